"""HubTrainer: a Trainer that says in one line what the Hub refuses, and saves no token."""

from pathlib import Path

from peft import PeftModel
from transformers import Trainer

from ..hub.credentials import UnsavedToken
from ..hub.files import hub_errors, prepare_repo
from ..occupied import ADAPTER, MODEL, check_repository


class HubTrainer(Trainer):
    """Trainer, with the errors of the Hub as what to do about them; its token is not saved with the arguments.

    Args:
        args, kwargs: those of the trainer that it goes in front of.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.args.hub_token is not None:
            self.args.hub_token = UnsavedToken(self.args.hub_token)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As the parent's; the branch `hub_revision` is made where it does not exist.

        Raises:
            FNSFTError: the repository holds something of another kind, or the Hub refuses it or cannot be reached; the
                message says what to do.
        """
        with self._hub_errors():
            if self.is_world_process_zero() and self.args.hub_model_id is not None:
                check_repository(
                    self.args.hub_model_id,
                    ADAPTER if isinstance(self.model, PeftModel) else MODEL,
                    branch=self.args.hub_revision,
                    token=self.args.hub_token,
                )
            super().init_hf_repo(*args, **kwargs)
            if self.hub_model_id is not None and self.args.hub_revision is not None:
                prepare_repo(self.hub_model_id, token=self.args.hub_token, branch=self.args.hub_revision)

    def push_to_hub(self, *args, **kwargs):
        """As the parent's.

        Raises:
            FNSFTError: the Hub refuses it or cannot be reached; the message says what to do.
        """
        with self._hub_errors():
            return super().push_to_hub(*args, **kwargs)

    def _hub_errors(self):
        repo = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        return hub_errors(repo, self.args.hub_revision, token=self.args.hub_token)

"""ProtectingTrainer: a Trainer of which what is protected is projected after every step, saved and resumed."""

from pathlib import Path

from .protection import Protection, check_unprotected
from .retained import RetainingTrainer


class ProtectingTrainer(RetainingTrainer):
    """Trainer with protection, which whoever makes it puts there and calls `hold` of. It goes in front of any other.

    Args:
        args, kwargs: those of the trainer that it goes in front of.
    """

    _protection: Protection | None = None

    @property
    def protection(self) -> Protection | None:
        """What is protected."""
        return self._protection

    def create_optimizer(self, *args, **kwargs):
        """As the parent's; what is protected is projected after every step."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._protection is not None:
            self._protection.attach(optimizer)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the parent's; a resumed run has the directions that it began with. What rounding has left along them is
        taken out at the end.

        Raises:
            FNSFTError: the checkpoint was written with other ones, or without any.
        """
        if self._protection is None:
            check_unprotected(resume_from_checkpoint, self.args.output_dir)
        else:
            self._protection.begin(resume_from_checkpoint, self.args.output_dir)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._protection is not None and self.state.global_step:
            self._protection.weights.settle()
        return result

    def _extend_card_with_protection(self) -> None:
        if self._protection is not None and self.is_world_process_zero():
            self._protection.extend_card(Path(self.args.output_dir))

    def _save_protection(self, directory: Path) -> None:
        if self._protection is not None and self.args.should_save:
            self._protection.save(directory)

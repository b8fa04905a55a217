"""Preparation: what SFTTrainer makes of rows, kept in a cache, with what it makes nothing of counted."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTConfig

from ..errors import FNSFTError
from .labels import check_labels, watch_labels
from .left_out import LeftOut
from .rendering import RENDER_ERRORS, refusal
from .tokenized import TokenizedCache, key_of, made_with, preparation_settings, rekeyed


@dataclass
class Preparation:
    """The preparation of one dataset.

    Attributes:
        make (`Callable`): SFTTrainer's preparation of rows by arguments and packed or not; `is_processed` if they
            have their tokens.
        args (`SFTConfig`): the arguments of the trainer.
        packing (`bool`): whether rows are packed.
        name (`str`): of the split.
        processing_class: the tokenizer or processor.
        chat_template (`str`, *optional*): one that takes the place of its own.
        completion_only_loss (`bool`): whether prompts are learnt.
        is_formatted (`bool`): whether a function of the user makes the text.
        cache (`TokenizedCache`, *optional*): where what is made is kept.
    """

    make: Callable[..., Dataset | IterableDataset]
    args: SFTConfig
    packing: bool
    name: str
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    chat_template: str | None
    completion_only_loss: bool
    is_formatted: bool
    cache: TokenizedCache | None

    def of(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """What is trained of a dataset.

        Raises:
            FNSFTError: none of its rows teaches anything, or the chat template refuses them all.
        """
        if isinstance(dataset, IterableDataset):
            return self._of_stream(dataset)
        settings = preparation_settings(self.args, self.packing)
        settings |= {"packing": self.packing, "completion_only_loss": self.completion_only_loss}
        settings["chat_template"] = self.chat_template
        made = made_with(self.processing_class, settings)
        key = key_of(dataset, made) if self._is_cached(dataset) else None
        prepared, refused = None if key is None else self.cache.read(key), 0
        if prepared is None:
            prepared, refused = self._made(rekeyed(dataset, made))
            is_kept = len(prepared) and not refused
            if key is not None and self.args.distributed_state.is_local_main_process and is_kept:
                self.cache.save(key, prepared)
        check_labels(
            prepared, len(dataset) - refused, self.name, max_length=self.args.max_length, packing=self._strategy
        )
        return prepared

    @property
    def _strategy(self) -> str | None:
        return self.args.packing_strategy if self.packing else None

    def _is_cached(self, dataset: Dataset) -> bool:
        return (
            self.cache is not None
            and not self.is_formatted
            and self.cache.takes(dataset, self.processing_class, self.chat_template)
        )

    def _made(self, rows: Dataset) -> tuple[Dataset, int]:
        """The rows, prepared, and how many of them the chat template refuses."""
        state = self.args.distributed_state
        if state.num_processes > 1:  # they wait for each other, and one that fails would leave the others waiting
            refused = gather_object(self._refused(rows, state.process_index, state.num_processes))
        else:
            try:
                return self.make(rows, self.args, self.packing), 0
            except RENDER_ERRORS:
                refused = self._refused(rows, 0, 1)
                if not refused:
                    raise
        left_out = LeftOut(f"the {self.name} data")
        for number, reason in sorted(refused):
            left_out.add(number, reason)
        left_out.check(len(rows))
        numbers = {number for number, _ in refused}
        if numbers:
            rows = rows.select([number for number in range(len(rows)) if number not in numbers])
        return self.make(rows, self.args, self.packing), len(numbers)

    def _refused(self, rows: Dataset, process: int, processes: int) -> list[tuple[int, str]]:
        """Of the rows that fall to a process, the numbers of those that cannot be rendered, and why."""
        if self.is_formatted or "input_ids" in rows.column_names:
            return []
        reasons = (
            (number, refusal(rows[number], self.processing_class, self.chat_template))
            for number in range(process, len(rows), processes)
        )
        return [(number, reason) for number, reason in reasons if reason is not None]

    def _of_stream(self, stream: IterableDataset) -> IterableDataset:
        whole = copy.copy(self.args)
        whole.max_length, whole.shuffle_dataset = None, False
        try:
            labelled = self.make(stream, whole, False)
            watched = watch_labels(labelled, self.name, self.args, self._strategy)
        except TemplateError as error:
            raise FNSFTError(f"the chat template refuses a row of the {self.name} data ({error})") from error
        return self.make(watched, self.args, self.packing, is_processed=True)

"""Loading a model by name, with errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..embedded import resolve_model
from ..errors import FNSFTError
from ..hub import explain


@contextmanager
def model_errors(name_or_path: str) -> Iterator[None]:
    """Say in one line that a model cannot be loaded, and what to give instead."""
    try:
        yield
    except FNSFTError:
        raise
    except (OSError, ValueError) as error:
        raise FNSFTError(
            f"the model {name_or_path!r} cannot be loaded ({_reason(error, name_or_path)}); give a directory with a "
            "causal language model and its tokenizer, a Hub id, or `embedded`"
        ) from error


def _reason(error: Exception, name: str) -> str:
    """What the Hub says, where transformers passes it on: a gated model, no right to read it."""
    cause = error.__cause__
    known = (
        None
        if cause is None or isinstance(cause, (EntryNotFoundError, RevisionNotFoundError))
        else explain(cause, name)
    )
    return known or str(error).strip().splitlines()[0]


def load_model_and_tokenizer(name_or_path: str, dtype: str = "float32"):
    """Load a causal language model and its tokenizer.

    Raises:
        FNSFTError: it is not found, or is not a causal language model.
    """
    path = resolve_model(name_or_path)
    with model_errors(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model, tokenizer

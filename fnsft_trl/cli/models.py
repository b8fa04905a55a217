"""Loading a model by name, with errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..embedded import resolve_model
from ..errors import FNSFTError


@contextmanager
def model_errors(name_or_path: str) -> Iterator[None]:
    """Say in one line that a model cannot be loaded, and what to give instead."""
    try:
        yield
    except FNSFTError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FNSFTError(
            f"the model {name_or_path!r} cannot be loaded ({reason}); give a directory with a causal language model "
            "and its tokenizer, a Hub id, or `embedded`"
        ) from error


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

"""What is needed of datasets beyond its public interface. Seen in datasets 5.2.0."""

from datasets import Dataset


__all__ = ["fingerprint"]


def fingerprint(dataset: Dataset) -> str:
    """What a dataset was made from and by, as a hash: the key of the library's cache, of which new ones are made.

    https://github.com/huggingface/datasets/blob/5.2.0/src/datasets/arrow_dataset.py
    """
    return dataset._fingerprint

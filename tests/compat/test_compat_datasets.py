"""The parts of datasets that have no public name are there, and do what is relied on."""

from datasets import Dataset

from fnsft_trl.compat import datasets as compat


def test_datasets_fingerprint_follows_what_a_dataset_was_made_by():
    data = Dataset.from_dict({"a": [1, 2]})
    assert compat.fingerprint(data.select([0])) == compat.fingerprint(data.select([0])) != compat.fingerprint(data)
    named = data.map(lambda row: row, new_fingerprint="0123456789abcdef")
    assert compat.fingerprint(named) == "0123456789abcdef"

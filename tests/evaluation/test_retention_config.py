import pytest

from fnsft_trl import FNSFTError, RetentionConfig


def test_a_source_without_a_name_gets_one_from_itself():
    given = ["wiki=a/b.jsonl", "~/texts/law.parquet", "allenai/c4", "embedded", "data/x=1.txt", "old=x=y"]
    assert RetentionConfig(retention_datasets=given).sources() == {
        "wiki": "a/b.jsonl",
        "law": "~/texts/law.parquet",
        "c4": "allenai/c4",
        "embedded": "embedded",
        "x-1": "data/x=1.txt",
        "old": "x=y",
    }


def test_the_metrics_are_those_of_every_series_and_the_task():
    assert RetentionConfig(retention_datasets=["a=x", "b=y"]).metrics() == [
        *("retention/a/rise", "retention/a/cross_entropy", "retention/a/kl"),
        *("retention/b/rise", "retention/b/cross_entropy", "retention/b/kl", "retention/task/kl"),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a RetentionConfig has no effect without retention_datasets"),
        ({"retention_budget": 0.05}, "retention_budget has no effect without retention_datasets"),
        ({"retention_tokens": 5}, "retention_tokens has no effect without retention_datasets"),
        ({"retention_datasets": ["a=x"], "retention_on_budget": "stop"}, "no effect without retention_budget"),
        ({"retention_datasets": ["a=x", "a=y"]}, "names 'a' twice"),
        ({"retention_datasets": ["x/a.txt", "y/a.txt"]}, "names 'a' twice"),
        ({"retention_datasets": ["task=x"]}, "task is the series of the prompts"),
        ({"retention_datasets": ["a="]}, "names no source"),
        ({"retention_datasets": ["=x"]}, "has no name"),
        ({"retention_datasets": [" "]}, "no name can be made of"),
        ({"retention_datasets": ["a=x"], "retention_tokens": 0}, "retention_tokens is 0"),
        ({"retention_datasets": ["a=x"], "retention_batch_size": 0}, "retention_batch_size is 0"),
        ({"retention_datasets": ["a=x"], "retention_budget": -0.1}, "retention_budget is -0.1"),
        (
            {"retention_datasets": ["a=x"], "retention_budget": 0.1, "retention_on_budget": "pause"},
            "rollback, stop, warn",
        ),
    ],
)
def test_a_bad_config_is_one_line(given, message):
    with pytest.raises(FNSFTError, match=message) as error:
        RetentionConfig(**given)
    assert "\n" not in str(error.value)

"""Model cards of what was trained: free of local paths, and of a model that an adapter was merged into."""

import re
from pathlib import PurePath
from typing import Any

import yaml

from .names import is_source_name


TAGS = ["fnsft", "functional-networks", "independent-component-analysis", "interpretability"]
SECTION = "## Functional networks"  # heading of what a trained model's card says of them
ADAPTER_NOTE = (
    "The adapter is of a PEFT method of its own: `import fnsft_trl.tuner` before `PeftModel.from_pretrained`."
)


def publishable_card(card: str) -> str:
    """A trained model's README without local paths in its metadata, for which the Hub would refuse it."""
    metadata, body = _split(card)
    public = _without_paths(metadata)
    return card if public == metadata else _front(public) + body


def merged_card(base_model: str, adapter_card: str | None) -> str:
    """The README of a model that an adapter was merged into.

    Args:
        base_model: the model, as the adapter names it.
        adapter_card: the README of the adapter, whose metadata and section on networks go along, where there is one.
    """
    known, body = _split(adapter_card or "")
    known = _without_paths(known)
    kept = ("base_model", "datasets", "license", "language")
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata |= {key: known[key] for key in kept if key in known}
    tags = (tag for tag in known.get("tags", []) if not tag.startswith(("base_model:adapter:", "peft", "lora")))
    metadata["tags"] = sorted({*TAGS[:2], *tags})
    section = body[body.find(SECTION) :] if SECTION in body else ""
    paragraphs = [part.strip() for part in section.split("\n\n") if part.strip() not in ("", ADAPTER_NOTE)]
    name = PurePath(base_model).name if _is_path(base_model) else base_model
    told = "`fnsft_trl` merged a trained adapter into its weights: an ordinary checkpoint, which needs no adapter."
    return (
        "\n\n".join(
            [
                _front(metadata).strip(),
                f"# {PurePath(name).name}, fine-tuned",
                f"`{name}`, fine-tuned. {told}",
                *paragraphs,
            ]
        )
        + "\n"
    )


def _split(card: str) -> tuple[dict[str, Any], str]:
    """The metadata of a card and what follows them."""
    front, body = re.fullmatch(r"(?:---\n(.*?)---\n)?(.*)", card, flags=re.DOTALL).groups()
    return yaml.safe_load(front or "") or {}, body


def _without_paths(metadata: dict[str, Any]) -> dict[str, Any]:
    public = {key: value for key, value in metadata.items() if not _is_path(value)}
    if "tags" in public:
        public["tags"] = [tag for tag in public["tags"] if not _is_path(tag.rpartition(":")[2])]
    return public


def _front(metadata: dict[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)}---\n"


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and not is_source_name(value)

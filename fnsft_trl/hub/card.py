"""Model cards of what was trained: free of local paths, and of a model that an adapter was merged into."""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ..errors import FNSFTError
from .names import is_source_name, one_line


if TYPE_CHECKING:
    from huggingface_hub import RepoCard


TAGS = ["fnsft", "functional-networks", "independent-component-analysis", "interpretability"]
SECTION = "## Functional networks"  # heading of what a trained model's card says of them
MASK_NOTE = "The mask is not part of these weights."
ADAPTER_NOTE = (
    "The adapter is of a PEFT method of its own. Run `import fnsft_trl.tuner` before you load it, by `pipeline` or "
    "`PeftModel.from_pretrained`."
)


def card_text(metadata: dict[str, Any], body: str) -> str:
    """A README with the Hub's metadata on top, of which the order is always the same.

    Args:
        metadata: arguments of `huggingface_hub.ModelCardData`.
        body: what follows.
    """
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{body}"


# What could begin Markdown or HTML in the middle of a line, and what makes a link of an address.
_MARKUP = re.compile(r"[^\w ,;()+/%='.:-]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", flags=re.IGNORECASE)


def plain(text: str) -> str:
    """Text of somebody else as a card shows it, letter by letter on one line: nothing of it is Markdown or HTML."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(text))


def with_section(card: str, section: str) -> str:
    """A README with a section: in the place of the one with the same heading, or at its end.

    Args:
        card: the README.
        section: begins with its heading, `## ...`.
    """
    section = section.strip() + "\n"
    old = _section(section.partition("\n")[0])
    if old.search(card):
        return old.sub(lambda found: section + "\n" * (found.end() < len(card)), card, count=1)
    return f"{card.rstrip()}\n\n{section}"


def without_section(card: str, heading: str) -> str:
    """A README without the section that has a heading, `## ...`."""
    return _section(heading).sub("", card, count=1).rstrip() + "\n"


def _section(heading: str) -> re.Pattern:
    """A section of a README, up to the next one."""
    return re.compile(rf"^{re.escape(heading)}$.*?(?=^##? |\Z)", flags=re.MULTILINE | re.DOTALL)


def publishable_card(card: str) -> str:
    """A trained model's README without local paths in its metadata, for which the Hub would refuse it.

    Raises:
        FNSFTError: its metadata cannot be read.
    """
    from huggingface_hub import CardData

    found = _read(card)
    metadata = found.data.to_dict()
    public = _without_paths(metadata)
    if public == metadata:
        return card
    found.data = CardData(**public)
    return str(found)


def named_card(card: str, name: str, base_model: str) -> str:
    """A card of TRL with names in the places where it has none, because a model was not loaded from the Hub.

    Args:
        card: the README.
        name: of the trained model.
        base_model: that it was trained from.
    """
    card = card.replace("[None](https://huggingface.co/None)", plain(base_model))
    card = card.replace("# Model Card for None\n", f"# Model Card for {plain(name)}\n")
    return card.replace('model="None"', f"model={json.dumps(name)}")


def merged_card(base_model: str, adapter_card: str | None, *, pipeline: str | None = "text-generation") -> str:
    """The README of a model that an adapter was merged into.

    Args:
        base_model: the model, as the adapter names it.
        adapter_card: the README of the adapter, whose metadata and section on networks go along, where there is one.
        pipeline: what the Hub calls the model's task.

    Raises:
        FNSFTError: the metadata of that README cannot be read.
    """
    found = _read(adapter_card or "")
    known = _without_paths(found.data.to_dict())
    kept = ("base_model", "datasets", "license", "language")
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": pipeline}
    metadata |= {key: known[key] for key in kept if key in known}
    tags = (tag for tag in known.get("tags", []) if not tag.startswith(("base_model:adapter:", "peft", "lora")))
    metadata["tags"] = sorted({*TAGS[:2], *tags})
    section = found.text[found.text.find(SECTION) :] if SECTION in found.text else ""
    paragraphs = [part.strip() for part in section.split("\n\n") if part.strip() not in ("", ADAPTER_NOTE)]
    name = PurePath(base_model).name if _is_path(base_model) else base_model
    told = "`fnsft_trl` merged a trained adapter into its weights: an ordinary checkpoint, which needs no adapter."
    lead = [f"\n# {plain(PurePath(name).name)}, fine-tuned", f"{plain(name)}, fine-tuned. {told}"]
    return card_text(metadata, "\n\n".join([*lead, *paragraphs]) + "\n")


def _read(card: str) -> RepoCard:
    import yaml
    from huggingface_hub import RepoCard

    if not card.lstrip().startswith("---"):
        card = f"---\n\n---\n{card}"  # RepoCard warns of a card without metadata
    try:
        return RepoCard(card)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise FNSFTError(
            f"the metadata on top of a model card cannot be read ({told}); correct its README.md"
        ) from error


def _without_paths(metadata: dict[str, Any]) -> dict[str, Any]:
    public = {key: value for key, value in metadata.items() if not _is_path(value)}
    if "tags" in public:
        public["tags"] = [tag for tag in public["tags"] if not _is_path(tag.rpartition(":")[2])]
    return public


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and not is_source_name(value)

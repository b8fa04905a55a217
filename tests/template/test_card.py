"""Cards of trained and of merged models; those of templates are tested where they are pushed."""

from dataclasses import replace

import yaml

from fnsft_trl.hub.card import ADAPTER_NOTE, SECTION, merged_card, publishable_card
from fnsft_trl.template.card import template_card
from fnsft_trl.template.description import TemplateDescription


def card(text: str, **metadata) -> str:
    return f"---\n{yaml.safe_dump(metadata)}---\n{text}"


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_is_published_without_local_paths():
    local = card(
        "# A", base_model="/home/me/model", library_name="peft", tags=["base_model:adapter:/home/me/model", "x"]
    )
    public = publishable_card(local)
    assert metadata(public) == {"library_name": "peft", "tags": ["x"]}
    assert public.endswith("---\n# A")
    of_the_hub = card("# A", base_model="org/model", tags=["base_model:adapter:org/model"])
    assert publishable_card(of_the_hub) == of_the_hub
    assert publishable_card("# no metadata") == "# no metadata"


def test_the_card_of_a_merged_model_says_what_the_adapter_s_said():
    told = f"# Adapter\n\nBy PEFT.\n\n{SECTION}\n\n2 neurons could change.\n\nA lesion.\n\n{ADAPTER_NOTE}\n"
    merged = merged_card("org/model", card(told, base_model="org/model", license="mit", tags=["peft", "trl"]))
    assert metadata(merged) == {
        "base_model": "org/model",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["fnsft", "functional-networks", "trl"],
    }
    assert merged.endswith(f"{SECTION}\n\n2 neurons could change.\n\nA lesion.\n")
    assert "By PEFT" not in merged


def test_a_merged_model_has_a_card_even_where_its_adapter_has_none():
    merged = merged_card("/home/me/base", None)
    assert "# base, fine-tuned" in merged
    assert "/home" not in merged
    assert "base_model" not in metadata(merged)


def test_a_template_of_several_datasets_says_where_its_networks_recur(templates):
    description = TemplateDescription.of(templates["llama"], "0" * 64)
    assert "in each dataset alone" not in template_card(description)
    found = {"component": 0, "correlation": 0.9}
    recurrence = {"a|b.txt": {**found, "iou": 0.5, "recurs": True}, "c.txt": {**found, "iou": 0.1, "recurs": False}}
    components = tuple(replace(component, recurrence=recurrence) for component in description.components)
    text = template_card(replace(description, components=components))
    table = text.split("counts as the same:\n\n")[1].split("\n\n## How to use it")[0].splitlines()
    rows = [f"| {number} | 0.50 (recurs) | 0.10 |" for number in range(3)]
    assert table == [r"| network | a\|b.txt | c.txt |", "|---|---|---|", *rows]

"""Cards of trained and of merged models; those of templates are tested where they are pushed."""

import ast
import html
import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fnsft_trl import FNSFTError
from fnsft_trl.hub.card import (
    ADAPTER_NOTE,
    SECTION,
    TAGS,
    merged_card,
    plain,
    publishable_card,
    with_section,
    without_section,
)
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


def test_metadata_end_where_the_hub_ends_them_and_keep_their_order():
    """Indented dashes end nothing, and line breaks of another system stay."""
    front = "widget:\n- text: |\n    a\n    ---\n    b\nbase_model: /home/me/model\nlicense: mit\n"
    local = f"---\n{front}---\n# A\n\n---\nb\n"
    for text in (local, local.replace("\n", "\r\n")):
        public = ModelCard(publishable_card(text))
        assert public.text.replace("\r\n", "\n") == "# A\n\n---\nb\n"
        assert public.data.get("base_model") is None
        assert public.data.license == "mit"
        assert public.data.widget[0]["text"].split() == ["a", "---", "b"]
        assert str(public).index("widget") < str(public).index("license")
        assert str(public).count("\r") == (0 if text == local else str(public).count("\n"))
    assert metadata(merged_card("org/model", local))["license"] == "mit"


@pytest.mark.parametrize("base", ["org/model", "/home/me/model"])
def test_the_code_of_a_card_loads_what_it_uses_and_its_table_says_how_networks_were_found(templates, base):
    description = TemplateDescription.of(templates["llama"], "0" * 64)
    found = replace(description, base_model=base, settings=description.settings | {"ica_backend": "sklearn"})
    text = template_card(found)
    code = ast.parse(text.split("```python\n")[1].split("```")[0])
    loads = [name for name in ast.walk(code) if isinstance(name, ast.Name)]
    made = {name.id for name in loads if isinstance(name.ctx, ast.Store)}
    imported = {alias.name for line in ast.walk(code) if isinstance(line, ast.ImportFrom) for alias in line.names}
    assert {name.id for name in loads} <= made | imported
    assert (
        f'AutoModelForCausalLM.from_pretrained("{base if base == "org/model" else "path of the base model"}")' in text
    )
    assert "FastICA of scikit-learn" in text
    assert "FastICA (" in template_card(description)


@pytest.mark.parametrize("front", ["a: [", "- a", "1: a", "a: b: c"])
def test_metadata_that_cannot_be_read_are_one_line(front):
    for read in (publishable_card, lambda card: merged_card("org/model", card)):
        with pytest.raises(FNSFTError, match="metadata on top of a model card cannot be read") as refused:
            read(f"---\n{front}\n---\n# A")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["no", "null", "1:4", "007", "a: b", "- a", "---", "x\n---\nbase_model: other", "#"])
def test_no_value_becomes_metadata_of_another_kind(templates, value):
    text = template_card(replace(TemplateDescription.of(templates["llama"], "0" * 64), license=value))
    data = ModelCard(text).data
    assert data.license == value
    assert data.base_model is None
    assert (data.library_name, data.tags) == ("fnsft_trl", TAGS)


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
    assert table == ["| network | a&#124;b.txt | c.txt |", "|---|---|---|", *rows]


INJECTIONS = [
    "<img src=x onerror=alert(1)>",
    "wiki. **Endorsed by Meta**, [download the fixed weights](https://evil.example/x)",
    "x | y <script>alert(3)</script>",
    "a\n\n## Another section\n\n- a list",
    "`` ` `code` ``` and ~~~",
    "![picture](https://evil.example/x.png) <https://evil.example> https://evil.example www.evil.example",
    "&lt;b&gt; &#60;i&#62; \\<u\\> _all_ __of__ *it* ~~so~~ a_b_c",
    '[one]: https://evil.example "title"',
    "$x^2$ @somebody #1 {{ jinja }} {% raw %}",
]
RENDERED = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


@given(st.text(max_size=60) | st.text(alphabet="<>[]()!`*_~|&#;\\\n a1.:/w-", max_size=40))
@example("".join(INJECTIONS))
def test_text_of_others_is_shown_letter_by_letter(text):
    """In a paragraph and in a table: what Markdown makes of it is that text, on one line, without a tag."""
    shown = plain(text)
    assert html.unescape(shown) == "".join(c if c.isprintable() else " " for c in text).strip()
    page = RENDERED.render(f"Found on {shown}, no less.\n\n| a | b |\n|---|---|\n| x | {shown} |\n")
    tags = re.findall(r"</?(\w+)", page)
    assert set(tags) <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
    assert (tags.count("td"), tags.count("p")) == (4, 2)
    expected = " ".join(html.unescape(shown).split())
    assert expected in " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


@pytest.mark.parametrize("text", INJECTIONS)
def test_addresses_are_no_links_on_the_hub(text):
    """Which makes links of bare addresses too."""
    assert "://" not in plain(text)
    assert "www." not in plain(text)


@pytest.mark.parametrize("text", INJECTIONS)
def test_a_template_says_nothing_in_markdown_of_its_own(templates, text):
    """All of `config.json` that is text of somebody: sources, revision, settings, versions, recurrence."""
    name = " ".join(text.split())
    description = TemplateDescription.of(templates["llama"], "0" * 64)
    found = {name: {"component": 0, "correlation": 0.9, "iou": 0.5, "recurs": True}}
    settings = {**description.settings, "ica_variant": name, "ica_contrast": name, "ica_rank": name}
    hostile = replace(
        description,
        revision=name,
        fnsft_trl_version=name,
        settings=settings,
        calibration=replace(description.calibration, sources=[name]),
        components=tuple(replace(each, recurrence=found) for each in description.components),
    )
    page = template_card(hostile, name=name)
    assert name not in page
    tags = set(re.findall(r"<(\w+)", RENDERED.render(page.split("---\n", 2)[2])))
    usual = set(re.findall(r"<(\w+)", RENDERED.render(template_card(description).split("---\n", 2)[2])))
    assert tags <= usual


def test_a_section_is_put_in_the_place_of_the_one_before():
    section = "## Results\n\ntwo\n"
    assert with_section("# A\n\ntext\n", section) == "# A\n\ntext\n\n## Results\n\ntwo\n"
    old = "# A\n\n## Results\n\none\n### more\n\n## Results of others\n\nthree\n"
    new = with_section(old, section)
    assert new == "# A\n\n## Results\n\ntwo\n\n## Results of others\n\nthree\n"
    assert with_section(new, section) == new
    assert with_section("# A\n\n## Results\n\none", section) == "# A\n\n## Results\n\ntwo\n"
    assert without_section(new, "## Results") == "# A\n\n## Results of others\n\nthree\n"
    assert without_section("# A\n\n## Results\n\none", "## Results") == "# A\n"
    assert without_section("# A\n", "## Results") == "# A\n"

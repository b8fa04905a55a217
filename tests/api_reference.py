"""docs/api/, a page for each package, made from the docstrings of the public names.

python tests/api_reference.py
"""

import inspect
import re
from pathlib import Path
from textwrap import dedent

import fnsft_trl


SECTIONS = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$", flags=re.MULTILINE)
ITEM = re.compile(r"^(?=\S)", flags=re.MULTILINE)


API = Path(__file__).parent.parent / "docs" / "api"


def api_pages() -> dict[str, str]:
    """File name -> page, the packages in the order in which data passes through them, and the index."""
    homes: dict[str, list[str]] = {}
    for name, home in fnsft_trl._HOMES.items():
        homes.setdefault(home, []).append(name)
    lines = [
        "# API reference\n",
        "Made from the docstrings. Everything here is imported from `fnsft_trl`. `fnsft VERB --help` documents the",
        "command line.\n",
        "| page | names |",
        "|---|---|",
    ]
    pages = {}
    for home, names in homes.items():
        links = ", ".join(f"[`{name}`]({home}.md#{name.lower()})" for name in names)
        lines.append(f"| [{home}]({home}.md) | {links} |")
        pages[f"{home}.md"] = "\n".join([f"# API: {home}\n", *(_entry(name) for name in names)])
    return pages | {"index.md": "\n".join(lines) + "\n"}


def _entry(name: str) -> str:
    thing = getattr(fnsft_trl, name)
    parts = [f"## `{name}`\n", f"```text\n{name}{_signature(thing)}\n```\n", _markdown(thing.__doc__)]
    if inspect.isclass(thing):
        for member, value in _members(thing).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if member.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
                continue
            call = "" if isinstance(value, property) else _signature(getattr(thing, member))
            parts += [f"### `{name}.{member}`\n", f"```text\n{member}{call}\n```\n", _markdown(function.__doc__)]
    return "\n".join(parts)


def _members(thing: type) -> dict:
    """What a class has, and what it has from others of the package, the last ones first."""
    found: dict = {}
    for base in (base for base in thing.__mro__ if base.__module__.startswith("fnsft_trl.")):
        found |= {member: value for member, value in vars(base).items() if member not in found}
    return found


def _signature(thing) -> str:
    """The call, one argument a line where it is long; types are in the text below it."""
    if isinstance(thing, type) and issubclass(thing, Exception):
        return "(message)"
    parameters = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in inspect.signature(thing).parameters.values()
        if p.name != "self"
    ]
    words = [re.sub(r"<factory>|<dataclasses.*?>|<function .* at 0x\w+>", "...", str(p)) for p in parameters]
    words = [re.sub(r"(?<=frozenset\(\{).*?(?=\}\))", _in_order, word) for word in words]
    names = [p.name for p in parameters]
    first = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if first is not None and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        words.insert(first, "*")
    line = f"({', '.join(words)})"
    return line if len(line) + len(names) < 100 else "(\n    " + ",\n    ".join(words) + ",\n)"


def _in_order(members: re.Match) -> str:
    """The members of a set, which Python writes in another order each time."""
    return ", ".join(sorted(members[0].split(", ")))


def _markdown(docstring: str) -> str:
    """Google's sections as bullet lists, references as links."""
    text, *sections = SECTIONS.split(inspect.cleandoc(docstring))
    lines = [text.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body, after = re.match(r"((?:\n|[ ]+.*\n)*)((?:.|\n)*)", body.lstrip("\n") + "\n").groups()
        body = dedent(body).strip("\n")
        if title in ("Returns", "Example"):
            lines.append(f"**{title}**\n\n{body if title == 'Example' else ' '.join(body.split())}")
        else:
            items = [" ".join(item.split()) for item in ITEM.split(body) if item.strip()]
            lines.append(f"**{title}**\n\n" + "\n".join(f"- {_named(item)}" for item in items))
        if after.strip():
            lines.append(after.strip())
    return _linked("\n\n".join(lines)).replace("```python", "```pycon") + "\n"


def _named(item: str) -> str:
    """`name: text` with the name as code."""
    name, colon, text = item.partition(":")
    bare = re.fullmatch(r"[\w*, ]+", name)
    return f"`{name}`:{text}" if colon and bare else re.sub(r"^(\*?\w+) \(", r"`\1` (", item)


def _linked(text: str) -> str:
    def link(match: re.Match) -> str:
        name = match[1].lstrip("~").rpartition(".")[2] if match[1].startswith("~") else match[1]
        home = name.partition(".")[0]
        anchor = name.replace(".", "").lower()
        page = fnsft_trl._HOMES.get(home)
        return f"[`{name}`]({page}.md#{anchor})" if page else f"`{name}`"

    return re.sub(r"\[`([~\w.]+)`\]", link, text)


if __name__ == "__main__":
    API.mkdir(exist_ok=True)
    for old in API.glob("*.md"):
        old.unlink()
    for file, page in api_pages().items():
        (API / file).write_text(page, encoding="utf-8")

"""fnsft recipes: list and copy the recipes that the package brings. Needs no torch."""

import difflib
from pathlib import Path

from ..errors import FNSFTError
from ..writing import disk_errors, files_written_whole
from .options.arguments import read_arguments
from .options.schema import Option, row


ABOUT = (
    "List the recipes that this package brings, or copy some. The data that a recipe names is copied with it, and "
    "its paths are adapted."
)

_DATA = "data"  # the folder of what recipes read


def options() -> list[Option]:
    """The options of the verb."""
    return [
        row("names", "Recipes or folders to copy; `all` copies all.", many=True, positional=True, metavar="NAME"),
        row("output_dir", "Folder to copy them to, made if it does not exist.", "recipes", metavar="DIR"),
    ]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    source = recipes_folder()
    known = _recipes(source)
    if not args.names:
        if "output_dir" in args.given:
            raise FNSFTError("output_dir without a recipe to copy; name some, or `all`")
        width = max(map(len, known))
        for name, about in known.items():
            print(f"{name:<{width}}  {about}")
        print("\n`fnsft recipes NAME...` copies recipes, `fnsft recipes all` all of them.")
        return
    for path in _copy(_with_tasks(_chosen(args.names, known), source), source, Path(args.output_dir)):
        print(path)


def _copy(names: list[str], source: Path, target: Path) -> list[Path]:
    """Copy recipes and the data that they name.

    Returns:
        The recipes.

    Raises:
        FNSFTError: another file lies where one of them goes, or the disk does not take them.
    """
    prefix = f"{target.as_posix().rstrip('/')}/"
    texts = {name: (source / name).read_text(encoding="utf-8").replace("recipes/", prefix) for name in names}
    for path in sorted((source / _DATA).iterdir()):
        if any(path.name in text for text in texts.values()):
            texts[f"{_DATA}/{path.name}"] = path.read_text(encoding="utf-8")
    for name, text in texts.items():
        place = target / name
        if place.exists() and (place.is_dir() or place.read_text(encoding="utf-8") != text):
            raise FNSFTError(f"{place} exists already, with other content; choose another output_dir, or move it away")
    with disk_errors(target), files_written_whole(target) as scratch:
        for name, text in texts.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_text(text, encoding="utf-8")
    return [target / name for name in names]


def _with_tasks(names: list[str], folder: Path) -> list[str]:
    """Recipes, and the files of tasks that those of `fnsft continual` name."""
    found = dict.fromkeys(names)
    for name in names:
        text = (folder / name).read_text(encoding="utf-8")
        beside = sorted((folder / name).parent.glob("tasks/*.yaml"))
        found |= {path.relative_to(folder).as_posix(): None for path in beside if f"tasks/{path.name}" in text}
    return list(found)


def recipes_folder() -> Path:
    """Where the recipes lie: in the package once it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())


def _recipes(folder: Path) -> dict[str, str]:
    """Name -> what it does in one line: the first sentence below the command at its head."""
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        head = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            head.append(line.removeprefix("#").strip())
        told = " ".join(head[1:] if head[0].startswith(("fnsft ", "accelerate ")) else head).strip()
        found[path.relative_to(folder).as_posix()] = f"{told.partition('. ')[0].rstrip('.')}."
    return found


def _chosen(names: list[str], known: dict[str, str]) -> list[str]:
    """The recipes that are meant, by their names, without the ending, or by a folder.

    Raises:
        FNSFTError: there is none of a name.
    """
    if names == ["all"]:
        return list(known)
    chosen: dict[str, None] = {}
    for name in names:
        name = name.strip("/")
        found = [each for each in known if name in (each, each.removesuffix(".yaml"))]
        found = found or [each for each in known if each.startswith(f"{name}/")]
        if not found:
            near = difflib.get_close_matches(name, [each.removesuffix(".yaml") for each in known], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; `fnsft recipes` lists them"
            raise FNSFTError(f"there is no recipe {name!r}{hint}")
        chosen |= dict.fromkeys(found)
    return list(chosen)

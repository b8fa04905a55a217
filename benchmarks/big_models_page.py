"""What big models cost, as the tables of docs/discovery.md: of one block each on a CPU, and of whole models on a card.

    python benchmarks/big_models_page.py --write

They are made of results/big_models.json and results/whole_models.json, of those that are there.
"""

import argparse
import json
from pathlib import Path


RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "discovery.md"
BLOCKS, WHOLE = "big_models.json", "whole_models.json"
START, END = "<!-- big models -->", "<!-- end of big models -->"
ARMS = {"lora": "LoRA r16 on the MLPs", "delta 10%": "neuron deltas, 10%", "full": "full fine-tuning"}


def markdown(results: Path = RESULTS) -> str:
    """The tables of a folder of results; empty where there are none."""
    made = {BLOCKS: _of_blocks, WHOLE: _of_whole_models}
    return "\n\n".join(
        make(json.loads((results / name).read_text())) for name, make in made.items() if (results / name).exists()
    )


def page(text: str, tables: str) -> str:
    """The text of a page with other tables."""
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n\n{tables}\n\n{END}{after}" if tables else f"{before}{START}\n{END}{after}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    """Three digits; nothing where nothing was measured."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def _of_blocks(found: dict) -> str:
    """Minutes of one core and GiB, computed from one block of each shape."""
    machine, shapes = found["machine"], found["shapes"]
    rows = []
    for name, part in shapes.items():
        values = part["computed"]
        cells = [f"{100 * part['measured']['sketch_share']:.1f}%"]
        for work in ("discovery", "lora", "delta"):
            cells += [_number(values[f"{work}_core_minutes"]), _number(values[f"{work}_gib"])]
        rows.append([name, *cells])
    header = ["one core", "sketch, share of the forward pass"]
    header += [
        f"{work}: {unit}" for work in ("discovery", "LoRA step", "10% deltas step") for unit in ("minutes", "GiB")
    ]
    return (
        f"Computed from one block of each shape, measured in float32 on one CPU thread (torch {machine['torch']}). "
        "Embeddings, head and the ICA at the end are left out. Weights count in bfloat16. A step has 1,024 tokens.\n\n"
        + _table(header, rows)
    )


def _of_whole_models(found: dict) -> str:
    """Seconds, milliseconds and GiB of whole models on one card."""
    shapes, machine = found["shapes"], found["machine"]
    parts = [_discoveries(machine, shapes), _steps(shapes), _masked(shapes)]
    return "\n\n".join(part for part in parts if part)


def _discoveries(machine: dict, shapes: dict) -> str:
    names = ("forward", "reading", "sketch", "ica", "null", "whole")
    rows = []
    for shape, parts in shapes.items():
        if one := parts.get("discovery"):
            seconds = [_number(one["seconds"][name]) for name in names]
            rows.append(
                [shape, f"{one['tokens']:,}", *seconds, _number(one["over_forward"]), _number(one["peak_gib"])]
            )
    if not rows:
        return ""
    header = ["discovery", "tokens", "forward pass alone, s", "with activations read, s", "sketch, s", "ICA, s"]
    header += ["null, s", "whole, s", "over the forward pass", "GiB"]
    return (
        f"Measured on whole models with random weights in bfloat16, on one {machine['device']} "
        f"(torch {machine['torch']}, CUDA {machine['cuda']}), by the clock. Random tokens have no "
        f"networks, so FastICA went on to its last iteration:\n\n{_table(header, rows)}"
    )


def _steps(shapes: dict) -> str:
    rows = []
    for shape, parts in shapes.items():
        for size in (part for name, part in parts.items() if name.startswith("training")):
            for name, title in ARMS.items():
                plain, held = (size["arms"].get(key, {}) for key in (name, f"{name} protected"))
                if plain or held:
                    cells = [plain.get("milliseconds"), plain.get("over_lora"), plain.get("peak_gib")]
                    cells += [held.get("over_plain"), held.get("peak_gib")]
                    rows.append([f"{shape}, {title}", f"{size['tokens']:,}", *map(_number, cells)])
    if not rows:
        return ""
    return _table(["step", "tokens", "ms", "over LoRA", "GiB", "protected, over plain", "protected, GiB"], rows)


def _masked(shapes: dict) -> str:
    ratios = {shape: parts["masked"]["over_plain"] for shape, parts in shapes.items() if "masked" in parts}
    if not ratios:
        return ""
    found = ", ".join(f"{_number(ratio)} ({shape})" for shape, ratio in ratios.items())
    return f"A forward pass with 2% of the neurons silenced, over a plain one: {found}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into the page")
    tables = markdown()
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(), tables))
    print(tables)


if __name__ == "__main__":
    main()

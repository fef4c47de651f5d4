"""Runs the benchmarks that stand for our goals; writes docs/figures.json and the table of them.

`make figures` measures what a CPU can; `make figures-gpu` what needs CUDA. The rows of the other
kind are kept as they were last measured. With `--check` nothing is written: it ends with 1 where a
goal is missed by more than the spread.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.benchmarks.figure import Figure

OUTPUT = Path(__file__).parents[2] / "docs" / "figures.json"
PAGE = OUTPUT.with_name("benchmarks.md")
BEGIN, END = "<!-- figures.json as a table -->\n", "<!-- end of the table -->\n"
CPU_MODULES = [
    "alignment_measures",
    "decoding",
    "captions",
    "demo",
    "epoch",
    "extraction",
    "extraction_memory",
    "explore",
    "finished",
    "formats",
    "head",
    "indexing",
    "joining",
    "knn",
    "loader",
    "loss",
    "memory",
    "retrieval",
    "scaling",
    "step",
    "writer",
]
GPU_MODULES = ["gpu"]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="measure what needs a CUDA device")
    parser.add_argument("--only", choices=CPU_MODULES + GPU_MODULES, help="measure one module")
    parser.add_argument("--group", help="of `gpu`: encoder, step, loss, text or extraction")
    parser.add_argument("--check", action="store_true", help="compare with the goals instead")
    arguments = parser.parse_args()
    modules = GPU_MODULES if arguments.gpu else CPU_MODULES
    if arguments.only:
        modules = [arguments.only]
    measured = list[Figure]()
    for name, measure in _work(modules, arguments.group):
        print(f"measuring {name} ...", flush=True)
        figures = measure()
        measured += figures
        if not arguments.check:
            record(figures)
    if arguments.check:
        print(table([figure.as_dict() for figure in measured]))
        sys.exit(any(figure.is_far_from_goal for figure in measured))
    print(table(json.loads(OUTPUT.read_text(encoding="utf-8"))))


def _work(
    modules: Sequence[str], group: str | None
) -> Iterator[tuple[str, Callable[[], list[Figure]]]]:
    """Yield what is measured and recorded together: a module, or a group of one for GPUs."""
    for name in modules:
        module = importlib.import_module(f"tests.benchmarks.{name}")
        if name not in GPU_MODULES:
            yield name, module.measure
            continue
        module.check_device()
        for each, measure in module.GROUPS.items():
            if group in (None, each):
                yield f"{name}: {each}", measure


def record(figures: Sequence[Figure]) -> None:
    """Put figures in the place of those of their names, in the JSON and on the page."""
    kept = json.loads(OUTPUT.read_text(encoding="utf-8")) if OUTPUT.is_file() else []
    rows = {row["figure"]: row for row in kept}
    rows |= {figure.figure: figure.as_dict() for figure in figures}
    text = json.dumps(list(rows.values()), indent=2, ensure_ascii=False) + "\n"
    OUTPUT.write_text(text, encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page = f"{before}{BEGIN}{table(list(rows.values()))}\n{END}{after}"
    PAGE.write_text(page, encoding="utf-8")


def table(rows: list[dict[str, object]]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| figure | value | goal | ok | n | spread | machine | date |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        sign = "≥" if row["direction"] == "min" else "≤"
        goal = "–" if row["goal"] is None else f"{sign} {row['goal']}"
        lines.append(
            f"| {row['figure']} | {row['value']} {row['unit']} | {goal} | "
            f"{'yes' if row['ok'] else 'no'} | {row['n']} | {row['spread']} | {row['machine']} | "
            f"{row['date']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

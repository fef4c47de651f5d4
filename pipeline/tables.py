"""Tables for the terminal, made of the plain data that `--json` prints."""

from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH_OF_A_PIPE = 160


def store_table(description: dict[str, Any]) -> str:
    """Return what `sail inspect STORE` prints."""
    table = Table(title=description["path"], title_justify="left")
    for heading in (
        "column",
        "shape",
        "status",
        "norm min / mean / max",
        "size",
        "model",
        "pooling",
    ):
        table.add_column(heading, overflow="fold")
    for name, column in description["columns"].items():
        norms = column["norms"]
        table.add_row(
            name,
            " × ".join(map(str, column["shape"])),
            "\n".join(f"{count} {status}" for status, count in column["status"].items()),
            " / ".join(f"{norms[key]:g}" for key in ("min", "mean", "max")) if norms else "-",
            byte_size(column["bytes"]),
            str(column["model"]),
            str(column["pooling"]),
        )
    lines = [
        f"{description['rows']} rows in chunks of {description['rows_per_chunk']}; caption fields: "
        f"{', '.join(description['caption_fields']) or 'none'}; {description['classes']} classes"
    ]
    for name, column in description["columns"].items():
        told = [what for what in ("licence", "supervision") if column[what]]
        lines += [f"{name}: {what}: {column[what]}" for what in told]
    return "\n".join([_rendered(table), *lines])


def row_table(description: dict[str, Any]) -> str:
    """Return what `sail inspect STORE --row N` prints."""
    table = Table(show_header=False, title=f"row {description['row']}", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("key", description["key"])
    for field, caption in description["captions"].items():
        table.add_row(f"caption/{field}", caption)
    for what in ("label", "class", "group"):
        if description[what] is not None:
            table.add_row(what, str(description[what]))
    for name, column in description["columns"].items():
        table.add_row(name, f"{column['status']}; norm {column['norm']}; {column['first']} …")
    return _rendered(table)


def byte_size(count: int) -> str:
    """Return a number of bytes in words: `8.4 MB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _rendered(table: Table) -> str:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_A_PIPE)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")

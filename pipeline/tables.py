"""Tables for the terminal, made of the plain data that `--json` prints."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from features.encoders.plan import shown
from features.terminal import harmless

WIDTH_OF_A_PIPE = 160


class _Harmless(Console):
    """Shows strings, as captions and keys, so that they steer nothing."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(harmless(text, lines=True), **options)


def rendered(table: RenderableType) -> str:
    """Return a table, or coloured text, as wide as the terminal, or for a pipe 160 columns.

    Brackets, colons and control characters in its strings are no markup: they may be of captions
    and keys.
    """
    width = None if Console().is_terminal else WIDTH_OF_A_PIPE
    console = _Harmless(width=width, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def words(*headings: str) -> list[Column]:
    """Return columns of text, which is folded where it is too long."""
    return [Column(heading, overflow="fold") for heading in headings]


def numbers(*headings: str, no_wrap: bool = False) -> list[Column]:
    """Return columns of numbers."""
    return [Column(heading, justify="right", no_wrap=no_wrap) for heading in headings]


def titled(title: str, *columns: Column) -> Table:
    """Return a table with a title."""
    return Table(*columns, title=title, title_justify="left")


def store_table(description: dict[str, Any]) -> str:
    """Return what `sail inspect STORE` prints."""
    columns = description["columns"]
    headings = ("column", "shape", "status", "size", "model", "pooling", "licence")
    table = titled(description["path"], *words(*headings))
    for name, column in columns.items():
        table.add_row(
            name,
            f"{' × '.join(map(str, column['shape']))} {column['dtype']}",
            "\n".join(f"{count} {status}" for status, count in column["status"].items()),
            byte_size(column["bytes"]),
            str(column["fingerprint"].get("model")),
            _pooling(column["fingerprint"]),
            str(column["fingerprint"].get("licence") or "-"),
        )
    lines = [
        f"{description['rows']} rows in chunks of {description['rows_per_chunk']}; caption fields: "
        f"{', '.join(description['caption_fields']) or 'none'}; {description['classes']} classes"
    ]
    lines += [
        harmless(f"{name}: supervision: {supervision}")
        for name, column in columns.items()
        if (supervision := column["fingerprint"].get("supervision"))
    ]
    parts = [rendered(table), *lines, _statistics_table(columns), _samples_table(description)]
    return "\n".join(parts)


def _statistics_table(columns: dict[str, Any]) -> str:
    right = numbers(
        "rows",
        "norm: min / mean / max",
        "sd of a dimension: min / median / max",
        "constant",
        "largest variance",
        "near-duplicates",
    )
    table = titled("features of rows that are ok", *words("column"), *right)
    for name, column in columns.items():
        found = column["statistics"]
        if found is None:
            table.add_row(name, "0", *5 * ["-"])
            continue
        norms, dimensions = found["norms"], found["dimensions"]
        sd, alike = sorted(dimensions["sd"]), found["near_duplicates"]
        table.add_row(
            name,
            str(found["rows"]),
            " / ".join(f"{norms[key]:g}" for key in ("min", "mean", "max")),
            " / ".join(f"{value:.3g}" for value in (sd[0], sd[len(sd) // 2], sd[-1])),
            f"{dimensions['constant']} of {len(sd)}",
            f"{dimensions['largest_share']:.1%}",
            f"{alike['fraction']:.1%} of {alike['queries']}, cosine ≥ {alike['cosine']:g}",
        )
    return rendered(table)


def _samples_table(description: dict[str, Any]) -> str:
    table = titled("some rows", *numbers("row"), *words("key", "captions", "class"))
    for row in description["samples"]:
        name = row["class"] or ("-" if row["label"] in (None, -1) else str(row["label"]))
        table.add_row(str(row["row"]), row["key"], _captions(row), name)
    return rendered(table)


def hits_table(hits: list[dict[str, Any]]) -> str:
    """Return what `sail search` prints."""
    table = Table(*numbers("#", "cosine"), *words("key", "captions"))
    for hit in hits:
        table.add_row(
            str(hit["rank"]), f"{hit['cosine']:.3f}", harmless(hit["key"]), _captions(hit)
        )
    return rendered(table)


def _captions(row: dict[str, Any]) -> str:
    return "\n".join(harmless(f"{field}: {text}") for field, text in row["captions"].items())


def _pooling(fingerprint: dict[str, Any]) -> str:
    pooling, layer = str(fingerprint.get("pooling") or "-"), fingerprint.get("layer")
    return pooling if layer in (None, -1) else f"{pooling}, layer {layer}"


def row_table(description: dict[str, Any]) -> str:
    """Return what `sail inspect STORE --row N` prints."""
    table = titled(f"row {description['row']}", Column(no_wrap=True), *words(""))
    table.show_header = False
    table.add_row("key", harmless(description["key"]))
    for field, caption in description["captions"].items():
        table.add_row(f"caption/{field}", harmless(caption))
    for what in ("label", "class", "group"):
        if description[what] is not None:
            table.add_row(what, harmless(str(description[what])))
    for name, column in description["columns"].items():
        table.add_row(name, f"{column['status']}; norm {column['norm']}; {column['first']} …")
    return rendered(table)


def plan_table(plan: dict[str, Any]) -> str:
    """Return what `sail plan RECIPE` prints."""
    splits = [
        f"{name}: {'' if split['exact'] else 'about '}{split['rows']:,} rows ({split['found_in']})"
        for name, split in plan["splits"].items()
    ]
    splits += [f"{name}: left out. {why}" for name, why in plan["splits_left_out"].items()]
    sizes = titled("on disk", *map(Column, ("column", "length", "size")))
    for column in plan["columns"]:
        is_known = column["bytes"] is not None
        size = byte_size(column["bytes"]) if is_known else "not known: load it once"
        sizes.add_row(column["column"], str(column["dim"] or "?"), size)
    total, free = f"{byte_size(plan['bytes'])} of features", plan["free_bytes"]
    if free is not None:
        total += f"; {byte_size(free)} are free there"
        total += "" if plan["bytes"] < free else ", which is not enough"
    parts = [*splits, rendered(sizes), total, _machine_table(plan), _gpu_table(plan)]
    return "\n".join([*parts, *_assumptions(plan)])


def _machine_table(plan: dict[str, Any]) -> str:
    machine = plan["this_machine"]
    title = f"stage one on this machine: {machine['device']}, {machine['cores']} cores"
    headings = ("pass", "work per row", "rows/s by phase", "time", "slowest")
    table = titled(title, *words(*headings))
    for each in plan["passes"]:
        work = (
            "not known" if each["flops_per_row"] is None else _scaled(each["flops_per_row"], "FLOP")
        )
        if each["tokens"] is not None:
            work += f", {each['tokens']:.0f} tokens ({each['tokens_from']})"
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in each["rows_per_second"].items())
        table.add_row(
            each["pass"],
            work,
            rates or "not measured: the data or the weights are not here",
            _duration(each["total_hours"]),
            each["bottleneck"] or "-",
        )
    lines = [rendered(table)]
    if machine["stage_one_hours"] is not None:
        lines.append(f"all of stage one on this machine: {_duration(machine['stage_one_hours'])}")
    if machine["bottleneck"]:
        lines.append(f"bottleneck on this machine: {machine['bottleneck']}")
    return "\n".join(lines)


def _gpu_table(plan: dict[str, Any]) -> str:
    names = [each["pass"] for each in plan["passes"] if each["flops_per_row"] is not None]
    price = "euros" if plan["price"] is None else f"euros at {plan['price']:g} an hour"
    headings = (
        "GPU",
        *names,
        "stage one",
        "stage two",
        "total",
        price,
        "cores to decode",
        "rows in the heads",
    )
    table = titled("on one GPU, computed", *words(*headings))
    for gpu in plan["gpus"]:
        hours = [gpu["hours"][name] for name in names]
        hours += [gpu["stage_one_hours"], gpu["stage_two_hours"], gpu["total_hours"]]
        euros = "-" if gpu["euros"] is None else f"{gpu['euros']:,.0f}"
        needed = str(gpu["cores_to_decode"] or "-")
        table.add_row(gpu["gpu"], *map(_duration, hours), euros, needed, _rows_at_once(plan, gpu))
    return rendered(table)


def _rows_at_once(plan: dict[str, Any], gpu: dict[str, Any]) -> str:
    """Return the `align.micro_batch` with which a training step fits on a GPU, in words."""
    if plan["stage_two"] is None:
        return "?"
    rows, batch = gpu["micro_batch"], plan["stage_two"]["memory"]["batch_size"]
    if rows is None:
        return "does not fit"
    return f"all {rows:,}" if rows == batch else f"{rows:,} at once"


def _assumptions(plan: dict[str, Any]) -> list[str]:
    assumed, two = plan["assumed"], plan["stage_two"]
    lines = [
        f"GPU hours are work ÷ (dense bfloat16 peak of its data sheet × utilisation), the latter "
        f"assumed: {assumed['encoder_utilisation']:.0%} for encoders, "
        f"{assumed['head_utilisation']:.0%} for the head. With fewer cores than are needed to "
        f"decode, decoding is the bottleneck.",
    ]
    if assumed["decoded_per_core"]:
        lines.append(f"Decoding: {assumed['decoded_per_core']:.0f} images/s a core, assumed.")
    if plan["passes"]:
        lines.append("Equal captions of a chunk are encoded once, so text can take less.")
    if two:
        lines.append(
            f"Stage two: {two['samples']:,.0f} samples of "
            f"{_scaled(two['flops_per_sample'], 'FLOP')}; an epoch reads "
            f"{byte_size(two['bytes_per_epoch'])}, which takes the time of the disk instead where "
            f"that does not stay in memory."
        )
        whole = two["memory"]["steps"][0]
        lines.append(
            f"A training step holds {byte_size(whole['peak'])} with {whole['micro_batch']:,} rows "
            f"in the heads at once ({byte_size(whole['kept'])} between steps), beside "
            f"align.memory_mb and about 0.5 GB of CUDA. The last column is the align.micro_batch "
            f"that fits."
        )
    return lines


def byte_size(count: int) -> str:
    """Return a number of bytes in words: `8.4 MB`."""
    return _scaled(count, "B")


def _scaled(count: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} T{unit}"


def _duration(hours: float | None) -> str:
    """Return hours in the unit that suits them: `35.6 h`, `21 min`, `0.4 s`."""
    if hours is None:
        return "?"
    if hours >= 1:
        return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 30 else f"{3600 * hours:.1f} s"


def conversion_table(losses: dict[str, dict[str, float]]) -> str:
    """Return what `sail convert` prints: how far each column is from what it was."""
    headings = ("column", "error / norm, mean", "greatest", "same 10 neighbours", "size")
    table = titled("against the old features", *map(Column, headings))
    for name, loss in losses.items():
        table.add_row(
            name,
            f"{loss['relative_error_mean']:.4f}",
            f"{loss['relative_error_max']:.4f}",
            f"{loss['same_neighbours']:.3f}",
            f"{byte_size(int(loss['bytes']))} of {byte_size(int(loss['bytes_before']))}",
        )
    return rendered(table)


def drift_table(document: dict[str, Any]) -> str:
    """Return what `sail eval RECIPE --check` prints."""
    protocol = document["protocol"]
    table = titled(
        f"drift of the embeddings of {protocol['rows']} rows of {protocol['split']}",
        *words("of", "over", "usual", "compared with"),
        *numbers("max |difference|", "1 − least cosine", "other neighbour", no_wrap=True),
    )
    for drift in document["drifts"]:
        found = 3 * ["-"]
        if drift["min_cosine"] is not None:
            distance = 1 - drift["min_cosine"]
            found = [
                f"{drift['max_abs_difference']:.2g}",
                f"{distance:.2g}" + (" !" if distance > protocol["tolerance"] else ""),
                f"{drift['changed_neighbours']} of {protocol['rows']}",
            ]
        table.add_row(*(drift[what] for what in ("modality", "over", "usual", "other")), *found)
    return f"{rendered(table)}\ntolerance: 1 − cosine of {protocol['tolerance']:g} at most"


def plans_table(plans: list[dict[str, Any]]) -> str:
    """Return what `sail encoders` prints."""
    parts = []
    for plan in plans:
        table = titled(f"{plan['model']} as an encoder of {plan['kind']}s", *words("", "", "from"))
        for name, decision in plan["plan"].items():
            table.add_row(name, shown(decision["value"]), decision["from"])
        parts += [rendered(table), *(f"warning: {each}" for each in plan["warnings"])]
        parts += [f"note: {each}" for each in plan["notes"]]
        if plan["files"]:
            parts.append(f"decided by {', '.join(plan['files'])} and the weights")
        if check := plan.get("check"):
            verdict = "equal to" if check["equal"] else "DIFFERS from"
            parts.append(
                f"{verdict} {check['reference']} on {check['inputs']} {plan['kind']}s: at most "
                f"{check['largest_difference']:.1e} of a value of length 1, where "
                f"{check['tolerance']:.0e} is rounding"
            )
    return "\n".join(parts)


def settings_table(found: dict[str, list[dict[str, str]]]) -> str:
    """Return what `sail settings` prints."""
    parts = []
    for title, rows in found.items():
        table = titled(title, *words("setting", "type", "default", "meaning"))
        for row in rows:
            plain = {name: text.replace("`", "").replace("\\|", "|") for name, text in row.items()}
            table.add_row(*plain.values())
        parts.append(rendered(table))
    return "\n".join(parts)


def doctor_table(examination: dict[str, Any]) -> str:
    """Return what `sail doctor` prints."""
    table = Table(*words("", "looked at", "found", "what to do"))
    for check in examination["checks"]:
        table.add_row(*(check[what] for what in ("status", "name", "found", "advice")))
    broken = sum(check["status"] == "broken" for check in examination["checks"])
    end = "Nothing that is needed is broken." if not broken else f"{broken} broken, see above."
    return f"{rendered(table)}\n{end}"


def scores_table(found: Sequence[dict[str, Any]]) -> str:
    """Return what `sail eval --mteb` prints: the main score of each task, in per cent."""
    table = Table(*words("task", "split", "subset", "metric"), *numbers("%"))
    for each in found:
        name = (each["task"], each["split"], each["subset"], each["metric"])
        table.add_row(*map(harmless, name), f"{100 * each['value']:.2f}")
    return rendered(table)

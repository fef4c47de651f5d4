"""The command of `sail` that hands a trained run over to other programs.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import json
from pathlib import Path

import click

FORMS = ("hf", "llava", "onnx", "open_clip", "sentence-transformers")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "form", required=True, type=click.Choice(FORMS), help="For which program.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The new folder; RUN/export/FORM if not given."
)
@click.option(
    "--with-encoders",
    is_flag=True,
    help="With the weights of both encoders, also those of the hub; mind their licences.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(run: Path, form: str, out: Path | None, with_encoders: bool, as_json: bool) -> None:
    """Write a trained run as a folder that other programs open. Prints its path.

    RUN is the folder of a run that was aligned. An earlier export at the same place is replaced,
    as a whole.

    \b
    --to hf    config, safetensors, processor, tokenizer and a card. Opens with
               `load_aligned(FOLDER)`, and with torch and transformers alone by the lines in the
               card. Encoders of the hub are named by revision and sha256; local and bundled ones
               come along where their licence allows it.

    \b
    --to llava  the image encoder with its head as a vision tower for LLaVA (docs/export.md).

    \b
    --to onnx   both heads, without the encoders; needs the extra `onnx`.

    \b
    --to open_clip
                a state dict of both heads under the names that open_clip has for them.

    \b
    --to sentence-transformers
                the text encoder with its head, if that is of kind linear or mlp.

    \b
    Examples:
      sail export runs/demo --to hf
      sail export runs/demo --to hf --with-encoders --out aligned
    """
    from pipeline.handover.exports import export_run
    from pipeline.progress import start_log

    start_log(verbose=False)
    folder = out or run / "export" / form
    export_run(run, form, folder, with_encoders=with_encoders)
    click.echo(json.dumps({"path": str(folder)}) if as_json else str(folder))

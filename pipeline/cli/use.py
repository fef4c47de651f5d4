"""The commands of `sail` that use what was trained: search, and embeddings for other programs.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import (
    NamedRun,
    Stage,
    json_option,
    run_argument,
    say,
    say_json,
    say_paths,
    say_written,
    stage,
    until_stopped,
)
from pipeline.export import FORMS


@click.command()
@run_argument
@click.argument("query", required=False)
@click.option("--image", type=click.Path(path_type=Path), help="Search by an image instead.")
@click.option(
    "--split", help="Where to search; the first split that is not trained on if not given."
)
@click.option(
    "--among",
    type=click.Choice(["images", "captions"]),
    default="images",
    show_default=True,
    help="What to find.",
)
@click.option("--top", default=10, show_default=True, type=click.IntRange(1), help="How many.")
@click.option(
    "--score",
    type=click.Choice(["cosine", "csls", "inverted-softmax", "dual-bank"]),
    default="cosine",
    show_default=True,
    help="What comes first; the others push down what is near to every query.",
)
@json_option
def search(
    run: Path,
    query: str | None,
    image: Path | None,
    split: str | None,
    among: str,
    top: int,
    score: Any,
    as_json: bool,
) -> None:
    """Find the rows of a run that fit a sentence or an image best.

    RUN is a run that was aligned. The first search embeds the split by the head;
    later ones answer at once.

    \b
    Examples:
      sail search runs/demo "a red circle"
      sail search runs/demo --image photo.jpg --among captions --top 3
    """
    if (not query) == (image is None):
        raise click.UsageError("Give either a sentence or --image FILE.")
    from pipeline.python import load_aligned
    from pipeline.search import Ranking, search_captions, search_images
    from pipeline.tables import hits_table

    aligned = load_aligned(run)
    splits = list(aligned.config.data)
    others = [name for name in splits if name not in aligned.config.trained_splits]
    where = split or (others or splits)[0]
    vector = aligned.encode_text([query]) if query else aligned.encode_image([str(image)])
    find = search_images if among == "images" else search_captions
    by = Ranking("text" if query else "image", None if score == "cosine" else score)
    hits = [asdict(hit) for hit in find(aligned, where, vector, top, by)]
    if as_json:
        say_json(hits, indent=2)
    else:
        say(hits_table(hits))


@click.command()
@run_argument
@click.option("--images", type=click.Path(path_type=Path), help="Folder of images.")
@click.option("--texts", type=click.Path(path_type=Path), help="File with one sentence a line.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="FILE.npy, FILE.parquet or FILE.zarr.",
)
@json_option
def embed(run: Path, images: Path | None, texts: Path | None, out: Path, as_json: bool) -> None:
    """Write embeddings of your own images or sentences.

    One per item and in order. Vectors are normalised float32: the cosine of an image and a sentence
    is their product. An image that cannot be read is named in the log; its vector is not-a-number
    (null in parquet).

    \b
    Examples:
      sail embed runs/demo --images photos --out photos.parquet
      sail embed runs/demo --texts queries.txt --out queries.npy
    """
    if (images is None) == (texts is None):
        raise click.UsageError("Give either --images FOLDER or --texts FILE.")
    from pipeline.embed import Written, embed_images, embed_sentences, image_files, sentences
    from pipeline.python import load_aligned

    aligned = load_aligned(run)

    def work(stop: Any) -> Written:
        if images is not None:
            files = image_files(images)
            return embed_images(aligned, files, out, stop)
        lines = sentences(texts or Path())
        return embed_sentences(aligned, lines, out, stop)

    written = until_stopped(work, kept="nothing was written.")
    path = written.path
    say_written(path, asdict(written) | {"path": str(path)}, as_json=as_json)


@click.command()
@run_argument
@click.option("--to", "form", required=True, type=click.Choice(FORMS), help="For which program.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The new folder; RUN/export/FORM if not given."
)
@click.option(
    "--with-encoders",
    is_flag=True,
    help="With the weights of both encoders, also those of the hub; mind their licences.",
)
@json_option
def export(run: Path, form: str, out: Path | None, with_encoders: bool, as_json: bool) -> None:
    """Write a trained run as a folder that other programs open. Prints its path.

    RUN is a run that was aligned. An earlier export at the same place is replaced,
    as a whole.

    \b
    --to hf    config, safetensors, processor, tokenizer and a card. Opens with
               `load_aligned(FOLDER)`, and with torch and transformers alone by the lines in the
               card. Encoders of the hub are named by revision and sha256; local and bundled ones
               come along where their licence allows it.

    \b
    --to embedding-atlas
                one parquet file of the images: embeddings, a map, neighbours; the card has the
                command that opens it.

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
    from pipeline.export.exports import export_run

    folder = out or run / "export" / form
    export_run(run, form, folder, with_encoders=with_encoders)
    say_written(folder, {"path": str(folder)}, as_json=as_json)


@click.command(name="import-head")
@click.argument("file")
@stage
def import_head(run: Stage, file: str) -> None:
    """Make a released SAIL head the checkpoint of a run.

    FILE is its .pt, also on the hub (hf://owner/name/FILE); `sail eval` measures it there. The
    recipe's features must be extracted, by the encoders that the head was trained on. Nothing in
    the file is run. Prints the path of the checkpoint.

    \b
    Example:
      sail import-head hf://le723z/sail/sail_dinov2l_nv2.pt sail-paper \\
        --set run.dir=runs/released
      sail eval sail-paper --set run.dir=runs/released
    """
    from pipeline.export import released
    from pipeline.hub import fetched

    checkpoint = str(run.run(lambda config, _stop: released.import_head(fetched(file), config)))
    say_written(checkpoint, [checkpoint], as_json=run.as_json)


@click.command(name="export-head")
@click.argument("checkpoint", type=NamedRun())
@click.argument("file", type=click.Path(path_type=Path))
def export_head(checkpoint: Path, file: Path) -> None:
    """Write a head in the layout of the released SAIL code.

    CHECKPOINT is a run, or the folder of one of its checkpoints. Heads of kind star, mlp and
    linear have a place in that layout. Prints the path of FILE.

    \b
    Example:
      sail export-head runs/sail-paper sail.pt
    """
    from pipeline.export import released

    say_paths([released.export_head(checkpoint, file)])


@click.command()
@run_argument
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at. Any but this machine's own asks for a token.",
)
@click.option(
    "--port",
    default=8642,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen at; 0 takes any that is free.",
)
@click.option(
    "--token",
    envvar="SAIL_TOKEN",
    metavar="WORD",
    help="What a browser must know; made and printed where one is needed and none is given.",
)
@click.option(
    "--memory",
    default=2.0,
    show_default=True,
    metavar="GIB",
    type=click.FloatRange(min=0),
    help="What one search index may take; beyond it, rows are compared from disk.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where images and sentences are encoded: cpu, cuda, mps, or auto.",
)
def explore(run: Path, host: str, port: int, token: str | None, memory: float, device: str) -> None:
    """Look at a run in a browser, and search in it.

    RUN is a run. The views are search, map, results, training and store. Prints the
    address to open, and serves until Ctrl-C. Training is shown live, also before there is a head.
    docs/explore.md tells more.

    \b
    Examples:
      sail explore runs/demo
      sail explore runs/demo --port 0
      sail explore runs/demo --host 0.0.0.0
    """
    from pipeline.explore.server import access_for, serve
    from pipeline.explore.session import Session

    access = access_for(host, token)
    session = Session(run, device=device, memory_bytes=int(memory * 2**30))

    def work(stop: Any) -> None:
        serve(session, access, port, stop, on_ready=say)

    until_stopped(work, kept="nothing of the run was changed.")

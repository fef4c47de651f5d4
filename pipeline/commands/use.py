"""The commands of `sail` that use what was trained: search, and embeddings for other programs.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.commands.options import until_stopped

RUN = click.argument("run", type=click.Path(path_type=Path))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@RUN
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
@AS_JSON
def search(
    run: Path,
    query: str | None,
    image: Path | None,
    split: str | None,
    among: str,
    top: int,
    as_json: bool,
) -> None:
    """Find the rows of a run that fit a sentence or an image best.

    RUN is the folder of a run that was aligned. The first search embeds the split by the head;
    later ones answer at once.

    \b
    Examples:
      sail search runs/demo "a red circle"
      sail search runs/demo --image photo.jpg --among captions --top 3
    """
    if (not query) == (image is None):
        raise click.UsageError("Give either a sentence or --image FILE.")
    from pipeline.aligned import load_aligned
    from pipeline.embedding.search import search_captions, search_images
    from pipeline.progress import start_log
    from pipeline.tables import hits_table

    start_log(verbose=False)
    aligned = load_aligned(run)
    splits = list(aligned.config.data)
    others = [name for name in splits if name not in aligned.config.trained_splits]
    where = split or (others or splits)[0]
    vector = aligned.encode_text([query]) if query else aligned.encode_image([str(image)])
    find = search_images if among == "images" else search_captions
    hits = [asdict(hit) for hit in find(aligned, where, vector, top)]
    click.echo(json.dumps(hits, indent=2, ensure_ascii=False) if as_json else hits_table(hits))


@click.command()
@RUN
@click.option("--images", type=click.Path(path_type=Path), help="Folder of images.")
@click.option("--texts", type=click.Path(path_type=Path), help="File with one sentence a line.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="FILE.npy, FILE.parquet or FILE.zarr.",
)
@AS_JSON
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
    from pipeline.aligned import load_aligned
    from pipeline.embedding.files import (
        Written,
        embed_images,
        embed_sentences,
        image_files,
        sentences,
    )
    from pipeline.progress import start_log

    start_log(verbose=False)
    aligned = load_aligned(run)

    def work(stop: Any) -> Written:
        if images is not None:
            files = image_files(images)
            return embed_images(aligned, files, out, stop)
        lines = sentences(texts or Path())
        return embed_sentences(aligned, lines, out, stop)

    written = until_stopped(work, kept="nothing was written.")
    if as_json:
        click.echo(json.dumps(asdict(written) | {"path": str(written.path)}))
    else:
        click.echo(str(written.path))

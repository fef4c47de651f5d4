"""A run as a model of mteb: its own task classes measure our heads (`sail eval RUN --mteb TASK`).

What the frozen encoders give is kept by the content of each item, so a second head of the same
encoders encodes nothing: only the heads are computed again.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float16, Float32, Int64
from PIL import Image
from zarr.codecs import Crc32cCodec

from features.encoders.checkpoint import first_line
from features.errors import ConfigError, EvaluationError, SailError
from features.storage.fingerprint import Fingerprint
from features.storage.lock import locked
from pipeline.run.aligned import Aligned

logger = logging.getLogger(__name__)
AT_ONCE = 256
"""Items that are encoded before their features are written down."""
EXTRA = "Install the extra with `pip install -e '.[mteb]'`."


class FeatureCache:
    """Features of frozen encoders by the sha256 of what they are of, in one Zarr group.

    Of each encoder it has `features` (items, dim), float16, and `items` (items, 32), uint8, both
    with a crc32c for each chunk; items are written after their features, so that what a kill cut
    off is not read. It is a context: one process at a time has it open.
    """

    def __init__(self, folder: Path) -> None:
        """Name a cache; it is opened, or made, where the context begins.

        Args:
            folder: Of the group.
        """
        self.folder = folder
        self._known: dict[str, dict[bytes, int]] = {}
        self._open = ExitStack()

    def __enter__(self) -> "FeatureCache":
        """Open it.

        Raises:
            LockedError: Another process has it open.
        """
        lock = self.folder.with_name(f".{self.folder.name}.lock")
        self._open.enter_context(locked(lock, f"{self.folder} is being written"))
        self._group = zarr.open_group(str(self.folder), mode="a")
        self._known.clear()
        return self

    def __exit__(self, *_: object) -> None:
        """Let other processes open it."""
        self._open.close()

    def read(
        self,
        encoder: str,
        items: Sequence[bytes],
        encode: Callable[[Sequence[int]], Float32[np.ndarray, "some dim"]],
    ) -> Float16[np.ndarray, "items dim"]:
        """Return the features of items, and encode those that are new.

        Args:
            encoder: Its name here, which stands for all that decides its features.
            items: The sha256 of each.
            encode: Returns the features of the items at some places, in that order.

        Raises:
            EvaluationError: The cache is damaged.
        """
        known = self._opened(encoder)
        new = list({item: place for place, item in enumerate(items) if item not in known}.values())
        for start in range(0, len(new), AT_ONCE):
            some = new[start : start + AT_ONCE]
            self._append(encoder, [items[place] for place in some], encode(some))
        rows, places = np.unique([known[item] for item in items], return_inverse=True)
        found: np.ndarray = self._array(f"{encoder}/features", rows)[places]
        return found

    def _opened(self, encoder: str) -> dict[bytes, int]:
        if encoder not in self._known:
            known: dict[bytes, int] = {}
            if f"{encoder}/items" in self._group:
                items = self._array(f"{encoder}/items")
                known = {row.tobytes(): number for number, row in enumerate(items)}
            self._known[encoder] = known
        return self._known[encoder]

    def _array(self, path: str, rows: Int64[np.ndarray, "rows"] | None = None) -> np.ndarray:
        try:
            array: Any = self._group[path]
            values: np.ndarray = array[:] if rows is None else array.oindex[rows]
        except (ValueError, LookupError, OSError) as error:
            raise EvaluationError(
                f"{self.folder}/{path} cannot be read: {first_line(error)} What `sail eval --mteb` "
                f"wrote was expected. Delete {self.folder}, and call it again."
            ) from error
        return values

    def _append(
        self, encoder: str, items: Sequence[bytes], features: Float32[np.ndarray, "some dim"]
    ) -> None:
        known = self._known[encoder]
        first, last = len(known), len(known) + len(items)
        digests = np.frombuffer(b"".join(items), dtype=np.uint8).reshape(-1, 32)
        for name, values in (("features", features.astype(np.float16)), ("items", digests)):
            path = f"{encoder}/{name}"
            if path not in self._group:
                self._group.create_array(
                    path,
                    shape=(0, values.shape[1]),
                    chunks=(AT_ONCE, values.shape[1]),
                    dtype=values.dtype,
                    compressors=[Crc32cCodec()],
                )
            array: Any = self._group[path]
            array.resize((last, values.shape[1]))
            array[first:last] = values
        known.update(zip(items, range(first, last), strict=True))


def mteb() -> Any:
    """Return the library.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import mteb as library
    except ImportError as error:
        raise ConfigError(
            f"mteb cannot be imported ({error}). It was expected for --mteb. {EXTRA}"
        ) from error
    return library


def model_of(aligned: Aligned, cache: FeatureCache | None = None) -> Any:
    """Return a run as a model that `mteb.evaluate` takes: images, texts, or both of an item.

    Args:
        aligned: The run.
        cache: Where features are kept; nowhere if not given.

    Raises:
        ConfigError: mteb is not installed.
    """
    mteb()
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta

    class _Model(AbsEncoder):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            self.model = None
            self.mteb_model_meta = ModelMeta.create_empty(
                {
                    "name": f"sail/{aligned.checkpoint.sha256[:16]}",
                    "revision": aligned.checkpoint.sha256,
                    "modalities": ["image", "text"],
                    "embed_dim": aligned.dim,
                }
            )

        def encode(self, inputs: Any, **_: Any) -> Float32[np.ndarray, "items dim"]:
            return embed_items(aligned, inputs, cache)

    return _Model()


def embed_items(
    aligned: Aligned, batches: Iterable[dict[str, Any]], cache: FeatureCache | None
) -> Float32[np.ndarray, "items dim"]:
    """Embed the items of mteb's batches: normalised, and of an item with both the mean of both.

    Raises:
        EvaluationError: A batch has neither images nor texts.
    """
    parts = []
    for batch in batches:
        sides = []
        if batch.get("image"):
            sides.append(_images(aligned, batch["image"], cache))
        if batch.get("text"):
            sides.append(_texts(aligned, list(batch["text"]), cache))
        if not sides:
            raise EvaluationError(
                f"A task of mteb has items of {sorted(batch)}. Images or texts were expected. "
                f"Choose another task."
            )
        parts.append(np.mean(sides, axis=0) if len(sides) > 1 else sides[0])
    return np.concatenate(parts)


def _images(
    aligned: Aligned, images: Sequence[Image.Image], cache: FeatureCache | None
) -> Float32[np.ndarray, "images dim"]:
    def encode(places: Sequence[int]) -> np.ndarray:
        return aligned.image_features([images[place] for place in places])

    digests = [_digest(each) for each in images]
    name = _name("image", aligned.checkpoint.image["fingerprint"])
    return aligned.embed_images(_features(cache, name, digests, encode))


def _digest(image: Image.Image) -> bytes:
    """Return the sha256 of all of a picture that its features may depend on."""
    colours = (image.getpalette("RGBA"), image.info.get("transparency"), dict(image.getexif()))
    return hashlib.sha256(
        f"{image.mode} {image.size} {colours} ".encode() + image.tobytes()
    ).digest()


def _texts(
    aligned: Aligned, texts: Sequence[str], cache: FeatureCache | None
) -> Float32[np.ndarray, "texts dim"]:
    def encode(places: Sequence[int]) -> np.ndarray:
        return aligned.text_features([texts[place] for place in places])

    digests = [hashlib.sha256(each.encode()).digest() for each in texts]
    name = _name("text", aligned.checkpoint.text["fingerprint"])
    return aligned.embed_texts(_features(cache, name, digests, encode))


def _features(
    cache: FeatureCache | None,
    name: str,
    digests: Sequence[bytes],
    encode: Callable[[Sequence[int]], np.ndarray],
) -> np.ndarray:
    if cache is None:
        return encode(range(len(digests))).astype(np.float16)
    return cache.read(name, digests, encode)


def _name(kind: str, fingerprint: dict[str, Any]) -> str:
    deciding = repr(sorted(Fingerprint(fingerprint).deciding.items(), key=lambda each: each[0]))
    return f"{kind}-{hashlib.sha256(deciding.encode()).hexdigest()[:16]}"


def evaluate_by_mteb(aligned: Aligned, tasks: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Let mteb measure a run on some of its tasks; return its main scores.

    Args:
        aligned: The run.
        tasks: Their names in mteb, such as `CIFAR10ZeroShot`.
        folder: Of the features, which heads share, and of mteb's own results.

    Raises:
        ConfigError: mteb is not installed, or has no such task.
        EvaluationError: A task cannot be evaluated, as where its data cannot be fetched.
        LockedError: Another process measures by mteb with the same features.
    """
    library, chosen = mteb(), list[Any]()
    for name in tasks:
        try:
            chosen.append(library.get_task(name))
        except KeyError as error:
            raise ConfigError(
                f"mteb {library.__version__} has no task {name!r}. The name of one was expected, "
                f"as in `python -m mteb available-tasks`. Correct --mteb."
            ) from error
    with FeatureCache(folder / "features.zarr") as cache:
        model = model_of(aligned, cache)
        return [score for task in chosen for score in measured(model, task, folder)]


def measured(model: Any, task: Any, folder: Path) -> list[dict[str, Any]]:
    """Evaluate a task of mteb; return the main score of each of its splits and subsets.

    Args:
        model: From `model_of`.
        task: An object of mteb.
        folder: Where mteb keeps its own results.

    Raises:
        EvaluationError: It cannot be evaluated.
    """
    library = mteb()
    from mteb.cache import ResultCache

    try:
        result = library.evaluate(model, task, cache=ResultCache(folder), show_progress_bar=False)
    except SailError:
        raise
    except Exception as error:  # whatever the hub and the task raise
        raise EvaluationError(
            f"mteb cannot evaluate {task.metadata.name}: {type(error).__name__} "
            f"{first_line(error)} Its data and a task of images and texts were expected. Look at "
            f"the network, or choose another task."
        ) from error
    return [
        {
            "task": each.task_name,
            "split": split,
            "subset": score["hf_subset"],
            "metric": task.metadata.main_score,
            "value": float(score["main_score"]),
        }
        for each in result.task_results
        for split, scores in each.scores.items()
        for score in scores
    ]

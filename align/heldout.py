"""Retrieval on the held-out rows during training: what the best checkpoint is chosen by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float16, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from align.columns import Columns
from align.heads import AlignmentModel
from align.ranks import Relevance, retrieval_ranks
from features.store import key_hashes

RECALL_AT = (1, 5, 10)
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class HeldOutRows:
    """Rows of one store that are scored."""

    columns: Columns
    rows: Int64[np.ndarray, "queries"]
    """In order."""
    text_ok: Bool[np.ndarray, "queries fields"]
    """Their captions that can be used."""

    def texts(self) -> Float16[np.ndarray, "queries fields dim"]:
        """Read the features of all captions."""
        return np.stack([column.rows_at(self.rows) for column in self.columns.text], axis=1)


class HeldOut:
    """The features of the held-out rows, in memory, and what is right for each of them."""

    def __init__(
        self,
        parts: Sequence[HeldOutRows],
        *,
        identical: bool,
        device: torch.device,
    ) -> None:
        """Read the rows.

        Args:
            parts: Rows of each store. One that has fewer caption fields than another is filled up
                with captions that do not count.
            identical: Whether a caption with the same words is as right as the image's own.
            device: Where the features are kept.
        """
        self.device = device
        fields = max(len(part.columns.text) for part in parts)
        images = [part.columns.image.rows_at(part.rows) for part in parts]
        texts = [_filled(part.texts(), fields) for part in parts]
        weights = [_filled(part.text_ok, fields).astype(np.float32) for part in parts]
        self._image = torch.from_numpy(np.concatenate(images)).to(device)
        self._text = torch.from_numpy(np.concatenate(texts)).flatten(0, 1).to(device)
        ids = None
        if identical:
            every = [_filled(_caption_ids(part.columns, part.rows), fields) for part in parts]
            ids = torch.from_numpy(np.concatenate(every)).to(device)
        used = torch.from_numpy(np.concatenate(weights)).flatten().to(device) > 0
        self._text = self._text[used]
        owner = torch.arange(len(self._image), device=device).repeat_interleave(fields)[used]
        words = None if ids is None else ids.flatten()[used]
        self._relevance = Relevance(len(self._image), owner, words)

    def __len__(self) -> int:
        return len(self._image)

    @torch.no_grad()
    def score(self, model: AlignmentModel) -> dict[str, float]:
        """Return recall@k as fractions, each way and the mean of both ways; and `mean_recall`.

        That is the mean of recall@1, @5 and @10 (the "rsum" of the literature, over six), by which
        the best checkpoint is chosen: one k alone may be saturated long before the others.

        An image is right if one of its captions is among the k nearest of all captions; a caption
        is right if its image is among the k nearest of all images. A wrong one that is equally
        near (to within 1e-6 of cosine) counts as nearer.
        """
        was_training = model.training
        model.eval()
        image = self._embed(model.embed_image, self._image)
        text = self._embed(model.embed_text, self._text)
        model.train(was_training)
        with torch.autocast(self.device.type, enabled=False):
            found = retrieval_ranks(image, text, self._relevance)
        scores = {}
        for k in RECALL_AT:
            both = [(ranks < k).double().mean().item() for ranks in (found.by_image, found.by_text)]
            scores[f"recall@{k}"] = sum(both) / 2
            scores[f"recall@{k}/image_to_text"], scores[f"recall@{k}/text_to_image"] = both
        scores["mean_recall"] = sum(scores[f"recall@{k}"] for k in RECALL_AT) / len(RECALL_AT)
        return scores

    def _embed(
        self, embed: Callable[[Tensor], Tensor], features: Float16[Tensor, "rows dim"]
    ) -> Tensor:
        blocks = [embed(block) for block in torch.split(features, BLOCK_ROWS)]
        return F.normalize(torch.cat(blocks).float(), dim=-1)


def _caption_ids(
    columns: Columns, rows: Int64[np.ndarray, "queries"]
) -> Int64[np.ndarray, "queries fields"]:
    ids = np.empty((len(rows), len(columns.fields)), dtype=np.int64)
    for part in _by_chunk(rows, columns.image.rows_per_chunk):
        first, last = int(rows[part][0]), int(rows[part][-1])
        for field, name in enumerate(columns.fields):
            captions = columns.text_store.captions(name, first, last + 1)[rows[part] - first]
            ids[part, field] = key_hashes(captions, len(captions)).view(np.int64)
    return ids


def _filled(values: Shaped[np.ndarray, "queries ..."], fields: int) -> np.ndarray:
    """Append fields of zeros until there are as many."""
    missing = fields - values.shape[1]
    return np.pad(values, [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)])


def _by_chunk(rows: Int64[np.ndarray, "queries"], rows_per_chunk: int) -> list[slice]:
    """Return the slices of sorted rows that lie in one chunk each."""
    starts = np.flatnonzero(np.diff(rows // rows_per_chunk, prepend=-1)).tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]

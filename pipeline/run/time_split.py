"""Where the time of stage one goes: beside the progress, in a log, in one sentence at the end."""

import json
import logging
import time
from pathlib import Path

from features.extract import Phases
from pipeline.progress import SECONDS_BETWEEN_LINES, ProgressLine, duration

logger = logging.getLogger(__name__)
FILE = "time.jsonl"
WORTH_TELLING = 10.0
"""Seconds that a pass must take, for its time to be recorded and explained."""
MOSTLY = 0.5
ADVICE = {
    "reading": "Put the data on a faster disk or nearer, or raise extract.workers",
    "decoding": 'Raise extract.workers, or set mode = "fast" of the image encoder',
    "tokenising": "Nothing of the settings makes it faster; longer captions cost more",
    "writing": "Put run.dir (or extract.store) on a faster disk",
    "encoding": "A GPU, a larger batch of the encoder, precision and compile make it faster",
}
"""What to change where the time goes there."""


class TimeSplit:
    """Follows one pass of an encoder over the rows of a split."""

    def __init__(
        self, run: Path, line: ProgressLine, phases: Phases, *, of: dict[str, str]
    ) -> None:
        """Begin to measure.

        Args:
            run: Folder of the run; long passes leave lines in its `time.jsonl`, and curves for
                TensorBoard.
            line: Of the progress.
            phases: Where the pass counts its seconds.
            of: `split` and `columns` of the pass.
        """
        self._run, self._line, self.phases, self._of = run, line, phases, of
        self._started = self._recorded = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the pass began."""
        return time.monotonic() - self._started

    def advance(self, rows: int) -> None:
        """Tell of some rows that are done, and what the encoder did meanwhile."""
        seconds, phases = max(self.seconds, 1e-9), self.phases
        busy, waits = min(phases.encode / seconds, 1.0), min(phases.wait / seconds, 1.0)
        self._line.advance(rows, note=f"encoder {busy:.0%}, waits {waits:.0%}")
        if time.monotonic() - self._recorded > SECONDS_BETWEEN_LINES:
            self._record(with_curves=True)

    def finish(self) -> None:
        """Say what limited the pass, and what would make it faster."""
        if self.seconds < WORTH_TELLING:
            return
        self._record(with_curves=False)
        limit, share = self.limit()
        logger.info(
            "%s  %s: %s is the limit (%.0f %% of %s). %s.",
            *self._of.values(),
            limit,
            100 * share,
            duration(self.seconds),
            ADVICE[limit],
        )

    def limit(self) -> tuple[str, float]:
        """Return what the pass mostly waited for, and its share of the time."""
        phases, seconds = self.phases, max(self.seconds, 1e-9)
        waits = phases.wait / seconds
        if waits > MOSTLY:
            is_text = self._of["columns"].startswith("text/")
            loading = "reading" if phases.read > phases.decode else "decoding"
            return "tokenising" if is_text else loading, min(waits, 1.0)
        parts = {"encoding": phases.encode, "writing": phases.write / 2}  # on two threads
        limit = max(parts, key=lambda name: parts[name])
        return limit, min(parts[limit] / seconds, 1.0)

    def _record(self, *, with_curves: bool) -> None:
        self._recorded = time.monotonic()
        values = {"rows": self.phases.rows, "seconds": round(self.seconds, 3)}
        shares = {}
        for name in ("read", "decode", "encode", "write", "wait"):
            values[f"{name}_seconds"] = round(getattr(self.phases, name), 3)
            shares[name] = getattr(self.phases, name) / self.seconds
        try:
            with (self._run / FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self._of, **values}) + "\n")
            if with_curves:
                self._draw(shares)
        except OSError as error:  # what it tells of goes on
            logger.warning("the time of this pass is not recorded in %s: %s", self._run, error)

    def _draw(self, shares: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        with SummaryWriter(str(self._run / "tensorboard" / "extract")) as board:
            for name, share in shares.items():
                place = "/".join(["extract", *self._of.values(), name])
                board.add_scalar(place, share, self.phases.rows)

"""The log, and the progress lines, on stderr."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0


def start_log(*, verbose: bool) -> None:
    """Send the log of this program to stderr; that of the libraries only from warnings on."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    for package in ("pipeline", "features", "align", "evaluate"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class ProgressLine:
    """One line of progress: done / total, rate, time left.

    On a terminal it is updated in place; elsewhere a line is logged every half minute and at the
    end, so that the log of a batch job stays short.
    """

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
        self._resumed_at = 0
        self._started = self._last_line = time.monotonic()
        self._bar = _terminal_bar() if sys.stderr.isatty() else None
        self._task = (
            self._bar.add_task(name, total=total, unit=unit, note="") if self._bar else None
        )

    def advance(self, count: int, note: str = "") -> None:
        """Add to what is done, and say something beside it."""
        self.done += count
        self.note = note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, note=note)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._log()

    def set(self, done: int, total: int, note: str = "") -> None:
        """Say how much is done of what total, for work that counts by itself (or resumes)."""
        if self.total != total:
            self.total = total
            self._resumed_at = self.done = done - 1
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, total=total, completed=self.done)
        self.advance(done - self.done, note)

    def __enter__(self) -> "ProgressLine":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done:
            self._log()

    def _log(self) -> None:
        self._last_line = time.monotonic()
        seconds = max(self._last_line - self._started, 1e-9)
        rate = (self.done - self._resumed_at) / seconds
        left = ""
        if self.total and rate and self.done < self.total:
            left = f", {duration((self.total - self.done) / rate)} left"
        total = f" / {self.total:,}" if self.total else ""
        note = f"  {self.note}" if self.note else ""
        logger.info(
            "%s  %s%s %s  %s %s/s%s%s",
            self.name,
            f"{self.done:,}",
            total,
            self.unit,
            f"{rate:,.1f}",
            self.unit,
            left,
            note,
        )


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Log how long something took."""
    started = time.monotonic()
    yield
    logger.info("%s took %s", name, duration(time.monotonic() - started))


def duration(seconds: float) -> str:
    """Return a duration in words: `3.2 s`, `4 min 10 s`, `1 h 56 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


class _Rate(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="cyan")


def _terminal_bar() -> Progress:
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<32}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        console=Console(stderr=True),
    )

"""What is written down during training: metrics.jsonl, and event files for TensorBoard."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from features.storage.files import write


class MetricsLog:
    """One JSON object per line, with units in the names; the numbers go to TensorBoard as well.

    A resumed run cuts the file back to the step it goes on from, so that in the end every step is
    there once.
    """

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        _cut_back(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=step + 1 if step else None
        )

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Add what was measured after a step (the number of updates made)."""
        line = {"step": step, "epoch": round(epoch, 4), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            name = name if "/" in name else f"train/{name}"
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._file.close()
        self._board.close()


def _cut_back(path: Path, step: int) -> None:
    """Keep the lines up to a step; a line cut off by a kill is dropped."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
    write(path, "".join(f"{line}\n" for line in kept).encode())


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")

"""Ctrl-C and SIGTERM in commands that have nothing to save: the exit code, and no traceback."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.trained import trained

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "verify": ("pipeline.stores.verify", ("{run}/features/test.zarr",)),
    "inspect": ("pipeline.stores.inspect", ("{run}/features/test.zarr",)),
    "search": ("pipeline.python", ("{run}", "a red circle")),
    "export": ("pipeline.python", ("{run}", "--to", "hf", "--out", "{out}/exported")),
    "embed": ("pipeline.python", ("{run}", "--texts", "{out}/lines.txt", "--out", "{out}/o.npy")),
}
"""The last module that a command imports before it works, and its arguments."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_ends_every_command_with_its_code(
    name: str, number: signal.Signals, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "lines.txt").write_text("a red circle\n" * 5000)
    last_import, arguments = COMMANDS[name]
    words = [word.format(run=run, out=tmp_path) for word in arguments]
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "pipeline.cli", name, *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # off in the background
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.split("|")[-1].strip() == last_import:
                process.send_signal(number)
                break
        left = process.stderr.read()
    assert process.returncode == 128 + number, left
    told = [line for line in left.splitlines() if not line.startswith("import time:")]
    assert "Traceback" not in left
    assert len([line for line in told if line.startswith("Stopped")]) == 1, told
    assert not [path for path in tmp_path.iterdir() if path.name != "lines.txt"]

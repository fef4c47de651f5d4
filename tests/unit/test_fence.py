"""How a command ends: one line, its exit code, and for a fault of ours the traceback in a file."""

import errno
import logging
import os
import re
import signal
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from features.errors import StoreError
from pipeline.cli import Commands, cli
from pipeline.cli.options import start_log


def ended(fault: BaseException, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Result:
    """Call a command that meets a fault."""
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    group = Commands("sail")

    @group.command("meet")
    def meet() -> None:
        raise fault

    return CliRunner().invoke(group, ["meet"])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (StoreError("It is gone. Put it back."), "It is gone. Put it back."),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), "x.bin.*Make room"),
        (OSError(errno.EACCES, "Permission denied", "x.bin"), "x.bin.*the right to it"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.EIO, "Input/output error", "x.bin"), "Check the disk"),
        (MemoryError(), "not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deep"),
        (RuntimeError("can't start new thread"), "no more threads"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    ],
    ids=str,
)
def test_errors_of_the_user_and_of_the_machine_are_one_line_and_exit_1(
    fault: Exception, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = ended(fault, monkeypatch, tmp_path)
    assert result.exit_code == 1
    assert re.fullmatch(f"Error: .*{words}.*\n", result.stderr)
    assert not list(tmp_path.iterdir())


def test_what_nobody_foresaw_is_one_line_exit_70_and_a_file_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["sail", "explore", "--token", "a-secret-word"])
    result = ended(KeyError("https://me:secret@host/x\x1b[31m"), monkeypatch, tmp_path)
    assert result.exit_code == 70
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: This is a fault of ours")
    assert "\x1b" not in line
    (report,) = tmp_path.iterdir()
    assert str(report) in line
    text = report.read_text("utf-8")
    assert "raise fault" in text
    assert "KeyError" in text
    assert "secret" not in text


def test_a_fault_whose_report_cannot_be_written_is_told_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = ended(KeyError("x"), monkeypatch, tmp_path / "gone")
    assert result.exit_code == 70
    assert "raise fault" in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = ended(KeyboardInterrupt(), monkeypatch, tmp_path)
    assert result.exit_code == 130
    assert result.stderr.startswith("Stopped")


def test_sigterm_ends_what_is_open_and_exits_with_143() -> None:
    group, closed = Commands("sail"), []

    @group.command("wait")
    def wait() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(group, ["wait"])
    assert result.exit_code == 143
    assert closed
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_message_is_cut_where_nobody_reads_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = ended(StoreError("no" * 10_000), monkeypatch, tmp_path)
    assert len(result.stderr) < 4100


def test_a_thread_of_a_library_leaves_no_traceback_on_the_terminal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    group = Commands("sail")

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    @group.command("begin")
    def begin() -> None:
        thread = threading.Thread(target=fail, name="writer")
        thread.start()
        thread.join()

    with caplog.at_level(logging.WARNING):
        result = CliRunner().invoke(group, ["begin"])
    assert result.exit_code == 0
    assert "Traceback" not in result.stderr
    assert caplog.messages == ["writer ended: OSError: [Errno 28] No space left on device"]


def test_a_line_of_the_log_steers_nothing_and_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    start_log()
    record = logging.LogRecord(
        "features.x", logging.INFO, "x.py", 1, "%s", ("a\x1b]0;x\x07\nError: b\u202e\x9b",), None
    )
    shown = root.handlers[0].format(record)
    assert shown.endswith(r"a\u001b]0;x\u0007\u000aError: b\u202e\u009b")


@pytest.mark.parametrize("value", ["[" * 3000, "9" * 5000, "{a=" * 2000])
def test_a_setting_that_is_too_deep_or_too_long_is_one_line(value: str) -> None:
    from pipeline.cli import cli

    result = CliRunner().invoke(cli, ["plan", "demo", "--set", f"run.seed={value}"])
    assert result.exit_code == 1
    assert len([line for line in result.stderr.splitlines() if line]) == 1
    assert len(result.stderr) < 1000


def test_a_path_that_the_shell_took_apart_is_told_of() -> None:
    result = CliRunner().invoke(cli, ["extract", "a", "x", "y", "[b]/run.toml"])
    assert result.exit_code == 2
    assert "Put quotation marks around a path" in result.stderr

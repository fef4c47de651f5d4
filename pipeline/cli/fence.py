"""How a command ends that did not come to its end: in one line, and with the exit code for it."""

import logging
import platform
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from types import FrameType

import click

from features.errors import SailError, refused
from features.storage.place import without_secrets
from features.terminal import harmless

logger = logging.getLogger(__name__)
MAX_MESSAGE = 4000
NO_MEMORY = (
    "This machine has not enough memory for that. Free memory, or lower the batch sizes; what was "
    "done is kept."
)
OF_THE_MACHINE: Sequence[tuple[type[Exception], str, str]] = (
    (MemoryError, "", NO_MEMORY),
    (RuntimeError, "can't allocate memory", NO_MEMORY),  # as torch says it, of host and device
    (RuntimeError, "out of memory", NO_MEMORY),
    (
        RuntimeError,
        "can't start new thread",
        "This machine starts no more threads. Raise the number of processes (`ulimit -u`), or "
        "lower `run.threads` and `workers`; what was done is kept.",
    ),
    (
        RecursionError,
        "",
        "What was read is nested too deep. A plain file or setting was expected. Correct it, or "
        "write the file again.",
    ),
)
"""Errors that are no fault of the program: their kind, a part of their text, and what is said."""


class _Fault(click.ClickException):
    exit_code = 70  # EX_SOFTWARE of sysexits.h


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT: what is open is closed on the way out."""


@contextmanager
def fence() -> Iterator[None]:
    """End a command in one line, whatever happens in it.

    Errors of ours and of the machine exit with 1, signals with 130 and 143, and what nobody foresaw
    with 70, after its traceback was written to a file.
    """
    try:
        with _terminated_by_signal(), _threads_in_one_line():
            yield
    except (click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except click.ClickException as error:
        split = "unexpected extra argument" in error.message  # as a shell does at blanks
        hint = " Put quotation marks around a path or words with blanks or braces." if split else ""
        vars(error)["message"] = one_message(error.message) + hint
        raise
    except KeyboardInterrupt:
        raise _stopped(signal.SIGINT) from None
    except Terminated:
        raise _stopped(signal.SIGTERM) from None
    except Exception as error:
        if (message := _told(error)) is not None:
            raise click.ClickException(one_message(message)) from error
        raise _fault(error) from error


def one_message(text: str) -> str:
    """Return a message that steers no terminal, and is not longer than anyone reads."""
    text = harmless(text, lines=True)
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}… (cut)"


def _told(error: Exception) -> str | None:
    """Return what the user can put right; None for what is a fault of the program."""
    if isinstance(error, SailError):
        return str(error)
    if isinstance(error, OSError):
        return refused(error, "this command")
    if isinstance(error, UnicodeEncodeError):
        return (
            f"{error.object!r:.200} cannot be written in {error.encoding}. Text in UTF-8 was "
            f"expected. Rename what it names, or set PYTHONUTF8=1."
        )
    found = (
        message
        for kind, words, message in OF_THE_MACHINE
        if isinstance(error, kind) and words in str(error)
    )
    return next(found, None)


def _fault(error: Exception) -> click.ClickException:
    """Write the traceback where it can be sent from, and return what is said of it."""
    report = "\n".join(
        [
            f"sail {_version()}, Python {platform.python_version()}, {platform.platform()}",
            shlex.join(_arguments()),
            "".join(traceback.format_exception(error)),
        ]
    )
    place = "It follows; send it to whoever maintains sail."
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix="sail-fault-",
            suffix=".txt",
            delete=False,
            encoding="utf-8",
            errors="backslashreplace",
        ) as file:
            file.write(without_secrets(report))
        place = f"The traceback is in {file.name}: send it to whoever maintains sail."
    except OSError:
        click.echo(harmless(without_secrets(report), lines=True), err=True)
    kind, text = type(error).__name__, " ".join(str(error).split())[:200]
    return _Fault(
        one_message(
            f"This is a fault of ours, not of your data or settings: {kind}: {text}. A command "
            f"that ends well was expected. {place} What was done is kept."
        )
    )


def _arguments() -> list[str]:
    """Return the command line, without the word that keeps others from a page."""
    words = sys.argv[:]
    for place, word in enumerate(words):
        if word == "--token":
            words[place + 1 : place + 2] = ["…"]
        elif word.startswith("--token="):
            words[place] = "--token=…"
    return words


def _version() -> str:
    try:
        return metadata.version("sail")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _stopped(number: signal.Signals) -> click.exceptions.Exit:
    click.echo("Stopped; what is done is kept.", err=True)
    return click.exceptions.Exit(128 + number)


@contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        with suppress(ValueError, TypeError):  # one that was not set from Python
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _threads_in_one_line() -> Iterator[None]:
    """Let threads of libraries, as that of TensorBoard, end without a traceback on the terminal.

    What they met is raised again where their work is waited for.
    """

    def tell(ended: threading.ExceptHookArgs) -> None:
        name = ended.thread.name if ended.thread else "a thread"
        kind, text = ended.exc_type.__name__, " ".join(str(ended.exc_value).split())
        logger.warning("%s ended: %s: %s", name, kind, text)

    before, threading.excepthook = threading.excepthook, tell
    try:
        yield
    finally:
        threading.excepthook = before

"""The system calls by which a process changes files: each can be recorded, or made to fail.

By seccomp's user notifications the kernel asks this process before each such call of a child and of
all its threads, whatever language they are written in and whatever library they go through (HDF5,
Arrow, Rust, the C library's own buffers). Neither a compiler nor root is needed, but Linux 5.5.
"""

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

SECONDS = 120
NUMBERS = {  # of x86-64
    1: "write",
    2: "open",
    18: "pwrite",
    20: "writev",
    74: "fsync",
    75: "fsync",
    76: "truncate",
    77: "ftruncate",
    82: "rename",
    83: "mkdir",
    84: "rmdir",
    85: "open",
    86: "link",
    87: "unlink",
    88: "symlink",
    257: "open",
    258: "mkdir",
    263: "unlink",
    264: "rename",
    265: "link",
    266: "symlink",
    285: "fallocate",
    296: "writev",
    316: "rename",
}
COPIES = (40, 326)  # sendfile, copy_file_range: refused, so that programs read and write instead
AT_CALLS = (257, 258, 263, 264, 265, 266, 316)
OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT
REMOVING = ("unlink", "rmdir")


@dataclass(frozen=True)
class Call:
    """A call that is about to be made."""

    name: str
    paths: tuple[str, ...]
    """What it is about, absolute; of `rename` and `link` the old and the new name."""
    arguments: tuple[int, ...]
    process: int
    number: int

    def memory(self, address: int, size: int) -> bytes:
        """Read the memory of the process that calls."""
        with Path(f"/proc/{self.process}/mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(size)

    def text(self, address: int) -> bytes:
        """Read a string that ends with a zero."""
        text = b""
        while b"\0" not in text:  # page by page: behind the last one there may be none
            start = address + len(text)
            text += self.memory(start, 4096 - start % 4096)
        return text.split(b"\0")[0]


Answer = Callable[[Call], int | None]
"""Says with which error a call fails; None if it is made."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def is_possible() -> bool:
    """Whether this machine can ask before calls."""
    release = platform.release().split(".")
    is_known = sys.platform == "linux" and platform.machine() == "x86_64"
    return is_known and tuple(int(part) for part in release[:2]) >= (5, 5)


needs_system_calls = pytest.mark.skipif(
    not is_possible(), reason="calls can be made to fail on Linux 5.5 or later on x86-64 only"
)


def run_command(
    context: BaseContext, arguments: Sequence[object], folder: Path, answer: Answer
) -> Ended:
    """Run a `sail` command in a process of its own, which ends as a program does.

    Args:
        context: How the process is started.
        arguments: Of the command.
        folder: Where it runs. Only calls about what is below it are asked for.
        answer: Is asked before each call.
    """
    ours, theirs = socket.socketpair()
    told = folder.with_name(f"{folder.name}.told")
    told.mkdir(exist_ok=True)
    words = [str(argument) for argument in arguments]
    process: Any = context.Process(target=_command, args=(theirs, words, told, folder))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        _, listeners, _, _ = socket.recv_fds(ours, 1, 1)
        ours.send(b"!")
        _answer_all(listeners[0], str(folder), answer, process.pid)
        process.join(SECONDS)
    finally:
        process.kill()
        process.join()
        ours.close()
    texts = [(told / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return Ended(process.exitcode, *texts)


def _command(connection: socket.socket, words: list[str], told: Path, folder: Path) -> None:
    """Become the command: its output goes into files, and its end is that of a C program."""
    from pipeline.cli import cli

    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(told / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.dont_write_bytecode = True
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listener = _listener()
    socket.send_fds(connection, [b"!"], [listener])
    connection.recv(1)
    os.close(listener)
    code: Any = 0
    try:
        cli.main(words)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).exit(int(code or 0))  # not os._exit: libraries have work to do at the end


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("first", ctypes.POINTER(_Instruction)))


LOAD, EQUALS, HAS_BITS, GREATER, RETURN = 0x20, 0x15, 0x45, 0x25, 0x06
ASK, LET, REFUSE = 0x7FC00000, 0x7FFF0000, 0x00050000


def _listener() -> int:
    """Have this process ask before its calls; return the file by which it is answered."""
    rules = [(LOAD, 0, 0, 0)]
    for number in COPIES:
        rules += [(EQUALS, 0, 1, number), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    for number, name in NUMBERS.items():
        if name == "open" and number != 85:
            flags = 16 + 8 * (2 if number == 257 else 1)
            rules += [
                *((EQUALS, 0, 4, number), (LOAD, 0, 0, flags), (HAS_BITS, 0, 1, OPEN_TO_WRITE)),
                *((RETURN, 0, 0, ASK), (RETURN, 0, 0, LET)),
            ]
        elif name in ("write", "writev"):  # not those to stdout and stderr
            rules += [
                *((EQUALS, 0, 4, number), (LOAD, 0, 0, 16), (GREATER, 0, 1, 2)),
                *((RETURN, 0, 0, ASK), (RETURN, 0, 0, LET)),
            ]
        else:
            rules += [(EQUALS, 0, 1, number), (RETURN, 0, 0, ASK)]
    rules.append((RETURN, 0, 0, LET))
    instructions = (_Instruction * len(rules))(*[_Instruction(*rule) for rule in rules])
    program = _Program(len(rules), instructions)
    system = ctypes.CDLL(None, use_errno=True)
    if system.prctl(38, 1, 0, 0, 0):  # no new privileges
        raise OSError(ctypes.get_errno(), "prctl")
    listener: int = system.syscall(317, 1, 8, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


RECEIVE, SEND, CONTINUE = 0xC0502100, 0xC0182101, 1


def _answer_all(listener: int, folder: str, answer: Answer, process: int) -> None:
    """Answer until the process, and all that it has started, have ended."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    deadline = time.monotonic() + SECONDS
    try:
        while time.monotonic() < deadline:
            events = poll.poll(1000)
            if any(event & select.POLLHUP for _, event in events):
                return
            if not events:
                continue
            try:
                asked = bytearray(80)
                fcntl.ioctl(listener, RECEIVE, asked)
            except OSError:  # the thread was killed meanwhile
                continue
            identity, pid, _, number, _, _, *values = struct.unpack("<QIIiIQ6Q", asked)
            call = _call(number, pid, values)
            failing = None
            if any(path.startswith(folder) for path in call.paths):
                failing = answer(call)
            reply = struct.pack(
                "<QqiI", identity, 0, -failing if failing else 0, 0 if failing else CONTINUE
            )
            try:
                fcntl.ioctl(listener, SEND, bytearray(reply))
            except OSError:
                continue
        os.kill(process, signal.SIGKILL)
        raise TimeoutError(f"the command did not end in {SECONDS} s")
    finally:
        os.close(listener)


def _call(number: int, process: int, values: Sequence[int]) -> Call:
    call = Call(NUMBERS[number], (), tuple(values), process, number)

    def path(address: int, folder: int | None) -> str:
        text = os.fsdecode(call.text(address))
        if not text.startswith("/"):
            where = "cwd" if folder in (None, 0xFFFFFF9C) else f"fd/{folder}"
            text = f"{os.readlink(f'/proc/{process}/{where}')}/{text}"  # noqa: PTH115
        return os.path.normpath(text)

    name, is_at = call.name, number in AT_CALLS
    try:
        if name in ("write", "pwrite", "writev", "fsync", "ftruncate", "fallocate"):
            paths = [os.readlink(f"/proc/{process}/fd/{values[0]}")]  # noqa: PTH115
        elif name == "symlink":
            paths = [path(values[2], values[1] & 0xFFFFFFFF) if is_at else path(values[1], None)]
        elif name in ("rename", "link"):
            places = [(values[1], values[0]), (values[3], values[2])]
            every = places if is_at else [(values[0], None), (values[1], None)]
            paths = [path(at, None if of is None else of & 0xFFFFFFFF) for at, of in every]
        else:
            at, of = (values[1], values[0] & 0xFFFFFFFF) if is_at else (values[0], None)
            paths = [path(at, of)]
    except OSError:  # the descriptor is none
        paths = []
    return Call(name, tuple(paths), tuple(values), process, number)

"""Streams, events and the current device of each thread, as CUDA has them; nothing is computed.

An operation has a stream and a number in it. A clock says, for some streams, up to which number
everything is done: an event carries the clock of its stream, a stream that waits for it takes the
clock over, and so does the host. Two accesses of one memory, one of them a write, race if neither
comes before the other by these clocks.
"""

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Optional

import torch

GPUS = 2
PAUSE = 0.005
"""Seconds that a wait for late work takes, in which other threads may do what they should not."""

Clock = dict["Stream", int]

lock = threading.RLock()
host: Clock = {}
"""What the host knows to be done; all threads as one, which hides races that only one would see."""
is_late = False
"""Whether copies that the host does not wait for are made only when it waits: as late as may be."""
contexts: set[int] = set()
"""Devices on which something was made: each costs some hundred MB."""
on_wait: list[Callable[[str], None]] = []
"""Are told of every wait of the host."""

_here = threading.local()
_default: dict[int, "Stream"] = {}
_all = weakref.WeakSet["Stream"]()
_numbers = itertools.count()


def index_of(device: Any = None) -> int:
    """Number of a device as CUDA's functions take it: None and `cuda` are the current one."""
    index = device if isinstance(device, int) else None
    if device is not None and not isinstance(device, int):
        index = torch.device(device).index
    index = current_device() if index is None or index < 0 else index
    if index >= GPUS:
        raise torch.AcceleratorError("CUDA error: invalid device ordinal")
    return index


def current_device() -> int:
    index: int = getattr(_here, "device", 0)
    return index


def set_device(device: Any) -> None:
    _here.device = index_of(device)


class Device:
    """`torch.cuda.device`: makes a device the current one for a while."""

    def __init__(self, device: Any) -> None:
        self._index = index_of(device)

    def __enter__(self) -> None:
        self._before, _here.device = current_device(), self._index

    def __exit__(self, *_: object) -> None:
        _here.device = self._before


class Stream:
    """A queue of operations of one device, which are done in order."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = torch.device("cuda", index_of(device))
        self.device_index = self.device.index
        self.number = next(_numbers)
        self.launched = 0
        self.after: Clock = {}
        """What of other streams comes before all that is launched from now on."""
        self._late: deque[tuple[int, Callable[[], object]]] = deque()
        _all.add(self)
        contexts.add(self.device_index)

    def __repr__(self) -> str:
        return f"stream {self.number} of cuda:{self.device.index}"

    @property
    def clock(self) -> Clock:
        return self.after | {self: self.launched}

    @property
    def is_behind(self) -> bool:
        """Whether work was launched that is not done."""
        return bool(self._late)

    def launch(self) -> int:
        with lock:
            contexts.add(self.device_index)
            self.launched += 1
            return self.launched

    def later(self, work: Callable[[], object], number: int | None = None) -> None:
        """Do some work when somebody waits for it, and not before."""
        with lock:
            self._late.append((number or self.launch(), work))

    def catch_up(self, number: int) -> None:
        """Do what was launched up to a number."""
        if self._late:
            time.sleep(PAUSE)
        with lock:
            while self._late and self._late[0][0] <= number:
                self._late.popleft()[1]()

    def synchronize(self) -> None:
        _wait("stream.synchronize", self.clock)

    def wait_event(self, event: "Event") -> None:
        with lock:
            self.after = _both(self.after, event.clock)
            if any(stream.is_behind for stream in event.clock):
                self.later(lambda: _do(event.clock))

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Optional["Event"] = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return not self.is_behind


class Event:
    """A place in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        with lock:
            contexts.add(stream.device_index)
            self.clock = stream.clock

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        _wait("event.synchronize", self.clock)

    def query(self) -> bool:
        return not any(stream.is_behind for stream in self.clock)

    def elapsed_time(self, _: "Event") -> float:
        return 1.0


class Current:
    """`torch.cuda.stream`: makes a stream and its device the current ones for a while."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = current_device(), getattr(_here, "streams", {})
        if (stream := self._stream) is not None:
            _here.device = stream.device.index
            _here.streams = {**self._before[1], stream.device.index: stream}

    def __exit__(self, *_: object) -> None:
        _here.device, _here.streams = self._before


def default_stream(device: Any = None) -> Stream:
    with lock:
        index = index_of(device)
        if index not in _default:
            _default[index] = Stream(index)
        return _default[index]


def current_stream(device: Any = None) -> Stream:
    found: Stream | None = getattr(_here, "streams", {}).get(index_of(device))
    return found or default_stream(device)


def synchronize(device: Any = None) -> None:
    clock: Clock = {}
    for stream in [each for each in _all if each.device_index == index_of(device)]:
        clock = _both(clock, stream.clock)
    _wait("torch.cuda.synchronize", clock)


def wait_for(stream: Stream, what: str) -> None:
    """Let the host wait for all that a stream was given."""
    _wait(what, stream.clock)


def _wait(what: str, clock: Clock) -> None:
    _do(clock)
    with lock:
        host.update(_both(host, clock))
    for told in on_wait:
        told(what)


def _do(clock: Clock) -> None:
    for stream, number in clock.items():
        stream.catch_up(number)


def _both(one: Clock, other: Clock) -> Clock:
    return {each: max(one.get(each, 0), other.get(each, 0)) for each in {*one, *other}}


def is_before(stream: Stream | None, number: int, later: Stream | None) -> bool:
    """Whether an operation is done before what a stream, or the host, does now."""
    if stream is None or host.get(stream, 0) >= number:
        return True  # the host's own accesses are in the order of the program
    return later is not None and (later is stream or later.after.get(stream, 0) >= number)

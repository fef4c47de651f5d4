"""Many requests at once, since each of them mostly waits."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

from features.storage.place import Place, RemotePath

T = TypeVar("T")
U = TypeVar("U")
IN_FLIGHT = 32
"""Requests at once where there are many."""


def in_order(
    function: Callable[[T], U], items: Iterable[T], *, at: Place | Iterable[Place]
) -> Generator[U, None, None]:
    """Yield `function(item)` in order; where it waits for a server, many at once.

    Args:
        function: Called by several threads if any place is under a URL.
        items: Taken no further ahead than there are requests at once.
        at: The place or places that it reads or writes.
    """
    remaining = iter(items)
    places = [at] if isinstance(at, RemotePath) else at if isinstance(at, Iterable) else []
    first = list(islice(remaining, 2)) if any(isinstance(it, RemotePath) for it in places) else []
    items = chain(first, remaining)
    if len(first) < 2:
        yield from map(function, items)
        return
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT, "sail-request") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= IN_FLIGHT:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

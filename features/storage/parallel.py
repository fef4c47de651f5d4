"""Many requests at once, since each of them mostly waits."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
IN_FLIGHT = 32
"""Requests at once where there are many."""


def in_order(
    function: Callable[[T], U], items: Iterable[T], *, remote: bool
) -> Generator[U, None, None]:
    """Yield `function(item)` in order; where it waits for a server, many at once.

    Args:
        function: Called by several threads if `remote`.
        items: Taken no further ahead than there are requests at once.
        remote: Whether to do so.
    """
    if not remote:
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

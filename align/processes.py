"""The processes of one training as a ring: each passes its texts on to the next.

Every process has as many images. The texts travel, the images stay: after as many hops as there are
processes every image has met every text once, and no process ever held more than two shares of
texts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Ring:
    """This process and its neighbours; alone if not told otherwise."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_processes(cls) -> "Ring":
        """Return the ring of all processes of torch.distributed, or of this one alone."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which writes the files."""
        return self.rank == 0

    def tour(self, constant: T, changing: U) -> Iterator[tuple[int, T, U]]:
        """Yield the tensors of every process, our own first; in the end ours have come back.

        Args:
            constant: A dataclass of tensors that others only read; it travels on meanwhile.
            changing: One of tensors that every process may add to, in place. Ours are complete
                after the tour.

        Yields:
            The rank of the process that they belong to, its constant and its changing tensors.
        """
        here, passing = _tensors(constant), _tensors(changing)
        for hop in range(self.size):
            coming = self._send(here) if hop + 1 < self.size else _Coming(here)
            owner = (self.rank - hop) % self.size
            yield owner, _with_tensors(constant, here), _with_tensors(changing, passing)
            here = coming.wait()
            if self.size > 1:
                passing = self._send(passing).wait()
        for ours, returned in zip(_tensors(changing), passing, strict=True):
            if ours is not returned:
                ours.copy_(returned)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, the same on each."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def sum_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def greatest(self, *numbers: int) -> list[int]:
        """Return the greatest of each number over all processes; a barrier for all of them."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers or (0,))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        greatest: list[int] = found.tolist()
        return greatest

    def from_first(self, scores: dict[str, float]) -> dict[str, float]:
        """Return the scores of the first process on all of them."""
        held = [scores]
        if self.size > 1:
            dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def _send(self, tensors: Sequence[Tensor]) -> "_Coming":
        """Begin to send tensors to the next process and to receive those of the one before."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        outgoing = [tensor.contiguous() for tensor in tensors]
        received = [torch.empty_like(tensor) for tensor in outgoing]
        operations = [dist.P2POp(dist.isend, tensor, after) for tensor in outgoing]
        operations += [dist.P2POp(dist.irecv, tensor, before) for tensor in received]
        return _Coming(received, tuple(dist.batch_isend_irecv(operations)), tuple(outgoing))


@dataclass(frozen=True)
class _Coming:
    """Tensors in flight."""

    tensors: list[Tensor]
    works: tuple[dist.Work, ...] = ()
    kept: tuple[Tensor, ...] = ()
    """Tensors that are being sent, which must not be freed before they are."""

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.tensors


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """Apply a function to every tensor of a dataclass and of the dataclasses in it."""
    if isinstance(value, Tensor):
        return cast(T, function(value))
    if is_dataclass(value) and not isinstance(value, type):
        changed = {
            each.name: map_tensors(getattr(value, each.name), function) for each in fields(value)
        }
        return cast(T, replace(value, **changed))
    return value


def _tensors(value: Any) -> list[Tensor]:
    found = list[Tensor]()

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, add)
    return found


def _with_tensors(value: T, tensors: Sequence[Tensor]) -> T:
    remaining = iter(tensors)
    return map_tensors(value, lambda _: next(remaining))

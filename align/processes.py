"""The processes of one training as a ring: what each must see of the others comes by in turn.

Every process has as many images. The texts travel, the images stay: after as many hops as there are
processes every image has met every text once, and nobody ever held more than two shares of texts.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Tensors = list[Tensor]


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
        """Whether this is the first process, the one that writes."""
        return self.rank == 0

    def tour(
        self, constant: Sequence[Tensor], changing: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensors, Tensors]]:
        """Yield the tensors of every process, our own first, and take all home in the end.

        Args:
            constant: What others only read; it travels on while it is read.
            changing: What every process may add to, in place. Ours are complete after the tour.

        Yields:
            The rank that the tensors belong to, its constant and its changing ones.
        """
        here, carried = list(constant), list(changing)
        for hop in range(self.size):
            coming = self._send(here) if hop + 1 < self.size else _Coming(here)
            yield (self.rank - hop) % self.size, here, carried
            here = coming.wait()
            if self.size > 1:
                carried = self._send(carried).wait()
        for ours, returned in zip(changing, carried, strict=True):
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
        """Return the greatest over all processes of each number; so all of them come here first."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers or (0,))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        greatest: list[int] = found.tolist()
        return greatest

    def from_first(self, scores: dict[str, float]) -> dict[str, float]:
        """Return the scores that the first process has, whatever the others give."""
        if self.size == 1:
            return scores
        text = json.dumps(scores).encode()
        (size,) = self.greatest(len(text) * self.leads)
        letters = torch.zeros(size, dtype=torch.uint8)
        if self.leads:
            letters[:] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(letters, src=0)
        told: dict[str, float] = json.loads(letters.numpy().tobytes())
        return told

    def _send(self, tensors: Sequence[Tensor]) -> "_Coming":
        """Begin to pass tensors to the next process and to receive those of the one before."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        outgoing = [tensor.contiguous() for tensor in tensors]
        received = [torch.empty_like(tensor) for tensor in outgoing]
        operations = [dist.P2POp(dist.isend, tensor, after) for tensor in outgoing]
        operations += [dist.P2POp(dist.irecv, tensor, before) for tensor in received]
        return _Coming(received, tuple(dist.batch_isend_irecv(operations)), tuple(outgoing))


@dataclass(frozen=True)
class _Coming:
    """Tensors that are on their way."""

    tensors: Tensors
    works: tuple[dist.Work, ...] = ()
    kept: tuple[Tensor, ...] = ()
    """What is being sent must stay in memory until it is gone."""

    def wait(self) -> Tensors:
        for work in self.works:
            work.wait()
        return self.tensors

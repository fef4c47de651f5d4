"""A GPU that is simulated on a processor, for what of our code no processor would notice.

Tensors say that they are on `cuda:N`, and are computed on the CPU. What a GPU refuses is refused:
tensors of two devices in one operation, numpy on the memory of a device, a device that is not
there. What it only does badly is counted in `seen`: waits of the host by the function that waits,
pageable copies, and races (see `streams`, which knows the devices with a context too). With
`streams.is_late` the GPU is as late as its events allow, so that a race gives wrong numbers. With
SIMULATED_META=1 it has no memory: operations give shapes alone, at real sizes, and the bytes that
they would hold.

It cannot show the numbers of CUDA's kernels, how fast anything is, what NCCL or a driver does,
fragmentation of memory, memory that the caching allocator gives to another stream too early, or
races between two threads of the host.

`install` puts it in the place of `torch.cuda`, for the rest of the process.
"""

import itertools
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

from tests.simulated_cuda import build

build.load()

import torch  # noqa: E402 - after the library that it asks for its devices
from torch.nn import functional as F  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from tests.simulated_cuda import streams  # noqa: E402
from tests.simulated_cuda.streams import Stream, current_stream, is_before  # noqa: E402

META = os.environ.get("SIMULATED_META") == "1"
CAPABILITY = (9, 0)  # of a Hopper
GIB = 1 << 30
HERE = str(Path(__file__).parent)
OURS = tuple(
    f"{build.ROOT}/{name}/" for name in ("pipeline", "features", "align", "evaluate", "tests")
)
MEMORY = "meta" if META else "cpu"
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "masked_select"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
aten = torch.ops.aten


@dataclass
class Seen:
    """What was noticed since `clear`."""

    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """Times that the host waited: what for, in which thread, in which function."""
    pageable: Counter[str] = field(default_factory=Counter)
    """Bytes copied to or from memory of the host that is not pinned, by function."""
    races: dict[tuple[str, str], str] = field(default_factory=dict)
    """What was read or written while nothing said that a write was done; by both lines."""
    held: int = 0
    """Bytes of all tensors that there are."""
    peak: int = 0
    peak_at: str = ""
    allocations: int = 0
    room: int = 141 * GIB
    """Bytes of each device."""
    fails_at: int = -1
    """Number of the allocation that finds no memory, from 1 after `clear`."""
    fails_in: str = ""
    """File or function whose allocations are counted; all if empty."""
    fails_with: type[RuntimeError] = torch.OutOfMemoryError
    """What it raises; `torch.AcceleratorError` is what CUDA says by itself."""

    def peak_of(self, *_: object) -> int:
        """The most that was held since `forget_peak`."""
        return self.peak

    def forget_peak(self, *_: object) -> None:
        """Begin anew from what is held."""
        self.peak = self.held

    def clear(self) -> None:
        """Forget all but what is held."""
        for each in (self.waits, self.pageable, self.races, streams.contexts):
            each.clear()
        self.peak, self.allocations, self.fails_at, self.fails_in = self.held, 0, -1, ""


seen = Seen()
refuses_to_wait = False


def where(*, with_line: bool = True) -> str:
    """The innermost function of our own code, and the line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _place(frame.f_code):
        frame = frame.f_back
    if frame is None:
        return "?"
    return f"{_place(frame.f_code)}:{frame.f_lineno}" if with_line else _place(frame.f_code)


@cache
def _place(code: CodeType) -> str:
    """File and function, empty where it is not of our code."""
    file = code.co_filename
    is_simulation = file.startswith(HERE) and not file.startswith(f"{HERE}/inside/")
    if is_simulation or not file.startswith(OURS):
        return ""
    return f"{Path(file).relative_to(build.ROOT)}:{code.co_qualname}"


def _noticed_wait(what: str) -> None:
    thread = threading.current_thread().name.split("_")[0]
    seen.waits[what, thread, where(with_line=False)] += 1
    if refuses_to_wait and "synchronize" not in what:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what} at {where()}")


streams.on_wait.append(_noticed_wait)


@dataclass
class Memory:
    """What is known of one storage while a tensor has it."""

    size: int
    tensors: int = 0
    accesses: list[tuple[Stream | None, int, bool, range, str]] = field(default_factory=list)


_memories: dict[int, Memory] = {}
_pinned: dict[int, torch.UntypedStorage] = {}


class SimulatedTensor(torch.Tensor):
    """Says that it is on a GPU; `on_host` is where its numbers are."""

    on_host: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: Any) -> "SimulatedTensor":
        index = streams.index_of(device)
        with torch.inference_mode(False):
            made: Any = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                layout=inner.layout,
                device=torch.device("cuda", index),
            )
        made.on_host = inner.detach() if inner.requires_grad else inner
        streams.contexts.add(index)
        _hold(made)
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.device}, {tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> Any:
        copy = SimulatedTensor(self.on_host.clone(), self.device).requires_grad_(self.requires_grad)
        if hasattr(self, "_is_param"):
            copy._is_param = True
        memo[id(self)] = copy
        return copy

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.on_host.data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


def _hold(tensor: SimulatedTensor) -> None:
    storage = tensor.on_host.untyped_storage()
    key = storage._cdata
    with streams.lock:
        if key not in _memories:
            size = storage.nbytes()
            is_counted = not seen.fails_in or seen.fails_in in where()
            seen.allocations += is_counted
            fails = is_counted and seen.allocations == seen.fails_at
            if fails or seen.held + size > seen.room:
                raise seen.fails_with(f"CUDA out of memory. Tried to allocate {size} bytes.")
            seen.held += size
            if seen.held > seen.peak:
                seen.peak, seen.peak_at = seen.held, where()
            _memories[key] = Memory(size)
        _memories[key].tensors += 1
    weakref.finalize(tensor, _let_go, key, storage)


def _let_go(key: int, _: torch.UntypedStorage) -> None:
    """Count a tensor less; the storage is an argument so that it lives until then."""
    with streams.lock:
        memory = _memories[key]
        memory.tensors -= 1
        if not memory.tensors:
            seen.held -= _memories.pop(key).size


def _note(tensor: torch.Tensor, stream: Stream, number: int, *, writes: bool) -> None:
    """Write down that a stream reads or writes a tensor, and which accesses that races with."""
    if META or not tensor.numel():
        return
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset() * tensor.element_size()
    span, at = range(first, first + (reach + 1) * tensor.element_size()), where()
    with streams.lock:
        memory = _memories.get(tensor.untyped_storage()._cdata)
        if memory is None:
            return  # of the host: nothing says when that is read or written
        kept = []
        for access in memory.accesses:
            other, then, wrote, before, line = access
            meet = before.start < span.stop and span.start < before.stop
            if meet and (wrote or writes) and not is_before(other, then, stream):
                words = f"{'write' if wrote else 'read'} by {other} at {line}, then unordered "
                words += f"{'write' if writes else 'read'} by {stream} at {at}"
                seen.races.setdefault((line, at), words)
            if other is None or streams.host.get(other, 0) < then:
                kept.append(access)
        memory.accesses = [*kept, (stream, number, writes, span, at)][-400:]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _inner(value: Any) -> Any:
    return value.on_host if isinstance(value, SimulatedTensor) else value


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[torch.Tensor, bool]]:
    """Every tensor that an operation is given, and whether it is written."""
    schema = func._schema.arguments
    by_name = {each.name: each for each in schema}
    given = [*zip(schema, args, strict=False), *((by_name[k], v) for k, v in kwargs.items())]
    for argument, value in given:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        yield from ((tensor, writes) for tensor in _tensors(value))


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.split("::")[1]
    if name in DONE_APART:
        return DONE_APART[name](*args, **kwargs)
    operation = _Operation(name, func, args, kwargs)
    if operation.device is None:
        return operation.compute()
    return operation.launch(current_stream(operation.device))


class _Operation:
    """A call of an operator of torch, on one device."""

    def __init__(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        self._name, self._func, self._args = name, func, args
        self._given = list(_arguments(func, args, kwargs))
        self.device = _device_of(name, [tensor for tensor, _ in self._given])
        if kwargs.get("device") is not None:
            wanted = torch.device(kwargs["device"])
            self.device = wanted if wanted.type == "cuda" else None
            kwargs = {**kwargs, "device": MEMORY if self.device else "cpu"}
        self._kwargs = kwargs

    def compute(self) -> Any:
        args, kwargs = tree_map(_inner, self._args), tree_map(_inner, self._kwargs)
        if self._name == "_varlen_attn":
            return _varlen(*args, **kwargs)
        return self._func(*args, **kwargs)

    def launch(self, stream: Stream) -> Any:
        """Do it, or leave it to the stream that is behind."""
        _wait_if_it_must(self._name, self._args, self._given, stream)
        if META and self._name == "_local_scalar_dense":
            return 1.0
        aliases = [each.alias_info for each in self._func._schema.arguments]
        if any(each is not None and not each.is_write for each in aliases):
            return tree_map(self._wrapped, self.compute())  # a view: no kernel
        number = stream.launch()
        for tensor, writes in self._given:
            if isinstance(tensor, SimulatedTensor):
                _note(tensor.on_host, stream, number, writes=writes)
        written = self._returned()
        if stream.is_behind and written and all(each.numel() for each in written):
            stream.later(self.compute, number)
        else:
            if self._given:
                stream.catch_up(stream.launched)  # its numbers are needed for what is made of them
            made = self.compute()
            if not written:
                return tree_map(self._wrapped, made)
            self._resize(written)
        return written[0] if len(written) == 1 else tuple(written)

    def _returned(self) -> list[torch.Tensor]:
        """What an operation in place gives back; nothing where it makes something new."""
        written = [tensor for tensor, writes in self._given if writes]
        returns = self._func._schema.returns
        is_same = len(returns) == len(written) and all(each.alias_info for each in returns)
        return written if is_same else []

    def _resize(self, written: list[torch.Tensor]) -> None:
        for tensor in written:
            if isinstance(tensor, SimulatedTensor) and tensor.shape != tensor.on_host.shape:
                tensor.data = SimulatedTensor(tensor.on_host, tensor.device)

    def _wrapped(self, value: Any) -> Any:
        is_new = isinstance(value, torch.Tensor) and not isinstance(value, SimulatedTensor)
        return SimulatedTensor(value, self.device) if is_new else value


def _device_of(name: str, given: list[torch.Tensor]) -> torch.device | None:
    """The device of an operation; raises what torch raises where there are two."""
    ours = {tensor.device for tensor in given if isinstance(tensor, SimulatedTensor)}
    for tensor in given:
        is_index = name in INDEXING and not tensor.is_floating_point()
        if not isinstance(tensor, SimulatedTensor) and tensor.dim() and not is_index:
            ours.add(tensor.device)
    if len(ours) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, ours)))}! ({name} at {where()})"
        )
    return ours.pop() if ours else None


def _wait_if_it_must(name: str, args: Any, given: Any, stream: Stream) -> None:
    if name in WAITING:
        streams.wait_for(stream, name)
    if name in INDEXING:
        for tensor in _tensors(args[1]):
            if not isinstance(tensor, SimulatedTensor):
                seen.pageable[where(with_line=False)] += tensor.nbytes
                streams.wait_for(stream, "an index of the host")
            elif tensor.dtype in (torch.bool, torch.uint8):
                streams.wait_for(stream, "a mask as index")


def _copy_into(into: Any, source: Any, non_blocking: bool = False) -> Any:
    target, values = _inner(into), _inner(source)
    stream, number, is_async = _note_copy(into, source, non_blocking)
    if META:
        if not isinstance(into, SimulatedTensor):
            target.zero_()
    elif stream.is_behind or (streams.is_late and is_async):
        stream.later(lambda: target.copy_(values), number)
    else:
        target.copy_(values)
    if not is_async:
        streams.wait_for(stream, "a copy that blocks")
    return into


def _copied(source: Any, *, device: Any = None, non_blocking: bool = False, **kind: Any) -> Any:
    device = source.device if device is None else torch.device(device)
    kind.pop("pin_memory", None)
    on_gpu = device.type == "cuda"
    if isinstance(source, SimulatedTensor):
        current_stream(source.device).catch_up(current_stream(source.device).launched)
    if META:
        kind["device"] = "meta" if on_gpu else "cpu"
    if META and not on_gpu:
        made = torch.zeros(source.shape, dtype=kind.get("dtype") or source.dtype)
    else:
        made = aten._to_copy(_inner(source), **kind)
    result = SimulatedTensor(made, device) if on_gpu else made
    stream, _, is_async = _note_copy(result, source, non_blocking)
    if not is_async:
        streams.wait_for(stream, "a copy that blocks")
    return result


def _note_copy(into: Any, source: Any, non_blocking: bool) -> tuple[Stream, int, bool]:
    """Write down a copy: its stream and number, and whether the host goes on meanwhile."""
    to_gpu, from_gpu = isinstance(into, SimulatedTensor), isinstance(source, SimulatedTensor)
    stream = current_stream((into if to_gpu else source).device)
    number, is_async = stream.launch(), True
    if from_gpu:
        _note(source.on_host, stream, number, writes=False)
    if to_gpu:
        _note(into.on_host, stream, number, writes=True)
    if not (to_gpu and from_gpu):
        of_host = source if to_gpu else into
        if not is_pinned(of_host) and of_host.dim():
            seen.pageable[where(with_line=False)] += of_host.nbytes
        is_async = non_blocking and is_pinned(of_host)
    return stream, number, is_async


# The choice of attention is that which is written out: its numbers are those of the definition.
DONE_APART: dict[str, Callable[..., Any]] = {
    "copy_": _copy_into,
    "_to_copy": _copied,
    "_fused_sdp_choice": lambda *_, **__: 0,
}


def _varlen(*args: Any, **kwargs: Any) -> Any:
    """Attend within runs of packed tokens, as the kernel would; and demand what it demands."""
    names = ("query", "key", "value", "starts", "_", "_", "_", "is_causal", "scale")
    given = dict(zip(names, args, strict=False)) | kwargs
    q, k, v = (given[name] for name in names[:3])
    assert q.dtype in (torch.float16, torch.bfloat16), q.dtype
    assert {each.stride(-1) for each in (q, k, v)} == {1}
    assert q.shape[-1] % 8 == 0 and given["starts"].dtype == torch.int32  # noqa: PT018
    result = torch.empty_like(q)
    if not META:
        for first, last in itertools.pairwise(given["starts"].tolist()):
            run = [each[first:last].transpose(0, 1).float()[None] for each in (q, k, v)]
            attended = F.scaled_dot_product_attention(
                run[0],
                run[1],
                run[2],
                scale=given.get("scale"),
                is_causal=bool(given.get("is_causal")),
                enable_gqa=q.shape[1] != k.shape[1],
            )
            result[first:last] = attended[0].transpose(0, 1).to(q.dtype)
    sums = torch.empty(q.shape[1], q.shape[0], device=MEMORY)
    return result, sums, torch.empty(2, dtype=torch.int64, device=MEMORY)


_empty = torch.empty
_factories = torch.library.Library("aten", "IMPL", "CUDA")


def _new(
    size: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Any:
    shape = memory_format or torch.contiguous_format
    kind = dtype or torch.get_default_dtype()
    return SimulatedTensor(_empty(size, dtype=kind, memory_format=shape, device=MEMORY), device)


def _new_strided(
    size: Any,
    stride: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Any:
    kind = dtype or torch.get_default_dtype()
    made = torch.empty_strided(size, stride, dtype=kind, device=MEMORY)
    return SimulatedTensor(made, device)


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    """Say of the memory of a tensor that it is pinned; it is kept as long as any tensor has it."""
    if isinstance(tensor, SimulatedTensor):
        raise RuntimeError("Only dense CPU tensors can be pinned")
    with streams.lock:
        for key, storage in list(_pinned.items()):
            if torch._C._storage_Use_Count(storage._cdata) == 1:
                del _pinned[key]
        storage = tensor.untyped_storage()
        _pinned[storage._cdata] = storage
    if not streams.contexts:  # torch pins by way of a device that has a context, if one has
        streams.contexts.add(streams.current_device())
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage()._cdata in _pinned


def _set_sync_debug_mode(mode: int | str) -> None:
    global refuses_to_wait
    refuses_to_wait = mode in (2, "error")


def _properties(_: Any = None) -> Any:
    major, minor = CAPABILITY
    name = f"Simulated GPU {major}.{minor}"
    return SimpleNamespace(name=name, total_memory=seen.room, major=major, minor=minor)


def install() -> None:
    """Put the simulated GPUs in the place of `torch.cuda`, until the process ends."""
    _factories.impl("empty.memory_format", _new)
    _factories.impl("empty_strided", _new_strided)
    _factories.impl("copy_", _copy_into)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    cuda: Any = torch.cuda
    for name in ("Stream", "Event", "current_stream", "default_stream", "current_device"):
        setattr(cuda, name, getattr(streams, name))
    cuda.set_device, cuda.synchronize = streams.set_device, streams.synchronize
    cuda.device, cuda.stream = streams.Device, streams.Current
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: streams.GPUS
    cuda._lazy_init = cuda.empty_cache = lambda: None
    cuda.manual_seed_all = cuda.set_rng_state = lambda *_: None
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    cuda.get_device_properties = _properties
    cuda.get_device_name = lambda *_: _properties().name
    cuda.get_device_capability = lambda *_: CAPABILITY
    # By emulation every GPU has it.
    cuda.is_bf16_supported = lambda including_emulation=True: (
        including_emulation or CAPABILITY >= (8,)
    )
    cuda.max_memory_allocated, cuda.reset_peak_memory_stats = seen.peak_of, seen.forget_peak
    cuda.mem_get_info = lambda *_: (seen.room - seen.held, seen.room)
    cuda.set_sync_debug_mode = _set_sync_debug_mode
    cuda.amp.common.amp_definitely_not_available = lambda: False
    empty_like = torch.empty_like

    def pinned_empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        made = _empty(*args, **kwargs)
        return _pin(made) if pin_memory else made

    def pinned_empty_like(like: Any, *, pin_memory: bool = False, **kwargs: Any) -> Any:
        made = empty_like(like, **kwargs)
        return _pin(made) if pin_memory else made

    torch.empty, torch.empty_like = pinned_empty, pinned_empty_like  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self, *_: _pin(self.clone())  # type: ignore[method-assign]
    torch.Tensor.is_pinned = lambda self, *_: is_pinned(self)  # type: ignore[method-assign]


def host_copy(tensor: torch.Tensor) -> Any:
    """The numbers of a tensor as they are now, whatever its stream has still to do."""
    return _inner(tensor).numpy().copy()


def reads_later(stream: Stream, tensors: Iterable[torch.Tensor], work: Callable[[], None]) -> None:
    """Launch a kernel that reads tensors when somebody waits for it, and not before."""
    number = stream.launch()
    for tensor in tensors:
        _note(_inner(tensor), stream, number, writes=False)
    stream.later(work, number)

"""A capturer for the CPU: it writes down each call of ATen, and makes the same calls again.

As a CUDA graph does, a replay knows addresses and whatever the host said at the capture, and
nothing else: what a step had from the host once is what it gets ever after. And as there, nothing
of a capture is seen outside: what is written to others' memory is written down, and not written;
KV that lies behind a table of blocks is not read either, as there may be no memory behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_HOST_READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")
_BY_INDEX = torch.ops.aten.index_select.default


@dataclass
class _Call:
    """One call, to be made again over the same memory."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    """What it made, each in memory of its own, in which it is made again."""
    onednn: bool

    def __call__(self) -> None:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(self.onednn)
        try:
            found = _tensors(self.operator(*self.args, **self.kwargs))
        finally:
            torch._C._set_mkldnn_enabled(before)
        for there, again in zip(self.outputs, found, strict=bool(self.outputs)):
            assert (there.shape, there.stride()) == (again.shape, again.stride())
            there.copy_(again)


@dataclass
class Recording:
    """A step that was captured."""

    handle: int | None = None
    calls: list[_Call] = field(default_factory=list)
    replayed: Callable[[], object] = lambda: None
    closed: bool = False

    @torch.inference_mode()
    def replay(self) -> None:
        assert not self.closed
        self.replayed()
        for call in self.calls:
            call()

    def close(self) -> None:
        self.closed = True
        self.calls.clear()


class _Writing(TorchDispatchMode):
    """Writes calls down while they are made."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self._calls = calls
        self._own: dict[int, Tensor] = {}
        """Storages that were made within the capture, kept alive: no address comes twice."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch's compiler is imported, which a worker's torch has no place for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert not str(func).startswith(_HOST_READS), f"{func} waits for the device"
        given = [*_tensors(args), *_tensors(list(kwargs.values()))]
        mutable = func._schema.is_mutable
        call = _Call(func, args, kwargs, [], torch._C._get_mkldnn_enabled())
        if mutable and not self._is_own(_written(func, args, kwargs)):
            self._calls.append(call)
            return _written(func, args, kwargs)
        if func is _BY_INDEX and not self._is_own(args[0]):
            shape = list(args[0].shape)
            shape[args[1]] = len(args[2])
            out = torch.zeros(shape, dtype=args[0].dtype)
        else:
            out = func(*args, **kwargs)
        known = {_storage(tensor) for tensor in given}
        found = _tensors(out)
        fresh = [tensor for tensor in found if _storage(tensor) not in known]
        assert len(fresh) in (0, len(found)), f"{func} gives views and others"
        if mutable or fresh or not found:
            call.outputs = fresh
            self._calls.append(call)
        self._own |= {_storage(tensor): tensor for tensor in fresh}
        return out

    def _is_own(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._own


def _written(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The one tensor that an operator writes to."""
    (place,) = [
        (index, argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    tensor: Tensor = args[place[0]] if place[0] < len(args) else kwargs[place[1]]
    return tensor


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class RecordingCapturer:
    """Captures on the CPU.

    Args:
        fail: Raised by the captures, the first one's error first; None is a capture that works.
        replayed: Called before each replay of any of them.
        capturing: Called before each capture; what it raises, the capture does.
    """

    note = ""
    scratch: tuple[int, int] | None = None
    own_bytes = 0

    def __init__(
        self,
        fail: list[Exception | None] | None = None,
        replayed: Callable[[], object] = lambda: None,
        capturing: Callable[[], object] = lambda: None,
    ) -> None:
        self.made: list[Recording] = []
        self.placed: list[Tensor] = []
        self.dropped = 0
        self._fail = fail or []
        self._replayed = replayed
        self._capturing = capturing

    def place(self, nbytes: int) -> Tensor:
        assert not self.made
        # What is there is anything, and no token or position.
        self.placed.append(torch.full((nbytes,), 0x7F, dtype=torch.uint8))
        return self.placed[-1]

    def reach(self, nbytes: int) -> None:
        raise NotImplementedError

    def capture(self, work: Callable[[], object]) -> Recording:
        self._capturing()
        error = self._fail.pop(0) if self._fail else None
        if error is not None:
            raise error
        calls: list[_Call] = []
        with _Writing(calls):
            work()
        recording = Recording(len(self.made) + 1, calls, self._replayed)
        self.made.append(recording)
        return recording

    def drop(self) -> None:
        assert all(recording.closed for recording in self.made)
        self.dropped += 1

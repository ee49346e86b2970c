"""What several test files use: small options, comparison of states, and a view of this process's resources."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from deadlines import patience

import ckpt
from ckpt import _native
from ckpt.saving import inspection

DEADLINE_S = patience(60.0)  # for anything that takes milliseconds unless it hangs


def options(**changes: Any) -> ckpt.Options:
    """Small and quick: 8 MiB of arena, 256 KiB chunks, 2 writers; waits fail after a minute."""
    small: dict[str, Any] = {
        "arena_bytes": "8MiB",
        "chunk_bytes": "256KiB",
        "writers": 2,
        "eager_bytes": "4KiB",
        "timeout_s": DEADLINE_S,
        "drain_timeout_s": DEADLINE_S,
    }
    return ckpt.Options(**(small | changes))


def clear_faults() -> None:
    if hasattr(_native, "clear_faults"):
        _native.clear_faults()


def close_engines(timeout_s: float = DEADLINE_S) -> None:
    """Drains and ends every engine that this process keeps, with its threads and its arena."""
    inspection.close_engines(timeout_s)


# ---- what a process says -----------------------------------------------------------------------------------------------


def standard_output_for_answers() -> TextIO:
    """For answers that another process reads; what libraries print goes to standard error from now on, as gloo's greetings."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return answers


# ---- resources -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of this process. `memory_bytes` is resident anonymous memory: no page cache, no mapped files."""

    threads: int
    descriptors: int
    children: int
    memory_bytes: int


def resources() -> Resources:
    gc.collect()
    process = psutil.Process()
    memory = process.memory_info()
    return Resources(
        threads=process.num_threads(),
        descriptors=process.num_fds(),
        children=len(process.children()),
        memory_bytes=memory.rss - memory.shared,
    )


def wait_until(condition: Callable[[], bool], timeout_s: float = DEADLINE_S, what: str = "the condition") -> None:
    """Polls; fails the test at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.001)


def somebody_is_in(function: str) -> bool:
    """Whether a thread of this process is just inside a function of this name."""
    stacks = [traceback.extract_stack(frame) for frame in sys._current_frames().values()]
    return any(entry.name == function for stack in stacks for entry in stack)


def stop(pid: int) -> None:
    """SIGSTOP, and waits until none of its threads runs any more: each goes on until it sees the signal."""
    process = psutil.Process(pid)
    process.suspend()
    threads = [Path(f"/proc/{pid}/task/{thread.id}/stat") for thread in process.threads()]
    wait_until(lambda: all(_is_stopped(thread) for thread in threads), what="the stop")


def _is_stopped(thread: Path) -> bool:
    try:
        return thread.read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return True


def assert_no_leak(before: Resources, *, memory_bytes: int | None = None, timeout_s: float = 10.0) -> None:
    """Threads, descriptors and children are not more than `before`; nor is memory by more than `memory_bytes`, if given.

    What is on its way out gets `timeout_s` to go.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        now = resources()
        grown = {
            name: (getattr(before, name), getattr(now, name))
            for name in ("threads", "descriptors", "children")
            if getattr(now, name) > getattr(before, name)
        }
        if memory_bytes is not None and now.memory_bytes > before.memory_bytes + memory_bytes:
            grown["memory_bytes"] = (before.memory_bytes, now.memory_bytes)
        if not grown:
            return
        assert time.monotonic() < deadline, f"leaked (before, now): {grown}"
        time.sleep(0.02)


# ---- comparing states ------------------------------------------------------------------------------------------------

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same(expected: Any, found: Any) -> None:
    """Equal in every respect that torch.save keeps: types, values bit for bit, shapes, strides, flags, shared memory."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    _compare(expected, found, "saved", pairs)
    assert sharing([a for a, _ in pairs]) == sharing([b for _, b in pairs]), "tensors share memory in another way"


def _compare(a: Any, b: Any, path: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert type(a) is type(b), f"{path} is a {type(b).__name__}, not a {type(a).__name__}"
    if isinstance(a, torch.Tensor):
        _compare_tensors(a, b, path, pairs)
    elif isinstance(a, (torch.TypedStorage, torch.UntypedStorage)):
        assert bytes(a.untyped()) == bytes(b.untyped()), f"{path} has other bytes"
    elif isinstance(a, Mapping):
        assert list(a) == list(b), f"{path} has other keys"
        for key in a:
            _compare(a[key], b[key], f"{path}[{key!r}]", pairs)
        _compare(getattr(a, "_metadata", None), getattr(b, "_metadata", None), f"{path}._metadata", pairs)
    elif isinstance(a, Sequence) and not isinstance(a, (str, bytes)):
        assert len(a) == len(b), f"{path} has {len(b)} items, not {len(a)}"
        for index, (item_a, item_b) in enumerate(zip(a, b, strict=True)):
            _compare(item_a, item_b, f"{path}[{index}]", pairs)
    elif type(a).__module__ == "numpy":
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), f"{path} differs"
    elif isinstance(a, types.MethodType):
        assert a.__func__ is b.__func__, f"{path} is another method"
    elif hasattr(a, "__dict__") and (type(a).__eq__ is object.__eq__ or dataclasses.is_dataclass(a)):
        _compare(vars(a), vars(b), f"{path}.__dict__", pairs)
    else:
        assert a == b, f"{path} is {b!r}, not {a!r}"


def _compare_tensors(a: torch.Tensor, b: torch.Tensor, path: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    if isinstance(a, torch.nn.parameter.UninitializedTensorMixin):
        return
    for name in ("dtype", "layout", "device", "requires_grad", "is_quantized", "is_nested"):
        assert getattr(a, name) == getattr(b, name), f"{path}.{name} is {getattr(b, name)}, not {getattr(a, name)}"
    assert a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg(), f"{path} has lost its lazy conjugation or negation"
    if a.layout is torch.jagged:  # its __dict__ holds a symbolic size that is new in every tensor
        _compare_tensors(a.values(), b.values(), f"{path}.values", pairs)
        _compare_tensors(a.offsets(), b.offsets(), f"{path}.offsets", pairs)
        return
    if vars(a) or vars(b):
        _compare(vars(a), vars(b), f"{path}.__dict__", pairs)
    if a.is_meta:
        assert (a.shape, a.stride()) == (b.shape, b.stride()), f"{path} has another shape or stride"
    elif a.is_nested:
        for index, (part_a, part_b) in enumerate(zip(a.unbind(), b.unbind(), strict=True)):
            _compare_tensors(part_a, part_b, f"{path}<{index}>", [])
    elif a.layout is not torch.strided:
        assert a.shape == b.shape, f"{path} has shape {list(b.shape)}, not {list(a.shape)}"
        for part_a, part_b in zip(_sparse_parts(a), _sparse_parts(b), strict=True):
            _compare_tensors(part_a, part_b, f"{path}<part>", [])
    else:
        assert (a.shape, a.stride()) == (b.shape, b.stride()), f"{path} has another shape or stride"
        if a.is_quantized:
            _compare_quantized(a, b, path)
        assert torch.equal(as_integers(a), as_integers(b)), f"{path} has other values"
        pairs.append((a, b))


def _sparse_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def _compare_quantized(a: torch.Tensor, b: torch.Tensor, path: str) -> None:
    assert a.qscheme() == b.qscheme(), f"{path} has another quantization"
    if a.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        assert (a.q_scale(), a.q_zero_point()) == (b.q_scale(), b.q_zero_point()), f"{path} has another scale"
    else:
        assert torch.equal(a.q_per_channel_scales(), b.q_per_channel_scales()), f"{path} has other scales"
        assert torch.equal(a.q_per_channel_zero_points(), b.q_per_channel_zero_points()), f"{path} has other zero points"


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits as integers, so that NaNs compare and every dtype does."""
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.int_repr()
    if plain.is_conj():
        plain = plain.resolve_conj()
    plain = plain.resolve_neg().as_subclass(torch.Tensor)
    if plain.dtype is torch.complex128:
        plain = torch.view_as_real(plain)
    return plain.view(_SAME_SIZE[plain.dtype.itemsize])


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The storage of a tensor, as a tensor of bytes over the same memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a strided tensor and of the one behind its last; equal if it has no elements."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.dtype.itemsize


def sharing(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int] | None]:
    """For each tensor: which group of overlapping tensors it belongs to, and where in the group's bytes it begins."""
    ranges = [byte_range(tensor) for tensor in tensors]
    group_of: dict[int, tuple[int, int]] = {}
    edge, low, groups = -1, 0, 0
    for index in sorted(range(len(ranges)), key=lambda index: ranges[index]):
        begin, end = ranges[index]
        if begin == end:
            continue
        if begin >= edge:
            low, groups = begin, groups + 1
        group_of[index] = (groups, begin - low)
        edge = max(edge, end)
    names: dict[int, int] = {}  # groups are numbered by their first tensor, not by their address
    result: list[tuple[int, int] | None] = []
    for index in range(len(tensors)):
        if index not in group_of:
            result.append(None)
            continue
        group, offset = group_of[index]
        result.append((names.setdefault(group, len(names)), offset))
    return result

"""Objects that torch.save can save: every dtype, and every odd case that its pickling knows."""

from __future__ import annotations

import collections
import dataclasses
import datetime
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from support import as_bytes


class Twice(torch.Tensor):
    """A subclass with its own type and attributes."""


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 5))
        self.body[2].weight = torch.nn.Parameter(self.body[0].weight.data.t())
        self.register_buffer("mask", torch.arange(7) % 2 == 0, persistent=False)
        self.note = {"any": ["thing"]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Fresh:
    """Pickles tensors that did not exist before, and are views."""

    def __getstate__(self) -> dict[str, Any]:
        return {"part": torch.arange(50_000)[300:310], "whole": torch.arange(50_000)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclasses.dataclass
class Position:
    epoch: int
    weights: torch.Tensor
    seen: set[int]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bits that the dtype can have, NaNs included."""
    tensor = torch.empty(shape, dtype=dtype)
    as_bytes(tensor).random_(0, 2 if dtype is torch.bool else 256)
    return tensor


def trained(optimizer_class: Callable[..., torch.optim.Optimizer], **settings: Any) -> dict[str, Any]:
    model = Net()
    optimizer = optimizer_class(model.parameters(), **settings)
    for _ in range(2):
        model(torch.randn(3, 5)).square().sum().backward()
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def tied() -> dict[str, Any]:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    return {"a": weight, "b": weight, "data": weight.data, "t": weight.data.t(), "flat": weight.detach().view(-1)}


def with_attributes() -> list[torch.Tensor]:
    plain, parameter = torch.arange(3), torch.nn.Parameter(torch.ones(2))
    plain.note = "hello"  # type: ignore[attr-defined]
    parameter.shards = [1, torch.zeros(3)]  # type: ignore[attr-defined]
    return [plain, parameter]


def hooked() -> torch.Tensor:
    tensor = torch.ones(3, requires_grad=True)
    tensor.register_hook(lambda grad: grad)
    return tensor


def sparse() -> dict[str, torch.Tensor]:
    dense = torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
    return {
        "coo": dense.to_sparse(),
        "uncoalesced": torch.sparse_coo_tensor(torch.tensor([[0, 0, 1]]), torch.tensor([1.0, 2.0, 3.0]), (2,)),
        "nothing_in_it": torch.zeros(3, 3).to_sparse(),
        "csr": torch.sparse_csr_tensor(torch.tensor([0, 2, 3]), torch.tensor([1, 3, 0]), torch.tensor([1.0, 2.0, 3.0])),
        "csc": torch.sparse_csc_tensor(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 3.0])),
    }


def sparse_over_views() -> list[torch.Tensor]:
    """Torch's own conversions leave their indices in storages larger than these."""
    dense = torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
    return [dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr((1, 2)), dense.to_sparse_bsc((1, 2))]


def quantized() -> dict[str, torch.Tensor]:
    x, scales = torch.linspace(-3, 3, 24).view(4, 6), torch.tensor([0.1, 0.2, 0.3, 0.4])
    points = torch.tensor([1, 2, 3, 4])
    return {
        **{str(d): torch.quantize_per_tensor(x, 0.1, 8, d) for d in (torch.quint8, torch.qint8, torch.qint32)},
        "channel": torch.quantize_per_channel(x, scales, points, 0, torch.quint8),
        "float_points": torch.quantize_per_channel(x, scales, points.float(), 0, torch.quint4x2),
    }


def conjugated() -> list[torch.Tensor]:
    x = torch.randn(4, 3, dtype=torch.complex64)
    return [x, x.conj(), x.conj().t(), x.conj().resolve_conj(), torch.randn(2, 3, dtype=torch.cdouble).mH]


def bare_storages() -> list[Any]:
    tensor = torch.arange(6, dtype=torch.float32)
    return [tensor, tensor.storage(), tensor.storage(), torch.arange(5).untyped_storage(), torch.UntypedStorage(0)]


def numpy_things() -> dict[str, Any]:
    return {
        "array": np.arange(12.0).reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "large": np.arange(50_000),
        "scalar": np.float32(1.5),
        "structured": np.zeros(3, dtype=[("a", "i4"), ("b", "f8")]),
        "shared": torch.from_numpy(np.arange(5)),
        "rng": np.random.RandomState(1).get_state(),
    }


def tricky_strings() -> list[Any]:
    text = ["cpu", "storage", "0", "1", "FloatStorage", "data/0", "version", ""]
    return [text, torch.zeros(2), text, {"cpu": torch.ones(3), "0": "storage"}, ("storage", "cpu", "0"), "x" * 300]


def odd_objects() -> dict[Any, Any]:
    shared = [1, 2]
    loop: list[Any] = []
    loop.append(loop)
    return {
        "ints": [0, 255, 65535, -1, 2**31, 2**63, -(2**63), 10**40, True, None, 1.5, float("inf"), 1j],
        "shared": (shared, shared),
        "loop": [id(loop) == id(loop[0])],
        "sets": [{1, 2}, frozenset({3}), set()],
        "torch": [torch.Size([2, 3]), torch.float16, torch.device("cpu")],
        "types": [int, OrderedDict, torch.nn.Linear],
        "date": datetime.datetime(2024, 1, 2),
        "counter": collections.Counter("abca"),
        "default": collections.defaultdict(list, a=[torch.ones(1)]),
        "bytes": [b"", b"abc", bytearray(b"xyz")],
        "position": Position(3, torch.ones(2, 2), {1}),
        ("tuple", 1): OrderedDict(a=1, b=OrderedDict()),
        "empty_dict_twice": [OrderedDict()] * 2,
    }


def nested_tensors() -> list[torch.Tensor]:
    parts = [torch.arange(3.0), torch.arange(5.0)]
    return [torch.nested.nested_tensor(parts), torch.nested.nested_tensor(parts, layout=torch.jagged)]


def deep(levels: int) -> Any:
    value: Any = torch.arange(3)
    for level in range(levels):
        value = [value] if level % 2 else {"k": value}
    return value


STATES: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "tensor": lambda: torch.randn(3, 4),
    "scalar": lambda: torch.tensor(7.0),
    "empty": lambda: [
        torch.empty(0),
        torch.empty(3, 0, 5),
        torch.empty(0, dtype=torch.int8),
        torch.nn.Parameter(torch.empty(0)),
    ],
    "non_contiguous": lambda: [torch.randn(3, 4).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)],
    "expanded": lambda: torch.ones(1).expand(5),
    "tied": tied,
    "parameters": lambda: [torch.nn.Parameter(torch.ones(2), requires_grad=flag) for flag in (True, False)],
    "buffer": lambda: torch.nn.Buffer(torch.ones(3)),
    "uninitialized": lambda: [torch.nn.UninitializedParameter(), torch.nn.UninitializedBuffer()],
    "not_a_leaf": lambda: torch.ones(3, requires_grad=True) * 2,
    "attributes": with_attributes,
    "hooked": hooked,
    "sparse": sparse,
    "quantized": quantized,
    "conjugated": conjugated,
    "nested": nested_tensors,
    "subclass": lambda: [torch.ones(3).as_subclass(Twice), torch.nn.Parameter(torch.ones(2).as_subclass(Twice))],
    "meta": lambda: [torch.empty(3, 4, device="meta"), torch.ones(1)],
    "bare_storages": bare_storages,
    "numpy": numpy_things,
    "tricky_strings": tricky_strings,
    "odd_objects": odd_objects,
    "state_dict": lambda: Net().state_dict(),
    "whole_module": Net,
    "sgd": lambda: trained(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": lambda: trained(torch.optim.AdamW, lr=0.1),
    "adam_amsgrad": lambda: trained(torch.optim.Adam, lr=0.1, amsgrad=True),
    "adam_fused": lambda: trained(torch.optim.Adam, lr=0.1, fused=True),
    "lbfgs_empty": lambda: torch.optim.LBFGS([torch.ones(3, requires_grad=True)]).state_dict(),
    "rng": lambda: [torch.get_rng_state(), torch.random.initial_seed()],
    "deep": lambda: deep(200),
    "many_sizes": lambda: [torch.arange(size, dtype=torch.uint8) for size in [*range(140), 4095, 4096, 4097, 300_000]],
    "large": lambda: {"a": torch.randn(600_001), "b": torch.arange(3), "c": torch.randn(2_000_003).half()},
}

# Torch writes storages whole that we write in part: only the objects are the same.
PARTIAL_STATES: dict[str, Callable[[], Any]] = {
    "sparse_over_views": sparse_over_views,
    "views": lambda: [torch.arange(1000)[10:20], torch.ones(7, 9)[:, 2:4], torch.eye(5).diagonal()],
    "made_while_pickling": lambda: [Fresh(), torch.arange(100)[5:7]],
}

_QUANTIZED = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}
DTYPES = sorted({*torch.storage._dtype_to_storage_type_map(), *torch.storage._new_dtypes()} - _QUANTIZED, key=str)


def of_dtype(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "some": random_tensor((7,), dtype),
        "many": random_tensor((501, 33), dtype),
        "none": random_tensor((0,), dtype),
        "one": random_tensor((), dtype),
        "turned": random_tensor((4, 6), dtype).t(),
    }


ALL_STATES: dict[str, Callable[[], Any]] = STATES | {
    str(dtype).removeprefix("torch."): lambda dtype=dtype: of_dtype(dtype) for dtype in DTYPES
}

"""Sharded states of every kind, on the ranks of a real process group: made, trained for a step, and known in full."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as td
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

State = dict[str, Any]


class Net(nn.Module):
    """Uneven dimensions, tied and frozen weights, statistics, and one parameter that is smaller than the number of ranks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, hidden), nn.Linear(hidden, 64, bias=False)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 64, bias=False)
        self.tied = self.head
        self.frozen = nn.Parameter(torch.randn(129, 3), requires_grad=False)
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.down(torch.relu(self.up(x))))
        return self.tied(self.head(hidden)) * self.scale.sum()


class Trained:
    """A model and its optimizer, which has stepped once, if it has begun."""

    def __init__(
        self,
        wrap: Callable[[nn.Module], object],
        fused: bool = False,
        hidden: int = 257,
        begun: bool = True,
        model: nn.Module | None = None,
    ) -> None:
        torch.manual_seed(7)
        self.model: nn.Module = model or Net(hidden)
        wrap(self.model)
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [{"params": learning[:2], "weight_decay": 0.1}, {"params": learning[2:]}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, fused=fused)
        if begun:
            self.step()

    def step(self) -> None:
        torch.manual_seed(8)
        self.model(torch.randn(16, 64)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> State:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "progress": {"step": 1, "seen": [1, 2, 3], "loss": 0.25}}


def _fsdp(model: nn.Module, mesh: Any) -> None:
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _tp(model: nn.Module, mesh: Any) -> None:
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp(world: int, fused: bool = False) -> Trained:
    mesh = init_device_mesh("cpu", (world,))
    return Trained(lambda model: _fsdp(model, mesh), fused)


def mixed(world: int) -> Trained:
    """In lower precision, by an optimizer that has no state yet."""
    mesh = init_device_mesh("cpu", (world,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)

    def wrap(model: nn.Module) -> None:
        fully_shard(model.up, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)

    return Trained(wrap, begun=False)


def offloaded(world: int) -> Trained:
    """Kept in host memory. Where all computes there, nothing moves, but it takes the way of what does."""
    mesh = init_device_mesh("cpu", (world,))
    policy = CPUOffloadPolicy(pin_memory=False)

    def wrap(model: nn.Module) -> None:
        fully_shard(model.up, mesh=mesh, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)

    return Trained(wrap)


def fsdp1(world: int) -> Trained:
    mesh = init_device_mesh("cpu", (world,))
    wrapped = FullyShardedDataParallel(Net(257), device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=True)
    return Trained(lambda _: None, model=wrapped)


def hsdp(world: int) -> Trained:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return Trained(lambda model: _fsdp(model, mesh))


def tensor_parallel(world: int) -> Trained:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    return Trained(lambda model: _tp(model, mesh), hidden=256)


def both(world: int) -> Trained:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))

    def wrap(model: nn.Module) -> None:
        _tp(model, mesh["tp"])
        _fsdp(model, mesh["dp"])

    return Trained(wrap, hidden=258)


class Fixed:
    """A state that nothing trains."""

    def __init__(self, state: State, whole: State | None = None) -> None:
        self._state, self.whole = state, whole

    def state(self) -> State:
        return self._state

    def step(self) -> None:
        """What a step would do to it."""
        for tensor in tensors_of(self._state):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            with torch.no_grad():
                local.view(torch.uint8).zero_() if local.numel() and local.dim() and local.is_contiguous() else local.zero_()


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    bits = torch.empty(shape, dtype=dtype)
    raw = torch.empty(0, dtype=torch.uint8).set_(bits.untyped_storage())
    raw.random_(0, 2 if dtype is torch.bool else 120)
    return bits


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64, torch.uint16]


def placements(world: int) -> Fixed:
    """Each dtype and each placement, on a mesh of one dimension."""
    torch.manual_seed(3)
    mesh = init_device_mesh("cpu", (world,))
    state: State = {"dtypes": {}, "plain": {}, "values": {}}
    make = functools.partial(_distribute, mesh)
    for dtype in DTYPES:
        state["dtypes"][str(dtype)] = make(random_tensor((70, 33), dtype), [Shard(0)])
        state["dtypes"][f"{dtype}-columns"] = make(random_tensor((33, 70), dtype), [Shard(1)])
        state["dtypes"][f"{dtype}-0"] = make(random_tensor((), dtype), [Replicate()])
        state["plain"][f"{dtype}"] = random_tensor((5, 900), dtype)
        state["plain"][f"{dtype}-0"] = random_tensor((), dtype)
    state["empty"] = [make(torch.randn(2, 5), [Shard(0)]), make(torch.randn(0, 5), [Shard(0)]), make(torch.randn(3, 1), [Shard(1)])]
    state["replicated"] = {f"{n}": make(torch.randn(100 * n, 7), [Replicate()]) for n in range(1, 9)}
    transposed = torch.randn(40, 60).t()
    state["views"] = {"transposed": transposed, "column": torch.randn(50, 50)[:, 3], "part": torch.randn(5000)[7:4000]}
    shared = torch.randn(3000)
    state["shared"] = {"one": shared, "two": shared, "half": shared[1500:]}
    state["values"] = {"none": None, "text": "x" * 300, "pair": (torch.ones(3), [2]), "list": [1, 2.5, "three"], "flag": True}
    state["values"] |= {"set": [{"lr": 0.1, "betas": (0.9, 0.99)}], "nested": {"deep": [torch.zeros(2), torch.ones(4)]}}
    return Fixed(state)


def _distribute(mesh: Any, tensor: torch.Tensor, where: list[Any]) -> DTensor:
    """Without a collective, which does not know every dtype: all ranks have made the same tensor."""
    return distribute_tensor(tensor, mesh, where, src_data_rank=None)


def grid(world: int) -> Fixed:
    """Placements on a mesh of two dimensions, on the parts of it, and on its flattened self."""
    torch.manual_seed(4)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))
    state: State = {}
    for shape in ((10, 12), (5, 7), (1, 3), (9, 300)):
        for first in (Shard(0), Shard(1), Replicate()):
            for second in (Shard(0), Shard(1), Replicate()):
                state[f"{shape}{first}{second}"] = _distribute(mesh, torch.randn(shape), [first, second])
        for part in ("a", "b"):
            for where in (Shard(0), Shard(1), Replicate()):
                state[f"{shape}{part}{where}"] = _distribute(mesh[part], torch.randn(shape), [where])
    state["strided"] = _distribute(mesh, torch.randn(16, 5), [_StridedShard(0, split_factor=world // 2), Shard(0)])
    state["strided-uneven"] = _distribute(mesh, torch.randn(9, 5), [_StridedShard(0, split_factor=world // 2), Shard(0)])
    state["flat"] = _distribute(mesh[("a", "b")]._flatten("ab"), torch.randn(21, 5), [Shard(0)])
    return Fixed(state)


def apart(world: int) -> Fixed:
    """Sharded so that what a rank holds does not lie together in the whole: torch's own writer refuses that."""
    torch.manual_seed(5)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))
    whole = {"rows": torch.randn(16, 300), "uneven": torch.randn(9, 5), "columns": torch.randn(60, 17), "both": torch.randn(8, 8)}
    strided = _StridedShard(0, split_factor=2), _StridedShard(1, split_factor=3)
    how = {"rows": (strided[0], Replicate()), "uneven": (strided[0], Replicate()), "columns": (strided[1], Shard(0))}
    how["both"] = strided
    return Fixed({name: _distribute(mesh, tensor, list(how[name])) for name, tensor in whole.items()}, whole)


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "fsdp": (fsdp, (1, 2, 4)),
    "fsdp-fused": (lambda world: fsdp(world, fused=True), (2,)),
    "mixed": (mixed, (2,)),
    "offloaded": (offloaded, (2,)),
    "fsdp1": (fsdp1, (2,)),
    "hsdp": (hsdp, (2, 4)),
    "tensor-parallel": (tensor_parallel, (1, 2)),
    "both": (both, (4,)),
    "placements": (placements, (1, 2, 4)),
    "grid": (grid, (2, 4)),
    "apart": (apart, (2, 4)),
}


def difference(expected: Any, found: Any, path: str = "") -> str:
    """The first one; empty if there is none."""
    if isinstance(expected, torch.Tensor):
        same = expected.shape == found.shape and expected.dtype == found.dtype
        bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (expected, found)]
        return "" if same and torch.equal(*bits) else path
    if isinstance(expected, dict):
        return next((text for key in expected if (text := difference(expected[key], found[key], f"{path}.{key}"))), "")
    if isinstance(expected, (list, tuple)):
        pairs = enumerate(zip(expected, found, strict=True))
        return next((text for number, pair in pairs if (text := difference(*pair, f"{path}.{number}"))), "")
    return "" if expected == found else path


# ---- what it is in full ----------------------------------------------------------------------------------------------


def tensors_of(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


def in_full(state: Any) -> Any:
    """A copy, with whole tensors. A collective."""
    if isinstance(state, DTensor):
        return _whole(state)
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: in_full(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(in_full, state))
    return state


def whole_of(case: Any, state: Any) -> Any:
    """As in_full(), also of what does not lie in one box."""
    if getattr(case, "whole", None) is None:
        return in_full(state)
    return {key: value.full_tensor() for key, value in state.items()}


def _whole(tensor: DTensor) -> torch.Tensor:
    """By bytes, because gloo does not know every dtype."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    parts: list[Any] = [None] * td.get_world_size()
    chunks = tensor.__create_chunk_list__()
    with torch.no_grad():
        local = tensor.to_local().clone().contiguous()
    td.all_gather_object(parts, (list(chunks[0].offsets), list(local.shape), local.reshape(-1).view(torch.uint8)))
    for offsets, shape, raw in parts:
        where = tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))
        whole[where] = raw.view(tensor.dtype).reshape(shape)
    return whole

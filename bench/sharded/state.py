"""States of DTensors, each rank with a part of every one: as a training has them, and of values that are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench.measure.ranks import Ranks
from bench.measure.sampling import clock
from bench.rivals.base import names_of

State = dict[str, Any]

PER_PARAMETER = 4  # tensors: the parameter, two moments, and AdamW's step
BYTES_PER_ELEMENT = 12  # fp32: the parameter and the moments
SPLITS = 4  # each rank of as many has as many rows
SMALL_ELEMENTS = 256
GROUP = 64  # parameters in a group of the optimizer: the first step on DTensors takes time that is quadratic in that
MOMENTS = ("exp_avg", "exp_avg_sq")


class Shape(NamedTuple):
    """
    Attributes:
        parameters: how many; each has two moments of the same shape, and a step of one element that all ranks have.
        rows, columns: of each, all ranks together.
    """

    parameters: int
    rows: int
    columns: int

    @staticmethod
    def of(tensors: int, nbytes: int) -> Shape:
        """So many tensors, which have about so many bytes, all ranks together."""
        parameters = max(1, tensors // PER_PARAMETER)
        elements = nbytes // BYTES_PER_ELEMENT // parameters
        columns = 16 if elements <= 16 * SMALL_ELEMENTS else 256
        return Shape(parameters, max(SPLITS, elements // columns // SPLITS * SPLITS), columns)

    @property
    def tensors(self) -> int:
        return self.parameters * PER_PARAMETER

    @property
    def nbytes(self) -> int:
        return self.parameters * (self.rows * self.columns * BYTES_PER_ELEMENT + 4)

    @property
    def names(self) -> list[str]:
        return [f"layers.{number}.weight" for number in range(self.parameters)]


class Mesh:
    """One dimension, of all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.mesh: DeviceMesh = init_device_mesh("cpu", (ranks.count,))
        self._ranks = ranks

    def sharded(self, shape: Shape, make: Callable[[int, int], Tensor]) -> DTensor:
        """
        Args:
            make: is given the first row of this rank and the first of the next one; returns this rank's rows.
        """
        each = math.ceil(shape.rows / self._ranks.count)
        begin = min(shape.rows, each * self._ranks.rank)
        local = make(begin, min(shape.rows, begin + each))
        whole = torch.Size((shape.rows, shape.columns))
        found: DTensor = DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=whole, stride=(shape.columns, 1)
        )
        return found


class Training:
    """Parameters that AdamW steps, of which each rank has half; gradients are drawn once."""

    def __init__(self, shape: Shape, ranks: Ranks) -> None:
        torch.manual_seed(ranks.rank)
        mesh = Mesh(ranks)

        def draw() -> DTensor:
            return mesh.sharded(shape, lambda begin, end: torch.randn(end - begin, shape.columns))

        self.parameters = {name: torch.nn.Parameter(draw()) for name in shape.names}
        for parameter in self.parameters.values():
            parameter.grad = draw()
        owned = list(self.parameters.values())
        groups = [{"params": owned[first : first + GROUP]} for first in range(0, len(owned), GROUP)]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        self.optimizer.register_step_pre_hook(self._note_hook)  # runs after the global hooks, ckpt's among them
        self._hook_ran_at = math.nan
        self.step()  # now the optimizer has its state, and ckpt knows the optimizer
        self.state = self._state()

    def _note_hook(self, *_: Any) -> None:
        self._hook_ran_at = clock()

    def step(self) -> float:
        """When its pre-step hooks had run, the automatic fence among them."""
        self.optimizer.step()
        return self._hook_ran_at

    def _state(self) -> State:
        """By names, as get_state_dict() of torch has it. The tensors are stepped in place, so it is made once."""
        moments = {name: dict(self.optimizer.state[parameter]) for name, parameter in self.parameters.items()}
        names = {parameter: name for name, parameter in self.parameters.items()}
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": [names[p] for p in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        model = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return {"model": model, "optimizer": {"state": moments, "param_groups": groups}}


def known_state(shape: Shape, ranks: Ranks) -> State:
    """The same on any number of ranks: each element has bits of its own."""
    mesh = Mesh(ranks)

    def pattern(number: int) -> DTensor:
        def make(begin: int, end: int) -> Tensor:
            bits = torch.arange(begin * shape.columns, end * shape.columns, dtype=torch.int32)
            return bits.mul_(0x5DEECE6D).add_(number * 0x9E3779B1 % (1 << 31)).view(torch.float32).view(-1, shape.columns)

        return mesh.sharded(shape, make)

    return _like_training(shape, pattern, lambda number: torch.tensor(float(number)))


def blank_state(shape: Shape, ranks: Ranks) -> State:
    """Of zeros."""
    mesh = Mesh(ranks)

    def blank(_: int) -> DTensor:
        return mesh.sharded(shape, lambda begin, end: torch.zeros(end - begin, shape.columns))

    return _like_training(shape, blank, lambda _: torch.tensor(0.0))


def _like_training(shape: Shape, make: Callable[[int], DTensor], make_step: Callable[[int], Tensor]) -> State:
    names = list(enumerate(shape.names))
    moments = {
        name: {"step": make_step(number)}
        | {moment: make(place * shape.parameters + number) for place, moment in enumerate(MOMENTS, 1)}
        for number, name in names
    }
    groups = [{"lr": 1e-4, "params": shape.names}]
    return {"model": {name: make(number) for number, name in names}, "optimizer": {"state": moments, "param_groups": groups}}


def local_tensors(state: State) -> dict[str, Tensor]:
    """This rank's memory of each tensor, by paths."""
    with torch.no_grad():
        return {name: each.to_local() if isinstance(each, DTensor) else each for name, each in names_of(state)}


def blank_like(value: Any) -> Any:
    """The same state, of zeros."""
    if isinstance(value, DTensor):
        with torch.no_grad():
            local = torch.zeros_like(value.to_local())
        more: dict[str, Any] = {"run_check": False, "shape": value.shape, "stride": value.stride()}
        return DTensor.from_local(local, value.device_mesh, value.placements, **more)
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: blank_like(each) for key, each in value.items()}
    return list(map(blank_like, value)) if isinstance(value, list) else value


def difference(expected: dict[str, Tensor], found: State) -> str:
    """The first tensor of this rank that has other bits; empty if there is none."""
    tensors = local_tensors(found)
    if tensors.keys() != expected.keys():
        return "there are other tensors than were saved"
    for name, tensor in expected.items():
        if not torch.equal(_bits(tensor), _bits(tensors[name])):
            return f"tensor {name} came back changed"
    return ""


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor

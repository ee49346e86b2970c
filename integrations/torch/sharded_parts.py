"""Modules whose parameters are DTensors (fully_shard, tensor parallelism), or become such (FSDP1), and what steps these.

Their states go by names of parameters, as torch.distributed.checkpoint.state_dict has them. So they can be loaded on another
number of ranks, and by whoever reads such checkpoints:

    model          {name of a parameter: DTensor, or a tensor that is the same on all ranks}
    optimizer      {"state": {name: {"exp_avg": ..., "step": ...}}, "param_groups": [{"params": [names], "lr": ..., ...}]}

What a module holds besides parameters is each rank's own, as of modules that are not sharded.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import ckpt
from ckpt import optimizers

from . import fsdp1, state_parts
from .torch_private import is_flattened

State = dict[str, Any]
Saved = Mapping[str, tuple[tuple[int, ...], torch.dtype] | None]  # by key: shape and dtype of a tensor, None of a value


def is_dtensor(tensor: Any) -> bool:
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return isinstance(kind, type) and isinstance(tensor, kind)


class ShardedParts:
    """Those among the parts of a training state.

    Args:
        parts: as name_parts() gives them.

    Raises:
        TypeError: the parameters of an optimizer belong to no module among the parts, or it has parameters of several.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        self._flat = {name for name, part in modules.items() if fsdp1.is_wrapped(part)}
        self._modules = {
            name: part for name, part in modules.items() if name in self._flat or any(map(is_dtensor, part.parameters()))
        }
        # While a module of FSDP1 computes, and after some of its forwards, it does not say which its parameters are.
        self._parameter_names = {name: frozenset(_named(part)) for name, part in self._modules.items()}
        self._optimizers: dict[str, tuple[torch.optim.Optimizer, nn.Module]] = {}
        self._on_one_side: dict[str, list[str]] = {}  # names in modules, by the checkpoint that targets() was told of last
        self._owners: dict[str, str] = {}  # the names of these modules, by optimizer
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer) and any(map(self._is_sharded, _parameters(part))):
                owner = self._owners[name] = self._owner_of(name, part)
                self._optimizers[name] = part, self._modules[owner]
        self._names = {name: _names_in(*pair) for name, pair in self._optimizers.items()}

    def _is_sharded(self, parameter: torch.Tensor) -> bool:
        return is_dtensor(parameter) or is_flattened(parameter)

    def _owner_of(self, name: str, optimizer: torch.optim.Optimizer) -> str:
        stepped = set(map(id, _parameters(optimizer)))
        for owner, module in self._modules.items():
            if stepped <= set(map(id, module.parameters())):
                return owner
        raise TypeError(
            f"{name} steps sharded parameters that do not all belong to one of the modules that were given: give its module, "
            "too, since its state is saved by the names of its parameters"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._modules or name in self._optimizers

    def __bool__(self) -> bool:
        return bool(self._modules)

    # ---- saving ----------------------------------------------------------------------------------------------------

    def take(self) -> tuple[State, dict[str, State]]:
        """`sharded` of `ckpt.Checkpointer.save`, with the tensors that are there, but for FSDP1; and what of each module this
        rank alone has."""
        states = {name: self._state_of_module(name, as_they_are=True) for name in self._modules}
        found: State = {name: self._shared_of(name, state) for name, state in states.items()}
        for name, pair in self._optimizers.items():
            found[name] = fsdp1.take_optimizer(*pair) if self._owners[name] in self._flat else _state_of(*pair)
            _refuse_nested(name, found[name])
        return found, {name: self._own_of(name, state) for name, state in states.items()}

    def _state_of_module(self, name: str, as_they_are: bool = False) -> State:
        """
        Args:
            as_they_are: parameters, not tensors without their gradients: to make one of these of a DTensor takes long.
        """
        module = self._modules[name]
        if name in self._flat:
            return fsdp1.take_module(module)
        plain = type(module).state_dict is nn.Module.state_dict
        state = module.state_dict(keep_vars=True) if as_they_are and plain else module.state_dict()
        return {state_parts.bare(key): value for key, value in state.items()}

    def _shared_of(self, name: str, state: State) -> State:
        """Its parameters, and what else of it is sharded."""
        parameters = self._parameter_names[name]
        return {key: value for key, value in state.items() if key in parameters or is_dtensor(value)}

    def _own_of(self, name: str, state: State) -> State:
        parameters = self._parameter_names[name]
        return {key: value for key, value in state.items() if key not in parameters and not is_dtensor(value)}

    # ---- restoring -------------------------------------------------------------------------------------------------

    def prepare_targets(self) -> Callable[[Saved], State]:
        """`sharded_into` of `ckpt.Checkpointer.restore`: what is there, and memory for what an optimizer has not yet, and for
        FSDP1. To be called by all ranks together; what it gives asks nobody.

        That raises:
            ckpt.CheckpointError: an optimizer has not stepped, and it does not follow from its parameters how what was saved is
                laid out.
        """
        return functools.partial(self._targets, {name: self._state_of_module(name) for name in self._modules})

    def _targets(self, states: dict[str, State], saved: Saved) -> State:
        found: State = {name: self._shared_of(name, state) for name, state in states.items()}
        for name, state in found.items():
            theirs = {key.removeprefix(f"{name}.") for key in saved if key.startswith(f"{name}.")}
            self._on_one_side[name] = sorted(theirs ^ state.keys())
        found.update((name, self._target_of(name, found, saved)) for name in self._optimizers)
        return found

    def _target_of(self, name: str, found: State, saved: Saved) -> State:
        (optimizer, module), owner = self._optimizers[name], self._owners[name]
        if owner not in self._flat:
            return _target_of(name, owner, _state_of(optimizer, module), _named(module), saved)
        groups = [{**group, "params": names} for group, names in zip(optimizer.param_groups, self._names[name], strict=True)]
        return _target_of(name, owner, {"state": {}, "param_groups": groups}, found[owner], saved)

    def load(self, name: str, filled: Any, own: State | None, strict: bool) -> list[str]:
        """Puts back what the targets were filled with; returns the names in a module that only one side has, if not strict.

        Raises:
            ValueError: it does not fit.
        """
        if name in self._optimizers:
            self._load_optimizer(name, filled)
            return []
        module, own = self._modules[name], own or {}
        here = self._own_of(name, self._state_of_module(name))
        differing = sorted(here.keys() ^ own.keys())
        if differing and strict:
            raise ValueError(f"only one side has {', '.join(differing)}")
        fitting = {key: value for key, value in own.items() if key in here}
        if name in self._flat:
            fsdp1.load_module(module, {**here, **fitting, **filled})
        else:
            names = {state_parts.bare(key): key for key in module.state_dict()}
            module.load_state_dict({names[key]: value for key, value in fitting.items()}, strict=False)
        return self._on_one_side[name] + differing

    def _load_optimizer(self, name: str, filled: Any) -> None:
        ours, theirs = self._names[name], [group["params"] for group in filled["param_groups"]]
        if ours != theirs:
            raise ValueError(f"its groups have the parameters {ours}, those in the checkpoint {theirs}")
        optimizer, module = self._optimizers[name]
        if self._owners[name] in self._flat:
            fsdp1.load_optimizer(optimizer, module, filled)
        else:
            _load_optimizer(optimizer, ours, filled)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    """Each parameter under each of its names."""
    return {state_parts.bare(name): tensor for name, tensor in module.named_parameters(remove_duplicate=False)}


def _names_in(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[list[str]]:
    """Of the parameters of each group. One that has several names goes by the first."""
    names: dict[int, str] = {}
    for name, tensor in _named(module).items():
        names.setdefault(id(tensor), name)
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _state_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> State:
    state = optimizer.state_dict()
    groups = [
        {**group, "params": names} for group, names in zip(state["param_groups"], _names_in(optimizer, module), strict=True)
    ]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    named = dict(zip(indices, [name for group in groups for name in group["params"]], strict=True))
    return {"state": {named[index]: value for index, value in state["state"].items()}, "param_groups": groups}


def _refuse_nested(name: str, state: State) -> None:
    """What is deeper cannot be told from names with dots in them when it is to be loaded.

    Raises:
        TypeError: says what.
    """
    groups = [(f"group {number}", group) for number, group in enumerate(state["param_groups"])]
    for where, fields in [*state["state"].items(), *groups]:
        for key, value in fields.items():
            if "." in str(key) or _is_nested(value):
                what = "has a dot in its name" if "." in str(key) else f"is a {type(value).__name__}"
                raise TypeError(
                    f"{name} cannot be saved: of a sharded optimizer tensors and values are saved, and no containers of them, "
                    f"but '{key}' of {where} {what}"
                )


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list) and any(isinstance(each, torch.Tensor) or _is_nested(each) for each in value)


def _target_of(name: str, owner: str, target: State, parameters: Mapping[str, torch.Tensor], saved: Saved) -> State:
    """
    Args:
        target: what the optimizer has.
        parameters: of the module that is the owner, by their names.
    """
    prefix = f"{name}.state."
    states: dict[str, State] = {}
    for parameter_name in (each for group in target["param_groups"] for each in group["params"]):
        begin = f"{prefix}{parameter_name}."
        keys = [key.removeprefix(begin) for key in saved if key.startswith(begin)]
        here = target["state"].get(parameter_name, {})
        # A name may be the beginning of another: "a" and "a.b" are parameters of different modules.
        wanted = [key for key in keys if "." not in key]
        if wanted:
            parameter = parameters[parameter_name]
            theirs = saved.get(f"{owner}.{parameter_name}")
            same = theirs is not None and theirs[0] == tuple(parameter.shape)
            states[parameter_name] = {
                key: here[key] if key in here else _memory_for(f"{begin}{key}", parameter, saved[f"{begin}{key}"], same)
                for key in wanted
            }
    return {"state": states, "param_groups": _groups_of(f"{name}.param_groups.", saved) or target["param_groups"]}


def _groups_of(prefix: str, saved: Saved) -> list[State]:
    """Memory for what the groups had when they were saved: schedulers add to them, and not each optimizer has one yet."""
    groups: dict[int, State] = {}
    for key, form in saved.items():
        if key.startswith(prefix):
            number, _, field = key.removeprefix(prefix).partition(".")
            groups.setdefault(int(number), {})[field] = None if form is None else torch.zeros(form[0], dtype=form[1])
    return [groups[number] for number in sorted(groups)]


def _memory_for(
    key: str, parameter: torch.Tensor, form: tuple[tuple[int, ...], torch.dtype] | None, same: bool
) -> torch.Tensor | None:
    """
    Args:
        same: the parameter had this shape when it was saved. If not, the checkpoint is of another model: let the comparison
            say so, of the parameter and of what of its state is laid out as it is.
    """
    if form is None:
        return None
    shape, dtype = form
    if len(shape) == 0 and parameter.dim() > 0:  # a count of steps
        return torch.zeros((), dtype=dtype)
    if shape == tuple(parameter.shape) or not same:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    raise ckpt.CheckpointError(
        f"'{key}' has the shape {shape}, which is not that of its parameter: how it is laid out on the ranks is only known "
        "when the optimizer has stepped once"
    )


def _load_optimizer(optimizer: torch.optim.Optimizer, ours: list[list[str]], filled: Any) -> None:
    numbers = {name: index for index, name in enumerate(name for names in ours for name in names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in filled["param_groups"]]
    state = {numbers[name]: value for name, value in filled["state"].items()}
    optimizers.load_state(optimizer, {"state": state, "param_groups": groups})

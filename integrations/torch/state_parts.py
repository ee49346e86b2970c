"""The parts of a training state, each under a name: "model", or "model/generator" if several were given.

Modules are saved bare: without the prefixes of DistributedDataParallel and torch.compile, whichever wraps them.
"""

from __future__ import annotations

import collections
import itertools
import pickle
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from ckpt import optimizers, state_dicts

from . import torch_private
from .resumable_sampler import make_resumable
from .sharding_check import refuse_shards


@runtime_checkable
class Stateful(Protocol):
    """What keeps its state in a dict: optimizers, schedulers, GradScaler, StatefulDataLoader, samplers of your own."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def name_parts(kind: str, given: Stateful | Mapping[str, Stateful] | None) -> dict[str, Any]:
    """Objects by the name of their part, modules unwrapped.

    Raises:
        TypeError: one has no state_dict() and load_state_dict(), or this rank holds only a part of it.
        ValueError: a name is not a text without "/".
    """
    if given is None:
        return {}
    parts: dict[str, Any] = {}
    if isinstance(given, Mapping):
        for name, item in given.items():
            if not isinstance(name, str) or not name or "/" in name:
                raise ValueError(f"{kind}= takes names that are texts without '/', not {name!r}")
            parts[f"{kind}/{name}"] = item
    else:
        parts[kind] = given
    return {name: _usable(name, item) for name, item in parts.items()}


def _usable(name: str, item: Any) -> Any:
    if name.partition("/")[0] == "data":
        item = make_resumable(item)
    if isinstance(item, type) or not isinstance(item, Stateful):
        raise TypeError(
            f"{name} must have state_dict() and load_state_dict(), and {type(item).__name__} has not{_instead(name, item)}"
        )
    refuse_shards(name, item)
    return unwrap(item) if isinstance(item, nn.Module) else item


def _instead(name: str, item: Any) -> str:
    """What to give for it."""
    if name.partition("/")[0] != "data":
        return ""
    if isinstance(item, DataLoader):
        which = "sampler" if type(item.batch_sampler) in (BatchSampler, type(None)) else "batch_sampler"
        return f": give its sampler, data=loader.{which}, or a StatefulDataLoader of torchdata (`pip install torchdata`)"
    return (
        ": give a sampler of torch.utils.data, such as RandomSampler or DistributedSampler, which learns to go on; one of your "
        "own that has both; or a StatefulDataLoader (`pip install torchdata`, torchdata.stateful_dataloader)"
    )


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile, in whatever order they were applied."""
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif (compiled := dict(module.named_children()).get("_orig_mod")) is not None:
            module = compiled
        else:
            return module


def take_state(part: Any, split: bool) -> tuple[Any, dict[str, Any] | None]:
    """What is the same on all ranks, and what may differ between them: all of a module but its parameters.

    Args:
        split: False: all in the first, None in the second, which is also what any part but a module gives.
    """
    state = part.state_dict()
    if not isinstance(part, nn.Module):
        return state, None
    shared: collections.OrderedDict[str, Any] = collections.OrderedDict()
    own: dict[str, Any] = {}
    parameters = {name for name, _ in part.named_parameters(remove_duplicate=False)} if split else set(state)
    for key, value in state.items():
        (shared if key in parameters else own)[bare(key)] = value
    metadata = torch_private.metadata_of(state)
    torch_private.set_metadata(shared, {bare(prefix): dict(value) for prefix, value in metadata.items()})
    return shared, own if split else None


def lend_memory(part: Any, shared: Any, strict: bool) -> dict[tuple[Any, ...], torch.Tensor] | None:
    """Tensors of a part into which those of its state in a file can be read before load_state(), by their paths in that state.

    They are those that load_state() would just copy to. Parts that have ways of their own to load a state lend nothing.

    Returns:
        None if load_state() is going to complain.
    """
    if isinstance(part, nn.Module):
        return _lend_module(part, shared, strict)
    return _lend_optimizer(part, shared) if isinstance(part, torch.optim.Optimizer) else {}


def _lend_module(module: nn.Module, shared: Any, strict: bool) -> dict[tuple[Any, ...], torch.Tensor] | None:
    if not isinstance(shared, Mapping):
        return None
    parameters = {bare(name): tensor for name, tensor in module.named_parameters(remove_duplicate=False)}
    persistent = {bare(key) for key in module.state_dict()}
    if strict and not parameters.keys() <= shared.keys() <= persistent:
        return None
    here: dict[str, torch.Tensor] = {}  # in the order in which torch loads them
    for prefix, each in module.named_modules(remove_duplicate=False):
        own = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
        named = [*each.named_parameters(**own), *each.named_buffers(**own)]
        here |= {bare(name): tensor for name, tensor in named if bare(name) in persistent}
    if any(nn.parameter.is_lazy(tensor) for tensor in here.values()):
        return {}  # it gets memory by load_state_dict()
    common = {key: (shared[key], tensor) for key, tensor in here.items() if key in shared}
    if not all(isinstance(found, torch.Tensor) and found.shape == tensor.shape for found, tensor in common.values()):
        return None
    return {(key,): tensor for key, (_, tensor) in common.items()} if state_dicts.is_plain(module) else {}


def _lend_optimizer(optimizer: torch.optim.Optimizer, shared: Any) -> dict[tuple[Any, ...], torch.Tensor] | None:
    """What it has from steps that it has made; one that has made none takes up what is in the file as it is."""
    if not state_dicts.is_plain(optimizer):
        return {}
    if not isinstance(shared, Mapping) or not {"state", "param_groups"} <= shared.keys():
        return None
    states, groups = shared["state"], shared["param_groups"]
    if not isinstance(states, Mapping) or not isinstance(groups, list):
        return None
    theirs: list[Any] = [group.get("params") if isinstance(group, Mapping) else None for group in groups]
    ours = [group["params"] for group in optimizer.param_groups]
    if not all(isinstance(params, list) for params in theirs) or list(map(len, theirs)) != list(map(len, ours)):
        return None
    lent: dict[tuple[Any, ...], torch.Tensor] = {}
    for index, parameter in zip(itertools.chain(*theirs), itertools.chain(*ours), strict=True):
        found, state = states.get(index), optimizer.state.get(parameter, {})
        if isinstance(found, Mapping):
            lent |= {("state", index, key): state[key] for key in found if isinstance(state.get(key), torch.Tensor)}
    return lent


def load_state(part: Any, shared: Any, own: dict[str, Any] | None, strict: bool) -> list[str]:
    """Puts back what take_state() has taken; returns the names in a module that only one side has, if not strict.

    Raises:
        whatever `part` raises if the state does not fit. A module may then be loaded in part.
    """
    if isinstance(part, torch.optim.Optimizer):
        optimizers.load_state(part, shared)
        return []
    if not isinstance(part, nn.Module):
        part.load_state_dict(shared)
        return []
    names = {bare(key): key for key in part.state_dict()}
    state = collections.OrderedDict((names.get(key, key), value) for key, value in {**shared, **(own or {})}.items())
    metadata = torch_private.metadata_of(shared)
    prefixes = [prefix for prefix, _ in part.named_modules(remove_duplicate=False)]
    torch_private.set_metadata(state, {p: metadata[bare(p)] for p in prefixes if bare(p) in metadata})
    differing = part.load_state_dict(state, strict=strict)
    return [*differing.missing_keys, *differing.unexpected_keys]


def bare(key: str) -> str:
    """The key that it would be if no submodule were wrapped or compiled."""
    wrapped = torch_private.WRAPPED
    return ".".join(name for name in key.split(".") if name not in wrapped) if "._" in f".{key}" else key


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, tensors and all."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and pickle.dumps(a) == pickle.dumps(b)

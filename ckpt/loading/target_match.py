"""Laying what is in a file beside what it is to be loaded into, before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ckpt import devices as torch_devices
from ckpt import optimizers
from ckpt.devices import HOST
from ckpt.errors import MismatchError
from ckpt.loading.record_memory import Memory, allocate_on
from ckpt.loading.skeleton import PLAIN, Outline, is_plain_tensor, view_of

_SHOWN_PROBLEMS = 20
_SHOWN_KEYS = 5


class Pair(NamedTuple):
    """A tensor of the outline, the tensor that gets its elements, and the record that they are in."""

    source: torch.Tensor
    target: torch.Tensor
    record: str


class Fit:
    """What is to be done, and all that stands against it.

    Attributes:
        pairs: tensors to fill.
        adopted: records of tensors that have no counterpart yet; these are given to the target as they come from the file. With
            the devices on which it wants them, HOST among them.
        last: to be called when all bytes are there: what puts values that are not tensors in their places.
        problems: for people; empty if the two fit.
        loaded, missing, unexpected: paths of what is in both, what the file lacks, and what the target lacks.
    """

    def __init__(self, outline: Outline, strict: bool) -> None:
        self.pairs: list[Pair] = []
        self.adopted: dict[str, set[int]] = {}
        self.last: list[Callable[[], object]] = []
        self.problems: list[str] = []
        self.loaded: list[str] = []
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self._outline = outline
        self._strict = strict
        self._memory: Memory | None = None

    def lay(self, found: Any, target: Any, path: str = "") -> None:
        """Goes through both; notes what to do and what is wrong."""
        if isinstance(target, torch.nn.Module):
            self._lay_module(found, target, path)
        elif isinstance(target, torch.optim.Optimizer):
            self._lay_optimizer(found, target, path)
        elif isinstance(target, torch.Tensor):
            self._lay_tensor(found, target, path)
        elif isinstance(target, Mapping):
            self._lay_mapping(found, target, path)
        elif isinstance(target, (list, tuple)) and not isinstance(target, torch.Size):
            self._lay_sequence(found, target, path)
        elif not isinstance(found, PLAIN) or found != target:
            self._problem(path, f"is {_kind(found)} in the file, and {_kind(target)} here, which cannot be changed in place")

    def note_nothing_in_common(self) -> None:
        """A problem even if keys that only one side has are passed over."""
        if not self.problems:
            sides = [f"the file has {_some(self.unexpected)}"] if self.unexpected else []
            sides += [f"the target has {_some(self.missing)}"] if self.missing else []
            self._problem("", f"has no key in common with it: {', '.join(sides)}")

    def memory(self, devices: bool = True) -> Memory:
        """For what is adopted; to be filled before the last calls.

        Args:
            devices: whether what is read can be sent to them.
        """
        unanimous = {name: next(iter(wanted)) for name, wanted in self.adopted.items() if len(wanted) == 1}
        elsewhere = {name: device for name, device in unanimous.items() if devices and device != HOST}
        here = {name: self._outline.storages[name] for name in self.adopted if name not in elsewhere}
        made, elsewhere_now = allocate_on(self._outline.archive, elsewhere, elsewhere)
        self._memory = Memory(self._outline.archive, here | made, elsewhere_now)
        return self._memory

    def mismatch(self, touched: bool = False) -> MismatchError:
        """The error that lists the problems. `touched`: the target holds parts of another file already."""
        shown = "; ".join(self.problems[:_SHOWN_PROBLEMS])
        if len(self.problems) > _SHOWN_PROBLEMS:
            shown += f"; and {len(self.problems) - _SHOWN_PROBLEMS} more"
        if len(self.problems) == len(self.missing) + len(self.unexpected) and self.loaded:
            shown += " (strict=False passes over keys that only one side has)"
        after = "It holds parts of a damaged checkpoint that came before" if touched else "Nothing was changed"
        text = f"'{self._outline.archive.path}' does not fit what it is to be loaded into: {shown}. {after}"
        return MismatchError(text, self.problems)

    def _problem(self, path: str, what: str) -> None:
        self.problems.append(f"{path or 'the whole'} {what}")

    def _lay_tensor(self, found: Any, target: torch.Tensor, path: str) -> None:
        if not isinstance(found, torch.Tensor):
            return self._problem(path, f"is {_kind(found)} in the file, and a tensor here")
        record = self._outline.record_of(found)
        if torch.nn.parameter.is_lazy(target) or target.is_meta:
            return self._problem(path, "has no memory here yet: let a first forward give it some, or use load()")
        if record is None or not is_plain_tensor(target.data):
            return self._problem(path, "is no plain strided tensor: load() can load it")
        if found.dtype != target.dtype:
            self._problem(path, f"is {found.dtype} in the file, and {target.dtype} here")
        if found.shape != target.shape:
            self._problem(path, f"has shape {list(found.shape)} in the file, and {list(target.shape)} here")
        if _lies_on_itself(target):
            self._problem(path, "has elements here that lie on one another")
        self.loaded.append(path)
        self.pairs.append(Pair(found, target.detach(), record))

    def _lay_mapping(self, found: Any, target: Mapping[Any, Any], path: str) -> None:
        if not isinstance(found, Mapping):
            return self._problem(path, f"is {_kind(found)} in the file, and has keys here")
        missing = [_join(path, key) for key in target if key not in found]
        unexpected = [_join(path, key) for key in found if key not in target]
        self.missing += missing
        self.unexpected += unexpected
        if self._strict:
            self.problems += [f"{each} is missing in the file" for each in missing]
            self.problems += [f"{each} is in the file, and not here" for each in unexpected]
        for key in (key for key in found if key in target):
            self._lay_part(found[key], target, key, _join(path, key))

    def _lay_sequence(self, found: Any, target: Any, path: str) -> None:
        if not isinstance(found, (list, tuple)) or len(found) != len(target):
            length = len(found) if isinstance(found, (list, tuple)) else _kind(found)
            return self._problem(path, f"has {len(target)} parts here, and in the file: {length}")
        for index, part in enumerate(found):
            self._lay_part(part, target, index, _join(path, index))

    def _lay_part(self, found: Any, container: Any, key: Any, path: str) -> None:
        """A value that is not a tensor takes its place in its container."""
        replaceable = isinstance(found, PLAIN) and isinstance(container[key], PLAIN)
        if replaceable and hasattr(container, "__setitem__"):
            self.loaded.append(path)
            self.last.append(lambda: container.__setitem__(key, found))
        else:
            self.lay(found, container[key], path)

    def _lay_module(self, found: Any, module: torch.nn.Module, path: str) -> None:
        state = dict(module.state_dict())
        self._lay_mapping(found, state, path)
        extra = {key for key, value in state.items() if not isinstance(value, torch.Tensor)}
        if extra:  # get_extra_state(): values that the module takes back by itself
            self.last.append(lambda: module.load_state_dict({key: state[key] for key in extra}, strict=False))

    def _lay_optimizer(self, found: Any, optimizer: torch.optim.Optimizer, path: str) -> None:
        """It follows the file, as with its load_state_dict(). What it has of the same kind is filled, all else replaced."""
        ours = optimizer.state_dict()
        if not isinstance(found, Mapping) or not isinstance(found.get("state"), Mapping):
            return self._problem(path, f"is {_kind(found)} in the file, and the state of an optimizer here")
        counts = [len(group["params"]) for group in ours["param_groups"]]
        theirs = [len(group["params"]) for group in found.get("param_groups", ())]
        if counts != theirs:
            return self._problem(path, f"has groups of {theirs} parameters in the file, and of {counts} here")
        # Parameters have numbers, in the order of the groups: those of the file need not be ours.
        numbers = itertools.chain.from_iterable(group["params"] for group in found["param_groups"])
        parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
        here = {number: (mine, parameter) for mine, (number, parameter) in enumerate(zip(numbers, parameters, strict=True))}
        states = {}
        for number, state in found["state"].items():
            mine, parameter = here.get(number, (None, None))
            states[number] = self._follow(state, ours["state"].get(mine), parameter)
        groups = [self._follow(*pair) for pair in zip(found["param_groups"], ours["param_groups"], strict=True)]
        rest = {key: self._follow(value, None) for key, value in found.items() if key not in ("state", "param_groups")}
        self.loaded.append(path)
        self.last.append(
            lambda: optimizers.load_state(
                optimizer, rest | {"state": self._where_read(states), "param_groups": list(map(self._with_moved, groups))}
            )
        )

    def _follow(self, found: Any, ours: Any, parameter: torch.Tensor | None = None) -> Any:
        """What is in the file, with tensors of ours in the place of those that can be filled, and the others adopted."""
        if not isinstance(found, Mapping):
            self._adopt(None, found, parameter)
            return found
        followed = dict(found)
        for name, part in found.items():
            target = ours.get(name) if isinstance(ours, Mapping) else None
            record = self._outline.record_of(part) if isinstance(part, torch.Tensor) else None
            if record is not None and isinstance(target, torch.Tensor) and _is_alike(part, target):
                self.pairs.append(Pair(part, target.detach(), record))
                followed[name] = target
            else:
                self._adopt(name, part, parameter)
        return followed

    def _adopt(self, name: Any, part: Any, parameter: torch.Tensor | None) -> None:
        """What the optimizer has not. Its load_state_dict() moves it to the device of the parameter, but for the step."""
        device = HOST
        if (
            parameter is not None
            and name != "step"
            and isinstance(part, torch.Tensor)
            and self._outline.record_of(part) is not None
        ):
            cast = parameter.is_floating_point() and part.dtype != parameter.dtype
            device = HOST if cast else torch_devices.holding(parameter)
        for record in self._outline.records_of(part):
            self.adopted.setdefault(record, set()).add(device)

    def _where_read(self, states: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: self._with_moved(value) for key, value in states.items()}

    def _with_moved(self, value: Any) -> Any:
        """The same, with the tensors that were read to other memory than the outline's."""
        return {name: self._moved(part) for name, part in value.items()} if isinstance(value, Mapping) else value

    def _moved(self, part: Any) -> Any:
        record = self._outline.record_of(part) if isinstance(part, torch.Tensor) else None
        if record is None or self._memory is None or record not in self._memory.places:
            return part
        place = self._memory.places[record]
        return part if place is self._outline.storages[record] else view_of(part, place)


def _is_alike(found: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the target can get its elements without becoming another kind of tensor."""
    plain = is_plain_tensor(target.data) and not torch.nn.parameter.is_lazy(target) and not target.is_meta
    same = plain and found.dtype == target.dtype and found.shape == target.shape
    return same and not _lies_on_itself(target)


def _lies_on_itself(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _some(paths: list[str]) -> str:
    shown = ", ".join(f"'{path}'" for path in paths[:_SHOWN_KEYS])
    return f"{shown} and {len(paths) - _SHOWN_KEYS} more" if len(paths) > _SHOWN_KEYS else shown


def _kind(value: Any) -> str:
    if isinstance(value, PLAIN):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"

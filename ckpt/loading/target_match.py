"""Laying what is in a file beside what it is to be loaded into, before anything is written."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ckpt import devices as torch_devices
from ckpt import optimizers, state_dicts, torch_private
from ckpt.devices import HOST
from ckpt.errors import MismatchError
from ckpt.loading.overlap import Intervals, Pair, lies_on_itself
from ckpt.loading.record_memory import RecordMemory, allocate_on
from ckpt.loading.skeleton import PLAIN, Skeleton, is_plain_tensor, view_of

_SHOWN_PROBLEMS = 20
_SHOWN_KEYS = 5
_SHOWN_TEXT = 1000  # characters of what torch says
_LACKED, _SURPLUS = "missing in the file", "in the file, and not here"
_SHARDED = ("DTensor", "ShardedTensor")
_OF_PARAMETER = re.compile(r"(|.*\.)state\.\d+")  # in a state dict of an optimizer, where parameters have numbers
_STEP_OTHERWISE = re.compile(r"(|.*\.)state\.\d+\.step (is (?!missing|in the file, and not)|has )")  # a problem
_NO_MEMORY = "has no memory here yet: let a first forward give it some, or use load()"


class TargetMatch:
    """What is to be done, and all that stands against it.

    Attributes:
        pairs: tensors to fill.
        adopted: records of tensors that have no counterpart yet; these are given to the target as they come from the file. With
            the devices on which it wants them, HOST among them.
        problems: for people; empty if the two fit.
        loaded, missing, unexpected: paths of what is in both, what the file lacks, and what the target lacks. Modules that load
            in a way of their own add theirs at the very end.
    """

    def __init__(self, skeleton: Skeleton, strict: bool) -> None:
        self.pairs: list[Pair] = []
        self.adopted: dict[str, set[int]] = {}
        self.problems: list[str] = []
        self.loaded: list[str] = []
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self._skeleton = skeleton
        self._strict = strict
        self._memory: RecordMemory | None = None
        self._last: list[Callable[[], object]] = []  # puts what is no tensor in its place, when all bytes are there
        self._modules: list[torch.nn.Module] = []  # that load in a way of their own
        self._optimizers: list[tuple[Any, torch.optim.Optimizer, str]] = []
        self._taken = Intervals()  # memory into which optimizers must not have anything read
        self._counterparts: dict[int, torch.Tensor | None] = {}  # by the id() of tensors in states of optimizers

    def compare(self, found: Any, target: Any, path: str = "") -> None:
        """Goes through both; notes what to do and what is wrong."""
        self._compare(found, target, path)
        if self._optimizers:
            self._compare_optimizers()

    def put_rest(self) -> None:
        """All that is not read straight to its place, when all bytes are there.

        Raises:
            MismatchError: a module that loads in a way of its own has refused it, which cannot be known before.
        """
        for put in self._last:
            put()

    def _compare(self, found: Any, target: Any, path: str) -> None:
        if isinstance(target, torch.nn.Module):
            self._compare_module(found, target, path)
        elif isinstance(target, torch.optim.Optimizer):
            self._optimizers.append((found, target, path))
        elif isinstance(target, torch.Tensor):
            self._compare_tensor(found, target, path)
        elif isinstance(target, Mapping):
            self._compare_mapping(found, target, path)
        elif isinstance(target, (list, tuple)) and not isinstance(target, torch.Size):
            self._compare_sequence(found, target, path)
        elif not isinstance(found, PLAIN) or found != target:
            self._problem(path, f"is {_kind(found)} in the file, and {_kind(target)} here, which cannot be changed in place")

    def expect_something(self) -> None:
        """Nothing in common is a problem even if keys that only one side has are passed over."""
        found = self.loaded or self._modules or not (self.missing or self.unexpected)
        if not found and not self.problems:
            sides = [f"the file has {_some(self.unexpected)}"] if self.unexpected else []
            sides += [f"the target has {_some(self.missing)}"] if self.missing else []
            self._problem("", f"has no key in common with it: {', '.join(sides)}")

    def memory(self, devices: bool = True) -> RecordMemory:
        """For what is adopted; to be filled before the last calls.

        Args:
            devices: whether what is read can be sent to them.
        """
        unanimous = {name: next(iter(wanted)) for name, wanted in self.adopted.items() if len(wanted) == 1}
        elsewhere = {name: device for name, device in unanimous.items() if devices and device != HOST}
        here = {name: self._skeleton.storages[name] for name in self.adopted if name not in elsewhere}
        made, elsewhere_now = allocate_on(self._skeleton.archive, elsewhere, elsewhere)
        self._memory = RecordMemory(self._skeleton.archive, here | made, elsewhere_now)
        return self._memory

    def mismatch(self, touched: bool = False) -> MismatchError:
        """The error that lists the problems. `touched`: the target holds parts of another file already."""
        shown = "; ".join(self._shown())
        shown += self._what_may_help()
        after = "It holds parts of a damaged checkpoint that came before" if touched else "Nothing was changed"
        text = f"'{self._skeleton.archive.path}' does not fit what it is to be loaded into: {shown}. {after}"
        return MismatchError(text, self.problems)

    def _what_may_help(self) -> str:
        if any(map(_STEP_OTHERWISE.match, self.problems)):
            # a number or a tensor, on the host or not: that depends on torch and on the settings of the optimizer
            return " (give the optimizer itself, not its state_dict(): it takes up its step in any form)"
        if len(self.problems) != len(self.missing) + len(self.unexpected) or not self.loaded:
            return ""
        optimizers_of = {found[1] for path in self.unexpected if (found := _OF_PARAMETER.fullmatch(path))}
        if any(path.startswith(f"{each}param_groups.") for each in optimizers_of for path in self.loaded):
            # strict=False would lose the state
            return " (give the optimizer itself, not its state_dict(): before its first step there is no state to load into)"
        return " (strict=False passes over keys that only one side has)"

    def _shown(self) -> list[str]:
        """The problems, without the rest of those that are of one kind."""
        sides = [(_LACKED, self.missing), (_SURPLUS, self.unexpected)] if self._strict else []
        of_sides = {f"{path} is {what}" for what, paths in sides for path in paths}
        others = [problem for problem in self.problems if problem not in of_sides]
        shown = others[:_SHOWN_PROBLEMS] + [f"and {len(others) - _SHOWN_PROBLEMS} more"] * (len(others) > _SHOWN_PROBLEMS)
        for what, paths in sides:
            shown += [f"{path} is {what}" for path in paths[:_SHOWN_KEYS]]
            shown += [f"{len(paths) - _SHOWN_KEYS} more are {what}"] * (len(paths) > _SHOWN_KEYS)
        return shown

    def _problem(self, path: str, what: str) -> None:
        self.problems.append(f"{path or 'the whole'} {what}")

    def _compare_tensor(self, found: Any, target: torch.Tensor, path: str) -> None:
        if not isinstance(found, torch.Tensor):
            return self._problem(path, f"is {_kind(found)} in the file, and a tensor here")
        record = self._skeleton.record_of(found)
        if torch.nn.parameter.is_lazy(target) or target.is_meta:
            return self._problem(path, _NO_MEMORY)
        if (kind := type(target.data).__name__) in _SHARDED:
            what = f"is a {kind} here, of which each rank has a part: save it by sharded=, and restore it by sharded_into="
            return self._problem(path, what)
        if record is None or not is_plain_tensor(target.data):
            return self._problem(path, "is no plain strided tensor: load() can load it")
        if found.dtype != target.dtype:
            self._problem(path, f"is {found.dtype} in the file, and {target.dtype} here")
        if found.shape != target.shape:
            self._problem(path, f"has shape {list(found.shape)} in the file, and {list(target.shape)} here")
        if lies_on_itself(target):
            self._problem(path, "has elements here that lie on one another")
        self.loaded.append(path)
        self.pairs.append(Pair(found, target.detach(), record))

    def _compare_mapping(self, found: Any, target: Mapping[Any, Any], path: str) -> None:
        if not isinstance(found, Mapping):
            return self._problem(path, f"is {_kind(found)} in the file, and has keys here")
        for key in self._common_keys(found, target, path):
            self._compare_part(found[key], target, key, _join(path, key))

    def _common_keys(self, found: Mapping[Any, Any], target: Mapping[Any, Any], path: str) -> list[Any]:
        """In the order of the target, as load_state_dict() goes through them."""
        missing = [_join(path, key) for key in target if key not in found]
        unexpected = [_join(path, key) for key in found if key not in target]
        self.missing += missing
        self.unexpected += unexpected
        if self._strict:
            self.problems += [f"{each} is {_LACKED}" for each in missing]
            self.problems += [f"{each} is {_SURPLUS}" for each in unexpected]
        return [key for key in target if key in found]

    def _compare_sequence(self, found: Any, target: Any, path: str) -> None:
        if not isinstance(found, (list, tuple)) or len(found) != len(target):
            length = len(found) if isinstance(found, (list, tuple)) else _kind(found)
            return self._problem(path, f"has {len(target)} parts here, and in the file: {length}")
        for index, part in enumerate(found):
            self._compare_part(part, target, index, _join(path, index))

    def _compare_part(self, found: Any, container: Any, key: Any, path: str) -> None:
        """A value that is not a tensor takes its place in its container."""
        replaceable = isinstance(found, PLAIN) and isinstance(container[key], PLAIN)
        if replaceable and hasattr(container, "__setitem__"):
            self.loaded.append(path)
            self._last.append(lambda: container.__setitem__(key, found))
        else:
            self._compare(found, container[key], path)

    def _compare_module(self, found: Any, module: torch.nn.Module, path: str) -> None:
        if not isinstance(found, Mapping):
            return self._problem(path, f"is {_kind(found)} in the file, and the state of a module here")
        state = _state_of(module)
        if state is None:
            return self._give_module(found, module, path)
        named = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        named |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
        extra: OrderedDict[str, Any] = OrderedDict()  # what the module gets from get_extra_state(), and takes back by itself
        for key in self._common_keys(found, state, path):
            if key in named:
                self._compare_tensor(found[key], state[key], _join(path, key))
            else:
                extra[key] = found[key]
                self._adopt(None, found[key], None)
                self.loaded.append(_join(path, key))
        if extra:
            torch_private.copy_versions(found, extra)
            self._last.append(lambda: self._load_module(module, extra, path, strict=False))

    def _give_module(self, found: Mapping[Any, Any], module: torch.nn.Module, path: str) -> None:
        """Whether it fits is for the module alone to say, when it is given all that the file holds."""
        tensors = [*module.parameters(), *module.buffers()]
        if any(tensor.is_meta for tensor in tensors):  # torch would leave them so
            return self._problem(path, _NO_MEMORY)
        for tensor in tensors:
            if not torch.nn.parameter.is_lazy(tensor) and is_plain_tensor(tensor.data):
                self._taken.cover(tensor)
        self._modules.append(module)
        self._adopt(None, found, None)
        keys = list(found)

        def load() -> None:
            differing = self._load_module(module, found, path, self._strict)
            unexpected = set(getattr(differing, "unexpected_keys", ()))
            self.loaded += [_join(path, key) for key in keys if key not in unexpected]
            self.missing += [_join(path, key) for key in getattr(differing, "missing_keys", ())]
            self.unexpected += [_join(path, key) for key in unexpected]

        self._last.append(load)

    def _load_module(self, module: torch.nn.Module, state: Mapping[str, Any], path: str, strict: bool) -> Any:
        try:
            return module.load_state_dict(state, strict=strict)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            said = said if len(said) <= _SHOWN_TEXT else f"{said[:_SHOWN_TEXT]}..."
            problem = f"{path or 'the whole'} was refused by load_state_dict() of {type(module).__name__}: {said}"
            raise MismatchError(
                f"'{self._skeleton.archive.path}' does not fit what it is to be loaded into: {problem}. It may have been "
                "loaded in part",
                [problem],
            ) from error

    def _compare_optimizers(self) -> None:
        """Last of all: what they share with the rest must stay as it is until their own load_state_dict() replaces it."""
        for pair in self.pairs:
            self._taken.cover(pair.target)
        for each in self._optimizers:
            self._compare_optimizer(*each)
        self._optimizers = []

    def _compare_optimizer(self, found: Any, optimizer: torch.optim.Optimizer, path: str) -> None:
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
        filled = ours["state"] if state_dicts.is_plain(optimizer) else {}
        states = {}
        for number, state in found["state"].items():
            mine, parameter = here.get(number, (None, None))
            states[number] = self._follow(state, filled.get(mine), parameter)
        groups = [self._follow(*pair, anew=True) for pair in zip(found["param_groups"], ours["param_groups"], strict=True)]
        rest = {key: self._follow(value, None) for key, value in found.items() if key not in ("state", "param_groups")}
        self.loaded.append(path)
        self._last.append(
            lambda: optimizers.load_state(
                optimizer, rest | {"state": self._where_read(states), "param_groups": list(map(self._with_moved, groups))}
            )
        )

    def _follow(self, found: Any, ours: Any, parameter: torch.Tensor | None = None, *, anew: bool = False) -> Any:
        """What is in the file, with tensors of ours in the place of those that can be filled, and the others adopted.

        Args:
            anew: with tensors like ours, which stay as they are: others may have them too. torch copies what groups hold.
        """
        if not isinstance(found, Mapping):
            self._adopt(None, found, parameter)
            return found
        followed = dict(found)
        for name, part in found.items():
            target = ours.get(name) if isinstance(ours, Mapping) else None
            counterpart = self._counterpart(part, target, anew) if isinstance(part, torch.Tensor) else None
            if counterpart is not None:
                followed[name] = counterpart
            else:
                self._adopt(name, part, parameter)
        return followed

    def _counterpart(self, part: torch.Tensor, target: Any, anew: bool) -> torch.Tensor | None:
        """What is filled for it: one tensor wherever the file has one, and nothing whose memory is wanted for anything else."""
        if id(part) not in self._counterparts:
            chosen, record = None, self._skeleton.record_of(part)
            if record is not None and isinstance(target, torch.Tensor) and _is_alike(part, target):
                chosen = torch.empty_like(target.detach()) if anew else target
                chosen = chosen if self._taken.add(chosen) else None
            if record is not None and chosen is not None:
                self.pairs.append(Pair(part, chosen.detach(), record))
            self._counterparts[id(part)] = chosen
        return self._counterparts[id(part)]

    def _adopt(self, name: Any, part: Any, parameter: torch.Tensor | None) -> None:
        """What is not there yet. An optimizer moves it to the device of the parameter, but for the step."""
        device = HOST
        if (
            parameter is not None
            and name != "step"
            and isinstance(part, torch.Tensor)
            and self._skeleton.record_of(part) is not None
        ):
            cast = parameter.is_floating_point() and part.dtype != parameter.dtype
            device = HOST if cast else torch_devices.holding(parameter)
        for record in self._skeleton.records_of(part):
            self.adopted.setdefault(record, set()).add(device)

    def _where_read(self, states: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: self._with_moved(value) for key, value in states.items()}

    def _with_moved(self, value: Any) -> Any:
        """The same, with the tensors that were read to other memory than the skeleton's."""
        return {name: self._moved(part) for name, part in value.items()} if isinstance(value, Mapping) else value

    def _moved(self, part: Any) -> Any:
        record = self._skeleton.record_of(part) if isinstance(part, torch.Tensor) else None
        if record is None or self._memory is None or record not in self._memory.places:
            return part
        place = self._memory.places[record]
        return part if place is self._skeleton.storages[record] else view_of(part, place)


def _is_alike(found: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the target can get its elements without becoming another kind of tensor."""
    plain = is_plain_tensor(target.data) and not torch.nn.parameter.is_lazy(target) and not target.is_meta
    same = plain and found.dtype == target.dtype and found.shape == target.shape
    return same and not lies_on_itself(target)


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


def _state_of(module: torch.nn.Module) -> dict[str, Any] | None:
    """Its state dict, in which tensors that bear names of the module's are these themselves; None if it has another."""
    if not state_dicts.is_plain(module):
        return None
    state = dict(module.state_dict())
    parts = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    own = [(state[name], tensor) for name, tensor in itertools.chain(*parts) if name in state]
    return state if all(_is_itself(given, tensor) for given, tensor in own) else None


def _is_itself(given: Any, tensor: torch.Tensor) -> bool:
    if not (isinstance(given, torch.Tensor) and is_plain_tensor(given) and is_plain_tensor(tensor.data)):
        return isinstance(given, torch.Tensor)  # which is not going to be filled
    return (given.data_ptr(), given.shape, given.stride()) == (tensor.data_ptr(), tensor.shape, tensor.stride())

"""All that changes while a model learns, captured as one state and put back from it.

Adapters differ in when they save. Those that are given the objects themselves save and resume the same, which stands here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch

import ckpt
from ckpt.state_dicts import SupposedlyFrozen, supposedly_frozen

from . import state_parts
from .random_state import rng_state, set_rng_state
from .sharded_parts import Saved, ShardedParts
from .state_parts import load_state, same, take_state

logger = logging.getLogger("ckpt")

State = dict[str, Any]


class Restored(Protocol):
    """What `ckpt.Checkpointer.restore` has found."""

    @property
    def step(self) -> int: ...

    @property
    def state(self) -> Any:
        """This rank's own; None if there is none."""

    @property
    def replicated(self) -> Any:
        """What is the same on all ranks; None if there is none."""

    @property
    def sharded(self) -> Any:
        """Of which each rank has a part; None if there is none."""


class TrainingState(Protocol):
    """All that changes while a model learns."""

    def capture(self) -> tuple[State, State, State | None]:
        """What is the same on all ranks, what is this rank's own, and of what each rank has a part, if there is anything of the
        kind: `replicated`, `state` and `sharded` of `ckpt.Checkpointer.save`."""

    def resume(self, found: Restored) -> int:
        """Puts back what was captured; returns the optimizer steps done."""


class NamedParts(TrainingState):
    """Objects that each have a name, and the random number generators.

    Args:
        parts: objects as name_parts() gives them. Their states are the same on all ranks, but for what modules hold besides
            parameters, which each rank saves for itself if there are several.
        positions: what knows this rank's position in the data, as name_parts() gives it for "data".
        checkpointer: that saves and restores them. It knows the ranks, and errors name its directory.
        merge_data: as for CheckpointCallback.
    """

    def __init__(
        self,
        parts: dict[str, Any],
        positions: dict[str, Any],
        checkpointer: ckpt.Checkpointer,
        merge_data: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self._parts = parts
        self._sharded = ShardedParts(parts)
        self._data = positions
        self._checkpointer = checkpointer
        self._merge_data = merge_data

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those among the parts. Their parameters and states change only in their steps, so these may leave lazily."""
        return [part for part in self._parts.values() if isinstance(part, torch.optim.Optimizer)]

    def supposedly_frozen(self) -> SupposedlyFrozen:
        """Of what was given as "model"."""
        models = [part for name, part in self._parts.items() if name.partition("/")[0] == "model"]
        groups = [group for optimizer in self.optimizers() for group in optimizer.param_groups]
        return supposedly_frozen(models, (parameter for group in groups for parameter in group["params"]))

    def capture(self) -> tuple[State, State, State | None]:
        replicated: State = {}
        state: State = {"rng": rng_state()}
        sharded, of_rank = self._sharded.take() if self._sharded else (None, {})
        for name, part in self._parts.items():
            if name in self._sharded:
                own = of_rank.get(name)
            else:
                replicated[name], own = take_state(part, split=self._checkpointer.world_size > 1)
            if own is not None:
                state[f"buffers/{name}"] = own
        state.update((name, part.state_dict()) for name, part in self._data.items())
        return replicated, state, sharded

    def prepare_targets(self) -> Callable[[Saved], State] | None:
        """`sharded_into` of `ckpt.Checkpointer.restore`. To be called by all ranks together."""
        return self._sharded.prepare_targets() if self._sharded else None

    def resume(self, found: Restored, *, strict: bool = True) -> int:
        """See TrainingState. The random number generators are put back last of all.

        Args:
            strict: as for CheckpointCallback.resume().

        Raises:
            ckpt.CheckpointError: the state does not fit, and the message says which part of it; the objects may have been
                loaded in part.
        """
        step, replicated, state = found.step, found.replicated or {}, found.state or {}
        ckpt.fence()  # loading writes to tensors
        whole = {name: part for name, part in self._parts.items() if name not in self._sharded}
        self._check_parts(step, replicated, whole, strict)
        dropped = state.get("dropped", ())
        held = _positions(state)
        self._check_parts(step, held, {name: part for name, part in self._data.items() if name not in dropped}, strict)
        for name, part in self._parts.items():
            if name in replicated:
                with _Naming(step, name):
                    passed_over = load_state(part, replicated[name], state.get(f"buffers/{name}"), strict)
                if passed_over:
                    logger.warning("'%s' of checkpoint %d: only one side has %s", name, step, ", ".join(passed_over))
        for name, filled in (found.sharded or {}).items():
            with _Naming(step, name):
                passed_over = self._sharded.load(name, filled, state.get(f"buffers/{name}"), strict)
            if passed_over:
                logger.warning("'%s' of checkpoint %d: only one side has %s", name, step, ", ".join(passed_over))
        for name, part in self._data.items():
            if name in held:
                with _Naming(step, name):
                    part.load_state_dict(held[name])
        if "rng" in state:
            with _Naming(step, "rng"):
                set_rng_state(state["rng"])
        return step

    def lend_memory(self, replicated: Any, *, strict: bool) -> dict[tuple[Any, ...], torch.Tensor]:
        """Tensors of the parts into which a checkpoint can be read, by their paths in it; none if not all of it fits.

        This is `replicated_into` of `ckpt.Checkpointer.restore`.
        """
        lent: dict[tuple[Any, ...], torch.Tensor] = {}
        whole = {name: part for name, part in self._parts.items() if name not in self._sharded}
        if not isinstance(replicated, Mapping) or (strict and replicated.keys() != whole.keys()):
            return {}
        for name, part in whole.items():
            if name in replicated:
                tensors = state_parts.lend_memory(part, replicated[name], strict)
                if tensors is None:
                    return {}
                lent.update(((name, *path), tensor) for path, tensor in tensors.items())
        return lent

    def merge(self, states: list[State]) -> State:
        """This rank's state from those of another number of ranks: `merge` of `ckpt.Checkpointer.restore`."""
        rank, old = self._checkpointer.rank, len(states)
        merged = {name: value for name, value in states[0].items() if name.startswith("buffers/")}
        merged |= {name: value for name, value in states[rank % old].items() if name == "rng"}
        logger.warning(
            "the checkpoint was saved by %d rank(s), now there are %d: rank %d goes on with the random numbers of rank %d",
            *(old, self._checkpointer.world_size, rank, rank % old),
        )
        return merged | self._merge_positions(states)

    def _merge_positions(self, states: list[State]) -> State:
        positions = [_positions(state) for state in states]
        if not any(positions):
            return {}
        if self._merge_data is not None:
            merged = self._merge_data([_unpack_data(each) for each in positions])
            return {"data": merged} if "data" in self._data else {f"data/{name}": value for name, value in merged.items()}
        if all(same(each, positions[0]) for each in positions):
            logger.warning("the position in the data that all ranks had is taken up; give merge_data= if it means another now")
            return positions[0]
        logger.warning(
            "the positions in the data differ between the %d ranks that saved, and are not taken up: the data begin anew; give "
            "merge_data= to tell how they are shared out now",
            len(states),
        )
        return {"dropped": sorted(positions[0])}

    def _check_parts(self, step: int, held: State, wanted: State, strict: bool) -> None:
        missing, surplus = sorted(wanted.keys() - held.keys()), sorted(held.keys() - wanted.keys())
        problems = [f"it holds no {', '.join(missing)}"] if missing else []
        problems += [f"it holds {', '.join(surplus)}, which the callback was not given"] if surplus else []
        if not problems:
            return
        text = f"checkpoint {step} in '{self._checkpointer.directory}' does not fit: " + "; ".join(problems)
        if strict:
            raise ckpt.CheckpointError(f"{text}. Give the callback what it had when it saved, or resume(strict=False)")
        logger.warning("%s", text)


class _Naming:
    """Turns an error inside the block into one that names the part of the checkpoint."""

    def __init__(self, step: int, name: str) -> None:
        self._step, self._name = step, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, Exception):
            raise ckpt.CheckpointError(f"'{self._name}' of checkpoint {self._step} does not fit: {error}") from error


def _positions(state: State) -> State:
    return {name: value for name, value in state.items() if name.partition("/")[0] == "data"}


def _unpack_data(parts: State) -> Any:
    """As `data=` was given: one state, or states by name."""
    return parts["data"] if "data" in parts else {name.removeprefix("data/"): value for name, value in parts.items()}

"""A torch file whose frozen tensors lie in another one, and that other one. See directory/frozen_files.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ckpt._native import SavedStorage
from ckpt.directory.frozen_files import IDENTITY, RECORD, FrozenReference
from ckpt.formats.format import FileDescription
from ckpt.formats.torch_zip import TorchZip, serialization_id
from ckpt.plan.lazy_storages import LazyStorages
from ckpt.plan.pickler import pickle_object
from ckpt.plan.save_plan import SavePlan, place

# Given the records of a state, and the state: how it refers to those that go to the other file; None: there is no such file.
Choose = Callable[[Sequence[SavedStorage], Any], FrozenReference | None]


@dataclasses.dataclass(frozen=True)
class StateWithoutFrozen:
    """The one that has the pickle.

    Args:
        choose: called for each plan.
    """

    choose: Choose

    def plan(self, obj: Any, lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str) -> SavePlan:
        """See FileFormat."""
        data, records = pickle_object(obj)
        reference = self.choose(records, obj)
        numbers = (
            () if reference is None else tuple(number for number in range(len(records)) if number not in reference.numbers)
        )
        kept = records if reference is None else [records[number] for number in numbers]
        plan = SavePlan(data, kept, [], bytearray(len(kept)), numbers=numbers, reference=reference)
        return place(plan, lazy, eager_bytes, device_lazy)

    def structure(self, obj: Any) -> SavePlan:
        """Never asked for: each rank writes a file."""
        raise NotImplementedError

    def describe(self, plan: SavePlan, target: Path, shared_token: str | None) -> FileDescription:
        """See FileFormat."""
        made = TorchZip().describe(plan, target, shared_token)
        if plan.reference is None:
            return made
        said = plan.reference.to_bytes()
        return dataclasses.replace(made, head=[*made.head, (RECORD, said)], numbers=plan.numbers)


@dataclasses.dataclass(frozen=True)
class FrozenTensors(TorchZip):
    """The other one.

    Args:
        token: no other file has it.
    """

    token: str = ""

    @property
    def identity(self) -> str:
        """By which it is referred to."""
        return serialization_id(self.token)

    def describe(self, plan: SavePlan, target: Path, shared_token: str | None) -> FileDescription:
        """See FileFormat."""
        made = super().describe(plan, target, shared_token)
        tail = [(name, self.identity.encode() if name == IDENTITY else content) for name, content in made.tail]
        return dataclasses.replace(made, tail=tail)

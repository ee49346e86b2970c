"""What a file format has to say of a file before it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ckpt.plan.lazy_storages import LazyStorages
from ckpt.plan.save_plan import Archives, SavePlan


@dataclasses.dataclass(frozen=True)
class FileDescription:
    """All of a file but the bytes of its tensors, which come between head and tail, each as one record.

    Where each record lies is computed by the core (csrc/format/), from this and the sizes of the tensors.

    Attributes:
        archive: the folder in the file that holds the records.
        head, tail: the records before and behind those of the tensors, each with its name and its bytes.
        alignment: bytes, of each record; None: large ones begin at multiples of what direct I/O demands, the others need none.
        archives: the file holds these, without head and tail; None: one.
        numbers: of the tensors' records; empty: 0, 1, 2, ...
        packed: head and tensors stand one behind the other, and nothing else is there: no archive, no names, no tail.
    """

    archive: bytes
    head: list[tuple[str, bytes]]
    tail: list[tuple[str, bytes]]
    alignment: int | None
    archives: Archives | None = None
    packed: bool = False
    numbers: Sequence[int] = ()


class FileFormat(Protocol):
    """How an object becomes a file: TorchZip, DcpFile, SafetensorsFile."""

    def plan(self, obj: Any, lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str) -> SavePlan:
        """What of the object goes to the file; see make_plan()."""

    def structure(self, obj: Any) -> SavePlan:
        """What of it ranks compare, where another one writes it; see structure_of()."""

    def describe(self, plan: SavePlan, target: Path, shared_token: str | None) -> FileDescription:
        """
        Args:
            target: what the file will be called.
            shared_token: of a file that several processes write, together or each the same: it gives each the same
                description, and has not been used before. None: this process writes all of it.
        """

"""One rank's file of a checkpoint of torch.distributed.checkpoint (DCP): many torch files, one behind the other.

Each holds a chunk of a tensor, or a value. Where it lies stands in the checkpoint's `.metadata`, which rank 0 writes when all
files are durable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckpt.formats.format import FileDescription
from ckpt.plan.lazy_storages import LazyStorages
from ckpt.plan.save_plan import SavePlan
from ckpt.sharded.planning import ChooseArchives, ShardedPlanner


class DcpFile:
    """
    Args:
        planner: of this rank. It is kept from save to save, and remembers what does not change.
        apart: chooses what goes to another file.
    """

    def __init__(self, planner: ShardedPlanner, apart: ChooseArchives | None = None) -> None:
        self._planner = planner
        self._apart = apart

    def without(self, apart: ChooseArchives) -> DcpFile:
        """The same for what of a state does not go to another file."""
        return DcpFile(self._planner, apart)

    def plan(self, obj: Any, lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str) -> SavePlan:
        """See FileFormat."""
        return self._planner.plan(obj, lazy, eager_bytes, device_lazy, self._apart)

    def structure(self, obj: Any) -> SavePlan:
        """Never asked for: each rank writes a file."""
        raise NotImplementedError

    def describe(self, plan: SavePlan, target: Path, shared_token: str | None) -> FileDescription:
        """See FileFormat."""
        return FileDescription(b"", [], [], None, plan.archives)

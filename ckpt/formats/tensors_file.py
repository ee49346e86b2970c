"""A data file of a checkpoint of torch.distributed.checkpoint (DCP) whose contents somebody else has planned: given tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckpt.formats.format import FileDescription
from ckpt.plan.lazy_storages import LazyStorages
from ckpt.plan.save_plan import SavePlan
from ckpt.sharded.planning import plan_tensors


class TensorsFile:
    """An archive for each tensor of a list. What is saved are pairs, as plan_tensors() takes them."""

    def plan(self, obj: Any, lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str) -> SavePlan:
        """See FileFormat."""
        return plan_tensors(obj, lazy, eager_bytes, device_lazy)

    def structure(self, obj: Any) -> SavePlan:
        """Never asked for: each rank writes a file."""
        raise NotImplementedError

    def describe(self, plan: SavePlan, target: Path, shared_token: str | None) -> FileDescription:
        """See FileFormat."""
        return FileDescription(b"", [], [], None, plan.archives)

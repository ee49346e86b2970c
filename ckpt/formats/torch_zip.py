"""The file that torch.save writes: a zip file of stored entries, one for each storage, around a pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from ckpt.formats.format import FileDescription
from ckpt.plan.lazy_storages import LazyStorages
from ckpt.plan.save_plan import SavePlan, make_plan, structure_of

SHARED_ARCHIVE = b"replicated"  # the same on all ranks, whatever the file will be called


@dataclasses.dataclass(frozen=True)
class TorchZip:
    """See the module.

    Args:
        alignment: as of `FileDescription`; it is written into the file, and a reader may compute from it where records lie.
    """

    alignment: int | None = None

    def plan(self, obj: Any, lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str) -> SavePlan:
        """See FileFormat."""
        return make_plan(obj, lazy, eager_bytes, device_lazy)

    def structure(self, obj: Any) -> SavePlan:
        """See FileFormat."""
        return structure_of(obj)

    def describe(self, plan: SavePlan, target: Path, shared_token: str | None) -> FileDescription:
        """See FileFormat."""
        head = [("data.pkl", plan.pickle)]
        if self.alignment is not None:
            head += [(".format_version", b"1"), (".storage_alignment", str(self.alignment).encode())]
        head.append(("byteorder", sys.byteorder.encode()))
        identity = serialization_id(shared_token or secrets.token_hex())
        tail = [("version", b"3\n"), (".data/serialization_id", identity.encode())]
        archive = SHARED_ARCHIVE if shared_token else os.fsencode(archive_name(target))
        return FileDescription(archive, head, tail, self.alignment)


def serialization_id(token: str) -> str:
    """40 digits that tell this file from every other one. torch.save derives them from the content, which we have not read."""
    return f"{int.from_bytes(hashlib.sha256(token.encode()).digest(), 'big') % 10**40:040d}"


def archive_name(path: Path) -> str:
    """The folder inside the zip: as torch.save, the base name up to its last dot."""
    name = path.name
    dot = name.rfind(".")
    return name[:dot] if dot > 0 else name

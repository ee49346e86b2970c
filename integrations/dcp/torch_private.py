"""The names of torch.distributed.checkpoint that this adapter uses although torch does not promise to keep them.

Without them torch's own writer writes, and its reader reads files that are verified as a whole.
"""

from __future__ import annotations

from typing import Any

import torch.distributed.checkpoint as stock
import torch.distributed.checkpoint.filesystem as filesystem

# Where an item lies, as `.metadata` says it.
StorageInfo: Any = getattr(filesystem, "_StorageInfo", None)
VERSION: str | None = getattr(filesystem, "CURRENT_DCP_VERSION", None)
staging: Any = getattr(stock, "staging", None)
FileSystem: Any = getattr(filesystem, "FileSystem", None)


def prefix_of(plan: Any) -> str | None:
    """What the names of a rank's files begin with, "__3_"; None if torch does not tell."""
    found = getattr(plan.storage_data, "prefix", None)
    return found if isinstance(found, str) else None


def has_extensions(writer: Any) -> bool:
    """True, too, if that cannot be told."""
    transforms = getattr(writer, "transforms", None)
    return transforms is not None and bool(getattr(transforms, "extensions", True))


def writes_safetensors(writer: Any) -> bool:
    return getattr(getattr(writer, "serialization_format", None), "value", "torch_save") != "torch_save"


def replace_files(reader: Any, files: Any) -> bool:
    """Lets a reader open all by `files`. False if it has no such place."""
    if FileSystem is None or not isinstance(getattr(reader, "fs", None), FileSystem):
        return False
    reader.fs = files
    return True


def copying_stager(kind: str) -> dict[str, Any]:
    """What lets async_save() of torch copy all of a state inside the call, on any machine; nothing where it does so anyway.

    Args:
        kind: of a tensor in it. DefaultStager fails at ShardedTensors; writers to file systems are stagers, which do not.
    """
    if staging is None or not hasattr(staging, "StagingOptions") or kind == "ShardedTensor":
        return {}
    return {"async_stager": staging.DefaultStager(staging.StagingOptions(False, False, False, False))}

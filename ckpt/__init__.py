"""Lazy asynchronous checkpointing for PyTorch training.

    import ckpt

    with ckpt.Checkpointer("checkpoints", keep=3) as checkpointer:
        found = checkpointer.restore()
        ...
        for step in range(start, steps):
            train_one_iteration()
            checkpointer.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

save() returns in milliseconds. The bytes leave in the background, a few MiB at a time, until the next optimizer step,
which waits just for what has not left yet. Files are ordinary torch files.

For one file, `ckpt.save(obj, path)`, `ckpt.load(path)` and `ckpt.load_into(path, target)`. Errors are described in
`ckpt.errors`, and are here, too, as `ckpt.CorruptError` is; all derive from CheckpointError.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from ckpt import fence_hooks

if TYPE_CHECKING:
    from ckpt.bundles import BundleCheckpointer
    from ckpt.checkpointer import Checkpointer
    from ckpt.device_check import check_devices
    from ckpt.errors import (
        CancelledError,
        CaptureError,
        CheckpointError,
        ClosedError,
        CorruptError,
        DeadlineError,
        DeviceError,
        FailedSavesError,
        ForkedError,
        InUseError,
        MismatchError,
        NotACheckpointError,
        PeerError,
        SkippedError,
        StorageError,
        SupersededError,
        UnsupportedError,
    )
    from ckpt.fence import fence
    from ckpt.loading.load import load
    from ckpt.loading.load_into import load_into
    from ckpt.metrics.stats import SaveStats
    from ckpt.options import Options
    from ckpt.saving.pending import PendingSave
    from ckpt.saving.single_file import save
    from ckpt.tiers.tier import Tier

__version__ = "0.2.0"

__all__ = [
    "BundleCheckpointer",
    "CancelledError",
    "CaptureError",
    "CheckpointError",
    "Checkpointer",
    "ClosedError",
    "CorruptError",
    "DeadlineError",
    "DeviceError",
    "FailedSavesError",
    "ForkedError",
    "InUseError",
    "MismatchError",
    "NotACheckpointError",
    "Options",
    "PeerError",
    "PendingSave",
    "SaveStats",
    "SkippedError",
    "StorageError",
    "SupersededError",
    "Tier",
    "UnsupportedError",
    "check_devices",
    "fence",
    "load",
    "load_into",
    "save",
]

# Imported when they are first asked for: what needs no torch, as the drain, is not to wait for it.
_HOMES = {
    "BundleCheckpointer": "ckpt.bundles",
    **dict.fromkeys([name for name in __all__ if name.endswith("Error")], "ckpt.errors"),
    "Checkpointer": "ckpt.checkpointer",
    "Options": "ckpt.options",
    "PendingSave": "ckpt.saving.pending",
    "SaveStats": "ckpt.metrics.stats",
    "Tier": "ckpt.tiers.tier",
    "check_devices": "ckpt.device_check",
    "fence": "ckpt.fence",
    "load": "ckpt.loading.load",
    "load_into": "ckpt.loading.load_into",
    "save": "ckpt.saving.single_file",
}
_MODULES = {
    *("coordinator", "dcp", "drain", "errors", "formats", "metrics", "names", "optimizers", "options", "quantities"),
    "state_dicts",
}


if not TYPE_CHECKING:  # a checker knows the names above, and is to find those that are wrong

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return importlib.import_module(f"ckpt.{name}")
        raise AttributeError(f"module 'ckpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _Package(types.ModuleType):
    """The function fence() hides its module, which `from ckpt.fence import` still finds: the import of any submodule makes it
    an attribute of its package, whenever that happens."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "fence" and isinstance(value, types.ModuleType):
            value = value.fence
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
fence_hooks.install_beside_torch()

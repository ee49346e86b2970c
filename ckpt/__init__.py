"""Lazy asynchronous checkpointing for PyTorch training.

    import ckpt

    with ckpt.Checkpointer("checkpoints", keep=3) as checkpointer:
        found = checkpointer.restore()
        ...
        for step in range(start, steps):
            train_one_iteration()
            checkpointer.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

save() returns in milliseconds. The bytes leave in the background, straight from the tensors, until the next optimizer step,
which waits just for what has not left yet. Files are ordinary torch files.

For one file, `ckpt.save(obj, path)`, `ckpt.load(path)` and `ckpt.load_into(path, target)`. Errors are in `ckpt.errors`; all
derive from CheckpointError.
"""

from ckpt.bundles import BundleCheckpointer
from ckpt.checkpointer import Checkpointer
from ckpt.device_check import check_devices
from ckpt.errors import CheckpointError
from ckpt.fence import fence  # as an attribute it hides its module, which `from ckpt.fence import` still finds
from ckpt.loading.load import load
from ckpt.loading.load_into import load_into
from ckpt.options import Options
from ckpt.saving.pending import PendingSave, SaveStats
from ckpt.saving.single_file import save

__version__ = "0.1.0"

__all__ = [
    "BundleCheckpointer",
    "CheckpointError",
    "Checkpointer",
    "Options",
    "PendingSave",
    "SaveStats",
    "check_devices",
    "fence",
    "load",
    "load_into",
    "save",
]

"""The names of Lightning that this adapter uses although Lightning does not promise to keep them, and those that it replaces.
One of torch is among them.

Lightning comes as `lightning` and as `pytorch_lightning` with `lightning_fabric`: the same sources, other classes.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from typing import Any

from ckpt.errors import UnsupportedError

TESTED = "2.6.6"
META_FILE = "meta.pt"  # beside the files of torch.distributed.checkpoint: all of a checkpoint that is not model or optimizer


@dataclasses.dataclass(frozen=True)
class Package:
    """One of the two that Lightning comes as.

    Attributes:
        trainer: where Trainer and LightningModule are.
        fabric: where Fabric and CheckpointIO are.
    """

    trainer: str
    fabric: str


PACKAGES = (Package("lightning.pytorch", "lightning.fabric"), Package("pytorch_lightning", "lightning_fabric"))


@dataclasses.dataclass(frozen=True)
class Seam:
    """What is replaced.

    Attributes:
        module: below Package.trainer, or below Package.fabric with `of_fabric`.
        takes: arguments that it must have.
        needed: whether nothing works without it. What is not is of a strategy or callback that a version may lack.
    """

    module: str
    owner: str
    name: str
    takes: tuple[str, ...]
    needed: bool = True
    of_fabric: bool = False

    def module_in(self, package: Package) -> str:
        return f"{package.fabric if self.of_fabric else package.trainer}.{self.module}"


SEAMS = {
    "trainer_save": Seam("trainer.trainer", "Trainer", "save_checkpoint", ("self", "filepath")),
    "trainer_end": Seam("trainer.trainer", "Trainer", "_teardown", ("self",)),
    "load": Seam("strategies.strategy", "Strategy", "load_checkpoint", ("self", "checkpoint_path")),
    "optimizer_step": Seam(
        "plugins.precision.precision", "Precision", "optimizer_step", ("self", "optimizer", "model", "closure")
    ),
    "file_exists": Seam("callbacks.model_checkpoint", "ModelCheckpoint", "file_exists", ("self", "filepath", "trainer")),
    "link": Seam("callbacks.model_checkpoint", "ModelCheckpoint", "_link_checkpoint", ("trainer", "filepath", "linkpath")),
    "batch_end": Seam("callbacks.model_checkpoint", "ModelCheckpoint", "on_train_batch_end", ("self", "trainer", "pl_module")),
    "fsdp_save": Seam("strategies.fsdp", "FSDPStrategy", "save_checkpoint", ("self", "checkpoint", "filepath"), False),
    "fsdp_load": Seam("strategies.fsdp", "FSDPStrategy", "load_checkpoint", ("self", "checkpoint_path"), False),
    "parallel_save": Seam(
        "strategies.model_parallel", "ModelParallelStrategy", "save_checkpoint", ("self", "checkpoint", "filepath"), False
    ),
    "parallel_load": Seam(
        "strategies.model_parallel", "ModelParallelStrategy", "load_checkpoint", ("self", "checkpoint_path"), False
    ),
    "parallel_model": Seam(
        "strategies.model_parallel", "ModelParallelStrategy", "lightning_module_state_dict", ("self",), False
    ),
    "parallel_optimizer": Seam(
        "strategies.model_parallel", "ModelParallelStrategy", "optimizer_state", ("self", "optimizer"), False
    ),
    "swap": Seam("callbacks.weight_averaging", "WeightAveraging", "_swap_models", ("self", "pl_module"), False),
    "copy_average": Seam(
        "callbacks.weight_averaging", "WeightAveraging", "_copy_average_to_current", ("self", "pl_module"), False
    ),
    "transfer": Seam(
        "callbacks.stochastic_weight_avg", "StochasticWeightAveraging", "transfer_weights",
        ("src_pl_module", "dst_pl_module"), False,
    ),
    "fabric_save": Seam("fabric", "Fabric", "save", ("self", "path", "state"), of_fabric=True),
    "fabric_load": Seam("fabric", "Fabric", "load", ("self", "path"), of_fabric=True),
}  # fmt: skip


def packages_in_use() -> list[Package]:
    """Those that are imported; if none is, those that are installed."""
    imported = [package for package in PACKAGES if package.trainer in sys.modules or package.fabric in sys.modules]
    return imported or [package for package in PACKAGES if _is_installed(package.fabric)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def checkpoint_io_class(package: Package) -> Any:
    """The class by which Lightning knows such a plugin."""
    found = getattr(importlib.import_module(f"{package.fabric}.plugins"), "CheckpointIO", None)
    if found is None or not hasattr(found, "register"):
        raise UnsupportedError(_sentence(package, "plugins.CheckpointIO, which can be registered with"))
    return found


def find(seam: Seam, package: Package) -> tuple[Any, Any] | None:
    """The class, and what is replaced in it, as it stands there; None if this version does without.

    Raises:
        UnsupportedError: it has it no more, or has made something else of it.
    """
    name = seam.module_in(package)
    if not seam.of_fabric and not _is_installed(package.trainer):
        return None  # Fabric alone
    try:
        owner = getattr(importlib.import_module(name), seam.owner, None)
    except ImportError:
        owner = None
    stock = None if owner is None else inspect.getattr_static(owner, seam.name, None)
    if stock is None:
        if seam.needed:
            raise UnsupportedError(_sentence(package, f"{seam.owner}.{seam.name}"))
        return None
    function = stock.__func__ if isinstance(stock, staticmethod) else stock
    taken = list(inspect.signature(function).parameters)
    if not set(seam.takes) <= set(taken):
        raise UnsupportedError(_sentence(package, f"{seam.owner}.{seam.name}({', '.join(seam.takes)}), but one of {taken}"))
    return owner, stock


def _sentence(package: Package, what: str) -> str:
    root = package.trainer.split(".")[0] if _is_installed(package.trainer) else package.fabric
    version = getattr(importlib.import_module(root), "__version__", "of an unknown version")
    return (
        f"{root} {version} has no {what}: LazyCheckpointIO cannot see there what Lightning does with checkpoints. It was "
        f"tested with {TESTED}: install that, or leave LazyCheckpointIO out"
    )


def plugin_of(strategy: Any) -> Any:
    """The CheckpointIO that a strategy was given, without making one."""
    return getattr(strategy, "_checkpoint_io", None)


def is_sharded_fsdp(strategy: Any) -> bool:
    return getattr(strategy, "_state_dict_type", None) == "sharded"


def is_sharded_parallel(strategy: Any) -> bool:
    return bool(getattr(strategy, "_save_distributed_checkpoint", False))


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer in a LightningOptimizer."""
    return getattr(optimizer, "_optimizer", optimizer)


def has_step_pre_hooks(optimizer: Any) -> bool:
    """Of its own, or of all optimizers but for the fence. Where torch has another name for them: perhaps, so True."""
    own = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    common = getattr(importlib.import_module("torch.optim.optimizer"), "_global_optimizer_pre_hooks", None)
    if own is None or common is None:
        return True
    return bool(own) or any(not getattr(hook, "__module__", "").startswith("ckpt.") for hook in common.values())


def is_fitting(trainer: Any) -> bool:
    """Whether it is in the middle of fit(): what it saves is followed by more training, or by the end of fit(), which waits."""
    return _value(getattr(trainer.state, "fn", None)) == "fit" and is_running(trainer)


def is_running(trainer: Any) -> bool:
    """Whether nothing has interrupted it."""
    return _value(getattr(trainer.state, "status", None)) == "running"


def _value(member: Any) -> str:
    return str(getattr(member, "value", member))

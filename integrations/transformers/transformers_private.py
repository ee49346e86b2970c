"""What this adapter takes from transformers although transformers does not promise to keep it, and whether it is there.

Without the methods and functions of the first two tables there are no lazy checkpoints: a class that wants them is refused.
Without what stands in a callback of transformers itself, that callback is taken to read checkpoints, and saves are waited for.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from ckpt.errors import UnsupportedError

TESTED = "5.24.0"

# Methods of Trainer that are overridden, or called, and the parameters that they must have.
_METHODS: dict[str, tuple[str, ...]] = {
    "_save_checkpoint": ("model", "trial"),
    "save_model": ("output_dir", "_internal_call"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_save_scaler": ("output_dir",),
    "_save_rng_state": ("output_dir",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_get_output_dir": ("trial",),
    "_load_from_checkpoint": ("resume_from_checkpoint",),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "train": ("resume_from_checkpoint",),
    "training_step": (),
    "evaluation_loop": (),
}
# Functions that are replaced, each by the name by which the Trainer looks it up.
MODEL_WRITER = ("transformers.modeling_utils", "safe_save_file")
PLAIN_MODEL_WRITER = ("safetensors.torch", "save_file")  # of models that are not of transformers
ADAPTER_WRITER = ("peft.peft_model", "safe_save_file")  # of PEFT, if it is there
ROTATION = ("transformers.trainer", "rotate_checkpoints")
_FUNCTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    MODEL_WRITER: ("tensors", "filename", "metadata"),
    PLAIN_MODEL_WRITER: ("tensors", "filename", "metadata"),
    ROTATION: ("output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"),
    ("transformers.trainer_utils", "sort_checkpoints"): ("output_dir", "use_mtime"),
}
# Gives the client by which the Trainer uploads. Without it the uploads of the whole directory hold what is hidden there.
UPLOADS = ("transformers.trainer", "hf_api")
# Modules that write with torch.save(), as they look it up.
TORCH_SAVES = ("transformers.trainer", "accelerate.utils.fsdp_utils")

# Their methods leave alone what they have written; all others may look at it.
KNOWN_PACKAGES = {"ckpt", "peft", "torch", "transformers"}

INCOMPLETE = "checkpoint-is-incomplete.txt"  # what marks a checkpoint of JITCheckpointCallback that was never completed

# What the Trainer, accelerate and DeepSpeed call their own files. Half a checkpoint may have left some of them.
_FILES = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "*.index.json",
    "optimizer.*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "training_args.bin",
    "pytorch_model_fsdp*",
    "optimizer_[0-9]*",
    "global_step[0-9]*",
    "latest",
    "zero_to_fp32.py",
    INCOMPLETE,
)

# Optimizers that update the parameters in the backward pass; their step() does nothing.
_IN_BACKWARD = {"Lomo", "AdaLomo"}

# Callbacks of transformers that have on_save(), and whether they then read what was saved.
_READERS: dict[str, Callable[[Any], bool]] = {
    "WandbCallback": lambda callback: getattr(callback._log_model, "value", None) == "checkpoint",
    "MLflowCallback": lambda callback: bool(callback._log_artifacts),
    "DagsHubCallback": lambda callback: bool(callback._log_artifacts),
    "ClearMLCallback": lambda callback: bool(callback._log_model),
    "DVCLiveCallback": lambda callback: callback._log_model == "all",
    "FlyteCallback": lambda callback: bool(callback.sync_checkpoints),
    "TrackioCallback": lambda callback: False,
    "SwanLabCallback": lambda callback: False,
}


def check(trainer: type, behind: Any) -> None:
    """
    Args:
        trainer: a class that is to checkpoint lazily.
        behind: has the methods that it would have without that.

    Raises:
        UnsupportedError: it is no Trainer, or one that lacks what is needed.
    """
    missing = [f"{name}()" for name, parameters in _METHODS.items() if not _has(getattr(behind, name, None), parameters)]
    missing += [".".join(place) for place, parameters in _FUNCTIONS.items() if not _has(find(*place), parameters)]
    if missing:
        import transformers

        raise UnsupportedError(
            f"{trainer.__name__} cannot checkpoint lazily: {', '.join(missing)} is not there, or not as in transformers "
            f"{TESTED}, with which this was tested; this is transformers {transformers.__version__}. Derive from "
            "LazyCheckpointMixin and a Trainer, in this order, or install the tested version"
        )


def find(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name, None)


def knows_adapters() -> bool:
    """Whether PEFT is there, and writes adapters by what is known."""
    return ADAPTER_WRITER[0] in sys.modules and _has(find(*ADAPTER_WRITER), _FUNCTIONS[MODEL_WRITER])


def _has(function: Any, parameters: tuple[str, ...]) -> bool:
    if not callable(function):
        return False
    found = inspect.signature(function).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in found.values()):
        return True  # an override that hands on what it is given
    return all(name in found for name in parameters)


def reads_checkpoints(callback: Any) -> bool:
    """Whether on_save() of a callback of transformers itself looks at what was saved. True if that cannot be told."""
    try:
        return _READERS[type(callback).__name__](callback)
    except (KeyError, AttributeError):
        return True


def is_of_trainer(name: str) -> bool:
    """Whether the Trainer gives this name to a file, or a directory, of a checkpoint."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _FILES)


def jit_managers(trainer: Any) -> list[Any]:
    """What saves when SIGTERM has come, with `enable_jit_checkpoint`."""
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
    managers = (getattr(callback, "jit_manager", None) for callback in callbacks)
    return [manager for manager in managers if hasattr(manager, "execute_jit_checkpoint")]


def innermost(optimizer: Any) -> Any:
    """What accelerate has wrapped."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def updates_in_backward(optimizer: Any) -> bool:
    """Whether it changes parameters outside its step."""
    return not _IN_BACKWARD.isdisjoint(each.__name__ for each in type(innermost(optimizer)).__mro__)

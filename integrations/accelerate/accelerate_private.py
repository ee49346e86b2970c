"""What of accelerate this adapter replaces or calls, although accelerate does not promise to keep it.

All of it is looked for before anything is replaced. Without it there is nothing to be done: accelerate saves by itself.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..huggingface import replaced_writers, seams, sharded_writes

TESTED = "1.15.0"
ADAPTER = "ckpt.integrations.accelerate"
_NEEDED = (
    "accelerate:Accelerator.save_state",
    "accelerate:Accelerator.load_state",
    "accelerate:Accelerator.end_training",
    "accelerate.state:PartialState.destroy_process_group",
    "accelerate.utils:ProjectConfiguration.automatic_checkpoint_naming",
    "accelerate.utils:broadcast_object_list",
    "accelerate.checkpointing:torch",
    "accelerate.checkpointing:save_accelerator_state",
    "accelerate.utils.other:torch",
    "accelerate.utils.other:save",
    "accelerate.utils.other:safe_save_file",
    "accelerate.utils.fsdp_utils:torch",
    "accelerate.utils.fsdp_utils:save_fsdp_model",
    "accelerate.utils.fsdp_utils:save_fsdp_optimizer",
)
FOLDER = "checkpoints"  # in project_dir, where accelerate numbers what it saves
_NUMBERED = "checkpoint_"
_NUMBER = re.compile(r"[0-9]+")
_OF_EACH_RANK = "random_states_"
# What save_state() writes, and what DeepSpeed and torch.distributed.checkpoint have there, and this library.
_OF_A_STATE = re.compile(
    r"(model|pytorch_model|optimizer|scheduler|sampler|dl_state_dict)(_\d+)?(\.safetensors|\.bin)"
    r"|pytorch_model_fsdp(_\d+)?(_rank\d+)?(\.bin)?|optimizer_\d+(_rank\d+\.bin)?|pytorch_model(_\d+)?"
    r"|scaler\.pt|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl"
    r"|latest|zero_to_(fp32|torch)\.py|manifest\.json|\.lock|\.tmp-.*"
)


def check() -> None:
    """
    Raises:
        ImportError: accelerate is not installed.
        UnsupportedError: it is not as those that were tested.
    """
    seams.require("accelerate", TESTED, _NEEDED, ADAPTER)


def replace_writers() -> None:
    """Those that save_state() calls. Safe to call again."""
    checkpointing, other, fsdp = (
        importlib.import_module(f"accelerate.{name}") for name in ("checkpointing", "utils.other", "utils.fsdp_utils")
    )
    replaced_writers.replace_torch_save(checkpointing, _is_ours_to_write)
    replaced_writers.replace_torch_save(other)  # which asks for the rank itself
    replaced_writers.replace_torch_save(fsdp)
    replaced_writers.replace_save_file(other, "safe_save_file")


def replace_sharded_writes() -> None:
    """Those of FSDP; they import much of torch."""
    sharded_writes.replace_sharded_writes()


def _is_ours_to_write(path: Any) -> bool:
    """All ranks write the states of scaler and dataloaders, each over those of the others. Here the main process does."""
    from accelerate.state import PartialState

    return Path(path).name.startswith(_OF_EACH_RANK) or bool(PartialState().is_main_process)


def number_of(name: str) -> int | None:
    """By which accelerate takes a directory for newer than others; None if it has none."""
    found = _NUMBER.search(name)
    return None if found is None or name.startswith(".") else int(found[0])


def numbered(number: int) -> str:
    """The name of a directory that accelerate numbers, from the one in which FOLDER lies."""
    return f"{FOLDER}/{_NUMBERED}{number}"


def is_numbered(path: Path) -> bool:
    return path.parent.name == FOLDER and path.name.startswith(_NUMBERED)


def is_of_a_state(name: str) -> bool:
    """Whether save_state() makes files or directories of this name."""
    return _OF_A_STATE.fullmatch(name) is not None


def distributed_type(accelerator: Any) -> str:
    """ "NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED", ..."""
    found = accelerator.distributed_type
    return str(getattr(found, "value", found))


def engines_of(accelerator: Any) -> list[Any]:
    """Those of DeepSpeed that save_state() saves."""
    return models_of(accelerator)


def models_of(accelerator: Any) -> list[Any]:
    """Those that were prepared."""
    return list(getattr(accelerator, "_models", ()))


def optimizers_of(accelerator: Any) -> list[Any]:
    """See models_of()."""
    return list(getattr(accelerator, "_optimizers", ()))


def without_offload(accelerator: Any) -> Callable[[], None]:
    """Lets FSDP give what lies on devices as it is, where it would be copied to the host first; how to put that back.

    Not if somebody has replaced the functions that save: so accelerate can be told to write files of each rank
    (`use_dcp=False`), and these would name the device, which another job may not have.
    """
    config: Any = getattr(getattr(accelerator.state, "fsdp_plugin", None), "state_dict_config", None)
    if type(config).__name__ != "ShardedStateDictConfig" or not getattr(accelerator, "is_fsdp2", False) or not _saves_by_dcp():
        return lambda: None
    before = config.offload_to_cpu
    config.offload_to_cpu = False

    def put_back() -> None:
        config.offload_to_cpu = before

    return put_back


def _saves_by_dcp() -> bool:
    """Whether save_state() calls what shards as accelerate has it."""
    caller, stock = (importlib.import_module(f"accelerate.{name}") for name in ("accelerator", "utils.fsdp_utils"))
    return all(getattr(caller, name, None) is getattr(stock, name) for name in ("save_fsdp_model", "save_fsdp_optimizer"))

"""What this adapter calls and overrides of torchtitan's CheckpointManager, which torchtitan does not promise to keep."""

from __future__ import annotations

import inspect
from typing import Any

from ckpt.errors import UnsupportedError

TESTED = "0.3.0"
METHODS: dict[str, tuple[str, ...]] = {
    "_save": ("self", "curr_step", "last_step"),
    "_wait_for_saving": ("self",),
    "_maybe_wait_for_staging": ("self",),
    "_close": ("self",),
    "_should_save": ("self", "curr_step", "last_step"),
    "_save_last_step": ("self", "curr_step"),
    "_flattened_model_states_sd": ("self",),
    "_create_checkpoint_id": ("self", "step"),
    "_should_purge": ("self",),
    "dcp_save": ("self", "state_dict", "checkpoint_id", "async_mode"),
    "dcp_load": ("self", "state_dict", "checkpoint_id", "from_hf", "from_quantized"),
}


def check(manager: Any) -> None:
    """
    Raises:
        UnsupportedError: this torchtitan has made something else of it.
    """
    for name, arguments in METHODS.items():
        function = getattr(manager, name, None)
        taken = () if function is None else tuple(inspect.signature(function).parameters)
        if not set(arguments) <= set(taken):
            raise UnsupportedError(
                f"CheckpointManager of this torchtitan has no {name}({', '.join(arguments)}), which "
                f"LazyCheckpointManager needs; it was tested with torchtitan {TESTED}: install that, or use CheckpointManager"
            )

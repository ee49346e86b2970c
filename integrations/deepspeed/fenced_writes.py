"""DeepSpeed's functions that write to parameters, or to the optimizer's state, outside the step of the optimizer inside.

All of them wait at a fence first, which costs nothing if no save is in flight. Gradients, loss scales and the values of
parameter groups are not here: the former are not saved, the latter are no tensors.
"""

from __future__ import annotations

from typing import Any

import ckpt

from .wrapping import Call, wrap_function, wrap_method

_FUNCTIONS: dict[str, tuple[str, ...]] = {
    # Bound to each parameter, and behind safe_set_full_fp32_param() and safe_set_full_optimizer_state().
    "deepspeed.utils.tensor_fragment": ("set_full_hp_param",),
    "deepspeed.checkpoint.universal_checkpoint": ("load_hp_checkpoint_state",),
    "deepspeed.utils.zero_to_fp32": ("load_state_dict_from_zero_checkpoint",),
}

_OPTIMIZERS = (
    ("deepspeed.runtime.base_optimizer", "ZeROOptimizer"),
    ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
    ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"),
    ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer"),
    ("deepspeed.runtime.fp16.fused_optimizer", "FP16_Optimizer"),
    ("deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer"),
)
_OPTIMIZER_WRITES = (
    "step",  # Muon's momentum is written before the optimizer inside has its turn, whose hook is the usual fence
    "load_state_dict",
    "refresh_fp32_params",
    "_restore_from_bit16_weights",
    "update_lp_params",
    "initialize_optimizer_states",
    "set_full_hp_param",  # with ZeRO 3, behind the functions safe_set_..., as the next
    "set_local_hp_param",
    "load_hp_checkpoint_state_from_checkpoint_dir",
    "load_hp_checkpoint_state_from_checkpoint_dir_stage3",
    "load_module_checkpoint_state_from_checkpoint_dir_stage3",
    "offload_states",
    "reload_states",
    "reset_swap_buffers",
)

_METHODS: dict[tuple[str, str], tuple[str, ...]] = {
    ("deepspeed.runtime.engine", "DeepSpeedEngine"): ("_take_model_step", "load_module_state_dict"),
    ("deepspeed.runtime.pipe.engine", "PipelineEngine"): ("load_module_state_dict",),
    ("deepspeed.runtime.pipe.module", "PipelineModule"): ("load_state_dir",),
    ("deepspeed.utils.tensor_fragment", "tensor_fragment"): ("update_hp", "update_lp"),
    ("deepspeed.runtime.zero.tiling", "TiledLinear"): ("copy_params_from",),
    ("deepspeed.module_inject.containers.features.hybrid_engine", "HybridEngineContainer"): ("fuse_lora", "unfuse_lora"),
}


def fence_writes() -> None:
    """To be called once in a process. Functions that this version of DeepSpeed lacks are left out."""
    for module, names in _FUNCTIONS.items():
        for name in names:
            wrap_function(module, name, _fenced)
    for (module, owner), names in [*_METHODS.items(), *((optimizer, _OPTIMIZER_WRITES) for optimizer in _OPTIMIZERS)]:
        for name in names:
            wrap_method(module, owner, name, _fenced)
    # By this GatheredParameters, at its end, and others write parameters back.
    wrap_method("deepspeed.runtime.zero.partition_parameters", "Init", "_partition_param", _fenced_if_updated)


def _fenced(stock: Call) -> Call:
    def fenced(*args: Any, **kwargs: Any) -> Any:
        ckpt.fence()
        return stock(*args, **kwargs)

    return fenced


def _fenced_if_updated(stock: Call) -> Call:
    def partition(self: Any, param: Any, buffer: Any = None, has_been_updated: bool = False, *args: Any, **kwargs: Any) -> Any:
        if has_been_updated:  # then the partition is written to; in fp32 it can be the very memory that the optimizer has
            ckpt.fence()
        return stock(self, param, buffer, has_been_updated, *args, **kwargs)

    return partition

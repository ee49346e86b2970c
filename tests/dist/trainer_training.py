"""Trains a small GPT-2 with the Trainer of transformers, on one rank or several, to be killed and resumed.

A plan is a dict: `directory`, `log` (a file, to whose name the rank is added), and, if wanted, `stock` (the Trainer of
transformers), `resume` (as resume_from_checkpoint), `arguments` (of TrainingArguments), `stage` (of ZeRO: trains with DeepSpeed,
whose checkpoints are lazy unless the Trainer is stock), `fsdp` (the kind of state dict: trains with FSDP2), `lora` (trains an
adapter of PEFT). Each rank writes one JSON line for each step: the loss, and a digest of the model and of the optimizer behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import accelerate
import torch
from support import options
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import ckpt.integrations.deepspeed as lazy_deepspeed
from ckpt.integrations.transformers import LazyTrainer

STEPS = 8
SAMPLES, CONTEXT, WORDS = 64, 16, 64


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self._tokens = torch.randint(WORDS, (SAMPLES, CONTEXT), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


def network(**changes: Any) -> GPT2LMHeadModel:
    """With dropout, and with weights that two layers share."""
    torch.manual_seed(2)
    shape = {"vocab_size": WORDS, "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 2, **changes}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape))


def lora_config() -> Any:
    import peft

    wide: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **wide)


def lora() -> Any:
    """A model with frozen weights, and an adapter that learns."""
    import peft

    return peft.get_peft_model(network(), lora_config())


def arguments(directory: Path | str, **changes: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(directory), **(given | changes))


def build(directory: Path | str, kind: type[Trainer] = LazyTrainer, model: Any = None, **changes: Any) -> Any:
    """A Trainer. `callbacks` and `checkpoint_options` go to it, all else to the arguments."""
    own = {
        name: changes.pop(name) for name in ("callbacks", "eval_dataset", "checkpoint_metrics", "optimizers") if name in changes
    }
    if issubclass(kind, LazyTrainer.__mro__[1]):
        own["checkpoint_options"] = changes.pop("checkpoint_options", None) or options()
    model = network() if model is None else model
    return kind(model=model, args=arguments(directory, **changes), train_dataset=Tokens(), **own)


def digest(trainer: Any) -> str:
    """Of all that a step changes in the model and its optimizer."""
    states = [] if trainer.is_deepspeed_enabled else trainer.optimizer.state_dict()["state"].values()
    tensors = [*trainer.model.state_dict().values(), *(value for state in states for value in state.values())]
    whole = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else torch.as_tensor(tensor)
        whole.update(gathered.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


class Log(TrainerCallback):
    def __init__(self, path: str) -> None:
        self.trainer: Any = None
        self._file = open(f"{path}.{os.environ.get('RANK', '0')}", "w")  # noqa: SIM115

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            said = {"step": state.global_step, "loss": float(logs["loss"]).hex(), "rate": logs["learning_rate"]}
            self._file.write(json.dumps(said | {"digest": digest(self.trainer)}) + "\n")
            self._file.flush()


def import_all() -> None:
    """What transformers puts off until a Trainer is made."""
    import torch.distributed.checkpoint.state_dict  # noqa: F401

    network()


def zero(stage: int) -> dict[str, Any]:
    """A configuration of DeepSpeed, whose other values the Trainer fills in."""
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    return {**auto, "zero_optimization": {"stage": stage}, "optimizer": optimizer}


def shard_on_cpus() -> None:
    """accelerate knows of FSDP on accelerators alone; but all that it does for it works here, too."""
    state: Any = accelerate.state.AcceleratorState
    stock = state.__init__

    def begin(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = accelerate.DistributedType.FSDP, fsdp_plugin

    state.__init__ = begin


def main(plan: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    log = Log(plan["log"])
    kind = Trainer if plan.get("stock") else LazyTrainer
    more = plan.get("arguments", {})
    if "stage" in plan:
        more |= {"deepspeed": zero(plan["stage"])}
        if kind is LazyTrainer:
            lazy_deepspeed.enable(options())
    if "fsdp" in plan:
        shard_on_cpus()
        layers = {"transformer_layer_cls_to_wrap": ["GPT2Block"]}
        more |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": plan["fsdp"], **layers}}
    log.trainer = build(plan["directory"], kind, lora() if "lora" in plan else None, callbacks=[log], **more)
    log.trainer.train(resume_from_checkpoint=plan.get("resume"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""More modes of deepspeed_training.py: ranks that do not save the same.

torchrun --nproc-per-node 2 deepspeed_agreement.py plan.json; 4 for "folded"
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import deepspeed
import torch
from deepspeed import comm
from dist import deepspeed_training
from dist.deepspeed_behaviour import error_of, leftovers, loads, started, wait_error
from dist.deepspeed_models import BATCH, Case
from dist.deepspeed_training import contents, digest, read, tree
from torch import nn

import ckpt.integrations.deepspeed as lazy


def differing(case: Case, directory: Path) -> dict[str, Any]:
    """In what the first of the tags names; the second is DeepSpeed's way to validate tags."""
    training, rank = started(case), comm.get_rank()
    config = training.engine._config
    config.checkpoint_tag_validation_enabled = case.tags[1] != "IGNORE"
    config.checkpoint_tag_validation_fail = case.tags[1] == "FAIL"
    where, tag = (directory, f"of-{rank}") if case.tags[0] == "tags" else (directory / f"of-{rank}", "same")
    training.save(str(directory), "before")
    refused = [error_of(lambda: training.save(str(where), tag)) for _ in range(2)]
    training.advance()
    expected = digest(training.state())
    training.save(str(directory), "after")
    found: dict[str, Any] = {"refused": refused, "wait": wait_error(training), "latest": read(directory / "latest")}
    training.advance()
    found["loads"] = loads(training, directory, None, expected)
    found["leftovers"] = leftovers(directory)
    training.engine.destroy()
    return found


def exported(case: Case, directory: Path) -> dict[str, Any]:
    """The 16-bit weights, to a directory of each rank's own: only rank 0 writes."""
    training, where = started(case), directory / f"of-{comm.get_rank()}"
    raised = error_of(lambda: training.engine.save_16bit_model(str(where)))
    found = {"raised": raised, "files": sorted(path.name for path in where.glob("*.bin"))}
    training.engine.destroy()
    return found


# ---- replicas of experts, all of which write -------------------------------------------------------------------------

EXPERTS, HIDDEN, INNER = 4, 16, 32


class Mixture(nn.Module):
    """As DeepSpeed looks for it, to put its own in this place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, EXPERTS, bias=False), nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 10)
        self.experts.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 10)
        self.experts.act_fn = nn.SiLU()


class MixtralLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.mlp = Mixture()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o_proj(self.q_proj(x))
        found = self.mlp(x)
        return x + (found[0] if isinstance(found, tuple) else found)


class MixtralForCausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([MixtralLayer()])
        self.config = types.SimpleNamespace(
            model_type="mixtral", num_local_experts=EXPERTS, num_experts_per_tok=2, hidden_size=HIDDEN, hidden_act="silu"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.layers[0](x).float().square().mean()  # type: ignore[no-any-return]


def folded_engine(case: Case) -> Any:
    """Two ranks share a layer, and two others the same one; so do experts: ranks 0 and 2, and 1 and 3, write the same files."""
    torch.manual_seed(5)
    model = MixtralForCausalLM()
    layers = [{"patterns": [f".*{name}_proj.weight$"], "partition_type": how} for name, how in (("q", "column"), ("o", "row"))]
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "steps_per_print": 1 << 30,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": case.stage},
        "bf16": {"enabled": case.stage > 0},
        "tensor_parallel": {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": layers}},
        "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "mixtral", "use_grouped_mm": False},
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def step(engine: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(10 * number + comm.get_rank() // 2)
    values = torch.randn(BATCH, 4, HIDDEN, generator=generator).to(next(engine.module.parameters()).dtype)
    engine.backward(engine(values))
    engine.step()


def state(path: Path) -> str:
    """Its digest, without the number among the replicas: the stock engine leaves that of whichever has written last."""
    found = contents(path)
    if "expert" in path.name or "expp" in path.name:
        for value in found.values():
            if isinstance(value, dict):
                value.pop("zero_partition_rank", None)
    return digest(found)


def folded(case: Case, directory: Path) -> dict[str, Any]:
    """First by DeepSpeed's own engine, then the same by ours."""
    lazy.disable()
    engine = folded_engine(case)
    step(engine, 0)
    engine.save_checkpoint(str(directory / "stock"), "a")
    comm.barrier()
    lazy.attach(engine)
    ours, expected = directory / "ours", digest(dict(engine.module.named_parameters()))
    found: dict[str, Any] = {"saved": engine.save_checkpoint(str(ours), "a")}
    step(engine, 1)
    found["wait"] = error_of(lambda: lazy.wait(engine, timeout=deepspeed_training.DEADLINE_S))
    if found["wait"]:
        return found
    names = tree(directory / "stock")
    found["files"] = tree(ours) == names and len([name for name in names if "expert" in name])
    states = [name for name in names if name.endswith(".pt")]
    found["differences"] = [name for name in states if state(directory / "stock" / name) != state(ours / name)]
    files = json.loads((ours / "a" / "manifest.json").read_text())["files"]
    found["ranks"] = sorted({file["rank"] for file in files if "expert" in file["name"]})
    found["loads"] = engine.load_checkpoint(str(ours))[0] is not None
    found["same"] = digest(dict(engine.module.named_parameters())) == expected
    found["leftovers"] = leftovers(ours)
    engine.destroy()
    return found


deepspeed_training.MODES.update({"folded": folded, "differing": differing, "exported": exported})

if __name__ == "__main__":
    deepspeed_training.main(json.loads(Path(sys.argv[1]).read_text()))

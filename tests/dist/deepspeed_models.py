"""Small models of every kind that DeepSpeed trains, with all that a checkpoint has to keep; and their DeepSpeed engines.

Each holds parameters above and below 64 KiB, and buffers that forward changes: a mean, a large scatter matrix, a count.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import groups
from torch import nn

WIDTH, BATCH, ACCUMULATE, EXPERTS = 192, 4, 2, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work for all ranks.

    Attributes:
        mode: "files", "train", "tree", "look" or "flight": see deepspeed_training.py.
        engine: who writes: "stock"; "enable": ours, by a section of the configuration; "attach": ours, put on one engine.
        variant: "plain", "pipeline" or "moe".
        offload, frozen, tied: the optimizer's state in host memory; a layer that does not learn; one weight in two places.
        muon: matrices are updated by DeepSpeed's Muon.
        own_adam: by DeepSpeed's compiled Adam, CPUAdam with `offload`, FusedAdam without; with `muon`, the rest.
        restless: some parameters are changed by forward.
        expert_ranks: over how many ranks the experts of a "moe" are spread.
        same_buffers: all ranks have the same values in their buffers, as resuming with ZeRO 0 to 2 needs: rank 0's are saved.
        tags: what is saved, in this order, `between` steps apart.
        in_the_middle: saves between the two backward passes of a step.
        half: also saves the 16-bit weights, right behind each checkpoint.
        faults: what is injected, as for `_native.set_fault`, while files are written.
        options: for our engine, on top of small ones.
        reload: whether it also loads what it has saved.
        like: of "tree": the case, before this one in the same plan, whose files the own ones are compared with.
        directory: where the checkpoints go; "": a directory of the case's name beside the outcomes.
        steps, every, wait: of "train": the last step, how often it saves, whether it waits for each save.
        one_tag: of "train": each save takes the place of the one before.
        weights: of "train": also leaves the full fp32 weights of the last save, in "<name>.weights.pt" beside the outcomes.
        load_tag: of "train": what it resumes from; "": what `latest` names.
        universal: of "train": resumes from what `latest_universal` names.
        crash_point, crash_skip, crash_rank: of "train": where a rank is killed.
    """

    name: str
    mode: str = "files"
    engine: str = "stock"
    variant: str = "plain"
    stage: int = 0
    precision: str = "fp32"
    offload: bool = False
    own_adam: bool = False
    muon: bool = False
    frozen: bool = False
    exclude_frozen: bool = False
    tied: bool = False
    restless: bool = False
    expert_ranks: int = 1
    same_buffers: bool = False
    tags: tuple[str, ...] = ("first", "second")
    between: int = 1
    in_the_middle: bool = False
    half: bool = False
    faults: tuple[dict[str, Any], ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    reload: bool = True
    like: str = ""
    directory: str = ""
    steps: int = 6
    every: int = 1
    wait: bool = False
    one_tag: bool = False
    weights: bool = False
    load_tag: str = ""
    universal: bool = False
    crash_point: str = ""
    crash_skip: int = 0
    crash_rank: int = 0


class Statistics(nn.Module):
    """Takes the running mean of its input away. Its buffers change in every forward pass."""

    def __init__(self, same_on_all_ranks: bool) -> None:
        super().__init__()
        self.same_on_all_ranks = same_on_all_ranks
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("scatter", torch.zeros(WIDTH, WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        rows = x.detach().reshape(-1, WIDTH).to(self.mean.dtype, copy=True)
        if self.same_on_all_ranks:
            comm.all_reduce(rows)
        self.mean.lerp_(rows.mean(0), 0.1)
        self.scatter.mul_(0.9).addmm_(rows.T, rows, alpha=0.1 / len(rows))
        self.calls += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.observe(x)
        return x - self.mean.to(x.dtype)


class Block(nn.Module):
    def __init__(self, same_buffers: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.statistics = Statistics(same_buffers)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * torch.tanh(self.statistics(self.linear(x)))


class Network(nn.Module):
    """Gives the loss of a batch that it is to reproduce."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList([Block(case.same_buffers) for _ in range(2)])
        self.experts = None
        if case.variant == "moe":  # without the random choice of tokens, so that a resumed run computes the same
            expert = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False))
            self.experts = MoE(WIDTH, expert, EXPERTS, case.expert_ranks, use_rts=False)
        self.leave = nn.Linear(WIDTH, WIDTH, bias=False)
        if case.tied:
            self.leave.weight = self.enter.weight
        if case.frozen:
            self.blocks[0].linear.requires_grad_(False)
        # What forward changes although it is a parameter: a teacher that follows, rows that are kept short.
        self.teacher = self.rows = None
        if case.restless and case.stage < 3:
            self.teacher = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        if case.restless:
            self.rows = nn.Embedding(WIDTH, WIDTH, max_norm=0.5)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        x, extra = self.enter(batch), batch.new_zeros(())
        if self.teacher is not None:
            self.teacher.weight.data.mul_(0.9).add_(self.enter.weight.data, alpha=0.1)
        if self.rows is not None:
            x = x + self.rows(torch.arange(WIDTH)[: len(x)]).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        if self.experts is not None:
            routed, extra, _ = self.experts(x)
            x = x + routed
        return mean_square(self.leave(x), batch) + 0.01 * extra


def mean_square(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found.float() - wanted.float()).square().mean()


def pipeline(case: Case) -> PipelineModule:
    """One stage for each rank, whose layers share a weight at both ends if the case is tied."""
    if case.tied:
        ends = [TiedLayerSpec("ends", nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(2)]
    else:
        ends = [LayerSpec(nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(2)]
    layers = [ends[0], LayerSpec(Block), LayerSpec(Block), ends[1]]
    return PipelineModule(layers, num_stages=comm.get_world_size(), loss_fn=mean_square, partition_method="uniform")


def batch(case: Case, step: int, part: int) -> torch.Tensor:
    """Depends on nothing but its arguments and the data-parallel rank."""
    rank = 0 if case.variant == "pipeline" else comm.get_rank()
    generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
    return torch.randn(BATCH, WIDTH, generator=generator).to(DTYPES[case.precision])


# ---- engines ---------------------------------------------------------------------------------------------------------


def configuration(case: Case) -> dict[str, Any]:
    rates = {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-2, "warmup_num_steps": 20}
    zero: dict[str, Any] = {"stage": case.stage}
    if case.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 1000, "stage3_gather_16bit_weights_on_model_save": True}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    precision = {"bf16": {"enabled": case.precision == "bf16"}, "fp16": {"enabled": case.precision == "fp16"}}
    if case.precision == "fp16":
        precision["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 2}
    optimizer: dict[str, Any] = {"type": "AdamW", "params": {"lr": 1e-2}}
    if case.muon:
        optimizer = {"type": "Muon", "params": {"lr": 1e-2, "momentum": 0.9, "ns_method": "standard"}}
        zero |= {"reduce_scatter": False}
    optimizer["params"]["torch_adam"] = not case.own_adam  # of Muon too: it leaves biases and norms to Adam
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "steps_per_print": 1 << 30,
        "optimizer": optimizer,
        "scheduler": {"type": "WarmupLR", "params": rates},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": case.universal},
    } | precision


def build(case: Case, section: dict[str, Any] | None) -> Any:
    """A DeepSpeed engine with a new model. `section` is what the configuration says to our checkpoint engine."""
    # torch computes with float16 on any CPU; DeepSpeed asks whether this one has instructions for it.
    get_accelerator().is_fp16_supported = lambda: case.precision == "fp16"
    groups.mpu = None  # a pipeline leaves its grid there, for all engines after it
    torch.manual_seed(5)
    model = pipeline(case) if case.variant == "pipeline" else Network(case)
    parameters: Any = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if case.variant == "moe":
        parameters = split_params_into_different_moe_groups_for_optimizer({"params": parameters, "name": "all"})
    config = configuration(case) | ({"datastates_ckpt": section} if section else {})
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


class Training:
    """An engine, the steps it has done, and what the caller keeps beside: values and a tensor that change with each step."""

    def __init__(self, case: Case, engine: Any) -> None:
        self.case, self.engine = case, engine
        self.client = {"history": [0.0], "position": {"epoch": 0, "order": [3, 1, 2]}, "noise": torch.zeros(300, 100)}

    @property
    def step(self) -> int:
        return int(self.engine.global_steps)

    def advance(self) -> float:
        """One step of the optimizer; its loss."""
        if self.case.variant == "pipeline":
            loss = self.engine.train_batch(self._pairs()).item()
        else:
            loss = sum(self.backward(part) for part in range(ACCUMULATE))
        self.change_client(loss)
        return loss

    def backward(self, part: int) -> float:
        loss = self.engine(batch(self.case, self.step, part))
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.item())

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((values, values) for part in itertools.count() for values in [batch(self.case, self.step, part)])

    def change_client(self, loss: float) -> None:
        self.client["history"].append(loss)
        self.client["position"]["epoch"] += 1
        self.client["position"]["order"].reverse()
        self.client["noise"].add_(1.0)

    def save(self, directory: str, tag: str) -> None:
        """What is saved besides changes as soon as it returns."""
        changes = {"exclude_frozen_parameters": True} if self.case.exclude_frozen else {}
        self.engine.save_checkpoint(directory, tag=tag, client_state=self.client, **changes)
        self.change_client(-1.0)

    def load(self, directory: str, tag: str | None = None) -> str | None:
        """The path it has loaded, if any."""
        path, client = self.engine.load_checkpoint(directory, tag=tag)
        if path is not None:
            self.client = {name: client[name] for name in self.client}
        return path

    def state(self) -> dict[str, Any]:
        """All that a checkpoint brings back to this rank. Where only rank 0 writes the model, its buffers are for all."""
        module, case = self.engine.module, self.case
        own_file = case.stage == 3 or case.variant == "pipeline" or comm.get_rank() == 0
        return {
            "parameters": [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()],
            "buffers": dict(module.named_buffers()) if own_file or case.same_buffers else None,
            "client": self.client if own_file else None,
            "optimizer": self.engine.optimizer.state_dict(),
            "scheduler": self.engine.lr_scheduler.state_dict(),
            "counts": [self.engine.global_steps, self.engine.global_samples, self.engine.skipped_steps],
        }

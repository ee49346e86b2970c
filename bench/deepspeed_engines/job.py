"""A DeepSpeed job on the CPU that saves with one checkpoint engine after the other; every rank runs it."""

from __future__ import annotations

import contextlib
import datetime
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config
from torch import Tensor, nn
from torch.nn import functional as F

from bench.deepspeed_engines.workload import FLOOR, NO_SAVING, OURS, TORCH
from bench.measure.disk_pages import fsync_path
from bench.measure.sampling import Values, clock
from bench.workloads.training import Net

FAST, DECOUPLED, DATASTATES = "FastCheckpointEngine", "DecoupledCheckpointEngine", "DataStatesCheckpointEngine"
WRITER = {"data_parallel": "replica"}  # the default asks a grid for its size, which a model without one has not
SECTIONS: dict[str, dict[str, Any]] = {  # what the configuration says to each
    FLOOR: {},
    OURS: {},
    TORCH: {},
    f"{FAST}, python writer": {"writer": WRITER | {"type": "python"}},
    f"{FAST}, fast writer": {"writer": WRITER | {"type": "fast"}},
    f"{DECOUPLED}, python writer": {"writer": WRITER | {"type": "python", "decoupled": True}},
    f"{DECOUPLED}, fast writer": {"writer": WRITER | {"type": "fast", "decoupled": True}},
    DATASTATES: {},
}
BYTES_PER_PARAMETER = 14  # bf16, and fp32 with two moments, which the ranks share
KEEP = 2
COLLECTIVE_TIMEOUT_S = 120.0


def sides(rivals: list[str]) -> list[str]:
    """Ours, what it is measured against, and the rivals in whose names one of these is found; no names: all."""
    always = (NO_SAVING, FLOOR, OURS)
    asked = [name for name in SECTIONS if name in always or not rivals or any(part in name for part in rivals)]
    return [NO_SAVING, *asked]


class Model(nn.Module):
    """Gives the loss, as DeepSpeed has it."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.net = Net(parameters)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.net(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class NothingWritten(CheckpointEngine):  # type: ignore[misc]
    """What save_checkpoint() of DeepSpeed takes by itself, whatever engine it has."""

    def create(self, info: Any) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        pass

    def load(self, path: str, map_location: Any = None) -> None:
        raise NotImplementedError

    def commit(self, info: Any) -> bool:
        return True


def start_distributed() -> None:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for minutes, and used instead of gloo
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S), verbose=False)


def configuration(section: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 30,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"tag_validation": "Warn", **section},
    }


# ---- checkpoint engines ----------------------------------------------------------------------------------------------


class Job:
    """One DeepSpeedEngine, whose checkpoint engine is exchanged between measurements. All ranks make the same calls.

    An engine that keeps the training's memory for itself (the decoupled one moves it to shared memory) needs a job of its own.
    """

    def __init__(self, state_bytes: int) -> None:
        torch.manual_seed(0)
        model = Model(state_bytes // BYTES_PER_PARAMETER)
        self.vocabulary = model.net.vocabulary
        parameters = list(model.parameters())
        self.nbytes = sum(parameter.numel() for parameter in parameters) * BYTES_PER_PARAMETER
        self.engine = deepspeed.initialize(model=model, model_parameters=parameters, config=configuration({}))[0]
        self.choose(1, 1)
        self._made: dict[str, tuple[Any, bool]] = {}
        self._held_s = 0.0
        commit = self.engine._commit_decoupled_checkpoint
        self.engine._commit_decoupled_checkpoint = lambda: self._hold(commit)

    def _hold(self, commit: Callable[[], None]) -> None:
        started = clock()
        commit()
        self._held_s += clock() - started

    def make(self, side: str) -> None:
        """Makes a checkpoint engine as DeepSpeed makes it, from what the configuration says.

        Raises:
            Exception: what DeepSpeed raises.
        """
        import ckpt.integrations.deepspeed as lazy

        config = self.engine._config
        config.checkpoint_config = get_checkpoint_config({"checkpoint": SECTIONS[side]})
        config.datastates_config.enabled = side == DATASTATES
        (lazy.enable if side == OURS else lazy.disable)()
        try:
            if side.endswith("fast writer"):
                need_libaio()
            self.engine._configure_checkpointing()
            if side == FLOOR:
                self.engine.checkpoint_engine = NothingWritten()
        finally:
            config.datastates_config.enabled = False
            lazy.disable()
        self._made[side] = (self.engine.checkpoint_engine, self.engine.save_non_zero_checkpoint)

    def use(self, side: str) -> None:
        if side != NO_SAVING:
            self.engine.checkpoint_engine, self.engine.save_non_zero_checkpoint = self._made[side]

    def close(self) -> None:
        for checkpoint_engine, _ in self._made.values():
            checkpoint_engine.cleanup()
        self.engine.destroy()

    # ---- training --------------------------------------------------------------------------------------------------

    def choose(self, tokens: int, micro_steps: int) -> None:
        """From now on a step has so many forward and backward passes, each over one sequence of so many tokens."""
        self.tokens = torch.randint(self.vocabulary, (1, tokens + 1))
        self.micro_steps = micro_steps
        self.engine.set_train_batch_size(micro_steps * comm.get_world_size())
        self.engine.micro_steps = 0

    def iterate(self) -> Values:
        """Seconds of an iteration, of its step (with the update, without forward and backward), and held up by a checkpoint."""
        self._held_s, started = 0.0, clock()
        for _ in range(self.micro_steps):
            self.tokens = torch.randint_like(self.tokens, self.vocabulary)  # see Trainer.forward_backward()
            self.engine.backward(self.engine(self.tokens))
            before = clock()
            self.engine.step()
        ended = clock()
        return {"iteration_s": ended - started, "step_s": ended - before, "held_s": self._held_s}

    def weights(self) -> list[Tensor]:
        """What this rank's file of the optimizer must hold: the master weights, and both moments."""
        optimizer = self.engine.optimizer
        moments = optimizer.optimizer.state.values()
        both = [state[name] for state in moments for name in ("exp_avg", "exp_avg_sq")]
        return [tensor.detach().clone() for tensor in [*optimizer.fp32_groups_flat_partition, *both]]

    # ---- saving ----------------------------------------------------------------------------------------------------

    def save(self, directory: Path, tag: str) -> float:
        started = clock()
        self.engine.save_checkpoint(str(directory), tag=tag, client_state={"epoch": 1})
        return clock() - started

    def make_durable(self, side: str, directory: Path, tag: str) -> None:
        """Returns when the files of all ranks and `latest` are on the disk. What an engine does not do for it is done here."""
        if side == OURS:
            import ckpt.integrations.deepspeed as lazy

            lazy.wait(self.engine, COLLECTIVE_TIMEOUT_S)
            comm.barrier()
        else:
            if self.engine.checkpoint_engine.is_decoupled():
                self.engine._commit_decoupled_checkpoint()  # as the next step does
            comm.barrier()
            paths = sorted(path for path in (directory / tag).iterdir() if path.is_file())
            for path in paths[comm.get_rank() :: comm.get_world_size()]:
                fsync_path(path)
            comm.barrier()
            if comm.get_rank() == 0:
                for path in (directory / tag, directory / "latest", directory):
                    fsync_path(path)
            comm.barrier()
        if (directory / "latest").read_text() != tag:
            raise AssertionError(f"{side}: 'latest' is not {tag}")

    def is_right(self, directory: Path, tag: str, expected: list[Tensor]) -> bool:
        """Whether this rank's file of the optimizer holds what the training had when it was saved."""
        name = f"bf16_zero_pp_rank_{comm.get_rank()}_mp_rank_00_optim_states.pt"
        (path,) = (directory / tag).glob(f"{name}*")  # the fast writer adds to the name
        found = torch.load(path, weights_only=False)["optimizer_state_dict"]
        moments = found["base_optimizer_state"]["state"].values()
        both = [state[name] for state in moments for name in ("exp_avg", "exp_avg_sq")]
        tensors = [*found["single_partition_of_fp32_groups"], *both]
        return len(tensors) == len(expected) and all(map(torch.equal, tensors, expected))


def need_libaio() -> None:
    """DeepSpeed compiles other things for a minute before it finds that this one is missing."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise RuntimeError(
            "the writer of type 'fast' needs DeepSpeed's async_io, which needs libaio and its headers (libaio-dev)"
        )


def prune(directory: Path) -> None:
    """Removes all but the newest checkpoints; rank 0 does it for all."""
    comm.barrier()
    if comm.get_rank() == 0 and directory.exists():
        tags = sorted((path for path in directory.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
        for path in tags[:-KEEP]:
            shutil.rmtree(path)
    comm.barrier()


def slowest(values: Values) -> Values:
    """Of each value the largest of all ranks."""
    numbers = torch.tensor(list(values.values()), dtype=torch.float64)
    comm.all_reduce(numbers, op=comm.ReduceOp.MAX)
    return dict(zip(values, numbers.tolist(), strict=True))


def agree(error: str) -> str:
    """The first error of any rank, on all of them."""
    answers: list[str] = [""] * comm.get_world_size()
    torch.distributed.all_gather_object(answers, error)
    return next(filter(None, answers), "")


@contextlib.contextmanager
def jobs(state_bytes: int, names: list[str]) -> Iterator[tuple[dict[str, Job], dict[str, str]]]:
    """For each of the checkpoint engines that can be made its job; and why the others cannot."""
    shared, apart = Job(state_bytes), []
    found, errors = {NO_SAVING: shared}, {}
    for side in names:
        if side == NO_SAVING:
            continue
        job = shared
        try:
            if side.startswith(DECOUPLED) and not side.endswith("fast writer"):
                apart.append(job := Job(state_bytes))
            job.make(side)
            error = ""
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        if error := agree(error):
            errors[side] = error
        else:
            found[side] = job
    yield found, errors
    for job in [shared, *apart]:
        job.close()

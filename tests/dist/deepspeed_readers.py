"""More modes of deepspeed_training.py: what reads a checkpoint in the process that has just saved it, or reads a part of it.

torchrun --nproc-per-node 2 deepspeed_readers.py plan.json

The functions are imported here, before anything is enabled, as a training script does it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import torch
from deepspeed import comm
from deepspeed.checkpoint import DeepSpeedCheckpoint
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_file,
    get_optim_files,
    load_state_dict_from_zero_checkpoint,
)
from dist import deepspeed_training
from dist.deepspeed_behaviour import DAMAGES, LATE_S, error_of, fault, on_rank_0, started, wait_error, warnings
from dist.deepspeed_models import Case, Training, build
from dist.deepspeed_training import digest, new_network, wait

import ckpt.integrations.deepspeed as lazy

Weights = dict[str, torch.Tensor]


def weights(training: Training) -> Weights:
    """In full, as the optimizer keeps them; a collective."""
    named = list(training.engine.module.named_parameters())
    return {name: safe_get_full_fp32_param(parameter).detach().clone() for name, parameter in named}


def same(found: Any, expected: Weights) -> bool:
    return all(torch.equal(found[name].float(), expected[name]) for name in expected)


# ---- readers: what rank 0 reads alone, right behind a save -----------------------------------------------------------


def state_dict(case: Case, directory: Path, tag: str | None) -> Any:
    return get_fp32_state_dict_from_zero_checkpoint(directory, tag)


def into_a_model(case: Case, directory: Path, tag: str | None) -> Any:
    return load_state_dict_from_zero_checkpoint(new_network(case), str(directory), tag=tag).state_dict()


def converted(case: Case, directory: Path, tag: str | None) -> Any:
    target = directory.with_name(f"{directory.name} converted")
    convert_zero_checkpoint_to_fp32_state_dict(str(directory), str(target), max_shard_size=None, tag=tag)
    return torch.load(target / "pytorch_model.bin")


READERS = {reader.__name__: reader for reader in (state_dict, into_a_model, converted)}


def alone(action: Callable[[], Any]) -> Any:
    """What rank 0 finds, while the others wait for it in a barrier."""
    found = action() if comm.get_rank() == 0 else None
    comm.barrier()
    return found


def attempt(read: Callable[..., Any], case: Case, directory: Path, tag: str | None, expected: Weights) -> Any:
    try:
        return same(read(case, directory, tag), expected)
    except Exception as error:
        return {"type": type(error).__name__, "text": str(error)}


def readers(case: Case, directory: Path) -> dict[str, Any]:
    """The reader is the first of the tags."""
    training, read = started(case, 2), READERS[case.tags[0]]
    found: dict[str, Any] = {}

    def look(tag: str | None, expected: Weights) -> Any:
        return alone(lambda: attempt(read, case, directory, tag, expected))

    with fault(call="fallocate", delay_s=LATE_S):
        for name, tag in (("first", None), ("second", None), ("second", "second")):
            training.advance()
            expected = weights(training)
            training.save(str(directory), name)
            found[f"{name} by {tag}"] = look(tag, expected)
        training.advance()
        training.engine.save_checkpoint(str(directory), tag="aside", save_latest=False)
        found["aside"] = look(None, expected)
    with fault(1, call="pwritev", error=5):
        training.save(str(directory), "failed")
        found["failed"] = look(None, expected)
        found["failed, by its tag"] = look("failed", expected)
        wait_error(training)
    found["failed, later"] = look(None, expected)
    found["the one before"] = look("second", expected)
    training.advance()
    expected = weights(training)
    training.save(str(directory), "good")
    found["good"] = look(None, expected)
    training.engine.destroy()
    return found


def listings(case: Case, directory: Path) -> dict[str, Any]:
    """What DeepSpeed's functions list on rank 0 alone, each right behind a save to a directory of its own."""
    training, found = started(case), {}
    looks: dict[str, Callable[[Path], Any]] = {
        "optimizers": lambda at: len(get_optim_files(str(at))),
        "model": lambda at: Path(get_model_state_file(str(at), case.stage)).name,
        "checkpoint": lambda at: len(DeepSpeedCheckpoint(str(at)).mp_rank_files),
    }
    with fault(call="fallocate", delay_s=LATE_S):
        for name, look in looks.items():
            training.save(str(directory / name), "saved")
            raised: list[Any] = []
            outcome = alone(lambda: error_of(lambda: raised.append(look(directory / name / "saved")), meet=False))  # noqa: B023
            found[name] = outcome or (raised or [None])[0]
    training.engine.destroy()
    return found


def two_engines(case: Case, directory: Path) -> dict[str, Any]:
    """What one of our engines, or one of DeepSpeed's own, loads right behind a save of another."""
    lazy.disable()
    stock = Training(case, build(case, None))
    saving, other = started(case, 2), started(case)
    found = {}
    with fault(call="fallocate", delay_s=LATE_S):
        for name, training in (("stock", stock), ("other", other)):
            saving.advance()
            expected = digest(saving.state())
            saving.save(str(directory), f"for {name}")
            path = training.load(str(directory))
            found[name] = [path and Path(path).parent.name, digest(training.state()) == expected]
    return found


# ---- loads of a part -------------------------------------------------------------------------------------------------

PARTS: dict[str, dict[str, Any]] = {
    "module only": {"load_module_only": True},
    "no states": {"load_optimizer_states": False},
    "neither": {"load_module_only": True, "load_optimizer_states": False, "load_lr_scheduler_states": False},
    "all": {},
}


def part_loads(training: Training, directory: Path, tag: str | None, part: str) -> dict[str, Any]:
    """What comes of it: the tag that it says it has loaded, and the weights that it has."""
    loaded: list[Any] = []
    error = error_of(lambda: loaded.append(training.engine.load_checkpoint(str(directory), tag, **PARTS[part])[0]))
    path = loaded[0] if loaded else None
    return {"error": error, "path": path and Path(path).parent.name, "weights": parameters(training)}


def parameters(training: Training) -> str:
    return digest([getattr(parameter, "ds_tensor", parameter) for parameter in training.engine.module.parameters()])


def rejected(case: Case, directory: Path) -> dict[str, Any]:
    """Weights alone: of the newest, of an older one by its tag, and without a tag where the newest is damaged."""
    training, expected = started(case), {}
    for tag in ("one", "two"):
        training.advance()
        expected[tag] = parameters(training)
        training.save(str(directory), tag)
    wait(training)
    ways = {"newest": (None, "two"), "by tag": ("one", "one"), "damaged": (None, "one")}
    found = {}
    for way, (tag, wanted) in ways.items():
        if way == "damaged":
            on_rank_0(lambda: DAMAGES[case.tags[0]](directory / "two"))
        training.advance()
        with warnings() as logged:
            found[way] = part_loads(training, directory, tag, "no states")
        found[way] |= {"same": found[way].pop("weights") == expected[wanted], "logged": logged}
    training.engine.destroy()
    return found


def deleted(case: Case, directory: Path) -> dict[str, Any]:
    """The optimizer's files are removed by hand; what DeepSpeed's own engine then loads, and ours."""
    lazy.disable()
    stock = Training(case, build(case, None))
    training = started(case, 2)
    training.save(str(directory), "saved")
    expected = parameters(training)
    wait(training)

    def remove() -> None:
        for path in (directory / "saved").glob("*_optim_states.pt"):
            path.unlink()

    on_rank_0(remove)
    found: dict[str, Any] = {}
    for part in PARTS:
        outcomes = []
        for each in (stock, training):
            each.advance()
            outcome = part_loads(each, directory, None, part)
            outcomes.append(outcome | {"same": outcome.pop("weights") == expected})
        found[part] = dict(zip(("stock", "ours"), outcomes, strict=True))
    if case.stage < 3:
        on_rank_0(lambda: DAMAGES["truncate"](directory / "saved"))
        found["damaged too"] = part_loads(training, directory, None, "module only")
    return found


MODES = (readers, listings, two_engines, rejected, deleted)
deepspeed_training.MODES.update({mode.__name__: mode for mode in MODES})

if __name__ == "__main__":
    deepspeed_training.main(json.loads(Path(sys.argv[1]).read_text()))

"""More modes of deepspeed_training.py: what writes to the state of a training right after it was saved, without a step.

torchrun --nproc-per-node 2 deepspeed_writes.py plan.json

The functions are imported here, before anything is enabled, as a training script does it.
"""

from __future__ import annotations

import importlib
import io
import json
import operator
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import deepspeed
import torch
from deepspeed import comm
from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state, safe_set_local_fp32_param
from deepspeed.utils.tensor_fragment import safe_set_local_optimizer_state
from dist import deepspeed_training
from dist.deepspeed_behaviour import LATE_S, error_of, fault, wait_error
from dist.deepspeed_models import Case, Training, batch
from dist.deepspeed_training import Recorder, digest, start

from ckpt.integrations.deepspeed import fenced_writes as writes
from ckpt.saving import inspection

torch._dynamo.config.disable = True  # DeepSpeed's Muon would be compiled, for a minute

Action = Callable[[], Any]


def learning(training: Training) -> Iterator[torch.nn.Parameter]:
    return (parameter for parameter in training.engine.module.parameters() if parameter.requires_grad)


def full(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.full(getattr(parameter, "ds_shape", parameter.shape), 3.0)


def local(parameter: Any) -> torch.Tensor:
    return torch.full(parameter.ds_tensor.shape, 3.0)


def copied(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def each(training: Training, write: Callable[[Any], Any]) -> Action:
    return lambda: [write(parameter) for parameter in learning(training)]


# ---- the writes: each prepares itself, and gives what is done after the save -----------------------------------------


def full_parameters(training: Training, directory: Path) -> Action:
    return each(training, lambda parameter: safe_set_full_fp32_param(parameter, full(parameter)))


def full_state(training: Training, directory: Path) -> Action:
    return each(training, lambda parameter: safe_set_full_optimizer_state(parameter, full(parameter), "exp_avg"))


def local_parameters(training: Training, directory: Path) -> Action:
    return each(training, lambda parameter: safe_set_local_fp32_param(parameter, local(parameter)))


def local_state(training: Training, directory: Path) -> Action:
    return each(training, lambda parameter: safe_set_local_optimizer_state(parameter, local(parameter), "exp_avg_sq"))


def by_the_parameter(training: Training, directory: Path) -> Action:
    """By the method that DeepSpeed gives to each parameter."""
    setters = [(parameter.set_full_hp_param, full(parameter)) for parameter in learning(training)]
    return lambda: [set_it(value, "exp_avg") for set_it, value in setters]


def fragments(training: Training, directory: Path) -> Action:
    """Low precision to high, as it lies behind a parameter."""
    mappings = [parameter._hp_mapping for parameter in learning(training) if parameter._hp_mapping is not None]
    return lambda: [mapping.update_hp() for mapping in mappings]


def refresh(training: Training, directory: Path) -> Action:
    return lambda: training.engine.optimizer.refresh_fp32_params()


def optimizer_state(training: Training, directory: Path) -> Action:
    if training.case.stage == 0:
        earlier = copied(training.engine.optimizer.state_dict())
        training.advance()
        return lambda: training.engine.optimizer.load_state_dict(earlier)
    earlier = [copied(training.engine.optimizer.state_dict())] * comm.get_world_size()
    training.advance()
    return lambda: training.engine.optimizer.load_state_dict(earlier, load_from_fp32_weights=True)


def module_state(training: Training, directory: Path) -> Action:
    earlier = copied(training.engine.module.state_dict())
    training.advance()
    return lambda: training.engine.load_module_state_dict({"module": earlier})


def gathered(training: Training, directory: Path) -> Action:
    def write() -> None:
        with deepspeed.zero.GatheredParameters(list(learning(training)), modifier_rank=0):
            for parameter in learning(training):
                parameter.data.add_(1.0)

    return write


def universal(training: Training, directory: Path) -> Action:
    """One parameter's part of a universal checkpoint."""
    parameter: Any = next(learning(training))
    load = types.MethodType(load_hp_checkpoint_state, parameter)
    folder = directory.with_name(f"{directory.name} of rank {comm.get_rank()}")
    folder.mkdir()
    for key in ("fp32", "exp_avg", "exp_avg_sq"):
        torch.save({"param": full(parameter)}, folder / f"{key}.pt")
    return lambda: parameter._hp_mapping is None or load(str(folder), 0, 1)


def own_step(training: Training, directory: Path) -> Action:
    """The optimizer's step, without the engine's."""
    training.backward(0)
    training.engine.backward(training.engine(batch(training.case, training.step, 1)))
    return lambda: training.engine.optimizer.step()


def whole_step(training: Training, directory: Path) -> Action:
    return training.advance


WAYS = (full_parameters, full_state, local_parameters, local_state, by_the_parameter, fragments, refresh, optimizer_state)
WAYS += (module_state, gathered, universal, own_step, whole_step)
ACTIONS = {way.__name__: way for way in WAYS}


def written(case: Case, directory: Path) -> dict[str, Any]:
    """What the only tag names is done right after a save, while the disk is slow."""
    training = start(case)
    recorder = Recorder(training.engine.checkpoint_engine)
    for _ in range(2):
        training.advance()
    write = ACTIONS[case.tags[0]](training, directory)
    before = digest(training.state() | {"client": None})
    with fault(call="fallocate", delay_s=LATE_S):
        training.save(str(directory), "saved")
        raised = error_of(write)
        saves = inspection.pending_of(training.engine.checkpoint_engine._checkpointer)
        found = {"raised": raised, "captured": [save.captured for save in saves]}
        found |= {"changed": digest(training.state() | {"client": None}) != before}
        found["wait"] = wait_error(training)
    found["differences"] = recorder.differences()
    found["files"] = len(recorder.expected)
    training.engine.destroy()
    return found


def unfenced(case: Case, directory: Path) -> dict[str, Any]:
    """Names that this DeepSpeed does not have, or that lead past ours."""
    start(case).engine.destroy()
    functions = [(module, name) for module, names in writes._FUNCTIONS.items() for name in names]
    methods = [(module, f"{owner}.{name}") for (module, owner), names in writes._METHODS.items() for name in names]
    left = [path for path in (*functions, *methods) if not is_ours(*path)]
    for name in writes._OPTIMIZER_WRITES:
        having = [(module, f"{owner}.{name}") for module, owner in writes._OPTIMIZERS if own_method(module, owner, name)]
        left += [path for path in having if not is_ours(*path)] if having else [("no optimizer", name)]
    return {"left": left}


def own_method(module: str, owner: str, name: str) -> bool:
    return name in vars(getattr(importlib.import_module(module), owner))


def is_ours(module: str, path: str) -> bool:
    try:
        found = operator.attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    replacement = (found.__kwdefaults__ or {}).get("_replacement", found)
    return bool(replacement.__code__.co_filename == writes.__file__)


deepspeed_training.MODES.update({"written": written, "unfenced": unfenced})

if __name__ == "__main__":
    deepspeed_training.main(json.loads(Path(sys.argv[1]).read_text()))

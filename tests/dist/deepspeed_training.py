"""Trains and saves with DeepSpeed: many cases one after the other in the same processes, under torchrun or started one by one.

    torchrun --nproc-per-node 2 deepspeed_training.py plan.json        # {"outcomes": directory, "cases": [fields of Case, ...]}

Every rank writes `<case>.<rank>.json` into the directory of outcomes: what it found, or "error". The modes:

    files   saves, trains on, and compares every file with what the stock engine would have written at that moment
    train   resumes if it can and goes on to the given step, saving on the way; notes losses and digests of the whole state
    tree    saves once and ends; what it leaves can be compared with what another engine leaves
    look    notes what DeepSpeed's own functions find in the first of the tags in a directory
    flight  the same before and while a tag is saved again
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import hashlib
import io
import itertools
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import deepspeed
import torch
from deepspeed import comm
from deepspeed.checkpoint import DeepSpeedCheckpoint, constants, ds_to_universal, reshape_utils
from deepspeed.utils import safe_get_full_fp32_param, zero_to_fp32
from dist.deepspeed_models import Case, Network, Training, build
from support import assert_same, patience, wait_until

from ckpt import Options, _native
from ckpt.integrations.deepspeed.readers import reading

DEADLINE_S = patience(60.0)
OTHERS_S = patience(15.0)  # how long a rank that has failed waits for the others before it takes all down
SMALL: dict[str, Any] = {  # nearly everything is lazy, in many chunks
    "chunk_bytes": "64KiB",
    "writers": 2,
    "eager_bytes": "1KiB",
    "timeout_s": DEADLINE_S,
    "drain_timeout_s": DEADLINE_S,
    "commit_timeout_s": DEADLINE_S,
}
ARENA_MIB = 4


class Recorder:
    """Keeps, for each path that a checkpoint engine is given, what the stock engine would write there at that moment."""

    def __init__(self, checkpoint_engine: Any) -> None:
        self.expected: dict[str, bytes] = {}
        self._save = checkpoint_engine.save
        checkpoint_engine.save = self.save

    def save(self, state_dict: Any, path: str) -> Any:
        file = io.BytesIO()
        torch.save(state_dict, file)
        self.expected[path] = file.getvalue()
        return self._save(state_dict, path)

    def differences(self) -> list[str]:
        return [text for path in self.expected if (text := self._difference(path))]

    def _difference(self, path: str) -> str | None:
        try:
            expected = torch.load(io.BytesIO(self.expected[path]), weights_only=False)
            assert_same(expected, torch.load(path, weights_only=False))
        except Exception as error:  # of any kind: the file may be missing, or cut off
            return f"{Path(path).name}: {type(error).__name__}: {error}"
        return None


def digest(value: Any) -> str:
    """Of tensors, containers and plain objects, bit for bit."""
    whole = hashlib.blake2b(digest_size=16)
    feed(whole, value)
    return whole.hexdigest()


def feed(whole: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        whole.update(f"{value.dtype} {list(value.shape)}".encode())
        whole.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key, item in value.items():
            whole.update(repr(key).encode())
            feed(whole, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            feed(whole, item)
    elif hasattr(value, "__dict__") and not isinstance(value, enum.Enum):
        whole.update(type(value).__qualname__.encode())
        feed(whole, vars(value))
    else:
        whole.update(repr(value).encode())


# ---- engines ---------------------------------------------------------------------------------------------------------


def start(case: Case) -> Training:
    """With the checkpoint engine that the case asks for. "enable" holds for the life of the process: stock ones come before."""
    if case.engine == "stock":
        engine = build(case, None)
        assert type(engine.checkpoint_engine).__module__.startswith("deepspeed.")
        return Training(case, engine)
    import ckpt.integrations.deepspeed as lazy

    if case.engine == "enable":
        lazy.enable()
        return Training(case, build(case, {"host_cache_size": ARENA_MIB / 1024, **SMALL, **case.options}))
    assert case.engine == "attach"
    engine = build(case, None)
    lazy.attach(engine, Options(**({"arena_bytes": f"{ARENA_MIB}MiB"} | SMALL | case.options)))
    return Training(case, engine)


def wait(training: Training) -> None:
    if training.case.engine != "stock":
        import ckpt.integrations.deepspeed as lazy

        lazy.wait(training.engine, timeout=DEADLINE_S)
    comm.barrier()


@contextmanager
def faults(case: Case) -> Iterator[None]:
    for fault in case.faults:
        _native.set_fault(**fault)
    try:
        yield
    finally:
        if case.faults:
            _native.clear_faults()


# ---- modes -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class AtReturn:
    """What was there when save_checkpoint() returned: new files under their final names, and `latest` on the new tag.

    Saves that took as long as the files are held up say nothing about that.
    """

    files: list[str] = dataclasses.field(default_factory=list)
    latest: list[str] = dataclasses.field(default_factory=list)

    def save(self, training: Training, recorder: Recorder, directory: Path, tag: str) -> None:
        known = set(recorder.expected)  # of earlier saves: these may be put in place at any time
        begin = time.monotonic()
        training.save(str(directory), tag)
        files = [Path(path).name for path in recorder.expected.keys() - known if Path(path).exists()]
        latest = [tag] if read(directory / "latest") == tag else []
        if 0 < max((fault["delay_s"] for fault in training.case.faults), default=0.0) <= time.monotonic() - begin:
            return
        self.files += files
        self.latest += latest


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def check_files(case: Case, directory: Path) -> dict[str, Any]:
    training = start(case)
    recorder = Recorder(training.engine.checkpoint_engine)
    at_return, states = AtReturn(), {}
    for _ in range(2):
        training.advance()
    with faults(case):
        for tag in case.tags:
            if case.in_the_middle:
                training.backward(0)
            states[tag] = digest(training.state())
            at_return.save(training, recorder, directory, tag)
            if case.half:
                training.engine.save_16bit_model(str(directory / f"half-{tag}"))
            if case.in_the_middle:
                training.backward(1)
            for _ in range(case.between):
                training.advance()
        training.advance()
        wait(training)
    outcome = {
        "differences": recorder.differences(),
        "files": sorted(str(Path(path).relative_to(directory)) for path in recorder.expected),
        "at_return": dataclasses.asdict(at_return),
        "latest": read(directory / "latest"),
        "optimizer": type(getattr(training.engine.optimizer, "optimizer", None)).__name__,
        "leftovers": sorted(str(path.relative_to(directory)) for path in directory.rglob(".tmp-*")),
        "lost": [tag for tag in states if case.reload and not comes_back(training, directory, tag, states[tag])],
    }
    training.engine.destroy()
    return outcome


def comes_back(training: Training, directory: Path, tag: str, expected: str) -> bool:
    assert training.load(str(directory), tag) is not None
    return digest(training.state()) == expected


def train(case: Case, directory: Path) -> dict[str, Any]:
    training = start(case)
    path = training.load(str(directory), case.load_tag or None)
    found = training.step
    digests = {found: digest(training.state())}
    say(f"found {found} {digests[found]}")
    if path is not None:
        training.change_client(-1.0)  # as the run did that has saved it
    if case.crash_point and comm.get_rank() == case.crash_rank:
        _native.set_crash_point(case.crash_point, case.crash_skip)
    losses = {}
    with faults(case):
        while training.step < case.steps:
            losses[training.step] = training.advance().hex()
            _native.crash_point("deepspeed-stepped")
            digests[training.step] = digest(training.state())
            if training.step % case.every == 0:
                training.save(str(directory), "tag" if case.one_tag else f"step{training.step}")
                if case.weights:
                    leave_weights(training, directory.with_name(f"{case.name}.weights.pt"))
                if case.wait:
                    wait(training)
                    say(f"durable {training.step}")
        wait(training)
    training.engine.destroy()
    return {"path": path, "found": found, "losses": losses, "digests": digests, "latest": read(directory / "latest")}


def leave_weights(training: Training, path: Path) -> None:
    """Of what learns, in full, as the optimizer keeps them."""
    named = training.engine.module.named_parameters()
    weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in named if parameter.requires_grad}
    if comm.get_rank() == 0:
        torch.save({name: weight.detach().clone() for name, weight in weights.items()}, path)


def leave_tree(case: Case, directory: Path) -> dict[str, Any]:
    training = start(case)
    for _ in range(2):
        training.advance()
    for tag in case.tags:
        training.save(str(directory), tag)
        if case.half:
            training.engine.save_16bit_model(str(directory / f"half-{tag}"))
        training.advance()
    wait(training)
    training.engine.destroy()
    differences = compare_trees(directory.parent / case.like, directory) if case.like and comm.get_rank() == 0 else []
    return {"differences": differences, "files": tree(directory)}


def tree(directory: Path) -> list[str]:
    """All files but what our engine adds to them."""
    paths = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    ours = ("manifest.json", ".lock", ".run", ".drain")
    return sorted(str(path) for path in paths if path.name not in ours and path.parts[0] not in ours)


def compare_trees(expected: Path, found: Path) -> list[str]:
    differences = []
    for name in tree(expected):
        try:
            assert_same(contents(expected / name), contents(found / name))
        except Exception as error:
            differences.append(f"{name}: {type(error).__name__}: {error}")
    return differences


def contents(path: Path) -> Any:
    if path.suffix not in (".pt", ".bin"):
        return path.read_bytes()
    state = torch.load(path, weights_only=False)
    state.get("ds_config", {}).pop("datastates_ckpt", None)
    for flat in state.get("optimizer_state_dict", {}).get("fp32_flat_groups", []):
        vars(flat).pop("ds_id", None)  # a number that ZeRO 3 gives once in the life of a process
    return plain(state)


def plain(value: Any) -> Any:
    """Without what the stock engine loses where DeepSpeed clones state dicts: the versions of modules, the type of shapes."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def look_at_tag(case: Case, directory: Path) -> dict[str, Any]:
    return {"found": look(case, directory, case.tags[0])}


def look_in_flight(case: Case, directory: Path) -> dict[str, Any]:
    training, tag = start(case), case.tags[0]
    training.advance()
    training.save(str(directory), tag)
    wait(training)
    outcome = {"before": look(case, directory, tag)}
    training.advance()
    with faults(case):
        training.save(str(directory), tag)
        mine = f"-{os.getpid()}-"
        wait_until(lambda: any(mine in path.name for path in (directory / tag).glob(".tmp-*")), DEADLINE_S, "a temporary file")
        temporaries = sorted(path.name for path in (directory / tag).glob(".tmp-*"))
        with reading(directory, None):  # as another process sees it, which waits for nothing
            outcome |= {"during": look(case, directory, tag), "temporaries": temporaries}
        outcome["still"] = [name for name in temporaries if (directory / tag / name).exists()]
    wait(training)
    outcome |= {"after": look(case, directory, tag), "latest": read(directory / "latest")}
    training.engine.destroy()
    return outcome


def look(case: Case, directory: Path, tag: str) -> dict[str, Any]:
    """What the functions that DeepSpeed's tools are made of find: names of files, layouts, and digests of values."""
    at = directory / tag
    files = reshape_utils.get_files(str(at))
    prefixes = {value for name, value in vars(constants).items() if name.endswith("FILE_PREFIX")}
    found: dict[str, Callable[[], Any]] = {
        **{prefix: lambda prefix=prefix: names(reshape_utils.get_files_with_prefix(files, prefix)) for prefix in prefixes},
        "zero": lambda: names(reshape_utils.get_zero_files(str(at))),
        "optimizers": lambda: names(zero_to_fp32.get_optim_files(str(at))),
        "models": lambda: names(zero_to_fp32.get_model_state_files(str(at))),
        "to universal": lambda: names(ds_to_universal._get_optim_files(str(at))),
        "to universal, ZeRO 3": lambda: names(ds_to_universal._get_zero3_model_state_files(str(at))),
        "layout": lambda: layout(DeepSpeedCheckpoint(str(at))),
        "weights": lambda: digest(zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(directory), tag)),
        "of latest": lambda: digest(zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(directory))),
        "lazy": lambda: sorted(zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(directory), tag, lazy_mode=True)),
        "model": lambda: digest(
            zero_to_fp32.load_state_dict_from_zero_checkpoint(new_network(case), str(directory), tag).state_dict()
        ),
    }
    return {name: attempt(function) for name, function in found.items()}


def new_network(case: Case) -> Network:
    torch.manual_seed(5)
    return Network(case)


def layout(checkpoint: DeepSpeedCheckpoint) -> dict[str, Any]:
    places = list(itertools.product(*map(range, (checkpoint.pp_degree, checkpoint.tp_degree, checkpoint.dp_degree))))
    return {
        "degrees": [checkpoint.tp_degree, checkpoint.pp_degree, checkpoint.dp_degree, checkpoint.original_world_size],
        "iteration": checkpoint.get_iteration(),
        "files": [names(found) for found in (checkpoint.mp_rank_files, checkpoint.layer_files)],
        "layers": checkpoint.layer_keys,
        "zero files": [names(checkpoint.get_zero_files(*place)) for place in places],
        "zero": [digest(checkpoint.get_zero_checkpoint_state(*place)["optimizer_state_dict"]) for place in places],
    }


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def attempt(function: Callable[[], Any]) -> Any:
    """Its value, or what kind of error it raises: not every function is for every kind of training."""
    try:
        return function()
    except Exception as error:
        return {"raises": type(error).__name__}


MODES: dict[str, Callable[[Case, Path], dict[str, Any]]] = {
    "files": check_files,
    "train": train,
    "tree": leave_tree,
    "look": look_at_tag,
    "flight": look_in_flight,
}


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


# ---- the processes ---------------------------------------------------------------------------------------------------


def run(case: Case, outcomes: Path) -> None:
    directory = Path(case.directory or outcomes / case.name)
    begin = time.monotonic()
    try:
        outcome = MODES[case.mode](case, directory)
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    outcome["seconds"] = time.monotonic() - begin
    own = outcomes / f"{case.name}.{comm.get_rank()}.json"
    own.with_suffix(".part").write_text(json.dumps(outcome, indent=1))
    own.with_suffix(".part").rename(own)
    if "error" in outcome:
        give_up_unless_all_ended(case, outcomes)


def give_up_unless_all_ended(case: Case, outcomes: Path) -> None:
    """The others may be in a collective that this rank has left."""
    deadline = time.monotonic() + OTHERS_S
    others = [outcomes / f"{case.name}.{rank}.json" for rank in range(comm.get_world_size())]
    while not all(path.exists() for path in others):
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.05)


def main(plan: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for minutes, and used instead of gloo
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=DEADLINE_S), verbose=False)
    for fields in plan["cases"]:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        run(Case(**fields), Path(plan["outcomes"]))
    comm.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

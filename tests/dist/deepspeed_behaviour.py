"""More modes of deepspeed_training.py: what goes wrong around a save, and what load_checkpoint() makes of what it finds.

torchrun --nproc-per-node 2 deepspeed_behaviour.py plan.json
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import deepspeed
import psutil
import torch
from deepspeed import comm
from dist import deepspeed_training
from dist.deepspeed_models import Case, Network, Training, build, configuration
from dist.deepspeed_training import DEADLINE_S, SMALL, Recorder, digest, read, start, wait
from support import patience

import ckpt.integrations.deepspeed as lazy
from ckpt import _native

LATE_S = 0.7  # how late a slow writer is
MANY = 20  # checkpoints that are saved, and fail or are deleted
DISK_S = patience(3.0)  # what the disk takes for the files of the fence's case
TEXT = 3000  # characters of a message that are kept

kept: list[Any] = []  # to the end of the interpreter, as the variables of a script


# ---- what the modes are made of --------------------------------------------------------------------------------------


@contextmanager
def fault(rank: int | None = None, **fields: Any) -> Iterator[None]:
    """On one rank; None: on all."""
    if rank in (None, comm.get_rank()):
        _native.set_fault(**fields)
    try:
        yield
    finally:
        _native.clear_faults()


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What is logged meanwhile, as a warning or worse."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage()[:TEXT])  # type: ignore[method-assign]
    logging.getLogger("ckpt").addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger("ckpt").removeHandler(handler)


def error_of(action: Callable[[], Any], meet: bool = True) -> dict[str, str] | None:
    """Of this rank. To meet: all of them have done it, well or not, when it returns."""
    try:
        action()
        found = None
    except Exception as error:
        found = {"type": type(error).__name__, "text": str(error)[:TEXT]}
    if meet:
        comm.barrier()
    return found


def wait_error(training: Training) -> dict[str, str] | None:
    return error_of(lambda: lazy.wait(training.engine, timeout=DEADLINE_S))


def on_rank_0(action: Callable[[], Any]) -> None:
    comm.barrier()
    if comm.get_rank() == 0:
        action()
    comm.barrier()


def leftovers(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob(".tmp-*"))


def started(case: Case, steps: int = 1) -> Training:
    training = start(case)
    for _ in range(steps):
        training.advance()
    return training


def loads(training: Training, directory: Path, tag: str | None, expected: str) -> dict[str, Any]:
    """What load_checkpoint() says and brings back."""
    where: list[str | None] = []
    with warnings() as logged:
        error = error_of(lambda: where.append(training.load(str(directory), tag)))
    path = where[0] if where else None
    return {
        "error": error,
        "path": path and Path(path).parent.name,
        "same": path is not None and digest(training.state()) == expected,
        "logged": logged,
    }


# ---- saving ----------------------------------------------------------------------------------------------------------


def slow_rank(case: Case, directory: Path) -> dict[str, Any]:
    """Rank 0 looks at `latest` without a pause while rank 1 writes."""
    training, found = started(case), {}
    training.save(str(directory), "first")
    wait(training)
    with fault(1, call="fallocate", delay_s=LATE_S):
        begin = time.monotonic()
        training.save(str(directory), "second")
        found["at_return"] = read(directory / "latest")
        while comm.get_rank() == 0 and read(directory / "latest") != "second" and time.monotonic() < begin + DEADLINE_S:
            time.sleep(0.0005)
        found["files"] = sorted(path.name for path in (directory / "second").glob("*_states.pt"))
        found["moved_s"] = time.monotonic() - begin
        wait(training)
    found["all_files"] = sorted(path.name for path in (directory / "first").glob("*_states.pt"))
    training.engine.destroy()
    return found


def destroyed(case: Case, directory: Path) -> dict[str, Any]:
    """Three saves without a step between, and the end."""
    training = started(case)
    recorder = Recorder(training.engine.checkpoint_engine)
    with fault(call="fallocate", delay_s=LATE_S / 2):
        training.save(str(directory), "first")
        if case.half:
            training.engine.save_16bit_model(str(directory / "half"))
        training.save(str(directory), "second")
        training.engine.destroy()
    comm.barrier()
    return {
        "differences": recorder.differences(),
        "files": len(recorder.expected),
        "latest": read(directory / "latest"),
        "half": [path.name for path in (directory / "half").glob("*.bin")],
        "leftovers": leftovers(directory),
    }


def load_at_once(case: Case, directory: Path) -> dict[str, Any]:
    training, found = started(case), {}
    with fault(call="fallocate", delay_s=LATE_S / 2):
        for tag, given, steps in (("first", None, 0), ("second", "second", 0), ("third", None, 1), ("fourth", "fourth", 1)):
            training.advance()
            expected = digest(training.state())
            training.save(str(directory), tag)
            for _ in range(steps):
                training.advance()
            found[tag] = loads(training, directory, given, expected)
    training.engine.destroy()
    return found


FAILURES: dict[str, dict[str, Any]] = {
    "EIO in a write on rank 1": {"rank": 1, "call": "pwritev", "error": 5},
    "ENOSPC on rank 0": {"rank": 0, "call": "fallocate", "error": 28},
    "EIO in a flush on rank 1": {"rank": 1, "call": "fdatasync", "error": 5},
    "ENOSPC in the manifest": {"rank": 0, "call": "write", "path_part": "manifest", "error": 28},
}


def failing(case: Case, directory: Path) -> dict[str, Any]:
    training, found = started(case), {}
    training.save(str(directory), "good 0")
    wait(training)
    for number, (name, fields) in enumerate(FAILURES.items()):
        with fault(**fields):
            outcome = failing_once(training, directory, f"bad {number}")
        expected = digest(training.state())
        training.save(str(directory), f"good {number + 1}")
        outcome["then"] = wait_error(training)
        outcome["latest_then"] = read(directory / "latest")
        training.advance()
        outcome["loads"] = loads(training, directory, None, expected)
        found[name] = outcome
    training.engine.destroy()
    return found


def failing_once(training: Training, directory: Path, tag: str) -> dict[str, Any]:
    returned = training.engine.save_checkpoint(str(directory), tag=tag, client_state=training.client)
    losses = [training.advance(), training.advance()]
    return {
        "returned": returned,
        "trained": len(losses),
        "wait": wait_error(training),
        "wait_again": wait_error(training),
        "latest": read(directory / "latest"),
        "leftovers": leftovers(directory),
    }


def unpicklable(case: Case, directory: Path) -> dict[str, Any]:
    training = started(case)
    training.client["cannot"] = lambda: None
    found = failing_once(training, directory, "bad")
    del training.client["cannot"]
    training.save(str(directory), "good")
    found["then"] = wait_error(training)
    training.client["cannot"] = lambda: None
    training.save(str(directory), "last")
    found["destroy"] = error_of(training.engine.destroy)
    return found | {"latest": read(directory / "latest")}


def too_many_failures(case: Case, directory: Path) -> dict[str, Any]:
    """Saves until one raises. `case.tags` is the rank that is slow to clean up, and so to know that a save has failed."""
    training, raised = started(case), None
    slow, number = int(case.tags[0]), 0
    with fault(1, call="pwritev", error=5):
        if comm.get_rank() == slow:
            _native.set_fault("unlink", delay_s=LATE_S)
        while raised is None and number < MANY:
            raised = error_of(lambda: training.save(str(directory), f"bad {number}"), meet=False)  # noqa: B023
            number += 1
            training.advance()
            if case.wait:
                wait_error(training)
        wait_error(training)
    training.save(str(directory), "good")
    found = {"raised": raised, "saves": number, "then": wait_error(training), "latest": read(directory / "latest")}
    training.engine.destroy()
    return found


def deleted_in_flight(case: Case, directory: Path) -> dict[str, Any]:
    training = started(case)
    training.save(str(directory), "first")
    wait(training)
    with fault(call="fallocate", delay_s=LATE_S):
        training.save(str(directory), "second")
        on_rank_0(lambda: shutil.rmtree(directory / "second"))
        training.advance()
        found = {"wait": wait_error(training), "latest": read(directory / "latest")}
    expected = digest(training.state())
    training.save(str(directory), "third")
    found |= {"then": wait_error(training), "loads": loads(training, directory, None, expected)}
    training.engine.destroy()
    return found


def deleted_often(case: Case, directory: Path) -> dict[str, Any]:
    """A directory for each checkpoint; the one before is deleted as soon as save_checkpoint() has returned."""
    training, process, old = started(case), psutil.Process(), None
    counts, errors = [], []
    for fields in case.faults:
        _native.set_fault(**fields)
    for number in range(MANY):
        new = directory / f"checkpoint-{number}"
        errors.append(error_of(lambda new=new: training.save(str(new), "step")))
        if old is not None:
            on_rank_0(lambda old=old: shutil.rmtree(old, ignore_errors=True))
        training.advance()
        counts.append((process.num_fds(), process.num_threads()))
        old = new
    _native.clear_faults()
    expected = digest(training.state())
    last = directory / "checkpoint-last"
    training.save(str(last), "step")
    found = {"errors": [error for error in errors if error], "counts": counts, "wait": wait_error(training)}
    counts.append((process.num_fds(), process.num_threads()))
    found["loads"] = loads(training, last, None, expected)
    training.engine.destroy()
    return found


def own_retention(case: Case, directory: Path) -> dict[str, Any]:
    """The state at the return of save_checkpoint() to a second directory; then a save there that fails."""
    training, found = started(case), {}
    with fault(call="fallocate", delay_s=LATE_S):
        for name in ("one", "two"):
            training.save(str(directory / name), "tag")
            found[name] = read(directory / name / "latest")
    with fault(1, call="pwritev", error=28):
        found["full"] = error_of(lambda: training.save(str(directory / "three"), "tag"))
    training.engine.destroy()
    return found


def fence(case: Case, directory: Path) -> dict[str, Any]:
    """How long training is held while the disk takes seconds; it is let go when that is known."""
    training, took = started(case, 2), {}
    actions: dict[str, Callable[[], Any]] = {
        "save": lambda: training.save(str(directory), "slow"),
        "first step": training.advance,
        "second step": training.advance,
    }
    with fault(call="fallocate", delay_s=DISK_S):
        for name, action in actions.items():
            begin = time.monotonic()
            action()
            took[name] = time.monotonic() - begin
        found = {"took": took, "disk_s": DISK_S, "meanwhile": read(directory / "latest")}
    wait(training)
    training.engine.destroy()
    return found | {"latest": read(directory / "latest")}


# ---- loading ---------------------------------------------------------------------------------------------------------


def flip(tag: Path) -> None:
    path = next(tag.glob("*zero_pp_rank_1_*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(tag: Path) -> None:
    os.truncate(tag / "mp_rank_00_model_states.pt", 5000)


def delete(tag: Path) -> None:
    next(tag.glob("*zero_pp_rank_1_*optim_states.pt")).unlink()


def only_temporaries(tag: Path) -> None:
    (tag / "manifest.json").unlink()
    for path in list(tag.iterdir()):
        path.rename(tag / f".tmp-{path.name}-0123abcd-17-0123abcd0")


def empty(tag: Path) -> None:
    for path in list(tag.iterdir()):
        path.unlink()


def cut_manifest(tag: Path) -> None:
    os.truncate(tag / "manifest.json", 40)


DAMAGES = {damage.__name__: damage for damage in (flip, truncate, delete, only_temporaries, empty, cut_manifest)}


def damaged(case: Case, directory: Path) -> dict[str, Any]:
    training, found = started(case), {}
    for tag in ("one", "two"):
        expected = digest(training.state())
        training.save(str(directory), tag)
        training.advance()
    wait(training)
    for name, damage in DAMAGES.items():

        def ruin(name: str = name, damage: Callable[[Path], None] = damage) -> None:
            shutil.copytree(directory / "two", directory / name)
            damage(directory / name)
            (directory / "latest").write_text(name)

        on_rank_0(ruin)
        before = digest(training.state())
        found[name] = {"named": loads(training, directory, name, before)}
        found[name]["untouched"] = digest(training.state()) == before
        training.advance()
        found[name]["newest"] = loads(training, directory, None, expected)
        on_rank_0(lambda name=name: shutil.rmtree(directory / name))
    on_rank_0(lambda: (directory / "latest").write_text("nowhere"))
    found["missing directory"] = {"newest": loads(training, directory, None, expected)}
    on_rank_0(lambda: flip(directory / "two") or flip(directory / "one"))
    found["all of them"] = {"newest": loads(training, directory, None, expected)}
    training.engine.destroy()
    return found


def nothing_there(case: Case, directory: Path) -> dict[str, Any]:
    """By DeepSpeed's own engine, and by ours."""
    lazy.disable()
    stock = Training(case, build(case, None))
    directory.mkdir(exist_ok=True)
    ours, found = started(case), {}
    alone = directory / "alone"
    on_rank_0(lambda: alone.mkdir() or (alone / "latest").write_text("nowhere"))
    cases = {"no directory": (directory / "none", None), "empty directory": (directory, None)}
    cases |= {"missing tag": (directory, "nowhere"), "latest alone": (alone, None)}
    for name, (where, tag) in cases.items():
        found[name] = [
            ended(lambda t=training, w=where, tag=tag: t.engine.load_checkpoint(w, tag=tag)) for training in (stock, ours)
        ]
    return found


def ended(action: Callable[[], Any]) -> dict[str, Any]:
    returned: list[Any] = []
    error = error_of(lambda: returned.extend(action()))
    return {"error": error and error["type"], "returned": returned}


def of_stock(case: Case, directory: Path) -> dict[str, Any]:
    """What DeepSpeed's own engine has saved, then our own beside it, then its own again, by the same DeepSpeedEngine."""
    lazy.disable()
    training = Training(case, build(case, None))
    training.advance()
    expected = digest(training.state())
    training.save(str(directory), "stock")
    comm.barrier()
    training.advance()
    own = training.engine.checkpoint_engine
    lazy.attach(training.engine, lazy.ckpt.Options(**(SMALL | {"arena_bytes": "4MiB"})))
    found = {"by tag": loads(training, directory, "stock", expected)}
    training.advance()
    found["by latest"] = loads(training, directory, None, expected)
    training.advance()
    expected = digest(training.state())
    training.save(str(directory), "lazy")
    wait(training)
    training.engine.checkpoint_engine.cleanup()
    training.engine.checkpoint_engine = own
    training.advance()
    found["ours by stock"] = loads(training, directory, None, expected)
    training.engine.destroy()
    return found


# ---- processes of their own ------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Goes through everything."""


def leave(case: Case, directory: Path) -> dict[str, Any]:
    """Ends right after a save, in the way that the only tag names."""
    training = started(case)
    _native.set_fault("fallocate", delay_s=LATE_S)
    training.save(str(directory), "saved")
    training.advance()
    if case.tags[0] != "local":
        kept.append(training)
    if case.tags[0] == "exception":
        raise Interrupted
    if case.tags[0] == "exit":
        sys.exit(3)
    return {"at_return": read(directory / "latest")}


def on_nodes(case: Case, directory: Path) -> dict[str, Any]:
    """Each rank on a node of its own, whose working directory holds its checkpoints."""
    node = directory / f"node{comm.get_rank()}"
    node.mkdir(parents=True, exist_ok=True)
    os.chdir(node)
    torch.manual_seed(5)
    model = Network(case)
    config = configuration(case) | {
        "checkpoint": {"use_node_local_storage": True},
        "datastates_ckpt": SMALL | {"host_cache_size": 0.005} | case.options,
    }
    lazy.enable()
    training = Training(case, deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0])
    path = training.load("saved")
    found = {"path": path and Path(path).parent.name, "found": digest(training.state())}
    training.advance()
    if case.crash_point and comm.get_rank() == case.crash_rank:
        _native.set_crash_point(case.crash_point)
    found["saved"] = digest(training.state())
    found["refused"] = error_of(lambda: training.save("saved", case.tags[0]), meet=False)
    if found["refused"]:
        return found
    training.advance()
    found["wait"] = wait_error(training)
    training.engine.destroy()
    return found


MODES = (slow_rank, destroyed, load_at_once, failing, unpicklable, too_many_failures, deleted_in_flight, deleted_often, fence)
MODES += (own_retention,)
MODES += (damaged, nothing_there, of_stock, leave, on_nodes)
deepspeed_training.MODES.update({mode.__name__: mode for mode in MODES})

if __name__ == "__main__":
    import json

    deepspeed_training.main(json.loads(Path(sys.argv[1]).read_text()))

"""The user's program forks while saves are in flight: the child neither hangs nor disturbs, the parent's saves stand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from nursery import Ended, Nursery, shared_nursery
from support import patience, wait_until

import ckpt

Run = Callable[..., Ended]  # of pieces of a program

HEADER = f"""
import faulthandler, logging, os, signal, sys, threading, time
faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
signal.alarm({int(patience(50))})
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
import torch, ckpt
from ckpt import _native
from ckpt.errors import ForkedError
from ckpt.saving import inspection
directory = sys.argv[1]
options = ckpt.Options(arena_bytes="1MiB", chunk_bytes="64KiB", writers=2, eager_bytes="4KiB", drain_timeout_s=30)
weights = torch.arange(2000 * 256, dtype=torch.float32)

def fork(child):
    # Runs child() in a forked process; returns its exit code, a hang counts as -14.
    pid = os.fork()
    if pid == 0:
        signal.alarm({int(patience(20))})
        child()
        sys.exit(0)  # through the interpreter's whole end
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def refused(call):
    try:
        call()
    except ForkedError as error:
        assert "parent" in str(error), error
    else:
        raise AssertionError("the child was not refused", call)
"""

SLOW_SAVE = """
_native.set_fault("pwritev", delay_s=0.01)
checkpointer = ckpt.Checkpointer(directory, options=options)
pending = checkpointer.save(1, {"weights": weights}, lazy=True)
assert not pending.done()
"""

PARENT_ENDS_WELL = """
pending.result(120)
assert checkpointer.steps() == [1]
checkpointer.save(2, {"weights": weights + 1}).result(120)
checkpointer.close()
print("parent ends well")
"""

# Each way for a child to end, with the exit code that it must have.
ENDINGS = {
    "os._exit": ("os._exit(0)", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an error": ("raise ValueError('on purpose')", 1),
    "the end": ("pass", 0),
    "closing": ("checkpointer.close()", 0),
    "collecting": ("global checkpointer, pending; del checkpointer, pending; import gc; gc.collect()", 0),
}

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with shared_nursery() as nursery:
        yield nursery


@pytest.fixture
def run(nursery: Nursery, tmp_path: Path) -> Run:
    def run_to_success(*parts: str) -> Ended:
        done = nursery.run("".join([HEADER, *parts]), str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        for bad in ("terminate called", "Fatal Python error"):
            assert bad not in done.stderr, done.stderr
        return done

    return run_to_success


def assert_both_steps_are_good(directory: Path) -> None:
    for step in (1, 2):
        state = ckpt.load(directory / f"step-{step:012d}" / "state.pt")
        assert torch.equal(state["weights"], torch.arange(2000 * 256, dtype=torch.float32) + (step - 1))


@pytest.mark.parametrize("how", ENDINGS)
def test_a_child_ends_while_the_parent_saves(how: str, run: Run, tmp_path: Path) -> None:
    ending, code = ENDINGS[how]
    body = f"""
def child():
    {ending}

for _ in range(3):
    assert fork(child) == {code}
"""
    assert "parent ends well" in run(SLOW_SAVE, body, PARENT_ENDS_WELL).stdout
    assert_both_steps_are_good(tmp_path)


def test_a_child_does_not_keep_the_space_of_a_file_that_is_replaced(run: Run) -> None:
    """Forked with the outcome of the save, before the space is given back."""
    body = """
path = directory + "/a.pt"

def replaced():
    links = ("/proc/self/fd/" + number for number in os.listdir("/proc/self/fd"))
    return [link for link in links if os.path.islink(link) and os.readlink(link) == path + " (deleted)"]

def look(_):
    seen.append(len(replaced()))
    seen.append(fork(lambda: os._exit(len(replaced()))))
    told.set()

seen, told = [], threading.Event()
ckpt.save({"weights": weights}, path, options=options).result(120)
_native.set_fault("fdatasync", delay_s=60)
pending = ckpt.save({"weights": weights}, path, options=options)
pending.add_done_callback(look)
_native.clear_faults()
pending.result(120)
assert told.wait(120) and seen == [1, 0], seen
"""
    run(body)


def test_a_child_is_refused_what_belongs_to_its_parent(run: Run, tmp_path: Path) -> None:
    finished = """
finished = ckpt.save({"n": 1}, directory + "/finished.pt", options=options)
finished.result(120)
"""
    body = """
def child():
    for call in (
        lambda: checkpointer.save(9, {}), checkpointer.restore, checkpointer.wait,
        pending.result, pending.exception, lambda: pending.result(0.1),
        inspection.engine_of(checkpointer).fence, lambda: inspection.engine_of(checkpointer).in_flight,
    ):
        refused(call)
    assert not pending.done()
    assert finished.result(0).name == "finished.pt"

assert fork(child) == 0
"""
    assert "parent ends well" in run(finished, SLOW_SAVE, body, PARENT_ENDS_WELL).stdout
    assert_both_steps_are_good(tmp_path)


def test_a_child_makes_its_own_saves(run: Run, tmp_path: Path) -> None:
    body = """
def child():
    _native.clear_faults()
    ckpt.fence()
    ckpt.save({"weights": weights}, directory + "/child.pt", lazy=True, options=options).result(120)
    with ckpt.Checkpointer(directory + "/of-the-child", options=options) as own:
        own.save(5, {"weights": weights}).result(120)
        assert own.restore().step == 5
    ckpt.save({"weights": weights}, directory + "/unwaited.pt", options=options)

assert fork(child) == 0
for name in ("child.pt", "unwaited.pt", "of-the-child/step-000000000005/state.pt"):
    assert torch.equal(ckpt.load(directory + "/" + name)["weights"], weights), name
"""
    assert "parent ends well" in run(SLOW_SAVE, body, PARENT_ENDS_WELL).stdout
    assert_both_steps_are_good(tmp_path)


TRAIN = """
import multiprocessing

def train(directory, depth=0, fail=False):
    _native.set_fault("pwritev", delay_s=0.02)
    checkpointer = ckpt.Checkpointer(directory, options=options)
    checkpointer.save(1, {"weights": weights}).result(20)
    checkpointer.save(2, {"weights": weights}, lazy=True)
    ckpt.save({"weights": weights}, directory + "/single.pt", options=options)
    if depth:
        child = multiprocessing.get_context("fork").Process(target=train, args=(directory + "/deeper", depth - 1))
        child.start()
        child.join()
        assert child.exitcode == 0
    if fail:
        raise ValueError("on purpose")

def check(directory):
    assert ckpt.Checkpointer(directory, options=options).restore().step == 2
    assert torch.equal(ckpt.load(directory + "/single.pt")["weights"], weights)
"""


@pytest.mark.parametrize("parent", [SLOW_SAVE, ""], ids=["saves", "has_never_saved"])
def test_training_in_a_child_of_multiprocessing_is_drained_at_its_end(parent: str, run: Run, tmp_path: Path) -> None:
    body = """
fail = multiprocessing.get_context("fork").Process(target=train, args=(directory + "/failing",), kwargs={"fail": True})
for child, code in ((multiprocessing.get_context("fork").Process(target=train, args=(directory + "/own", 1)), 0), (fail, 1)):
    child.start()
    child.join()
    assert child.exitcode == code, child.exitcode
for name in ("/own", "/own/deeper", "/failing"):
    check(directory + name)
print("parent ends well")
"""
    assert "parent ends well" in run(TRAIN, parent, body).stdout


def test_training_in_a_pool_is_drained_at_its_end(run: Run, tmp_path: Path) -> None:
    body = """
with multiprocessing.get_context("fork").Pool(2) as pool:
    pool.map(train, [directory + "/a", directory + "/b"])
    pool.close()
    pool.join()
for name in ("/a", "/b"):
    check(directory + name)
print("parent ends well")
"""
    assert "parent ends well" in run(TRAIN, body).stdout


def test_a_child_may_change_its_copy_of_the_tensors(run: Run, tmp_path: Path) -> None:
    body = """
def child():
    weights.fill_(-1)
    ckpt.fence()

assert fork(child) == 0
"""
    assert "parent ends well" in run(SLOW_SAVE, body, PARENT_ENDS_WELL).stdout
    assert_both_steps_are_good(tmp_path)


def test_a_parent_may_change_its_tensors_after_the_fence_while_a_child_holds_a_copy(run: Run, tmp_path: Path) -> None:
    body = """
ready, go = os.pipe()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    os.read(ready, 1)
    os._exit(0 if torch.equal(weights, torch.arange(2000 * 256, dtype=torch.float32)) else 1)
ckpt.fence()
weights.fill_(-1)
os.write(go, b"x")
assert os.waitpid(pid, 0)[1] == 0
weights.copy_(torch.arange(2000 * 256, dtype=torch.float32))
"""
    assert "parent ends well" in run(SLOW_SAVE, body, PARENT_ENDS_WELL).stdout
    assert_both_steps_are_good(tmp_path)


def test_many_forks_at_any_moment(run: Run, tmp_path: Path) -> None:
    """Locks may be held by threads that the child does not have; what the child may call must not need them."""
    body = """
import random
moments = random.Random(5)
small = [torch.full((300,), float(n)) for n in range(200)]

def child():
    assert pending.done() in (True, False)
    assert pending.stats.save_s >= 0 and "PendingSave" in repr(pending)
    try:
        assert pending.captured in (True, False)
    except ForkedError:
        pass
    ckpt.fence()
    logging.getLogger("ckpt").error("from the child")
    if not pending.done():
        refused(pending.result)
    os._exit(0)

with ckpt.Checkpointer(directory, options=options, keep=2) as checkpointer:
    for step in range(120):
        pending = checkpointer.save(step, {"small": small, "weights": weights[: 256 * moments.randrange(1, 400)]}, lazy=True)
        if moments.random() < 0.5:
            deadline = time.monotonic() + moments.uniform(0, 0.006)
            while time.monotonic() < deadline:
                pass
        assert fork(child) == 0, step
        if step % 3 == 0:
            ckpt.fence()
print("parent ends well")
"""
    assert "parent ends well" in run(body).stdout
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        found = checkpointer.restore()
    assert found is not None and found.step == 119


def test_a_fork_from_another_thread(run: Run, tmp_path: Path) -> None:
    body = """
codes = []
thread = threading.Thread(target=lambda: codes.append(fork(lambda: os._exit(0))))
thread.start()
thread.join(120)
assert codes == [0]
"""
    assert "parent ends well" in run(SLOW_SAVE, body, PARENT_ENDS_WELL).stdout
    assert_both_steps_are_good(tmp_path)


def test_a_child_of_a_child(run: Run, tmp_path: Path) -> None:
    body = """
def grandchild():
    refused(checkpointer.wait)
    ckpt.save({"n": 2}, directory + "/grandchild.pt", options=options).result(120)

def child():
    _native.clear_faults()
    own = ckpt.save({"n": 1}, directory + "/child.pt", options=options)
    assert fork(grandchild) == 0
    own.result(120)

assert fork(child) == 0
assert [ckpt.load(directory + name)["n"] for name in ("/child.pt", "/grandchild.pt")] == [1, 2]
"""
    assert "parent ends well" in run(SLOW_SAVE, body, PARENT_ENDS_WELL).stdout


def test_workers_of_a_data_loader(run: Run, tmp_path: Path) -> None:
    body = """
_native.set_fault("pwritev", delay_s=0.001)
model = torch.nn.Linear(512, 512)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
data = torch.utils.data.TensorDataset(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)))
with ckpt.Checkpointer(directory, options=options, keep=1) as checkpointer:
    step = 0
    for epoch in range(4):
        loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="fork")
        for (batch,) in loader:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpointer.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            step += 1
        checkpointer.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    checkpointer.wait()
    found = checkpointer.restore()
assert found.step == step == 32
assert torch.equal(found.state["model"]["weight"], model.weight)
print("parent ends well")
"""
    done = run(body)
    assert "parent ends well" in done.stdout
    assert "ERROR" not in done.stderr, done.stderr


def test_processes_of_multiprocessing(run: Run, tmp_path: Path) -> None:
    body = """
import multiprocessing
context = multiprocessing.get_context("fork")

def work(number):
    ckpt.save({"n": number}, f"{directory}/{number}.pt", options=options).result(120)
    return number * 2

with context.Pool(2) as pool:
    assert pool.map(work, range(4)) == [0, 2, 4, 6]
process = context.Process(target=work, args=(9,))
process.start()
process.join(120)
assert process.exitcode == 0
assert sorted(ckpt.load(f"{directory}/{number}.pt")["n"] for number in (0, 1, 2, 3, 9)) == [0, 1, 2, 3, 9]
"""
    slow_save = SLOW_SAVE.replace('"pwritev"', '"pwritev", "step-"')
    assert "parent ends well" in run(slow_save, body, PARENT_ENDS_WELL).stdout
    assert_both_steps_are_good(tmp_path)


CHILDREN = {
    "returns": ("pass", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "raises": ("raise ValueError('on purpose')", 1),
    "a child of its own": ("inner = context.Process(target=nested); inner.start(); inner.join(); assert not inner.exitcode", 0),
    "a plain fork": ("assert fork(nested) == 0", 0),
}


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_what_a_child_of_multiprocessing_saved_last_is_drained(method: str, tmp_path: Path) -> None:
    """Of a program of its own, because the last two start new interpreters, which import it."""
    program = tmp_path / "program.py"
    body = f"""
def work():
    _native.set_fault("pwritev", delay_s=0.01)
    ckpt.save({{"weights": weights}}, directory + "/file.pt", lazy=True, options=options)
    ckpt.Checkpointer(directory, options=options).save(7, {{"weights": weights}}, lazy=True)

if __name__ == "__main__":
    import multiprocessing
    process = multiprocessing.get_context("{method}").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
"""
    program.write_text(HEADER + body)
    command = [sys.executable, str(program), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(ckpt.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "file.pt", tmp_path / "step-000000000007" / "state.pt"):
        assert torch.equal(ckpt.load(path)["weights"], torch.arange(2000 * 256, dtype=torch.float32))
    assert (tmp_path / "step-000000000007" / "manifest.json").exists()


@pytest.mark.parametrize("how", CHILDREN)
def test_a_forked_child_of_a_saving_parent_drains_however_it_ends(how: str, run: Run, tmp_path: Path) -> None:
    ending, code = CHILDREN[how]
    body = f"""
import multiprocessing
context = multiprocessing.get_context("fork")

def save(name):
    _native.clear_faults()
    _native.set_fault("pwritev", "/" + name, delay_s=0.01)
    ckpt.save({{"weights": weights}}, directory + "/" + name, lazy=True, options=options)

def nested():
    save("nested.pt")

def work():
    save("child.pt")
    {ending}

process = context.Process(target=work)
process.start()
process.join()
assert process.exitcode == {code}, process.exitcode
"""
    assert "parent ends well" in run(SLOW_SAVE, body, PARENT_ENDS_WELL).stdout
    assert_both_steps_are_good(tmp_path)
    names = ["child.pt", "nested.pt"] if "nested" in ending else ["child.pt"]
    for name in names:
        assert torch.equal(ckpt.load(tmp_path / name)["weights"], torch.arange(2000 * 256, dtype=torch.float32))


def test_the_parent_ends_before_the_child(run: Run, tmp_path: Path) -> None:
    """The child, alone by then, still ends in good order."""
    body = """
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    while os.getppid() == parent:
        time.sleep(0.01)
    sys.exit(0)
print("child", pid)
"""
    done = run("import os; parent = os.getpid()\n", SLOW_SAVE, body, PARENT_ENDS_WELL)
    assert "parent ends well" in done.stdout
    assert_both_steps_are_good(tmp_path)
    child = int(done.stdout.split()[1])
    wait_until(lambda: not psutil.pid_exists(child), 10, "the end of the child")

"""How bytes leave devices with device_lazy="auto": up when they have been found right, down when they have not."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import logging
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from device_training import Training, cuda, fake_library, state, training
from places import ROOT
from support import DEADLINE_S, assert_same, wait_until
from test_ranks_apart import Threaded, Wire

import ckpt
from ckpt import device_modes
from ckpt import devices as torch_devices
from ckpt.errors import CaptureError

__all__ = ["cuda", "fake_library", "training"]

fence = importlib.import_module("ckpt.fence")  # as an attribute of ckpt it is the function
SPOILT = 0xEE
SLOW_S = 0.02  # for each copy to be enqueued
SMALL: dict[str, Any] = {"arena_bytes": "1MiB", "chunk_bytes": "64KiB"}


@pytest.fixture(autouse=True)
def races_of_the_check(request: pytest.FixtureRequest) -> None:
    """A device is tried out without the waits, too: see csrc/cuda/self_check.h."""
    if "training" in request.fixturenames:
        request.getfixturevalue("cuda").excused.append("cuMemsetD8Async")


def expect_race(training: Training) -> None:
    """Of a kernel that nothing holds back, with the copies."""
    training.cuda.excused.append("a kernel")


def save(training: Training, path: Path, value: float = 1.0, **how: Any) -> ckpt.SaveStats:
    """One that is right, although kernels overwrite all of it behind the fence."""
    current, expected = state(value), state(value)
    pending = ckpt.save(current, path, lazy=True, options=support.options(**how))
    ckpt.fence()
    for tensor in current.values():
        if isinstance(tensor, torch.Tensor):
            training.fill(tensor, SPOILT)
    assert_same(expected, torch.load(pending.result(DEADLINE_S)))
    training.synchronize()
    return pending.stats


def test_a_device_goes_up_once_it_has_shown_that_it_is_right(
    training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ckpt")
    found = [save(training, tmp_path / "a.pt", float(number)) for number in range(5)]
    assert [stats.device_mode for stats in found] == ["ordered"] * 3 + ["lazy"] * 2
    reasons = [stats.device_mode_reason for stats in found]
    assert reasons[0] == "it has not been tried out yet"
    assert "it has passed its check" in reasons[1] and reasons[3:] == ["", ""]
    assert all(0 < stats.probed_bytes <= stats.bytes_from_devices for stats in found)
    assert len([record for record in caplog.records if "saved lazily" in record.message]) == 1


def test_kinds_of_devices_that_are_known_go_up_at_once(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_modes, "KNOWN", {training.platform_of(0)})
    assert [save(training, tmp_path / "a.pt").device_mode for _ in range(3)] == ["ordered", "lazy", "lazy"]


@pytest.mark.parametrize(("wish", "mode"), [(True, "lazy"), (False, "host")])
def test_who_knows_better_says_so(training: Training, tmp_path: Path, wish: bool, mode: str) -> None:
    current = state()
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=True, options=support.options(device_lazy=wish))
    pending.result(DEADLINE_S)
    stats = pending.stats
    assert stats.device_mode == (mode if wish else None)  # torch copies: to the engine there is no device
    assert training.cuda.count("cuLaunchHostFunc") == 0, "it is not tried out"


@pytest.mark.parametrize(("order", "verdict"), [("without waits", "failed"), ("one queue", "inconclusive")])
def test_a_device_that_does_not_pass(
    training: Training, tmp_path: Path, order: str, verdict: str, caplog: pytest.LogCaptureFixture
) -> None:
    training.cuda.set_order(order)
    current = state()
    ckpt.save(current, tmp_path / "a.pt", options=support.options()).result(DEADLINE_S)
    training.cuda.set_order("right")
    tried = training.cuda.count("cuLaunchHostFunc")
    found = [save(training, tmp_path / "a.pt") for _ in range(4)]
    assert {stats.device_mode for stats in found} == {"ordered"}
    assert all(f"its check was {verdict}" in stats.device_mode_reason for stats in found)
    assert training.cuda.count("cuLaunchHostFunc") - tried <= 3, "it is tried out once; the rest are sums"
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len([each for each in warnings if f"the verdict is {verdict}" in each]) == 1


def test_a_device_that_cannot_be_used(training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training.driver = str(tmp_path / "libcuda.so.1")
    for number in range(3):
        current = state(float(number))
        pending = ckpt.save(current, tmp_path / "a.pt", options=support.options())
        assert_same(current, torch.load(pending.result(DEADLINE_S)))
    assert pending.stats.device_mode == "host" and "libcuda" in pending.stats.device_mode_reason
    assert len([record for record in caplog.records if "inside save(), and wait for that" in record.message]) == 1


def test_with_true_that_is_an_error(training: Training, tmp_path: Path) -> None:
    training.driver = str(tmp_path / "libcuda.so.1")
    with pytest.raises(ckpt.errors.DeviceError, match="libcuda"):
        ckpt.save(state(), tmp_path / "a.pt", options=support.options(device_lazy=True))


def test_several_devices_go_by_the_lowest(training: Training, tmp_path: Path) -> None:
    for _ in range(4):
        save(training, tmp_path / "a.pt")
    places = {}
    training.on = lambda storage: places.get(storage.data_ptr(), 0)
    both = {"first": torch.ones(60_000), "second": torch.zeros(60_000)}
    places[both["second"].data_ptr()] = 1
    pending = ckpt.save(both, tmp_path / "b.pt", lazy=True, options=support.options())
    pending.result(DEADLINE_S)
    assert pending.stats.device_mode == "ordered"


# ---- a step that nothing holds back ----------------------------------------------------------------------------------


class Filling(torch.optim.Optimizer):
    """Its step fills its parameter by a kernel of the current stream; so does a replay, which calls nothing of ours."""

    def __init__(self, training: Training, elements: int = 400_000) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(elements))], {})
        self.training, self.value = training, 1

    @property
    def weights(self) -> torch.Tensor:
        return self.param_groups[0]["params"][0].detach()

    def step(self, closure: Any = None) -> None:
        if not self.training.is_capturing():
            self.replay()

    def replay(self) -> None:
        self.training.fill(self.weights, self.value)


def go_up(training: Training, path: Path) -> None:
    for _ in range(4):
        mode = save(training, path).device_mode
    assert mode == "lazy"


def fails(pending: ckpt.PendingSave) -> None:
    error = pending.exception(DEADLINE_S)
    assert isinstance(error, CaptureError), error
    assert "tensor second (float32" in str(error) and "on CUDA device 0, is not in the file" in str(error)
    assert not pending.path.exists() or pending.path.stat().st_size == 0


@pytest.mark.parametrize("mended", [True, False])
def test_a_second_stream_that_is_not_put_in_order(
    mended: bool, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step seals the save; the second, on another stream, comes while copies are still going on."""
    go_up(training, tmp_path / "before.pt")
    pair = [Filling(training, 1000), Filling(training)]
    for each in pair:
        each.step()
        each.value = SPOILT
    training.synchronize()
    first, second = training.streams[0], training.cuda.stream(0)
    names = {"first": pair[0].weights, "second": pair[1].weights}
    expected = {name: tensor.clone() for name, tensor in names.items()}
    training.cuda.delay("cuMemcpyDtoHAsync", SLOW_S)  # the lane's; those of probes came first
    pending = ckpt.save(names, tmp_path / "a.pt", options=support.options(chunk_bytes="64KiB"))
    training.synchronize()
    training.cuda.hold_copies(True)
    pair[0].step()
    if not mended:
        expect_race(training)
        monkeypatch.setattr(fence, "_still_fetched", list)
    training.streams[0] = second
    pair[1].step()
    training.cuda.synchronize(0, second) if not mended else time.sleep(0.02)
    training.cuda.hold_copies(False)
    training.cuda.delay("cuMemcpyDtoHAsync", 0)
    if mended:
        assert_same(expected, torch.load(pending.result(DEADLINE_S)))
    else:
        fails(pending)
        assert device_modes.mode_of([0], "auto")[0] == "ordered"
    for stream in (first, second):
        training.cuda.synchronize(0, stream)


@pytest.mark.parametrize("mended", [True, False])
def test_a_step_that_a_graph_replays(mended: bool, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_up(training, tmp_path / "before.pt")
    if not mended:
        expect_race(training)
        monkeypatch.setattr(fence, "_note_capture", lambda optimizer: None)
    learner = Filling(training)
    learner.step()
    training.cuda.set_capturing(0, training.streams[0], True)
    learner.step()
    training.cuda.set_capturing(0, training.streams[0], False)
    training.synchronize()
    learner.value = SPOILT
    expected = learner.weights.clone()
    training.cuda.delay("cuMemcpyDtoHAsync", SLOW_S)
    training.cuda.hold_copies(not mended)  # then the lane's are behind it for certain, but for those that fill the arena
    pending = ckpt.save(
        {"first": torch.ones(10), "second": learner.weights}, tmp_path / "a.pt", options=support.options(**SMALL)
    )
    learner.replay()
    training.cuda.hold_copies(False)
    training.synchronize()
    training.cuda.delay("cuMemcpyDtoHAsync", 0)
    if mended:
        assert_same(expected, torch.load(pending.result(DEADLINE_S))["second"])
    else:
        fails(pending)
    training.synchronize()


def test_down_to_the_host(training: Training, tmp_path: Path) -> None:
    """What the caller's own stream copies can be written to by a stream that waits for nothing, too."""
    current = {"first": torch.ones(10), "second": torch.zeros(900_000)}
    other = training.cuda.stream(0)
    save(training, tmp_path / "before.pt")
    expect_race(training)
    before = training.cuda.count("copies that ended")
    training.cuda.delay("cuMemcpyDtoHAsync", SLOW_S)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        saving = pool.submit(ckpt.save, current, tmp_path / "a.pt", options=support.options(**SMALL))
        wait_until(lambda: training.cuda.count("copies that ended") > before + 16, what="the probes")
        training.cuda.fill(0, other, current["second"].data_ptr(), SPOILT, 3_600_000)
        training.cuda.synchronize(0, other)
        training.cuda.delay("cuMemcpyDtoHAsync", 0)
        fails(saving.result(DEADLINE_S))
    assert device_modes.mode_of([0], "auto")[0] == "host"
    current = state()
    pending = ckpt.save(current, tmp_path / "b.pt", options=support.options())
    pending.result(DEADLINE_S)
    assert pending.stats.device_mode == "host" and "had other bytes" in pending.stats.device_mode_reason


def test_sums_see_what_probes_miss(training: Training, tmp_path: Path) -> None:
    """One byte of a state of which sixteen parts are probed."""
    expect_race(training)
    current = {"first": torch.zeros(10), "second": torch.zeros(8 << 20, dtype=torch.uint8)}
    found = []
    for number in range(8):
        training.cuda.delay("cuMemcpyDtoHAsync", SLOW_S / 4)
        pending = ckpt.save(current, tmp_path / f"{number}.pt", lazy=True, options=support.options(**SMALL))
        mode = pending.stats.device_mode
        at = random.randrange(6 << 20, 8 << 20)
        if mode == "lazy":
            training.cuda.fill(0, training.streams[0], current["second"].data_ptr() + at, SPOILT, 1)
        training.cuda.delay("cuMemcpyDtoHAsync", 0)
        ckpt.fence()
        if mode == "lazy":
            found.append(pending.exception(DEADLINE_S))
            break
        pending.result(DEADLINE_S)
    assert isinstance(found[0], CaptureError) and "is not in the file" in str(found[0])


@pytest.mark.parametrize("low", [0, 8, 2, 5])
@pytest.mark.parametrize("nbytes", [1, 7, 8, 4096, 100_003])
def test_the_sum_that_a_device_finds(low: int, nbytes: int) -> None:
    content = torch.randint(0, 256, (nbytes + low,), dtype=torch.uint8)
    words = [bytes(content[at : at + 8].tolist()).ljust(8, b"\0") for at in range(low, nbytes + low, 8)]
    expected = sum(int.from_bytes(word, "little") for word in words) % (1 << 64)
    assert int(torch_devices.word_sum(content.untyped_storage(), low, nbytes)) % (1 << 64) == expected


def test_the_table_of_known_devices() -> None:
    """What docs/compatibility.md says is what is done."""
    text = (ROOT / "docs" / "compatibility.md").read_text()
    rows = re.findall(r"^\| (\d+\.\d+) \| (\d+) \| \d{4}-\d\d-\d\d \| \S", text, re.MULTILINE)
    assert {(capability, int(major)) for capability, major in rows} == device_modes.KNOWN
    assert "GPUs on which saving in the background" in text


# ---- what a save has of several files, of several ranks, and when it may not be looked at -----------------------------


def test_ranks_that_write_a_file_together_go_up_too(training: Training, tmp_path: Path) -> None:
    """Each sums up what it writes, and compares the records of which it writes all."""
    wire = Wire()
    checkpointers = []
    for rank in range(2):
        made = ckpt.Checkpointer(tmp_path, options=support.options(**SMALL), coordinator=Threaded(wire, rank))
        checkpointers.append(made)
    current = state()

    def save_all(rank: int) -> list[str | None]:
        found = []
        for step in range(1, 6):
            pending = checkpointers[rank].save(step, replicated=current, lazy=True)
            pending.result(DEADLINE_S)
            found.append(pending.stats.device_mode)
        return found

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        modes = list(pool.map(save_all, range(2)))
        list(pool.map(lambda rank: checkpointers[rank].close(), range(2)))
    assert modes[0][0] == modes[1][0] == "ordered" and modes[0][-1] == modes[1][-1] == "lazy", modes


def test_a_save_of_several_files_is_one_proof(training: Training, tmp_path: Path) -> None:
    modes = []
    with ckpt.BundleCheckpointer(options=support.options(), coordinator="local") as checkpointer:
        for number in range(5):
            bundle = checkpointer.begin(tmp_path, f"bundle-{number}")
            for part in range(4):
                bundle.save(state(float(part)), bundle.directory / f"{part}.pt", lazy=True)
            pending = bundle.commit()
            pending.result(DEADLINE_S)
            modes.append(pending.stats.device_mode)
    assert modes == ["ordered"] * 3 + ["lazy"] * 2


def test_a_save_that_a_capture_refuses_puts_nothing_into_the_graph(training: Training, tmp_path: Path) -> None:
    training.cuda.set_capturing(0, training.streams[0], True)
    before = training.cuda.count("cuLaunchHostFunc")
    with pytest.raises(ckpt.errors.DeviceError, match="captured into a graph"):
        ckpt.save(state(), tmp_path / "a.pt", options=support.options())
    assert training.cuda.count("cuLaunchHostFunc") == before
    training.cuda.set_capturing(0, training.streams[0], False)


def test_a_copy_that_is_refused_is_an_error_and_no_reason_to_begin_again(training: Training, tmp_path: Path) -> None:
    """What the first attempt has written to the file and to the arena is still on its way."""
    save(training, tmp_path / "before.pt")
    training.cuda.fail("cuMemcpyDtoHAsync", skip=18, code=2)
    with contextlib.suppress(ckpt.errors.DeviceError):
        pending = ckpt.save(state(), tmp_path / "a.pt", options=support.options())
        assert isinstance(pending.exception(DEADLINE_S), ckpt.errors.DeviceError)
    assert device_modes.mode_of([0], "auto")[0] == "ordered"
    save(training, tmp_path / "a.pt")


def test_an_interrupt_while_a_device_is_tried_out(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save is on its way, and ends; its files are nobody's leftovers."""

    def interrupted(device: int) -> None:
        raise KeyboardInterrupt

    with ckpt.Checkpointer(tmp_path, options=support.options(), coordinator="local") as checkpointer:
        monkeypatch.setattr(training, "synchronize_stream", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(1, state(), lazy=True)
        monkeypatch.undo()
        monkeypatch.setattr(torch_devices, "in_use", training)
        ckpt.fence()
        checkpointer.wait(DEADLINE_S)
        assert checkpointer.steps() == [1]


def test_a_device_whose_training_has_failed_is_not_tried_out(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is the training's error, which it will meet by itself; the save has its own outcome."""

    def broken(device: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(training, "synchronize_stream", broken, raising=False)
    assert save(training, tmp_path / "a.pt").device_mode == "ordered"
    assert "an illegal memory access" in save(training, tmp_path / "a.pt").device_mode_reason

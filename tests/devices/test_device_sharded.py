"""Sharded states on devices: many archives in a file, of records that leave from devices and from the host."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support
import torch
import torch.distributed as td
import torch.distributed.checkpoint as stock
from device_training import Training, cuda, fake_library, training
from support import DEADLINE_S, assert_same
from test_ranks_apart import Threaded, Wire
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import ckpt
from ckpt import device_modes
from ckpt.dcp import DcpCheckpointer
from ckpt.devices import HOST
from ckpt.errors import CaptureError, DeviceError
from ckpt.integrations import dcp

__all__ = ["cuda", "fake_library", "training"]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

SPOILT = 0xEE
SMALL: dict[str, Any] = {"arena_bytes": "1MiB", "chunk_bytes": "64KiB"}
Begin = Callable[[Any], ckpt.PendingSave]  # a save of this state


def options(**how: Any) -> ckpt.Options:
    return support.options(**({"device_lazy": True} | how))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of one rank, on which a shard is the whole."""
    td.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('meeting')}/file", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    td.destroy_process_group()


class State:
    """A sharded state of which some lies on either device and some on the host, and what it was before kernels wrote to it."""

    def __init__(self, training: Training, mesh: Any, value: float, count: int = 12) -> None:
        self.training = training
        self.places: dict[int, int] = {}
        self.tensors: list[tuple[torch.Tensor, int]] = []
        kinds = itertools.cycle([(0,), (1,), (HOST,), (0,)])
        sizes = itertools.cycle([40_000, 7, 90_001, 0, 1, 300])
        sharded = {str(number): self._make(next(sizes), value + number, next(kinds)[0]) for number in range(count)}
        placements = itertools.cycle([[Shard(0)], [Replicate()]])
        model = {key: DTensor.from_local(tensor, mesh, next(placements)) for key, tensor in sharded.items()}
        plain = {str(number): self._make(next(sizes), -value - number, next(kinds)[0]) for number in range(count)}
        both = self._make(5000, value, 0)
        views = {"head": both[:2000], "tail": both[1000:], "transposed": both.view(50, 100).t(), "scalar": both[7]}
        self.state = {"model": model, "plain": plain, "views": views, "step": value, "notes": ["a", {"b": value}]}
        self.expected = copy_of(self.state)

    def _make(self, size: int, value: float, device: int) -> torch.Tensor:
        tensor = torch.full((size,), value)
        self.places[tensor.data_ptr()] = device
        self.tensors.append((tensor, device))
        return tensor

    def on(self, storage: Any) -> int:
        return self.places.get(storage.data_ptr(), HOST)

    def spoil(self, host: bool) -> None:
        """What kernels write from now on, and what the host does."""
        for tensor, device in self.tensors:
            if device == HOST and host:
                tensor.fill_(SPOILT)
            elif device != HOST and len(tensor):
                self.training.fill(tensor, SPOILT, device)

    def assert_saved(self, path: Path) -> None:
        self.training.synchronize()
        found = zeros_like(self.expected)
        stock.load(found, checkpoint_id=str(path), no_dist=True)
        assert_same(self.expected, found)
        again = zeros_like(self.expected)
        dcp.load(again, checkpoint_id=path, no_dist=True)
        assert_same(self.expected, again)


def copy_of(value: Any) -> Any:
    """In full, and in memory of its own."""
    if isinstance(value, DTensor):
        return value.to_local().clone()
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copy_of(item) for key, item in value.items()}
    return [copy_of(item) for item in value] if isinstance(value, list) else value


def zeros_like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: zeros_like(item) for key, item in value.items()}
    return [zeros_like(item) for item in value] if isinstance(value, list) else type(value)()


@pytest.fixture(params=["steps", "directories"])
def begin(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Begin]]:
    """Makes what saves, of either kind."""
    with contextlib.ExitStack() as ending:

        def make(**how: Any) -> Begin:
            numbers = itertools.count(1)
            if request.param == "steps":
                steps = ending.enter_context(
                    ckpt.Checkpointer(tmp_path, keep=None, options=options(**how), coordinator="local")
                )
                return lambda state: steps.save(next(numbers), sharded=state, lazy=True)
            checkpointer = ending.enter_context(DcpCheckpointer(options=options(**how), alone=True))
            return lambda state: checkpointer.save(tmp_path / str(next(numbers)), state, lazy=True)

        yield make


@pytest.mark.parametrize("cache", [0, "8MiB"])
@pytest.mark.parametrize("seed", range(3))
def test_what_computes_after_the_fence_never_reaches_the_file(
    seed: int, cache: int | str, training: Training, mesh: Any, begin: Callable[..., Begin]
) -> None:
    training.cuda.configure(seed=seed, most_delay_s=0.003)
    save = begin(**SMALL, device_cache=cache)
    saved = []
    for number in range(4):
        made = State(training, mesh, float(number + 1))
        training.on = made.on
        pending = save(made.state)
        ckpt.fence()
        assert pending.captured
        made.spoil(host=True)
        saved.append((made, pending))
    for made, pending in saved:
        path = pending.result(DEADLINE_S)
        on_devices = sum(tensor.nbytes for tensor, device in made.tensors if device != HOST)
        of_views = 8_000 + 16_000 + 20_000 + 4  # of the memory that they share each has its own part
        assert pending.stats.bytes_from_devices == on_devices - 20_000 + of_views
        assert pending.stats.device_mode == "lazy"
        assert 0 < pending.stats.probed_bytes <= pending.stats.bytes_from_devices
        made.assert_saved(path)


def test_eager_tensors_are_in_order_with_the_stream(training: Training, mesh: Any, tmp_path: Path) -> None:
    training.cuda.configure(seed=3, most_delay_s=0.01)
    made = State(training, mesh, 1.0)
    training.on = made.on
    with DcpCheckpointer(options=options(**SMALL), alone=True) as checkpointer:
        pending = checkpointer.save(tmp_path / "id", made.state, lazy=False)
        made.spoil(host=True)
        made.assert_saved(pending.result(DEADLINE_S))


def test_a_fence_returns_while_copies_are_going_on(training: Training, mesh: Any, begin: Callable[..., Begin]) -> None:
    save = begin(arena_bytes="8MiB")
    before = State(training, mesh, 1.0)
    training.on = before.on
    before.assert_saved(save(before.state).result(DEADLINE_S))
    training.cuda.hold_copies(True)
    made = State(training, mesh, 2.0)
    training.on = made.on
    pending = save(made.state)
    ckpt.fence()
    assert pending.captured and not pending.done()
    made.spoil(host=True)
    training.cuda.hold_copies(False)
    made.assert_saved(pending.result(DEADLINE_S))


@pytest.mark.parametrize(
    ("wish", "modes"), [(True, ["lazy"] * 5), (False, [None] * 5), ("auto", ["ordered"] * 3 + ["lazy"] * 2)]
)
def test_how_they_leave(
    wish: bool | str, modes: list[str | None], training: Training, mesh: Any, begin: Callable[..., Begin]
) -> None:
    """With "auto" each record of each archive is compared by its sum, until the device has shown that it is right."""
    training.cuda.excused.append("cuMemsetD8Async")  # of the check: see csrc/cuda/self_check.h
    save = begin(device_lazy=wish, **SMALL)
    found = []
    for number in range(5):
        made = State(training, mesh, float(number + 1))
        training.on = made.on
        pending = save(made.state)
        ckpt.fence()
        made.spoil(host=True)
        made.assert_saved(pending.result(DEADLINE_S))
        found.append(pending.stats.device_mode)
        assert (pending.stats.bytes_from_devices > 0) == bool(wish)
    assert found == modes


def test_sums_find_one_byte_in_one_of_many_archives(training: Training, mesh: Any, begin: Callable[..., Begin]) -> None:
    """Which names the tensor; the checkpoint before stands."""
    training.cuda.excused += ["cuMemsetD8Async", "race"]
    save = begin(device_lazy="auto", **SMALL)
    for _ in range(3):
        state = {str(number): torch.zeros(1 << 20, dtype=torch.uint8) for number in range(8)}
        training.on = lambda _: 0
        pending = save(state)
        ckpt.fence()
        path = pending.result(DEADLINE_S)
    assert device_modes.mode_of([0], "auto")[0] == "lazy"
    training.cuda.delay("cuMemcpyDtoHAsync", 0.005)
    state = {str(number): torch.zeros(1 << 20, dtype=torch.uint8) for number in range(8)}
    pending = save(state)
    training.cuda.fill(0, training.streams[0], state["6"].data_ptr() + random.randrange(1 << 20), SPOILT, 1)
    training.cuda.delay("cuMemcpyDtoHAsync", 0)
    ckpt.fence()
    error = pending.exception(DEADLINE_S)
    assert isinstance(error, CaptureError) and "tensor 6 (uint8" in str(error), error
    assert not pending.path.exists() or not (pending.path / ".metadata").exists()
    training.synchronize()
    assert (path / ".metadata").exists()
    save({"a": torch.ones(5)}).result(DEADLINE_S)


def test_probes_find_what_is_written_before_the_fence(training: Training, mesh: Any, begin: Callable[..., Begin]) -> None:
    training.cuda.excused.append("race")
    save = begin(**SMALL)
    state = {str(number): torch.zeros(300_000) for number in range(4)}
    training.on = lambda _: 0
    save(state).result(DEADLINE_S)
    training.cuda.delay("cuMemcpyDtoHAsync", 0.02)
    pending = save(state)
    training.fill(state["3"], SPOILT)
    training.cuda.delay("cuMemcpyDtoHAsync", 0)
    ckpt.fence()
    error = pending.exception(DEADLINE_S)
    assert isinstance(error, CaptureError) and "tensor 3 (float32" in str(error), error
    training.synchronize()
    save({"a": torch.ones(5)}).result(DEADLINE_S)


@pytest.mark.parametrize("skip", [0, 5, 30])
@pytest.mark.parametrize("late", [True, False])
def test_a_copy_that_fails_fails_that_save_only(late: bool, skip: int, training: Training, mesh: Any, tmp_path: Path) -> None:
    """The id that it was to replace is whole, and may be saved again. To a strict driver the device has ended."""
    if training.cuda.is_strict and late:
        pytest.skip("no save from this device goes through any more")
    made = [State(training, mesh, float(number)) for number in range(3)]
    training.on = lambda storage: max(each.on(storage) for each in made)
    with DcpCheckpointer(options=options(**SMALL), alone=True) as checkpointer:
        checkpointer.save(tmp_path / "id", made[0].state, lazy=True).result(DEADLINE_S)
        training.cuda.fail("cuMemcpyDtoHAsync", skip=skip, late=late, **({} if late else {"code": 2}))
        try:
            error = checkpointer.save(tmp_path / "id", made[1].state, lazy=True).exception(DEADLINE_S)
        except DeviceError as raised:
            error = raised
        assert isinstance(error, DeviceError), error
        ckpt.fence()
        made[0].assert_saved(tmp_path / "id")
        assert len(list((tmp_path / "id").glob("__*.distcp"))) == 1
        checkpointer.save(tmp_path / "id", made[2].state, lazy=True).result(DEADLINE_S)
        made[2].assert_saved(tmp_path / "id")


# ---- optimizers ------------------------------------------------------------------------------------------------------


class Filling(torch.optim.Optimizer):
    """Step number n fills DTensors of parameters and of state with bytes n, when the stream of their device comes to it."""

    def __init__(self, training: Training, mesh: Any) -> None:
        self.training, self.steps, self.places = training, 0, dict[int, int]()
        parameters = [torch.nn.Parameter(self._make(mesh, number)) for number in range(8)]
        super().__init__(parameters, {})
        for number, parameter in enumerate(parameters):
            self.state[parameter] = {"momentum": self._make(mesh, number)}
        training.on = lambda storage: self.places.get(storage.data_ptr(), HOST)

    def _make(self, mesh: Any, number: int) -> DTensor:
        local = torch.zeros(30_000 + number)
        self.places[local.data_ptr()] = number % 2
        return DTensor.from_local(local, mesh, [Shard(0)])

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for local in self.tensors():
            self.training.fill(local, self.steps, self.places[local.data_ptr()])

    def tensors(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [each.to_local() for parameter, its in self.state.items() for each in (parameter, its["momentum"])]

    def sharded(self) -> dict[str, Any]:
        learned = [{"weight": parameter, **its} for parameter, its in self.state.items()]
        return {"learned": learned, "steps": self.steps}


def assert_filled(path: Path, value: int) -> None:
    found = {
        "learned": [{name: torch.zeros(30_000 + number) for name in ("weight", "momentum")} for number in range(8)],
        "steps": 0,
    }
    stock.load(found, checkpoint_id=str(path), no_dist=True)
    bytes_found = {
        byte for each in found["learned"] for tensor in each.values() for byte in tensor.view(torch.uint8).unique().tolist()
    }
    assert (bytes_found, found["steps"]) == ({value}, value)


@pytest.mark.parametrize("way", ["ours", "parts"])
@pytest.mark.parametrize("cache", [0, "8MiB"])
def test_async_saves_hold_back_each_step(cache: int | str, way: str, training: Training, mesh: Any, tmp_path: Path) -> None:
    """By ckpt.integrations.dcp, and where torch plans on another thread: an id that is saved again, and one for each step."""
    training.cuda.configure(seed=2, most_delay_s=0.002)
    optimizer, uploads = Filling(training, mesh), []
    how = options(**SMALL, device_cache=cache)
    dcp.configure(how)
    for number in range(1, 7):
        optimizer.step()
        target = str(tmp_path / ("again" if number % 2 else str(number)))
        if way == "ours":
            uploads.append(dcp.async_save(optimizer.sharded(), checkpoint_id=target, no_dist=True).upload_completion)
            continue
        uploads = [upload for upload in uploads if upload.exception(DEADLINE_S) is None]  # torch has one at a time
        more = {"storage_writer": dcp.LazyStorageWriter(target, how), "async_stager": dcp.LazyStager(how)}
        found: Any = stock.async_save(optimizer.sharded(), no_dist=True, **more)
        uploads.append(found.upload_completion)
    optimizer.step()
    for upload in uploads:
        upload.result(DEADLINE_S)
    training.synchronize()
    for name, value in {"again": 5, "2": 2, "4": 4, "6": 6}.items():
        assert_filled(tmp_path / name, value)
    dcp.close()


# ---- several ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [0, "8MiB"])
def test_ranks_write_what_is_theirs_from_their_devices(cache: int | str, training: Training, mesh: Any, tmp_path: Path) -> None:
    """Of what is the same on both each writes a part, from a device of its own."""
    training.cuda.configure(seed=5, most_delay_s=0.003)
    wire, held = Wire(), list[torch.Tensor]()
    places: dict[int, int] = {}
    training.on = lambda storage: places.get(storage.data_ptr(), HOST)
    checkpointers = [
        ckpt.Checkpointer(tmp_path, keep=None, options=options(**SMALL, device_cache=cache), coordinator=Threaded(wire, rank))
        for rank in range(2)
    ]

    def save(rank: int, step: int) -> ckpt.PendingSave:
        state = {str(number): torch.full((40_000 + number,), float(step * 100 + number)) for number in range(10)}
        places.update({tensor.data_ptr(): rank for tensor in state.values()})
        held.extend(state.values())
        pending = checkpointers[rank].save(step, sharded=state, lazy=True)
        ckpt.fence()
        assert pending.captured
        for tensor in state.values():
            training.fill(tensor, SPOILT, rank)
        return pending

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        saves = [list(pool.map(save, range(2), [step] * 2)) for step in range(1, 4)]
        for step, pair in enumerate(saves, start=1):
            path = pair[0].result(DEADLINE_S)
            assert all(pending.stats.bytes_from_devices > 700_000 for pending in pair)
            found = {str(number): torch.zeros(40_000 + number) for number in range(10)}
            stock.load(found, checkpoint_id=str(path), no_dist=True)
            assert [tensor.unique().tolist() for tensor in found.values()] == [[float(step * 100 + n)] for n in range(10)]
        training.synchronize()
        list(pool.map(lambda rank: checkpointers[rank].close(), range(2)))

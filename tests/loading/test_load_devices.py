"""Loading to devices, on machines that have none: straight there, in the order of their streams, or else as torch would."""

from __future__ import annotations

import io
import logging
import os
import pickle
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from device_training import Training, cuda, fake_library, training
from states import STATES
from support import DEADLINE_S, assert_same
from support import options as host_options
from test_load_into import mixed_state, network, train, zeros_like
from test_restore_into import common, file_of, flip, own

import ckpt
from ckpt import devices as torch_devices
from ckpt.devices import HOST
from ckpt.errors import CheckpointError, CorruptError, MismatchError
from ckpt.loading import archive, device_placement

__all__ = ["cuda", "fake_library", "training"]

NOT_SUPPORTED = 801


def layers(value: float = 1.0) -> dict[str, Any]:
    """Both sides of what is worth a read of its own, and more than fits into the buffers of all threads at once."""
    large = {f"layer {number}": torch.randn(1_500_000 + number) + value for number in range(3)}
    small = {f"bias {number}": torch.full((number % 60 + 1,), value + number) for number in range(2000)}
    return large | small | {"step": 3}


def torch_saved(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


def carried(training: Training) -> int:
    """Copies to devices."""
    return training.cuda.count("cuMemcpyHtoDAsync")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cuda:1", torch.device("cuda:1"), {"cpu": "cuda:1"}], ids=str)
@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_goes_where_map_location_says(where: Any, writer: str, training: Training, tmp_path: Path) -> None:
    training.cuda.configure(seed=1, most_delay_s=0.0005)
    state, path = layers(), tmp_path / "state.pt"
    if writer == "ours":
        ckpt.save(state, path, options=host_options()).result(DEADLINE_S)
    else:
        torch.save(state, path)
    found = ckpt.load(path, map_location=where)
    assert_same(state, found)
    assert {training.placed(tensor) for tensor in tensors_of(found)} == {1}
    assert training.cuda.count("pageable copies") == 0
    assert carried(training) < 2100, "few more than there are tensors: none twice"


def test_loads_make_no_batches(training: Training, tmp_path: Path) -> None:
    """By which drivers are known to crash."""
    path = torch_saved(layers(), tmp_path / "state.pt")
    ckpt.load(path, map_location="cuda:0")
    assert training.cuda.count("cuMemcpyBatchAsync") == 0 and carried(training) > 2000


def test_goes_where_it_was_saved(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": torch.randn(300_000), "b": torch.randn(70_000), "c": torch.arange(9)}
    tags = {state["a"].data_ptr(): "cuda:1", state["b"].data_ptr(): "cuda:0"}
    registry = torch.serialization._package_registry
    mine = (0, lambda storage: tags.get(storage.data_ptr()), lambda storage, location: None)
    monkeypatch.setattr(torch.serialization, "_package_registry", [mine, *registry])
    path = torch_saved(state, tmp_path / "state.pt")
    monkeypatch.setattr(torch.serialization, "_package_registry", registry)
    for where, places in ((None, [1, 0, None]), ({"cuda:1": "cuda:0"}, [0, 0, None]), ({"cuda:0": "cpu"}, [1, None, None])):
        found = ckpt.load(path, map_location=where)
        assert_same(state, found)
        assert [training.placed(found[name]) for name in "abc"] == places


@pytest.mark.parametrize("name", STATES)
def test_every_state(name: str, training: Training, tmp_path: Path) -> None:
    try:
        torch.save(STATES[name](), tmp_path / "state.pt")
    except Exception:
        pytest.skip("torch.save refuses this state")
    expected = torch.load(tmp_path / "state.pt", weights_only=False)
    try:
        found = ckpt.load(tmp_path / "state.pt", map_location="cuda:0", weights_only=False)
    except RuntimeError as error:
        # Of a device that is one, torch is given the name of the place, and not a function.
        assert "Callable map_location not supported" in str(error)
        return
    assert_same(expected, found)


def test_keys_go_there_alone(training: Training, tmp_path: Path) -> None:
    state = {"a": torch.randn(300_000), "b": torch.randn(200_000)}
    found = ckpt.load(torch_saved(state, tmp_path / "state.pt"), "cuda:1", keys="b")
    assert_same({"b": state["b"]}, found)
    assert [(storage.nbytes(), device) for storage, device in training.given] == [(800_000, 1)]


def test_a_function_is_given_host_memory(training: Training, tmp_path: Path) -> None:
    state = layers()
    assert_same(state, ckpt.load(torch_saved(state, tmp_path / "state.pt"), lambda storage, location: storage))
    assert not training.given and not carried(training)


def test_bytes_of_another_order_are_swapped_on_the_host(training: Training, tmp_path: Path) -> None:
    state = {"a": torch.randn(1000)}
    torch.save(state, tmp_path / "state.pt")
    with zipfile.ZipFile(tmp_path / "state.pt") as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("byteorder"):
                content = b"big"
            elif name.endswith("data/0"):
                content = bytes(torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 4).flip(1).flatten().tolist())
            new.writestr(name, content)
    with pytest.raises(Exception, match=r"cuda|CUDA"):  # by torch: there is no device that it knows
        ckpt.load(tmp_path / "big.pt", map_location="cuda:0")
    assert not training.given
    assert_same(state, ckpt.load(tmp_path / "big.pt"))


def test_memory_beside_it_is_bounded(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two buffers for each thread, and none of the size of the state on the host."""
    path = torch_saved(layers(), tmp_path / "state.pt")
    made: list[int] = []
    allocate = archive.allocate
    monkeypatch.setattr(archive, "allocate", lambda nbytes, *at, **how: made.append(nbytes) or allocate(nbytes, *at, **how))
    ckpt.load(path, map_location="cuda:0")
    assert max(made) < 1 << 20, "the pickle"
    assert 0 < training.cuda.count("cuMemHostRegister") <= 2 * archive.reader_threads()


def test_a_device_without_memory_is_left_to_torch(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch_saved(layers(), tmp_path / "state.pt")

    asked: list[int] = []

    def refuse(nbytes: int, device: int) -> Any:
        asked.append(nbytes)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(training, "allocate", refuse)
    with pytest.raises(Exception, match="CUDA"):  # what torch says, which sees no device here
        ckpt.load(path, map_location="cuda:0")
    assert asked and not carried(training)


HUGE_MEMO = b"\x80\x02N" + pickle.LONG_BINPUT + b"\xff\xff\xff\xff" + pickle.BINUNICODE + b"\x04\x00\x00\x00cuda."
HUGE_BUFFER = b"\x80\x05" + pickle.BYTEARRAY8 + (1 << 40).to_bytes(8, "little") + b"cuda."


def place(content: bytes, map_location: Any = None) -> dict[str, int]:
    small = {"data.pkl": content, "byteorder": b"little"}
    return device_placement.devices_of(["data/0"], lambda: small, map_location)


def named(key: Any, location: Any) -> bytes:
    """A pickle that names one storage."""

    class Naming(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", None, key, location, 3) if obj is place else None

    stream = io.BytesIO()
    Naming(stream, 2).dump(["cuda", place])
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"cuda", b"\x80\x02", pickle.dumps({"cuda": [1, {2}, (3,), object]}, 2), HUGE_MEMO, HUGE_BUFFER]
    + [named("0", location) for location in ("cuda:x", "cuda:1:2", ["cuda"], 3)]
    + [named(["0"], "cuda:1")],
)
def test_pickles_that_are_not_understood_place_nothing(content: bytes, training: Training) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert place(content) == place(content, {"cuda:7": "cpu"}) == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_pickles_that_are_understood_place_what_they_name(training: Training) -> None:
    assert place(named("0", "cuda:1")) == place(named("0", "cpu"), {"cpu": "cuda:1"}) == {"data/0": 1}
    assert place(named("0", "cpu")) == place(named("0", "cuda:1"), {"cuda:1": "cpu"}) == {}


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_looking_for_places_runs_no_code(tmp_path: Path) -> None:
    assert place(pickle.dumps(["cuda", Runs(f"touch {tmp_path / 'ran'}")], 2)) == {}
    assert not os.listdir(tmp_path)


def test_a_shape_that_reaches_beyond_its_record_is_damage(training: Training, tmp_path: Path) -> None:
    """Memory of a device can be resized: torch would make it larger, and leave what is new as it finds it."""
    path = torch_saved({"a": torch.ones(40_000)}, tmp_path / "state.pt")
    content = path.read_bytes()
    shape, larger = b"K\x00M\x40\x9c\x85", b"K\x00M\x41\x9c\x85"  # an offset, and a tuple of one
    assert content.count(shape) == 1
    forged = tmp_path / "forged.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(forged, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(shape, larger))
    with pytest.raises(CheckpointError):
        ckpt.load(forged, map_location="cuda:0")


def test_a_load_to_the_host_asks_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has asked cannot fork one that computes on devices."""

    def ask(*_: Any) -> Any:
        raise AssertionError("the driver was asked")

    state = {"a": torch.randn(300_000)}
    path = torch_saved(state, tmp_path / "state.pt")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for name in ("is_available", "device_count", "current_device", "current_stream", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, ask)
    target = zeros_like(state)
    ckpt.load_into(path, target)
    for where in (None, "cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda storage, location: storage):
        assert_same(state, ckpt.load(path, where))
    with ckpt.Checkpointer(tmp_path / "steps", options=host_options()) as checkpointer:
        checkpointer.save(1, state).result(DEADLINE_S)
        found = checkpointer.restore()
        assert found is not None and checkpointer.restore(into=target) is not None
    assert_same(state, found.state)
    assert_same(state, target)


def test_devices_are_those_that_torch_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    names = ("cpu", "cuda:0", "cuda:1", "cuda", "cuda:2", "meta", "xpu:0")
    assert [torch_devices.index_named(name) for name in names] == [HOST, 0, 1, 1, HOST, HOST, HOST]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_devices.index_named("cuda:0") == HOST


# ---- into what is there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_fills_tensors_on_devices(seed: int, training: Training, tmp_path: Path) -> None:
    """Behind what computes on them: a kernel that was launched before must not write over what was loaded."""
    training.cuda.configure(seed=seed, most_delay_s=0.02)
    state = mixed_state() | {"more": torch.randn(2_000_000), "on the host": torch.randn(200_000)}
    ckpt.save(state, tmp_path / "state.pt", options=host_options()).result(DEADLINE_S)
    target = zeros_like(state)
    target["turned"] = torch.zeros(500, 300)  # laid out otherwise than in the file
    devices = {target[name].data_ptr(): number for name, number in (("large", 0), ("more", 1), ("half", 1), ("turned", 0))}
    training.on = lambda storage: devices.get(storage.data_ptr(), HOST)
    for name in ("large", "more", "half"):
        training.fill(target[name], 0xEE, devices[target[name].data_ptr()])
    version = target["more"]._version
    ckpt.load_into(tmp_path / "state.pt", target)
    state["turned"] = state["turned"].contiguous()
    assert_same(state, target)
    assert target["more"]._version > version
    assert carried(training) > 0 and training.cuda.count("pageable copies") == 0
    training.synchronize()
    assert_same(state, target)


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_modules_and_optimizers(stepped: bool, training: Training, tmp_path: Path) -> None:
    model, optimizer = network()
    train(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    training.on = lambda storage: HOST
    ckpt.save(state, tmp_path / "state.pt", options=host_options()).result(DEADLINE_S)
    other_model, other_optimizer = network()
    if stepped:
        train(other_model, other_optimizer, 1)
    parameters = {parameter.data_ptr() for parameter in other_model.parameters()}
    training.on = lambda storage: 1 if storage.data_ptr() in parameters else HOST
    ckpt.load_into(tmp_path / "state.pt", {"model": other_model, "optimizer": other_optimizer})
    for parameter, found in other_optimizer.state.items():
        for name, part in found.items():
            on_device = training.placed(part) == 1
            assert on_device == (not stepped and name != "step" and parameter.numel() > 0), name
    training.on = lambda storage: HOST
    train(model, optimizer)
    train(other_model, other_optimizer)
    assert_same(model.state_dict(), other_model.state_dict())
    assert_same(optimizer.state_dict(), other_optimizer.state_dict())


class Sharing(torch.optim.SGD):
    """Its state holds a tensor twice: by itself, and in a list; and one of another dtype."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                seen = torch.full_like(parameter, 3.0)
                self.state[parameter] = {"seen": seen, "history": [seen], "wide": seen.double(), "step": torch.tensor(1.0)}


def test_state_that_is_shared_is_read_where_all_of_it_finds_it(training: Training, tmp_path: Path) -> None:
    training.on = lambda storage: HOST
    model = torch.nn.Linear(300, 300)
    optimizer = Sharing(model.parameters())
    optimizer.step()
    ckpt.save(optimizer.state_dict(), tmp_path / "state.pt", options=host_options()).result(DEADLINE_S)
    other = Sharing(torch.nn.Linear(300, 300).parameters())
    training.on = lambda storage: 1
    ckpt.load_into(tmp_path / "state.pt", other)
    assert_same(torch.load(tmp_path / "state.pt"), other.state_dict())
    assert not training.given


def test_parameters_without_memory_are_told(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    bare = torch.nn.Linear(3, 3, device="meta")
    with pytest.raises(MismatchError, match="no memory"):
        ckpt.load_into(tmp_path / "state.pt", {"model": bare, "optimizer": torch.optim.Adam(bare.parameters())})
    for names in (("model", "optimizer"), ("optimizer", "model")):
        lazy = torch.nn.LazyLinear(3)
        parts = {"model": lazy, "optimizer": (other := torch.optim.Adam(lazy.parameters()))}
        ckpt.load_into(tmp_path / "state.pt", {name: parts[name] for name in names})  # gets its memory by load_state_dict()
        assert_same(dict(model.state_dict()), dict(lazy.state_dict()))
        assert_same(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_whatever_the_default_device_is(device: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(30, 30)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(30)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = torch.optim.Adam(torch.nn.Linear(30, 30).parameters())
    with torch.device(device):
        ckpt.load_into(tmp_path / "state.pt", other)
    assert_same(optimizer.state_dict(), other.state_dict())


def test_restore_reads_every_byte_once(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[Path, int] = {}
    close = archive.Archive.close

    def spy(self: archive.Archive) -> None:
        read[self.path] = self.bytes_read
        close(self)

    training.on = lambda storage: HOST
    with ckpt.Checkpointer(tmp_path, options=host_options()) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, own(step), replicated=common(step)).result(DEADLINE_S)
        monkeypatch.setattr(archive.Archive, "close", spy)
        target, replicated = zeros_like(own(1)), zeros_like(common(1))
        devices = {target["large"].data_ptr(): 0, replicated["weights"].data_ptr(): 1}
        training.on = lambda storage: devices.get(storage.data_ptr(), HOST)
        found = checkpointer.restore(into=target, replicated_into=replicated)
        assert found is not None and found.step == 2
        assert_same([own(2), common(2)], [target, replicated])
        assert carried(training) > 0
        weights = file_of(tmp_path, 2, "replicated")
        again = read[weights] - weights.stat().st_size
        assert again < replicated["weights"].nbytes / 2, "the directory and the pickle, which are read first"
        flip(weights, weights.stat().st_size // 2)
        found = checkpointer.restore(into=target, replicated_into=replicated)
        assert found is not None and found.step == 1
        assert_same([own(1), common(1)], [target, replicated])
        fresh = checkpointer.restore(map_location="cuda:1")
        assert fresh is not None
        assert_same([own(1), common(1)], [fresh.state, fresh.replicated])
        assert training.placed(fresh.replicated["weights"]) == 1


def test_damage_is_found(training: Training, tmp_path: Path) -> None:
    path = torch_saved(layers(), tmp_path / "state.pt")
    flip(path, path.stat().st_size // 2)
    with pytest.raises(CorruptError, match="CRC-32"):
        ckpt.load(path, map_location="cuda:0")

"""Without a name of torch's that is not public, or with one that has come to mean something else, values are the same."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import states
import support
import torch
from places import PYTHONPATH

import ckpt
from ckpt import torch_private
from ckpt.errors import CheckpointError, CorruptError
from ckpt.integrations.torch import CheckpointCallback
from ckpt.loading import skeleton, unpickle
from ckpt.plan import pickler

LOADING = ["serialization._load", "_weights_only_unpickler", "noted"]
SAVING = ["_utils._rebuild_tensor_v2", "_utils._rebuild_tensor_v3", "_utils._rebuild_parameter", "_backward_hooks"]
OTHERS = ["_cdata", "_cdata, storages anew", "_version"]
UNNAMED = ["unnamed _rebuild_tensor_v2", "unnamed _rebuild_parameter"]
CHANGED = ["load without sharing", "load with another signature", "load that trusts", "pickles otherwise"]
CACHED = (
    torch_private.rebuilding,
    torch_private._has_addresses,
    torch_private._has_versions,
    torch_private._storages_last,
    unpickle.private_loader,
    unpickle.can_serve,
    pickler.short_way,
)


def forget() -> None:
    for each in CACHED:
        each.cache_clear()
    torch_private._warned.clear()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process in which nothing has been looked up yet; what is taken away is given back afterwards."""
    forget()
    with monkeypatch.context() as patch:
        yield patch
    forget()
    torch_private.inform_core()


def take_away(patch: pytest.MonkeyPatch, name: str) -> None:
    """What looking up gives in a torch without it. Torch itself needs all of them, so they stay where they are."""
    hidden = {"noted": ["_utils._get_sparse_tensors_to_validate", "_utils._sparse_tensors_to_validate"]}.get(name, [name])
    found = torch_private.find
    patch.setattr(torch_private, "find", lambda path: None if path in hidden else found(path))
    if name.startswith("_cdata"):
        patch.setattr(torch_private, "_has_addresses", lambda: False)
    if name == "_cdata, storages anew":
        patch.setattr(torch_private, "_storages_last", lambda: False)
    if name == "_version":
        patch.setattr(torch_private, "_has_versions", lambda: False)
    if name == "_backward_hooks":
        patch.setattr(pickler, "has_hooks", lambda tensor: tensor._no_such_thing)
    patch.setattr(pickler, "rebuild", torch_private.rebuilding())
    patch.setattr(pickler, "state_pickler", pickler.make_state_pickler())
    torch_private.inform_core()


def change(patch: pytest.MonkeyPatch, how: str) -> None:
    right = torch.serialization._load

    def copying(reader: Any, *arguments: Any, **options: Any) -> Any:
        loaded = right(reader, *arguments, **options)
        return {key: part.clone() if isinstance(part, torch.Tensor) else part for key, part in loaded.items()}

    def other(reader: Any, *, location: Any) -> Any:
        raise AssertionError("nobody can call this by what it was before")

    def trusting(reader: Any, location: Any, module: Any, **options: Any) -> Any:
        import pickle

        return right(reader, location, pickle, **{name: value for name, value in options.items() if name != "weights_only"})

    def reduce(self: Any, tensor: torch.Tensor) -> Any:
        return torch.Tensor.clone, (tensor.detach(),)

    if how in UNNAMED:
        name, lookup = f"_utils.{how.split()[1]}", torch_private.find
        patch.setattr(torch_private, "find", lambda path: (lambda *given: None) if path == name else lookup(path))
        patch.setattr(pickler, "rebuild", torch_private.rebuilding())
        patch.setattr(pickler, "state_pickler", pickler.make_state_pickler())
        return
    loads = {"load without sharing": copying, "load with another signature": other, "load that trusts": trusting}
    found = torch_private.find
    if how in loads:
        patch.setattr(torch_private, "find", lambda path: loads[how] if path == "serialization._load" else found(path))
    else:
        patch.setattr(pickler.StorageTable, "reduce", reduce)


@pytest.fixture(params=[*LOADING, *SAVING, *OTHERS, *CHANGED, *UNNAMED])
def other_torch(request: pytest.FixtureRequest, fresh: pytest.MonkeyPatch) -> str:
    if request.param in CHANGED + UNNAMED:
        change(fresh, request.param)
    else:
        take_away(fresh, request.param)
    return str(request.param)


def state() -> dict[str, Any]:
    """Plain tensors, views, shared ones, bytes of every length, a sparse one, an optimizer's."""
    base = torch.randn(1000, 7)
    tiny = {str(count): torch.arange(count, dtype=torch.uint8) for count in range(12)}
    tied = states.tied()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are new
        sparse = torch.eye(50).to_sparse_csr()
    return {"base": base, "view": base[3:500], "tiny": tiny, "tied": tied, "step": 7, "half": base.bfloat16(), "sparse": sparse,
            "optimizer": states.trained(torch.optim.Adam), "parameter": torch.nn.Parameter(base[:2].clone())}  # fmt: skip


def saved(path: Path, value: Any) -> Path:
    ckpt.save(value, path, options=support.options()).result()
    return path


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [True, False])
def test_saved_and_loaded(other_torch: str, weights_only: bool, tmp_path: Path) -> None:
    before = state()
    path = saved(tmp_path / "state.pt", before)
    support.assert_same(before, ckpt.load(path, weights_only=weights_only))
    support.assert_same(before, torch.load(path, weights_only=weights_only))
    torch.save(before, tmp_path / "theirs.pt")
    support.assert_same(before, ckpt.load(tmp_path / "theirs.pt", weights_only=weights_only))


def test_states_of_all_kinds(other_torch: str, tmp_path: Path) -> None:
    for name, make in states.ALL_STATES.items():
        torch.manual_seed(1)
        before = make()
        path = saved(tmp_path / "state.pt", before)
        support.assert_same(torch.load(path, weights_only=False), ckpt.load(path, weights_only=False))
        assert name


def test_parts_of_a_file(other_torch: str, tmp_path: Path) -> None:
    before = state()
    path = saved(tmp_path / "state.pt", before)
    for keys in ("view", "tiny.*", "step", "sparse", "optimizer.*", "tied"):
        key = keys.removesuffix(".*")
        for weights_only in (True, False):
            found = ckpt.load(path, keys=keys, weights_only=weights_only)
            support.assert_same({key: before[key]}, found)


def test_locations(other_torch: str, tmp_path: Path) -> None:
    before = {"a": torch.randn(5), "b": torch.arange(3)}
    path = saved(tmp_path / "state.pt", before)
    for where in (
        "cpu",
        torch.device("cpu"),
        {"cpu": "cpu"},
        lambda storage, location: storage,
        lambda storage, location: None,
    ):
        support.assert_same(before, ckpt.load(path, map_location=where))
    assert all(part.is_meta and part.shape == before[key].shape for key, part in ckpt.load(path, map_location="meta").items())


def test_into_what_is_there(other_torch: str, tmp_path: Path) -> None:
    before = {name: part for name, part in state().items() if name not in ("sparse", "optimizer", "tied")}
    path = saved(tmp_path / "state.pt", before)
    target = {
        name: torch.zeros_like(part)
        if isinstance(part, torch.Tensor)
        else {key: torch.zeros_like(x) for key, x in part.items()}
        for name, part in before.items()
        if name != "step"
    } | {"step": 0}
    places = {name: part.data_ptr() for name, part in target.items() if isinstance(part, torch.Tensor)}
    ckpt.load_into(path, target)
    for name, part in before.items():
        support.assert_same(part.detach() if name == "parameter" else part, target[name])
    assert places == {name: part.data_ptr() for name, part in target.items() if isinstance(part, torch.Tensor)}


@pytest.mark.parametrize("weights_only", [True, False])
def test_restored(other_torch: str, weights_only: bool, tmp_path: Path) -> None:
    before = {"model": states.Net().state_dict(), "step": 3, "more": torch.arange(4)}
    with ckpt.Checkpointer(tmp_path, options=support.options()) as checkpointer:
        checkpointer.save(3, before).result()
        found = checkpointer.restore(weights_only=weights_only)
        assert found is not None and found.step == 3
        support.assert_same(before, found.state)
        target = {"model": states.Net().state_dict(), "step": 0, "more": torch.zeros(4, dtype=torch.int64)}
        again = checkpointer.restore(into=target, weights_only=weights_only)
    assert again is not None and again.step == 3
    support.assert_same(before, target)


def train(directory: Path, steps: int, resume: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer, int]:
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with CheckpointCallback(directory, model=model, optimizer=optimizer, options=support.options()) as callback:
        start = (callback.resume() or 0) if resume else 0
        for _ in range(steps):
            torch.manual_seed(start)
            model(torch.randn(8, 40)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if steps:
            callback.save(start + steps).result()
    return model, optimizer, start


def test_resumed(other_torch: str, tmp_path: Path) -> None:
    model, optimizer, _ = train(tmp_path, 3, resume=False)
    resumed, optimizer_resumed, start = train(tmp_path, 0, resume=True)
    assert start == 3
    support.assert_same(model.state_dict(), resumed.state_dict())
    support.assert_same(optimizer.state_dict(), optimizer_resumed.state_dict())


# ---- what else stays so ----------------------------------------------------------------------------------------------


def test_one_warning_names_the_tested_versions(other_torch: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch_private._warned.clear()
    with caplog.at_level(logging.WARNING, "ckpt"):
        torch_private.inform_core()
        for _ in range(3):
            ckpt.load(saved(tmp_path / "state.pt", {"a": torch.ones(3)}))
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == 1 and torch_private.TESTED in found[0] and torch.__version__ in found[0]


class Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._made = function, arguments

    def __reduce__(self) -> Any:
        return self._made


@pytest.mark.parametrize("name", [*LOADING, "load that trusts"])
def test_weights_only_refuses_code_all_the_same(name: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (take_away if name in LOADING else change)(fresh, name)
    torch.save([Calls((tmp_path / "called").touch)], tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="weights_only=False, which can run any code"):
        ckpt.load(tmp_path / "state.pt")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("name", LOADING)
def test_damage_is_found_all_the_same(name: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take_away(fresh, name)
    path = saved(tmp_path / "state.pt", {"a": torch.full((1000,), 3.0)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((9,), 3.0).numpy().tobytes()) + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="data/0"):
        ckpt.load(path)


def test_not_even_a_served_file(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch.load reads the path, and what needs the places of records says so."""
    take_away(fresh, "serialization._load")
    for module in (unpickle, skeleton):
        fresh.setattr(module, "can_serve", lambda: False)
    before = state()
    path = saved(tmp_path / "state.pt", before)
    support.assert_same(before, ckpt.load(path))
    support.assert_same({"view": before["view"]}, ckpt.load(path, keys="view"))
    with pytest.raises(CheckpointError, match=r"use load\(\)"):
        ckpt.load_into(path, {"base": torch.zeros(1000, 7)}, strict=False)
    train(tmp_path / "run", 2, resume=False)
    assert train(tmp_path / "run", 0, resume=True)[2] == 2


RANK = """
import sys, torch.distributed as dist
from ckpt import torch_private
from ckpt.coordinator import make_coordinator
from support import standard_output_for_answers
answers = standard_output_for_answers()
found = torch_private.find
torch_private.find = lambda path: None if path.endswith("_get_default_store") else found(path)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
coordinator = make_coordinator("auto")
word = coordinator.broadcast("key", b"word" if rank == 0 else None, 60)
print(coordinator.name, word, file=answers)
dist.barrier()
coordinator.close()
"""


def test_ranks_agree_without_the_store_of_torch(tmp_path: Path) -> None:
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "met")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    ended = [rank.communicate(timeout=support.DEADLINE_S * 2) for rank in ranks]
    assert [output for output, _ in ended] == ["torch b'word'\n"] * 2, ended


def test_classes_of_storages_are_those_of_torch() -> None:
    named = torch.storage._dtype_to_storage_type_map()
    assert named == torch_private.STORAGE_CLASSES
    assert set(torch_private.NEWER_DTYPES) == torch.storage._new_dtypes()


def test_storages_of_one_dtype_by_public_methods(fresh: pytest.MonkeyPatch) -> None:
    class Storage:
        dtype = torch.int16

        def __init__(self, storage: torch.UntypedStorage) -> None:
            self._bytes = storage

        def untyped(self) -> torch.UntypedStorage:
            return self._bytes

    storage = torch.arange(5, dtype=torch.int16).untyped_storage()
    assert torch_private.parts_of(Storage(storage)) == (storage, "ShortStorage", 5)  # type: ignore[arg-type]

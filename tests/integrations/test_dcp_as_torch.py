"""ckpt.integrations.dcp beside torch.distributed.checkpoint: the same calls have the same results, and the same errors."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from states import STATES
from support import DEADLINE_S, assert_same, options

import ckpt
from ckpt.errors import CorruptError
from ckpt.integrations import dcp

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:Detected an existing", "ignore:.*deprecated"),
]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    dcp.configure(options(commit_timeout_s=DEADLINE_S))
    yield
    with contextlib.suppress(ckpt.CheckpointError):
        dcp.close()


def outcome(act: Callable[[], Any]) -> Any:
    """What it returns; or what is raised, and why."""
    try:
        return act()
    except BaseException as error:  # as torch's own is
        causes = getattr(error, "failures", None) or {0: (error,)}
        return type(error).__name__, {rank: str(each[0]) for rank, each in causes.items()}


def test_its_response_is_a_future_as_that_of_torch(tmp_path: Path) -> None:
    """By default torch returns that alone."""
    state, told = {"weight": torch.arange(4.0)}, []
    responses = [each.async_save(state, checkpoint_id=str(tmp_path / each.__name__)) for each in (dcp, stock)]
    for response in responses:
        found: Any = response.result(DEADLINE_S)
        assert isinstance(found, stock.Metadata) and response.result() is found
        assert response.done() and response.exception() is None
        assert not response.cancel() and not response.cancelled() and not response.running()
        response.add_done_callback(told.append)
    assert len(told) == 2 and all(each.done() for each in told)


def test_what_it_does_not_have_is_that_of_torch() -> None:
    assert dcp.FileSystemReader is stock.FileSystemReader and dcp.DefaultLoadPlanner is stock.DefaultLoadPlanner
    with pytest.raises(AttributeError, match=r"neither .* has 'no_such_name'"):
        _ = dcp.no_such_name


def saved_by(save: Any, state: Any, path: Path) -> Any:
    """What `.metadata` says, but where each item lies."""
    metadata = save(state, checkpoint_id=str(path))
    return metadata.state_dict_metadata, metadata.planner_data


def blank(value: Any) -> Any:
    """A place of the same form for what is to be loaded."""
    if isinstance(value, torch.Tensor):
        try:
            return torch.zeros(value.shape, dtype=value.dtype)
        except Exception:  # of dtypes that have no zero
            return torch.empty(value.shape, dtype=value.dtype)
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    return [blank(item) for item in value] if type(value) is list else None


def loaded(load: Any, target: Any, path: Path) -> Any:
    load(target, checkpoint_id=str(path))
    return target


@pytest.mark.parametrize("name", STATES)
def test_states_of_all_kinds(name: str, tmp_path: Path) -> None:
    """Where torch saves one, we do, and all readers find the same; where torch refuses it, so do we, or it can be loaded."""
    state = {"state": STATES[name](), "number": 7}
    theirs, ours = (
        outcome(functools.partial(saved_by, save, state, tmp_path / str(save is dcp.save))) for save in (stock.save, dcp.save)
    )
    if type(theirs[0]) is str and type(ours[0]) is str:
        assert ours[0] == theirs[0]
        return
    found = [
        outcome(functools.partial(loaded, load, blank(state), tmp_path / str(is_ours)))
        for load in (stock.load, dcp.load) for is_ours in (True, False)
        if is_ours or type(theirs[0]) is not str
    ]  # fmt: skip
    for each in found[1:]:
        assert_same(found[0], each)


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "jagged", "meta"])
@pytest.mark.parametrize("way", ["ours", "parts", "steps"])
def test_what_no_reader_of_torch_loads_is_not_saved(way: str, layout: str, tmp_path: Path) -> None:
    tensors = {
        "sparse_coo": lambda: torch.eye(4).to_sparse(),
        "sparse_csr": lambda: torch.eye(4).to_sparse_csr(),
        "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "meta": lambda: torch.ones(4, device="meta"),
    }
    state = {"a": torch.ones(2), "b": tensors[layout]()}
    with pytest.raises(BaseException) as found:
        if way == "ours":
            dcp.save(state, checkpoint_id=tmp_path / "id")
        elif way == "parts":
            stock.save(state, storage_writer=dcp.LazyStorageWriter(tmp_path / "id", options()))
        else:
            with ckpt.Checkpointer(tmp_path, options=options(), coordinator="local") as checkpointer:
                checkpointer.save(1, sharded=state)
    assert isinstance(found.value, ValueError if way == "steps" else stock.api.CheckpointException)
    assert not list(tmp_path.rglob(".metadata"))


@pytest.mark.parametrize(
    "target",
    [
        {"a": torch.zeros(4, 5)},
        {"a": torch.zeros(2, 4)},
        {"a": torch.zeros(4, 4), "missing": torch.zeros(2)},
        {"a": torch.zeros(4, 4)},
        {"a": torch.zeros(4, 4, dtype=torch.float64)},
        {"a": 3},
        {"n": torch.zeros(())},
        {"m": {"w": torch.zeros(3), "x": 5}},
        {"m": {}},
        {},
    ],
    ids=[
        "shape",
        "smaller",
        "missing",
        "fewer",
        "dtype",
        "value-for-tensor",
        "tensor-for-value",
        "missing-inside",
        "inside",
        "none",
    ],
)
def test_targets_that_do_not_fit(target: dict[str, Any], tmp_path: Path) -> None:
    state = {"a": torch.arange(16.0).view(4, 4), "n": 3, "m": {"w": torch.ones(3)}}
    for save in (stock.save, dcp.save):
        save(state, checkpoint_id=str(tmp_path / str(save is dcp.save)))
    found = [
        outcome(functools.partial(loaded, load, copy.deepcopy(target), tmp_path / str(is_ours)))
        for load in (stock.load, dcp.load)
        for is_ours in (True, False)
    ]
    for each in found[1:]:
        assert_same(found[0], each)


@pytest.mark.parametrize(
    "state", [{1: torch.ones(2)}, {"a.b": 1, "a": {"b": 2}}, {"": 3}, {("t", 1): 2}, torch.ones(2), [1], {}], ids=str
)
def test_odd_states(state: Any, tmp_path: Path) -> None:
    theirs, ours = (
        outcome(functools.partial(saved_by, save, state, tmp_path / str(save is dcp.save))) for save in (stock.save, dcp.save)
    )
    assert ours == theirs


def test_what_each_rank_has_written_for_itself_is_read(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(3), "n": 1}, checkpoint_id=tmp_path, use_collectives=False)
    assert not (tmp_path / ".metadata").exists()
    found = {"a": torch.zeros(3), "n": 0}
    dcp.load(found, checkpoint_id=tmp_path)
    assert_same({"a": torch.ones(3), "n": 1}, found)


def test_but_not_in_place_of_what_is_newer_and_damaged(tmp_path: Path) -> None:
    """torch goes on to the metadata of this rank when it finds that of all to be bad."""
    dcp.save({"a": torch.ones(3), "n": 1}, checkpoint_id=tmp_path, use_collectives=False)
    dcp.save({"a": torch.full((3,), 2.0), "n": 2}, checkpoint_id=tmp_path)
    found = {"a": torch.zeros(3), "n": 0}
    dcp.load(found, checkpoint_id=tmp_path)
    assert_same({"a": torch.full((3,), 2.0), "n": 2}, found)
    content = bytearray((tmp_path / ".metadata").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / ".metadata").write_bytes(content)
    found = {"a": torch.zeros(3), "n": 0}
    with pytest.raises(CorruptError, match="metadata"):
        dcp.load(found, checkpoint_id=tmp_path)
    assert_same({"a": torch.zeros(3), "n": 0}, found)

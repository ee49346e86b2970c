"""restore() into what is there: all of the newest good checkpoint, never a mixture, and no second copy."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, options, patience
from test_load_into import pointers, zeros_like
from test_ranks_apart import Threaded, Wire
from torch import nn

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.errors import CheckpointError, CorruptError, MismatchError
from ckpt.loading import archive, skeleton


def own(step: int, rank: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {
        "large": torch.randn(200, 501, generator=generator),
        "small": [torch.full((3,), float(step)), torch.tensor(step)],
        "turned": torch.randn(30, 50, generator=generator).t(),
        "step": step,
    }


def common(step: int) -> dict[str, Any]:
    return {"weights": torch.full((40_000,), float(step)), "name": f"model {step}"}


def file_of(directory: Path, step: int, name: str = "state") -> Path:
    return directory / f"step-{step:012d}" / f"{name}.pt"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def damage_payload(path: Path) -> None:
    """In the middle of the largest record: what is before and behind it has been read by then."""
    records = archive.Archive(path).records.values()
    largest = max(records, key=lambda record: record.size)
    flip(path, largest.offset + largest.size // 2)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ckpt.Checkpointer]:
    """Two checkpoints of one process, of both kinds of states."""
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, own(step), replicated=common(step)).result(DEADLINE_S)
        yield checkpointer


# ---- what is filled --------------------------------------------------------------------------------------------------


def test_fills_both(job: ckpt.Checkpointer) -> None:
    target, replicated = zeros_like(own(1)), zeros_like(common(1))
    target["turned"] = torch.zeros(50, 30)  # laid out otherwise than in the file
    before, version = pointers([target, replicated]), target["large"]._version
    found = job.restore(into=target, replicated_into=replicated)
    assert found is not None and found.step == 2
    assert found.state is target and found.replicated is replicated
    assert pointers([target, replicated]) == before and target["large"]._version > version
    expected = own(2)
    expected["turned"] = expected["turned"].contiguous()
    assert_same([expected, common(2)], [target, replicated])


def test_one_target_of_two(job: ckpt.Checkpointer) -> None:
    target = zeros_like(common(1))
    found = job.restore(replicated_into=target, map_location="cpu")
    assert found is not None and found.replicated is target
    assert_same([own(2), common(2)], [found.state, target])


@pytest.mark.parametrize("stepped", [True, False])
def test_modules_and_optimizers(stepped: bool, tmp_path: Path) -> None:
    def make(seed: int, step: bool) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * seed)
        if step:
            model(torch.randn(4, 64)).square().mean().backward()
            optimizer.step()
        return {"model": model, "optimizer": optimizer}

    saved, target = make(1, True), make(2, stepped)
    states = {name: part.state_dict() for name, part in saved.items()}
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, states).result(DEADLINE_S)
        before = pointers(list(target["model"].state_dict().values()))
        found = checkpointer.restore(into=target)
    assert found is not None and found.state is target
    assert pointers(list(target["model"].state_dict().values())) == before
    for name, part in target.items():
        assert_equal(states[name], part.state_dict(), name)


def assert_equal(a: Any, b: Any, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    else:
        assert a == b, where


def test_what_only_one_side_has(job: ckpt.Checkpointer) -> None:
    target = {"large": torch.zeros(200, 501), "more": torch.ones(2)}
    with pytest.raises(MismatchError, match="more is missing in the file"):
        job.restore(into=target)
    found = job.restore(into=target, strict=False)
    assert found is not None and found.state is target
    assert torch.equal(target["large"], own(2)["large"]) and target["more"].tolist() == [1.0, 1.0]


def test_saves_in_flight_have_the_old_bytes(tmp_path: Path, native: Any) -> None:
    target = {"weights": torch.zeros(1_000_000)}
    with ckpt.Checkpointer(tmp_path / "job", options=options()) as checkpointer:
        checkpointer.save(1, {"weights": torch.ones(1_000_000)}).result(DEADLINE_S)
        native.set_fault("pwritev", delay_s=0.05)
        pending = ckpt.save(target, tmp_path / "alone.pt", lazy=True, options=options())
        assert checkpointer.restore(into=target) is not None
        native.clear_faults()
        pending.result(DEADLINE_S)
    assert torch.count_nonzero(ckpt.load(tmp_path / "alone.pt")["weights"]) == 0
    assert torch.count_nonzero(target["weights"]) == 1_000_000


def test_a_file_without_checksums_of_its_own(tmp_path: Path) -> None:
    """The manifest has one of it: nothing is unpickled, or written, before that has been compared."""
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, replicated=common(1)).result(DEADLINE_S)
        path = file_of(tmp_path, 1, "replicated")
        replace_without_checksums(path, common(7))
        target = zeros_like(common(1))
        found = checkpointer.restore(replicated_into=target)
        assert found is not None and found.replicated is target
        assert_same(common(7), target)
        damage_payload(path)
        target = zeros_like(common(1))
        with pytest.raises(CorruptError) as raised:
            checkpointer.restore(replicated_into=target)
        assert "holds parts" not in str(raised.value)
        assert_same(zeros_like(common(1)), target)


def replace_without_checksums(path: Path, state: Any) -> None:
    """The only file of a checkpoint, and what its manifest says of it."""
    was = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(was)
    assert not archive.Archive(path).checksummed
    at = path.with_name("manifest.json")
    manifest = json.loads(at.read_text())
    manifest["files"][0] |= {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
    manifest["crc32"] = manifests._checksum(manifest)
    at.write_text(json.dumps(manifest))


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state", "replicated"])
def test_the_older_one_fills_again(name: str, job: ckpt.Checkpointer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage_payload(file_of(tmp_path, 2, name))
    target, replicated = zeros_like(own(1)), zeros_like(common(1))
    found = job.restore(into=target, replicated_into=replicated)
    assert found is not None and found.step == 1
    assert_same([own(1), common(1)], [target, replicated])
    assert "is passed over" in caplog.text


def test_a_flip_anywhere_leaves_no_trace(job: ckpt.Checkpointer, tmp_path: Path) -> None:
    path = file_of(tmp_path, 2, "replicated")
    content = path.read_bytes()
    records = archive.Archive(path).records
    pickle = records["data.pkl"]
    places = {0, 20, 45, pickle.offset, pickle.offset + pickle.size // 2, records["data/0"].offset, len(content) - 1}
    places |= set(range(7, len(content), len(content) // 25)) | set(range(len(content) - 700, len(content), 53))
    for place in sorted(places):
        flip(path, place)
        target = zeros_like(common(1))
        found = job.restore(replicated_into=target)
        assert found is not None and found.step == 1, place
        assert_same(common(1), target)
        path.write_bytes(content)


def test_a_whole_file_of_another_checkpoint(job: ckpt.Checkpointer, tmp_path: Path) -> None:
    """Nothing is wrong with it but that the manifest names another."""
    content = file_of(tmp_path, 1, "replicated").read_bytes()
    assert len(content) == file_of(tmp_path, 2, "replicated").stat().st_size
    file_of(tmp_path, 2, "replicated").write_bytes(content)
    found = job.restore(into=(target := zeros_like(own(0))), replicated_into=zeros_like(common(0)))
    assert found is not None and found.step == 1
    assert_same([own(1), common(1)], [target, found.replicated])


def test_none_is_good(job: ckpt.Checkpointer, tmp_path: Path) -> None:
    for step in (1, 2):
        damage_payload(file_of(tmp_path, step))
    target = zeros_like(own(0))
    with pytest.raises(
        CorruptError, match=r"no checkpoint in .* is good: .*What was to be loaded into holds parts of them now"
    ):
        job.restore(into=target)
    assert target["step"] == 0, "what is no tensor waits until the ranks have agreed"
    with pytest.raises(CorruptError) as raised:
        job.restore()
    assert "holds parts" not in str(raised.value)


def test_a_cause_that_several_have_in_common_is_told_once(tmp_path: Path) -> None:
    two = Two(tmp_path)
    for step in (1, 2):
        damage_payload(file_of(tmp_path, step, "replicated"))
    errors = two.both(lambda rank: two.ranks[rank].restore())
    for checkpointer in two.ranks:
        checkpointer.close()
    for error in errors:
        assert isinstance(error, CorruptError)
        assert str(error).count("replicated.pt") == 1 and "ranks 0, 1: " in str(error)
        assert "(so it is with step-000000000001). `ckpt list" in str(error)


# ---- misfits ---------------------------------------------------------------------------------------------------------


def test_a_misfit_changes_nothing(job: ckpt.Checkpointer) -> None:
    """Neither of the two, if only one does not fit; and no older one is taken for it."""
    target, replicated = zeros_like(own(0)), {"weights": torch.zeros(7), "name": ""}
    versions = target["large"]._version, replicated["weights"]._version
    with pytest.raises(
        MismatchError, match=r"replicated.pt' does not fit .*weights has shape \[40000\].*Nothing was changed"
    ) as raised:
        job.restore(into=target, replicated_into=replicated)
    assert len(raised.value.problems) == 1
    assert_same([zeros_like(own(0)), {"weights": torch.zeros(7), "name": ""}], [target, replicated])
    assert versions == (target["large"]._version, replicated["weights"]._version)
    assert job.restore() is not None


def test_a_damaged_misfit_is_damaged(job: ckpt.Checkpointer, tmp_path: Path) -> None:
    job.save(3, {"other": torch.ones(50_000)}, replicated=common(3)).result(DEADLINE_S)
    damage_payload(file_of(tmp_path, 3))
    target = zeros_like(own(0))
    found = job.restore(into=target)
    assert found is not None and found.step == 2
    assert_same(own(2), target)


def test_a_misfit_after_damage_says_what_is_there(job: ckpt.Checkpointer, tmp_path: Path) -> None:
    job.save(3, {"other": torch.ones(50_000)}, replicated=common(3)).result(DEADLINE_S)
    damage_payload(file_of(tmp_path, 3))
    with pytest.raises(MismatchError, match="It holds parts of a damaged checkpoint that came before"):
        job.restore(into={"other": torch.zeros(50_000)})


def test_targets_that_a_checkpoint_has_nothing_for(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        target = {"weights": torch.zeros(40_000), "name": ""}
        assert checkpointer.restore(into=target) is None
        checkpointer.save(1, common(1)).result(DEADLINE_S)
        with pytest.raises(
            CheckpointError, match="has nothing for replicated_into= on rank 0; it has a state of rank 0 for itself"
        ):
            checkpointer.restore(into=target, replicated_into=zeros_like(target))
        checkpointer.save(2, replicated=common(2)).result(DEADLINE_S)
        with pytest.raises(
            CheckpointError, match="has nothing for into= on rank 0; it has a replicated state, which replicated_into= takes"
        ):
            checkpointer.restore(into=target, replicated_into=zeros_like(target))
        with pytest.raises(ValueError, match="into= or merge=, not both"):
            checkpointer.restore(into=target, merge=lambda states: states[0])
        assert torch.count_nonzero(target["weights"]) == 0
        assert checkpointer.restore(replicated_into=target) is not None


def test_objects_that_are_refused(job: ckpt.Checkpointer) -> None:
    job.save(3, {"fraction": fractions_of(3)}, replicated=common(3)).result(DEADLINE_S)
    with pytest.raises(CheckpointError, match="weights_only"):
        job.restore(into={"fraction": 0}, replicated_into=(target := zeros_like(common(0))))
    assert_same(zeros_like(common(0)), target)


def fractions_of(step: int) -> Any:
    import fractions

    return fractions.Fraction(step, 7)


# ---- memory that is lent ---------------------------------------------------------------------------------------------


def test_lent_memory_stands_in_the_result(job: ckpt.Checkpointer, tmp_path: Path) -> None:
    damage_payload(file_of(tmp_path, 2))
    large, turned, misfit = torch.zeros(200, 501), torch.zeros(50, 30), torch.zeros(4)
    seen = []

    def lend(held: Any) -> dict[tuple[Any, ...], torch.Tensor]:
        seen.append((list(held), held["large"].shape))
        return {("large",): large, ("turned",): turned, ("small", 0): misfit}

    found = job.restore(into=lend)
    assert found is not None and found.step == 1 and len(seen) == 2 and seen[0] == (list(own(1)), (200, 501))
    assert found.state["large"] is large, "it could be filled as the file was read"
    assert found.state["turned"] is not turned and found.state["small"][0] is not misfit
    assert_same(own(1), found.state)


def test_memory_that_is_lent_twice(tmp_path: Path) -> None:
    """Once for one record: else one of them would hold the bytes of the other."""
    weight = torch.randn(300, 300)
    saved = {"a": weight, "again": weight, "b": torch.randn(300, 300), "count": collections.Counter([3])}
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, saved).result(DEADLINE_S)
        here = torch.zeros(300, 300)
        found = checkpointer.restore(into=lambda held: {("a",): here, ("again",): here, ("b",): here})
        apart = torch.zeros(300, 300)
        other = checkpointer.restore(into=lambda held: {("a",): here, ("again",): apart})
    assert found is not None and found.state["a"] is here and found.state["again"] is here and found.state["b"] is not here
    assert_same(saved, found.state)
    assert other is not None and other.state["again"] is apart and torch.equal(apart, weight)


def test_counters_need_no_records(tmp_path: Path) -> None:
    """As in the state of a MultiStepLR, which must not make all records needed."""
    torch.save({"weight": torch.ones(9), "milestones": collections.Counter([30, 60])}, tmp_path / "state.pt")
    found = skeleton.Skeleton(archive.Archive(tmp_path / "state.pt"), weights_only=True)
    assert found.records_of(found.value["milestones"]) == set()
    assert found.records_of(found.value) == {"data/0"}


def test_what_a_lender_raises(job: ckpt.Checkpointer) -> None:
    def lend(held: Any) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        job.restore(replicated_into=lend)
    with pytest.raises(TypeError, match="only tensors can be lent"):
        job.restore(replicated_into=lambda held: {("name",): "text"})


# ---- two ranks -------------------------------------------------------------------------------------------------------


class Two:
    """Both ranks of a job, with two checkpoints."""

    def __init__(self, directory: Path) -> None:
        wire = Wire()
        waits = {"timeout_s": patience(20.0), "commit_timeout_s": patience(20.0)}
        self.ranks = [
            ckpt.Checkpointer(directory, options=options(**waits), coordinator=Threaded(wire, rank)) for rank in range(2)
        ]
        for step in (1, 2):

            def save(rank: int, step: int = step) -> ckpt.PendingSave:
                return self.ranks[rank].save(step, own(step, rank), replicated=common(step))

            for pending in self.both(save):
                pending.result(DEADLINE_S)

    def both(self, call: Callable[[int], Any]) -> list[Any]:
        def guarded(rank: int) -> Any:
            try:
                return call(rank)
            except CheckpointError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(guarded, range(2)))


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    both = Two(tmp_path)
    yield both
    for checkpointer in both.ranks:
        checkpointer.close()


def test_what_one_rank_rejects_stays_nowhere(two: Two, tmp_path: Path) -> None:
    damage_payload(file_of(tmp_path, 2, "rank-00001"))
    own_targets = [zeros_like(own(0, rank)) for rank in range(2)]
    replicated = [zeros_like(common(0)) for _ in range(2)]
    found = two.both(lambda rank: two.ranks[rank].restore(into=own_targets[rank], replicated_into=replicated[rank]))
    for rank in range(2):
        assert found[rank].step == 1 and found[rank].state is own_targets[rank]
        assert_same([own(1, rank), common(1)], [own_targets[rank], replicated[rank]])


@pytest.mark.parametrize("bad", [0, 1])
def test_a_misfit_on_one_rank_is_its_own(bad: int, two: Two) -> None:
    targets: list[dict[str, Any]] = [zeros_like(common(0)) for _ in range(2)]
    targets[bad]["weights"] = torch.zeros(3)
    found = two.both(lambda rank: two.ranks[rank].restore(replicated_into=targets[rank]))
    assert isinstance(found[bad], MismatchError) and torch.count_nonzero(targets[bad]["weights"]) == 0
    assert found[1 - bad].step == 2
    assert_same(common(2), targets[1 - bad])
    assert [each.step for each in two.both(lambda rank: two.ranks[rank].restore())] == [2, 2], "they are in step again"


def test_another_number_of_ranks(two: Two, tmp_path: Path) -> None:
    target, replicated = zeros_like(own(0)), zeros_like(common(0))
    with ckpt.Checkpointer(tmp_path, options=options(), coordinator="local") as alone:
        with pytest.raises(CheckpointError, match=r"was saved by 2 ranks.*merge="):
            alone.restore(into=target, replicated_into=replicated)
        assert_same([zeros_like(own(0)), zeros_like(common(0))], [target, replicated])
        found = alone.restore(replicated_into=replicated, merge=lambda states: [state["step"] for state in states])
    assert found is not None and found.state == [2, 2] and found.replicated is replicated
    assert_same(common(2), replicated)

"""The benchmark of sharded states with two ranks and tiny sizes: its lines, and what is not measured. No speed is judged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from support import patience
from test_bench import check_line, only, run_bench
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.measure.ranks import Ranks
from bench.measure.sampling import Settings
from bench.rivals.dcp import DcpSaveInGroup
from bench.rivals.sharded import DROP_IN, KEPT, OURS, RIVALS, SAVE, STAGED, THREAD, CkptSharded, chosen
from bench.sharded import saves
from bench.sharded.plan import SAVES, Plan
from bench.sharded.state import Shape, Training, blank_like, blank_state, difference, known_state, local_tensors

SMALL = Shape.of(40, 1 << 20)

pytestmark = pytest.mark.usefixtures("native")


class OneOfMany(Ranks):
    """Nobody else is there."""

    def gather(self, mine: Any) -> list[Any]:
        return [mine]

    def meet(self) -> None:
        pass


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    yield
    if td.is_initialized():
        td.destroy_process_group()


def as_rank(rank: int, count: int) -> Ranks:
    if td.is_initialized():
        td.destroy_process_group()
    td.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    return OneOfMany(rank, count)


def alone() -> Ranks:
    td.init_process_group("gloo", store=td.HashStore(), rank=0, world_size=1)
    return Ranks(0, 1)


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    lines, _ = run_bench(tmp_path, "--workload=sharded", "--rounds=2", deadline_s=patience(300.0))
    for line in lines:
        check_line(line)
    names = [(line["case"], line["quantity"]) for line in lines]
    assert len(names) == len(set(names))
    assert not [line for line in lines if line["quantity"] == "runs_here"], "all of torch's ways run on a CPU"
    sides = [OURS, DROP_IN, THREAD, KEPT, STAGED, SAVE]
    for shape, blocked_bar in (("large tensors", "<= 0.03333"), ("small tensors", "<= 0.1")):
        for side in sides:
            for name in ("blocked_s", "durable_s"):
                slowest = only(lines, "sharded", f"{shape}: {side}", name)
                of_rank_0 = only(lines, "sharded", f"{shape}: {side}", f"rank0_{name}")
                assert slowest["n"] == 2
                assert all(a >= b > 0 for a, b in zip(slowest["samples"], of_rank_0["samples"], strict=True))
        ratio = only(lines, "sharded", f"{shape}: {OURS} / {THREAD}, blocked", "ratio")
        medians = [only(lines, "sharded", f"{shape}: {side}", "blocked_s")["median"] for side in (OURS, THREAD)]
        assert (ratio["value"], ratio["bar"]) == (medians[0] / medians[1], blocked_bar)
        assert only(lines, "sharded", f"{shape}: {OURS} / {THREAD}, durable", "ratio")["bar"] == "<= 0.5"
        assert 58 < only(lines, "sharded", f"{shape}: {OURS}", "sent_bytes")["value"] < 2000, "a digest, and not the layout"
    for ranks, bar in ((2, "<= 0.6"), (4, "<= 0.8")):
        title = f"load, 2 -> {ranks} ranks"
        for loader in ("ckpt, restore(sharded_into=)", "ckpt, dcp.load", "DCP load"):
            assert only(lines, "sharded", f"{title}: {loader}", "load_s")["n"] == 2
        assert only(lines, "sharded", f"{title}: ckpt, restore(sharded_into=) / DCP load", "ratio")["bar"] == bar
    assert os.listdir(tmp_path / "files") == []


@pytest.mark.slow
def test_planning_on_simulated_ranks(tmp_path: Path) -> None:
    lines, _ = run_bench(tmp_path, "--workload=sharded", "--parts=planning", "--rounds=2")
    for line in lines:
        check_line(line)
    assert [line["bar"] for line in lines if line["bar"]] == ["<= 0.05", "<= 200"] * 4
    for mesh in ("all shards", "16 shards, replicated"):
        case = f"planning, 32 ranks: {mesh}, rank 10"
        told, again = (only(lines, "sharded", f"{case}{which}", "layout_bytes") for which in (", first save", ""))
        assert again["samples"] == [again["value"]] * 2
        assert again["value"] < told["value"], "the first one has the layout in it"
    parts = [only(lines, "sharded", f"planning, 32 ranks: {mesh}, rank 10", "plan_s")["detail"]["parts_written"]
             for mesh in ("all shards", "16 shards, replicated")]  # fmt: skip
    assert parts == [8, 4], "of eight tensors each of two replicas writes a half"
    assert os.listdir(tmp_path / "files") == []


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_known_state_is_the_same_on_any_number_of_ranks(count: int) -> None:
    whole = local_tensors(known_state(SMALL, as_rank(0, 1)))
    parts = [local_tensors(known_state(SMALL, as_rank(rank, count))) for rank in range(count)]
    for name, tensor in whole.items():
        found = parts[0][name] if tensor.dim() == 0 else torch.cat([part[name] for part in parts])
        assert torch.equal(found.view(torch.int32), tensor.view(torch.int32))
    assert sum(tensor.nbytes for tensor in whole.values()) == SMALL.nbytes
    assert len(whole) == SMALL.tensors == 40
    bits = torch.cat([tensor.view(torch.int32).flatten() for tensor in whole.values() if tensor.dim()])
    assert len(bits.unique()) > 0.99 * len(bits), "no part can be taken for another one"


def test_one_bit_is_a_difference() -> None:
    ranks = as_rank(1, 2)
    expected, found = local_tensors(known_state(SMALL, ranks)), known_state(SMALL, ranks)
    assert difference(expected, found) == ""
    local_tensors(found)["optimizer/state/layers.7.weight/exp_avg"].view(torch.int32)[-1, -1] ^= 1
    assert difference(expected, found) == "tensor optimizer/state/layers.7.weight/exp_avg came back changed"
    assert difference(expected, blank_state(SMALL, ranks)) != ""
    del found["model"]["layers.0.weight"]
    assert "other tensors" in difference(expected, found)


def test_a_training_steps_what_is_saved_in_place() -> None:
    training = Training(SMALL, alone())
    assert len(local_tensors(training.state)) == SMALL.tensors
    before = {name: tensor.clone() for name, tensor in local_tensors(training.state).items()}
    training.step()
    now = local_tensors(training.state)
    assert [name for name, tensor in before.items() if torch.equal(tensor, now[name])] == []
    assert not any(tensor.any() for tensor in local_tensors(blank_like(training.state)).values())


class Forgetful(DcpSaveInGroup):
    """Its loads bring nothing."""

    name = "forgetful"

    def load(self, into: dict[str, Any]) -> None:
        pass


class OursForgetful(Forgetful):
    ours = True


def test_what_comes_back_changed_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, ranks = Settings(tmp_path, rest_s=0.0), alone()
    plan = Plan(SAVES, str(tmp_path), "", 1, 0.0, SMALL.tensors, SMALL.nbytes, compute_s=0.01)
    monkeypatch.setattr(saves, "chosen", lambda _: [CkptSharded, Forgetful, DcpSaveInGroup])
    measured = saves.measure_saves(plan, ranks, settings)
    assert list(measured["samples"]) == [OURS, SAVE]
    assert "came back changed" in measured["errors"]["forgetful"]
    monkeypatch.setattr(saves, "chosen", lambda _: [OursForgetful])
    with pytest.raises(RuntimeError, match=r"forgetful: tensor .* came back changed"):
        saves.measure_saves(plan, ranks, settings)


def test_what_the_bars_are_stated_for_is_always_measured() -> None:
    assert [rival.name for rival in chosen(())] == [rival.name for rival in RIVALS]
    assert [rival.name for rival in chosen(["kept"])] == [OURS, DROP_IN, THREAD, KEPT]
    assert [rival.name for rival in chosen(["none"])] == [OURS, DROP_IN, THREAD]

"""The simulation beside closed formulas where there are any, beside the engine's own rules, and beside real saves."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from support import patience

import ckpt
from ckpt import _native
from ckpt.plan.save_plan import make_plan

pytest.importorskip("simpy", reason="the simulation needs simpy")

from bench.simulation import published as studies
from bench.simulation import scale
from bench.simulation.model import DEVICE, HOST, INFINITE, Cluster, Job, Outcome, Saving, share_of
from bench.simulation.rank import simulate

DEADLINE_S = patience(240.0)
PNG = b"\x89PNG\r\n\x1a\n"
GB = 10**9
CHUNK = 4 << 20
FREE = Cluster(d2h=INFINITE, copy=INFINITE)  # everything costs nothing; each test gives one thing a price
ROOMY = Saving(arena_bytes=64 * GB)
STEADY = 12  # iterations


def near(value: float, chunks: float = 1.0, rate: float = GB) -> Any:
    """Equal but for so many chunks at that rate: bytes go by the chunk."""
    return pytest.approx(value, abs=chunks * CHUNK / rate + 1e-9)


# ---- closed formulas -------------------------------------------------------------------------------------------------


def test_with_everything_free_nothing_is_lost() -> None:
    outcome = simulate(FREE, Job(GB, 0.2, 0.3, 0.1), ROOMY)
    assert outcome.blocked() == [0.0] * 5
    assert outcome.trained_s == pytest.approx(outcome.plain_s) == pytest.approx(3.0)


@pytest.mark.parametrize("compute_s", [0.0, 0.3, 0.6])
def test_one_gpu_limited_by_its_link_to_the_host(compute_s: float) -> None:
    cluster = dataclasses.replace(FREE, d2h=2 * GB)
    outcome = simulate(cluster, Job(GB, compute_s, 0.0, 0.1, iterations=3), ROOMY)
    assert outcome.blocked() == pytest.approx([max(0.0, 0.5 - compute_s)] * 3)
    copied = simulate(cluster, Job(GB, compute_s, 0.0, 0.1, iterations=3, lazy=False), ROOMY)
    assert copied.blocked() == pytest.approx([0.5] * 3), "copied inside save(), it costs the same however long an iteration is"


def test_a_small_arena_makes_training_wait_for_the_file_system() -> None:
    arena = 128 * CHUNK
    cluster = dataclasses.replace(FREE, file_system=GB)
    outcome = simulate(cluster, Job(2 * GB, 0.5, 0.0, iterations=1), Saving(arena_bytes=arena))
    assert outcome.blocked()[0] == near((2 * GB - arena) / GB - 0.5, chunks=2)
    assert outcome.arena_peak == arena


@pytest.mark.parametrize("level", ["node link", "file system"])
def test_in_the_long_run_an_iteration_takes_as_long_as_its_flush(level: str) -> None:
    limits = {"node link": {"node_link": 2 * GB}, "file system": {"file_system": 2 * GB}}[level]
    cluster = dataclasses.replace(FREE, gpus_per_node=4, **limits)
    outcome = simulate(cluster, Job(GB, 0.5, 0.0, iterations=STEADY), ROOMY)
    blocked = outcome.blocked()
    assert sum(blocked[-4:]) / 4 == pytest.approx(4 * 1.0 / 2.0 - 0.5, rel=0.02), "4 GB at 2 GB/s, of which 0.5 s are hidden"
    assert outcome.ended_s == pytest.approx(STEADY * 2.0, rel=0.02)


def test_host_memory_is_copied_from_the_end_while_writers_come_from_the_front() -> None:
    """Until the fence the disk has written compute x rate; the rest shrinks at both ends."""
    cluster = Cluster(copy=4 * GB, file_system=GB)
    outcome = simulate(cluster, Job(GB, 0.25, 0.0, iterations=1, source=HOST), ROOMY)
    rest = GB - 0.25 * GB
    assert outcome.blocked()[0] == near(rest / (4 * GB + GB), chunks=6)  # four writers have a chunk in their hands
    hidden = simulate(cluster, Job(GB, 1.1, 0.0, iterations=1, source=HOST), ROOMY)
    assert hidden.blocked() == [0.0] and hidden.arena_peak == 0, "what has been written needs no copy"


@pytest.mark.parametrize("ranks", [1, 64, 4096])
def test_the_commit_is_a_gather_and_a_verdict_of_each_rank(ranks: int) -> None:
    saving = dataclasses.replace(ROOMY, gather_s=60e-6, verdict_s=80e-6, publish_s=0.02, fsync_s=0.01)
    cluster = dataclasses.replace(FREE, nodes=ranks, simulated_nodes=16)
    outcome = simulate(cluster, Job(CHUNK, 0.1, 0.0, iterations=1), saving)
    durable = max(saves[0].durable_at - saves[0].begun_at for saves in outcome.saves)
    assert durable == pytest.approx(0.03 + ranks * 140e-6)


def test_a_third_save_waits_for_the_first() -> None:
    cluster = dataclasses.replace(FREE, file_system=GB)
    outcome = simulate(cluster, Job(GB, 0.1, 0.0, iterations=3), ROOMY)
    first, second, third = outcome.saves[0]
    assert first.save_s == second.save_s == 0.0
    assert third.save_s == pytest.approx(first.durable_at - third.begun_at) == pytest.approx(0.8)


# ---- a tier of nodes -------------------------------------------------------------------------------------------------


def by_node(**limits: Any) -> Cluster:
    return dataclasses.replace(FREE, nodes=2, gpus_per_node=2, node_disk=4 * GB, **limits)


def test_a_save_by_way_of_the_nodes_waits_for_their_disks_and_not_for_home() -> None:
    outcome = simulate(by_node(file_system=GB / 10), Job(GB, 0.5, 0.0, iterations=1), ROOMY)
    (save,) = outcome.saves[0]
    assert save.durable_at == near(2 * GB / (4 * GB), chunks=8, rate=4 * GB), "two ranks share the disk of their node"
    assert save.blocked_s == 0.0
    assert outcome.home_at[0] == near(save.durable_at + 4 * GB / (GB / 10), chunks=4, rate=GB / 10)
    assert outcome.bytes_in == outcome.bytes_out == 4 * GB


def test_what_is_saved_faster_than_home_takes_it_is_superseded_and_the_newest_arrives() -> None:
    """10.5 s of draining for each save, one each 2 s: when the next is chosen, the newest is five or six further on."""
    outcome = simulate(by_node(file_system=GB / 10.5), Job(GB // 4, 2.0, 0.0, iterations=20), ROOMY)
    assert max(outcome.home_at) == 19 and 0 in outcome.home_at
    gaps = [later - sooner for sooner, later in zip(outcome.home_at, list(outcome.home_at)[1:], strict=False)]
    assert set(gaps[:-1]) <= {5, 6}
    assert outcome.bytes_out == GB * len(outcome.home_at)
    assert outcome.blocked() == [0.0] * 20
    ages = outcome.ages_at_home()
    assert len(ages) == len(outcome.home_at) - 1 and all(20.0 <= age <= 24.0 for age in ages[1:-1])


def test_what_the_drain_reads_is_missing_to_those_who_write() -> None:
    """0.5 s of writing for each save, as long as an iteration; what goes home is read from the same disk."""
    saving = dataclasses.replace(ROOMY, max_in_flight=1)
    beside = simulate(by_node(file_system=INFINITE), Job(GB, 0.5, 0.0, iterations=STEADY), saving)
    away = simulate(by_node(file_system=GB / 1000), Job(GB, 0.5, 0.0, iterations=STEADY), saving)
    assert sum(away.blocked()) < 0.1 < sum(beside.blocked())
    assert beside.busy_s["node disk"] <= beside.ended_s


def test_the_last_node_publishes_what_all_have_delivered() -> None:
    saving = dataclasses.replace(ROOMY, publish_s=0.25, receipt_s=0.125, drain_rate=GB)
    outcome = simulate(dataclasses.replace(by_node(), node_disk=INFINITE), Job(GB, 0.5, 0.0, iterations=1), saving)
    assert outcome.home_at[0] == pytest.approx(0.25 + 2.0 + 0.25 + 2 * 0.125, rel=0.01), "a commit there, 2 GB a node, a commit"


# ---- conservation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [DEVICE, HOST])
@pytest.mark.parametrize("arena", [4 * CHUNK, 40 * CHUNK, 400 * CHUNK])
@pytest.mark.parametrize("every", [1, 2])
def test_no_byte_is_lost_and_no_arena_overflows(source: str, arena: int, every: int) -> None:
    cluster = Cluster(3, 2, d2h=4 * GB, copy=4 * GB, node_link=3 * GB, file_system=5 * GB, servers=3, jitter=0.3)
    nbytes = 137 * CHUNK + 12345
    job = Job(nbytes, 0.05, 0.1, 0.02, iterations=4, every=every, source=source)
    outcome = simulate(cluster, job, Saving(arena_bytes=arena, plan_s=0.001, gather_s=1e-4, verdict_s=1e-4))
    saves = -(-4 // every)
    assert [len(ranks) for ranks in outcome.saves] == [saves] * 6
    assert outcome.bytes_in == outcome.bytes_out == 6 * saves * nbytes
    assert 0 < outcome.arena_peak <= arena
    assert outcome.plain_s <= outcome.trained_s <= outcome.ended_s
    for ranks in outcome.saves:
        for save in ranks:
            assert save.begun_at < save.captured_at <= save.flushed_at <= save.durable_at
            assert save.save_s + save.fence_s == save.blocked_s >= 0.001
    assert all(busy <= outcome.ended_s for busy in outcome.busy_s.values())


def test_the_same_seed_gives_the_same_run() -> None:
    cluster = Cluster(2, 2, file_system=GB, servers=4, jitter=0.5)
    job = Job(GB, 0.1, 0.1)

    def blocked(seed: int) -> list[float]:
        return simulate(cluster, job, Saving(), seed).blocked()

    assert blocked(1) == blocked(1) != blocked(2)


# ---- what makes large runs affordable --------------------------------------------------------------------------------


COSTS = {"by_node": True, "gather_s": 1e-4, "verdict_s": 1e-4, "node_s": 4e-3, "decide_s": 3e-5}


def polaris(nodes: int, simulated: int | None, most_chunks: int | None, seed: int = 0) -> Outcome:
    """With a commit that costs the same whatever was measured last."""
    cluster = dataclasses.replace(studies.POLARIS, nodes=nodes, simulated_nodes=simulated, file_system=40 * GB, servers=32)
    saving = dataclasses.replace(studies.saving_for(cluster), most_chunks=most_chunks, **COSTS)
    return simulate(cluster, Job(4 * GB, 1.0, 1.0, iterations=6), saving, seed)


def test_few_nodes_stand_for_many_alike() -> None:
    """But for where their stripes happen to lie, which the median of three seeds leaves out."""
    all_of_them, few = ([polaris(32, simulated, 64, seed) for seed in range(3)] for simulated in (None, 4))
    assert {len(each.saves) for each in few} == {16} and {len(each.saves) for each in all_of_them} == {128}
    trained = [statistics.median(each.trained_s for each in runs) for runs in (few, all_of_them)]
    assert trained[0] == pytest.approx(trained[1], rel=0.05)
    assert min(each.overhead for each in few) > 1.0, "else they would agree about nothing"


def test_the_grain_hardly_matters() -> None:
    coarse, fine = (polaris(2, None, most) for most in (32, 512))
    assert coarse.trained_s == pytest.approx(fine.trained_s, rel=0.05)
    assert coarse.ended_s == pytest.approx(fine.ended_s, rel=0.05)


# ---- the engine's own rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arena", [1 << 20, 8 << 20, 64 << 20])
def test_chunks_are_cut_as_the_engine_cuts_them(native: Any, arena: int) -> None:
    engine = _native.Engine(arena_bytes=arena, chunk_bytes=CHUNK, writers=1)
    sizes = Saving(arena_bytes=arena).chunks(50_000_001)
    assert sizes[0] == engine.chunk_bytes
    assert sum(sizes) == 50_000_001 and len(sizes) == -(-50_000_001 // engine.chunk_bytes)
    assert engine.close(60.0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_those_of_the_engine(native: Any, tmp_path: Path, count: int) -> None:
    engine = _native.Engine(arena_bytes=8 << 20, chunk_bytes=1 << 16, writers=2)
    plan = make_plan({f"tensor {i}": torch.zeros(size) for i, size in enumerate((300_000, 17, 90_000))}, lambda _: False, 4096)
    written = []
    for index in range(count):
        job = engine.submit(
            path=os.fsencode(tmp_path / "file"), direct=False, archive=b"replicated", head=[("data.pkl", plan.pickle)],
            addresses=plan.addresses, sizes=plan.sizes, kinds=bytes(plan.kinds), tail=[("version", b"3\n")], copy_at_most=4096,
            uniform_alignment=0, verify=False, timeout_s=60.0, share_index=index, share_count=count,
        )  # fmt: skip
        assert job.wait_finished(60.0) and job.error is None
        written.append(job.written[1] - job.written[0])
    body = sum(written)
    assert written == [share_of(body, 1 << 16, index, count) for index in range(count)]
    assert engine.close(60.0)


def test_defaults_are_those_of_the_library() -> None:
    options = ckpt.Options()
    ours = Saving()
    assert (ours.arena_bytes, ours.chunk_bytes) == (options.size("arena_bytes"), options.size("chunk_bytes"))
    assert (ours.writers, ours.max_in_flight) == (options.writers, options.max_in_flight)


# ---- the studies -----------------------------------------------------------------------------------------------------


def measured(case: str, quantity: str) -> dict[str, Any]:
    return {"workload": "coordination", "case": case, "quantity": quantity, "median": 0.0}


def test_the_commit_costs_what_was_measured(tmp_path: Path) -> None:
    """The newest of each case: by message, and by rank."""
    seconds = {
        ("torch, 64 ranks", "gathered_s"): 0.5, ("torch, 64 ranks", "agreed_s"): 0.6,
        ("torch, 16384 ranks", "gathered_s"): 1.0, ("torch, 16384 ranks", "agreed_s"): 3.0,
        ("torch by node, 16384 ranks", "gathered_s"): 0.25, ("torch by node, 16384 ranks", "agreed_s"): 0.5,
        ("one node, torch, 8 ranks", "agreed_s"): 0.004,
        ("rank 0 decides, 16384 ranks", "decided_s"): 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="coordination"):
        studies.measured_commit(64, results=tmp_path)
    for day, times in ((1, 9.0), (2, 1.0)):
        lines = [measured(*of) | {"median": found * times} for of, found in seconds.items()]
        (tmp_path / f"2026-01-0{day}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    flat, by_node, few = (studies.measured_commit(*how, results=tmp_path) for how in ((16384,), (20000, True), (1,)))
    assert flat == {"gather_s": 1 / 16384, "verdict_s": 2 / 16384, "node_s": 0.0, "decide_s": 0.5 / 16384}
    assert by_node == {"gather_s": 0.25 / 2048, "verdict_s": 0.25 / 2048, "node_s": 0.004, "decide_s": 0.5 / 16384}
    assert few["gather_s"] == 0.5 / 64


def test_there_are_measurements_of_the_commit() -> None:
    for by_node in (False, True):
        assert min(studies.measured_commit(16384, by_node).values()) >= 0.0
        assert studies.measured_commit(1, by_node)["gather_s"] > studies.measured_commit(16384, by_node)["decide_s"] > 0.0


def test_by_node_a_message_serves_all_its_ranks() -> None:
    """The other ranks of a node wait for theirs, and rank 0 for the nodes alone."""
    cluster = dataclasses.replace(FREE, nodes=10, gpus_per_node=8)
    costs = {"gather_s": 0.01, "verdict_s": 0.02, "decide_s": 0.003}
    for by_node, messages, node_s in ((False, 80, 0.0), (True, 10, 0.5)):  # and 80 answers either way
        saving = dataclasses.replace(ROOMY, by_node=by_node, node_s=node_s, **costs)
        saves = simulate(cluster, Job(GB, 0.5, 0.0, iterations=1), saving).saves
        took_s = max(save.durable_at for (save,) in saves) - saves[0][0].flushed_at
        assert took_s == pytest.approx(messages * 0.03 + 80 * 0.003 + node_s)


def test_each_level_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """13.3 GB of each of 4 GPUs a node: by hand 0.53 s to the host, 2.1 s off the node, 20.9 s into 10.4 TB/s for 16,384."""
    monkeypatch.setattr(scale, "CHUNKS", 16)
    case = scale.Case(16384, scale.GROWS, "10 TB/s")
    assert scale.critical_interval(case, *scale.alone("file system", *by_way_of_nodes(case))) == scale.SHORTEST_S
    assert scale.critical_interval(case, *scale.alone("node disk", *by_way_of_nodes(case))) == pytest.approx(13.3, rel=0.12)
    costs = studies.measured_commit(case.gpus, by_node=True)
    commit_s = case.gpus / 4 * (costs["gather_s"] + costs["verdict_s"]) + case.gpus * costs["decide_s"]
    expected = {"D2H link": 0.5325, "node link": 2.13, "file system": 21.8, "commit": commit_s, scale.SAVE_CALL: 0.7}
    for level, seconds in expected.items():
        found = scale.critical_interval(case, *scale.alone(level, case.cluster(), case.saving()))
        assert found == pytest.approx(seconds, rel=0.12), level
    assert {case.gpus for case in scale.cases([80, 1024])} == {80, 1024}
    assert {case.growth for case in scale.cases([80, 1024])} == {scale.GROWS, scale.SHARED}


def by_way_of_nodes(case: scale.Case) -> tuple[Cluster, Saving]:
    same = case._replace(by_node=True)
    return same.cluster(), same.saving()


def simulation(*arguments: str) -> str:
    command = [sys.executable, "-m", "bench.simulation.run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_beside_real_saves(native: Any, tmp_path: Path) -> None:
    out = tmp_path / "lines"
    where = [f"--directory={tmp_path / 'files'}", f"--out={out}", f"--plots={tmp_path}"]
    said = simulation("--study=validate", "--scale=0.03", "--disk-rate=none", *where)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["detail"]["role"] for line in lines] == ["calibrates"] + ["predicted"] * 7
    for line in lines:
        assert len(line["samples"]) == len(line["detail"]["real_blocked_s"]) == 5
        assert min(line["detail"]["real_blocked_s"]) > 0
    assert "predicted" not in said and "calibrates" in said
    assert os.listdir(tmp_path / "files") == []
    assert (tmp_path / "validation.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_the_published_setting_and_what_lies_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.simulation import run as program

    for module, name, value in ((studies, "CHUNKS", 16), (scale, "CHUNKS", 16), (scale, "SAVES", 4), (scale, "PRECISION", 2.0)):
        monkeypatch.setattr(module, name, value)
    out = tmp_path / "lines"
    wanted = ["--study=published", "--study=scale", "--gpus=80", f"--out={out}", f"--plots={tmp_path}"]
    assert program.main(wanted) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    published = {line["case"]: line for line in lines if line["case"].startswith("published")}
    assert len(published) == 2 * len(studies.PUBLISHED)
    line = published["published setting, 70B on 80 GPUs, copied in save()"]
    assert line["value"] == pytest.approx(1065 / 80 / 25 + studies.PLAN_S, rel=0.02)
    assert line["detail"]["published_GBps"] == 638
    assert {"plan_s", "node_link"} <= line["detail"]["sources"].keys()
    assert "638" in said and "D2H link" in said and "assumption" in said
    further = [line for line in lines if line["case"].startswith(scale.GROWS)]
    assert len(further) == len(scale.INTERVALS_S) + len(scale.ARENAS_GB)
    for line in further:
        assert line["detail"]["arena_peak_bytes"] <= max(scale.ARENAS_GB) * GB
        assert set(line["detail"]["critical_interval_s"]) == {*scale.LEVELS, scale.FLAT_COMMIT, scale.ALL}
    losses = [line["detail"]["steady_loss"] for line in further if "every" in line["case"]]
    assert losses[0] > 1.0 > scale.FREE > losses[-1], "ten times a second is too much, every 1,000 s is not"
    for name in ("published.png", "scale.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)

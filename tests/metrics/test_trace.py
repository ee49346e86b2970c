"""`ckpt trace`: the events of a real job as Chrome trace events, checked against the rules of that format."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Shell
from support import options

import ckpt
from ckpt.metrics.trace import make_trace

DEADLINE_S = 60.0
US = 1e6
REQUIRED = {
    "M": {"name", "args"},
    "X": {"name", "ts", "dur", "args"},
    "s": {"name", "ts", "id", "cat"},
    "f": {"name", "ts", "id", "cat", "bp"},
    "C": {"name", "ts", "args"},
    "i": {"name", "ts", "s"},
}


def check(trace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the format demands; by kind."""
    assert json.loads(json.dumps(trace)) == trace
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        assert REQUIRED[event["ph"]] | {"ph", "pid", "tid"} <= event.keys(), event
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event.get("ts", 1) > 0 and event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert event["args"] and all(isinstance(value, float) for value in event["args"].values())
        found[event["ph"]].append(event)
    named = {(event["pid"], event["tid"]) for event in found["M"] if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for kind in "Xsfi" for event in found[kind]} <= named
    assert {event["pid"] for event in trace["traceEvents"]} == {e["pid"] for e in found["M"] if e["name"] == "process_name"}
    check_nesting(found["X"])
    check_flows(found)
    return found


def check_nesting(slices: list[dict[str, Any]]) -> None:
    """Two slices of one thread lie inside each other, or apart (but for what floating point makes of an instant)."""
    threads = defaultdict(list)
    for event in slices:
        threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for found in threads.values():
        open_until: list[float] = []
        for begin, end in sorted(found, key=lambda each: (each[0], -each[1])):
            while open_until and open_until[-1] <= begin + 1:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1
            open_until.append(end)


def check_flows(found: dict[str, list[dict[str, Any]]]) -> None:
    begins, ends = ({event["id"]: event for event in found[kind]} for kind in "sf")
    assert begins.keys() == ends.keys() and len(begins) == len(found["s"]) == len(found["f"])
    for flow, begin in begins.items():
        assert begin["ts"] <= ends[flow]["ts"]
        for event in (begin, ends[flow]):
            assert any(
                (event["pid"], event["tid"]) == (each["pid"], each["tid"])
                and each["ts"] - 1 <= event["ts"] <= each["ts"] + each["dur"] + 1
                for each in found["X"]
            ), "it is bound to no slice"


def names(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [event["name"] for event in sorted(found["X"], key=lambda each: each["ts"])]


def test_a_real_job(tmp_path: Path, shell: Shell) -> None:
    before = time.time()
    parameter = torch.nn.Parameter(torch.zeros(1_000_000))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    run, output = tmp_path / "run", tmp_path / "trace.json"
    with ckpt.Checkpointer(run, coordinator="local", options=options(max_in_flight=3), keep=2) as checkpointer:
        for step in range(6):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            checkpointer.save(step, {"parameter": parameter})
        checkpointer.wait(DEADLINE_S)
        assert checkpointer.restore() is not None
    said = shell.json("trace", run, "-o", output)
    found = check(trace := json.loads(output.read_text()))
    assert said["events"]["save"] == 6 and said["trace_events"] == len(trace["traceEvents"])
    for step in range(6):
        assert {f"save {step}", f"write {step}", f"capture {step}", f"commit {step}"} <= {*names(found)}
        assert {f"fsync {step}", f"rename {step}"} <= {*names(found)}
    assert len(found["s"]) == 6 and names(found)[-1] == "restore 5"
    assert [event["name"] for event in found["i"]] == [f"delete {step}" for step in range(4)]
    assert all(before * US <= event["ts"] <= time.time() * US for event in found["X"])
    (process,) = [event["args"]["name"] for event in found["M"] if event["name"] == "process_name"]
    assert process.startswith("rank 0 on ")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    drawn = {event["name"]: event["dur"] for event in found["X"]}
    for event in events:
        if event["event"] == "save":
            assert drawn[f"write {event['step']}"] == pytest.approx(event["flushed_s"] * US, abs=2000)


def end_of(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


def test_where_the_time_went(native: Any, tmp_path: Path, shell: Shell) -> None:
    """To a flush that takes long, and to a rename that does: it is seen which."""
    run, output = tmp_path / "run", tmp_path / "trace.json"
    with ckpt.Checkpointer(run, coordinator="local", options=options()) as checkpointer:
        for step, (call, name) in enumerate((("fdatasync", ".tmp-state"), ("rename", "/state.pt"))):
            native.set_fault(call, name, delay_s=0.4)
            checkpointer.save(step, {"parameter": torch.ones(1000)}).result(DEADLINE_S)
            native.clear_faults()
    shell.json("trace", run, "-o", output)
    drawn = {event["name"]: event for event in check(json.loads(output.read_text()))["X"]}
    for step, slow in enumerate(("fsync", "rename")):
        fsync, write, rename, commit = (drawn[f"{name} {step}"] for name in ("fsync", "write", "rename", "commit"))
        assert drawn[f"{slow} {step}"]["dur"] >= 0.4 * US
        assert fsync["tid"] == write["tid"] and end_of(fsync) == pytest.approx(end_of(write), abs=5)
        assert rename["tid"] == commit["tid"] and rename["ts"] == commit["ts"] and end_of(rename) <= end_of(commit) + 5


def test_whose_figures_they_are(tmp_path: Path, shell: Shell) -> None:
    at = 1_800_000_000.0
    save = {"schema": 1, "time": "2027-01-15T08:00:09.000Z", "event": "save", "outcome": "committed", "step": 1, "began": at}
    save |= {"flushed_s": 2.0, "durable_s": 3.0, "world_size": 2, "all_ranks": {"bytes_total": 7}}
    events = tmp_path / "events.jsonl"
    for ranks, words in (((0,), "those of rank 0, of 2"), ((1, 0), "")):
        events.write_text("".join(json.dumps({**save, "rank": rank}) + "\n" for rank in ranks))
        said = shell("trace", tmp_path, "-o", tmp_path / "trace.json").out
        assert words in said and said.count("\n") == 1 + bool(words)
    drawn = {event["name"]: event for event in check(json.loads((tmp_path / "trace.json").read_text()))["X"]}
    assert drawn["commit 1"]["args"]["all_ranks"] == {"bytes_total": 7}


def test_ranks_tiers_and_what_failed() -> None:
    at = 1_800_000_000.0
    common = {"schema": 1, "time": "2027-01-15T08:00:09.000Z", "run": "job", "host": "a"}
    save = {**common, "event": "save", "outcome": "committed", "save_s": 0.1, "fence_s": 0.2, "captured_s": 1.0}
    save |= {"flushed_s": 2.0, "durable_s": 8.0, "tiers_s": {"node": 2.5}, "arena_used": 7}
    drain = {**common, "event": "drain", "tier": "home", "outcome": "committed", "rank": 0, "backlog_bytes": 5}
    events = [
        *({**save, "rank": rank, "step": step, "began": at + step} for rank in (0, 1) for step in range(3)),
        {**common, "event": "save", "outcome": "failed", "rank": 0, "step": 3, "began": at + 3, "save_s": 0.1},
        *({**drain, "step": step, "began": at + 3 + step, "ended": at + 5 + step} for step in range(3)),
        {"schema": 1, "event": "save"},
    ]
    found = check(make_trace(events))
    assert "save 3 (failed)" in names(found) and len(found["s"]) == 6
    fence = next(event for event in found["X"] if event["name"] == "fence 0")
    assert (fence["ts"], fence["dur"]) == (pytest.approx((at + 0.8) * US), pytest.approx(0.2 * US))
    commit = next(event for event in found["X"] if event["name"] == "commit 0")
    assert commit["ts"] + commit["dur"] == pytest.approx((at + 2.5) * US), "on the node; the drain has the rest"
    threads = [event["args"]["name"] for event in found["M"] if event["name"] == "thread_name"]
    assert {"training", "committer", "writers 2", "drain to home 1", "drain to home 2"} <= {*threads}
    assert {event["name"] for event in found["C"]} == {"arena", "backlog to home"}
    processes = [event["args"]["name"] for event in found["M"] if event["name"] == "process_name"]
    assert processes == ["rank 0 on a (job)", "rank 1 on a (job)"]


HOSTILE = ("NaN", "1e999", "-Infinity", "1" + "0" * 400, "1e300", "-1e300", '"text"', "null", "true", "[1e999]", '{"a": NaN}')
DEEP = "[" * 700 + "]" * 700


def test_numbers_that_are_none(tmp_path: Path, shell: Shell) -> None:
    """Lines may have been written by anybody. What is drawn is JSON, all the same."""
    keys = ("rank", "step", "began", "ended", "save_s", "fence_s", "captured_s", "flushed_s", "durable_s", "total_s")
    keys = (*keys, "arena_used", "backlog_bytes", "tiers_s", "bytes_total", "written_s", "named_s", "world_size", "all_ranks")
    lines = []
    for kind in ("save", "drain", "restore", "delete"):
        good = {"schema": 1, "time": "2027-01-15T08:00:09Z", "event": kind, "outcome": "committed", "rank": 0, "step": 1}
        good |= {"began": 1.8e9, "ended": 1.8e9 + 1, "flushed_s": 1.0, "captured_s": 0.5, "durable_s": 2.0, "fence_s": 0.1}
        for key in keys:
            lines += [json.dumps(good | {key: "?"}).replace('"?"', value) for value in (*HOSTILE, DEEP)]
        lines += [json.dumps(good | {"tiers_s": {"node": "?"}}).replace('"?"', value) for value in (*HOSTILE, DEEP)]
        lines += [json.dumps(good | {"time": "?"}).replace('"?"', value) for value in (*HOSTILE, DEEP)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    said = shell.json("trace", tmp_path, "-o", tmp_path / "trace.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads((tmp_path / "trace.json").read_text(), parse_constant=refuse)
    assert said["events"]["save"] == len(lines) / 4 and len(found["traceEvents"]) > len(lines) / 2
    for event in found["traceEvents"]:
        assert all(abs(event.get(key, 0)) <= 1e22 for key in ("ts", "dur"))
        assert event.get("ph") != "C" or all(isinstance(value, float) for value in event["args"].values())


def test_no_events(tmp_path: Path, shell: Shell) -> None:
    said = shell("trace", tmp_path, "-o", tmp_path / "trace.json")
    assert said.code == 3 and "no job has kept events" in said.err and not (tmp_path / "trace.json").exists()

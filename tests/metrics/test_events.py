"""events.jsonl: what a job writes there, what it never does to a save, and that nobody else minds the file."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_records import Kept
from support import options
from test_node_saves import end_drains

import ckpt
from ckpt.directory import steps
from ckpt.metrics import events as event_log
from ckpt.metrics.events import NAME, OLDER, EventLog, read_events
from ckpt.storage.log_file import append_line

DEADLINE_S = 60.0
FIELDS = {
    *("schema", "time", "event", "run", "rank", "host", "step", "sequence", "path", "outcome", "began", "blocked_s", "save_s"),
    *("fence_s", "arena_wait_s", "captured_s", "written_s", "flushed_s", "named_s", "durable_s"),
    *("bytes_total", "bytes_from_tensors", "reused_bytes", "unread_bytes"),
    *(
        "bytes_copied_in_save",
        "bytes_copied_at_fence",
        "bytes_from_devices",
        "reused_bytes",
        "direct_io",
        "device_mode",
        "arena_bytes",
    ),
    *("arena_used", "world_size", "slowest_rank", "error"),
}


def state(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((1000, 100), float(step))}


def events_in(directory: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(directory) if not kinds or event["event"] in kinds]


def job(directory: Path, *sinks: Any, **more: Any) -> ckpt.Checkpointer:
    tiers = more.pop("tiers", ())
    return ckpt.Checkpointer(directory, coordinator="local", metrics=sinks, options=options(**more), keep=2, tiers=tiers)


def test_what_a_job_says(tmp_path: Path) -> None:
    kept, before = Kept(), time.time()
    with pytest.raises(ckpt.CheckpointError), job(tmp_path, kept) as checkpointer:
        assert checkpointer.restore() is None
        for step in range(3):
            checkpointer.save(step, state(step))
        checkpointer.wait(DEADLINE_S)
        (tmp_path / "step-000000000003").write_text("in the way")
        error = checkpointer.save(3, state(3)).exception(DEADLINE_S)
        found = checkpointer.restore()
        assert found is not None
    told = events_in(tmp_path)
    assert [event["event"] for event in told] == [
        *("restore", "commit", "save", "commit", "save", "delete", "commit", "save", "save", "restore"),
    ]
    for event in told:
        at = datetime.fromisoformat(event["time"].replace("Z", "+00:00"))
        assert event["time"].endswith("Z") and at.tzinfo == timezone.utc and before - 1 <= at.timestamp() <= time.time() + 1
        assert (event["schema"], event["rank"], event["host"]) == (1, 0, socket.gethostname())
    saves = events_in(tmp_path, "save")
    for record, event in zip(kept.records, saves, strict=True):
        assert event.keys() == FIELDS and (event["step"], event["outcome"]) == (record.step, record.outcome)
        for name in ("blocked_s", "fence_s", "captured_s", "durable_s"):
            assert event[name] == (None if (value := getattr(record.stats, name)) is None else pytest.approx(value, abs=1e-6))
        assert event["bytes_total"] == record.stats.bytes_total and event["sequence"] == record.sequence
        assert before <= event["began"] <= time.time()
    assert [event["sequence"] for event in saves] == [1, 2, 3, None]
    assert saves[3]["error"] == {"type": type(error).__name__, "message": str(error)}
    (deleted,) = events_in(tmp_path, "delete")
    assert (deleted["step"], deleted["sequence"]) == (0, 1) and not (tmp_path / "step-000000000000").exists()
    nothing, restored = events_in(tmp_path, "restore")
    assert nothing["outcome"] == "nothing" and (restored["outcome"], restored["step"], restored["sequence"]) == ("ok", 2, 3)
    assert restored["bytes"] == {"home": (tmp_path / "step-000000000002" / "state.pt").stat().st_size}
    manifest = json.loads((tmp_path / "step-000000000002" / "manifest.json").read_text())
    assert manifest["cost"] == {name: pytest.approx(saves[2][name], abs=1e-6) for name in ("blocked_s", "flushed_s")}


def test_who_only_looks_writes_nothing(tmp_path: Path) -> None:
    with job(tmp_path, events=False) as checkpointer:
        checkpointer.save(0, state(0)).result(DEADLINE_S)
    before = {path.name for path in tmp_path.iterdir()}
    assert NAME not in before
    with job(tmp_path) as checkpointer:
        assert checkpointer.restore() is not None
    assert {path.name for path in tmp_path.iterdir()} == before


def test_damage_is_told(tmp_path: Path) -> None:
    with job(tmp_path) as checkpointer:
        for step in range(2):
            checkpointer.save(step, state(step)).result(DEADLINE_S)
        damaged = tmp_path / "step-000000000001" / "state.pt"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        found = checkpointer.restore()
        assert found is not None and found.step == 0
    (verified,), (restored,) = events_in(tmp_path, "verify"), events_in(tmp_path, "restore")
    assert (verified["tier"], verified["outcome"]) == ("home", "damaged") and "state.pt" in verified["problem"]
    assert (restored["outcome"], restored["step"]) == ("fell_back", 0)


@pytest.mark.parametrize("obstacle", ["a directory", "a pipe", "a link"])
def test_what_cannot_be_written_fails_no_save(obstacle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / NAME
    if obstacle == "a directory":
        path.mkdir()
    elif obstacle == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING, "ckpt"), job(tmp_path) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state(step)).result(DEADLINE_S)
        assert [text for text in caplog.messages if "events are lost" in text] == [
            text for text in caplog.messages if str(path) in text
        ]
        assert sum("events are lost" in text for text in caplog.messages) == 1 and not (tmp_path / "elsewhere").exists()
        path.rmdir() if obstacle == "a directory" else path.unlink()
        checkpointer.save(3, state(3)).result(DEADLINE_S)
    told = events_in(tmp_path)
    assert [(event["event"], event["step"]) for event in told] == [("delete", 1), ("commit", 3), ("save", 3)]
    assert [event.get("lost") for event in told] == [7, None, None], "three commits, three saves, and one removal"


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    log = EventLog(tmp_path, 0)
    log.note("warning", message="before")
    assert not (tmp_path / NAME).exists(), "the directory is not ours yet"
    log.begin()
    with open(tmp_path / NAME, "ab") as file:
        file.write(b'{"schema":1,"event":"save","st')
    log.note("warning", message="behind")
    assert [event["message"] for event in read_events(tmp_path)] == ["before", "behind"]
    log.close()
    log.note("warning", message="too late")
    assert len((tmp_path / NAME).read_bytes().splitlines()) == 3


class Unsayable:
    def __str__(self) -> str:
        raise RuntimeError("no words for it")


def test_what_cannot_be_said_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    circular: list[Any] = []
    circular.append(circular)
    log = EventLog(tmp_path, 0)
    log.note("warning", message=Unsayable())
    log.begin()
    for each in (circular, {(1, 2): 3}, 10**5000, Unsayable()):
        log.note("warning", message=each)
    log.note("warning", message="behind")
    log.close()
    assert [(event["message"], event["lost"]) for event in read_events(tmp_path)] == [("behind", 5)]
    assert caplog.text.count("events are lost") == 1


class Hanging:
    """A file system that does not answer until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.let_go = threading.Event(), threading.Event()
        monkeypatch.setattr(event_log, "append_line", self.append)

    def append(self, *details: Any) -> None:
        self.asked.set()
        assert self.let_go.wait(DEADLINE_S)
        append_line(*details)


def test_on_a_node_nobody_waits_for_a_home_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, tier = Hanging(monkeypatch), ckpt.Tier.node(tmp_path / "node-0")
    try:
        with job(tmp_path / "home", tiers=[tier]) as checkpointer:
            for step in range(3):
                assert checkpointer.save(step, state(step)).on_tier("node").result(DEADLINE_S).parts[-3] == "node-0"
            assert hanging.asked.wait(DEADLINE_S) and not (tmp_path / "home" / NAME).exists()
            hanging.let_go.set()
            checkpointer.save(3, state(3)).result(DEADLINE_S)
        landed = [event["step"] for event in events_in(tmp_path / "home", "commit") if event["tier"] == "node"]
        assert landed == [0, 1, 2, 3]
    finally:
        hanging.let_go.set()
        end_drains(tmp_path)


def test_a_save_that_is_skipped_waits_for_no_directory_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is to go on: that is what it is skipped for."""
    hanging, publishing, publish = Hanging(monkeypatch), threading.Event(), steps.publish

    def publish_when_it_answers(*details: Any, **more: Any) -> None:
        publishing.set()
        assert hanging.let_go.wait(DEADLINE_S)
        publish(*details, **more)

    monkeypatch.setattr(steps, "publish", publish_when_it_answers)
    returned: list[ckpt.PendingSave] = []
    try:
        with job(tmp_path, when_busy="skip", max_in_flight=1) as checkpointer:
            first = checkpointer.save(0, state(0))
            assert publishing.wait(DEADLINE_S)
            saving = threading.Thread(target=lambda: returned.append(checkpointer.save(1, state(1))), daemon=True)
            saving.start()
            saving.join(DEADLINE_S / 4)
            in_time = [*returned]
            hanging.let_go.set()
            saving.join(DEADLINE_S)
            assert len(in_time) == 1 and isinstance(in_time[0].exception(DEADLINE_S), ckpt.SkippedError)
            first.result(DEADLINE_S)
    finally:
        hanging.let_go.set()
    assert {(event["step"], event["outcome"]) for event in events_in(tmp_path, "save")} == {(0, "committed"), (1, "skipped")}


def test_more_than_can_wait_is_lost_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, log = Hanging(monkeypatch), EventLog(tmp_path, 0, behind=True)
    log.begin()
    for number in range(1200):
        log.note("warning", message=number)
        assert hanging.asked.wait(DEADLINE_S)
    hanging.let_go.set()
    log.close(DEADLINE_S)
    told = [*read_events(tmp_path)]
    assert [event["message"] for event in told] == [*range(1001)] and told[1]["lost"] == 199


def test_an_end_waits_for_no_home_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, log = Hanging(monkeypatch), EventLog(tmp_path, 0, behind=True)
    log.begin()
    log.note("warning", message="in time")
    assert hanging.asked.wait(DEADLINE_S)
    log.note("warning", message="dropped")
    log.close(0.0)
    hanging.let_go.set()
    for thread in threading.enumerate():
        if thread.name == "ckpt-events":
            thread.join(DEADLINE_S)
    assert [event["message"] for event in read_events(tmp_path)] == ["in time"], "still in the directory that it was in"


def test_an_end_leaves_the_directory_to_the_line_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its descriptor might be that of another one by then."""
    hanging, log = Hanging(monkeypatch), EventLog(tmp_path, 0)
    log.begin()
    writing = threading.Thread(target=lambda: log.note("warning", message="in time"))
    writing.start()
    assert hanging.asked.wait(DEADLINE_S)
    log.close(0.0)
    taken = [os.open(tmp_path.parent, os.O_RDONLY) for _ in range(8)]
    hanging.let_go.set()
    writing.join(DEADLINE_S)
    for descriptor in taken:
        os.close(descriptor)
    assert [event["message"] for event in read_events(tmp_path)] == ["in time"] and not (tmp_path.parent / NAME).exists()


def test_it_begins_anew_when_it_is_large(tmp_path: Path) -> None:
    log, other = EventLog(tmp_path, 0, most_bytes=2000), EventLog(tmp_path, 1, most_bytes=2000)
    for each in (log, other):
        each.begin()
    for number in range(100):
        (log if number % 2 else other).note("warning", message=str(number))
    kept = [int(event["message"]) for event in read_events(tmp_path)]
    assert kept == [*range(kept[0], 100)] and len(kept) > 10, "the newest are there, and none of these is missing"
    assert (tmp_path / OLDER).stat().st_size + (tmp_path / NAME).stat().st_size < 2 * 2500
    assert {path.name for path in tmp_path.iterdir()} == {NAME, OLDER}


def test_bundles_keep_none_unless_they_are_asked_to(tmp_path: Path) -> None:
    for events, there in (("auto", False), (True, True)):
        root = tmp_path / str(events)
        root.mkdir()
        with ckpt.BundleCheckpointer(coordinator="local", options=options(events=events)) as checkpointer:
            bundle = checkpointer.begin(root, "tag", step=7)
            bundle.save(state(7), root / "tag" / "state.pt")
            bundle.commit().result(DEADLINE_S)
        assert (root / NAME).exists() == there
    assert [(event["step"], event["outcome"]) for event in events_in(tmp_path / "True", "save")] == [(7, "committed")]


def test_no_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Options\.events must be 'auto', 'all', True or False, but is 'rank0'"):
        ckpt.Options(events="rank0")

"""Checkpointers with an object store behind home: real saves, real drains, a real server."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from node_roots import drain_well, wait_for
from object_server import Fault, ObjectServer, Proxy, options_for
from remote_jobs import end_drains
from support import options, patience

import ckpt
from ckpt.drain import node as nodes
from ckpt.drain import remote_place
from ckpt.errors import CheckpointError, CorruptError, FailedSavesError, NotACheckpointError, StorageError, SupersededError
from ckpt.remote.layout import Catalogue
from ckpt.storage.object_store import ObjectStore

DEADLINE_S = patience(60.0)
SECRET = {"access_key_id": "test-key", "secret_access_key": "never-written-down"}

Make = Callable[..., ckpt.Checkpointer]


class Place:
    """Homes and Checkpointers of one bucket; whatever was started ends with it."""

    def __init__(self, base: Path, bucket: str, port: int) -> None:
        self.base = base
        self.url = f"s3://{bucket}/run1"
        self.options = {key: value for key, value in options_for(port).items() if key != "skip_signature"} | SECRET

    def make(self, home: str = "home", tiers: list[ckpt.Tier] | None = None, keep: int = 3, **more: Any) -> ckpt.Checkpointer:
        tier = ckpt.Tier.remote(self.url, options=self.options, **more)
        return ckpt.Checkpointer(self.base / home, keep=keep, options=options(), tiers=[*(tiers or []), tier])

    def end_drains(self) -> None:
        end_drains(self.base)


@pytest.fixture
def place(tmp_path: Path, bucket: str, server: ObjectServer) -> Iterator[Place]:
    made = Place(tmp_path, bucket, server.port)
    yield made
    made.end_drains()


@pytest.fixture
def proxied(tmp_path: Path, bucket: str, proxy: Proxy) -> Iterator[Place]:
    made = Place(tmp_path, bucket, proxy.port)
    yield made
    made.end_drains()


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((300, 400), float(step))}


def test_a_save_comes_to_the_store_and_nothing_secret_to_a_disk(
    proxied: Place, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    place = proxied
    with place.make() as checkpointer:
        assert checkpointer.restore() is None
        pending = checkpointer.save(1, state(1))
        assert pending.result(DEADLINE_S) == place.base / "home" / "step-000000000001"
        where = pending.on_tier("object").result(DEADLINE_S)
        assert str(where).startswith(f"{place.url}/step-000000000001/") and pending.on_tier("object").done()
        assert {*pending.stats.tier_at} == {"object"}
        (told,) = (place.base / "home" / ".remote").glob("*")
        remote = remote_place.read(told)
        assert {*remote.options} == {"endpoint", "allow_http", "region"}
        for path in place.base.rglob("*"):
            assert not path.is_file() or SECRET["secret_access_key"].encode() not in path.read_bytes()
        assert SECRET["secret_access_key"] not in caplog.text + repr(checkpointer) + repr(pending)
    puts = [request.head for request in proxy.requests if request.method == "PUT"]
    assert puts and all(f"Credential={SECRET['access_key_id']}" in head for head in puts), "the drain has them, all the same"


def test_what_the_tier_does_not_want_is_told(place: Place) -> None:
    with place.make(every=2) as checkpointer:
        saves = [checkpointer.save(step, state(step)) for step in (1, 2, 3)]
        errors = [pending.on_tier("object").exception(DEADLINE_S) for pending in saves]
    assert errors[1] is None
    for error in (errors[0], errors[2]):
        assert isinstance(error, SupersededError) and "Tier.remote(every=) does not want it" in str(error)


def test_credentials_that_are_refused_do_not_touch_the_training(
    proxied: Place, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.rule = lambda _: Fault(status=403)
    with proxied.make() as checkpointer:
        first = checkpointer.save(1, state(1))
        assert first.result(DEADLINE_S).is_dir()
        error = first.on_tier("object").exception(DEADLINE_S)
        assert isinstance(error, StorageError) and "AccessDenied" in str(error) and "is a checkpoint at home" in str(error)
        proxy.rule = lambda _: None
        second = checkpointer.save(2, state(2))
        second.on_tier("object").result(DEADLINE_S)
        checkpointer.wait(DEADLINE_S)
    assert [record.getMessage() for record in caplog.records if "at home alone" in record.getMessage()] != []


def test_a_tier_that_is_required_raises_at_the_next_save(proxied: Place, proxy: Proxy) -> None:
    proxy.rule = lambda _: Fault(status=403)
    with proxied.make(required=True) as checkpointer:
        first = checkpointer.save(1, state(1))
        assert first.on_tier("object").exception(DEADLINE_S) is not None and first.result() is not None
        with pytest.raises(FailedSavesError, match="AccessDenied"):
            checkpointer.save(2, state(2))
        proxy.rule = lambda _: None
        checkpointer.save(3, state(3)).on_tier("object").result(DEADLINE_S)


def test_a_tier_that_is_required_and_a_drain_that_cannot_be_started(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.make(required=True) as checkpointer, monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "")
        with pytest.raises(CheckpointError, match=r"does not know its own program.*is required"):
            checkpointer.save(1, state(1))
        patched.undo()
        checkpointer.save(2, state(2)).on_tier("object").result(DEADLINE_S)


def test_the_store_is_away_while_the_job_runs(proxied: Place, proxy: Proxy) -> None:
    """Saves go on at home; what is wanted comes to the store when it is back, after the drain was killed, too."""
    proxy.rule = lambda _: Fault(refuse=True)
    with proxied.make(keep=1) as checkpointer:
        saves = [checkpointer.save(step, state(step)) for step in (1, 2, 3)]
        for pending in saves:
            pending.result(DEADLINE_S)
        (told,) = (proxied.base / "home" / ".remote").glob("*")
        lock = told / ".drain.lock"
        wait_for(lambda: lock.exists() and lock.read_text().startswith("process "))
        os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
        proxy.rule = lambda _: None
        saves[-1].on_tier("object").result(DEADLINE_S)


# ---- restores --------------------------------------------------------------------------------------------------------


def save_steps(place: Place, *steps: int, **more: Any) -> None:
    with place.make(**more) as checkpointer:
        checkpointer.restore()
        for step in steps:
            checkpointer.save(step, state(step)).on_tier("object").result(DEADLINE_S)


def test_home_is_lost_and_the_store_has_all(place: Place) -> None:
    """The job goes on at a new home, with numbers above those in the store, and takes the place there over."""
    save_steps(place, 1, 2)
    with place.make("new") as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 2 and torch.equal(found.state["weight"], state(2)["weight"])
        assert set(found.sources.values()) == {"object store"}
        checkpointer.save(3, state(3)).on_tier("object").result(DEADLINE_S)
        found = checkpointer.restore()
        assert found is not None and found.step == 3 and set(found.sources.values()) == {"home"}
    assert not [*place.base.glob("fetched-*")]


def test_a_step_that_is_in_the_store_alone_stays_for_who_has_gone_back_to_it(place: Place) -> None:
    """Beside the one that the store keeps. No node has a part in it."""
    save_steps(place, 1, 2)
    tier = ckpt.Tier.remote(place.url, options=place.options, every=1, keep=1)
    catalogue = Catalogue(ObjectStore(place.url, place.options))
    with ckpt.Checkpointer(place.base / "new", keep=1, options=options(), tiers=[tier]) as checkpointer:
        for step in (3, 4):
            found = checkpointer.restore(step=1)
            assert found is not None and set(found.sources.values()) == {"object store"}
            checkpointer.save(step, state(step)).on_tier("object").result(DEADLINE_S)
            wait_for(lambda step=step: [copy.manifest.step for copy in catalogue.find().copies] == [step, 1])


def test_into_memory_that_is_there(place: Place) -> None:
    save_steps(place, 1)
    target = {"step": 0, "weight": torch.zeros(300, 400)}
    with place.make("new") as checkpointer:
        found = checkpointer.restore(into=target)
    assert found is not None and torch.equal(target["weight"], state(1)["weight"])


@pytest.mark.parametrize("damaged", [False, True])
def test_a_sharded_state(place: Place, damaged: bool) -> None:
    """Of its file only what is needed comes; whoever reads it verifies each piece."""
    weights = torch.arange(300_000.0).reshape(1000, 300)
    with place.make() as checkpointer:
        for step in (1, 2):
            pending = checkpointer.save(step, sharded={"weights": weights + step, "number": step})
            pending.on_tier("object").result(DEADLINE_S)
    if damaged:
        overwrite(place, "step-000000000002", b"x" * 1000, ".distcp")
    target = {"weights": torch.zeros(1000, 300), "number": 0}
    with place.make("new") as checkpointer:
        found = checkpointer.restore(sharded_into=target)
    assert found is not None and found.step == (1 if damaged else 2)
    assert torch.equal(target["weights"], weights + found.step) and target["number"] == found.step
    assert set(found.sources.values()) == {"object store"}


def test_a_file_that_is_damaged_at_home_is_read_from_the_store(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(place, 1, 2)
    (path,) = (place.base / "home" / "step-000000000002").glob("*.pt")
    damage(path)
    with place.make() as checkpointer:
        found = checkpointer.restore()
    assert found is not None and found.step == 2 and torch.equal(found.state["weight"], state(2)["weight"])
    assert "is read from object store instead of home" in caplog.text


def test_an_object_that_is_damaged_costs_that_checkpoint_alone(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(place, 1, 2)
    overwrite(place, "step-000000000002", b"x" * 1000)
    with place.make("new") as checkpointer:
        found = checkpointer.restore()
    assert found is not None and found.step == 1
    assert "'step-000000000002' in all places where it lies is passed over" in caplog.text


@pytest.mark.parametrize("suffix", [".pt", "manifest.json"])
def test_nothing_good_is_an_error(place: Place, suffix: str) -> None:
    """Also if all that is known of a checkpoint is that there was one: a job must not begin anew because of that."""
    save_steps(place, 1)
    overwrite(place, "step-000000000001", b"x" * 100, suffix)
    with place.make("new") as checkpointer, pytest.raises(ckpt.errors.CorruptError, match=r"no checkpoint in .* is good"):
        checkpointer.restore()


@pytest.mark.parametrize("home", ["new", "home"])
def test_a_store_that_does_not_answer_at_a_restore(
    proxied: Place, proxy: Proxy, home: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A job never begins anew because of that. What is at home is resumed."""
    save_steps(proxied, 1)
    proxied.end_drains()
    proxy.rule = lambda _: Fault(status=403)
    with proxied.make(home) as checkpointer:
        if home == "new":
            with pytest.raises(StorageError, match="there is no checkpoint elsewhere, and whether the object store has one"):
                checkpointer.restore()
        else:
            found = checkpointer.restore()
            assert found is not None and found.step == 1 and "left out of this restore" in caplog.text


def test_a_store_that_does_not_say_whose_it_is(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(place, 1)
    overwrite(place, "run", b"\0", ".json")
    with place.make() as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 1 and "run.json' cannot be understood" in caplog.text
    with place.make("new") as checkpointer, pytest.raises(CorruptError, match=r"run\.json' cannot be understood"):
        checkpointer.restore()


def test_a_job_that_has_not_looked_is_refused_in_the_store(place: Place) -> None:
    """It forgets to restore, at a home that is new: what another home has carried there stays as it is."""
    save_steps(place, 1)
    with place.make("new") as checkpointer:
        error = checkpointer.save(1, state(1)).on_tier("object").exception(DEADLINE_S)
        assert error is not None and "call restore() before the first save" in str(error)
    with place.make("third") as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 1


def test_a_job_with_checkpoints_of_its_own_never_restores_those_of_another(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """It was given the URL of another job by mistake, whose commits have higher numbers."""
    with ckpt.Checkpointer(place.base / "other", options=options()) as checkpointer:
        checkpointer.save(9, state(9)).result(DEADLINE_S)
    save_steps(place, 1, 2, 3)
    with place.make("other") as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 9 and "holds checkpoints of another home" in caplog.text
        error = checkpointer.save(10, state(10)).on_tier("object").exception(DEADLINE_S)
        assert error is not None and "belongs to the checkpoints of" in str(error)
    with place.make() as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 3
        checkpointer.save(4, state(4)).on_tier("object").result(DEADLINE_S)


@pytest.mark.slow
def test_with_a_store_that_is_in_use_elsewhere(tmp_path: Path, seaweed: ObjectServer) -> None:
    """SeaweedFS: the same protocol by another hand."""
    place = Place(tmp_path, seaweed.make_bucket(), seaweed.port)
    place.options = seaweed.options()
    try:
        save_steps(place, 1, 2, 3, keep=1)
        with place.make("new") as checkpointer:
            found = checkpointer.restore()
            assert found is not None and found.step == 3 and torch.equal(found.state["weight"], state(3)["weight"])
            checkpointer.save(4, state(4)).on_tier("object").result(DEADLINE_S)
        with place.make("third") as checkpointer:
            found = checkpointer.restore()
            assert found is not None and found.step == 4
    finally:
        place.end_drains()


def test_by_way_of_a_node(place: Place) -> None:
    node = ckpt.Tier.node(place.base / "nvme")
    with place.make(tiers=[node], every=1) as checkpointer:
        pending = checkpointer.save(1, state(1))
        pending.on_tier("object").result(DEADLINE_S)
        (root,) = (place.base / "nvme").iterdir()
        assert nodes.read(root).every_steps == 1, "what the store wants comes home first"
        assert {*pending.stats.tier_at} == {"node", "object"} and pending.result(0).is_dir()


def test_home_is_made_anew_from_its_node_and_is_still_the_same(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """The store has an older checkpoint than the node. Nothing is restored behind the back of what the node has."""
    home, tiers = place.base / "home", [ckpt.Tier.node(place.base / "nvme")]
    with place.make(tiers=tiers) as checkpointer:
        checkpointer.save(1, state(1)).on_tier("object").result(DEADLINE_S)
        place.end_drains()
        land(checkpointer, 2)
    place.end_drains()
    shutil.rmtree(home)
    (root,) = (place.base / "nvme").iterdir()
    lost = pytest.raises(NotACheckpointError, match=r"names no run.*--rebuild.*has: step 1 is the newest there")
    with place.make(tiers=tiers) as checkpointer, lost:
        checkpointer.restore()
    drain_well(root, "--rebuild")
    with place.make(tiers=tiers) as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 2 and "another home" not in caplog.text
        checkpointer.save(3, state(3)).on_tier("object").result(DEADLINE_S)


def land(checkpointer: ckpt.Checkpointer, step: int) -> None:
    checkpointer.save(step, state(step)).on_tier("node").result(DEADLINE_S)


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\0\1\2\3" * 100)


def overwrite(place: Place, step: str, content: bytes, suffix: str = ".pt") -> None:
    """Of a file of this step in the store, some bytes in its middle."""
    from ckpt.storage.object_store import ObjectStore

    store = ObjectStore(place.url, place.options)
    (key,) = [each.key for each in store.list(step) if each.key.endswith(suffix)]
    with store.open(key) as file:
        whole = file.read()
    middle = len(whole) // 2
    store.replace(key, whole[:middle] + content + whole[middle + len(content) :])

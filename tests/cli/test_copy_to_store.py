"""`ckpt copy` to an object store: what arrives is what was saved, also behind a kill; and a place belongs to one directory."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Shell, copied, save_steps, step_in
from nursery import Nursery
from object_server import Fault, ObjectServer, Proxy, Request, options_for
from test_copy import assert_arrived
from test_verify import flip, place_of

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.drain import node as nodes
from ckpt.drain import remote_place
from ckpt.drain.stopping import Stop
from ckpt.drain.uploader import Uploader
from ckpt.remote.layout import Catalogue
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.storage.object_store import ObjectStore


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(drain=True) as made:
        yield made


@pytest.fixture
def url(bucket: str, server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the environment says of it is all that there is to know."""
    point_to(server.port, monkeypatch)
    return f"s3://{bucket}/run1"


def point_to(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in options_for(port).items():
        monkeypatch.setenv(f"AWS_{name.upper()}", value)


def states(shell: Shell, place: object) -> list[tuple[int, str]]:
    return [(row["step"], row["state"]) for row in shell.json("list", str(place))["checkpoints"]]


def test_a_whole_directory_there_and_back(shell: Shell, home: Path, url: str, tmp_path: Path) -> None:
    document = shell.json("copy", home, url)
    assert [each["state"] for each in document["checkpoints"]] == ["copied"] * 3 and document["left"] == 0
    assert all(each["target"].startswith(f"{url}/step-") for each in document["checkpoints"])
    keys = {each.key for each in ObjectStore(url).list("")}
    assert "0 checkpoints of 0 B copied, 0 left over" in shell("copy", home, url).out
    assert keys == {each.key for each in ObjectStore(url).list("")}, "nothing was put again"
    assert states(shell, url) == [(3, "committed"), (2, "committed"), (1, "committed")]
    lost = document["checkpoints"][0]["target"].removeprefix(f"{url}/")
    ObjectStore(url).remove(f"{lost}/state.pt")
    said = shell("copy", home, url)
    assert said.code == 5 and f"{lost}' is there, but" in said.out and "state.pt" in said.out
    ObjectStore(url).remove(f"{lost}/manifest.json")
    assert shell("copy", step_in(home, 1), url).code == 0
    rows = shell.json("list", home, "--tiers")["checkpoints"]
    assert [row["where"] for row in rows] == [{url: "committed"}] * 3
    assert shell("copy", url, tmp_path / "back").code == 0
    assert_arrived(tmp_path / "back", 1, 2, 3)


def test_one_and_others_later(shell: Shell, home: Path, url: str) -> None:
    assert shell("copy", step_in(home, 2), url).code == 0 and states(shell, url) == [(2, "committed")]
    document = shell.json("copy", home, url)
    assert [(each["name"][-1], each["state"]) for each in document["checkpoints"]] == [
        *(("1", "copied"), ("2", "already there"), ("3", "copied"))
    ]
    with ObjectStore(url).open("latest") as file:
        assert file.read().startswith(b"step-000000000003/")


def test_the_tier_of_a_job_goes_on_there(shell: Shell, home: Path, url: str) -> None:
    assert shell("copy", step_in(home, 3), url).code == 0
    save_steps(home, 4)
    drain = Uploader(remote_place.place_of(home, url), Stop())
    drain.run(once=True)
    assert not drain.failed and states(shell, url)[:2] == [(4, "committed"), (3, "committed")]
    assert [each["state"] for each in shell.json("copy", home, url)["checkpoints"]] == [
        *("copied", "copied", "already there", "already there")
    ]


def test_a_place_belongs_to_one_directory(shell: Shell, home: Path, url: str, tmp_path: Path) -> None:
    assert shell("copy", home, url).code == 0
    other = tmp_path / "other"
    save_steps(other, 7)
    said = shell("copy", other, url)
    assert said.code == 5 and f"belongs to the checkpoints of '{home}'" in said.out and "1 left over" in said.out
    assert states(shell, url) == [(3, "committed"), (2, "committed"), (1, "committed")]
    shutil.rmtree(step_in(home, 3))
    save_steps(home, 9)  # with the number that was that of step 3
    assert manifests.read(step_in(home, 9)).sequence == 3
    said = shell("copy", home, url)
    assert said.code == 5 and "the same number of commit" in said.out and "3 left over" in said.out


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("point", ["upload-chunk", "upload-file", "upload-complete", "upload-committed"])
def test_killed_and_called_again(point: str, nursery: Nursery, shell: Shell, home: Path, url: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    program = (
        f"import os; os.environ.update({environment!r}); from ckpt import _native; from ckpt.cli.main import main; "
        f"_native.set_crash_point({point!r}, 1); main(['copy', {str(home)!r}, {url!r}])"
    )
    assert nursery.run(program).returncode == -signal.SIGKILL
    assert 0 < [state for _, state in states(shell, url)].count("committed") < 3
    assert shell("copy", home, url).code == 0
    assert {each.key.rpartition("/")[0] for each in ObjectStore(url).list("step")} == {
        copy.folder for copy in Catalogue(ObjectStore(url)).find().copies
    }, "it went on in the folder that it had begun"
    assert shell("copy", url, tmp_path / "back").code == 0
    assert_arrived(tmp_path / "back", 1, 2, 3)


def test_interrupted(shell: Shell, home: Path, url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(proxy.port, monkeypatch)

    def interrupt(request: Request) -> Fault | None:
        if request.is_put_of_manifest:
            os.kill(os.getpid(), signal.SIGINT)
        return None

    proxy.rule = interrupt
    said = shell("copy", home, url)
    assert said.code == 130 and said.out == ""
    proxy.rule = lambda _: None
    assert len(states(shell, url)) == 1
    assert shell("copy", home, url).code == 0 and len(states(shell, url)) == 3


def test_damage_does_not_arrive(shell: Shell, home: Path, url: str) -> None:
    path = step_in(home, 2) / "state.pt"
    flip(path, place_of(path, "data/0"))
    document = shell.json("copy", home, url, code=5)
    assert [each["name"] for each in document["checkpoints"]] == ["step-000000000001"] and document["left"] == 2
    assert document["error"]["type"] == "CorruptError" and str(path) in document["error"]["message"]
    assert states(shell, url) == [(1, "committed")]
    assert "has the CRC-32" in shell("status", home).out


def test_a_store_that_refuses(shell: Shell, home: Path, url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(proxy.port, monkeypatch)
    proxy.rule = lambda request: Fault(status=403) if request.is_put_of_manifest else None
    document = shell.json("copy", home, url, code=5)
    assert document["left"] == 3 and document["checkpoints"] == [] and "AccessDenied" in document["error"]["message"]
    proxy.rule = lambda _: None
    sent = len(proxy.requests)
    assert shell("copy", step_in(home, 1), url).code == 0
    assert not [each for each in proxy.requests[sent:] if each.method == "PUT" and "state.pt" in each.path], "it was there"


def test_what_is_refused(shell: Shell, home: Path, url: str, tmp_path: Path) -> None:
    assert shell("copy", tmp_path / "nothing", url).code == 3
    assert shell("copy", home, "s3://").code == 1 and shell("copy", url, url).code == 1
    with ckpt.BundleCheckpointer() as bundles:
        bundle = bundles.begin(tmp_path / "b", "global_step1")
        bundle.save({"w": 1}, tmp_path / "b" / "global_step1" / "a.pt")
        bundle.commit().result()
    said = shell("copy", tmp_path / "b", url)
    assert said.code == 1 and "is a bundle" in said.err
    node = copied(home, tmp_path / "node")
    (node / nodes.NAME).write_text("{}")
    assert shell("copy", node, url).code == 1
    place = remote_place.place_of(home, url)
    place.mkdir(parents=True)
    lock = DirectoryLock(place, name=nodes.LOCK)
    lock.acquire()
    try:
        assert shell("copy", home, url).code == 4
    finally:
        lock.release()
    assert [each.key for each in ObjectStore(url).list("")] == []

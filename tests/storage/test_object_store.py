"""ObjectStore, at a real server: what is put there is whole under its key, and who was quicker is known."""

from __future__ import annotations

import errno
import pickle
import random
import threading
import zlib
from pathlib import Path

import pytest
from object_server import Fault, ObjectServer, Proxy, options_for

from ckpt.errors import CorruptError, StorageError
from ckpt.storage import object_store
from ckpt.storage.object_store import ObjectStore, ObjectStoreError, parts_for
from ckpt.storage.stores import Store, StoredObject

MiB = 1 << 20
LARGE = random.Random(1).randbytes(2 * MiB + 5)  # three parts, as they are here


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_PART_BYTES", MiB)


@pytest.fixture
def store(server: ObjectServer, bucket: str) -> ObjectStore:
    return ObjectStore(f"s3://{bucket}/run1", options_for(server.port))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(LARGE)
    return path


def read(store: Store, key: str) -> bytes:
    with store.open(key) as file:
        return file.read()


def keys(store: Store, prefix: str = "") -> list[str]:
    return [each.key for each in store.list(prefix)]


def test_what_is_put_is_read(store: ObjectStore, source: Path) -> None:
    store.put("step-1/rank-0.pt", source, zlib.crc32(LARGE))
    store.replace("step-1/manifest.json", b"{}")
    store.replace("latest", b"step-1")
    store.replace("latest", b"step-2")
    assert read(store, "step-1/rank-0.pt") == LARGE and read(store, "latest") == b"step-2"
    assert store.list("") == [
        *(StoredObject("latest", 6), StoredObject("step-1/manifest.json", 2)),
        StoredObject("step-1/rank-0.pt", len(LARGE)),
    ]
    assert keys(store, "step-1/r") == ["step-1/rank-0.pt"] and keys(store, "step") == keys(store, "step-1/")
    assert keys(store, "step-2/") == keys(store, "nothing") == []
    assert bytes(store.read_range("step-1/rank-0.pt", 5, MiB + 7)) == LARGE[5 : MiB + 7]


@pytest.mark.parametrize("size", [0, 1, MiB, MiB + 1])
def test_sizes_at_the_edge_of_a_part(store: ObjectStore, source: Path, size: int) -> None:
    source.write_bytes(LARGE[:size])
    store.put("some-file", source, zlib.crc32(LARGE[:size]))
    assert read(store, "some-file") == LARGE[:size]


@pytest.mark.parametrize("size", [5000, len(LARGE)])
def test_a_source_with_other_bytes(store: ObjectStore, source: Path, size: int) -> None:
    """The last part is never sent, so there is no object; also what is there stays."""
    source.write_bytes(LARGE[:size])
    store.replace("some-file", b"before")
    with pytest.raises(CorruptError, match=r"CRC-32 [0-9a-f]{8} where [0-9a-f]{8} was expected"):
        store.put("some-file", source, zlib.crc32(LARGE[:size]) ^ 1)
    assert read(store, "some-file") == b"before"


def test_what_a_callback_raises_ends_it(store: ObjectStore, source: Path) -> None:
    def before(size: int, chunks: list[int] = []) -> None:  # noqa: B006
        chunks.append(size)
        if len(chunks) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        store.put_file("some-file", source, zlib.crc32(LARGE), before=before)
    assert keys(store) == []


def test_of_many_that_create_one_wins(store: ObjectStore) -> None:
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda number=number: results.append(store.create("one-object", b"%d" % number)))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]
    there = store.read_small("one-object")
    assert there is not None and store.create("one-object", there.content), "equal is one's own, whose answer was lost"


def test_an_exchange_needs_what_was_read(store: ObjectStore) -> None:
    assert store.read_small("some-object") is None and store.create("some-object", b"1")
    before = store.read_small("some-object")
    assert before is not None and store.exchange("some-object", b"2", before)
    assert not store.exchange("some-object", b"3", before) and read(store, "some-object") == b"2"
    assert store.exchange("some-object", b"2", before), "equal is one's own, whose answer was lost"


def test_what_is_removed(store: ObjectStore) -> None:
    for key in ("a/first-one", "a/other-one", "b/third-one"):
        store.replace(key, b"x")
    store.remove("a/first-one")
    store.remove("a/first-one")
    store.remove_all(["a/other-one", "never/was-there"])
    assert keys(store) == ["b/third-one"]
    with pytest.raises(ObjectStoreError, match=r"cannot read 's3://.*/a/first-one': it is not there"):
        store.open("a/first-one")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "a//b", "../up", "a/..", "./a", "a/"])
def test_keys_that_are_none(key: str, store: ObjectStore, source: Path) -> None:
    for call in (
        *(lambda: store.put(key, source, zlib.crc32(LARGE)), lambda: store.replace(key, b"")),
        *(lambda: store.open(key), lambda: store.remove(key), lambda: store.create(key, b"")),
    ):
        with pytest.raises(ValueError, match="a key is a relative path"):
            call()


@pytest.mark.parametrize(
    ("fault", "permanent", "code"),
    [
        *((Fault(status=403), True, errno.EACCES), (Fault(status=401), True, errno.EACCES)),
        *((Fault(status=400), True, errno.EINVAL), (Fault(status=429), False, errno.EAGAIN)),
        *((Fault(status=503), False, errno.EAGAIN), (Fault(refuse=True), False, errno.EHOSTUNREACH)),
        (Fault(answer_bytes=20), False, errno.EHOSTUNREACH),
    ],
    ids=str,
)
def test_which_errors_pass_by_themselves(bucket: str, proxy: Proxy, fault: Fault, permanent: bool, code: int) -> None:
    proxy.rule = lambda _: fault
    store = ObjectStore(f"s3://{bucket}/run1", options_for(proxy.port), retries=0)
    for call in (lambda: store.replace("some-key", b"x"), lambda: store.read_small("some-key"), lambda: store.list("")):
        with pytest.raises(ObjectStoreError, match=f"s3://{bucket}/run1") as caught:
            call()
        assert (caught.value.permanent, caught.value.errno) == (permanent, code), caught.value
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.permanent, again.errno) == (str(caught.value), permanent, code)


def test_a_bucket_that_is_not_there(server: ObjectServer) -> None:
    store = ObjectStore("s3://no-such-bucket/run1", options_for(server.port), retries=0)
    for call in (lambda: store.replace("some-key", b"x"), lambda: store.read_small("some-key"), lambda: store.list("")):
        with pytest.raises(ObjectStoreError, match="NoSuchBucket") as caught:
            call()
        assert caught.value.permanent


def test_an_answer_that_is_cut_is_never_taken_for_all(bucket: str, proxy: Proxy) -> None:
    """The client asks for the rest, or says that it has failed."""
    store = ObjectStore(f"s3://{bucket}/run1", options_for(proxy.port))
    store.replace("some-file", LARGE)
    proxy.requests.clear()
    proxy.rule = lambda _: Fault(answer_bytes=MiB)
    assert bytes(store.read_range("some-file", 0, len(LARGE))) == LARGE and len(proxy.requests) > 2
    proxy.rule = lambda _: Fault(answer_bytes=20)
    with pytest.raises(StorageError, match="some-file"):
        store.read_range("some-file", 0, len(LARGE))


def test_secrets_are_in_no_text(bucket: str, proxy: Proxy) -> None:
    options = options_for(proxy.port) | {"secret_access_key": "hidden-secret", "access_key_id": "hidden-id"}
    del options["skip_signature"]
    store = ObjectStore(f"s3://{bucket}/run1", options, retries=0)
    proxy.rule = lambda _: Fault(status=403, text="for hidden-id with hidden-secret")
    with pytest.raises(ObjectStoreError) as caught:
        store.replace("some-key", b"x")
    assert "AccessDenied" in str(caught.value) and "hidden" not in str(caught.value) + repr(store)


def test_parts_are_few_and_large_and_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for size in (0, 1, 10 << 30, 1 << 40, 5 << 40):
        part, in_flight = parts_for(size)
        assert part >= 16 * MiB and part % 4096 == 0 and size / part <= 10_000
        assert in_flight == 2 or part * in_flight <= object_store._MOST_BYTES_IN_FLIGHT
    assert parts_for(1 << 30) == (16 * MiB, 16) and parts_for(1 << 30, 4) == (16 * MiB, 4)

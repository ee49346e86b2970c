"""save(), the PendingSave that it returns, and load()."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from states import Position
from support import DEADLINE_S, assert_same, close_engines, options, wait_until

import ckpt
from ckpt.errors import CheckpointError, CorruptError, DeadlineError, StorageError

STATE = {"a": torch.arange(100_000), "b": [torch.ones(3), 7, "text"]}


def save(path: Path, state: Any = STATE, **how: Any) -> ckpt.PendingSave:
    return ckpt.save(state, path, options=options(**how))


# ---- save ------------------------------------------------------------------------------------------------------------


def test_returns_the_path_that_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", Path("b.pt"), str(tmp_path / "c.pt")):
        pending = ckpt.save(STATE, name, options=options())
        monkeypatch.chdir("/")  # relative is relative to where save() was called
        assert pending.result(DEADLINE_S) == tmp_path / Path(name).name == pending.path
        assert_same(STATE, ckpt.load(pending.path))
        monkeypatch.chdir(tmp_path)


def test_with_default_options(tmp_path: Path) -> None:
    assert_same(STATE, ckpt.load(ckpt.save(STATE, tmp_path / "x.pt").result(DEADLINE_S)))


def test_replaces_a_file_at_once(native: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", ["old"]).result(DEADLINE_S)
    native.set_fault("rename", delay_s=0.2)
    pending = save(path, ["new"])
    seen = []
    while not pending.done():
        seen.append(ckpt.load(path)[0])
    assert set(seen) <= {"old", "new"} and seen[0] == "old" and seen == sorted(seen, reverse=True)
    assert ckpt.load(path) == ["new"] and os.listdir(tmp_path) == ["x.pt"]


def test_the_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path / "x.pt").result(DEADLINE_S)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_python_values_are_those_of_the_call(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=0.05)
    state: dict[str, Any] = {"step": 1, "history": [1, 2], "big": list(range(100_000))}
    pending = save(tmp_path / "x.pt", state)
    state["step"] = 2
    state["history"].append(3)
    state["big"].clear()
    assert ckpt.load(pending.result(DEADLINE_S)) == {"step": 1, "history": [1, 2], "big": list(range(100_000))}


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none.*removed\?") as caught:
        save(tmp_path / "none" / "x.pt")
    assert caught.value.errno == errno.ENOENT and isinstance(caught.value, OSError)
    save(tmp_path / "x.pt").result(DEADLINE_S)


def test_a_path_that_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a directory") as caught:
        save(tmp_path)
    assert caught.value.errno == errno.EISDIR


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    name = "n" * 252 + ".pt"
    torch.save(STATE, tmp_path / name)
    assert_same(STATE, ckpt.load(save(tmp_path / name).result(DEADLINE_S)))
    assert os.listdir(tmp_path) == [name]


def test_after_the_engines_were_closed_there_are_new_ones(tmp_path: Path) -> None:
    save(tmp_path / "x.pt").result(DEADLINE_S)
    close_engines()
    save(tmp_path / "y.pt").result(DEADLINE_S)


# ---- a save that fails -----------------------------------------------------------------------------------------------


def test_a_failure_is_raised_logged_and_leaves_the_old_file(
    native: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "x.pt", ["old"]).result(DEADLINE_S)
    native.set_fault("pwritev", error=errno.ENOSPC)
    pending = save(path, ["new"])
    for _ in range(2):
        with pytest.raises(StorageError, match=r"pwritev.*x\.pt.*No space left.*free space") as caught:
            pending.result(DEADLINE_S)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename
    assert pending.exception() is not None and pending.done() and pending.captured
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and errors[0].name.startswith("ckpt") and "No space left" in errors[0].getMessage()
    assert ckpt.load(path) == ["old"] and os.listdir(tmp_path) == ["x.pt"]
    assert pickle.loads(pickle.dumps(caught.value)).errno == errno.ENOSPC


def test_a_failure_of_one_save_is_not_that_of_the_next(native: Any, tmp_path: Path) -> None:
    native.set_fault("fdatasync", path_part="bad", error=errno.EIO)
    bad, good = save(tmp_path / "bad.pt"), save(tmp_path / "good.pt")
    assert good.exception(DEADLINE_S) is None
    assert isinstance(bad.exception(DEADLINE_S), StorageError)
    assert os.listdir(tmp_path) == ["good.pt"]


# ---- waiting ---------------------------------------------------------------------------------------------------------


def test_waiting_with_a_timeout(native: Any, tmp_path: Path) -> None:
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    pending = save(tmp_path / "x.pt")
    begin = time.monotonic()
    with pytest.raises(DeadlineError, match=r"x\.pt.*captured, not yet durable.*goes on"):
        pending.result(timeout=0.1)
    with pytest.raises(TimeoutError):
        pending.exception(timeout=0)
    assert time.monotonic() - begin < DEADLINE_S / 2
    assert not pending.done() and not (tmp_path / "x.pt").exists()
    native.clear_faults()
    assert pending.result(DEADLINE_S) == tmp_path / "x.pt" and pending.exception(0) is None


def test_captured_comes_before_durable(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    tensor = torch.ones(1_000_000)  # more than the writers hold
    pending = ckpt.save([tensor], tmp_path / "x.pt", lazy=True, options=options())
    assert not pending.captured and not pending.done() and "in flight" in repr(pending)
    with pytest.raises(DeadlineError, match="not yet captured"):
        pending.result(0)
    native.clear_faults("pwritev")
    wait_until(lambda: pending.captured)
    assert not pending.done() and " captured" in repr(pending)
    native.clear_faults()
    pending.result(DEADLINE_S)
    assert pending.captured and pending.done() and "durable" in repr(pending) and str(tmp_path) in repr(pending)


def test_an_eager_save_is_captured_at_once(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=0.1)
    assert save(tmp_path / "x.pt").captured


def test_a_failed_save_says_so(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", error=errno.EIO)
    pending = save(tmp_path / "x.pt")
    assert isinstance(pending.exception(DEADLINE_S), StorageError)
    assert "failed: pwritev" in repr(pending)


def test_waiting_from_many_threads(native: Any, tmp_path: Path) -> None:
    native.set_fault("fdatasync", delay_s=0.2)
    pending, results = save(tmp_path / "x.pt"), []
    threads = [threading.Thread(target=lambda: results.append(pending.result(DEADLINE_S))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert results == [tmp_path / "x.pt"] * 8


# ---- callbacks -------------------------------------------------------------------------------------------------------


def test_callbacks_get_the_save_once(native: Any, tmp_path: Path) -> None:
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    pending = save(tmp_path / "x.pt")
    called: list[Any] = []
    for _ in range(2):
        pending.add_done_callback(lambda done: called.append((done, done.result(0), threading.current_thread())))
    assert called == []
    native.clear_faults()
    pending.result(DEADLINE_S)
    wait_until(lambda: len(called) == 2)
    assert [entry[:2] for entry in called] == [(pending, tmp_path / "x.pt")] * 2
    assert all(entry[2] is not threading.main_thread() for entry in called)
    pending.add_done_callback(lambda done: called.append(done))
    assert called[2:] == [pending], "at once, when done already"


def test_callbacks_of_a_failed_save(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", error=errno.EIO)
    pending, called = save(tmp_path / "x.pt"), []
    pending.add_done_callback(lambda done: called.append(done.exception(0)))
    wait_until(lambda: bool(called))
    assert isinstance(called[0], StorageError)


def test_a_callback_that_raises_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pending, called = save(tmp_path / "x.pt"), []

    def raises(done: ckpt.PendingSave) -> None:
        raise LookupError("a bug in the callback")

    pending.add_done_callback(raises)
    pending.add_done_callback(called.append)
    pending.result(DEADLINE_S)
    wait_until(lambda: called == [pending])
    save(tmp_path / "y.pt").result(DEADLINE_S)
    assert "a bug in the callback" in caplog.text


def test_a_callback_may_save_again(tmp_path: Path) -> None:
    again: list[ckpt.PendingSave] = []
    save(tmp_path / "x.pt").add_done_callback(lambda _: again.append(save(tmp_path / "y.pt")))
    wait_until(lambda: bool(again))
    assert again[0].result(DEADLINE_S) == tmp_path / "y.pt"


# ---- load ------------------------------------------------------------------------------------------------------------


def test_loads_plain_torch_files(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt")
    for path in (tmp_path / "x.pt", str(tmp_path / "x.pt")):
        assert_same(STATE, ckpt.load(path))


def test_loads_the_legacy_format(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert_same(STATE, ckpt.load(tmp_path / "x.pt"))


def test_loads_files_without_checksums_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    with caplog.at_level(logging.INFO, "ckpt"):
        assert_same(STATE, ckpt.load(tmp_path / "x.pt"))
    assert "without checksums" in caplog.text


def test_loads_where_it_is_told_to(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt").result(DEADLINE_S)
    assert ckpt.load(path, map_location="meta")["a"].is_meta
    assert ckpt.load(path, map_location=lambda storage, location: storage)["a"].device.type == "cpu"


def test_objects_need_to_be_allowed(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", Position(1, torch.ones(2), {3})).result(DEADLINE_S)
    with pytest.raises(CheckpointError, match=r"x\.pt.*weights_only=False.*run any code") as caught:
        ckpt.load(path)
    assert not isinstance(caught.value, CorruptError)
    assert ckpt.load(path, weights_only=False).epoch == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.pt") as caught:
        ckpt.load(tmp_path / "none.pt")
    assert caught.value.errno == errno.ENOENT


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=str(tmp_path)):
        ckpt.load(tmp_path)


def not_torch_files() -> dict[str, bytes]:
    rng = random.Random(4)
    junk = {f"junk_{number}": rng.randbytes(1000) for number in range(20)}
    text = {"text": b"hello, world\n" * 20, "json": b'{"a": 1}', "one_byte": b"P", "magic": b"PK\x03\x04", "zeros": bytes(5000)}
    return junk | text | {"empty": b"", "end": b"PK\5\6" + bytes(18), "short_end": b"PK\5\6", "pickle": pickle.dumps([1])}


def outcome(path: Path, **how: Any) -> str:
    """What load() makes of a bad file: "" if it calls it corrupt, as it should."""
    try:
        ckpt.load(path, **how)
    except CorruptError as error:
        return "" if str(path) in str(error) else f"does not name the file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return "loaded"


@pytest.mark.parametrize("weights_only", [True, False])
def test_what_is_no_torch_file_is_corrupt(weights_only: bool, tmp_path: Path) -> None:
    """Above all it must not advise to unpickle it without weights_only."""
    wrong = {}
    for name, content in not_torch_files().items():
        (tmp_path / name).write_bytes(content)
        if found := outcome(tmp_path / name, weights_only=weights_only):
            wrong[name] = found
    assert wrong == {}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_another_zip_is_no_torch_file(compression: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", compression) as archive:
        archive.writestr("hello.txt", "hello " * 100)
        archive.writestr("x/hello.txt", "hello " * 100)
    assert outcome(tmp_path / "x.pt") == ""


@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_a_truncated_file_is_corrupt(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    if writer == "ours":
        save(path).result(DEADLINE_S)
    else:
        torch.save(STATE, path)
    whole = path.read_bytes()
    rng, wrong = random.Random(5), {}
    for length in [*range(1, 60), *(len(whole) - n for n in range(1, 60)), *(rng.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:length])
        if found := outcome(path):
            wrong[length] = found
    assert wrong == {}
    path.write_bytes(whole)
    assert_same(STATE, ckpt.load(path))


@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_a_flipped_bit_in_a_record_is_found_and_named(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    if writer == "ours":
        save(path).result(DEADLINE_S)
    else:
        torch.save(STATE, path)
    whole = bytearray(path.read_bytes())
    at = whole.index(torch.arange(77_000, 77_002).numpy().tobytes())
    whole[at] ^= 4
    path.write_bytes(whole)
    torch.load(path)
    with pytest.raises(CorruptError, match=r"data/0.*x\.pt.*CRC-32"):
        ckpt.load(path)


@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_a_flipped_bit_anywhere_is_found_or_harmless(writer: str, tmp_path: Path) -> None:
    """In our files it is always found. Torch's differ between versions: there the result must at least be right."""
    state = {"a": torch.arange(20), "b": [torch.ones(3), 7, "text"]}
    path = tmp_path / "x.pt"
    if writer == "ours":
        save(path, state).result(DEADLINE_S)
    else:
        torch.save(state, path)
    whole = bytearray(path.read_bytes())
    wrong = {}
    for at in range(len(whole)):
        whole[at] ^= 1 << at % 8
        path.write_bytes(whole)
        found = outcome(path)
        if found == "loaded" and writer == "torch":
            assert_same(state, ckpt.load(path))
        elif found:
            wrong[at] = found
        whole[at] ^= 1 << at % 8
    assert wrong == {}


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_threads_and_files_are_those_of_the_engine(leaks_nothing: Any, tmp_path: Path) -> None:
    """The fixture looks whether all are gone; here they must be few."""
    for number in range(30):
        save(tmp_path / f"{number}.pt").result(DEADLINE_S)
    assert threading.active_count() < 10

"""The checking proxy: it changes nothing, finds what is put in, and what it takes down has the same findings elsewhere."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import fake_driver
import pytest
from device_rig import EAGER, LAZY, MIB, Rig
from fake_driver import FakeCuda
from places import ROOT
from replay_trace import kinds_of, replay
from strict_face import SIZE, Face
from support import DEADLINE_S, wait_until

KINDS = ("strict", "proxy")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("proxy")
    fake_driver.build_proxy(directory, fake_driver.build(directory))
    fake_driver.build(directory, kind="strict")
    return directory


@pytest.fixture
def proxied(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """One of its own, that takes down its calls."""
    monkeypatch.setenv("LAZYCKPT_PROXY_TRACE", str(tmp_path / "trace"))
    (tmp_path / "lib").mkdir()
    with fake_driver.loaded(Path(shutil.copy(built / "libproxy_cuda.so", tmp_path / "lib"))) as fake:
        monkeypatch.delenv("LAZYCKPT_PROXY_TRACE")  # else what replays would write there, too
        yield fake


def replayed(built: Path, tmp_path: Path, kind: str) -> list[str]:
    (tmp_path / kind).mkdir()
    library = shutil.copy(built / f"lib{kind}_cuda.so", tmp_path / kind)
    violations, differences = replay(tmp_path / "trace", Path(library))
    assert not differences
    return violations


def assert_found_again(built: Path, tmp_path: Path, proxied: FakeCuda, found: list[str]) -> None:
    for kind in KINDS:
        assert kinds_of(replayed(built, tmp_path, kind)) == kinds_of(found), kind
    proxied.before = proxied.alive()  # with what the trace has not given back, on the same stand-in


def test_it_has_all_calls_that_are_used(proxied: FakeCuda) -> None:
    used = re.findall(r"\bX\(\w+, (cu\w+),", (ROOT / "csrc" / "cuda" / "driver.h").read_text())
    assert len(used) > 30
    assert [call for call in used if not hasattr(proxied.cu, call)] == []


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("cache", [0, 4 * MIB])
def test_a_clean_run_is_clean(built: Path, proxied: FakeCuda, tmp_path: Path, cache: int, batches: bool) -> None:
    proxied.configure(seed=3, most_delay_s=0.001)
    rig = Rig(proxied, tmp_path, device_cache_bytes=cache, device_batches=batches)
    if cache:
        rig.warm_up()
    for _ in range(3):
        saved = rig.save([500_000, 10, 3000, *[300] * 50], [LAZY, LAZY, EAGER, *[LAZY] * 50], [0, 1, 0, *[1] * 50])
        rig.overwrite(saved, EAGER)
        rig.engine.fence(rig.streams)
        rig.overwrite(saved, LAZY)
        rig.check(saved)
    rig.end()
    proxied.assert_no_violation()
    assert_found_again(built, tmp_path, proxied, [])


def test_a_race_is_found_and_found_again(built: Path, proxied: FakeCuda, tmp_path: Path) -> None:
    rig = Rig(proxied, tmp_path)
    rig.check(rig.save([10, 10], [LAZY, LAZY], [0, 1]))
    rig.engine.fence(rig.streams)
    proxied.hold_copies(True)
    saved = rig.save([50_000], [LAZY], [0])
    wait_until(lambda: saved.job.captured)
    proxied.fill(0, rig.streams[0], saved.tensors[0].data_ptr(), 0xEE, 50_000, told=False)
    proxied.hold_copies(False)
    rig.engine.fence(rig.streams)
    assert saved.job.wait_finished(DEADLINE_S)
    found = proxied.violations()
    assert len(found) == 1 and "race" in found[0] and "a kernel" in found[0] and "cuMemcpyDtoHAsync" in found[0]
    rig.end()
    assert_found_again(built, tmp_path, proxied, found)


def test_a_range_beyond_an_allocation_is_found(built: Path, proxied: FakeCuda, tmp_path: Path) -> None:
    face = Face(proxied)
    memory, target, side = face.host(2 * SIZE), face.pinned(2 * SIZE), face.stream()
    proxied.cu.fake_declare(0, ctypes.c_void_p(memory), ctypes.c_size_t(SIZE))
    assert face.to_host(target, memory, side) == 0
    proxied.assert_no_violation()
    face.to_host(target, memory + 1, side)
    found = proxied.violations()
    assert len(found) == 1 and "crosses the end of the allocation" in found[0]
    proxied.synchronize(0, side.value or 0)
    for end in face.ends:
        end()
    library = Path(shutil.copy(built / "libstrict_cuda.so", tmp_path))
    violations, differences = replay(tmp_path / "trace", library)
    assert kinds_of(violations) == kinds_of(found)
    assert len(differences) == 1 and "1 instead of 0" in differences[0], "the model refuses it"


def test_memory_that_is_given_up_in_use_is_found(proxied: FakeCuda) -> None:
    face = Face(proxied)
    memory, target, side = face.allocation(), face.host(), face.stream()
    assert face.register(target) == face.to_host(target, memory, side) == 0
    assert face.unregister(target) == 0
    found = proxied.violations()
    assert len(found) == 1 and "cuMemHostUnregister gives up" in found[0]
    proxied.synchronize(0, side.value or 0)
    for end in face.ends:
        end()
    proxied.before["frees of memory in use"] = proxied.alive()["frees of memory in use"]


def test_handles_that_are_gone_are_found(proxied: FakeCuda) -> None:
    stream = ctypes.c_void_p()
    proxied.call("cuStreamCreateWithPriority", ctypes.byref(stream), 0, 0)
    proxied.call("cuStreamDestroy_v2", stream)
    assert proxied.cu.cuStreamQuery(stream) == 400
    assert ["destroyed stream" in each for each in proxied.violations()] == [True]

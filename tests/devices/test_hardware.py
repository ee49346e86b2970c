"""On a real GPU, through torch: what no stand-in for the driver can show. `make gpu` runs it.

With LAZYCKPT_TEST_DEVICE=cpu the same programs run in host memory, which tries out these tests, and not the library. With
LAZYCKPT_TEST_DRIVER=proxy the library's calls go through the checking proxy, which may find no rule broken.
(LAZYCKPT_PROXY_TRACE names a file for the calls; "%p" in it is the number of the process.)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import CHOSEN, build_proxy
from places import PYTHONPATH
from support import patience

import ckpt
from ckpt import devices as torch_devices

DEVICE = torch.device(os.environ.get("LAZYCKPT_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="has no meaning in host memory")
DEADLINE_S = 120.0
ARENAS = ("16MiB", "1GiB")  # less than the state, and more
WIDTH = 1024 if ON_GPU else 128


@functools.cache
def proxy() -> Path:
    return build_proxy(Path(tempfile.mkdtemp(prefix="ckpt-proxy-")))


def checked() -> Iterator[None]:
    """Through the proxy, if that is chosen."""
    if CHOSEN != "proxy" or not ON_GPU:
        yield
        return
    library, before = ctypes.CDLL(str(proxy())), torch_devices.in_use
    library.fake_violations.restype = ctypes.c_char_p
    torch_devices.in_use = torch_devices.TorchDevices(driver=str(proxy()))
    yield
    torch_devices.in_use = before
    found = library.fake_violations().decode()
    # What tries a device out lets a copy and a write race, each with the other, on purpose.
    assert [each for each in found.splitlines() if not ("cuMemsetD8Async" in each and "race" in each)] == []


through_proxy = pytest.fixture(autouse=True)(checked)


def options(**how: Any) -> ckpt.Options:
    return ckpt.Options(**({"device_lazy": True, "arena_bytes": "64MiB"} | how))


def make_checkpointer(directory: Path, **how: Any) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(directory, keep=None, options=options(**how), coordinator="local")


def on_host(value: Any) -> Any:
    """A copy that nothing changes any more."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: on_host(each) for key, each in value.items()}
    return [on_host(each) for each in value] if isinstance(value, list) else value


def assert_same(expected: Any, found: Any, path: str = "") -> None:
    """The same values, to the bit, under the same names."""
    if isinstance(expected, torch.Tensor):
        assert (expected.dtype, expected.shape) == (found.dtype, found.shape), path
        a, b = (each.cpu().contiguous().reshape(-1).view(torch.uint8) for each in (expected, found))
        assert torch.equal(a, b), f"{path}: {int((a != b).sum())} of {a.numel()} bytes differ"
    elif isinstance(expected, (dict, list)):
        keys = range(len(expected)) if isinstance(expected, list) else expected
        assert len(expected) == len(found), path
        for key in keys:
            assert_same(expected[key], found[key], f"{path}/{key}")
    else:
        assert expected == found, path


def loaded(directory: Path, step: int) -> Any:
    return ckpt.load(directory / f"step-{step:012d}" / "state.pt", map_location="cpu")


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
        yield


def make_stream() -> Any:
    if not ON_GPU:
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def make_model(width: int = WIDTH, layers: int = 6) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).to(DEVICE)


def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer, width: int = WIDTH) -> None:
    model(torch.randn(64, width, device=DEVICE)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_every_step(directory: Path, optimizer_options: dict[str, Any], stream: Any, arena: str, steps: int = 12) -> None:
    """Each file must hold what was there when save() was called, although the next step comes at once."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **optimizer_options)
    expected = {}
    with (
        on_stream(stream),
        ckpt.Checkpointer(directory, keep=None, options=options(arena_bytes=arena), coordinator="local") as c,
    ):
        for step in range(steps):
            learn(model, optimizer)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            expected[step] = on_host(state)
            c.save(step, state)
        c.wait(DEADLINE_S)
    for step, each in expected.items():
        assert_same(each, loaded(directory, step))


@needs_gpu
def test_the_device_keeps_order() -> None:
    assert [(each.verdict, each.reason) for each in ckpt.check_devices(timeout_s=30)] == [("passed", "")]


@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize("how", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_each_step_is_what_was_there(side: bool, how: dict[str, Any], arena: str, tmp_path: Path) -> None:
    save_every_step(tmp_path, how, make_stream() if side else None, arena)


def test_two_optimizers_on_two_streams(tmp_path: Path) -> None:
    """Neither waits for the other: each must wait for the copies of its own tensors."""
    models = [make_model(), make_model()]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in models]
    streams = [make_stream(), make_stream()]
    expected = {}
    with make_checkpointer(tmp_path) as checkpointer:
        for step in range(12):
            for model, optimizer, stream in zip(models, optimizers, streams, strict=True):
                with on_stream(stream):
                    learn(model, optimizer)
            synchronize()
            state = {str(i): [models[i].state_dict(), optimizers[i].state_dict()] for i in (0, 1)}
            expected[step] = on_host(state)
            checkpointer.save(step, state)
        checkpointer.wait(DEADLINE_S)
    for step, each in expected.items():
        assert_same(each, loaded(tmp_path, step))


@needs_gpu
@pytest.mark.parametrize("fenced", [False, True])
def test_a_captured_step(fenced: bool, tmp_path: Path) -> None:
    """With a fence before each replay, and without one."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.05), capturable=True)
    batch = torch.randn(64, WIDTH, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(batch).square().mean().backward()
        optimizer.step()

    side = make_stream()
    with on_stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    ckpt.fence()
    with torch.cuda.graph(graph):
        step()
    expected = {}
    lazy = list(model.parameters()) if fenced else None
    with make_checkpointer(tmp_path) as checkpointer:
        for number in range(8):
            if fenced:
                ckpt.fence()
            graph.replay()
            expected[number] = on_host(model.state_dict())
            checkpointer.save(number, model.state_dict(), lazy=lazy)
        ckpt.fence()
        checkpointer.wait(DEADLINE_S)
    for number, each in expected.items():
        assert_same(each, loaded(tmp_path, number))


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("lazy", [False, True])
def test_all_kinds_of_tensors(lazy: bool, tmp_path: Path) -> None:
    state: dict[str, Any] = {
        str(dtype): torch.randint(0, 2, (257, 33)).to(torch.float32).to(dtype).to(DEVICE) for dtype in DTYPES
    }
    whole = torch.randn(300, 200, device=DEVICE)
    state |= {"scalar": torch.tensor(3.5, device=DEVICE), "empty": torch.empty(0, 4, device=DEVICE), "whole": whole}
    state |= {"column": whole[:, 7], "transposed": whole.t(), "part": whole[10:20], "on the host": torch.randn(50, 50)}
    expected = on_host(state)
    pending = ckpt.save(state, tmp_path / "a.pt", lazy=lazy, options=options())
    ckpt.fence()
    for tensor in state.values():
        tensor.zero_()
    pending.result(DEADLINE_S)
    assert_same(expected, ckpt.load(tmp_path / "a.pt", map_location="cpu"))
    assert_same(expected, torch.load(tmp_path / "a.pt", map_location="cpu", weights_only=True))


def test_loads_to_the_device(tmp_path: Path) -> None:
    model = make_model()
    ckpt.save(model.state_dict(), tmp_path / "a.pt", options=options()).result(DEADLINE_S)
    expected = on_host(model.state_dict())
    found = ckpt.load(tmp_path / "a.pt", map_location=DEVICE)
    assert {tensor.device.type for tensor in found.values()} == {DEVICE.type}
    assert_same(expected, found)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    ckpt.load_into(tmp_path / "a.pt", model)
    assert_same(expected, model.state_dict())


@needs_gpu
def test_memory_is_used_again(tmp_path: Path) -> None:
    """Tensors go right after the fence, and what is allocated next is written at once."""
    for number in range(20):
        tensors = [torch.full((1 << 20,), float(number), device=DEVICE) for _ in range(16)]
        pending = ckpt.save(tensors, tmp_path / "a.pt", lazy=True, options=options(arena_bytes="16MiB"))
        ckpt.fence()
        del tensors
        others = [torch.full((1 << 20,), -1.0, device=DEVICE) for _ in range(16)]
        pending.result(DEADLINE_S)
        assert all(bool((each == number).all()) for each in ckpt.load(tmp_path / "a.pt", map_location="cpu"))
        del others


@needs_gpu
def test_a_full_device(tmp_path: Path) -> None:
    model = make_model()
    expected, rest = on_host(model.state_dict()), []
    try:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            while True:
                rest.append(torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE))
        ckpt.save(model.state_dict(), tmp_path / "a.pt", lazy=True, options=options()).result(DEADLINE_S)
    finally:
        rest.clear()
        torch.cuda.empty_cache()
    assert_same(expected, ckpt.load(tmp_path / "a.pt", map_location="cpu"))


@needs_gpu
@pytest.mark.parametrize("setting", ["backend:cudaMallocAsync", "expandable_segments:True"])
def test_other_allocators(setting: str, tmp_path: Path) -> None:
    program = (
        "import contextlib, pathlib, sys, test_hardware as t\n"
        "with contextlib.contextmanager(t.checked)():\n"
        "    t.save_every_step(pathlib.Path(sys.argv[1]), {'foreach': True}, t.make_stream(), '16MiB')\n"
    )
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting, "PYTHONPATH": PYTHONPATH}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=patience(300)
    )
    assert ended.returncode == 0, ended.stderr

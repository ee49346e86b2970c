"""LazyStager with LazyStorageWriter: what happens to tensors between staging and the writing, which torch begins later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from support import DEADLINE_S, options
from torch import nn

from ckpt import _native
from ckpt import devices as torch_devices
from ckpt.errors import CaptureError
from ckpt.integrations import dcp
from ckpt.saving import staged

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    _native.clear_faults()


class Held(stock.DefaultSavePlanner):
    """Waits before it plans."""

    def __init__(self, go_on: threading.Event) -> None:
        super().__init__()
        self._go_on = go_on

    def create_local_plan(self) -> Any:
        assert self._go_on.wait(DEADLINE_S)
        return super().create_local_plan()


def trained() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 300)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def begin(path: Path, state: dict[str, Any], go_on: threading.Event) -> Any:
    more = {"storage_writer": dcp.LazyStorageWriter(path, options()), "async_stager": dcp.LazyStager(options())}
    return stock.async_save(state, planner=Held(go_on), no_dist=True, **more)


def counted(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.add_(1)


def uncounted(weight: torch.Tensor) -> None:
    weight.data.add_(1)


@pytest.mark.parametrize("write", [counted, uncounted])
def test_a_write_before_torch_has_planned_is_found(write: Callable[[torch.Tensor], None], tmp_path: Path) -> None:
    """By no step of an optimizer, which would wait."""
    (model, optimizer), go_on = trained(), threading.Event()
    go_on.set()
    begin(tmp_path / "id", {"model": model.state_dict()}, go_on).upload_completion.result(DEADLINE_S)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    go_on.clear()
    response = begin(tmp_path / "id", {"model": model.state_dict()}, go_on)
    write(model.weight)
    go_on.set()
    with pytest.raises(BaseException, match="was changed before its bytes were captured") as found:
        response.upload_completion.result(DEADLINE_S)
    (failure,) = found.value.failures.values()  # type: ignore[attr-defined]
    assert isinstance(failure[0], CaptureError) and "model.weight (float32[300, 300])" in str(failure[0])
    response.staging_completion.result(DEADLINE_S)
    step(model, optimizer)
    there = {"model": {key: torch.zeros_like(tensor) for key, tensor in before.items()}}
    stock.load(there, checkpoint_id=str(tmp_path / "id"), no_dist=True)
    assert all(torch.equal(there["model"][key], tensor) for key, tensor in before.items())
    assert len(list((tmp_path / "id").glob("*.distcp"))) == 1


def test_copies_of_device_memory_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that makes them is not that of the thread that writes them."""
    (model, _), go_on, done, asked = trained(), threading.Event(), threading.Event(), threading.Event()
    go_on.set()

    def mark(device: int) -> Callable[[], None]:
        assert device == 3 and not asked.is_set()

        def wait() -> None:
            asked.set()
            assert done.wait(DEADLINE_S)

        return wait

    monkeypatch.setattr(staged, "device_of", lambda tensor: 3 if tensor is model.weight else torch_devices.HOST)
    monkeypatch.setattr(torch_devices.in_use, "mark", mark, raising=False)
    response = begin(tmp_path / "id", {"weight": model.weight, "bias": model.bias}, go_on)
    assert asked.wait(DEADLINE_S)
    assert not list(tmp_path.glob("id/*.distcp")) and not list(tmp_path.glob("id/.tmp-*"))
    done.set()
    response.upload_completion.result(DEADLINE_S)
    found = {"weight": torch.zeros(300, 300), "bias": torch.zeros(300)}
    stock.load(found, checkpoint_id=str(tmp_path / "id"), no_dist=True)
    assert torch.equal(found["weight"], model.weight) and torch.equal(found["bias"], model.bias)


VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "whole": lambda: torch.randn(4, 5),
    "transposed": lambda: torch.randn(40, 60).t(),
    "column": lambda: torch.randn(50, 50)[:, 3],
    "gaps": lambda: torch.randn(6, 8)[1:, 2:5],
    "expanded": lambda: torch.randn(4, 1)[1:].expand(3, 5),
    "windows": lambda: torch.randn(20).unfold(0, 4, 2),
    "channels": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)[:, :, 1:],
    "empty": lambda: torch.randn(3, 4)[:, :0],
    "scalar": lambda: torch.randn(3)[1],
    "conjugated": lambda: torch.randn(3, 4, dtype=torch.complex64)[:, 1:3].conj(),
    "negative": lambda: torch._neg_view(torch.randn(3, 4)[:, 1:3]),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_copy_lies_in_its_memory_as_the_tensor_does(kind: str) -> None:
    """torch 2.15 notes the strides of what is staged, and with its own stagers those are what they were."""
    tensor = VIEWS[kind]()
    kept = staged.StagedTensors([tensor], options())
    (copy,) = kept.tensors
    kept.release()
    assert copy is not tensor and copy.dtype == tensor.dtype and torch.equal(copy.to_dense(), tensor.to_dense())
    if tensor.layout is torch.strided and tensor.numel() > 0:
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
        if kind not in ("conjugated", "negative"):
            assert copy.stride() == tensor.stride() and copy.storage_offset() == 0

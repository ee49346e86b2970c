"""In-place writes that count versions: which tensor counts depends on which was saved, and through which it is written."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, clear_faults, options

import ckpt
from ckpt.errors import CaptureError
from ckpt.saving import inspection

ELEMENTS = 1 << 20
Write = Callable[[], object]
Case = tuple[Any, Any, Write, str]  # the state, what is declared, a write of few elements, and how an error names the tensor


def trained(*parameters: torch.nn.Parameter, kind: Any = torch.optim.SGD) -> torch.optim.Optimizer:
    optimizer = kind(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizers.append(optimizer)  # until the test has ended
    return optimizer


optimizers: list[torch.optim.Optimizer] = []


@pytest.fixture(autouse=True)
def forget() -> Any:
    yield
    optimizers.clear()


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.rand(1024, ELEMENTS // 1024))


def add_to_one(tensor: torch.Tensor) -> Write:
    def write() -> None:
        with torch.no_grad():
            tensor[517, 7] += 1

    return write


def renormalise(saved: Callable[[torch.nn.Parameter], Any], declared: Any = None) -> Case:
    embedding = torch.nn.Embedding(4096, ELEMENTS // 4096, max_norm=1.0)
    trained(embedding.weight)
    rows = iter(range(1700, 4000, 50))
    return {"weight": saved(embedding.weight)}, declared, lambda: embedding(torch.tensor([next(rows)])), "weight"


def saved_data(declared: Any = None) -> Case:
    weight = parameter()
    trained(weight)
    return {"w": weight.data}, declared, add_to_one(weight), "w"


def saved_flat() -> Case:
    weight = parameter()
    trained(weight)
    return {"w": weight.data.view(-1)}, None, add_to_one(weight), ""


def with_attribute(written: Callable[[torch.nn.Parameter], torch.Tensor] = lambda weight: weight, lazy: Any = None) -> Case:
    weight = parameter()
    weight.note = 1  # type: ignore[attr-defined]
    trained(weight)
    return {"w": weight}, lazy, add_to_one(written(weight)), "w"


class Special(torch.nn.Parameter):
    """A subclass, which torch's own way pickles."""


def subclass() -> Case:
    weight = Special(torch.rand(1024, ELEMENTS // 1024))
    trained(weight)
    return {"w": weight}, True, add_to_one(weight), "w"


def flat(first: int, gap: int, written: int) -> Case:
    """Parameters in one buffer, each with a counter of its own."""
    buffer = torch.rand(first + 2 * ELEMENTS + gap)
    starts = (first, first + ELEMENTS + gap)
    both = [torch.nn.Parameter(buffer[start : start + ELEMENTS].view(1024, -1).data) for start in starts]
    trained(*both)
    # A witness that is hit before the counters are looked at knows the record alone, which goes by its first tensor.
    return {"a": both[0], "b": both[1]}, None, add_to_one(both[written]), "a|b" if written else "a"


def alias(lazy: Any) -> Case:
    """Saved twice by tensors that count apart, and written through the second."""
    weight = parameter()
    trained(weight)
    other = weight.data
    return {"w": weight.detach(), "other": other}, lazy, add_to_one(other), "w|other"


def state_of_adam() -> Case:
    weight = parameter()
    optimizer = trained(weight, kind=torch.optim.Adam)
    average = optimizer.state[weight]["exp_avg"]
    return {"average": average.data}, None, add_to_one(average), "average"


def declared_model() -> Case:
    layer = torch.nn.Linear(1024, ELEMENTS // 1024)
    return {name: each.data for name, each in layer.named_parameters()}, layer, add_to_one(layer.weight), "weight"


def state_that_is_the_gradient() -> Case:
    """An optimizer that keeps the gradient itself, to which the next backward adds."""
    weight = parameter()
    optimizer = trained(weight)
    optimizer.state[weight]["last"] = weight.grad
    return {"last": optimizer.state[weight]["last"].data}, None, lambda: (weight[517:518] * 3).sum().backward(), "last"


CASES: dict[str, Callable[[], Case]] = {
    "embedding": lambda: renormalise(lambda weight: weight),
    "embedding_data": lambda: renormalise(lambda weight: weight.data),
    "embedding_data_all": lambda: renormalise(lambda weight: weight.data, True),
    "data": saved_data,
    "data_all": lambda: saved_data(True),
    "data_in_another_shape": saved_flat,
    "attribute": with_attribute,
    "attribute_alias": lambda: with_attribute(lambda weight: weight.detach(), True),
    "subclass": subclass,
    "flat_first": lambda: flat(0, 0, 0),
    "flat_second": lambda: flat(0, 0, 1),
    "flat_gap_first": lambda: flat(64, 640, 0),
    "flat_gap_second": lambda: flat(64, 640, 1),
    "alias": lambda: alias(None),
    "alias_all": lambda: alias(True),
    "state": state_of_adam,
    "declared": declared_model,
    "gradient": state_that_is_the_gradient,
}


@pytest.mark.parametrize("case", CASES)
def test_a_write_that_counts_fails_the_save(case: str, native: Any, tmp_path: Path) -> None:
    state, declared, write, name = CASES[case]()
    for _ in range(3):
        native.set_fault("pwritev", delay_s=DEADLINE_S)
        pending = ckpt.save(state, tmp_path / "x.pt", lazy=declared, options=options())
        assert not pending.captured, "it is not lazy, so this tests nothing"
        write()
        clear_faults()
        with pytest.raises(CaptureError, match=rf"tensor {'[.]?' if name else ''}({name})"):
            pending.result(DEADLINE_S)
        assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("case", CASES)
def test_without_a_write_all_is_well(case: str, tmp_path: Path) -> None:
    state, declared, write, _ = CASES[case]()
    for _ in range(3):
        with torch.serialization.safe_globals([Special]):
            torch.save(state, tmp_path / "expected.pt")
            expected = torch.load(tmp_path / "expected.pt", weights_only=False)
            pending = ckpt.save(state, tmp_path / "x.pt", lazy=declared, options=options())
            ckpt.fence()
            write()
            assert_same(expected, ckpt.load(pending.result(DEADLINE_S), weights_only=False))


def test_a_write_beside_what_is_saved_is_nobodys_business(native: Any, tmp_path: Path) -> None:
    """Another parameter in the same buffer, which this save does not hold."""
    state, _, write, _ = flat(64, 640, 1)
    del state["b"]
    expected = copy.deepcopy(state["a"])
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    pending = ckpt.save(state, tmp_path / "x.pt", options=options())
    assert not pending.captured
    write()
    clear_faults()
    assert_same({"a": expected}, ckpt.load(pending.result(DEADLINE_S)))


def test_forward_and_backward_count_nothing(tmp_path: Path, native: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 1000))
    optimizer = trained(*model.parameters(), kind=torch.optim.AdamW)
    native.set_fault("pwritev", delay_s=0.01)
    for number in range(5):
        state = {"model": {n: p.data for n, p in model.named_parameters()}, "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / "expected.pt")
        pending = ckpt.save(state, tmp_path / f"{number}.pt", options=options())
        optimizer.zero_grad(set_to_none=number % 2 == 0)
        model(torch.arange(100)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert_same(torch.load(tmp_path / "expected.pt"), ckpt.load(pending.result(DEADLINE_S)))


# Not the sum into a gradient: its counter moves when all of it has been added, milliseconds behind the one row that changes. A
# save that ends in between has no trace of it, which is why such a backward needs a fence of its own.
@pytest.mark.parametrize("case", [case for case in CASES if case != "gradient"])
def test_writes_at_random_moments(case: str, native: Any, tmp_path: Path) -> None:
    """A write may come too late to matter; else the save must fail."""
    state, declared, write, _ = CASES[case]()
    choose, right = random.Random(case), 0
    for number in range(15):
        torch.save(state, tmp_path / "expected.pt")
        held = number % 5 == 0  # then the write comes in time, also where this thread is slow
        native.set_fault("pwritev", delay_s=DEADLINE_S if held else choose.choice([0.0, 0.0, 0.0005, 0.002]))
        how = options(chunk_bytes="64KiB" if held else choose.choice(["64KiB", "1MiB"]), arena_bytes="16MiB")
        pending = ckpt.save(state, tmp_path / "x.pt", lazy=declared, options=how)
        chunks = 0 if held else choose.randrange(8)
        while chunks and not pending.captured:
            chunks -= inspection.files_of(pending)[0].job.stats["bytes_from_tensors"] > 0
        write()
        clear_faults()
        error = pending.exception(DEADLINE_S)
        if error is None:
            right += 1
            assert not held
            expected = torch.load(tmp_path / "expected.pt", weights_only=False)
            assert_same(expected, ckpt.load(pending.path, weights_only=False))
        else:
            assert isinstance(error, CaptureError)
    assert right < 15, "the writes come too late to test anything"

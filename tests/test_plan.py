"""The plan: which bytes of which storages a save will write, and the pickle that names them."""

from __future__ import annotations

import gc
import pickletools
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from states import ALL_STATES, PARTIAL_STATES, Net
from support import as_bytes

import ckpt
from ckpt._plan import COPY, LAZY, SavePlan, make_plan

# What torch's weights_only unpickler, or any protocol 2 reader, knows.
LATER_OPCODES = {"FRAME", "MEMOIZE", "SHORT_BINUNICODE", "BINUNICODE8", "STACK_GLOBAL", "NEWOBJ_EX", "BYTEARRAY8", "POP"}


def plan_of(obj: Any, is_lazy: Callable[[int], bool] = lambda _: False, eager_bytes: int = 0) -> SavePlan:
    return make_plan(obj, is_lazy, eager_bytes)


def bytes_of(plan: SavePlan, index: int) -> bytes:
    """What would be written as record `index`, read through the storage that the plan holds."""
    storage = as_bytes(torch.empty(0, dtype=torch.uint8).set_(plan.records[index].storage))
    low = plan.addresses[index] - storage.data_ptr()
    assert 0 <= low <= low + plan.sizes[index] <= storage.numel(), "the record reaches out of its storage"
    return storage[low : low + plan.sizes[index]].numpy().tobytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL_STATES | PARTIAL_STATES)
def test_every_record_lies_in_its_storage(name: str) -> None:
    plan = plan_of((ALL_STATES | PARTIAL_STATES)[name]())
    assert len(plan.records) == len(plan.addresses) == len(plan.sizes) == len(plan.kinds)
    for index, size in enumerate(plan.sizes):
        if size:
            bytes_of(plan, index)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL_STATES | PARTIAL_STATES)
def test_the_pickle_is_protocol_2(name: str) -> None:
    plan = plan_of((ALL_STATES | PARTIAL_STATES)[name]())
    assert {opcode.name for opcode, _, _ in pickletools.genops(plan.pickle)} & LATER_OPCODES == set()


def test_records_are_numbered_as_they_are_met() -> None:
    tensors = [torch.full((3,), i, dtype=torch.uint8) for i in range(5)]
    plan = plan_of({"b": tensors[0], "a": [tensors[1], tensors[0], tensors[2]], "z": {"y": tensors[3:]}})
    assert [bytes_of(plan, index) for index in range(5)] == [bytes([i] * 3) for i in range(5)]
    assert [record.key for record in plan.records] == ["0", "1", "2", "3", "4"]


def test_a_storage_is_planned_once() -> None:
    weight = torch.nn.Parameter(torch.randn(10))
    plan = plan_of([weight, weight, weight.data, weight.detach(), weight.data.view(2, 5), weight.data.t()])
    assert plan.sizes == [40] and plan.addresses == [weight.data_ptr()]


def test_only_what_is_lazy_and_large_is_lazy() -> None:
    large, small, other = torch.zeros(100), torch.zeros(4), torch.zeros(100)
    lazy = {tensor.untyped_storage()._cdata for tensor in (large, small)}
    plan = plan_of([large, small, other], lazy.__contains__, eager_bytes=16)
    assert list(plan.kinds) == [LAZY, COPY, COPY]
    plan = plan_of([large, small, other], lazy.__contains__, eager_bytes=15)
    assert list(plan.kinds) == [LAZY, LAZY, COPY]
    plan = plan_of([large, small, other], lazy.__contains__, eager_bytes=400)
    assert list(plan.kinds) == [COPY, COPY, COPY]


def test_the_size_that_counts_is_that_of_the_record() -> None:
    """A small view of a large lazy storage is small."""
    large = torch.zeros(10_000)
    plan = plan_of([large[3:5], large[50:5000]], lambda _: True, eager_bytes=100)
    assert plan.sizes == [8, 4 * 4950] and list(plan.kinds) == [COPY, LAZY]
    assert plan.addresses == [large[3:].data_ptr(), large[50:].data_ptr()]


def test_tensors_made_while_pickling_stay_alive() -> None:
    class Maker:
        def __reduce__(self) -> Any:
            return (list, ([torch.arange(1000) + 7, torch.arange(500)[20:30]],))

    plan = plan_of([Maker(), torch.arange(9)[2:4]])
    gc.collect()
    for _ in range(20):
        torch.full((1000,), -1)  # would take the memory, were it free
    made = [torch.frombuffer(bytearray(bytes_of(plan, index)), dtype=torch.int64) for index in range(3)]
    assert torch.equal(made[0], torch.arange(1000) + 7)
    assert set(range(20, 30)) <= set(made[1].tolist())
    assert made[2].tolist() == [2, 3]


def test_the_plan_holds_storages_and_gives_them_back() -> None:
    """Without the cyclic collector: a save must not keep what the caller has dropped."""
    gc.collect()
    gc.disable()
    try:
        tensor, holder = torch.ones(1000), Net()
        gone = [weakref.ref(tensor), weakref.ref(holder)]
        plan: Any = plan_of([tensor, holder, torch.ones(5)[1:2]])
        del tensor, holder
        assert bytes_of(plan, 0) == np.ones(1000, dtype=np.float32).tobytes()
        del plan
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_an_object_that_cannot_be_pickled_raises_its_own_error(tmp_path: Any) -> None:
    class Refuses:
        def __reduce__(self) -> Any:
            raise LookupError("not me")

    with pytest.raises(LookupError, match="not me"):
        ckpt.save([torch.ones(3), Refuses()], tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []
    assert gc.isenabled()
    ckpt.save([torch.ones(3)], tmp_path / "x.pt").result(60)  # its place in flight was given back
    ckpt.save([torch.ones(3)], tmp_path / "x.pt").result(60)


def test_a_disabled_collector_stays_disabled(tmp_path: Any) -> None:
    gc.disable()
    try:
        ckpt.save([torch.ones(3)], tmp_path / "x.pt").result(60)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_pickling_may_run_any_code() -> None:
    """Objects whose pickling looks at tensors, makes some, or saves by itself."""

    class Nosy:
        def __reduce__(self) -> Any:
            inner = plan_of([torch.ones(3), torch.ones(8)[2:5]])
            assert sorted(inner.sizes) == [12, 12]
            return (OrderedDict, ())

    outer = plan_of([torch.zeros(2), Nosy(), torch.zeros(5)[1:2]])
    assert outer.sizes == [8, 4]


def test_planning_is_fast() -> None:
    """A bound that only an accident breaks: the aim, 10 microseconds, is measured by the benchmarks."""
    state = {str(i): torch.empty(10) for i in range(10_000)}
    fastest = min(timed(lambda: plan_of(state)) for _ in range(3))
    assert fastest < 0.5, f"{fastest / 10_000 * 1e6:.1f} microseconds per tensor"


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def test_planning_needs_time_in_proportion_to_the_tensors() -> None:
    flat = torch.zeros(80_000)
    views = [flat[2 * i : 2 * i + 1] for i in range(40_000)]
    assert timed(lambda: plan_of(views)) < 5  # each view becomes a record; a quadratic search would take minutes

"""The plan: which bytes of which storages a save will write, and the pickle that names them."""

from __future__ import annotations

import gc
import io
import pickletools
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from states import ALL_STATES, PARTIAL_STATES, Net
from support import as_bytes

import ckpt
from ckpt import _native
from ckpt.plan import pickler as torch_pickler
from ckpt.plan.lazy_storages import LazyStorages
from ckpt.plan.save_plan import COPY, LAZY, SavePlan, make_plan

# What torch's weights_only unpickler, or any protocol 2 reader, knows.
LATER_OPCODES = {"FRAME", "MEMOIZE", "SHORT_BINUNICODE", "BINUNICODE8", "STACK_GLOBAL", "NEWOBJ_EX", "BYTEARRAY8", "POP"}


def plan_of(obj: Any, lazy: LazyStorages = lambda _: False, eager_bytes: int = 0) -> SavePlan:
    return make_plan(obj, lazy, eager_bytes)


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
    lazy = {tensor.untyped_storage()._cdata: [None, tensor] for tensor in (large, small)}
    plan = plan_of([large, small, other], lambda _: lazy, eager_bytes=16)
    assert list(plan.kinds) == [LAZY, COPY, COPY]
    plan = plan_of([large, small, other], lambda _: lazy, eager_bytes=15)
    assert list(plan.kinds) == [LAZY, LAZY, COPY]
    plan = plan_of([large, small, other], lambda _: lazy, eager_bytes=400)
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


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda bad: {"model": [torch.ones(3), {"f": bad}], "other": 3}, "['model'][1]['f']"),
        (lambda bad: {"ema": Holder((1, bad))}, "['ema'].held[1]"),
        (lambda bad: bad, ""),
    ],
)
def test_the_error_says_where_pickling_failed(wrap: Any, path: str, tmp_path: Any) -> None:
    """Also for which file; it keeps its type."""
    with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock'") as caught:
        ckpt.save(wrap(threading.Lock()), tmp_path / "x.pt")
    where = f"what is at {path} cannot be pickled: " if path else ""
    assert str(caught.value).startswith(f"cannot save to '{tmp_path / 'x.pt'}': {where}cannot pickle")


def test_an_error_of_the_object_keeps_what_it_carries(tmp_path: Any) -> None:
    class Code(Exception):
        pass

    class Refuses:
        def __reduce__(self) -> Any:
            raise Code("E17")

    with pytest.raises(Code) as caught:
        ckpt.save({"a": [Refuses()]}, tmp_path / "x.pt")
    assert caught.value.args == ("E17",)
    if hasattr(caught.value, "__notes__"):
        assert caught.value.__notes__ == [f"cannot save to '{tmp_path / 'x.pt'}': what is at ['a'][0] cannot be pickled"]


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
    begin = time.process_time()
    call()
    return time.process_time() - begin  # whatever else the machine does


def test_planning_needs_time_in_proportion_to_the_tensors() -> None:
    flat = torch.zeros(80_000)
    views = [flat[2 * i : 2 * i + 1] for i in range(40_000)]
    assert timed(lambda: plan_of(views)) < 5  # each view becomes a record; a quadratic search would take minutes


# ---- the native pickler, beside Python's own -------------------------------------------------------------------------


@pytest.fixture(params=["calls", "dlpack", "methods"])
def pickler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are asked by functions of torch's libraries, by the exchange API of DLPack, and by methods, as in other torch."""
    calls, exchange = request.param == "calls", request.param != "methods"
    made = torch_pickler.make_state_pickler(exchange=exchange, calls=calls)
    if exchange and not made.exchanges:
        pytest.skip(f"torch {torch.__version__} has no exchange API that tells strides as they are")
    if calls and not made.calls_directly:
        pytest.skip(f"the libraries of torch {torch.__version__} do not answer as those that were tested")
    assert (made.exchanges, made.calls_directly) == (exchange, calls)
    monkeypatch.setattr(torch_pickler, "state_pickler", made)


def pickled_twice(obj: Any, remaps: dict[int, Any] | None = None) -> tuple[bytes | None, bytes]:
    table = torch_pickler.StorageTable(remaps or {})
    records = {"records": table.records, "order": table.order}
    native = torch_pickler.state_pickler.dump(obj, **records, remaps=remaps or {}, reduce=table.reducer_override)
    return native, torch_pickler.dump_in_python(obj, remaps or {})[0]


def assert_native(obj: Any) -> None:
    native, reference = pickled_twice(obj)
    assert native == reference


@pytest.mark.usefixtures("pickler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL_STATES | PARTIAL_STATES)
def test_the_native_pickler_writes_the_same_opcodes_or_declines(name: str) -> None:
    native, reference = pickled_twice((ALL_STATES | PARTIAL_STATES)[name]())
    assert native in (None, reference)


def state_of_a_training() -> dict[str, Any]:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    sum(parameter.sum() for parameter in net.parameters()).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    return state | {"step": 70_000, "rng": torch.get_rng_state(), "loss": 0.1, "parameters": list(net.parameters())}


@pytest.mark.usefixtures("pickler")
def test_what_a_training_saves_is_pickled_natively() -> None:
    assert_native(state_of_a_training())


INTEGERS = [
    0,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    -1,
    -128,
    -129,
    -(2**31),
    -(2**31) - 1,
    -(2**63),
]
INTEGERS += [sign * 2**bits + more for bits in range(6, 63) for sign in (1, -1) for more in (-1, 0, 1)]


@pytest.mark.parametrize(
    "obj", [INTEGERS, [0.0, -1.5, float("inf"), float("nan"), 1e-300], "", "äß€😀" * 100, [None, True, False]]
)
def test_plain_values_are_pickled_natively(obj: Any) -> None:
    assert_native(obj)


@pytest.mark.usefixtures("pickler")
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 255, 256, 257, 999, 1000, 1001, 2000, 2001, 3000])
def test_containers_of_every_size_are_pickled_natively(count: int) -> None:
    texts = [f"{i}" for i in range(count)]
    ordered = OrderedDict(zip(texts, range(count), strict=True))
    with_attribute = OrderedDict(ordered)
    with_attribute._metadata = {"version": 1}  # type: ignore[attr-defined]
    reordered = OrderedDict(ordered)
    if count:
        reordered.move_to_end("0")
    tensors = [torch.zeros(i % 4, i % 3) for i in range(count)]
    assert_native([texts, tuple(texts), dict(ordered), ordered, with_attribute, reordered, texts, tensors, tuple(tensors[:4])])


@pytest.mark.usefixtures("pickler")
def test_what_is_shared_or_holds_itself_is_pickled_natively_or_declined() -> None:
    shared = ["a", {"b": ("c", 1)}, torch.ones(3)]
    assert_native([shared, shared, shared[1], shared[2], shared[2].view(3), shared[2].detach()])
    endless: list[Any] = []
    endless.append({"again": endless})
    assert_native(endless)
    inner: list[Any] = []
    holds_itself = (inner, 1)
    inner.append(holds_itself)
    native, reference = pickled_twice(holds_itself)
    assert native is None and pickletools.dis(reference, out=io.StringIO()) is None


@pytest.mark.parametrize(
    "decline", [object, lambda: 2**70, lambda: b"bytes", lambda: "\ud800", lambda: {1}, lambda: OrderedDict]
)
def test_what_the_native_pickler_declines_is_planned_all_the_same(decline: Callable[[], Any]) -> None:
    tensor, thing = torch.ones(5), decline()
    plan = plan_of({"tensor": tensor, "thing": thing, "again": tensor})
    assert plan.sizes == [20] and [record.key for record in plan.records] == ["0"]
    native, reference = pickled_twice([tensor, thing])
    assert native in (None, reference) and plan.pickle


@pytest.mark.usefixtures("pickler")
@pytest.mark.parametrize(
    "tensor",
    [torch.ones(3, dtype=torch.complex64).conj(), torch._neg_view(torch.ones(3)), torch.ones(3, device="meta")],
    ids=["conjugate", "negative", "meta"],
)
def test_what_its_bytes_do_not_tell_is_not_pickled_natively(tensor: torch.Tensor) -> None:
    native, _ = pickled_twice([tensor])
    assert native is None


@pytest.mark.usefixtures("pickler")
def test_a_tensor_beyond_the_end_of_its_storage_keeps_its_offset() -> None:
    """As FSDP leaves them: here the storage has as many bytes as the tensor, but not its bytes."""
    tensor = torch.arange(10, dtype=torch.float32)[3:5]
    tensor.untyped_storage().resize_(8)
    plan = plan_of([tensor])
    assert plan.sizes == [8] and plan.addresses == [tensor.untyped_storage().data_ptr()]
    assert_native([tensor])


@pytest.mark.usefixtures("pickler")
def test_a_lazy_clone_is_planned_where_its_bytes_are() -> None:
    clone = torch._lazy_clone(torch.arange(9))
    plan = plan_of([clone], lambda _: True)
    assert plan.addresses == [clone.data_ptr()] and _native.find_changed(plan.lazy) == (None, False)
    assert bytes_of(plan, 0) == torch.arange(9).numpy().tobytes()


def test_tensors_without_a_storage_are_left_to_torch() -> None:
    """As on devices that have none; here one inside of vmap."""
    planned = []

    def plan_inside(tensor: torch.Tensor) -> torch.Tensor:
        planned.append(plan_of({"inside": tensor}).sizes)
        return tensor

    torch.vmap(plan_inside)(torch.ones(3, 2, device="meta"))
    assert planned == [[]]


def test_tensors_without_a_version_counter_are_looked_at_for_their_memory_alone() -> None:
    with torch.inference_mode():
        tensor = torch.arange(10)
    plan = plan_of([tensor], lambda _: True)
    assert list(plan.kinds) == [LAZY] and _native.find_changed(plan.lazy) == (None, False)
    tensor.untyped_storage().resize_(10_000)
    assert _native.find_changed(plan.lazy) == (None, True)


def test_too_deep_an_object_is_an_error_not_a_crash() -> None:
    deep: list[Any] = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(RecursionError):
        plan_of(deep)
    while deep:
        deep = deep.pop()


@pytest.mark.usefixtures("pickler")
@pytest.mark.parametrize("seed", range(200))
def test_random_states_are_pickled_alike(seed: int) -> None:
    random, shared = Random(seed), [torch.randn(20), "shared", {"x": 1}]

    def make(depth: int) -> Any:
        leaves = [
            lambda: random.randrange(-(2**40), 2**40) >> random.randrange(40),
            lambda: random.random(),
            lambda: random.choice([None, True, False, "", "lr", "cpu", "storage", "0", "1"]),
            lambda: random.choice(shared),
            lambda: shared[0][random.randrange(10) : random.randrange(10, 20)],
            lambda: torch.empty(
                [random.randrange(3) for _ in range(random.randrange(6))], dtype=random.choice(list(torch_pickler.CLASSES))
            ),
            lambda: torch.nn.Parameter(torch.zeros(random.randrange(3)), random.random() < 0.5),
            lambda: torch.empty(4, 4).t(),
            lambda: torch.empty_strided((1, 5), (7, 1)),
            lambda: torch.arange(4)[2:3].expand(4),
        ]
        if depth == 0 or random.random() < 0.3:
            return random.choice(leaves)()
        children = [make(depth - 1) for _ in range(random.randrange(6))]
        keyed = {f"{random.randrange(9)}": child for child in children}
        return random.choice([children, tuple(children), keyed, OrderedDict(keyed)])

    state = [make(4), shared, make(4)]
    assert_native(state)
    _, table = torch_pickler.dump_in_python(state, {})
    remaps = torch_pickler.find_remaps(table)  # of the views
    native, reference = pickled_twice(state, remaps)
    assert native == reference

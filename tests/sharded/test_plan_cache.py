"""What is kept of one plan for the next saves: a plan that was made with it is the one that would be made without."""

from __future__ import annotations

import gc
import operator
import random
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt import torch_private
from ckpt.plan.lazy_storages import lazy_storages
from ckpt.plan.save_plan import SavePlan
from ckpt.sharded.entries import EntryFinder
from ckpt.sharded.planning import ShardedPlanner

pytestmark = pytest.mark.usefixtures("native")

EAGER_BYTES = 64
State = dict[str, Any]
Change = Callable[[State, random.Random], None]


@pytest.fixture(params=[0, 3], ids=["rank 0", "rank 3"])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    td.init_process_group("fake", rank=request.param, world_size=4, store=FakeStore())
    yield request.param
    td.destroy_process_group()


class Counting(ShardedPlanner):
    """Tells how many plans were made anew."""

    anew = 0

    def _plan_anew(self, *arguments: Any) -> SavePlan:
        self.anew += 1
        return super()._plan_anew(*arguments)


def planner(rank: int) -> Counting:
    return Counting(EntryFinder(rank, 4), rank, 4)


def part(mesh: Any, *sizes: int, placements: Any = None, dtype: torch.dtype = torch.float32) -> DTensor:
    local = torch.randn(*sizes).to(dtype)
    return DTensor.from_local(local, mesh, placements or [Replicate(), Shard(0)], run_check=False)


def state_on(mesh: Any) -> State:
    model = {f"layers.{n}": torch.nn.Parameter(part(mesh, 5 + n % 3, 8)) for n in range(6)}
    buffer = torch.randn(100)
    return {
        "model": OrderedDict(model),
        "optimizer": {
            "state": {n: {"exp_avg": part(mesh, 5, 8), "step": torch.tensor(3.0), "name": f"p{n}"} for n in range(5)},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["a", "b"]}],
        },
        "pair": [torch.nn.Parameter(torch.randn(30)), part(mesh, 3, 3, dtype=torch.bfloat16)],
        "views": {"low": buffer[:40], "high": buffer[40:], "apart": buffer[::3]},
        "columns": part(mesh, 8, 6, placements=[Shard(1), Replicate()]),
        "epoch": 3,
        "best": None,
    }


def described(plan: SavePlan) -> dict[str, Any]:
    """All that is written by it, in comparable form."""
    archives, compared, contents = plan.archives, plan.compared, plan.contents
    assert archives is not None and compared is not None
    return {
        "pickles": [archives.pickles[number] for number in archives.pickle_of],
        "records_of": archives.records_of,
        "kinds": bytes(plan.kinds),
        "sizes": plan.sizes,
        "lazy": [record.low for record in plan.lazy],
        # What was copied for it lies elsewhere each time.
        "bytes": [bytes_of(record) for record in plan.records],
        "views": [None if record.views is None else list(record.views) for record in plan.records],
        "storages": [record.storage.nbytes() for record in plan.records],
        "dtypes": [record.dtype for record in plan.records],
        "compared": (compared.pickle, compared.sizes, compared.addresses),
        "named": {key: where(tensor) for key, tensor in plan.named.items() if isinstance(tensor, torch.Tensor)},
        "items": contents.items,
        "payloads": contents.payloads,
        "description": contents.description,
    }


def where(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else 0


def bytes_of(record: Any) -> bytes:
    storage = torch.empty(0, dtype=torch.uint8).set_(record.storage)
    return storage[record.low : record.low + record.nbytes].numpy().tobytes()


def expect_same(warm: ShardedPlanner, rank: int, state: State) -> bool:
    """False if both refuse it."""

    def made(by: ShardedPlanner) -> Any:
        try:
            return described(by.plan(state, lazy_storages(True), EAGER_BYTES, False))
        except (TypeError, ValueError) as error:
            return type(error), str(error)

    again, fresh = made(warm), made(planner(rank))
    if isinstance(fresh, tuple):
        assert again == fresh
        return False
    assert again.keys() == fresh.keys()
    for what, expected in fresh.items():
        assert again[what] == expected, what
    return True


# ---- what may change -------------------------------------------------------------------------------------------------


def values(state: State, chance: random.Random) -> None:
    state["epoch"] = chance.choice([chance.randrange(9), "four", None, 2.5, (1, [2]), 10**5000])
    state["optimizer"]["param_groups"][0]["lr"] = chance.random()
    state["optimizer"]["state"][2]["name"] = "p" * chance.randrange(20)


def numbers(state: State, chance: random.Random) -> None:
    with torch.no_grad():
        for tensor in state["model"].values():
            tensor.to_local().add_(chance.random())
        state["optimizer"]["state"][1]["step"] += 1
        state["views"]["apart"].mul_(chance.random())


def other_memory(state: State, chance: random.Random) -> None:
    state["pair"][0].data = torch.randn(30)
    state["views"]["low"] = torch.randn(40)
    state["model"]["layers.1"]._local_tensor.data = torch.randn(6, 8)


def another_place_in_the_memory(state: State, chance: random.Random) -> None:
    low = chance.randrange(60)
    state["views"]["low"] = torch.randn(100)[low : low + 40]
    state["model"]["layers.0"]._local_tensor.data = torch.randn(20, 8)[low % 15 : low % 15 + 5]


def new_objects(state: State, chance: random.Random) -> None:
    state["model"] = OrderedDict((key, tensor.detach().requires_grad_()) for key, tensor in state["model"].items())


def strides(state: State, chance: random.Random) -> None:
    state["pair"][0].data = torch.randn(60)[:: chance.choice([1, 2])][:30]
    state["columns"]._local_tensor.data = torch.randn(6, 8).t() if chance.random() < 0.5 else torch.randn(8, 6)


def dtype(state: State, chance: random.Random) -> None:
    state["pair"][0].data = torch.randn(30).to(chance.choice([torch.float16, torch.float32]))


def gradients(state: State, chance: random.Random) -> None:
    state["model"]["layers.2"].requires_grad_(chance.random() < 0.5)
    state["pair"][0].requires_grad_(chance.random() < 0.5)


def placements(state: State, chance: random.Random) -> None:
    mesh = state["columns"].device_mesh
    chosen = chance.choice([[Shard(1), Replicate()], [Shard(0), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(1)]])
    state["columns"] = part(mesh, 8, 6, placements=chosen)


def another_mesh(state: State, chance: random.Random) -> None:
    shape = chance.choice([(2, 2), (1, 4), (4, 1)])
    state["pair"][1] = part(init_device_mesh("cpu", shape), 3, 3, dtype=torch.bfloat16)


def order(state: State, chance: random.Random) -> None:
    state["model"].move_to_end(chance.choice(list(state["model"])))


def keys(state: State, chance: random.Random) -> None:
    state["optimizer"]["state"][chance.choice([7, "7", 8])] = {"step": torch.tensor(float(chance.randrange(5)))}


def fewer_keys(state: State, chance: random.Random) -> None:
    state["optimizer"]["state"].pop(chance.choice([7, "7", 8]), None)


def containers(state: State, chance: random.Random) -> None:
    pair = list(state["pair"].values()) if isinstance(state["pair"], dict) else state["pair"]
    state["pair"] = chance.choice([list(pair), dict(enumerate(pair)), OrderedDict((str(n), it) for n, it in enumerate(pair))])


def tensor_for_value(state: State, chance: random.Random) -> None:
    state["best"] = chance.choice([None, torch.randn(4), [torch.randn(2), 1], [1, 2], {}, {"a": 1}])


def tensors_in_values(state: State, chance: random.Random) -> None:
    state["epoch"] = chance.choice([(torch.randn(3), 1), 7])


def what_is_shared(state: State, chance: random.Random) -> None:
    group = state["optimizer"]["state"]
    group[0]["step"] = group[1]["step"] if chance.random() < 0.5 else torch.tensor(1.0)
    group[3]["exp_avg"] = chance.choice([group[4]["exp_avg"], part(group[4]["exp_avg"].device_mesh, 5, 8)])


def unresolved(state: State, chance: random.Random) -> None:
    state["best"] = chance.choice(
        [torch.randn(3, dtype=torch.complex64).conj(), torch.randn(3), torch._neg_view(torch.randn(3))]
    )


def named_parts(state: State, chance: random.Random) -> None:
    state["views"]["high"] = torch.randn(60)
    if chance.random() < 0.5:
        state["views"]["high"].global_offsets = state["views"]["high"].local_offsets = [(0,)]


def what_is_noted_beside(state: State, chance: random.Random) -> None:
    """Objects that a user keeps at tensors, some of which nobody can pickle."""
    state["columns"]._local_tensor.note = chance.choice([3, lambda: None, torch.ones(3)])
    state["pair"][0].note = chance.choice([3, lambda: None])


def spec_in_place(state: State, chance: random.Random) -> None:
    spec = state["columns"]._spec
    spec.placements = chance.choice([(Shard(1), Replicate()), (Replicate(), Shard(1)), (Replicate(), Replicate())])


class Said:
    """An object of which some are values."""


def objects(state: State, chance: random.Random) -> None:
    state["best"] = Said()
    if chance.random() < 0.5:
        state["best"].__create_write_items__ = None


def sparse(state: State, chance: random.Random) -> None:
    state["best"] = chance.choice([torch.eye(3).to_sparse(), torch.eye(3)])


def refused(state: State, chance: random.Random) -> None:
    state["best"] = chance.choice([lambda: None, (state["columns"], 1), 5, torch.empty(3, device="meta")])


KNOWN: list[Change] = [values, numbers, other_memory, another_place_in_the_memory, new_objects]
OTHERS: list[Change] = [
    *(strides, dtype, gradients, placements, another_mesh, order, keys, fewer_keys, containers, tensor_for_value),
    *(what_is_noted_beside, spec_in_place, objects),
    *(tensors_in_values, what_is_shared, unresolved, sparse, refused, named_parts),
]


@pytest.mark.parametrize("change", KNOWN + OTHERS, ids=lambda change: change.__name__)
def test_a_plan_with_the_cache_is_the_one_without(rank: int, change: Change) -> None:
    chance, state, warm = random.Random(4), state_on(init_device_mesh("cpu", (2, 2))), planner(rank)
    warm.plan(state, lazy_storages(True), EAGER_BYTES, False)
    for _ in range(6):
        change(state, chance)
        expect_same(warm, rank, state)
    if change in KNOWN:
        assert warm.anew == 1


@pytest.mark.parametrize("seed", range(8))
def test_whatever_changes(rank: int, seed: int) -> None:
    chance, state, warm = random.Random(seed), state_on(init_device_mesh("cpu", (2, 2))), planner(rank)
    for _ in range(40):
        for change in chance.sample(KNOWN + OTHERS, chance.randrange(3)):
            try:
                change(state, chance)
            except (AttributeError, RuntimeError, KeyError, TypeError):
                continue  # another change has taken away what it would change
        if not expect_same(warm, rank, state):
            state = state_on(init_device_mesh("cpu", (2, 2)))  # else it would be refused for ever
    assert warm.anew < 40, "the cache is used"


def test_a_shard_in_strides_is_another_place(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch takes it for equal to one that is not, as torch before 2.13 does."""
    mesh, warm = init_device_mesh("cpu", (2, 2)), planner(rank)
    whole = part(mesh, 4, 4, placements=[Shard(0), Shard(0)])
    monkeypatch.setattr(_StridedShard, "__eq__", lambda self, other: self.dim == other.dim)
    strided = (_StridedShard(0, split_factor=2), Shard(0))
    spec = DTensorSpec(mesh, strided, tensor_meta=whole._spec.tensor_meta)
    found: DTensor = DTensor(whole._local_tensor, spec, requires_grad=False)  # type: ignore[abstract]
    for tensor in (whole, found, whole):
        expect_same(warm, rank, {"tensor": tensor})
    assert warm.anew == 3


def test_another_order_of_cutting_is_refused(rank: int) -> None:
    """Of which placements say nothing: each part would be written to the place of another one, as torch itself does it."""
    entry = getattr(torch.distributed.tensor._dtensor_spec, "ShardOrderEntry", None)
    if entry is None:
        pytest.skip("this torch has one order of cutting")
    mesh, warm = init_device_mesh("cpu", (2, 2)), planner(rank)
    usual = part(mesh, 2, 3, placements=[Shard(0), Shard(0)])
    assert expect_same(warm, rank, {"tensor": usual})
    spec = usual._spec
    other = DTensorSpec(spec.mesh, spec.placements, tensor_meta=spec.tensor_meta, shard_order=(entry(0, (1, 0)),))
    tensor: DTensor = DTensor(usual._local_tensor, other, requires_grad=False)  # type: ignore[abstract]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot save 'tensor' of sharded=: it is cut over .* in another order"):
            warm.plan({"tensor": tensor}, lazy_storages(True), EAGER_BYTES, False)
    assert expect_same(warm, rank, {"tensor": usual})


@pytest.mark.parametrize("names", [("wrapper_names", lambda: None), ("_spec_parts", operator.attrgetter("no_such_name"))])
def test_a_torch_with_other_names_is_planned_for_anew(
    rank: int, names: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    state, warm = state_on(init_device_mesh("cpu", (2, 2))), planner(rank)
    warm.plan(state, lazy_storages(True), EAGER_BYTES, False)
    monkeypatch.setattr(torch_private, *names)
    for _ in range(2):
        expect_same(warm, rank, state)
    assert warm.anew == 3


def test_it_keeps_no_tensor_alive(rank: int) -> None:
    warm, state = planner(rank), state_on(init_device_mesh("cpu", (2, 2)))
    for _ in range(2):
        warm.plan(state, lazy_storages(True), EAGER_BYTES, False)
    assert warm.anew == 1
    tensors = [*state["model"].values(), state["pair"][0], state["views"]["low"], state["columns"]]
    gone = [weakref.ref(tensor.untyped_storage() if type(tensor) is torch.Tensor else tensor) for tensor in tensors]
    memory = [weakref.ref(tensor._local_tensor) for tensor in tensors if isinstance(tensor, DTensor)]
    del state, tensors
    gc.collect()
    assert [each() for each in gone + memory] == [None] * len(gone + memory)

"""A state that changes from save to save, as training and its users change it: each time the plan is one made from nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from states import Twice

from ckpt import _native, torch_private
from ckpt.plan import pickler
from ckpt.plan.lazy_storages import lazy_storages
from ckpt.plan.save_plan import LAZY, SavePlan, make_plan

SERIES, CHANGES = 120, 25  # each of these is one comparison
NUMBERS = [0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**40, -1, -128, -129, -(2**31) - 1, 2**62, 10**30, 0.5, -0.0, 1e300]
VALUES = [None, True, False, 1, 0, 1.0, "", "a", "cpu", "storage", "0", "1", "12", "exp_avg", "x" * 300, b"", b"ab", 1j, {3}]


class Odd:
    """Pickled by a method of its own, which names a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return list, ([self.tensor, "odd"],)


def plan_in_python(obj: Any, lazy: Any, patch: pytest.MonkeyPatch) -> SavePlan:
    with patch.context() as only_here:
        only_here.setattr(pickler, "dump", pickler.dump_in_python)
        return make_plan(obj, lazy, 0)


def described(plan: SavePlan) -> Any:
    records = [(each.key, each.location, each.low, each.nbytes, each.dtype, each.type, each.numel) for each in plan.records]
    return plan.pickle, records, plan.addresses, plan.sizes, [each.storage.data_ptr() for each in plan.records]


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Series:
    """A state dict, as an optimizer and its user would have it, and what may happen to it."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.parameters = [torch.nn.Parameter(torch.randn(random.randrange(1, 9), 3)) for _ in range(6)]
        self.optimizer = torch.optim.AdamW(self.parameters)
        self.step()
        self.state: dict[Any, Any] = {"extra": {}, "list": [], "loss": 0.5}
        self.refresh()

    def step(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def refresh(self) -> None:
        """A state dict holds fresh tensors of the same memory each time."""
        self.state["model"] = OrderedDict((f"p{i}", parameter.detach()) for i, parameter in enumerate(self.parameters))
        self.state["optimizer"] = self.optimizer.state_dict()

    def extra(self) -> dict[Any, Any]:
        found = self.state["extra"]
        assert isinstance(found, dict)
        return found

    def tensor(self) -> torch.Tensor:
        found = [value for value in self.extra().values() if isinstance(value, torch.Tensor)]
        found += self.state["model"].values()
        plain = [each for each in found if each.layout is torch.strided and not each.is_neg() and not each.is_conj()]
        return self.random.choice(plain)

    def put(self, value: Any) -> None:
        key = self.random.choice(["a", "b", "c", 0, 1, 255, 256, 2.5, ("t", 1), "cpu"])
        self.extra()[key] = value

    def changes(self) -> list[Callable[[], Any]]:
        random, extra = self.random, self.extra()
        return [
            self.step,
            self.refresh,
            lambda: self.state.update(loss=random.choice(NUMBERS)),
            lambda: self.put(random.choice(NUMBERS)),
            lambda: self.put(random.choice(VALUES)),
            lambda: self.state["list"].append(random.choice(NUMBERS)),
            self.state["list"].clear,
            lambda: extra.pop(next(iter(extra)), None) if extra else None,
            lambda: self.state.update(extra=dict(reversed(extra.items()))),
            lambda: self.state.update(extra=random.choice([dict, OrderedDict])(extra)),
            lambda: self.state["model"].move_to_end("p0"),
            lambda: setattr(self.state["model"], "_metadata", OrderedDict(p0={"version": random.choice(NUMBERS)})),
            *self.changes_of_tensors(),
        ]

    def changes_of_tensors(self) -> list[Callable[[], Any]]:
        random, one, other = self.random, self.tensor(), self.tensor()
        return [
            lambda: self.put(one),  # one object twice, or no longer
            lambda: self.put([one, one, other]),
            lambda: self.put(one.detach()),
            lambda: self.put(one.view(-1)[random.randrange(one.numel()) :] if one.is_contiguous() and one.numel() else 0),
            lambda: self.put(one.t() if one.dim() == 2 else one),
            lambda: self.put(one.clone()),
            lambda: self.put(torch.nn.Parameter(one.detach(), one.is_floating_point() and random.random() < 0.5)),
            lambda: self.put(one.detach().clone().requires_grad_(one.is_floating_point() and random.random() < 0.5)),
            lambda: self.put(one.detach().clone().as_subclass(Twice)),
            lambda: self.put(one.detach().clone().to(random.choice([torch.float16, torch.int32, torch.bool]))),
            lambda: self.put(one.detach().view(torch.uint8) if one.dim() and one.is_contiguous() else one),
            lambda: self.put(torch._neg_view(one.detach().clone().float())),
            lambda: self.put(torch.complex(torch.ones(2), torch.ones(2)).conj()),
            lambda: self.put(torch.eye(3).to_sparse()),
            lambda: self.put(one.detach().clone().untyped_storage()),
            lambda: self.put(Odd(one)),
            lambda: one.untyped_storage().resize_(one.untyped_storage().nbytes() + 4 * random.randrange(2)),
            lambda: self.replace(one.shape),
            lambda: setattr(one, "note", "hello"),
            lambda: self.move(random.choice(self.parameters)),
            lambda: self.hook(random.choice(self.parameters)),
        ]

    def replace(self, shape: torch.Size) -> None:
        """By another one of the same shape, perhaps at the address of one that is gone."""
        self.state["model"]["p1"] = torch.empty(shape)

    def move(self, parameter: torch.Tensor) -> None:
        """The same object, elsewhere."""
        parameter.data = torch.randn_like(parameter)

    def hook(self, parameter: torch.Tensor) -> None:
        self.put(parameter)
        handle = parameter.register_hook(lambda grad: grad)
        if self.random.random() < 0.5:
            handle.remove()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(SERIES))
def test_each_plan_is_that_of_pythons_pickler(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(seed)
    series = Series(random)
    for _ in range(CHANGES):
        random.choice(series.changes())()
        try:
            expected = plan_in_python(series.state, lambda _: False, monkeypatch)
        except RuntimeError as error:  # two dtypes in one storage, of which one is no plain tensor's
            with pytest.raises(RuntimeError, match=str(error)[:40]):
                make_plan(series.state, lambda _: False, 0)
            series.state["extra"] = {}
            continue
        assert described(make_plan(series.state, lambda _: False, 0)) == described(expected)


def test_numbers_of_records_are_texts_of_their_own() -> None:
    """Those of one digit are shared in Python, with whatever is called so in the state; others never are, in any save."""
    state = {str(i): torch.ones(1) for i in range(300)}
    for _ in range(2):
        native = make_plan(state, lambda _: False, 0)
        data, _ = pickler.dump_in_python(state, {})
        assert native.pickle == data
        assert [record.key for record in native.records] == [str(i) for i in range(300)]


def test_what_a_class_has_instead_of_torchs_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(3)
    before = make_plan([tensor], lambda _: False, 0).pickle
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "requires_grad", property(lambda self: True))
        assert make_plan([tensor], lambda _: False, 0).pickle == pickler.dump_in_python([tensor], {})[0] != before
    assert make_plan([tensor], lambda _: False, 0).pickle == before
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_neg", lambda self: True)
        table = pickler.StorageTable({})
        asked = {"records": table.records, "order": table.order, "remaps": {}, "reduce": table.reducer_override}
        assert pickler.state_pickler.dump([tensor], **asked) is None


# ---- whose they are --------------------------------------------------------------------------------------------------


@pytest.fixture
def by_keys() -> Iterator[Callable[[bool], None]]:
    """Lets storages be told apart by their keys, as in a torch that has several objects for one."""

    def tell(keys: bool) -> None:
        torch_private.inform_core()
        if keys:
            _native.use_torch_names(
                storage_key="_cdata", keys_last=True, one_object=False, version="_version", backward_hooks="_backward_hooks"
            )

    yield tell
    torch_private.inform_core()


def owned_somehow(random: Random) -> tuple[list[Any], list[torch.Tensor], Any]:
    """Optimizers that have stepped, tensors that are theirs, or near these, and what is declared beside."""
    flats = [torch.randn(random.choice([60, 120])) for _ in range(4)]
    tensors, optimizers = [], []
    for flat in flats:
        cut = random.randrange(1, len(flat))
        parts = random.choice([[flat], [flat[:cut], flat[cut:]], [flat[:cut]], [flat[: len(flat) // 2 * 2].view(2, -1).t()]])
        parameters = [torch.nn.Parameter(part, random.random() < 0.8) for part in parts]
        tensors += [flat, flat[: random.randrange(2, len(flat))], *parameters, *(each.detach() for each in parameters)]
        if not any(each.requires_grad for each in parameters):
            continue
        for _ in range(random.choice([1, 1, 2])):
            optimizer = random.choice([torch.optim.SGD, torch.optim.Adam])(parameters, lr=0.1)
            for each in parameters:
                each.grad = torch.ones_like(each) if each.requires_grad and random.random() < 0.9 else None
            optimizer.step()
            optimizers.append(optimizer)
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    saved = random.sample(tensors, random.randrange(1, len(tensors)))
    choices = [None, None, True, random.choice(tensors), random.sample(tensors, 2), optimizers]
    return optimizers, saved, random.choice(choices)


@pytest.mark.parametrize("seed", range(300))
def test_what_is_lazy_does_not_depend_on_how_owners_are_noted(seed: int, by_keys: Callable[[bool], None]) -> None:
    random = Random(seed)
    optimizers, saved, declared = owned_somehow(random)

    def watched() -> tuple[SavePlan, SavePlan, SavePlan]:
        by_keys(False)
        storages = lazy_storages(declared)
        first, again = make_plan(saved, storages, 0), make_plan(saved, storages, 0)
        by_keys(True)
        return first, again, make_plan(saved, lazy_storages(declared), 0)

    plans = watched()
    assert len({bytes(plan.kinds) for plan in plans}) == 1, [list(plan.kinds) for plan in plans]
    assert [len(plan.lazy) for plan in plans] == [list(plan.kinds).count(LAZY) for plan in plans]
    assert [_native.find_changed(plan.lazy) for plan in plans] == [(None, False)] * 3
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                with torch.no_grad():
                    parameter.add_(1)
    assert len({_native.find_changed(plan.lazy)[0] is None for plan in plans}) == 1


def test_a_plan_beside_another_of_the_same_save_knows_the_owners_too() -> None:
    weight, other = (torch.nn.Parameter(torch.randn(50)) for _ in range(2))
    optimizer = torch.optim.SGD([weight, other], lr=0.1)
    weight.grad, other.grad = torch.ones(50), torch.ones(50)
    optimizer.step()
    storages = lazy_storages()
    for tensors in ([weight.detach()], [other.detach(), weight], [torch.ones(3), other]):
        plan = make_plan(tensors, storages, 0)
        assert [kind == LAZY for kind in plan.kinds] == [len(tensor) == 50 for tensor in tensors]

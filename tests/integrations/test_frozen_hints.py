"""Parameters that need no gradient are not read once they seem to be frozen. What is written to one is saved nevertheless."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reuse_runs import KINDS, sharing  # noqa: F401  sharing is a fixture
from safetensors.torch import load_file
from support import DEADLINE_S, assert_same, options
from torch import nn

from ckpt.integrations.torch import CheckpointCallback
from ckpt.state_dicts import supposedly_frozen

MIB = 1 << 20
WIDE = 512  # a weight of so many rows and columns takes 1 MiB
SAVES = 7


class Adapted(nn.Module):
    """A layer that is frozen, and what learns beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.base = nn.Linear(WIDE, 2 * WIDE, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDE, 4, bias=False), nn.Linear(4, 2 * WIDE, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Training:
    """Saves each step, and checks what came of it."""

    def __init__(self, place: Path, model: nn.Module, more: dict[str, nn.Module] | None = None, **how: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        self.callback = CheckpointCallback(
            place / "run", model=model, optimizer=self.optimizer, extra=more, keep=None,
            options=options(**how.pop("options", {})), **how,
        )  # fmt: skip
        self.kept = more or {}
        self.step = 0

    def advance(self) -> int:
        """A step, and its checkpoint; how many bytes of that were not read."""
        self.step += 1
        torch.manual_seed(self.step)
        self.model(torch.randn(3, WIDE)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.save()

    def save(self) -> int:
        pending = self.callback.save(self.step)
        found = torch.load(pending.result(DEADLINE_S) / "replicated.pt")
        assert_same(dict(self.model.state_dict()), dict(found["model"]))
        assert_same(self.optimizer.state_dict(), found["optimizer"])
        for name, module in self.kept.items():
            assert_same(dict(module.state_dict()), dict(found[f"extra/{name}"]))
        return pending.stats.unread_bytes


@pytest.fixture
def training(sharing: Path) -> Iterator[Callable[..., Training]]:  # noqa: F811
    made: list[Training] = []

    def make(model: nn.Module, *args: Any, **how: Any) -> Training:
        made.append(Training(sharing, model, *args, **how))
        return made[-1]

    yield make
    for each in made:
        each.callback.close()


@pytest.mark.parametrize("sharing", KINDS, indirect=True)
def test_the_base_of_a_lora_is_not_read(training: Callable[..., Training], sharing: Path) -> None:  # noqa: F811
    """Once the save before has found it the same. And in none where all is written anew."""
    run = training(Adapted(), options={"refresh_every": 4})
    unread = [run.advance() for _ in range(SAVES)]
    assert [each > MIB for each in unread] == [False] * 2 + [True] * 3 + [False] + [True]
    run.callback.close()
    again = training(Adapted())
    assert again.callback.resume() == SAVES
    again.step = SAVES
    assert_same(run.model.state_dict(), again.model.state_dict())
    run.optimizer.zero_grad()
    assert [again.advance() > MIB for _ in range(3)] == [False] * 2 + [True]


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(0.9)


def one_element(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[7, 5] += 1


def through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(0.9)


def through_numpy(weight: nn.Parameter) -> None:
    array = weight.detach().numpy()
    array += 1


def other_memory(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1


def swapped(weight: nn.Parameter) -> None:
    weight.data, before = torch.rand_like(weight), weight.data
    del before


def several_at_once(weight: nn.Parameter) -> None:
    torch._foreach_mul_([weight.detach()], 0.9)


def cases(fast: list[Callable[..., None]], others: list[Callable[..., None]]) -> list[Any]:
    named = [*((each, ()) for each in fast), *((each, pytest.mark.slow) for each in others)]
    return [pytest.param(each, id=each.__name__, marks=marks) for each, marks in named]


WRITES = cases([one_element, through_data, other_memory], [in_place, through_numpy, swapped, several_at_once])


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_to_a_frozen_weight_is_saved(training: Callable[..., Training], write: Callable[..., None]) -> None:
    run = training(Adapted())
    assert [run.advance() > MIB for _ in range(3)][-1]
    for _ in range(2):
        write(run.model.base.weight)
        assert run.advance() == 0


def test_who_writes_behind_the_back_of_torch_is_not_believed_again(training: Callable[..., Training]) -> None:
    run = training(Adapted())
    for _ in range(3):
        run.advance()
    through_data(run.model.base.weight)
    assert [run.advance() for _ in range(4)] == [0] * 4


def test_one_of_them_that_has_changed_speaks_against_all(training: Callable[..., Training]) -> None:
    """As when an adapter is merged into its base: what changes too little to be seen by a short look changes with others."""
    model = Adapted()
    model.table = nn.Embedding(WIDE, 3 * WIDE).requires_grad_(False)
    run = training(model)
    unread = [run.advance() for _ in range(3)]
    assert unread[-1] > 4 * MIB
    through_data(model.base.weight)
    model.table.weight.data[3] += 1
    assert run.advance() == 0
    run.advance()


class Followed(nn.Module):
    """Learns, and has a copy of itself that follows in some way."""

    def __init__(self, follow: Callable[[nn.Parameter, nn.Parameter], None], every: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.online = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.follow, self.every, self.calls = follow, every, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls % self.every == 0:
            for own, other in zip(self.target.parameters(), self.online.parameters(), strict=True):
                self.follow(own, other)
        return self.online(x) - self.target(x)


def lerp(own: nn.Parameter, other: nn.Parameter) -> None:
    with torch.no_grad():
        own.lerp_(other, 0.1)


def lerp_data(own: nn.Parameter, other: nn.Parameter) -> None:
    own.data.mul_(0.9).add_(other.data, alpha=0.1)


def copy_data(own: nn.Parameter, other: nn.Parameter) -> None:
    own.data.copy_(other.data)


def one_row(own: nn.Parameter, other: nn.Parameter) -> None:
    own.data[0].copy_(other.data[0])


def replace_data(own: nn.Parameter, other: nn.Parameter) -> None:
    own.data = own.data * 0.9 + other.data * 0.1


@pytest.mark.parametrize("follow", cases([lerp_data, one_row], [lerp, replace_data, copy_data]))
def test_a_copy_that_follows_is_always_read(training: Callable[..., Training], follow: Callable[..., None]) -> None:
    """Also if it follows in steps, and stands still in between."""
    run = training(Followed(follow, every=4))
    assert [run.advance() for _ in range(5)] == [0] * 5


@pytest.mark.parametrize("follow", cases([one_row], [lerp, lerp_data]))
def test_so_is_one_beside_the_model(training: Callable[..., Training], follow: Callable[..., None]) -> None:
    model = nn.Sequential(nn.Linear(WIDE, WIDE))
    average = copy.deepcopy(model).requires_grad_(False)
    run = training(model, {"average": average})
    for step in range(5):
        if step == 3:
            for own, other in zip(average.parameters(), model.parameters(), strict=True):
                follow(own, other)
        assert run.advance() == 0


class Quantised(nn.Module):
    """With a table that no optimizer owns, and that each forward writes to, past torch's eyes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDE, WIDE)
        self.table = nn.Parameter(torch.randn(3 * WIDE, WIDE), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table.data[:1].add_(x.mean())
        return self.layer(x)


def test_what_a_forward_writes_to_is_always_read(training: Callable[..., Training]) -> None:
    """It has never been found the same as a whole."""
    run = training(Quantised())
    assert [run.advance() for _ in range(5)] == [0] * 5


def test_a_layer_that_is_unfrozen_is_saved(training: Callable[..., Training]) -> None:
    run = training(Adapted())
    for _ in range(3):
        run.advance()
    run.model.base.requires_grad_(True)
    run.optimizer.add_param_group({"params": [run.model.base.weight]})
    assert [run.advance() for _ in range(2)] == [0] * 2


def test_it_can_be_said_or_denied(training: Callable[..., Training], sharing: Path) -> None:  # noqa: F811
    model = Adapted()
    assert all(run == 0 for run in _unread(training(model, frozen=False)))
    said = _unread(training(model, frozen=model))
    assert [each > MIB for each in said] == [False] * 2 + [True] * 2


def _unread(run: Training) -> list[int]:
    found = [run.advance() for _ in range(4)]
    run.callback.close()
    shutil.rmtree(run.callback.checkpointer.directory)
    return found


def test_what_is_supposed_to_be_frozen() -> None:
    model, teacher = Adapted(), Adapted().requires_grad_(False)
    assert supposedly_frozen([model, teacher], [*model.up.parameters()]).tensors == (model.base.weight,)
    assert supposedly_frozen([model], []).tensors == (), "nothing of it is known to learn"
    assert supposedly_frozen([model], model.parameters()).tensors == (), "an optimizer owns all of it"
    assert supposedly_frozen([Followed(lerp)], Followed(lerp).parameters()).tensors == ()
    model.base.to("meta")
    assert supposedly_frozen([model], [*model.up.parameters()]).tensors == ()


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate(sharing: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    import ckpt.integrations.accelerate as lazy_accelerate

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    lazy_accelerate.enable(options())
    try:
        accelerator, model = Accelerator(cpu=True), Adapted()
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        unread = []
        for step in range(4):
            if step == 3:
                through_data(model.base.weight)
            accelerator.backward(model(torch.randn(3, WIDE)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            place = sharing / f"state{step}"
            accelerator.save_state(str(place))
            saves = lazy_accelerate._saves
            assert saves is not None
            pending = saves._newest[place]
            lazy_accelerate.wait(DEADLINE_S)
            unread.append(pending.stats.unread_bytes)
            assert_same(dict(model.state_dict()), load_file(place / "model.safetensors"))
        assert [each > MIB for each in unread] == [False, False, True, False]
    finally:
        lazy_accelerate.disable()
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()

"""Models with adapters of PEFT: what of them a Trainer, accelerate and the callback save, and that they go on bit for bit."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

import peft
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from dist.trainer_training import STEPS, Tokens, build, digest, lora, lora_config, network
from mounting import MIB
from reuse_runs import sharing  # noqa: F401  a fixture
from safetensors.torch import load_file
from support import DEADLINE_S, assert_same, options
from trainer_saves import names_in, saves
from transformers import Trainer

import ckpt.integrations.accelerate as lazy_accelerate
from ckpt.integrations.torch import CheckpointCallback
from ckpt.integrations.transformers import LazyTrainer

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def listed(checkpoint: Path) -> set[str]:
    return {each["name"] for each in json.loads((checkpoint / "manifest.json").read_text())["files"]}


# ---- the Trainer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[type[Trainer], tuple[Path, str]]:
    """What each has left, and the digest of its last step."""
    left = {}
    for kind in (Trainer, LazyTrainer):
        trainer = build(tmp_path_factory.mktemp(kind.__name__), kind, model=lora())
        trainer.train()
        left[kind] = Path(trainer.args.output_dir), digest(trainer)
    return left


def test_files_are_those_of_the_trainer(trained: dict[type[Trainer], tuple[Path, str]]) -> None:
    (theirs, expected), (ours, found) = trained[Trainer], trained[LazyTrainer]
    assert found == expected
    assert names_in(ours) == names_in(theirs) == saves(*range(1, STEPS + 1))
    for step in (1, STEPS):
        stock, lazy = (where / f"checkpoint-{step}" for where in (theirs, ours))
        assert names_in(lazy) == names_in(stock) | {"manifest.json"} and {ADAPTER, CONFIG} <= names_in(stock)
        assert "model.safetensors" not in names_in(lazy)
        for name in (ADAPTER, CONFIG, "README.md"):
            assert (lazy / name).read_bytes() == (stock / name).read_bytes()
        assert_same(
            torch.load(stock / "optimizer.pt", weights_only=False), torch.load(lazy / "optimizer.pt", weights_only=False)
        )
        assert {ADAPTER, "optimizer.pt"} <= listed(lazy), "it was left to others to save it"


def test_each_resumes_from_the_other(trained: dict[type[Trainer], tuple[Path, str]], tmp_path: Path) -> None:
    for kind, other in ((Trainer, LazyTrainer), (LazyTrainer, Trainer), (LazyTrainer, LazyTrainer)):
        trainer = build(tmp_path / kind.__name__ / other.__name__, kind, model=lora())
        trainer.train(resume_from_checkpoint=str(trained[other][0] / f"checkpoint-{STEPS - 2}"))
        assert digest(trainer) == trained[other][1]


def test_several_adapters(tmp_path: Path) -> None:
    """All but the one called "default" lie in directories of their own."""
    for kind in (Trainer, LazyTrainer):
        model = lora()
        model.add_adapter("other", lora_config())
        build(tmp_path / kind.__name__, kind, model=model, max_steps=2).train()
    stock, lazy = (tmp_path / kind.__name__ / "checkpoint-2" for kind in (Trainer, LazyTrainer))
    assert names_in(lazy / "other") == names_in(stock / "other") >= {ADAPTER, CONFIG}
    for name in (ADAPTER, f"other/{ADAPTER}", f"other/{CONFIG}"):
        assert (lazy / name).read_bytes() == (stock / name).read_bytes()


# ---- accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    try:
        yield Accelerator(cpu=True)
    finally:
        lazy_accelerate.disable()
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()


class Loop:
    def __init__(self) -> None:
        self.model = lora()
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-2)
        self.steps = 0

    def advance(self, steps: int) -> None:
        """Its dropout draws on the random numbers of the process."""
        for _ in range(steps):
            batch = Tokens()[self.steps]
            self.model(input_ids=batch["input_ids"][None], labels=batch["labels"][None]).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1

    def state(self) -> Any:
        return copy.deepcopy([dict(self.model.state_dict()), self.optimizer.state_dict()])


def test_accelerate_saves_and_resumes_the_whole_model(accelerator: Accelerator, tmp_path: Path) -> None:
    loop = Loop()
    loop.model, loop.optimizer = accelerator.prepare(loop.model, loop.optimizer)
    loop.advance(2)
    accelerator.save_state(str(tmp_path / "stock"))
    lazy_accelerate.enable(options())
    accelerator.save_state(str(tmp_path / "lazy"))
    saved = loop.state()
    loop.advance(2)
    expected = loop.state()
    lazy_accelerate.wait(DEADLINE_S)
    assert names_in(tmp_path / "lazy") == names_in(tmp_path / "stock") | {"manifest.json"}
    stock, lazy = (load_file(tmp_path / kind / "model.safetensors") for kind in ("stock", "lazy"))
    assert_same(dict(sorted(stock.items())), dict(sorted(lazy.items())))
    for kind in ("lazy", "stock"):
        accelerator.load_state(str(tmp_path / kind))
        assert_same(saved, loop.state())
        loop.steps = 2
        loop.advance(2)
        assert_same(expected, loop.state())


# ---- the callback ----------------------------------------------------------------------------------------------------


def test_the_callback_resumes_model_and_optimizer(tmp_path: Path) -> None:
    loop = Loop()
    with CheckpointCallback(tmp_path, model=loop.model, optimizer=loop.optimizer, options=options()) as callback:
        loop.advance(2)
        callback.step(2)
        loop.advance(2)
    expected = loop.state()
    again = Loop()
    with CheckpointCallback(tmp_path, model=again.model, optimizer=again.optimizer, options=options()) as callback:
        assert callback.resume() == 2
        again.steps = 2
        again.advance(2)
    assert_same(expected, again.state())


def test_frozen_weights_that_are_declared_are_not_copied(tmp_path: Path) -> None:
    loop = Loop()
    loop.advance(1)
    how: dict[str, Any] = {"model": loop.model, "optimizer": loop.optimizer, "options": options()}
    frozen = [parameter for parameter in loop.model.parameters() if not parameter.requires_grad]
    copied = []
    for number, lazy in enumerate((None, frozen)):
        with CheckpointCallback(tmp_path / str(number), lazy=lazy, **how) as callback:
            pending = callback.save(1)
            pending.result(DEADLINE_S)
            copied.append(pending.stats.bytes_copied_in_save)
    large = sum(parameter.nbytes for parameter in frozen if parameter.dim() == 2)
    assert copied[0] > large > 2 * copied[1]


class Wide(Loop):
    """6 MiB of its matrices are of 1 MiB and more, and frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.model = peft.get_peft_model(network(vocab_size=2048, n_embd=256), lora_config())
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-2)


def test_frozen_weights_are_written_twice_and_shared_from_then_on(sharing: Path) -> None:  # noqa: F811
    """On a file system that shares blocks. Each checkpoint is whole, and one in the middle goes on bit for bit."""
    loop, saved = Wide(), {}
    large = [each for each in loop.model.parameters() if not each.requires_grad and each.nbytes >= MIB]
    assert sum(each.nbytes for each in large) == 6 * MIB
    how: dict[str, Any] = {"keep": None, "options": options()}
    with CheckpointCallback(sharing, model=loop.model, optimizer=loop.optimizer, **how) as callback:
        for step in range(1, 7):
            loop.advance(1)
            pending = callback.save(step)
            saved[step] = loop.state()
            place = pending.result(DEADLINE_S)
            reused = pending.stats.reused_bytes
            assert reused == 0 if step < 3 else 5.25 * MIB < reused <= 6 * MIB, reused
            assert_same(saved[step][0], dict(torch.load(place / "replicated.pt")["model"]))
    again = Wide()
    with CheckpointCallback(sharing, model=again.model, optimizer=again.optimizer, **how) as callback:
        assert callback.resume(step=4) == 4
        assert_same(saved[4], again.state())
        again.steps = 4
        again.advance(2)
    assert_same(saved[6], again.state())

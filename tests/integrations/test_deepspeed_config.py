"""What the DeepSpeed configuration says to our engine, and the ways in and out of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import patience
from tier_places import end_drains_below

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

import ckpt
import ckpt.integrations.deepspeed as lazy
from ckpt import Options
from ckpt.errors import ClosedError, DeadlineError
from ckpt.integrations.deepspeed.config import options_from, tiers_from

GIB = 2**30
FIELDS = [field.name for field in dataclasses.fields(Options)]
OTHER: dict[str, Any] = {  # for each field a value that is not its default
    "arena_bytes": "6MiB",
    "chunk_bytes": "128KiB",
    "writers": 3,
    "eager_bytes": 2048,
    "direct_io": False,
    "device_lazy": True,
    "device_cache": "16MiB",
    "device_batches": True,
    "device_rate": "1GiB",
    "metadata_compat": "2.14",
    "record_alignment": 512,
    "replicated_writers": "rank0",
    "replicated_readers": "all",
    "max_in_flight": 5,
    "when_busy": "skip",
    "reuse": False,
    "refresh_every": 7,
    "frozen": "separate",
    "verify_capture": True,
    "max_failed_saves": 0,
    "timeout_s": 12.5,
    "drain_timeout_s": 13,
    "commit_timeout_s": 14.0,
    "events": "all",
}
SMALL: dict[str, Any] = {"arena_bytes": "2MiB", "chunk_bytes": "64KiB", "writers": 1}


# ---- the section -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [None, True, False, {}])
def test_a_section_that_says_nothing(section: Any) -> None:
    assert options_from(section, None) == Options()
    base = Options(writers=7)
    assert options_from(section, base) == base


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_can_stand_in_the_section(name: str) -> None:
    assert OTHER[name] != getattr(Options(), name)
    found = options_from({name: OTHER[name]}, None)
    assert found == Options(**{name: OTHER[name]})


@pytest.mark.parametrize("name", FIELDS)
def test_the_section_goes_before_the_options_that_enable_was_given(name: str) -> None:
    apart = {"frozen": "together"} if name == "record_alignment" else {"record_alignment": None}  # not both
    base = Options(**OTHER | apart)
    default = getattr(Options(), name)
    assert options_from({name: default}, base) == dataclasses.replace(base, **{name: default})


@pytest.mark.parametrize(("size", "arena_bytes"), [(4, 4 * GIB), (0.5, GIB // 2), (1.25, GIB + GIB // 4), (1 / 1024, 2**20)])
def test_the_cache_is_given_in_gibibytes(size: float, arena_bytes: int) -> None:
    assert options_from({"host_cache_size": size}, None) == Options(arena_bytes=arena_bytes)
    assert options_from({"host_cache_size": size, "writers": 2}, Options(arena_bytes="1GiB", timeout_s=9)) == Options(
        arena_bytes=arena_bytes, writers=2, timeout_s=9
    )


@pytest.mark.parametrize("size", [True, False, 0, -1, -0.5, "4", "4GiB", None, [4], float("nan"), float("inf")])
def test_a_cache_that_is_no_number_of_gibibytes(size: Any) -> None:
    with pytest.raises(ValueError, match=r"host_cache_size.*must be a number of GiB"):
        options_from({"host_cache_size": size}, None)


def test_a_cache_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="arena_bytes must be at least '1MiB'"):
        options_from({"host_cache_size": 0.0001}, None)


def test_the_cache_and_the_arena_are_the_same() -> None:
    with pytest.raises(ValueError, match=r"both.*host_cache_size.*arena_bytes"):
        options_from({"host_cache_size": 1, "arena_bytes": "1GiB"}, None)


@pytest.mark.parametrize("keys", [["host_cache"], ["Writers"], ["enabled", "writer"]])
def test_an_unknown_key_is_refused(keys: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        options_from(dict.fromkeys(keys, 1) | {"writers": 2}, None)
    refused, valid = str(caught.value).split("valid are:")
    assert all(key in refused for key in keys) and "datastates_ckpt" in refused
    assert all(name in valid for name in ["host_cache_size", *FIELDS])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arena_bytes", "much"),
        ("arena_bytes", 17),
        ("arena_bytes", 1.5),
        ("chunk_bytes", "100KiB"),
        ("writers", 0),
        ("writers", True),
        ("writers", "2"),
        ("eager_bytes", -1),
        ("direct_io", "no"),
        ("record_alignment", 100),
        ("replicated_writers", "none"),
        ("replicated_readers", "one"),
        ("max_in_flight", 0),
        ("when_busy", "fail"),
        ("verify_capture", 1),
        ("max_failed_saves", -1),
        ("timeout_s", 0),
        ("drain_timeout_s", "60"),
        ("commit_timeout_s", float("inf")),
    ],
)
def test_an_impossible_value_is_refused(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        options_from({name: value}, None)
    text = str(caught.value)
    assert name in text.split("valid keys are:")[0] and "datastates_ckpt" in text
    assert "host_cache_size" in text.split("valid keys are:")[1]


@pytest.mark.parametrize("section", ["4GiB", 4, [("writers", 2)]])
def test_a_section_that_is_no_object(section: Any) -> None:
    with pytest.raises(TypeError, match=r"must be an object.*host_cache_size"):
        options_from(section, None)


@pytest.mark.parametrize("base", [(), (ckpt.Tier.node("/elsewhere"),)])
def test_tiers_can_stand_in_the_section(base: tuple[ckpt.Tier, ...]) -> None:
    tier = {"node": "/nvme/ckpt", "keep": 3, "every": 10, "rate": "200MB", "max_bytes": "1GB", "address": "10.0.0.1"}
    tier |= {"when_full": "wait", "required": True}
    more = {name: value for name, value in tier.items() if name != "node"}
    assert tiers_from({"tiers": [tier]}, base) == [ckpt.Tier.node("/nvme/ckpt", **more)]
    assert tiers_from({"tiers": []}, base) == []
    for section in (None, True, {}, {"writers": 2}):
        assert tiers_from(section, base) is base
    assert options_from({"tiers": [tier]}, None) == Options()


@pytest.mark.parametrize(
    ("tiers", "said"),
    [
        ("/nvme/ckpt", "must be a list such as"),
        ({"node": "/nvme/ckpt"}, "must be a list such as"),
        (["/nvme/ckpt"], "must hold objects such as"),
        ([{"path": "/nvme/ckpt"}], "must hold objects such as"),
        ([{"node": "/nvme/ckpt", "kept": 2}], "unknown keys: kept; valid are: node, keep, every"),
        ([{"node": "/nvme/ckpt", "keep": 0}], "Tier.keep must be None"),
        ([{"node": 7}], "must be a text"),
    ],
)
def test_tiers_that_are_none(tiers: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(said)) as caught:
        tiers_from({"tiers": tiers}, ())
    assert '"tiers" in the section "datastates_ckpt" of the DeepSpeed config' in str(caught.value)


# ---- the ways in and out ---------------------------------------------------------------------------------------------


class Engines:
    """Makes checkpoint engines as `deepspeed.initialize` does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        import deepspeed.runtime.config
        import deepspeed.runtime.engine

        self.runtime: Any = deepspeed.runtime.engine
        self._config_class: Any = deepspeed.runtime.config.DeepSpeedConfig
        self._made: list[lazy.LazyCheckpointEngine] = []

    def config(self, **fields: Any) -> Any:
        return self._config_class({"train_batch_size": 1} | fields)

    def make(self, **fields: Any) -> Any:
        """What "initialize" would, with this configuration."""
        config = self.config(**fields)
        return self.note(
            self.runtime.create_checkpoint_engine(
                config_params=config, groups=None, zero_stage=0, has_moe_layers=False, optimize_dp_state=False
            )
        )

    def note(self, engine: Any) -> Any:
        if isinstance(engine, lazy.LazyCheckpointEngine):
            self._made.append(engine)
        return engine

    def close(self) -> None:
        for engine in self._made:
            engine.cleanup()
        lazy.disable()


class Trainer:
    """As much of a DeepSpeedEngine as attach() and wait() look at."""

    def __init__(self, config: Any, checkpoint_engine: Any = None) -> None:
        self._config = config
        self.checkpoint_engine = checkpoint_engine
        self.module = torch.nn.BatchNorm1d(3)
        self.global_steps = 11


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    engines = Engines(monkeypatch)
    yield engines
    engines.close()


def test_enable(engines: Engines) -> None:
    lazy.enable()
    found = engines.make(datastates_ckpt=SMALL | {"max_in_flight": 4})
    assert isinstance(found, lazy.LazyCheckpointEngine)
    assert found.options == Options(**SMALL, max_in_flight=4)


def test_enable_with_options(engines: Engines) -> None:
    lazy.enable(Options(**SMALL, timeout_s=5))
    assert engines.make().options == Options(**SMALL, timeout_s=5)
    assert engines.make(datastates_ckpt={"timeout_s": 6}).options == Options(**SMALL, timeout_s=6)


@pytest.mark.parametrize("section", [True, {}, {"host_cache_size": 1 / 64}])
def test_sections_that_deepspeed_lets_through(section: Any, engines: Engines) -> None:
    lazy.enable(Options(**SMALL))
    expected = {"arena_bytes": GIB // 64} if section not in (True, {}) else {}
    assert engines.make(datastates_ckpt=section).options == Options(**(SMALL | expected))


def test_a_wrong_section_ends_initialize(engines: Engines) -> None:
    lazy.enable()
    with pytest.raises(ValueError, match=r"host_cache_sise.*valid are"):
        engines.make(datastates_ckpt={"host_cache_sise": 4})


def test_enable_twice_patches_once(engines: Engines) -> None:
    lazy.enable(Options(**SMALL))
    engine_class = engines.runtime.DeepSpeedEngine
    names = ("save_checkpoint", "load_checkpoint", "_configure_checkpointing", "offload_states")
    patched = [engines.runtime.create_checkpoint_engine, *(getattr(engine_class, name) for name in names)]
    lazy.enable(Options(**SMALL, timeout_s=8))
    assert patched == [engines.runtime.create_checkpoint_engine, *(getattr(engine_class, name) for name in names)]
    assert engines.make().options.timeout_s == 8, "the later options hold"


def test_disable(engines: Engines) -> None:
    lazy.enable(Options(**SMALL))
    made = engines.make()
    lazy.disable()
    lazy.disable()
    assert type(engines.make()).__name__ == "TorchCheckpointEngine"
    assert made.is_decoupled(), "what was made stays"
    lazy.enable(Options(**SMALL))
    assert isinstance(engines.make(), lazy.LazyCheckpointEngine)


def test_attach(engines: Engines) -> None:
    trainer = Trainer(engines.config(datastates_ckpt={"timeout_s": 4}))
    ours = engines.note(lazy.attach(trainer, Options(**SMALL)))
    assert trainer.checkpoint_engine is ours
    assert ours.options == Options(**SMALL, timeout_s=4)
    lazy.wait(trainer)
    assert type(engines.make()).__name__ == "TorchCheckpointEngine", "attach() is for one engine"


def test_attach_refuses_a_wrong_section(engines: Engines) -> None:
    own = object()
    trainer = Trainer(engines.config(datastates_ckpt={"writers": -1}), own)
    with pytest.raises(ValueError, match="writers"):
        lazy.attach(trainer)
    assert trainer.checkpoint_engine is own


def test_wait_is_for_our_engines(engines: Engines) -> None:
    trainer = Trainer(engines.config(), engines.make())
    with pytest.raises(TypeError, match=r"enable\(\).*attach\(\)"):
        lazy.wait(trainer)
    with pytest.raises(TypeError, match=r"enable\(\).*attach\(\)"):
        lazy.wait(object())


def test_a_writer_of_deepspeed_is_not_used(engines: Engines, caplog: pytest.LogCaptureFixture) -> None:
    lazy.enable(Options(**SMALL))
    with caplog.at_level(logging.WARNING, "ckpt"):
        engines.make()
        assert not caplog.records
        made = engines.make(checkpoint={"writer": {"type": "FAST", "decoupled": True}})
    assert isinstance(made, lazy.LazyCheckpointEngine)
    assert [record.message for record in caplog.records if "checkpoint.writer" in record.message]


def test_tiers_of_enable_and_of_attach(engines: Engines, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A save to a directory that was saved to before lands on the node, and nothing is made at home for it."""
    tiers = [ckpt.Tier.node(tmp_path / "node-0")]
    lazy.enable(Options(**SMALL), tiers)
    local = engines.make(checkpoint={"use_node_local_storage": True})
    assert "tiers have no effect with use_node_local_storage" in caplog.text
    trainer = Trainer(engines.config(), local)
    with pytest.raises(ValueError, match="no tiers"):
        lazy.wait(trainer, tier="node")
    trainer.checkpoint_engine = engines.make()
    attached = Trainer(engines.config())
    engines.note(lazy.attach(attached, Options(**SMALL), tiers))
    with pytest.raises(ValueError, match="'node', but is 'disk'"):
        lazy.wait(attached, tier="disk")
    for number, each in enumerate((trainer, attached)):
        where = tmp_path / f"saved-{number}"
        begin(each.checkpoint_engine, where, "first")
        lazy.wait(each)
        each.checkpoint_engine.create(SimpleNamespace(tag="second", save_dir=where, save_latest=True))
        each.checkpoint_engine.makedirs(str(where / "second"), exist_ok=True)
        assert not (where / "second").exists()
        each.checkpoint_engine.save({"step": 4}, str(where / "second" / "mp_rank_00_model_states.pt"))
        lazy.wait(each, tier="node")
        assert list((tmp_path / "node-0").glob("*/step-*/manifest.json"))
        lazy.wait(each)
        assert (where / "latest").read_text() == "second"
        assert torch.load(where / "second" / "mp_rank_00_model_states.pt") == {"step": 4}
        each.checkpoint_engine.cleanup()
    end_drains_below(tmp_path)


# ---- the engine by itself --------------------------------------------------------------------------------------------


def begin(engine: Any, where: Path, tag: str) -> None:
    engine.create(SimpleNamespace(tag=tag, save_dir=where, save_latest=True))
    engine.save({"module": {"weight": torch.arange(50000.0)}, "step": 3}, str(where / tag / "mp_rank_00_model_states.pt"))
    assert engine.is_decoupled()


def test_wait_has_a_deadline(engines: Engines, native: Any, tmp_path: Path) -> None:
    trainer = Trainer(engines.config())
    ours = engines.note(lazy.attach(trainer, Options(**SMALL)))
    native.set_fault("fallocate", delay_s=60)
    begin(ours, tmp_path, "tag")
    with pytest.raises(DeadlineError):
        lazy.wait(trainer, timeout=0.05)
    assert not (tmp_path / "latest").exists()
    native.clear_faults()
    lazy.wait(trainer, timeout=patience(60))
    assert (tmp_path / "latest").read_text() == "tag"


def test_the_surface_of_an_engine(engines: Engines, tmp_path: Path) -> None:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    trainer = Trainer(engines.config())
    ours = engines.note(lazy.attach(trainer, Options(**SMALL)))
    assert all(hasattr(ours, name) for name in vars(CheckpointEngine) if not name.startswith("_"))
    assert [ours.is_data_parallel_writer(rank) for rank in range(3)] == [True, False, False]
    ours.makedirs(tmp_path / "a" / "b", exist_ok=True)
    ours.makedirs(tmp_path / "a" / "b", exist_ok=True)
    with pytest.raises(ckpt.CheckpointError, match=r"without create\(\)"):
        ours.save({}, str(tmp_path / "a" / "x.pt"))
    assert ours.get_commit_info() is None


def test_load_gives_what_was_saved_a_moment_ago(engines: Engines, tmp_path: Path) -> None:
    trainer = Trainer(engines.config())
    ours = engines.note(lazy.attach(trainer, Options(**SMALL)))
    begin(ours, tmp_path, "tag")
    found = ours.load(str(tmp_path / "tag" / "mp_rank_00_model_states.pt"), map_location="cpu")
    assert found["step"] == 3
    assert torch.equal(found["module"]["weight"], torch.arange(50000.0))
    found["module"].pop("weight").zero_()  # it is the caller's own


def test_cleanup_ends_it(engines: Engines, tmp_path: Path) -> None:
    trainer = Trainer(engines.config())
    ours = engines.note(lazy.attach(trainer, Options(**SMALL)))
    begin(ours, tmp_path, "tag")
    ours.cleanup()
    ours.cleanup()
    assert (tmp_path / "latest").read_text() == "tag"
    with pytest.raises(ClosedError):
        begin(ours, tmp_path, "more")


def test_recovery_scripts_are_not_copied_again_and_again(engines: Engines, tmp_path: Path) -> None:
    """Overwriting one waits for the direct writes of the save."""

    class Engine(engines.runtime.DeepSpeedEngine):  # type: ignore[misc, name-defined]
        def __init__(self, checkpoint_engine: Any) -> None:
            vars(self)["checkpoint_engine"] = checkpoint_engine

        def __del__(self) -> None:
            pass

    def copied(checkpoint_engine: Any) -> bool:
        for script in scripts:
            os.utime(script, (1, 1))
        Engine(checkpoint_engine)._copy_recovery_script(str(tmp_path))
        return [script.stat().st_mtime > 1 for script in scripts] == [True, True]

    lazy.enable()
    ours = engines.make()
    Engine(ours)._copy_recovery_script(str(tmp_path))
    scripts = [tmp_path / "zero_to_fp32.py", tmp_path / "zero_to_torch.py"]
    assert all(os.access(script, os.X_OK) for script in scripts)
    assert not copied(ours)
    assert copied("of another kind")
    scripts[1].write_text("an older version")
    assert copied(ours) and "an older version" not in scripts[1].read_text()

"""DeepSpeed's own tools, and DeepSpeed with its own checkpoint engine, take what our engine has saved; and the reverse."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from dist.deepspeed_nursery import DeepSpeedNursery
from dist.deepspeed_runs import TIMEOUT_S, Fields, Outcomes, environment
from nursery import Nursery, nurseries_of_ranks
from support import assert_same

from ckpt.storage import temporary_names

pytestmark = pytest.mark.usefixtures("native")

OURS = "enable"
WRITERS = ("stock", OURS)  # in this order: what is enabled stays so
EARLY, LATEST, LAST = 2, 4, 5  # the step of an older tag, that of the newest, and the end of the run that saved them
SLOW = [{"call": "pwritev", "delay_s": 0.5}]  # of many; it ends when the fault is taken away

ZERO: dict[str, Fields] = {f"zero{stage}": {"stage": stage, "precision": "bf16", "frozen": True} for stage in (1, 2, 3)}
KINDS: dict[str, Fields] = {
    "zero0": {"stage": 0, "precision": "bf16"},
    "zero0 fp16": {"stage": 0, "precision": "fp16"},
    **ZERO,
    "tied": {"stage": 2, "precision": "bf16", "tied": True},
    "pipeline": {"variant": "pipeline", "stage": 1, "precision": "bf16", "tied": True},
    "moe": {"variant": "moe", "stage": 2, "precision": "fp32", "expert_ranks": 2},
    "moe zero0": {"variant": "moe", "stage": 0, "precision": "bf16", "expert_ranks": 1},
}
# Of the others DeepSpeed's zero_to_fp32.py gets no weights, whoever saved them: without ZeRO there are no fp32 partitions in
# files of their own, a pipeline's layers are not in its model files, and an expert "is not a model state checkpoint".
WITH_WEIGHTS = (*ZERO, "tied")
UNIVERSAL = (*ZERO, "tied", "pipeline")
FLYING = ("zero1", "zero3", "pipeline", "moe")


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(2, DeepSpeedNursery) as made:
        yield made


# ---- what the tools work on ------------------------------------------------------------------------------------------


def saving(writer: str, kind: str) -> Fields:
    job = {"name": f"{writer} {kind}", "mode": "train", "engine": writer, "steps": LAST, "every": EARLY}
    return job | {"same_buffers": True, "weights": kind in WITH_WEIGHTS} | KINDS[kind]


def loading(reader: str, writer: str, kind: str, saved: Outcomes, **more: Any) -> Fields:
    """Saves nothing. `more` can say where from, and how far it goes on."""
    job = {"name": f"{reader} reads {writer} {kind}", "mode": "train", "engine": reader, "steps": LAST, "every": 1000}
    return job | {"same_buffers": True, "directory": str(saved.directory / f"{writer} {kind}")} | KINDS[kind] | more


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    cases = [saving(writer, kind) for writer in WRITERS for kind in KINDS]
    return Outcomes(tmp_path_factory.mktemp("by-two"), 2, cases)


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    cases = [saving(writer, kind) for writer in WRITERS for kind in UNIVERSAL]
    return Outcomes(tmp_path_factory.mktemp("by-one"), 1, cases)


class Tools:
    """Runs scripts and modules as `python` does, in children that have DeepSpeed imported already."""

    def __init__(self, nurseries: list[Nursery]) -> None:
        self._nurseries = nurseries

    def run(self, *commands: tuple[Path, list[str]]) -> None:
        """In each a directory to run in, and the words after "python". As many at once as there are nurseries."""
        for begin in range(0, len(commands), len(self._nurseries)):
            some = commands[begin : begin + len(self._nurseries)]
            children = [nursery.start(program(*command)) for nursery, command in zip(self._nurseries, some, strict=False)]
            for ended in [child.wait() for child in children]:
                assert ended.returncode == 0, ended.stdout + ended.stderr


def program(directory: Path, words: list[str]) -> str:
    if words[0] == "-m":
        words, run = words[1:], f"runpy.run_module({words[1]!r}, run_name='__main__', alter_sys=True)"
    elif words[0] == "-c":
        run = words[1]
    else:
        run = f"runpy.run_path({words[0]!r}, run_name='__main__')"
    place = f"os.chdir({str(directory)!r}); sys.path.insert(0, {str(directory)!r}); sys.argv = {words!r}"
    return f"import os, runpy, sys; {place}; {run}; os._exit(0)"


@pytest.fixture(scope="module")
def tools(nurseries: list[Nursery]) -> Tools:
    return Tools(nurseries)


# ---- stock DeepSpeed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read_by_two(by_two: Outcomes, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    cases = []
    for reader, writer in (("stock", OURS), (OURS, "stock")):
        for kind in KINDS:
            early = {"name": f"{reader} reads {writer} {kind} early", "load_tag": f"step{EARLY}", "steps": EARLY + 1}
            cases += [loading(reader, writer, kind, by_two), loading(reader, writer, kind, by_two, **early)]
    return Outcomes(tmp_path_factory.mktemp("read-by-two"), 2, cases)


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_train_the_same(kind: str, by_two: Outcomes) -> None:
    stock, ours = (by_two[f"{writer} {kind}"] for writer in WRITERS)
    for mine, theirs in zip(ours, stock, strict=True):
        for name in ("digests", "losses", "latest"):
            assert mine[name] == theirs[name]


@pytest.mark.parametrize("tag", ["", f"step{EARLY}"], ids=["latest", "tag"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("reader", "writer"), [("stock", OURS), (OURS, "stock")])
def test_one_engine_goes_on_from_what_the_other_saved(
    reader: str, writer: str, kind: str, tag: str, by_two: Outcomes, read_by_two: Outcomes
) -> None:
    step, name = (EARLY, f"{kind} early") if tag else (LATEST, kind)
    for rank, saved in zip(read_by_two[f"{reader} reads {writer} {name}"], by_two[f"{writer} {kind}"], strict=True):
        assert rank["found"] == step and Path(rank["path"]).parent.name == f"step{step}"
        for what, numbers in (("digests", {step, step + 1}), ("losses", {step + 1})):
            assert {int(number) for number in rank[what]} == numbers
            assert rank[what].items() <= saved[what].items(), f"other {what}"


def test_reading_changes_no_directory(by_two: Outcomes, read_by_two: Outcomes) -> None:
    assert read_by_two is not None
    for kind in KINDS:
        stock, ours = (by_two.directory / f"{writer} {kind}" for writer in WRITERS)
        assert not list(stock.rglob("manifest.json")) and not list(stock.rglob(".*"))
        assert {path.name for path in ours.rglob(".*")} <= {".lock"}


# ---- zero_to_fp32.py -------------------------------------------------------------------------------------------------


def needs(module: str, why: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed: {why}")


needs_hub = needs("huggingface_hub", "the script needs it to choose what goes into which file")
needs_safetensors = needs("safetensors", "the script needs it for --safe_serialization")

SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
IMPORTED = "from zero_to_fp32 import *; convert_zero_checkpoint_to_fp32_state_dict('.', {out!r}, max_shard_size=None{more})"
FORMATS = [
    pytest.param([], id="one file"),
    pytest.param(["--max_shard_size", "400KB"], id="many files"),
    pytest.param(["--safe_serialization"], id="safetensors", marks=needs_safetensors),
    pytest.param(["--safe_serialization", "--max_shard_size", "400KB"], id="many safetensors", marks=needs_safetensors),
]


def roots(saved: Outcomes, kind: str) -> list[Path]:
    """Of the stock engine, and of ours."""
    return [saved.directory / f"{writer} {kind}" for writer in WRITERS]


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in directory.iterdir():
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights |= load_file(path)
        elif path.suffix == ".bin":
            weights |= torch.load(path)
    return {name: weight.detach() for name, weight in weights.items()}  # some require gradients


def trained_weights(saved: Outcomes, kind: str) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(saved.directory / f"{OURS} {kind}.weights.pt")
    assert weights
    return weights


def check_weights(saved: Outcomes, kind: str, out: str) -> list[str]:
    """They are those that were trained, and in all else what the tool makes of the stock engine's files; the files."""
    stock, ours = (root / out for root in roots(saved, kind))
    trained, found = trained_weights(saved, kind), weights_in(ours)
    assert_same(trained, {name: found[name] for name in trained})
    assert_same(weights_in(stock), found)
    files = sorted(path.name for path in ours.iterdir())
    assert files == sorted(path.name for path in stock.iterdir())
    return files


def test_both_engines_leave_the_scripts(by_two: Outcomes) -> None:
    for kind in WITH_WEIGHTS:
        stock, ours = roots(by_two, kind)
        for script in SCRIPTS:
            assert (ours / script).read_bytes() == (stock / script).read_bytes()


@pytest.mark.parametrize("more", ["", pytest.param(", safe_serialization=True", marks=needs_safetensors)])
@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_fp32_weights_in_one_file(kind: str, more: str, by_two: Outcomes, tools: Tools) -> None:
    if kind == "tied" and more:
        pytest.skip("safetensors refuses two names for one weight")
    out = f"imported{more}"
    tools.run(*((root, ["-c", IMPORTED.format(out=out, more=more)]) for root in roots(by_two, kind)))
    assert len(check_weights(by_two, kind, out)) == 1


@needs_hub
@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("kind", ZERO)
def test_fp32_weights(kind: str, options: list[str], by_two: Outcomes, tools: Tools) -> None:
    out = "-".join(["out", *options])
    tools.run(*((root, ["zero_to_fp32.py", ".", out, *options]) for root in roots(by_two, kind)))
    files = check_weights(by_two, kind, out)
    assert len(files) > 2 if "400KB" in options else len(files) == 1


@needs_hub
@pytest.mark.parametrize("kind", ZERO)
def test_bf16_weights(kind: str, by_two: Outcomes, tools: Tools) -> None:
    tools.run(*((root, ["zero_to_torch.py", ".", "bf16", "--dtype", "bf16"]) for root in roots(by_two, kind)))
    stock, ours = (weights_in(root / "bf16") for root in roots(by_two, kind))
    assert_same(stock, ours)


@needs_hub
def test_fp32_weights_in_a_process_of_its_own(by_two: Outcomes) -> None:
    _, ours = roots(by_two, "zero2")
    python(ours, "zero_to_fp32.py", ".", "own", "--tag", f"step{LATEST}")
    trained, found = trained_weights(by_two, "zero2"), weights_in(ours / "own")
    assert_same(trained, {name: found[name] for name in trained})


def python(directory: Path, *words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=directory, env=environment(), check=True, timeout=TIMEOUT_S)


# ---- universal checkpoints -------------------------------------------------------------------------------------------

# What the tool misses in files of ZeRO 1 and 2 is how tensor-parallel layers are cut, which only the training can tell it.
TO_UNIVERSAL = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
ALONE = ["--num_extract_workers", "1", "--num_merge_workers", "1"]  # quicker than processes of its own


def folders(root: Path) -> list[str]:
    """Where what was saved last is, and where it goes: beside it, as users do, with `latest_universal` beside `latest`."""
    return ["--input_folder", str(root / f"step{LATEST}"), "--output_folder", str(root / "universal")]


@pytest.fixture(scope="module")
def universal(by_two: Outcomes, by_one: Outcomes, tools: Tools) -> None:
    some = [(saved, kind) for saved in (by_two, by_one) for kind in UNIVERSAL]
    tools.run(*((root, [*TO_UNIVERSAL, *ALONE, *folders(root)]) for saved, kind in some for root in roots(saved, kind)))


@pytest.fixture(scope="module")
def read_by_others(
    by_two: Outcomes, by_one: Outcomes, universal: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcomes]:
    """By as many ranks as have not saved it."""

    def jobs(saved: Outcomes, ranks: int) -> Outcomes:
        cases = []
        for reader, writer in itertools.product(WRITERS, WRITERS):
            for kind in UNIVERSAL:
                cases.append(loading(reader, writer, kind, saved, universal=True))
        return Outcomes(tmp_path_factory.mktemp("read-by-others"), ranks, cases)

    return {"2 to 1": jobs(by_two, 1), "1 to 2": jobs(by_one, 2)}


@pytest.mark.parametrize("kind", UNIVERSAL)
@pytest.mark.parametrize("ranks", [1, 2])
def test_universal_checkpoints_are_equal(ranks: int, kind: str, by_two: Outcomes, by_one: Outcomes, universal: None) -> None:
    saved = by_one if ranks == 1 else by_two
    stock, ours = (Path(folders(root)[-1]) for root in roots(saved, kind))
    files = sorted(path.relative_to(stock) for path in stock.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(ours) for path in ours.rglob("*") if path.is_file())
    for file in files:
        # The others are copies of what was saved; and ZeRO 3 numbers what it partitions through the life of a process.
        if file.parts[0] == "zero" and file.name != "optimizer_state.pt":
            assert (stock / file).read_bytes() == (ours / file).read_bytes(), file


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", WRITERS)
@pytest.mark.parametrize("kind", UNIVERSAL)
@pytest.mark.parametrize("ranks", ["2 to 1", "1 to 2"])
def test_another_number_of_ranks_goes_on(
    ranks: str, kind: str, reader: str, writer: str, read_by_others: dict[str, Outcomes]
) -> None:
    expected = read_by_others[ranks][f"stock reads stock {kind}"]
    for rank, same in zip(read_by_others[ranks][f"{reader} reads {writer} {kind}"], expected, strict=True):
        assert rank["found"] == LATEST
        assert {int(step) for step in rank["digests"]} == {LATEST, LAST}
        for what in ("digests", "losses"):
            assert rank[what] == same[what], f"other {what}"


def test_a_run_goes_on_saving_beside_a_universal_checkpoint(by_two: Outcomes, universal: None, tmp_path: Path) -> None:
    before = by_two.directory / f"{OURS} zero3"
    again = shutil.copytree(before, tmp_path / "again")
    case = loading(OURS, OURS, "zero3", by_two, name="case", directory=str(again), every=1, steps=LAST + 1)
    for rank in Outcomes(tmp_path, 2, [case])["case"]:
        assert (rank["found"], rank["latest"]) == (LATEST, f"step{LAST + 1}")
    for path in [before / "latest_universal", *(before / "universal").rglob("*.pt")]:
        assert (again / path.relative_to(before)).read_bytes() == path.read_bytes()


def test_a_universal_checkpoint_by_a_process_of_its_own(by_two: Outcomes, universal: None, tmp_path: Path) -> None:
    root = by_two.directory / f"{OURS} zero2"
    python(tmp_path, *TO_UNIVERSAL, "--input_folder", str(root / f"step{LATEST}"), "--output_folder", str(tmp_path / "step"))
    before = Path(folders(root)[-1])
    for path in (before / "zero").rglob("*.pt"):
        assert (tmp_path / "step" / path.relative_to(before)).read_bytes() == path.read_bytes()


# ---- what DeepSpeed's functions find ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looks(by_two: Outcomes, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """At the files of the stock engine, and at ours with all that a killed process can have left between them."""
    where, cases = tmp_path_factory.mktemp("looks"), []
    for kind in KINDS:
        stock, ours = roots(by_two, kind)
        strewn = where / f"{kind} strewn"
        shutil.copytree(ours, strewn)
        strew(strewn)
        for name, directory in (("stock", stock), ("ours", strewn)):
            job = {"name": f"{name} {kind}", "mode": "look", "directory": str(directory), "tags": [f"step{LATEST}"]}
            cases.append(job | KINDS[kind])
    return Outcomes(where, 1, cases)


def strew(root: Path) -> None:
    tag = root / f"step{LATEST}"
    for file in [root / "latest", *tag.iterdir()]:
        temporary_names.temporary_path(file).write_bytes(b"half of it")
        temporary_names.shared_path(file, temporary_names.shared_token(0)).write_bytes(b"half of it")


@pytest.mark.parametrize("kind", KINDS)
def test_deepspeed_finds_the_same(kind: str, looks: Outcomes) -> None:
    (stock,), (ours,) = looks[f"stock {kind}"], looks[f"ours {kind}"]
    assert ours["found"] == stock["found"]
    if kind in WITH_WEIGHTS:  # ZeRO 3 has no file of the kind that DeepSpeedCheckpoint looks for
        fails = [name for name, value in ours["found"].items() if isinstance(value, dict) and "raises" in value]
        assert fails == (["layout"] if kind == "zero3" else [])


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    common = {"mode": "flight", "engine": OURS, "tags": ["tag"], "faults": SLOW}
    cases = [{"name": kind} | common | KINDS[kind] for kind in FLYING]
    return Outcomes(tmp_path_factory.mktemp("flights"), 2, cases)


@pytest.mark.parametrize("kind", FLYING)
def test_deepspeed_does_not_see_what_is_in_flight(kind: str, flights: Outcomes) -> None:
    for rank in flights[kind]:
        assert rank["temporaries"] and rank["still"] == rank["temporaries"]
        assert rank["during"] == rank["before"] != rank["after"]
        assert rank["latest"] == "tag"

"""The benchmarks beside other engines at tiny sizes: what they report, and the pictures of it. Speeds are not looked at."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import patience
from test_bench import ROOT, check_line, only, run_bench

pytestmark = pytest.mark.slow

DEADLINE_S = patience(300.0)  # three processes, two of them Python's, start and stop for some of the engines
ENGINES = {
    *("ckpt", "torch.save + fsync", "torch.save without CRC-32 + fsync", "safetensors", "DCP save"),
    *("DCP async_save, thread", "DCP async_save, thread, asynchronous staging", "DCP async_save, process"),
    *("torchsnapshot async_take", "torch_checkpointing"),
}
PART_OF_TORCH = {name for name in ENGINES if name.startswith(("ckpt", "torch.save", "DCP save", "DCP async_save, thread"))}
FEW = {"ckpt", "torch.save + fsync", "DCP async_save, thread"}
PNG = b"\x89PNG\r\n\x1a\n"

Line = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rivals")


@pytest.fixture(scope="module")
def said_and_lines(directory: Path) -> tuple[str, list[Line]]:
    workloads = [f"--workload={name}" for name in ("rivals", "frequency", "sizes")]
    arguments = [*workloads, "--one-process", "--rounds=1", "--fio=none"]
    lines, said = run_bench(directory, *arguments, deadline_s=DEADLINE_S)
    return said, lines


@pytest.fixture(scope="module")
def lines(said_and_lines: tuple[str, list[Line]]) -> list[Line]:
    return said_and_lines[1]


def of(lines: list[Line], workload: str, quantity: str) -> dict[str, Line]:
    return {line["case"]: line for line in lines if (line["workload"], line["quantity"]) == (workload, quantity)}


def test_every_line_is_complete(lines: list[Line], directory: Path) -> None:
    for line in lines:
        check_line(line)
    names = [(line["workload"], line["case"], line["quantity"]) for line in lines]
    assert len(names) == len(set(names))
    assert os.listdir(directory / "files") == [], "nothing is left behind"


def test_each_engine_is_measured_or_says_why_not(said_and_lines: tuple[str, list[Line]]) -> None:
    said, lines = said_and_lines
    missing = of(lines, "rivals", "runs_here")
    measured = of(lines, "rivals", "blocked_s").keys()
    assert measured | missing.keys() == ENGINES
    assert not measured & missing.keys()
    assert measured >= PART_OF_TORCH
    for case, line in missing.items():
        assert f"{case} cannot run here: {line['detail']['error']}" in said
    for name, package in (("torchsnapshot async_take", "torchsnapshot"), ("torch_checkpointing", "torch_checkpointing")):
        if importlib.util.find_spec(package):
            assert name in measured, missing[name]["detail"]["error"]
            assert package in lines[0]["versions"]
        else:
            assert "No module named" in missing[name]["detail"]["error"]


def test_the_figures_of_an_engine_stand_together(lines: list[Line]) -> None:
    measured = of(lines, "rivals", "blocked_s")
    for quantity in ("bytes_per_blocked_GBps", "durable_s", "restore_s"):
        assert of(lines, "rivals", quantity).keys() == measured.keys(), quantity
    for case, line in measured.items():
        assert line["detail"]["configuration"]
        field = only(lines, "rivals", case, "bytes_per_blocked_GBps")
        assert field["samples"] == [line["bytes"] / seconds / 1e9 for seconds in line["samples"]]
        durable, rate = only(lines, "rivals", case, "durable_s"), only(lines, "rivals", case, "rate_GBps")
        assert rate["samples"] == [line["bytes"] / seconds / 1e9 for seconds in durable["samples"]]
        medians = line["detail"]["medians"]
        assert line["median"] == pytest.approx(medians["save_s"] + medians["before_step_s"] + medians["fence_s"])
        assert line["median"] < only(lines, "rivals", case, "iteration_s")["median"]
    assert of(lines, "rivals", "extra_MiB").keys() == {"ckpt", "torch.save + fsync"}, "at this size no others are looked at"
    assert of(lines, "rivals", "extra_MiB")["ckpt"]["value"] > 0


def test_the_bars_are_those_of_each_rival_the_fastest_and_the_disk(lines: list[Line]) -> None:
    ratios = of(lines, "rivals", "ratio")
    rivals = of(lines, "rivals", "blocked_s").keys() - {"ckpt"}
    assert {case: line["bar"] for case, line in ratios.items() if line["bar"]} == {
        **{f"ckpt / {name}, blocked": "<= 0.02083" for name in rivals},
        "ckpt / fastest rival, durable": "<= 1",
        "ckpt / best of own loop": ">= 0.95",
    }
    fastest = min((line["median"], case) for case, line in of(lines, "rivals", "durable_s").items() if case != "ckpt")
    judged = ratios["ckpt / fastest rival, durable"]
    assert judged["detail"]["rival"] == fastest[1]
    assert judged["value"] == only(lines, "rivals", "ckpt", "durable_s")["median"] / fastest[0]
    rates = of(lines, "rivals", "rate_GBps")
    assert rates["memcpy"]["value"] > 0
    disk = max(line["median"] for case, line in rates.items() if case.startswith("own direct-write loop"))
    assert ratios["ckpt / best of own loop"]["value"] == rates["ckpt"]["median"] / disk


def test_a_block_for_each_frequency_engine_and_length_of_compute(lines: list[Line]) -> None:
    totals, iterations = of(lines, "frequency", "total_s"), of(lines, "frequency", "iteration_s")
    assert totals.keys() == iterations.keys()
    cells = {tuple(line["detail"][name] for name in ("setting", "every", "engine")) for line in totals.values()}
    expected = {
        (setting, every, engine) for setting in ("longer", "shorter") for every in (10, 5, 4, 3, 2, 1) for engine in FEW
    }
    assert cells == expected | {(setting, 0, "no saving") for setting in ("longer", "shorter")}
    for case, line in totals.items():
        every, count = line["detail"]["every"], line["detail"]["iterations"]
        assert line["detail"]["saves_of_a_block"] == (len(range(0, count, every)) if every else 0)
        assert iterations[case]["n"] == count
        assert sum(iterations[case]["samples"]) <= line["value"]


def test_sizes_from_small_to_large(lines: list[Line]) -> None:
    blocked, durable = of(lines, "sizes", "blocked_s"), of(lines, "sizes", "durable_s")
    assert blocked.keys() == durable.keys()
    axes: dict[str, set[tuple[int, int]]] = {}
    for case, line in blocked.items():
        detail = line["detail"]
        assert detail["engine"] in FEW
        assert durable[case]["value"] > 0
        axes.setdefault(detail["axis"], set()).add((line["bytes"], detail["tensors"]))
    assert len(axes["bytes"]) == 5
    assert {tensors for _, tensors in axes["tensors"]} == {10, 20, 200}
    assert {tensors for _, tensors in axes["shape"]} == {1, 13}


def test_what_does_not_fit_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.measure.report import Report
    from bench.measure.sampling import Settings, clock
    from bench.workloads import sizes

    huge = sizes.of_size(1 << 60)
    settings, report = Settings(tmp_path), Report({}, 1.0)
    reason = sizes.impossible(settings, huge, tmp_path, clock())
    assert "of memory are free" in reason
    assert "have taken" in sizes.impossible(settings, sizes.of_size(1), tmp_path, clock() - 2 * sizes.LIMIT_S)
    sizes.add_skipped(report, huge, "all", reason)
    assert (report.lines[0]["quantity"], report.lines[0]["detail"]["error"]) == ("measured", reason)
    fit, skipped = sizes.affordable(["torch.save + fsync", "DCP async_save, thread"], huge)
    assert fit == ["torch.save + fsync"], "it makes no copy of the state"
    assert "it needs" in skipped["DCP async_save, thread"]


def test_an_engine_whose_tensors_change_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from bench.rivals import registry

    state, into = {"model": {"w": torch.ones(3)}}, {"model": {"w": torch.zeros(3)}}
    field = registry.start(["ckpt", "torch.save + fsync"], tmp_path)
    monkeypatch.setattr(registry.TorchSave, "_load", lambda self, path, into: {"model": {"w": torch.full((3,), 2.0)}})
    registry.try_out(field, state, into)
    assert list(field.rivals) == ["ckpt"]
    assert "model/w came back changed" in field.errors["torch.save + fsync"]
    field.close()
    with pytest.raises(ValueError, match="no engine has 'nonesuch' in its name"):
        registry.chosen(["nonesuch"])
    assert registry.chosen(["CRC"], registry.FEW) == ["ckpt", "torch.save without CRC-32 + fsync"]


def test_pictures_come_out_of_the_lines(lines: list[Line], tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    (tmp_path / "lines").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "none").write_text("", encoding="utf-8")
    plot, pictures = [sys.executable, "-m", "bench.plot"], tmp_path / "pictures"
    done = subprocess.run(
        [*plot, str(tmp_path / "lines"), "--out", str(pictures)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    assert done.returncode == 0, done.stderr
    names = {"rivals-blocked", "rivals-durable", "rivals-restore-memory", "frequency", "sizes"}
    assert {Path(line) for line in done.stdout.splitlines()} == {pictures / f"{name}.png" for name in names}
    for name in names:
        picture = (pictures / f"{name}.png").read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) > 10_000, "more than an empty canvas"
    done = subprocess.run(
        [*plot, str(tmp_path / "none"), "--out", str(pictures)], cwd=ROOT, capture_output=True, text=True, timeout=patience(120)
    )
    assert done.returncode == 1
    assert "nothing that can be drawn" in done.stderr


def test_a_caption_names_machine_date_and_command(lines: list[Line], monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    from bench import plot

    caption = plot.caption(lines).replace("\n", " ")
    for text in (lines[0]["machine"]["cpu"], lines[0]["date"], lines[0]["commit"][:12], "--workload=sizes", "scale 0.002"):
        assert text in caption

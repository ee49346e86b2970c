"""The page for a reader: what passed, what did not, and the figures against their bars."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.gpu_report.findings import FAIL, INCONCLUSIVE, NOT_RUN, PASS, SKIPPED
from bench.gpu_report.runner import Outcome
from bench.gpu_report.sizes import Size

CELL_CHARACTERS = 500
ASYNC = (
    "DCP async_save",
    "DCP async_save, thread, pinned, staged in background",
    "DCP async_save, process, pinned",
    "DCP async_save, process, pinned, staged in background",
)
DEFAULT = "ckpt, default arena"
UNITS = {"_bytes": (1e9, "GB"), "_GBps": (1.0, "GB/s"), "_us": (1.0, "µs"), "_s": (1.0, "s")}
Lines = Mapping[tuple[str, str], Mapping[str, Any]]


class Judged(NamedTuple):
    """A figure that has a bar. `case` and `quantity` are those of the line that bench.run writes."""

    title: str
    case: str
    quantity: str
    bar: str
    default_case: str = ""  # the same with the arena that Options has by default


BARS = (
    Judged("copies from the GPU / a bare pinned copy", "ckpt / pinned limit", "ratio", ">= 0.95", f"{DEFAULT} / pinned limit"),
    Judged("host time of save() + fence", "ckpt", "blocked_s", "<= 0.005 s", DEFAULT),
    Judged(
        "iteration with a save / without", "ckpt every iteration / no saving", "ratio", "<= 1.02",
        f"{DEFAULT} every iteration / no saving",
    ),
    *(Judged(f"blocked: ckpt / {name}", f"ckpt / {name}, blocked", "ratio", "<= 0.05") for name in ASYNC),
    Judged("restore, load() / min(disk, pinned limit)", "ckpt.load / min(disk, link)", "ratio", ">= 0.9"),
    Judged("restore, load_into() / min(disk, pinned limit)", "ckpt.load_into / min(disk, link)", "ratio", ">= 0.9"),
)  # fmt: skip


def make_page(
    common: Mapping[str, Any], outcomes: Sequence[Outcome], size: Size | None, results_name: str, stand_in: bool
) -> str:
    """
    Args:
        common: what all lines of the results share: date, versions, commit.
        results_name: of the file beside the page.
    """
    measured = [line for outcome in outcomes for line in outcome.measurements]
    lines = {(line["case"], line["quantity"]): line for line in measured}
    title = f"# lazyckpt {common['versions']['ckpt']} on a GPU, {common['date'][:10]}"
    parts = [title, summary(outcomes, lines)]
    if stand_in:
        parts.append("**There was no GPU: host memory and a fake driver stood in. Nothing here says anything about a GPU.**")
    parts += [
        f"To tell us: open an issue and attach this page and `{results_name}`, which has every sample. "
        "Neither names your host or user, but for paths in error texts.",
        "## Machine", table(("fact", "value"), facts_of(common, outcomes)),
        "## Checks", table(("step", "verdict", "seconds", "why"), map(row_of, outcomes)),
        "## Figures against their bars", size_text(size), table(BAR_HEAD, (bar_row(judged, lines, size) for judged in BARS)),
        "## Other figures", table(("step", "check", "figures"), figures_of(outcomes)),
        "## All measurements", table(("case", "quantity", "unit", "median", "min .. max", "n"), map(measurement_row, measured)),
        *said_by(outcomes),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(outcomes: Sequence[Outcome], lines: Lines) -> str:
    counts = collections.Counter(outcome.verdict for outcome in outcomes)
    judged = collections.Counter(verdict_on(bar, lines) for bar in BARS)
    return f"Steps: {counted(counts)}. Bars: {counted(judged)}."


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[each]} {each}" for each in (PASS, FAIL, INCONCLUSIVE, SKIPPED, NOT_RUN) if counts[each])


def facts_of(common: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """With what it was measured, and what the first step has found."""
    found: dict[str, Any] = {"commit": common["commit"] + (" and changes" if common["uncommitted_changes"] else "")}
    found |= {"build of the native core": common["versions"]["native_build"], "python": common["versions"]["python"]}
    found |= {name: common["machine"][name] for name in ("cpu", "kernel")}
    for outcome in outcomes:
        for finding in outcome.findings:
            if finding["check"] == "facts":
                found |= finding["figures"]
    return [(name, shown(name, value)) for name, value in found.items() if "uuid" not in name]


def row_of(outcome: Outcome) -> tuple[str, ...]:
    counts = collections.Counter(finding["verdict"] for finding in outcome.findings)
    several = f"{counted(counts)}. " if sum(counts.values()) > 1 else ""
    seconds = f"{outcome.seconds:.0f}" if outcome.seconds else ""
    return outcome.step.name, outcome.verdict, seconds, several + outcome.reason


# ---- bars ------------------------------------------------------------------------------------------------------------

BAR_HEAD = ("figure", "arena as large as the state", "bar", "verdict", "samples", "default arena", "note")


def verdict_on(judged: Judged, lines: Lines) -> str:
    line = lines.get((judged.case, judged.quantity))
    if line is None:
        return NOT_RUN
    return {True: PASS, False: FAIL, None: INCONCLUSIVE}[line["passed"]]


def bar_row(judged: Judged, lines: Lines, size: Size | None) -> tuple[str, ...]:
    line = lines.get((judged.case, judged.quantity))
    verdict = verdict_on(judged, lines)
    if line is None:
        return judged.title, "", judged.bar, verdict, "", "", why_missing(judged, lines)
    notes = []
    if verdict == INCONCLUSIVE:
        scale = "a stand-in" if size is None or "STAND-IN" in line["workload"] else f"scale {size.scale:g}"
        notes.append(f"not judged: {scale}")
    computing = lines.get(("ckpt every iteration", "iteration_s"))
    if judged.case == "ckpt every iteration / no saving" and computing is not None:
        notes.append(f"computing longer than the flush {computing['detail']['forward_backward_longer_than_flush']}")
    number = figure(line["value"], line["unit"])
    return judged.title, number, judged.bar, verdict, str(line["n"]), with_default_arena(judged, lines), "; ".join(notes)


def with_default_arena(judged: Judged, lines: Lines) -> str:
    """The same figure, where there is one; it has no bar: it may be smaller than the state, or grow first."""
    if judged.default_case:
        line = lines.get((judged.default_case, judged.quantity))
        return "" if line is None else figure(line["value"], line["unit"])
    other = judged.case.removeprefix("ckpt / ").removesuffix(", blocked")
    pair = lines.get((DEFAULT, "blocked_s")), lines.get((other, "blocked_s"))
    return figure(pair[0]["median"] / pair[1]["median"], "1") if pair[0] and pair[1] and other in ASYNC else ""


def why_missing(judged: Judged, lines: Lines) -> str:
    """What a rival has said that does not run here."""
    other = lines.get((judged.case.removeprefix("ckpt / ").removesuffix(", blocked"), "runs_here"))
    return "not measured" if other is None else str(other["detail"]["error"])


def size_text(size: Size | None) -> str:
    if size is None:
        return ""
    if size.scale == 1:
        return f"Full size: 1 billion parameters, 14 GB of state; {size.rounds} rounds."
    return (
        f"At {size.scale:g} of the full size of 1 billion parameters; {size.rounds} rounds: {size.why}. "
        "Bars are stated for the full size, so they are not judged."
    )


# ---- the rest --------------------------------------------------------------------------------------------------------


def figures_of(outcomes: Sequence[Outcome]) -> Iterable[tuple[str, ...]]:
    for outcome in outcomes:
        for finding in outcome.findings:
            figures = [f"{name} {shown(name, value)}" for name, value in finding["figures"].items() if name != "seconds"]
            if figures and finding["check"] != "facts":
                yield outcome.step.name, finding["check"], ", ".join(figures)


def measurement_row(line: Mapping[str, Any]) -> tuple[str, ...]:
    spread = f"{line['min']:.4g} .. {line['max']:.4g}"
    return line["case"], line["quantity"], line["unit"], f"{line['median']:.4g}", spread, str(line["n"])


def said_by(outcomes: Sequence[Outcome]) -> list[str]:
    """The last words of steps that did not pass."""
    parts = []
    for outcome in outcomes:
        if outcome.verdict in (FAIL, INCONCLUSIVE) and outcome.said:
            text = outcome.said.replace("```", "'''")
            parts.append(f"### Said by: {outcome.step.name}\n\n```text\n{text}\n```")
    return ["## What failed", *parts] if parts else []


def shown(name: str, value: Any) -> str:
    if value is None:
        return "none" if name.startswith(("locked_memory", "cgroup")) else "not known"
    for ending, (divisor, unit) in UNITS.items():
        if name.endswith(ending) and isinstance(value, (int, float)):
            return f"{value / divisor:.4g} {unit}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def figure(value: float, unit: str) -> str:
    return f"{value:.4g}" if unit == "1" else f"{value:.4g} {unit}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[cell(text) for text in row] for row in rows]
    if not cells:
        return "None."
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *cells])


def cell(text: str) -> str:
    flat = " ".join(str(text).split()).replace("|", "\\|")
    return flat if len(flat) <= CELL_CHARACTERS else f"{flat[:CELL_CHARACTERS]} ..."

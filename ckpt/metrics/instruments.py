"""What is measured: one row for each instrument, with its names for OpenTelemetry and for Prometheus."""

from __future__ import annotations

from typing import NamedTuple

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
# Upper bounds of the buckets of all histograms of durations, seconds; the last bucket has none.
SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
SIZES = tuple(float(1 << power) for power in range(20, 42, 2))  # bytes: 1 MiB, 4 MiB, ... 1 TiB


class Instrument(NamedTuple):
    """
    Attributes:
        name: for OpenTelemetry.
        exported: for Prometheus, without the "_total" of a counter.
        unit: as OpenTelemetry has it: "s", "By", or "{save}" for a count of saves.
        attributes: whose values tell its series apart. Never a step, nor a path: there would be no end of series.
    """

    name: str
    kind: str
    unit: str
    exported: str
    description: str
    attributes: tuple[str, ...] = ()

    @property
    def buckets(self) -> tuple[float, ...]:
        return SIZES if self.unit == "By" else SECONDS


_ROWS = (
    Instrument("ckpt.save.count", COUNTER, "{save}", "ckpt_save_count", "Saves that have ended.", ("outcome",)),
    Instrument(
        *("ckpt.save.blocked.time", COUNTER, "s", "ckpt_save_blocked_time_seconds"),
        "Time that training was held: inside save(), and at fences; of both, for room in the arena.",
        ("where",),
    ),
    Instrument(
        *("ckpt.save.duration", HISTOGRAM, "s", "ckpt_save_duration_seconds"),
        "Blocked: training was held. Capture, flush, durable: from the call of save(). Commit: from flush to durable.",
        ("phase",),
    ),
    Instrument("ckpt.save.size", HISTOGRAM, "By", "ckpt_save_size_bytes", "What this process has written for a save."),
    Instrument(
        *("ckpt.save.reused", COUNTER, "By", "ckpt_save_reused_bytes"),
        "Bytes of committed saves that were not written: the checkpoint before has them.",
    ),
    Instrument(
        *("ckpt.io", COUNTER, "By", "ckpt_io_bytes"),
        "Bytes of committed saves, and of restores; those written by where they came from.",
        ("direction", "source", "tier"),
    ),
    Instrument(
        *("ckpt.restore.duration", HISTOGRAM, "s", "ckpt_restore_duration_seconds"),
        "Choose: to agree upon a checkpoint. Read: and verify. Load: to make the state of what was read.",
        ("phase", "tier"),
    ),
    Instrument("ckpt.restore.count", COUNTER, "{restore}", "ckpt_restore_count", "Restores that have ended.", ("outcome",)),
    Instrument(
        *("ckpt.verify.failures", COUNTER, "{file}", "ckpt_verify_failures"),
        "Files that were not what was written.",
        ("tier",),
    ),
    Instrument("ckpt.committed.step", GAUGE, "{step}", "ckpt_committed_step", "The step that was committed last.", ("tier",)),
    Instrument(
        *("ckpt.committed.timestamp", GAUGE, "s", "ckpt_committed_timestamp_seconds"),
        "When that was, as Unix time.",
        ("tier",),
    ),
    Instrument("ckpt.in_flight", GAUGE, "{save}", "ckpt_in_flight", "Saves on their way."),
    Instrument("ckpt.arena.usage", GAUGE, "By", "ckpt_arena_usage_bytes", "Staging memory in use."),
    Instrument("ckpt.arena.limit", GAUGE, "By", "ckpt_arena_limit_bytes", "Staging memory that there is."),
    Instrument(
        *("ckpt.drain.backlog", GAUGE, "By", "ckpt_drain_backlog_bytes"),
        "What this node's drain, or that of an object store, has still to carry to a tier.",
        ("tier",),
    ),
    Instrument("ckpt.drain.pending", GAUGE, "{step}", "ckpt_drain_pending", "Checkpoints that this is of.", ("tier",)),
    Instrument(
        *("ckpt.drain.duration", HISTOGRAM, "s", "ckpt_drain_duration_seconds"),
        "How long a checkpoint was on its way to a tier.",
        ("tier", "outcome"),
    ),
    Instrument(
        *("ckpt.drain.retries", COUNTER, "{attempt}", "ckpt_drain_retries"),
        "Attempts to carry a checkpoint to a tier that have failed.",
        ("tier", "error"),
    ),
    Instrument("ckpt.tier.free", GAUGE, "By", "ckpt_tier_free_bytes", "Free space, when a save has ended there.", ("tier",)),
    Instrument("ckpt.info", GAUGE, "1", "ckpt_info", "Always 1.", ("version", "torch")),
)
INSTRUMENTS = {row.name: row for row in _ROWS}
# Gauges that are read when somebody wants them, see Registry.watch(); all others are set when something happens.
WATCHED = {"ckpt.in_flight", "ckpt.arena.usage", "ckpt.arena.limit", "ckpt.drain.backlog", "ckpt.drain.pending"}

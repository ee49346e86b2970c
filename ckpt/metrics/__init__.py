"""What saves and restores have cost, for whoever keeps such numbers. Imports no torch.

For one Checkpointer, as `metrics=[...]`: `callback(function)` gives a flat dict for each save, `textfile(path)` writes for
node_exporter, and any object with saved() and close() is told of each save (`MetricsSink`). For the whole process, called once:
`prometheus()` for prometheus_client, `opentelemetry()`. docs/operating/metrics.md lists what there is.
"""

from ckpt.metrics.loggers import callback, figures
from ckpt.metrics.opentelemetry_bridge import opentelemetry
from ckpt.metrics.prometheus_collector import prometheus
from ckpt.metrics.record import MetricsSink, SaveRecord
from ckpt.metrics.registry import PROCESS
from ckpt.metrics.text_format import textfile

__all__ = ["MetricsSink", "SaveRecord", "callback", "figures", "name_run", "opentelemetry", "prometheus", "textfile"]


def name_run(run: str) -> None:
    """Names the job in metrics (the label `run`) and events, the same on all its ranks; else it has the name that SLURM or
    torchrun has given it, or none."""
    PROCESS.run = run

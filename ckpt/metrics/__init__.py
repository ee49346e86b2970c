"""What saves have cost, told to whoever keeps such numbers."""

from ckpt.metrics.record import MetricsSink, SaveRecord

__all__ = ["MetricsSink", "SaveRecord"]

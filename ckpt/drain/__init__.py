"""Carries committed generations from the disk of a node home. Imports no torch.

`python -m ckpt drain NODE_ROOT` is the program; status() says how far it has come.
"""

from ckpt.drain.progress import DrainStatus, status

__all__ = ["DrainStatus", "status"]

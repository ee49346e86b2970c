"""Checkpoints in an object store: what lies there, whose it is, and how it is read. Needs no torch."""

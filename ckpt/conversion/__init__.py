"""Checkpoints as other formats, and beside each other: one tensor after the other, never all of them in memory."""

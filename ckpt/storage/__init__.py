"""All that Python changes on a file system, and places for copies of checkpoints."""

"""Looks at checkpoints, and mends, removes and copies them, outside of the job that saves. Imports no torch."""

"""How the ranks of a job make a save a checkpoint."""

"""Training frameworks: how long their own way to save holds a training up, and how long ours does."""

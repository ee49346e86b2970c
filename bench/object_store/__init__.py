"""How fast checkpoints come to an object store, and back, beside its client alone."""

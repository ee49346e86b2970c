"""Training frameworks with our checkpoints beside the same ones with their own."""

"""What `python -m ckpt` does: one module for each command. The one place of ckpt/ that sets up logging."""

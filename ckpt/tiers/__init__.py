"""What stands between a Checkpointer and the disk of its node, where saves land before they are carried home."""

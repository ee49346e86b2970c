"""Directories of checkpoints: names, manifests, and what is no longer wanted."""

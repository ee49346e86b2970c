"""Sharded state: what of it each rank writes, computed by each rank alone, and the metadata that readers of torch need."""

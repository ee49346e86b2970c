"""What it brings to save on the disk of the node first, where the file system behind it is slow."""

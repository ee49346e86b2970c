"""From a file to an object: its records, what its pickle means, and memory of the host or of devices for it."""

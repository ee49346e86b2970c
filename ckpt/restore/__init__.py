"""Which checkpoint the ranks of a job restore, and how its files are read."""

"""From an object to what must be written: its pickle, its storages, and which of them may leave lazily."""

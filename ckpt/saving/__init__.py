"""save(): the plan is submitted to an engine, looked after at fences, and taken to its end in the background."""

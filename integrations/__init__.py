"""Adapters between `ckpt` and the frameworks that drive training.

Each adapter is a package of its own, imported by name by whoever wants it, and imports its framework itself, so that
`import ckpt` never pulls one in. Adapters are written against the public names of `ckpt` and nothing else: what they
can do, any user can do.

The packages bear the names of their frameworks. So this directory itself must never be in `sys.path`: they would be imported in
place of the frameworks.
"""

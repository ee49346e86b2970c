"""What the adapters of Hugging Face's libraries have in common; no part of it is promised to anybody else.

Their own code says which files a checkpoint has, and calls writers for them. So it runs as it is, and is told to write to the
directory of a bundle. Meanwhile the writers that it calls hand what goes there to the bundle (`open_bundle`,
`replaced_writers`, `sharded_writes`). What somebody else writes there is made durable with it.
"""

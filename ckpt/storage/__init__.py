"""What this package changes on a file system, and only this package."""

"""`python -m ckpt`: see cli/."""

import sys

from ckpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

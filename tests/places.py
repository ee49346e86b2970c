"""Where things lie: the repository, its tests, and the folders in which a test module finds what it imports."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# Modules of tests import each other by their bare names, whatever folder they are in. For pytest conftest.py sees to that;
# a process that a test starts is given PYTHONPATH.
FOLDERS = [TESTS, *sorted({path.parent for path in TESTS.glob("*/test_*.py")})]
PYTHONPATH = os.pathsep.join(map(str, [ROOT, *FOLDERS]))

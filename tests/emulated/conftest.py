"""Lets the tests of this folder import the helper modules of tests/compiled."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "compiled"))

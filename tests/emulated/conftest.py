"""Lets the tests of this folder import the helper modules of this folder and of tests/compiled."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "compiled")]

"""Bitwright against other quantizers on the zoo: accuracy, speed, size, quantizing time and memory.

usage: BITWRIGHT_ZOO=... python benchmarks/quantization [run|table|paired] ...
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started as a folder, this file's folder is on the path instead of the one that holds the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from quantization.command import main

    sys.exit(main())

"""Compiled artifacts against ONNX Runtime's fastest form of the same model, and their kernels under the roofline.

usage: BITWRIGHT_ZOO=... python benchmarks/kernels [run|table] --out DIR [--models ...] [--targets ...] [--threads 1,2]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started as a folder, this file's folder is on the path instead of the one that holds the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from kernels.command import main

    sys.exit(main())

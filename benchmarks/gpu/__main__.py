"""A folder that checks and times GPU kernels and models on a machine with a GPU, built on a machine without one.

usage: BITWRIGHT_ZOO=... python benchmarks/gpu build --out DIR [--profile NAME] [--models NAME ...] [--gemm SIZE]
           [--device-key KEY --tuning-store FILE]
       python benchmarks/gpu learn RESULT.json --device-key KEY --tuning-store FILE
       python benchmarks/gpu table RESULT.json
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started as a folder, this file's folder is on the path instead of the one that holds the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from gpu.command import main

    sys.exit(main())

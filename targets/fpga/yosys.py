"""Yosys, as the families of circuits share it."""

from bitwright.targets.toolchain.yosys import INSTALL, run_yosys, yosys_missing, yosys_version

__all__ = ("INSTALL", "run_yosys", "yosys_missing", "yosys_version")

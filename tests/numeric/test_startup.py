"""What the command line must not load before it works: each is a fifth of the time of a small model's quantization."""

import subprocess
import sys

import onnx_ir as ir
import pytest


@pytest.mark.parametrize("module", ["sympy.core", "networkx.algorithms", "scipy", "rich", "tvm"])
def test_not_loaded_by_importing_the_pipeline(module):
    program = f"import sys, bitwright.compiler.cli, bitwright.compiler.frontend; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_deferred_modules_work_when_they_are_used():
    assert str((ir.SymbolicDim("N") + 1).simplify()) in ("SymbolicDim(N + 1)", "N + 1")
    program = "import bitwright.compiler.cli, networkx as nx; assert nx.path_graph(3).number_of_edges() == 2"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

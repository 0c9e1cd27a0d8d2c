"""What processes must not load before they work: each is a fifth of the time of a small model's quantization."""

import os
import subprocess
import sys

import onnx_ir as ir

from bitwright.compiler.child import CHILD

PROBE = """
import sys, types
import networkx, sympy
try:
    import torch
except ImportError:
    print(sys.argv[1:], [type(m) is types.ModuleType for m in (networkx, sympy)])
"""


def loaded(program: str, *modules: str) -> list[str]:
    """Return which of the modules a program has loaded in a process of its own."""
    code = f"import sys\n{program}\nprint(*(m for m in {modules!r} if sys.modules.get(m)))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def test_not_loaded_by_importing_the_pipeline():
    program = "import bitwright.compiler.cli, bitwright.compiler.frontend"
    assert loaded(program, "sympy.core", "networkx.algorithms", "scipy", "rich", "tvm", "numpy") == ["numpy"]


def test_deferred_modules_work_when_they_are_used():
    assert str((ir.SymbolicDim("N") + 1).simplify()) in ("SymbolicDim(N + 1)", "N + 1")
    program = "import bitwright.compiler.cli, networkx as nx; assert nx.path_graph(3).number_of_edges() == 2"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_process_of_our_own_loads_neither_pytorch_nor_what_is_deferred(tmp_path):
    """TVM's loader imports PyTorch wherever it is installed: it would be most of a small lowering."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "torch.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, *CHILD, "probe", "one", "two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "['one', 'two'] [False, False]"


def test_not_loaded_by_a_lowering():
    program = "sys.modules['torch'] = None\nfrom bitwright.compiler.deferred import defer_imports\ndefer_imports()\n"
    program += "import bitwright.compiler.lower.worker"
    assert loaded(program, "sympy.core", "scipy.special", "tvm") == ["tvm"]

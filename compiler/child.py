"""Starts a module as a process of our own: ``python -P -m bitwright.compiler.child MODULE ARGUMENTS``.

Half of a small lowering was importing what it never uses: sympy, networkx, and PyTorch, which ``tvm_ffi`` loads
wherever it is installed (1.5 s of processor time).
"""

from __future__ import annotations

import runpy
import sys

from bitwright.compiler.deferred import defer_imports

# Arguments of the Python interpreter; the module's name follows.
CHILD = ("-P", "-m", "bitwright.compiler.child")


def main() -> None:
    """Run the module that the first argument names, as if it had been started itself."""
    del sys.argv[0]
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails as where it is not installed
    defer_imports()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

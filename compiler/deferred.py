"""Modules that are loaded when they are first used rather than when something imports them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

# onnx_ir needs sympy only to calculate with symbolic dimensions; loading it is 0.2 s and 33 MB, more than all
# of a small model's calibration. networkx (0.08 s, 15 MB) is not needed before the scales are chosen.
DEFERRED = frozenset(["networkx", "sympy", "onnx_ir._symbolic_shapes"])


class DeferredFinder(MetaPathFinder):
    """Finds the named modules like Python does, and lets ``importlib.util.LazyLoader`` load them.

    A deferred module is loaded by the first use of an attribute, and by a second ``import`` statement.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that loads lazily for a named module, None for every other."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self._names else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def defer_imports() -> None:
    """Defer the modules that cost much and are rarely used; those that are loaded already stay as they are."""
    if not any(isinstance(finder, DeferredFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, DeferredFinder(DEFERRED))

"""What a pass is: a frozen dataclass with a name and a ``run`` from a valid ONNX model to a valid ONNX model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import onnx_ir as ir


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        model: The rewritten model. Passes edit the model they are given in place and return it.
        changed: How many rewrites fired; 0 means the model is untouched.
        notes: One line for each "why" or "why not" a reader of the report would ask about.
    """

    model: ir.Model
    changed: int
    notes: tuple[str, ...] = ()


@runtime_checkable
class Pass(Protocol):
    """A rewrite. Its options are its dataclass fields, so its repr is its log line.

    A pass must reach a fixed point: run on its own output it changes nothing.
    """

    @property
    def name(self) -> str:
        """The verb phrase that names the pass in logs and reports, e.g. ``fold_batchnorm``."""
        ...

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        ...

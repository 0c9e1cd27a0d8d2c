"""Replace calls of model-local functions by their bodies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import PassError
from onnx_ir.passes.common import InlinePass, RemoveUnusedOpsetsPass

from bitwright.compiler.errors import ModelError
from bitwright.passes.contract import PassResult


@dataclass(frozen=True)
class InlineFunctions:
    """Inline every model-local function, nested calls included, and drop the definitions."""

    name: ClassVar[str] = "inline_functions"

    def run(self, model: ir.Model) -> PassResult:
        """Inline.

        Raises:
            ModelError: Functions call each other in a circle, import another opset than the model, or take
                graphs as attributes.
        """
        defined = len(model.functions)
        if not defined:
            return PassResult(model, 0)
        try:
            InlinePass()(model)
        except (PassError, ValueError) as error:
            msg = f"a model-local function cannot be inlined: {error}"
            raise ModelError(
                msg,
                fix="export the model without functions",
            ) from error
        model.functions.clear()  # only ones that nobody calls are left
        RemoveUnusedOpsetsPass()(model)
        return PassResult(model, defined, (f"{defined} model-local functions inlined",))

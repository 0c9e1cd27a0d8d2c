"""From a template's loop body to the kernel record that lowering works with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitwright.compiler.lower.templates.epilogue import Epilogue
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import Buffer, Parameter, build_function
from bitwright.compiler.lower.templates.staging import Staging
from bitwright.targets.backend import Kernel


def assemble_kernel(
    intrinsic: str,
    geometry: DotGeometry,
    staging: Staging,
    epilogue: Epilogue,
    params: object,
    constants: dict[str, np.ndarray],
    body: Callable[[list[Buffer]], None],
) -> Kernel:
    """Build the function and the record of a dot-product kernel.

    Args:
        intrinsic: Compute row it is built on, or "llvm".
        geometry: Loop bounds.
        staging: How the activations reach the instruction.
        epilogue: What is done with the accumulators.
        params: Blocking. With the above it determines the function: together they are its key.
        constants: Name -> array, in parameter order.
        body: Writes the loops, given flat views of the activations, the constants and the output.
    """
    parameters = [
        Parameter("x", geometry.input_shape, staging.source),
        *(Parameter(name, array.shape, array.dtype.name) for name, array in constants.items()),
        Parameter("y", geometry.output_shape, epilogue.dtype),
    ]
    return Kernel(
        key=f"{intrinsic}|{geometry}|{staging}|{epilogue}|{params}",
        function=build_function(parameters, body),
        constants=tuple(constants.values()),
        output_shape=geometry.output_shape,
        output_dtype=epilogue.dtype,
        intrinsic=intrinsic,
    )

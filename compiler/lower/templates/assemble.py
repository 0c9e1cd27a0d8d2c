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
    return kernel_of(
        f"{intrinsic}|{geometry}|{staging}|{epilogue}|{params}",
        intrinsic,
        Parameter("x", geometry.input_shape, staging.source),
        constants,
        Parameter("y", geometry.output_shape, epilogue.dtype),
        body,
    )


def kernel_of(
    key: str,
    intrinsic: str,
    source: Parameter,
    constants: dict[str, np.ndarray],
    output: Parameter,
    body: Callable[[list[Buffer]], None],
) -> Kernel:
    """Build the function and the record of a kernel that reads one tensor and constants.

    Args:
        key: Kernels with equal keys have the same function.
        intrinsic: Compute row it is built on, or "llvm".
        source: The activations.
        constants: Name -> array, in parameter order.
        output: The result.
        body: Writes the loops, given flat views of the activations, the constants and the output.
    """
    arrays = (Parameter(name, array.shape, array.dtype.name) for name, array in constants.items())
    return Kernel(
        key=key,
        function=build_function([source, *arrays, output], body),
        constants=tuple(constants.values()),
        output_shape=output.shape,
        output_dtype=output.dtype,
        intrinsic=intrinsic,
    )

"""Scales of groups in fewer bits than float32: bfloat16, or integers times the unit of a super-block as in k-quants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.plan.model import Plan, WeightQuant

ScaleStorage = Literal["float32", "bfloat16", "integer"]

Float32 = NDArray[np.float32]

# Groups of a super-block: 8 of 32 weights, as in llama.cpp's k-quants.
MOST_GROUPS = 8
LARGEST = 255


@dataclass(frozen=True, eq=False)
class SuperScales:
    """Scales as products; in this form groups run along the last axis.

    Attributes:
        integers: 1 to 255, uint8, shape (..., super-blocks, groups of one).
        units: Values of bfloat16 as float32, shape (..., super-blocks, 1).
    """

    integers: NDArray[np.uint8]
    units: Float32

    def scales(self) -> Float32:
        """Return the scales, float32, shape (..., groups): exact products, of 16 significant bits at most."""
        found = self.integers.astype(np.float32) * self.units
        return found.reshape(*found.shape[:-2], -1)


def as_bfloat16(values: NDArray[np.floating]) -> Float32:
    """Return the nearest values of bfloat16, as float32."""
    return values.astype(ir.DataType.BFLOAT16.numpy()).astype(np.float32)


def groups_together(count: int) -> int:
    """Return how many of ``count`` neighbouring groups share a unit: the largest divisor up to 8."""
    return next(k for k in range(MOST_GROUPS, 0, -1) if count % k == 0)


def super_scales(scales: Float32) -> SuperScales:
    """Write scales as integers times units; the largest of a super-block is 255 units.

    Of scales that are such products already the very products are found again.

    Args:
        scales: Positive, float32, shape (..., groups).
    """
    size = groups_together(scales.shape[-1])
    blocks = scales.reshape(*scales.shape[:-1], -1, size)
    units = as_bfloat16(blocks.max(axis=-1, keepdims=True) / np.float32(LARGEST))
    integers = np.clip(np.rint(blocks / units), 1, LARGEST)
    np.put_along_axis(integers, blocks.argmax(axis=-1)[..., None], LARGEST, axis=-1)
    return SuperScales(integers.astype(np.uint8), units)


def scale_bits(storage: ScaleStorage, groups: int) -> float:
    """Return the bits that one scale takes.

    Args:
        storage: How scales are stored.
        groups: Groups along the reduction.
    """
    if storage == "integer":
        return 8 + 16 / groups_together(groups)
    return 16.0 if storage == "bfloat16" else 32.0


def narrowed(plan: Plan, storage: ScaleStorage) -> Plan:
    """Return the plan with scales of groups that can be stored so; zero points and types stay."""
    if storage == "float32":
        return plan
    return replace(plan, weights={key: _narrowed(quant, storage) for key, quant in plan.weights.items()})


def _narrowed(quant: WeightQuant, storage: ScaleStorage) -> WeightQuant:
    if not quant.group or quant.axis is None or quant.codebook == "nf4":
        return quant
    if storage == "bfloat16":
        return replace(quant, scale=as_bfloat16(quant.scale), scale_storage=storage)
    last = np.moveaxis(quant.scale, quant.axis, -1)
    scales = np.moveaxis(super_scales(last).scales(), -1, quant.axis)
    return replace(quant, scale=np.ascontiguousarray(scales), scale_storage=storage)

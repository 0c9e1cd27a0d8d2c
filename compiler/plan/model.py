"""The plan: every decision of a compilation, as data that is written to plan.yaml and can be read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class ActivationQuant:
    """How one activation tensor is quantized.

    Attributes:
        tensor: Name of the float tensor in the normalized model.
        dtype: ``"uint8"``, ``"int8"``, ``"uint16"`` or ``"int16"``; ``"float8_e4m3fn"`` or ``"float8_e5m2"``.
        scale: Positive scale, float32 value.
        zero_point: Integer of ``dtype``.
        low: Calibrated lower end of the range (real units), <= 0.
        high: Calibrated upper end, >= 0.
        tie: Identifier shared by all tensors that must have one scale, or "".
        method: Calibration method that chose the range.
        float_copy: Float operators read the value before quantization rather than the dequantized one.
    """

    tensor: str
    dtype: str
    scale: float
    zero_point: int
    low: float
    high: float
    tie: str = ""
    method: str = "minmax"
    float_copy: bool = True


@dataclass(frozen=True)
class WeightQuant:
    """How one constant weight is quantized.

    Attributes:
        tensor: Initializer name.
        dtype: Element type in the file, e.g. ``"int8"``, ``"int4"``, ``"uint4"``, ``"int2"``, ``"float16"``.
        axis: Channel axis of the scales, the axis that is cut into groups, or None for one scale.
        scale: float32 array: one per channel (or one element); with groups, of the weight's rank, ``axis``
            divided by ``group`` (rounded up).
        zero_point: Integers of ``scale``'s shape; None where it is the middle of the type.
        group: Weights along ``axis`` that share a scale; 0 without groups.
        bits: Width of the integers really used, at most that of ``dtype``.
        codebook: Name of the table of values that the integers index, or "".
        menu: Group lengths that the kernel takes.
        scale_storage: How scales of groups stand in the file: ``"float32"``, ``"bfloat16"`` or ``"integer"``
            (:mod:`bitwright.compiler.plan.scale_storage`).
    """

    tensor: str
    dtype: str
    axis: int | None
    scale: np.ndarray
    zero_point: np.ndarray | None = None
    group: int = 0
    bits: int = 8
    codebook: str = ""
    menu: tuple[int, ...] = ()
    scale_storage: Literal["float32", "bfloat16", "integer"] = "float32"


@dataclass(frozen=True)
class NodeDecision:
    """What was decided for one node.

    Attributes:
        node: Node name.
        op: Operator type.
        format: ``"float"`` or one of :data:`bitwright.targets.schema.FORMATS`.
        role: The profile's role of the operator, or "" when it has none.
        reason: Why, in words a user understands.
        inputs: Activation inputs that are read as integers.
        output: ``"int"``: followed by a quantizer; ``"float"`` otherwise.
        weight: Initializer name of its quantized weight, or "".
        macs: Multiply-accumulates of one call at the planning shape.
        estimated_s: Estimated seconds on the target in the chosen format.
        estimated_float_s: Estimated seconds in float.
        estimate: Where ``estimated_s`` comes from: ``"measured"``, ``"fitted"`` or ``"modelled"``.
        constant_weight: It multiplies by a constant weight (an attention product does not).
    """

    node: str
    op: str
    format: str
    role: str
    reason: str
    inputs: tuple[str, ...] = ()
    output: Literal["int", "float"] = "float"
    weight: str = ""
    macs: int = 0
    estimated_s: float = 0.0
    estimated_float_s: float = 0.0
    estimate: str = "modelled"
    constant_weight: bool = False

    @property
    def integer(self) -> bool:
        """Whether it reads integers (a weight-only format does not)."""
        return bool(self.inputs)


@dataclass
class Plan:
    """Decisions for a whole model and one runtime.

    Attributes:
        target: Profile name.
        runtime: ``"artifact"`` or ``"onnxruntime"``.
        nodes: Decision by node name.
        activations: By tensor name.
        weights: By initializer name.
        foldings: Of circuits: layer -> how much of it is computed in a cycle, by parameter.
    """

    target: str
    runtime: Literal["artifact", "onnxruntime"]
    nodes: dict[str, NodeDecision] = field(default_factory=dict)
    activations: dict[str, ActivationQuant] = field(default_factory=dict)
    weights: dict[str, WeightQuant] = field(default_factory=dict)
    foldings: dict[str, dict[str, int]] = field(default_factory=dict)

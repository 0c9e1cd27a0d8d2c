"""ONNX operators as functions of PyTorch tensors: the node and its inputs in, its outputs out."""

from __future__ import annotations

from collections.abc import Mapping

from bitwright.compiler.training.operators.elementwise import ELEMENTWISE
from bitwright.compiler.training.operators.linear import LINEAR
from bitwright.compiler.training.operators.normalization import NORMALIZATION
from bitwright.compiler.training.operators.pooling import POOLING
from bitwright.compiler.training.operators.shaping import SHAPING
from bitwright.compiler.training.operators.signature import Operator

OPERATORS: Mapping[str, Operator] = {**LINEAR, **POOLING, **NORMALIZATION, **ELEMENTWISE, **SHAPING}
"""By operator type, standard domain, in the forms of opset 18 and later."""

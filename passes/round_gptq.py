"""Round the weights of anchors with known inputs so that each layer's output changes least (GPTQ)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import FreshNames
from bitwright.compiler.graph.operands import weight_of
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.compiler.plan.weight_grids import matrices_of, quantizer_of, weight_from
from bitwright.compiler.plan.weight_search import known_moments, readers_of
from bitwright.compiler.rounding.coordinate import refine
from bitwright.compiler.rounding.gptq import Feedback, factorize, gptq
from bitwright.compiler.rounding.grid import Quantizer, codebook
from bitwright.compiler.rounding.objective import DAMPING, shrinkage_of
from bitwright.passes.contract import PassResult
from bitwright.passes.stored_weights import is_indexed, store_weight


@dataclass(frozen=True)
class RoundGPTQ:
    """Quantize weights by GPTQ (Frantar et al. 2022), within the scales of the plan.

    Weights without moments, in half precision, or in a layout that is no plain matrix product are left to
    RoundNearest, which runs behind.

    Attributes:
        plan: Names the weight of each node, its format and its scales.
        moments: Input moments by node name, of the model the pass is run on.
        refine: Move levels by coordinate descent afterwards, while the layer's error falls.
    """

    plan: Plan
    moments: Mapping[str, InputMoments]
    refine: bool = True

    @property
    def name(self) -> str:
        """The pass's name."""
        return "round_gptq"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        fresh = FreshNames(model)
        # Layers that read one tensor follow each other: keeping more than the last factorization only takes memory.
        last: tuple[tuple[int, ...], Feedback] | None = None
        changed, notes = 0, []
        for key, nodes in readers_of(self.plan, model).items():
            known = known_moments(nodes, self.moments)
            quantizer = quantizer_of(self.plan.weights[key], nodes[0], known[0].groups) if known else None
            if quantizer is None:
                continue
            ids = tuple(id(m) for m in known)
            if last is None or last[0] != ids:
                last = (ids, feedback_of(known))
            self._replace(model, key, nodes, self._levels(nodes[0], last[1], quantizer), fresh)
            changed += len(nodes)
            if last[1].damping > DAMPING:
                notes.append(f"{key}: nearly dependent inputs, damping raised to {last[1].damping:.2g}")
        return PassResult(model, changed, tuple(notes))

    def _levels(self, node: ir.Node, feedback: Feedback, quantizer: Quantizer) -> NDArray[np.float32]:
        weights = matrices_of(node)
        assert weights is not None
        levels = gptq(weights, feedback, quantizer)
        return refine(weights, levels, feedback.objective, quantizer) if self.refine else levels

    def _replace(
        self,
        model: ir.Model,
        key: str,
        nodes: Sequence[ir.Node],
        levels: NDArray[np.float32],
        fresh: FreshNames,
    ) -> None:
        quant, weight = self.plan.weights[key], weight_of(nodes[0])
        assert weight is not None
        stored = weight_from(levels, nodes[0])
        read = store_weight(model, weight.name or "weight", _integers(stored, quant), quant, fresh)
        for node in nodes:
            node.replace_input_with(1, read())


def feedback_of(moments: Sequence[InputMoments]) -> Feedback:
    """Factor the joint second moment of all inputs that one weight multiplies.

    Raises:
        DataError: A moment is not finite.
    """
    count = sum(m.count for m in moments)
    if len(moments) == 1:
        return factorize(moments[0].second, shrinkage=shrinkage_of(count))
    second = sum((m.second * (m.count / count) for m in moments), np.zeros(moments[0].second.shape))
    return factorize(second, shrinkage=shrinkage_of(count))


def _integers(levels: NDArray[np.float32], quant: WeightQuant) -> NDArray[np.generic]:
    """Return what is stored for levels: positions in NF4's table, the values of a float type, or integers."""
    if is_indexed(quant):
        return codebook(quant.codebook).index(levels)
    if quant.dtype.startswith("float"):
        return levels
    return np.rint(levels).astype(np.int16)

"""The main graph of a normalized ONNX model as a PyTorch module, rounded where a plan rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import constant_array, is_op, node_label
from bitwright.compiler.graph.operands import stored_weight, table_of, weight_of
from bitwright.compiler.training.operators import OPERATORS
from bitwright.compiler.training.rounding_points import RoundingPoints

# Operators whose constant vectors (gains, biases) are trained beside weights and tables.
_GAINS = {"Add": (0, 1), "Mul": (0, 1), "Gemm": (2,), "Conv": (2,), "LayerNormalization": (1, 2)}
_GAINS |= {"RMSNormalization": (1,), "BatchNormalization": (1, 2)}

Watch = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class _Step:
    """One node.

    Attributes:
        node: What is computed.
        inputs: Names, None where an optional input is left out.
        outputs: Names.
        done: Values that nobody reads afterwards.
    """

    node: ir.Node
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...] = field(default=())


class GraphModule(nn.Module):
    """Computes what the graph computes; weights, tables, biases and gains are its parameters.

    Args:
        model: Normalized; constants are initializers.
        points: Where to round, None for the float model.
        outputs: Names of the values to compute; None: the graph's outputs.
        hidden: Names of further values to return, as they are before their readers round them.

    Attributes:
        trained: Names of the initializers that are parameters, in the order of the graph.
        watch: Called with the name and the value of every node's first output; what it returns is passed on.

    Raises:
        ModelError: An operator cannot be trained; the message names the node.
    """

    def __init__(
        self,
        model: ir.Model,
        points: RoundingPoints | None = None,
        outputs: Iterable[str] | None = None,
        hidden: Iterable[str] = (),
    ) -> None:
        super().__init__()
        graph = model.graph
        self.outputs = tuple(outputs) if outputs is not None else tuple(o.name or "" for o in graph.outputs)
        self.hidden = tuple(hidden)
        self.points = points
        self.watch: Watch = _pass_on
        arrays = {name: array for name, v in graph.initializers.items() if _is_read(v, array := _array(v))}
        self.trained = tuple(name for name in trained_names(model) if name in arrays)
        self._place = {name: k for k, name in enumerate(self.trained)}
        self.weights = nn.ParameterList(
            nn.Parameter(torch.from_numpy(arrays[n].copy())) for n in self.trained
        )
        self._constants = {
            name: torch.from_numpy(array.copy()) for name, array in arrays.items() if name not in self._place
        }
        self._steps = _steps(model, frozenset((*self.outputs, *self.hidden)))
        made = {name for step in self._steps for name in step.outputs}
        self._rounded = tuple(name for name in self.outputs if name in made)

    def weight(self, name: str) -> Tensor:
        """Return the parameter of an initializer."""
        return self.weights[self._place[name]]

    def trains(self, name: str) -> bool:
        """Tell whether an initializer is a parameter."""
        return name in self._place

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            feeds: Input -> tensor of the model's shape and type.

        Returns:
            Output or hidden value -> tensor.
        """
        values: dict[str, Tensor] = {**self._constants, **feeds}
        values.update({name: self.weights[k] for name, k in self._place.items()})
        rounded: dict[str, Tensor] = {}
        for step in self._steps:
            inputs = [None if name is None else values[name] for name in step.inputs]
            if self.points is not None:
                inputs = self.points.round_inputs(step.node, inputs, rounded)
            results = OPERATORS[step.node.op_type](step.node, inputs)
            values.update(zip(step.outputs, results, strict=False))
            values[step.outputs[0]] = self.watch(step.outputs[0], values[step.outputs[0]])
            for name in step.done:
                del values[name]
                rounded.pop(name, None)
        found = {name: values[name] for name in (*self.outputs, *self.hidden)}
        if self.points is not None:
            found |= {name: self.points.round_output(name, found[name]) for name in self._rounded}
        return found


def _pass_on(name: str, value: Tensor) -> Tensor:
    del name
    return value


def _array(value: ir.Value) -> np.ndarray:
    array = constant_array(value)
    if array is None:
        what = f"'{value.name}' has no value"
        raise ModelError(what, where=value.name or "", fix="export the model again")
    return array


def _is_read(value: ir.Value, array: np.ndarray) -> bool:
    return bool(value.uses()) or array.size == 0


def trained_names(model: ir.Model) -> tuple[str, ...]:
    """Return the initializers that training changes: weights, tables, biases and gains, in graph order."""
    found: dict[str, None] = {}
    for node in model.graph:
        for value in (stored_weight(weight_of(node)), table_of(node), *_gains(node)):
            array = constant_array(value)
            if value is not None and array is not None and array.dtype == np.float32:
                found.setdefault(value.name or "")
    return tuple(name for name in found if name in model.graph.initializers)


def _gains(node: ir.Node) -> tuple[ir.Value, ...]:
    places = _GAINS.get(node.op_type, ())
    found = [node.inputs[k] for k in places if k < len(node.inputs)]
    vectors = [v for v in found if v is not None and (a := constant_array(v)) is not None and a.ndim == 1]
    return tuple(v for v in vectors if (a := constant_array(v)) is not None and a.size > 1)


def _steps(model: ir.Model, kept: frozenset[str]) -> list[_Step]:
    nodes = list(model.graph)
    for node in nodes:
        if not is_op(node, *OPERATORS):
            name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
            what = f"{name} cannot be trained"
            fix = f"operators that can: {', '.join(sorted(OPERATORS))}"
            raise ModelError(what, where=f"node '{node_label(node)}'", fix=fix)
    produced = {o.name for node in nodes for o in node.outputs if o.name}
    last = {v.name: k for k, node in enumerate(nodes) for v in node.inputs if v is not None}
    steps = []
    for k, node in enumerate(nodes):
        read = {v.name for v in node.inputs if v is not None}
        done = tuple(sorted(n for n in read & produced - kept if n is not None and last[n] == k))
        inputs = tuple(None if v is None else v.name for v in node.inputs)
        steps.append(_Step(node, inputs, tuple(o.name or "" for o in node.outputs), done))
    return steps

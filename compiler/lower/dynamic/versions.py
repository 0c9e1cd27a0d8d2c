"""A model lowered at one length: as far as shapes tell, without the weights of its products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from bitwright.compiler.lower.dynamic.islands import NodeShapes, node_shapes
from bitwright.compiler.lower.float.replace import Replacement, find_replacements
from bitwright.compiler.lower.float.vectors import vector_unit
from bitwright.compiler.lower.kernel_table import KernelCall
from bitwright.compiler.lower.kernels.loops import kernel
from bitwright.compiler.lower.layout import dot_order
from bitwright.compiler.lower.relax_module import build_functions
from bitwright.compiler.program.ops import Program, Step
from bitwright.targets.backend import Kernel
from bitwright.targets.schema import Profile


@dataclass(frozen=True)
class Version:
    """The model at one length.

    Attributes:
        program: Its program, of the first length only.
        module: With its Relax function, and stand-ins for dot products.
        bindings: Of the function: variables and values.
        replaced: Position of a binding -> the float kernel that computes it.
        dropped: Positions of bindings that float kernels make superfluous.
        table: Kernel calls.
        function: The Relax function.
        nodes: What stays float.
    """

    program: Program | None
    module: tvm.IRModule
    bindings: list[tuple[Any, Any]]
    replaced: dict[int, Replacement]
    dropped: set[int]
    table: Sequence[KernelCall]
    function: Any
    nodes: list[NodeShapes]


def version_of(name: str, program: Program, profile: Profile, target: tvm.target.Target) -> Version:
    """Lower a program at its length as far as shapes tell; dot products keep their places only."""
    lowered = build_functions({name: program}, profile, _stand_in)
    prepare = [relax.transform.DecomposeOpsForInference(), relax.transform.CanonicalizeBindings()]
    with target:
        module = tvm.transform.Sequential(prepare)(lowered.ir_module)
    function = module[name]
    bindings = [(b.var, b.value) for block in function.body.blocks for b in block.bindings]
    position = {variable: k for k, (variable, _) in enumerate(bindings)}
    replaced, dropped = find_replacements(function, vector_unit(target))
    return Version(
        program,
        module,
        bindings,
        {position[v]: r for v, r in replaced.items()},
        {position[v] for v in dropped},
        lowered.kernel_tables[name],
        function,
        node_shapes(program),
    )


def _stand_in(step: Step, program: Program, _: Profile) -> Kernel:
    """Return a kernel with the shapes of a dot product's and nothing in it: no weight is packed for it."""
    (source,) = step.inputs
    orders = {n: dot_order(step, len(program.tensor(n).shape)) for n in (source, step.output)}

    def emit(_inputs: Any, _constants: Any, output: Any) -> None:
        index = [tirx.const(0, "int32")] * len(output.shape)
        output.store(index, tirx.const(0, output.buffer.dtype))

    return kernel("stand_in", program, orders, ((source,), step.output), (), emit)

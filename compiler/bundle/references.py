"""What the functions of an artifact must compute: their integer programs, and which kernel call is which step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from bitwright.compiler.bundle.bundle import LIBRARY_FOLDER, MODEL_FILE, STATIC_MODEL_FILE, Bundle
from bitwright.compiler.bundle.segments import KERNEL_TABLE_FILE, read_kernel_table
from bitwright.compiler.errors import InternalError
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.lower.kernel_table import KernelCall, Stored, load_table
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import Program
from bitwright.passes.normalize import specialize
from bitwright.targets.toolchain.shape_rules import MAIN


@dataclass(frozen=True)
class Reference:
    """What one function of the library computes.

    Attributes:
        program: Its integer program.
        table: Its kernel calls.
    """

    program: Program
    table: Sequence[KernelCall]


def references_of(bundle: Bundle) -> Callable[..., Reference]:
    """Return the look-up of a function's reference by its name, and by the elements of a dynamic one; read once."""

    @cache
    def reference(function: str, elements: int | None = None) -> Reference:
        lib = bundle.path / LIBRARY_FOLDER
        if function == MAIN:
            model = read_model(bundle.path / STATIC_MODEL_FILE).model
            return Reference(extract_program(model), read_kernel_table(lib))
        assert bundle.rules is not None
        rule = next(f for f in bundle.rules.functions if f.name == function)
        model = read_model(bundle.path / MODEL_FILE).model
        table = load_table((lib / rule.folder / KERNEL_TABLE_FILE).read_text())
        if not bundle.rules.is_dynamic(rule):
            specialize(model, bundle.rules.fixed | rule.sizes)
            return Reference(extract_program(model), table)
        assert bundle.rules.dynamic is not None and elements is not None
        specialize(model, bundle.rules.fixed | rule.sizes | {bundle.rules.dynamic: elements})
        program = extract_program(model)
        return Reference(program, [_of_shape(call, program) for call in table])

    return reference


def _of_shape(call: KernelCall, program: Program) -> KernelCall:
    """Return the call with the shapes that its tensors have in a program."""

    def resized(stored: Stored) -> Stored:
        if stored.tensor not in program.tensors:
            msg = f"the model for another size of the batch has no tensor '{stored.tensor}'"
            raise InternalError(msg, where="kernels.json")
        return replace(stored, shape=program.tensor(stored.tensor).shape)

    return replace(call, inputs=tuple(map(resized, call.inputs)), output=resized(call.output))

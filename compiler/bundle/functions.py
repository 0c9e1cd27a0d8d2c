"""The functions of a library for several shapes: what lies in ``lib`` for each of them.

``main`` has its interface and kernel table in ``lib`` itself, ``main_K`` in ``lib/main_K``; all are in one
``lib/model.so``, whose constants they share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bitwright.compiler.bundle.segments import KERNEL_TABLE_FILE
from bitwright.compiler.lower.kernel_table import KernelCall, activation_counts, dump_table
from bitwright.targets.backend import Execution
from bitwright.targets.toolchain.interface import ANY_SIZE, Interface, Port
from bitwright.targets.toolchain.shape_rules import MAIN, Dispatch, FunctionRule, PortRule, ShapeRules


def write_functions(lib: Path, rules: ShapeRules, tables: Mapping[str, Sequence[KernelCall]]) -> None:
    """Write ``shapes.json`` and the folder of every function but ``main``.

    Args:
        lib: The bundle's ``lib``.
        rules: The functions and their sizes.
        tables: Name of a further function -> its kernel calls.
    """
    rules.write(lib)
    for function in rules.functions:
        if function.name == MAIN:
            continue
        folder = lib / function.folder
        folder.mkdir()
        table = tables[function.name]
        interface_of(rules, function, activation_counts(table)).write(folder)
        (folder / KERNEL_TABLE_FILE).write_text(dump_table(table))


def interface_of(rules: ShapeRules, function: FunctionRule, roles: Mapping[str, int]) -> Interface:
    """Return the interface of one function."""
    inputs, outputs = (tuple(_ports(side, rules, function)) for side in (rules.inputs, rules.outputs))
    return Interface(inputs, outputs, roles, function.name)


def _ports(ports: Sequence[PortRule], rules: ShapeRules, function: FunctionRule) -> Iterator[Port]:
    sizes = function.sizes | ({rules.loop: 1} if rules.loop else {})
    if rules.dynamic is not None and rules.is_dynamic(function):
        sizes = sizes | {rules.dynamic: ANY_SIZE}
    for port in ports:
        yield Port(port.name, port.dtype, tuple(sizes[d] if isinstance(d, str) else d for d in port.dims))


def merged(rules: ShapeRules, dispatch: Dispatch, executions: Sequence[Execution]) -> Execution:
    """Return the calls of one set of inputs as one execution: traces joined, times added, outputs put together."""
    times = [execution.seconds for execution in executions if execution.seconds is not None]
    return Execution(
        outputs=rules.assemble(dispatch.sizes, [execution.outputs for execution in executions]),
        trace=[call for execution in executions for call in execution.trace],
        executed=executions[0].executed,
        seconds=sum(times) if len(times) == len(executions) else None,
        call_seconds=[call for execution in executions for call in execution.call_seconds],
    )

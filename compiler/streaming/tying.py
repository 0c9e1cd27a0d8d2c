"""A table that the first part looks up in and a later part multiplies by: it is stored once.

Table and head have one set of scales then, those of least error in the head's outputs. They depend on the head's
inputs, so the float model runs through all parts before the first one is rounded, as where a model is quantized at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.compiler import frontend
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.graph.model import constant_array, node_label
from bitwright.compiler.graph.operands import table_of, weight_array, weight_of
from bitwright.compiler.plan.model import WeightQuant
from bitwright.compiler.plan.weight_search import tied_head, with_scales_of
from bitwright.compiler.streaming.chain import Part
from bitwright.compiler.streaming.heap import give_back
from bitwright.compiler.streaming.held import Stream
from bitwright.compiler.streaming.part import plan_part
from bitwright.passes.block_tables import TiedTable

# Returns what a part begins with, its samples taken from a stream.
StateOf = Callable[[Part, Stream], Compilation]


def tied_tables(
    first: Compilation, parts: Sequence[Part], stream: Stream, state_of: StateOf
) -> tuple[TiedTable, ...]:
    """Return the tables of the first part that products of later parts read, with the scales that both will have.

    Args:
        first: The first part, planned.
        parts: All parts.
        stream: The float model's samples, at the beginning; used up.
        state_of: See :data:`StateOf`.
    """
    tables = list(_grouped_tables(first))
    heads = [part for part in parts[1:] if any(_may_read(part, table.array) for table in tables)]
    found: list[TiedTable] = []
    for part in parts[: parts.index(heads[-1]) + 1] if heads else ():
        state = state_of(part, stream)
        if part in heads:
            found.extend(_read_by(state, tables))
        else:
            frontend.normalize_model(state, [])
        assert state.normalized is not None
        stream.advance(part, state.normalized)
        give_back()
    stream.close()
    return tuple(found)


def with_tied_scales(c: Compilation) -> None:
    """Give the plan's entries of tied tables, and of products by them, their common scales."""
    assert c.plan is not None and c.model is not None
    weights = dict(c.plan.weights)
    for node in c.model.graph if c.tied else ():
        decision = c.plan.nodes.get(node_label(node))
        if decision is None or not decision.weight:
            continue
        weight, entry = weight_of(node), weights[decision.weight]
        table = constant_array(table_of(node)) if decision.role == "table" else None
        for tied in c.tied:
            if table is not None and tied.is_equal(table):
                weights[decision.weight] = replace(tied.quant, tensor=entry.tensor)
            elif weight is not None and _alike(entry, tied.quant) and tied.is_equal(weight_array(weight).T):
                weights[decision.weight] = with_scales_of(entry, tied.quant)
    c.plan = replace(c.plan, weights=weights)


def tied_as_plain(tied: Sequence[TiedTable]) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Return tables as JSON values and as arrays."""
    rows: list[dict[str, Any]] = []
    arrays: list[np.ndarray] = []
    for table in tied:
        quant = {f.name: getattr(table.quant, f.name) for f in fields(WeightQuant)}
        kept = {name: quant.pop(name) for name in ("scale", "zero_point")}
        places = {name: len(arrays) + k for k, name in enumerate(n for n, a in kept.items() if a is not None)}
        arrays.extend(a for a in kept.values() if a is not None)
        row = {"name": table.name, "shape": list(table.shape), "digest": table.digest.hex()}
        rows.append({**row, "quant": quant, "arrays": places})
    return rows, arrays


def tied_from_plain(rows: Sequence[Mapping[str, Any]], arrays: Sequence[np.ndarray]) -> tuple[TiedTable, ...]:
    """Return what :func:`tied_as_plain` was given."""
    found = []
    for row in rows:
        kept = {name: arrays[place] for name, place in row["arrays"].items()}
        quant = WeightQuant(**{**row["quant"], "menu": tuple(row["quant"]["menu"])}, **kept)
        shape = (int(row["shape"][0]), int(row["shape"][1]))
        found.append(TiedTable(row["name"], shape, bytes.fromhex(row["digest"]), quant))
    return tuple(found)


def _alike(product: WeightQuant, table: WeightQuant) -> bool:
    kinds = [(q.group, q.dtype, q.bits, q.codebook) for q in (product, table)]
    return product.axis == 0 and kinds[0] == kinds[1]


@dataclass(frozen=True, eq=False)
class _Table:
    name: str
    array: np.ndarray
    quant: WeightQuant


def _grouped_tables(c: Compilation) -> Iterator[_Table]:
    assert c.plan is not None and c.model is not None
    for node in c.model.graph:
        decision = c.plan.nodes.get(node_label(node))
        value = table_of(node)
        array = constant_array(value)
        if (
            decision is None
            or decision.role != "table"
            or not decision.weight
            or value is None
            or array is None
        ):
            continue
        quant = c.plan.weights[decision.weight]
        if quant.group and quant.axis == 1:
            yield _Table(value.name or "table", array, quant)


def _may_read(part: Part, table: np.ndarray) -> bool:
    """Tell whether a product of a part multiplies by a constant of a table's size, read through whatever."""
    products = (n for n in part.nodes if node_label(n) in part.products)
    constants = (_initializer(n.inputs[1]) for n in products)
    return any(c is not None and c.size == table.size for c in constants)


def _initializer(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return what a constant operand was made from."""
    while value is not None and (producer := value.producer()) is not None:
        value = producer.inputs[0] if producer.inputs else None
    return None if value is None else value.const_value


def _read_by(c: Compilation, tables: Sequence[_Table]) -> Iterator[TiedTable]:
    """Plan a part and yield the tables that it multiplies by, with the scales that it wants."""
    plan_part(c)
    assert c.plan is not None and c.model is not None
    for table in tables:
        head = tied_head(table.quant, table.array, c.plan, c.model)
        if head is not None:
            quant = table.quant if table.quant.codebook else with_scales_of(table.quant, head)
            yield TiedTable.of(table.name, table.array, quant)

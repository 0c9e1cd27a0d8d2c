"""Fix named dynamic dimensions to integers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import onnx_ir as ir

from bitwright.compiler.errors import UsageError, nearest
from bitwright.passes.contract import PassResult

FIXED_DIMS = "bitwright.fixed_dims"  # in-memory note on the model: what was fixed before is no unknown name
_POSITION = re.compile(r"(?P<input>.+):(?P<axis>\d+)")


@dataclass(frozen=True)
class FixDims:
    """Give dynamic dimensions of the graph inputs a size, everywhere they appear.

    Attributes:
        dims: Dimension name -> size, e.g. ``{"N": 1, "T": 64}``. A dimension without a name is addressed as
            ``"input:axis"``, e.g. ``"state:1"``.
    """

    dims: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    name: ClassVar[str] = "fix_dims"

    def run(self, model: ir.Model) -> PassResult:
        """Replace the dimensions; ``changed`` counts the values whose shape changed.

        Raises:
            UsageError: A name is no dynamic dimension of an input, or a size is not positive.
        """
        fixed: dict[str, int] = model.meta.setdefault(FIXED_DIMS, {})
        wanted = {key: size for key, size in self.dims.items() if fixed.get(key) != size}
        _check(model, wanted)
        changed = sum(_fix_axis(model, key, size) for key, size in wanted.items() if _POSITION.fullmatch(key))
        values = {v for g in model.graphs() for v in ir.convenience.create_value_mapping(g).values()}
        changed += sum(_substitute(value, wanted) for value in values)
        fixed.update(wanted)
        return PassResult(model, changed)


def dynamic_dims(model: ir.Model) -> tuple[str, ...]:
    """Return the dynamic dimensions of the inputs in order: their names, or ``input:axis`` where unnamed."""
    found = [
        dim.value if dim.value is not None else f"{value.name}:{axis}"
        for value in model.graph.inputs
        for axis, dim in enumerate(value.shape or ())
        if isinstance(dim, ir.SymbolicDim)
    ]
    return tuple(dict.fromkeys(found))


def _check(model: ir.Model, dims: Mapping[str, int]) -> None:
    known = dynamic_dims(model)
    for name, size in dims.items():
        where = f"dimension {name}={size}"
        if size < 1:
            msg = "a dimension must be at least 1"
            raise UsageError(msg, where=where, fix="give a positive integer")
        if name not in known:
            msg = f"'{name}' is no dynamic dimension of the model's inputs"
            raise UsageError(
                msg,
                where=where,
                fix=nearest(name, known) if known else "all input dimensions are fixed: leave it out",
            )


def _fix_axis(model: ir.Model, key: str, size: int) -> bool:
    """Fix an unnamed dimension given as ``input:axis``."""
    match = _POSITION.fullmatch(key)
    assert match is not None, "only called for positions"
    for value in model.graph.inputs:
        axis = int(match["axis"])
        if value.name == match["input"] and value.shape is not None and axis < len(value.shape):
            dims = list(value.shape)
            dim = dims[axis]
            if not isinstance(dim, int) and dim.value is None:
                dims[axis] = size
                value.shape = ir.Shape(dims)
                return True
    return False


def _substitute(value: ir.Value, dims: Mapping[str, int]) -> bool:
    if value.shape is None:
        return False
    old = list(value.shape)
    new: list[int | ir.SymbolicDim] = [_sized(dim, dims) for dim in old]
    if new == old:
        return False
    value.shape = ir.Shape(new)
    return True


def _sized(dim: int | ir.SymbolicDim, dims: Mapping[str, int]) -> int | ir.SymbolicDim:
    return dim if isinstance(dim, int) or dim.value is None else dims.get(dim.value, dim)

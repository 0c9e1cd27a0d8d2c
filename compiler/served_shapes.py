"""Which functions the library of an artifact for several shapes gets: from the options and the model to the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import onnx_ir as ir

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import UsageError, nearest
from bitwright.compiler.shape_choice import is_batch, static_shapes
from bitwright.targets.toolchain.shape_rules import MAIN, FunctionRule, PortRule, ShapeRules

MOST_FUNCTIONS = 64


def shape_rules(c: Compilation) -> ShapeRules:
    """Return the functions that the options ask for, and what inputs and outputs they have.

    Raises:
        UsageError: The options contradict each other or the model; an input lacks its padding.
    """
    assert c.model is not None
    buckets, loop = {n: tuple(s) for n, s in c.options.buckets.items()}, c.options.loop
    dynamic = c.options.dynamic
    if dynamic is not None:
        buckets.setdefault(dynamic, (c.dims[dynamic],))
        _check_largest(c, dynamic, buckets[dynamic])
    combinations = [dict(zip(buckets, sizes, strict=True)) for sizes in product(*buckets.values())]
    if len(combinations) > MOST_FUNCTIONS:
        msg = f"the buckets make {len(combinations)} functions, at most {MOST_FUNCTIONS} are compiled"
        raise UsageError(msg, where="--bucket", fix="name fewer sizes")
    main = {name: c.dims[name] for name in buckets}
    others = [sizes for sizes in combinations if sizes != main]
    if dynamic is not None:
        others += [_without(s, dynamic) for s in combinations if s[dynamic] == buckets[dynamic][0]]
    functions = [FunctionRule(name=MAIN, sizes=main)]
    functions += [FunctionRule(name=f"{MAIN}_{k}", sizes=sizes) for k, sizes in enumerate(others, 1)]
    free = [*buckets, *([loop] if loop else [])]
    inputs = tuple(_input_rule(c, value, free) for value in c.model.graph.inputs)
    outputs = _output_rules(c, free)
    if dynamic is not None and is_batch(c.model, dynamic):
        _check_outermost(dynamic, outputs)
    elif dynamic is not None and set(buckets) != {dynamic}:
        other = next(name for name in buckets if name != dynamic)
        msg = f"'{dynamic}' is a length, and '{other}' is to have several sizes, too"
        raise UsageError(msg, where="--bucket", fix=f"fix '{other}' with --dim, or bucket both")
    _check_pads(c, inputs)
    return ShapeRules(
        buckets=buckets,
        loop=loop,
        dynamic=dynamic,
        longest=c.options.longest,
        fixed={name: size for name, size in c.dims.items() if name not in buckets},
        inputs=inputs,
        outputs=outputs,
        functions=tuple(functions),
        cache=c.cache,
    )


def _check_largest(c: Compilation, dim: str, exact: Sequence[int]) -> None:
    """Refuse a largest size that leaves the function for any size nothing to serve."""
    largest, most = c.options.longest, max(exact)
    if largest is None:
        return
    if most > largest:
        whose = "the bucket" if dim in c.options.buckets else "the samples' most frequent size"
        msg = f"{whose} {dim}={most} is larger than {largest}, the largest that is to be served"
        raise UsageError(msg, where="--dynamic", fix=f"name --dynamic {dim}={most}, or more")
    if len(set(exact)) == largest:
        msg = f"no '{dim}' up to {largest} is left to serve: each has a function of its own"
        raise UsageError(
            msg, where="--dynamic", fix=f"name a larger size, e.g. --dynamic {dim}={2 * largest}"
        )


def _without(sizes: Mapping[str, int], name: str) -> dict[str, int]:
    return {dim: size for dim, size in sizes.items() if dim != name}


def _check_outermost(dim: str, ports: Sequence[PortRule]) -> None:
    """Refuse inputs and outputs whose elements do not lie one behind the other."""
    for port in ports:
        if dim in port.dims and (port.dims[0] != dim or port.dims.count(dim) > 1):
            shape = ", ".join(map(str, port.dims))
            msg = f"'{dim}' is not the outermost dimension of '{port.name}' [{shape}]"
            fix = "only a batch can be dynamic: name sizes with --bucket, or transpose the model's inputs and outputs"
            raise UsageError(msg, where="--dynamic", fix=fix)


def _padded_dims(c: Compilation) -> set[str]:
    return set(c.options.buckets) - {c.options.dynamic}


def _input_rule(c: Compilation, value: ir.Value, free: Sequence[str]) -> PortRule:
    name = value.name or ""
    assert value.dtype is not None and value.shape is not None
    dims: list[int | str] = []
    for axis, dim in enumerate(value.shape):
        label = (dim.value or f"{name}:{axis}") if isinstance(dim, ir.SymbolicDim) else dim
        dims.append(label if label in free else c.dims[label] if isinstance(label, str) else label)
    pad = c.options.pad.get(name) if set(dims) & _padded_dims(c) else None
    return PortRule(name=name, dtype=value.dtype.numpy().name, dims=tuple(dims), pad=pad)


def _check_pads(c: Compilation, inputs: Sequence[PortRule]) -> None:
    bucketed = [p for p in inputs if set(p.dims) & _padded_dims(c)]
    for name in c.options.pad:
        if name not in [p.name for p in bucketed]:
            msg = f"no input '{name}' has a bucketed dimension"
            raise UsageError(msg, where="--pad", fix=nearest(name, [p.name for p in bucketed]))
    for port in bucketed:
        if port.pad is None:
            msg = f"nothing says what fills input '{port.name}' up to a bucket's size"
            fix = f"e.g. --pad {port.name}=0 (a mask: the value that hides a position)"
            raise UsageError(msg, where="--pad", fix=fix)
        if float(np.asarray(port.pad).astype(port.dtype)) != port.pad:
            msg = f"{port.pad:g} is no value of type {port.dtype}"
            raise UsageError(msg, where=f"--pad {port.name}", fix="choose a value of the input's type")


def _output_rules(c: Compilation, free: Sequence[str]) -> tuple[PortRule, ...]:
    """Return the outputs; which axes follow which dimension is seen by changing one dimension after the other."""
    assert c.model is not None
    names = [value.name or "" for value in c.model.graph.outputs]
    dims: dict[str, list[int | str]] = {name: list(c.shapes[name]) for name in names}
    for dim in free:
        other = _another_size(c, dim)
        shapes = static_shapes(c.model, c.dims | {dim: other})
        for name in names:
            for axis, (old, new) in enumerate(zip(c.shapes[name], shapes[name], strict=True)):
                if old == new:
                    continue
                if (old, new) != (c.dims[dim], other):
                    msg = f"axis {axis} of output '{name}' is {old} for {dim}={c.dims[dim]} and {new} for {other}"
                    fix = "only axes that have the dimension's own size can be cut back: use --dim for it"
                    raise UsageError(
                        msg, where="--dynamic" if dim == c.options.dynamic else "--bucket", fix=fix
                    )
                dims[name][axis] = dim
        elements = dim == c.options.loop or (dim == c.options.dynamic and is_batch(c.model, dim))
        if elements and any(dim not in dims[name] for name in names):
            lacking = next(name for name in names if dim not in dims[name])
            msg = (
                f"output '{lacking}' has no dimension '{dim}', so results of single elements cannot be joined"
            )
            raise UsageError(msg, where=option_of(c), fix="compile for a fixed size with --dim")
    return tuple(
        PortRule(name=value.name or "", dtype=_dtype(value), dims=tuple(dims[value.name or ""]))
        for value in c.model.graph.outputs
    )


def _another_size(c: Compilation, dim: str) -> int:
    others = [size for size in c.options.buckets.get(dim, ()) if size != c.dims[dim]]
    if others:
        return others[0]
    joined = dim in (c.options.loop, c.options.dynamic) and c.dims[dim] != c.options.longest
    return c.dims[dim] + 1 if joined else max(1, c.dims[dim] - 1)


def _dtype(value: ir.Value) -> str:
    assert value.dtype is not None
    return value.dtype.numpy().name


def option_of(c: Compilation) -> str:
    """Return the option that asks for single elements or for any number of them."""
    return "--dynamic" if c.options.dynamic is not None else "--loop"

"""Sums, products, functions of one tensor, pooling, Softmax and concatenation."""

from __future__ import annotations

from bitwright.compiler.program.ops import QAdd, QConcat, QLut, QMul, QPool
from bitwright.targets.ethos_u.averages import as_products, rescaled_behind
from bitwright.targets.ethos_u.functions import LookUp
from bitwright.targets.ethos_u.integer_steps import QSoftmax
from bitwright.targets.ethos_u.translate_dot import average, emit_clipped, geometry
from bitwright.targets.ethos_u.translator import CHANNELS_LAST, Translator, UnsupportedStepError

ELEMENTWISE_RANK = 4


def elementwise(t: Translator, step: QAdd | QMul) -> None:
    """Emit ADD or MUL; the operand that lies first decides the order of axes."""
    rank = len(t.shape(step.output))
    if rank > ELEMENTWISE_RANK:
        msg = f"its result has {rank} dimensions"
        raise UnsupportedStepError(msg)
    order = _common_order(t, step.inputs, rank)
    operands = tuple(_operand(t, name, rank, order) for name in step.inputs)
    kind, version = ("AddOptions", 2) if isinstance(step, QAdd) else ("MulOptions", 2)
    target = t.result(step.output, order)
    operator = "ADD" if isinstance(step, QAdd) else "MUL"
    emit_clipped(t, operator, operands, (step.output, target), (step.lower, step.upper), (kind, {}), version)


def _common_order(t: Translator, names: tuple[str, ...], rank: int) -> tuple[int, ...]:
    """Return the order that the first operand of full rank lies in."""
    placed = [t.stored[n] for n in names if n in t.stored and t.stored[n].view == t.shape(n)]
    full = [s.order for s in placed if len(s.view) == rank]
    return full[0] if full else tuple(range(rank))


def _operand(t: Translator, name: str, rank: int, order: tuple[int, ...]) -> str:
    """Return an operand in ``order``, with leading ones where it has fewer axes."""
    shape = t.shape(name)
    if len(shape) == rank:
        return t.read(name, order)
    missing = rank - len(shape)
    wide = (*[1] * missing, *shape)
    source = t.reshape(t.read(name), wide, t.quant(name), name)
    moved = [axis for axis in order if wide[axis] != 1]
    if moved == sorted(moved):
        stored = tuple(wide[axis] for axis in order)
        return source if stored == wide else t.reshape(source, stored, t.quant(name), name)
    return t.transpose(source, order, t.quant(name), name)


def concatenation(t: Translator, step: QConcat) -> None:
    """Emit CONCATENATION."""
    order = _common_order(t, step.inputs, len(t.shape(step.output)))
    sources = tuple(t.read(name, order) for name in step.inputs)
    options = {"axis": order.index(step.axis), "fusedActivationFunction": 0}
    t.emit("CONCATENATION", sources, t.result(step.output, order), "ConcatenationOptions", options, 2)


def pooling(t: Translator, step: QPool) -> None:
    """Emit MAX_POOL_2D or AVERAGE_POOL_2D.

    Raises:
        UnsupportedStepError: A maximum changes the scale, windows are dilated, or the padding has no form.
    """
    quants = t.quant(step.inputs[0]), t.quant(step.output)
    if step.kind == "max" and quants[0] != quants[1]:
        msg = "a maximum cannot change the scale"
        raise UnsupportedStepError(msg)
    if as_products(step, *quants):
        average(t, step)
        return
    if step.dilations != (1, 1):
        msg = "dilated pooling has no operator"
        raise UnsupportedStepError(msg)
    quant, counts_padding = t.quant(step.inputs[0]), step.kind == "average" and step.count_include_pad
    # The smallest integer is the maximum of nothing else.
    harmless = counts_padding or (step.kind == "max" and quant.zero_point == quant.bounds[0])
    fill = quant.zero_point if harmless else None
    found = geometry(t, step, step.kernel, fill=fill, same=not counts_padding)
    options = {
        "padding": found.padding,
        "strideH": found.strides[0],
        "strideW": found.strides[1],
        "filterHeight": step.kernel[0],
        "filterWidth": step.kernel[1],
        "fusedActivationFunction": 0,
    }
    operator = "MAX_POOL_2D" if step.kind == "max" else "AVERAGE_POOL_2D"
    target = t.result(step.output, CHANNELS_LAST)
    if rescaled_behind(step, *quants):
        averaged = t.add(t.fresh(f"{step.output}_average"), t.tensors[target].shape, quants[0])
        t.emit(operator, (found.source,), averaged, "Pool2DOptions", options, 2)
        t.emit("QUANTIZE", (averaged,), target, version=2)
        return
    t.emit(operator, (found.source,), target, "Pool2DOptions", options, 2)


def softmax(t: Translator, step: QSoftmax) -> None:
    """Emit SOFTMAX along the last axis."""
    quant = t.quant(step.output)
    if quant.scale != 1 / 256 or quant.zero_point != quant.bounds[0]:
        msg = "a Softmax writes steps of 1/256 from -128 on, nothing else"
        raise UnsupportedStepError(msg)
    source = t.read(step.inputs[0])
    t.emit("SOFTMAX", (source,), t.result(step.output), "SoftmaxOptions", {"beta": 1.0}, 2)


def function(t: Translator, step: QLut, found: LookUp) -> None:
    """Emit the operator of a function of one tensor."""
    source = t.where(step.inputs[0])
    target = t.result(step.output, source.order, source.view)
    t.emit(found.operator, (source.tensor,), target, found.options_type, found.options, found.version)

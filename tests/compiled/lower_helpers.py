"""A plain dot-product kernel, a backend around it, and a traced run: what the tests of the lowering share."""

from __future__ import annotations

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine
from tvm.tirx.script import builder as tir

from bitwright.compiler.lower.kernels.loops import as_int32, clamp_cast, fma, for_each, kernel
from bitwright.compiler.lower.layout import dot_order
from bitwright.compiler.program.ops import QConv


def host_target():
    """The machine the tests run on: fma must be an instruction there, not a call."""
    return {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}


def plain_dot_kernel(step, program, _profile=None):
    """Return a QGemm or QConv kernel of plain loops, following the formulas in compiler/program/ops.py."""
    x, y = program.tensor(step.inputs[0]), program.tensor(step.output)
    outputs = step.weight_scale.size
    bias = np.zeros(outputs, np.int32) if step.bias is None else step.bias
    m = np.float32(x.quant.scale) * step.weight_scale
    if y.quant:
        m = m / np.float32(y.quant.scale)
    float_bias = np.zeros(outputs, np.float32) if step.float_bias is None else step.float_bias
    conv = isinstance(step, QConv)

    def emit(inputs, constants, output):
        (source,), (w, b, scale, extra) = inputs, constants
        axis = 1 if conv else len(y.shape) - 1

        def one(index):
            total = tir.alloc_buffer((1,), "int32")
            o = index[axis]
            tir.buffer_store(total, b[o], [0])
            _accumulate(step, x, source, w, index, total)
            real = tir.cast(total[0], "float32")
            if y.quant:
                value = tir.nearbyint(real * scale[o]) + tir.float32(y.quant.zero_point)
                value = clamp_cast(value, tir.float32(step.lower), tir.float32(step.upper), y.dtype)
            else:
                value = fma(real, scale[o], extra[o])
                value = tir.max(value, tir.float32(0)) if step.relu else value
            output.store(index, value)

        for_each(output.shape, output.order, 1, one, vectors=False)

    orders = {
        name: dot_order(step, len(program.tensor(name).shape)) for name in (step.inputs[0], step.output)
    }
    constants = (step.weight, bias, m.astype(np.float32), float_bias)
    return kernel(f"plain_{step.name}", program, orders, (step.inputs, step.output), constants, emit)


def _accumulate(step, x, source, w, index, total):
    def add(value, weight):
        product = (as_int32(value) - x.quant.zero_point) * as_int32(weight)
        tir.buffer_store(total, total[0] + product, [0])

    if not isinstance(step, QConv):
        with tir.serial(x.shape[-1]) as k:
            add(source.at([*index[:-1], k]), w[k, index[-1]])
        return
    n, o, oh, ow = index
    per_group = step.weight_scale.size // step.group
    _, channels, kh_, kw_ = step.weight.shape
    with tir.serial(kh_) as kh, tir.serial(kw_) as kw, tir.serial(channels) as c:
        ih = oh * step.strides[0] + kh * step.dilations[0] - step.pads[0]
        iw = ow * step.strides[1] + kw * step.dilations[1] - step.pads[1]
        inside = tir.And(tir.And(ih >= 0, ih < x.shape[2]), tir.And(iw >= 0, iw < x.shape[3]))
        with tir.If(inside), tir.Then():
            add(source.at([n, o // per_group * channels + c, ih, iw]), w[o, c, kh, kw])


class PlainBackend:
    """Enough of a backend for the worker."""

    family = "x86_cpu"

    def dot_kernel(self, step, program, profile, choice=None):
        return plain_dot_kernel(step, program, profile)

    def tvm_target(self, _profile):
        return host_target()


def run(executable, feeds):
    """Run ``main``; returns its outputs and every kernel call as (name, arguments)."""
    vm, trace = VirtualMachine(executable, tvm.cpu()), []

    def record(_function, name, before, _result, *arguments):
        if not before and name.startswith("bw_"):
            trace.append((name, [a.numpy().copy() for a in arguments]))

    vm.set_instrument(record)
    found = vm["main"](*[tvm.runtime.tensor(a) for a in feeds])
    outputs = [o.numpy() for o in ([found] if hasattr(found, "numpy") else found)]
    return outputs, trace

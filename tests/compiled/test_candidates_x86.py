"""Layers of well-known small networks by members of their spaces, as the tuner runs them: all equal the formulas."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tvm
from dot_reference import Case, channels_last, expected, make
from test_dot_kernels_x86 import MCPU
from test_dot_properties_x86 import usable

from bitwright.targets.x86_cpu.kernels import candidates_for, kernel_for

AVAILABLE = ("amx_int8", "avx512_vnni")
# Of every layer; BITWRIGHT_EVERY_CANDIDATE=1 takes all of them, which are thousands.
SAMPLED, TOGETHER = 3, 16


def conv(size: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> Case:
    """Return a convolution padded as TensorFlow pads "same": unevenly where the stride is 2."""
    before, after = ((kernel - 1) // 2, kernel // 2) if stride == 1 else (0, max(kernel - stride, 0))
    label = f"conv{kernel}x{kernel}s{stride} {size}x{size} {inputs} to {outputs}"
    pads = (before, before, after, after)
    return Case(
        label, (1, inputs, size, size), (outputs, inputs, kernel, kernel), strides=(stride, stride), pads=pads
    )


def depthwise(size: int, channels: int, stride: int = 1) -> Case:
    """Return a 3x3 depthwise convolution."""
    like = conv(size, channels, channels, 3, stride)
    label = f"depthwise s{stride} {size}x{size} {channels}"
    return Case(
        label, like.x, (channels, 1, 3, 3), strides=like.strides, pads=like.pads, group=channels, relu=True
    )


def gemm(rows: int, inputs: int, outputs: int, y_dtype: str = "uint8") -> Case:
    return Case(
        f"gemm {rows}x{inputs}x{outputs} {y_dtype}", (rows, inputs), (inputs, outputs), y_dtype=y_dtype
    )


RESNET8 = [
    *(conv(32, 3, 16), conv(32, 16, 16), conv(32, 16, 32, 3, 2), conv(16, 32, 32), conv(32, 16, 32, 1, 2)),
    *(conv(16, 32, 64, 3, 2), conv(8, 64, 64), conv(16, 32, 64, 1, 2), gemm(1, 64, 10, "int8")),
]
KWS = [
    Case("conv10x4 49x10 1 to 64", (1, 1, 49, 10), (64, 1, 10, 4), strides=(2, 2), pads=(4, 1, 5, 1)),
    Case("depthwise 25x5 64", (1, 64, 25, 5), (64, 1, 3, 3), pads=(1, 1, 1, 1), group=64, relu=True),
    Case("conv1x1 25x5 64", (1, 64, 25, 5), (64, 64, 1, 1), x_dtype="int8", y_dtype="int8"),
    gemm(1, 64, 12, "float32"),
]
VWW = [
    conv(96, 3, 8, 3, 2),
    *(depthwise(48, 8), depthwise(48, 16, 2), depthwise(24, 32), depthwise(24, 32, 2), depthwise(12, 64)),
    *(depthwise(12, 64, 2), depthwise(6, 128), depthwise(6, 128, 2), depthwise(3, 256)),
    *(conv(48, 8, 16, 1), conv(24, 16, 32, 1), conv(24, 32, 32, 1), conv(12, 32, 64, 1), conv(12, 64, 64, 1)),
    *(conv(6, 64, 128, 1), conv(6, 128, 128, 1), conv(3, 128, 256, 1), conv(3, 256, 256, 1), gemm(1, 256, 2)),
]
ENCODER = [gemm(32, 384, 384, "float32"), gemm(32, 384, 1536, "float32"), gemm(32, 1536, 384, "float32")]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*RESNET8, *KWS, *VWW, *ENCODER], ids=lambda c: c.label)
def test_members_equal_the_formulas(case: Case) -> None:
    if not all(usable(name) for name in AVAILABLE):
        pytest.skip(f"this machine lacks one of {', '.join(AVAILABLE)}")
    step, program, x = make(case)
    found = list(candidates_for(step, program, AVAILABLE))
    if os.environ.get("BITWRIGHT_EVERY_CANDIDATE") != "1":
        rng = np.random.default_rng(len(case.label))
        found = [found[i] for i in sorted({0, *rng.integers(len(found), size=SAMPLED).tolist()})]
    data, want = tvm.runtime.tensor(channels_last(x, case)), channels_last(expected(step, program, x), case)
    target = tvm.target.Target({"kind": "llvm", "mcpu": MCPU["amx_int8"]})
    for first in range(0, len(found), TOGETHER):
        kernels = {
            f"f{i}": kernel_for(step, program, AVAILABLE, c) for i, c in enumerate(found[first:][:TOGETHER])
        }
        functions = {name: k.function.with_attr("global_symbol", name) for name, k in kernels.items()}
        module = tvm.compile(tvm.IRModule(functions), target=target)
        for (name, kernel), choice in zip(kernels.items(), found[first:], strict=False):
            y = tvm.runtime.tensor(np.full(kernel.output_shape, 77, kernel.output_dtype))
            module[name](data, *(tvm.runtime.tensor(a) for a in kernel.constants), y)
            np.testing.assert_array_equal(y.numpy(), want, err_msg=f"{case.label} by {choice.label()}")

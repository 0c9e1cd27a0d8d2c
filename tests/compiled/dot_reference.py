"""Dot-product steps for tests, and their outputs computed from the formulas of the integer program."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bitwright.compiler.program.ops import Dot, Program, QConv, QGemm, QuantParams, Tensor


@dataclass(frozen=True)
class Case:
    """A random step: logical input shape, weight shape (Gemm [K, N] or Conv [O, I/g, KH, KW]) and options."""

    label: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    group: int = 1
    x_dtype: str = "uint8"
    y_dtype: str = "uint8"
    bias: bool = True
    relu: bool = False
    extreme: bool = False
    seed: int = 0

    def output_shape(self) -> tuple[int, ...]:
        if len(self.w) == 2:
            return (*self.x[:-1], self.w[1])
        (n, _, h, w), (o, _, kh, kw) = self.x, self.w
        top, left, bottom, right = self.pads
        oh = (h + top + bottom - (kh - 1) * self.dilations[0] - 1) // self.strides[0] + 1
        ow = (w + left + right - (kw - 1) * self.dilations[1] - 1) // self.strides[1] + 1
        return (n, o, oh, ow)


def quant(dtype, scale, zero_point):
    return QuantParams(dtype, float(np.float32(scale)), zero_point)


def make(case: Case) -> tuple[Dot, Program, np.ndarray]:
    """Return the step, a program that holds it, and a logical input."""
    rng = np.random.default_rng(case.seed)
    info = np.iinfo(case.x_dtype)
    outputs = case.w[1] if len(case.w) == 2 else case.w[0]
    reduction = case.w[0] if len(case.w) == 2 else int(np.prod(case.w[1:]))
    x = rng.integers(info.min, info.max + 1, case.x).astype(case.x_dtype)
    w = rng.integers(-128, 128, case.w).astype(np.int8)
    if case.extreme:  # the largest products, which saturate 16-bit sums
        x, w = np.full(case.x, info.max, case.x_dtype), np.full(case.w, 127, np.int8)
        w[..., 1::2] = -128
    xq = quant(case.x_dtype, 0.0173, int(rng.integers(info.min, info.max + 1)))
    weight_scale = rng.uniform(0.001, 0.02, outputs).astype(np.float32)
    yq = None
    if case.y_dtype != "float32":
        out = np.iinfo(case.y_dtype)
        spread = 0.0173 * 0.01 * 75 * 75 * np.sqrt(reduction) / 40
        yq = quant(case.y_dtype, spread, int(rng.integers(out.min // 2, out.max // 2)))
    lower, upper = yq.bounds if yq else (0, 255)
    if yq and case.relu:
        lower, upper = yq.zero_point, upper - 3
    bias = rng.integers(-9000, 9000, outputs).astype(np.int32) if case.bias else None
    float_bias = rng.normal(0, 3, outputs).astype(np.float32) if case.bias and not yq else None
    step: Dot = QGemm(
        name=case.label,
        inputs=("x",),
        outputs=("y",),
        weight=w,
        weight_scale=weight_scale,
        bias=bias,
        float_bias=float_bias,
        lower=lower,
        upper=upper,
        relu=case.relu,
    )
    if len(case.w) == 4:
        window = {
            "strides": case.strides,
            "pads": case.pads,
            "dilations": case.dilations,
            "group": case.group,
        }
        step = QConv(**vars(step), **window)
    tensors = {
        "x": Tensor("x", case.x, case.x_dtype, xq),
        "y": Tensor("y", case.output_shape(), case.y_dtype, yq),
    }
    return step, Program(("x",), ("y",), (step,), tensors), x


def accumulate(step: Dot, x: np.ndarray, zero_point: int) -> np.ndarray:
    """Return sum_k (x[k] - zx) * w[o, k] in int64, channels first for convolutions."""
    centred = x.astype(np.int64) - zero_point
    w = step.weight.astype(np.int64)
    if isinstance(step, QGemm):
        return centred @ w
    assert isinstance(step, QConv)
    top, left, bottom, right = step.pads
    padded = np.pad(centred, ((0, 0), (0, 0), (top, bottom), (left, right)))
    o, per_group, kh, kw = w.shape
    (sh, sw), (dh, dw) = step.strides, step.dilations
    oh = (padded.shape[2] - (kh - 1) * dh - 1) // sh + 1
    ow = (padded.shape[3] - (kw - 1) * dw - 1) // sw + 1
    total = np.zeros((x.shape[0], o, oh, ow), np.int64)
    per_out = o // step.group
    for g in range(step.group):
        ins = slice(g * per_group, (g + 1) * per_group)
        outs = slice(g * per_out, (g + 1) * per_out)
        for i in range(kh):
            for j in range(kw):
                window = padded[:, ins, i * dh :, j * dw :][
                    :, :, : (oh - 1) * sh + 1 : sh, : (ow - 1) * sw + 1 : sw
                ]
                total[:, outs] += np.einsum("nchw,oc->nohw", window, w[outs, :, i, j])
    return total


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Fused multiply-add of float32 arrays, rounded once.

    The product is exact in float64; the sum is rounded there to odd, so that float32 cannot round twice.
    """
    p, c = a.astype(np.float64) * b.astype(np.float64), np.broadcast_to(c, a.shape).astype(np.float64)
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    even = s.view(np.int64) % 2 == 0
    toward = np.nextafter(s, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, toward, s).astype(np.float32)


def expected(step: Dot, program: Program, x: np.ndarray) -> np.ndarray:
    """Return the logical output of the step, formula by formula."""
    xq, yq = program.tensor("x").quant, program.tensor("y").quant
    assert xq is not None
    acc = accumulate(step, x, xq.zero_point)
    channels = (-1,) if acc.ndim != 4 or isinstance(step, QGemm) else (-1, 1, 1)
    if step.bias is not None:
        acc = acc + step.bias.reshape(channels)
    assert np.abs(acc).max(initial=0) < 2**31
    m = np.float32(xq.scale) * step.weight_scale
    if yq is None:
        bias = np.zeros(1, np.float32) if step.float_bias is None else step.float_bias.reshape(channels)
        y = fma(acc.astype(np.float32), np.broadcast_to(m.reshape(channels), acc.shape), bias)
        return np.maximum(y, np.float32(0)) if step.relu else y
    m = (m / np.float32(yq.scale)).reshape(channels)
    rounded = np.rint(acc.astype(np.float32) * m) + yq.zero_point
    return np.clip(rounded, step.lower, step.upper).astype(yq.dtype)


def channels_last(array: np.ndarray, case: Case) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if len(case.w) == 4 else array


CASES = (
    Case("gemm", (32, 64), (64, 48)),
    Case("gemm_one_row", (1, 640), (640, 128), y_dtype="int8", relu=True),
    Case("gemm_narrow", (5, 9), (9, 12), x_dtype="int8"),
    Case("gemm_k10", (33, 10), (10, 33), x_dtype="int8", y_dtype="int8"),
    Case("gemm_3d", (3, 17, 130), (130, 70), bias=False),
    Case("gemm_float", (19, 100), (100, 37), y_dtype="float32", relu=True),
    Case("gemm_float_s8", (2, 4, 64), (64, 16), x_dtype="int8", y_dtype="float32", bias=False),
    Case("gemm_extreme", (7, 512), (512, 40), extreme=True),
    Case("gemm_parallel", (130, 256), (256, 80), y_dtype="float32"),
    Case("conv1x1", (2, 24, 5, 7), (40, 24, 1, 1)),
    Case("conv1x1_s2", (2, 64, 9, 9), (32, 64, 1, 1), strides=(2, 2), x_dtype="int8"),
    Case("conv3x3", (1, 32, 14, 14), (64, 32, 3, 3), pads=(1, 1, 1, 1), relu=True),
    Case("conv3x3_batch", (3, 16, 20, 19), (24, 16, 3, 3), pads=(1, 1, 1, 1), y_dtype="int8"),
    Case("conv_rgb_s2", (1, 3, 23, 21), (20, 3, 7, 7), strides=(2, 2), pads=(3, 3, 3, 3)),
    Case(
        "conv_10x4",
        (2, 1, 49, 10),
        (64, 1, 10, 4),
        strides=(2, 2),
        pads=(4, 1, 5, 1),
        x_dtype="int8",
        y_dtype="int8",
    ),
    Case("conv_dilated", (1, 12, 15, 13), (18, 12, 3, 3), pads=(2, 2, 2, 2), dilations=(2, 2)),
    Case("conv_no_pad", (2, 64, 8, 21), (36, 64, 3, 3)),
    Case("conv_cropped", (1, 8, 12, 12), (16, 8, 3, 2), strides=(3, 4), pads=(0, 1, 0, 0)),
    Case("conv_groups", (2, 24, 9, 8), (18, 8, 3, 3), pads=(1, 0, 0, 1), group=3, x_dtype="int8"),
    Case("conv_multiplier", (1, 6, 9, 8), (12, 1, 3, 3), pads=(1, 1, 1, 1), group=6),
    Case("conv_float", (1, 20, 7, 7), (33, 20, 3, 3), pads=(1, 1, 1, 1), y_dtype="float32", relu=True),
    Case("conv_large", (1, 64, 30, 30), (64, 64, 3, 3), pads=(1, 1, 1, 1)),
    Case("depthwise_s1", (2, 72, 9, 11), (72, 1, 3, 3), pads=(1, 1, 1, 1), group=72, relu=True),
    Case(
        "depthwise_s2",
        (1, 40, 10, 11),
        (40, 1, 3, 3),
        strides=(2, 2),
        pads=(0, 0, 1, 1),
        group=40,
        x_dtype="int8",
        y_dtype="int8",
    ),
    Case("depthwise_7x7", (1, 11, 12, 12), (11, 1, 7, 7), pads=(3, 3, 3, 3), group=11, y_dtype="float32"),
    Case("depthwise_dilated", (1, 16, 12, 12), (16, 1, 3, 3), dilations=(2, 3), group=16, extreme=True),
)


def random_case(rng: np.random.Generator, number: int) -> Case:
    """Draw a shape; the label says what was drawn, so that a failure can be repeated."""
    types = {
        "x_dtype": str(rng.choice(["uint8", "int8"])),
        "y_dtype": str(rng.choice(["uint8", "int8", "float32"])),
        "bias": bool(rng.integers(2)),
        "relu": bool(rng.integers(2)),
        "seed": number,
    }
    if rng.integers(3) == 0:
        m, k, n = (int(v) for v in rng.integers(1, 150, 3))
        return Case(f"random_{number}_gemm_{m}x{k}x{n}", (m, k), (k, n), **types)
    group = int(rng.choice([1, 1, 2, 5]))
    kh, kw, sh, sw, dh, dw = (int(v) for v in rng.integers(1, [5, 5, 4, 4, 3, 3]))
    pads = tuple(int(v) for v in rng.integers(0, 3, 4))
    n, h, w = (int(v) for v in rng.integers([1, 9, 9], [4, 20, 40]))
    per_in, per_out = (int(v) for v in rng.integers(1, 40, 2))
    case = Case("", (n, group * per_in, h, w), (group * per_out, per_in, kh, kw), group=group, **types)
    case = replace(case, strides=(sh, sw), pads=pads, dilations=(dh, dw))
    return replace(case, label=f"random_{number}_{case.x}_{case.w}".replace(" ", ""))


def random_depthwise(rng: np.random.Generator, number: int) -> Case:
    """Draw a depthwise convolution: channels around vector widths, every stride, dilation and one-sided padding."""
    channels = int(rng.choice([1, 2, 3, 8, 15, 16, 17, 24, 31, 32, 40, 64, 72, 96, 128, 130, 192])) + 1
    channels -= int(rng.integers(2))
    kh, kw, sh, sw, dh, dw = (int(v) for v in rng.integers(1, [7, 7, 4, 4, 3, 3]))
    n, h, w = (int(v) for v in rng.integers([1, 11, 11], [3, 18, 30]))
    pads = tuple(int(v) for v in rng.integers(0, 4, 4))
    types = {"x_dtype": str(rng.choice(["uint8", "int8"])), "seed": number}
    types |= {"y_dtype": str(rng.choice(["uint8", "int8", "float32"])), "relu": bool(rng.integers(2))}
    group = max(channels, 2)
    case = Case("", (n, group, h, w), (group, 1, kh, kw), (sh, sw), pads, (dh, dw), group, **types)
    return replace(case, label=f"depthwise_{number}_{case.x}_{case.w}".replace(" ", ""))

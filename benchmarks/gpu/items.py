"""The kernels of a kit: products to be measured, and every distinct integer kernel of the models."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitwright.compiler.interpret.dot import conv, gemm
from bitwright.compiler.interpret.weight_only import weight_only_dot
from bitwright.compiler.lower.templates.choice import as_choice, params_of
from bitwright.compiler.lower.templates.geometry import geometry_of
from bitwright.compiler.program.ops import Dot, Program, QConv, QGemm, QuantParams, Tensor, WeightOnlyDot
from bitwright.compiler.program.workload import workloads_of
from bitwright.targets.backend import Kernel, KernelChoice
from bitwright.targets.nvidia_gpu import kernels
from bitwright.targets.nvidia_gpu.float_gemm import half_gemm_kernel
from bitwright.targets.nvidia_gpu.mma_tiles import MMA_UNIT, Tiling
from bitwright.targets.schema import Profile
from gpu.kit.patterns import pattern

Arrays = dict[str, np.ndarray]
# Larger outputs are compared by their hash.
LARGEST_GOLDEN = 1 << 16
CANDIDATES = 6
HALF_ROWS, HALF_TOLERANCE = 16, 2.0**-10
# What is known to be good on processors of this kind, whatever the cost model says.
USUAL = (
    Tiling(128, 256, 64, 64, 64, 3),
    Tiling(128, 256, 64, 64, 64, 4),
    Tiling(256, 128, 64, 64, 64, 3),
    Tiling(128, 256, 128, 64, 64, 3),
    Tiling(128, 128, 64, 64, 32, 4),
    Tiling(128, 128, 128, 64, 32, 3),
)


@dataclass
class Item:
    """One kernel.

    Attributes:
        name: In the kit, a C identifier.
        group: Kernels that do the same thing.
        kernel: The kernel.
        inputs: Shape, dtype and pattern of the activations.
        golden: How its output is checked, as ``kit/kernels.py`` reads it.
        arrays: What of the above is in a file.
        choice: What was chosen, for the reader.
        macs: Multiply-accumulates.
        timed: It is to be timed.
        patterns: Constants by position that are patterns, not in a file: shape, dtype and seed.
        learned: What a tuning record of it is made from: workload, choice and rank.
    """

    name: str
    group: str
    kernel: Kernel
    inputs: tuple[tuple[int, ...], str, int]
    golden: dict[str, Any]
    arrays: Arrays
    choice: str
    macs: int
    timed: bool
    patterns: Mapping[int, tuple[tuple[int, ...], str, int]] = field(default_factory=dict)
    learned: Mapping[str, Any] = field(default_factory=dict)

    def record(self, parameters: tuple[str, ...], launch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the kit says of it.

        Args:
            parameters: Names of the function's parameters.
            launch: How it is started.
        """
        described: list[dict[str, Any]] = [dict(zip(("shape", "dtype", "pattern"), self.inputs, strict=True))]
        for number, constant in enumerate(self.kernel.constants):
            if number in self.patterns:
                described.append(dict(zip(("shape", "dtype", "pattern"), self.patterns[number], strict=True)))
                continue
            key = hashlib.sha256(constant.tobytes() + str(constant.dtype).encode()).hexdigest()[:16]
            self.arrays[key] = constant  # kernels that share it share its place in the file
            described.append({"array": key})
        described.append({"shape": self.kernel.output_shape, "dtype": self.kernel.output_dtype})
        named = [{"name": n, **d} for n, d in zip(parameters, described, strict=True)]
        plain: dict[str, Any] = {
            "name": self.name,
            "group": self.group,
            "choice": self.choice,
            "macs": self.macs,
        }
        return {
            **plain,
            **self.learned,
            "timed": self.timed,
            "launch": launch,
            "parameters": named,
            "golden": self.golden,
        }


def golden_of(name: str, output: np.ndarray) -> tuple[dict[str, Any], Arrays]:
    """Return how an output is checked, and what of it goes into the file."""
    output = np.ascontiguousarray(output)
    if output.nbytes > LARGEST_GOLDEN:
        return {"sha256": hashlib.sha256(output.tobytes()).hexdigest()}, {}
    return {"array": f"{name}/golden"}, {f"{name}/golden": output}


def int8_products(size: int, profile: Profile) -> Iterator[Item]:
    """Yield candidates of the square int8 product with fused requantization."""
    x, weight = pattern((size, size), "int8", 1), pattern((size, size), "int8", 2)
    scale = np.full(size, 1.0, np.float32)
    tensors = {
        "x": Tensor("x", (size, size), "int8", QuantParams("int8", 0.0625, 0)),
        "y": Tensor("y", (size, size), "int8", QuantParams("int8", float(np.sqrt(size)) * 8, 0)),
    }
    # The constant's layout is [N, K]: with whole tiles it is the pattern itself.
    step = QGemm(
        name="product",
        inputs=("x",),
        outputs=("y",),
        weight=weight.T,
        weight_scale=scale,
        lower=-128,
        upper=127,
    )
    program = Program(("x",), ("y",), (step,), tensors)
    quant = tensors["x"].quant
    assert quant is not None
    golden, arrays = golden_of("int8_gemm", gemm(step, x, quant, tensors["y"]))
    for number, choice in enumerate(_measured(kernels.candidates(step, program, profile), profile)):
        tiling = params_of(choice, Tiling)
        if size % tiling.block_n or size % tiling.block_k:
            continue
        kernel = kernels.tiled(step, program, tiling, choice.intrinsic)
        at = {0: ((1, size, size), "int8", 2)}
        inputs = ((size, size), "int8", 1)
        name = f"int8_gemm_{number}"
        yield Item(name, "int8_gemm", kernel, inputs, golden, arrays, choice.label(), size**3, True, at)


def _measured(candidates: Sequence[KernelChoice], profile: Profile) -> list[KernelChoice]:
    """Return the best candidates of each instruction for large tiles, and those known to be good."""
    names = [n for n in (kernels.WGMMA_S8, kernels.MMA_S8) if any(row.name == n for row in profile.compute)]
    best = [[c for c in candidates if c.intrinsic == name][:CANDIDATES] for name in names]
    gpu = kernels.gpu_of(profile)
    usual = [
        as_choice(kernels.IMPLICIT_GEMM, kernels.MMA_S8, t) for t in USUAL if t.is_legal(MMA_UNIT, gpu, 1)
    ]
    return list(dict.fromkeys([c for found in best for c in found] + usual))


def half_products(size: int, profile: Profile) -> Iterator[Item]:
    """Yield candidates of the square fp16 product."""
    x, weight = pattern((size, size), "float16", 3), pattern((size, size), "float16", 4)
    rows = x[:HALF_ROWS].astype(np.float64) @ weight.T.astype(np.float64)
    golden = {"array": "fp16_gemm/golden", "tolerance": HALF_TOLERANCE}
    gpu = kernels.gpu_of(profile)
    for number, tiling in enumerate(
        t for t in USUAL if t.is_legal(MMA_UNIT, gpu, 0) and size % t.block_n == 0
    ):
        kernel = half_gemm_kernel(size, weight.T, None, tiling)
        shape = ((size, size), "float16", 3)
        at = {0: ((1, size, size), "float16", 4)}
        arrays = {"fp16_gemm/golden": rows}
        name = f"fp16_gemm_{number}"
        yield Item(name, "fp16_gemm", kernel, shape, golden, arrays, f"{tiling}", size**3, True, at)


def int4_rows(size: int, profile: Profile) -> Iterator[Item]:
    """Yield the product of one row with 4-bit weights in groups of 32, as in decoding."""
    rng = np.random.default_rng(5)
    groups = size // 32
    step = WeightOnlyDot(
        name="row",
        inputs=("x",),
        outputs=("y",),
        weight=rng.integers(0, 16, (size, size)).astype(np.uint8),
        scale=rng.uniform(0.001, 0.02, (groups, size)).astype(np.float32),
        zero_point=np.full((groups, size), 8, np.uint8),
        bits=4,
        group=32,
    )
    tensors = {n: Tensor(n, (1, size), "float32") for n in ("x", "y")}
    program = Program(("x",), ("y",), (step,), tensors)
    output = weight_only_dot(step, pattern((1, size), "float32", 6))
    for number, choice in enumerate(kernels.candidates(step, program, profile)):
        name = f"int4_row_{number}"
        golden, arrays = golden_of(name, output)
        kernel = kernels.dot_kernel(step, program, profile, choice)
        shape = ((1, size), "float32", 6)
        yield Item(name, "int4_row", kernel, shape, golden, arrays, choice.label(), size * size, True)


def model_kernels(model: str, program: Program, profile: Profile) -> Iterator[Item]:
    """Yield the best candidates of every distinct dot product of a model, with the constants of the first such step."""
    steps = {step.name: step for step in program.steps}
    for number, workload in enumerate(workloads_of([program])):
        step = steps[workload.steps[0]]
        assert isinstance(step, Dot | WeightOnlyDot)
        shape, dtype, output, macs = _reference(step, program, 10 + number)
        stem = re.sub(r"\W", "_", f"{model}_{number}")
        golden, arrays = golden_of(stem, output)
        for rank, choice in enumerate(kernels.candidates(step, program, profile)[:CANDIDATES]):
            kernel = kernels.dot_kernel(step, program, profile, choice)
            learned = {"workload": workload.key, "plan": choice.as_plain(), "rank": rank}
            inputs, label = (shape, dtype, 10 + number), f"{workload.label}: {choice.label()}"
            name = f"{stem}_{rank}"
            yield Item(name, model, kernel, inputs, golden, arrays, label, macs, True, learned=learned)


def _reference(
    step: Dot | WeightOnlyDot, program: Program, seed: int
) -> tuple[tuple[int, ...], str, np.ndarray, int]:
    """Return the physical input's shape and type, the physical output for its pattern, and the work."""
    source, output = program.tensor(step.inputs[0]), program.tensor(step.output)
    if isinstance(step, WeightOnlyDot):
        x = pattern(source.shape, "float32", seed)
        return source.shape, "float32", weight_only_dot(step, x), x.size * step.weight.shape[1]
    geometry = geometry_of(step, program)
    x = pattern(geometry.input_shape, "int8", seed)
    assert source.quant is not None
    if isinstance(step, QConv):
        y = conv(step, x.transpose(0, 3, 1, 2), source.quant, output).transpose(0, 2, 3, 1)
    else:
        assert isinstance(step, QGemm)
        y = gemm(step, x, source.quant, output)
    return geometry.input_shape, "int8", y, geometry.macs

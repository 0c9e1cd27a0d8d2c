"""Kernels under the ceilings: operations, bytes, what limits them, and the picture."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from bitwright.compiler.bench import ceilings as module
from bitwright.compiler.bench.ceilings import Ceilings, InstructionCeiling, MemoryCeiling, machine_ceilings
from bitwright.compiler.bench.roofline import Roofline, kernel_points
from bitwright.compiler.bench.roofline_picture import roofline_picture
from bitwright.compiler.errors import InternalError
from bitwright.compiler.lower.kernel_table import KernelCall, Stored
from bitwright.compiler.program.ops import Program, QAdd, QGemm, QuantParams, Tensor

QUANT = QuantParams("uint8", 0.1, 128)
CEILINGS = Ceilings(
    machine="a machine",
    threads=1,
    date="2026-01-01",
    load=0.0,
    versions={},
    instructions={
        "dot": InstructionCeiling(registers=2e12, cached=1e12),
        "slow": InstructionCeiling(registers=2e11, cached=1e11),
    },
    levels=(
        MemoryCeiling(name="l2", bytes=1 << 20, bytes_per_s=1e11),
        MemoryCeiling(name="memory", bytes=1 << 40, bytes_per_s=1e10),
    ),
)
ROWS = 128


def program(inner: int) -> Program:
    weight = np.ones((inner, 64), np.int8)
    steps = (
        QGemm(name="fc", inputs=("x",), outputs=("h",), weight=weight, weight_scale=np.ones(64, np.float32)),
        QAdd(name="sum", inputs=("h", "h"), outputs=("y",)),
    )
    shapes = {"x": (ROWS, inner), "h": (ROWS, 64), "y": (ROWS, 64)}
    return Program(("x",), ("y",), steps, {n: Tensor(n, s, "uint8", QUANT) for n, s in shapes.items()})


def stored(name: str, source: Program, argument: int = 0) -> Stored:
    tensor = source.tensors[name]
    return Stored(name, tensor.shape, (0, 1), "uint8", argument, tensor.shape)


def table(source: Program, intrinsic: str = "dot") -> tuple[KernelCall, ...]:
    x, h, y = (stored(n, source) for n in ("x", "h", "y"))
    return (
        KernelCall("fc", "QGemm", "fused_fc", 0, intrinsic, (x,), h),
        KernelCall("sum", "QAdd", "fused_sum", 0, "llvm", (h, h), y),
    )


def test_a_kernel_has_its_operations_bytes_and_ceiling():
    source = program(512)
    timed = [("cast", 1e-6), ("fused_fc", 1e-5), ("fused_sum", 1e-6)]
    (fc, add), other = kernel_points(source, table(source), timed, CEILINGS)
    assert fc.operations == 2 * ROWS * 512 * 64 and fc.bytes == ROWS * 512 + ROWS * 64 + 512 * 64
    # 79 operations a byte times 100 GB/s are more than the instruction's 1000 GOPS.
    assert (fc.bound, fc.ceiling) == ("compute", 1e12)
    assert fc.gops == pytest.approx(fc.operations / 1e-5 * 1e-9) and fc.share == pytest.approx(fc.gops / 1000)
    assert (add.operations, add.bytes, add.bound) == (ROWS * 64, 3 * ROWS * 64, "l2")
    assert add.ceiling == pytest.approx(1e11 / 3) and other == 1e-6


def test_what_does_not_fit_the_cache_is_bound_by_memory():
    source = program(1 << 15)
    (fc, _), _ = kernel_points(source, table(source), [("fused_fc", 1.0), ("fused_sum", 1.0)], CEILINGS)
    assert fc.bytes > 1 << 20 and fc.bound == "memory"
    assert fc.ceiling == pytest.approx(1e10 * fc.intensity)


def test_code_without_an_instruction_is_held_against_the_best():
    source = program(512)
    (fc, _), _ = kernel_points(
        source, table(source, "llvm"), [("fused_fc", 1.0), ("fused_sum", 1.0)], CEILINGS
    )
    assert fc.ceiling == 1e12
    (fc, _), _ = kernel_points(
        source, table(source, "slow"), [("fused_fc", 1.0), ("fused_sum", 1.0)], CEILINGS
    )
    assert fc.ceiling == 1e11


def test_times_of_other_calls_are_refused():
    source = program(8)
    with pytest.raises(InternalError, match="1 kernel calls were timed, the table lists 2"):
        kernel_points(source, table(source), [("fused_fc", 1.0)], CEILINGS)


def roofline(label: str) -> Roofline:
    source = program(512)
    points, other = kernel_points(source, table(source), [("fused_fc", 1e-5), ("fused_sum", 1e-6)], CEILINGS)
    return Roofline(label, CEILINGS, points, other)


def test_the_picture_has_every_kernel_and_every_ceiling():
    found = [roofline("first"), roofline("second")]
    text = roofline_picture(found)
    assert text == roofline_picture(found)
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    for label in ("first", "second"):
        for intrinsic in ("dot", "llvm"):
            (group,) = (g for g in root.iter(f"{space}g") if g.get("id") == f"kernels-{label}-{intrinsic}")
            assert len(list(group.iter(f"{space}use"))) == 1
    words = "".join(root.itertext())
    for part in ("dot 1000 GOPS", "slow 100 GOPS", "l2 100 GB/s", "memory 10 GB/s", "a machine"):
        assert part in words


def test_the_summary_is_of_the_dot_products():
    lines = " ".join(roofline("r").lines())
    ideal = 2 * ROWS * 512 * 64 / 1e12 / 1e-5
    assert f"91% of the time, {ideal:.0%} of their ceilings, 100% of it bound by compute" in lines


def test_ceilings_are_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[int] = []

    def measured(_: str, key: module._Key) -> Ceilings:
        asked.append(key.threads)
        return CEILINGS.model_copy(update={"threads": key.threads, "load": 9.0})

    monkeypatch.setattr(module, "_measured", measured)
    assert machine_ceilings(1) == machine_ceilings(1) and asked == [1]
    # Wall times of two threads beside other jobs are no ceilings: used, and measured again the next time.
    assert machine_ceilings(2).busy and machine_ceilings(2).busy and asked == [1, 2, 2]
    (kept,) = (tmp_path / "bitwright" / "ceilings").glob("*.json")
    kept.write_text("{")
    assert machine_ceilings(1).threads == 1 and asked == [1, 2, 2, 1]

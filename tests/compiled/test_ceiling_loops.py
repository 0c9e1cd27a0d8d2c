"""The loops that measure the machine's ceilings do the work they claim: nothing was optimised away."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.targets.loader import load_profile
from bitwright.targets.toolchain.codegen import llvm_target
from bitwright.targets.x86_cpu import ceiling
from bitwright.targets.x86_cpu.avx2 import AVX2
from bitwright.targets.x86_cpu.native import processor_flags
from bitwright.targets.x86_cpu.vnni import VNNI

THREADS, TIMES = 2, 3


def needs(flag: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(flag not in processor_flags(), reason=f"this processor has no {flag}")


def written(made: ceiling.Loop) -> np.ndarray:
    call, output = ceiling.compile_loop(
        made, THREADS, {**llvm_target(load_profile("host")), "num-cores": THREADS}
    )
    call()
    return output()


@pytest.mark.parametrize(
    "instruction", [pytest.param(VNNI, marks=needs("avx512_vnni")), pytest.param(AVX2, marks=needs("avx2"))]
)
def test_a_cached_loop_multiplies_everything(instruction):
    made = ceiling.cached_loop(instruction, THREADS, TIMES)
    # All operands are 1: a lane counts its multiply-accumulates.
    sums = written(made)
    assert (sums == TIMES * ceiling.STEPS * instruction.step).all()
    assert sums.sum() == THREADS * made.work


@needs("avx512_vnni")
def test_a_register_loop_multiplies_everything():
    made = ceiling.register_loop(VNNI, THREADS, TIMES)
    sums = written(made)
    assert sums.sum() == THREADS * made.work + sums.size  # every sum starts at 1


@needs("avx2")
def test_a_register_loop_of_two_instructions_multiplies_every_time():
    made = ceiling.register_loop(AVX2, THREADS, TIMES)
    total = np.ones(AVX2.lanes, np.int32)
    for _ in range(TIMES):
        halves = total.view(np.int16).astype(np.int32)
        total = total + halves[0::2] + halves[1::2]
    assert (written(made) == np.tile(total, made.parameters[-1].shape[0] // AVX2.lanes)).all()


@needs("amx_int8")
@pytest.mark.parametrize("loads", [True, False])
def test_a_tile_loop_multiplies_everything(loads):
    from bitwright.compiler.lower.loaded import ask_for_tiles

    ask_for_tiles()
    made = ceiling.tile_loop(THREADS, TIMES, loads=loads)
    tiles = written(made).reshape(THREADS, 5, ceiling.TILE_SIZE // 4)[:, :4]
    assert tiles.sum() == THREADS * made.work


def test_a_read_loop_adds_everything():
    made = ceiling.read_loop(THREADS, 1 << 16, TIMES)
    assert written(made).sum() * 4 == THREADS * made.work


@needs("avx2")
def test_a_rate_is_positive_and_finite():
    target = {**llvm_target(load_profile("host")), "num-cores": 1}
    found = ceiling.measured_rate(lambda n: ceiling.read_loop(1, 1 << 14, n), 1, target)
    assert 0 < found < 1e15

"""Hundreds of random steps that are no dot products equal the interpreter bit for bit, for three kinds of vectors."""

from __future__ import annotations

import pytest
import tvm
from lower_helpers import host_target
from random_steps import KINDS, differences, random_program
from tvm.runtime.vm import VirtualMachine

from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.lower.compile import compile_module
from bitwright.compiler.lower.relax_module import build_module

STEPS = 6 * len(KINDS)
# Processor -> the seed of its steps: each gets others.
PROCESSORS = {"haswell": 1, "cascadelake": 2, "this machine": 3}


def target_of(processor: str) -> dict[str, str]:
    host = host_target()
    if processor == "this machine":
        return host
    available = {str(f) for f in tvm.target.codegen.llvm_get_cpu_features(tvm.target.Target(host))}
    target = {"kind": "llvm", "mcpu": processor}
    if "avx2" not in available or not runs(target, available):
        pytest.skip(f"this machine is no {processor}")
    return target


def runs(target: dict[str, str], available: set[str]) -> bool:
    needed = {str(f) for f in tvm.target.codegen.llvm_get_cpu_features(tvm.target.Target(target))}
    return all(f in available for f in needed if f.startswith("avx"))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_steps_equal_the_interpreter(processor: str) -> None:
    program, feeds, labels = random_program(PROCESSORS[processor], range(STEPS))
    module = build_module(program, None, None).ir_module  # type: ignore[arg-type]
    machine = VirtualMachine(compile_module(module, target_of(processor)), tvm.cpu())
    results = machine["main"](*[tvm.runtime.tensor(a) for a in feeds.values()])
    found = {name: r.numpy() for name, r in zip(program.outputs, results, strict=True)}
    wrong = differences(labels, found, run_program(program, feeds))
    assert not wrong, "\n".join(wrong)

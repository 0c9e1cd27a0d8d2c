"""Random steps that are no dot products on emulated processors: one library and one start of the emulator for all."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_steps import KINDS, differences, random_program

from bitwright.compiler.bundle.runtime import add_runtime
from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.lower.compile import compile_module, export_objects
from bitwright.compiler.lower.relax_module import build_module
from bitwright.compiler.program.ops import Program
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile
from bitwright.targets.toolchain.interface import Interface, Port

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

STEPS = 4 * len(KINDS)
# Target -> the seed of its steps: each gets others.
SEEDS = {"arm-cortex-a53": 11, "arm-neoverse-n2": 12}


def ports(program: Program, names: tuple[str, ...]) -> tuple[Port, ...]:
    return tuple(Port(name, program.tensor(name).dtype, program.tensor(name).shape) for name in names)


@pytest.mark.parametrize("target", SEEDS)
def test_steps_equal_the_interpreter(target: str, tmp_path: Path) -> None:
    profile = load_profile(target)
    backend = backend_for(profile.family)
    reason = backend.why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    program, feeds, labels = random_program(SEEDS[target], range(STEPS))
    module = build_module(program, None, None).ir_module  # type: ignore[arg-type]
    objects, lib = tmp_path / "objects", tmp_path / "lib"
    objects.mkdir()
    lib.mkdir()
    executable = compile_module(module, backend.tvm_target(profile))
    backend.link(export_objects(executable, objects), lib / "model.so", profile)
    interface = Interface(ports(program, program.inputs), ports(program, program.outputs), {})
    status = add_runtime(lib, profile, interface)
    assert status.missing is None
    found = backend.execute(tmp_path, feeds, profile, trace=False).outputs
    wrong = differences(labels, found, run_program(program, feeds))
    assert not wrong, "\n".join(wrong)

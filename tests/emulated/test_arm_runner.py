"""aarch64 artifacts under qemu: right outputs, a right trace, SIGILL where instructions are missing."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.bundle.runtime import add_runtime
from bitwright.compiler.errors import ToolchainError
from bitwright.targets.arm_cpu import emulated
from bitwright.targets.arm_cpu.backend import executes_on
from bitwright.targets.backend import backend_for
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.interface import Interface, Port
from bitwright.targets.toolchain.linker import find_driver

BUILDER = Path(__file__).parents[1] / "compiled" / "build_tiny_module.py"
INTERFACE = Interface(
    inputs=(Port("x", "int8", (4, 16)),),
    outputs=(Port("scaled", "int32", (4, 16)), Port("dot", "int32", (4, 8))),
    roles={"bw_scale": 1, "bw_dot": 1},
)
BACKEND = backend_for("arm_cpu")

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine needs no emulator"),
]


def load_profile(mcpu: str, cpu: str | None = None, **emulator: str) -> Profile:
    """A profile whose code is made for ``mcpu`` and emulated on ``cpu``."""
    return Profile.model_validate_json(
        json.dumps(
            {
                "schema": 1,
                "name": f"test-{mcpu}",
                "family": "arm_cpu",
                "description": "a processor for tests",
                "provenance": {},
                "clock_hz": 1e9,
                "cores": 1,
                "codegen": {"mtriple": "aarch64-linux-gnu", "mcpu": mcpu},
                "compute": [
                    {"name": "llvm", "weight": "s8", "act": "s8", "acc": "s32", "macs_per_cycle": 1.0}
                ],
                "memory": [{"name": "ram", "size_bytes": 1e9, "bytes_per_s": 1e9}],
                "qspaces": {},
                "runtimes": {"artifact": {"ops": {}}, "onnxruntime": {"ops": {}}},
                "toolchain": {
                    "triple": "aarch64-linux-gnu",
                    "emulator": {"command": "qemu-aarch64", "cpu": cpu or mcpu, **emulator},
                },
            }
        )
    )


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(3).integers(-128, 128, (4, 16)).astype("int8")}


def build(mcpu: str, folder: Path) -> Path:
    profile = load_profile(mcpu)
    reason = BACKEND.why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    try:
        find_driver("aarch64-linux-gnu")
    except ToolchainError as error:
        pytest.skip(error.message)
    objects = folder / "objects"
    objects.mkdir()
    target = json.dumps(BACKEND.tvm_target(profile))
    subprocess.run([sys.executable, str(BUILDER), target, str(objects)], check=True)
    (folder / "lib").mkdir()
    BACKEND.link(sorted(objects.glob("*.o")), folder / "lib/model.so", profile)
    status = add_runtime(folder / "lib", profile, INTERFACE)
    if status.missing:
        pytest.skip(status.missing)
    return folder


@pytest.fixture(scope="module")
def dotprod_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("cortex-a76", tmp_path_factory.mktemp("a76"))


def test_outputs_and_trace(dotprod_bundle: Path) -> None:
    given = feeds()
    x, w = given["x"].astype(int), np.arange(128).reshape(8, 16) * 37 % 255 - 127
    execution = BACKEND.execute(dotprod_bundle, given, load_profile("cortex-a76"), trace=True, repeat=3)
    np.testing.assert_array_equal(execution.outputs["scaled"], x * 3 + 1)
    np.testing.assert_array_equal(execution.outputs["dot"], x @ w.T)
    assert execution.executed == "emulated"
    assert execution.seconds is None, "an emulator's time says nothing about the silicon"
    assert [name for name, _, _ in execution.trace] == ["bw_scale", "bw_dot"]
    np.testing.assert_array_equal(execution.trace[1][2], x @ w.T)


def test_dot_product_code_needs_a_dot_product_processor(dotprod_bundle: Path) -> None:
    """The Cortex-A72 (Armv8.0) has no sdot: the instruction ceiling of a profile is a fact, not a label."""
    profile = load_profile("cortex-a76")
    assert executes_on(dotprod_bundle, feeds(), profile, "cortex-a76")
    assert not executes_on(dotprod_bundle, feeds(), profile, "cortex-a72")
    with pytest.raises(ToolchainError, match="SIGILL"):
        BACKEND.execute(dotprod_bundle, feeds(), load_profile("cortex-a76", "cortex-a72"), trace=False)


def test_code_for_an_older_processor_runs_on_both(tmp_path: Path) -> None:
    bundle = build("cortex-a53", tmp_path)
    for cpu in ("cortex-a53", "cortex-a76"):
        assert executes_on(bundle, feeds(), load_profile("cortex-a53"), cpu)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_LD_PREFIX", str(tmp_path))
    monkeypatch.setattr(emulated.shutil, "which", lambda _: None)
    reason = BACKEND.why_not_executable(load_profile("cortex-a76"))
    for package in ("qemu-user", "libc6-arm64-cross", "libstdc++6-arm64-cross", "libgcc-s1-arm64-cross"):
        assert package in reason


def test_an_unknown_emulated_processor_is_named() -> None:
    if BACKEND.why_not_executable(load_profile("cortex-a76")):
        pytest.skip("qemu-aarch64 or its libraries are not installed")
    assert "cortex-a9999" in BACKEND.why_not_executable(load_profile("cortex-a76", "cortex-a9999"))


C_PROGRAM = """
#include <stdio.h>
#include "bitwright_runtime.h"
int main(int count, char** arguments) {
  static signed char x[64];
  bw_model* model = NULL;
  bw_tensor input = {BW_INT8, 2, {4, 16}, x, sizeof x}, dot;
  if (count < 3 || fread(x, 1, sizeof x, fopen(arguments[2], "rb")) != sizeof x) return 2;
  if (bw_open(arguments[1], &model) || bw_set_threads(model, 2) || bw_run(model, &input, 1)) {
    puts(bw_last_error());
    return 1;
  }
  bw_result(model, 1, &dot);
  for (size_t i = 0; i < dot.bytes / 4; ++i) printf("%d ", ((int*)dot.data)[i]);
  bw_close(model);
  return 0;
}
"""


def test_the_c_interface(dotprod_bundle: Path, tmp_path: Path) -> None:
    lib, x = dotprod_bundle / "lib", feeds()["x"]
    (tmp_path / "main.c").write_text(C_PROGRAM)
    (tmp_path / "x").write_bytes(x.tobytes())
    driver = find_driver("aarch64-linux-gnu")
    link = [f"-L{lib}", "-lbitwright_runtime", "-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{lib}"]
    command = [
        *driver.command,
        f"-I{lib}/include",
        str(tmp_path / "main.c"),
        "-o",
        str(tmp_path / "main"),
        *link,
    ]
    driver.run(command, "compiling a program")
    prefix = emulated.launch(load_profile("cortex-a76")).prefix
    done = subprocess.run(
        [*prefix, str(tmp_path / "main"), str(lib), str(tmp_path / "x")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    w = np.arange(128).reshape(8, 16) * 37 % 255 - 127
    np.testing.assert_array_equal(np.fromstring(done.stdout, int, sep=" ").reshape(4, 8), x.astype(int) @ w.T)

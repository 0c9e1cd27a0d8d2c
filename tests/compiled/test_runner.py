"""The C++ runner on this machine: right outputs, a right trace, and clear refusals."""

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.bundle.runtime import add_runtime
from bitwright.compiler.errors import DataError, ToolchainError
from bitwright.targets.backend import backend_for
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.interface import Interface, Port
from bitwright.targets.toolchain.linker import Driver, find_driver
from bitwright.targets.toolchain.runner import build_runner

BUILDER = Path(__file__).with_name("build_tiny_module.py")
PROFILE = {
    "schema": 1,
    "name": "test-x86",
    "family": "x86_cpu",
    "description": "a processor for tests",
    "provenance": {},
    "clock_hz": 1e9,
    "cores": 1,
    "codegen": {"mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v2"},
    "compute": [{"name": "llvm", "weight": "s8", "act": "s8", "acc": "s32", "macs_per_cycle": 1.0}],
    "memory": [{"name": "ram", "size_bytes": 1e9, "bytes_per_s": 1e9}],
    "qspaces": {},
    "runtimes": {"artifact": {"ops": {}}, "onnxruntime": {"ops": {}}},
    "toolchain": {"triple": "x86_64-linux-gnu"},
}
INTERFACE = Interface(
    inputs=(Port("x:0", "int8", (4, 16)),),
    outputs=(Port("scaled", "int32", (4, 16)), Port("dot", "int32", (4, 8))),
    roles={"bw_scale": 1, "bw_dot": 1},
)

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="executes x86-64 code")


def load_profile(**codegen: object) -> Profile:
    text = json.dumps({**PROFILE, "codegen": {**PROFILE["codegen"], **codegen}})
    return Profile.model_validate_json(text)


def weights() -> np.ndarray:
    return np.arange(128).reshape(8, 16) * 37 % 255 - 127


def feeds() -> dict[str, np.ndarray]:
    return {"x:0": np.random.default_rng(3).integers(-128, 128, (4, 16)).astype("int8")}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("objects")
    target = backend_for("x86_cpu").tvm_target(load_profile())
    subprocess.run([sys.executable, str(BUILDER), json.dumps(target), str(folder)], check=True)
    return sorted(folder.glob("*.o"))


@pytest.fixture(scope="module")
def bundle(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "lib").mkdir()
    tool = backend_for("x86_cpu").link(objects, folder / "lib/model.so", load_profile())
    assert any(c.isdigit() for c in tool)
    assert add_runtime(folder / "lib", load_profile(), INTERFACE).missing is None
    return folder


def test_outputs_trace_and_time(bundle: Path) -> None:
    assert backend_for("x86_cpu").why_not_executable(load_profile()) is None
    given = feeds()
    x = given["x:0"].astype(int)
    execution = backend_for("x86_cpu").execute(bundle, given, load_profile(), trace=True, repeat=3)
    np.testing.assert_array_equal(execution.outputs["scaled"], x * 3 + 1)
    np.testing.assert_array_equal(execution.outputs["dot"], x @ weights().T)
    assert execution.executed == "native"
    assert execution.seconds is not None
    assert 0 < execution.seconds < 1
    assert [name for name, _, _ in execution.trace] == ["bw_scale", "bw_dot"]
    for (_, inputs, output), expected in zip(execution.trace, execution.outputs.values(), strict=True):
        assert len(inputs) == 1
        np.testing.assert_array_equal(inputs[0], given["x:0"])
        np.testing.assert_array_equal(output, expected)


def test_no_trace_unless_asked(bundle: Path) -> None:
    execution = backend_for("x86_cpu").execute(bundle, feeds(), load_profile(), trace=False, repeat=0)
    assert list(execution.trace) == []
    assert execution.seconds is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no array was given"),
        ({"y": np.zeros(1)}, "no input 'y'"),
        ({"x:0": np.zeros((4, 16), "uint8")}, "expected int8, got uint8"),
        ({"x:0": np.zeros((4, 15), "int8")}, r"expected shape \[4, 16\], got \[4, 15\]"),
    ],
)
def test_wrong_feeds_are_refused_before_anything_runs(bundle: Path, given: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        backend_for("x86_cpu").execute(bundle, given, load_profile(), trace=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not an array", "not an .npy"), (b"\x93NUMPY\x01\x00\x00\xff" + b" " * 100, "too long")],
)
def test_the_runner_refuses_damaged_files(bundle: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    command = [bundle / "lib/runner", bundle / "lib/model.so", tmp_path, tmp_path / "x.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_wrong_shape_is_reported_with_the_runtimes_own_words(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 16), "int8"))
    command = [bundle / "lib/runner", bundle / "lib/model.so", tmp_path, tmp_path / "x.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "shape" in done.stderr.lower()


def test_a_bundle_without_runner_says_so(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="no runner"):
        backend_for("x86_cpu").execute(tmp_path, feeds(), load_profile(), trace=False)


def test_a_processor_that_lacks_instructions_is_named() -> None:
    reason = backend_for("x86_cpu").why_not_executable(load_profile(mattr=["+invented-feature"]))
    assert reason == "this processor lacks invented_feature"


@pytest.mark.slow  # zig builds its C runtime the first time
def test_zig_links_the_same_library(objects: list[Path], bundle: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("ziglang", reason="the optional linker 'bitwright[link]' is not installed")
    monkeypatch.setattr("bitwright.targets.toolchain.linker.shutil.which", lambda _: None)
    find_driver.cache_clear()
    try:
        assert find_driver("x86_64-linux-gnu").is_zig
        (tmp_path / "lib").mkdir()
        tool = backend_for("x86_cpu").link(objects, tmp_path / "lib/model.so", load_profile())
        status = add_runtime(tmp_path / "lib", load_profile(), INTERFACE)
    finally:
        find_driver.cache_clear()
    assert tool.startswith("zig ")
    assert status.missing is None
    execution = backend_for("x86_cpu").execute(tmp_path, feeds(), load_profile(), trace=True)
    native = backend_for("x86_cpu").execute(bundle, feeds(), load_profile(), trace=True)
    np.testing.assert_array_equal(execution.outputs["dot"], native.outputs["dot"])
    assert len(execution.trace) == 2


def test_without_any_linker_the_fix_names_the_package(monkeypatch) -> None:
    monkeypatch.setattr("bitwright.targets.toolchain.linker.shutil.which", lambda _: None)
    monkeypatch.setattr("bitwright.targets.toolchain.linker.find_spec", lambda _: None)
    find_driver.cache_clear()
    try:
        with pytest.raises(ToolchainError, match="pip install ziglang"):
            find_driver("aarch64-linux-gnu")
    finally:
        find_driver.cache_clear()


def test_a_failing_linker_passes_its_message_on(tmp_path: Path) -> None:
    (tmp_path / "bad.o").write_text("no object file")
    with pytest.raises(ToolchainError, match=r"linking model\.so"):
        backend_for("x86_cpu").link([tmp_path / "bad.o"], tmp_path / "model.so", load_profile())


def test_the_runner_is_compiled_once_for_the_same_sources(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # A short source in the place of the runner's: what is built does not matter, that it is built does.
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, text in zip(
        folders, ("int main() {}", "int main() {}", "int main() { return 3; }"), strict=True
    ):
        shutil.copytree(bundle / "lib/include", folder / "include")
        (folder / "runner.cc").write_text(text)
        (folder / "bitwright_runtime.cc").write_text("")
    kept = tmp_path / "cache/bitwright/runner"
    builds = []
    for folder in folders:
        build_runner(folder, "x86_64-linux-gnu")
        builds.append(len(list(kept.iterdir())))
    assert builds == [1, 1, 2]
    assert (folders[0] / "runner").read_bytes() == (folders[1] / "runner").read_bytes()
    assert [subprocess.run([folder / "runner"], check=False).returncode for folder in folders] == [0, 0, 3]


def test_a_missing_compiler_leaves_a_bundle_without_runner_and_a_reason(tmp_path: Path, monkeypatch) -> None:
    broken = replace(Driver(("cc",)), command=("no-such-compiler",))
    monkeypatch.setattr("bitwright.targets.toolchain.linker.find_driver", lambda *_: broken)
    status = add_runtime(tmp_path, load_profile(), INTERFACE)
    assert status.compiler is None
    assert "no-such-compiler" in status.missing
    assert (tmp_path / "runner.cc").exists()

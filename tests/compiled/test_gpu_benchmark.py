"""The folder that is carried to a GPU: it is complete, its script finds what is right and what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dot_reference import Case
from gpu.build import build_kit
from gpu.kit.patterns import pattern
from gpu.learn import learn
from gpu.table import table_of
from gpu_cases import symmetric

from bitwright.compiler.program.workload import workload_key
from bitwright.compiler.tune.farm import Farm
from bitwright.compiler.tune.hardware import hardware_key, processor_of
from bitwright.compiler.tune.records import Key
from bitwright.compiler.tune.store import TuningStore
from bitwright.targets.loader import load_profile
from bitwright.targets.nvidia_gpu.codegen import find_nvcc
from bitwright.targets.nvidia_gpu.emulated_device import environment
from bitwright.targets.nvidia_gpu.emulation import why_not_emulated
from bitwright.targets.nvidia_gpu.kernels import candidates

needs_tools = pytest.mark.skipif(
    find_nvcc() is None or why_not_emulated() is not None,
    reason="nvcc of CUDA 12 or 13, or a C++ compiler, is not installed",
)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "kit"
    size = build_kit(folder, "nvidia-h100", [], 256, emulated=True)
    assert 1_000_000 < size < 20_000_000
    return folder


def _run(kit: Path, *arguments: str, emulated: bool = True) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    if emulated:
        variables |= environment(kit / "emulation/kernels.so")
    command = [sys.executable, "-I", str(kit / "run.py"), "--verify-only", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=300)


@needs_tools
def test_the_folder_holds_all_it_needs_and_its_kernels_are_right(kit: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(kit, moved)
    result = tmp_path / "result.json"
    done = _run(moved, "--output", str(result))
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert found["right"]
    groups = {k["group"] for k in found["kernels"]}
    assert groups == {"int8_gemm", "fp16_gemm", "int4_row"}
    assert all(k["exact"] for k in found["kernels"] if k["group"] != "fp16_gemm")
    assert found["kit"]["architecture"] == "sm_90a"


@needs_tools
def test_a_wrong_constant_is_found(kit: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(kit, broken)
    with np.load(kit / "kernels.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    record = json.loads((kit / "kernels.json").read_text())[0]
    name = next(p["array"] for p in record["parameters"] if p["name"] == "multiplier")
    arrays[name][3] *= np.float32(1.5)
    np.savez_compressed(broken / "kernels.npz", **arrays)
    done = _run(broken, "--output", str(tmp_path / "result.json"))
    assert done.returncode == 1
    assert "DIFFERENT: int8_gemm_0" in done.stdout


@needs_tools
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a driver")
def test_without_a_device_the_script_says_so(kit: Path, tmp_path: Path) -> None:
    done = _run(kit, "--output", str(tmp_path / "result.json"), emulated=False)
    assert done.returncode == 2
    assert "cannot run: libcuda.so.1" in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_a_folder_too_large_to_be_carried_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu.build as build

    monkeypatch.setattr(build, "MOST_BYTES", 1000)
    monkeypatch.setattr(build, "int8_products", lambda *_: ())
    monkeypatch.setattr(build, "half_products", lambda *_: ())
    monkeypatch.setattr(build, "int4_rows", lambda *_: ())
    monkeypatch.setattr(build, "_write_kernels", lambda *_: None)
    with pytest.raises(ValueError, match="can be carried"):
        build.build_kit(tmp_path / "kit", "nvidia-h100", [], 256)


def _in_integers(index: int, seed: int) -> int:
    h = (index * 2654435761 + seed * 40503 + 1) % 2**32
    h ^= h >> 15
    h = h * 2246822519 % 2**32
    h ^= h >> 13
    byte = h >> 24
    return max(byte - 256 if byte > 127 else byte, -127)


def test_patterns_are_the_same_everywhere() -> None:
    found = pattern((2, 4), "int8", 7)
    assert found.reshape(-1).tolist() == [_in_integers(i, 7) for i in range(8)]
    many = pattern((1 << 16,), "int8", 1)
    assert many.min() == -127
    assert many.max() == 127
    assert abs(float(many.mean())) < 1
    halves = pattern((100,), "float16", 2)
    assert halves.dtype == np.float16
    assert np.abs(halves.astype(np.float64)).max() <= 1


def _result(share: float) -> dict[str, object]:
    return {
        "device": "NVIDIA H200",
        "date": "2026-11-22T10:00:00+00:00",
        "kernels": [{"name": "int8_gemm_0", "exact": True}, {"name": "fp16_gemm_0", "within": True}],
        "models": [{"name": "resnet8_cifar10", "within": True}, {"name": "minilm_l6", "within": False}],
        "compared": {
            "int8_gemm": {
                "us": 150.0,
                "tera_operations": 916.3,
                "share_of_vendor_int8": share,
                "times_vendor_fp16": 1.4,
            },
            "resnet8_cifar10": {"us": 30.0, "times_torch_fp16": 1.25},
        },
    }


@pytest.mark.parametrize(("share", "held"), [(0.7, "yes"), (0.6, "no")])
def test_the_table_says_which_bounds_hold(share: float, held: str) -> None:
    text = table_of(_result(share))
    assert "1 of 1 integer kernels bit-equal" in text
    assert "1 of 2 models" in text
    assert f"| int8_gemm | 150.0 | 916 TOP/s | PyTorch `_int_mm` | {share:.2f} | 0.65 | {held} |" in text
    assert "| resnet8_cifar10 | 30.0 |  | PyTorch fp16 with a CUDA graph | 1.25 | 1.0 | yes |" in text
    assert "minilm_l6 |" not in text


def _timed_result() -> dict[str, object]:
    """Return a result of two kinds of dot products: one whose second candidate is faster, one whose default is."""
    profile = load_profile("nvidia-h100")
    kernels = []
    for number, times in enumerate(((4.0, 3.0), (5.0, 6.0))):
        case = Case("product", (64, 128), (128, 64 * (number + 1)), y_dtype="int8")
        _, step, program, _ = symmetric(case)
        choices = candidates(step, program, profile)
        for rank, microseconds in enumerate(times):
            kernels.append(
                {
                    "name": f"k{number}_{rank}",
                    "workload": workload_key(step, program),
                    "plan": choices[rank].as_plain(),
                    "rank": rank,
                    "best_us": microseconds,
                    "exact": True,
                }
            )
    kernels.append({**kernels[0], "best_us": 0.1, "exact": False})  # fast and wrong
    return {"kit": {"profile": "nvidia-h100", "made_by": hardware_key(profile, "")}, "kernels": kernels}


def test_times_become_records_that_compilations_use(tmp_path: Path) -> None:
    result, store = _timed_result(), tmp_path / "records.jsonl"
    assert learn(result, "h200", store) == 2
    profile = load_profile("nvidia-h100")
    known = TuningStore(store).read()
    assert known.damaged == 0
    hardware = hardware_key(profile, processor_of(profile, Farm("h200")) or "")
    best = {}
    for kernel in result["kernels"]:  # type: ignore[attr-defined]
        found = known.of(Key(kernel["workload"], hardware)).finished
        assert found is not None
        best[kernel["name"][1]] = (found.rank, round(found.seconds * 1e6, 3), round(found.default_s * 1e6, 3))
    assert best == {"0": (1, 3.0, 4.0), "1": (0, 5.0, 5.0)}


def test_times_of_other_templates_are_refused(tmp_path: Path) -> None:
    result = _timed_result()
    result["kit"]["made_by"] += "x"  # type: ignore[index]
    with pytest.raises(ValueError, match="build it again"):
        learn(result, "h200", tmp_path / "records.jsonl")
    assert not (tmp_path / "records.jsonl").exists()


def test_a_run_without_times_teaches_nothing(tmp_path: Path) -> None:
    result = _timed_result()
    result["kernels"] = [{"name": "k", "exact": True}]
    with pytest.raises(ValueError, match="timed no kernel"):
        learn(result, "h200", tmp_path / "records.jsonl")

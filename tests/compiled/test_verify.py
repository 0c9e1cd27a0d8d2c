"""Verification of whole bundles: a right artifact passes bit for bit, a wrong one is found and named."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest
from small_bundle import ONE_STEP, feeds, fill, model

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.verification import OutputComparison, Verification, compare
from bitwright.compiler.bundle.verify import verify, verify_folder
from bitwright.compiler.bundle.writer import BundleWriter
from bitwright.compiler.errors import UsageError, VerificationError
from bitwright.compiler.graph.saving import save_model
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import Profile

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="executes x86-64 code")


@pytest.fixture(scope="module")
def profile() -> Profile:
    found = load_profile("x86-avx2")
    reason = backend_for("x86_cpu").why_not_executable(found)
    if reason:
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def bundle(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "out"
    with BundleWriter(out) as writer:
        fill(writer.path, profile)
        assert verify_folder(writer.path, profile, samples=1).passed
        writer.commit(profile)
    return out


def test_a_right_artifact_is_exact(bundle: Path) -> None:
    found = verify(bundle)
    found.check()
    assert (found.executed, found.sets, found.passed) == ("native", 2, True)
    assert found.calls >= 2 * 3, "Quantize, Gemm and Add at least, on two golden sets"
    assert found.elements > 0
    assert found.seconds > 0
    golden = [o for o in found.outputs if o.reference == "golden"]
    assert len(golden) == 2
    assert all(o.difference.largest <= ONE_STEP for o in golden)
    assert {o.reference for o in found.outputs} == {"golden", "onnxruntime"}
    assert "bit for bit" in found.lines()[0]
    assert found.to_dict()["passed"] is True


def test_a_bundle_runs_in_both_runtimes(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    artifact, ort = opened.run(feeds(5)), opened.run(feeds(5), runtime="ort")
    np.testing.assert_allclose(artifact["y"], ort["y"], atol=ONE_STEP)
    with pytest.raises(UsageError, match="unknown runtime"):
        opened.run(feeds(5), runtime="tpu")


def copy_with(bundle: Path, folder: Path, profile: Profile, name: str, content: bytes) -> Path:
    """Return a copy of the bundle in which one file is another, with a fitting manifest."""
    with BundleWriter(folder / "out") as writer:
        for path in bundle.rglob("*"):
            if path.is_file() and path.name != "manifest.json":
                copy = writer.path / path.relative_to(bundle)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(
                    content if path.relative_to(bundle).as_posix() == name else path.read_bytes()
                )
                copy.chmod(path.stat().st_mode)
        return writer.commit(profile)


def test_a_kernel_with_another_weight_is_found(bundle: Path, tmp_path: Path, profile: Profile) -> None:
    other = model(seed=1)
    save_model(other, tmp_path / "other.onnx")
    content = (tmp_path / "other.onnx").read_bytes()
    found = verify(copy_with(bundle, tmp_path, profile, "lib/model.static.onnx", content))
    assert not found.passed
    steps = {d.step for d in found.kernel_differences}
    assert len(steps) == 1, "only the Gemm differs: every other kernel is judged on the inputs it really had"
    with pytest.raises(VerificationError, match="differs: step"):
        found.check()


def test_what_cannot_be_executed_says_why(bundle: Path, profile: Profile, monkeypatch) -> None:
    monkeypatch.setattr("bitwright.targets.x86_cpu.native.processor_flags", lambda: frozenset())
    found = verify(bundle)
    assert found.executed == "none"
    assert "avx2" in found.reason
    assert found.lines() == [f"compiled, not executed: {found.reason}"]


def test_comparison_counts_bits() -> None:
    a = np.array([1.0, np.nan, np.inf, -0.0, 2.0], "float32")
    b = np.array([1.0, np.nan, np.inf, 0.0, 2.5], "float32")
    found = compare(a, b)
    assert (found.elements, found.differing, found.largest) == (5, 2, 0.5)
    assert compare(a, a.astype("float64")).differing == 5
    integers = compare(np.array([0, 255], "uint8"), np.array([255, 255], "uint8"))
    assert (integers.differing, integers.largest) == (1, 255)


def test_the_record_is_valid_json_even_for_infinite_differences() -> None:
    infinite = compare(np.array([np.inf], "float32"), np.array([0], "float32"))
    assert infinite.largest == np.inf
    outputs = (OutputComparison(0, "y", "golden", "float32", infinite),)
    record = json.loads(json.dumps(Verification("native", outputs=outputs).to_dict(), allow_nan=False))
    assert record["outputs"][0]["difference"] == {"elements": 1, "differing": 1, "largest": None}

"""Artifacts for several shapes: every length and batch is computed, weights are stored once, leaks are refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from attention_model import LEAKING, sample, samples, write_model

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.errors import DataError, UsageError, VerificationError
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model

SHAPES = {"buckets": {"T": (4, 8, 12)}, "pad": {"x": 0.0, "mask": 0.0}, "loop": "N"}


def options(model: Path, out: Path, **changes: object) -> Options:
    return Options(model=model, output=out, **{"target": "host", "data": samples(), **SHAPES, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "attention.onnx")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = compile_model(options(model, tmp_path_factory.mktemp("buckets") / "out"))
    assert made is not None
    return made


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 4), (2, 5), (3, 12), (1, 9)])
def test_any_size_is_computed(bundle: Bundle, batch: int, length: int) -> None:
    feeds = sample(length, 99, batch)
    artifact, reference = bundle.run(feeds), bundle.run(feeds, "ort")
    assert artifact["tokens"].shape == (batch, length, 16)
    assert artifact["pooled"].shape == (batch, 8)
    for name, expected in reference.items():
        # Softmax is float code of two runtimes, and a value at a tie of the quantizer behind it moves by one step:
        # that is 1/255 of the range in one of 16 summands.
        np.testing.assert_allclose(artifact[name], expected, atol=np.ptp(expected) / 100)


def test_padding_changes_no_bit_of_what_is_kept(bundle: Bundle) -> None:
    """Length 4 through the functions for 4 and, padded, for 12: only the order of float sums may differ."""
    rules = bundle.rules
    assert rules is not None
    feeds = sample(4, 3)
    found = {}
    for function in rules.functions:
        dispatch = rules.dispatch(feeds, function)
        results = [e.outputs for e in bundle.execute_calls(dispatch)]
        found[function.sizes["T"]] = rules.assemble(dispatch.sizes, results)
    for name in ("tokens", "pooled"):
        np.testing.assert_allclose(found[12][name], found[4][name], atol=np.ptp(found[4][name]) / 100)


def test_every_function_is_verified(bundle: Bundle) -> None:
    result = verify(bundle.path)
    assert result.passed and result.executed == "native"
    assert bundle.rules is not None
    lengths = [golden.inputs["x"].shape[1] for golden in bundle.golden()]
    assert {bundle.rules.function_for({"N": 1, "T": n}).name for n in lengths} == {"main", "main_1", "main_2"}
    assert any(golden.inputs["x"].shape[0] == 2 for golden in bundle.golden()), "the loop is verified, too"
    tables = [len((bundle.path / f"lib/{f.folder}/kernels.json").read_text()) for f in bundle.rules.functions]
    assert len(tables) == 3 and min(tables) > 2


def test_sizes_beyond_the_buckets_are_refused(bundle: Bundle) -> None:
    with pytest.raises(DataError, match=r"T=13 is larger than the largest bucket; T has \[4, 8, 12\]"):
        bundle.run(sample(13, 0))


def test_weights_are_stored_once(tmp_path: Path) -> None:
    """Three shapes of a model with 512 kB of weights: the library has them once, though each prefers another kernel."""
    text = (
        '<ir_version: 9, opset_import: ["" : 20]>\n'
        "g (float[T, 512] x) => (float[T, 512] z) { y = MatMul (x, w1)\n h = Relu (y)\n z = MatMul (h, w2) }"
    )
    proto = onnx.parser.parse_model(text)
    for name in ("w1", "w2"):
        array = np.random.default_rng(len(proto.graph.initializer)).normal(size=(512, 512)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array / 20, name))
    onnx.save(proto, tmp_path / "mlp.onnx")
    data = [
        {"x": np.random.default_rng(n).normal(size=(n, 512)).astype(np.float32)} for n in (3, 4, 7, 8, 15, 16)
    ]
    made = compile_model(
        options(
            tmp_path / "mlp.onnx",
            tmp_path / "out",
            data=data * 2,
            buckets={"T": (4, 8, 16)},
            pad={"x": 0.0},
            loop=None,
        )
    )
    assert made is not None
    assert (made.path / "lib/model.so").stat().st_size < 1.6 * 2 * 512 * 512
    assert {f["sizes"]["T"] for f in made.report["deployment"]["functions"]} == {4, 8, 16}


def test_a_model_that_mixes_positions_is_refused(tmp_path: Path) -> None:
    leaking = write_model(tmp_path / "leaking.onnx", LEAKING)
    with pytest.raises(VerificationError, match="padding T from 2 to 4 changes the outputs by"):
        compile_model(options(leaking, tmp_path / "out", loop=None))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pad": {"x": 0.0}}, UsageError, "nothing says what fills input 'mask'"),
        ({"pad": {"x": 0.0, "mask": 0.0, "y": 1.0}}, UsageError, "no input 'y' has a bucketed dimension"),
        ({"buckets": {"S": (4, 8)}}, UsageError, "no dynamic dimension 'S'"),
        ({"loop": "M"}, UsageError, "no dynamic dimension 'M'"),
        ({"buckets": {"T": (1,)}}, DataError, "every sample is larger than the largest bucket"),
        ({"buckets": {"T": (4, 8, 12, 40)}}, DataError, "no sample is served by the function for T=40"),
        (
            {"data": [sample(8, seed) for seed in range(3)], "buckets": {"T": (8,)}},
            DataError,
            "every sample has exactly a bucket's size",
        ),
        (
            {"data": [sample(4, 0), sample(5, 1), sample(6, 2)]},
            DataError,
            "no two samples have the same shape",
        ),
        ({"buckets": {"T": tuple(range(1, 80))}}, UsageError, "at most 64 are compiled"),
    ],
)
def test_what_cannot_be_proven_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compile_model(options(model, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_report_says_what_is_shipped_and_what_memory_it_takes(bundle: Bundle) -> None:
    found = bundle.report["deployment"]
    names = [f["name"] for f in found["files"]]
    assert names == ["model.so", "model.txt", "libbitwright_runtime.so", "libtvm_runtime.so", "libtvm_ffi.so"]
    for record in found["files"]:
        assert record["bytes"] == (bundle.path / "lib" / record["name"]).stat().st_size
    assert found["bytes"] == sum(f["bytes"] for f in found["files"])
    page = (bundle.path / "report.html").read_text()
    assert 'id="deployment"' in page and "libtvm_runtime.so" in page and "Memory by layer" in page
    memory = {f["sizes"]["T"]: f["memory"] for f in found["functions"]}
    assert memory[4]["live_bytes"] < memory[12]["live_bytes"] <= memory[12]["peak_bytes"]
    counts = {length: len(found["layers"]) for length, found in memory.items()}
    assert len(set(counts.values())) == 1, f"functions are made of other kernels: {counts}"
    layers = [row["layer"] for row in memory[12]["layers"]]
    assert any(layer.startswith("MatMul") for layer in layers), layers

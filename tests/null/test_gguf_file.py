"""The file: what is written is read back, by us and by the gguf package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.errors import InternalError, ModelError
from bitwright.compiler.gguf import types
from bitwright.compiler.gguf.reader import GgufFile
from bitwright.compiler.gguf.rounding import dequantize, quantize
from bitwright.compiler.gguf.types import TYPES
from bitwright.compiler.gguf.values import (
    Typed,
    ValueType,
    boolean,
    float32,
    int32s,
    text,
    texts,
    uint32,
)
from bitwright.compiler.gguf.writer import PlannedTensor, write_gguf

METADATA = {
    "general.architecture": text("llama"),
    "general.name": text("Bücher und \N{SNOWMAN}"),
    "count": uint32(4_000_000_000),
    "share": float32(0.5),
    "yes": boolean(True),
    "tokens": texts(["a", "", "Ġthe", "\n"]),
    "kinds": int32s([1, -3, 2**31 - 1]),
    "small": Typed(ValueType.INT8, -7),
    "wide": Typed(ValueType.UINT64, 2**63),
    "exact": Typed(ValueType.FLOAT64, 0.1),
    "flags": Typed(ValueType.BOOL, [True, False]),
    "none": texts([]),
}


def weights(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def written(path: Path) -> tuple[list[PlannedTensor], dict[str, np.ndarray]]:
    """Write a file with a tensor of every type; returns what was planned and the stored bytes."""
    planned = [PlannedTensor(f"blk.0.{t.name}.weight", t, (3, 256)) for t in TYPES]
    planned.append(PlannedTensor("vector", types.F32, (5,)))
    stored: dict[str, np.ndarray] = {}

    def data_of(tensor: PlannedTensor) -> np.ndarray:
        stored[tensor.name] = quantize(weights(tensor.shape).reshape(-1, tensor.shape[-1]), tensor.kind)
        return stored[tensor.name]

    with path.open("wb") as file:
        size = write_gguf(file, METADATA, planned, data_of)
    assert size == path.stat().st_size
    assert list(stored) == [p.name for p in planned]
    return planned, stored


def test_a_file_is_read_back(tmp_path: Path) -> None:
    planned, stored = written(tmp_path / "a.gguf")
    with GgufFile(tmp_path / "a.gguf") as file:
        assert file.version == 3
        assert file.metadata == METADATA
        assert list(file.tensors) == [p.name for p in planned]
        for plan in planned:
            found = file.tensors[plan.name]
            assert (found.kind, found.shape, found.bytes) == (plan.kind, plan.shape, plan.bytes)
            assert found.offset % 32 == 0
            assert np.array_equal(file.stored(plan.name), stored[plan.name])
            values = dequantize(stored[plan.name], plan.kind).reshape(plan.shape)
            assert np.array_equal(file.array(plan.name), values)


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    planned, _ = written(tmp_path / "a.gguf")
    theirs = package.GGUFReader(tmp_path / "a.gguf")
    for key, typed in METADATA.items():
        if typed.value != []:
            assert theirs.get_field(key).contents() == typed.value, key
    with GgufFile(tmp_path / "a.gguf") as ours:
        for tensor, plan in zip(theirs.tensors, planned, strict=True):
            assert tensor.name == plan.name and tensor.tensor_type.name == plan.kind.name
            assert tuple(reversed(tensor.shape.tolist())) == plan.shape
            values = package.quants.dequantize(tensor.data, tensor.tensor_type).reshape(plan.shape)
            assert np.array_equal(ours.array(plan.name).view(np.uint32), values.view(np.uint32))


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    writer = package.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    values = weights((4, 64))
    kind = package.GGMLQuantizationType.Q4_0
    writer.add_tensor("x", package.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("y", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(tmp_path / "b.gguf") as file:
        assert file.value("general.architecture", str) == "llama"
        assert file.value("llama.block_count", int) == 2
        assert np.array_equal(file.array("y"), values)
        expected = package.quants.dequantize(package.quants.quantize(values, kind), kind)
        assert np.array_equal(file.array("x"), expected)


def test_missing_values_and_tensors_are_named(tmp_path: Path) -> None:
    written(tmp_path / "a.gguf")
    with GgufFile(tmp_path / "a.gguf") as file:
        with pytest.raises(ModelError, match=r"did you mean 'general\.name'"):
            file.value("general.nam", str)
        with pytest.raises(ModelError, match="'share' is float, not int"):
            file.value("share", int)
        with pytest.raises(ModelError, match="'yes' is bool, not int"):
            file.value("yes", int)
        with pytest.raises(ModelError, match="no tensor 'vectr'"):
            file.array("vectr")


def test_infinite_weights_in_a_file_are_refused(tmp_path: Path) -> None:
    plan = PlannedTensor("w", types.F32, (1, 4))
    values = np.array([[1, np.inf, 2, 3]], "<f4").view(np.uint8)
    with (tmp_path / "a.gguf").open("wb") as stream:
        write_gguf(stream, {}, [plan], lambda _: values)
    with GgufFile(tmp_path / "a.gguf") as file, pytest.raises(ModelError, match="'w' holds NaN or infinity"):
        file.array("w")


def test_a_plan_that_is_not_kept_is_a_bug_of_ours(tmp_path: Path) -> None:
    for plan in (
        PlannedTensor("w", types.Q4_0, (2, 33)),
        PlannedTensor("w" * 64, types.F32, (2, 4)),
        PlannedTensor("w", types.F32, (2, 4)),
    ):
        with (tmp_path / "a.gguf").open("wb") as stream, pytest.raises(InternalError):
            write_gguf(stream, {}, [plan], lambda _: np.zeros((1, 4), np.uint8))

"""Tied embeddings of models that are quantized part by part: table and head, in different parts, are one tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from llama_models import llama_model
from streaming_cases import TIED, arrays, feeds_of, logits, options, shared_recipe

from bitwright.compiler.deploy import quantize


def recipe_in(folder: Path, name: str) -> str:
    """Return a recipe: one of ours, or groups of four bits for all, rounded in some way."""
    if name.startswith("w"):
        return name
    (folder / "shared.yaml").write_text(shared_recipe(name))
    return str(folder / "shared.yaml")


@pytest.mark.parametrize("name", ["gptq", "nearest", "w3-small"])
def test_shared_table_is_that_of_a_run_at_once(name: str, tmp_path: Path) -> None:
    """The last recipe's files are smaller than what kernels read: streamed ones, too."""
    found = {}
    for way in ("off", "float"):
        (tmp_path / way).mkdir()
        asked = options(tmp_path / way, llama_model(TIED), TIED, recipe=recipe_in(tmp_path, name), stream=way)
        found[way] = quantize(asked)
    expected, stored = arrays(found["off"].model), arrays(found["float"].model)
    assert sorted(stored) == sorted(expected)
    for key, array in expected.items():
        assert stored[key].dtype == array.dtype
        np.testing.assert_array_equal(stored[key], array, err_msg=key)
    feeds = feeds_of(TIED)
    np.testing.assert_array_equal(logits(found["float"].model, feeds), logits(found["off"].model, feeds))
    ledgers = [{row["initializer"]: row["bytes"] for row in d.report["sizes"]} for d in found.values()]
    assert ledgers[0] == ledgers[1]
    assert found["float"].report["summary"]["bytes"] == found["off"].report["summary"]["bytes"]


def test_shared_table_is_in_the_file_once(tmp_path: Path) -> None:
    """Sequential calibration passes on what the rounded table gives; the head still reads that table's bytes."""
    asked = options(tmp_path, llama_model(TIED), TIED, recipe=recipe_in(tmp_path, "gptq"), stream="quantized")
    made = quantize(asked)
    model = onnx.load(made.model, load_external_data=False)
    large = [t for t in model.graph.initializer if np.prod(t.dims) == TIED.vocabulary * TIED.width]
    assert [t.name for t in large] == ["w_embedding_quantized"]
    readers = sorted(n.op_type for n in model.graph.node if large[0].name in n.input)
    assert readers == ["GatherBlockQuantized", "Transpose"]
    notes = [note for phase in made.report["phases"] for note in phase["notes"]]
    assert sum("reads the table 'w_embedding'" in note for note in notes) == 1
    rows = {row["node"]: row for row in made.report["layers"] if row["format"] == "w4"}
    assert len(rows) == 2 + 7 * TIED.layers
    # The head's errors are those of four bits: it does read its own table.
    exact = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = feeds_of(TIED)
    right = exact.run(["scores"], feeds)[0]
    noise = logits(made.model, feeds) - right
    assert np.sum(noise**2) < 0.2 * np.sum(right**2)  # 10.7 dB on random weights


def test_table_in_eight_bits_stays_beside_the_head(tmp_path: Path) -> None:
    """Two formats are two tensors, as in a run at once; the float model is not run for their scales."""
    made = quantize(options(tmp_path, llama_model(TIED), TIED, stream="float"))
    elements = TIED.vocabulary * TIED.width
    kinds = {name: a.dtype for name, a in arrays(made.model).items() if a.size == elements}
    assert sorted(map(str, kinds.values())) == ["int8", "uint4"]

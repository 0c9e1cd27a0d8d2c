"""Decoders out of Hugging Face folders compute in ONNX Runtime what the same decoders compute in numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from checkpoints import COMPARED, CheckpointSizes, compared_tokens, write_checkpoint

import bitwright
from bitwright.compiler import export_decoder
from bitwright.compiler.cli.app import main
from bitwright.compiler.errors import InternalError, ModelError, UsageError
from bitwright.compiler.export_decoder import ExportedDecoder, export_folder
from bitwright.compiler.hugging_face.checkpoint import open_checkpoint
from bitwright.compiler.hugging_face.names import Part
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.llama.recognise import recognise
from bitwright.compiler.llama.reference import logits
from bitwright.compiler.llama.tensors import in_halves, tensors_of
from bitwright.passes.normalize import normalize

# Float32 sums in another order; the logits are about one.
SINGLE = 2e-5


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def whole(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of sequences, shape (N, T, vocabulary)."""
    found: np.ndarray = session(path).run(["logits"], {"input_ids": tokens})[0]
    return found


def in_steps(path: Path, tokens: np.ndarray, steps: list[int]) -> np.ndarray:
    """Return the logits of sequences that are fed in pieces of these lengths, the cache handed on."""
    model = session(path)
    names = [o.name for o in model.get_outputs()]
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds: dict[str, np.ndarray] = {
        i.name: np.zeros((len(tokens), i.shape[1], 0, i.shape[3]), dtype[i.type])
        for i in model.get_inputs()[1:]
    }
    found, start = [], 0
    for step in steps:
        feeds["input_ids"] = tokens[:, start : start + step]
        results = dict(zip(names, model.run(names, feeds), strict=True))
        found.append(results.pop("logits"))
        feeds = {name.replace("present", "past"): value for name, value in results.items()}
        start += step
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("case", COMPARED)
def test_both_forms_compute_what_numpy_does(case: str, tmp_path: Path) -> None:
    sizes, dtype = COMPARED[case]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "folder", sizes, dtype=dtype, shards=2))
    tokens = compared_tokens(sizes)
    expected = logits(tokens, checkpoint.hyper, checkpoint.weight)
    plain = export_folder(checkpoint.folder, tmp_path / "plain.onnx", form="plain")
    cache = export_folder(checkpoint.folder, tmp_path / "cache.onnx", form="cache")
    assert plain.largest_difference is not None and plain.largest_difference < SINGLE
    # Two sequences at once, of which the second must not see the first.
    both = np.stack([tokens, tokens[::-1]])
    found = whole(plain.path, both)
    assert np.abs(found[0] - expected).max() < SINGLE
    steps = [20, *[1] * 18, 10]
    assert np.abs(in_steps(cache.path, both, steps) - found).max() < SINGLE


def test_half_precision_differs_by_its_rounding(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder", dtype="float16")
    checkpoint, tokens = open_checkpoint(folder), compared_tokens(CheckpointSizes())
    expected = logits(tokens, checkpoint.hyper, checkpoint.weight)
    export_folder(folder, tmp_path / "half.onnx", dtype="float16")
    found = in_steps(tmp_path / "half.onnx", tokens[None], [1] * len(tokens))[0]
    # Some twenty roundings of 2^-11 between input and logits of about one.
    assert 1e-5 < np.abs(found - expected).max() < 20 * 2.0**-11
    export_folder(folder, tmp_path / "single.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * (tmp_path / "single.onnx").stat().st_size


def test_files_of_the_tokenizer_come_along_and_replace_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder")
    (folder / "tokenizer.json").write_text('{"model": "\u00e9"}', encoding="utf-8")
    (folder / "generation_config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"\0")
    found = export_folder(folder, tmp_path / "out/model.onnx")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["generation_config.json", "model.onnx", "tokenizer.json"]
    assert {p.name for p in found.companions} == {"generation_config.json", "tokenizer.json"}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert export_folder(folder, tmp_path / "out/again.onnx").companions == (), "equal files stay"
    (tmp_path / "out/tokenizer.json").write_text("another's")
    with pytest.raises(UsageError, match="belongs to another model"):
        export_folder(folder, tmp_path / "out/third.onnx")
    assert not (tmp_path / "out/third.onnx").exists()
    (folder / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="not UTF-8"):
        export_folder(folder, tmp_path / "other/model.onnx")


def test_a_wrong_graph_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "folder")

    def wrong(*arguments: Any, **options: Any) -> ir.Model:
        model = right(*arguments, **options)
        next(n for n in model.graph if n.op_type == "Sigmoid").op_type = "Tanh"
        return model

    right = export_decoder.decoder_model
    monkeypatch.setattr(export_decoder, "decoder_model", wrong)
    with pytest.raises(InternalError, match="differ from the checkpoint's"):
        export_folder(folder, tmp_path / "out/model.onnx")
    assert not (tmp_path / "out").exists()


def test_values_that_are_no_numbers_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(part: Part) -> np.ndarray:
        values = np.ones(part.shape, np.float32)
        if part.gguf == "blk.1.ffn_down.weight":
            values[3, 5] = np.nan
        return values

    folder = write_checkpoint(tmp_path / "folder", arrays=broken)
    # As if it were too large for a check: the values are first seen while they are written.
    monkeypatch.setattr(export_decoder, "INLINE_LIMIT_BYTES", 0)
    with pytest.raises(ModelError, match=r"mlp\.down_proj\.weight' holds NaN"):
        export_folder(folder, tmp_path / "out/model.onnx")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, place = str(write_checkpoint(tmp_path / "folder")), str(tmp_path / "m.onnx")
    assert main(["export", folder, "-o", place, "--form", "plain", "--context", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["context"]) == ("LlamaForCausalLM", 32)
    assert found["largest_difference"] < SINGLE
    assert main(["export", folder, "-o", place]) == 0
    assert capsys.readouterr().out.split() == [place]
    assert main(["export", folder, "-o", place, "--context", "65"]) == 2
    assert main(["export", folder, "-o", place, "--opset", "20"]) == 2
    assert main(["export", "net.py:make", "-o", place, "--form", "plain"]) == 2
    assert main(["export", str(tmp_path), "-o", place]) == 3


def test_the_function_of_the_package(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder")
    found = bitwright.export(folder, output=tmp_path / "m.onnx", form="plain", context=16)
    assert isinstance(found, ExportedDecoder) and found.context == 16
    assert whole(found.path, np.arange(16)[None]).shape == (1, 16, 80)
    with pytest.raises(UsageError, match="opset"):
        bitwright.export(str(folder), output=tmp_path / "m.onnx", opset=20)
    with pytest.raises(UsageError):
        bitwright.export(tmp_path / "none", output=tmp_path / "m.onnx")


LARGE = CheckpointSizes(layers=6, width=768, heads=12, key_heads=4, feed_forward=3072, vocabulary=32000)
PEAK = """
import sys
from pathlib import Path
import bitwright
from bitwright.compiler import export_decoder
from bitwright.compiler.graph import saving

def memory(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) >> 10

# As if a quarter of a gigabyte were too much for one file and a check.
saving.INLINE_LIMIT_BYTES = export_decoder.INLINE_LIMIT_BYTES = 1 << 28
before = memory("VmRSS")
export_decoder.export_folder(Path(sys.argv[1]), Path(sys.argv[2]))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_weights_stream_into_external_data(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder", LARGE, shards=3)
    command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    data = (tmp_path / "model.onnx.data").stat().st_size
    assert data > 290 << 20 and (tmp_path / "model.onnx").stat().st_size < 1 << 20
    # Not even the largest tensor, the embedding in float32, is in memory as a whole.
    assert int(done.stdout) < (LARGE.vocabulary * LARGE.width * 4) >> 20, "MiB"
    model = ir.load(tmp_path / "model.onnx")
    checkpoint = open_checkpoint(folder)
    for name in ("blk.4.ffn_up.weight", "blk.5.attn_norm.weight"):
        part = checkpoint.parts[name]
        stored = model.graph.initializers[part.name].const_value
        assert stored is not None
        expected = checkpoint.read(part)
        assert np.array_equal(stored.numpy(), expected.T if expected.ndim == 2 else expected)


def folder_of(model: Path, folder: Path) -> Path:
    """Write an ONNX decoder as a Hugging Face folder."""
    source = read_model(model).model
    normalize(source)
    decoder = recognise(source)
    h, tensors = decoder.hyper, {t.name: t for t in tensors_of(decoder)}

    def arrays(part: Part) -> np.ndarray:
        values = tensors[part.gguf].load()
        return in_halves(values, part.heads) if part.heads else values

    sizes = CheckpointSizes(
        layers=h.layers, width=h.width, heads=h.heads, key_heads=h.key_heads, feed_forward=h.feed_forward,
        vocabulary=h.vocabulary, positions=h.context, base=h.base, epsilon=h.epsilon, tied=decoder.tied,
    )  # fmt: skip
    return write_checkpoint(folder, sizes, dtype="float32", arrays=arrays)


@pytest.mark.zoo
@pytest.mark.skipif("BITWRIGHT_ZOO" not in os.environ, reason="BITWRIGHT_ZOO is not set")
def test_a_trained_decoder_comes_back_as_it_was(tmp_path: Path) -> None:
    zoo = Path(os.environ["BITWRIGHT_ZOO"]) / "tinylm"
    folder = folder_of(zoo / "model.onnx", tmp_path / "folder")
    export_folder(folder, tmp_path / "cache.onnx")
    tokens = np.load(zoo / "data.npz")["test"].reshape(-1)[:128][None].astype(np.int64)
    expected = whole(zoo / "model.onnx", tokens)
    bound = 1e-5 * np.abs(expected).max()
    assert np.abs(in_steps(tmp_path / "cache.onnx", tokens, [100, *[1] * 28]) - expected).max() < bound
    ours, theirs = session(tmp_path / "cache.onnx"), session(zoo / "model_kv.onnx")
    assert [i.name for i in ours.get_inputs()] == [i.name for i in theirs.get_inputs()]
    assert [o.name for o in ours.get_outputs()] == [o.name for o in theirs.get_outputs()]

"""Decoders with masks and positions as inputs: what ``--unpadded`` makes of them, from the file to the text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from llama_models import Sizes
from masked_models import FORMS, MASK, POSITIONS, SIZES, Masked, MaskForm, masked_model

import bitwright
from bitwright.compiler import deploy, frontend
from bitwright.compiler.cli.app import main
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.deploy import Deployment, quantize
from bitwright.compiler.errors import BitwrightError, DataError, UsageError
from bitwright.compiler.gguf.reader import GgufFile
from bitwright.compiler.options import Options
from bitwright.compiler.ort.equality import rms_difference
from bitwright.compiler.ort.session import callable_model, open_session, run
from bitwright.compiler.to_gguf.export import Request, export_gguf
from bitwright.compiler.unpadded import with_masks
from bitwright.passes.assume_unpadded import AssumeUnpadded
from bitwright.passes.fuse_decoder_attention import FuseDecoderAttention
from bitwright.passes.normalize import normalize
from bitwright.targets.loader import load_profile

# The same products in another order: 2^-24 times a few hundred terms, over two layers.
CLOSE = 2e-5
WINDOW = 12


def feeds(model: ir.Model, new: int, past: int = 0, batch: int = 1) -> dict[str, np.ndarray]:
    """Return random tokens and caches, with the mask and the positions of sequences without padding."""
    random = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.name is not None
        if len(value.shape) == 4:
            shape = (batch, value.shape[1], past, value.shape[3])
            found[value.name] = random.standard_normal(shape).astype(np.float32)
        elif value.name == "input_ids":
            found[value.name] = random.integers(0, 48, (batch, new))
    return with_masks(model, found)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_unpadded_sequences_get_the_same_results(form: MaskForm, positions: bool, cache: bool) -> None:
    sizes = replace(SIZES, cache=cache, computed_angles=form != "triangle")
    model = ir.from_proto(masked_model(Masked(sizes, form, positions)))
    plain = model.clone()
    AssumeUnpadded().run(plain)
    fused = plain.clone()
    normalize(fused, 20)
    assert FuseDecoderAttention().run(fused).changed == 2
    calls = [(5, 0, 1), (4, 0, 2), *([(1, 5, 1), (3, 4, 1), (1, 6, 3)] if cache else [])]
    for new, past, batch in calls:
        given = feeds(model, new, past, batch)
        expected = run(open_session(model), given)
        assert rms_difference(expected, run(open_session(plain), given)) == 0.0
        assert rms_difference(expected, run(open_session(fused), given)) < CLOSE


def test_padding_is_what_is_lost() -> None:
    """On the left, padding moves positions: the graph as exported sees to it, the one without a mask cannot."""
    model = ir.from_proto(masked_model())
    alone = feeds(model, 4)
    padded = feeds(model, 6)
    padded["input_ids"][:, 2:] = alone["input_ids"]
    padded[MASK][:, :2] = 0
    padded[POSITIONS] = np.array([[1, 1, 0, 1, 2, 3]])
    expected = run(open_session(model), alone)["logits"]
    found = run(open_session(model), padded)["logits"][:, 2:]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    AssumeUnpadded().run(model)
    without = run(open_session(model), padded)["logits"][:, 2:]
    assert np.abs(without - expected).max() > 0.1 * np.abs(expected).max()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a model, a config.json as exporters leave it, and tokens."""
    onnx.save(masked_model(), tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 40, "rope_scaling": None}))
    np.savez(tmp_path / "tokens.npz", tokens=np.random.default_rng(1).integers(0, 257, 400))
    return tmp_path


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longest: comparing the result's time with the float model's."""
    monkeypatch.setattr(deploy, "_time", lambda c, notes: None)


def asked(folder: Path, **changes: object) -> Options:
    given: dict[str, object] = {
        "model": folder / "model.onnx",
        "target": "host",
        "data": f"{folder / 'tokens.npz'}:tokens,window={WINDOW},windows=6",
        "recipe": "w4",
        "output": folder / "q" / "q.onnx",
        "unpadded": True,
        "gate": False,
    }
    (folder / "q").mkdir(exist_ok=True)
    return Options(**{**given, **changes})  # type: ignore[arg-type]


def notes_of(made: Deployment, phase: str) -> str:
    phases: list[dict[str, object]] = made.report["phases"]  # type: ignore[assignment]
    return " ".join(str(note) for p in phases if p["name"] == phase for note in p["notes"])  # type: ignore[attr-defined]


def operators(path: Path) -> list[str]:
    return [node.op_type for node in ir.load(path).graph]


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("cache", [None, "int8"])
def test_an_export_becomes_the_fast_int4_decoder(folder: Path, cache: str | None) -> None:
    metric = f"perplexity:{folder / 'tokens.npz'}:tokens,window={WINDOW},windows=8"
    made = quantize(asked(folder, kv_cache=cache, evaluate=metric))
    found = operators(made.model)
    assert found.count("GroupQueryAttention") == 2 and not {"Softmax", "Cos", "Sin"} & set(found)
    assert found.count("SkipSimplifiedLayerNormalization") == 5
    model = ir.load(made.model)
    # One product for queries, keys and values, four others of each layer, the head and the embedding beside it.
    assert [v.dtype for v in model.graph.initializers.values()].count(ir.DataType.UINT4) >= 2 * (2 * 5 + 1)
    assert [v.name for v in model.graph.inputs] == [
        "input_ids", *(f"past_key_values_{n}_{part}" for n in range(2) for part in ("key", "value"))
    ]  # fmt: skip
    assert "--unpadded: 'attention_mask' and 'position_ids' are computed" in notes_of(made, "ingest")
    assert "largest relative difference to the input model: 0.00e+00" in notes_of(made, "normalize")
    assert model.metadata_props["context_length"] == "40"
    # Weights of 4 bits move logits by some percent, and the perplexity of random tokens hardly at all.
    before, after = (bitwright.evaluate(p, metric).value for p in (folder, made.model))
    assert after == pytest.approx(before, rel=0.2)
    text = bitwright.generate(made.model, tokens=[3, 1, 4], max_tokens=60)
    assert text.cached and text.reason == "context" and len(text.tokens) == 40 - 3 + 1


@pytest.mark.usefixtures("untimed")
def test_without_the_option_the_report_names_it(folder: Path) -> None:
    made = quantize(asked(folder, unpadded=False))
    assert "GroupQueryAttention" not in operators(made.model)
    said = notes_of(made, "fuse")
    assert "the model takes 'attention_mask' and 'position_ids'; if no sequence is ever padded" in said
    with pytest.raises(UsageError, match="cannot be fused") as caught:
        quantize(asked(folder, unpadded=False, kv_cache="int8"))
    assert "--unpadded" in caught.value.fix


@pytest.mark.usefixtures("untimed")
def test_part_by_part(folder: Path) -> None:
    made = quantize(asked(folder, stream="quantized"))
    found = operators(made.model)
    assert found.count("GroupQueryAttention") == 2 and MASK not in {
        v.name for v in ir.load(made.model).graph.inputs
    }


def test_the_command_line_takes_it(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = f"{folder / 'tokens.npz'}:tokens,window={WINDOW},windows=4"
    command = [
        "quantize",
        str(folder / "model.onnx"),
        "-t",
        "host",
        "-d",
        data,
        "--recipe",
        "w4",
        "--no-gate",
    ]
    assert main([*command, "--unpadded", "-o", str(folder / "q.onnx")]) == 0
    capfd.readouterr()
    assert operators(folder / "q.onnx").count("GroupQueryAttention") == 2


def test_generation_needs_no_option(folder: Path) -> None:
    """Without caches of its own the text is that of the graph in which everything is spelled out."""
    plain = ir.from_proto(masked_model())
    AssumeUnpadded().run(plain)
    ir.save(plain, folder / "plain.onnx")
    first, second = (
        bitwright.generate(folder / name, tokens=[5, 6, 7], max_tokens=20)
        for name in ("model.onnx", "plain.onnx")
    )
    assert first.tokens == second.tokens and len(first.tokens) == 20


def test_gguf_files_state_the_context(folder: Path) -> None:
    sizes = Sizes(width=256, feed_forward=256, vocabulary=64, cache=True, computed_angles=True)
    onnx.save(masked_model(Masked(sizes)), folder / "model.onnx")
    written = export_gguf(
        Request(folder / "model.onnx", folder / "m.gguf", kind="Q8_0", without_tokenizer=True)
    )
    assert written.proof < 1e-5
    assert GgufFile(written.path).metadata["llama.context_length"].value == 40


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """Return sequences as tokenizers give them; caches are left out."""
    ids = np.random.default_rng(2).integers(0, 257, (4, 9))
    positions = np.tile(np.arange(9), (4, 1))
    return {"input_ids": ids, MASK: np.ones_like(ids), POSITIONS: positions, **changes}


def ingested(options: Options) -> Compilation:
    """Read model and data, and nothing more."""
    c = Compilation(options, load_profile("host"))
    frontend.ingest(c, [])
    return c


def test_arrays_of_a_tokenizer_are_data(folder: Path) -> None:
    np.savez(folder / "arrays.npz", **arrays())  # type: ignore[arg-type]
    only_tokens = {"input_ids": arrays()["input_ids"]}
    for data in (
        str(folder / "arrays.npz"),
        arrays(),
        only_tokens,
        [{k: v[:1] for k, v in arrays().items()}] * 4,
    ):
        c = ingested(asked(folder, data=data))
        assert c.dataset is not None and c.source is not None and len(c.dataset) == 4
        batch = next(iter(c.dataset.batches(4)))
        assert list(batch) == [v.name for v in c.source.model.graph.inputs]
        np.testing.assert_array_equal(batch["input_ids"][0], arrays()["input_ids"][0])
        assert batch["past_key_values_0_key"].shape == (4, 2, 0, 16)


def test_samples_with_caches_are_data(folder: Path) -> None:
    model = ir.from_proto(masked_model())
    samples = [feeds(model, 4, 3) for _ in range(3)]
    c = ingested(asked(folder, data=samples))
    assert c.dataset is not None
    assert next(iter(c.dataset))["past_key_values_0_key"].shape == (1, 2, 3, 16)
    del samples[1]["past_key_values_1_key"]
    with pytest.raises(DataError, match="no array for input 'past_key_values_1_key'"):
        ingested(asked(folder, data=samples))


LEFT = np.ones((4, 9), np.int64)
LEFT[2, :3] = 0


@pytest.mark.parametrize("form", ["npz", "memory", "validation", "context"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {MASK: LEFT},
            "sample 2, input 'attention_mask': element [0, 0] is 0, where nobody is said to be padded",
        ),
        ({POSITIONS: np.tile(np.arange(1, 10), (4, 1))}, "positions are not 0 to 8, as without padding"),
        ({MASK: np.ones((4, 8), np.int64)}, "covers 8 positions, tokens and cache have 9"),
        ({MASK: np.ones((4, 9), np.int32)}, "is int32, the model needs int64"),
        ({POSITIONS: np.tile(np.arange(8), (4, 1))}, "positions are not 0 to 8"),
    ],
)
def test_padded_data_is_refused(
    folder: Path, changes: Mapping[str, np.ndarray], words: str, form: str
) -> None:
    given = arrays(**changes)
    np.savez(folder / "arrays.npz", **given)  # type: ignore[arg-type]
    options = {
        "npz": lambda: asked(folder, data=str(folder / "arrays.npz")),
        "memory": lambda: asked(folder, data=given),
        "validation": lambda: asked(folder, validation=str(folder / "arrays.npz")),
        "context": lambda: asked(folder, data=given, context=32, unpadded=False),
    }[form]()
    with pytest.raises(DataError) as caught:
        ingested(options)
    assert words in str(caught.value)


def test_a_model_without_a_mask_refuses_padded_calls(folder: Path) -> None:
    """A metric of the user's own may still give masks; what they hide must not be counted in silence."""
    model = ir.from_proto(masked_model())
    given = feeds(model, 6)
    AssumeUnpadded().run(model)
    call = callable_model(open_session(model))
    assert call(given)["logits"].shape == (1, 6, 257)
    given[MASK][0, 1] = 0
    with pytest.raises(DataError, match="takes no 'attention_mask'"):
        call(given)


def test_models_without_masks_need_no_option(folder: Path) -> None:
    model = ir.from_proto(masked_model())
    AssumeUnpadded().run(model)
    ir.save(model, folder / "model.onnx")
    with pytest.raises(UsageError, match="takes no 'attention_mask'") as caught:
        quantize(asked(folder))
    assert caught.value.where == "--unpadded"


def test_what_is_no_decoder_is_refused(folder: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
    with pytest.raises(BitwrightError, match="not a decoder") as caught:
        quantize(asked(folder, data={"x": np.ones((4, 3), np.float32)}))
    assert caught.value.where.startswith("--unpadded")


@pytest.mark.usefixtures("untimed")
def test_masks_of_a_fused_attention(folder: Path) -> None:
    """Graphs of ONNX Runtime's own exporters count the mask for their GroupQueryAttention."""
    model = ir.from_proto(masked_model())
    AssumeUnpadded().run(model)
    normalize(model, 20)
    FuseDecoderAttention().run(model)
    given = feeds(model, 3, 4)
    expected = run(open_session(model), given)["logits"]
    onnx.save(counting_the_mask(ir.to_proto(model)), folder / "model.onnx")
    with pytest.raises(UsageError, match="'attention_mask'") as caught:
        quantize(asked(folder, unpadded=False, recipe="w8", kv_cache="float16"))
    assert "--unpadded" in caught.value.fix
    made = quantize(asked(folder, recipe="w8", kv_cache="float16"))
    after = ir.load(made.model)
    assert [v.name for v in after.graph.inputs] == [v.name for v in model.graph.inputs]
    halves = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in given.items()}
    # Steps of 8 bits in every weight are some tenths of a percent.
    assert rms_difference({"logits": expected}, run(open_session(after), halves)) < 0.03


def counting_the_mask(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let attention count its tokens along a mask instead of from sizes."""
    text = """
        <ir_version: 8, opset_import: ["": 20]>
        g (int64[N, S] attention_mask) => (int32[N] last, int32 total) {
            axis = Constant<value = int64[1] {1}>()
            one = Constant<value = int64 {1}>()
            sum = ReduceSum<keepdims=0>(attention_mask, axis)
            last64 = Sub(sum, one)
            last = Cast<to=6>(last64)
            sizes = Shape(attention_mask)
            whole = Gather(sizes, one)
            total = Cast<to=6>(whole)
        }"""
    counted = onnx.compose.add_prefix(onnx.parser.parse_model(text), "mask_")
    counted.graph.input[0].name = counted.graph.node[2].input[0] = MASK
    counted.graph.node[5].input[0] = MASK
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[5:7] = ["mask_last", "mask_total"]
    model.graph.input.extend(counted.graph.input)
    nodes = [*counted.graph.node, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model

"""Decoders with ONNX Runtime's fused operators compute what they did spelled out, for prompts and token by token."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from checkpoints import CheckpointSizes, write_checkpoint
from llama_models import Sizes, llama_model
from llama_operators import SPELLINGS, operator_model

from bitwright.compiler import accuracy, deploy, fusion
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.deploy import Deployment, quantize
from bitwright.compiler.errors import AccuracyGateError, DataError, UsageError
from bitwright.compiler.fusion import narrowed
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.hugging_face.checkpoint import open_checkpoint
from bitwright.compiler.hugging_face.graph import decoder_model
from bitwright.compiler.options import Options
from bitwright.compiler.ort.accuracy import Accuracy
from bitwright.compiler.ort.equality import rms_difference
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.ort.timing import PairedTiming
from bitwright.passes.fuse_decoder_attention import FuseDecoderAttention
from bitwright.passes.fuse_skip_norms import FuseSkipNorms
from bitwright.passes.join_attention_inputs import JoinAttentionInputs
from bitwright.passes.narrow_cache import NarrowCache, cache_type
from bitwright.passes.normalize import normalize
from bitwright.targets.loader import load_profile

# Both forms compute in float32 and order sums differently: 2^-24 times a few hundred terms, over two layers.
CLOSE = 2e-5
# Half precision rounds queries, keys, values and results to 11 bits.
CLOSE_IN_HALF = 3e-3
PLAIN = {
    "tables": Sizes(),
    "computed angles": Sizes(computed_angles=True),
    "scaled on both sides, mask selects": Sizes(fused_attention=True),
    "as many key heads": Sizes(key_heads=4),
    "one key head": Sizes(key_heads=1),
    "another scale": Sizes(scale=0.3),
    "head of its own": Sizes(tied=False, layers=3),
}
CACHED = {
    "llama": CheckpointSizes(),
    "biases": CheckpointSizes(architecture="Qwen2ForCausalLM"),
    "scaled angles": CheckpointSizes(
        rope={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "wide heads": CheckpointSizes(head_width=32, key_heads=1, tied=False),
}
STEPS = (FuseDecoderAttention(), FuseSkipNorms(), JoinAttentionInputs())


def fused(model: ir.Model) -> tuple[ir.Model, list[int]]:
    """Return a rewritten copy and how often each pass fired; on its own output none fires."""
    copy = model.clone()
    changed = [step.run(copy).changed for step in STEPS]
    assert [step.run(copy).changed for step in STEPS] == [0, 0, 0]
    return copy, changed


def plain(sizes: Sizes) -> ir.Model:
    model = ir.from_proto(llama_model(sizes))
    normalize(model, 20)
    return model


def cached(folder: Path, sizes: CheckpointSizes | None = None, dtype: str = "float32") -> ir.Model:
    source = open_checkpoint(write_checkpoint(folder, sizes or CheckpointSizes(), dtype="float32"))
    model = decoder_model(source, "cache", dtype)  # type: ignore[arg-type]
    normalize(model, 20)
    return model


def feeds(model: ir.Model, new: int, past: int = 0, batch: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random tokens, and random caches of the types that the model takes."""
    random = np.random.default_rng(seed)
    found = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        if len(value.shape) == 2:
            found[value.name] = random.integers(0, 48, (batch, new))
        else:
            shape = (batch, value.shape[1], past, value.shape[3])
            found[value.name] = random.standard_normal(shape).astype(value.dtype.numpy())  # type: ignore[arg-type]
    return found


def difference(before: ir.Model, after: ir.Model, given: dict[str, np.ndarray]) -> float:
    return rms_difference(run(open_session(before), given), run(open_session(after), given))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("name", PLAIN)
def test_decoders_without_a_cache(name: str) -> None:
    model = plain(PLAIN[name])
    after, changed = fused(model)
    layers = PLAIN[name].layers
    assert changed == [layers, 2 * layers + 1, layers]
    assert "Softmax" not in operators(after) and "Where" not in operators(after)
    assert max(difference(model, after, feeds(model, new)) for new in (1, 9, 32)) < CLOSE


@pytest.mark.parametrize("name", CACHED)
def test_decoders_with_a_cache(tmp_path: Path, name: str) -> None:
    model = cached(tmp_path, CACHED[name])
    after, changed = fused(model)
    assert changed == [2, 5, 2]
    assert [v.name for v in after.graph.inputs] == [v.name for v in model.graph.inputs]
    assert [v.name for v in after.graph.outputs] == [v.name for v in model.graph.outputs]
    for new, past in ((6, 0), (1, 6), (4, 3), (1, 63)):
        assert difference(model, after, feeds(model, new, past)) < CLOSE


@pytest.mark.parametrize(
    "name", [name for name, spelling in SPELLINGS.items() if spelling.attention == "Attention"]
)
def test_attention_of_opset_23(name: str) -> None:
    model = ir.from_proto(operator_model(SPELLINGS[name], Sizes(cache=True)))
    normalize(model, 20)
    after, changed = fused(model)
    assert changed == [2, 5, 2] and "Attention" not in operators(after)
    assert max(difference(model, after, feeds(model, *sizes)) for sizes in ((5, 0), (1, 5), (3, 4))) < CLOSE


def test_the_cache_of_one_call_is_the_past_of_the_next(tmp_path: Path) -> None:
    model = cached(tmp_path)
    after, _ = fused(model)
    sessions = [open_session(m) for m in (model, after)]
    first = feeds(model, 5)
    results = [run(session, first) for session in sessions]
    for token in (7, 3, 40):
        given = [
            {
                k: np.array([[token]]) if k == "input_ids" else found[k.replace("past", "present")]
                for k in first
            }
            for found in results
        ]
        results = [run(session, g) for session, g in zip(sessions, given, strict=True)]
        assert rms_difference(*results) < CLOSE
    assert results[1]["present_1_v"].shape[2] == 8


def test_several_sequences(tmp_path: Path) -> None:
    model = cached(tmp_path)
    after, _ = fused(model)
    for new, past in ((6, 0), (1, 5)):
        assert difference(model, after, feeds(model, new, past, batch=3)) < CLOSE
    # What docs/language-models.md says: prompts of several sequences start from an empty cache.
    with pytest.raises(DataError, match="batch_size must be 1"):
        run(open_session(after), feeds(model, 3, 5, batch=2))


def test_padding_behind_a_prompt_changes_nothing_before_it(tmp_path: Path) -> None:
    after, _ = fused(cached(tmp_path))
    session = open_session(after)
    together = feeds(after, 6, batch=2)
    short = {k: v[:1, :4] if k == "input_ids" else v[:1] for k, v in together.items()}
    padded, alone = run(session, together)["logits"], run(session, short)["logits"]
    assert rms_difference({"logits": alone}, {"logits": padded[:1, :4]}) < CLOSE


def test_a_cache_in_half_precision_keeps_its_type(tmp_path: Path) -> None:
    model = cached(tmp_path, dtype="float16")
    after, changed = fused(model)
    assert changed == [2, 5, 2]
    assert {v.dtype for v in after.graph.inputs} == {ir.DataType.INT64, ir.DataType.FLOAT16}
    assert max(difference(model, after, feeds(model, *sizes)) for sizes in ((6, 0), (1, 9))) < CLOSE_IN_HALF


@pytest.mark.parametrize(("kind", "bound"), [("float16", 3e-3), ("int8", 0.03), ("int4", 0.4)])
def test_narrow_caches(tmp_path: Path, kind: str, bound: float) -> None:
    """Errors relative to the output: of 11, 8 and 4 bits, of which 127 and 7 steps are used, half a step at most."""
    model, _ = fused(cached(tmp_path))
    wide = feeds(model, 5)
    before = run(open_session(model), wide)
    largest = {
        f"past_{k}": np.abs(before[f"present_{k}"]).max(axis=(0, 2)) for k in ("0_k", "0_v", "1_k", "1_v")
    }
    narrow = model.clone()
    step = NarrowCache(cache_type(kind), largest)
    assert step.run(narrow).changed == 2 and step.run(narrow).changed == 0
    session = open_session(narrow)
    given = feeds(narrow, 5)
    found = run(session, given)
    assert rms_difference({"logits": before["logits"]}, {"logits": found["logits"]}) < bound
    stored = found["present_1_k"]
    assert stored.dtype == {"float16": np.float16, "int8": np.int8, "int4": np.uint8}[kind]
    assert stored.shape == (1, 2, 5, 8 if kind == "int4" else 16)
    if kind == "int8":
        # Behind the first layer's keys nothing was rounded yet.
        back = found["present_0_k"] * (largest["past_0_k"] / 127)[None, :, None]
        assert np.abs(back - before["present_0_k"]).max() <= largest["past_0_k"].max() / 127 * 0.501
    after = run(
        session,
        {k: v[:, :1] if k == "input_ids" else found[k.replace("past", "present")] for k, v in given.items()},
    )
    assert after["present_0_v"].shape[2] == 6 and np.isfinite(after["logits"]).all()


def test_a_channel_that_is_always_zero_has_a_scale(tmp_path: Path) -> None:
    model, _ = fused(cached(tmp_path))
    NarrowCache("int8", {f"past_{n}_{p}": np.zeros((2, 16), np.float32) for n in (0, 1) for p in "kv"}).run(
        model
    )
    assert np.isfinite(run(open_session(model), feeds(model, 4))["logits"]).all()


def test_masks_that_depend_on_tokens_are_left_alone() -> None:
    proto = llama_model()
    mask = next(n for n in proto.graph.node if n.op_type == "Where")
    mask.output[0] = "causal"
    at = list(proto.graph.node).index(mask) + 1
    for node in (
        onnx.helper.make_node("Cast", ["ids"], ["ids_float"], to=1),
        onnx.helper.make_node("Neg", ["ids_float"], ["penalty"]),
        onnx.helper.make_node("Add", ["causal", "penalty"], ["mask"]),
    ):
        proto.graph.node.insert(at, node)
        at += 1
    model = ir.from_proto(proto)
    normalize(model, 20)
    result = FuseDecoderAttention().run(model)
    assert result.changed == 0 and "what is in the input 'ids'" in result.notes[0]


def test_networks_that_are_no_decoders_are_left_alone() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 4, 8] x) => (float[1, 4, 8] y) { s = Softmax<axis=-1>(x) y = Mul(s, x) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert [step.run(model).changed for step in STEPS] == [0, 0, 0]
    assert FuseDecoderAttention().run(model).notes == ()


def options(folder: Path, recipe: str = "w4", **more: object) -> Options:
    """Return options for a decoder with a cache."""
    model = folder / "m.onnx"
    if not model.exists():
        sizes = replace(CheckpointSizes(), feed_forward=128)
        checkpoint = open_checkpoint(write_checkpoint(folder, sizes, dtype="float32"))
        save_model(decoder_model(checkpoint, "cache"), model)
    samples = [feeds(ir.load(model), 8, 4, seed=k) for k in range(4)]
    more = {"target": "x86-avx512-vnni", "data": samples, "recipe": recipe, "gate": False, **more}
    return Options(model, output=folder / "q.onnx", **more)  # type: ignore[arg-type]


def notes_of(made: Deployment, phase: str) -> str:
    phases = made.report["phases"]
    assert isinstance(phases, list)
    return "; ".join(next(p["notes"] for p in phases if p["name"] == phase))


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longest: comparing the result's time with the float model's."""
    monkeypatch.setattr(deploy, "_time", lambda c, notes: None)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("recipe", ["w4", "int8", "w3"])
def test_quantized_decoders_are_fused(tmp_path: Path, recipe: str) -> None:
    made = quantize(options(tmp_path, recipe))
    model = ir.load(made.model)
    assert operators(model).count("GroupQueryAttention") == 2
    assert "2 attentions became GroupQueryAttention" in notes_of(made, "fuse")
    exact = ir.load(tmp_path / "m.onnx")
    given = feeds(model, 4, 6)
    # The bits of the weights alone decide how far it is from float: 3 bits are a few per cent of random weights' sums.
    assert difference(exact, model, given) < {"w3": 0.5, "w4": 0.3}.get(recipe, 0.06)


def test_the_cache_is_narrowed_and_the_metric_measured_again(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 48, 200)
    np.savez(tmp_path / "tokens.npz", test=tokens)
    metric = f"perplexity:{tmp_path / 'tokens.npz'},window=24"
    narrow = quantize(options(tmp_path, evaluate=metric, kv_cache="int4"))
    line = r"perplexity [\d.]+ in float, ([\d.]+) quantized"
    first, last = (re.search(line, notes_of(narrow, phase)) for phase in ("accuracy", "fuse"))
    assert first is not None and last is not None and float(first[1]) != float(last[1])
    assert float(last[1]) == pytest.approx(-narrow.report["accuracy"]["quantized_value"], rel=1e-4)  # type: ignore[index]
    assert "the cache holds int4: 64 bytes a token, not 512" in notes_of(narrow, "fuse")
    assert {v.dtype for v in ir.load(narrow.model).graph.inputs} == {ir.DataType.INT64, ir.DataType.UINT8}
    # Had the model been better before, the bound would not hold any more.
    asked = options(tmp_path, evaluate=metric, max_drop=0.01)
    c = Compilation(asked, load_profile(asked.target))
    c.accuracy, c.quantized = Accuracy(-100.0, -100.0, "perplexity"), ir.load(narrow.model)
    with pytest.raises(AccuracyGateError, match="the metric drops by 24"):
        accuracy.remeasure(c, [])


def test_the_next_token_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which form is faster is the machine's word; what is written must follow it, and the report must say so."""
    for ratio, adopted in ((0.5, True), (1.0, False)):
        monkeypatch.setattr(
            fusion, "time_reopened", lambda *_, r=ratio, **__: PairedTiming(r, 0.0, r, 1.0, 1)
        )
        made = quantize(options(tmp_path, gate=True))
        assert f"takes {ratio:.2f} of the time of one token behind 63" in notes_of(made, "fuse")
        assert ("GroupQueryAttention" in operators(ir.load(made.model))) == adopted
        timing = made.report["timing"]["onnxruntime"]  # type: ignore[index]
        assert timing["what"] == ("one token behind 63" if adopted else "")
        assert ("nothing would be gained" in notes_of(made, "fuse")) != adopted


@pytest.mark.usefixtures("untimed")
def test_positions_that_start_at_zero_behind_a_cache_are_found_out(tmp_path: Path) -> None:
    """This decoder appends to its cache, but turns every new token as if it were the first."""
    model = tmp_path / "m.onnx"
    onnx.save(llama_model(Sizes(cache=True)), model)
    samples = [feeds(ir.load(model), 1, 4, seed=k) for k in range(4)]
    asked = Options(
        model, target="x86-avx512-vnni", data=samples, recipe="w4", gate=False, output=tmp_path / "q.onnx"
    )
    made = quantize(asked)
    assert "attention is left as it was: with 1 tokens behind 5" in notes_of(made, "fuse")
    assert "Softmax" in operators(ir.load(made.model))
    with pytest.raises(UsageError, match="cannot be fused: with 1 tokens"):
        quantize(replace(asked, kv_cache="int8"))


@pytest.mark.usefixtures("untimed")
def test_caches_of_attention_that_was_fused_before(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    onnx.save(operator_model(SPELLINGS["group query that rotates"], Sizes(cache=True)), model)
    samples = [feeds(ir.load(model), 8, 4, seed=k) for k in range(4)]
    made = quantize(
        Options(
            model,
            "x86-avx512-vnni",
            data=samples,
            recipe="w8",
            gate=False,
            kv_cache="int8",
            output=tmp_path / "q.onnx",
        )
    )
    after = ir.load(made.model)
    assert {v.dtype for v in after.graph.inputs} == {ir.DataType.INT64, ir.DataType.INT8}
    given = feeds(ir.load(model), 8)
    empty = narrowed([given], after)[0]
    before, found = run(open_session(ir.load(model)), given), run(open_session(after), empty)
    # 3 % are the weights'; the rest are keys larger than any of the 48 that the scales were learned from.
    assert rms_difference({"scores": before["scores"]}, {"scores": found["scores"]}) < 0.1


@pytest.mark.usefixtures("untimed")
def test_caches_that_cannot_be_narrowed_are_refused(tmp_path: Path) -> None:
    onnx.save(llama_model(), tmp_path / "m.onnx")
    given = options(tmp_path, kv_cache="int8")
    with pytest.raises(UsageError, match="the model keeps no cache"):
        quantize(given)
    with pytest.raises(UsageError, match="needs other hardware"):
        quantize(replace(given, target="nvidia-h100"))
    with pytest.raises(UsageError, match="unknown type of a cache 'int2'"):
        options(tmp_path, kv_cache="int2")


@pytest.mark.usefixtures("untimed")
def test_products_of_different_formats_stay_apart(tmp_path: Path) -> None:
    made = quantize(options(tmp_path, keep_float=frozenset({"model.layers.0.self_attn.k_proj"})))
    assert "2 attentions became GroupQueryAttention, 1 of them with one product" in notes_of(made, "fuse")

"""Decoders with norms of query and key heads, and with windows of attention: fused, cached, rotated, the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import COMPARED, CheckpointSizes, compared_tokens, write_checkpoint
from pass_harness import check_pass

from bitwright.compiler import fixed_cache, fusion
from bitwright.compiler.errors import UsageError
from bitwright.compiler.hugging_face.checkpoint import open_checkpoint
from bitwright.compiler.hugging_face.graph import FloatName, Form, decoder_model
from bitwright.compiler.llama.recognise import recognise
from bitwright.compiler.ort.equality import rms_difference
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import CachedAttention
from bitwright.passes.fix_cache import FixCache, telling_length
from bitwright.passes.fix_dims import FixDims
from bitwright.passes.fuse_decoder_attention import FuseDecoderAttention, sights
from bitwright.passes.fuse_skip_norms import FuseSkipNorms
from bitwright.passes.infer_shapes import InferShapes
from bitwright.passes.join_attention_inputs import JoinAttentionInputs
from bitwright.passes.narrow_cache import NarrowCache, cache_type
from bitwright.passes.normalize import normalize
from bitwright.passes.rotate_residual import RotateResidual

# Float32 sums in another order, over two layers.
CLOSE = 2e-5
# Three matrix products in float32 where there was one.
ROTATED = 1e-4
# Half precision rounds queries, keys, values and results to 11 bits.
CLOSE_IN_HALF = 3e-3
QWEN3 = CheckpointSizes(architecture="Qwen3ForCausalLM", head_width=32, epsilon=1e-6)
CASES = [name for name in COMPARED if "qwen3" in name or "window" in name]


def decoder(
    folder: Path, sizes: CheckpointSizes = QWEN3, form: Form = "cache", dtype: FloatName = "float32"
) -> ir.Model:
    checkpoint = open_checkpoint(write_checkpoint(folder, sizes, dtype="float32"))
    model = decoder_model(checkpoint, form, dtype)
    normalize(model, 20)
    return model


def feeds(model: ir.Model, new: int, past: int = 0) -> dict[str, np.ndarray]:
    """Return random tokens, and random caches."""
    random = np.random.default_rng(0)
    found = {model.graph.inputs[0].name or "": random.integers(0, 80, (1, new))}
    for value in model.graph.inputs[1:]:
        assert value.shape is not None and value.dtype is not None
        cache = random.standard_normal((1, value.shape[1], past, value.shape[3]))  # type: ignore[arg-type]
        found[value.name or ""] = cache.astype(value.dtype.numpy())
    return found


def difference(before: ir.Model, after: ir.Model, given: dict[str, np.ndarray]) -> float:
    return rms_difference(run(open_session(before), given), run(open_session(after), given))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("form", ["cache", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_fused(case: str, form: Form, tmp_path: Path) -> None:
    sizes = COMPARED[case][0]
    model = decoder(tmp_path, sizes, form)
    after = model.clone()
    steps = (FuseDecoderAttention(), FuseSkipNorms(), JoinAttentionInputs())
    normalized = "qwen3" in case
    # Two norms a layer and one before the head; those of heads make four. What is normalized cannot be one product.
    expected = [sizes.layers, (4 if normalized else 2) * sizes.layers + 1, 0 if normalized else sizes.layers]
    assert [step.run(after).changed for step in steps] == expected
    assert [step.run(after).changed for step in steps] == [0, 0, 0]
    assert "Softmax" not in operators(after) and "ReduceMean" not in operators(after)
    for lengths in ((6, 0), (40, 0)) if form == "plain" else ((6, 0), (40, 0), (1, 6), (4, 30), (1, 63)):
        assert difference(model, after, feeds(model, *lengths)) < CLOSE, lengths


@pytest.mark.parametrize("case", [name for name in CASES if "window" in name])
def test_fused_windows_are_the_operators_own(case: str, tmp_path: Path) -> None:
    sizes = COMPARED[case][0]
    model = decoder(tmp_path, sizes)
    FuseDecoderAttention().run(model)
    wanted = open_checkpoint(tmp_path).hyper.windows
    nodes = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert [n.attributes.get_int("local_window_size", -1) for n in nodes] == [w or -1 for w in wanted]
    assert [s.window for s in sights(model)] == list(wanted)


@pytest.mark.parametrize("case", CASES)
def test_fused_decoders_are_found_again(case: str, tmp_path: Path) -> None:
    model = decoder(tmp_path, COMPARED[case][0])
    before = recognise(model).hyper
    FuseDecoderAttention().run(model)
    FuseSkipNorms().run(model)
    after = recognise(model).hyper
    assert (after.head_norms, after.windows) == (before.head_norms, before.windows)
    assert (after.heads, after.key_heads, after.head_width) == (
        before.heads,
        before.key_heads,
        before.head_width,
    )
    assert after.epsilon == pytest.approx(before.epsilon, rel=1e-6)


def test_weights_in_half_precision(tmp_path: Path) -> None:
    model = decoder(tmp_path, dtype="float16")
    assert recognise(model).hyper.head_norms
    after = model.clone()
    assert FuseDecoderAttention().run(after).changed == 2
    assert difference(model, after, feeds(model, 4, 7)) < CLOSE_IN_HALF


def test_rotation_leaves_norms_of_heads_where_they_are(tmp_path: Path) -> None:
    model = decoder(tmp_path)
    before = recognise(model).layers
    check_pass(RotateResidual(), model, feeds(model, 12, 3), fires=2, bound=ROTATED)
    for old, new in zip(before, recognise(model).layers, strict=True):
        for name in ("query_norm", "key_norm"):
            gains = getattr(old.attention, name).weight
            assert np.ptp(gains) > 0.1
            assert np.array_equal(getattr(new.attention, name).weight, gains)
        assert (new.attention_norm.weight == 1).all(), "gains of the stream are folded"


def test_values_without_a_cache_are_rotated_by_head(tmp_path: Path) -> None:
    model = decoder(tmp_path, form="plain")
    check_pass(RotateResidual(), model, feeds(model, 12), fires=2, bound=ROTATED)


def in_pieces(model: ir.Model, tokens: np.ndarray, pieces: tuple[int, ...]) -> np.ndarray:
    """Return the logits of calls behind each other, caches of fixed capacity handed on."""
    session = open_session(model)
    names = [v.name or "" for v in model.graph.inputs[2:]]
    caches = [
        np.full(v.shape.numpy(), 7.0, np.float32) for v in model.graph.inputs[2:] if v.shape is not None
    ]
    found, past = [], 0
    for size in pieces:
        given = {"input_ids": tokens[:, past : past + size], "past_length": np.array([past], np.int32)}
        logits, *caches = run(session, {**given, **dict(zip(names, caches, strict=True))}).values()
        found.append(logits)
        past += size
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("form", ["cache", "plain"])
def test_caches_of_fixed_capacity(form: Form, tmp_path: Path) -> None:
    model = decoder(tmp_path, form=form)
    tokens = compared_tokens(QWEN3)[None]
    expected = run(open_session(model), {**feeds(model, 1), "input_ids": tokens})["logits"]
    assert FixCache(48).run(model).changed == 2
    found = in_pieces(model, tokens, (20, 1, 1, 16, 10))
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()


@pytest.mark.parametrize("case", [name for name in CASES if "window" in name])
def test_fixed_caches_keep_windows(case: str, tmp_path: Path) -> None:
    sizes = COMPARED[case][0]
    model = decoder(tmp_path, sizes)
    windows = open_checkpoint(tmp_path).hyper.windows
    tokens = compared_tokens(sizes)[None]
    expected = run(open_session(model), {**feeds(model, 1), "input_ids": tokens})["logits"]
    FixCache(48).run(model)
    assert telling_length(model) == max(w or 0 for w in windows) + 2
    nodes = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert [n.attributes.get_int("local_window_size", -1) for n in nodes] == [w or -1 for w in windows]
    found = in_pieces(model, tokens, (20, 1, 1, 16, 10))
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()
    steps = extract_program(specialized(model)).steps
    assert [s.window for s in steps if isinstance(s, CachedAttention)] == list(windows)


def specialized(model: ir.Model) -> ir.Model:
    """Return the model for calls of four tokens."""
    FixDims({"T": 4}).run(model)
    InferShapes().run(model)
    return model


def test_windows_of_other_models_are_followed_up_to_a_length(tmp_path: Path) -> None:
    """Numbers in masks that are too large to be tried out are refused instead."""
    sizes = CheckpointSizes(architecture="MistralForCausalLM", positions=4096, extra={"sliding_window": 3000})
    model = decoder(tmp_path, sizes)
    FixCache(4000).run(model)
    described = fixed_cache.FixedDecoder(model, "input_ids", "T", 4000)
    with pytest.raises(UsageError, match="number 3000") as caught:
        fixed_cache._proven(model, described)
    assert caught.value.fix is not None and caught.value.fix.startswith("--context 3000")
    assert fixed_cache._proven(model, replace(described, context=3000)) == 2048


def described(window: int, form: Form, tmp_path: Path) -> object:
    """Return what the deployment says of a fused decoder with a window and 4096 positions."""
    sizes = CheckpointSizes(
        architecture="MistralForCausalLM", layers=1, width=32, heads=2, key_heads=1, feed_forward=16,
        positions=4096, extra={"sliding_window": window},
    )  # fmt: skip
    model = decoder(tmp_path, sizes, form)
    FuseDecoderAttention().run(model)
    return fusion._described(model)


@pytest.mark.parametrize(
    ("window", "form"), [(511, "plain"), (2000, "plain"), (510, "plain"), (4000, "cache")]
)
def test_windows_are_only_fused_where_they_can_be_seen(window: int, form: Form, tmp_path: Path) -> None:
    found = described(window, form, tmp_path)
    if form == "plain" and window > 510:
        assert isinstance(found, str) and f"number {window}" in found
        return
    assert isinstance(found, fusion._Decoder)
    assert found.longest > window + 1
    assert sum(max(found.lengths(), key=sum)) == found.longest


@pytest.mark.parametrize(("kind", "bound"), [("float16", CLOSE_IN_HALF), ("int8", 2e-2)])
def test_windows_hold_for_narrow_caches(kind: str, bound: float, tmp_path: Path) -> None:
    """Beyond a window nothing is seen, however the cache is stored; without one outputs differ by their own size."""
    model = decoder(tmp_path, COMPARED["qwen3, a window in the first layer"][0])
    after = model.clone()
    FuseDecoderAttention().run(after)
    given = feeds(model, 40)
    expected = run(open_session(model), given)
    largest = {
        name: np.abs(expected[name.replace("past", "present")]).max(axis=(0, 2))
        for name in given
        if name.startswith("past")
    }
    NarrowCache(cache_type(kind), largest).run(after)
    session = open_session(after)
    empty = {v.name or "": v for v in after.graph.inputs[1:]}
    caches: dict[str, np.ndarray] = {}
    for name, value in empty.items():
        assert value.shape is not None and value.dtype is not None
        caches[name] = np.zeros((1, value.shape[1], 0, value.shape[3]), value.dtype.numpy())  # type: ignore[arg-type]
    logits = []
    for start, end in ((0, 30), (30, 31), (31, 40)):
        found = run(session, {"input_ids": given["input_ids"][:, start:end], **caches})
        logits.append(found.pop("logits"))
        caches = {name.replace("present", "past"): value for name, value in found.items()}
    whole = {"logits": np.concatenate(logits, axis=1)}
    assert rms_difference({"logits": expected["logits"]}, whole) < bound

"""Decoders with caches of fixed capacity compute what the growing ones do, whatever lies behind the last position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import COMPARED, compared_tokens, write_checkpoint
from llama_models import Sizes, llama_model
from masked_models import SIZES as MASKED_SIZES
from masked_models import Masked, masked_model

from bitwright.compiler.decoding.interface import find_interface
from bitwright.compiler.decoding.ports import ports_of
from bitwright.compiler.errors import ModelError, UsageError
from bitwright.compiler.hugging_face.checkpoint import open_checkpoint
from bitwright.compiler.hugging_face.graph import FloatName, Form, decoder_model
from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import CachedAttention
from bitwright.passes.assume_unpadded import AssumeUnpadded
from bitwright.passes.fix_cache import FixCache
from bitwright.passes.fuse_decoder_attention import FuseDecoderAttention
from bitwright.passes.normalize import normalize, specialize

# Float32 sums in another order, relative to logits of order one.
BOUND = 1e-5
CONTEXT = 24
# Whatever a cache holds behind its last position must not matter, as long as it is a number.
RUBBISH = 1e3


def decoder(sizes: Sizes) -> ir.Model:
    model = ir.from_proto(llama_model(sizes))
    normalize(model)
    return model


def tokens(sizes: Sizes, count: int = CONTEXT) -> np.ndarray:
    return np.random.default_rng(1).integers(0, sizes.vocabulary, (1, count))


def whole(model: ir.Model, sizes: Sizes, ids: np.ndarray) -> np.ndarray:
    empty = np.zeros((1, sizes.key_heads, 0, sizes.head_width), np.float32)
    feeds = {v.name or "": empty for v in model.graph.inputs if v.name != "ids"}
    return run(open_session(model, SessionConfig()), {"ids": ids, **feeds})["scores"]


def in_pieces(model: ir.Model, ids: np.ndarray, pieces: tuple[int, ...]) -> np.ndarray:
    session = open_session(model, SessionConfig())
    names = [v.name or "" for v in model.graph.inputs[2:]]
    tokens_name = model.graph.inputs[0].name or ""
    shapes = [v.shape.numpy() for v in model.graph.inputs[2:] if v.shape is not None]
    caches = [np.full(shape, RUBBISH, np.float32) for shape in shapes]
    found, past = [], 0
    for size in pieces:
        feeds = {tokens_name: ids[:, past : past + size], "past_length": np.array([past], np.int32)}
        logits, *caches = run(session, {**feeds, **dict(zip(names, caches, strict=True))}).values()
        found.append(logits)
        past += size
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(cache=True, tied=False),
        Sizes(computed_angles=True, key_heads=4),
        Sizes(fused_attention=True, key_heads=1),
    ],
    ids=["plain", "growing cache", "computed angles", "one head of keys"],
)
def test_calls_behind_each_other_compute_the_whole_sequence(sizes: Sizes) -> None:
    model = decoder(sizes)
    expected = whole(model, sizes, tokens(sizes))
    assert FixCache(CONTEXT).run(model).changed == sizes.layers
    assert [v.name for v in model.graph.inputs[:4]] == ["ids", "past_length", "past_key_0", "past_value_0"]
    assert [v.name for v in model.graph.outputs[:2]] == ["scores", "present_key_0"]
    for pieces in ((CONTEXT,), (1, 7, 1, 1, 14), (5, 19)):
        found = in_pieces(model, tokens(sizes), pieces)
        assert np.abs(found - expected).max() < BOUND * np.abs(expected).max()
    assert FixCache(CONTEXT).run(model).changed == 0


@pytest.mark.parametrize(
    ("name", "form", "dtype"),
    [
        ("qwen2", "cache", "float32"),
        ("llama, biases", "plain", "float32"),
        ("llama 3", "cache", "float32"),
        ("llama, tied", "cache", "float16"),
    ],
)
def test_exported_folders_get_fixed_caches(tmp_path: Path, name: str, form: Form, dtype: FloatName) -> None:
    sizes, stored = COMPARED[name]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, sizes, dtype=stored))
    model = decoder_model(checkpoint, form, dtype)
    normalize(model)
    ids = compared_tokens(sizes)[None, :CONTEXT]
    interface = find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
    feeds = {**interface.empty_caches(), **interface.feeds(ids)}
    expected = run(open_session(model, SessionConfig()), feeds)[interface.logits.name]
    FixCache(CONTEXT).run(model)
    found = in_pieces(model, ids, (9, 1, CONTEXT - 10))
    assert np.abs(found - expected).max() < BOUND * np.abs(expected).max()


@pytest.mark.parametrize("form", ["triangle", "looked up", "added up", "fused"])
def test_masks_growing_caches_and_fused_attention_go(form: str) -> None:
    """What other exporters write, and what ``quantize`` makes of it, is recognised; both inputs are gone afterwards."""
    model = ir.from_proto(masked_model(Masked(form="triangle" if form == "fused" else form)))  # type: ignore[arg-type]
    interface = find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
    ids = tokens(MASKED_SIZES)
    feeds = {**interface.empty_caches(), **interface.feeds(ids)}
    expected = run(open_session(model, SessionConfig()), feeds)["logits"]
    if form == "fused":
        AssumeUnpadded().run(model)
    normalize(model, 20)
    assert FuseDecoderAttention().run(model).changed == (2 if form == "fused" else 0)
    assert FixCache(CONTEXT).run(model).changed == 2
    assert [v.name for v in model.graph.inputs[:3]] == ["input_ids", "past_length", "past_key_0"]
    assert len(model.graph.inputs) == 6
    found = in_pieces(model, ids, (9, 1, CONTEXT - 10))
    assert np.abs(found - expected).max() < BOUND * np.abs(expected).max()


def test_the_step_means_what_onnx_runtime_computes() -> None:
    sizes = Sizes()
    model = decoder(sizes)
    FixCache(CONTEXT).run(model)
    specialize(model, {"T": 3})
    program = extract_program(model)
    steps = [step for step in program.steps if isinstance(step, CachedAttention)]
    assert len(steps) == sizes.layers and {s.heads // s.key_heads for s in steps} == {2}
    random = np.random.default_rng(2)
    feeds = {
        name: random.normal(size=program.tensor(name).shape).astype(np.float32) for name in program.inputs[2:]
    }
    for past in (0, 8, CONTEXT - 3):
        feeds |= {"ids": tokens(sizes, 3), "past_length": np.array([past], np.int32)}
        expected, found = run(open_session(model, SessionConfig()), feeds), run_program(program, feeds)
        for name in program.outputs:
            # ONNX Runtime clears what lies behind the last position.
            one, other = (a if a.ndim == 3 else a[:, :, : past + 3] for a in (found[name], expected[name]))
            np.testing.assert_allclose(one, other, atol=BOUND * np.abs(other).max())


def test_what_cannot_have_fixed_caches_is_refused() -> None:
    with pytest.raises(UsageError, match="the model's table holds 32 positions, fewer than 33"):
        FixCache(33).run(decoder(Sizes()))
    with pytest.raises(ModelError, match="not a llama decoder"):
        FixCache(16).run(decoder(Sizes(activation="Tanh")))
    with pytest.raises(ModelError, match="heads of 24 elements"):
        FixCache(16).run(decoder(Sizes(width=96)))
    fixed = decoder(Sizes())
    specialize(fixed, {"T": 8})
    with pytest.raises(ModelError):
        FixCache(16).run(fixed)

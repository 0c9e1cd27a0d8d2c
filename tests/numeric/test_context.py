"""Calls that reach beyond a decoder's positions are refused, whoever makes them, and never computed wrongly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from checkpoints import CheckpointSizes, write_checkpoint
from llama_models import Sizes, llama_model
from masked_models import SIZES, Masked, masked_model

import bitwright
from bitwright.compiler import frontend
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.decoding.caches import cache_pairs
from bitwright.compiler.decoding.context import context_of
from bitwright.compiler.decoding.interface import find_interface
from bitwright.compiler.decoding.ports import ports_of
from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.generation.opening import open_decoder
from bitwright.compiler.hugging_face.checkpoint import open_checkpoint
from bitwright.compiler.hugging_face.graph import Form, decoder_model
from bitwright.compiler.ingest.stated_context import state_context
from bitwright.compiler.options import Options
from bitwright.compiler.ort.decoding import DecodingSession
from bitwright.compiler.ort.session import open_session, run
from bitwright.passes.fuse_decoder_attention import FuseDecoderAttention
from bitwright.passes.normalize import normalize
from bitwright.targets.loader import load_profile

POSITIONS = 32
TABLES = Sizes(positions=POSITIONS)
PROMPT = tuple(range(1, 30))


def fused_model() -> onnx.ModelProto:
    model = ir.from_proto(own_export("cache"))
    normalize(model, 20)
    assert FuseDecoderAttention().run(model).changed == 2
    return ir.to_proto(model)


def own_export(form: Form) -> onnx.ModelProto:
    """Return what ``bitwright export`` writes, as if it did not state its context."""
    with TemporaryDirectory() as folder:
        sizes = CheckpointSizes(positions=POSITIONS)
        checkpoint = open_checkpoint(write_checkpoint(Path(folder), sizes, dtype="float32"))
        model = decoder_model(checkpoint, form, "float32")
        model.metadata_props.clear()
        return ir.to_proto(model)


MODELS = {
    "own, cache": lambda: own_export("cache"),
    "own, no cache": lambda: own_export("plain"),
    "tables": lambda: llama_model(TABLES),
    "fused": fused_model,
    "masks, tables": lambda: masked_model(Masked(replace(SIZES, computed_angles=False))),
    "masks, no cache": lambda: masked_model(Masked(replace(SIZES, computed_angles=False, cache=False))),
    "masks, angles": masked_model,
}


@pytest.fixture(params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a decoder of 32 positions; where no table says so config.json does."""
    onnx.save(MODELS[request.param](), tmp_path / "model.onnx")
    if request.param == "masks, angles":
        (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": POSITIONS}))
    np.savez(tmp_path / "tokens.npz", tokens=np.arange(300) % 48)
    return tmp_path / "model.onnx"


def test_texts_end_with_the_positions(path: Path) -> None:
    found = bitwright.generate(path, tokens=PROMPT, max_tokens=20)
    assert found.reason == "context" and len(found.prompt) + len(found.tokens) == POSITIONS + 1


def test_prompts_that_are_too_long_are_refused(path: Path) -> None:
    with pytest.raises(DataError, match=f"the prompt has 33 tokens, the model takes {POSITIONS}"):
        bitwright.generate(path, tokens=range(33), max_tokens=1)


def test_a_call_too_far_is_refused_and_changes_nothing(path: Path) -> None:
    session = open_decoder(path, 1).session
    session.feed(PROMPT)
    with pytest.raises(DataError, match=f"4 tokens behind 29, where the model takes {POSITIONS}"):
        session.feed([1, 2, 3, 4])
    assert session.length == 29
    expected = session.feed([1, 2, 3])
    session.restart()
    found = session.feed([*PROMPT, 1, 2, 3])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("spec", [":tokens,window=33", ":tokens,window=33,stride=5"])
def test_windows_that_are_too_long_are_refused(path: Path, spec: str) -> None:
    metric = f"perplexity:{path.with_name('tokens.npz')}{spec}"
    with pytest.raises(DataError, match="a window has 33 tokens, the model takes 32") as caught:
        bitwright.evaluate(path, metric)
    assert caught.value.fix == "add ,window=32"
    at_most = metric.replace("window=33", "window=32")
    assert np.isfinite(bitwright.evaluate(path, at_most).value)


def ingested(path: Path, **changes: object) -> Compilation:
    data = f"{path.with_name('tokens.npz')}:tokens,window=16"
    options = Options(**{"model": path, "target": "host", "data": data, "recipe": "w4", **changes})  # type: ignore[arg-type]
    c = Compilation(options, load_profile("host"))
    frontend.ingest(c, [])
    return c


def test_data_and_metrics_are_refused_before_any_work(path: Path) -> None:
    tokens = f"{path.with_name('tokens.npz')}:tokens"
    with pytest.raises(DataError, match="a window has 256 tokens, the model takes 32") as caught:
        ingested(path, data=tokens)
    assert caught.value.fix == f"{tokens},window=32"
    with pytest.raises(DataError, match="a window has 256 tokens, the model takes 32"):
        ingested(path, evaluate=f"perplexity:{tokens}")
    caches = {
        v.name: np.zeros((1, 2, 4, 16), np.float32) for v in ir.load(path).graph.inputs if len(v.shape) == 4
    }
    samples = [{_tokens(path): np.ones((1, 33 - 4 * bool(caches)), np.int64), **caches}]
    for given in {"data": samples}, {"validation": _written(path, samples)}:
        with pytest.raises(
            DataError, match="33 tokens, those in the cache included, where the model takes 32"
        ):
            ingested(path, unpadded=_takes_masks(path), **given)
    c = ingested(path)
    assert c.source is not None and context_of(c.source.model) == POSITIONS


def test_a_row_that_serves_several_tokens_is_why() -> None:
    """A slice ends with its table; behind 31 tokens one row is left, which turns four tokens without complaint."""
    model = ir.from_proto(own_export("cache"))
    interface = find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
    assert context_of(model) == POSITIONS
    random = np.random.default_rng(0)
    caches = {p.name: random.standard_normal((1, 2, 31, 16)).astype(np.float32) for p in interface.caches}
    assert run(open_session(model), {"input_ids": np.array([[1, 2, 3, 4]]), **caches})["logits"].shape == (
        1,
        4,
        80,
    )


def test_logits_of_no_token_are_an_error(tmp_path: Path) -> None:
    """Behind all of its table a graph gives no row at all, so no logits; here nobody has said how far it goes."""
    model = ir.from_proto(own_export("cache"))
    interface = find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
    pairs = cache_pairs(model, interface)
    session = DecodingSession(open_session(model), interface, pairs)
    session.feed(list(range(POSITIONS)))
    with pytest.raises(DataError, match="1 tokens behind 32"):
        session.feed([5])
    assert session.length == POSITIONS


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 77}, 77),
        ({"max_position_embeddings": 77, "rope_scaling": None}, 77),
        ({"max_position_embeddings": 77, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 77),
        ({"max_position_embeddings": 77, "rope_parameters": {"rope_type": "default"}}, 77),
        # Stretched when the model runs, by a factor that transformers applies to what is written here.
        ({"max_position_embeddings": 77, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"max_position_embeddings": 77, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, None),
        ({"max_position_embeddings": 77, "rope_scaling": "twice"}, None),
        ({"max_position_embeddings": "77"}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": 10**30}, None),
        ({"hidden_size": 64}, None),
        ([1, 2], None),
        ("{", None),
        ('{"max_position_embeddings": 77, "max_position_embeddings": 78}', None),
    ],
)
def test_what_config_json_says(tmp_path: Path, config: object, expected: int | None) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    model = ir.from_proto(masked_model())
    assert state_context(model, tmp_path / "model.onnx") == expected
    assert context_of(model) == expected
    assert state_context(model, tmp_path / "model.onnx") is None or expected is None


def test_what_the_graph_says_goes_before_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 77}')
    table, stated = ir.from_proto(llama_model(TABLES)), ir.from_proto(masked_model())
    stated.metadata_props["context_length"] = "90"
    for model, expected in ((table, POSITIONS), (stated, 90)):
        assert state_context(model, tmp_path / "model.onnx") is None
        assert context_of(model) == expected


def test_caches_of_more_positions_are_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="32 positions, fewer than 33") as caught:
        ingested(path, context=33, data={_tokens(path): np.ones((4, 20), np.int64)})
    assert caught.value.where == "--context" and "--context 32" in caught.value.fix


def _tokens(path: Path) -> str:
    graph = ir.load(path).graph
    return find_interface(ports_of(graph.inputs), ports_of(graph.outputs)).tokens.name


def _takes_masks(path: Path) -> bool:
    return any(v.name == "attention_mask" for v in ir.load(path).graph.inputs)


def _written(path: Path, samples: list[dict[str, np.ndarray]]) -> str:
    """Write samples as a folder of files; return its name."""
    folder = path.with_name("samples")
    folder.mkdir()
    for number, sample in enumerate(samples):
        np.savez(folder / f"{number}.npz", **sample)  # type: ignore[arg-type]
    return str(folder)

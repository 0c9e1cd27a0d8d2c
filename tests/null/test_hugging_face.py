"""Hugging Face folders: what their configurations mean, and that their weights arrive where they belong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from checkpoints import COMPARED, LLAMA3, CheckpointSizes, compared_tokens, stored, write_checkpoint

from bitwright.compiler.errors import ModelError
from bitwright.compiler.hugging_face import lazy_weight
from bitwright.compiler.hugging_face.checkpoint import Checkpoint, open_checkpoint
from bitwright.compiler.hugging_face.config import read_config
from bitwright.compiler.hugging_face.graph import decoder_model
from bitwright.compiler.hugging_face.lazy_weight import LazyWeight
from bitwright.compiler.llama.recognise import recognise
from bitwright.compiler.llama.reference import logits
from bitwright.compiler.llama.tensors import tensors_of
from bitwright.passes.normalize import normalize

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/transformers_logits.json").read_text())


@pytest.mark.parametrize("case", COMPARED)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    sizes, dtype = COMPARED[case]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, sizes, dtype=dtype))
    found = logits(compared_tokens(sizes), checkpoint.hyper, checkpoint.weight)
    expected = np.array(GOLDEN["cases"][case])
    # Float32 sums in another order, logits of about one rounded to six decimals.
    assert np.abs(found[GOLDEN["positions"], : expected.shape[1]] - expected).max() < 1e-5


def test_every_compared_decoder_has_its_logits() -> None:
    assert set(GOLDEN["cases"]) == set(COMPARED)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_values_do_not_depend_on_files(dtype: str, shards: int, tmp_path: Path) -> None:
    exact = open_checkpoint(write_checkpoint(tmp_path / "exact", dtype="float32"))
    other = open_checkpoint(write_checkpoint(tmp_path / "other", dtype=dtype, shards=shards))
    bits = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    for name in exact.parts:
        values = exact.weight(name)
        assert values is not None
        assert np.array_equal(other.weight(name), values.astype(bits).astype(np.float32)), name
    assert other.weight("output.weight") is None, "the head is tied"


def test_the_makers_bfloat16_rounds_as_it_should() -> None:
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    assert np.array_equal(stored(values, "BF16"), values.astype(ml_dtypes.bfloat16).view(np.uint16))


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write config.json with changes; an ellipsis removes a key."""
    found = {**CheckpointSizes().config(), **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))
    return found


def test_defaults_and_both_spellings_of_rope(tmp_path: Path) -> None:
    config_of(tmp_path, num_key_value_heads=..., rope_theta=..., rms_norm_eps=..., tie_word_embeddings=...)
    hyper = read_config(tmp_path).hyper()
    assert (hyper.key_heads, hyper.base, hyper.epsilon) == (4, 10000.0, 1e-6)
    assert not read_config(tmp_path).tied
    older = {**LLAMA3, "type": "llama3"}
    config_of(tmp_path, rope_scaling=older, rope_theta=500000.0)
    first = read_config(tmp_path).hyper()
    config_of(tmp_path, rope_scaling=..., rope_theta=..., rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    second = read_config(tmp_path).hyper()
    assert first.base == second.base == 500000.0
    assert first.factors is not None and np.array_equal(first.factors, second.factors)
    # The fastest pair turns often within 32 positions and stays; the slowest is eight times slower.
    assert first.factors[0] == 1 and first.factors[-1] == 8


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"architectures": ["GemmaForCausalLM"]},
        "GemmaForCausalLM is not supported; Llama",
    ),
    "no architecture": ({"architectures": ...}, "no architecture"),
    "two": ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "not supported"),
    "a missing size": ({"hidden_size": ...}, "no 'hidden_size'"),
    "a text for a size": ({"hidden_size": "64"}, "'hidden_size'"),
    "a truth for a size": ({"vocab_size": True}, "'vocab_size'"),
    "no layers": ({"num_hidden_layers": 0}, "'num_hidden_layers'"),
    "a size beyond reason": ({"max_position_embeddings": 1 << 60}, "'max_position_embeddings'"),
    "odd heads": ({"head_dim": 17}, "'head_dim'"),
    "heads that do not divide": ({"hidden_size": 66}, "no even multiple"),
    "key heads that do not divide": ({"num_key_value_heads": 3}, "cannot share"),
    "another activation": ({"hidden_act": "gelu"}, "'hidden_act'"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "'quantization_config'"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'rope_scaling.rope_type'"),
    "unknown rope key": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1}}, "mscale"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
    "rope twice": ({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "contradicts"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor'"),
    "blend upside down": ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "not above"),
    "mistral's default window": ({"architectures": ["MistralForCausalLM"]}, "no 'sliding_window'"),
    "qwen's default window": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
        "'use_sliding_window' without",
    ),
    "a window that is not stated": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layers of sliding_attention where no window",
    ),
    "a window that is not used": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "layers of sliding_attention where no window",
    ),
    "kinds of layers": (
        {"layer_types": ["full_attention", "chunked_attention"]},
        "layers of chunked_attention",
    ),
    "kinds of too few layers": ({"layer_types": ["full_attention"]}, "1 'layer_types' for 2 layers"),
    "qwen3's default width": ({"architectures": ["Qwen3ForCausalLM"]}, "no 'head_dim'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_of_other_functions_are_refused(case: str, tmp_path: Path) -> None:
    changes, word = REFUSED[case]
    config_of(tmp_path, **changes)
    with pytest.raises(ModelError) as caught:
        read_config(tmp_path)
    assert word in caught.value.what and "config.json" in caught.value.where


WINDOWS: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "mistral": ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, (32, 32)),
    "as long as the context": ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, (None, None)),
    "llama has none": ({"sliding_window": 8, "use_sliding_window": True}, (None, None)),
    "not used": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 8},
        (None, None),
    ),
    "used by the last": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        (None, 8),
    ),
    "named by layers": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (8, None),
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_those_that_bind(case: str, tmp_path: Path) -> None:
    changes, expected = WINDOWS[case]
    config_of(tmp_path, **changes)
    config = read_config(tmp_path)
    assert config.hyper().windows == expected
    assert config.hyper(8).windows == (None, None), "no sequence of so many positions reaches beyond"


GRAPHS: dict[str, CheckpointSizes] = {
    "tied": CheckpointSizes(),
    "untied": CheckpointSizes(tied=False, layers=3),
    "biases": CheckpointSizes(key_heads=4, extra={"attention_bias": True, "mlp_bias": True}),
    "qwen2": CheckpointSizes(architecture="Qwen2ForCausalLM"),
    "llama 3": CheckpointSizes(head_width=32, base=500000.0, rope=LLAMA3, positions=256),
    "stretched": CheckpointSizes(rope={"rope_type": "linear", "factor": 4.0}),
    "qwen3": CheckpointSizes(architecture="Qwen3ForCausalLM", head_width=24),
    "windows": CheckpointSizes(architecture="MistralForCausalLM", extra={"sliding_window": 9}),
}


@pytest.mark.parametrize("form", ["plain", "cache"])
@pytest.mark.parametrize("case", GRAPHS)
def test_graphs_are_recognised_with_every_weight_in_its_place(case: str, form: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, GRAPHS[case], dtype="float32"))
    model = decoder_model(checkpoint, form)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    normalize(model)
    decoder = recognise(model)
    found, given = decoder.hyper, checkpoint.hyper
    for name in (
        "vocabulary",
        "layers",
        "width",
        "feed_forward",
        "heads",
        "key_heads",
        "head_width",
        "context",
        "head_norms",
        "windows",
    ):
        assert getattr(found, name) == getattr(given, name), name
    assert (found.base, found.epsilon) == (given.base, pytest.approx(given.epsilon))
    tensors = {t.name: t for t in tensors_of(decoder)}
    assert set(tensors) - {"rope_freqs.weight"} == set(checkpoint.parts)
    for name, part in tensors.items():
        # Factors are read back from float32 tables.
        np.testing.assert_allclose(part.load(), checkpoint.weight(name), rtol=1e-6 if "rope" in name else 0)
    assert (decoder.caches is None) == (form == "plain")


def test_caches_are_named_layer_by_layer(tmp_path: Path) -> None:
    model = decoder_model(open_checkpoint(write_checkpoint(tmp_path, CheckpointSizes(layers=3))))
    caches = recognise(model).caches
    assert caches is not None and len(caches) == 3
    for layer, cache in enumerate(caches):
        assert (cache.past_key.name, cache.past_value.name) == (f"past_{layer}_k", f"past_{layer}_v")
        assert (cache.present_key.name, cache.present_value.name) == (
            f"present_{layer}_k",
            f"present_{layer}_v",
        )
    names = [v.name for v in (*model.graph.inputs, *model.graph.outputs)]
    assert names[:2] == ["input_ids", "past_0_k"] and names[7:9] == ["logits", "present_0_k"]


def test_a_tied_embedding_is_one_initializer(tmp_path: Path) -> None:
    sizes = CheckpointSizes(vocabulary=500)
    model = decoder_model(open_checkpoint(write_checkpoint(tmp_path, sizes)))
    large = [
        n
        for n, v in model.graph.initializers.items()
        if v.const_value is not None and v.const_value.size >= 500 * 64
    ]
    assert large == ["model.embed_tokens.weight"]
    normalize(model)
    assert recognise(model).tied
    assert sum(500 in tuple(v.shape or ()) for v in model.graph.initializers.values()) == 1


def test_half_precision_keeps_norms_and_logits_single(tmp_path: Path) -> None:
    model = decoder_model(open_checkpoint(write_checkpoint(tmp_path)), "cache", "float16")
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    half = ir.DataType.FLOAT16
    weights = [v for n, v in model.graph.initializers.items() if n.startswith("model.")]
    assert {v.dtype for v in weights} == {half}
    assert {v.dtype for v in model.graph.inputs[1:]} == {half}
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    normalize(model)
    assert recognise(model).caches is not None


def test_the_context_can_be_shortened(tmp_path: Path) -> None:
    model = decoder_model(open_checkpoint(write_checkpoint(tmp_path)), context=16)
    assert model.graph.initializers["cos_table"].shape == ir.Shape([16, 16])
    assert model.metadata_props["context_length"] == "16" and recognise(model).hyper.context == 16
    with pytest.raises(ModelError, match="--context"):
        decoder_model(open_checkpoint(write_checkpoint(tmp_path, CheckpointSizes(positions=1 << 24))))


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_written_in_pieces(
    transposed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, dtype="float32"))
    part = checkpoint.parts["blk.0.ffn_up.weight"]
    tensor = LazyWeight(checkpoint, part, ir.DataType.FLOAT, transposed=transposed)
    expected = checkpoint.read(part).T if transposed else checkpoint.read(part)
    monkeypatch.setattr(lazy_weight, "PIECE_BYTES", 7 * 4 * expected.shape[1])
    assert [len(p) for p in tensor.pieces()][:2] == [7, 7]
    stream = io.BytesIO()
    tensor.tofile(stream)
    assert stream.getvalue() == tensor.tobytes() == expected.tobytes()
    assert np.array_equal(tensor.numpy(), expected) and tensor.nbytes == expected.nbytes


def test_values_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    def large(part: Any) -> np.ndarray:
        return np.full(part.shape, 1e5, np.float32)

    checkpoint: Checkpoint = open_checkpoint(write_checkpoint(tmp_path, dtype="float32", arrays=large))
    weight = decoder_model(checkpoint, dtype="float16").graph.initializers["model.norm.weight"].const_value
    assert weight is not None
    with pytest.raises(ModelError, match="beyond 65504"):
        weight.tobytes()

"""What checkpoints call the parts of a decoder, what GGUF calls them, and which shapes they have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bitwright.compiler.hugging_face.config import Config

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# GGUF's name -> the checkpoint's, within a layer.
LAYER_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
LAYER_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Of query and key heads, one gain an element of a head.
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Buffers that older versions saved; they follow from the configuration.
DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Part:
    """One tensor that a decoder needs.

    Attributes:
        gguf: GGUF's name.
        name: The checkpoint's name.
        shape: (outputs, inputs) or (elements,).
        heads: Its rows belong to so many rotated heads, which GGUF orders otherwise; 0 if it does not.
    """

    gguf: str
    name: str
    shape: tuple[int, ...]
    heads: int = 0


def parts_of(config: Config) -> tuple[Part, ...]:
    """Return all tensors of a decoder, the embedding first, in the order of the layers."""
    width, vocabulary = config.hidden_size, config.vocab_size
    found = [Part("token_embd.weight", EMBEDDING, (vocabulary, width))]
    for layer in range(config.num_hidden_layers):
        found += _of_layer(config, layer)
    found.append(Part("output_norm.weight", NORM, (width,)))
    if not config.tied:
        found.append(Part("output.weight", HEAD, (vocabulary, width)))
    return tuple(found)


def _of_layer(config: Config, layer: int) -> Iterator[Part]:
    ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
    for gguf, name in LAYER_NORMS.items():
        yield Part(f"{ours}{gguf}.weight", f"{theirs}{name}.weight", (config.hidden_size,))
    for gguf, name in HEAD_NORMS.items() if config.head_norms else ():
        yield Part(f"{ours}{gguf}.weight", f"{theirs}{name}.weight", (config.head_width,))
    # GGUF's qwen3 turns heads as checkpoints do.
    heads = {} if config.head_norms else {"attn_q": config.heads, "attn_k": config.key_heads}
    for gguf, (outputs, inputs) in _matrices(config).items():
        name, rotated = f"{theirs}{LAYER_LINEARS[gguf]}", heads.get(gguf, 0)
        yield Part(f"{ours}{gguf}.weight", f"{name}.weight", (outputs, inputs), rotated)
        if gguf in config.biased:
            yield Part(f"{ours}{gguf}.bias", f"{name}.bias", (outputs,), rotated)


def _matrices(config: Config) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of a layer's linear layers."""
    width, wide = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    return {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_gate": (wide, width),
        "ffn_up": (wide, width),
        "ffn_down": (width, wide),
    }

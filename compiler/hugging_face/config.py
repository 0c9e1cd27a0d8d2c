"""config.json: which decoders of the llama family are read, and the numbers they are built from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.compiler.errors import ModelError
from bitwright.compiler.hugging_face.json_file import read_object
from bitwright.compiler.llama.decoder import HyperParameters

CONFIG_FILE = "config.json"
LARGEST_CONFIG = 1 << 20
# Tables of positions are made for the whole context; beyond this they are no longer made by accident.
LARGEST_TABLE = 1 << 27
LLAMA, MISTRAL, QWEN2, QWEN3 = (f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3"))
SUPPORTED = (LLAMA, MISTRAL, QWEN2, QWEN3)
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"

Size = Annotated[int, Field(ge=1, le=1 << 24)]
Number = Annotated[float, Field(gt=0, allow_inf_nan=False, le=1e12)]
STRICT = ConfigDict(strict=True, frozen=True, extra="forbid")


class RopeParameters(BaseModel):
    """How positions turn queries and keys; the older key ``type`` means ``rope_type``.

    Attributes:
        rope_type: As they are, all slower by one factor, or as Llama 3 slows them by wavelength.
        rope_theta: The base, if it is stated here.
        factor: How much slower.
        low_freq_factor, high_freq_factor: Between these the factor is blended in.
        original_max_position_embeddings: The context before it was stretched.
        partial_rotary_factor: Share of a head that is turned.
    """

    model_config = STRICT

    rope_type: Literal["default", "linear", "llama3"] = "default"
    rope_theta: Number | None = None
    factor: Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)] | None = None
    low_freq_factor: Number | None = None
    high_freq_factor: Number | None = None
    original_max_position_embeddings: Size | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0


class Config(BaseModel):
    """What config.json says about the function; what it says about training or sampling is left alone.

    Attributes:
        architectures: One name.
        head_dim: Elements of a head; by default the width over the heads.
        num_key_value_heads: By default as many as query heads.
        attention_bias, mlp_bias: Linear layers add a vector.
        sliding_window: Positions that a token sees, its own included.
        use_sliding_window: Whether they limit anything (Qwen2, Qwen3).
        max_window_layers: So many layers in front see everything all the same, unless ``layer_types`` is given.
        layer_types: Kind of attention of each layer.
        rope_theta, rope_scaling, rope_parameters: Older and newer keys of the same things.
        quantization_config: Of checkpoints that are already quantized.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    architectures: Annotated[list[str], Field(min_length=1, max_length=1)]
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)]
    num_attention_heads: Annotated[int, Field(ge=1, le=1 << 14)]
    num_key_value_heads: Annotated[int, Field(ge=1, le=1 << 14)] | None = None
    head_dim: Annotated[int, Field(ge=2, le=1 << 12, multiple_of=2)] | None = None
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: Annotated[float, Field(gt=0, le=0.1)] = 1e-6
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool | None = None
    rope_theta: Number | None = None
    rope_scaling: RopeParameters | None = None
    rope_parameters: RopeParameters | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Field(ge=0)] = 28
    layer_types: list[str] | None = None
    quantization_config: None = None

    @property
    def architecture(self) -> str:
        """The one architecture."""
        return self.architectures[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.num_attention_heads

    @property
    def key_heads(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Elements of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def tied(self) -> bool:
        """Whether the head multiplies with the embedding; all architectures default to an own head."""
        return bool(self.tie_word_embeddings)

    @property
    def rope(self) -> RopeParameters:
        """How positions turn, whichever keys say it."""
        return self.rope_parameters or self.rope_scaling or RopeParameters()

    @property
    def base(self) -> float:
        """Rope theta."""
        return self.rope.rope_theta or self.rope_theta or 10000.0

    @property
    def biased(self) -> frozenset[str]:
        """The linear layers that add a vector, by GGUF's names."""
        attention = frozenset({"attn_q", "attn_k", "attn_v"})
        if self.architecture == QWEN2:
            return attention
        if self.architecture == MISTRAL:
            return frozenset()
        found = attention | {"attn_output"} if self.attention_bias else frozenset[str]()
        feed_forward = self.mlp_bias and self.architecture == LLAMA
        return found | {"ffn_gate", "ffn_up", "ffn_down"} if feed_forward else found

    @property
    def head_norms(self) -> bool:
        """Whether query and key heads are normalized before they are rotated."""
        return self.architecture == QWEN3

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions each layer sees, None where all; ``layer_types`` counts for the Qwen models alone."""
        layers = self.num_hidden_layers
        if self.architecture == MISTRAL:
            return (self.sliding_window,) * layers
        if self.architecture == LLAMA or not self.use_sliding_window or self.sliding_window is None:
            return (None,) * layers
        kinds = self.layer_types or [
            SLIDING_ATTENTION if n >= self.max_window_layers else FULL_ATTENTION for n in range(layers)
        ]
        return tuple(self.sliding_window if kind == SLIDING_ATTENTION else None for kind in kinds)

    def hyper(self, context: int | None = None) -> HyperParameters:
        """Return the numbers that a decoder is built from.

        Args:
            context: Longest sequence; by default ``max_position_embeddings``.
        """
        positions = context or self.max_position_embeddings
        return HyperParameters(
            vocabulary=self.vocab_size,
            layers=self.num_hidden_layers,
            width=self.hidden_size,
            feed_forward=self.intermediate_size,
            heads=self.heads,
            key_heads=self.key_heads,
            head_width=self.head_width,
            context=positions,
            base=self.base,
            epsilon=self.rms_norm_eps,
            factors=_factors(self.rope, self.base, self.head_width),
            head_norms=self.head_norms,
            # One that is no shorter than the longest sequence changes nothing.
            windows=tuple(None if w is None or w >= positions else w for w in self.windows),
        )


def read_config(folder: Path) -> Config:
    """Read a folder's config.json.

    Raises:
        ModelError: It is missing or malformed, names another architecture, or asks for what is not supported.
    """
    path = folder / CONFIG_FILE
    found = read_object(path, LARGEST_CONFIG)
    _check_architecture(found.get("architectures"), path)
    for key in ("rope_scaling", "rope_parameters"):
        found[key] = _rope(found.get(key), f"{path}: {key}")
    try:
        config = Config.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=True)[0]
        place = ".".join(map(str, first["loc"]))
        given = str(first["input"])[:60]
        msg = f"'{place}': {first['msg']}; it is {given}" if first["type"] != "missing" else f"no '{place}'"
        _refuse(msg, path)
    _check(config, path)
    return config


def _check_architecture(names: object, path: Path) -> None:
    if isinstance(names, list) and len(names) == 1 and names[0] in SUPPORTED:
        return
    named = ", ".join(map(str, names))[:80] if isinstance(names, list) else "no architecture"
    msg = f"{named or 'no architecture'} is not supported; {', '.join(SUPPORTED)} are"
    raise ModelError(
        msg, where=str(path), fix="export this model with its own exporter, and give the ONNX file"
    )


def _rope(found: object, where: str) -> object:
    """Return a rope entry under its newer key, null where it says nothing."""
    if not isinstance(found, dict):
        return found
    entry: dict[str, Any] = dict(found)
    older = entry.pop("type", None)
    if older is not None and entry.setdefault("rope_type", older) != older:
        _refuse(f"type '{older}' contradicts rope_type '{entry['rope_type']}'", where)
    return entry


def _check(config: Config, path: Path) -> None:
    """Refuse numbers that do not fit together, and attention of other kinds."""
    if config.heads % config.key_heads:
        _refuse(f"{config.heads} heads cannot share {config.key_heads} key heads", path)
    if config.head_dim is None and config.hidden_size % (2 * config.heads):
        _refuse(f"hidden_size {config.hidden_size} is no even multiple of {config.heads} heads", path)
    if config.architecture != LLAMA and config.num_key_value_heads is None:
        _refuse("no 'num_key_value_heads'", path)
    if config.architecture == QWEN3 and config.head_dim is None:
        _refuse("no 'head_dim'", path)
    _check_window(config, path)
    _check_rope(config, path)


def _check_window(config: Config, path: Path) -> None:
    """Refuse kinds of attention that are not known, and windows that are not stated."""
    if config.architecture == MISTRAL and "sliding_window" not in config.model_fields_set:
        _refuse("no 'sliding_window'; null where there is none", path)
    if config.use_sliding_window and "sliding_window" not in config.model_fields_set:
        _refuse("'use_sliding_window' without a 'sliding_window'", path)
    kinds = config.layer_types
    if kinds is None:
        return
    others = set(kinds) - {FULL_ATTENTION, SLIDING_ATTENTION}
    if others:
        _refuse(f"layers of {', '.join(sorted(others))[:80]} are not supported", path)
    if len(kinds) != config.num_hidden_layers:
        _refuse(f"{len(kinds)} 'layer_types' for {config.num_hidden_layers} layers", path)
    stated = [SLIDING_ATTENTION if window is not None else FULL_ATTENTION for window in config.windows]
    if SLIDING_ATTENTION in kinds and stated != kinds:
        _refuse("layers of sliding_attention where no window is stated", path)


def _check_rope(config: Config, path: Path) -> None:
    rope = config.rope
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[rope.rope_type]
    missing = [name for name in needed if getattr(rope, name) is None]
    if missing:
        _refuse(f"rope_type '{rope.rope_type}' needs {', '.join(missing)}", path)
    if rope.rope_type == "llama3" and not (rope.high_freq_factor or 0) > (rope.low_freq_factor or 0):
        _refuse("high_freq_factor is not above low_freq_factor", path)


def check_context(positions: int, head_width: int, where: str) -> None:
    """Refuse a context whose table of positions would be made by accident.

    Raises:
        ModelError: The table is too large.
    """
    if positions * head_width > LARGEST_TABLE:
        msg = f"tables for {positions} positions would have more than {LARGEST_TABLE} elements"
        raise ModelError(msg, where=where, fix="pass --context with the longest sequence that you need")


def _factors(rope: RopeParameters, base: float, head_width: int) -> NDArray[np.float32] | None:
    """Return what each pair's frequency is divided by, shape (head_width / 2,), or None."""
    half = head_width // 2
    if rope.rope_type == "default" or rope.factor is None:
        return None
    if rope.rope_type == "linear":
        return np.full(half, rope.factor, np.float32)
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    assert low is not None and high is not None and original is not None, "read_config() checked them"
    turns = original * base ** -(np.arange(half) / half) / (2 * math.pi)
    # Fast pairs, which turn often within the original context, stay; slow ones are divided; between both is blended.
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - blend) / rope.factor + blend)).astype(np.float32)


def _refuse(what: str, where: object) -> NoReturn:
    fix = "check that config.json belongs to this checkpoint"
    raise ModelError(what, where=str(where), fix=fix) from None

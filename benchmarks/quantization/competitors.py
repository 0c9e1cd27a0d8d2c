"""Who takes part: one line a setting of a tool. A new Bitwright recipe is a new line in :data:`BITWRIGHT`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

CNNS = ("kws_dscnn", "resnet8_cifar10", "vww_mobilenet")
TRANSFORMERS = ("minilm_l6", "tinylm")
MIXED = ("ppocr_rec",)
ALL = (*CNNS, "ad_autoencoder", *TRANSFORMERS, *MIXED)
WITH_MATMUL = (*TRANSFORMERS, *MIXED)


@dataclass(frozen=True)
class Competitor:
    """One setting of one tool.

    Attributes:
        name: Short unique name, as the command line takes it.
        label: What the table calls it.
        function: ``module:function`` called with the job.
        settings: For that function.
        models: Zoo models it is run on.
        environment: ``"own"`` is this interpreter, ``"nncf"`` one with NNCF.
        time_limit_s: Wall seconds after which the attempt is ended.
        family: Who is compared with whom: fewer than 8 bits a weight or not.
    """

    name: str
    label: str
    function: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ALL
    environment: Literal["own", "nncf"] = "own"
    time_limit_s: float = 900.0
    family: Literal["8-bit", "low-bit"] = "8-bit"

    @property
    def is_ours(self) -> bool:
        """Whether it is Bitwright."""
        return self.function.startswith("quantization.bitwright_recipe")


def _static(name: str, label: str, models: tuple[str, ...] = ALL, **settings: Any) -> Competitor:
    function = "quantization.rivals.ort_static:quantize"
    return Competitor(f"ort-static-{name}", f"ORT static, {label}", function, settings, models)


def _u8s8(name: str, label: str, models: tuple[str, ...] = ALL, **settings: Any) -> Competitor:
    return _static(name, f"U8S8 {label}", models, activation="QUInt8", weight="QInt8", **settings)


def _linear_only(name: str, label: str, **settings: Any) -> Competitor:
    return _u8s8(
        f"linear-{name}",
        f"per channel, tuned for transformers (linear layers only, float outputs), {label}",
        TRANSFORMERS,
        per_channel=True,
        linear_only=True,
        **settings,
    )


def _nbits(name: str, label: str, *, time_limit_s: float = 900.0, **settings: Any) -> Competitor:
    return Competitor(
        f"ort-nbits-{name}",
        f"ORT MatMulNBits, {label}",
        "quantization.rivals.ort_nbits:quantize",
        settings,
        WITH_MATMUL,
        time_limit_s=time_limit_s,
        family="low-bit",
    )


def _nncf_weights(name: str, label: str, **settings: Any) -> Competitor:
    return Competitor(
        f"nncf-w4-{name}",
        f"NNCF compress_weights, {label}",
        "quantization.rivals.nncf_weights:quantize",
        settings,
        WITH_MATMUL,
        "nncf",
        family="low-bit",
    )


def _ours(name: str, label: str, models: tuple[str, ...] = ALL, **options: Any) -> Competitor:
    function = "quantization.bitwright_recipe:quantize"
    return Competitor(f"bitwright-{name}", f"**Bitwright**, {label}", function, options, models)


def _our_low_bits(
    recipe: str, models: tuple[str, ...] = WITH_MATMUL, *, suffix: str = "", **options: Any
) -> Competitor:
    function = "quantization.bitwright_recipe:quantize"
    settings = {"recipe": recipe, "gate": False, **options}
    label = f"**Bitwright**, {recipe}" + "".join(f", {k} {_said(v)}" for k, v in options.items())
    return Competitor(f"bitwright-{recipe}{suffix}", label, function, settings, models, family="low-bit")


def _said(option: Any) -> str:
    """Return an option as a label spells it: a mapping as ``bits=6``."""
    return " ".join(f"{k}={v:g}" for k, v in option.items()) if isinstance(option, Mapping) else str(option)


NNCF_INT8 = "quantization.rivals.nncf_int8:quantize"
DYNAMIC = "quantization.rivals.ort_dynamic:quantize"

BITWRIGHT = (
    _ours("int8", "int8, gate off", gate=False),
    _ours("int8-gated", "int8, only where it is faster"),
    _ours("int8-nearest", "int8-nearest, gate off", recipe="int8-nearest", gate=False),
    _ours("int8-dynamic", "int8-dynamic, gate off", WITH_MATMUL, recipe="int8-dynamic", gate=False),
    _ours("int8-row", "int8-row, gate off", WITH_MATMUL, recipe="int8-row", gate=False),
    _our_low_bits("w4a8-mixed", ("kws_dscnn", "resnet8_cifar10"), budget={"bits": 6.0}),
    _our_low_bits("w4a8", CNNS),
    _our_low_bits("w8"),
    _our_low_bits("w4", group=32),
    _our_low_bits("w4", suffix="-128", group=128),
    _our_low_bits("nf4"),
    _our_low_bits("w2"),
    _our_low_bits("ternary"),
)

RIVALS = (
    _static("default", "all defaults (S8S8 MinMax per tensor)"),
    _u8s8("minmax", "MinMax per tensor"),
    _u8s8("minmax-channel", "MinMax per channel", per_channel=True),
    _u8s8("percentile-channel", "Percentile per channel", per_channel=True, method="Percentile"),
    _u8s8("entropy-channel", "Entropy per channel", per_channel=True, method="Entropy"),
    _linear_only("minmax", "MinMax"),
    _linear_only("percentile", "Percentile, equal lengths", method="Percentile", equal_length=True),
    _linear_only("entropy", "Entropy, equal lengths", method="Entropy", equal_length=True),
    Competitor("ort-dynamic", "ORT dynamic, per tensor", DYNAMIC),
    Competitor("ort-dynamic-channel", "ORT dynamic, per channel", DYNAMIC, {"per_channel": True}),
    Competitor("nncf", "NNCF quantize, default", NNCF_INT8, environment="nncf"),
    Competitor(
        "nncf-bias",
        "NNCF quantize, fast_bias_correction=False",
        NNCF_INT8,
        {"fast_bias_correction": False},
        environment="nncf",
    ),
    Competitor(
        "nncf-transformer",
        "NNCF quantize, model_type=TRANSFORMER",
        NNCF_INT8,
        {"transformer": True},
        WITH_MATMUL,
        "nncf",
    ),
    Competitor(
        "tflite",
        "TensorFlow Lite int8, as Q/DQ",
        "quantization.rivals.shipped:quantize",
        {"file": "model_tflite_int8_qdq.onnx"},
        (*CNNS, "ad_autoencoder"),
    ),
    _nbits("rtn-sym-32", "RTN symmetric, group 32", block_size=32, symmetric=True),
    _nbits("rtn-asym-32", "RTN asymmetric, group 32", block_size=32, symmetric=False),
    _nbits("k-quant-32", "k-quant, group 32", block_size=32, algorithm="k_quant", symmetric=False),
    _nbits(
        "gptq-32",
        "GPTQ act-order and MSE, group 32",
        block_size=32,
        algorithm="gptq",
        actorder=True,
        mse=True,
        time_limit_s=300.0,
    ),
    _nbits("hqq-32", "HQQ, group 32", block_size=32, algorithm="hqq", symmetric=False, time_limit_s=300.0),
    _nncf_weights("sym-32", "INT4_SYM, group 32", mode="INT4_SYM", group_size=32),
    _nncf_weights("asym-32", "INT4_ASYM, group 32", mode="INT4_ASYM", group_size=32),
    _nncf_weights(
        "aware-32",
        "INT4_SYM, group 32, AWQ and scale estimation",
        mode="INT4_SYM",
        group_size=32,
        data_aware=True,
    ),
)

COMPETITORS = (*BITWRIGHT, *RIVALS)

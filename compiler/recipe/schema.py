"""A recipe: which formats may be used and which methods prepare them; named ones are shipped, others are YAML files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bitwright.targets.schema import NAME_PATTERN, Format
from bitwright.targets.sections.record import Strict

Candidate = Literal[Format, "float"]


class Migrate(Strict):
    """Rewrites that preserve the function and make it easier to quantize.

    Attributes:
        equalize: Even out the channels of neighbouring layers (cross-layer equalization).
        smooth: Move activation outliers into weights (SmoothQuant), strength chosen per input.
        disassemble: Share of extra channels that outlier channels may be split into (QLLM); 0 leaves them.
        awq: Protect the weights that meet large activations (AWQ); for weight-only formats.
        split_outliers: Outlier input channels of a layer that are multiplied in float (LLM.int8); 0 for none.
        rotate: Multiply the residual stream of a llama decoder by a Hadamard matrix that is folded into the weights
            (QuaRot), and its values head by head; refused for other models.
        rotate_down: With ``rotate``: neighbouring channels in front of each down projection that are rotated when
            the model runs; 0 for none.
    """

    equalize: bool = True
    smooth: bool = True
    disassemble: Annotated[float, Field(ge=0, le=0.25)] = 0.03
    awq: bool = False
    split_outliers: Annotated[int, Field(ge=0, le=256)] = 0
    rotate: bool = False
    rotate_down: Annotated[int, Field(ge=0, le=256)] = 0


class Rounding(Strict):
    """From a float weight to integers.

    Attributes:
        granularity: ``kernel``: the group length that the kernel prefers. ``error``: a length, with or without zero
            points, for every weight by its error and the bits its scales take.
        zero_points: Groups of integers may have zero points; false: all are symmetric, and no zero points are stored.
        stored_scales: How the file of ONNX Runtime holds the scales of groups: as float32, as bfloat16, or as 8-bit
            integers times the scale of up to 8 neighbouring groups (as k-quants do). The latter are widened when
            a session is opened. An artifact's scales are float32.
        scales: From the largest magnitude, or searched for the least square error.
        method: Round to nearest, or with the error fed forward (GPTQ).
        refine: Improve the integers by coordinate descent on the layer's output error.
        correct_bias: Take the mean error of a layer's output off its bias. For rounding to nearest: GPTQ minimizes the
            mean error together with the rest, and what is left is noise of the calibration samples.
    """

    granularity: Literal["kernel", "error"] = "kernel"
    zero_points: bool = True
    stored_scales: Literal["float32", "bfloat16", "integer"] = "float32"
    scales: Literal["max", "mse"] = "mse"
    method: Literal["nearest", "gptq"] = "gptq"
    refine: bool = False
    correct_bias: bool = False


class Recipe(Strict):
    """A whole recipe.

    Attributes:
        schema_version: Version of this schema, YAML key ``schema``.
        name: What reports call it.
        description: One line.
        formats: Formats of operators with a constant weight, best first.
        choose: With several formats, ``first``: each operator runs in the first that the target has a kernel for;
            ``allocate``: the allocator chooses one of them for each group of layers, under budgets; float must be
            listed to be chosen.
        others: Formats of the operators between them.
        tables: Formats of embedding tables.
        group: Weights that share a scale in grouped formats; absent: the kernel's first choice.
        migrate: Rewrites before rounding.
        rounding: How weights are rounded.
        nodes: Format of single nodes, by name.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: str = Field(pattern=NAME_PATTERN)
    description: str = ""
    formats: tuple[Candidate, ...] = Field(min_length=1)
    choose: Literal["first", "allocate"] = "first"
    others: tuple[Format, ...] = ("int8",)
    tables: tuple[Candidate, ...] = ("int8",)
    group: Annotated[int, Field(ge=16, le=256)] | None = None
    migrate: Migrate = Migrate()
    rounding: Rounding = Rounding()
    nodes: dict[str, Candidate] = {}

"""Small llama decoders as the common exporters write them: with inputs for a mask and for positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import llama_models as llama
import numpy as np
import onnx
import onnx.parser
from llama_models import Sizes
from onnx import numpy_helper

MaskForm = Literal["triangle", "looked up", "added up"]
MASK, POSITIONS = "attention_mask", "position_ids"
KEYS, VALUES = "past_key_values_{}_key", "past_key_values_{}_value"
HEAD = """
<ir_version: 8, opset_import: ["" : 17]>
decoder (int64[N, T] input_ids{inputs}) => (float[N, T, {vocabulary}] logits{outputs})
{{
sizes = Shape(input_ids)
batch = Gather(sizes, zeros)
new = Gather(sizes, one)
new1 = Gather(sizes, ones)
"""
PAST = """
cache_sizes = Shape({cache})
past = Gather(cache_sizes, two_scalar)
"""
NO_PAST = "past = Identity(zero)\n"
COUNTS = """
total = Add(past, new)
total1 = Unsqueeze(total, zeros)
whole_mask = Concat<axis=0>(batch, ones, new1, total1)
"""
# Optimum with transformers below 4.50: a triangle of the lowest number, the mask expanded and put over it.
TRIANGLE = """
square = Concat<axis=0>(new1, total1)
lows = ConstantOfShape<value = float[1] {{-3.4028234663852886e38}}>(square)
first_later = Add(past, one)
triangle = Trilu<upper=1>(lows, first_later)
mask4 = Unsqueeze({mask}, one_two)
wide = Expand(mask4, whole_mask)
wide_float = Cast<to=1>(wide)
inverted = Sub(unit, wide_float)
hidden = Cast<to=9>(inverted)
mask = Where(hidden, lowest, triangle)
"""
# TorchScript of later versions: the mask is looked up at flat indices, its size compared with -1.
LOOKED_UP = """
later = Range(zero, new, one)
rows0 = Add(later, past)
rows = Unsqueeze(rows0, ones)
columns = Range(zero, total, one)
sees = LessOrEqual(columns, rows)
bools = Cast<to=9>({mask})
flat_mask = Flatten<axis=2>(bools)
batch0 = Squeeze(batch)
numbers = Range(zero, batch0, one)
numbers4 = Unsqueeze(numbers, one_two_three)
stride = Mul(numbers4, total1)
indices = Add(columns, stride)
found = Gather<axis=0>(flat_mask, indices)
found_shape = Shape(indices)
lined = Reshape(found, minus)
square = Reshape(lined, found_shape)
allowed4 = And(sees, square)
open_size = Concat<axis=0>(batch, minus, new1, total1)
is_open = Equal(open_size, all_minus)
full_size = Where(is_open, all_ones, open_size)
allowed = Expand(allowed4, full_size)
mask = Where(allowed, nothing, never)
"""
# A sum along the mask says how far positions are apart: nothing else is a range.
ADDED_UP = """
counts = CumSum({mask}, one)
from_new = Slice(counts, past1, total1, ones)
rows = Unsqueeze(from_new, two)
columns = Unsqueeze(counts, ones)
sees = LessOrEqual(columns, rows)
bools = Cast<to=9>({mask})
bools3 = Unsqueeze(bools, ones)
both = And(sees, bools3)
both4 = Unsqueeze(both, ones)
mask = Where(both4, nothing, never)
"""
FORMS = {"triangle": TRIANGLE, "looked up": LOOKED_UP, "added up": ADDED_UP}
# Positions of models without an input for them: how many have been seen, one where nobody looks.
COUNTED = """
seen = CumSum({mask}, one)
before = Sub(seen, one)
unseen = Equal({mask}, zero)
all_positions = Where(unseen, one, before)
positions = Slice(all_positions, past1, total1, ones)
"""
ANGLES = """
column = Unsqueeze({positions}, two)
pf = Cast<to=1>(column)
angles = Mul(pf, frequencies)
twice = Concat<axis=-1>(angles, angles)
c_raw = Cos(twice)
s_raw = Sin(twice)
c_unit = Mul(c_raw, unit)
s_unit = Mul(s_raw, unit)
c = Unsqueeze(c_unit, ones)
s = Unsqueeze(s_unit, ones)
x0 = Gather<axis=0>(w_embedding, input_ids)
"""
# Tables of earlier versions: cut to the length, then looked up by position.
LOOKED_UP_ANGLES = """
c_cut = Slice(cos_table, zeros, total1, zeros)
s_cut = Slice(sin_table, zeros, total1, zeros)
c_rows = Gather<axis=0>(c_cut, {positions})
s_rows = Gather<axis=0>(s_cut, {positions})
c = Unsqueeze(c_rows, ones)
s = Unsqueeze(s_rows, ones)
x0 = Gather<axis=0>(w_embedding, input_ids)
"""


SIZES = Sizes(cache=True, computed_angles=True, vocabulary=257)


@dataclass(frozen=True)
class Masked:
    """A decoder to build.

    Attributes:
        sizes: Of the decoder inside; ``computed_angles`` decides where cosines come from.
        form: How the mask is made.
        positions: Whether positions are an input; else they are counted along the mask.
    """

    sizes: Sizes = SIZES
    form: MaskForm = "triangle"
    positions: bool = True


def masked_model(given: Masked | None = None) -> onnx.ModelProto:
    """Return a decoder with random weights; sequences may be padded on either side."""
    g = given or Masked()
    model = onnx.parser.parse_model(_text(g))
    s = g.sizes
    arrays = {**llama.constant_arrays(s), **llama.weight_arrays(s), **_constants()}
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    onnx.checker.check_model(model)
    return model


def _constants() -> dict[str, np.ndarray]:
    integers = {
        "minus": [-1],
        "one_two": [1, 2],
        "one_two_three": [1, 2, 3],
        "all_minus": [-1] * 4,
        "all_ones": [1] * 4,
        "two_scalar": 2,
    }
    lowest = {"lowest": np.array(np.finfo(np.float32).min, np.float32)}
    return {**{k: np.array(v, np.int64) for k, v in integers.items()}, **lowest}


def _text(g: Masked) -> str:
    s = g.sizes
    caches = [name.format(n) for n in range(s.layers) for name in (KEYS, VALUES)] if s.cache else []
    kind = f"float[N, {s.key_heads}, {{}}, {s.head_width}]"
    extra = [MASK, *([POSITIONS] if g.positions else [])]
    inputs = "".join(f", int64[N, {'S' if name == MASK else 'T'}] {name}" for name in extra)
    inputs += "".join(f", {kind.format('P')} {name}" for name in caches)
    outputs = "".join(f", {kind.format('R')} {_present(name)}" for name in caches)
    text = HEAD.format(inputs=inputs, outputs=outputs, vocabulary=s.vocabulary)
    text += PAST.format(cache=caches[0]) if s.cache else NO_PAST
    text += COUNTS + "past1 = Unsqueeze(past, zeros)\n" + FORMS[g.form].format(mask=MASK)
    text += "" if g.positions else COUNTED.format(mask=MASK)
    angles = ANGLES if s.computed_angles else LOOKED_UP_ANGLES
    text += angles.format(positions=POSITIONS if g.positions else "positions")
    body = "".join(llama.layer_text(s, n) for n in range(s.layers))
    for n in range(s.layers if s.cache else 0):
        for part, name in (("k", KEYS), ("v", VALUES)):
            body = body.replace(f"new_past_{part}{n}", _present(name.format(n)))
            body = body.replace(f"past_{part}{n}", name.format(n))
    text += body + llama.NORM.format(x=f"x{s.layers}", to="z", gain="g_z")
    return text + "logits = MatMul(z, w_head)\n}"


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")

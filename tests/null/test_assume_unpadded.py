"""The pass that computes masks and positions: what it takes away, what it leaves alone, what it refuses."""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from llama_models import Sizes, llama_model
from masked_models import FORMS, MASK, POSITIONS, Masked, MaskForm, masked_model

from bitwright.compiler.errors import ModelError
from bitwright.compiler.llama.reach import table_positions
from bitwright.passes.assume_unpadded import AssumeUnpadded
from bitwright.passes.fuse_decoder_attention import FuseDecoderAttention
from bitwright.passes.normalize import normalize

TINY = """
<ir_version: 8, opset_import: ["": {opset}]>
g (int64[N, T] ids, {mask} attention_mask) => (float[N, T, 4] logits{more}) {{
    table = Constant<value = float[4, 4] {{0,9,0,0, 0,0,9,0, 0,0,0,9, 9,0,0,0}}>()
    rows = Gather<axis=0>(table, ids)
    logits = Identity(rows)
    {body}
}}
"""


def parsed(opset: int = 17, mask: str = "int64[N, T]", more: str = "", body: str = "") -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TINY.format(opset=opset, mask=mask, more=more, body=body)))


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_interface_is_that_of_our_own_exports(form: MaskForm, positions: bool) -> None:
    given = masked_model(Masked(form=form, positions=positions))
    model = ir.from_proto(given)
    result = AssumeUnpadded().run(model)
    assert result.changed == 1 + positions
    assert result.notes == (
        "'attention_mask' and 'position_ids' are computed: no position is padded"
        if positions
        else "'attention_mask' is computed: no position is padded",
    )
    expected = [i.name for i in given.graph.input if i.name not in (MASK, POSITIONS)]
    assert [v.name for v in model.graph.inputs] == expected
    assert [v.name for v in model.graph.outputs] == [o.name for o in given.graph.output]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert AssumeUnpadded().run(model).changed == 0


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_recognised_only_then(form: MaskForm) -> None:
    before, after = (ir.from_proto(masked_model(Masked(form=form))) for _ in range(2))
    AssumeUnpadded().run(after)
    for model in (before, after):
        normalize(model, 20)
    kept = FuseDecoderAttention().run(before)
    assert kept.changed == 0 and "what is in the input 'attention_mask'" in kept.notes[0]
    assert FuseDecoderAttention().run(after).changed == 2
    assert "Softmax" not in {n.op_type for n in after.graph}


def test_decoders_without_such_inputs_are_left_alone() -> None:
    model = ir.from_proto(llama_model(Sizes(cache=True)))
    before = ir.to_proto(model).SerializeToString()
    result = AssumeUnpadded().run(model)
    assert result.changed == 0 and result.notes == ()
    assert ir.to_proto(model).SerializeToString() == before


def test_a_mask_that_nobody_reads_goes_too() -> None:
    model = parsed()
    assert AssumeUnpadded().run(model).changed == 1
    assert [v.name for v in model.graph.inputs] == ["ids"]


@pytest.mark.parametrize("kind", ["float", "bool", "int32", "float16"])
def test_masks_keep_their_type(kind: str) -> None:
    model = parsed(mask=f"{kind}[N, S]", body="unread = Shape(attention_mask)")
    kept = model.graph.inputs[1].dtype
    AssumeUnpadded().run(model)
    reader = next(n for n in model.graph if n.outputs[0].name == "unread")
    assert reader.inputs[0] is not None and reader.inputs[0].dtype == kept
    assert reader.inputs[0].producer() is not None
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (parsed(opset=10), "opset 10 cannot count positions"),
        (parsed(mask="int64[N, 1, T, T]"), "is no matrix of numbers"),
        (ir.from_proto(onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] image, int64[N, T] attention_mask)'
            " => (float[N, 3] out) { out = Relu(image) }"
        )), "not a decoder"),
    ],
)  # fmt: skip
def test_what_is_refused(model: ir.Model, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        AssumeUnpadded().run(model)


def test_a_mask_that_is_returned_is_refused() -> None:
    model = parsed()
    model.graph.outputs.append(model.graph.inputs[1])
    with pytest.raises(ModelError, match="returns it as it is") as caught:
        AssumeUnpadded().run(model)
    assert "attention_mask" in caught.value.where


@pytest.mark.parametrize("computed", [True, False])
def test_how_far_tables_reach(computed: bool) -> None:
    sizes = Sizes(computed_angles=computed, positions=24)
    expected = None if computed else 24
    for proto in (llama_model(sizes), masked_model(Masked(sizes))):
        model = ir.from_proto(proto)
        assert table_positions(model) == expected
        AssumeUnpadded().run(model)
        normalize(model, 20)
        assert table_positions(model) == expected
        assert FuseDecoderAttention().run(model).changed == 2
        assert table_positions(model) == expected

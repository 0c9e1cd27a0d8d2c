"""Forward values and gradients of the trainable quantizers."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs PyTorch: pip install bitwright[qat]")
torch.set_num_threads(1)

from bitwright.compiler.errors import UsageError  # noqa: E402
from bitwright.compiler.plan.model import ActivationQuant, WeightQuant  # noqa: E402
from bitwright.compiler.training.fake_quantization import few_values, learned_sign, learned_step  # noqa: E402
from bitwright.compiler.training.quantizers import ActivationQuantizer, WeightQuantizer  # noqa: E402
from bitwright.passes.round_nearest import round_to_nearest  # noqa: E402
from bitwright.passes.stored_weights import expand  # noqa: E402

LOW, HIGH = -2.0, 1.0


def values(*shape):
    return np.random.default_rng(1).normal(0, 1, shape)


def surrogate(value, scale, low, high, residual):
    """What learned_step would be if rounding added a constant to each value inside the grid."""
    steps = value / scale
    inside = (steps > low) & (steps < high)
    return np.where(inside, steps + residual, np.clip(steps, low, high)) * scale


def test_the_gradient_of_the_scale_is_that_of_the_surrogate():
    value, scale, pull = values(6, 50), np.abs(values(6, 1)) + 0.3, values(6, 50)
    steps = value / scale
    residual = np.rint(steps) - steps
    step = 1e-6
    ends = [(surrogate(value, s, LOW, HIGH, residual) * pull).sum(1) for s in (scale + step, scale - step)]
    expected = (ends[0] - ends[1]) / (2 * step) / math.sqrt(50 * 2)
    parameter = torch.tensor(scale, requires_grad=True)
    (learned_step(torch.tensor(value), parameter, LOW, HIGH, 50) * torch.tensor(pull)).sum().backward()
    # Central differences of a function that is linear in the scale between the edges of the grid.
    np.testing.assert_allclose(parameter.grad.numpy()[:, 0], expected, rtol=1e-5, atol=1e-7)


def test_gradients_pass_where_nothing_was_clipped_and_nowhere_else():
    value = torch.tensor([-3.0, -1.4, 0.2, 0.9, 1.1, 7.0], requires_grad=True)
    rounded = learned_step(value, torch.tensor(1.0), LOW, HIGH, 6)
    assert rounded.tolist() == [-2.0, -1.0, 0.0, 1.0, 1.0, 1.0]
    rounded.sum().backward()
    assert value.grad.tolist() == [0, 1, 1, 1, 0, 0]


def test_rounding_is_half_to_even_like_onnx():
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert learned_step(halves, torch.tensor(1.0), -8, 7, 1).tolist() == [0, 2, 2, 0, -2]


def test_few_values_pass_every_gradient():
    weight = torch.tensor([-3.0, -0.2, 0.0, 0.6], requires_grad=True)
    ternary = few_values(weight, torch.tensor(1.0), zero=True)
    assert ternary.tolist() == [-1, 0, 0, 1]
    (ternary * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert weight.grad.tolist() == [1, 2, 3, 4]
    assert few_values(weight, torch.tensor(0.5), zero=False).tolist() == [-0.5, -0.5, -0.5, 0.5]


def test_the_scale_of_signs_is_learned_from_their_gradients():
    weight = torch.tensor([-3.0, 0.5, 0.0], requires_grad=True)
    scale = torch.tensor([2.0], requires_grad=True)
    (learned_sign(weight, scale, 3) * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert weight.grad.tolist() == [0, 10, 100]
    np.testing.assert_allclose(scale.grad.numpy(), (-1 + 10 - 100) / math.sqrt(3), rtol=1e-6)


QUANTS = {
    "int8 a channel": WeightQuant("w", "int8", 0, np.full(4, 0.02, np.float32)),
    "2 bits a channel": WeightQuant("w", "int8", 0, np.full(4, 0.9, np.float32), bits=2),
    "4 bits a tensor": WeightQuant("w", "int8", None, np.full(1, 0.3, np.float32), bits=4),
    "ternary a channel": WeightQuant("w", "int8", 1, np.full(40, 0.7, np.float32), bits=2, codebook="ternary"),
    "binary a channel": WeightQuant("w", "int8", 0, np.full(4, 0.7, np.float32), bits=1, codebook="binary"),
    "ternary in groups": WeightQuant("w", "int2", 1, np.full((4, 3), 0.6, np.float32), None, 16, 2, "ternary"),
    "4 bits in groups with zero points": WeightQuant(
        "w", "uint4", 1, np.full((4, 3), 0.25, np.float32), np.arange(12).reshape(4, 3).astype(np.uint8), 16, 4
    ),
    "8 bits in groups along rows": WeightQuant("w", "int8", 0, np.full((1, 40), 0.02, np.float32), None, 32, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("scaling", ["learned", "mean"])
def test_a_module_rounds_to_the_integers_that_are_written(name, scaling):
    weight = values(4, 40).astype(np.float32)
    module = WeightQuantizer(QUANTS[name], weight.shape, scaling)
    found = module(torch.from_numpy(weight))
    quant = module.learned(torch.from_numpy(weight))
    integers = round_to_nearest(weight, quant).astype(np.float32)
    zero = 0 if quant.zero_point is None else expand(quant.zero_point.astype(np.float32), quant, weight.shape)
    np.testing.assert_array_equal(
        found.detach().numpy(), (integers - zero) * expand(quant.scale, quant, weight.shape)
    )


def test_mean_scales_are_the_mean_magnitudes_of_the_groups():
    weight = values(4, 40).astype(np.float32)
    module = WeightQuantizer(QUANTS["ternary in groups"], weight.shape, "mean")
    scale = module.learned(torch.from_numpy(weight)).scale
    expected = np.stack([np.abs(weight[:, a:b]).mean(1) for a, b in ((0, 16), (16, 32), (32, 40))], axis=1)
    np.testing.assert_allclose(scale, expected, rtol=1e-6)


def test_scales_of_groups_with_zero_points_are_learned():
    quant = QUANTS["4 bits in groups with zero points"]
    module = WeightQuantizer(quant, (4, 40), "learned")
    module(torch.from_numpy(values(4, 40).astype(np.float32))).square().sum().backward()
    assert bool((module.log_scale.grad != 0).all())


def test_codebooks_without_a_grid_are_refused():
    with pytest.raises(UsageError, match="nf4 cannot be trained"):
        WeightQuantizer(
            WeightQuant("w", "uint4", 0, np.ones((1, 4), np.float32), None, 16, 4, "nf4"), (16, 4), "learned"
        )


def test_an_activation_saturates_at_its_own_integers():
    quant = ActivationQuant("x", "uint8", 0.5, 3, -1.5, 6.0)
    module = ActivationQuantizer(quant, 0, 15)
    found = module(torch.tensor([[-9.0, -1.5, 0.0, 0.3, 5.9, 9.0]]))
    assert found.tolist() == [[-1.5, -1.5, 0.0, 0.5, 6.0, 6.0]]
    learned = module.learned()
    assert (learned.zero_point, learned.low, learned.high) == (3, -1.5, 6.0)
    assert learned.scale == pytest.approx(0.5, rel=1e-6)

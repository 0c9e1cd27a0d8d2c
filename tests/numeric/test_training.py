"""Training end to end on a small network: proof, determinism, checkpoints, and what is written."""

import dataclasses
import importlib.util
from collections import Counter

import numpy as np
import onnx
import pytest
import training_models

torch = pytest.importorskip("torch", reason="training needs PyTorch: pip install bitwright[qat]")
torch.set_num_threads(1)

import bitwright  # noqa: E402
from bitwright.compiler import quantizing  # noqa: E402
from bitwright.compiler.cli.app import main  # noqa: E402
from bitwright.compiler.compilation import Compilation, Silent  # noqa: E402
from bitwright.compiler.errors import DataError, ToolchainError, UsageError  # noqa: E402
from bitwright.compiler.ingest.model_reader import read_model  # noqa: E402
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session, run  # noqa: E402
from bitwright.compiler.pipeline import compile_model  # noqa: E402
from bitwright.compiler.training import entry  # noqa: E402
from bitwright.compiler.training import train as verb  # noqa: E402
from bitwright.compiler.training.distillation import Distillation  # noqa: E402
from bitwright.compiler.training.graph_module import GraphModule  # noqa: E402
from bitwright.compiler.training.request import checkpoint_of  # noqa: E402
from bitwright.passes.dequantized import dequantized_array  # noqa: E402
from bitwright.targets.loader import load_profile  # noqa: E402

OPTIONS, TRAINING = training_models.options, training_models.training
PLAIN = SessionConfig(optimize=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("training")
    training_models.write(place)
    return place


@pytest.fixture(scope="module")
def trained(folder):
    return entry.train(OPTIONS(folder), TRAINING())


def arrays(path):
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def test_training_lowers_the_held_out_loss(trained):
    outcome = trained.outcome
    assert outcome.best_loss < 0.5 * outcome.first_loss
    assert outcome.best_loss == min(loss for _, loss in outcome.history)
    assert trained.float_difference < 1e-5


def test_the_file_holds_small_integers_only(trained, folder):
    found = arrays(trained.model)
    weights = {k: v for k, v in found.items() if k.startswith("w") and k.endswith("_quantized")}
    assert len(weights) == 4
    for name, integers in weights.items():
        assert integers.dtype == np.int8
        assert set(np.unique(integers)) <= {-2, -1, 0, 1}, name
    model = read_model(trained.model).model
    quantized = [n.outputs[0] for n in model.graph if n.op_type == "QuantizeLinear"]
    model.graph.outputs[:] = quantized
    session = open_session(model, PLAIN)
    x = np.load(folder / "x.npz")["x"]
    largest = {name: int(value.max()) for name, value in run(session, {"x": x}).items()}
    assert sum(value <= 15 for value in largest.values()) == 3  # what the convolutions read
    assert sum(value > 15 for value in largest.values()) >= 3  # what the addition reads, what pooling writes


def test_the_file_computes_what_the_module_computed(folder):
    options = OPTIONS(folder, "compared.onnx")
    training = TRAINING()
    c = Compilation(options, load_profile(options.target), Silent())
    tensors = verb.start_plan(c, training)
    student, teacher, _ = verb._modules(c, training, tensors)
    verb._trained(c, training, student, teacher)
    x = np.load(folder / "x.npz")["x"]
    with torch.no_grad():
        expected = student({"x": torch.from_numpy(x)})["l"].numpy()
    model, _ = verb.written_model(c, student, verb._levels(c, training, tensors))
    model.graph.outputs[0] = model.graph.outputs[0].producer().inputs[0]
    found = next(iter(run(open_session(model, PLAIN), {"x": x}).values()))
    # Sums in another order tip a rounding here and there: a step of an 8-bit tensor, not a different function.
    assert np.mean(np.abs(found - expected) > 1e-4 * np.abs(expected).max()) < 0.05
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_training_starts_at_the_weights_that_rounding_with_feedback_finds(folder):
    options, training = OPTIONS(folder, "start.onnx"), TRAINING()
    c = Compilation(options, load_profile(options.target), Silent())
    tensors = verb.start_plan(c, training)
    student, _, _ = verb._modules(c, training, tensors)
    rounded = quantizing.rounded_model(c, c.plan)
    reads = {n.name: n.inputs for n in rounded.graph}
    moved = 0
    for node in c.model.graph:
        decision = c.plan.nodes.get(node.name)
        if decision is None or not decision.weight:
            continue
        key = decision.weight
        before = torch.from_numpy(np.array(node.inputs[1].const_value.numpy()))
        start = student.weight(student.points.weight_names[key][0])
        with torch.no_grad():
            found, nearest = student.points.weight(key)(start), student.points.weight(key)(before)
        np.testing.assert_allclose(found, dequantized_array(reads[node.name][1]), rtol=1e-6, atol=1e-7)
        moved += int((found != nearest).sum())
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            np.testing.assert_array_equal(
                student.weight(bias.name).detach(), reads[node.name][2].const_value.numpy()
            )
    assert moved > 10  # some weights are rounded another way than to nearest


def hidden_differences(folder, weight):
    """Return the mean relative difference of the hidden layers before and after training."""
    options, training = OPTIONS(folder, "hidden.onnx"), TRAINING(hidden=weight)
    c = Compilation(options, load_profile(options.target), Silent())
    tensors = verb.start_plan(c, training)
    student, teacher, _ = verb._modules(c, dataclasses.replace(training, hidden=1.0), tensors)
    assert student.hidden == teacher.hidden == ("r0", "r1", "c2", "r2", "p")
    x = torch.from_numpy(np.load(folder / "x.npz")["x"])

    def differences():
        with torch.no_grad():
            found, wanted = student({"x": x}), teacher({"x": x})
        assert float(found["r0"].max()) > student.points.activation("r0").learned().high  # not yet rounded
        return np.mean(
            [
                float((found[n] - wanted[n]).square().mean() / wanted[n].square().mean())
                for n in student.hidden
            ]
        )

    before = differences()
    verb._trained(c, training, student, teacher)
    return before, differences()


def test_hidden_layers_come_nearer_where_they_are_compared(folder):
    before, compared = hidden_differences(folder, 3.0)
    again, alone = hidden_differences(folder, 0.0)
    assert before == again
    assert compared < alone
    assert compared < before


def test_the_hidden_layers_part_of_the_loss():
    student = {"y": torch.tensor([[0.0, 1.0]]), "h": torch.tensor([2.0, 0.0])}
    teacher = {"y": torch.tensor([[0.0, 1.0]]), "h": torch.tensor([1.0, 1.0])}
    loss = Distillation(hidden=0.5, layers=("h",))
    assert float(loss.judged(student, teacher, None)) == 0.0
    assert float(loss(student, teacher, None)) == 0.5  # squared differences 1 and 1, mean square 1


def test_the_same_seed_gives_the_same_file(trained, folder):
    again = entry.train(OPTIONS(folder, "again.onnx"), TRAINING())
    assert again.model.read_bytes() == trained.model.read_bytes()
    other = entry.train(OPTIONS(folder, "other.onnx"), TRAINING(seed=1))
    assert not same(arrays(other.model), arrays(trained.model))


class Interrupting(Silent):
    def __init__(self, at):
        self.at = at

    def step(self, done, total, what):
        if done == self.at and what.startswith("steps"):
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_as_if_it_had_not_been(trained, folder):
    options = OPTIONS(folder, "resumed.onnx")
    with pytest.raises(KeyboardInterrupt):
        entry.train(options, TRAINING(), Interrupting(7))
    assert checkpoint_of(options.output).is_file()
    assert not options.output.exists()
    with pytest.raises(UsageError, match="other settings: seed"):
        entry.train(options, TRAINING(seed=3, resume=True))
    resumed = entry.train(options, TRAINING(resume=True))
    assert resumed.model.read_bytes() == trained.model.read_bytes()
    assert resumed.outcome == trained.outcome
    assert not checkpoint_of(options.output).exists()


def test_a_damaged_checkpoint_is_refused(folder):
    options = OPTIONS(folder, "damaged.onnx")
    checkpoint_of(options.output).write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        entry.train(options, TRAINING(resume=True))
    np.savez(checkpoint_of(options.output), header=np.frombuffer(b'{"version": 0}', np.uint8))
    with pytest.raises(UsageError, match="no checkpoint of this version"):
        entry.train(options, TRAINING(resume=True))


def test_a_checkpoint_of_another_model_is_refused(folder):
    options = OPTIONS(folder, "foreign.onnx")
    place = checkpoint_of(options.output)
    with pytest.raises(KeyboardInterrupt):
        entry.train(options, TRAINING(), Interrupting(7))
    kept = dict(np.load(place))
    np.savez(place, **{k: v for k, v in kept.items() if not k.startswith("best/")})
    with pytest.raises(UsageError, match="belongs to another model"):
        entry.train(options, TRAINING(resume=True))


def test_a_circuit_computes_the_trained_integers(folder):
    pytest.importorskip("pyosys", reason="simulating circuits needs pyosys: pip install bitwright[fpga]")
    options = OPTIONS(folder, "circuit.onnx", target="ecp5-85f")
    trained = entry.train(options, TRAINING(2, 4, epochs=1.0))
    place = folder / "circuit"
    bundle = compile_model(
        dataclasses.replace(options, model=trained.model, output=place, dims={"N": 1}, golden=1)
    )
    verified = bundle.report["verification"]
    assert verified["passed"]
    rounded = next(m for m in verified["measurements"] if "rounded" in m["label"])
    # A circuit multiplies by 16-bit integers instead of floats: near a half it may round to the other side.
    assert int(rounded["value"]) <= 0.01 * verified["elements"]


def test_onnx_runtime_computes_the_narrow_integers_with_its_integer_kernels(folder):
    made = entry.train(OPTIONS(folder, "ort.onnx"), TRAINING(epochs=1.0, runtime="onnxruntime"))
    model, optimized = read_model(made.model).model, folder / "optimized.onnx"
    config = config_for(load_profile(training_models.TARGET).runtimes.onnxruntime)
    x = np.load(folder / "x.npz")["x"]
    fused = run(open_session(model, config, optimized_path=optimized), {"x": x})["y"]
    counts = Counter(n.op_type for n in onnx.load(optimized).graph.node)
    assert (counts["QLinearConv"], counts["QGemm"], counts["Clip"]) == (3, 1, 3)
    assert not counts["Conv"] + counts["FusedConv"] + counts["Gemm"]
    np.testing.assert_allclose(fused, run(open_session(model, PLAIN), {"x": x})["y"], atol=0.01)


def test_the_pipeline_takes_the_file_as_it_is(trained, folder):
    dump = folder / "dump"
    options = dataclasses.replace(
        OPTIONS(folder), model=trained.model, output=None, dump=dump, stop_after="audit"
    )
    compile_model(options)
    last = max(dump.glob("*-audit.onnx"))
    assert Counter(n.op_type for n in onnx.load(last).graph.node) == Counter(
        n.op_type for n in onnx.load(trained.model).graph.node
    )
    before, after = arrays(trained.model), arrays(last)
    integers = [k for k, v in before.items() if v.dtype == np.int8 and v.ndim > 1]
    assert len(integers) == 4
    assert all(any(np.array_equal(before[k], v) for v in after.values()) for k in integers)


def test_ternary_weights_take_mean_scales(folder):
    training = TRAINING("ternary", None, scaling="mean", mixture=0.5, epochs=2.0)
    found = arrays(entry.train(OPTIONS(folder, "ternary.onnx"), training).model)
    weights = {k: v for k, v in found.items() if k.startswith("w") and k.endswith("_quantized")}
    assert all(set(np.unique(v)) == {-1, 0, 1} for v in weights.values())


def test_labels_and_squared_error(folder):
    labelled = TRAINING(labels=folder / "labels.npz", label_share=1.0, epochs=8.0)
    outcome = entry.train(OPTIONS(folder, "labelled.onnx"), labelled).outcome
    assert outcome.best_loss < outcome.first_loss
    squared = entry.train(OPTIONS(folder, "squared.onnx"), TRAINING(None, None, loss="mse", epochs=1.0))
    assert squared.outcome.best_loss < 0.1  # of the mean square: 8 bits lose little


def test_a_bound_on_time_bounds_the_steps(folder):
    outcome = entry.train(OPTIONS(folder, "timed.onnx"), TRAINING(epochs=1e6, minutes=0.01)).outcome
    assert 1 <= outcome.steps < 2000


def test_labels_that_do_not_fit_are_refused(folder):
    np.savez(folder / "short.npz", y=np.zeros(3, np.int64))
    with pytest.raises(DataError, match=f"3 labels for {training_models.SAMPLES} samples"):
        entry.train(OPTIONS(folder, "no.onnx"), TRAINING(labels=folder / "short.npz"))
    np.savez(folder / "high.npz", y=np.full(training_models.SAMPLES, 5))
    with pytest.raises(DataError, match="from 5 to 5 do not fit"):
        entry.train(OPTIONS(folder, "no.onnx"), TRAINING(labels=folder / "high.npz"))
    np.savez(folder / "floats.npz", y=np.zeros(training_models.SAMPLES))
    with pytest.raises(DataError, match="not one of integers"):
        entry.train(OPTIONS(folder, "no.onnx"), TRAINING(labels=folder / "floats.npz"))
    assert not (folder / "no.onnx").exists()


@pytest.mark.parametrize(
    ("recipe", "why"), [("int8-row", "no scales to be trained"), ("mixed", "one format")]
)
def test_recipes_without_a_grid_are_refused(folder, recipe, why):
    with pytest.raises(UsageError, match=why):
        entry.train(OPTIONS(folder, "no.onnx", recipe=recipe), TRAINING(None, None, runtime="onnxruntime"))


def test_widths_need_layers_of_8_bits(folder):
    with pytest.raises(UsageError, match="no layer between the first and the last"):
        entry.train(OPTIONS(folder, "no.onnx", recipe="w8"), TRAINING(2, None))


@pytest.mark.parametrize(
    ("changes", "option"),
    [({"rate": 0.0}, "--rate"), ({"mixture": 2.0}, "--mix"), ({"held": 1.0}, "--hold"), ({"loss": "l1"}, "--loss"),
     ({"hidden": -1.0}, "--hidden"), ({"weights": 9}, "--weights"), ({"weights": "trinary"}, "--weights"),
     ({"activations": 0}, "--activations")],
)  # fmt: skip
def test_options_out_of_range_are_refused(changes, option):
    with pytest.raises(UsageError) as found:
        TRAINING(**changes)
    assert found.value.where == option


def test_without_pytorch_the_verb_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r"pip install bitwright\[qat\]"):
        entry.train(OPTIONS(folder), TRAINING())
    code = main(
        ["train", str(folder / "model.onnx"), "-t", training_models.TARGET, "-d", str(folder / "x.npz")]
    )
    assert code == ToolchainError.exit_code
    assert "bitwright[qat]" in capsys.readouterr().err


def test_the_command_line_and_the_function_make_the_same_file(folder, capsys):
    place = folder / "typed.onnx"
    typed = ["--weights", "4", "--activations", "4", "--epochs", "1", "--seed", "2", "--all-layers", "-q"]
    code = main(
        [
            "train",
            str(folder / "model.onnx"),
            "-t",
            training_models.TARGET,
            "-d",
            str(folder / "x.npz"),
            *typed,
            "-o",
            str(place),
        ]
    )
    assert code == 0
    assert capsys.readouterr().out.split() == [str(place), str(place.with_suffix(".plan.yaml"))]
    called = bitwright.train(
        folder / "model.onnx",
        target=training_models.TARGET,
        data=folder / "x.npz",
        output=folder / "called.onnx",
        weights=4,
        activations=4,
        all_layers=True,
        training={"epochs": 1.0, "seed": 2},
    )
    assert same(arrays(place), arrays(called.model))


def test_importing_the_verb_does_not_load_pytorch():
    import subprocess
    import sys

    code = "import sys, bitwright.compiler.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert importlib.util.find_spec("torch") is not None


def test_the_float_module_is_the_model(folder):
    model = read_model(folder / "model.onnx").model
    x = np.load(folder / "x.npz")["x"]
    expected = run(open_session(model, PLAIN), {"x": x})["y"]
    found = GraphModule(model)({"x": torch.from_numpy(x)})["y"].detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)

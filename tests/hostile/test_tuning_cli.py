"""The options of tuning, written wrongly; and boards that are not there."""

from __future__ import annotations

import json
import socket

import numpy as np
import onnx
import pytest

import bitwright
from bitwright.compiler.cli.app import main

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[1,16] x) => (float[1,16] y) { h = MatMul(x, w)
 y = Relu(h) }
"""


@pytest.fixture
def model(tmp_path):
    proto = onnx.parser.parse_model(TEXT)
    weight = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=np.zeros((1, 16), np.float32))
    return str(tmp_path / "net.onnx")


def failure(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == code
    assert error["fix"]
    return error


@pytest.mark.parametrize("verb", ["tune", "compile"])
@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--tune", "60 parsecs"], "--tune"),
        (["--tune", "-3"], "--tune"),
        (["--tracker", "nohost"], "--tracker"),
        (["--tracker", "127.0.0.1:9190"], "--tracker"),
        (["--device-key", "a b"], "--device-key"),
        (["--tuning-store", "{folder}"], "--tuning-store"),
        (["--tuning-store", "{folder}/net.onnx/store"], "--tuning-store"),
    ],
)
def test_wrong_options_are_usage_errors(verb, options, where, model, tmp_path, capsys):
    options = [option.replace("{folder}", str(tmp_path)) for option in options]
    output = ["-o", str(tmp_path / "out")] if verb == "compile" else []
    error = failure(capsys, verb, model, "-t", "host", "--random-data", *output, *options)
    assert (error["exit_code"], error["class"]) == (2, "UsageError")
    assert error["where"].startswith(where)
    assert not (tmp_path / "out").exists()


def test_boards_without_a_tracker_cannot_be_measured_on(model, tmp_path, capsys):
    options = ["-d", str(tmp_path / "data.npz"), "--tuning-store", str(tmp_path / "s"), "--device-key", "pi4"]
    error = failure(capsys, "tune", model, "-t", "arm-cortex-a72", *options)
    assert (error["exit_code"], error["where"]) == (2, "--device-key")


def test_a_tracker_that_does_not_answer_is_named_at_once(model, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["-d", str(tmp_path / "data.npz"), "--tuning-store", str(tmp_path / "s")]
    farm = ["--tracker", address, "--device-key", "pi4"]
    error = failure(capsys, "tune", model, "-t", "arm-cortex-a72", *options, *farm)
    assert (error["exit_code"], error["class"]) == (7, "ToolchainError")
    assert address in error["what"] and "rpc_tracker" in error["fix"]
    assert not (tmp_path / "s").exists()


def test_the_python_api_takes_the_same_budgets(model):
    with pytest.raises(bitwright.UsageError, match="parsecs"):
        bitwright.tune(model, target="host", data={"x": np.zeros((2, 16), np.float32)}, budget="60 parsecs")

"""Real models as trainable modules: the same function as in ONNX Runtime, and a gradient for every weight."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs PyTorch: pip install bitwright[qat]")
torch.set_num_threads(1)

from bitwright.compiler.graph.operands import stored_weight, weight_of  # noqa: E402
from bitwright.compiler.ingest.dataset import random_dataset  # noqa: E402
from bitwright.compiler.ingest.model_reader import read_model  # noqa: E402
from bitwright.compiler.ort.session import SessionConfig, open_session, run  # noqa: E402
from bitwright.compiler.training.graph_module import GraphModule  # noqa: E402
from bitwright.passes.normalize import normalize  # noqa: E402

pytestmark = pytest.mark.zoo
MODELS = ("kws_dscnn", "resnet8_cifar10", "vww_mobilenet", "ad_autoencoder", "minilm_l6", "tinylm")
# Sums of up to 1536 float32 products in another order, through up to 28 layers.
BOUND = 1e-4


def path_of(name: str) -> Path:
    found = os.environ.get("BITWRIGHT_ZOO")
    if not found:
        pytest.skip("BITWRIGHT_ZOO does not name the folder of real models")
    if name != "minilm_l6":
        return Path(found) / name / "model.onnx"
    built = os.environ.get("BITWRIGHT_MINILM")
    if not built:
        pytest.skip("BITWRIGHT_MINILM does not name the built sentence encoder")
    return Path(built)


@pytest.mark.parametrize("name", MODELS)
def test_a_module_computes_the_model_and_trains_all_weights(name: str) -> None:
    model = read_model(path_of(name)).model
    normalize(model, 20)
    feeds = next(iter(random_dataset(model, 1, seed=1).batches(1)))
    expected = run(open_session(model, SessionConfig()), feeds)
    module = GraphModule(model)
    found = module({k: torch.from_numpy(np.array(v)) for k, v in feeds.items()})
    assert found.keys() == expected.keys()
    for output, array in expected.items():
        assert np.abs(found[output].detach().numpy() - array).max() <= BOUND * np.abs(array).max()
    torch.stack([v.square().mean() for v in found.values()]).sum().backward()
    weights = {v.name for n in model.graph if (v := stored_weight(weight_of(n))) is not None}
    assert len(weights) >= 8
    assert weights <= set(module.trained)
    assert all(bool((module.weight(n).grad != 0).any()) for n in weights)

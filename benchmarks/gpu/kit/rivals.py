"""What PyTorch takes for the same work on the same device: its int8 and fp16 products, and fp16 models.

The models have random weights: only their shapes matter for time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

ROUNDS, CALLS, MODEL_CALLS = 15, 20, 300


def event_times(call: Callable[[], Any], calls: int = CALLS, rounds: int = ROUNDS) -> dict[str, float]:
    """Return best and median microseconds of one call, several in a row between two events."""
    found = []
    for _ in range(rounds + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / calls)
    return {"best_us": min(found[1:]), "median_us": statistics.median(found[1:])}


def wall_times(call: Callable[[], Any]) -> dict[str, float]:
    """Return best and mean microseconds of a call, waiting for the device included, as the artifact's runner does."""
    found = []
    for number in range(MODEL_CALLS + 20):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if number >= 20:
            found.append((time.perf_counter() - start) * 1e6)
    return {"best_us": min(found), "mean_us": statistics.fmean(found)}


def int8_product(size: int) -> dict[str, float]:
    """Time the vendor library's int8 product with int32 output."""
    left = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
    right = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
    return event_times(lambda: torch._int_mm(left, right.t()))


def fp16_product(rows: int, depth: int, columns: int) -> dict[str, float]:
    """Time the vendor library's fp16 product."""
    left = torch.randn(rows, depth, dtype=torch.float16, device="cuda")
    right = torch.randn(columns, depth, dtype=torch.float16, device="cuda")
    return event_times(lambda: functional.linear(left, right))


class Block(nn.Module):
    """A layer of a BERT encoder."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Apply attention and the two products behind it."""
        n, t, width = x.shape

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(n, t, self.heads, width // self.heads).transpose(1, 2)

        parts = (split(f(x)) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(*parts, attn_mask=mask)
        x = self.first(x + self.out(mixed.transpose(1, 2).reshape(n, t, width)))
        return self.second(x + self.down(functional.gelu(self.up(x))))


class MiniLM(nn.Module):
    """all-MiniLM-L6: embeddings, six layers of 384 with 12 heads, mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, 384), nn.Embedding(512, 384)
        self.norm = nn.LayerNorm(384)
        self.layers = nn.ModuleList(Block(384, 12, 1536) for _ in range(6))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return one embedding a row."""
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]])
        blocked = (1 - mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, blocked)
        kept = mask[..., None].to(x.dtype)
        return (x * kept).sum(1) / kept.sum(1)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, group: int = 1, *, relu: bool = True
) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=group)
    return nn.Sequential(conv, nn.ReLU()) if relu else conv


class Residual(nn.Module):
    """Two convolutions and what goes around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, 3, stride)
        self.second = _conv(outputs, outputs, 3, relu=False)
        self.around = nn.Identity() if stride == 1 else _conv(inputs, outputs, 1, stride, relu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add both ways."""
        return functional.relu(self.second(self.first(x)) + self.around(x))


def resnet8() -> nn.Module:
    """Return MLPerf Tiny's image classification network."""
    stages = (Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))
    return nn.Sequential(_conv(3, 16, 3), *stages, *end)


def mobilenet() -> nn.Module:
    """Return MLPerf Tiny's person detection network: MobileNet v1 of a quarter of the width, 96 x 96."""
    layers, channels = [_conv(3, 8, 3, 2)], 8
    plan = [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1)]
    for outputs, stride in plan:
        layers += [_conv(channels, channels, 3, stride, channels), _conv(channels, outputs, 1)]
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 2), nn.Softmax(1))


def captured(model: nn.Module, image: torch.Tensor) -> Callable[[], None]:
    """Return a call that replays a model as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(image)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(image)
    return graph.replay


@torch.inference_mode()
def run_rivals(size: int) -> dict[str, Any]:
    """Time everything."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    found: dict[str, Any] = {"torch": torch.__version__, "device": torch.cuda.get_device_name(0)}
    found["int8_product"] = int8_product(size)
    found["fp16_product"] = fp16_product(size, size, size)
    found["fp16_row"] = fp16_product(1, 4096, 4096)
    encoder = MiniLM().half().cuda().eval()
    ids = torch.randint(0, 30522, (32, 128), device="cuda")
    mask = torch.ones_like(ids)
    found["minilm_l6"] = {"form": "fp16, eager", **wall_times(lambda: encoder(ids, mask))}
    for name, model, side in (("resnet8_cifar10", resnet8(), 32), ("vww_mobilenet", mobilenet(), 96)):
        ready = model.half().cuda().eval().to(memory_format=torch.channels_last)
        image = torch.randn(1, 3, side, side, dtype=torch.float16, device="cuda")
        image = image.to(memory_format=torch.channels_last)
        found[name] = {"form": "fp16, CUDA graph", **wall_times(captured(ready, image))}
    return found

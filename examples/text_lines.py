"""Rendered lines of English text, and reading text from the recognizer's output."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HEIGHT, WIDTH = 48, 320
CALIBRATION_LINES = 48
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
)
WORDS = (  # noqa: SIM905
    "anchor autumn bakery bicycle bright button candle carbon castle copper cotton dragon engine "
    "falcon forest garden granite harbour island jacket kitchen ladder lantern marble meadow mirror "
    "needle ocean orchard paper pepper planet pocket quartz rabbit river saddle silver stone summer "
    "thunder timber tunnel velvet village walnut window winter yellow zebra Berlin Cairo Dublin "
    "Lisbon Madrid Oslo Paris Quito Seoul Tokyo"
).split()


def text_of(rng: np.random.Generator) -> str:
    """Return a line such as ``velvet Oslo 4817``."""
    words = rng.choice(WORDS, size=2).tolist()
    number = str(rng.integers(10, 10**4)) if rng.random() < 0.7 else str(rng.choice(WORDS))
    return " ".join([*words, number])


def picture_of(text: str, rng: np.random.Generator) -> Image.Image:
    """Draw a line: random font, size and shade, a slight tilt, blur and noise."""
    shade, paper = int(rng.integers(0, 90)), int(rng.integers(190, 255))
    image = Image.new("L", (WIDTH * 2, HEIGHT * 2), paper)
    name = FONTS[int(rng.integers(len(FONTS)))]
    font = _fitting(name, text, int(rng.integers(44, 60)))
    box = ImageDraw.Draw(image).textbbox((0, 0), text, font=font)
    top = HEIGHT - (box[1] + box[3]) / 2 + rng.uniform(-4, 4)
    ImageDraw.Draw(image).text((rng.uniform(8, 24), top), text, fill=shade, font=font)
    image = image.rotate(rng.uniform(-1.0, 1.0), Image.Resampling.BICUBIC, fillcolor=paper)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 3.4))).resize((WIDTH, HEIGHT))
    noisy = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(4, 28), (HEIGHT, WIDTH))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _fitting(name: str, text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return the font at ``size``, or as much smaller as the line's width demands."""
    font = _font(name, size)
    return font if font.getlength(text) < 2 * WIDTH - 40 else _fitting(name, text, size - 2)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", name), size)


def lines(count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield texts and their pictures; a seed always gives the same ones."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        text = text_of(rng)
        yield text, picture_of(text, rng)


def input_of(picture: Image.Image) -> np.ndarray:
    """Return the model's input: float32 [1, 3, 48, 320] in [-1, 1]."""
    pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
    return np.ascontiguousarray(((pixels - 0.5) / 0.5).transpose(2, 0, 1)[None])


def samples() -> Iterator[dict[str, np.ndarray]]:
    """Yield calibration samples, for ``bitwright ... --data examples/text_lines.py:samples``."""
    return ({"x": input_of(picture)} for _, picture in lines(CALIBRATION_LINES, seed=1))


def decode(scores: np.ndarray, alphabet: list[str]) -> str:
    """Return the text in scores [1, steps, symbols]: best symbol of each step, repeats and blanks left out."""
    best = scores[0].argmax(-1).tolist()
    previous = [0, *best[:-1]]
    return "".join(alphabet[k] for k, before in zip(best, previous, strict=True) if k and k != before)


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(second) + 1))
    for a in first:
        new = [row[0] + 1]
        for k, b in enumerate(second):
            new.append(min(row[k] + (a != b), row[k + 1] + 1, new[-1] + 1))
        row = new
    return row[-1]

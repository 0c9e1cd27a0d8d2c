"""Two decoders continue one prompt: their texts, and where these part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitwright.compiler.errors import DataError
from bitwright.compiler.generation.generate import Generation, Request, continued, prompt_tokens
from bitwright.compiler.generation.opening import open_decoder, open_language


@dataclass(frozen=True)
class Comparison:
    """What two decoders wrote behind one prompt.

    Attributes:
        first: The model.
        second: The one that it is compared with.
    """

    first: Generation
    second: Generation

    @property
    def agreeing(self) -> int:
        """How many tokens are equal before the first that differs."""
        pairs = zip(self.first.tokens, self.second.tokens, strict=False)
        return next(
            (k for k, (a, b) in enumerate(pairs) if a != b),
            min(len(self.first.tokens), len(self.second.tokens)),
        )

    @property
    def same(self) -> bool:
        """Whether they wrote the same."""
        return self.first.tokens == self.second.tokens

    def verdict(self) -> str:
        """Return one line on where they part."""
        if self.same:
            return f"the same {len(self.first.tokens)} tokens"
        return f"the texts part at token {self.agreeing + 1} of {len(self.first.tokens)}"

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "agreeing_tokens": self.agreeing,
            "same": self.same,
        }


def compare(request: Request, other: Path) -> Comparison:
    """Let two models continue the same tokens, chosen in the same way.

    Args:
        request: What is wanted, and of which model.
        other: The other model, an .onnx file, a folder with one or a bundle. It is given the same token numbers.

    Raises:
        BitwrightError: As :func:`~bitwright.compiler.generation.generate.generate`.
        DataError: The models have vocabularies of different sizes.
    """
    decoder = open_decoder(request.model, request.threads)
    language = open_language(decoder, request.tokenizer, needed=request.prompt is not None)
    prompt = prompt_tokens(request, language)
    second = open_decoder(other, request.threads)
    sizes = [d.vocabulary for d in (decoder, second)]
    if None not in sizes and sizes[0] != sizes[1]:
        what = f"the models have {sizes[0]} and {sizes[1]} tokens"
        raise DataError(what, where=f"--compare {other}", fix="compare two forms of one model")
    for opened in (decoder, second):
        opened.session.feed(
            prompt[:1]
        )  # the first call of a session allocates, which says nothing about a model
    return Comparison(
        continued(decoder, language, prompt, request), continued(second, language, prompt, request)
    )

"""A byte-level BPE tokenizer's file (tokenizer.json) as GGUF metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.compiler.errors import DataError, nearest
from bitwright.compiler.gguf.values import Typed, boolean, int32s, text, texts, uint32

LARGEST_FILE = 64 << 20
LARGEST_CONFIG = 1 << 20
LARGEST_TEMPLATE = 1 << 20
TOKENS = 1 << 20
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
FIX = "give the tokenizer.json of a byte-level BPE tokenizer, or pass --no-tokenizer"

# llama.cpp cuts text by rules that it knows by name; these are the patterns of the common ones. A ByteLevel
# pre-tokenizer with its own pattern is GPT-2's.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
RULES = {LLAMA3: "llama-bpe", LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
GPT2, DIGITS_FIRST = "gpt-2", "smollm"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as llama.cpp needs it.

    Attributes:
        tokens: Text of each token, in GPT-2's printable alphabet of bytes.
        types: What each token is: normal, control, defined by the user, unused.
        merges: ``"left right"``, the most important first.
        rule: llama.cpp's name of how text is cut before merging.
        special: Roles ("bos", "eos", ...) -> token number.
        add_bos: Put the beginning-of-text token in front of every text.
        template: How a chat is written as text, or "".
        notes: What was assumed.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    rule: str
    special: dict[str, int]
    add_bos: bool
    template: str
    notes: tuple[str, ...]

    def metadata(self) -> dict[str, Typed]:
        """Return the entries for the file."""
        found = {
            "tokenizer.ggml.model": text("gpt2"),
            "tokenizer.ggml.pre": text(self.rule),
            "tokenizer.ggml.tokens": texts(self.tokens),
            "tokenizer.ggml.token_type": int32s(self.types),
            "tokenizer.ggml.merges": texts(self.merges),
        }
        for role, number in self.special.items():
            found[f"tokenizer.ggml.{role}_token_id"] = uint32(number)
        found["tokenizer.ggml.add_bos_token"] = boolean(self.add_bos)
        if self.template:
            found["tokenizer.chat_template"] = text(self.template)
        return found


def no_tokenizer() -> dict[str, Typed]:
    """Return the entries of a file that takes and gives token numbers only."""
    return {"tokenizer.ggml.model": text("no_vocab")}


def read_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """Read ``tokenizer.json``, and ``tokenizer_config.json`` beside it if there is one.

    Args:
        path: The file.
        vocabulary: Tokens of the model; numbers without text become unused tokens.

    Raises:
        DataError: It is no byte-level BPE tokenizer, or does not fit the model.
    """
    data = _json(path, LARGEST_FILE)
    model = _part(data, "model", dict, path)
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "a BPE with byte fallback" if model.get("byte_fallback") else repr(model.get("type"))
        msg = f"the tokenizer is {kind}; only byte-level BPE is supported"
        raise DataError(msg, where=str(path), fix=FIX)
    tokens, types = _tokens(data, model, vocabulary, path)
    config_path = path.with_name("tokenizer_config.json")
    config = _json(config_path, LARGEST_CONFIG) if config_path.is_file() else {}
    special, notes = _special(config, tokens, types)
    template = config.get("chat_template", "")
    if not isinstance(template, str) or len(template) > LARGEST_TEMPLATE:
        template, notes = "", [*notes, "the chat template is no plain text and is left out"]
    merges = [_merge(m, path) for m in _part(model, "merges", list, path)]
    add_bos = bool(config.get("add_bos_token", False)) or _begins_with(data, special.get("bos"), tokens)
    return Tokenizer(tokens, types, merges, _rule(data, path), special, add_bos, template, tuple(notes))


def _json(path: Path, limit: int) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
        data = json.loads(raw) if len(raw) <= limit else None
    except (OSError, ValueError, RecursionError) as error:
        msg = f"cannot be read as JSON: {error}"
        raise DataError(msg, where=str(path), fix=FIX) from error
    if not isinstance(data, dict):
        msg = f"is longer than {limit} bytes" if data is None and len(raw) > limit else "is no JSON object"
        raise DataError(msg, where=str(path), fix=FIX)
    return data


def _part(data: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    found = data.get(key)
    if not isinstance(found, kind):
        msg = f"'{key}' is missing or of another type"
        raise DataError(msg, where=str(path), fix=FIX)
    return found


def _tokens(
    data: dict[str, Any], model: dict[str, Any], vocabulary: int, path: Path
) -> tuple[list[str], list[int]]:
    """Return the text and the type of every token."""
    known: dict[int, tuple[str, int]] = {}
    for content, number in _part(model, "vocab", dict, path).items():
        known[_number(number, vocabulary, path)] = (content, NORMAL)
    for added in data.get("added_tokens") or []:
        number = _number(added.get("id") if isinstance(added, dict) else None, vocabulary, path)
        known[number] = (str(added.get("content", "")), CONTROL if added.get("special") else USER_DEFINED)
    tokens = [known.get(n, (f"[PAD{n}]", UNUSED)) for n in range(vocabulary)]
    return [t for t, _ in tokens], [kind for _, kind in tokens]


def _number(value: object, vocabulary: int, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < min(vocabulary, TOKENS):
        msg = f"token number {value!r} is none of the model's {vocabulary} tokens"
        raise DataError(msg, where=str(path), fix="give the tokenizer that belongs to the model")
    return value


def _merge(entry: object, path: Path) -> str:
    parts = entry.split(" ") if isinstance(entry, str) else entry
    if (
        not isinstance(parts, list)
        or len(parts) != 2
        or not all(isinstance(p, str) and " " not in p for p in parts)
    ):
        msg = f"a merge is not a pair of texts: {str(entry)[:60]!r}"
        raise DataError(msg, where=str(path), fix=FIX)
    return f"{parts[0]} {parts[1]}"


def _rule(data: dict[str, Any], path: Path) -> str:
    """Return llama.cpp's name of the pre-tokenizer."""
    before = data.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    kinds = [s.get("type") for s in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2
    if (
        kinds == ["Digits", "ByteLevel"]
        and steps[0].get("individual_digits")
        and steps[1].get("use_regex", True)
    ):
        return DIGITS_FIRST
    if kinds == ["Split", "ByteLevel"]:
        pattern = (steps[0].get("pattern") or {}).get("Regex", "")
        if pattern in RULES:
            return RULES[pattern]
    msg = f"the pre-tokenizer {kinds} is none that llama.cpp is known to have a rule for here"
    raise DataError(msg, where=str(path), fix=FIX)


def _special(config: dict[str, Any], tokens: list[str], types: list[int]) -> tuple[dict[str, int], list[str]]:
    """Return the numbers of tokens with a role."""
    found: dict[str, int] = {}
    for key in SPECIAL:
        value = config.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            if content not in tokens:
                msg = f"{key} '{content}' is no token"
                raise DataError(msg, where="tokenizer_config.json", fix=nearest(content, tokens[:50]))
            found[KEYS[key]] = tokens.index(content)
    control = [n for n, kind in enumerate(types) if kind == CONTROL]
    if found or len(control) != 1:
        notes = [] if "eos" in found else ["no token is known to end a text"]
        return found, notes
    note = f"'{tokens[control[0]]}', the only special token, is taken as beginning and end of a text"
    return {"bos": control[0], "eos": control[0]}, [note]


def _begins_with(data: dict[str, Any], bos: int | None, tokens: list[str]) -> bool:
    """Tell whether the tokenizer's template puts the beginning-of-text token in front."""
    after = data.get("post_processor") or {}
    steps = after.get("processors", []) if after.get("type") == "Sequence" else [after]
    for step in steps:
        single = step.get("single") if step.get("type") == "TemplateProcessing" else None
        first = (
            single[0].get("SpecialToken", {}).get("id") if single and isinstance(single[0], dict) else None
        )
        if bos is not None and first == tokens[bos]:
            return True
    return False

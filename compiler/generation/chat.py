"""A message as an instruction-tuned model was taught to read it: by the template that comes with its tokenizer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from bitwright.compiler.errors import DataError, ToolchainError, UsageError
from bitwright.compiler.generation.stop_tokens import TOKENIZER_CONFIG
from bitwright.compiler.hugging_face.json_file import read_object
from bitwright.compiler.ingest.text import one_line

TEMPLATE_FILE = "chat_template.jinja"
LARGEST_TEMPLATE = 1 << 20
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
WHERE = "--chat"


def chat_text(folder: Path, message: str, system: str | None = None) -> str:
    """Return the text that a model continues to answer a message.

    The template is chat_template.jinja, or ``chat_template`` of tokenizer_config.json. It is somebody else's program:
    it runs in Jinja's sandbox, which has no access to files, modules or attributes of Python.

    Args:
        folder: Where the files are.
        message: What the user says.
        system: What the model is told beforehand, or None.

    Raises:
        UsageError: The model has no template.
        DataError: The template is wrong, or refuses these messages.
        ToolchainError: The package ``jinja2`` is not installed.
    """
    path = folder / TOKENIZER_CONFIG
    config = read_object(path) if path.is_file() else {}
    template, where = _template(folder, config)
    if find_spec("jinja2") is None:
        what = "chat templates need the package 'jinja2', which is not installed"
        raise ToolchainError(what, where=WHERE, fix="pip install 'bitwright[lm]'")
    told = [] if system is None else [{"role": "system", "content": system}]
    messages = [*told, {"role": "user", "content": message}]
    special = {name: _content(config.get(name)) for name in SPECIAL}
    return _rendered(template, {"messages": messages, "add_generation_prompt": True, **special}, where)


def _template(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """Return the template and where it is from."""
    own = folder / TEMPLATE_FILE
    if own.is_file():
        if own.stat().st_size > LARGEST_TEMPLATE:
            what = f"is larger than {LARGEST_TEMPLATE} bytes"
            raise DataError(what, where=str(own), fix="give the model's own template")
        return own.read_text(encoding="utf-8", errors="replace"), str(own)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        what = "the model comes without a chat template"
        fix = f"put {TEMPLATE_FILE} or {TOKENIZER_CONFIG} beside it, or leave --chat out"
        raise UsageError(what, where=f"{WHERE}: {folder}", fix=fix)
    return found, str(folder / TOKENIZER_CONFIG)


def _content(entry: Any) -> str:
    found = entry.get("content") if isinstance(entry, dict) else entry
    return found if isinstance(found, str) else ""


def _rendered(template: str, names: dict[str, Any], where: str) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # As Hugging Face's tokenizers set it up, for which templates are written.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template).render(names)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"the chat template fails: {one_line(error)}"
        raise DataError(
            what, where=where, fix="correct the template, or leave --chat or --system out"
        ) from error


def _refuse(message: str) -> NoReturn:
    """Let a template refuse messages."""
    raise ValueError(message)

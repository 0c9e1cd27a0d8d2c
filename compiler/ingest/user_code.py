"""Functions of the user's own scripts, named on the command line as FILE.py:FUNC."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from bitwright.compiler.errors import BitwrightError, DataError, UsageError, nearest
from bitwright.compiler.ingest.text import one_line, quoted


def is_function_spec(source: str) -> bool:
    """Tell whether ``source`` has the form FILE.py:FUNC."""
    file, colon, function = source.rpartition(":")
    return bool(colon) and file.endswith(".py") and function.isidentifier()


def load_function(spec: str) -> tuple[Callable[..., Any], Path]:
    """Run the user's script and return its function and the script's path.

    Raises:
        UsageError: The spec, the file or the function does not exist.
        DataError: The script itself raises; the message has its line.
    """
    if not is_function_spec(spec):
        what = "is not of the form FILE.py:FUNC"
        raise UsageError(what, where=spec, fix="e.g. data.py:samples")
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        what = f"there is no file {quoted(file)}"
        raise UsageError(what, where=spec, fix="check the path of the script")
    with blaming(path, spec):
        module = _run(path)
    function = getattr(module, name, None)
    if function is None:
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        fix = nearest(name, known) if known else "define it"
        what = f"{quoted(file)} defines no function {quoted(name)}"
        raise UsageError(what, where=spec, fix=fix)
    if not callable(function):
        what = f"{quoted(name)} is not a function"
        raise UsageError(what, where=spec, fix="name a function")
    return function, path


class _LeavesNothing(SourceFileLoader):
    """Runs a script without writing a __pycache__ into the user's folder."""

    def set_data(self, path: Any, data: Any, *, _mode: int = 0o666) -> None:
        """Drop the byte code that Python would keep."""


def _run(path: Path) -> ModuleType:
    # A name of its own: two scripts called data.py must not share a module.
    name = f"_bitwright_user_{abs(hash(path.resolve()))}_{path.stem}"
    script = path.resolve()
    loader = _LeavesNothing(name, str(script))
    module_spec = importlib.util.spec_from_file_location(name, script, loader=loader)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    folder = str(path.resolve().parent)
    sys.modules[name] = module
    # The script's neighbours stay importable, as when it is run: functions may import them late.
    if folder not in sys.path:
        sys.path.append(folder)
    module_spec.loader.exec_module(module)
    return module


@contextmanager
def blaming(path: Path, spec: str) -> Iterator[None]:
    """Turn an exception of the user's code into a DataError with the line of the script it came through.

    Raises:
        DataError: The code raised.
    """
    try:
        yield
    except BitwrightError:
        raise
    except (Exception, SystemExit) as error:
        what = f"raised {type(error).__name__}: {one_line(error) or 'no message'}"
        line = _line(error, path)
        raise DataError(what, where=f"{path}:{line}" if line else spec, fix="correct the script") from error


def _line(error: BaseException, path: Path) -> int | None:
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).name == path.name:
        return error.lineno
    script = str(path.resolve())
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == script), None)

"""The way to the extension modules that `make native` builds into this folder: which there are, and what to do if not.

    modules.load("_simt").matmul("naive_01", a, b, d)

_simt runs the kernels on the CPU model, _simt_checked on the model that looks for races and stray accesses, _sm90 and
_sm80 on a GPU. Refused with a RuntimeError that says what to do: a module that is not built, or for another Python.
"""

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

NAMES = ("_simt", "_simt_checked", "_sm90", "_sm80")
FOLDER = Path(__file__).parent


@cache
def load(name: str) -> ModuleType:
    """The module cuda.<name>. Raises RuntimeError where it cannot be imported."""
    try:
        return importlib.import_module(f"cuda.{name}")
    except ImportError as error:
        raise RuntimeError(why_not(name, error)) from error


def why_not(name: str, error: ImportError, folder: Path = FOLDER) -> str:
    """What the failed import of cuda.<name> means, and what to do."""
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    files = sorted(path.name for path in folder.glob(f"{name}.*.so"))
    if not isinstance(error, ModuleNotFoundError):
        return f"cuda.{name} cannot be loaded: {error}. Run `make native` to build it again"
    if files:
        return (
            f"cuda.{name} is built for another Python ({', '.join(files)}), this is {python}: run `make native` with it"
        )
    if name.startswith("_sm"):
        return f"cuda.{name} is not built: run `make native` where there is nvcc 12.3 or newer; it says what it found"
    return f"cuda.{name} is not built: run `make native` (it needs a C++ compiler)"

"""Finding the first NaN or inf: what `detect_anomaly()` checks after each operation, and what it then says.

Holds no graph and changes no value. An operation is at fault when its result has a NaN and no input had one, or an inf
and all inputs were finite; so a mask of -inf given on purpose is not an error.
"""

import linecache
import sys
from pathlib import Path

import numpy as np

_PACKAGE = str(Path(__file__).parent)


class AnomalyError(ArithmeticError):
    """A NaN or inf appeared under `detect_anomaly()`."""


def user_line() -> str:
    """'file:line: source' of the innermost caller outside this package."""
    frame = sys._getframe(1)
    while frame.f_back and str(Path(frame.f_code.co_filename).parent) == _PACKAGE:
        frame = frame.f_back
    name, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(name).name}:{line}: {linecache.getline(name, line).strip()}"


def describe(array: np.ndarray) -> str:
    if array.dtype.kind != "f" or not array.size:
        return f"{array.shape} {array.dtype}"
    finite = array[np.isfinite(array)]
    spread = f"min {finite.min():.4g} max {finite.max():.4g} mean {finite.mean():.4g}" if finite.size else "none finite"
    nans, infs = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    return f"{array.shape} {array.dtype} {spread}, {nans} NaN, {infs} inf"


def _bad(array) -> str | None:
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return None
    return "NaN" if np.isnan(array).any() else "inf"


def check_output(op: str, out, inputs, when: str = "") -> None:
    """Raises AnomalyError when `out` has a NaN or inf that no input explains."""
    bad = _bad(out.data)
    if bad is None:
        return
    from_inputs = {_bad(tensor.data) for tensor in inputs}
    if "NaN" in from_inputs or (bad == "inf" and "inf" in from_inputs):
        return
    lines = [f"{op}{when} made the first {bad}, at {user_line()}", f"  output   {describe(out.data)}"]
    lines += [f"  input {i}  {describe(tensor.data)}" for i, tensor in enumerate(inputs)]
    raise AnomalyError("\n".join(lines))

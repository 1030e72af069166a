"""What operations do besides computing, per thread: record themselves for a backward pass, and look for NaN and inf."""

import threading
from contextlib import contextmanager


class _Mode(threading.local):
    grad = True  # are operations recorded?
    anomaly = False  # is each result looked at for NaN and inf?


mode = _Mode()


@contextmanager
def _set_mode(**values):
    before = {name: getattr(mode, name) for name in values}
    vars(mode).update(values)
    try:
        yield
    finally:
        vars(mode).update(before)


def no_grad():
    """Context manager (or decorator): operations inside are not recorded."""
    return _set_mode(grad=False)


def enable_grad():
    """Context manager (or decorator): operations inside are recorded, also within `no_grad`."""
    return _set_mode(grad=True)


def is_grad_enabled() -> bool:
    return mode.grad


def detect_anomaly():
    """Context manager (or decorator): the first operation, forward or backward, that makes a NaN or inf out of inputs
    that had none raises AnomalyError with the operation, the statistics of its inputs and the line that called it."""
    return _set_mode(anomaly=True)

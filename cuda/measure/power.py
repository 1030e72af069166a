"""What the card draws and at which clock it runs, while something is measured: NVIDIA's management library, read only.

    with PowerMeter() as meter:
        compare(functions, before=meter.begin, ...)
        meter.reading("cuBLAS")   # {"power_w": 640.1, "sm_mhz": 1545.0, "temperature_c": 61.0}, or Nones

A thread asks every few milliseconds and files the answer under the name that is being measured. Without the library, a
driver or a GPU every reading is None: a measurement does not fail because nobody could read the clock. Nothing is ever
set. Refused: readings of a name before it was measured.
"""

import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from typing import Self

LIBRARY = "libnvidia-ml.so.1"
INTERVAL_S = 0.004
SM_CLOCK, GPU_SENSOR, POWER_INSTANT = 1, 0, 186  # NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_FI_DEV_POWER_INSTANT
FIELDS = ("power_w", "sm_mhz", "temperature_c")


class FieldValue(ctypes.Structure):
    """nvmlFieldValue_t."""

    _fields_ = (
        ("field", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency_us", ctypes.c_longlong),
        ("value_type", ctypes.c_int),
        ("status", ctypes.c_int),
        ("value", ctypes.c_uint64),  # a union; power is an unsigned int of milliwatts, little endian
    )


def reader(uuid: str) -> Callable[[], dict[str, float]] | None:
    """A function that reads the GPU of that UUID ("GPU-..."); None where it cannot be."""
    try:
        nvml = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return None

    def milliwatts() -> int | None:
        field = FieldValue(field=POWER_INSTANT)
        if nvml.nvmlDeviceGetFieldValues(handle, 1, ctypes.byref(field)) == 0 and field.status == 0:
            return field.value & 0xFFFFFFFF
        average = ctypes.c_uint()  # older drivers: over the last second
        return average.value if nvml.nvmlDeviceGetPowerUsage(handle, ctypes.byref(average)) == 0 else None

    def read() -> dict[str, float]:
        found, number = {}, ctypes.c_uint()
        if (power := milliwatts()) is not None:
            found["power_w"] = power / 1e3
        if nvml.nvmlDeviceGetClockInfo(handle, SM_CLOCK, ctypes.byref(number)) == 0:
            found["sm_mhz"] = float(number.value)
        if nvml.nvmlDeviceGetTemperature(handle, GPU_SENSOR, ctypes.byref(number)) == 0:
            found["temperature_c"] = float(number.value)
        return found

    return read


def current_reader() -> Callable[[], dict[str, float]] | None:
    """The reader of torch's current CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return None
    return reader(f"GPU-{str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix('GPU-')}")


class PowerMeter:
    """`rest_s` is slept before each sample; what is read in the first `skip_s` of a sample does not count: the time in
    which power and clocks settle when samples last seconds."""

    def __init__(self, read: Callable[[], dict[str, float]] | None = None, *, rest_s: float = 0.0, skip_s: float = 0.0):
        self.read, self.rest_s, self.skip_s = read, rest_s, skip_s
        self.found: dict[str, list[dict[str, float]]] = {}
        self.name: str | None = None
        self.since = 0.0
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self.read is not None:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.name = None
        self.closed.set()
        if self.thread.is_alive():
            self.thread.join()

    def begin(self, name: str) -> None:
        """The sample before has ended, as `compare` waits for the device; one of `name` begins after the rest."""
        self.name = None
        time.sleep(self.rest_s)
        self.found.setdefault(name, [])
        self.since = time.monotonic() + self.skip_s
        self.name = name

    def reading(self, name: str) -> dict[str, float | None]:
        """The medians of what was read while `name` was measured."""
        rows = self.found[name]
        values = {key: [row[key] for row in rows if key in row] for key in FIELDS}
        return {key: statistics.median(numbers) if numbers else None for key, numbers in values.items()}

    def _watch(self) -> None:
        while not self.closed.wait(INTERVAL_S):
            name, since = self.name, self.since
            if name is None or time.monotonic() < since:
                continue
            row = self.read()
            if self.name == name and self.since == since:  # else the sample ended meanwhile
                self.found[name].append(row)

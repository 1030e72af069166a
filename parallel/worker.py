"""One thread that runs calls in order, so that a collective goes on while its caller computes.

The thread begins with the first call and ends when its Worker is no longer used, or with the process: it holds nobody
up. On CUDA the calls run on a stream of their own, which waits for the caller's stream and which `wait` waits for.
After an error the order of messages is lost: the call raises at `wait`, and so does every later one.
"""

import queue
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Job:
    def __init__(self, function: Callable[[], None], tensors: Sequence[Tensor], stream: torch.cuda.Stream | None):
        self._function, self._tensors, self._stream = function, tensors, stream
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._ready = self._over = None
        if stream is not None:
            self._ready = torch.cuda.current_stream(stream.device).record_event()

    def run(self) -> None:
        if self._stream is None:
            self._function()
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._ready)
            self._function()
            for tensor in self._tensors:
                tensor.record_stream(self._stream)
            self._over = self._stream.record_event()

    def end(self, error: BaseException | None) -> None:
        self._error = error
        self._function = self._tensors = None
        self._done.set()

    def wait(self) -> None:
        """Raises what the call raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        if self._over is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._over)


class Worker:
    def __init__(self, name: str):
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        weakref.finalize(self, self._jobs.put, None)  # the thread knows the queue only, so this object can go

    def submit(self, function: Callable[[], None], *tensors: Tensor) -> Job:
        """function() after all calls before it; `tensors` are what it reads and writes."""
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._jobs,), name=self._name, daemon=True)
            self._thread.start()
        job = Job(function, tensors, self._stream(tensors))
        self._jobs.put(job)
        return job

    def _stream(self, tensors: Sequence[Tensor]) -> torch.cuda.Stream | None:
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is None:
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _serve(jobs: queue.SimpleQueue) -> None:
    broken: BaseException | None = None
    with torch.no_grad():  # a thread has its own grad mode
        while (job := jobs.get()) is not None:
            error = broken and RuntimeError(f"an earlier collective of this group failed: {broken}")
            if error is None:
                try:
                    job.run()
                except BaseException as raised:
                    error = broken = raised
            job.end(error)
            del job, error

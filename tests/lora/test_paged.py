"""Pages on a machine of two streams that is made up here: work waits in queues, and runs as early or as late as events
allow it, in many orders by chance. So a CPU sees what would be a race on a GPU. Large ones on a GPU that is late."""

import random
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from lora import adamw8bit
from lora.adamw8bit import AdamW8bit
from lora.paged import States, block_bytes
from tests.cuda.products import DEVICES
from tests.lora.test_adamw8bit import OPTIONS, bits, gradients, parameters, same_states, states

SIZES = [(40, 130), (4096,), (7, 3), (64, 100)]  # 21, 16 and 25 blocks in pages, of which each below is several


@dataclass(frozen=True, slots=True)
class Event:
    stream: "Stream"
    place: int  # it has happened when so much of the stream is done


class Stream:
    """The part of torch.cuda.Stream that lora/paged.py uses. It runs something by chance when work comes."""

    device = torch.device("cpu")

    def __init__(self, chance: random.Random, eager: float):
        self.work, self.done, self.chance, self.eager = [], 0, chance, eager

    def put(self, run, event: Event | None = None) -> None:
        self.work.append((run, event))
        while self.chance.random() < self.eager and self.advance():
            pass

    def advance(self) -> bool:
        """Runs what is next, if there is something and it has nothing to wait for."""
        if self.done == len(self.work):
            return False
        run, event = self.work[self.done]
        if event is not None and event.stream.done < event.place:
            return False
        run()
        self.done += 1
        return True

    def record_event(self) -> Event:
        return Event(self, len(self.work))

    def wait_event(self, event: Event) -> None:
        self.put(lambda: None, event)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        while self.done < len(self.work):
            if not self.advance():  # the other one first, as far as it is needed
                self.work[self.done][1].stream.advance()


@pytest.fixture
def machine(monkeypatch):
    """A function of a seed and of how eager the streams are, from 0 to 1; it returns them, the default one first."""
    here = []  # the stream that copies go to, if not the default one
    copy, update, make = torch.Tensor.copy_, adamw8bit._update, States.__init__

    def start(seed, eager, eager_side):
        chance = random.Random(seed)
        main, side = Stream(chance, eager), Stream(chance, eager_side)

        @contextmanager
        def stream(which):
            here.append(which)
            yield
            here.pop()

        def copied(self, source, non_blocking=False):
            if not here or not non_blocking:
                return copy(self, source)
            here[-1].put(lambda: copy(self, source))
            return self

        def made(self, *args, **options):
            make(self, *args, **options)
            self.side = side if self.slots else None

        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.Tensor, "copy_", copied)
        monkeypatch.setattr(adamw8bit, "_update", lambda *args: main.put(lambda: update(*args)))
        monkeypatch.setattr(States, "__init__", made)
        return main, side

    return start


def run(params, optimizer, steps, main=None):
    for step in range(*steps):
        gradients(params, step)
        optimizer.step()
        if main is not None:
            main.synchronize()  # as the next loss.item() does; the other stream may be behind


ORDERS = [(0, 1), (1, 0), (0, 0), (1, 1), (0.5, 0.5), (0.8, 0.3), (0.3, 0.8)]


@pytest.mark.parametrize("resident", [1, 2, 3])
@pytest.mark.parametrize("eager", ORDERS)
def test_in_every_order_the_bits_are_those_without_pages(machine, resident, eager):
    plain = parameters(SIZES)
    one = AdamW8bit(plain, **OPTIONS)
    run(plain, one, (0, 3))
    wanted = bits(plain), states(one)
    for blocks in (4, 9, 30):
        main, side = machine(blocks, *eager)
        paged = parameters(SIZES)
        other = AdamW8bit(paged, **OPTIONS, paged=True, page=blocks * block_bytes(True), resident=resident)
        run(paged, other, (0, 3), main)
        assert bits(paged) == wanted[0] and same_states(states(other), wanted[1])
        assert side.done == len(side.work) > 0


def test_states_that_are_given_back_to_their_optimizer_have_arrived(machine):
    """A state_dict that was kept over a step has the states after it, as that of torch's AdamW."""
    plain = parameters(SIZES)
    one = AdamW8bit(plain, **OPTIONS)
    run(plain, one, (0, 2))
    main, side = machine(0, 0, 0)
    paged = parameters(SIZES)
    other = AdamW8bit(paged, **OPTIONS, paged=True, page=9 * block_bytes(True))
    run(paged, other, (0, 1), main)
    kept = other.state_dict()
    run(paged, other, (1, 2), main)
    assert side.done < len(side.work)
    other.load_state_dict(kept)
    assert same_states(states(other), states(one))


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("resident", [1, 2, 3])
def test_nothing_waits_between_steps(device, resident):
    """31 pages, while the default stream is late, and a second optimizer takes the memory of the first."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(1000, 1000, generator=generator).to(device) for _ in range(4)]
    results = []
    for paged in (False, True):
        (p,) = parameters([(1000, 1000)], device=device)
        for _ in range(2):
            optimizer = AdamW8bit([p], **OPTIONS, paged=paged, page=2**16, resident=resident)
            for p.grad in steps:
                torch.cuda._sleep(2_000_000)  # about a millisecond
                optimizer.step()
            kept = optimizer.state_dict()["state"][0]
        results.append({"p": p.detach().cpu()} | {name: x.cpu() for name, x in kept.items()})
    assert len(results[0]) == 6 and all(torch.equal(x, results[1][name]) for name, x in results[0].items())

"""Random numbers under tensor parallelism: the same on all ranks where they hold the same, others where they do not.

What all ranks of a tp group have (the residual stream) needs one dropout mask; what each has a part of (its heads, its
MLP channels, under sequence parallelism its tokens) needs masks of its own, or they would repeat over the model.
`seed_ranks` makes torch's generators equal along tp; `local_random` leads them apart for a while.

There is no second state to keep: a local region draws one number from the common generator and goes on from that and
the rank. So who saves torch's generator state has saved everything, torch.utils.checkpoint among them. Refused:
generators other than torch's default ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from parallel.comm import Comm
from parallel.mesh import AXES, Mesh


def seed_ranks(mesh: Mesh, seed: int, shared: tuple[str, ...] = ("tp",)) -> None:
    """Seeds torch's default generators: alike on ranks that differ on the `shared` axes alone, otherwise apart."""
    if unknown := [axis for axis in shared if axis not in AXES]:
        raise ValueError(f"axis {unknown[0]!r}: expected one of {', '.join(AXES)}")
    place = [0 if axis in shared else mesh.place[axis] for axis in AXES]
    torch.manual_seed(int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0]))


@contextmanager
def local_random(comm: Comm) -> Iterator[None]:
    """Inside, each rank of the group draws numbers of its own; all ranks enter it alike.

    Before and after it the generators are as equal on all ranks as they were. Inside a group of one nothing changes
    but the numbers.
    """
    drawn = int(torch.randint(2**31, ()))  # on the CPU: a GPU would have to be waited for
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(drawn + comm.rank)  # a CPU generator looks at the low 32 bits alone
        yield

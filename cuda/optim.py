"""AdamW and gradient clipping by our kernels: all tensors in one launch, and no wait for the device.

    optimizer = AdamW(model.parameters(), lr=3e-4)
    norm = clip_grad_norm_(model.parameters(), 1.0)     # scales the gradients where they lie
    optimizer.step()

    norm, factor = grad_norm(model.parameters(), 1.0)   # or: the step scales them while it reads them
    optimizer.step(factor=factor)

A kernel finds its tensors in a table of addresses and sizes on the device, which is made again only when one of them
has moved. `kernels` says whose they are: CPU tensors run on the CPU model (cuda/_simt) for "cuda" and in Triton's
interpreter for "triton", CUDA tensors on the GPU, on the current stream.
Refused with a ValueError: types other than float32, bfloat16 and float16, sparse gradients, parameters with gaps.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from operator import is_

import torch
from torch import Tensor

from cuda.device import DTYPES, Kernels, check_kernels, place

CHUNK = 8192  # elements of a block: chunk_elements in fused/multi_tensor.cuh
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Type there


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, *, kernels: Kernels = "cuda") -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for the 2-norm: gradients times min(1, max_norm / (norm + 1e-6)), and the norm,
    0-dim float32. A norm that is infinite or NaN makes gradients 0 or NaN, as there. The order of the sum does not
    depend on the schedule."""
    norm, factor, tables = _norm(parameters, max_norm, kernels)
    if tables:
        tables.run("grad_scale", factor=factor)
    return norm


def grad_norm(
    parameters: Tensor | Iterable[Tensor], max_norm: float, *, kernels: Kernels = "cuda"
) -> tuple[Tensor, Tensor]:
    """The norm of all gradients and the factor that clips it, both 0-dim float32; the gradients stay as they are."""
    return _norm(parameters, max_norm, kernels)[:2]


def _norm(parameters, max_norm, kernels):
    check_kernels(kernels)
    if not max_norm >= 0:
        raise ValueError(f"max_norm {max_norm}: expected 0 or a positive number")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [g for g in map(_gradient, parameters) if g is not None and g.numel()]
    device = gradients[0].device if gradients else parameters[0].device if parameters else torch.device("cpu")
    if any(g.device != device for g in gradients):
        raise ValueError(f"gradients on {', '.join(sorted({str(g.device) for g in gradients}))}: expected one device")
    norm, factor = torch.zeros((), device=device), torch.ones((), device=device)
    if not gradients:
        return norm, factor, None
    places = tuple((g.data_ptr(), g.numel(), g.dtype) for g in gradients)
    tables = _Tables([gradients], _gradient_tables(device, places), kernels)
    sums = torch.empty(len(tables.chunks), device=device)
    tables.run("grad_norm", sums=sums, norm=norm, factor=factor, max_norm=float(max_norm))
    return norm, factor, tables


@lru_cache(maxsize=8)  # whatever lies at these addresses by now, the tables are right
def _gradient_tables(device: torch.device, gradients: tuple) -> tuple[Tensor, Tensor]:
    rows = [(address, size, TYPES[dtype]) for address, size, dtype in gradients]
    return _moved(torch.tensor(rows), device), _chunks([size for _, size, _ in gradients], device)


def _gradient(parameter: Tensor) -> Tensor | None:
    """The gradient, without gaps; one that has them is replaced by its copy."""
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout != torch.strided:
        raise ValueError(f"a gradient is {gradient.layout}: expected a dense tensor")
    if gradient.dtype not in DTYPES:
        raise ValueError(f"a gradient is {gradient.dtype}: expected one of {DTYPES}")
    if not gradient.is_contiguous():
        gradient = parameter.grad = gradient.contiguous()
    return gradient


def _check_parameter(p: Tensor) -> None:
    if p.dtype not in DTYPES:
        raise ValueError(f"a parameter is {p.dtype}: expected one of {DTYPES}")
    if not p.is_contiguous():
        raise ValueError(f"a parameter {tuple(p.shape)} has strides {p.stride()}: expected a contiguous one")


def _check_factor(factor: Tensor | None, device: torch.device) -> None:
    if factor is not None and (factor.dtype != torch.float32 or factor.ndim or factor.device != device):
        described = f"{factor.dtype} of shape {tuple(factor.shape)} on {factor.device}"
        raise ValueError(f"factor is {described}: expected a torch.float32 of shape () on {device}")


def _chunks(sizes: list[int], device: torch.device) -> Tensor:
    """(chunks, 2) int32: the tensor, and the chunk's number in it."""
    counts = torch.tensor([-(-size // CHUNK) for size in sizes])
    tensor = torch.repeat_interleave(counts)
    number = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return _moved(torch.stack([tensor, number], 1).int(), device)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """From the CPU to the device; the host goes on, which needs page-locked memory."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


class _Tables:
    """What a launch over many tensors is given."""

    def __init__(self, tensors: list[list[Tensor]], tables: tuple[Tensor, Tensor], kernels: str):
        (self.table, self.chunks), self.device, self.kernels = tables, tensors[0][0].device, kernels
        # The CPU model is told which memory its kernels may touch. On a GPU there is no need.
        self.memory = list(chain(*tensors)) if self.device.type == "cpu" else None

    def run(self, operation: str, **arguments) -> None:
        here = place(self.device, kernels=self.kernels)
        here.run(operation, tensors=self.table, chunks=self.chunks, memory=self.memory, **arguments)


class _Batch:
    """Parameters on one device that have made as many steps: one launch."""

    def __init__(self, parameters: list[Tensor], states: list[dict], count: int, kernels: str):
        self.parameters, self.count, self.kernels = parameters, count, kernels
        self.steps = torch.full((len(states),), float(count))  # whose elements are the states' `step`
        for state, step in zip(states, self.steps.split(1), strict=True):
            state["step"] = step.view(())
        self.first, self.second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        self.masters = [state.get("master") for state in states]
        self.chunks = _chunks([p.numel() for p in parameters], parameters[0].device)
        self.places = self.tables = None

    def step(self, group: dict, factor: Tensor | None) -> None:
        _check_factor(factor, self.chunks.device)
        gradients = [_gradient(p) for p in self.parameters]
        places = [(p.data_ptr(), g.data_ptr(), g.dtype) for p, g in zip(self.parameters, gradients, strict=True)]
        if places != self.places:
            self.places, self.tables = places, self._tables(gradients)
        self.steps += 1
        self.count += 1
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        if len(self.chunks):
            self.tables.run(
                "adamw",
                decay=1 - lr * group["weight_decay"],
                beta1_rest=1 - beta1,
                beta2=beta2,
                beta2_rest=1 - beta2,
                step=lr / (1 - beta1**self.count),
                root_inverse=(1 - beta2**self.count) ** -0.5,
                eps=group["eps"],
                factor=factor,
            )

    def _tables(self, gradients: list[Tensor]) -> _Tables:
        for p, m, master in zip(self.parameters, self.first, self.masters, strict=True):
            _check_parameter(p)
            if p.device != m.device or (p.dtype != torch.float32 and master is None):
                raise ValueError(f"a parameter became {p.dtype} on {p.device} after its first step: expected neither")
        rows = [
            (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), 0 if x is None else x.data_ptr(), p.numel(),
             TYPES[p.dtype], TYPES[g.dtype])
            for p, g, m, v, x in zip(self.parameters, gradients, self.first, self.second, self.masters, strict=True)
        ]  # fmt: skip
        masters = [x for x in self.masters if x is not None]
        tensors = [[p.detach() for p in self.parameters], gradients, self.first, self.second, masters]
        return _Tables(tensors, (_moved(torch.tensor(rows), self.chunks.device), self.chunks), self.kernels)


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with the same state dict: step, exp_avg, exp_avg_sq, which may come from there and go there.

    Moments are float32. A parameter of bfloat16 or float16 also has a float32 copy, `master`, which the steps change
    and the parameter is rounded from: who writes to such a parameter writes to its master too. A state dict without one
    makes it from the parameter. `factor` of a step, 0-dim float32 on the device, multiplies the gradients. A group's
    `lr` may be a tensor; one on a GPU is waited for. Refused: amsgrad and maximize in a state dict.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        kernels: Kernels = "cuda",
    ):
        check_kernels(kernels)
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} {value}: expected 0 or a positive number")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {betas}: expected two numbers from 0 to below 1")
        self._kernels = kernels
        self._plans: dict[int, tuple[list[Tensor], list[_Batch]]] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_kernels": self._kernels}

    def __setstate__(self, state: dict) -> None:  # of a copy or a pickle: its tables are made again
        super().__setstate__({"_kernels": "cuda"} | state)
        self._plans = {}

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            _check_parameter(p)

    @torch.no_grad()
    def step(self, closure=None, *, factor: Tensor | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for batch in self._batches(number, group):
                batch.step(group, factor)
        return loss

    def _batches(self, number: int, group: dict) -> list[_Batch]:
        """Made once for the parameters that have gradients, and again when these are others."""
        parameters = [p for p in group["params"] if p.grad is not None]
        known, batches = self._plans.get(number, ((), ()))
        if len(known) == len(parameters) and all(map(is_, known, parameters)):
            return batches
        together: dict[tuple, list[Tensor]] = {}
        for p in parameters:
            together.setdefault((p.device, int(self._state_of(p)["step"])), []).append(p)
        batches = [
            _Batch(some, [self.state[p] for p in some], count, self._kernels) for (_, count), some in together.items()
        ]
        self._plans[number] = parameters, batches
        return batches

    def _state_of(self, p: Tensor) -> dict:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros(p.shape, device=p.device)
        if p.dtype != torch.float32 and "master" not in state:
            state["master"] = p.detach().float()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        for group in state_dict["param_groups"]:
            for key in ("amsgrad", "maximize"):
                if group.get(key):
                    raise ValueError(f"{key} in a state dict: expected one of AdamW without it")
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        here = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, here, strict=True):  # torch has made them the parameter's type
            values = state_dict["state"].get(key, {})
            for name, value in values.items():
                if name == "step":
                    self.state[p][name] = torch.tensor(float(value))
                elif isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, torch.float32, copy=True).contiguous()
        self._plans.clear()

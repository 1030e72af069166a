"""Optimizers and learning-rate schedules, updating parameters in place.

SGD (Sutskever et al. 2013 for Nesterov), AdamW (Loshchilov & Hutter 2019) as torch defines them, and Muon (Jordan et
al. 2024): momentum whose matrix is replaced by the nearest orthogonal one, by Newton-Schulz iteration. Parameters
without a gradient are left alone. Refuses hyper-parameters outside their range, and Muon on anything but matrices.
"""

import math

import numpy as np

from autograd.tensor import Tensor


class Optimizer:
    """Holds parameter groups (dicts with "params" and hyper-parameters; "lr" may be rewritten between steps) and one
    state dict of arrays per parameter."""

    def __init__(self, params, **defaults):
        params = list(params)
        if not params:
            raise ValueError(f"{type(self).__name__}: an empty list of parameters")
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        self.param_groups = [{**defaults, **group, "params": list(group["params"])} for group in groups]
        for group in self.param_groups:
            self._check(group)
        every = [p for group in self.param_groups for p in group["params"]]
        if len({id(p) for p in every}) != len(every):
            raise ValueError(f"{type(self).__name__}: a parameter is listed twice")
        for p in every:
            if not isinstance(p, Tensor) or not p.is_leaf:
                raise ValueError(f"{type(self).__name__}: {p!r}: expected a leaf tensor")
        self.state = {id(p): {} for p in every}
        # An array per parameter to compute in, kept from step to step: fresh memory for large ones costs page faults.
        self._scratch = {id(p): np.empty_like(p.data) for p in every}
        self._params = every

    def _check(self, group):
        for name, (low, high) in {"lr": (0, math.inf), "weight_decay": (0, math.inf), "momentum": (0, 1)}.items():
            if name in group and not low <= group[name] <= high:
                raise ValueError(f"{type(self).__name__}: {name} {group[name]}: expected {low} to {high}")

    def zero_grad(self) -> None:
        for p in self._params:
            p.grad = None

    def step(self) -> None:
        name = type(self).__name__
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    key = id(p)
                    self._update(p.data, p.grad.data, self.state[key], self._scratch[key], group)
                    p._version[0] += 1
                    p._version[1] = name

    def state_dict(self) -> dict:
        """Hyper-parameters of each group and, in order of the parameters, a copy of each one's state."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"groups": groups, "state": [_copied(self.state[id(p)]) for p in self._params]}

    def load_state_dict(self, state: dict) -> None:
        if len(state["state"]) != len(self._params) or len(state["groups"]) != len(self.param_groups):
            raise ValueError(
                f"optimizer state of {len(state['state'])} parameters in {len(state['groups'])} groups: "
                f"expected {len(self._params)} in {len(self.param_groups)}"
            )
        for p, values in zip(self._params, state["state"], strict=True):
            for name, value in values.items():
                if isinstance(value, np.ndarray) and value.shape != p.shape:
                    raise ValueError(
                        f"optimizer state {name} of shape {value.shape} for a parameter of shape {p.shape}"
                    )
        for group, values in zip(self.param_groups, state["groups"], strict=True):
            group.update(values)
        for p, values in zip(self._params, state["state"], strict=True):
            self.state[id(p)] = _copied(values)


def _copied(state):
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in state.items()}


class SGD(Optimizer):
    """v = momentum v + (g + weight_decay p); p -= lr v, or with Nesterov p -= lr (g + momentum v)."""

    def __init__(self, params, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)

    def _check(self, group):
        super()._check(group)
        if group["nesterov"] and not group["momentum"] > 0:
            raise ValueError(f"SGD: Nesterov with momentum {group['momentum']}: expected a positive momentum")

    def _update(self, p, g, state, scratch, group):
        if group["weight_decay"]:
            g = g + group["weight_decay"] * p
        momentum = group["momentum"]
        if momentum:
            if "momentum" not in state:
                state["momentum"] = g.copy()
            else:
                state["momentum"] *= momentum
                state["momentum"] += g
            g = g + momentum * state["momentum"] if group["nesterov"] else state["momentum"]
        np.multiply(g, group["lr"], out=scratch)
        p -= scratch


class AdamW(Optimizer):
    """Adam with decoupled weight decay: p *= 1 - lr weight_decay; p -= lr m̂ / (sqrt(v̂) + eps)."""

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _check(self, group):
        super()._check(group)
        if not all(0 <= beta < 1 for beta in group["betas"]) or not group["eps"] >= 0:
            raise ValueError(
                f"AdamW: betas {group['betas']}, eps {group['eps']}: expected betas in [0, 1) and eps >= 0"
            )

    def _update(self, p, g, state, scratch, group):
        if not state:
            state.update(step=0, m=np.zeros_like(p), v=np.zeros_like(p))
        lr, (beta1, beta2) = group["lr"], group["betas"]
        state["step"] += 1
        m, v = state["m"], state["v"]
        np.subtract(g, m, out=scratch)
        scratch *= 1 - beta1
        m += scratch
        np.multiply(g, g, out=scratch)
        scratch -= v
        scratch *= 1 - beta2
        v += scratch
        np.sqrt(v, out=scratch)
        scratch /= math.sqrt(1 - beta2 ** state["step"])
        scratch += group["eps"]
        np.divide(m, scratch, out=scratch)
        scratch *= lr / (1 - beta1 ** state["step"])
        p *= 1 - lr * group["weight_decay"]
        p -= scratch


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(g: np.ndarray, steps: int = 5) -> np.ndarray:
    """A matrix with g's singular vectors and singular values near 1 (0.7 to 1.2), by the quintic Newton-Schulz
    iteration X <- aX + (bA + cA²)X with A = XXᵀ, in g's dtype."""
    a, b, c = NEWTON_SCHULZ
    x = g / (np.linalg.norm(g) + 1e-7)
    if x.shape[0] > x.shape[1]:
        return orthogonalize(g.T, steps).T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalized; the update is scaled by sqrt(max(1, rows / columns)) so that its effect on
    the output does not depend on the matrix's shape. For hidden weight matrices; give the rest to AdamW."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0, steps: int = 5):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps)

    def _check(self, group):
        super()._check(group)
        for p in group["params"]:
            if p.ndim != 2:
                raise ValueError(f"Muon: a parameter of shape {p.shape}: expected matrices (use AdamW for the others)")

    def _update(self, p, g, state, scratch, group):
        momentum, lr = group["momentum"], group["lr"]
        if not state:
            state["momentum"] = np.zeros_like(p)
        m = state["momentum"]
        m *= momentum
        m += (1 - momentum) * g
        update = orthogonalize((1 - momentum) * g + momentum * m, group["steps"])
        p *= 1 - lr * group["weight_decay"]
        np.multiply(update, lr * math.sqrt(max(1, p.shape[0] / p.shape[1])), out=scratch)
        p -= scratch


def clip_grad_norm_(parameters, max_norm: float) -> float:
    """Scales all gradients by one factor so that their joint Euclidean norm is at most max_norm; returns the norm.

    A norm that is NaN or inf is a ValueError, and the gradients are left as they are.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm_: max_norm {max_norm}: expected a positive number")
    gradients = [p.grad.data for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients))
    if not math.isfinite(norm):
        raise ValueError(f"clip_grad_norm_: the gradient norm is {norm}")
    if norm > max_norm:
        for g in gradients:
            g *= max_norm / (norm + 1e-6)
    return norm


def warmup_cosine(step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Factor on the learning rate at `step` (from 0): linear warmup, then half a cosine from 1 to `floor`."""
    _check_schedule(step, total, warmup)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(step: int, total: int, warmup: int = 0, decay: int = 0, floor: float = 0.0) -> float:
    """Factor on the learning rate at `step` (from 0): linear warmup, then 1, then linear to `floor` over the last
    `decay` steps (Hu et al. 2024)."""
    _check_schedule(step, total, warmup + decay)
    if step < warmup:
        return (step + 1) / warmup
    left = total - step
    return 1.0 if left >= decay else floor + (1 - floor) * left / decay


def _check_schedule(step, total, phases):
    if not (0 <= step <= total and 0 <= phases <= total):
        raise ValueError(
            f"schedule: step {step} of {total} with phases of {phases} steps together: expected them within it"
        )

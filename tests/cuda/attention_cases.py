"""What the tests of attention share: the definition in float64, operands, how a step is called, errors.

The definition knows nothing of tiles: all scores at once, and gradients by torch's autograd. `Case` holds one problem;
`forward` and `backward` run a step of a module into the middle of arrays of NaN: an element that was not written fails,
and so does one beside the result that was.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

EVERYTHING = 1 << 30
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass(slots=True)
class Case:
    """q (B, H, T, K), k and v (B, G, S, K); with lengths_q and lengths_k packed: (rows, heads, K)."""

    heads: int = 2
    kv_heads: int = 2
    queries: int = 64
    keys: int = 64
    head_dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    left: int = EVERYTHING
    right: int = EVERYTHING
    softcap: float = 0.0
    scale: float | None = None
    sink: bool = False
    bias: str = ""  # "", "full" (B, H, T, S) or "shared" (1, 1, T, S), with some -inf
    lengths_q: tuple[int, ...] = ()
    lengths_k: tuple[int, ...] = ()
    magnitude: float = 1.0
    device: str = "cpu"
    seed: int = 0
    arrays: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def rows(total, heads, packed):
            # In memory as a GPT has them, (.., row, head, K), and a view of a wider row: no dense strides.
            shape = (total, heads, self.head_dim) if packed else (self.batch, total, heads, self.head_dim)
            wide = torch.randn(*shape[:-1], self.head_dim + 8, generator=generator).to(self.device, self.dtype)
            view = wide[..., : self.head_dim] * self.magnitude
            wide[..., : self.head_dim] = view
            view = wide[..., : self.head_dim]
            return view if packed else view.transpose(1, 2)

        packed = bool(self.lengths_q)
        total_q = sum(self.lengths_q) if packed else self.queries
        total_k = sum(self.lengths_k) if packed else self.keys
        a = self.arrays
        a["q"], a["k"], a["v"] = (
            rows(n, h, packed) for n, h in ((total_q, self.heads), (total_k, self.kv_heads), (total_k, self.kv_heads))
        )
        a["v"] = a["v"] / self.magnitude if self.magnitude != 1 else a["v"]
        a["d_o"] = (
            rows(total_q, self.heads, packed)
            if self.magnitude == 1
            else torch.randn(a["q"].shape, generator=generator).to(self.device, self.dtype)
        )
        if self.sink:
            a["sink"] = torch.randn(self.heads, generator=generator).to(self.device)
        if self.bias:
            full = (self.batch, self.heads) if self.bias == "full" else (1, 1)
            a["bias"] = torch.randn(*full, self.queries, self.keys, generator=generator).to(self.device)
            a["bias"][torch.rand(a["bias"].shape, generator=generator).to(self.device) < 0.2] = -math.inf
        if packed:
            for name, lengths in (("starts_q", self.lengths_q), ("starts_k", self.lengths_k)):
                a[name] = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(self.device, torch.int32)

    @property
    def scale_value(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def arguments(self) -> dict:
        """For module.run, but for the results."""
        names = ("q", "k", "v", "sink", "bias", "starts_q", "starts_k")
        given = {name: self.arrays[name] for name in names if name in self.arrays}
        given |= {"scale": self.scale_value, "softcap": self.softcap, "left": self.left, "right": self.right}
        if self.lengths_q:
            given |= {"longest_q": max(self.lengths_q), "longest_k": max(self.lengths_k)}
        return given


def definition(q, k, v, *, scale, softcap=0.0, left=EVERYTHING, right=EVERYTHING, sink=None, bias=None):
    """o (B, H, T, K) and lse (B, H, T) in the type of q, which should be float64; see attention.h."""
    (H, T), (G, S) = q.shape[1:3], k.shape[1:3]
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    scores = scale * q @ k.mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    distance = torch.arange(S, device=q.device) - torch.arange(T, device=q.device)[:, None] - (S - T)
    scores = scores.masked_fill((distance < -left) | (distance > right), -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    lse = scores.logsumexp(-1)
    dead = lse == -math.inf
    p = (scores - lse.masked_fill(dead, 0.0)[..., None]).exp()
    return p[..., :S] @ v, lse


def reference(case: Case, dtype=torch.float64, gradients=False) -> dict[str, torch.Tensor]:
    """o and lse, and with `gradients` dq, dk, dv and d_sink, of the case's rounded inputs computed in `dtype`."""
    a = case.arrays
    leaves = {n: a[n].detach().to(dtype).requires_grad_(gradients) for n in ("q", "k", "v", "sink") if n in a}
    options = {"scale": case.scale_value, "softcap": case.softcap, "left": case.left, "right": case.right}
    if case.lengths_q:
        outs, lses = [], []
        for i in range(len(case.lengths_q)):
            (q0, q1), (k0, k1) = (a[s][i : i + 2].tolist() for s in ("starts_q", "starts_k"))
            q, k, v = (x[None].transpose(1, 2) for x in (leaves["q"][q0:q1], leaves["k"][k0:k1], leaves["v"][k0:k1]))
            o, lse = definition(q, k, v, sink=leaves.get("sink"), **options)
            outs.append(o[0].transpose(0, 1))
            lses.append(lse[0])
        result = {"o": torch.cat(outs), "lse": torch.cat(lses, dim=1)}
    else:
        o, lse = definition(
            leaves["q"], leaves["k"], leaves["v"], sink=leaves.get("sink"), bias=a.get("bias"), **options
        )
        result = {"o": o, "lse": lse}
    if gradients:
        found = torch.autograd.grad(result["o"], list(leaves.values()), a["d_o"].to(dtype), allow_unused=True)
        names = {"q": "dq", "k": "dk", "v": "dv", "sink": "d_sink"}
        result |= {
            names[n]: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)
        }
    return {name: x.detach() for name, x in result.items()}


class Guarded:
    """A result like `x`, of NaN, with rows of NaN around it."""

    def __init__(self, x: torch.Tensor, dtype=None):
        heads_last = x.ndim == 4
        shape = x.transpose(1, 2).shape if heads_last else x.shape
        self.whole = torch.full((shape[0], shape[1] + 4, *shape[2:]) if heads_last else (shape[0] + 4, *shape[1:]),
                                math.nan, dtype=dtype or x.dtype, device=x.device)  # fmt: skip
        inside = self.whole[:, 2:-2] if heads_last else self.whole[2:-2]
        self.inside = inside.transpose(1, 2) if heads_last else inside
        self.edges = (self.whole[:, :2], self.whole[:, -2:]) if heads_last else (self.whole[:2], self.whole[-2:])

    def check(self):
        assert all(edge.isnan().all() for edge in self.edges), "written outside of the result"


def lse_like(case: Case) -> torch.Tensor:
    q = case.arrays["q"]
    shape = (q.shape[1], q.shape[0]) if case.lengths_q else q.shape[:3]
    return torch.full(shape, math.nan, device=q.device)


def forward(module, step: str, case: Case) -> dict[str, torch.Tensor]:
    """o and lse by one step."""
    o, lse = Guarded(case.arrays["q"]), lse_like(case)
    scores = None
    if step == "naive_01":
        batch, queries = len(case.lengths_q) or case.batch, max(case.lengths_q, default=case.queries)
        keys = max(case.lengths_k, default=case.keys)
        scores = torch.full((batch, case.heads, queries, keys), math.nan, device=case.device)
    module.run("attention_forward", step=step, o=o.inside, lse=lse, scores=scores, **case.arguments())
    if case.device == "cuda":
        torch.cuda.synchronize()
    o.check()
    return {"o": o.inside, "lse": lse}


def backward(module, step: str, case: Case, deterministic=False) -> dict[str, torch.Tensor]:
    """dq, dk and dv by one step, of a forward pass by definition (o rounded as a kernel would)."""
    a, found = case.arrays, reference(case)
    heads, total, batch = (
        case.heads,
        a["q"].shape[0] if case.lengths_q else case.batch * case.queries,
        max(1, len(case.lengths_q) or case.batch),
    )
    grads = {name: Guarded(a[of]) for name, of in (("dq", "q"), ("dk", "k"), ("dv", "v"))}
    device = case.device
    module.run(
        "attention_backward", step=step, o=found["o"].to(case.dtype).contiguous(),
        lse=found["lse"].float().contiguous(),
        d_o=a["d_o"],
        **{name: g.inside for name, g in grads.items()},
        deterministic=deterministic,
        delta=torch.full((heads * total,), math.nan, device=device),
        dq_sum=torch.full((heads * (total + 128 * batch) * case.head_dim,), math.nan, device=device),
        turns=torch.full((heads * (total // 64 + batch),), -7, dtype=torch.int32, device=device), **case.arguments(),
    )  # fmt: skip
    if device == "cuda":
        torch.cuda.synchronize()
    for g in grads.values():
        g.check()
    return {name: g.inside for name, g in grads.items()}


def torchs_own(case: Case, gradients=False) -> dict[str, torch.Tensor] | None:
    """The same by torch's SDPA in the case's type, where it has the features; None where it has not."""
    if (
        case.lengths_q
        or case.softcap
        or case.sink
        or (case.left != EVERYTHING and case.right != EVERYTHING and case.right != 0)
    ):
        return None
    a = case.arrays
    leaves = [a[n].detach().clone().requires_grad_(gradients) for n in ("q", "k", "v")]
    distance = torch.arange(case.keys) - torch.arange(case.queries)[:, None] - (case.keys - case.queries)
    mask = ((distance >= -case.left) & (distance <= case.right)).to(case.device)
    if not mask.any(-1).all():
        return None
    bias = torch.zeros(mask.shape, device=case.device).masked_fill(~mask, -math.inf)
    if "bias" in a:
        bias = bias + a["bias"]
        if (bias == -math.inf).all(-1).any():
            return None
    o = F.scaled_dot_product_attention(
        *leaves, attn_mask=bias.to(case.dtype), scale=case.scale_value, enable_gqa=case.heads != case.kv_heads
    )
    result = {"o": o.detach()}
    if gradients:
        result |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, a["d_o"]), strict=True))
    return result


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of `want`; NaN where got has one."""
    if want.numel() == 0:
        return 0.0
    return (
        (got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt().clamp_min(1e-6)
    ).item()


def check_forward(module, step: str, case: Case) -> None:
    """Within rounding of the definition, and where torch's SDPA has the features not further from it (10% for luck)."""
    got, want, torchs = forward(module, step, case), reference(case), torchs_own(case)
    worst = ROUNDING[case.dtype] * 1.5
    mine = error(got["o"], want["o"])
    assert mine <= worst, f"o: {mine:.3g} of its size, expected {worst:.3g}"
    if torchs is not None:
        theirs = error(torchs["o"], want["o"])
        assert mine <= 1.1 * theirs + 1e-6, f"o: {mine:.3g}, torch {theirs:.3g}"
    finite = want["lse"][want["lse"].isfinite()].abs()
    spread = 2e-5 * max(1.0, finite.max().item() if finite.numel() else 1.0)
    if case.softcap:  # of a GPU's tanh 2^-11 is what is promised
        spread = max(2 * ROUNDING[case.dtype], case.softcap * 2**-11 if case.device == "cuda" else 0.0)
    same = (got["lse"] == want["lse"].float()) | ((got["lse"].double() - want["lse"]).abs() <= spread)
    assert same.all(), f"lse: {(got['lse'].double() - want['lse'])[~same].abs().max():.3g}"
    dead = want["lse"] == -math.inf
    rows = (dead.transpose(0, 1) if case.lengths_q else dead)[..., None].expand_as(want["o"])
    assert (got["o"][rows] == 0).all(), "a row that sees nothing is not zero"


def check_backward(module, step: str, case: Case, deterministic=False) -> None:
    got, want, torchs = (
        backward(module, step, case, deterministic),
        reference(case, gradients=True),
        torchs_own(case, gradients=True),
    )
    for name in ("dq", "dk", "dv"):
        mine = error(got[name], want[name])
        worst = 3 * ROUNDING[case.dtype]
        assert mine <= worst, f"{name}: {mine:.3g} of its size, expected {worst:.3g}"
        if torchs is not None:
            theirs = error(torchs[name], want[name])
            assert mine <= 1.25 * theirs + 1e-6, f"{name}: {mine:.3g}, torch {theirs:.3g}"

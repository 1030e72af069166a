"""Training-step times of the engine beside torch, plain numpy written by hand, HIPS autograd, and the bare products.

`python -m autograd.bench` times forward + backward + SGD of two MLPs and a 2-layer GPT block, alternating in one
process with the same number of threads (HIPS autograd, whose package has our name, in a process of its own), and
the engine's overhead per node. Saves results/autograd/*.json. Refuses to time steps whose losses do not agree.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from autograd import Tensor, manual_seed, nn, optim
from autograd import functional as F
from common import timing
from common.cli import parse, run
from common.results import save_result

LR = 0.01
CHECK_STEPS = 3
MLPS = {"mlp_64_128_64_10": ((64, 128, 64, 10), 64), "mlp_784_512_256_10": ((784, 512, 256, 10), 128)}
BLOCK = {"batch": 8, "length": 64, "width": 128, "heads": 4, "layers": 2}


@dataclass(frozen=True, slots=True)
class Config:
    """How to measure."""

    rounds: int = field(default=25, metadata={"help": "samples of each competitor, taken in turn"})
    threads: int = field(default=2, metadata={"help": "threads of torch and of numpy's BLAS"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result file"})

    def __post_init__(self):
        if self.rounds < 1 or self.threads < 1:
            raise ValueError(f"rounds {self.rounds}, threads {self.threads}: expected at least 1 each")


# -- MLPs: linear, relu, ..., linear, cross-entropy, SGD --
def mlp_data(sizes, batch):
    """Weights (out, in), biases, inputs (batch, in) and labels (batch), the same for every competitor."""
    rng = np.random.default_rng(0)
    pairs = list(pairwise(sizes))
    weights = [(rng.standard_normal((o, i)) / np.sqrt(i)).astype(np.float32) for i, o in pairs]
    biases = [np.zeros(o, np.float32) for _, o in pairs]
    return weights, biases, rng.standard_normal((batch, sizes[0])).astype(np.float32), rng.integers(0, sizes[-1], batch)


def mlp_ours(sizes, batch):
    weights, biases, x, labels = mlp_data(sizes, batch)
    layers = []
    for w, b in zip(weights, biases, strict=True):
        layer = nn.Linear(w.shape[1], w.shape[0])
        layer.load_state_dict({"weight": w, "bias": b})
        layers.append(layer)
    x, labels = Tensor(x), Tensor(labels)
    optimizer = optim.SGD([p for layer in layers for p in layer.parameters()], lr=LR)

    def step():
        h = x
        for layer in layers[:-1]:
            h = F.relu(layer(h))
        loss = F.cross_entropy(layers[-1](h), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def mlp_torch(sizes, batch):
    import torch

    weights, biases, x, labels = mlp_data(sizes, batch)
    parameters = [torch.tensor(p, requires_grad=True) for pair in zip(weights, biases, strict=True) for p in pair]
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))
    x, labels = torch.tensor(x), torch.tensor(labels)
    optimizer = torch.optim.SGD(parameters, lr=LR)
    linear, relu = torch.nn.functional.linear, torch.nn.functional.relu

    def step():
        h = x
        for w, b in layers[:-1]:
            h = relu(linear(h, w, b))
        loss = torch.nn.functional.cross_entropy(linear(h, *layers[-1]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def mlp_by_hand(sizes, batch):
    """The same step as plain numpy, as tight as a careful person writes it."""
    weights, biases, x, labels = mlp_data(sizes, batch)
    rows = np.arange(batch)

    def step():
        activations, h = [x], x
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            h = h @ w.T
            h += b
            np.maximum(h, 0, out=h)
            activations.append(h)
        z = h @ weights[-1].T
        z += biases[-1]
        z -= z.max(1, keepdims=True)
        of_label = z[rows, labels]
        g = np.exp(z)
        total = g.sum(1, keepdims=True)
        loss = (np.log(total).sum() - of_label.sum()) / batch
        g /= total * batch
        g[rows, labels] -= 1 / batch
        for i in reversed(range(len(weights))):
            w, a = weights[i], activations[i]
            dw, db = g.T @ a, g.sum(0)
            if i:
                g = g @ w
                g *= a > 0
            dw *= LR
            w -= dw
            db *= LR
            biases[i] -= db
        return float(loss)

    return step


def mlp_products(sizes, batch):
    """Only the matrix products of the step, into arrays that exist: the bound that numpy's BLAS sets."""
    weights, _, x, _ = mlp_data(sizes, batch)
    rng = np.random.default_rng(1)
    hidden = [x] + [rng.standard_normal((batch, w.shape[0])).astype(np.float32) for w in weights]
    gradients = [np.empty_like(w) for w in weights]
    buffers = [np.empty_like(h) for h in hidden]

    def step():
        for i, w in enumerate(weights):
            np.matmul(hidden[i], w.T, out=buffers[i + 1])
            np.matmul(hidden[i + 1].T, hidden[i], out=gradients[i])
            if i:
                np.matmul(hidden[i + 1], w, out=buffers[i])
        return 0.0

    return step


def mlp_flops(sizes, batch) -> int:
    """Multiplications and additions of the products: forward, gradient of weights, gradient of inputs but the first."""
    pairs = list(pairwise(sizes))
    return sum((4 if i == 0 else 6) * batch * m * n for i, (m, n) in enumerate(pairs))


# -- the GPT block: pre-norm attention and MLP, twice, on given activations --
class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the torch twin below has the same names."""

    def __init__(self, width, heads):
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTC):
        B, T, C = x_BTC.shape
        qkv = self.qkv(self.norm1(x_BTC)).reshape(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x_BTC = x_BTC + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x_BTC + self.down(F.gelu(self.up(self.norm2(x_BTC)), "tanh"))


def torch_block(width, heads):
    import torch

    functional = torch.nn.functional

    class TorchBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
            self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
            self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

        def forward(self, x_BTC):
            B, T, C = x_BTC.shape
            qkv = self.qkv(self.norm1(x_BTC)).reshape(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
            x_BTC = x_BTC + self.out(y.transpose(1, 2).reshape(B, T, C))
            return x_BTC + self.down(functional.gelu(self.up(self.norm2(x_BTC)), approximate="tanh"))

    return TorchBlock()


def block_pair():
    """Our step and torch's on the same weights and data: forward, mean-squared loss, backward, SGD."""
    import torch

    rng = np.random.default_rng(0)
    shape = (BLOCK["batch"], BLOCK["length"], BLOCK["width"])
    x, target = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    manual_seed(0)
    ours = nn.Sequential(*(Block(BLOCK["width"], BLOCK["heads"]) for _ in range(BLOCK["layers"])))
    theirs = torch.nn.Sequential(*(torch_block(BLOCK["width"], BLOCK["heads"]) for _ in range(BLOCK["layers"])))
    theirs.load_state_dict({name: torch.tensor(value) for name, value in ours.state_dict().items()})

    def stepper(model, optimizer, x, target, mse):
        def step():
            loss = mse(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    return {
        "ours": stepper(ours, optim.SGD(ours.parameters(), lr=LR), Tensor(x), Tensor(target), F.mse_loss),
        "torch": stepper(
            theirs,
            torch.optim.SGD(theirs.parameters(), lr=LR),
            torch.tensor(x),
            torch.tensor(target),
            torch.nn.functional.mse_loss,
        ),
    }


def block_flops() -> int:
    B, T, C, L = (BLOCK[k] for k in ("batch", "length", "width", "layers"))
    return 3 * L * (2 * B * T * 12 * C * C + 4 * B * T * T * C)  # backward counts twice; attention is not halved


# -- measuring --
def same_losses(results: dict) -> bool:
    """The competitors' losses (the products alone have none) agree to 1e-4."""
    losses = [loss for name, loss in results.items() if name != "products"]
    return all(abs(loss - losses[-1]) <= 1e-4 * abs(losses[-1]) for loss in losses)


def measure(case, steppers, flops, config) -> dict:
    for _ in range(CHECK_STEPS - 1):  # the check sees the loss after a few updates, so a wrong gradient shows
        for step in steppers.values():
            step()
    samples = timing.compare(steppers, rounds=config.rounds, warmup=3, check=same_losses)
    row = {"case": case, "threads": config.threads, "gflop": flops / 1e9}
    for name, sample in samples.items():
        row |= {f"{name}_ms": sample.median * 1e3, f"{name}_samples": sample}
    row["vs_torch"] = row["ours_ms"] / row["torch_ms"]
    if "products_ms" in row:
        row["vs_by_hand"] = row["ours_ms"] / row["by_hand_ms"]
        row["of_gemm_bound"] = row["products_ms"] / row["ours_ms"]
    return row


def hips(config) -> dict[str, timing.Samples]:
    """The samples of HIPS autograd by case, {} where it is not installed."""
    script = Path(__file__).with_name("bench_hips.py")
    command = [sys.executable, "-I", str(script), json.dumps({"cases": MLPS, "lr": LR, "rounds": config.rounds})]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **thread_limits(config.threads)})
    if done.returncode == 3:
        print("HIPS autograd is not installed (the `bench` extra brings it): its column stays empty")
        return {}
    if done.returncode:
        raise RuntimeError(f"bench_hips.py failed:\n{done.stderr}")
    return {case: timing.Samples(tuple(raw), inner=5) for case, raw in json.loads(done.stdout).items()}


def thread_limits(threads: int) -> dict[str, str]:
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def nodes_per_second(config) -> dict:
    """Forward and backward through a long chain of one-element operations: nothing but the engine's own overhead."""
    import torch

    length = 2000

    def chain(x):
        def step():
            x.grad = None
            y = x
            for _ in range(length):
                y = y * 1.0001 if y is x else y + x
            y.sum().backward()
            return float(x.grad.sum())

        return step

    steppers = {"ours": chain(Tensor(np.ones(1, np.float32), requires_grad=True))}
    steppers["torch"] = chain(torch.ones(1, requires_grad=True))
    samples = timing.compare(steppers, rounds=config.rounds, warmup=2, check=timing.close(1e-4))
    return {
        "case": "chain of 2,000 nodes",
        "threads": config.threads,
        "nodes": length,
        "nodes_per_s": length / samples["ours"].median,
        "torch_nodes_per_s": length / samples["torch"].median,
        "ours_samples": samples["ours"],
        "torch_samples": samples["torch"],
    }


def main() -> None:
    config = parse(Config, prog="autograd.bench", description="Time training steps of the engine beside its peers.")
    if os.environ.get("OPENBLAS_NUM_THREADS") != str(config.threads):  # numpy's BLAS reads it once, at import
        os.execve(
            sys.executable,
            [sys.executable, "-m", "autograd.bench", *sys.argv[1:]],
            {**os.environ, **thread_limits(config.threads)},
        )
    import torch

    torch.set_num_threads(config.threads)
    rows = []
    for case, (sizes, batch) in MLPS.items():
        builders = {"products": mlp_products, "ours": mlp_ours, "by_hand": mlp_by_hand, "torch": mlp_torch}
        steppers = {name: build(sizes, batch) for name, build in builders.items()}
        rows.append(measure(case, steppers, mlp_flops(sizes, batch), config))
        print_row(rows[-1])
    rows.append(measure("gpt_block_8x64x128", block_pair(), block_flops(), config))
    print_row(rows[-1])
    for case, samples in hips(config).items():
        row = next(row for row in rows if row["case"] == case)
        row |= {"hips_ms": samples.median * 1e3, "hips_samples": samples}
        print(f"{case:22} HIPS autograd {row['hips_ms']:.3f} ms")
    chain = nodes_per_second(config)
    print(f"{chain['nodes_per_s']:,.0f} nodes/s forward and backward (torch: {chain['torch_nodes_per_s']:,.0f})")
    print(save_result("autograd", "training_step", rows, config=config, device="cpu", root=config.out))
    print(save_result("autograd", "engine_overhead", [chain], config=config, device="cpu", root=config.out))


def print_row(row) -> None:
    times = ", ".join(f"{k[:-3]} {v:.3f} ms" for k, v in row.items() if k.endswith("_ms"))
    print(f"{row['case']:22} {times}; {row['vs_torch']:.2f} of torch's time", flush=True)


if __name__ == "__main__":
    run(main)

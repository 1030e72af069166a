"""Handwritten digits: an MLP and a small ConvNet on scikit-learn's bundled 8 x 8 images, trained by our engine.

`python -m autograd.digits` trains both, prints their test accuracy on a fixed split (every fifth image, 360 of 1,797),
and writes learning curves and the misclassified digits as PNGs. The images are real but few, so both models are held
back by dropout and label smoothing. Refuses settings out of range before anything is trained.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autograd import Tensor, manual_seed, nn, no_grad, optim
from autograd import functional as F
from common import plots
from common.cli import parse, run
from common.log import RunLog

SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Config:
    """How to train."""

    epochs: int = field(default=30, metadata={"help": "passes over the training images, for each model"})
    batch: int = field(default=64, metadata={"help": "images per step"})
    lr: float = field(default=3e-3, metadata={"help": "peak learning rate of AdamW"})
    seed: int = field(default=0, metadata={"help": "of the weights and the order of the images"})
    out: Path = field(default=Path("runs/digits"), metadata={"help": "folder of the logs and pictures"})

    def __post_init__(self):
        if self.epochs < 1 or not 1 <= self.batch <= 1437 or not self.lr > 0 or self.seed < 0:
            raise ValueError(
                f"epochs {self.epochs}, batch {self.batch}, lr {self.lr}, seed {self.seed}: expected epochs >= 1, "
                f"batch 1 to 1437, lr > 0, seed >= 0"
            )


def load():
    """(train images, train labels, test images, test labels); images (N, 1, 8, 8) float32 in [0, 1], labels int64."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


class MLP(nn.Module):
    """Three linear layers over the 64 pixels."""

    def __init__(self):
        self.dropout = nn.Dropout(0.3)
        self.layers = nn.ModuleList([nn.Linear(64, 512), nn.Linear(512, 256)])
        self.head = nn.Linear(256, 10)

    def forward(self, x_B1HW):
        x = x_B1HW.flatten(1)
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        return self.head(x)


class ConvNet(nn.Module):
    """Three 3 x 3 convolutions, pooled to 2 x 2 after the second and the third, and two linear layers."""

    def __init__(self):
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2, self.conv3 = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.dropout = nn.Dropout(0.4)
        self.hidden, self.head = nn.Linear(32 * 2 * 2, 64), nn.Linear(64, 10)

    def forward(self, x_B1HW):
        x = F.relu(self.conv1(x_B1HW))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return self.head(self.dropout(F.relu(self.hidden(self.dropout(x.flatten(1))))))


def predict(model, images) -> np.ndarray:
    """The most likely class of each image."""
    model.eval()
    with no_grad():
        logits = model(Tensor(images))
    model.train()
    return logits.data.argmax(1)


def train(name, model, data, config):
    """Trains the model; returns its test accuracy after each epoch, the training loss of each, and its predictions."""
    images, labels, test_images, test_labels = data
    rng = np.random.default_rng(config.seed)
    optimizer = optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    per_epoch = len(images) // config.batch
    total = config.epochs * per_epoch
    accuracies, losses, step = [], [], 0
    with RunLog(config.out / name, config, total_steps=total) as log:
        for _ in range(config.epochs):
            order, epoch_loss = rng.permutation(len(images)), 0.0
            for start in range(0, per_epoch * config.batch, config.batch):
                chosen = order[start : start + config.batch]
                optimizer.param_groups[0]["lr"] = config.lr * optim.warmup_cosine(step, total, warmup=total // 20)
                logits = model(Tensor(images[chosen]))
                loss = F.cross_entropy(logits, Tensor(labels[chosen]), label_smoothing=SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                epoch_loss += loss.item() / per_epoch
                log.progress(step, model=name, loss=loss.item(), accuracy=accuracies[-1] if accuracies else 0.0)
            predictions = predict(model, test_images)
            accuracies.append(float((predictions == test_labels).mean()))
            losses.append(epoch_loss)
            log.metrics(step, loss=epoch_loss, test_accuracy=accuracies[-1])
    return accuracies, losses, predictions


def draw(out, results, data):
    """learning_curves.png, and misclassified.png with what the ConvNet (or, if it has no errors, the MLP) got wrong."""
    _, _, images, labels = data
    curves = {name: (range(1, len(a) + 1), [100 * (1 - x) for x in a]) for name, (a, _, _) in results.items()}
    title = "Digits: test error"
    plots.curve(out / "learning_curves.png", curves, xlabel="epoch", ylabel="test error, %", title=title, log_y=True)
    wrong = {name: np.flatnonzero(p != labels) for name, (_, _, p) in results.items()}
    chosen = [(name, i) for name, indices in wrong.items() for i in indices][:24]
    if chosen:
        titles = [f"{name}: {results[name][2][i]} for {labels[i]}" for name, i in chosen]
        plots.image_grid(out / "misclassified.png", [images[i, 0] for _, i in chosen], titles, columns=6)


def main() -> None:
    config = parse(Config, prog="autograd.digits", description="Train an MLP and a ConvNet on handwritten digits.")
    data, results = load(), {}
    for name, build in {"mlp": MLP, "convnet": ConvNet}.items():
        manual_seed(config.seed)
        results[name] = train(name, build(), data, config)
        wrong = int((results[name][2] != data[3]).sum())
        print(
            f"{name}: {100 * results[name][0][-1]:.2f} % of {len(data[3])} test images right, {wrong} wrong", flush=True
        )
    draw(config.out, results, data)
    print(f"pictures: {config.out / 'learning_curves.png'}, {config.out / 'misclassified.png'}")


if __name__ == "__main__":
    run(main)

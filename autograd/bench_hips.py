"""The MLP training steps on HIPS autograd, for `autograd.bench`: prints {case: [seconds per step, ...]} as JSON.

Runs as a script in isolated mode, so that `import autograd` finds the installed package and not this folder.
Exits with 3 where that package is not installed.
"""

import json
import sys
from itertools import pairwise
from time import perf_counter

try:
    import autograd
    import autograd.numpy as np
except ImportError:
    sys.exit(3)
import numpy


def stepper(sizes, batch, lr):
    rng = numpy.random.default_rng(0)
    pairs = list(pairwise(sizes))
    weights = [(rng.standard_normal((o, i)) / numpy.sqrt(i)).astype("float32") for i, o in pairs]
    biases = [numpy.zeros(o, "float32") for _, o in pairs]
    x = rng.standard_normal((batch, sizes[0])).astype("float32")
    labels = rng.integers(0, sizes[-1], batch)
    one_hot = (labels[:, None] == numpy.arange(sizes[-1])).astype("float32")

    def loss(parameters):
        h = x
        for w, b in parameters[:-1]:
            h = np.maximum(np.dot(h, w.T) + b, 0)
        w, b = parameters[-1]
        z = np.dot(h, w.T) + b
        z = z - np.max(z, axis=1, keepdims=True)
        return -np.sum((z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))) * one_hot) / batch

    parameters = list(zip(weights, biases, strict=True))
    gradient = autograd.grad(loss)

    def step():
        for (w, b), (dw, db) in zip(parameters, gradient(parameters), strict=True):
            w -= lr * dw
            b -= lr * db

    return step


def main():
    task = json.loads(sys.argv[1])
    result = {}
    for case, (sizes, batch) in task["cases"].items():
        step = stepper(sizes, batch, task["lr"])
        for _ in range(3):
            step()
        samples = []
        for _ in range(task["rounds"]):
            start = perf_counter()
            for _ in range(5):
                step()
            samples.append((perf_counter() - start) / 5)
        result[case] = samples
    print(json.dumps(result))


if __name__ == "__main__":
    main()

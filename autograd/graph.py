"""The graph: Node, and `record`, the one door through which every operation enters it.

The graph is a set of Nodes. A Node keeps, for each input that wants a gradient, an edge to where that gradient goes and
a vector-Jacobian product ("vjp") that maps the gradient of the output to the gradient of that input. A vjp is a closure
written in Tensor operations, so running it with recording on yields derivatives that can be differentiated again.
"""

from itertools import count
from types import FunctionType
from weakref import ref

import numpy as np

from autograd.anomaly import check_output, user_line
from autograd.mode import mode
from autograd.tensor import Tensor, constant

_sequence = count(1)


class Node:
    """One recorded operation: where gradients go (edges), and what must not have changed until then (saved)."""

    __slots__ = ("__dict__", "edges", "joint", "op", "saved", "seq", "shape")
    hooks = None  # these three are rare: most nodes read them here, and never get a __dict__
    result = None
    where = None

    def __init__(self, op, out, inputs, vjps):
        self.op = op
        self.seq = next(_sequence)  # creation order is a topological order: inputs exist before outputs
        self.shape = out.data.shape
        self.edges = edges = []
        self.saved = saved = []
        if mode.anomaly:
            self.where = user_line()
        if type(vjps) is tuple:
            self.joint = None
            for tensor, vjp in zip(inputs, vjps, strict=True):
                if tensor.requires_grad:
                    edges.append((tensor._node or tensor, vjp, tensor.data.shape))
                    if vjp.__closure__:
                        _find_saved(vjp, saved)
        else:  # one rule for all inputs, which may need any of them
            self.joint = vjps
            for i, tensor in enumerate(inputs):
                saved.append((tensor, tensor._version[0]))
                if tensor.requires_grad:
                    edges.append((tensor._node or tensor, i, tensor.data.shape))

    def __repr__(self):
        return f"<{self.op} -> {self.shape}>"


def _find_saved(vjp, saved, within=()):
    """What a backward rule needs is exactly what its closure holds: no list to keep in step, nothing to forget."""
    for cell in vjp.__closure__ or ():
        content = cell.cell_contents
        if isinstance(content, Tensor):
            saved.append((content, content._version[0]))
        elif type(content) is FunctionType:
            if content is not vjp and content not in within:  # a rule may call itself
                _find_saved(content, saved, (*within, vjp))
        elif type(content) is tuple:
            saved.extend((item, item._version[0]) for item in content if isinstance(item, Tensor))


def record(op: str, result, inputs: tuple, vjps) -> Tensor:
    """The Tensor of an operation's result, entered in the graph when recording is on and an input requires grad.

    result  ndarray, or a constant Tensor y that the vjps themselves use (exp: `lambda g: g * y`). Such a y never
            becomes the output itself (the closure would hold its own output in a reference cycle, and memory would wait
            for the garbage collector): the caller gets a twin of it, and the engine ties y to the node when the
            backward pass must be differentiable.
    vjps    one function per input: gradient of the output (Tensor) -> gradient of that input (Tensor whose shape
            may still be the broadcast one). Called only for inputs that require grad. Or a single function that
            gives the gradients of all inputs at once (None where it has none).
    """
    out = result.detach() if type(result) is Tensor else constant(result)
    if mode.anomaly:
        check_output(op, out, inputs)
    for tensor in inputs:
        if tensor.requires_grad:
            if mode.grad:
                out.requires_grad = True
                out._node = node = Node(op, out, inputs, vjps)
                if type(result) is Tensor:
                    node.result = result
            break
    return out


def record_view(op: str, data: np.ndarray, base: Tensor, vjp) -> Tensor:
    """As `record`, for a result that shares its memory with its only input: writes to one are seen by the other."""
    out = record(op, data, (base,), (vjp,))
    out._version = version = base._version
    sharing = version[2]
    if sharing is None:
        version[2] = [ref(base), ref(out)]
    else:
        if len(sharing) > 32:
            sharing[:] = [r for r in sharing if r() is not None]
        sharing.append(ref(out))
    return out

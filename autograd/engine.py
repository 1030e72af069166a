"""Reverse-mode differentiation over the recorded graph: `backward`, `grad`, and `fused` operations.

A vertex is a Node (a recorded operation) or a leaf Tensor. Vertices are visited once, in falling order of creation,
which is a reverse topological order; nothing here recurses, so the depth of a graph is limited by memory alone. When a
vertex is visited all its gradient has arrived. A graph is freed as it is used, unless `retain_graph` or `create_graph`
asks to keep it. Refuses a graph that was freed, and a value that was overwritten since it was recorded.
"""

from operator import attrgetter
from sys import getrefcount

import numpy as np

from autograd.anomaly import AnomalyError, check_output
from autograd.graph import Node, record
from autograd.mode import mode
from autograd.tensor import Tensor, as_tensor, constant


def backward(root: Tensor, gradient=None, retain_graph: bool | None = None, create_graph: bool = False) -> None:
    """Accumulates the gradient of `root` into `.grad` of every leaf below it that requires grad.

    gradient  same shape as root; may be left out when root has one element (it is 1 then)
    Raises RuntimeError when root has no graph, when the graph was freed by an earlier backward, or when a value that a
    rule needs was overwritten in place; ValueError for a gradient of another shape.
    """
    vertices, seeds = _roots([root], [gradient])
    for leaf, gradient in backpropagate(vertices, seeds, retain_graph=retain_graph, create_graph=create_graph).items():
        if leaf.grad is None:
            leaf.grad = gradient
        elif create_graph or gradient.requires_grad or leaf.grad.requires_grad:
            leaf.grad = leaf.grad + gradient
        else:
            leaf.grad.data += gradient.data
            leaf.grad._version[0] += 1


def grad(outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False, allow_unused=False) -> tuple:
    """The gradients of the sum of `outputs` (each weighted by its `grad_outputs`) with respect to `inputs`, as a tuple.

    Touches no `.grad`. With create_graph the results can be differentiated again. An input that the outputs do not
    depend on is a RuntimeError, or None with allow_unused.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if grad_outputs is None or isinstance(grad_outputs, Tensor):
        grad_outputs = [grad_outputs] * len(outputs) if grad_outputs is None else [grad_outputs]
    for i, tensor in enumerate(inputs):
        if not tensor.requires_grad:
            raise RuntimeError(f"grad: input {i} of shape {tensor.shape} does not require grad")
    targets = [tensor._node or tensor for tensor in inputs]
    vertices, seeds = _roots(outputs, grad_outputs)
    found = backpropagate(vertices, seeds, targets=targets, retain_graph=retain_graph, create_graph=create_graph)
    result = tuple(found.get(vertex) for vertex in targets)
    for i, gradient in enumerate(result):
        if gradient is None and not allow_unused:
            raise RuntimeError(
                f"grad: the outputs do not depend on input {i} of shape {inputs[i].shape} (allow_unused?)"
            )
    return result


def _roots(outputs, gradients):
    """The vertices to start from, and the gradient each starts with."""
    if len(outputs) != len(gradients):
        raise ValueError(f"{len(gradients)} gradients for {len(outputs)} outputs")
    vertices, seeds = [], []
    for output, gradient in zip(outputs, gradients, strict=True):
        if not output.requires_grad:
            raise RuntimeError("backward of a tensor that does not require grad and has no graph")
        if gradient is None:
            if output.numel() != 1:
                raise RuntimeError(f"backward of a tensor of shape {output.shape} needs a gradient of that shape")
            gradient = constant(np.ones(output.data.shape, output.data.dtype))
        else:
            gradient = as_tensor(gradient)
            if gradient.shape != output.shape:
                raise ValueError(f"gradient of shape {gradient.shape} for a tensor of shape {output.shape}")
            if gradient.dtype != output.dtype:
                raise ValueError(f"gradient of dtype {gradient.dtype} for a tensor of dtype {output.dtype}")
        vertices.append(output._node or output)
        seeds.append(gradient)
    return vertices, seeds


def _order(roots, floor):
    """All nodes below the roots, newest first. Nodes made before `floor` are boundaries: not looked into."""
    seen, stack = set(roots), [v for v in roots if type(v) is Node and v.seq >= floor]
    order = []
    while stack:
        node = stack.pop()
        order.append(node)
        if node.edges is None:
            raise RuntimeError(
                f"backward through {node.op} a second time: its graph was freed by the first; "
                f"call that one with retain_graph=True"
            )
        for vertex, _, _ in node.edges:
            if vertex not in seen:
                seen.add(vertex)
                if type(vertex) is Node and vertex.seq >= floor:
                    stack.append(vertex)
    order.sort(key=attrgetter("seq"), reverse=True)
    return order


def _leading_to(targets, order):
    """The nodes from which a target can be reached: work on the others would be thrown away."""
    wanted = set(targets)
    for node in reversed(order):
        if node not in wanted and any(vertex in wanted for vertex, _, _ in node.edges):
            wanted.add(node)
    return wanted


def backpropagate(roots, seeds, *, targets=None, retain_graph=None, create_graph=False, floor=0) -> dict:
    """Runs the vjps from `roots` down and returns {vertex: its whole gradient} for the targets (default: all leaves).

    floor: vertices made before this sequence number are treated as leaves (autograd.checkpointing uses it to stop at
    the edge of the part that it recomputes).
    """
    order = _order(roots, floor)
    wanted = None if targets is None else _leading_to(targets, order)
    keep_graph = create_graph if retain_graph is None else retain_graph
    pending: dict = {}  # vertex -> gradient that has arrived so far
    found: dict = dict.fromkeys(targets or ())
    was_recording, mode.grad = mode.grad, create_graph
    try:
        for root, seed in zip(roots, seeds, strict=True):
            seed = seed if create_graph else constant(seed.data)  # the caller's own tensor must not become a .grad
            pending[root] = pending[root] + seed if root in pending else seed
        _sweep(order, pending, found, wanted, keep_graph, create_graph)
        while pending:  # the leaves, and what lies beyond the edge
            vertex, gradient = pending.popitem()
            if type(vertex) is not Node and vertex._hooks:
                gradient = _call_hooks(vertex._hooks, gradient, "leaf", vertex.shape)
            # A leaf may keep an array that nobody else holds, as in torch; any other it must copy, or `.grad` of two
            # leaves (both operands of an addition) would be one array, and scaling one would scale both.
            array = gradient.data
            shared = array.base is not None or (getrefcount(gradient), getrefcount(array)) != _UNSHARED
            if shared and not create_graph:
                gradient = constant(array.copy())
            if targets is None or vertex in found:
                found[vertex] = gradient
    finally:
        mode.grad = was_recording
    return found


def _sweep(order, pending, found, wanted, keep_graph, create_graph):
    """Visits the nodes, newest first: each passes its gradient on along its edges, and is then freed."""
    owned: set = set()  # vertices whose pending gradient is a sum made here: nobody else holds that array
    run = _watched if mode.anomaly else None
    for node in order:
        gradient = pending.pop(node, None)
        if gradient is None:
            continue
        if node.hooks:
            gradient = _call_hooks(node.hooks, gradient, node.op, node.shape)
        if node in found:
            found[node] = gradient
        if wanted is not None and node not in wanted:
            continue
        for tensor, version in node.saved:
            if tensor._version[0] != version:
                raise _overwritten(node, tensor, version)
        if create_graph and node.result is not None:  # rules written in terms of the result are differentiable now
            node.result.requires_grad, node.result._node = True, node
        joint = node.joint
        parts = joint and (run(node, joint, gradient) if run else joint(gradient))
        for vertex, vjp, shape in node.edges:
            if wanted is not None and vertex not in wanted:
                continue
            part = parts[vjp] if joint else run(node, vjp, gradient) if run else vjp(gradient)
            if part is None:
                continue
            if part.data.shape != shape:
                part = sum_to(part, shape)
            before = pending.get(vertex)
            if before is None:
                pending[vertex] = part
            elif vertex in owned:
                before.data += part.data
            else:
                pending[vertex] = before + part
                if not create_graph:
                    owned.add(vertex)
        if not keep_graph:
            node.edges = node.saved = node.joint = None
            if node.result is not None:
                node.result = None


def _overwritten(node, tensor, version):
    writes, writer, _ = tensor._version
    return RuntimeError(
        f"backward of {node.op}: a tensor of shape {tensor.shape} that it needs was changed in place after the "
        f"forward pass (by {writer}; version {writes}, expected {version}); write to a clone() instead"
    )


def _watched(node, vjp, gradient):
    """A vjp under detect_anomaly: its results are looked at, and an error says where the operation was recorded."""
    try:
        parts = vjp(gradient)
        for part in [parts] if isinstance(parts, Tensor) else parts:
            if part is not None:
                check_output(node.op, part, (gradient,), " (backward)")
        return parts
    except AnomalyError as error:
        raise AnomalyError(f"in the backward pass of {node.op}, recorded at {node.where}:\n{error}") from None


def _call_hooks(hooks, gradient, op, shape):
    for hook in list(hooks.values()):
        replaced = hook(gradient)
        if replaced is not None:
            if not isinstance(replaced, Tensor) or replaced.shape != shape:
                raise ValueError(f"hook on {op} returned {replaced!r}: expected None or a tensor of shape {shape}")
            gradient = replaced
    return gradient


def _unshared():
    """The reference counts that a gradient has in `backpropagate` when nobody else holds it. They depend on the
    interpreter, so it is asked, with the same statements."""
    pending = {0: constant(np.ones(1))}
    vertex, gradient = pending.popitem()
    array = gradient.data
    return getrefcount(gradient), getrefcount(array)


_UNSHARED = _unshared()


def sum_to(gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undoes broadcasting: sums over the dimensions that `shape` lacks or has as 1."""
    extra = gradient.ndim - len(shape)
    stretched = tuple(extra + i for i, n in enumerate(shape) if n == 1 and gradient.shape[extra + i] != 1)
    dims = tuple(range(extra)) + stretched
    if dims:
        gradient = gradient.sum(dims, keepdim=True)
    return gradient.reshape(shape) if gradient.shape != shape else gradient


def fused(op: str, result, inputs: tuple, backward_all, definition) -> Tensor:
    """Records an operation whose derivative is written by hand, for speed, on numpy arrays.

    backward_all  gradient (ndarray) -> one ndarray or None per input: the first derivative
    definition    the same operation out of plain Tensor operations, `definition(*inputs) -> Tensor`: it is what gets
                  differentiated when the backward pass itself must be differentiable
    """

    def joint(gradient):
        if not mode.grad:
            return [None if part is None else constant(part) for part in backward_all(gradient.data)]
        copies = [identity(tensor) for tensor in inputs]  # a vertex per argument, though one tensor be passed twice
        output = definition(*copies)
        wanted = [copy._node for copy in copies if copy.requires_grad]
        edge = wanted[-1].seq + 1  # the copies were made before it, the inside of the definition after
        found = backpropagate([output._node], [gradient], targets=wanted, create_graph=True, floor=edge)
        return [found.get(copy._node) if copy.requires_grad else None for copy in copies]

    return record(op, result, inputs, joint)


def identity(tensor: Tensor) -> Tensor:
    return record("identity", constant(tensor.data), (tensor,), (lambda gradient: gradient,))

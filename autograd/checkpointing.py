"""Activation checkpointing: `checkpoint(fn, *args)` keeps no intermediate results and computes them again in backward.

Chen et al. 2016. Gradients flow to the arguments and to everything else that fn uses (the parameters of a layer),
through `backward` and `grad` alike, and the backward pass may itself be differentiated. Dropout inside sees the same
random numbers in both runs. Refuses a function that returns anything but one Tensor.
"""

import numpy as np

from autograd.engine import backpropagate, identity
from autograd.graph import Node, record
from autograd.mode import enable_grad, mode
from autograd.random import default_generator
from autograd.tensor import Tensor, constant


def checkpoint(function, *args) -> Tensor:
    """function(*args), computed now and, from the same inputs, once more when backward needs what lies inside."""
    if not mode.grad:
        return function(*args)
    random = default_generator().bit_generator
    random_before = random.state
    output, copies, floor = _run(function, args)
    if not output.requires_grad:
        return output
    outside = _outside(output._node, floor, copies)
    tensors = tuple(t for t in args if isinstance(t, Tensor) and t.requires_grad)

    def joint(gradient):
        random_now, random.state = random.state, random_before
        try:
            with enable_grad():
                again, copies, floor = _run(function, args)
        finally:
            random.state = random_now
        targets = [copy._node for copy in copies] + outside
        found = backpropagate([again._node], [gradient], targets=targets, create_graph=mode.grad, floor=floor)
        return [found.get(vertex) for vertex in targets]

    return record("checkpoint", output.data.copy(), tensors + tuple(_stand_in(v) for v in outside), joint)


def _run(function, args):
    """The output, the copies that stood in for the arguments (those that require grad), and the first sequence number
    that belongs to the inside: the copies themselves lie on the edge, so a backward pass stops there."""
    inside_args = [identity(t) if isinstance(t, Tensor) and t.requires_grad else t for t in args]
    copies = [new for new, old in zip(inside_args, args, strict=True) if new is not old]
    edge = identity(Tensor(np.zeros(1), requires_grad=True))._node.seq
    output = function(*inside_args)
    if not isinstance(output, Tensor):
        raise ValueError(f"checkpoint: the function returned {type(output).__name__}: expected one Tensor")
    return output, copies, edge


def _outside(node, floor, copies):
    """The vertices beyond the edge that the inside leads to, other than the arguments: parameters, captured results."""
    arguments = {copy._node for copy in copies}
    seen, stack, outside = {node}, [node], []
    while stack:
        for vertex, _, _ in stack.pop().edges:
            if vertex in seen or vertex in arguments:
                continue
            seen.add(vertex)
            if type(vertex) is Node and vertex.seq >= floor:
                stack.append(vertex)
            else:
                outside.append(vertex)
    return outside


def _stand_in(vertex) -> Tensor:
    """A Tensor that leads to a vertex: a leaf is one already; for a node, one with its shape and no memory."""
    if type(vertex) is not Node:
        return vertex
    tensor = constant(np.broadcast_to(np.float32(0), vertex.shape))
    tensor.requires_grad, tensor._node = True, vertex
    return tensor

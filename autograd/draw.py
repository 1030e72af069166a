"""Drawing a graph: `draw(tensor)` gives it as SVG text, and writes it where a path is given.

Operations are rounded boxes with the shape of their result, leaves are named boxes; arrows go from inputs to results.
Layers come from the longest path to the output, the order within a layer from the neighbours' mean position. Meant for
graphs that a person can look at: refuses more than a few hundred nodes, and a tensor without a graph.
"""

from collections import defaultdict
from html import escape
from pathlib import Path

from autograd.graph import Node
from autograd.tensor import Tensor
from common.log import atomic_write

MOST = 400
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 128, 40, 24, 44, 16
STYLE = (
    "text{font:12px ui-monospace,Menlo,Consolas,monospace;text-anchor:middle}.shape{fill:#666;font-size:11px}"
    ".op{fill:#eaf2fb;stroke:#3b6ea5}.leaf{fill:#fdf3e1;stroke:#c07f1c}.out{fill:#e9f6ec;stroke:#3c8d53}"
    ".edge{fill:none;stroke:#888}"
)


def draw(tensor: Tensor, path: Path | str | None = None, names: dict | None = None) -> str:
    """The graph above `tensor` as SVG.

    names  {label: Tensor} for leaves (a Module's dict(named_parameters()) fits); others are called leaf 1, leaf 2, ...
    Raises ValueError for a tensor without a graph, a freed graph, and one of more than 400 vertices.
    """
    if tensor._node is None:
        raise ValueError("draw: the tensor has no graph (it is a leaf, or was made under no_grad)")
    inputs = _inputs(tensor._node)
    position = _positions(tensor._node, inputs)
    label = {id(leaf): name for name, leaf in (names or {}).items()}
    unnamed = 0
    parts = []
    for vertex in inputs:
        for above in inputs[vertex]:
            parts.append(_arrow(position[above], position[vertex]))
    for vertex in inputs:
        if type(vertex) is Node:
            text, kind = vertex.op, "out" if vertex is tensor._node else "op"
        else:
            unnamed += id(vertex) not in label
            text, kind = label.get(id(vertex), f"leaf {unnamed}"), "leaf"
        parts.append(_box(position[vertex], text, vertex.shape, kind))
    width = max(x for x, _ in position.values()) + WIDTH + MARGIN
    height = max(y for _, y in position.values()) + HEIGHT + MARGIN
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}"><defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" '
        f'markerWidth="7" markerHeight="7" orient="auto"><path d="M0,0 8,4 0,8z" fill="#888"/></marker></defs>'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>' + "".join(parts) + "</svg>\n"
    )
    if path is not None:
        atomic_write(path, svg)
    return svg


def _inputs(root) -> dict:
    """{vertex: the vertices that feed it}, each once, in the order of the operation's arguments."""
    inputs, stack = {}, [root]
    while stack:
        vertex = stack.pop()
        if vertex in inputs:
            continue
        if type(vertex) is Node and vertex.edges is None:
            raise ValueError("draw: the graph was freed by backward; draw before it, or use retain_graph=True")
        inputs[vertex] = list(dict.fromkeys(v for v, _, _ in vertex.edges)) if type(vertex) is Node else []
        if len(inputs) > MOST:
            raise ValueError(f"draw: more than {MOST} vertices: draw a part of the graph")
        stack.extend(reversed(inputs[vertex]))
    return inputs


def _positions(root, inputs) -> dict:
    """Left upper corners: a layer per distance from the output, ordered by where the consumers stand."""
    consumers = defaultdict(list)
    for vertex, above in inputs.items():
        for v in above:
            consumers[v].append(vertex)
    depth = {}
    waiting, ready = {v: len(consumers[v]) for v in inputs}, [root]
    while ready:  # a vertex is placed once all its consumers are: one layer above the highest of them
        vertex = ready.pop()
        depth[vertex] = 1 + max((depth[c] for c in consumers[vertex]), default=-1)
        for v in inputs[vertex]:
            waiting[v] -= 1
            if not waiting[v]:
                ready.append(v)
    layers = defaultdict(list)
    for vertex in inputs:
        layers[depth[vertex]].append(vertex)
    across, position = {}, {}
    for level in sorted(layers):
        row = layers[level]
        row.sort(key=lambda v: sum(across[c] for c in consumers[v]) / max(len(consumers[v]), 1))
        for i, vertex in enumerate(row):
            across[vertex] = (i - (len(row) - 1) / 2) * (WIDTH + GAP_X)
    left = min(across.values())
    bottom = max(layers)
    for vertex in inputs:
        position[vertex] = (MARGIN + across[vertex] - left, MARGIN + (bottom - depth[vertex]) * (HEIGHT + GAP_Y))
    return position


def _arrow(start, end) -> str:
    x0, y0, x1, y1 = start[0] + WIDTH / 2, start[1] + HEIGHT, end[0] + WIDTH / 2, end[1] - 1
    bend = max((y1 - y0) / 2, 10)
    return (
        f'<path class="edge" marker-end="url(#tip)" '
        f'd="M{x0:.0f},{y0:.0f} C{x0:.0f},{y0 + bend:.0f} {x1:.0f},{y1 - bend:.0f} {x1:.0f},{y1:.0f}"/>'
    )


def _box(corner, text, shape, kind) -> str:
    x, y = corner
    middle = x + WIDTH / 2
    radius = 3 if kind == "leaf" else 10
    return (
        f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="{radius}"/>'
        f'<text x="{middle:.0f}" y="{y + 17:.0f}">{escape(text)}</text>'
        f'<text class="shape" x="{middle:.0f}" y="{y + 32:.0f}">{escape(str(tuple(shape)))}</text>'
    )

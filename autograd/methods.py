"""Which operations are methods of Tensor, and which operators they answer to: the one place that says so."""

import numpy as np

from autograd import activations, elementwise, engine, indexing, linalg, reduce, shape
from autograd.tensor import Tensor

_METHODS = {
    elementwise: "add sub mul div neg pow abs sign exp expm1 log log1p sqrt rsqrt sin cos tan tanh erf "
    "clamp masked_fill eq ne lt le gt ge isnan isfinite",
    activations: "sigmoid relu",
    reduce: "sum mean var std prod max min amax amin argmax argmin any all logsumexp softmax log_softmax cumsum",
    shape: "reshape flatten permute transpose expand squeeze unsqueeze flip roll split chunk tril triu repeat clone "
    "contiguous",
    indexing: "gather scatter_add index_select",
    linalg: "matmul",
    engine: "backward",
}

_OPERATORS = {
    "__add__": elementwise.add,
    "__radd__": elementwise.add,
    "__sub__": elementwise.sub,
    "__rsub__": lambda a, b: elementwise.sub(b, a),
    "__mul__": elementwise.mul,
    "__rmul__": elementwise.mul,
    "__truediv__": elementwise.div,
    "__rtruediv__": lambda a, b: elementwise.div(b, a),
    "__pow__": elementwise.pow,
    "__rpow__": lambda a, b: elementwise.pow(b, a),
    "__matmul__": linalg.matmul,
    "__rmatmul__": lambda a, b: linalg.matmul(b, a),
    "__neg__": elementwise.neg,
    "__abs__": elementwise.abs,
    "__invert__": lambda a: Tensor(~a.data),
    "__and__": lambda a, b: Tensor(a.data & indexing.array_index(b)),
    "__rand__": lambda a, b: Tensor(a.data & indexing.array_index(b)),
    "__or__": lambda a, b: Tensor(a.data | indexing.array_index(b)),
    "__ror__": lambda a, b: Tensor(a.data | indexing.array_index(b)),
    "__eq__": elementwise.eq,
    "__ne__": elementwise.ne,
    "__lt__": elementwise.lt,
    "__le__": elementwise.le,
    "__gt__": elementwise.gt,
    "__ge__": elementwise.ge,
    "__getitem__": indexing.getitem,
    "__setitem__": indexing.setitem,
    "T": property(lambda a: shape.permute(a, *reversed(range(a.ndim)))),
    "mT": property(lambda a: shape.transpose(a, -1, -2)),
    "to": elementwise.cast,
    "float": lambda a: elementwise.cast(a, np.float32),
    "double": lambda a: elementwise.cast(a, np.float64),
    "long": lambda a: elementwise.cast(a, np.int64),
    "view": shape.reshape,
}


def attach() -> None:
    for module, names in _METHODS.items():
        for name in names.split():
            setattr(Tensor, name, getattr(module, name))
    for name, function in _OPERATORS.items():
        setattr(Tensor, name, function)

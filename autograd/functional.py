"""The functions of torch.nn.functional, under its names: activations, norms, attention, convolution, losses.

Holds nothing of its own; the files it imports from do.
"""

from autograd.activations import gelu, leaky_relu, relu, sigmoid, silu, softplus
from autograd.attention import scaled_dot_product_attention
from autograd.conv import avg_pool2d, conv2d, max_pool2d
from autograd.elementwise import tanh
from autograd.indexing import embedding
from autograd.linalg import linear
from autograd.losses import binary_cross_entropy_with_logits, cross_entropy, mse_loss, nll_loss, one_hot
from autograd.norms import layer_norm, rms_norm
from autograd.random import dropout
from autograd.reduce import log_softmax, softmax
from autograd.shape import pad

__all__ = [
    "avg_pool2d",
    "binary_cross_entropy_with_logits",
    "conv2d",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "nll_loss",
    "one_hot",
    "pad",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]

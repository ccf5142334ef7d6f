"""The kernels: public functions, their refusals, and every op for the conformance tests and benchmarks."""

from jaxext.kernels import _attention_cudnn as _attention_cudnn
from jaxext.kernels import _cross_entropy_cuda as _cross_entropy_cuda
from jaxext.kernels import _indexed_rows_cuda as _indexed_rows_cuda
from jaxext.kernels import _norm_cuda as _norm_cuda
from jaxext.kernels._arg_reduce import ARG_REDUCE
from jaxext.kernels._attention import ATTENTION, attention, attention_op, attention_refusal
from jaxext.kernels._convolution import CONVOLUTION, CONVOLUTION_GRADIENT
from jaxext.kernels._cross_entropy import OPS as _CROSS_ENTROPY
from jaxext.kernels._cross_entropy import softmax_cross_entropy, softmax_cross_entropy_refusal
from jaxext.kernels._cumulative import CUMULATIVE
from jaxext.kernels._depthwise import DEPTHWISE, DEPTHWISE_GRADIENT
from jaxext.kernels._distinct_rows import DISTINCT
from jaxext.kernels._dot import DOT
from jaxext.kernels._export import export
from jaxext.kernels._group_norm import GROUP_NORM, group_norm, group_norm_refusal
from jaxext.kernels._indexed_rows import GATHER, SCATTER
from jaxext.kernels._linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_refusal
from jaxext.kernels._linear_recurrence import LINEAR_RECURRENCE
from jaxext.kernels._max_pool import MAX_POOL, MAX_POOL_GRADIENT
from jaxext.kernels._native_module import load_cuda
from jaxext.kernels._norm import OPS as _NORMS
from jaxext.kernels._norm import layer_norm, layer_norm_refusal, rms_norm, rms_norm_refusal
from jaxext.kernels._op import Op, native_status
from jaxext.kernels._product import OPS as _PRODUCTS
from jaxext.kernels._random_bits import RANDOM_BITS
from jaxext.kernels._searchsorted import SEARCHSORTED
from jaxext.kernels._sort import SORT
from jaxext.kernels._top_k import TOP_K

__all__ = [
    "OPS",
    "attention",
    "attention_op",
    "attention_refusal",
    "export",
    "group_norm",
    "group_norm_refusal",
    "layer_norm",
    "layer_norm_refusal",
    "linear_cross_entropy",
    "linear_cross_entropy_refusal",
    "rms_norm",
    "rms_norm_refusal",
    "softmax_cross_entropy",
    "softmax_cross_entropy_refusal",
]

_PRIMITIVES = (DOT, TOP_K, SORT, SEARCHSORTED, ARG_REDUCE, CUMULATIVE, RANDOM_BITS)
_WINDOWS = (CONVOLUTION, CONVOLUTION_GRADIENT, DEPTHWISE, DEPTHWISE_GRADIENT, MAX_POOL, MAX_POOL_GRADIENT)
_ROWS = (LINEAR_RECURRENCE, GATHER, SCATTER, DISTINCT)
OPS: tuple[Op, ...] = (ATTENTION, *_NORMS, GROUP_NORM, *_CROSS_ENTROPY, *_PRODUCTS, *_PRIMITIVES, *_WINDOWS, *_ROWS)

# A program that was exported or compiled elsewhere calls the kernels without tracing any of these functions.
native_status()
load_cuda()

"""What the ops on rows of a block are measured against: plain PyTorch, eager and by torch.compile.

Shapes are those of the blocks of the models (attention_shapes.py): rows of C channels behind the attention of a place,
hidden rows of 4*C, and in front of a pooling block rows of its input. 16-bit tables are a step under autocast: norms
have fp32 parameters, the residual stream is fp32 in stage 1, and what is normed is written in 16 bits.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import hiera_kernels
from benchmarks import attention_shapes
from benchmarks.attention import compiled
from benchmarks.attention_shapes import AttentionShape
from benchmarks.trial import OURS, Case, Trial

EPS = 1e-6
DROP_PATH = 0.1
HIDDEN = 4  # channels of the MLP for each of C
_PLACES = ("stage1", "stage3", "stage2", "stage4")
_FIRST = ("stage2.first", "stage3.first", "stage4.first")
# (model, batch), most important first.
_CUDA = (("hiera_base_224", 128), ("hiera_large_224", 64), ("mae_hiera_base_16x224", 16))


def _candidates(ours: Callable, plain: Callable, compile_too: bool) -> dict[str, Callable]:
    return {OURS: ours, "eager": plain} | ({"compiled": compiled(plain)} if compile_too else {})


def _rows(shape: AttentionShape, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(batch, shape.N // shape.P, width, device=device).to(dtype).requires_grad_()


def _weight(*sizes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return (torch.randn(*sizes, device=device) / math.sqrt(sizes[-1])).to(dtype).requires_grad_()


def q_pool_trial(shape: AttentionShape, batch: int, dtype: torch.dtype, compile_too: bool, device) -> Trial:
    """Max-pooling of rows over the leading stride."""

    def make():
        return (torch.randn(batch, shape.N, shape.C, device=device).to(dtype).requires_grad_(),)

    def plain(x):
        return x.unflatten(1, (shape.P, -1)).max(dim=1).values

    def oracle(x):
        return torch.stack(x.chunk(shape.P, dim=1)).max(dim=0).values

    full, pooled = (batch * n * shape.C * dtype.itemsize for n in (shape.N, shape.N // shape.P))
    candidates = _candidates(lambda x: hiera_kernels.q_pool(x, shape.P), plain, compile_too)
    moved = {"forward": full + pooled, "backward": 2 * full + pooled}
    return Trial(make, candidates, oracle, moved, exact=True, per_sample=True)


def add_layer_norm_trial(shape: AttentionShape, batch: int, dtype: torch.dtype, compile_too: bool, device) -> Trial:
    """Residual add with drop path, and LayerNorm of the sum."""
    stream = torch.float32 if shape.place.startswith("stage1") else dtype
    keep = (torch.arange(batch, device=device) % round(1 / DROP_PATH) != 1).float() / (1 - DROP_PATH)

    def make():
        x, branch = (_rows(shape, batch, shape.C, kind, device) for kind in (stream, dtype))
        weight, bias = (torch.randn(shape.C, device=device).requires_grad_() for _ in range(2))
        return x, branch, weight, bias

    def ours(x, branch, weight, bias):
        return hiera_kernels.add_layer_norm(x, branch, weight, bias, EPS, drop_scale=keep, normed_dtype=dtype)

    def plain(x, branch, weight, bias):
        x = x + branch * keep[:, None, None].to(branch.dtype)
        return x, F.layer_norm(x.float(), weight.shape, weight, bias, EPS).to(dtype)

    def oracle(x, branch, weight, bias):
        x = x + branch * keep.double()[:, None, None]
        apart = x - x.mean(-1, keepdim=True)
        normed = apart * ((apart * apart).mean(-1, keepdim=True) + EPS) ** -0.5
        return x, normed * weight + bias

    n = batch * shape.N // shape.P * shape.C
    wide, narrow = n * stream.itemsize, n * dtype.itemsize
    # Backward: the sum and both gradients in, the gradients of x and branch out.
    moved = {"forward": 2 * wide + 2 * narrow, "backward": 3 * wide + 2 * narrow}
    return Trial(make, _candidates(ours, plain, compile_too), oracle, moved)


def gelu_trial(shape: AttentionShape, batch: int, dtype: torch.dtype, compile_too: bool, device) -> Trial:
    """GELU of the hidden rows of the MLP."""

    def make():
        return (_rows(shape, batch, HIDDEN * shape.C, dtype, device),)

    def oracle(x):
        return x * (1 + torch.special.erf(x / math.sqrt(2))) / 2

    size = batch * shape.N // shape.P * HIDDEN * shape.C * dtype.itemsize
    candidates = _candidates(hiera_kernels.gelu, F.gelu, compile_too)
    return Trial(make, candidates, oracle, {"forward": 2 * size, "backward": 3 * size}, per_sample=True)


def mlp_trial(shape: AttentionShape, batch: int, dtype: torch.dtype, compile_too: bool, device) -> Trial:
    """The whole MLP; the bytes are those of its two products, with the hidden rows written once and read once."""
    C, M = shape.C, HIDDEN * shape.C

    def make():
        weights = (_weight(*sizes, dtype=dtype, device=device) for sizes in ((M, C), (M,), (C, M), (C,)))
        return (_rows(shape, batch, C, dtype, device), *weights)

    def plain(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    def oracle(x, w1, b1, w2, b2):
        hidden = torch.einsum("bnc,mc->bnm", x, w1) + b1
        return torch.einsum("bnm,cm->bnc", hidden * (1 + torch.special.erf(hidden / math.sqrt(2))) / 2, w2) + b2

    rows = batch * shape.N // shape.P * dtype.itemsize
    weights = 2 * C * M * dtype.itemsize
    moved = {"forward": rows * (2 * C + 2 * M) + weights, "backward": rows * (3 * C + 2 * M) + 2 * weights}
    return Trial(make, _candidates(hiera_kernels.mlp, plain, compile_too), oracle, moved)


def linear_q_pool_trial(shape: AttentionShape, batch: int, dtype: torch.dtype, compile_too: bool, device) -> Trial:
    """The shortcut of a pooling block: projection, then the maximum over the stride."""
    C_in, C, P = shape.C_in, shape.C, shape.P

    def make():
        x = torch.randn(batch, shape.N, C_in, device=device).to(dtype).requires_grad_()
        return x, *(_weight(*sizes, dtype=dtype, device=device) for sizes in ((C, C_in), (C,)))

    def whole(*sizes):
        return torch.randint(-1, 2, sizes, device=device).to(dtype).requires_grad_()

    def probe():
        # Products and sums of small whole numbers are exact in every dtype: which of P is largest is then no matter of
        # rounding, and many are equal.
        return whole(batch, shape.N, C_in), whole(C, C_in), whole(C)

    def plain(x, weight, bias):
        return F.linear(x, weight, bias).unflatten(1, (P, -1)).max(dim=1).values

    def oracle(x, weight, bias):
        product = torch.einsum("bnc,dc->bnd", x, weight) + bias
        return torch.stack(product.chunk(P, dim=1)).max(dim=0).values

    full, pooled = batch * shape.N * C_in, batch * shape.N // P * C
    moved = {
        "forward": (full + pooled + C * C_in) * dtype.itemsize,
        "backward": (2 * full + pooled + 2 * C * C_in) * dtype.itemsize + pooled,
    }
    candidates = _candidates(lambda x, w, b: hiera_kernels.linear_q_pool(x, w, b, P), plain, compile_too)

    def probe_grad(like):
        return torch.randint_like(like, -1, 2)

    return Trial(make, candidates, oracle, moved, probe=probe, probe_grad=probe_grad)


TRIALS = {
    "add_layer_norm": (add_layer_norm_trial, _PLACES),
    "gelu": (gelu_trial, _PLACES),
    "mlp": (mlp_trial, _PLACES),
    "q_pool": (q_pool_trial, _FIRST),
    "linear_q_pool": (linear_q_pool_trial, _FIRST),
}


def cases(op: str, device: torch.device, options) -> list[Case]:
    """The tables of an op on rows."""
    trial, places = TRIALS[op]
    if options.shape:
        wanted = [(options.shape, 8)]
    elif device.type == "cuda":
        wanted = [(f"{model}.{place}", batch) for model, batch in _CUDA for place in places if _has(model, place, op)]
    else:
        wanted = [(f"hiera_base_224.{place}", 4) for place in places[:2]]
    found = []
    for name, batch in wanted[: 1 if options.quick else None]:
        shape = attention_shapes.named(name)
        if places is _FIRST and shape.P == 1:
            raise ValueError(f"{op} needs a shape that pools, such as hiera_base_224.stage2.first; got {name}")
        for dtype in options.dtypes or ([torch.bfloat16] if device.type == "cuda" else [torch.float32]):
            note = "fp32 stream" if op == "add_layer_norm" and "stage1" in name and dtype is not torch.float32 else ""
            build = functools.partial(trial, shape, options.batch or batch, dtype, options.compile)
            found.append(Case(op, name, options.batch or batch, dtype, build, note))
    return found


def _has(model: str, place: str, op: str) -> bool:
    shapes = {shape.place: shape for shape in attention_shapes.of_model(model)}
    return place in shapes and (TRIALS[op][1] is not _FIRST or shapes[place].P > 1)


OPS = dict.fromkeys(TRIALS, cases)

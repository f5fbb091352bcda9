"""What `mask_unit_attention` and `window_attention` are measured against.

stock            as upstream calls it: 5-D q, k, v, which no fused backend takes, so that SDPA computes by its math path
                 (SAM 2: windows partitioned, padded, permuted, and put together again around 4-D SDPA)
folded           windows folded into the batch: 4-D SDPA, the backend is PyTorch's choice
folded_flash, folded_efficient, folded_cudnn, folded_math     the same with the backend forced
flex             FlexAttention, compiled, on the folded windows
compiled_stock, compiled_folded      torch.compile of the two

The oracle multiplies, exponentiates and sums in fp64, and shares no code with any of them.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import attention_shapes, window_shapes
from benchmarks.attention_shapes import AttentionShape
from benchmarks.trial import OURS, Case, Trial
from benchmarks.window_shapes import WindowShape
from hiera_kernels import mask_unit_attention, window_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# (shape, batch), most important first: what a training step of Hiera-B spends its time in, then other widths and
# lengths. Any other shape can be named on the command line.
CUDA = tuple(
    (f"{model}.{place}", batch)
    for model, batch, places in (
        (
            "hiera_base_224",
            128,
            ("stage1", "stage2.first", "stage2", "stage3.first", "stage3", "stage4.first", "stage4"),
        ),
        ("mae_hiera_base_224", 256, ("stage1", "stage3", "decoder")),
        ("hiera_large_224", 64, ("stage1", "stage2.first", "stage2", "stage3.first", "stage3")),
        ("hiera_base_plus_224", 64, ("stage1", "stage2.first", "stage2", "stage3.first", "stage3")),
        ("mae_hiera_base_16x224", 16, ("stage1", "stage3", "decoder")),
    )
    for place in places
)
CPU = (("hiera_base_224.stage1", 4), ("hiera_base_224.stage3", 8), ("hiera_base_224.stage2.first", 4))
CUDA_WINDOWS = tuple(
    (f"{model}_1024.{place}", 8)
    for model, places in (
        ("sam2_b+", ("stage3", "stage1", "stage2.first", "stage2", "stage3.first", "stage4.first", "stage4")),
        ("sam2_l", ("stage3", "stage1")),
        ("sam2_t", ("stage3", "stage1")),
    )
    for place in places
)
CPU_WINDOWS = (("sam2_b+_1024.stage3", 1),)


def forced(backend: str, function: Callable) -> Callable:
    """`function` with one backend of scaled_dot_product_attention, or an error that says why it does not run."""

    def call(*args):
        with sdpa_kernel(BACKENDS[backend]):
            return function(*args)

    return call


def compiled(function: Callable) -> Callable:
    """`function` by torch.compile, for static shapes; its backward may be called again on the same forward."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


@functools.cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)


def _rivals(stock: Callable, folded: Callable, device: torch.device, compile_too: bool) -> dict[str, Callable]:
    """`folded` takes the attention that it calls as its last argument."""
    found = {"stock": stock, "folded": lambda *args: folded(*args, F.scaled_dot_product_attention)}
    if device.type == "cuda":
        found |= {f"folded_{name}": forced(name, found["folded"]) for name in BACKENDS}
    if compile_too:
        found["flex"] = lambda *args: folded(*args, _flex())
        found["compiled_stock"] = compiled(stock)
        found["compiled_folded"] = compiled(found["folded"])
    return found


# ---- mask_unit_attention ----


def _stock(qkv: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    x = qkv.reshape(qkv.shape[0], shape.K, shape.W, 3, shape.H, shape.D)
    q, k, v = x.permute(3, 0, 4, 2, 1, 5)
    if shape.P > 1:
        q = q.unflatten(3, (shape.P, shape.S)).max(dim=3).values
    x = F.scaled_dot_product_attention(q, k, v)
    return x.transpose(1, 3).reshape(qkv.shape[0], shape.S * shape.W, shape.C)


def _folded(qkv: torch.Tensor, shape: AttentionShape, attend: Callable) -> torch.Tensor:
    x = qkv.reshape(qkv.shape[0], shape.K, shape.W, 3, shape.H, shape.D)
    q, k, v = (t.flatten(0, 1) for t in x.permute(3, 0, 2, 4, 1, 5))
    if shape.P > 1:
        q = q.unflatten(2, (shape.P, shape.S)).max(dim=2).values
    x = attend(q, k, v).unflatten(0, (qkv.shape[0], shape.W))
    return x.permute(0, 3, 1, 2, 4).reshape(qkv.shape[0], shape.S * shape.W, shape.C)


def oracle(qkv: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    """From the definition: token n belongs to window n % W; heads one after another."""
    n = torch.arange(shape.N, device=qkv.device)
    tokens = torch.stack([n[n % shape.W == w] for w in range(shape.W)])  # [W, K], in the order of their numbers
    outs = []
    for h in range(shape.H):
        first = [(part * shape.H + h) * shape.D for part in range(3)]
        q, k, v = (qkv[:, tokens, start : start + shape.D] for start in first)  # [B, W, K, D]
        q = torch.stack(q.split(shape.S, dim=2)).max(dim=0).values  # [B, W, S, D]
        logits = torch.einsum("bwsd,bwkd->bwsk", q, k) / shape.D**0.5
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        outs.append(torch.einsum("bwsk,bwkd->bswd", weights / weights.sum(-1, keepdim=True), v))
    return torch.cat(outs, dim=-1).flatten(1, 2)


def unit_trial(shape: AttentionShape, batch: int, dtype: torch.dtype, compile_too: bool, device: torch.device) -> Trial:
    """`mask_unit_attention` at a shape, against all its rivals on this device."""

    def make():
        return (torch.randn(batch, shape.N, 3 * shape.C, device=device).to(dtype).requires_grad_(),)

    candidates = {OURS: lambda qkv: mask_unit_attention(qkv, **shape.call())}
    candidates |= _rivals(
        lambda qkv: _stock(qkv, shape), lambda qkv, attend: _folded(qkv, shape, attend), device, compile_too
    )
    moved = {name: shape.bytes(batch, dtype.itemsize, name == "backward") for name in ("forward", "backward")}
    return Trial(make, candidates, lambda qkv: oracle(qkv, shape), moved, per_sample=True)


# ---- window_attention ----


def _partitioned(qkv: torch.Tensor, pad: torch.Tensor, shape: WindowShape, attend: Callable) -> torch.Tensor:
    """As SAM 2 has it: complete the windows, one batch entry for each, attend, put them together, crop."""
    batch, window, pool = qkv.shape[0], shape.window or shape.Hs, shape.pool
    rows, cols = -(-shape.Hs // window), -(-shape.Ws // window)
    x = qkv
    if (rows * window, cols * window) != (shape.Hs, shape.Ws):
        x = pad.expand(batch, rows * window, cols * window, 3 * shape.C).clone()
        x[:, : shape.Hs, : shape.Ws] = qkv
    x = x.unflatten(2, (cols, window)).unflatten(1, (rows, window)).transpose(2, 3)
    x = x.reshape(batch * rows * cols, window, window, 3, shape.C)
    q, k, v = x.unbind(3)
    if pool > 1:
        q = F.max_pool2d(q.permute(0, 3, 1, 2), pool).permute(0, 2, 3, 1)
    q, k, v = (t.flatten(1, 2).unflatten(2, (shape.H, shape.D)).transpose(1, 2) for t in (q, k, v))
    side = window // pool
    x = attend(q, k, v).transpose(1, 2).reshape(batch, rows, cols, side, side, shape.C).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, : shape.Hs // pool, : shape.Ws // pool].contiguous()


def window_oracle(qkv: torch.Tensor, pad: torch.Tensor, shape: WindowShape) -> torch.Tensor:
    """From the definition, window by window: the tokens of a window are listed one by one, padding among them."""
    window, pool = shape.window or shape.Hs, shape.pool
    rows = []
    for top in range(0, shape.Hs, window):
        row = []
        for left in range(0, shape.Ws, window):
            there = qkv[:, top : top + window, left : left + window]
            height, width = there.shape[1:3]
            missing = pad.expand(qkv.shape[0], window * window - height * width, pad.shape[0])
            keys = torch.cat([there.flatten(1, 2), missing], 1).unflatten(2, (3, shape.H, shape.D))
            corners = [there[:, i::pool, j::pool, : shape.C] for i in range(pool) for j in range(pool)]
            q = torch.stack(corners).max(dim=0).values
            logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2).unflatten(2, (shape.H, shape.D)), keys[:, :, 1])
            weights = (logits / shape.D**0.5).softmax(-1)
            out = torch.einsum("bhqk,bkhd->bqhd", weights, keys[:, :, 2])
            row.append(out.reshape(q.shape))
        rows.append(torch.cat(row, dim=2))
    return torch.cat(rows, dim=1)


def window_trial(shape: WindowShape, batch: int, dtype: torch.dtype, compile_too: bool, device: torch.device) -> Trial:
    """`window_attention` at a shape, against all its rivals on this device."""
    stride = shape.pool if shape.pool > 1 else None
    pad = torch.randn(3 * shape.C, device=device).to(dtype)

    def make():
        return (torch.randn(batch, shape.Hs, shape.Ws, 3 * shape.C, device=device).to(dtype).requires_grad_(),)

    candidates = {OURS: lambda qkv: window_attention(qkv, shape.H, shape.window, stride, pad)}
    candidates |= _rivals(
        lambda qkv: _partitioned(qkv, pad, shape, F.scaled_dot_product_attention),
        lambda qkv, attend: _partitioned(qkv, pad, shape, attend),
        device,
        compile_too,
    )
    # SAM 2 folds its windows itself: stock and folded are one.
    for twin in ("folded", "compiled_folded"):
        candidates.pop(twin, None)
    moved = {name: shape.bytes(batch, dtype.itemsize, name == "backward") for name in ("forward", "backward")}
    return Trial(make, candidates, lambda qkv: window_oracle(qkv, pad.double(), shape), moved, per_sample=True)


# ---- the tables ----


def _cases(op: str, named: Callable, trial: Callable, chosen: dict, device: torch.device, options) -> list[Case]:
    wanted = (
        [(options.shape, options.batch or 8)] if options.shape else chosen[device.type][: 1 if options.quick else None]
    )
    cases = []
    for name, batch in wanted:
        shape, batch = named(name), options.batch or batch
        for dtype in options.dtypes or ([torch.bfloat16] if device.type == "cuda" else [torch.float32]):
            build = functools.partial(trial, shape, batch, dtype, options.compile)
            cases.append(Case(op, name, batch, dtype, build))
    return cases


def unit_cases(op: str, device: torch.device, options) -> list[Case]:
    """The tables of `mask_unit_attention`."""
    return _cases(op, attention_shapes.named, unit_trial, {"cuda": CUDA, "cpu": CPU}, device, options)


def window_cases(op: str, device: torch.device, options) -> list[Case]:
    """The tables of `window_attention`."""
    chosen = {"cuda": CUDA_WINDOWS, "cpu": CPU_WINDOWS}
    return _cases(op, window_shapes.named, window_trial, chosen, device, options)


OPS = {"mask_unit_attention": unit_cases, "window_attention": window_cases}

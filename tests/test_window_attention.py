"""The specification of window_attention: against the NumPy oracle, against SAM 2's own block, and gradcheck.

Broken on purpose, each alone, and which test went red:
- the crop from the other corner, tokens padded at the left: the oracle, SAM 2's block
- a pad row that is detached: the oracle, gradcheck, the bias of SAM 2's block and of a wrapped layer
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hiera_kernels import reference, window_attention
from tests import window_oracle as oracle
from tests.upstream import load

# B, Hs, Ws, window, q_stride, H, D
CASES = [
    (2, 8, 12, 4, None, 2, 4),
    (2, 6, 10, 4, 2, 2, 4),
    (1, 14, 8, 8, 2, 1, 3),
    (1, 9, 16, 7, None, 2, 4),
    (1, 16, 15, 14, None, 1, 2),
    (1, 20, 16, 16, 4, 1, 2),
    (1, 5, 9, (3, 4), None, 2, 5),
    (1, 4, 2, (4, 8), (2, 1), 1, 4),
    (2, 6, 6, (6, 4), (3, 2), 3, 2),
    (1, 3, 2, 7, None, 2, 4),
    (2, 4, 6, None, 2, 2, 4),
    (1, 5, 3, 0, None, 2, 4),
    (1, 3, 7, (0, 0), None, 1, 4),
    (3, 1, 1, 1, None, 1, 1),
    (1, 1, 5, 4, None, 1, 2),
    (0, 5, 6, 4, None, 2, 4),
]


def draw(case, dtype=torch.float64, seed=0):
    """qkv, pad, grad_out. Queries of halves: of every few groups of four, some tie."""
    B, Hs, Ws, _, stride, H, D = case
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, Hs, Ws, 3 * H * D, generator=generator, dtype=torch.float64)
    qkv[..., : H * D] = (qkv[..., : H * D] * 2).round() / 2
    pool = (stride, stride) if isinstance(stride, int) else stride or (1, 1)
    grad = torch.randn(B, Hs // pool[0], Ws // pool[1], H * D, generator=generator, dtype=torch.float64)
    return qkv.to(dtype), torch.randn(3 * H * D, generator=generator, dtype=torch.float64).to(dtype), grad.to(dtype)


def close(got, want, tolerance=1e-12):
    want = torch.as_tensor(want)
    assert got.shape == want.shape
    assert got.isnan().equal(want.isnan())
    infinite = want.isinf()
    assert got.double()[infinite].equal(want[infinite])
    apart = (got.double() - want)[want.isfinite()].abs()
    assert apart.numel() == 0 or apart.max() <= tolerance * want[want.isfinite()].abs().max()


def compare(case, qkv, pad, grad, scale=None, tolerance=1e-12, function=reference.window_attention):
    _, _, _, window, stride, H, _ = case
    leaves = [t.detach().requires_grad_() for t in ((qkv,) if pad is None else (qkv, pad))]
    out = function(leaves[0], H, window, stride, leaves[1] if len(leaves) == 2 else None, scale)
    got = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    want = oracle.window_attention(
        qkv.detach().double().numpy(),
        H,
        window,
        stride,
        None if pad is None else pad.detach().double().numpy(),
        scale,
        grad.double().numpy(),
    )
    assert out.is_contiguous()
    close(out.detach(), want[0], tolerance)
    close(got[0], want[1], tolerance)
    if pad is not None:
        if got[1] is None:  # no window overhangs
            assert not want[2].any()
        else:
            close(got[1], want[2], tolerance)
            queries = pad.shape[0] // 3
            assert not got[1][:queries].any(), "the query of a padded token has no output"


@pytest.mark.parametrize("with_pad", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_equal_the_oracle(case, with_pad):
    qkv, pad, grad = draw(case)
    compare(case, qkv, pad if with_pad else None, grad)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(400))
def test_any_map_any_window(seed):
    rng = np.random.default_rng(seed)
    pool = tuple(int(n) for n in rng.integers(1, 4, 2))
    window = tuple(int(n) * p for n, p in zip(rng.integers(1, 5, 2), pool, strict=True))
    Hs, Ws = (int(n) * p for n, p in zip(rng.integers(1, 7, 2), pool, strict=True))
    case = (int(rng.integers(1, 3)), Hs, Ws, window, pool, int(rng.integers(1, 4)), int(rng.integers(1, 5)))
    compare(case, *draw(case, seed=seed))


def test_scale():
    case = CASES[1]
    compare(case, *draw(case), scale=0.7)


def test_zeros_are_the_pad_row_where_none_is_given():
    qkv, pad, _ = draw(CASES[3])
    got = reference.window_attention(qkv, 2, 7)
    assert got.equal(reference.window_attention(qkv, 2, 7, pad=torch.zeros_like(pad)))
    assert not got.equal(reference.window_attention(qkv, 2, 7, pad=pad))


LAYOUTS = {
    "channels strided": lambda t: torch.cat([t, -t], -1)[..., : t.shape[-1]],
    "lines strided": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "channels first": lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "lines and columns turned": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded batch": lambda t: t[:1].expand_as(t),
    "expanded columns": lambda t: t[:, :, :1].expand_as(t),
    "odd storage offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[10]], ids=str)
def test_any_layout(layout, case):
    qkv, pad, grad = draw(case)
    turn = LAYOUTS[layout]
    compare(case, turn(qkv), torch.stack([pad, pad], 1)[:, 0], turn(grad))
    compare(case, turn(qkv), pad[:1].expand_as(pad), turn(grad))


SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "large": 1e4}


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("part", ["q", "k", "v", "pad's q", "pad's k", "pad's v"])
def test_special_values_go_where_the_oracle_sends_them(part, value):
    """In the last token of the first window, or in the pad row: its q is nowhere seen."""
    case = (1, 7, 6, 4, None, 2, 4)
    qkv, pad, grad = draw(case)
    column = "qkv".index(part[-1]) * 8 + 1
    if not part.startswith("pad"):
        qkv[0, 3, 3, column] = SPECIAL[value]
        compare(case, qkv, pad, grad, tolerance=1e-10)
        return
    # The output alone: plain operations also compute the queries of padded tokens, and their gradient of zero, times a
    # weight of NaN, is NaN. The kernels do not (test_kernel_window_attention.py).
    pad[column] = SPECIAL[value]
    out = reference.window_attention(qkv, 2, 4, pad=pad)
    close(out, oracle.window_attention(qkv.numpy(), 2, 4, pad=pad.numpy()), 1e-10)
    assert out.isfinite().all() == (part == "pad's q" or value == "large")


def test_a_pooled_nan_gets_its_gradient_alone():
    case = (1, 4, 4, 4, 2, 1, 4)
    qkv, pad, grad = draw(case)
    qkv[0, 1, 0, 2] = float("nan")
    compare(case, qkv, pad, grad)


@pytest.mark.parametrize(
    "case", [(1, 3, 2, 2, None, 1, 2), (1, 2, 6, 4, 2, 1, 1), (1, 4, 2, None, (2, 1), 1, 2)], ids=str
)
def test_gradcheck(case):
    _, Hs, Ws, window, stride, H, D = case
    qkv = torch.randn(1, Hs, Ws, 3 * H * D, dtype=torch.float64, requires_grad=True)
    pad = torch.randn(3 * H * D, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t, p: reference.window_attention(t, H, window, stride, p), (qkv, pad))
    with sdpa_kernel(SDPBackend.MATH):  # CPU's fused SDPA has no second and no forward-mode derivative
        torch.autograd.gradgradcheck(lambda t, p: reference.window_attention(t, H, window, stride, p), (qkv, pad))


def test_the_oracle_agrees_with_its_own_finite_differences():
    rng = np.random.default_rng(0)
    qkv, direction = rng.normal(size=(2, 2, 6, 10, 3 * 2 * 3))
    pad, pad_direction = rng.normal(size=(2, 18))
    grad_out = rng.normal(size=(2, 3, 5, 6))
    ahead, behind = (
        oracle.window_attention(qkv + step * direction, 2, 4, 2, pad + step * pad_direction) for step in (1e-6, -1e-6)
    )
    expected = (grad_out * (ahead - behind)).sum() / 2e-6
    _, grad_qkv, grad_pad = oracle.window_attention(qkv, 2, 4, 2, pad, None, grad_out)
    got = (grad_qkv * direction).sum() + (grad_pad * pad_direction).sum()
    assert abs(got - expected) < 1e-7 * max(1, abs(expected))


# ---- SAM 2's own block ----


def sam2_block(dim, dim_out, heads, stride, window):
    block = load("sam2.modeling.backbones.hieradet").MultiScaleBlock(
        dim, dim_out, heads, mlp_ratio=1.0, q_stride=stride, window_size=window
    )
    for parameter in block.parameters():  # a bias of zeros would hide what the pad row is
        nn.init.normal_(parameter, std=0.4)
    return block.double()


def by_parts(block, x):
    """The block's forward with window_attention in place of partition, pad, attention, unpartition and crop."""
    attn, stride = block.attn, block.q_stride
    normed = block.norm1(x)
    shortcut = x
    if block.dim != block.dim_out:
        shortcut = block.proj(normed)
        if block.pool is not None:
            shortcut = block.pool(shortcut.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    pad = attn.qkv(x.new_zeros(block.dim))
    out = window_attention(attn.qkv(normed), attn.num_heads, block.window_size, stride, pad)
    x = shortcut + attn.proj(out)
    return x + block.mlp(block.norm2(x))


# Hs, Ws, window, pooled: whole and overhanging, sides smaller than the window, global.
SAM2_SIZES = [
    (8, 16, 8, False),
    (16, 8, 8, True),
    (12, 10, 8, True),
    (9, 11, 4, False),
    (6, 14, 4, True),
    (18, 15, 14, False),
    (16, 20, 14, True),
    (5, 9, 14, False),
    (2, 6, 14, True),
    (9, 8, 7, False),
    (7, 3, 7, False),
    (17, 6, 16, False),
    (10, 7, 0, False),
]


@pytest.mark.parametrize(("Hs", "Ws", "window", "pooled"), SAM2_SIZES)
def test_sam2_block(Hs, Ws, window, pooled):
    """Output, the gradient of the input and of every parameter, in fp64."""
    block = sam2_block(6, 12, 2, (2, 2), window) if pooled else sam2_block(12, 12, 3, None, window)
    x = torch.randn(2, Hs, Ws, block.dim, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    results = []
    for forward in (block, lambda x: by_parts(block, x)):
        out = forward(x)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for stock, ours in zip(*results, strict=True):
        close(ours, stock, 1e-11)


def test_the_gradient_reaches_the_bias_of_a_wrapped_layer():
    """A low-rank adapter around the qkv layer: what it makes of zeros is the bias, by whatever way."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(6, 2, bias=False), nn.Linear(2, 36)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    block = sam2_block(6, 12, 2, None, 4)
    block.attn.qkv = Adapted(block.attn.qkv).double()
    x = torch.randn(1, 5, 6, 6, dtype=torch.float64)
    names = ["attn.qkv.base.bias", "attn.qkv.up.bias", "attn.qkv.base.weight", "attn.qkv.down.weight"]
    parameters = [block.get_parameter(name) for name in names]
    stock = torch.autograd.grad(block(x).square().sum(), parameters)
    ours = torch.autograd.grad(by_parts(block, x).square().sum(), parameters)
    for name, a, b in zip(names, ours, stock, strict=True):
        assert b.any(), name
        close(a, b, 1e-11)


def test_ties_go_where_max_pooling_sends_them():
    """Queries of three values: every group has several maxima, and MaxPool2d takes the first in row-major order."""
    qkv = torch.randn(2, 8, 8, 24, dtype=torch.float64)
    qkv[..., :8] = qkv[..., :8].sign()
    qkv.requires_grad_()
    out = reference.window_attention(qkv, 2, 8, 2)
    q, k, v = qkv.chunk(3, -1)
    q = F.max_pool2d(q.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    q, k, v = (t.flatten(1, 2).unflatten(2, (2, 4)).transpose(1, 2) for t in (q, k, v))
    stock = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, 4, 8)
    grad = torch.randn_like(out)
    close(out.detach(), stock.detach())
    close(torch.autograd.grad(out, qkv, grad)[0], torch.autograd.grad(stock, qkv, grad)[0])

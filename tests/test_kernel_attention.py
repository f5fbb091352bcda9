"""The Triton kernels of mask-unit attention, interpreted, against the fp64 oracle: outputs and every gradient.

What was broken on purpose, each alone, and which test went red:
- the image index forgets W; the keys of a window taken as contiguous; only the first block of queries; padded keys in
  the softmax; dk not scaled; the gradient's image stride K instead of S; copies or padding counted as queries: all by
  test_forward_and_gradients, the first and the last by its shapes with B = 2 and S < 16 alone
- the last maximum instead of the first, "first" giving to all ties: test_forward_and_gradients, test_gradient_of_ties
- NaN losing in the maximum, copies of an inf gradient not cleared, "split" stopping a NaN, padded queries left in P or
  in dS of the long kernel: only by test_inf_and_nan_go_where_pytorch_sends_them_and_nowhere_else
- the other one of the two row statistics, the last block of queries left out, partial sums that overwrite each other
  or start undefined: test_forward_and_gradients with K > 64
- padded queries stored, 8 columns too many: test_every_element_is_written_and_nothing_outside_is_touched (before it
  existed, pytest crashed)
"""

import numpy as np
import pytest
import torch

import hiera_kernels
from tests import attention_oracle as oracle
from tests.interpreter import kernels_on_cpu, marks

pytestmark = marks

# S, P, W, H, D, B. Every (S, K) of the published models, and rows and widths that no model has.
SHAPES = [
    (64, 1, 3, 1, 96, 1),
    (64, 1, 2, 2, 72, 1),
    (16, 4, 2, 2, 56, 1),
    (16, 4, 3, 1, 96, 1),
    (16, 1, 5, 2, 96, 1),
    (16, 1, 3, 3, 72, 2),
    (4, 4, 3, 2, 64, 2),
    (4, 4, 1, 3, 32, 1),
    (49, 1, 1, 2, 128, 1),
    (49, 4, 1, 2, 32, 1),
    (196, 1, 1, 1, 32, 1),
    (76, 1, 1, 2, 72, 1),
    (256, 1, 1, 1, 64, 1),
    # odd
    (1, 1, 3, 2, 8, 2),
    (2, 1, 1, 1, 16, 1),
    (7, 1, 3, 2, 24, 1),
    (5, 3, 3, 1, 40, 1),
    (3, 5, 2, 2, 8, 1),
    (20, 1, 2, 2, 48, 1),
    (12, 4, 3, 1, 104, 1),
    (40, 1, 2, 1, 88, 1),
    (65, 1, 2, 1, 24, 1),
    (25, 9, 1, 1, 56, 1),
    (9, 8, 2, 1, 16, 1),
    (100, 2, 1, 1, 32, 1),
]
IDS = [f"S{S}K{P * S}W{W}H{H}D{D}B{B}" for S, P, W, H, D, B in SHAPES]
# Of max |expected|. In 16 bits the weights and the logits' gradients are rounded once more before they are multiplied.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1.5e-3}


def draw(shape, dtype=torch.float32, seed=0):
    """qkv and grad_out. Thirds of normal numbers: of every few groups of four, some tie."""
    S, P, W, H, D, B = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, P * S * W, 3 * H * D, generator=generator)
    qkv[..., : H * D] = (qkv[..., : H * D] * 3).round() / 4
    return qkv.to(dtype), torch.randn(B, S * W, H * D, generator=generator).to(dtype)


def launch(qkv, grad, shape, scale=None, ties="first", bias_grad=False):
    """out, lse, grad_qkv, grad_bias straight from the launch functions."""
    from hiera_kernels.kernels.attention import mask_unit_attention_forward
    from hiera_kernels.kernels.attention_backward import mask_unit_attention_backward
    from hiera_kernels.kernels.limits import attention_limit

    _, P, W, H, _, _ = shape
    assert attention_limit(qkv, H, W, P) is None
    out, lse = mask_unit_attention_forward(qkv, H, W, P, scale, save_lse=True)
    return out, lse, *mask_unit_attention_backward(grad, qkv, H, W, P, scale, ties, bias_grad)


def expected(qkv, grad, shape, scale=None, ties="first"):
    _, P, W, H, _, _ = shape
    qkv, grad = qkv.double().numpy(), grad.double().numpy()
    out, lse = oracle.attention(qkv, H, W, P, scale)
    return out, lse, oracle.attention_backward(grad, qkv, H, W, P, scale, ties)


def assert_close(got, want, tolerance):
    got = got.double().numpy()
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    infinite = np.isinf(want)
    np.testing.assert_array_equal(got[infinite], want[infinite])
    finite = np.isfinite(want)
    if finite.any():
        assert np.abs(got[finite] - want[finite]).max() <= tolerance * np.abs(want[finite]).max()


# First in the file: the kernel that writes elsewhere is named before it has corrupted the process.
@pytest.mark.parametrize(
    "shape",
    [(4, 4, 3, 1, 24, 1), (7, 1, 3, 3, 8, 1), (12, 4, 2, 1, 40, 2), (49, 1, 1, 2, 72, 1), (65, 1, 2, 1, 8, 1)],
    ids=str,
)
def test_every_element_is_written_and_nothing_outside_is_touched(shape):
    """Outputs start as a number that no result is, inputs lie between NaN: neither padding nor tail reads or writes."""
    from hiera_kernels.kernels.attention import plan_forward
    from hiera_kernels.kernels.attention_backward import partial_sums, plan_backward

    _, P, W, H, _, _ = shape
    qkv, grad = draw(shape)
    want = expected(qkv, grad, shape)

    def fenced(like, fill, fence):
        memory = torch.full((like.numel() + 2 * 4096,), fence)
        inside = memory[4096:-4096].view(like.shape)
        inside.copy_(like) if fill is None else inside.fill_(fill)
        return inside, memory

    qkv, _ = fenced(qkv, None, float("nan"))
    grad, _ = fenced(grad, None, float("nan"))
    outputs = [fenced(torch.from_numpy(like), -777.0, 555.0) for like in want]
    (out, _), (lse, _), (grad_qkv, _) = outputs
    partial = partial_sums(qkv, H, W, P, (0, 0))
    args = (H, W, P, None)
    launches = plan_forward(qkv, out, lse, *args, (0, 0))
    launches += plan_backward(grad, qkv, grad_qkv, partial, *args, "first", (0, 0))
    for each in launches:
        each.run()
    for (got, memory), like in zip(outputs, want, strict=True):
        assert_close(got, like, TOLERANCE[torch.float32])
        assert bool((memory[:4096] == 555).all())
        assert bool((memory[-4096:] == 555).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_forward_and_gradients(shape, dtype):
    qkv, grad = draw(shape, dtype)
    ties = ("first", "split")[SHAPES.index(shape) % 2]
    out, lse, grad_qkv, grad_bias = launch(qkv, grad, shape, ties=ties, bias_grad=True)
    want_out, want_lse, want_grad = expected(qkv, grad, shape, ties=ties)
    assert out.dtype == grad_qkv.dtype == dtype
    assert lse.dtype == grad_bias.dtype == torch.float32
    assert out.is_contiguous()
    assert grad_qkv.is_contiguous()
    assert_close(out, want_out, TOLERANCE[dtype])
    assert_close(lse, want_lse, 1e-6)
    for part in range(3):  # q, k and v apart: the largest gradient must not hide the others
        columns = slice(part * want_out.shape[2], (part + 1) * want_out.shape[2])
        assert_close(grad_qkv[..., columns], want_grad[..., columns], TOLERANCE[dtype])
    # The sum over keys of dk is zero on paper: its scale is that of the terms, not that of the sum.
    assert (
        np.abs(grad_bias.double().numpy() - want_grad.sum((0, 1))).max()
        <= TOLERANCE[dtype] * np.abs(want_grad).sum((0, 1)).max()
    )


@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize(
    "shape", [(16, 4, 1, 1, 24, 1), (4, 4, 2, 2, 8, 1), (5, 3, 1, 1, 16, 1), (49, 4, 1, 1, 16, 1)], ids=str
)
def test_gradient_of_ties(shape, ties):
    """Queries of few values: two thirds of the groups have several maxima."""
    qkv, grad = draw(shape)
    queries = qkv[..., : shape[3] * shape[4]]
    queries.copy_(queries.clamp(-0.5, 0.25))
    _, _, grad_qkv, _ = launch(qkv, grad, shape, ties=ties)
    want = expected(qkv, grad, shape, ties=ties)[2]
    assert_close(grad_qkv, want, TOLERANCE[torch.float32])
    other = expected(qkv, grad, shape, ties="split" if ties == "first" else "first")[2]
    assert np.abs(other - want).max() > 0.05 * np.abs(want).max()  # the two modes differ here


POISON = {
    "nan in q": (0, float("nan")),
    "nan in k": (1, float("nan")),
    "nan in v": (2, float("nan")),
    "inf in q": (0, float("inf")),
    "-inf in k": (1, float("-inf")),
    "inf in v": (2, float("inf")),
    "nan in grad": (3, float("nan")),
    "inf in grad": (3, float("inf")),
}


@pytest.mark.parametrize("what", POISON)
@pytest.mark.parametrize(
    "shape", [(16, 1, 2, 2, 24, 1), (4, 4, 2, 2, 8, 1), (5, 3, 3, 1, 16, 1), (12, 4, 2, 1, 8, 1), (65, 1, 2, 1, 8, 1)],
    ids=str,
)  # fmt: skip
def test_inf_and_nan_go_where_pytorch_sends_them_and_nowhere_else(shape, what):
    """One poisoned number, in the first window's last token: its unit has the oracle's pattern, no other is harmed."""
    S, P, W, H, D, _ = shape
    ties = "split" if what.endswith("q") else "first"
    qkv, grad = draw(shape)
    clean = launch(qkv, grad, shape, ties=ties)
    part, value = POISON[what]
    last = (P * S - 1) * W
    if part == 3:
        grad[0, (S - 1) * W, 0] = value
    else:
        qkv[0, last, part * H * D + 1] = value
        if what == "-inf in k":  # times a positive query: the key has weight 0, and its dk is finite
            qkv[0, ::W, 1] = qkv[0, ::W, 1].abs() + 0.25
    got = launch(qkv, grad, shape, ties=ties)
    for tensor, want in zip(got[:3], expected(qkv, grad, shape, ties=ties), strict=True):
        assert_close(tensor, want, TOLERANCE[torch.float32])
    other = [n for n in range(S * P * W) if n % W != 0]
    assert torch.equal(got[2][:, other], clean[2][:, other])
    assert torch.equal(
        got[0][:, [n for n in range(S * W) if n % W != 0]], clean[0][:, [n for n in range(S * W) if n % W]]
    )


@pytest.mark.parametrize("shape", [(16, 1, 2, 1, 16, 1), (16, 4, 1, 1, 16, 1), (76, 1, 1, 1, 8, 1)], ids=str)
def test_large_logits(shape):
    """Whole numbers, so that logits of 1e4 are exact in fp32: what remains is the softmax."""
    qkv, grad = draw(shape)
    width = shape[3] * shape[4]
    qkv[..., : 2 * width] = (qkv[..., : 2 * width] * 16).round()
    got = launch(qkv, grad, shape, scale=1.0)
    want = expected(qkv, grad, shape, scale=1.0)
    assert np.abs(want[1]).max() > 1e3
    assert_close(got[0], want[0], 2e-6)
    assert_close(got[1], want[1], 2e-6)
    # q and k are 20 times the gradients that their sums cancel to; plain PyTorch in fp32 is 3e-5 off here.
    assert_close(got[2], want[2], 2e-5)
    out, lse, _, _ = launch(qkv * 8, grad, shape, scale=0.25)
    want = expected(qkv * 8, grad, shape, scale=0.25)
    assert np.abs(want[1]).max() > 1e4
    assert_close(out, want[0], 2e-6)
    assert_close(lse, want[1], 1e-6)


def test_values_at_the_end_of_the_range_of_fp16():
    """Nothing finite becomes inf or NaN where PyTorch, which computes in fp32 inside, stays finite."""
    shape = (16, 4, 1, 2, 32, 1)
    qkv, grad = draw(shape, torch.float16)
    qkv[..., 128:] = qkv[..., 128:].sign() * 6e4  # v
    qkv[..., :64] *= 200  # q
    qkv[..., 64:128] *= 50  # k
    grad = grad * 1e-3
    got, want = launch(qkv, grad, shape), expected(qkv, grad, shape)
    for tensor, reference in zip(got[:3], want, strict=True):
        assert bool(tensor.isfinite().all())
        assert_close(tensor, reference, 3e-3)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale):
    shape = (5, 3, 2, 1, 16, 1)
    qkv, grad = draw(shape)
    for tensor, want in zip(launch(qkv, grad, shape, scale)[:3], expected(qkv, grad, shape, scale), strict=True):
        assert_close(tensor, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", [(4, 4, 3, 2, 8, 2), (12, 4, 1, 1, 8, 2), (65, 1, 1, 1, 8, 2)], ids=str)
def test_any_strides(shape):
    """Slices, expanded batches and transposed memory give what their copies give."""
    S, P, W, H, D, B = shape
    qkv, grad = draw(shape)
    want = launch(qkv, grad, shape)
    wide = torch.full((B, P * S * W, 3 * H * D + 3), 7.0)
    wide[..., 1:-2] = qkv
    sliced = wide[..., 1:-2]
    turned = grad.transpose(0, 2).contiguous().transpose(0, 2)
    for x, g in ((sliced, turned), (qkv.transpose(1, 2).contiguous().transpose(1, 2), grad)):
        assert not x.is_contiguous()
        for a, b in zip(launch(x, g, shape), want, strict=True):
            assert torch.equal(a, b)
    one, one_grad = qkv[:1].expand(B, -1, -1), grad[:1, :1].expand(B, S * W, -1)
    copies = launch(one.contiguous(), one_grad.contiguous(), shape)
    for a, b in zip(launch(one, one_grad, shape), copies, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(16, 4, 3, 2, 24, 0), (76, 1, 1, 2, 24, 0), (16, 1, 3, 1, 8, 0)], ids=str)
def test_empty_batch(shape):
    qkv, grad = draw(shape)
    out, lse, grad_qkv, grad_bias = launch(qkv, grad, shape, bias_grad=True)
    assert out.shape == grad.shape
    assert lse.shape == (0, shape[2], shape[3], shape[0])
    assert grad_qkv.shape == qkv.shape
    assert torch.equal(grad_bias, torch.zeros(qkv.shape[2]))


def test_repeats_are_bit_identical():
    shape = (49, 4, 1, 1, 24, 1)
    qkv, grad = draw(shape)
    first = launch(qkv, grad, shape, bias_grad=True)
    for tensor, again in zip(first, launch(qkv, grad, shape, bias_grad=True), strict=True):
        assert torch.equal(tensor, again)


def test_wide_offsets_are_those_of_narrow_ones(monkeypatch):
    """A single image of 2^31 elements and more takes 64-bit offsets inside a window too: the same numbers."""
    from hiera_kernels.kernels import attention, attention_backward

    narrow = attention.sizes

    def wide(*args):
        arguments, constexprs = narrow(*args)
        assert constexprs["WIDE"] is False
        return arguments, {**constexprs, "WIDE": True}

    for shape in ((4, 4, 3, 2, 24, 1), (12, 4, 2, 1, 8, 1), (65, 1, 2, 1, 8, 1)):
        qkv, grad = draw(shape)
        want = launch(qkv, grad, shape)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "sizes", wide)
            patch.setattr(attention_backward, "sizes", wide)
            for a, b in zip(launch(qkv, grad, shape), want, strict=True):
                assert torch.equal(a, b)
    huge = torch.empty(1, device="meta").expand(1, 2**20, 2 * 3 * 512)
    assert narrow(huge, 8, 2**14, 1, None)[1]["WIDE"] is True


# ---- through the dispatcher ----


@pytest.mark.parametrize("ties", ["first", "split"])
def test_the_public_function_and_its_gradient_run_the_kernels(ties):
    shape = (4, 4, 3, 2, 24, 1)
    _, P, W, H, _, _ = shape
    qkv, grad = draw(shape)
    with kernels_on_cpu() as calls:
        x = qkv.clone().requires_grad_()
        out = hiera_kernels.mask_unit_attention(x, H, W, P, ties=ties)
        out.backward(grad)
    assert calls == ["mask_unit_attention", "mask_unit_attention_backward"]
    want_out, _, want_grad = expected(qkv, grad, shape, ties=ties)
    assert_close(out.detach(), want_out, TOLERANCE[torch.float32])
    assert_close(x.grad, want_grad, TOLERANCE[torch.float32])


def test_the_bias_gradient_rides_along():
    shape = (5, 3, 2, 2, 16, 2)
    _, P, W, H, D, _ = shape
    qkv, grad = draw(shape)
    bias = torch.zeros(3 * H * D, requires_grad=True)
    x = qkv.clone().requires_grad_()
    with kernels_on_cpu():
        out, _ = torch.ops.hiera_kernels.mask_unit_attention(x, H, W, P, bias=bias, save_lse=True)
        out.backward(grad)
    want = expected(qkv, grad, shape)[2]
    assert_close(x.grad, want, TOLERANCE[torch.float32])
    assert np.abs(bias.grad.double().numpy() - want.sum((0, 1))).max() <= 4e-6 * np.abs(want).sum((0, 1)).max()


@pytest.mark.parametrize(
    ("qkv", "heads", "windows", "stride"),
    [
        (torch.randn(1, 6, 3 * 2 * 8, dtype=torch.float64), 2, 3, 1),
        (torch.randn(1, 6, 3 * 2 * 12), 2, 3, 2),
        (torch.randn(1, 6, 3 * 136), 1, 3, 2),
        (torch.randn(1, 257, 3 * 8), 1, 1, 1),
        (torch.randn(1, 34, 3 * 8), 1, 1, 17),
    ],
    ids=["fp64", "D=12", "D=136", "K=257", "P=17"],
)
def test_what_no_kernel_serves_goes_to_the_reference(qkv, heads, windows, stride):
    from hiera_kernels.kernels.limits import attention_limit

    assert attention_limit(qkv, heads, windows, stride) is not None
    x = qkv.clone().requires_grad_()
    with kernels_on_cpu():
        out, _ = torch.ops.hiera_kernels.mask_unit_attention(x, heads, windows, stride)
        grad = torch.randn_like(out)
        out.backward(grad)
    want, _ = oracle.attention(qkv.double().numpy(), heads, windows, stride)
    assert_close(out.detach(), want, TOLERANCE[torch.float32])
    want = oracle.attention_backward(grad.double().numpy(), qkv.double().numpy(), heads, windows, stride)
    assert_close(x.grad, want, TOLERANCE[torch.float32])

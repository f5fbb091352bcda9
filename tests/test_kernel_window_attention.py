"""The Triton kernels of window_attention, interpreted, against the fp64 oracle: outputs and every gradient.

What was broken on purpose, each alone, and which test went red:
- the sums of the bottom line of windows in the place of others; lines of the pooled map as long as those of the map;
  windows counted without the overhanging column (pytest crashes after the first): all of the first two tests
- blocks of padded keys that overwrite each other's sums, padding beyond K in them; the pad row's k left out or taken
  for its v; the last maximum, or the first token, in place of the first maximum: test_forward_and_gradients
- padding beyond K filled with the pad row, queries off the map left in P and dS, NaN losing in the maximum: only by
  test_inf_and_nan_go_where_the_definition_sends_them_and_nowhere_else
- whole windows that store sums too: only by tests/test_kernel_window_traffic.py, which looks for races
"""

import numpy as np
import pytest
import torch

import hiera_kernels
from tests import window_oracle as oracle
from tests.interpreter import kernels_on_cpu, marks

pytestmark = marks

# B, Hs, Ws, window, q_stride, H, D. Every (window, stride) of the published SAM 2 trunks, and shapes that none has.
SHAPES = [
    (1, 8, 16, 8, None, 1, 96),
    (1, 9, 8, 8, None, 2, 56),
    (1, 16, 8, 8, 2, 2, 72),
    (1, 8, 10, 8, 2, 1, 96),
    (2, 8, 12, 4, None, 2, 24),
    (1, 6, 9, 4, None, 3, 72),
    (1, 8, 8, 4, 2, 1, 96),
    (2, 6, 10, 4, 2, 2, 56),
    (1, 7, 14, 7, None, 1, 72),
    (1, 8, 9, 7, None, 2, 56),
    (1, 14, 14, 14, None, 1, 32),
    (1, 16, 13, 14, None, 1, 16),
    (1, 16, 14, 14, 2, 1, 24),
    (1, 16, 16, 16, None, 1, 16),
    (1, 10, 18, 16, 2, 1, 8),
    # odd
    (1, 1, 1, 1, None, 2, 8),
    (3, 1, 2, (1, 3), None, 1, 16),
    (2, 5, 9, (3, 4), None, 2, 8),
    (1, 6, 8, (6, 4), (3, 2), 1, 16),
    (1, 4, 2, (4, 8), (2, 1), 3, 40),
    (1, 3, 2, 7, None, 2, 8),
    (1, 6, 10, 14, 2, 1, 16),
    (1, 3, 20, (5, 7), None, 1, 104),
    (2, 4, 6, None, 2, 2, 16),
    (1, 9, 8, 0, None, 1, 24),
    (1, 6, 28, (6, 12), (3, 4), 1, 8),
]
# Of max |expected|. In 16 bits the weights and the logits' gradients are rounded once more before they are multiplied.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1.5e-3}


def two(value):
    """As the op takes a window or a stride: two ints or none."""
    if value in (None, 0):
        return ()
    return (value, value) if isinstance(value, int) else value


def draw(shape, dtype=torch.float32, seed=0):
    """qkv, pad and grad_out. Queries of quarters: of every few groups of four, some tie."""
    B, Hs, Ws, _, stride, H, D = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, Hs, Ws, 3 * H * D, generator=generator)
    qkv[..., : H * D] = (qkv[..., : H * D] * 3).round() / 4
    pool_h, pool_w = two(stride) or (1, 1)
    pad = torch.randn(3 * H * D, generator=generator)
    grad = torch.randn(B, Hs // pool_h, Ws // pool_w, H * D, generator=generator)
    return qkv.to(dtype), pad.to(dtype), grad.to(dtype)


def launch(qkv, pad, grad, shape, scale=None):
    """out, grad_qkv, grad_pad straight from the launch functions."""
    from hiera_kernels.kernels.window_limits import window_limit
    from hiera_kernels.kernels.windows import window_attention_forward
    from hiera_kernels.kernels.windows_backward import window_attention_backward

    _, _, _, window, stride, H, _ = shape
    args = (H, two(window), two(stride))
    assert window_limit(qkv, *args) is None
    out = window_attention_forward(qkv, *args, pad, scale)
    return out, *window_attention_backward(grad, qkv, *args, pad, scale)


def expected(qkv, pad, grad, shape, scale=None):
    _, _, _, window, stride, H, _ = shape
    qkv, pad, grad = (None if t is None else t.double().numpy() for t in (qkv, pad, grad))
    return oracle.window_attention(qkv, H, window, stride, pad, scale, grad)


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
    [(1, 6, 9, 4, None, 1, 24), (2, 6, 10, 4, 2, 2, 8), (1, 10, 12, 8, 2, 1, 40), (1, 8, 5, 7, None, 2, 8),
     (1, 9, 10, (9, 8), None, 1, 8), (1, 10, 4, 10, (2, 1), 1, 8)],
    ids=str,
)  # fmt: skip
def test_every_element_is_written_and_nothing_outside_is_touched(shape):
    """Outputs start as a number that no result is, inputs lie between NaN: neither padding nor tail reads or writes."""
    from hiera_kernels.kernels.windows import plan_forward
    from hiera_kernels.kernels.windows_backward import partial_sums, plan_backward

    _, _, _, window, stride, H, _ = shape
    tensors = draw(shape)
    want = expected(*tensors, shape)

    def fenced(like, fill, fence):
        memory = torch.full((like.numel() + 2 * 4096,), fence)
        inside = memory[4096:-4096].view(like.shape)
        inside.copy_(like) if fill is None else inside.fill_(fill)
        return inside, memory

    (qkv, _), (pad, _), (grad, _) = (fenced(t, None, float("nan")) for t in tensors)
    args = (H, two(window), two(stride), pad)
    partial = partial_sums(qkv, *args, (0, 0))
    outputs = [fenced(t, -777.0, 555.0) for t in (torch.from_numpy(want[0]), torch.from_numpy(want[1]), partial)]
    (out, _), (grad_qkv, _), (partial, _) = outputs
    launches = plan_forward(qkv, out, *args[:3], pad, None, (0, 0))
    launches += plan_backward(grad, qkv, grad_qkv, partial, *args[:3], pad, None, (0, 0))
    for each in launches:
        each.run()
    assert_close(out, want[0], TOLERANCE[torch.float32])
    assert_close(grad_qkv, want[1], TOLERANCE[torch.float32])
    if partial.numel() > 0:
        assert not (partial == -777.0).any()
        summed = torch.cat([torch.zeros(want[2].shape[0] // 3), partial.sum((0, 1))])
        assert_close(summed, want[2], TOLERANCE[torch.float32])
    for _, memory in outputs:
        assert bool((memory[:4096] == 555).all())
        assert bool((memory[-4096:] == 555).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype):
    qkv, pad, grad = draw(shape, dtype)
    out, grad_qkv, grad_pad = launch(qkv, pad, grad, shape)
    want_out, want_qkv, want_pad = expected(qkv, pad, grad, shape)
    assert out.dtype == grad_qkv.dtype == dtype
    assert grad_pad.dtype == torch.float32
    assert out.is_contiguous()
    assert grad_qkv.is_contiguous()
    assert_close(out, want_out, TOLERANCE[dtype])
    for part in range(3):  # q, k and v apart: the largest gradient must not hide the others
        columns = slice(part * want_out.shape[3], (part + 1) * want_out.shape[3])
        assert_close(grad_qkv[..., columns], want_qkv[..., columns], TOLERANCE[dtype])
        assert_close(grad_pad[columns], want_pad[columns], TOLERANCE[dtype])


@pytest.mark.parametrize(
    "shape",
    [(1, 6, 9, 4, None, 1, 8), (2, 6, 10, 4, 2, 2, 8), (1, 8, 9, 7, None, 1, 8), (1, 10, 9, 9, None, 1, 8)],
    ids=str,
)
def test_without_a_pad_row_it_is_zeros(shape):
    qkv, _, grad = draw(shape)
    out, grad_qkv, grad_pad = launch(qkv, None, grad, shape, scale=0.3)
    want_out, want_qkv, _ = expected(qkv, None, grad, shape, scale=0.3)
    assert_close(out, want_out, TOLERANCE[torch.float32])
    assert_close(grad_qkv, want_qkv, TOLERANCE[torch.float32])
    assert grad_pad.shape == (0,)


@pytest.mark.parametrize(
    "shape", [(1, 8, 8, 8, 2, 1, 24), (1, 6, 8, 4, 2, 2, 8), (1, 6, 4, (6, 4), (3, 2), 1, 8), (1, 10, 8, 10, 2, 1, 8)],
    ids=str,
)  # fmt: skip
def test_ties_go_to_the_first_in_row_major_order(shape):
    """Queries of few values: two thirds of the groups have several maxima."""
    qkv, pad, grad = draw(shape)
    queries = qkv[..., : shape[5] * shape[6]]
    queries.copy_(queries.clamp(-0.5, 0.25))
    _, grad_qkv, _ = launch(qkv, pad, grad, shape)
    want = expected(qkv, pad, grad, shape)[1]
    assert_close(grad_qkv, want, TOLERANCE[torch.float32])
    # Among the rest of a group, and read from the other end, ties would fall elsewhere.
    turned = expected(qkv.flip(1, 2), pad, grad.flip(1, 2), shape)[1][:, ::-1, ::-1] if shape[1] == shape[2] else None
    assert turned is None or np.abs(turned - want).max() > 0.05 * np.abs(want).max()


POISON = {
    "nan in q": (0, float("nan")),
    "nan in k": (1, float("nan")),
    "nan in v": (2, float("nan")),
    "inf in q": (0, float("inf")),
    "-inf in k": (1, float("-inf")),
    "inf in v": (2, float("inf")),
    "nan in grad": (3, float("nan")),
    "inf in grad": (3, float("inf")),
    "nan in pad's q": (4, float("nan")),
    "nan in pad's k": (5, float("nan")),
    "-inf in pad's k": (5, float("-inf")),
    "inf in pad's v": (6, float("inf")),
}


@pytest.mark.parametrize("what", POISON)
@pytest.mark.parametrize(
    "shape",
    [(1, 6, 5, 4, None, 2, 8), (1, 6, 6, 4, 2, 1, 8), (1, 6, 6, (6, 7), None, 1, 8), (1, 5, 14, (8, 16), (1, 2), 1, 8)],
    ids=str,
)  # fmt: skip
def test_inf_and_nan_go_where_the_definition_sends_them_and_nowhere_else(shape, what):
    """One poisoned number, in the map's last token or in the pad row: the oracle's pattern, window by window."""
    H, D = shape[5:]
    qkv, pad, grad = draw(shape)
    part, value = POISON[what]
    if part == 3:
        grad[0, -1, -1, 0] = value
    elif part > 3:
        pad[(part - 4) * H * D + 1] = value
    else:
        qkv[0, -1, -1, part * H * D + 1] = value
    if what.startswith("-inf"):  # times a positive query: the key has weight 0, and its dk is finite
        qkv[..., 1] = qkv[..., 1].abs() + 0.25
    got = launch(qkv, pad, grad, shape)
    for tensor, want in zip(got, expected(qkv, pad, grad, shape), strict=True):
        assert_close(tensor, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "shape", [(1, 6, 5, 4, None, 1, 16), (1, 8, 10, 8, 2, 1, 16), (1, 10, 9, 10, None, 1, 8)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_logits_of_ten_thousand(shape, dtype):
    """exp would overflow by far without the subtraction of the row's maximum; in fp16 a sum of squares passes 65504."""
    qkv, pad, grad = draw(shape, dtype)
    channels = shape[5] * shape[6]
    qkv[..., 0], qkv[..., channels], pad[channels] = 1e2, 1e2, 1e2  # every logit alike: nothing changes but the scale
    got = launch(qkv, pad, grad, shape, scale=1.0)
    want = expected(qkv, pad, grad, shape, scale=1.0)
    # A logit of 1e4 has steps of 1e-3 in fp32.
    for tensor, truth in zip(got, want, strict=True):
        assert_close(tensor, truth, 2e-2)
    qkv[..., :channels] *= 1e3 if dtype is torch.float32 else 30  # and here they differ: one key takes all
    out, grad_qkv, _ = launch(qkv, pad, grad, shape, scale=1.0)
    assert grad_qkv.isfinite().all()
    assert_close(out, expected(qkv, pad, grad, shape, scale=1.0)[0], 5e-2)


@pytest.mark.parametrize(
    "shape", [(2, 6, 9, 4, None, 2, 8), (1, 8, 10, 8, 2, 1, 8), (1, 10, 8, 10, None, 1, 8)], ids=str
)
def test_any_strides(shape):
    """Slices, expanded batches and transposed memory give what their copies give."""
    B, Hs, Ws, _, _, H, D = shape
    qkv, pad, grad = draw(shape)
    want = launch(qkv, pad, grad, shape)
    wide = torch.full((B, Hs, Ws, 3 * H * D + 3), 7.0)
    wide[..., 1:-2] = qkv
    sliced = wide[..., 1:-2]
    turned = grad.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    spread = torch.stack([pad, -pad], 1)[:, 0]
    for x, p, g in ((sliced, spread, turned), (qkv.transpose(1, 2).contiguous().transpose(1, 2), pad, grad)):
        assert not x.is_contiguous()
        for a, b in zip(launch(x, p, g, shape), want, strict=True):
            assert torch.equal(a, b)
    one, one_grad = qkv[:1, :1].expand_as(qkv), grad[:1, :, :1].expand_as(grad)
    copies = launch(one.contiguous(), pad[:1].expand_as(pad).contiguous(), one_grad.contiguous(), shape)
    for a, b in zip(launch(one, pad[:1].expand_as(pad), one_grad, shape), copies, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 6, 9, 4, None, 2, 8), (0, 16, 10, 14, 2, 1, 8)], ids=str)
def test_empty_batch(shape):
    qkv, pad, grad = draw(shape)
    out, grad_qkv, grad_pad = launch(qkv, pad, grad, shape)
    assert out.shape == grad.shape
    assert grad_qkv.shape == qkv.shape
    assert torch.equal(grad_pad, torch.zeros_like(pad))


def test_repeats_are_bit_identical():
    shape = (2, 10, 9, 10, None, 1, 8)
    tensors = draw(shape)
    first = launch(*tensors, shape)
    for tensor, again in zip(first, launch(*tensors, shape), strict=True):
        assert torch.equal(tensor, again)


def test_wide_offsets_are_those_of_narrow_ones(monkeypatch):
    """A single map of 2^31 elements and more takes 64-bit offsets inside a window too: the same numbers."""
    from hiera_kernels.kernels import windows, windows_backward

    narrow = windows.sizes

    def wide(*args):
        arguments, constexprs = narrow(*args)
        assert constexprs["WIDE"] is False
        return arguments, {**constexprs, "WIDE": True}

    for shape in ((1, 6, 9, 4, None, 2, 24), (1, 6, 8, 4, 2, 1, 8), (1, 10, 8, 10, 2, 1, 8)):
        tensors = draw(shape)
        want = launch(*tensors, shape)
        with monkeypatch.context() as patch:
            patch.setattr(windows, "sizes", wide)
            patch.setattr(windows_backward, "sizes", wide)
            for a, b in zip(launch(*tensors, shape), want, strict=True):
                assert torch.equal(a, b)
    huge = torch.empty(1, device="meta").expand(1, 2**10, 2**10, 2 * 3 * 512)
    assert narrow(huge, 8, (8, 8), (), None, None)[1]["WIDE"] is True


# ---- through the dispatcher ----


def test_the_public_function_and_its_gradients_run_the_kernels():
    shape = (2, 6, 9, 4, None, 2, 8)
    qkv, pad, grad = draw(shape)
    with kernels_on_cpu() as calls:
        x, row = qkv.clone().requires_grad_(), pad.clone().requires_grad_()
        out = hiera_kernels.window_attention(x, 2, 4, None, row)
        out.backward(grad)
    assert calls == ["window_attention", "window_attention_backward"]
    for got, want in zip((out.detach(), x.grad, row.grad), expected(qkv, pad, grad, shape), strict=True):
        assert_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("qkv", "window", "stride"),
    [
        (torch.randn(1, 3, 2, 3 * 8, dtype=torch.float64), (2, 2), ()),
        (torch.randn(1, 3, 2, 3 * 12), (2, 2), ()),
        (torch.randn(1, 3, 2, 3 * 136), (2, 2), ()),
        (torch.randn(1, 17, 3, 3 * 8), (17, 16), ()),
        (torch.randn(1, 17, 3, 3 * 8), (17, 2), (17, 1)),
    ],
    ids=["fp64", "D=12", "D=136", "K=272", "P=17"],
)
def test_what_no_kernel_serves_goes_to_the_reference(qkv, window, stride):
    from hiera_kernels.kernels.window_limits import window_limit

    assert window_limit(qkv, 1, window, stride) is not None
    x, pad = qkv.clone().requires_grad_(), torch.randn(qkv.shape[3], dtype=qkv.dtype, requires_grad=True)
    with kernels_on_cpu():
        out = torch.ops.hiera_kernels.window_attention(x, 1, window, stride, pad)
        grad = torch.randn_like(out)
        out.backward(grad)
    want = hiera_kernels.reference.window_attention(x, 1, window, stride or None, pad)
    assert out.equal(want)
    want_qkv, want_pad = torch.autograd.grad(want, [x, pad], grad, allow_unused=True)
    assert x.grad.equal(want_qkv)
    want_pad = torch.zeros_like(pad) if want_pad is None else want_pad
    assert torch.allclose(pad.grad, want_pad, rtol=1e-5, atol=1e-6)  # the sum over padded tokens has another order

"""reference.mask_unit_attention and reference.q_pool against the fp64 oracle, upstream's module, and gradcheck."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hiera_kernels import reference
from hiera_kernels.reference.attention import attend, mask_unit_logsumexp
from tests import attention_oracle as oracle
from tests.upstream import ALIAS, load_upstream

HEAD_DIMS = (32, 56, 64, 72, 96, 128, 1, 7, 40)
# (S, K, W): every shape of the published models (images, MAE, video), and odd ones with odd strides and window counts.
SHAPES = [
    (64, 64, 3),
    (16, 64, 5),
    (16, 16, 7),
    (4, 16, 6),
    (196, 196, 1),
    (49, 196, 1),
    (49, 49, 1),
    (76, 76, 1),
    (156, 156, 1),
    (256, 256, 1),
    (3, 9, 5),
    (7, 14, 2),
    (5, 5, 3),
    (1, 4, 1),
    (2, 14, 35),
]


def assert_close(actual: torch.Tensor, expected: np.ndarray, what: str, tolerance: float = 1e-11, floor: float = 0.0):
    """max|a - b| <= tolerance * max(max|b|, floor), NaN and infinities exactly where the oracle has them."""
    actual = actual.detach().double().numpy()
    assert actual.shape == expected.shape, what
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected), err_msg=what)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=what)
    if finite.any():
        worst = np.abs(actual[finite] - expected[finite]).max()
        assert worst <= tolerance * max(np.abs(expected[finite]).max(), floor), f"{what}: off by {worst}"


def compare(qkv, *args, scale=None, ties="first", tolerance=1e-11):
    """Output and gradient of the reference against the oracle, for a random upstream gradient."""
    qkv = qkv.detach().requires_grad_()
    out = reference.mask_unit_attention(qkv, *args, scale=scale, ties=ties)
    assert out.is_contiguous()
    assert out.dtype == qkv.dtype
    grad_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    expected, _ = oracle.attention(qkv.detach(), *args, scale=scale)
    assert_close(out, expected, "output", tolerance)
    expected = oracle.attention_backward(grad_out, qkv.detach(), *args, scale=scale, ties=ties)
    # A saturated softmax leaves gradients of q and k that are rounding of nothing: v's gradient is their floor.
    got, want = grad.chunk(3, dim=-1), np.split(expected, 3, axis=-1)
    floor = np.abs(want[2][np.isfinite(want[2])]).max(initial=0.0)
    for part, name in enumerate("qkv"):
        assert_close(got[part], want[part], f"gradient of {name}", tolerance, floor)


def random_qkv(batch, keys, num_windows, num_heads, head_dim, dtype=torch.float64):
    return torch.randn(batch, keys * num_windows, 3 * num_heads * head_dim, dtype=dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("queries", "keys", "num_windows"), SHAPES)
def test_output_and_gradient_equal_the_oracle(queries, keys, num_windows, head_dim):
    # Broken once each: window as the slowest axis of the fold, P and S swapped in q_pool, heads and queries swapped in
    # the output. Red here, against upstream and in 10 more tests; green only where W = 1 or P = 1 makes both alike.
    num_heads = 1 + HEAD_DIMS.index(head_dim) % 3
    compare(random_qkv(2, keys, num_windows, num_heads, head_dim), num_heads, num_windows, keys // queries)


@pytest.mark.parametrize(("keys", "head_dim"), [(1568, 32), (392, 96)])
def test_long_rows_equal_the_oracle(keys, head_dim):
    compare(random_qkv(1, keys, 1, 1, head_dim), 1)


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.5, 2])
def test_scale_is_honoured(scale):
    compare(random_qkv(2, 8, 3, 2, 16), 2, 3, 4, scale=scale)


def test_fp32_stays_within_fp32_rounding():
    compare(random_qkv(2, 16, 5, 2, 24, torch.float32), 2, 5, 4, tolerance=3e-6)


@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("num_windows", [1, 3])
def test_tied_queries_share_their_gradient_as_the_mode_says(ties, num_windows):
    """Three values only: nearly every group of four has several maxima."""
    qkv = torch.randint(-1, 2, (2, 4 * 5 * num_windows, 3 * 2 * 8)).double()
    groups = qkv[..., :16].reshape(2, 4, -1, 16)
    assert ((groups == groups.amax(1, keepdim=True)).sum(1) > 1).double().mean() > 0.3
    compare(qkv, 2, num_windows, 4, ties=ties)


@pytest.mark.parametrize("ties", ["first", "split"])
def test_nan_goes_where_the_definition_sends_it(ties):
    """One NaN in q, k or v of one window: other windows, and other heads, stay finite."""
    for part in range(3):
        qkv = random_qkv(2, 8, 3, 2, 4)
        qkv[1, 3 * 3 + 1, part * 8 + 5] = float("nan")  # pooled position p*S + s = 3 of window 1, head 1
        compare(qkv, 2, 3, 4, ties=ties)
        out = reference.mask_unit_attention(qkv, 2, 3, 4, ties=ties)
        assert out.isnan().any()
        assert out[0].isfinite().all()
        assert out[1, [0, 2, 3, 5]].isfinite().all()
        assert out[1, :, :4].isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinities_in_values_and_queries(value):
    for part in (0, 2):
        qkv = random_qkv(2, 8, 3, 2, 4)
        qkv[1, 3 * 3 + 1, part * 8 + 5] = value
        compare(qkv, 2, 3, 4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-2)])
def test_logits_of_ten_thousand(dtype, tolerance):
    """exp would overflow by far without the subtraction of the row's maximum."""
    qkv = random_qkv(2, 16, 3, 2, 8, dtype)
    q, k = qkv[..., 0:16:8], qkv[..., 16:32:8]  # the first channel of each head adds 1e4 to every logit alike
    q.fill_(1e4)
    k.fill_(2.8)
    compare(qkv, 2, 3, 4, tolerance=tolerance)
    qkv = random_qkv(2, 16, 3, 2, 8, dtype)
    qkv[..., :16] *= 3e4  # and here they differ by 1e4 and more: one key takes all
    out = reference.mask_unit_attention(qkv, 2, 3, 4)
    assert_close(out, oracle.attention(qkv, 2, 3, 4)[0], "output", 1e-6)


LAYOUTS = {
    "channels strided": lambda t: torch.cat([t, -t], -1)[..., : t.shape[-1]],
    "tokens strided": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch slowest to fastest": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "expanded batch": lambda t: t[:1].expand(3, -1, -1),
    "expanded tokens": lambda t: t[:, :1].expand(-1, t.shape[1], -1),
    "odd storage offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "negated flip": lambda t: -t.flip(1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_windows", [1, 3])
@pytest.mark.parametrize("q_stride", [1, 4])
def test_any_layout_of_qkv_gives_the_right_answer(layout, num_windows, q_stride):
    compare(LAYOUTS[layout](random_qkv(2, 8, num_windows, 2, 5)), 2, num_windows, q_stride)


def test_any_layout_of_the_incoming_gradient_gives_the_right_answer():
    qkv = random_qkv(2, 8, 3, 2, 4).requires_grad_()
    out = reference.mask_unit_attention(qkv, 2, 3, 4)
    for layout in LAYOUTS.values():
        grad_out = layout(torch.randn_like(out))[:1].expand_as(out)
        (grad,) = torch.autograd.grad(out, qkv, grad_out, retain_graph=True)
        assert_close(grad, oracle.attention_backward(grad_out, qkv.detach(), 2, 3, 4), "gradient")


@pytest.mark.parametrize(("num_windows", "q_stride"), [(1, 1), (3, 4)])
def test_empty_batch(num_windows, q_stride):
    qkv = torch.randn(0, 12 * num_windows, 3 * 2 * 8, requires_grad=True)
    out = reference.mask_unit_attention(qkv, 2, num_windows, q_stride)
    assert out.shape == (0, 12 * num_windows // q_stride, 16)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("ties", ["first", "split"])
def test_gradcheck(ties):
    qkv = random_qkv(2, 4, 3, 2, 3).requires_grad_()
    torch.autograd.gradcheck(lambda t: reference.mask_unit_attention(t, 2, 3, 2, None, ties), (qkv,))
    with sdpa_kernel(SDPBackend.MATH):  # CPU's fused SDPA has no second and no forward-mode derivative
        torch.autograd.gradgradcheck(lambda t: reference.mask_unit_attention(t, 2, 3, 2, None, ties), (qkv,))


def test_the_oracle_agrees_with_its_own_finite_differences():
    rng = np.random.default_rng(0)
    qkv, direction = rng.normal(size=(2, 2, 12 * 2, 3 * 2 * 3))
    grad_out = rng.normal(size=(2, 6, 6))
    step = 1e-6 * direction
    ahead, behind = (oracle.attention(qkv + sign * step, 2, 2, 4)[0] for sign in (1, -1))
    expected = (grad_out * (ahead - behind)).sum() / 2e-6
    got = (oracle.attention_backward(grad_out, qkv, 2, 2, 4) * direction).sum()
    assert abs(got - expected) < 1e-7 * max(1, abs(expected))


@pytest.mark.parametrize("head_dim", [8, 7])
@pytest.mark.parametrize(
    ("queries", "keys", "num_windows"), [(64, 64, 3), (16, 64, 5), (4, 16, 3), (49, 196, 1), (9, 9, 1)]
)
def test_upstream_module_gives_the_same_output_and_gradients(queries, keys, num_windows, head_dim):
    heads, stride = 2, keys // queries
    load_upstream()
    cls = sys.modules[f"{ALIAS}.hiera"].MaskUnitAttention
    windowed = num_windows > 1
    module = cls(10, heads * head_dim, heads, stride, queries if windowed else 0, use_mask_unit_attn=windowed).double()
    x = torch.randn(2, keys * num_windows, 10, dtype=torch.float64)
    expected = module(x)
    actual = module.proj(reference.mask_unit_attention(module.qkv(x), heads, num_windows, stride))
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()
    grad_out = torch.randn_like(expected)
    for name, parameter in module.named_parameters():
        (want,) = torch.autograd.grad(expected, parameter, grad_out, retain_graph=True)
        (got,) = torch.autograd.grad(actual, parameter, grad_out, retain_graph=True)
        assert (got - want).abs().max() <= 1e-11 * want.abs().max() + 1e-13, name


def test_logsumexp_equals_the_oracle():
    for heads, windows, stride, scale in ((2, 3, 4, None), (1, 1, 1, 0.7), (3, 5, 2, None)):
        qkv = random_qkv(2, 8, windows, heads, 5)
        _, expected = oracle.attention(qkv, heads, windows, stride, scale)
        assert_close(mask_unit_logsumexp(qkv, heads, windows, stride, scale), expected, "lse")


# ---- the way to SDPA ----


class Attentions(TorchDispatchMode):
    """Notes every attention operation that PyTorch dispatches, with the shape of its q."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in str(func):
            self.seen.append((str(func), tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("num_windows", "q_stride"), [(1, 1), (1, 4), (5, 1), (5, 4)])
def test_sdpa_is_reached_in_four_dimensions_by_its_fused_backend(num_windows, q_stride):
    with Attentions() as mode:
        reference.mask_unit_attention(torch.randn(3, 16 * num_windows, 3 * 2 * 32), 2, num_windows, q_stride)
    assert mode.seen == [
        ("aten._scaled_dot_product_flash_attention_for_cpu.default", (3 * num_windows, 2, 16 // q_stride, 32))
    ]


@pytest.mark.parametrize("max_batch", [1, 3, 5, 7, 8, None])
def test_chunks_change_nothing(max_batch):
    q, k, v = torch.randn(3, 7, 2, 6, 8, dtype=torch.float64)
    with Attentions() as mode:
        out = attend(q, k, v, 0.3, max_batch)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=0.3))
    assert [shape[0] for _, shape in mode.seen] == [len(part) for part in torch.arange(7).split(max_batch or 7)]


class SdpaCalls(TorchFunctionMode):
    """Notes shape and strides of q at every call of F.scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        self.shapes, self.strides = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
            self.strides.append(args[0].stride())
        return func(*args, **(kwargs or {}))


def test_a_cuda_batch_beyond_the_grid_is_split():
    """Fake CUDA tensors: B * W = 65,540 windows need two calls."""
    with FakeTensorMode(), SdpaCalls() as calls:
        qkv = torch.empty(13_108, 5 * 4, 3 * 8, device="cuda", dtype=torch.bfloat16)
        out = reference.mask_unit_attention(qkv, 1, 5)
        assert out.shape == (13_108, 20, 8)
        reference.mask_unit_attention(torch.empty(13_107, 5 * 4, 3 * 8, device="cuda", dtype=torch.bfloat16), 1, 5)
    assert [shape[0] for shape in calls.shapes] == [65_535, 5, 65_535]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_backends_meet_no_stranger_layout_than_that_of_a_linear(layout):
    """CUDA's backends take neither strides of 0 nor unaligned ones; W = 1 is where nothing else would copy."""
    qkv = LAYOUTS[layout](torch.randn(2, 6, 3 * 2 * 8))
    with SdpaCalls() as calls:
        reference.mask_unit_attention(qkv, 2)
    assert calls.strides == [(6 * 48, 8, 48, 1)]


# ---- query pooling ----


@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("shape", [(2, 12, 5), (1, 4, 1), (3, 4 * 49, 96), (0, 8, 3)])
@pytest.mark.parametrize("kind", ["random", "tied", "nan", "inf"])
def test_q_pool_equals_the_oracle(shape, ties, kind):
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "tied":
        x = x.round().clamp(-1, 1)
    elif kind != "random":
        x[..., ::2] = torch.where(torch.rand_like(x[..., ::2]) < 0.2, float(kind), x[..., ::2])
    x.requires_grad_()
    out = reference.q_pool(x, 4, ties)
    assert_close(out, oracle.q_pool(x.detach(), 4), "output", 0.0)
    grad_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, grad_out)
    assert_close(grad, oracle.q_pool_backward(grad_out, x.detach(), 4, ties), "gradient", 1e-15)


def test_q_pool_never_returns_its_input():
    x = torch.randn(2, 6, 3)
    out = reference.q_pool(x, 1)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()


def test_q_pool_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="'frist'"):
        reference.q_pool(torch.randn(1, 4, 2), 2, "frist")

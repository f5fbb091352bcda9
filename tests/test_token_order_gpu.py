"""Token order on a GPU, against counting; the same tests on the CPU keep this file honest where there is no GPU."""

import numpy as np
import pytest
import torch

from hiera_kernels import extension, ops
from tests.test_token_order_embed import choose_units, counted, counted_gradients, inputs
from tests.token_oracle import GRID_IDS, GRIDS, rerolled, unrolled, windows_of

every_grid = pytest.mark.parametrize(("size", "strides"), GRIDS, ids=GRID_IDS)
IMAGE = (16, 24), ((2, 2), (2, 2), (2, 2))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    assert extension.why_not(request.param) is None, "these tests are of the compiled kernels"
    return request.param


@every_grid
@pytest.mark.parametrize("channels", [1, 3, 8, 56, 144])
def test_unroll_and_reroll(device, size, strides, channels):
    n = int(np.prod(size))
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.complex128):
        x = torch.randn(3, n, channels).mul(100).to(dtype)
        bits = x.view(torch.uint8).numpy()
        tokens = ops.unroll(x.to(device), size, strides)
        assert tokens.device.type == device
        assert np.array_equal(tokens.cpu().view(torch.uint8).numpy(), unrolled(bits, size, strides)), dtype
        back = ops.reroll(x.to(device), size, strides)
        assert np.array_equal(back.cpu().view(torch.uint8).numpy(), rerolled(bits, size, strides)), dtype


def test_storage_that_starts_anywhere(device):
    size, strides = IMAGE
    memory = torch.arange(2 * 384 * 12 + 16, dtype=torch.int16)
    for offset in range(16):
        x = memory[offset : offset + 2 * 384 * 12].view(2, 384, 12)
        out = ops.unroll(memory.to(device)[offset : offset + x.numel()].view_as(x), size, strides)
        assert np.array_equal(out.cpu().numpy(), unrolled(x.numpy(), size, strides))


def test_more_windows_than_16_bits_count(device):
    """Batch times windows is 70,000: past what the second and third axes of a CUDA grid hold."""
    x = torch.arange(70_000 * 4, dtype=torch.int32).view(17_500, 16, 1)
    out = ops.unroll(x.to(device), (4, 4), ((2, 2),)).cpu()
    assert np.array_equal(out[[0, 9_999, -1]].numpy(), unrolled(x[[0, 9_999, -1]].numpy(), (4, 4), ((2, 2),)))
    assert ops.reroll(out.to(device), (4, 4), ((2, 2),)).cpu().flatten(1, 2).equal(x)


@pytest.mark.parametrize("units", ["all", "some", "none", "twice"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("patches", "position"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("channels", [5, 96])
def test_embed_tokens(device, units, channels_last, patches, position, channels):
    size, strides = IMAGE
    p, e = inputs(size, channels, 3, patches, position, channels_last)
    keep = choose_units(units, 3, windows_of(size, strides))
    wanted = counted(p, e, size, strides, keep)
    leaf_p, leaf_e = p.to(device).requires_grad_(), e.to(device).requires_grad_()
    keep_there = None if keep is None else keep.to(device)
    out = ops.embed_tokens(leaf_p, leaf_e, size, strides, keep_there)
    assert out.dtype is wanted.dtype
    assert out.cpu().equal(wanted)
    grad = torch.randn(wanted.shape).to(wanted.dtype)
    out.backward(grad.to(device))
    spatial, summed = counted_gradients(grad.double(), size, strides, keep)
    got = leaf_p.grad.flatten(2).transpose(1, 2).cpu().double()
    # Bit for bit where nothing is computed, rounded once to another dtype, summed in fp32 over copies of one unit.
    info = torch.finfo(patches)
    step = info.eps if units == "twice" or patches != wanted.dtype else 0.0
    allowed = step * (spatial.abs() + info.tiny + (8.0 if units == "twice" else 0.0))
    assert ((got - spatial).abs() <= allowed).all()
    sums = leaf_e.grad.cpu().double().reshape_as(summed)
    assert torch.allclose(sums, summed, rtol=4 * torch.finfo(position).eps, atol=8 * torch.finfo(position).eps)


@pytest.mark.parametrize("units", ["all", "some"])
def test_the_backward_gives_the_same_bits_every_time(device, units):
    size, strides = IMAGE
    p, e = inputs(size, 96, 33, torch.bfloat16)
    keep = choose_units(units, 33, windows_of(size, strides))
    found = []
    for _ in range(20):
        leaves = p.to(device).requires_grad_(), e.to(device).requires_grad_()
        out = ops.embed_tokens(*leaves, size, strides, None if keep is None else keep.to(device))
        found.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    assert all(a.equal(b) for again in found[1:] for a, b in zip(again, found[0], strict=True))


@pytest.mark.gpu
def test_current_stream_and_cuda_graph():
    """A capture fails on work that goes to another stream, and a replay shows that nothing was left to the host."""
    size, strides = IMAGE
    x = torch.randn(2, 384, 96, device="cuda")
    wanted = ops.unroll(x, size, strides).clone()
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.unroll(static, size, strides)
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            out = ops.unroll(static, size, strides)
    static.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert out.equal(wanted)

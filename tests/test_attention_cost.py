"""What a call costs in Python: checks, the choice of the way, autograd. The kernel itself does nothing here."""

import time
import timeit

import pytest
import torch
import torch.nn.functional as F

from hiera_kernels import ops


def best_microseconds(function, calls=2000, repeats=15):
    """CPU time of this thread, best of many: what else the machine does stays out of it."""
    function()
    return min(timeit.repeat(function, number=calls, repeat=repeats, timer=time.thread_time)) / calls * 1e6


@pytest.mark.timing
def test_a_forward_with_gradient_costs_few_native_calls(capsys):
    """The goal is 15 us above a native op on the machine that runs the GPU; here, in units of this machine's own speed.

    Measured at 3.1 us for `linear`: 17 us, 14 us above it, 5.5 times as much.
    """
    qkv = torch.randn(2, 48, 48, requires_grad=True)
    out, lse = torch.empty(2, 12, 16), torch.empty(0)
    x, weight = torch.randn(1, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with torch.library._scoped_library("hiera_kernels", "IMPL") as library:
        library.impl("mask_unit_attention", lambda *args: (out.detach(), lse), "CPU")
        fused = best_microseconds(lambda: ops.mask_unit_attention(qkv, 2, 3, 4))
    native = best_microseconds(lambda: F.linear(x, weight))
    with capsys.disabled():
        print(f"\nmask_unit_attention {fused:.1f} us a call, F.linear {native:.1f} us")
    assert fused <= 7 * native

"""Whole models through the Triton kernels, interpreted: accelerated equals stock, and the kernels really ran.

Every op of the package that has a Triton kernel takes part, because `kernels_on_cpu` registers them all; what is
counted here is attention, block by block. Small models of both libraries, image and video, plain and autoencoder.

Broken on purpose: the gradient of k without the scale, no pooling of queries in the forward (both red in the
autoencoder, which pools; the second by 4e-6 of the output, so the bounds have to be as tight as they are), and
`use_mask_unit_attn` ignored by the adapter (the swap's own comparison refuses every block).
"""

import copy

import pytest
import torch

import hiera_kernels
from tests.interpreter import kernels_on_cpu, marks
from tests.swap_cases import build, example, step

pytestmark = marks

# Two stages of mask units, and at least one block that is global and short.
CASES = [
    ("hiera", "image"),
    ("hiera", "video"),
    ("hiera", "MAE image"),
    ("hiera", "MAE video"),
    ("hiera-transformer", "image"),
    ("hiera-transformer", "MAE image"),
]


@pytest.fixture
def launched(monkeypatch):
    """(direction, windows, pool stride, keys) of every launch of an attention kernel, in order."""
    from hiera_kernels.kernels import attention, attention_backward
    from hiera_kernels.kernels.launch_table import Launch

    directions = {attention._forward_kernel: "forward", attention_backward._backward_kernel: "backward"}
    found, run = [], Launch.run

    def noting(launch):
        if launch.kernel in directions:
            windows, P, S = launch.arguments["num_windows"], launch.constexprs["P"], launch.constexprs["S"]
            found.append((directions[launch.kernel], windows, P, P * S))
        run(launch)

    monkeypatch.setattr(Launch, "run", noting)
    return found


def blocks_of(model):
    """(windows, pool stride, keys) of every attention that a forward calls, in order, by the module's own settings."""
    found = []

    def note(module, args):
        tokens = args[0].shape[1]
        windows = tokens // (module.q_stride * module.window_size) if module.use_mask_unit_attn else 1
        found.append((windows, module.q_stride, tokens // windows))

    for module in model.modules():
        if {"qkv", "use_mask_unit_attn"} <= {*vars(module), *module._modules}:
            module.register_forward_pre_hook(note)
    return found


def worst(actual, truth):
    """Largest error of each tensor over its largest value."""
    return {name: ((actual[name].double() - b).abs().max() / b.abs().max()).item() for name, b in truth.items()}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_accelerated_model_equals_stock(name, kind, launched):
    """Outputs, the loss of the autoencoders, the gradients of the input and of every parameter, against fp64."""
    stock = build(name, kind, torch.float64)
    counted = copy.deepcopy(stock)
    blocks = blocks_of(counted)
    truth = step(counted, example(kind))
    fast = copy.deepcopy(stock).float()
    assert not hiera_kernels.accelerate(fast).skipped
    with kernels_on_cpu():
        actual = step(fast, example(kind).float())
    reference = step(copy.deepcopy(stock).float(), example(kind).float())
    assert actual.keys() == truth.keys()
    errors, allowed = worst(actual, truth), worst(reference, truth)
    wrong = {n: (f"{e:.1e}", f"stock {allowed[n]:.1e}") for n, e in errors.items() if not e <= 4 * allowed[n] + 2e-6}
    assert not wrong
    assert {windows > 1 for windows, _, _ in blocks} == {True, False}
    assert [entry[1:] for entry in launched if entry[0] == "forward"] == blocks
    assert [entry[1:] for entry in launched if entry[0] == "backward"] == blocks[::-1]


OPS = torch.ops.hiera_kernels


def samples():
    """Op and arguments: windowed and pooled, global with a bias, the backward of it, pooling."""
    qkv = torch.randn(2, 16, 3 * 16, requires_grad=True)
    bias = torch.randn(48, requires_grad=True)
    yield OPS.mask_unit_attention.default, (qkv, 2, 2, 4)
    yield OPS.mask_unit_attention.default, (qkv, 2, 1, 1, None, "first", bias, True)
    grad = torch.randn(2, 4, 16)
    yield OPS.mask_unit_attention_backward.default, (grad, qkv.detach(), None, None, 2, 2, 4, None, "split", True)
    yield OPS.q_pool.default, (qkv, 4, "split")
    yield OPS.q_pool_backward.default, (torch.randn(2, 4, 48), qkv.detach(), 4)


@pytest.mark.parametrize("sample", range(5))
def test_opcheck_of_the_triton_kernels(sample):
    op, args = list(samples())[sample]
    with kernels_on_cpu() as calls:
        torch.library.opcheck(op, args)
    assert op._schema.name.partition("::")[2] in calls

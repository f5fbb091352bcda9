"""Every family's blocks call the ops, where the ops have kernels: which ones, and parity on that way.

First with the ops' default functions as the kernels of the CPU, in fp64; then with the Triton kernels, interpreted.
"""

import contextlib

import pytest
import torch

from hiera_kernels.ops import windows
from hiera_kernels.swap import accelerate
from tests import interpreter
from tests.block_kernels import default_kernels_on_cpu
from tests.families import FAMILIES, FEW, build, image, step
from tests.swap_cases import assert_equal

UNROLLED = {"add_layer_norm", "gelu", "mask_unit_attention", "linear_q_pool"}
MAPPED = {"add_layer_norm", "gelu", "window_attention"}
# family: (its settings, the ops of its blocks)
CASES = {
    "timm hiera_tiny_224": (dict(drop_path_rate=0.4), UNROLLED),
    # maximum and mean side by side need no projection
    "timm hiera_small_abswin_256": (dict(drop_path_rate=0.4), UNROLLED - {"linear_q_pool"}),
    "timm sam2_hiera_tiny": (dict(drop_path_rate=0.4), MAPPED),
    "timm hieradet_small": ({}, MAPPED),
    "transformers HieraForImageClassification": (dict(drop_path_rate=0.4), UNROLLED),
    "transformers HieraForPreTraining": ({}, UNROLLED),
    "transformers Sam2HieraDetModel tiny": ({}, MAPPED),
    "sam2 tiny": (dict(drop_path_rate=0.4), MAPPED),
}


@contextlib.contextmanager
def default_kernels():
    """Those of block_kernels.py, and those of window attention."""
    with default_kernels_on_cpu() as calls, pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "KERNEL_DTYPES", windows.DTYPES)

        def attention(*args, **kwargs):
            calls.append("window_attention")
            return windows.default(*args, **kwargs)

        def backward(*args, **kwargs):
            calls.append("window_attention_backward")
            return windows.default_backward(*args, **kwargs)

        with torch.library._scoped_library("hiera_kernels", "IMPL") as library:
            library.impl("window_attention", attention, "CPU")
            library.impl("window_attention_backward", backward, "CPU")
            yield calls


@pytest.mark.parametrize("name", CASES)
def test_blocks_on_ops(name):
    settings, ops = CASES[name]
    model = build(name, small=True, **settings)
    expected = step(model, image(), FAMILIES[name].call)
    accelerate(model)
    with default_kernels() as calls:
        actual = step(model, image(), FAMILIES[name].call)
    assert_equal(actual, expected)
    calls = [call.partition(" ")[0] for call in calls]  # "add_layer_norm of a sum"
    blocks = sum(path.endswith("attn") for path in FAMILIES[name].replaced(FEW))
    assert ops <= set(calls)
    assert {op + "_backward" for op in ops} <= set(calls)
    assert {op.removesuffix("_backward") for op in calls} <= ops | {"normalize"}
    attention = next(op for op in ops if op.endswith("attention"))
    assert calls.count(attention) == calls.count("gelu_backward") == blocks


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("drop_path", ["exact", "skip"])
@pytest.mark.parametrize("name", ["timm hiera_base_abswin_256", "sam2 tiny", "transformers HieraModel"])
def test_settings_of_accelerate(name, recompute, drop_path):
    """Whatever is recomputed or skipped, the same samples are dropped and the numbers are those of the original."""
    model = build(name, small=True, drop_path_rate=0.4)
    expected = step(model, image(batch=4), FAMILIES[name].call)
    accelerate(model, recompute=recompute, drop_path=drop_path)
    assert_equal(step(model, image(batch=4), FAMILIES[name].call), expected)


class TestInterpreted:
    """The Triton kernels themselves, in fp32, one model of each family at a width of one tile."""

    pytestmark = interpreter.marks

    @pytest.mark.parametrize(
        "name",
        [
            "timm hiera_tiny_224",
            "timm sam2_hiera_tiny",
            "transformers HieraForPreTraining",
            "transformers Sam2HieraDetModel tiny",
            "sam2 tiny",
        ],
    )
    def test_blocks_on_kernels(self, name):
        size = (64, 64) if "PreTraining" in name else (32, 64)
        model = build(name, small=True, size=size)
        call, ops = FAMILIES[name].call, CASES[name][1]
        x = image(size, batch=1)
        expected = step(model, x, call)
        accelerate(model.float())
        with interpreter.kernels_on_cpu() as calls:
            actual = step(model, x.float(), call)
        assert ops | {op + "_backward" for op in ops} <= set(calls)
        assert actual.keys() == expected.keys()
        for key, truth in expected.items():
            error = (actual[key].double() - truth).pow(2).mean().sqrt() / truth.pow(2).mean().sqrt()
            # fp32: 2e-7 a rounding, through five blocks and back.
            assert error <= 1e-5, f"{key}: {error:.2e}"

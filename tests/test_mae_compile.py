"""The whole masked-autoencoder step as one compiled graph, with the numbers of eager execution."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hiera import Hiera, MaskedAutoencoderHiera
from tests.model_pairs import SMALL_MAE, SMALL_VIDEO_MAE, encoder_pair, picture
from tests.upstream import load_upstream

# Three stages, both poolings, windowed and global blocks: the graph of the real thing, cheaper to trace.
SHORT = {"stages": (1, 1, 1), "mask_unit_attn": (True, True, False), "decoder_depth": 1}
IMAGE = {**SMALL_MAE, **SHORT, "mask_unit_size": (4, 4), "input_size": (48, 32)}
VIDEO = {**SMALL_VIDEO_MAE, **SHORT, "mask_unit_size": (1, 4, 4), "input_size": (4, 32, 48)}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, run, seed=3):
    """Loss, outputs and gradients of one training step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    outputs = run()
    outputs[0].backward()
    return [t.detach().clone() for t in outputs] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(a, b, atol=0.0):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y) if atol == 0 else torch.allclose(x, y, rtol=0, atol=atol)


def given_mask(model, kept=2):
    units = torch.Size(model.mask_spatial_shape).numel()
    mask = torch.zeros(2, units, dtype=torch.bool)
    mask[0, :kept] = mask[1, -kept:] = True
    return mask


@pytest.mark.parametrize("settings", [IMAGE, VIDEO], ids=["image", "video"])
def test_one_graph_random_mask(settings):
    model = MaskedAutoencoderHiera(**settings).double()
    x = picture(2, 3, *settings["input_size"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in (3, 4):  # two masks, one graph
        assert_same(step(model, lambda: compiled(x), seed), step(model, lambda: model(x), seed))
    assert counter.frame_count == 1


@pytest.mark.parametrize("settings", [IMAGE, VIDEO], ids=["image", "video"])
def test_one_graph_given_mask(settings):
    model = MaskedAutoencoderHiera(**settings).double()
    x, mask = picture(2, 3, *settings["input_size"]), given_mask(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    expected = step(model, lambda: model(x, mask=mask))
    assert_same(step(model, lambda: compiled(x, mask=mask, len_keep=2)), expected)
    assert_same(
        step(model, lambda: compiled(x, mask=mask.flip(0), len_keep=2)),
        step(model, lambda: model(x, mask=mask.flip(0))),
    )
    assert counter.frame_count == 1


def test_without_len_keep_the_count_is_read_before_the_one_graph():
    model = MaskedAutoencoderHiera(**IMAGE).double()
    x, mask = picture(2, 3, 48, 32), given_mask(model)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    assert_same(step(model, lambda: compiled(x, mask=mask)), step(model, lambda: model(x, mask=mask)))
    sizes = [
        sum(node.op == "call_function" or node.op == "call_module" for node in graph.graph.nodes) for graph in graphs
    ]
    assert sorted(sizes)[-2] < 15 < sorted(sizes)[-1]  # counting, and the step
    uneven = mask.clone()
    uneven[0] = True
    with pytest.raises(ValueError, match="rows keep 2 to 6"):
        compiled(x, mask=uneven)


def test_upstream_does_break():
    """What this is worth: the same step of hiera-transformer cannot be one graph."""
    model = load_upstream().MaskedAutoencoderHiera(**IMAGE)
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        torch.compile(model, fullgraph=True, backend="eager")(torch.randn(2, 3, 48, 32))


def test_checkpointed_step():
    model = MaskedAutoencoderHiera(**IMAGE, grad_checkpointing=True).double()
    x = picture(2, 3, 48, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(step(model, lambda: compiled(x)), step(model, lambda: model(x)))


def test_encoder_with_and_without_mask():
    model, _ = encoder_pair(
        input_size=(32, 48),
        embed_dim=8,
        num_classes=5,
        stages=(1, 2, 1),
        q_pool=2,
        mask_unit_size=(4, 4),
        drop_path_rate=0.2,
    )
    x, mask = picture(2, 3, 32, 48), given_mask(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def run(module, **kwargs):
        result, stages = module(x, return_intermediates=True, **kwargs)
        return [sum(t.square().sum() for t in [result, *stages]), result, *stages]

    for kwargs in ({}, {"mask": mask, "len_keep": 2}):
        assert_same(step(model, lambda k=kwargs: run(compiled, **k)), step(model, lambda k=kwargs: run(model, **k)))


def test_dynamic_sizes():
    """One graph per size. (With symbolic sizes the backward of the interpolation fails inside torch 2.13.)"""
    settings = {"stages": (1, 1), "q_pool": 1, "mask_unit_size": (2, 2), "mask_unit_attn": (True, False)}
    model = Hiera(input_size=(16, 16), embed_dim=8, num_classes=5, dynamic_size=True, **settings).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)

    def run(module, x):
        logits = module(x)
        return [logits.square().sum(), logits]

    sizes = [(16, 24), (32, 16)]
    for size in sizes + sizes:
        x = picture(2, 3, *size)
        assert_same(step(model, lambda x=x: run(compiled, x)), step(model, lambda x=x: run(model, x)))
    assert counter.frame_count == len(sizes)


@pytest.mark.slow
def test_inductor():
    model = MaskedAutoencoderHiera(**IMAGE)
    x, mask = picture(2, 3, *IMAGE["input_size"]).float(), given_mask(model)
    compiled = torch.compile(model, fullgraph=True)
    expected = step(model, lambda: model(x, mask=mask))
    assert_same(step(model, lambda: compiled(x, mask=mask, len_keep=2)), expected, atol=1e-4)

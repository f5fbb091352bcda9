"""torch.compile and torch.export of accelerated models of every family."""

import pytest
import torch

from hiera_kernels.ops.switch import disabled
from hiera_kernels.swap import accelerate
from tests.families import FAMILIES, build, flattened, image, step
from tests.swap_cases import assert_equal
from tests.test_family_ops import CASES, default_kernels

# One of each kind of block, and what it sets to have no global block: a compiler takes its time over each.
MODELS = {
    "timm hiera_tiny_224": {},
    "timm sam2_hiera_tiny": {"global_att_blocks": ()},
    "transformers HieraForImageClassification": {},
    "transformers Sam2VisionModel": {"global_attention_blocks": []},
    "sam2 tiny": {"global_att_blocks": []},
}


def shallow(name):
    return build(name, stages=(1, 1, 1, 1), small=True, **MODELS[name])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def called(name):
    return FAMILIES[name].call or (lambda model, x: model(x))


@pytest.mark.parametrize("name", MODELS)
def test_one_graph(name):
    """Forward and backward, values and all gradients."""
    model = shallow(name)
    expected = step(model, image(), called(name))
    accelerate(model)
    compiled = torch.compile(lambda x: called(name)(model, x), fullgraph=True, backend="aot_eager")
    assert_equal(step(model, image(), lambda _, x: compiled(x)), expected)


def test_masked_autoencoder_in_one_graph():
    """Its boolean indexing makes a number of tokens that only the device knows: blocks of the encoder run as stock."""
    model = build("transformers HieraForPreTraining", small=True)
    noise = torch.rand(2, 6, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(image(), noise=noise).loss
        accelerate(model)
        compiled = torch.compile(lambda x: model(x, noise=noise).loss, fullgraph=True, backend="eager")
        assert_equal({"loss": compiled(image())}, {"loss": expected})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if "PreTraining" not in name and "sam2.0" not in name])
def test_one_graph_of_every_model(name):
    size = (128, 128) if name == "transformers Sam2Model" else (64, 96)
    model = build(name, small=True, size=size)
    with torch.no_grad():
        expected = flattened(called(name)(model, image(size)))
        accelerate(model)
        compiled = torch.compile(lambda x: called(name)(model, x), fullgraph=True, backend="eager")
        actual = flattened(compiled(image(size)))
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_equal({str(i): a}, {str(i): b})


@pytest.mark.parametrize("name", ["sam2 tiny", "timm hiera_tiny_224"])
def test_the_graph_calls_the_ops(name):
    """Where there are kernels, each is one node of the graph."""
    found = []

    def record(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if "hiera_kernels" in str(node.target))
        return graph

    model = shallow(name)
    with torch.no_grad():
        expected = flattened(called(name)(model, image()))
        accelerate(model)
        with default_kernels():
            compiled = torch.compile(model, fullgraph=True, backend=record)
            actual = flattened(compiled(image()))
    assert_equal({"out": actual[-1]}, {"out": expected[-1]})
    for op in CASES[name][1]:
        assert any(f"hiera_kernels.{op}" in target for target in found), op


@pytest.mark.parametrize("name", MODELS)
def test_export(name):
    """The exported model runs, on other batches too; `disabled()` makes it plain PyTorch, as for ONNX."""
    model = shallow(name).eval()
    state = set(model.state_dict())

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return flattened(called(name)(self.model, x))

    wrapped = Called()
    batches = [image(batch=b) for b in (2, 3)]
    with torch.no_grad():
        expected = [wrapped(x) for x in batches]
        accelerate(model)
        shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
        program = torch.export.export(wrapped, (batches[0],), dynamic_shapes=shapes)
        with disabled():
            plain = torch.export.export(wrapped, (batches[0],))
        for x, wanted in zip(batches, expected, strict=True):
            for i, (a, b) in enumerate(zip(program.module()(x), wanted, strict=True)):
                assert_equal({str(i): a}, {str(i): b})
        for a, b in zip(plain.module()(batches[0]), expected[0], strict=True):
            assert torch.equal(a, b)
    assert {key.removeprefix("model.") for key in program.state_dict} == state
    assert not [node for node in plain.graph.nodes if "hiera_kernels" in str(node.target)]

"""torch.compile before and after `accelerate`, and torch.export."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hiera_kernels.ops.switch import disabled
from hiera_kernels.subclass import target_of
from hiera_kernels.swap import accelerate, restore
from tests.block_kernels import default_kernels_on_cpu
from tests.swap_cases import LIBRARIES, assert_equal, build, example, keep_mask, step


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same_names(run):
    return {key.removeprefix("_orig_mod."): value for key, value in run.items()}


def small(name, kind="image", **settings):
    """One block a stage: what a compiler does is the same, and it takes its time over every block."""
    return build(name, kind, stages=(1, 1, 1, 1), **settings)


@pytest.mark.parametrize("name", LIBRARIES)
def test_compiled_then_accelerated_then_restored(name):
    stock = small(name)
    expected = step(stock, example())
    compiled = torch.compile(stock, fullgraph=True, backend="aot_eager")
    step(compiled, example())  # compiled plain, and to be compiled again
    report = accelerate(compiled)
    assert {path for path, _ in report.replaced} >= {"_orig_mod", "_orig_mod.unroll", "_orig_mod.blocks.3.attn"}
    assert all(target_of(block.attn) is not None for block in stock.blocks)
    assert_equal(same_names(step(compiled, example())), expected)
    restore(compiled)
    assert_equal(same_names(step(compiled, example())), expected)


def test_the_compiled_graph_calls_the_ops():
    """Accelerating a model that was compiled and run already has an effect: Dynamo guards on the modules' classes."""
    calls = []

    def record(graph, inputs):
        calls.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    model = small("hiera")
    compiled = torch.compile(model, backend=record, fullgraph=True)
    compiled(example())
    assert "hiera_kernels" not in calls[-1]
    accelerate(compiled)
    compiled(example())
    assert len(calls) == 2, "the graph of the plain model was used again"
    assert "hiera_kernels.embed_tokens" in calls[-1] or calls[-1] != calls[0]
    with disabled():
        compiled(example())
    assert len(calls) == 3
    assert calls[-1] == calls[0]


def test_compile_with_changing_batch():
    stock = small("hiera")
    ours = copy.deepcopy(stock)
    accelerate(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x = example(batch=batch)
        assert_equal(same_names(step(compiled, x)), step(stock, x))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("image", {}),
        pytest.param("video", {}, marks=pytest.mark.slow),
        pytest.param("MAE image", {}, marks=pytest.mark.slow),
        pytest.param("image", {"recompute": "block"}, marks=pytest.mark.slow),
        pytest.param("image", {"drop_path": "skip"}, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_by_way_of_the_ops(kind, settings):
    """One graph, at most two of them for all batch sizes; the ops are nodes of it."""
    stock = build("hiera", kind, stages=(2, 1, 1, 1))
    ours = copy.deepcopy(stock)
    accelerate(ours, **settings)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    with default_kernels_on_cpu() as calls:
        for batch in (2, 3, 5):
            x, mask = example(kind, batch=batch), {}
            if kind == "MAE image":
                mask = {"mask": keep_mask(batch=batch)}
            run = step(compiled, x, **mask, **({"len_keep": 3} if mask else {}))
            assert_equal(same_names(run), step(stock, x, **mask))
    assert counter.frame_count <= 2
    assert {"add_layer_norm", "gelu_backward", "linear_q_pool_backward", "mask_unit_attention_backward"} <= set(calls)


@pytest.mark.slow
def test_compile_by_inductor():
    """To machine code, which takes minutes for a whole training step."""
    stock = small("hiera", dtype=torch.float32)
    ours = copy.deepcopy(stock)
    accelerate(ours)
    compiled = torch.compile(ours, fullgraph=True)
    x = example(dtype=torch.float32)
    assert_equal(same_names(step(compiled, x)), step(stock, x), tolerance=1e-3)


def test_compile_masked_autoencoder():
    stock = small("hiera", "MAE image")
    ours = copy.deepcopy(stock)
    accelerate(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    mask = keep_mask()
    assert_equal(same_names(step(compiled, example(), mask=mask, len_keep=3)), step(stock, example(), mask=mask))


@pytest.mark.parametrize("name", LIBRARIES)
def test_module_compiled_in_place(name):
    """`model.compile()` keeps the class and compiles the call."""
    stock = small(name)
    ours = copy.deepcopy(stock)
    ours.compile(fullgraph=True, backend="aot_eager")
    accelerate(ours)
    assert_equal(step(ours, example()), step(stock, example()))


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(name, dynamic):
    model = small(name).eval()
    expected = [model(example(batch=b)) for b in (2, 5)]
    accelerate(model)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}} if dynamic else None
    program = torch.export.export(model, (example(),), dynamic_shapes=shapes)
    module = program.module()
    for batch, wanted in zip((2, 5) if dynamic else (2,), expected, strict=False):
        assert (module(example(batch=batch)) - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    assert set(program.state_dict) == set(model.state_dict())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LIBRARIES)
def test_trace(name):
    model = small(name).eval()
    expected = model(example())
    accelerate(model)
    traced = torch.jit.trace(model, example(), check_trace=False)
    assert torch.equal(traced(example()), expected)
    assert "hiera_kernels" not in str(traced.graph)

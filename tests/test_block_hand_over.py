"""A note of the next block's LayerNorm is believed only by that block, for that very tensor, unchanged.

Expected values come from an untouched copy of the model. Broken on purpose and seen red here: versions not compared,
the identity of the tensor not compared, the parameters' state not compared, the dtype not compared, the note not
forgotten with its tensor.
"""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

from hiera_kernels import hand_over
from hiera_kernels.block_plan import plan_of
from hiera_kernels.swap import accelerate, restore
from tests.block_kernels import ALONE, JOINED, default_kernels_on_cpu
from tests.swap_cases import LIBRARIES, assert_equal, build, example, step

BLOCKS = 6


def pair(name="hiera", **settings):
    stock = build(name, **settings)
    ours = copy.deepcopy(stock)
    assert not accelerate(ours).skipped
    return stock, ours


def tokens(channels=8, batch=3):
    return torch.randn(batch, 384, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Chained(torch.nn.Module):
    """Two blocks of one stage, and what a user does between them."""

    def __init__(self, model, between):
        super().__init__()
        self.blocks, self.between = torch.nn.ModuleList(model.blocks[1:3]), between

    def forward(self, x):
        x = self.blocks[0](x)
        return self.blocks[1](self.between(x, self.blocks))


def chained(between, name="hiera"):
    torch.manual_seed(0)
    model = build(name, stages=(3, 1, 1, 1))
    stock = Chained(model, between)
    ours = copy.deepcopy(stock)
    assert not accelerate(ours).skipped
    return stock, ours


def nothing(x, blocks):
    return x


def in_place(x, blocks):
    return x.mul_(1.5)


def in_place_by_data(x, blocks):
    x.detach().add_(0.25)
    return x


def another_tensor(x, blocks):
    return x * 1.5


def same_values(x, blocks):
    return x.clone()


def view_of_it(x, blocks):
    return x.view_as(x)


def detached(x, blocks):
    return x.detach_().requires_grad_()


def norm_changed(x, blocks):
    with torch.no_grad():
        blocks[1].norm1.weight.mul_(1.1)
    return x


def norm_exchanged(x, blocks):
    torch.manual_seed(3)
    blocks[1].norm1 = copy.deepcopy(blocks[1].norm1)
    torch.nn.init.normal_(blocks[1].norm1.weight)
    return x


def data_exchanged(x, blocks):
    """As a wrapper does that gathers shards, or loads from the host: no version counts it."""
    for parameter in blocks[1].norm1.parameters():
        parameter.data = torch.linspace(-1, 1, len(parameter), dtype=parameter.dtype)
    return x


def eps_changed(x, blocks):
    blocks[1].norm1.eps = 0.5
    return x


def called_twice(x, blocks):
    return x + blocks[1](x)


def first_called_again(x, blocks):
    blocks[0](x + 1)
    return x


def interrupted(x, blocks):
    """Something else goes through both blocks in between."""
    blocks[1](blocks[0](x * 2))
    return x


def hooked_tensor(x, blocks):
    x.register_hook(lambda grad: grad * 2)
    return x


BELIEVED = [nothing, detached, hooked_tensor, called_twice]
BETWEEN = [
    *BELIEVED,
    *(in_place, in_place_by_data, another_tensor, same_values, view_of_it, norm_changed, norm_exchanged, eps_changed),
    data_exchanged,
    *(first_called_again, interrupted),
]


@pytest.mark.parametrize("between", BETWEEN)
def test_what_happens_between_two_blocks(between):
    stock, ours = chained(between)
    expected = step(stock, tokens())
    with default_kernels_on_cpu() as calls:
        actual = step(ours, tokens())
    if between is detached:
        assert expected.pop("input gradient") is actual.pop("input gradient") is None
    assert_equal(actual, expected)
    assert calls.count(JOINED) > 2, "nothing was handed over: nothing was tested"
    if between in BELIEVED:
        assert calls.count(ALONE) == 1 + (between is called_twice)
    else:
        assert calls.count(ALONE) >= 2


def test_the_gradient_that_reaches_the_tensor_between_is_whole():
    """It is a leaf to whoever asks: Grad-CAM, a hook, `retain_grad`."""
    kept = []

    def keeps(x, blocks):
        if x.requires_grad:
            x.retain_grad()
        kept.append(x)
        return x

    stock, ours = chained(keeps)
    step(stock, tokens())
    with default_kernels_on_cpu() as calls:
        step(ours, tokens())
    expected, actual = (x.grad for x in kept)
    assert calls.count(ALONE) == 1
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_hooks_on_blocks(name, where):
    stock, ours = pair(name)
    seen = [[], []]
    for model, log in zip((stock, ours), seen, strict=True):
        for block in model.blocks:
            if where != "after":
                block.register_forward_pre_hook(lambda m, args, log=log: log.append(args[0].detach().clone()))
            if where != "before":
                block.register_forward_hook(lambda m, args, out, log=log: log.append(out.detach().clone()) or out * 1.1)
    expected = step(stock, example())
    with default_kernels_on_cpu():
        actual = step(ours, example())
    assert_equal(actual, expected)
    assert len(seen[0]) == len(seen[1]) == BLOCKS * (1 + (where == "both"))
    for a, b in zip(*seen, strict=True):
        assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("way", "by_hook"),  # in place and without a hook is what nobody can see: hand_over.py says so
    [("in place", True), *((way, hook) for way in ("exchanged", "empty", "without storage") for hook in (True, False))],
)
def test_weights_that_arrive_with_the_call(way, by_hook):
    """Offloading, FSDP: until a block is called, its parameters hold what is no weight, or nothing at all."""

    def bring(block):
        for parameter in block.parameters():
            if way == "in place":
                parameter.data.copy_(parameter.kept)
            elif way == "without storage":
                parameter.untyped_storage().resize_(parameter.kept.untyped_storage().nbytes())
                with torch.autograd._unsafe_preserve_version_counter(parameter):
                    parameter.detach().copy_(parameter.kept)
            else:
                parameter.data = parameter.kept

    def take(block):
        for parameter in block.parameters():
            parameter.kept = parameter.detach().clone()
            if way == "in place":
                parameter.data.fill_(float("nan"))
            elif way == "without storage":
                parameter.untyped_storage().resize_(0)
            else:
                parameter.data = parameter.new_full(parameter.shape if way == "exchanged" else (0,), float("nan"))

    stock, ours = chained(nothing)
    expected = step(stock, tokens())
    take(ours.blocks[1])
    if by_hook:
        ours.blocks[1].register_forward_pre_hook(lambda block, _: bring(block))
    else:
        ours.between = lambda x, blocks: bring(blocks[1]) or x
    with default_kernels_on_cpu():
        assert_equal(step(ours, tokens()), expected)


def test_a_block_that_is_skipped_gets_no_gradient():
    """LayerDrop: None, not zeros, which an optimizer with weight decay would take for a reason to move."""

    def first_only(x, blocks):
        return x

    stock, ours = chained(first_only)
    for model in (stock, ours):
        model.forward = lambda x, model=model: model.blocks[0](x)
    expected = step(stock, tokens())
    with default_kernels_on_cpu() as calls:
        actual = step(ours, tokens())
    assert calls.count(JOINED) == 2
    assert_equal(actual, expected)
    assert ours.blocks[1].norm1.weight.grad is None


def test_a_note_taken_without_gradients_is_no_note_with_them():
    stock, ours = chained(nothing)

    def run(model, x):
        with torch.no_grad():
            x = model.blocks[0](x)
        return model.blocks[1](x).square().sum()

    gradients = []
    with default_kernels_on_cpu():
        for model in (stock, ours):
            run(model, tokens()).backward()
            gradients.append({name: p.grad for name, p in model.blocks[1].named_parameters()})
    assert_equal(gradients[1], gradients[0])


def test_under_autocast_in_part():
    """The note was written in the autocast dtype."""
    stock, ours = chained(nothing)
    stock, ours = stock.float(), ours.float()

    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = model.blocks[0](x)
        return model.blocks[1](x.float())

    with default_kernels_on_cpu():
        expected, actual = (run(model, tokens().float()) for model in (stock, ours))
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("end", ["a forward", "an exception", "a skipped block"])
def test_nothing_is_kept_beyond_the_forward(end, monkeypatch):
    _, ours = chained(nothing)
    notes = []
    made = hand_over._Note.__init__

    def init(self, total, norm, found):
        made(self, total, norm, found)
        notes.append(weakref.ref(found.normed))

    monkeypatch.setattr(hand_over._Note, "__init__", init)
    with default_kernels_on_cpu():
        if end == "a forward":
            ours(tokens())
        elif end == "a skipped block":
            ours.blocks[0](tokens())
        else:
            ours.between = lambda *_: 1 / 0
            with pytest.raises(ZeroDivisionError):
                ours(tokens())
    gc.collect()
    assert len(notes) == 1
    assert notes[0]() is None


def test_threads_have_notes_of_their_own():
    """`nn.DataParallel` calls its replicas so; here all threads share one model."""
    stock, ours = pair()
    inputs = [example(batch=b) for b in (1, 2, 3)]
    expected = [stock(x) for x in inputs]
    found = [None] * len(inputs)
    barrier = threading.Barrier(len(inputs))

    def work(i):
        barrier.wait()
        for _ in range(3):
            found[i] = ours(inputs[i])

    with default_kernels_on_cpu():
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual - wanted).abs().max() <= 1e-9 * wanted.abs().max()


def followers(model):
    return [plan_of(block).follower(block) for block in model.blocks]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_know_their_own_followers(way):
    _, ours = pair()
    twin = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert followers(ours) == [*ours.blocks[1:], None]
    assert followers(twin) == [*twin.blocks[1:], None]
    alone = copy.deepcopy(ours.blocks[2]) if way == "deepcopy" else pickle.loads(pickle.dumps(ours.blocks[2]))
    assert plan_of(alone).follower(alone) is None
    assert len(pickle.dumps(ours.blocks[2])) < 2 * len(pickle.dumps(stock_like(ours.blocks[2])))
    shallow = copy.copy(ours.blocks[2])
    assert plan_of(shallow).follower(shallow) is None
    assert followers(ours) == [*ours.blocks[1:], None]
    replica = ours.blocks[0]._replicate_for_data_parallel()
    assert plan_of(replica).follower(replica) is None
    with default_kernels_on_cpu() as calls:
        actual = step(twin, example())
    assert calls.count(ALONE) == 1
    with default_kernels_on_cpu():
        assert_equal(actual, step(ours, example()))


def stock_like(block):
    block = copy.deepcopy(block)
    restore(block)
    return block


def test_blocks_in_another_order():
    stock, ours = pair(stages=(3, 1, 1, 1))
    for model in (stock, ours):
        model.blocks = torch.nn.ModuleList([model.blocks[i] for i in (1, 0, 2, 3, 4, 5)])
    with default_kernels_on_cpu() as calls:
        assert_equal(step(ours, example()), step(stock, example()))
    assert calls.count(ALONE) > 1
    accelerate(ours)
    with default_kernels_on_cpu() as calls:
        assert_equal(step(ours, example()), step(stock, example()))
    assert calls.count(ALONE) == 1

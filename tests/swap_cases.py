"""Small models of both libraries, and what to run and compare on them."""

import functools
import importlib

import torch

from tests.upstream import load_upstream

LIBRARIES = ("hiera", "hiera-transformer")

SMALL = dict(embed_dim=8, num_heads=1, stages=(1, 2, 2, 1))
IMAGE = dict(input_size=(64, 96), num_classes=7, **SMALL)
VIDEO = dict(
    input_size=(4, 64, 96),
    num_classes=7,
    q_stride=(1, 2, 2),
    mask_unit_size=(1, 8, 8),
    patch_kernel=(3, 7, 7),
    patch_stride=(2, 4, 4),
    patch_padding=(1, 3, 3),
    sep_pos_embed=True,
    **SMALL,
)
SIGNAL = dict(
    input_size=(256,),
    num_classes=7,
    q_stride=(2,),
    mask_unit_size=(8,),
    patch_kernel=(7,),
    patch_stride=(4,),
    patch_padding=(3,),
    **SMALL,
)
MAE = dict(q_pool=2, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
# name: (class, arguments)
KINDS = {
    "image": ("Hiera", IMAGE),
    "video": ("Hiera", VIDEO),
    "signal": ("Hiera", SIGNAL),
    "two poolings": ("Hiera", {**IMAGE, "q_pool": 2}),
    "all mask units": ("Hiera", {**IMAGE, "mask_unit_attn": (True, True, True, True), "q_pool": 2}),
    "MAE image": ("MaskedAutoencoderHiera", {**IMAGE, **MAE}),
    "MAE video": ("MaskedAutoencoderHiera", {**VIDEO, **MAE}),
}


@functools.cache
def library(name):
    return load_upstream() if name == "hiera-transformer" else importlib.import_module("hiera")


def build(name, kind="image", dtype=torch.float64, **overrides):
    """A small model whose every parameter matters: no zeros, no equal values (upstream starts with constant biases)."""
    cls, arguments = KINDS[kind]
    torch.manual_seed(11)
    model = getattr(library(name), cls)(**{**arguments, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.to(dtype)


def example(kind="image", dtype=torch.float64, batch=2):
    """An input [batch, 3, *size]."""
    return torch.randn(batch, 3, *KINDS[kind][1]["input_size"], dtype=dtype, generator=torch.Generator().manual_seed(5))


# What is swapped in the plain models of this file.
ALL = {"", "unroll", "reroll", *(f"blocks.{i}{part}" for i in range(6) for part in ("", ".attn"))}


def swapped(model):
    """Paths of the modules that are swapped."""
    from hiera_kernels.subclass import target_of  # here: one test loads a model where nothing has imported the package

    return {path for path, module in model.named_modules() if target_of(module) is not None}


def tensors(output):
    """All tensors of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for item in output for tensor in tensors(item)]


def step(model, *arguments, seed=3, **keywords):
    """One forward and backward from a fixed seed: outputs, input gradient and every parameter gradient, by name.

    The loss is a fixed random projection of all floating-point outputs, so that every output element counts.
    """
    model.zero_grad()
    first = arguments[0].detach().clone().requires_grad_()
    torch.manual_seed(seed)
    outputs = [o for o in tensors(model(first, *arguments[1:], **keywords)) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(17)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True) if o.requires_grad)
    loss.backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    found["input gradient"] = first.grad
    found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


def assert_equal(actual, expected, tolerance=1e-9):
    """Per tensor: same dtype, and max|a - b| <= tolerance * max|b|, b not all zero."""
    assert actual.keys() == expected.keys()
    for name, b in expected.items():
        a = actual[name]
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        assert b.abs().max() > 0, f"{name} is zero: nothing would be compared"
        worst = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert worst <= tolerance, f"{name}: {worst:.2e}"


def steps(model, kind, dtype):
    """Outputs and gradients of `step` on six inputs, stacked: the RMS of one small bias would be mere chance."""
    generator = torch.Generator().manual_seed(23)
    size = KINDS[kind][1]["input_size"]
    inputs = [torch.randn(2, 3, *size, dtype=torch.float64, generator=generator) for _ in range(6)]
    runs = [step(model, x.to(dtype)) for x in inputs]
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def assert_law(actual, stock, oracle, rounding):
    """The law of parity: per tensor the RMS error against fp64 is at most twice that of stock, plus one rounding step.

    In low precision two right answers differ by far more than a rounding: where a rounding changes which token wins a
    max-pooling, the gradient goes elsewhere. So neither is the measure of the other, and fp64 is that of both. What
    stock itself gets half wrong (the input gradient, locally) proves nothing, and may be a tenth of the tensors.
    """
    assert actual.keys() == stock.keys() == oracle.keys()
    tested = 0
    for name, truth in oracle.items():
        assert actual[name].dtype == stock[name].dtype, name
        error, allowed = (
            ((run[name].double() - truth).pow(2).mean() / truth.pow(2).mean()).sqrt() for run in (actual, stock)
        )
        assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, stock {allowed:.2e}"
        tested += bool(2 * allowed + rounding < 0.8)
    assert tested >= 0.9 * len(oracle)


def keep_mask(kind="image", batch=2, kept=3):
    """A boolean mask [batch, mask units] that keeps the same number in every row, the last unit among them."""
    size, unit = KINDS[kind][1]["input_size"], {"image": (32, 32), "video": (2, 32, 32), "signal": (32,)}
    units = 1
    for length, pixels in zip(size, unit[kind.removeprefix("MAE ")], strict=True):
        units *= length // pixels
    mask = torch.zeros(batch, units, dtype=torch.bool)
    for row in range(batch):
        mask[row, torch.randperm(units - 1, generator=torch.Generator().manual_seed(row))[: kept - 1]] = True
        mask[row, -1] = True
    return mask

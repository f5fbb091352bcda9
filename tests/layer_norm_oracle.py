"""Residual add + LayerNorm from the definition, in NumPy fp64, row by row, gradients derived by hand.

A row s of the sum has mean m, variance v (divided by C), r = (v + eps)^(-1/2) and output (s - m) * r * weight + bias.
With h = grad_normed * weight, differentiating m and r each for itself,

    ds_j = r * (h_j - sum(h) / C) - (s_j - m) * r^3 * sum(h * (s - m)) / C + grad_sum_j

Also here: kernels for the CPU that stand in for the Triton kernels, so that the public function takes the op's way.
"""

import contextlib

import numpy as np
import torch

NAMES = ("x", "branch", "weight", "bias", "drop_scale", "layer_scale", "branch_bias")


def array(tensor):
    return None if tensor is None else tensor.detach().to(torch.float64).numpy()


def forward(x, branch=None, weight=None, bias=None, eps=1e-6, drop_scale=None, layer_scale=None):
    """Sum and normed, fp64."""
    total = np.array(x, dtype=np.float64)
    if branch is not None:
        for b in range(x.shape[0]):
            for index in np.ndindex(*x.shape[1:-1]):
                scaled = branch[(b, *index)] * (1.0 if drop_scale is None else drop_scale[b])
                total[(b, *index)] += scaled * (1.0 if layer_scale is None else layer_scale)
    return total, _normed(total, weight, bias, eps)


def _normed(total, weight, bias, eps):
    normed = np.empty_like(total)
    for index in np.ndindex(*total.shape[:-1]):
        row = total[index]
        distance = row - np.sum(row) / len(row)
        out = distance / np.sqrt(np.sum(distance**2) / len(row) + eps)
        out = out if weight is None else out * weight
        normed[index] = out if bias is None else out + bias
    return normed


def backward(
    grad_sum,
    grad_normed,
    x,
    branch=None,
    weight=None,
    bias=None,
    eps=1e-6,
    drop_scale=None,
    layer_scale=None,
    total=None,
):
    """Gradients of x, branch, weight, bias, layer_scale and branch_bias, fp64. Either gradient may be None: zero.

    total: the sum as it was rounded, where that matters.
    """
    total = forward(x, branch, weight, bias, eps, drop_scale, layer_scale)[0] if total is None else total
    C = total.shape[-1]
    found = {"x": np.zeros_like(total), "branch": np.zeros_like(total)}
    found |= {name: np.zeros(C) for name in ("weight", "bias", "layer_scale", "branch_bias")}
    for index in np.ndindex(*total.shape[:-1]):
        row = np.zeros(C) if grad_sum is None else np.array(grad_sum[index], dtype=np.float64)
        if grad_normed is not None:
            g = np.array(grad_normed[index], dtype=np.float64)
            distance = total[index] - np.sum(total[index]) / C
            r = (np.sum(distance**2) / C + eps) ** -0.5
            h = g if weight is None else g * weight
            row += r * (h - np.sum(h) / C) - distance * r**3 * np.sum(h * distance) / C
            found["weight"] += g * distance * r
            found["bias"] += g
        found["x"][index] = row
        if branch is not None:
            kept = row * (1.0 if drop_scale is None else drop_scale[index[0]])
            found["layer_scale"] += kept * branch[index]
            found["branch"][index] = kept * (1.0 if layer_scale is None else layer_scale)
            found["branch_bias"] += found["branch"][index]
    return found


def draw(shape, dtype=torch.float32, parameters=None, without=(), requires_grad=True):
    """Arguments of add_layer_norm by name: x and branch of `dtype`, parameters of theirs; sample 0 is dropped."""
    parameters = dtype if parameters is None else parameters
    B, C = shape[0], shape[-1]
    found = {name: torch.randn(shape).to(dtype) for name in ("x", "branch")}
    found["x"] += 0.5
    found |= {name: (1 + torch.randn(C) / 4).to(parameters) for name in ("weight", "layer_scale")}
    found |= {name: torch.randn(C).to(parameters) for name in ("bias", "branch_bias")}
    found["drop_scale"] = torch.tensor([0.0, 1.25] * B)[:B].to(parameters)
    found = {name: None if name in without else found[name] for name in NAMES}
    for name, tensor in found.items():
        if tensor is not None and name != "drop_scale":
            tensor.requires_grad_(requires_grad)
    return found


def gradients(function, arguments, grad_sum=None, grad_normed=None, **options):
    """Outputs of `function`, and by name the gradients of the arguments that ask for one."""
    total, normed = function(**arguments, **options)[:2]
    leaves = {name: t for name, t in arguments.items() if t is not None and t.requires_grad}
    pairs = [(t, g) for t, g in ((total, grad_sum), (normed, grad_normed)) if g is not None]
    found = torch.autograd.grad(
        [t for t, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True, materialize_grads=False
    )
    return total.detach(), normed.detach(), dict(zip(leaves, found, strict=True))


def wanted(arguments, grad_sum=None, grad_normed=None, eps=1e-6, total=None):
    """What `gradients` should give, fp64: sum, normed and every gradient. total: a rounded sum to go on from."""
    values = {name: array(tensor) for name, tensor in arguments.items() if name != "branch_bias"}
    own, normed = forward(**values, eps=eps)
    if total is not None:
        normed = _normed(array(total), values["weight"], values["bias"], eps)
    found = backward(array(grad_sum), array(grad_normed), **values, eps=eps, total=array(total))
    return own, normed, found


@contextlib.contextmanager
def kernels_on_cpu():
    """The defaults of the ops (plain operations), registered as the CPU's own kernels; yields the calls, name first."""
    from hiera_kernels.ops import layer_norm_library, normed_linear

    calls = []

    def counted(name, function):
        def call(*args, **kwargs):
            calls.append((name, *args))
            return function(*args, **kwargs)

        return call

    kernels = {
        "add_layer_norm": layer_norm_library.default,
        "add_layer_norm_backward": layer_norm_library.default_backward,
        "normalize": normed_linear.default,
    }
    with torch.library._scoped_library("hiera_kernels", "IMPL") as library:
        for name, function in kernels.items():
            library.impl(name, counted(name, function), "CPU")
        torch._dynamo.reset()  # a compiled graph keeps the way that it was traced with
        try:
            yield calls
        finally:
            torch._dynamo.reset()

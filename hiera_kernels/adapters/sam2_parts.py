"""What the homes of SAM 2's trunk share: attention on a map of tokens, and what stands in for a block's parts.

Source: sam2 1.1.0, `sam2/modeling/backbones/hieradet.py`. A block pads and cuts a map of tokens into windows, calls its
attention on them as on a batch, and puts the map together again. With `window_attention` the map stays whole.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from hiera_kernels.lookalike import Affine
from hiera_kernels.ops.windows import window_attention
from hiera_kernels.plain_modules import is_heard, is_readable_linear
from hiera_kernels.subclass import target_of


def attended(attn, qkv, num_heads, window_size, q_stride, scale=None):
    """What lies between two linear layers that are read; qkv [B, Hs, Ws, 3*dim_out] -> [B, Hs', Ws', dim_out].

    Arguments as of `attend`. The row of a zero token is the bias of the layer.
    """
    pad = None
    if _overhangs(qkv, window_size) and attn.qkv.bias is not None:
        pad = attn.qkv.bias.to(qkv.dtype)
    return window_attention(qkv, num_heads, window_size, q_stride, pad, scale)


def attend(attn, x, num_heads, window_size, q_stride, scale=None):
    """`proj(window_attention(qkv(x)))`; x [B, Hs, Ws, dim] -> [B, Hs/q_stride, Ws/q_stride, dim_out].

    Args:
        attn: A module with layers `qkv` and `proj`, which may be wrapped ones.
        x: The normed map.
        num_heads: H.
        window_size: Height and width; None is the whole map.
        q_stride: Height and width; None is no pooling.
        scale: factor on the logits; None is `D ** -0.5`.
    """
    pad = None
    if _overhangs(x, window_size):
        # The original pads before the layer, with zeros: they come out of it as its bias, whatever wraps the layer.
        pad = attn.qkv(x.new_zeros(1, 1, 1, x.shape[3])).flatten()
    return attn.proj(window_attention(attn.qkv(x), num_heads, window_size, q_stride, pad, scale))


def _overhangs(x, window_size):
    return window_size is not None and (x.shape[1] % window_size[0] != 0 or x.shape[2] % window_size[1] != 0)


def projected(normed, layer):
    """The output of a linear layer for a LayerNorm's output: the layer is read where it can be, else called."""
    return normed.linear(layer.weight, layer.bias) if is_readable_linear(layer) else layer(normed.tokens)


def divides(x, window_size, q_stride):
    """Whether pooling cuts neither windows nor the map [B, Hs, Ws, C]. Where it does, the original knows what to do."""
    if q_stride is None:
        return True
    height, width = q_stride
    sides = [(x.shape[1], x.shape[2])] + ([] if window_size is None else [window_size])
    return all(side[0] % height == 0 and side[1] % width == 0 for side in sides)


def pooled(x, pool):
    """x [B, Hs, Ws, C] through a pooling of channels-first maps, or as it is without one."""
    return x if pool is None else pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pool_stride(pool):
    """Height and width of a plain `nn.MaxPool2d` whose windows do not overlap; None of any other module."""
    if type(pool) is not nn.MaxPool2d or pool.ceil_mode or pool.return_indices:
        return None
    kernel, stride, padding, dilation = (
        size if isinstance(size, tuple) else (size, size)
        for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    return kernel if kernel == stride and padding == (0, 0) and dilation == (1, 1) else None


def int_pair(value):
    """Two positive ints in a tuple or list, as a tuple; else None."""
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
        return tuple(value)
    return None


def serves(attn, pools=()):
    """Whether a block may call its attention by parts: it is ours, and nobody would notice."""
    return target_of(attn) is not None and listener(attn, pools) is None


def listener(attn, pools=()):
    """Which part has a hook that would not be called, or would meet a map instead of windows; None if none has.

    Then the block runs its own forward, which calls its attention, which is ours, on windows.
    """
    if torch_module._has_any_global_hook():
        return "every module"
    for name, module in (("attn", attn), ("qkv", attn._modules["qkv"]), ("proj", attn._modules["proj"])):
        if is_heard(module):
            return f"its `{name}`"
    return "its pooling" if any(is_heard(pool) for pool in pools if pool is not None) else None


def noticed(attn, pools=()):
    """What the report says of a block that has to run its own forward for now."""
    who = listener(attn, pools)
    return None if who is None else f"not while a hook listens to {who}, as one does now"


def layers_that_do_not_fit(module, dim, dim_out):
    """What is wrong with the sizes of `qkv` and `proj`, in words, or None."""
    for name, fits in (("qkv", (dim, 3 * dim_out)), ("proj", (dim_out, dim_out))):
        layer = module._modules[name]
        # Wrapped layers may hide their sizes, and are called, not read.
        sizes = getattr(layer, "in_features", fits[0]), getattr(layer, "out_features", fits[1])
        if sizes != fits:
            return f"its `{name}` maps {sizes[0]} to {sizes[1]} channels where {fits[0]} to {fits[1]} are expected"
    return None


def attention_sizes(module, heads_name):
    """What is wrong with an attention's `dim`, `dim_out` and number of heads, in words, or None."""
    has = vars(module)
    for name in ("dim", "dim_out", heads_name):
        if not isinstance(has.get(name), int) or has[name] < 1:
            return f"it has no positive integer `{name}`"
    if has["dim_out"] % has[heads_name] != 0:
        return f"{heads_name} = {has[heads_name]} does not divide dim_out = {has['dim_out']}"
    return layers_that_do_not_fit(module, has["dim"], has["dim_out"])


# Stand-ins. Not affine where an affine one would commute with what lies around it.


class Norm:
    """Stands in for a LayerNorm. Its bias shows whether zeros are padded before it or after."""

    def __init__(self, fresh, dim):
        self.weight, self.bias = fresh(dim), fresh(dim)

    def __call__(self, x):
        """[..., C] -> the same shape."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias)


class Mixer(Affine):
    """Stands in for an MLP."""

    def __call__(self, x):
        """[..., C] -> the same shape."""
        return torch.tanh(super().__call__(x))


class Scaled:
    """Stands in for layer scale."""

    def __init__(self, fresh, dim):
        self.gamma = fresh(dim)

    def __call__(self, x):
        """[..., C] -> the same shape."""
        return x * self.gamma


class Drop:
    """Stands in for drop path: draws a number for each sample, so that the order of the calls shows."""

    def __call__(self, x):
        """[..., C] -> the same shape."""
        return x * (1 + torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=torch.float64)).to(x.dtype)


class MapAttention:
    """Stands in for the attention of a block, in plain PyTorch: windows are a batch."""

    def __init__(self, fresh, dim, dim_out, heads, q_stride, scale=None):
        self.qkv, self.proj = Affine(fresh, dim, 3 * dim_out), Affine(fresh, dim_out, dim_out)
        self.num_heads = self.num_attention_heads = heads
        self.q_pool = None if q_stride is None else nn.MaxPool2d(q_stride)
        self.query_stride = q_stride
        self.fused_attn, self.scale = scale is None, scale

    def __call__(self, hidden_states):
        """[M, h, w, dim] -> [M, h', w', dim_out]."""
        count = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).chunk(3, -1)
        if self.q_pool is not None:
            q = self.q_pool(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        shape = q.shape
        q, k, v = (t.reshape(count, -1, self.num_heads, shape[3] // self.num_heads).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(shape))


# (height and width of the map, window, stride, channels in and out): whole windows and overhanging ones on either side
# and on both, pooled and not, global, with and without another number of channels. Global and pooled at once is a
# division by zero in all homes.
CASES = (
    ((8, 12), (4, 4), None, (6, 6)),
    ((6, 9), (4, 4), None, (6, 6)),
    ((8, 10), (4, 4), (2, 2), (6, 16)),
    ((4, 8), (4, 4), (2, 2), (6, 16)),
    ((5, 3), (4, 4), None, (6, 16)),
    ((3, 5), None, None, (6, 6)),
)

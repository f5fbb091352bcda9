"""The parts of Hiera: patch embedding, attention in mask units, pooling, MLP, stochastic depth, layer scale, head.

Source: arXiv 2306.00989; module and parameter names as hiera-transformer 0.1.4, `hiera.py`, and timm's `Mlp`,
`DropPath` and `LayerScale`. This is the plain version, the one that a faster one is compared with: it says what is
computed.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class PatchEmbed(nn.Module):
    """Overlapping patches to tokens by one convolution, in 1 to 3 dimensions.

    Args:
        dim_in, dim_out: Channels of the picture and of the tokens.
        kernel, stride, padding: Of the convolution, one int per dimension.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel, stride, padding):
        super().__init__()
        self.spatial_dims = len(kernel)
        self.proj = CONV[self.spatial_dims](dim_in, dim_out, kernel_size=kernel, stride=stride, padding=padding)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed.

        Args:
            x: [B, dim_in, *size].
            mask: bool [B, 1, *units], True is *keep*; the grid of mask units divides `size`. What is not kept is set
                to zero *before* the convolution, because kernels overlap and would carry hidden pixels into visible
                tokens.

        Returns:
            [B, N, dim_out] in row-major spatial order.
        """
        if mask is not None:
            for dim in range(2, x.ndim):
                mask = mask.repeat_interleave(x.shape[dim] // mask.shape[dim], dim=dim)
            x = x * mask
        return self.proj(x).flatten(2).transpose(1, 2)


# The default where upstream has a lambda: this one can be pickled.
CLASS_PROBABILITIES = partial(torch.softmax, dim=-1)


class Head(nn.Module):
    """Dropout and a linear classifier; outside training its output goes through `act_func`.

    Args:
        dim, num_classes: Channels in and out.
        dropout_rate: Probability of dropping a channel.
        act_func: Applied in eval mode only. Default: softmax over the classes.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        dropout_rate: float = 0.0,
        act_func: Callable[[torch.Tensor], torch.Tensor] = CLASS_PROBABILITIES,
    ):
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate) if dropout_rate > 0 else nn.Identity()
        self.projection = nn.Linear(dim, num_classes)
        self.act_func = act_func

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, dim] -> [B, num_classes]: logits in training, `act_func` of them in eval mode."""
        x = self.projection(self.dropout(x))
        return x if self.training else self.act_func(x)


class MaskUnitAttention(nn.Module):
    """Multi-head attention inside mask units, or over all tokens, with optional max-pooling of the queries.

    Args:
        dim, dim_out: Channels of the input and of the output.
        heads: Number of heads; `dim_out` is divisible by it.
        q_stride: Pool the queries with this (flattened) stride: 2x2 is 4. 1 does not pool.
        window_size: Tokens of a mask unit *after* this block's pooling, flattened.
        use_mask_unit_attn: Attend inside mask units; else among all tokens.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        q_stride: int = 1,
        window_size: int = 0,
        use_mask_unit_attn: bool = False,
    ):
        super().__init__()
        self.dim = dim
        self.dim_out = dim_out
        self.heads = heads
        self.q_stride = q_stride
        self.head_dim = dim_out // heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)
        self.window_size = window_size
        self.use_mask_unit_attn = use_mask_unit_attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: [B, N, dim], unrolled order.

        Returns:
            [B, N // q_stride, dim_out], unrolled order.

        Equivalent to (K = q_stride * window_size keys in each of W = N // K windows; W = 1 for global attention): per
        window w and head, `softmax(q @ k.T * scale) @ v` over the tokens `x[:, w::W]`, where q has first been pooled
        to the maximum over its `q_stride` leading groups.
        """
        B, N, _ = x.shape
        W = N // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        qkv = self.qkv(x).reshape(B, N // W, W, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(3, 0, 4, 2, 1, 5).unbind(0)  # each [B, heads, W, N // W, head_dim]
        if self.q_stride > 1:
            # max(dim) and not amax: where several tokens tie, one of them gets the gradient.
            q = q.unflatten(3, (self.q_stride, -1)).max(dim=3).values
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 3).flatten(3).flatten(1, 2))


class Mlp(nn.Module):
    """Linear, activation, linear.

    Args:
        in_features: Channels of input and output.
        hidden_features: Channels between the two.
        act_layer: Makes the activation module.
    """

    def __init__(self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., in_features]."""
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a whole branch for some samples of the batch.

    Args:
        drop_prob: Probability of dropping it, 0 to 1.
        scale_by_keep: Divide what is kept by the probability of keeping it.

    Draws as timm's module does (one Bernoulli number per sample, in the dtype of `x`), so that the same generator
    state drops the same samples. Source: arXiv 1603.09382.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ...] -> [B, ...]."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        factor = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and self.scale_by_keep:
            factor.div_(keep_prob)
        return x * factor

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"drop_prob={self.drop_prob:.3f}"


class LayerScale(nn.Module):
    """A learned factor per channel. Source: arXiv 2103.17239.

    Args:
        dim: Number of channels.
        init_value: What every factor starts from.
    """

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> [..., dim]."""
        return x * self.gamma


class HieraBlock(nn.Module):
    """A transformer block whose attention may pool, and whose shortcut then pools too.

    Args:
        dim, dim_out, heads, q_stride, window_size, use_mask_unit_attn: See :class:`MaskUnitAttention`.
        mlp_ratio: Hidden channels of the MLP, as a multiple of `dim_out`.
        drop_path: Probability of dropping a branch; see :class:`DropPath`.
        norm_layer: Makes a normalisation of so many channels.
        act_layer: Makes the activation of the MLP.
        layer_scale: Initial value of a factor per channel on both branches (`ls1.gamma`, `ls2.gamma`), or None for
            none.
        expand_proj: Where the channels double, the shortcut is the max-pooled projection of the normalised input (the
            published models). False: max-pooled and mean-pooled input side by side, without a weight (timm's
            `hiera_small_abswin_256`).
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        q_stride: int = 1,
        window_size: int = 0,
        use_mask_unit_attn: bool = False,
        layer_scale: float | None = None,
        expand_proj: bool = True,
    ):
        super().__init__()
        self.dim = dim
        self.dim_out = dim_out
        self.expand_proj = expand_proj
        if not expand_proj and dim_out not in (dim, 2 * dim):
            raise ValueError(f"expand_proj=False needs dim_out = dim or 2 * dim, got dim={dim}, dim_out={dim_out}")

        # The order in which these are made is the order in which upstream's draw their initial values: the same seed
        # gives the same weights.
        self.norm1 = norm_layer(dim)
        self.attn = MaskUnitAttention(dim, dim_out, heads, q_stride, window_size, use_mask_unit_attn)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim_out, layer_scale)
        self.norm2 = norm_layer(dim_out)
        self.mlp = Mlp(dim_out, int(dim_out * mlp_ratio), act_layer=act_layer)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim_out, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if dim != dim_out and expand_proj:
            self.proj = nn.Linear(dim, dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, dim] -> [B, N // q_stride, dim_out], unrolled order."""
        x_norm = self.norm1(x)
        if self.dim != self.dim_out:
            if self.expand_proj:
                x = pool(self.proj(x_norm), self.attn.q_stride).max(dim=1).values
            else:
                groups = pool(x, self.attn.q_stride)
                x = torch.cat([groups.max(dim=1).values, groups.mean(dim=1)], dim=-1)
        x = x + self.drop_path(self.ls1(self.attn(x_norm)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def pool(x: torch.Tensor, stride: int) -> torch.Tensor:
    """View [B, N, C] as [B, stride, N // stride, C]: in the unrolled order, a reduction over dim 1 pools spatially."""
    return x.unflatten(1, (stride, -1))

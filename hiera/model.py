"""Hiera, the hierarchical vision transformer of arXiv 2306.00989, in plain PyTorch.

Constructor arguments, module and parameter names and outputs are those of hiera-transformer 0.1.4 (`hiera.py`), so
its checkpoints load with `strict=True`. Added: layer scale, other sizes than trained for, the absolute-win position
embedding, activation checkpointing, and masks without boolean indexing.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hiera.block import CONV, Head, HieraBlock, MaskUnitAttention, PatchEmbed
from hiera.checkpoint_loading import LoadReport, load_weights
from hiera.position import absolute_win_pos_embed, resize_pos_embed, separable_pos_embed
from hiera.sizes import check_settings, does_not_tile, token_grid, window_tokens
from hiera.tokens import Reroll, Unroll, count_kept, gather_units, kept_units

__all__ = ["Head", "Hiera", "HieraBlock", "MaskUnitAttention", "PatchEmbed"]


class Hiera(nn.Module):
    """Hiera with a classification head.

    Args:
        input_size: Size of the input in pixels: (W,), (H, W) or (T, H, W). Every length must be a multiple of
            `patch_stride` times the product of the pooling strides (32 pixels in the published image models).
        in_chans: Channels of the input.
        embed_dim: Channels of the first stage.
        num_heads: Heads of the first stage.
        num_classes: Outputs of the head.
        stages: Number of blocks in each stage.
        q_pool: Number of stage ends that pool, smaller than the number of stages.
        q_stride: Stride of one pooling, per dimension.
        mask_unit_size: Size of a mask unit in tokens, per dimension. With masks it must be
            `q_stride ** (len(stages) - 1)`.
        mask_unit_attn: For each stage, attention inside mask units (True) or global.
        dim_mul, head_mul: Growth of channels and heads from stage to stage.
        patch_kernel, patch_stride, patch_padding: Of the patch embedding.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of their input's.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        norm_layer: Name of a class in `torch.nn` (made with eps=1e-6), or a function of the number of channels.
        head_dropout: Dropout before the classifier.
        head_init_scale: Factor on the classifier's initial weights.
        sep_pos_embed: Separate embeddings for space and time (3-D inputs only).
        layer_scale: Initial value of learned factors per channel on both branches of every block, or None for none.
        expand_proj: See :class:`hiera.block.HieraBlock`.
        abs_win: Absolute-win position embedding (arXiv 2311.05613): parameters `pos_embed` [1, C, *global_pos_size]
            (background, interpolated) and `pos_embed_window` [1, C, *mask_unit_size] (tiled).
        global_pos_size: Grid of that background. Default: 14 in each spatial dimension, one entry per token in time.
        dynamic_size: Accept any size that tiles into mask units; position embeddings are interpolated in the forward.
            False: `x` must have `input_size` (load weights of another size with :meth:`load_pretrained`).
            Compile such a model with `dynamic=False`: torch 2.13 cannot differentiate the interpolation for symbolic
            sizes.
        grad_checkpointing: See :meth:`set_grad_checkpointing`.

    Raises:
        ValueError: for settings that contradict each other, and a size that does not tile into mask units (the
            message names the nearest sizes that do).

    `self.config` holds these arguments: `type(model)(**model.config)` builds another one like it.
    """

    def __init__(
        self,
        input_size: Sequence[int] = (224, 224),
        in_chans: int = 3,
        embed_dim: int = 96,
        num_heads: int = 1,
        num_classes: int = 1000,
        stages: Sequence[int] = (2, 3, 16, 3),
        q_pool: int = 3,
        q_stride: Sequence[int] = (2, 2),
        mask_unit_size: Sequence[int] = (8, 8),
        mask_unit_attn: Sequence[bool] = (True, True, False, False),
        dim_mul: float = 2.0,
        head_mul: float = 2.0,
        patch_kernel: Sequence[int] = (7, 7),
        patch_stride: Sequence[int] = (4, 4),
        patch_padding: Sequence[int] = (3, 3),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_layer: str | Callable[[int], nn.Module] = "LayerNorm",
        head_dropout: float = 0.0,
        head_init_scale: float = 0.001,
        sep_pos_embed: bool = False,
        layer_scale: float | None = None,
        expand_proj: bool = True,
        abs_win: bool = False,
        global_pos_size: Sequence[int] | None = None,
        dynamic_size: bool = False,
        grad_checkpointing: bool = False,
    ):
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config
        norm_layer = _norm_maker(norm_layer)
        depth, steps = sum(stages), len(stages) - 1
        self.input_size = tuple(input_size)
        self.patch_stride = patch_stride
        self.q_pool, self.q_stride = q_pool, q_stride
        self.mu_size, self.mask_unit_size = math.prod(mask_unit_size), mask_unit_size
        self.stage_ends = [sum(stages[:i]) - 1 for i in range(1, len(stages) + 1)]
        self.sep_pos_embed, self.abs_win = sep_pos_embed, abs_win
        self.dynamic_size, self.grad_checkpointing = dynamic_size, grad_checkpointing
        check_settings(input_size, stages, q_pool, q_stride, mask_unit_size, mask_unit_attn,
                       patch_kernel, patch_stride, patch_padding)  # fmt: skip
        self._pooled_unit = tuple(stride**steps for stride in q_stride)  # what the whole unroll schedule divides by
        self.tokens_spatial_shape = token_grid("input_size", input_size, patch_stride, self._pooled_unit)
        self.mask_spatial_shape = self._unit_grid(self.tokens_spatial_shape)

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_kernel, patch_stride, patch_padding)
        self._make_pos_embed(embed_dim, global_pos_size)
        schedule = [q_stride] * steps
        self.unroll = Unroll(input_size, patch_stride, schedule)
        self.reroll = Reroll(input_size, patch_stride, schedule, self.stage_ends, q_pool)

        pooling_blocks = [end + 1 for end in self.stage_ends[:q_pool]]
        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        stage, window_size, flat_stride = 0, self.mu_size, math.prod(q_stride)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            dim_out = embed_dim
            # The first block of a stage pools its queries, but its keys are still the previous stage's tokens: it
            # attends as that stage does.
            windowed = mask_unit_attn[stage]
            if i - 1 in self.stage_ends:
                dim_out, num_heads = int(embed_dim * dim_mul), int(num_heads * head_mul)
                stage += 1
                if i in pooling_blocks:
                    window_size //= flat_stride
            if windowed and window_size == 0:
                raise ValueError(
                    f"mask_unit_size={tuple(mask_unit_size)} is pooled away before block {i}, where "
                    f"mask_unit_attn={tuple(mask_unit_attn)} wants windows"
                )
            self.blocks.append(
                HieraBlock(
                    dim=embed_dim,
                    dim_out=dim_out,
                    heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    drop_path=drop_path[i],
                    norm_layer=norm_layer,
                    q_stride=flat_stride if i in pooling_blocks else 1,
                    window_size=window_size,
                    use_mask_unit_attn=windowed,
                    layer_scale=layer_scale,
                    expand_proj=expand_proj,
                )
            )
            embed_dim = dim_out
        self._window_tokens = window_tokens(self.blocks)
        self._check_windows("input_size", self.input_size, self.tokens_spatial_shape)
        self.norm = norm_layer(embed_dim)
        self.head = Head(embed_dim, num_classes, dropout_rate=head_dropout)

        for name in self.no_weight_decay():
            nn.init.trunc_normal_(getattr(self, name), std=0.02)
        self.apply(_init_weights)
        self.head.projection.weight.data.mul_(head_init_scale)
        self.head.projection.bias.data.mul_(head_init_scale)

    def _make_pos_embed(self, embed_dim: int, global_pos_size: Sequence[int] | None) -> None:
        grid = self.tokens_spatial_shape
        if self.sep_pos_embed:
            if len(grid) != 3 or self.abs_win:
                raise ValueError(
                    "sep_pos_embed=True is for 3-D inputs without abs_win; got "
                    f"input_size={self.input_size}, abs_win={self.abs_win}"
                )
            self.pos_embed_spatial = nn.Parameter(torch.zeros(1, grid[1] * grid[2], embed_dim))
            self.pos_embed_temporal = nn.Parameter(torch.zeros(1, grid[0], embed_dim))
        elif self.abs_win:
            if global_pos_size is None:
                global_pos_size = (grid[0], 14, 14) if len(grid) == 3 else (14,) * len(grid)
            if len(global_pos_size) != len(grid):
                raise ValueError(f"global_pos_size must have {len(grid)} entries, got {tuple(global_pos_size)}")
            if any(n % unit for n, unit in zip(grid, self.mask_unit_size, strict=True)):
                raise ValueError(does_not_tile("input_size", self.input_size, self._whole_units()))
            self.pos_embed = nn.Parameter(torch.zeros(1, embed_dim, *global_pos_size))
            self.pos_embed_window = nn.Parameter(torch.zeros(1, embed_dim, *self.mask_unit_size))
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(grid), embed_dim))

    def no_weight_decay(self) -> list[str]:
        """Names of the parameters that an optimizer should not decay: the position embeddings."""
        if self.sep_pos_embed:
            return ["pos_embed_spatial", "pos_embed_temporal"]
        return ["pos_embed", "pos_embed_window"] if self.abs_win else ["pos_embed"]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward and compute the rest again: less memory, the same gradients."""
        self.grad_checkpointing = enable

    def load_pretrained(self, source, strict: bool = True, source_size: Sequence[int] | None = None) -> LoadReport:
        """Load published or own weights into this model, resizing position embeddings where sizes differ.

        See :func:`hiera.checkpoint_loading.load_weights`.
        """
        return load_weights(self, source, strict=strict, source_size=source_size)

    def token_grid(self, x: torch.Tensor) -> list[int]:
        """Tokens per dimension for an input [B, in_chans, *size].

        Raises:
            ValueError: if `x` has another number of dimensions, another size than `input_size` (without
                `dynamic_size`), or one that does not tile into mask units.
        """
        dims = len(self.tokens_spatial_shape)
        if x.ndim != dims + 2:
            raise ValueError(f"x must be [batch, channels, {dims} lengths], got shape {tuple(x.shape)}")
        size = tuple(x.shape[2:])
        if size == self.input_size:
            return self.tokens_spatial_shape
        if not self.dynamic_size:
            raise ValueError(
                f"x has size {size}, the model takes {self.input_size}; build it with input_size={size} "
                "(and load_pretrained), or with dynamic_size=True"
            )
        grid = token_grid("x's size", size, self.patch_stride, self._pooled_unit)
        self._check_windows("x's size", size, grid)
        return grid

    def get_random_mask(self, x: torch.Tensor, mask_ratio: float) -> torch.Tensor:
        """Choose mask units to keep at random, the same number in every row.

        Args:
            x: The input [B, in_chans, *size]; gives batch, size and device.
            mask_ratio: Fraction to *remove*; `int(units * (1 - mask_ratio))` are kept.

        Returns:
            bool [B, units], True is *keep*.
        """
        units = math.prod(self._unit_grid(self.token_grid(x)))
        noise = torch.rand(x.shape[0], units, device=x.device)
        # The units with the smallest noise stay; a unit's rank is its position in the sorted noise.
        rank = torch.argsort(torch.argsort(noise, dim=1), dim=1)
        return rank < self.units_kept(units, mask_ratio)

    def units_kept(self, units: int, mask_ratio: float) -> int:
        """How many of `units` mask units :meth:`get_random_mask` keeps."""
        return int(units * (1 - mask_ratio))

    def get_pos_embed(self, grid: Sequence[int] | None = None) -> torch.Tensor:
        """Position embedding [1, prod(grid), C] in row-major spatial order; `grid` defaults to that of `input_size`."""
        trained = self.tokens_spatial_shape
        grid = trained if grid is None else grid
        if self.abs_win:
            return absolute_win_pos_embed(self.pos_embed, self.pos_embed_window, grid)
        if self.sep_pos_embed:
            return separable_pos_embed(
                resize_pos_embed(self.pos_embed_spatial, trained[1:], grid[1:]),
                resize_pos_embed(self.pos_embed_temporal, trained[:1], grid[:1]),
            )
        return resize_pos_embed(self.pos_embed, trained, grid)

    def embed_tokens(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Patch embedding, position embedding, unrolling, and dropping what is masked.

        Args:
            x: [B, in_chans, *size].
            mask: bool [B, units], True is *keep*: pixels of the others are zero before the convolution.
            keep: int64 [B, kept], the kept mask units, ascending; without `mask` it implies one. None keeps all
                tokens.

        Returns:
            [B, N, C] unrolled, or [B, kept * mu_size, C] unrolled over the kept mask units.
        """
        grid = self.token_grid(x)
        unit_grid = self._unit_grid(grid)
        if mask is None and keep is not None:
            mask = torch.zeros(x.shape[0], math.prod(unit_grid), dtype=torch.bool, device=x.device).scatter(
                1, keep, True
            )
        x = self.patch_embed(x, mask=None if mask is None else mask.view(x.shape[0], 1, *unit_grid))
        x = self.unroll(x + self.get_pos_embed(grid), **self._unless_default(grid))
        return x if keep is None else gather_units(x, keep, math.prod(unit_grid))

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        return_intermediates: bool = False,
        len_keep: int | None = None,
    ):
        """Classify, or encode the visible mask units.

        Args:
            x: [B, in_chans, *size] (or a list whose first element that is).
            mask: bool [B, units], True is *keep*; every row keeps the same number. Units in row-major order.
            return_intermediates: Also return the output of each stage.
            len_keep: Number of units that every row of `mask` keeps. Given, nothing waits for the device, and the
                whole forward compiles as one graph; the caller vouches for it (checked on the CPU, outside
                compilation). Without it the number is read from `mask`: one host synchronisation, and under
                `torch.compile` a graph break, before anything else runs.

        Returns:
            Without a mask [B, num_classes]: logits in training, probabilities in eval mode. With one the tokens
            [B, N', C] of the last block, unrolled. With `return_intermediates` a tuple with the list of stage
            outputs: [B, *grid, C], or [B, kept, *unit_size, C] with a mask.

        Raises:
            ValueError: for a size or a mask that does not fit; rows that keep unequal numbers; and a mask where
                `mask_unit_size` is not the product of the pooling strides. There upstream runs, but the tokens it
                discards are not those whose pixels it has set to zero: it would compute nonsense in silence.
            TypeError: if `mask` is not boolean.
        """
        if isinstance(x, (list, tuple)):
            x = x[0]
        grid, keep = self.token_grid(x), None
        if mask is not None:
            keep = kept_units(mask, self.check_mask(mask, x, len_keep))
        x = self.embed_tokens(x, mask, keep)

        intermediates = []
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x)
            if return_intermediates and i in self.stage_ends:
                intermediates.append(self.reroll(x, i, mask=mask, **self._unless_default(grid)))
        if mask is None:
            x = self.head(self.norm(x.mean(dim=1)))
        return (x, intermediates) if return_intermediates else x

    def check_mask(self, mask: torch.Tensor, x: torch.Tensor, len_keep: int | None = None) -> int:
        """The number of mask units that `mask` keeps per row, after checking it; see :meth:`forward`."""
        self.check_mask_units()
        units = math.prod(self._unit_grid(self.token_grid(x)))
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True is keep), got {mask.dtype}")
        if mask.shape != (x.shape[0], units):
            raise ValueError(f"mask must be [batch, mask units] = {(x.shape[0], units)}, got {tuple(mask.shape)}")
        if len_keep is None:
            return count_kept(mask)  # torch.compile(fullgraph=True) stops here: give len_keep=
        if not 1 <= len_keep <= units:
            raise ValueError(f"len_keep must be 1 to {units}, got {len_keep}")
        free = mask.device.type == "cpu" and not torch.compiler.is_compiling()  # costs no synchronisation
        if free and mask.shape[0] and count_kept(mask) != len_keep:
            raise ValueError(f"len_keep={len_keep}, but the rows of mask keep {count_kept(mask)} mask units")
        return len_keep

    def check_mask_units(self) -> None:
        """Raise ValueError where the tokens of a mask unit are not those of its pixels; see :meth:`forward`."""
        if tuple(self.mask_unit_size) != self._pooled_unit:
            raise ValueError(
                f"masks need mask_unit_size = q_stride ** (len(stages) - 1) = {self._pooled_unit}, this model has "
                f"{tuple(self.mask_unit_size)}: tokens and pixels would be masked in different places"
            )

    def run_block(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """One block, checkpointed where that is switched on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _unit_grid(self, grid: Sequence[int]) -> list[int]:
        return [n // unit for n, unit in zip(grid, self.mask_unit_size, strict=True)]

    def _whole_units(self) -> list[int]:
        """Pixels per dimension of what tiles in every respect."""
        return [
            stride * math.lcm(pooled, unit)
            for stride, pooled, unit in zip(self.patch_stride, self._pooled_unit, self.mask_unit_size, strict=True)
        ]

    def _check_windows(self, name: str, size: Sequence[int], grid: Sequence[int]) -> None:
        units_tile = all(n % unit == 0 for n, unit in zip(grid, self.mask_unit_size, strict=True))
        if math.prod(grid) % self._window_tokens or (self.abs_win and not units_tile):
            raise ValueError(does_not_tile(name, size, self._whole_units()))

    def _unless_default(self, grid: Sequence[int]) -> dict:
        """`size=` for unroll and reroll, only where it is not the one they were built for."""
        return {} if list(grid) == self.tokens_spatial_shape else {"size": grid}


def _norm_maker(norm_layer: str | Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return partial(getattr(nn, norm_layer), eps=1e-6) if isinstance(norm_layer, str) else norm_layer


def _init_weights(module: nn.Module, init_bias: float = 0.02) -> None:
    if isinstance(module, (nn.Linear, *CONV.values())):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.constant_(module.bias, init_bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.constant_(module.bias, init_bias)
        nn.init.constant_(module.weight, 1.0)

"""Masked autoencoder pre-training of Hiera: arXiv 2306.00989 section 3, after arXiv 2111.06377.

Names and results are those of hiera-transformer 0.1.4, `hiera_mae.py`. What is different is how: visible and masked
tokens are addressed by index, with counts that are known beforehand, where upstream uses boolean masks, which wait
for the device and break a compiled graph.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from hiera.block import CONV, HieraBlock
from hiera.model import Hiera, _norm_maker
from hiera.position import resize_pos_embed
from hiera.tokens import count_kept, kept_units, undo_windowing


class MaskedAutoencoderHiera(Hiera):
    """Hiera as encoder of the visible mask units, and a small transformer that predicts the pixels of the others.

    Args:
        in_chans, patch_stride, mlp_ratio, norm_layer: As for :class:`hiera.Hiera`; the decoder uses them too.
        decoder_embed_dim, decoder_depth, decoder_num_heads: Of the decoder.
        **kwargs: Everything else that :class:`hiera.Hiera` takes.

    Raises:
        ValueError: for settings that cannot be trained: `mask_unit_size` other than `q_stride ** (len(stages) - 1)`;
            pixels of a token that are not square; a pooling in time.
    """

    def __init__(
        self,
        in_chans: int = 3,
        patch_stride=(4, 4),
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_layer: str | Callable[[int], nn.Module] = "LayerNorm",
        **kwargs,
    ):
        super().__init__(
            in_chans=in_chans, patch_stride=patch_stride, mlp_ratio=mlp_ratio, norm_layer=norm_layer, **kwargs
        )
        self.config.update(
            decoder_embed_dim=decoder_embed_dim, decoder_depth=decoder_depth, decoder_num_heads=decoder_num_heads
        )
        self.check_mask_units()
        self._check_targets()
        norm_layer = _norm_maker(norm_layer)
        del self.norm, self.head
        dim = self.blocks[-1].dim_out
        pooled = [stride**self.q_pool for stride in self.q_stride]
        self.encoder_norm = norm_layer(dim)
        self.mask_unit_spatial_shape_final = [n // p for n, p in zip(self.mask_unit_size, pooled, strict=True)]
        self.tokens_spatial_shape_final = self._final_grid(self.tokens_spatial_shape)

        # A stage that pools later is brought to the final resolution by a convolution over its future token.
        self.multi_scale_fusion_heads = nn.ModuleList()
        for stage, end in enumerate(self.stage_ends[: self.q_pool]):
            kernel = [stride ** (self.q_pool - stage) for stride in self.q_stride]
            conv = CONV[len(kernel)](self.blocks[end].dim_out, dim, kernel_size=kernel, stride=kernel)
            self.multi_scale_fusion_heads.append(conv)
        self.multi_scale_fusion_heads.append(nn.Identity())

        self.decoder_embed = nn.Linear(dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        positions = math.prod(self.tokens_spatial_shape_final)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, positions, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            HieraBlock(
                dim=decoder_embed_dim,
                dim_out=decoder_embed_dim,
                heads=decoder_num_heads,
                norm_layer=norm_layer,
                mlp_ratio=mlp_ratio,
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        # Side of the square of pixels that one token predicts.
        self.pred_stride = patch_stride[-1] * pooled[-1]
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.pred_stride ** min(2, len(self.q_stride)) * in_chans)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Draw the initial weights: Xavier for linear layers and for the patch embedding (as the linear map it is)."""
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.decoder_pos_embed, std=0.02)
        self.apply(_init_mae_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))

    def get_pixel_label_2d(
        self, input_img: torch.Tensor, mask: torch.Tensor, norm: bool = True, num_masked: int | None = None
    ) -> torch.Tensor:
        """Pixels of the masked tokens of pictures.

        Args:
            input_img: [B, in_chans, H, W].
            mask: bool [B, tokens] at the resolution of the prediction; True is *masked*, equally many in every row.
            norm: Normalise each token's pixels to mean 0 and (unbiased) variance 1.
            num_masked: That number; without it, it is read from `mask` (one synchronisation).

        Returns:
            [B * num_masked, in_chans * pred_stride ** 2], channels slowest, rows in row-major order (batch, token).
        """
        s = self.pred_stride
        patches = input_img.unfold(2, s, s).unfold(3, s, s)  # [B, C, h, w, s, s]
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
        return _label(patches, mask, norm, num_masked)

    def get_pixel_label_3d(
        self, input_vid: torch.Tensor, mask: torch.Tensor, norm: bool = True, num_masked: int | None = None
    ) -> torch.Tensor:
        """Pixels of the masked tokens of videos: of the frames that a token covers only the first is predicted.

        Args:
            input_vid: [B, in_chans, T, H, W].
            mask, norm, num_masked: See :meth:`get_pixel_label_2d`.

        Returns:
            [B * num_masked, pred_stride ** 2 * in_chans], channels *fastest*: so were the published models trained.
        """
        s = self.pred_stride
        patches = input_vid[:, :, :: self.patch_stride[0]].unfold(3, s, s).unfold(4, s, s)  # [B, C, t, h, w, s, s]
        patches = patches.permute(0, 2, 3, 4, 5, 6, 1).flatten(1, 3).flatten(2)
        return _label(patches, mask, norm, num_masked)

    def forward_encoder(
        self, x: torch.Tensor, mask_ratio: float, mask: torch.Tensor | None = None, len_keep: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the visible mask units and fuse the stages.

        Args:
            x: [B, in_chans, *size].
            mask_ratio: Fraction of mask units to hide, where `mask` is None.
            mask: bool [B, units], True is *keep*. Default: drawn by :meth:`get_random_mask`.
            len_keep: Number of units that every row of `mask` keeps; see :meth:`hiera.Hiera.forward`.

        Returns:
            ([B, kept, *mask_unit_spatial_shape_final, C], mask).
        """
        if mask is None:
            mask = self.get_random_mask(x, mask_ratio)
            len_keep = self.units_kept(mask.shape[1], mask_ratio)
        _, stages = super().forward(x, mask, return_intermediates=True, len_keep=len_keep)
        # Stages after the last pooling have one resolution; only the last of them is used.
        stages = stages[: self.q_pool] + stages[-1:]
        fused = apply_fusion_head(self.multi_scale_fusion_heads[0], stages[0])
        for head, stage in zip(self.multi_scale_fusion_heads[1:], stages[1:], strict=True):
            fused = fused + apply_fusion_head(head, stage)
        return self.encoder_norm(fused), mask

    def forward_decoder(self, x: torch.Tensor, mask: torch.Tensor, grid=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the pixels of every token.

        Args:
            x: What :meth:`forward_encoder` returns, [B, kept, *mask_unit_spatial_shape_final, C].
            mask: bool [B, units], True where `x` has the unit; `kept` in every row.
            grid: Token grid of the input, where it is not that of `input_size`.

        Returns:
            (prediction [B, tokens, pixels], mask [B, tokens] at that resolution), in row-major spatial order.
        """
        x = self.decoder_embed(x)
        grid = self._final_grid(self.tokens_spatial_shape if grid is None else grid)
        unit = self.mask_unit_spatial_shape_final
        B, kept, C = x.shape[0], x.shape[1], x.shape[-1]

        # A mask token everywhere, then the visible units over it.
        dtype = torch.promote_types(x.dtype, self.mask_token.dtype)
        tokens = self.mask_token.to(dtype)[:, :, None].expand(B, mask.shape[1], math.prod(unit), C)
        where = kept_units(mask, kept)[:, :, None, None].expand(B, kept, math.prod(unit), C)
        tokens = tokens.scatter(1, where, x.reshape(B, kept, -1, C).to(dtype))
        tokens = undo_windowing(tokens.view(B, mask.shape[1], *unit, C), grid, unit).flatten(1, -2)
        visible = mask[:, :, None, None].expand(-1, -1, math.prod(unit), 1).reshape(B, mask.shape[1], *unit, 1)
        visible = undo_windowing(visible, grid, unit).flatten(1)

        x = tokens + resize_pos_embed(self.decoder_pos_embed, self.tokens_spatial_shape_final, grid)
        for block in self.decoder_blocks:
            x = self.run_block(block, x)
        return self.decoder_pred(self.decoder_norm(x)), visible

    def forward_loss(
        self, x: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor, num_masked: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean squared error of the masked tokens' normalised pixels.

        Args:
            x: The input [B, in_chans, *size].
            pred: [B, tokens, pixels].
            mask: bool [B, tokens], True is *masked*, the same number in every row.
            num_masked: That number; without it, it is read from `mask` (one synchronisation).

        Returns:
            (loss, prediction, label): a scalar and two [B * num_masked, pixels].

        Raises:
            NotImplementedError: for 1-D inputs, which have no pixel label.
        """
        if num_masked is None:
            num_masked = count_kept(mask)
        labels = {2: self.get_pixel_label_2d, 3: self.get_pixel_label_3d}
        if len(self.q_stride) not in labels:
            raise NotImplementedError(f"pixel labels exist for pictures and videos, not for q_stride={self.q_stride}")
        label = labels[len(self.q_stride)](x, mask, num_masked=num_masked)
        pred = _take(pred, mask, num_masked)
        return ((pred - label) ** 2).mean(), pred, label

    def forward(
        self,
        x: torch.Tensor,
        mask_ratio: float = 0.6,
        mask: torch.Tensor | None = None,
        len_keep: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One pre-training pass.

        Args:
            x: Pictures [B, in_chans, H, W] or videos [B, in_chans, T, H, W].
            mask_ratio: Fraction of mask units to hide. Source of the defaults: 0.6 for pictures, 0.9 for videos.
            mask: bool [B, units], True is *keep*; instead of a random one.
            len_keep: Number of units that every row of `mask` keeps. With a random mask it is known. With a given
                mask and without `len_keep`, it is read here first: one synchronisation, before the encoder runs
                (under `torch.compile` a graph break in front of the one graph; `fullgraph=True` then needs
                `len_keep`).

        Returns:
            (loss, prediction, label, mask): a scalar, two [B * masked tokens, pixels], and the bool [B, units] used.

        Raises:
            ValueError: if the rows of `mask` keep unequal numbers, or it does not fit; see
                :meth:`hiera.Hiera.forward`.
        """
        if mask is not None:
            len_keep = self.check_mask(mask, x, len_keep)
        latent, mask = self.forward_encoder(x, mask_ratio, mask=mask, len_keep=len_keep)
        pred, visible = self.forward_decoder(latent, mask, grid=self.token_grid(x))
        hidden = (mask.shape[1] - latent.shape[1]) * math.prod(self.mask_unit_spatial_shape_final)
        loss, pred, label = self.forward_loss(x, pred, ~visible, num_masked=hidden)
        return loss, pred, label, mask

    def _final_grid(self, grid) -> list[int]:
        return [n // stride**self.q_pool for n, stride in zip(grid, self.q_stride, strict=True)]

    def _check_targets(self) -> None:
        pooled = [stride**self.q_pool for stride in self.q_stride]
        pixels = [p * s for p, s in zip(pooled, self.patch_stride, strict=True)]
        if (len(pixels) > 1 and pixels[-1] != pixels[-2]) or (len(pixels) == 3 and pooled[0] != 1):
            raise ValueError(
                f"a token must predict a square of pixels of one frame; patch_stride={tuple(self.patch_stride)} with "
                f"q_stride={tuple(self.q_stride)} and q_pool={self.q_pool} gives {tuple(pixels)}"
            )


def apply_fusion_head(head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution to each mask unit, [B, units, *unit, C] -> [B, units, *unit', C']; Identity does nothing."""
    if isinstance(head, nn.Identity):
        return x
    return head(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1).unflatten(0, x.shape[:2])


def _take(x: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """`x[mask]` for [B, N, P], where every row of mask has `count` True: [B * count, P]."""
    where = kept_units(mask, count)[:, :, None].expand(-1, -1, x.shape[2])
    return x.gather(1, where).flatten(0, 1)


def _label(patches: torch.Tensor, mask: torch.Tensor, norm: bool, num_masked: int | None) -> torch.Tensor:
    label = _take(patches, mask, count_kept(mask) if num_masked is None else num_masked)
    if norm:
        mean, var = label.mean(dim=-1, keepdim=True), label.var(dim=-1, keepdim=True)
        label = (label - mean) / (var + 1.0e-6) ** 0.5
    return label


def _init_mae_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.constant_(module.bias, 0)
    elif isinstance(module, nn.LayerNorm):
        nn.init.constant_(module.bias, 0)
        nn.init.constant_(module.weight, 1.0)

"""The demo's two pictures: loss curves on top of each other, and what the model sees and fills in."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STOCK, ACCELERATED = "#d1495b", "#00798c"


@torch.no_grad()
def reconstruct(model, images: Tensor, mask_ratio: float, seed: int) -> tuple[Tensor, Tensor]:
    """What a masked autoencoder makes of `images`.

    The model predicts pixels normalised per patch (arXiv 2111.06377, section 3), so each predicted patch is given the
    mean and the deviation of the true one before it is shown, as the authors of MAE do in their pictures.

    Args:
        model: a `MaskedAutoencoderHiera` over 2-D images.
        images: [B, 3, H, W], float.
        mask_ratio: fraction of mask units hidden from the model.
        seed: of the random mask.

    Returns:
        masked [B, 3, H, W], the hidden units at the images' mean; filled [B, 3, H, W], the predictions in their place.
    """
    torch.manual_seed(seed)
    latent, mask = model.forward_encoder(images, mask_ratio)
    predicted, visible = model.forward_decoder(latent, mask)
    side = model.pred_stride
    rows, columns = (size // side for size in images.shape[2:])
    # [B, rows, columns, 3, side, side]
    patches = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    flat = patches.flatten(3)
    deviation = (flat.var(-1, keepdim=True) + 1e-6).sqrt()
    predicted = predicted.float().view_as(flat) * deviation + flat.mean(-1, keepdim=True)

    def compose(tokens: Tensor) -> Tensor:
        shown = torch.where(visible.view(-1, rows, columns, 1), flat, tokens)
        return shown.view_as(patches).permute(0, 3, 1, 4, 2, 5).reshape_as(images)

    return compose(flat.mean((1, 2, 3), keepdim=True).expand_as(flat)), compose(predicted)


def draw_reconstruction(path: Path, rows: list[tuple[str, Tensor]]) -> None:
    """One row of pictures per (name, images [B, 3, H, W] in 0..1)."""
    count = len(rows[0][1])
    figure, axes = plt.subplots(len(rows), count, figsize=(1.9 * count, 2.0 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.float().clamp(0, 1).permute(1, 2, 0).cpu().numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_loss(path: Path, stock: list[float], accelerated: list[float], stock_ms: float, accelerated_ms: float) -> None:
    """Both loss curves in one frame, and below them how far they are apart."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1))
    steps = range(1, len(stock) + 1)
    above.plot(steps, stock, color=STOCK, linewidth=5, alpha=0.45, label=f"stock, {stock_ms:.0f} ms a step")
    above.plot(
        steps, accelerated, color=ACCELERATED, linewidth=1.4, label=f"accelerated, {accelerated_ms:.0f} ms a step"
    )
    above.set_ylabel("MAE loss (normalised pixels)")
    above.legend()
    # A difference of exactly zero has no place on a logarithmic axis: it is drawn at the bottom, one float32 rounding.
    apart = [max(abs(a - b) / abs(a), 2.0**-24) for a, b in zip(stock, accelerated, strict=True)]
    below.semilogy(steps, apart, color="#444444", linewidth=1)
    below.set_ylabel("relative\ndifference")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.suptitle("Stock and accelerated from the same seed, on the same batches")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

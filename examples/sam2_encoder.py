"""Train SAM 2's image encoder: `python -m examples.sam2_encoder`. Needs sam2 and its hydra-core and iopath.

On a GPU: `python -m examples.sam2_encoder --device cuda --variant b+ --size 1024 --batch 4`. Distillation of random
features stands for a real objective, random weights for a checkpoint (`build_sam2(config, checkpoint)`).
"""

import argparse

import torch
import torch.nn.functional as F
from sam2.build_sam import build_sam2

from examples.side_by_side import compare


def main(arguments=None):
    """Print stock against accelerated; returns both lists of losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="t", choices=("t", "s", "b+", "l"))
    parser.add_argument("--size", type=int, nargs="+", default=[64, 96], help="height and width, multiples of 32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    size = tuple(options.size) if len(options.size) == 2 else (options.size[0],) * 2

    torch.manual_seed(0)
    config = f"configs/sam2.1/sam2.1_hiera_{options.variant}.yaml"
    model = build_sam2(config, device=options.device, mode="train").image_encoder
    pictures = torch.randn(options.batch, 3, *size, device=options.device)
    with torch.no_grad():
        targets = [torch.randn_like(level) for level in model(pictures)["backbone_fpn"]]

    def loss_of(model):
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            levels = model(pictures)["backbone_fpn"]
        return sum(F.mse_loss(level.float(), target) for level, target in zip(levels, targets, strict=True))

    return compare(model, loss_of, options.steps)


if __name__ == "__main__":
    main()

"""Fine-tune timm's Hiera with one line more: `python -m examples.finetune_timm`. Needs timm.

On a GPU: `python -m examples.finetune_timm --device cuda --model hiera_base_224 --size 224 --batch 64`. Random pictures
stand for yours, random weights for `pretrained=True`.
"""

import argparse

import timm
import torch
import torch.nn.functional as F

from examples.side_by_side import compare


def main(arguments=None):
    """Print stock against accelerated; returns both lists of losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="hiera_tiny_224")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 96], help="height and width, multiples of 32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    size = tuple(options.size) if len(options.size) == 2 else (options.size[0],) * 2

    torch.manual_seed(0)
    model = timm.create_model(options.model, img_size=size, num_classes=10, drop_path_rate=0.1).to(options.device)
    pictures = torch.randn(options.batch, 3, *size, device=options.device)
    labels = torch.arange(options.batch, device=options.device) % 10

    def loss_of(model):
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            return F.cross_entropy(model(pictures), labels, label_smoothing=0.1)

    return compare(model, loss_of, options.steps)


if __name__ == "__main__":
    main()

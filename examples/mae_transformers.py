"""Pre-train Hugging Face's Hiera as a masked autoencoder: `python -m examples.mae_transformers`. Needs transformers.

On a GPU: `python -m examples.mae_transformers --device cuda --size 224 --batch 64 --depths 2 3 16 3`. Random pictures
stand for yours; with weights, `HieraForPreTraining.from_pretrained("facebook/hiera-base-224-mae-hf")`.
"""

import argparse

import torch
from transformers import HieraConfig, HieraForPreTraining

from examples.side_by_side import compare


def main(arguments=None):
    """Print stock against accelerated; returns both lists of losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=96, help="height and width, a multiple of 32")
    parser.add_argument("--depths", type=int, nargs=4, default=[1, 1, 2, 1])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    config = HieraConfig(
        image_size=(options.size, options.size),
        depths=options.depths,
        num_query_pool=2,
        mask_ratio=0.6,
        decoder_hidden_size=512,
        decoder_depth=max(options.depths) // 2,
        decoder_num_heads=16,
    )
    model = HieraForPreTraining(config).to(options.device).train()
    pictures = torch.randn(options.batch, 3, options.size, options.size, device=options.device)

    def loss_of(model):
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            return model(pixel_values=pictures).loss  # draws its own mask

    return compare(model, loss_of, options.steps)


if __name__ == "__main__":
    main()

"""The models of the families: timm, transformers and SAM 2, and what `accelerate` is expected to replace in each.

`build(name, ...)` makes the real class of the real package. With `small=True` at a small width, else at the published
width with few blocks. Weights are random, none of them zero or all alike, so that every one of them counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tests.upstream import load

# Blocks in each stage, where not the published number: one, but two where attention may be global.
FEW = (1, 1, 2, 1)

# name: (published blocks in each stage, published width, heads, what else the variant sets)
TIMM_HIERA = {
    "hiera_tiny_224": ((1, 2, 7, 2), 96, 1, {}),
    "hiera_small_224": ((1, 2, 11, 2), 96, 1, {}),
    "hiera_base_224": ((2, 3, 16, 3), 96, 1, {}),
    "hiera_base_plus_224": ((2, 3, 16, 3), 112, 2, {}),
    "hiera_large_224": ((2, 6, 36, 4), 144, 2, {}),
    "hiera_huge_224": ((2, 6, 36, 4), 256, 4, {}),
    "hiera_small_abswin_256": ((1, 2, 11, 2), 96, 1, {}),
    "hiera_base_abswin_256": ((2, 3, 16, 3), 96, 1, {}),
}
# window sizes of the stages, and the blocks with global attention of the published depth
SAM2 = {
    "tiny": ((1, 2, 7, 2), 96, 1, {"windows": (8, 4, 14, 7), "global": (5, 7, 9)}),
    "small": ((1, 2, 11, 2), 96, 1, {"windows": (8, 4, 14, 7), "global": (7, 10, 13)}),
    "base_plus": ((2, 3, 16, 3), 112, 2, {"windows": (8, 4, 14, 7), "global": (12, 16, 20)}),
    "large": ((2, 6, 36, 4), 144, 2, {"windows": (8, 4, 16, 8), "global": (23, 33, 43)}),
}
SAM2_CONFIGS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
# The published decoder of masked autoencoders, but for its depth, and a small one.
DECODER = {"decoder_hidden_size": 512, "decoder_depth": 2, "decoder_num_heads": 16}
SMALL_DECODER = {"decoder_hidden_size": 16, "decoder_depth": 2, "decoder_num_heads": 2}


@dataclass
class Family:
    """One model: how it is built, what is expected to be replaced in it, and what is expected to be named as left."""

    build: Callable  # (stages, small, size) -> model
    stages: tuple[int, ...]
    replaced: Callable  # stages -> paths
    skipped: tuple[str, ...] = ()
    call: Callable | None = None
    dynamic_size: bool = True  # whether one model takes images of several sizes


def _width(small, width, heads):
    return (8, 1) if small else (width, heads)


def _ordered_blocks(stages, prefix=""):
    return {f"{prefix}unroll", f"{prefix}reroll"} | _blocks_and_attention(stages, f"{prefix}blocks.")


def _blocks_and_attention(stages, prefix):
    return {f"{prefix}{i}{end}" for i in range(sum(stages)) for end in ("", ".attn")}


def _window_blocks(prefix):
    return lambda stages: _blocks_and_attention(stages, f"{prefix}blocks.")


def _timm_hiera(name):
    published, width, heads, _ = TIMM_HIERA[name]

    def build(stages, small, size, **settings):
        embed_dim, num_heads = _width(small, width, heads)
        sizes = dict(stages=stages, embed_dim=embed_dim, num_heads=num_heads, num_classes=7, img_size=size)
        return load("timm").create_model(name, **{**sizes, **settings})

    return Family(build, published, _ordered_blocks, dynamic_size=False)


def _timm_sam2(name, variant):
    published, width, heads, settings = SAM2[variant]

    def build(stages, small, size=None, **more):
        embed_dim, num_heads = _width(small, width, heads)
        sizes = dict(stages=stages, embed_dim=embed_dim, num_heads=num_heads, num_classes=7)
        return load("timm").create_model(
            name, **{**sizes, "global_att_blocks": global_blocks(stages, published, settings), **more}
        )

    return Family(build, published, _window_blocks(""))


def global_blocks(stages, published, settings):
    """The published ones, or in a model of few blocks the last of stage 3."""
    return settings["global"] if stages == published else (sum(stages[:3]) - 1,)


def _sam2(variant, folder):
    published, width, heads, settings = SAM2[variant]

    def build(stages, small, size=None, **more):
        load("sam2.modeling.backbones.hieradet")
        embed_dim, num_heads = _width(small, width, heads)
        trunk = {"stages": list(stages), "embed_dim": embed_dim, "num_heads": num_heads}
        if stages != published:
            trunk["global_att_blocks"] = list(global_blocks(stages, published, settings))
        trunk.update(more)
        config = load("omegaconf").OmegaConf.load(_config(variant, folder)).model.image_encoder.trunk
        return load("hydra.utils").instantiate(config, **trunk)

    return Family(build, published, _window_blocks(""))


def _config(variant, folder):
    root = load("sam2").__path__[0]
    return f"{root}/configs/{folder}/{folder}_hiera_{SAM2_CONFIGS[variant]}.yaml"


def _transformers_hiera(class_name, prefix, skipped, **fixed):
    published, width, heads, _ = TIMM_HIERA["hiera_base_224"]
    mae = class_name == "HieraForPreTraining"

    def build(stages, small, size, **more):
        transformers = load("transformers")
        embed_dim, num_heads = _width(small, width, heads)
        config = dict(depths=stages, embed_dim=embed_dim, num_heads=[num_heads * 2**i for i in range(4)])
        if mae:
            config.update(SMALL_DECODER if small else DECODER, num_query_pool=2)
        config = transformers.HieraConfig(**{**config, "image_size": size, **fixed, **more})
        return getattr(transformers, class_name)(config)

    def replaced(stages):
        decoder = _blocks_and_attention((2,) if mae else (), "decoder.decoder_block.layers.")
        layers = [_blocks_and_attention((n,), f"{prefix}encoder.stages.{s}.layers.") for s, n in enumerate(stages)]
        return {f"{prefix}encoder"}.union(decoder, *layers)

    return Family(build, published, replaced, skipped, call=_masked if mae else _labelled, dynamic_size=False)


def _labelled(model, x, **keywords):
    return model(x, output_hidden_states=True, **keywords)


def _masked(model, x, **keywords):
    units = math.prod(model.config.image_size) // 32**2
    noise = torch.rand(x.shape[0], units, generator=torch.Generator().manual_seed(4))
    return model(x, noise=noise, output_hidden_states=True, **keywords)


def sam2_backbone_config(variant, stages, small, **more):
    """transformers' configuration of a trunk."""
    published, width, heads, settings = SAM2[variant]
    embed_dim, num_heads = _width(small, width, heads)
    return load("transformers").models.sam2.Sam2HieraDetConfig(
        hidden_size=embed_dim,
        blocks_per_stage=list(stages),
        embed_dim_per_stage=[embed_dim * 2**i for i in range(4)],
        num_attention_heads_per_stage=[num_heads * 2**i for i in range(4)],
        window_size_per_stage=list(settings["windows"]),
        **{"global_attention_blocks": list(global_blocks(stages, published, settings)), **more},
    )


def _transformers_sam2(class_name, variant, prefix, call):
    published = SAM2[variant][0]

    def build(stages, small, size=None, **more):
        load("transformers.models.sam2_video.modeling_sam2_video")
        transformers = load("transformers")
        backbone = sam2_backbone_config(variant, stages, small, **more)
        if class_name == "Sam2HieraDetModel":
            return transformers.models.sam2.modeling_sam2.Sam2HieraDetModel(backbone)
        vision = transformers.Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=backbone.embed_dim_per_stage[::-1],
            backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        )
        if class_name == "Sam2VisionModel":
            return transformers.Sam2VisionModel(vision)
        parts = dict(vision_config=vision, prompt_encoder_config={"image_size": 128})
        config = {"Sam2Model": "Sam2Config", "Sam2VideoModel": "Sam2VideoConfig"}[class_name]
        return getattr(transformers, class_name)(getattr(transformers, config)(**parts))

    return Family(build, published, _window_blocks(prefix), call=call)


def _image_features(model, x):
    return model.get_image_features(x)


def _clicked(model, x):
    points = torch.tensor([[[[40.0, 70.0]]]], dtype=x.dtype).expand(x.shape[0], 1, 1, 2)
    return model(pixel_values=x, input_points=points)


FAMILIES: dict[str, Family] = {
    **{f"timm {name}": _timm_hiera(name) for name in TIMM_HIERA},
    **{f"timm sam2_hiera_{variant}": _timm_sam2(f"sam2_hiera_{variant}", variant) for variant in SAM2},
    "timm hieradet_small": _timm_sam2("hieradet_small", "small"),
    "transformers HieraModel": _transformers_hiera("HieraModel", "", ("",)),
    "transformers HieraForImageClassification": _transformers_hiera(
        "HieraForImageClassification", "hiera.", ("hiera",), num_labels=7
    ),
    "transformers HieraForPreTraining": _transformers_hiera("HieraForPreTraining", "hiera.", ("hiera",)),
    "transformers HieraBackbone": _transformers_hiera(
        "HieraBackbone", "", (), out_features=["stage1", "stage2", "stage3", "stage4"]
    ),
    **{
        f"transformers Sam2HieraDetModel {variant}": _transformers_sam2("Sam2HieraDetModel", variant, "", None)
        for variant in SAM2
    },
    "transformers Sam2VisionModel": _transformers_sam2("Sam2VisionModel", "tiny", "backbone.", None),
    "transformers Sam2Model": _transformers_sam2("Sam2Model", "tiny", "vision_encoder.backbone.", _clicked),
    "transformers Sam2VideoModel": _transformers_sam2(
        "Sam2VideoModel", "tiny", "vision_encoder.backbone.", _image_features
    ),
    **{f"sam2 {variant}": _sam2(variant, "sam2.1") for variant in SAM2},
    **{f"sam2.0 {variant}": _sam2(variant, "sam2") for variant in SAM2},
}


def build(name, stages=FEW, small=False, size=(64, 96), dtype=torch.float64, **settings):
    """A model of a family with random weights."""
    torch.manual_seed(11)
    model = FAMILIES[name].build(stages, small, size, **settings)
    randomise(model)
    return model.to(dtype)


@torch.no_grad()
def randomise(model):
    """Weights that keep the size of what they are applied to, norms near one, biases that are not nothing."""
    for module in model.modules():
        scale = 0.3
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm) and name == "weight":
                parameter.normal_(1.0, 0.2)
            elif parameter.dim() > 1 and name == "weight":
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=scale)


def image(size=(64, 96), batch=2, dtype=torch.float64):
    """Pictures [batch, 3, *size]."""
    return torch.randn(batch, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(5))


def flattened(output):
    """All tensors of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for item in output for t in flattened(item)] if isinstance(output, (tuple, list)) else []


def step(model, x, call=None, seed=3):
    """One forward and backward from a fixed seed: outputs, input gradient and every parameter gradient, by name.

    The loss is a fixed random projection of all floating-point outputs, so that every output element counts.
    """
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    outputs = [o for o in flattened(call(model, x) if call else model(x)) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(17)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True) if o.requires_grad).backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    found["input gradient"] = x.grad
    # `_orig_mod` and `module` are what torch.compile and DDP put before.
    found.update(
        {name.replace("_orig_mod.", ""): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    )
    return found

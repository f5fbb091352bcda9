"""The published Hiera variants, for pictures and videos, plain and as masked autoencoders, and a mini one for tests.

Every function takes `pretrained=False`, `checkpoint=<the default>`, `strict=True` and any argument of the model's
class, as hiera-transformer's do. `pretrained=True` downloads the published weights (their licence is CC-BY-NC 4.0,
which is not this repository's) through `torch.hub`.
"""

import difflib
from collections.abc import Callable

import torch

from hiera.checkpoint_loading import load_weights, read_state_dict
from hiera.mae import MaskedAutoencoderHiera
from hiera.model import Hiera

URL = "https://dl.fbaipublicfiles.com/hiera/"

TINY = {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 7, 2)}
SMALL = {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 11, 2)}
BASE = {"embed_dim": 96, "num_heads": 1, "stages": (2, 3, 16, 3)}
BASE_PLUS = {"embed_dim": 112, "num_heads": 2, "stages": (2, 3, 16, 3)}
LARGE = {"embed_dim": 144, "num_heads": 2, "stages": (2, 6, 36, 4)}
HUGE = {"embed_dim": 256, "num_heads": 4, "stages": (2, 6, 36, 4)}
VIDEO = {
    "num_classes": 400,  # Kinetics-400
    "input_size": (16, 224, 224),
    "q_stride": (1, 2, 2),
    "mask_unit_size": (1, 8, 8),
    "patch_kernel": (3, 7, 7),
    "patch_stride": (2, 4, 4),
    "patch_padding": (1, 3, 3),
    "sep_pos_embed": True,
}
MAE = {"q_pool": 2}  # the decoder predicts at the resolution of stage 3
# 32 x 32 tokens in 16 mask units of 8 x 8; the autoencoder has 2.3 million parameters.
MINI = {"input_size": (128, 128), "embed_dim": 32, "num_heads": 1, "stages": (1, 1, 4, 1)}
MINI_DECODER = {"decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4}


def _variant(name: str, model_class: type, settings: dict, checkpoints: dict[str, str] | None) -> Callable[..., Hiera]:
    """The function that builds one variant. Its attributes `checkpoints` and `default` name the published weights."""
    default = next(iter(checkpoints), None) if checkpoints else None

    def build(pretrained: bool = False, checkpoint: str | None = default, strict: bool = True, **kwargs) -> Hiera:
        state = None
        if pretrained:
            state = _download(name, checkpoints, checkpoint)
            head = state.get("head.projection.weight")
            if head is not None:
                kwargs.setdefault("num_classes", head.shape[0])
        model = model_class(**{**settings, **kwargs})
        if state is not None:
            load_weights(model, state, strict=strict)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{model_class.__name__} with the settings of {name}.

    Args:
        pretrained: Download and load published weights: {", ".join(checkpoints) if checkpoints else "none"}.
        checkpoint: Which of them.
        strict: See :func:`hiera.checkpoint_loading.load_weights`.
        **kwargs: Any argument of :class:`hiera.{model_class.__name__}`, instead of the variant's own.

    Raises:
        ValueError: if `checkpoint` is not one of those, or the weights do not fit.
    """
    build.checkpoints, build.default = checkpoints, default
    return build


def _download(name: str, checkpoints: dict[str, str] | None, checkpoint: str | None) -> dict[str, torch.Tensor]:
    if not checkpoints:
        raise ValueError(f"{name} has no published weights; pretrained must be False")
    if checkpoint not in checkpoints:
        raise ValueError(f"{name} has no checkpoint {checkpoint!r}; there are {sorted(checkpoints)}")
    url = checkpoints[checkpoint]
    return read_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True))


def _image(name: str, settings: dict) -> Callable[..., Hiera]:
    weights = {"mae_in1k_ft_in1k": f"{URL}{name}.pth", "mae_in1k": f"{URL}mae_{name}.pth"}
    return _variant(name, Hiera, settings, weights)


def _video(name: str, settings: dict) -> Callable[..., Hiera]:
    weights = {"mae_k400_ft_k400": f"{URL}{name}.pth", "mae_k400": f"{URL}mae_{name}.pth"}
    return _variant(name, Hiera, {**VIDEO, **settings}, weights)


def _mae(name: str, settings: dict) -> Callable[..., Hiera]:
    trained_on = "mae_k400" if "16x" in name else "mae_in1k"
    video = VIDEO if "16x" in name else {}
    return _variant(name, MaskedAutoencoderHiera, {**video, **MAE, **settings}, {trained_on: f"{URL}{name}.pth"})


hiera_tiny_224 = _image("hiera_tiny_224", TINY)
hiera_small_224 = _image("hiera_small_224", SMALL)
hiera_base_224 = _image("hiera_base_224", BASE)
hiera_base_plus_224 = _image("hiera_base_plus_224", BASE_PLUS)
hiera_large_224 = _image("hiera_large_224", LARGE)
hiera_huge_224 = _image("hiera_huge_224", HUGE)

hiera_base_16x224 = _video("hiera_base_16x224", BASE)
hiera_base_plus_16x224 = _video("hiera_base_plus_16x224", BASE_PLUS)
hiera_large_16x224 = _video("hiera_large_16x224", LARGE)
hiera_huge_16x224 = _video("hiera_huge_16x224", HUGE)

mae_hiera_tiny_224 = _mae("mae_hiera_tiny_224", TINY)
mae_hiera_small_224 = _mae("mae_hiera_small_224", SMALL)
mae_hiera_base_224 = _mae("mae_hiera_base_224", BASE)
mae_hiera_base_plus_224 = _mae("mae_hiera_base_plus_224", BASE_PLUS)
mae_hiera_large_224 = _mae("mae_hiera_large_224", LARGE)
mae_hiera_huge_224 = _mae("mae_hiera_huge_224", HUGE)

mae_hiera_base_16x224 = _mae("mae_hiera_base_16x224", BASE)
mae_hiera_base_plus_16x224 = _mae("mae_hiera_base_plus_16x224", BASE_PLUS)
mae_hiera_large_16x224 = _mae("mae_hiera_large_16x224", LARGE)
mae_hiera_huge_16x224 = _mae("mae_hiera_huge_16x224", HUGE)

# Not published anywhere: small enough to train on two CPU cores.
hiera_mini_128 = _variant("hiera_mini_128", Hiera, MINI, None)
mae_hiera_mini_128 = _variant("mae_hiera_mini_128", MaskedAutoencoderHiera, {**MAE, **MINI, **MINI_DECODER}, None)


def list_models() -> list[str]:
    """Names of all variants, sorted; each is a function of `hiera` and a `name` for :func:`create_model`."""
    return sorted(name for name, value in globals().items() if hasattr(value, "checkpoints"))


def create_model(name: str, **overrides) -> Hiera:
    """Build a variant by name.

    Args:
        name: One of :func:`list_models`.
        **overrides: What the function of that name takes, e.g. `pretrained=True`, `input_size=(256, 384)`.

    Raises:
        ValueError: if there is no such variant; names the most similar ones.

    Equivalent to: `getattr(hiera, name)(**overrides)`.
    """
    models = list_models()
    if name not in models:
        close = difflib.get_close_matches(str(name), models, n=3) or models
        raise ValueError(f"name must be one of hiera.list_models(), got {name!r}; did you mean {', '.join(close)}?")
    return globals()[name](**overrides)

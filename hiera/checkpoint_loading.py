"""Loading weights: published checkpoints, one's own, those of another input size, and timm's."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from hiera.position import guess_grid, resize_grid, resize_pos_embed

WRAPPERS = ("model_state", "state_dict", "model")
MAE_ONLY = ("mask_token", "decoder_", "multi_scale_fusion_heads.", "encoder_norm.")
ENCODER_ONLY = ("norm.", "head.")


class LoadReport(NamedTuple):
    """What :func:`load_weights` did besides copying: parameter names, `resized` with (old shape, new shape)."""

    missing: list[str]
    unexpected: list[str]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def read_state_dict(source) -> dict[str, torch.Tensor]:
    """Read a state dict.

    Args:
        source: A path to a file that `torch.save` wrote (read with `weights_only=True`, so it cannot run code) or, if
            it ends in `.safetensors`, to one of that format; or a mapping. A state dict may lie under the key
            `model_state` (the published checkpoints), `state_dict` or `model`.

    Returns:
        A new dict from parameter name to tensor.

    Raises:
        ValueError: if there is no state dict in it.
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        if name.endswith(".safetensors"):
            from safetensors.torch import load_file

            source = load_file(name)
        else:
            source = torch.load(name, map_location="cpu", weights_only=True)
    found = source
    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        what = f"the keys {sorted(map(str, source))[:8]}" if isinstance(source, Mapping) else type(source).__name__
        raise ValueError(f"source must hold a state dict, bare or under one of {WRAPPERS}; it holds {what}")
    return dict(found)


def from_timm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the parameters of timm's Hiera to those of :class:`hiera.Hiera`.

    Args:
        state: State dict of a timm model, e.g. `hiera_small_abswin_256` or `hiera_base_224`.

    Returns:
        The same tensors under this package's names: `head.fc` is `head.projection`, `head.norm` is `norm`, and the
        window half of the absolute-win embedding, `pos_embed_win`, is `pos_embed_window`. (A model that takes the
        weights of `hiera_small_abswin_256` is `Hiera(input_size=(256, 256), stages=(1, 2, 11, 2), abs_win=True,
        global_pos_size=(16, 16), layer_scale=1e-5, expand_proj=False)`.)
    """
    names = {"head.fc.": "head.projection.", "head.norm.": "norm.", "pos_embed_win": "pos_embed_window",
             "pos_embed_abs": "pos_embed"}  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in names.items():
            if name == theirs or (theirs.endswith(".") and name.startswith(theirs)):
                name = ours + name[len(theirs) :]
                break
        renamed[name] = tensor
    return renamed


def load_weights(model: nn.Module, source, strict: bool = True, source_size: Sequence[int] | None = None) -> LoadReport:
    """Load weights into a Hiera or its masked autoencoder, whatever input size they were trained for.

    Args:
        model: :class:`hiera.Hiera` or :class:`hiera.MaskedAutoencoderHiera`; it gives the architecture.
        source: See :func:`read_state_dict`. timm's parameter names are recognised and renamed.
        strict: Every parameter of the model must be in `source` and the other way round, with three exceptions that
            are meant: an encoder takes a masked autoencoder's weights (its decoder is left out, `norm` and `head` keep
            their initial values), a masked autoencoder takes an encoder's (what only it has keeps its initial
            values), and a head for another number of classes keeps its initial values. False tolerates all names,
            never another shape.
        source_size: Input size in pixels that `source` was trained for. Needed only where it cannot be guessed:
            position embeddings whose number differs from the model's are otherwise taken to be of square pictures.

    Returns:
        A :class:`LoadReport`.

    Raises:
        ValueError: listing every parameter that is missing, unexpected, or of another shape. The model is then
            unchanged.
    """
    state = read_state_dict(source)
    if any(name == "pos_embed_win" or name.startswith("head.fc.") for name in state):
        state = from_timm(state)
    own = model.state_dict()
    allowed = _adapt_family(state, own)
    resized = _resize_positions(model, state, own, source_size)

    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    problems = [
        f"{name} has shape {tuple(state[name].shape)}, the model's has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if strict:
        problems += [f"{name} is missing" for name in missing if name not in allowed]
        problems += [f"{name} is unexpected" for name in unexpected]
    if problems:
        shown = "".join(f"\n  {line}" for line in problems[:12])
        rest = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"the weights do not fit this {type(model).__name__}:{shown}{rest}")
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)
    return LoadReport(missing, unexpected, resized)


def _adapt_family(state: dict, own: dict) -> set[str]:
    """Drop what belongs to the other half of the family; return the names that may then be missing."""
    allowed = set()
    if "decoder_pos_embed" in state and "decoder_pos_embed" not in own:
        for name in [name for name in state if name.startswith(MAE_ONLY)]:
            del state[name]
        allowed |= {name for name in own if name.startswith(ENCODER_ONLY)}
    elif "decoder_pos_embed" in own and "decoder_pos_embed" not in state:
        for name in [name for name in state if name.startswith(ENCODER_ONLY)]:
            del state[name]
        allowed |= {name for name in own if name.startswith(MAE_ONLY)}
    head = "head.projection.weight"
    if head in own and (head not in state or state[head].shape[0] != own[head].shape[0]):
        for name in ("head.projection.weight", "head.projection.bias"):
            if state.pop(name, None) is not None:
                allowed.add(name)
    return allowed


def _resize_positions(model, state: dict, own: dict, source_size: Sequence[int] | None) -> dict:
    """Interpolate every position embedding whose shape differs from the model's, in `state` itself."""
    grid = tuple(model.tokens_spatial_shape)
    trained = None
    if source_size is not None:
        if len(source_size) != len(grid):
            raise ValueError(f"source_size must have {len(grid)} lengths, got {tuple(source_size)}")
        trained = tuple(n // s for n, s in zip(source_size, model.patch_stride, strict=True))
    grids = {}  # parameter name -> (the model's grid, the source's grid or None)
    if model.sep_pos_embed:
        grids["pos_embed_temporal"] = grid[:1], trained and trained[:1]
        grids["pos_embed_spatial"] = grid[1:], trained and trained[1:]
    else:
        grids["pos_embed"] = grid, trained
    if "decoder_pos_embed" in own:
        pooled = tuple(n // f for n, f in zip(grid, model.tokens_spatial_shape_final, strict=True))
        grids["decoder_pos_embed"] = (
            tuple(model.tokens_spatial_shape_final),
            trained and tuple(n // p for n, p in zip(trained, pooled, strict=True)),
        )
    time = trained[0] if trained else None
    if model.sep_pos_embed and "pos_embed_temporal" in state:
        time = state["pos_embed_temporal"].shape[1]

    resized = {}
    for name, (new, old) in grids.items():
        if name not in state or name not in own or (state[name].shape == own[name].shape and old in (None, new)):
            continue
        before = tuple(state[name].shape)
        if model.abs_win and name == "pos_embed":  # an absolute-win background has its grid in its shape
            if state[name].ndim == own[name].ndim:
                state[name] = resize_grid(state[name], own[name].shape[2:])
        elif state[name].ndim == 3:
            old = old or guess_grid(before[1], new, time)
            if old is None:
                raise ValueError(f"{name} has {before[1]} positions, which is not a square picture: give source_size=")
            state[name] = resize_pos_embed(state[name], old, new)
        resized[name] = before, tuple(state[name].shape)
    return resized

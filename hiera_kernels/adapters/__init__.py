"""How the modules of a model family map onto the ops, one file per family."""

from hiera_kernels.adapters import hiera_embedding, hiera_transformer
from hiera_kernels.recognise import Target

TARGETS: tuple[Target, ...] = (*hiera_transformer.TARGETS, *hiera_embedding.TARGETS)


def target_named(name: str) -> Target | None:
    """The target that a stored module refers to, or None if this version has none of that name."""
    return next((target for target in TARGETS if target.name == name), None)

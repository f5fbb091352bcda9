"""How the modules of a model family map onto the ops, one file per family."""

from hiera_kernels.adapters import (
    hiera_block,
    hiera_embedding,
    hiera_mae,
    hiera_transformer,
    sam2,
    sam2_timm,
    sam2_transformers,
    timm_hiera,
    transformers_hiera,
)
from hiera_kernels.recognise import Target

# The first that a module resembles judges it: what asks for more comes before what asks for less.
TARGETS: tuple[Target, ...] = (
    *timm_hiera.TARGETS,
    *transformers_hiera.TARGETS,
    *sam2_timm.TARGETS,
    *sam2_transformers.TARGETS,
    *sam2.TARGETS,
    *hiera_block.TARGETS,
    *hiera_transformer.TARGETS,
    *hiera_mae.TARGETS,
    *hiera_embedding.TARGETS,
)


def target_named(name: str) -> Target | None:
    """The target that a stored module refers to, or None if this version has none of that name."""
    return next((target for target in TARGETS if target.name == name), None)

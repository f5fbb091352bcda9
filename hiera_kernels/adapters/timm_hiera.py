"""timm's Hiera (timm 1.0.20 and later): attention. Its `Unroll` and `Reroll` are hiera-transformer's.

Source: timm 1.0.31, `timm/models/hiera.py` (MaskUnitAttention). It differs from hiera-transformer's in two things: the
queries are pooled by `amax`, which splits the gradient over ties, and a flag `fused_attn` chooses between SDPA and two
matrix products with the module's own `scale`. Recognised by attributes, so vendored and renamed copies count.
"""

from hiera_kernels.adapters.hiera_transformer import Attention
from hiera_kernels.lookalike import Probe
from hiera_kernels.ops.attention import mask_unit_attention


class TimmAttention(Attention):
    """`MaskUnitAttention.forward` of timm."""

    name = "timm.MaskUnitAttention"
    looks_for = "the same with a flag `fused_attn` (timm)"
    known = Attention.known | {"fused_attn"}

    def resembles(self, module):
        """What is asked of hiera-transformer's, and timm's flag."""
        return "fused_attn" in vars(module) and super().resembles(module)

    def obstacle(self, module):
        """As for hiera-transformer's, and a scale to multiply by."""
        scale = vars(module).get("scale")
        if not isinstance(scale, (int, float)) or isinstance(scale, bool):
            return "it has no number `scale`"
        return super().obstacle(module)

    def probes(self, module, fresh):
        """The same calls, by either way; only one of them reads `scale`.

        Which is small: under autocast the products round their logits to 16 bits, and large ones far off.
        """
        found = []
        for probe in super().probes(module, fresh):
            for way, flag in (("SDPA", True), ("products", False)):
                holds = {**probe.holds, "fused_attn": flag, "scale": 0.05}
                found.append(Probe(f"{probe.name}, {way}", holds, probe.arguments))
        return found

    @staticmethod
    def fused(module, x):
        """`proj(op(qkv(x)))`; x [B, N, dim] -> [B, N/q_stride, dim_out], unrolled order."""
        windows = x.shape[1] // (module.q_stride * module.window_size) if module.use_mask_unit_attn else 1
        scale = None if module.fused_attn else module.scale
        return module.proj(
            mask_unit_attention(module.qkv(x), module.heads, windows, module.q_stride, scale, ties="split")
        )


TARGETS = (TimmAttention(),)

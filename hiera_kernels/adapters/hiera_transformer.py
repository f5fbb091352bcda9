"""hiera-transformer's modules, and the reference model's (`hiera/` in this repository), which bear the same names.

Source: hiera-transformer 0.1.4, `hiera/hiera.py` (MaskUnitAttention, Hiera) and `hiera/hiera_utils.py` (Unroll,
    Reroll). Recognised by attributes, so vendored and renamed copies count. Every setting is read at call time, as the
    originals do.
"""

import math

import torch

from hiera_kernels.lookalike import Affine, Probe
from hiera_kernels.ops.attention import mask_unit_attention, refusal
from hiera_kernels.ops.token_order import reroll, reroll_masked, unroll
from hiera_kernels.recognise import Target


class Attention(Target):
    """`MaskUnitAttention.forward`: the two linear layers stay modules, what lies between them becomes one op."""

    name = "hiera_transformer.MaskUnitAttention"
    looks_for = "attention with `qkv` and `proj` layers, `heads`, `q_stride`, `window_size` and `use_mask_unit_attn`"
    ops = ("mask_unit_attention",)
    # `scale` is among them although the originals never read it: SDPA has that very default. See `probes`.
    known = frozenset(
        ("dim", "dim_out", "heads", "head_dim", "q_stride", "window_size", "use_mask_unit_attn", "scale", "qkv", "proj")
    )

    def resembles(self, module):
        """Two of its layers and one of its settings, or its name: enough for the report to speak of it."""
        return {"qkv", "proj"} <= {name for name, _ in module.named_children()} and (
            "q_stride" in vars(module) or type(module).__name__.endswith("MaskUnitAttention")
        )

    def obstacle(self, module):
        """Settings of the wrong kind, or layers that do not fit them."""
        has = vars(module)
        for name in ("dim", "dim_out", "heads", "head_dim", "q_stride", "window_size"):
            if not isinstance(has.get(name), int):
                return f"it has no integer attribute `{name}`"
        if not isinstance(has.get("use_mask_unit_attn"), (bool, int)):
            return "it has no attribute `use_mask_unit_attn`"
        dim, dim_out, heads = has["dim"], has["dim_out"], has["heads"]
        if heads < 1 or heads * has["head_dim"] != dim_out:
            return f"heads = {heads} times head_dim = {has['head_dim']} is not dim_out = {dim_out}"
        for name, fits in (("qkv", (dim, 3 * dim_out)), ("proj", (dim_out, dim_out))):
            layer = module._modules[name]
            # Wrapped layers may hide their sizes, and are called, not read.
            sizes = getattr(layer, "in_features", fits[0]), getattr(layer, "out_features", fits[1])
            if sizes != fits:
                return f"its `{name}` maps {sizes[0]} to {sizes[1]} channels where {fits[0]} to {fits[1]} are expected"
        return None

    def probes(self, module, fresh):
        """Both kinds of attention, pooled and not, with two heads (one would hide how qkv is packed) and with ties."""
        dim, heads, head_dim = 6, 2, 8
        layers = {
            "qkv": Affine(fresh, dim, 3 * heads * head_dim),
            "proj": Affine(fresh, heads * head_dim, heads * head_dim),
        }
        # A scale that no default has: an attention that reads it gives other numbers than the op, and is left alone.
        sizes = {"dim": dim, "dim_out": heads * head_dim, "heads": heads, "head_dim": head_dim, "scale": 0.75}
        found = []
        for windowed, q_stride, window_size, tokens in (
            (True, 4, 3, 36),
            (True, 1, 4, 20),
            (False, 4, 5, 16),
            (False, 1, 0, 7),
        ):
            holds = {
                "q_stride": q_stride,
                "window_size": window_size,
                "use_mask_unit_attn": windowed,
                **sizes,
                **layers,
            }
            name = f"{'mask units' if windowed else 'global'}{', pooled' if q_stride > 1 else ''}"
            x = fresh.constant(2, tokens, dim)
            found.append(Probe(name, holds, (fresh.leaf(x),)))
            if q_stride > 1:
                groups = x.view(2, q_stride, -1, dim)
                tied = torch.cat([groups[:, :2], groups[:, :2]], dim=1).reshape(x.shape)
                found.append(Probe(f"{name}, ties", holds, (fresh.leaf(tied),)))
        return found

    def declined(self, module, x):
        """Asked of a window; of global attention, whose length only a call tells, with the shortest."""
        keys = module.q_stride * (module.window_size if module.use_mask_unit_attn else 1)
        return refusal(x.new_empty(0, keys, 3 * module.dim_out), module.heads, 1, module.q_stride)

    @staticmethod
    def fused(module, x):
        """`proj(op(qkv(x)))`; x [B, N, dim] -> [B, N/q_stride, dim_out], unrolled order."""
        # A token count that does not divide is rounded down here and refused by the op, as the original's view does.
        windows = x.shape[1] // (module.q_stride * module.window_size) if module.use_mask_unit_attn else 1
        return module.proj(mask_unit_attention(module.qkv(x), module.heads, windows, module.q_stride))


# Grids and schedules that no square hides in: (size, strides).
GRIDS = (([8], [(2,), (4,)]), ([8, 12], [(2, 3), (2, 1)]), ([2, 4, 6], [(1, 2, 3), (2, 2, 1)]), ([3, 5], []))


class UnrollOrder(Target):
    """`Unroll.forward`."""

    name = "hiera_transformer.Unroll"
    looks_for = "token reordering with `size` and a `schedule` of strides"
    ops = ("unroll",)
    known = frozenset(("size", "schedule"))

    def resembles(self, module):
        """Both settings, and nothing that computes."""
        return self.known <= vars(module).keys() and isinstance(vars(module)["schedule"], (list, tuple))

    def obstacle(self, module):
        """Settings that are not a grid and a schedule over it."""
        size, schedule = vars(module)["size"], vars(module)["schedule"]
        return _grid_obstacle(size, schedule)

    def probes(self, module, fresh):
        """Every number of dimensions."""
        return [
            Probe(f"grid {size}", {"size": size, "schedule": strides}, (fresh(2, math.prod(size), 3),))
            for size, strides in GRIDS
            if strides
        ]

    @staticmethod
    def fused(module, x, size=None):
        """x [B, N, C], row-major over `size` -> [B, N, C] unrolled.

        The reference model gives other sizes than its own.
        """
        return unroll(x, module.size if size is None else size, module.schedule)


class RerollOrder(Target):
    """`Reroll.forward`, with and without a mask."""

    name = "hiera_transformer.Reroll"
    looks_for = "token reordering back, with `size` and a `schedule` for each block"
    ops = ("reroll", "reroll_masked")
    known = frozenset(("size", "schedule"))

    def resembles(self, module):
        """Both settings, the schedule being a dict."""
        return self.known <= vars(module).keys() and isinstance(vars(module)["schedule"], dict)

    def obstacle(self, module):
        """Entries that are not a schedule and a grid."""
        for entry in vars(module)["schedule"].values():
            if not isinstance(entry, tuple) or len(entry) != 2:
                return "its `schedule` does not hold pairs of strides and grid"
            if reason := _grid_obstacle(entry[1], entry[0]):
                return reason
        return None

    def probes(self, module, fresh):
        """Every number of dimensions, all tokens and half of the mask units."""
        found = []
        for size, strides in GRIDS:
            holds = {"size": size, "schedule": {0: ([(1,) * len(size)], [1] * len(size)), 5: (strides, size)}}
            found.append(Probe(f"grid {size}", holds, (fresh(2, math.prod(size), 3), 5)))
            unit = math.prod(math.prod(step) for step in strides)
            mask = torch.ones(2, 3, dtype=torch.bool)
            found.append(Probe(f"grid {size}, masked", holds, (fresh(2, 3 * unit, 3), 5), {"mask": mask}))
        return found

    @staticmethod
    def fused(module, x, block_idx, mask=None, size=None):
        """x [B, N', C] as block `block_idx` returns it -> [B, *grid, C], with a mask [B, units, *unit_size, C]."""
        strides, grid = module.schedule[block_idx]
        if mask is not None:
            # Where every stride has been pooled away, a mask unit is one token.
            return reroll_masked(x, strides if len(strides) else [(1,) * len(grid)])
        if size is not None:
            grid = [n * g // full for n, g, full in zip(size, grid, module.size, strict=True)]
        return reroll(x, grid, strides)


def _grid_obstacle(size, schedule):
    if not _ints(size) or not 1 <= len(size) <= 3:
        return f"its `size` is not one to three positive integers: {size!r}"
    if not isinstance(schedule, (list, tuple)) or not all(_ints(step) and len(step) == len(size) for step in schedule):
        return f"its `schedule` does not hold strides of {len(size)} integers: {schedule!r}"
    return None


def _ints(values):
    return isinstance(values, (list, tuple)) and all(isinstance(value, int) and value > 0 for value in values)


ATTENTION, UNROLL, REROLL = Attention(), UnrollOrder(), RerollOrder()
TARGETS = (ATTENTION, UNROLL, REROLL)

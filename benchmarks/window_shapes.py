"""The shapes at which SAM 2's image encoders would call `window_attention`, walked through their settings.

    python -m benchmarks.window_shapes              # the table

The package itself is not needed; tests/test_bench_shapes.py walks its models and its configurations and compares.
"""

from dataclasses import dataclass, replace
from functools import cache

# Arguments of the image encoder `Hiera` of sam2 1.1.0, from its configurations sam2.1_hiera_*.yaml; what they leave out
# has the class's default.
SETTINGS = {
    "sam2_t": {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 7, 2), "global_att_blocks": (5, 7, 9)},
    "sam2_s": {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 11, 2), "global_att_blocks": (7, 10, 13)},
    "sam2_b+": {"embed_dim": 112, "num_heads": 2},
    "sam2_l": {
        "embed_dim": 144,
        "num_heads": 2,
        "stages": (2, 6, 36, 4),
        "global_att_blocks": (23, 33, 43),
        "window_spec": (8, 4, 16, 8),
    },
}
_DEFAULTS = {"stages": (2, 3, 16, 3), "global_att_blocks": (12, 16, 20), "window_spec": (8, 4, 14, 7)}
SIZE, PATCH_STRIDE, POOL = 1024, 4, 2


@dataclass(frozen=True)
class WindowShape:
    """One call of `window_attention`, but for the batch."""

    model: str
    place: str  # "stage2.first" (pools its queries), "stage3", "stage3.global"
    Hs: int  # height and width of the tokens
    Ws: int
    H: int  # heads
    D: int  # head dim
    window: int  # 0 is global attention
    pool: int = 1  # stride of the queries in each direction
    blocks: int = 1
    C_in: int = 0

    @property
    def C(self) -> int:
        """Channels."""
        return self.H * self.D

    @property
    def name(self) -> str:
        """Model and place, e.g. sam2_b+_1024.stage3."""
        return f"{self.model}.{self.place}"

    def bytes(self, batch: int, element_size: int, backward: bool = False) -> int:
        """What has to move at least: qkv in and out out, or qkv and the output's gradient in and qkv's gradient out."""
        qkv, out = 3 * self.Hs * self.Ws * self.C, self.Hs * self.Ws // self.pool**2 * self.C
        return batch * element_size * ((2 * qkv + out) if backward else (qkv + out))


@cache
def of_trunk(name: str, size: int = SIZE) -> tuple[WindowShape, ...]:
    """The shapes of one image encoder at `size` pixels, in the order of its blocks, equal ones of a stage merged."""
    settings = {**_DEFAULTS, **SETTINGS[name]}
    stages = settings["stages"]
    starts = [sum(stages[:i]) for i in range(1, len(stages))]
    side, heads, dim, stage = size // PATCH_STRIDE, settings["num_heads"], settings["embed_dim"], 0
    shapes: list[WindowShape] = []
    for i in range(sum(stages)):
        # The first block of a stage attends in windows of the stage before, whose tokens it still has.
        window = 0 if i in settings["global_att_blocks"] else settings["window_spec"][stage]
        dim_in, first = dim, i in starts
        if first:
            stage, heads, dim = stage + 1, 2 * heads, 2 * dim
        place = f"stage{stage + 1}" + (".first" if first else "") + ("" if window else ".global")
        shape = WindowShape(
            f"{name}_{size}", place, side, side, heads, dim // heads, window, POOL if first else 1, 1, dim_in
        )
        same = [j for j, other in enumerate(shapes) if replace(other, blocks=1) == shape]
        if same:
            shapes[same[0]] = replace(shapes[same[0]], blocks=shapes[same[0]].blocks + 1)
        else:
            shapes.append(shape)
        side //= POOL if first else 1
    return tuple(shapes)


def every() -> list[WindowShape]:
    """The shapes of all image encoders."""
    return [shape for name in SETTINGS for shape in of_trunk(name)]


def named(name: str) -> WindowShape:
    """The shape called so, e.g. "sam2_b+_1024.stage3".

    Raises:
        ValueError: there is none.
    """
    found = {shape.name: shape for shape in every()}
    if name not in found:
        raise ValueError(f"shape must be one of {', '.join(found)}; got {name!r}")
    return found[name]


def main() -> None:
    """Print the table."""
    print(f"{'':30}{'blocks':>7}{'Hs':>6}{'Ws':>6}{'H':>6}{'D':>6}{'window':>8}{'pool':>6}")
    for s in every():
        print(f"{s.name:30}{s.blocks:7}{s.Hs:6}{s.Ws:6}{s.H:6}{s.D:6}{s.window:8}{s.pool:6}")


if __name__ == "__main__":
    main()

"""What `accelerate` did, or would do, to which module."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Line(NamedTuple):
    """One module of the model (the root's path is the empty string) and what is to be said about it."""

    path: str
    text: str


@dataclass(frozen=True)
class Report:
    """The modules that run on this package's ops, and those that were left alone.

    Attributes:
        replaced: (module path, what its method calls now), in the order of `model.named_modules()`.
        skipped: (module path, why it was left alone): modules that resemble what is looked for, and no others.
    """

    replaced: list[Line] = field(default_factory=list)
    skipped: list[Line] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.replaced and not self.skipped:
            return "nothing in this model resembles a module that hiera_kernels knows"
        parts = []
        for title, lines in (("replaced", self.replaced), ("left alone", self.skipped)):
            rows = _grouped(lines)
            width = max((len(path) for path, _ in rows), default=0)
            parts.append(f"{title}: {len(lines)} module{'' if len(lines) == 1 else 's'}")
            parts += [f"  {path:{width}}  {text}" for path, text in rows]
        return "\n".join(parts)


def _grouped(lines: list[Line]) -> list[tuple[str, str]]:
    """One row for all modules that differ in a number only and of which the same is said: `blocks.*.attn (24)`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, text in lines:
        groups.setdefault((re.sub(r"\d+", "*", path), text), []).append(path or "(the model)")
    return [
        (paths[0] if len(paths) == 1 else f"{pattern} ({len(paths)})", text)
        for (pattern, text), paths in groups.items()
    ]

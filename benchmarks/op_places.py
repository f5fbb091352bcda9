"""Where in a model an operation belongs: its block, forwards by the last parameter used, backwards by autograd's order.

No hook and no module is touched, so that a swapped model is seen exactly as it runs. An operation belongs to the block
whose parameter was used last; an operation of the backward pass to where its autograd node was made, which nodes tell
by their sequence number.
"""

import bisect

import torch
from torch import nn

EMBEDDING, REST = "embedding", "rest"
_SUFFIX = {"decoder_blocks": "decoder"}


def block_of(parameter: str) -> str:
    """`blocks.3`, `decoder_blocks.0`, "embedding" or "rest", from a parameter's name."""
    parts = parameter.split(".")
    for i, part in enumerate(parts[:-1]):
        if part in ("blocks", "decoder_blocks") and parts[i + 1].isdigit():
            return f"{part}.{parts[i + 1]}"
    return EMBEDDING if parts[0].startswith(("patch_embed", "pos_embed")) else REST


def stage_of(block: str, stage_ends: list[int]) -> str:
    """`stage1` and so on for a block of the encoder, "decoder", "embedding" or "rest"."""
    kind, _, index = block.partition(".")
    if kind in _SUFFIX:
        return _SUFFIX[kind]
    if kind != "blocks":
        return block
    return f"stage{1 + sum(end < int(index) for end in stage_ends)}"


class Places:
    """The current place, and where the autograd nodes were made."""

    def __init__(self, model: nn.Module):
        self.current, self.inside = EMBEDDING, None
        self._of_storage: dict[int, str] = {}
        self._numbers: list[int] = [-1]
        self._places: list[tuple[str, str | None]] = [(EMBEDDING, None)]
        self.parameters: set[int] = set()
        for name, parameter in model.named_parameters():
            key = parameter.untyped_storage()._cdata
            self._of_storage[key] = block_of(name)
            self.parameters.add(key)

    def see(self, values, made_already: int = 0) -> None:
        """Notice which parameters are about to be used; `made_already`: nodes of this use that exist already."""
        for x in values:
            place = self._of_storage.get(x.untyped_storage()._cdata)
            if place is not None and place != self.current:
                self.current = place
                self._mark(made_already)
                return

    def enter(self, kind: str | None) -> None:
        """What follows is of this kind, whatever it looks like (None: no longer)."""
        self.inside = kind
        self._mark(0)

    def here(self) -> tuple[str, str | None]:
        """Block and kind, if forced, of the operation that is being executed."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self.current, self.inside
        number = node._sequence_nr()
        if number < 2**62:  # a gradient's accumulation has none
            self._latest = self._places[bisect.bisect_right(self._numbers, number) - 1]
        return getattr(self, "_latest", (self.current, None))

    def _mark(self, made_already):
        number = torch.autograd._get_sequence_nr() - made_already
        self._numbers.append(max(number, self._numbers[-1]))
        self._places.append((self.current, self.inside))

"""What a fused block knows about itself besides its submodules: how to recompute, which classes it reads, who follows.

A plan is an attribute of the module, copied and stored with it. It holds no module: the blocks of one ModuleList share
a `Chain` of weak references, which a copy or a loaded model fills anew, so that a block that is copied or stored alone
brings nothing along.
"""

import weakref
from dataclasses import dataclass, replace

from torch import nn

RECOMPUTE = ("none", "gelu", "block")
DROP_PATH = ("exact", "skip")
ATTRIBUTE = "_hiera_kernels_plan"


class Chain:
    """The blocks that run one after the other, each known by its place; weak."""

    def __init__(self, length: int):
        self.members: list[weakref.ref | None] = [None] * length

    def enter(self, place: int, block: nn.Module) -> None:
        """Take a place that is free: a shallow copy, or a replica, does not push the original out."""
        member = self.members[place]
        if member is None or member() is None:
            self.members[place] = weakref.ref(block)

    def after(self, place: int, block: nn.Module) -> nn.Module | None:
        """Who follows `block`, if it is `block` that has this place and somebody has the next one."""
        if place + 1 >= len(self.members) or self._at(place) is not block:
            return None
        return self._at(place + 1)

    def _at(self, place):
        member = self.members[place]
        return None if member is None else member()

    def __reduce__(self):
        return Chain, (len(self.members),)


@dataclass
class Plan:
    """The settings of one fused block.

    Attributes:
        recompute: ``"none"``, ``"gelu"`` or ``"block"``; see :func:`hiera_kernels.accelerate`.
        drop_path: ``"exact"`` or ``"skip"``; likewise.
        mlp, drop, scale: The class of its MLP, of its drop path and of its layer scale where that is one whose numbers
            we know, else None: then the module is called.
        chain, place: Who follows it, if it stands in a ModuleList or Sequential of its like.
    """

    recompute: str = "gelu"
    drop_path: str = "exact"
    mlp: type | None = None
    drop: type | None = None
    scale: type | None = None
    chain: Chain | None = None
    place: int = 0

    def follower(self, block: nn.Module) -> nn.Module | None:
        """The module that is to be called with what `block` returns, as far as one knows."""
        return None if self.chain is None else self.chain.after(self.place, block)

    def __reduce__(self):
        # Classes are judged anew where the module arrives.
        return _stored, (self.recompute, self.drop_path, self.chain, self.place)


def _stored(recompute, drop_path, chain, place):
    return Plan(recompute, drop_path, chain=chain, place=place)


_UNPLANNED = Plan()


def plan_of(block: nn.Module) -> Plan:
    """The plan of `block`; without one of its own (it was swapped by hand) it calls whatever can be called."""
    return block.__dict__.get(ATTRIBUTE, _UNPLANNED)


def check_settings(recompute: object, drop_path: object) -> None:
    """Raise ValueError unless both are None or one of the words that they may be."""
    for name, value, allowed in (("recompute", recompute, RECOMPUTE), ("drop_path", drop_path, DROP_PATH)):
        if value is not None and value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def set_up(module: nn.Module, recompute: str | None, drop_path: str | None) -> None:
    """Give a fused block its settings; None keeps those that it has."""
    had = plan_of(module)
    plan = replace(had, recompute=recompute or had.recompute, drop_path=drop_path or had.drop_path)
    vars(module)[ATTRIBUTE] = plan


def link(blocks: list[nn.Module]) -> None:
    """Tell each of the blocks, which run in this order, who follows it."""
    chain = Chain(len(blocks))
    for place, block in enumerate(blocks):
        plan = plan_of(block)
        plan.chain, plan.place = chain, place
        chain.enter(place, block)

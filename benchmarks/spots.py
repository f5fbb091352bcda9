"""Every kernel once, forward and backward, at small awkward shapes: what compute-sanitizer is pointed at.

    compute-sanitizer --tool memcheck python -m benchmarks.spots
    python -m benchmarks.spots gelu --device cpu

Odd numbers of images, windows, heads and rows, windows that overhang, rows that end inside a tile. Each result is
compared with the fp64 oracle of the benchmarks; the exit status is 1 where one differs.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks import attention, parity, rows, token_order
from benchmarks.attention_shapes import AttentionShape
from benchmarks.shapes import TokenShape
from benchmarks.trial import OURS, Trial, first_line, verdicts
from benchmarks.window_shapes import WindowShape

# (S, P, W, H, D): all kernels of attention, with the head widths of all families.
UNITS = (
    (64, 1, 3, 1, 96),
    (16, 4, 3, 2, 72),
    (16, 1, 5, 3, 56),
    (4, 4, 5, 2, 96),
    (49, 1, 1, 3, 64),
    (49, 4, 1, 2, 72),
    (196, 1, 1, 1, 96),
    (7, 1, 3, 2, 24),
)
# (Hs, Ws, H, D, window, pool)
WINDOWS = ((20, 12, 1, 96, 8, 2), (15, 9, 2, 56, 7, 1), (14, 14, 1, 72, 14, 1), (8, 12, 2, 96, 4, 2))
TOKENS = TokenShape("odd", 3, (16, 24), ((2, 2), (2, 2), (2, 2)), 56, torch.bfloat16, 4)
VIDEO = TokenShape("video", 2, (3, 8, 16), ((1, 2, 2), (1, 2, 2)), 5, torch.float32, 3)


def spots(op: str, device: torch.device) -> Iterator[tuple[str, Trial]]:
    """Label and trial of each spot of an op."""
    half = torch.bfloat16
    if op == "mask_unit_attention":
        for S, P, W, H, D in UNITS:
            shape = AttentionShape("spot", f"{S},{S * P} D={D}", S * P * W, W, P, H, D)
            yield shape.place, attention.unit_trial(shape, 3, half, False, device)
    elif op == "window_attention":
        for Hs, Ws, H, D, window, pool in WINDOWS:
            shape = WindowShape("spot", f"{Hs}x{Ws} window {window} pool {pool} D={D}", Hs, Ws, H, D, window, pool)
            yield shape.place, attention.window_trial(shape, 2, half, False, device)
    elif op in rows.TRIALS:
        for C_in, C, tokens in ((48, 96, 60), (72, 144, 12)):
            shape = AttentionShape("spot", f"C={C}", tokens, 1, 4, 1, C, C_in=C_in)
            for dtype in (half, torch.float32):
                yield f"{shape.place} {dtype}", rows.TRIALS[op][0](shape, 5, dtype, False, device)
    elif op == "embed_tokens":
        for shape in (TOKENS, VIDEO):
            for last, masked in ((False, False), (True, True)):
                note = f"{shape.name} channels-{'last' if last else 'first'}{' masked' if masked else ''}"
                yield note, token_order.embed_trial(shape, last, masked, device)
    else:
        for shape in (TOKENS, VIDEO):
            yield shape.name, token_order.move_trial(op, shape, device)


def operations() -> dict[str, Callable]:
    """The ops that there are spots of."""
    return {**attention.OPS, **rows.OPS, **token_order.OPS}


def main(arguments: list[str] | None = None) -> int:
    """Run the spots of the ops that the command line names."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.ops if name not in operations()]:
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(operations())}")
    device, bad = torch.device(options.device), 0
    for op in options.ops or operations():
        for label, trial in spots(op, device):
            torch.manual_seed(0)
            trial.candidates = {OURS: trial.candidates[OURS]}
            try:
                found = verdicts(trial, ("forward", "backward"))[OURS]
                answers = [error or verdict for verdict, error in found.values()]
            except Exception as raised:
                answers = [first_line(raised)]
            bad += any(answer != parity.GREEN for answer in answers)
            print(f"{op}  {label}: {', '.join(answers)}", flush=True)
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"which of {', '.join(operations())} (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())

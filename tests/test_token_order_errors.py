"""Bad input: the right exception, naming the argument, what it was and what it may be. No call reaches a kernel."""

import pytest
import torch

from hiera_kernels import ops

X = torch.zeros(2, 24, 3)
P, E = torch.zeros(2, 3, 4, 6), torch.zeros(1, 24, 3)
KEEP = torch.tensor([[0], [1]])

CASES = [
    (ops.unroll, ([1.0], (4, 6), ()), TypeError, "x must be a tensor [B, N, C], got list"),
    (ops.unroll, (X.to_sparse(), (4, 6), ()), TypeError, "x must be a dense tensor [B, N, C]"),
    (ops.unroll, (X[0], (4, 6), ()), ValueError, "x must be [B, N, C], got shape (24, 3)"),
    (ops.unroll, (X, (4, 5), ()), ValueError, "N = prod(size) = 20 for size (4, 5), got (2, 24, 3)"),
    (ops.unroll, (X, 24, ()), TypeError, "size must be a sequence of ints, got 24"),
    (ops.unroll, (X, "24", ()), TypeError, "size must be a sequence of ints, got '24'"),
    (ops.unroll, (X, (4.0, 6), ()), TypeError, "size must hold ints, got 4.0"),
    (ops.unroll, (X, (True, 24), ()), TypeError, "size must hold ints, got True"),
    (ops.unroll, (X, (), ()), ValueError, "size must have 1 to 3 entries, got ()"),
    (ops.unroll, (X, (1, 1, 4, 6), ()), ValueError, "size must have 1 to 3 entries"),
    (ops.unroll, (X, (0, 6), ()), ValueError, "size must hold positive ints, got (0, 6)"),
    (ops.unroll, (X, (4, 6), (2, 2)), TypeError, "sequence of steps such as ((2, 2), (2, 2)), got (2, 2)"),
    (ops.unroll, (X, (4, 6), 2), TypeError, "strides must be a sequence of steps"),
    (ops.unroll, (X, (4, 6), ((2,),)), ValueError, "every step of strides must have 2 entries"),
    (ops.unroll, (X, (4, 6), ((2, 0),)), ValueError, "strides must hold positive ints, got (2, 0)"),
    (ops.unroll, (X, (4, 6), ((2, 2), (2, 2))), ValueError, "size[1] is 6, the strides ((2, 2), (2, 2)) multiply to 4"),
    (ops.reroll, (X, (5, 6), ()), ValueError, "N = prod(size) = 30"),
    (ops.reroll, (None, (4, 6), ()), TypeError, "x must be a tensor [B, N, C], got NoneType"),
    (
        ops.reroll_masked,
        (X, ()),
        ValueError,
        "strides must have at least one step of 1 to 3 entries, such as ((1, 1),)",
    ),
    (ops.reroll_masked, (X, ((5, 1),)), ValueError, "x must hold whole mask units of 5 tokens ([5, 1]), got 24 tokens"),
    (ops.reroll_masked, (X, ((2, 2), (2,))), ValueError, "every step of strides must have 2 entries"),
    (ops.reroll_masked, (X, ((1, 1, 1, 1),)), ValueError, "1 to 3 entries"),
    (
        ops.embed_tokens,
        (P[0], E, (4, 6), ()),
        ValueError,
        "patches must be [B, C, *size] with size (4, 6), got shape (3, 4, 6)",
    ),
    (
        ops.embed_tokens,
        (P, E, (6, 4), ()),
        ValueError,
        "patches must be [B, C, *size] with size (6, 4), got (2, 3, 4, 6)",
    ),
    (ops.embed_tokens, (P, E[0], (4, 6), ()), ValueError, "pos_embed must be [1, 24, 3], got shape (24, 3)"),
    (
        ops.embed_tokens,
        (P, E[..., :2], (4, 6), ()),
        ValueError,
        "pos_embed must be [1, N, C] = (1, 24, 3), got (1, 24, 2)",
    ),
    (ops.embed_tokens, (P, E.expand(2, 24, 3), (4, 6), ()), ValueError, "pos_embed must be [1, N, C]"),
    (ops.embed_tokens, (P, E.to("meta"), (4, 6), ()), ValueError, "pos_embed must be on patches' device cpu, got meta"),
    (ops.embed_tokens, (P, E, (4, 6), ((2, 3),), [[0], [1]]), TypeError, "keep must be a tensor [B, kept], got list"),
    (ops.embed_tokens, (P, E, (4, 6), ((2, 3),), KEEP.bool()), TypeError, "keep must be int64 (indices of mask units"),
    (ops.embed_tokens, (P, E, (4, 6), ((2, 3),), KEEP.int()), TypeError, "got torch.int32"),
    (
        ops.embed_tokens,
        (P, E, (4, 6), ((2, 3),), KEEP[:1]),
        ValueError,
        "keep must be [B, kept] with B = 2, got (1, 1)",
    ),
    (ops.embed_tokens, (P, E, (4, 6), ((2, 3),), KEEP[:, 0]), ValueError, "keep must be [B, kept], got shape (2,)"),
    (
        ops.embed_tokens,
        (P, E, (4, 6), ((2, 3),), KEEP + 3),
        ValueError,
        "keep must hold mask units from 0 to 3, got 3 to 4",
    ),
    (
        ops.embed_tokens,
        (P, E, (4, 6), ((2, 3),), KEEP - 1),
        ValueError,
        "keep must hold mask units from 0 to 3, got -1 to 0",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "error", "words"), CASES, ids=[case[3][:40] for case in CASES])
def test_the_message_names_argument_value_and_what_is_allowed(function, arguments, error, words):
    with pytest.raises(error) as raised:
        function(*arguments)
    assert words in str(raised.value)


FLAT = torch.ops.hiera_kernels
REST = (torch.float32, torch.float32, False, True, True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: FLAT.unroll(X, [4, 5], []),
        lambda: FLAT.unroll(X, [4, 6], [3, 1]),
        lambda: FLAT.unroll(X, [4, 6], [2]),
        lambda: FLAT.unroll(X, [4, 6], [0, 1]),
        lambda: FLAT.reroll(X, [-4, -6], []),
        lambda: FLAT.reroll(X[0], [4, 6], []),
        lambda: FLAT.embed_tokens(P, E[:, :20], [4, 6], []),
        lambda: FLAT.embed_tokens(P, E, [6, 4], []),
        lambda: FLAT.embed_tokens(P, E, [4, 6], [2, 3], KEEP[:1]),
        lambda: FLAT.embed_tokens(P, E, [4, 6], [2, 3], KEEP + 3),
        lambda: FLAT.embed_tokens(P, E, [4, 6], [2, 3], KEEP - 1),
        lambda: FLAT.embed_tokens(P.int(), E.int(), [4, 6], [2, 3]),
        lambda: FLAT.embed_tokens_backward(X, [4, 6], [2, 3], KEEP, *REST),
        lambda: FLAT.embed_tokens_backward(X[:, :6], [4, 6], [2, 3], KEEP + 3, *REST),
        lambda: FLAT.embed_tokens_backward(X.double(), [4, 6], [], None, *REST),
        lambda: FLAT.embed_tokens_backward(X.half(), [4, 6], [], None, *REST),
    ],
)
def test_the_ops_themselves_do_not_read_out_of_bounds(call):
    """The compiled kernels are called without the checks here; they raise rather than go where there is nothing."""
    with pytest.raises(RuntimeError):
        call()

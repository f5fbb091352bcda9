"""GELU, the MLP and the pooled linear layer in NumPy, fp64, with gradients by hand: what the tests expect.

Shares no code with the package. `erf` is the C library's.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x):
    """x * Phi(x)."""
    with np.errstate(invalid="ignore"):
        return x * (0.5 * (1.0 + _erf(x / math.sqrt(2.0))))


def gelu_slope(x):
    """The derivative of x * Phi(x): Phi(x) + x * phi(x)."""
    with np.errstate(invalid="ignore", over="ignore"):
        return 0.5 * (1.0 + _erf(x / math.sqrt(2.0))) + x * np.exp(-x * x / 2.0) / math.sqrt(2.0 * math.pi)


def mlp(x, w1, b1, w2, b2):
    """[..., C] -> [..., C']; a bias may be None."""
    h = x @ w1.T + (0.0 if b1 is None else b1)
    return gelu(h) @ w2.T + (0.0 if b2 is None else b2)


def mlp_backward(grad_out, x, w1, b1, w2, b2):
    """Gradients of x, w1, b1, w2, b2, in this order."""
    h = x @ w1.T + (0.0 if b1 is None else b1)
    rows = tuple(range(x.ndim - 1))
    grad_h = (grad_out @ w2) * gelu_slope(h)
    return (
        grad_h @ w1,
        np.tensordot(grad_h, x, (rows, rows)),
        grad_h.sum(rows),
        np.tensordot(grad_out, gelu(h), (rows, rows)),
        grad_out.sum(rows),
    )


def linear_q_pool(x, weight, bias, stride, rounded=np.float64):
    """[B, N, C] -> [B, N/stride, O]; `rounded`: the dtype that the products have before they are compared."""
    product = (x @ weight.T + (0.0 if bias is None else bias)).astype(rounded).astype(np.float64)
    groups = product.reshape(x.shape[0], stride, x.shape[1] // stride, weight.shape[0])
    return groups.max(1), groups


def linear_q_pool_backward(grad_out, x, weight, groups, ties):
    """Gradients of x, weight and bias, token by token; `groups`: the products, of the forward."""
    batch, stride, pooled, wide = groups.shape
    unpooled = np.zeros(groups.shape)
    for b in range(batch):
        for r in range(pooled):
            for o in range(wide):
                column, grad = groups[b, :, r, o], grad_out[b, r, o]
                if np.isnan(column).any():
                    if ties == "first":
                        unpooled[b, int(np.argmax(np.isnan(column))), r, o] = grad
                    else:
                        unpooled[b, :, r, o] = np.nan
                    continue
                winners = np.flatnonzero(column == column.max())
                if ties == "first":
                    unpooled[b, winners[0], r, o] = grad
                else:
                    unpooled[b, winners, r, o] = grad / len(winners)
    rows = unpooled.reshape(batch, stride * pooled, wide)
    return rows @ weight, np.tensordot(rows, x, ((0, 1), (0, 1))), rows.sum((0, 1))

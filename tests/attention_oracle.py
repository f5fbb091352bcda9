"""Mask-unit attention and query pooling from their definitions, in NumPy fp64, gradients derived by hand.

Nothing here is shared with the package: a token is found by its number ``n = (p*S + s)*W + w``, window by window, head
by head, and every derivative is the one on paper. With P = softmax(Z), Z = scale * q k^T, O = P v and dO given:

    dv = P^T dO      dP = dO v^T      dZ = P * (dP - rowsum(P * dP))      dq = scale * dZ k      dk = scale * dZ^T q

The gradient of a maximum goes to the first of the largest entries ("first"; a NaN is largest), or in equal parts to
all entries that equal the maximum ("split"; a NaN equals nothing, so that every part is 0/0 = NaN).
"""

import numpy as np


def token_numbers(num_windows: int, q_stride: int, queries: int) -> np.ndarray:
    """[W, P, S]: the number of the token that is query s, pooled position p, of window w."""
    numbers = np.empty((num_windows, q_stride, queries), dtype=np.int64)
    for w in range(num_windows):
        for p in range(q_stride):
            for s in range(queries):
                numbers[w, p, s] = (p * queries + s) * num_windows + w
    return numbers


def pool(x: np.ndarray) -> np.ndarray:
    """Maximum over the first axis; a NaN wins."""
    return np.max(x, axis=0)


def pool_backward(grad: np.ndarray, x: np.ndarray, ties: str) -> np.ndarray:
    """Gradient of `pool`: grad [...], x [P, ...] -> [P, ...]."""
    if ties == "split":
        largest = (x == pool(x)).astype(np.float64)
        return grad * largest / largest.sum(axis=0)
    assert ties == "first"
    out = np.zeros_like(x)
    np.put_along_axis(out, np.argmax(x, axis=0)[None], grad[None], axis=0)  # argmax: the first; a NaN is largest
    return out


def _windows(qkv: np.ndarray, num_heads: int, num_windows: int, q_stride: int):
    """Every (batch, window, head) with its token numbers [P, S] and its columns of q, k and v."""
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    numbers = token_numbers(num_windows, q_stride, tokens // (num_windows * q_stride))
    for b in range(batch):
        for w in range(num_windows):
            for h in range(num_heads):
                starts = [(part * num_heads + h) * head_dim for part in range(3)]
                yield b, w, h, numbers[w], [slice(start, start + head_dim) for start in starts]


def _softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / total, (np.log(total) + largest)[..., 0]


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def attention(qkv, num_heads, num_windows=1, q_stride=1, scale=None):
    """qkv [B, N, 3*C] -> out [B, N/P, C], logarithms of the softmax's denominators [B, W, H, S]."""
    qkv = np.asarray(qkv, dtype=np.float64)
    batch, tokens, width = qkv.shape
    queries = tokens // (num_windows * q_stride)
    out = np.full((batch, tokens // q_stride, width // 3), -7.0)
    lse = np.full((batch, num_windows, num_heads, queries), -7.0)
    factor = (width // (3 * num_heads)) ** -0.5 if scale is None else scale
    for b, w, h, numbers, (cq, ck, cv) in _windows(qkv, num_heads, num_windows, q_stride):
        q = pool(qkv[b, numbers][..., cq])  # [S, D]
        keys = numbers.reshape(-1)
        weights, lse[b, w, h] = _softmax(factor * (q @ qkv[b, keys, ck].T))
        rows = np.arange(queries) * num_windows + w
        out[b, rows, cq] = weights @ qkv[b, keys, cv]  # head h of the output has the columns of head h of q
    return out, lse


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def attention_backward(grad_out, qkv, num_heads, num_windows=1, q_stride=1, scale=None, ties="first"):
    """Gradient of `attention` in qkv: [B, N, 3*C]."""
    qkv, grad_out = np.asarray(qkv, dtype=np.float64), np.asarray(grad_out, dtype=np.float64)
    queries = qkv.shape[1] // (num_windows * q_stride)
    grad = np.full_like(qkv, -7.0)
    factor = (qkv.shape[2] // (3 * num_heads)) ** -0.5 if scale is None else scale
    for b, w, _, numbers, (cq, ck, cv) in _windows(qkv, num_heads, num_windows, q_stride):
        unpooled = qkv[b, numbers][..., cq]  # [P, S, D]
        keys = numbers.reshape(-1)
        q, k, v = pool(unpooled), qkv[b, keys, ck], qkv[b, keys, cv]
        d_out = grad_out[b, np.arange(queries) * num_windows + w, cq]
        weights, _ = _softmax(factor * (q @ k.T))
        d_weights = d_out @ v.T
        d_logits = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
        grad[b, keys, cv] = weights.T @ d_out
        grad[b, keys, ck] = factor * (d_logits.T @ q)
        d_q = pool_backward(factor * (d_logits @ k), unpooled, ties)
        for p in range(q_stride):
            grad[b, numbers[p], cq] = d_q[p]
    return grad


def q_pool(x, stride):
    """x [B, N, C] -> [B, N/P, C]: token m of the result is the maximum of tokens p*(N/P) + m."""
    return pool(_pooled_parts(x, stride))


@np.errstate(invalid="ignore", divide="ignore")
def q_pool_backward(grad_out, x, stride, ties="first"):
    """Gradient of `q_pool` in x."""
    grads = pool_backward(np.asarray(grad_out, dtype=np.float64), _pooled_parts(x, stride), ties)
    return np.concatenate(list(grads), axis=1)


def _pooled_parts(x, stride):
    x = np.asarray(x, dtype=np.float64)
    kept = x.shape[1] // stride
    return np.stack([x[:, p * kept : (p + 1) * kept] for p in range(stride)])

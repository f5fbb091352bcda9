"""Attention in windows of a map from its definition, in NumPy fp64, gradients derived by hand.

Nothing is shared with the package. Window by window, head by head: the tokens of a window are listed line by line,
those beyond the map are the pad row; the derivatives are those written down in attention_oracle.py. What the gradient
of a padded token would be is added to the pad row's.
"""

import numpy as np


def _softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _windows(map_h, map_w, window):
    """Every window: the (line, column) of its tokens in row-major order, beyond the map too."""
    height, width = window
    for top in range(0, map_h, height):
        for left in range(0, map_w, width):
            yield [(top + y, left + x) for y in range(height) for x in range(width)]


def _pairs(size, whole):
    if size in (None, 0, (0, 0)):
        return whole
    return (size, size) if isinstance(size, int) else tuple(size)


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def window_attention(qkv, num_heads, window_size, q_stride=None, pad=None, scale=None, grad_out=None):
    """qkv [B, Hs, Ws, 3*C] -> out [B, Hs', Ws', C]; with grad_out also the gradients of qkv and pad."""
    qkv = np.asarray(qkv, dtype=np.float64)
    batch, map_h, map_w, channels = qkv.shape
    pad = np.zeros(channels) if pad is None else np.asarray(pad, dtype=np.float64)
    window = _pairs(window_size, (map_h, map_w))
    pool = _pairs(q_stride, (1, 1))
    dim = channels // (3 * num_heads)
    factor = dim**-0.5 if scale is None else scale
    out = np.full((batch, map_h // pool[0], map_w // pool[1], channels // 3), -7.0)
    grad_qkv, grad_pad = np.full_like(qkv, -7.0), np.zeros_like(pad)
    if grad_out is not None:
        grad_out = np.asarray(grad_out, dtype=np.float64)
    for b in range(batch):
        for tokens in _windows(map_h, map_w, window):
            exists = [y < map_h and x < map_w for y, x in tokens]
            rows = np.array([qkv[b, y, x] if there else pad for (y, x), there in zip(tokens, exists, strict=True)])
            # The tokens that each query is the maximum of, in row-major order; queries without any on the map are cut.
            groups = {}
            for number, (y, x) in enumerate(tokens):
                if exists[number]:
                    groups.setdefault((y // pool[0], x // pool[1]), []).append(number)
            for h in range(num_heads):
                cq, ck, cv = (
                    slice((part * num_heads + h) * dim, (part * num_heads + h + 1) * dim) for part in range(3)
                )
                own = slice(h * dim, (h + 1) * dim)
                k, v = rows[:, ck], rows[:, cv]
                grads = np.zeros((len(tokens), channels))
                for (y, x), members in groups.items():
                    q = rows[members, cq].max(axis=0)
                    weights = _softmax(factor * (k @ q))
                    out[b, y, x, own] = weights @ v
                    if grad_out is None:
                        continue
                    d_out = grad_out[b, y, x, own]
                    d_weights = v @ d_out
                    d_logits = weights * (d_weights - (weights * d_weights).sum())
                    grads[:, cv] += weights[:, None] * d_out
                    grads[:, ck] += factor * d_logits[:, None] * q
                    winners = np.array(members)[rows[members, cq].argmax(axis=0)]  # the first; a NaN is largest
                    grads[winners, np.arange(cq.start, cq.stop)] += factor * (d_logits @ k)
                for number, (y, x) in enumerate(tokens):
                    for columns in (cq, ck, cv):
                        if exists[number]:
                            grad_qkv[b, y, x, columns] = grads[number, columns]
                        else:
                            grad_pad[columns] += grads[number, columns]
    return out if grad_out is None else (out, grad_qkv, grad_pad)

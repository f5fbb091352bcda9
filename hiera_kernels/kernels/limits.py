"""What the attention and pooling kernels can serve, and why not the rest. Asked at every call, and without Triton.

The ops ask before they dispatch (`calling.limits`, filled by `register`), so that an input that no kernel serves takes
the reference as plain operations, and `explain` says why; the registered functions ask again, for direct calls of
torch.ops and for graphs that were compiled under other settings.
"""

import functools

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_KEYS = 256
SMALL_KEYS = 64  # up to here a program holds a whole window in the backward too
MIN_ROWS = 16  # of a tile in tl.dot
MAX_STRIDE = 16
MAX_HEAD_DIM = 128
# 163 KB a program and more; others have 99 KB.
LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))


def attention_limit(
    qkv: torch.Tensor, num_heads: int, num_windows: int = 1, q_stride: int = 1, *unread: object
) -> str | None:
    """Why the kernels cannot serve this legal input of mask_unit_attention, in words; None if they can."""
    _, tokens, width = qkv.shape
    return row_limit(qkv.dtype, qkv.device, width // (3 * num_heads), tokens // num_windows, q_stride)


def row_limit(dtype: torch.dtype, device: torch.device, head_dim: int, keys: int, q_stride: int) -> str | None:
    """Why no attention kernel serves windows of so many keys, pooled so, in words; None if one does."""
    if dtype not in DTYPES:
        return f"no fused kernel computes in {dtype}"
    if head_dim % 8 != 0 or not 8 <= head_dim <= MAX_HEAD_DIM:
        return f"the head dimension is {head_dim}; the fused kernels take multiples of 8 up to {MAX_HEAD_DIM}"
    if not 1 <= keys <= MAX_KEYS:
        return f"a window has {keys} keys; the fused kernels take 1 to {MAX_KEYS}"
    if q_stride > MAX_STRIDE:
        return f"q_stride is {q_stride}; the fused kernels take up to {MAX_STRIDE}"
    if device.type != "cuda":
        return None
    if (reason := device_limit(device)) is not None:
        return reason
    if keys > SMALL_KEYS and not has_large_shared_memory(device):
        return f"a window has {keys} keys; the shared memory of {_name(device)} holds {SMALL_KEYS}"
    if dtype is torch.float32:
        if keys > MIN_ROWS and matmul_precision() == "ieee":
            return f"fp32 without TF32 does not fit in registers for {keys} keys; 4-D SDPA serves it"
        if keys > SMALL_KEYS or (keys > 32 and head_dim > 96):
            return f"fp32 does not fit in shared memory for {keys} keys of {head_dim}; 4-D SDPA serves it"
    return None


def pooling_limit(x: torch.Tensor, stride: int, *unread: object) -> str | None:
    """Why the kernels cannot serve this legal input of q_pool, in words; None if they can."""
    if x.dtype not in DTYPES:
        return f"no fused kernel for {x.dtype}"
    if stride > MAX_STRIDE:
        return f"stride is {stride}; the fused kernels take up to {MAX_STRIDE}"
    return device_limit(x.device) if x.device.type == "cuda" else None


def device_limit(device: torch.device) -> str | None:
    """Why no Triton kernel of this package runs on this CUDA device; None if they do, or if no GPU can be asked."""
    if torch.version.hip is not None:
        return "the fused kernels have been compiled for NVIDIA GPUs only"
    capability = compute_capability(device)
    if capability is not None and capability < (8, 0):
        return f"the fused kernels need compute capability 8.0, this device has {_name(device)}"
    return None


def has_large_shared_memory(device: torch.device) -> bool:
    """Whether windows of more than SMALL_KEYS keys fit; True where no GPU can be asked."""
    capability = compute_capability(device)
    return capability is None or capability in LARGE_SHARED_MEMORY


def matmul_precision(dtype: torch.dtype = torch.float32) -> str:
    """How inputs are multiplied: fp32 as "tf32" where the user allowed PyTorch to; else "ieee"."""
    # The older `allow_tf32` raises once the user has set this newer switch; this one follows both.
    if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device; (0, 0) of the interpreter's CPU; None of a fake CUDA device without a GPU."""
    return _compute_capability(device)


@functools.cache
def _compute_capability(device):
    if device.type != "cuda":
        return (0, 0)
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


# Dynamo asks these once, while it traces, and does not look inside (as in calling.py).
compute_capability._dynamo_marked_constant = True
matmul_precision._dynamo_marked_constant = True


def _name(device):
    major, minor = compute_capability(device)
    return f"sm_{major}{minor}"

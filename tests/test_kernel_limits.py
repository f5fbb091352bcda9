"""What kernels say that they cannot serve, and that ops, compilers and reports ask them.

The GPUs are made up: fake CUDA tensors, and a compute capability that the test gives them.

Broken on purpose: the op not asking (test_ops_ask), `capability <= (8, 0)` (sm_80 of it), the older `allow_tf32`
in place of fp32_precision (test_tf32_as_the_user_set_it).
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import hiera_kernels
from hiera_kernels import kernels, platform_report
from hiera_kernels.kernels import limits
from hiera_kernels.ops import attention, calling, pooling
from tests.attention_kernels import oracle_kernels_on_cpu
from tests.swap_cases import build

pytest.importorskip("triton")  # without it nothing is registered for CUDA, and nothing has limits
ATTENTION = torch.ops.hiera_kernels.mask_unit_attention.default


@pytest.fixture
def gpu(monkeypatch):
    """Sets the compute capability of every CUDA device."""
    return lambda *capability: monkeypatch.setattr(limits, "compute_capability", lambda device: capability)


@pytest.fixture(autouse=True)
def _precision_put_back():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def qkv(keys, head_dim=64, dtype=torch.bfloat16):
    """One window of one head, fake, on a made-up GPU."""
    with FakeTensorMode():
        return torch.empty(2, keys, 3 * head_dim, dtype=dtype, device="cuda")


# (compute capability, fp32_precision, keys, head dim, dtype, what is said)
BF16, FP32 = torch.bfloat16, torch.float32
SAID = [
    ((7, 5), "ieee", 64, 64, BF16, "compute capability 8.0, this device has sm_75"),
    ((8, 0), "ieee", 64, 64, BF16, None),
    ((8, 0), "ieee", 256, 96, BF16, None),
    ((8, 6), "ieee", 65, 64, BF16, "shared memory of sm_86 holds 64"),
    ((8, 6), "ieee", 64, 64, torch.float16, None),
    ((9, 0), "ieee", 257, 64, BF16, "257 keys"),
    ((9, 0), "ieee", 16, 64, FP32, None),
    ((9, 0), "ieee", 17, 64, FP32, "fp32 without TF32"),
    ((9, 0), "tf32", 64, 64, FP32, None),
    ((9, 0), "tf32", 64, 104, FP32, "shared memory"),
    ((9, 0), "tf32", 65, 64, FP32, "shared memory"),
    ((12, 0), "ieee", 196, 64, BF16, "shared memory of sm_120"),
    ((9, 0), "ieee", 64, 60, BF16, "head dimension is 60"),
    ((9, 0), "ieee", 64, 64, torch.float64, "torch.float64"),
]


@pytest.mark.parametrize(("capability", "precision", "keys", "head_dim", "dtype", "said"), SAID)
def test_ops_ask(gpu, capability, precision, keys, head_dim, dtype, said):
    gpu(*capability)
    torch.backends.cuda.matmul.fp32_precision = precision
    reason = attention.refusal(qkv(keys, head_dim, dtype), 1)
    assert reason is None if said is None else said in reason


def test_pooling_is_asked(gpu):
    gpu(9, 0)
    x = qkv(34)
    assert pooling.refusal(x, 17) == "stride is 17; the fused kernels take up to 16"
    assert pooling.refusal(x, 2) is None
    assert "stride" in attention.refusal(x, 1, 1, 17)
    gpu(7, 0)
    assert "sm_70" in pooling.refusal(x, 2)


def test_amd_gpus_are_left_to_plain_pytorch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in attention.refusal(qkv(64), 1)
    assert "NVIDIA" in pooling.refusal(qkv(64), 2)


@pytest.mark.parametrize("older", [False, True])
def test_tf32_as_the_user_set_it(gpu, older):
    """By the newer switch, after which reading the older one raises, and by the older one."""
    gpu(9, 0)
    if older:
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert attention.refusal(qkv(64, dtype=torch.float32), 1) is None
    finally:
        if older:
            torch.backends.cuda.matmul.allow_tf32 = False


def test_without_a_gpu_to_ask_a_fake_one_is_taken_for_a_large_one():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to ask")
    assert attention.refusal(qkv(256), 1) is None


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_compiler_is_not_handed_an_op_whose_kernel_would_call_the_reference(dtype, fused):
    """Dynamo traces the question, and sees plain operations where the answer is no. No GPU: fake tensors."""
    torch._dynamo.reset()
    with FakeTensorMode():
        x = torch.empty(1, 64, 96, device="cuda", dtype=dtype)
        # Static: in a CPU build of torch, SDPA cannot choose among CUDA's backends for symbolic sizes.
        export = torch._dynamo.export(
            lambda x: hiera_kernels.mask_unit_attention(x, 2, 2, 4) + 1, assume_static_by_default=True
        )
        graph, _ = export(x)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert (ATTENTION in targets) == fused
    assert any("scaled_dot_product_attention" in str(target) for target in targets) != fused


def test_the_report_tells_what_is_not_served(gpu, monkeypatch):
    """`python -m hiera_kernels` on a made-up GPU: fp32 goes to SDPA for its registers; an old GPU has plain PyTorch."""
    monkeypatch.setattr(platform_report, "why_no_cuda", lambda: None)
    monkeypatch.setattr(platform_report, "_gpus", list)
    monkeypatch.setattr(platform_report, "_sample", lambda dtype, *shape, device: qkv(shape[1], shape[2] // 3, dtype))

    def row():
        (found,) = [
            r for r in platform_report.collect()["ops"] if (r["op"], r["device"]) == ("mask_unit_attention", "cuda")
        ]
        return found["implementation"], found["why_not_faster"]

    gpu(9, 0)
    how, why = row()
    assert how == "Triton kernel"
    assert why.startswith("float32: fp32 without TF32")
    gpu(7, 5)
    how, why = row()
    assert how == platform_report.REFERENCE
    assert "sm_75" in why


@pytest.mark.parametrize("library", ["hiera", "hiera-transformer"])
def test_explain_tells_what_is_not_served(library, monkeypatch):
    """fp32 weights are served under autocast only; what has no kernel in any dtype is said to be plain PyTorch."""
    model = build(library, dtype=torch.float32)

    def lines():
        return {path: text for path, text in hiera_kernels.explain(model).replaced if path.endswith(".attn")}

    def limit(qkv, num_heads, num_windows, q_stride):
        if qkv.shape[1] > 16:
            return "too long"
        return "no fp32 here" if qkv.dtype is torch.float32 else None

    assert {text.partition("(")[2] for text in lines().values()} == {"plain PyTorch, no kernel for cpu)"}
    with oracle_kernels_on_cpu():
        assert {text.partition("(")[2] for text in lines().values()} == {"compiled kernel for cpu)"}
        monkeypatch.setitem(calling.limits, ("mask_unit_attention", "cpu"), limit)
        assert lines() == {
            f"blocks.{i}.attn": f"forward -> mask_unit_attention ({how})"
            for i, how in enumerate(
                ["plain PyTorch for cpu: too long"] * 2
                + ["compiled kernel for cpu under autocast, else plain PyTorch: no fp32 here"] * 4
            )
        }


def test_limits_come_and_go_with_their_kernel():
    """A stand-in for another device has no limits but the contract's."""
    x = torch.randn(1, 34, 24)
    with torch.library._scoped_library("hiera_kernels", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        patch.setattr(calling, "limits", dict(calling.limits))
        kernels.register(library, "CPU")
        assert "q_stride is 17" in attention.refusal(x, 1, 1, 17)
    with oracle_kernels_on_cpu():
        assert attention.refusal(x, 1, 1, 17) is None

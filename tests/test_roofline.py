"""What `benchmarks.roofline` counts against sums done by hand, for layers small enough to do them."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hiera
import hiera_kernels
from benchmarks import roofline
from benchmarks.counting import FP32_ON_CUDA, FP32_RESULT_ON_CUDA, count, loss_of
from benchmarks.device_specs import SPECS, Spec, spec_named
from benchmarks.folded import fold
from benchmarks.fused_block import BlockShape, fused_block_bytes, weight_elements
from benchmarks.op_costs import Cost
from benchmarks.op_places import block_of, stage_of
from benchmarks.workloads import Workload

MIB = 2**20


def counted(model, make, run=None, **settings):
    """A step of `model` on what `make()` gives, with a loss that costs two named operations: sum and its backward."""
    settings = {"autocast": None, "optimizer": False, **settings}
    return count(model, lambda m: (run or (lambda m, x: m(x)))(m, make()).sum(), **settings)


def moved(step, *phases):
    """{name: bytes} without the loss's own: its sum, and the expanded ones that flow back."""
    found = {}
    for phase, _, _, name, cost in step.ops:
        if phase in (phases or ("forward", "backward")) and name not in ("ones_like",):
            found.setdefault(name, []).append(cost.bytes)
    return found


class Scale(nn.Module):
    """Holds an op and a weight, so that gradients flow to its input as they do inside a network."""

    def __init__(self, op, shape, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape, dtype=dtype))
        self.op = op

    def forward(self, x):
        return self.op(self.weight)


def nothing():
    return torch.empty(0)


def test_linear():
    layer = nn.Linear(48, 80)
    step = counted(layer, lambda: torch.empty(3, 100, 48, requires_grad=True))
    x, w, b, y = 300 * 48 * 4, 48 * 80 * 4, 80 * 4, 300 * 80 * 4
    found = moved(step)
    assert found["addmm"] == [x + w + b + y]
    # The loss's gradient is one expanded number, 4 bytes: in with the weight, gradient of x out; in with x, of w out.
    assert sorted(found["mm"]) == sorted([4 + w + x, 4 + x + w])
    assert found["sum"] == [y + 4, 4 + b]  # the loss itself, and the gradient of the bias
    assert step.total("flops", "forward") == 2 * 300 * 48 * 80
    assert step.total("flops", "backward") == 2 * 2 * 300 * 48 * 80
    assert sum(step.saved.values()) == x


def test_linear_under_autocast_casts_input_and_weights():
    layer = nn.Linear(48, 80)
    step = counted(layer, lambda: torch.empty(3, 100, 48), autocast=torch.bfloat16)
    x, w, b, y = 300 * 48, 48 * 80, 80, 300 * 80
    forward = moved(step, "forward")
    assert sorted(forward["_to_copy"]) == sorted([6 * x, 6 * w, 6 * b])
    assert forward["addmm"] == [2 * (x + w + b + y)]
    assert sum(step.saved.values()) == 2 * x
    backward = moved(step, "backward")
    # The weights' gradients become fp32; the loss, which CUDA sums in fp32, sends back an expanded fp32 number.
    assert sorted(backward["_to_copy"]) == sorted([6 * w, 6 * b, 4 + 2 * y])


def test_layer_norm_and_gelu():
    n, c = 2 * 30, 64
    layer = nn.Sequential(nn.LayerNorm(c), nn.GELU())
    step = counted(layer, lambda: torch.empty(2, 30, c, requires_grad=True))
    found, size, row = moved(step), n * c * 4, n * 4
    assert found["native_layer_norm"] == [size + 2 * c * 4 + size + 2 * row]
    assert found["gelu"] == [2 * size]
    assert found["gelu_backward"] == [4 + 2 * size]  # the loss's gradient is one expanded number
    assert found["native_layer_norm_backward"] == [2 * 2 * size + size + 2 * c * 4]  # two kernels read both
    assert sum(step.saved.values()) == size + 2 * row + size  # input and statistics; GELU's input


def test_layer_norm_of_16_bits_is_fp32_under_cudas_autocast():
    n, c = 60, 64
    step = counted(
        nn.LayerNorm(c), lambda: torch.empty(n, c, dtype=torch.bfloat16, requires_grad=True), autocast=torch.bfloat16
    )
    found = moved(step, "forward")
    assert found["_to_copy"] == [n * c * 6]
    assert found["native_layer_norm"] == [n * c * 8 + 2 * c * 4 + 2 * n * 4]


@pytest.mark.parametrize("names", [FP32_ON_CUDA, FP32_RESULT_ON_CUDA])
def test_what_is_added_to_autocast_is_what_cuda_has_and_the_cpu_has_not(names):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in names:
        assert has(f"aten::{name}", "AutocastCUDA"), name
        assert not has(f"aten::{name}", "AutocastCPU"), name


def test_attention_of_four_dimensions_is_one_kernel():
    b, h, s, k, d = 3, 2, 16, 64, 32

    def attend(weight):
        q, kv = weight[:, :, :s], weight
        return F.scaled_dot_product_attention(q, kv, kv.detach())

    step = counted(Scale(attend, (b, h, k, d), torch.bfloat16), nothing)
    (forward,) = [op for op in step.ops if op[0] == "forward" and op[2] == "attention"]
    # k and v are the same memory here, read once; the logarithms of the denominators are fp32.
    assert forward[4] == Cost(b * h * (s * d + k * d + s * d) * 2 + b * h * s * 4, 4 * b * h * s * k * d, 1)
    backward = [op for op in step.ops if op[0] == "backward" and op[2] == "attention" and "dot_product" in op[3]]
    assert [op[4].flops for op in backward] == [10 * b * h * s * k * d]


def test_attention_of_five_dimensions_is_computed_in_fp32_piece_by_piece():
    b, h, w, k, d = 2, 2, 3, 16, 32
    attend = lambda weight: F.scaled_dot_product_attention(*(weight[i] for i in range(3)))  # noqa: E731
    step = counted(Scale(attend, (3, b, h, w, k, d), torch.bfloat16), nothing)
    n, logits = b * h * w * k * d, b * h * w * k * k
    forward = [(op[3], op[4].bytes) for op in step.ops if op[0] == "forward" and op[2] == "attention"]
    assert [size for name, size in forward if name == "bmm"] == [4 * (2 * n + logits), 4 * (logits + 2 * n)]
    # q, k, v to fp32; the probabilities, which nobody asked for, and the result back.
    assert [size for name, size in forward if name == "_to_copy"] == [6 * n, 6 * n, 6 * n, 6 * logits, 6 * n]
    assert [size for name, size in forward if name == "_safe_softmax"] == [(8 + 5 + 1 + 8) * logits]
    assert [size for name, size in forward if name == "mul"] == [8 * n, 8 * n]
    products = [op for op in step.ops if op[3] == "bmm"]
    assert len(products) == 6
    assert not any(op[4].tensor_cores for op in products)


def test_a_maximum_scatters_its_gradient_in_place_and_keeps_64_bit_indices():
    n, p, c = 50, 4, 24
    step = counted(Scale(lambda weight: weight.max(0).values.square(), (p, n, c)), nothing)
    found, one = moved(step), n * c * 4
    assert found["max"] == [p * one + one + 2 * one]
    # Zeros, then as many writes as there are gradients; on fake tensors autograd calls the scatter that copies first.
    assert found["new_zeros" if "new_zeros" in found else "zeros"] == [p * one]
    assert found["scatter"] == [2 * one + one + one]


@pytest.mark.parametrize(("keys", "passes"), [(64, 1), (196, 2)])
def test_our_attention_moves_what_it_must(keys, passes):
    b, w, p, h, d = 2, 5 if keys == 64 else 1, 4, 2, 24
    n, c = w * keys, h * d
    attend = lambda weight: hiera_kernels.mask_unit_attention(weight, h, w, p)  # noqa: E731
    step = counted(Scale(attend, (b, n, 3 * c), torch.bfloat16), nothing)
    qkv, out = b * n * 3 * c * 2, b * n // p * c * 2
    found = moved(step)
    assert found["mask_unit_attention"] == [qkv + out]
    # The gradient that comes in is one expanded number.
    assert found["mask_unit_attention_backward"] == [passes * (qkv + 2) + qkv]
    assert sum(step.saved.values()) == 0  # qkv is a parameter here
    assert step.total("flops", "forward") == 4 * b * (n // p) * keys * c


def block_bytes_by_hand(n, c, e=2):
    """Forward of a plain block with 4-D attention, model in 16 bits, no pooling, one window: bytes by operation."""
    hidden, x = 4 * c, n * c * e
    return {
        "native_layer_norm": 2 * (2 * x + 2 * c * e) + 2 * 2 * n * 2,  # statistics in the dtype of the CPU: 16 bits
        "addmm": (x + 3 * x) + (x + x) + (x + 4 * x) + (4 * x + x) + e * (12 * c * c + 3 * c + c + hidden + c),
        "add": 2 * 3 * x,
        "gelu": 2 * 4 * x,
    }


def test_a_whole_plain_block():
    n, c = 3 * 16, 32
    block = hiera.block.HieraBlock(c, c, heads=2, window_size=16, use_mask_unit_attn=False)
    fold(block)
    step = counted(block, lambda: torch.empty(1, n, c, dtype=torch.bfloat16), cast=torch.bfloat16)
    found = moved(step, "forward")
    for name, expected in block_bytes_by_hand(n, c).items():
        assert sum(found[name]) == expected, name


def test_the_accelerated_step_moves_little_more_than_the_account_of_its_passes():
    workload = Workload("fine-tune", "hiera_tiny_224", 64)
    row = roofline.predict("accelerated", workload)
    account = weights = 0
    shape = BlockShape(N=56 * 56, P=1, C_in=96, C=96)
    for stage, blocks in enumerate((1, 2, 7, 2)):
        for i in range(blocks):
            if stage and i == 0:
                shape = BlockShape(shape.N // shape.P, 4, shape.C, 2 * shape.C)
            else:
                shape = BlockShape(shape.N // shape.P, 1, shape.C, shape.C)
            account += sum(fused_block_bytes(shape, residual=4 if stage == 0 else 2).values())
            weights += weight_elements(shape)
    # A weight is cast, read by two products, its gradient written by a third and cast back.
    floor = 64 * account + weights * (6 + 2 + 2 + 2 + 6)
    counted = sum(group["bytes"] for name, group in row["stages"].items() if name.startswith("stage"))
    assert floor <= counted <= 1.1 * floor
    stock = roofline.predict("folded", workload)
    assert sum(group["bytes"] for name, group in stock["stages"].items() if name.startswith("stage")) > 1.6 * floor


def test_every_operation_has_a_place_and_the_stages_make_up_the_whole():
    workload = Workload("fine-tune", "hiera_mini_128", 4, (128, 128))
    row = roofline.predict("accelerated", workload)
    assert set(row["stages"]) == {"embedding", "stage1", "stage2", "stage3", "stage4", "rest", "optimizer"} or set(
        row["stages"]
    ) == {"embedding", "stage1", "stage2", "stage3", "rest", "optimizer"}
    for what in ("bytes", "launches"):
        assert sum(group[what] for group in row["stages"].values()) == row[what] + row["optimizer"][what]
        assert sum(group[what] for group in row["kinds"].values()) == row[what] + row["optimizer"][what]
    assert sum(group["saved_bytes"] for group in row["stages"].values()) == row["saved_bytes"]
    assert sum(block["saved_bytes"] for block in row["blocks"].values()) == row["saved_bytes"]
    assert row["gpu_ms"]["h100"] == pytest.approx(sum(group["ms"]["h100"] for group in row["stages"].values()))


def test_what_is_saved_is_what_a_real_step_saves():
    workload = Workload("fine-tune", "hiera_mini_128", 3, (128, 128))
    model = roofline.built("folded", workload, {})
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), x)  # held, so that no other storage takes the address
        return x

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        images, labels = workload.inputs(torch.device("cpu"), 3, workload.size)
        workload.loss(workload.outputs(model, images), labels)
    real = sum(size for address, (size, _) in kept.items() if address not in parameters)
    step = count(model, loss_of(workload, 3), autocast=None, optimizer=False)
    assert sum(step.saved.values()) == real


def test_block_and_stage_of_a_parameter():
    assert block_of("blocks.3.norm1.weight") == "blocks.3"
    assert block_of("trunk.blocks.3.attn.qkv.bias") == "blocks.3"
    assert block_of("decoder_blocks.0.mlp.fc1.weight") == "decoder_blocks.0"
    assert block_of("pos_embed_spatial") == "embedding"
    assert block_of("decoder_pred.bias") == "rest"
    assert [stage_of(f"blocks.{i}", [1, 4]) for i in (0, 1, 2, 4)] == ["stage1", "stage1", "stage2", "stage2"]


def test_boolean_indexing_of_the_original_autoencoder_is_counted():
    workload = Workload("mae", "mae_hiera_tiny_224", 2, (224, 224), mask_ratio=0.6)
    row = roofline.predict("stock", workload)
    kept, units, tokens, channels = 19, 49, 64, 96
    picked = 2 * kept * tokens * channels
    # Under autocast tokens are fp32 (the position is); a mask of 3 dimensions means 3 lists of int64 positions.
    assert row["kinds"]["other"]["bytes"] > picked * (2 * 4 + 3 * 8) + 2 * units * tokens * channels
    smaller = roofline.predict("accelerated hiera", workload)
    assert smaller["kinds"]["other"]["bytes"] < 0.5 * row["kinds"]["other"]["bytes"]
    assert smaller["saved_bytes"] < row["saved_bytes"]


def test_time_is_the_longest_of_moving_computing_and_launching():
    spec = Spec(bandwidth_gb_per_s=1000, tensor_tflops=100, fp32_tflops=10, kernel_us=2, host_us=5)
    assert spec.seconds(Cost(bytes=10**9, flops=10**9, launches=1)) == pytest.approx(1e-3)
    assert spec.seconds(Cost(bytes=10**6, flops=10**12, launches=1)) == pytest.approx(1e-2)
    assert spec.seconds(Cost(bytes=10**6, flops=10**12, launches=1, tensor_cores=False)) == pytest.approx(1e-1)
    assert spec.seconds(Cost(bytes=10, flops=10, launches=3)) == pytest.approx(6e-6)


def test_a_step_that_the_host_cannot_feed_takes_the_hosts_time():
    row = roofline.predict("stock", Workload("fine-tune", "hiera_mini_128", 1, (128, 128)))
    launches = row["launches"] + row["optimizer"]["launches"]
    assert row["ms"]["h100"] == row["host_ms"]["h100"] == pytest.approx(launches * SPECS["h100"].host_us / 1e3)


def test_measured_ceilings_and_measurements_are_found(tmp_path):
    with pytest.raises(ValueError, match="make gpu"):
        spec_named("measured", tmp_path)
    about = {"gpu": "Some GPU", "commit": "c" * 40, "copy_gb_per_s": 2900.0}
    about["matmul_tflops"] = {"bfloat16": 650.0, "float32": 45.0}
    result = {"case": "a", "candidate": "stock", "dtype": "bfloat16", "mode": "eager", "ms": 70.0}
    (tmp_path / "some-gpu").mkdir()
    (tmp_path / "some-gpu" / "model.json").write_text(json.dumps({"environment": about, "results": [result]}))
    spec = spec_named("measured", tmp_path)
    assert (spec.bandwidth_gb_per_s, spec.tensor_tflops, spec.fp32_tflops) == (2900.0, 650.0, 45.0)
    row = {"case": "a", "candidate": "stock", "dtype": "bfloat16", "settings": {}}
    found = roofline.measured_like(row, tmp_path)
    assert (found["ms"], found["machine"]) == (70.0, "Some GPU")
    assert roofline.measured_like(row | {"settings": {"recompute": "gelu"}}, tmp_path) is None


def test_the_command_says_what_it_predicts_and_writes_it(tmp_path, capsys):
    arguments = ["--model", "hiera_mini_128", "--batch", "4", "--candidates", "stock", "accelerated", "--commit", "abc"]
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert roofline.main([*arguments, "--device-spec", "a100", *files]) == 0
    printed = capsys.readouterr().out
    assert "predicted for a100" in printed
    assert "stage3" in printed
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["environment"]["commit"] == "abc"
    assert [row["candidate"] for row in content["results"]] == ["stock", "accelerated"]
    assert (tmp_path / "out.png").stat().st_size > 5000
    with pytest.raises(SystemExit):
        roofline.main([*arguments, "--device-spec", "measured-by-nobody"])


@pytest.mark.gpu
@pytest.mark.parametrize("candidate", ["stock", "folded", "accelerated"])
def test_what_a_gpu_keeps_is_what_was_counted(candidate):
    workload = Workload("fine-tune", "hiera_tiny_224", 16)
    model = roofline.built(candidate, workload, {}).cuda()
    inputs = workload.inputs(torch.device("cuda"), 16, workload.size)

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            return workload.loss(workload.outputs(model, inputs[0]), inputs[1])

    run()  # what libraries keep for good
    before = torch.cuda.memory_allocated()
    loss = run()
    grown = torch.cuda.memory_allocated() - before
    del loss
    step = count(model.cpu(), loss_of(workload, 16), optimizer=False)
    assert grown == pytest.approx(sum(step.saved.values()) + step.saved_weights, rel=0.05)

"""Two processes on the CPU (gloo): DDP and FSDP2 around accelerated models of the families, and the other way round.

    python -m tests.family_distributed PORT

Started by test_family_distributed.py. Every rank trains on half of the batch; the averaged gradients must be those of
one plain process on the whole batch.
"""

import copy
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hiera_kernels.subclass import target_of
from hiera_kernels.swap import accelerate
from tests.families import FAMILIES, FEW, build, flattened, image
from tests.swap_cases import assert_equal

WORLD = 2
MODELS = (
    "timm hiera_tiny_224",
    "timm hieradet_small",
    "transformers HieraForImageClassification",
    "transformers Sam2HieraDetModel tiny",
    "sam2 tiny",
)


def blocks(model):
    return [module for module in model.modules() if hasattr(module, "attn")]


def shard(model):
    for block in blocks(model):
        fully_shard(block)
    return fully_shard(model)


def shard_attention(model):
    """Attention is a unit of its own, gathered by a hook: a block that passed it by would meet half of its weights."""
    for block in blocks(model):
        fully_shard(block.attn)
    return fully_shard(model)


WRAPPERS = {"DDP": DistributedDataParallel, "FSDP2": shard, "FSDP2 per attention": shard_attention}


CASES = [
    (name, wrap, order)
    for name in MODELS
    for wrap in WRAPPERS
    for order in ("accelerate first", "wrap first")
    # DDP looks at parameters alone: one order. Of the blocks that pass their attention by, and those that do not, one.
    if (wrap != "DDP" or order == "accelerate first")
    and (wrap != "FSDP2 per attention" or name in ("timm hiera_tiny_224", "sam2 tiny"))
]


def gradients(model, x):
    model.zero_grad()
    outputs = [o for o in flattened(model(x)) if o.is_floating_point()]
    sum(o.square().mean() for o in outputs).backward()
    found = {"output": outputs[-1].detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    return found


def one_case(name, wrap, order, rank):
    # The last stages see a map of 2 x 1 tokens: windows of 14 and 7 overhang on both sides.
    plain = build(name, small=True, size=(64, 32))
    x = image((64, 32), batch=2 * WORLD)
    mine = slice(2 * rank, 2 * rank + 2)
    expected = gradients(plain, x)
    expected["output"] = expected["output"][mine]
    model = copy.deepcopy(plain)
    if order == "accelerate first":
        accelerate(model)
    model = WRAPPERS[wrap](model)
    if order == "wrap first":
        accelerate(model)
    assert sum(target_of(module) is not None for module in model.modules()) == len(FAMILIES[name].replaced(FEW))
    for _ in range(2):  # the second step finds what the first has left behind
        assert_equal(gradients(model, x[mine]), expected)


def worker(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    for case in CASES:
        one_case(*case, rank)
        if rank == 0:
            print("ok:", *case, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(worker, args=(int(sys.argv[1]),), nprocs=WORLD)

"""Two processes on the CPU (gloo): DDP and FSDP2 around an accelerated model, and `accelerate` around theirs.

    python -m tests.distributed_swap PORT

Started by test_swap_distributed.py. Every rank trains on half of the batch; the averaged gradients must be those of one
plain process on the whole batch, for every way and order of wrapping.
"""

import copy
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hiera_kernels.subclass import target_of
from hiera_kernels.swap import accelerate, restore
from tests.block_kernels import JOINED, default_kernels_on_cpu
from tests.swap_cases import LIBRARIES, assert_equal, build, example, library

WORLD = 2


def shard(model):
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model.patch_embed)  # a unit of its own: it gathers its weights in a hook, which fusing must not skip
    return fully_shard(model)


def sharded_attention(model):
    """The swapped module itself is the unit: FSDP derives its class from ours, or ours from its."""
    for block in model.blocks:
        fully_shard(block.attn)
    return fully_shard(model)


WRAPPERS = {"DDP": DistributedDataParallel, "FSDP2": shard, "FSDP2 per attention": sharded_attention}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    found = {"output": out.detach()}
    found.update({name.removeprefix("module."): whole(p.grad).clone() for name, p in model.named_parameters()})
    return found


def swapped(model):
    return sum(target_of(module) is not None for module in model.modules())


def one_case(name, wrap, order, rank):
    plain = build(name, stages=(1, 1, 1, 1))
    x = example(batch=2 * WORLD)
    expected = gradients(plain, x)
    expected["output"] = expected["output"][2 * rank : 2 * rank + 2]
    model = copy.deepcopy(plain)
    count = len(accelerate(copy.deepcopy(plain)).replaced)
    if order == "accelerate first":
        accelerate(model)
    model = WRAPPERS[wrap](model)
    if order == "wrap first":
        report = accelerate(model)
        assert len(report.replaced) == count, report
    assert swapped(model) == count
    mine = x[2 * rank : 2 * rank + 2]
    for _ in range(2):  # the second step finds what the first has left behind
        assert_equal(gradients(model, mine), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    after_one_step = gradients(model, mine)
    restore(model)
    assert swapped(model) == 0
    assert_equal(gradients(model, mine), after_one_step)
    inner = model.module if wrap == "DDP" else model
    assert isinstance(inner, library(name).Hiera)


def worker(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    for name in LIBRARIES:
        for wrap in WRAPPERS:
            for order in ("accelerate first", "wrap first"):
                one_case(name, wrap, order, rank)
                if rank == 0:
                    print(f"ok: {name}, {wrap}, {order}", flush=True)
    # By way of the ops, where blocks read parameters, and hand over what they make of the next block's.
    for wrap in WRAPPERS:
        with default_kernels_on_cpu() as calls:
            one_case("hiera", wrap, "accelerate first", rank)
        # Of 4 blocks, 3 times; a block whose weights are gathered when it runs leaves no norm1 to another.
        handed_over = calls.count(JOINED) - 4 * 3
        assert handed_over == (0 if wrap == "FSDP2" else 3 * 3), (wrap, handed_over)
        if rank == 0:
            print(f"ok: hiera, {wrap}, by ops", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(worker, args=(int(sys.argv[1]),), nprocs=WORLD)

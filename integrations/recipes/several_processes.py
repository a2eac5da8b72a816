"""DDP, or FSDP2 for a model that fits no single GPU, run by torchrun: every rank probes, rank 0 writes.

torchrun --nproc-per-node 2 -m torchgeom_probe.integrations.recipes.several_processes
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import torchgeom_probe as tgp


def main(csv="torchgeom_runs/several/geometry.csv", sharded=False, steps=20):
    """Train on a different batch on every rank; make the monitor on every rank, with the same samples."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(4)), nn.Linear(32, 2))
    if sharded:  # all ranks measure all samples together, block by block; TopK, LogDet and Trace gather the whole model
        for block in [*list(model.children())[:-1], model]:
            fully_shard(block)
    else:  # each rank measures its share of the samples
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    x_probe = torch.randn(32, 32)
    batches = torch.Generator().manual_seed(1 + dist.get_rank())
    writer = csv if dist.get_rank() == 0 else None
    with tgp.Monitor(model, x_probe, layers=["3"], every=10, writer=writer).follow(optimizer) as monitor:
        for _ in range(steps):
            x = torch.randn(16, 32, generator=batches)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()

    report = monitor.history[-1][1] if dist.get_rank() == 0 else None
    if report is not None:
        print(report)
    dist.destroy_process_group()
    return report


if __name__ == "__main__":
    main()

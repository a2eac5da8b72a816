"""FSDP2, run by torchrun: a model that fits no single GPU, probed while it trains, by all ranks together.

torchrun --nproc-per-node 2 -m torchgeom_probe.integrations.recipes.fsdp
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import torchgeom_probe as tgp


def main(csv="torchgeom_runs/fsdp/geometry.csv", steps=20):
    """Train on a different batch on every rank; probe on every rank, with the same samples: rank 0 writes."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(4)), nn.Linear(32, 2))
    for block in model[:-1]:
        fully_shard(block)  # gathered one by one, also in a probe; TopK, LogDet and Trace gather the whole model
    fully_shard(model)
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

    report = monitor.history[-1][1]
    if dist.get_rank() == 0:
        print(report)
    dist.destroy_process_group()
    return report


if __name__ == "__main__":
    main()

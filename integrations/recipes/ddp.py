"""DDP, run by torchrun: each rank measures a share of the probe samples, rank 0 gathers and writes.

torchrun --nproc-per-node 2 -m torchgeom_probe.integrations.recipes.ddp
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torchgeom_probe as tgp


def main(csv="torchgeom_runs/ddp/geometry.csv", steps=20):
    """Train on a different batch on every rank; make the monitor on every rank, with the same samples."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    x_probe = torch.randn(32, 8)
    batches = torch.Generator().manual_seed(1 + dist.get_rank())
    with tgp.Monitor(model, x_probe, layers=["1"], every=10, writer=csv).follow(optimizer) as monitor:
        for _ in range(steps):
            x = torch.randn(16, 8, generator=batches)
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

"""LoRA by PEFT, trained by accelerate: probe the wrapped model as it is, with its adapters."""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

import torchgeom_probe as tgp


def main(steps=6):
    """Train adapters of rank 4 on a frozen network; the volume changes by what they add."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(network, LoraConfig(r=4, target_modules=["0", "2"]))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)

    x = torch.randn(64, 8)
    y = (x[:, 0] > 0).long()
    layers = ["base_model.model.1", "base_model.model.3"]
    with tgp.Monitor(model, x[:16], layers=layers, every=2).follow(optimizer) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
    print(monitor.history[-1][1])
    return monitor.history[-1][1]


if __name__ == "__main__":
    main()

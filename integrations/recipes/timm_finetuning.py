"""Fine-tuning a timm model: its own preprocessing, its stages as layers, and a penalty on two of them in the loss."""

import torch
from PIL import Image
from skimage import data
from torch import nn
from torchgeom_probe.integrations.timm import load, stage_layers

import torchgeom_probe as tgp


def main(name="vit_tiny_patch16_224", pretrained=False, steps=4, weight=0.1, **options):
    """Teach a network a cat, a cup and a rocket; ``pretrained=True`` fetches its ImageNet weights."""
    torch.manual_seed(0)
    loaded = load(name, pretrained=pretrained, num_classes=3, **options)
    photographs = [Image.fromarray(image) for image in (data.chelsea(), data.coffee(), data.rocket())]
    x, y = loaded.batch(photographs), torch.arange(3)

    model = loaded.model.train()
    head = {id(p) for p in model.get_classifier().parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in head], "lr": 1e-4},
        {"params": list(model.get_classifier().parameters()), "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups)

    layers = stage_layers(model)
    penalised = dict.fromkeys(layers[-2:], weight)
    with tgp.Monitor(model, x, layers=layers, estimator=tgp.Subspace(k=4), every=2).follow(optimizer) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            step = tgp.pushforward(model, x + 0.05 * torch.randn_like(x), layers=list(penalised))
            loss = nn.functional.cross_entropy(step.output, y) + tgp.penalty(step, penalised)
            loss.backward()
            optimizer.step()
            print(f"loss {loss.item():.3f}, " + ", ".join(f"{b} {step[b].trace.mean().item():.4f}" for b in penalised))

    print(monitor.history[-1][1])
    return monitor.history[-1][1]


if __name__ == "__main__":
    main()

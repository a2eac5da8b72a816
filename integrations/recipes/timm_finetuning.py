"""Fine-tuning a timm model: its own preprocessing, its stages as layers, a probe at the photographs."""

import torch
from PIL import Image
from skimage import data
from torch import nn
from torchgeom_probe.integrations.timm import load, stage_layers

import torchgeom_probe as tgp


def main(name="resnet10t.c3_in1k", pretrained=False, steps=4):
    """Teach a network a cat, a cup and a rocket; ``pretrained=True`` fetches its ImageNet weights."""
    torch.manual_seed(0)
    loaded = load(name, pretrained=pretrained, num_classes=3)
    photographs = [Image.fromarray(image) for image in (data.chelsea(), data.coffee(), data.rocket())]
    x, y = loaded.batch(photographs), torch.arange(3)

    model = loaded.model.train()
    head = {id(p) for p in model.get_classifier().parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in head], "lr": 1e-3},
        {"params": list(model.get_classifier().parameters()), "lr": 1e-2},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)

    layers, estimator = stage_layers(model), tgp.Subspace(k=4)
    with tgp.Monitor(model, x, layers=layers, estimator=estimator, every=2).follow(optimizer) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x + 0.05 * torch.randn_like(x)), y).backward()
            optimizer.step()

    print(monitor.history[-1][1])
    return monitor.history[-1][1]


if __name__ == "__main__":
    main()

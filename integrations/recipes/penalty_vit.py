"""Fine-tuning a timm ViT with a penalty on two of its blocks, where jvp and backward has the gradient wrong."""

import timm
import torch
from torch import nn

import torchgeom_probe as tgp


def main(name="vit_tiny_patch16_224", pretrained=False, steps=4, **options):
    """Teach a ViT two kinds of noise; ``pretrained=True`` fetches its ImageNet weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=pretrained, num_classes=2, drop_path_rate=0.1, **options).train()
    size = model.patch_embed.img_size[0]
    y = torch.arange(8) % 2
    smooth = nn.functional.interpolate(torch.randn(8, 3, size // 4, size // 4), size=size, mode="bilinear")
    x = torch.where(y[:, None, None, None] == 0, smooth, torch.randn(8, 3, size, size))

    blocks = [f"blocks.{len(model.blocks) // 2}", f"blocks.{len(model.blocks) - 1}"]
    head = {id(p) for p in model.get_classifier().parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in head], "lr": 1e-4},
        {"params": list(model.get_classifier().parameters()), "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        step = tgp.pushforward(model, x, layers=blocks)
        loss = nn.functional.cross_entropy(step.output, y) + tgp.penalty(step, dict.fromkeys(blocks, 0.1))
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}, " + ", ".join(f"{b} {step[b].trace.mean().item():.4f}" for b in blocks))

    report = tgp.measure(model, x[:2], layers=blocks, estimator=tgp.TopK(k=2))
    print(report)
    return report


if __name__ == "__main__":
    main()

"""An isometric autoencoder (Lee et al., ICLR 2022): a decoder that keeps lengths up to one scale."""

import torch
from torch import nn

import torchgeom_probe as tgp


def distortion(pushed, d):
    """Return d E tr g² / (E tr g)²: 1 where the decoder is isometric up to a scale, more elsewhere."""
    return d * pushed.isometry.mean() / pushed.trace.mean() ** 2


def main(weight=0.1, steps=300):
    """Fold a plane into R⁸, learn it back with and without the penalty, and print the distortion of both."""
    torch.manual_seed(0)
    plane = torch.rand(512, 2) * 3
    x = torch.cat([plane.sin(), plane.cos(), (2 * plane).sin(), plane.prod(1, keepdim=True), plane[:, :1] ** 2], 1)
    for strength in (0.0, weight):
        torch.manual_seed(1)
        encoder = nn.Sequential(nn.Linear(8, 64), nn.ELU(), nn.Linear(64, 2))
        decoder = nn.Sequential(nn.Linear(2, 64), nn.ELU(), nn.Linear(64, 8))
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            step = tgp.pushforward(decoder, encoder(x), k=2, probes="frame", normalize=False)
            error, bent = nn.functional.mse_loss(step.output, x), distortion(step[""], 2)
            (error + strength * bent).backward()
            optimizer.step()
        print(f"weight {strength:g}: error {error.item():.4f}, distortion {bent.item():.3f}")
    report = tgp.measure(decoder, encoder(x[:16]).detach(), layers="")
    print(report)
    return report


if __name__ == "__main__":
    main()

"""Compiled, in mixed precision, with gradient accumulation: the monitor counts updates, and measures in float32."""

import torch
from torch import nn

import torchgeom_probe as tgp


def main(steps=12, accumulate=4, backend="inductor"):
    """Train a small convolutional network on noise with labels; one probe every third update."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.float16 if device == "cuda" else torch.bfloat16
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GELU(), nn.Flatten(), nn.Linear(16 * 36, 4)).to(device)
    model = torch.compile(network, backend=backend)  # goes to the monitor as it is: it finds the network inside
    assert isinstance(model, nn.Module)  # an OptimizedModule
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=half == torch.float16)

    x_probe = torch.randn(8, 3, 8, 8, device=device)
    # Follows the optimizer: an update that the scaler skips is no step, and a micro-batch is none either.
    with tgp.Monitor(model, x_probe, layers=["0", "1"], every=3).follow(optimizer) as monitor:
        for _ in range(steps):
            for _ in range(accumulate):
                x, y = torch.randn(16, 3, 8, 8, device=device), torch.randint(0, 4, (16,), device=device)
                with torch.autocast(device, dtype=half):
                    loss = nn.functional.cross_entropy(model(x), y) / accumulate
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    report = monitor.history[-1][1]
    print(f"{monitor.steps} updates of {accumulate} micro-batches of a {type(model).__name__}, {monitor.probes} probes")
    print(report)
    return report


if __name__ == "__main__":
    main()

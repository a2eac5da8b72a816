"""A compiled model: training runs the compiled code, a probe the module that it was made from."""

import torch
from torch import nn

import torchgeom_probe as tgp


def main(steps=20, backend="inductor"):
    """Fit a sine by a compiled network; pass the compiled model to the monitor as it is."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    model = torch.compile(network, backend=backend)
    assert isinstance(model, nn.Module)  # an OptimizedModule: the monitor finds the network inside
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)

    x = torch.linspace(-3, 3, 64).unsqueeze(1)
    with tgp.Monitor(model, x, layers=["1", "3"], every=10, estimator=tgp.Exact()).follow(optimizer) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), x.sin()).backward()
            optimizer.step()

    report = monitor.history[-1][1]
    print(f"{monitor.probes} probes of the module inside {type(model).__name__}\n{report}")
    return report


if __name__ == "__main__":
    main()

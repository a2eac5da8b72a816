"""A plain training loop: the monitor follows the optimizer, and the loop stays as it is."""

import torch
from torch import nn

import torchgeom_probe as tgp


def main(log_dir="torchgeom_runs/plain_loop", epochs=8):
    """Separate two rings by a shallow network, and watch its hidden layer."""
    torch.manual_seed(0)
    angle, ring = 6.3 * torch.rand(512), torch.randint(0, 2, (512,))
    x = (1 + ring + 0.1 * torch.randn(512)) * torch.stack([angle.cos(), angle.sin()])
    data = torch.utils.data.TensorDataset(x.T, ring)
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)

    model = nn.Sequential(nn.Linear(2, 64), nn.Sigmoid(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    x_probe = torch.stack([data[i][0] for i in range(32)])
    with tgp.Monitor(model, x_probe, layers=["1"], every=20, writer=log_dir).follow(optimizer) as monitor:
        for _ in range(epochs):
            for inputs, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()

    report = monitor.history[-1][1]
    print(f"after {monitor.steps} steps, tensorboard --logdir {log_dir}\n{report}")
    return report


if __name__ == "__main__":
    main()

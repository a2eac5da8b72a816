"""Lightning: one callback, and the Trainer's own loggers get the charts; a penalty is a line of training_step."""

import pytorch_lightning as pl
import torch
from torch import nn
from torchgeom_probe.integrations.lightning import GeometryCallback

import torchgeom_probe as tgp


class Classifier(pl.LightningModule):
    """Any LightningModule; precision and accumulation stay the Trainer's."""

    def __init__(self, weights):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 2))
        self.weights = weights

    def forward(self, x):
        """Compute what is probed."""
        return self.net(x)

    def training_step(self, batch, batch_idx):
        """Return the loss with its penalty, and log what the penalty is of."""
        step = tgp.pushforward(self.net, batch[0], layers=list(self.weights), k=2)
        self.log_dict({f"trace/{layer}": pushed.trace.mean() for layer, pushed in step.items()})
        return nn.functional.cross_entropy(step.output, batch[1]) + tgp.penalty(step, self.weights)

    def configure_optimizers(self):
        """Return the optimizer, whose steps are counted."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(log_dir="torchgeom_runs/lightning", **options):
    """Train for two epochs, with a probe before, every 8 steps, at the ends of epochs and after."""
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    geometry = GeometryCallback(layers=["net.2", "net.3"], every=8, epoch_ends=True)
    trainer = pl.Trainer(max_epochs=2, callbacks=[geometry], default_root_dir=log_dir, **options)
    trainer.fit(Classifier({"2": 0.01, "3": 0.1}), loader)
    print([step for step, _ in geometry.history], dict(trainer.callback_metrics), geometry.history[-1][1], sep="\n")
    return geometry.history[-1][1]


if __name__ == "__main__":
    main()

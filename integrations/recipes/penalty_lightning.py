"""Lightning: a penalty on the geometry is a line of training_step; precision and accumulation stay the Trainer's."""

import pytorch_lightning as pl
import torch
from torch import nn

import torchgeom_probe as tgp


class Classifier(pl.LightningModule):
    """Any LightningModule."""

    def __init__(self, weights):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 2))
        self.weights = weights

    def training_step(self, batch, batch_idx):
        """Return the loss, and log what the penalty is of."""
        step = tgp.pushforward(self.net, batch[0], layers=list(self.weights), k=2)
        self.log_dict({f"trace/{layer}": pushed.trace.mean() for layer, pushed in step.items()})
        return nn.functional.cross_entropy(step.output, batch[1]) + tgp.penalty(step, self.weights)

    def configure_optimizers(self):
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(**options):
    """Train for two epochs, and measure the hidden layer."""
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    model = Classifier({"2": 0.01, "3": 0.1})
    trainer = pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, **options)
    trainer.fit(model, loader)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    report = tgp.measure(model.net, x[:16], layers="2")
    print(report)
    return report


if __name__ == "__main__":
    main()

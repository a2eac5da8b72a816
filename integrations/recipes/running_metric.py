"""In the manner of torchmetrics: ``update`` per batch, ``compute`` at the end of the epoch, ``reset``."""

import torch

import torchgeom_probe as tgp


class MeanLogVolume:
    """The mean log-volume of every layer over all samples seen since the last reset, in nats."""

    def __init__(self, model, **options):
        self.probe, self.reports = tgp.GeometryProbe(model, **options), []

    def update(self, x):
        """Measure one batch."""
        self.reports.append(self.probe.measure(x))

    def compute(self):
        """Layer → the mean over all samples so far."""
        report = tgp.GeometryReport.joined(self.reports)
        return {name: float(layer.value.mean()) for name, layer in report.items()}

    def reset(self):
        """Begin anew."""
        self.reports.clear()


def main(batches=3):
    """Three batches of a validation loop."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    metric = MeanLogVolume(model, layers=["1"])
    for _ in range(batches):
        metric.update(torch.randn(8, 4))
    report = tgp.GeometryReport.joined(metric.reports)
    print(metric.compute(), report, sep="\n")
    return report


if __name__ == "__main__":
    main()

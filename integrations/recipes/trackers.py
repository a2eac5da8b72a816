"""W&B and MLflow: a writer of a few lines each; any other tracker is one more like them."""

from math import isfinite

import torch

import torchgeom_probe as tgp


def numbers(report):
    """What a tracker takes: ``layer/statistic`` → a finite number."""
    found = {f"{name or 'model'}/{key}": v for name, layer in report.items() for key, v in layer.statistics().items()}
    return {key: value for key, value in found.items() if isfinite(value)}


class WandbWriter(tgp.Writer):
    """Into a run of Weights & Biases: ``WandbWriter(wandb.init(...))``."""

    def __init__(self, run):
        self.run = run

    def write(self, step, report):
        """Log every layer's statistics."""
        self.run.log(numbers(report), step=step)


class MlflowWriter(tgp.Writer):
    """Into the active run of MLflow: ``MlflowWriter(mlflow)``."""

    def __init__(self, mlflow):
        self.mlflow = mlflow

    def write(self, step, report):
        """Log every layer's statistics."""
        self.mlflow.log_metrics(numbers(report), step=step)


def main(writers=()):
    """Watch a layer that learns nothing, into the writers that are given."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh())
    with tgp.Monitor(model, torch.randn(8, 4), layers=["1"], every=1, writer=list(writers)) as monitor:
        monitor.step()
        monitor.step()
    print(monitor.history[-1][1])
    return monitor.history[-1][1]


if __name__ == "__main__":
    main()

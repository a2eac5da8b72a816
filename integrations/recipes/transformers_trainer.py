"""Hugging Face's Trainer: a callback over a Monitor.  Ids have no derivative, so it measures from the embeddings on."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import torchgeom_probe as tgp


class Geometry(TrainerCallback):
    """Probe before the first update, at every update that the monitor's schedule picks, and at the end."""

    def __init__(self, x_probe, **options):
        self.x_probe, self.options = x_probe, options

    def on_train_begin(self, args, state, control, model=None, **_):
        """Probe before the first step."""
        self.monitor = tgp.Monitor(model, self.x_probe, **self.options)
        self.monitor.probe_now()

    def on_step_end(self, args, state, control, **_):
        """Count the update."""
        self.monitor.step(at=state.global_step)

    def on_train_end(self, args, state, control, **_):
        """Let go of it."""
        self.monitor.close()


def main(steps=6):
    """Teach a small BERT which half of its vocabulary is in the majority."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, max_position_embeddings=16, **sizes))
    ids = torch.randint(0, 100, (64, 8))
    data = [{"input_ids": row, "labels": int((row < 50).sum() > 4)} for row in ids]
    options = {"layers": ["bert.encoder.layer.*"], "source": "bert.embeddings", "every": 2, "estimator": "subspace:8"}
    geometry = Geometry({"input_ids": ids[:8]}, **options)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, max_steps=steps, report_to=[], save_strategy="no", use_cpu=True)
        Trainer(model, settings, train_dataset=data, callbacks=[geometry]).train()
    print(geometry.monitor.history[-1][1])
    return geometry.monitor.history[-1][1]


if __name__ == "__main__":
    main()

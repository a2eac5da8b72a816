"""A token model: ids have no derivative, so the metric is pulled back to the output of the embeddings."""

import torch
from torch import nn

import torchgeom_probe as tgp


class Classifier(nn.Module):
    """Embeddings, one transformer block, the mean over the tokens, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.head = nn.Linear(16, 2)

    def forward(self, ids):
        """Class scores of token ids [B, T]."""
        return self.head(self.block(self.embed(ids)).mean(1))


def main(steps=20):
    """Learn whether a sequence has more low ids than high ones; probe from the embeddings on."""
    torch.manual_seed(0)
    model, ids = Classifier(), torch.randint(0, 50, (64, 9))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    layers = ["block.norm1", "block"]
    with tgp.Monitor(model, ids[:8], layers=layers, source="embed", every=10).follow(optimizer) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            labels = ((ids < 25).sum(1) > 4).long()
            nn.functional.cross_entropy(model(ids), labels).backward()
            optimizer.step()
    print(monitor.history[-1][1])
    return monitor.history[-1][1]


if __name__ == "__main__":
    main()

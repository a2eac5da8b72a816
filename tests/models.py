"""Small models for the tests: shapes are distinct primes where they can be."""

import timm
import torch
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(5, 13), nn.Sigmoid(), nn.Linear(13, 11), nn.GELU(), nn.Linear(11, 3))


def _calibrated(model, size):
    """Give batch normalisation running statistics that are its own, as in a trained network."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(7, 3, size, size))
    return model.eval()


def cifar_resnet():
    """The paper's ResNet, narrow: 3x3 stem, no max-pool, GELU."""
    model = timm.create_model(
        "resnet18", num_classes=7, act_layer="gelu", channels=(8, 12, 16, 20), zero_init_last=False
    )
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return _calibrated(model, 8)


def resnet18():
    return _calibrated(timm.create_model("resnet18", num_classes=7, zero_init_last=False), 32)


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=12, patch_size=4, depth=3, embed_dim=48, num_heads=3, num_classes=7
    ).eval()


#: name → (factory, input shape, hooked layers): inner modules, containers and the head, all hooked at once.
CASES = {
    "mlp": (mlp, (5,), ["1", "3", "4"]),
    "cifar_resnet": (
        cifar_resnet,
        (3, 8, 8),
        ["conv1", "layer1", "layer2.0.bn1", "layer3", "layer4.1", "global_pool", "fc"],
    ),
    "timm_resnet18": (resnet18, (3, 16, 16), ["maxpool", "layer1.0.act1", "layer2", "layer4", "fc"]),
    "vit": (vit, (3, 12, 12), ["patch_embed", "blocks.0.attn", "blocks.1.norm1", "blocks.2", "norm", "head"]),
}


class Tokens(nn.Module):
    """A token model: embeddings, one attention block, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(19, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 17, dropout=0.1, batch_first=True, activation="gelu")
        self.head = nn.Linear(8, 3)

    def forward(self, ids, mask=None):
        h = self.block(self.embed(ids), src_key_padding_mask=mask)
        return self.head(h.mean(1))

"""Barlow Twins with lightly on the paper's network, ResNet-34 with GELU: how much views are pulled together."""

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import BarlowTwinsLoss
from lightly.models.modules import BarlowTwinsProjectionHead
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from torch import nn
from torchgeom_probe.integrations.lightly import TwoViewProbe, embedding_layers, encoder, views
from torchgeom_probe.integrations.timm import cifar_resnet

import torchgeom_probe as tgp


def main(data=None, epochs=2, channels=(8, 8, 16, 16), size=16):
    """Train on a torchvision data set; the paper's: CIFAR10, 1000 epochs, channels (64, 128, 256, 512), size 32."""
    torch.manual_seed(0)
    kinds = (BYOLView1Transform, BYOLView2Transform)
    transform = BYOLTransform(*(kind(input_size=size, gaussian_blur=0.0) for kind in kinds))
    images = torchvision.datasets.FakeData(48, (3, 32, 32)) if data is None else data
    images = LightlyDataset.from_torch_dataset(images, transform=transform)
    loader = torch.utils.data.DataLoader(images, batch_size=8, shuffle=True, drop_last=True)

    model, criterion = nn.Module(), BarlowTwinsLoss()
    model.backbone = cifar_resnet("resnet34", act="gelu", num_classes=0, channels=channels)
    model.projection_head = BarlowTwinsProjectionHead(channels[-1], 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    batch, network = next(iter(loader)), encoder(model)
    layers = embedding_layers(model)
    with tgp.Monitor(network, views(batch)[0], layers=layers, every=5).follow(optimizer) as monitor:
        for (x0, x1), _, _ in (b for _ in range(epochs) for b in loader):
            optimizer.zero_grad()
            criterion(network(x0), network(x1)).backward()
            optimizer.step()

    print(monitor.history[-1][1], TwoViewProbe(model).augmentation(batch), sep="\n\n")
    return monitor.history[-1][1]


if __name__ == "__main__":
    main()

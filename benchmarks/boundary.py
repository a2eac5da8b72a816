"""How often the population test rejects a true null, and how often it finds a planted effect."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn

import torchgeom_probe as tgp
from benchmarks.timing import Settings
from torchgeom_probe.boundary import inference
from torchgeom_probe.boundary.design import Design, designed
from torchgeom_probe.boundary.inference import LayerFields, effect_of
from torchgeom_probe.reproduce.data import load_digits

TITLE = "The population test: true nulls that it rejects, planted effects that it finds"
NOTE = """\
Shares of draws in which `boundary_study` prints p < 0.05, with two standard errors of a share of 5 %: above the upper
end it would be too eager. Eight sigmoid networks (64-512-10) trained on scikit-learn's digits decide, over up to 100
pairs of held-out digits each (50 for the planted effect).

- "random field": in place of log-volumes Gaussian fields over R⁶⁴ of covariance exp(−r²/2ℓ²), ℓ in units of the median
  distance of two digits. "two classes": the same, of networks that tell odd digits from even ones; `mirror` regresses
  out what changes from class to class ("raw mirror": without that).
- `same_class`: of a volume, here the field itself, against points of one class.
- "untrained": another untrained network is `initial`, a trained one decides. "foreign": a trained network and its own
  initial state, at the boundaries of one that memorised random labels.
- "planted": 0.1 nats at the boundary, in a random field of 0.15 nats; here a high share is good. "bare peak": l(t*)
  minus the mean of its neighbours, which the package does not offer: the reason why.

The second table is what the test says of these networks themselves, as units (`compare_networks`): nats, trained minus
untrained, with 95 % intervals."""
METHOD = "shares of draws"

Field = Callable[[Tensor], Tensor]
_CONTRASTS = ("mirror", "peak", "same_class")
#: Digits to train on; the other 800 are held out.
_TRAINING = 997


class Beside(nn.Module):
    """One network that decides, and another that is measured where the first one's boundaries are."""

    def __init__(self, decides: nn.Module, measured: nn.Module) -> None:
        super().__init__()
        self.decides, self.measured = decides, measured

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        self.measured(x)
        return self.decides(x)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 512), nn.Sigmoid(), nn.Linear(512, 10))


def trained(seed: int, x: Tensor, labels: Tensor, epochs: int) -> nn.Sequential:
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def random_field(length: float, seed: int, *, features: int = 1000) -> Field:
    """A stationary Gaussian field of unit variance over R⁶⁴, by random Fourier features."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(64, features, generator=generator, dtype=torch.float64) / length
    phases = torch.rand(features, generator=generator, dtype=torch.float64) * 2 * math.pi
    weights = torch.randn(features, generator=generator, dtype=torch.float64) * math.sqrt(2 / features)
    return lambda x: torch.cos(x.double() @ frequencies + phases) @ weights


def odd_or_even(logits: Tensor) -> Tensor:
    """The logits of two classes."""
    return torch.stack([logits[:, parity::2].logsumexp(1) for parity in (0, 1)], 1)


class Draws:
    """Networks, held-out digits, and the p-values of one draw after the other."""

    def __init__(self, *, networks: int, epochs: int) -> None:
        data = load_digits(seed=0)
        images = torch.cat([data.train_images, data.test_images]).flatten(1)
        labels = torch.cat([data.train_labels, data.test_labels])
        x, labels, self.x = images[:_TRAINING], labels[:_TRAINING], images[_TRAINING:]
        self.scale = torch.cdist(self.x, self.x).median().item()
        shuffled = labels[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        self.trained = [trained(seed, x, labels, epochs) for seed in range(networks)]
        self.memorised = [trained(100 + seed, x, shuffled, epochs) for seed in range(networks)]
        self._designs: dict[tuple[int, str, int, Field | None], Design] = {}

    def fields(self, number: int, contrast: str, length: float, readout: Field | None = None) -> float:
        """Two independent random fields at a trained network's boundaries."""
        fields = [random_field(length * self.scale, 2 * number + i) for i in (0, 1)]
        return self._of_fields(number, contrast, fields, design=self._design(number, contrast, 100, readout))

    def planted(self, number: int, contrast: str, nats: float) -> float:
        """A bump along the boundary on a random field, without an untrained network."""
        model = copy.deepcopy(self.trained[number % len(self.trained)]).double()
        noise = random_field(0.35 * self.scale, number)
        top = model(self.x.double()).topk(2).values
        width = (top[:, 0] - top[:, 1]).median().item() / 2

        def field(x: Tensor) -> Tensor:
            margins = model(x.double()).topk(2).values
            return 0.15 * noise(x) + nats * torch.exp(-(((margins[:, 0] - margins[:, 1]) / width) ** 2))

        return self._of_fields(number, contrast, [field], pairs=50)

    def untrained(self, number: int, contrast: str) -> float:
        """An untrained network, and another one as its initial state, at a trained network's boundaries."""
        decides = self.trained[number % len(self.trained)]
        return self._study(decides, network(1000 + 2 * number), network(1001 + 2 * number), contrast, number)

    def foreign(self, number: int, contrast: str) -> float:
        """A trained network and its initial state at the boundaries of one that memorised random labels."""
        count = len(self.trained)
        own, other = number % count, (number + 1 + number // count) % count
        return self._study(self.memorised[other], self.trained[own], network(own), contrast, number)

    def bare_peak(self, number: int, length: float) -> float:
        """What a peak without its mirror image would say of a random field."""
        design = self._design(number, "peak", 100)
        weights = torch.tensor([1.0, -0.5, -0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
        bare = dataclasses.replace(design, weights=weights)
        return self._of_fields(number, "peak", [random_field(length * self.scale, number)], design=bare)

    def _study(self, decides: nn.Module, measured: nn.Module, initial: nn.Module, contrast: str, seed: int) -> float:
        study = tgp.boundary_study(
            Beside(decides, measured),
            self.x,
            layers=["measured.1"],
            initial=Beside(decides, initial),
            contrast=contrast,
            estimator=tgp.Subspace(k=1),
            pairs=100,
            offsets=(),
            seed=seed,
            progress=False,
        )
        return study["measured.1"].p_value

    def _design(self, number: int, contrast: str, pairs: int, readout: Field | None = None) -> Design:
        key = number % len(self.trained), contrast, pairs, readout
        if key not in self._designs:
            settings = {"contrast": contrast, "seed": key[0], "pairs": pairs, "share": False, "offsets": []}
            model = self.trained[key[0]]
            with torch.no_grad():
                self._designs[key] = designed(model, self.x, torch.arange(len(self.x)), readout, settings)
        return self._designs[key]

    def _of_fields(
        self, number: int, contrast: str, fields: list[Field], *, pairs: int = 100, design: Design | None = None
    ) -> float:
        design = design or self._design(number, contrast, pairs)
        shape = design.points.shape[:2]
        with torch.no_grad():
            values = [field(design.points.flatten(0, 1).double()).reshape(shape) for field in fields]
        places = len(design.weights)
        found = LayerFields(*({"speed": value, "volume": value[:, :places]} for value in values))
        return effect_of("a field", found, design, contrast, ()).p_value


def effects(draws: Draws, pairs: int) -> Iterator[str]:
    """What the test says of the digit networks themselves, the networks as units."""
    yield "| layer, contrast | log speed along the line | log √det g | ½ log tr g | untrained alone | p | pairs |"
    yield "|---|---|---|---|---|---|---|"
    for contrast in _CONTRASTS[:2]:
        studies = []
        for seed, model in enumerate(draws.trained):  # each with pairs of its own
            options = {"initial": network(seed), "contrast": contrast, "pairs": pairs, "seed": seed, "layers": ["1"]}
            studies.append(tgp.boundary_study(model, draws.x, progress=False, **options))
        found = tgp.compare_networks(studies)["1"]
        estimates = (found.estimate, found.volume.estimate, found.trace.estimate, found.initial.estimate)
        yield f"| sigmoid, {contrast} | {' | '.join(map(str, estimates))} | {found.p_value:.1g} | {found.num_pairs} |"


def share(p_values: list[float]) -> float:
    return sum(p < 0.05 for p in p_values) / len(p_values)


def table(settings: Settings) -> Iterator[str]:
    count = 4 if settings.quick else 400
    draws = Draws(networks=3 if settings.quick else 8, epochs=3 if settings.quick else 120)
    error = 2 * math.sqrt(0.05 * 0.95 / count)
    expected = f"{max(0.05 - error, 0):.3f} … {0.05 + error:.3f}"
    rows: list[tuple[str, Callable[[int, str], float]]] = [
        (f"random field, ℓ = {length:g}", lambda i, c, length=length: draws.fields(i, c, length))
        for length in (0.1, 0.35, 0.5, 1.0, 2.0)
    ]
    rows += [
        (f"two classes, ℓ = {length:g}", lambda i, c, length=length: draws.fields(i, c, length, odd_or_even))
        for length in (0.35, 1.0, 2.0, 4.0)
    ]
    rows += [("untrained", draws.untrained), ("foreign", draws.foreign)]
    rows += [("planted 0.1 nats, 50 pairs", lambda i, c: draws.planted(i, c, 0.1))]
    yield f"| draws | {' | '.join(_CONTRASTS)} | 5 % ± 2 standard errors |"
    yield "|---|---|---|---|---|"
    for name, draw in rows:
        found = [share([draw(i, contrast) for i in range(count)]) for contrast in _CONTRASTS]
        range_ = "–" if name.startswith("planted") else expected
        yield f"| {name} ({count}) | {' | '.join(f'{value:.3f}' for value in found)} | {range_} |"
    bare = share([draws.bare_peak(i, 0.5) for i in range(count)])
    yield f"| bare peak, random field, ℓ = 0.5 ({count}) | – | {bare:.3f} | – | {expected} |"
    with mock.patch.object(inference, "_without_trend", lambda values, pairs, where: values):
        raw = share([draws.fields(i, "mirror", 1.0, odd_or_even) for i in range(count)])
    yield f"| raw mirror, two classes, ℓ = 1 ({count}) | {raw:.3f} | – | – | {expected} |"
    yield ""
    yield from effects(draws, 20 if settings.quick else 200)

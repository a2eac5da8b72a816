"""State in unusual places: what a forward pass writes there is put back, or the measurement is refused."""

import array
import sys
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import torchgeom_probe as tgp

SETTINGS = types.ModuleType("settings_of_a_test")
sys.modules["settings_of_a_test"] = SETTINGS


class Slotted:
    __slots__ = ("count", "unset")

    def __init__(self):
        self.count = 0

    def __getattr__(self, name):
        return [name]


class Target:
    count = 0


class Places(nn.Module):
    """Adds 1 to a number in each of many places."""

    def __init__(self):
        super().__init__()
        self.inner, self.slotted, self.local = nn.Linear(3, 4), Slotted(), threading.local()
        self.bytes, self.numbers, self.items = bytearray(1), array.array("i", [0]), iter(range(100))
        self.listed, self.local.count, self.seen = iter(list(range(100))), 0, []
        self.register_buffer("learns", torch.zeros(2))
        self.register_buffer("repeated", torch.zeros(1).expand(4))
        self.register_buffer("conjugate", torch.zeros(4, dtype=torch.complex64).conj())
        self.register_buffer("negative", torch.zeros(4, dtype=torch.complex64).conj().imag)
        self.register_buffer("sparse", torch.zeros(4).to_sparse())
        self.target = Target()
        self.proxy = weakref.proxy(self.target)
        self.inner.weight.count, self.learns.count, SETTINGS.count = 0, 0, 0
        self.inner.weight.grad = torch.ones(4, 3)
        self.outside = []

    @property
    def noted(self):
        return self.outside

    @noted.setter
    def noted(self, value, seen=[]):  # noqa: B006  (the point)
        seen.append(value)

    def forward(self, x):
        import settings_of_a_test

        settings_of_a_test.count += 1
        for holder in (self.slotted, self.local, self.proxy, self.inner.weight, self.learns):
            holder.count += 1
        self.bytes[0] += 1
        self.numbers[0] += 1
        Places.noted.fset(self, 1)
        self.learns.requires_grad_(True)
        self.zero_grad()
        return self.inner(x) * (1 + next(self.items) + next(self.listed)) + self.repeated + self.sparse.to_dense()


def test_numbers_in_unusual_places_are_put_back():
    model = Places()
    gradient, x = model.inner.weight.grad, torch.randn(2, 3)
    SETTINGS.count = 0
    volumes = [
        tgp.measure(model, x, layers="", estimator=tgp.Exact(), engine=e)[""].log_volume for e in ("fused", "vjp")
    ]
    assert torch.allclose(*volumes, atol=1e-5)
    counts = [h.count for h in (SETTINGS, model.slotted, model.local, model.target, model.inner.weight, model.learns)]
    assert counts == [0] * 6
    assert (model.bytes[0], model.numbers[0], next(model.items), next(model.listed)) == (0, 0, 0, 0)
    assert Places.noted.fset.__defaults__ == ([],)
    assert (model.learns.requires_grad, model.inner.weight.grad is gradient) == (False, True)
    with pytest.raises(AttributeError):
        object.__getattribute__(model.slotted, "unset")


@pytest.mark.parametrize(
    "iterator",
    [
        (i for i in range(9)),
        enumerate("abcdefghi"),
        zip(range(9), strict=True),
        reversed(tuple(range(9))),
        iter({1, 2, 3, 4, 5}),
    ],
    ids=lambda iterator: type(iterator).__name__,
)
def test_an_iterator_that_cannot_be_put_back_is_refused_if_it_moves(iterator):
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.items, self.takes = iterator, False

        def forward(self, x):
            if self.takes:
                next(self.items)
            return x * 2

    model = Takes()
    next(model.items)
    tgp.measure(model, torch.randn(2, 3), layers="")
    model.takes = True
    if type(iterator) is type(reversed(())):
        tgp.measure(model, torch.randn(2, 3), layers="")
        assert next(iterator) == 7
        return
    with pytest.raises(tgp.ProbeError, match=rf"iterator \({type(iterator).__name__}\) that cannot be put back"):
        tgp.measure(model, torch.randn(2, 3), layers="")


def test_gradients_written_in_place_and_a_default_type_that_is_set():
    class Sets(nn.Linear):
        zeroes = False

        def forward(self, x):
            torch.set_default_dtype(torch.float64)
            self.zero_grad(set_to_none=not self.zeroes)
            return super().forward(x)

    model = Sets(3, 4)
    model.weight.grad = torch.ones(4, 3)
    try:
        tgp.measure(model, torch.randn(2, 3), layers="")
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.weight.grad.sum() == 12
    model.zeroes = True
    with pytest.raises(tgp.ProbeError, match=r"writes to its gradients in place(.|\n)*if self.training"):
        tgp.measure(model, torch.randn(2, 3), layers="")
    assert torch.get_default_dtype() == torch.float32


def test_an_array_argument_is_not_written_to():
    class Writes(nn.Module):
        def forward(self, x, gain):
            gain += 1
            return x * torch.from_numpy(gain)

    gain = np.ones(3, dtype=np.float32)
    volume = tgp.measure(Writes(), (torch.randn(2, 3), gain), layers="", normalize=False)[""].log_volume
    assert gain.tolist() == [1, 1, 1]
    assert torch.allclose(volume, torch.full((2,), 3 * np.log(2)).double(), atol=1e-6)

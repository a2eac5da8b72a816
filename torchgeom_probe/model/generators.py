"""Random generators of every kind: how each gives its state and takes it back."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torchgeom_probe.shapes import Tensor

GENERATORS = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)


def state_of(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What gives a generator's state, and what sets it.

    >>> get, put = state_of(random.Random(0))
    >>> before = get()
    """
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if isinstance(generator, (np.random.Generator, np.random.BitGenerator)):
        bits = getattr(generator, "bit_generator", generator)
        return functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.get_state, legacy=False), generator.set_state
    return generator.get_state, generator.set_state


def same_numbers(state: Any, other: Any) -> bool:
    """Whether two states are the same."""
    if isinstance(state, dict):
        return all(same_numbers(value, other[key]) for key, value in state.items())
    if isinstance(state, (Tensor, np.ndarray)):
        return bool((state == other).all())
    return state == other

"""Fields over a slice: smooth ones that are not periodic, ridges like an entropy, a boundary that is no straight
line."""

import math

import numpy as np


def smooth_field(rng, shape, length):
    """A stationary Gaussian field that is NOT periodic: a window of a larger one, smoothed over ``length`` points."""
    large = [size + math.ceil(7 * length) for size in shape]
    frequencies = np.meshgrid(*(np.fft.fftfreq(size) for size in large), indexing="ij")
    gain = np.exp(-((math.pi * length) ** 2) * sum(f**2 for f in frequencies))
    field = np.fft.ifftn(np.fft.fftn(rng.standard_normal(large)) * gain).real[tuple(slice(s) for s in shape)]
    return field / field.std()


def ridge(rng, shape, length):
    """An entropy-like field: high along the zero set of a smooth one."""
    return np.exp(-((smooth_field(rng, shape, length) / 0.5) ** 2))


def wavy_boundary(size=40):
    y, x = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    return x - 0.4 * np.sin(3 * y)

"""Geometry in a training loss: what the layers do to k tangents, differentiable in parameters and input."""

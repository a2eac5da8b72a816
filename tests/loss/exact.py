"""An exact oracle of the pushed tangents under autograd: J by a single double backward, which torch has right.

Rows of J are ordinary backward passes with ``create_graph``, one for each of a few features, so that what is made of JV
is differentiated once more by an ordinary backward.  It shares no code with the package.
"""

import contextlib

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def exact_tangents(model, layer, x, directions, transform):
    """(output, JV [k, B, n]) with their graphs, for features ``transform(output of the layer) -> [B, n]``.

    Batch normalisation by the batch's statistics: those of a first run at x, which know the parameters and x, and are
    held in a second run, along whose input J is taken.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            known = []
            with _batch_norms(model, known, collect=True):
                model(x)
            with _batch_norms(model, known, collect=False):
                point, seen = x + torch.zeros_like(x).requires_grad_(), []
                handle = model.get_submodule(layer).register_forward_hook(
                    lambda module, args, out: seen.append(transform(out.clone()))
                )
                output = model(point)
                handle.remove()
            features = seen[0]
            rows = [
                torch.autograd.grad(features[:, i].sum(), point, create_graph=True)[0].flatten(1)
                for i in range(features.shape[1])
            ]
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return output, torch.einsum("bnd,kbd->kbn", torch.stack(rows, 1), directions.flatten(2))


@contextlib.contextmanager
def _batch_norms(model, known, *, collect):
    given = iter(known)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]

    def replaced(norm):
        def forward(h):
            dims = [0, *range(2, h.ndim)]
            if collect:
                known.append(torch.var_mean(h, dims, correction=0))
            variance, mean = known[-1] if collect else next(given)
            spread = (-1, *[1] * (h.ndim - 2))
            scale = torch.rsqrt(variance + norm.eps) * norm.weight
            return _act(norm)(h * scale.view(spread) + (norm.bias - mean * scale).view(spread))

        return forward

    for norm in norms:
        norm.forward = replaced(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _act(norm):
    # timm's BatchNormAct2d is a normalisation, a dropout and an activation in one
    after = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    return nn.Sequential(*after)

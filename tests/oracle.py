"""The oracle: a dense float64 Jacobian by reverse mode, one sample at a time, and its SVD.  It shares no code with the
package."""

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def jacobians(model, layers, x, *, transform=None):
    """Layer → [B, n, d] float64 Jacobians of the flattened outputs, of a float64 copy of the model in eval mode."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    x = x.double()
    found = {}
    for layer in layers:

        def outputs(z, layer=layer):
            seen = []

            def hook(module, args, output):
                output = transform(output) if transform else output
                output = output[0] if isinstance(output, tuple) else output
                seen.append(output.reshape(-1) * 1.0)

            handle = model.get_submodule(layer).register_forward_hook(hook)
            try:
                model(z.unsqueeze(0))
            finally:
                handle.remove()
            return seen[0]

        with sdpa_kernel(SDPBackend.MATH):
            found[layer] = torch.stack([torch.func.jacrev(outputs)(sample).flatten(1) for sample in x])
    return found


def singular_values(model, layers, x, *, directions=None, transform=None):
    """Layer → [B, r] float64 singular values of J, or of JV for directions [k, B, *shape]."""
    found = {}
    for layer, jacobian in jacobians(model, layers, x, transform=transform).items():
        if directions is not None:
            jacobian = torch.einsum("bnd,kbd->bnk", jacobian, directions.double().flatten(2))
        found[layer] = torch.linalg.svdvals(jacobian)
    return found

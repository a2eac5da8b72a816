"""The Ricci scalar of any smooth feature map, by the Gauss equation.

For Φ: R^d → R^n with J = ∂Φ/∂x, g = JᵀJ and S_ab = ∂_a ∂_b Φ, the second fundamental form is the normal part
II_ab = (I − J g⁻¹ Jᵀ) S_ab, and the Gauss equation gives the Riemann tensor without third derivatives:
    R_abcd = ⟨II_ac, II_bd⟩ − ⟨II_ad, II_bc⟩,      R = |H|² − |II|²_g,      H = g^{ab} II_ab.

Axes: B samples, d inputs, n features, P pairs of directions; i, j run over a g-orthonormal frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchgeom_probe.curvature.twice import (
    FeatureMap,
    TwiceDifferentiable,
    refuse_wrong_second_derivative,
    second_derivative,
)
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.linalg.volume import regular
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.isolation import measuring
from torchgeom_probe.model.layers import resolve
from torchgeom_probe.model.wrappers import unwrapped
from torchgeom_probe.shapes import Float, Tensor


def scalar_curvature(
    model: Callable[..., Any],
    x: Float[Tensor, "batch *inputs"],  # noqa: F821 - an expression to ruff, a shape to jaxtyping
    *,
    layer: str | nn.Module | None = None,
    chunk_size: int = 1024,
) -> Float[Tensor, " batch"]:
    """Return the Ricci scalar R of the metric that a smooth feature map induces on its input space.

    R = |H|² − |II|²_g with II the second fundamental form of the image Φ(R^d) in R^n and H = g^{ab} II_ab its trace.
    The unit sphere S² has R = +2, S³ +6, the hyperbolic plane −2; for d = 2, R is twice the Gaussian curvature.

    How it is computed: QR of J gives a g-orthonormal frame E and the tangent space Q; B_ij is the second directional
    derivative of Φ along E_i and E_j, projected twice off Q; R = |Σ_i B_ii|² − Σ_ij |B_ij|².

    Args:
        model: a module, measured in eval mode and left as it was; or any callable on batches whose samples do not
            interact.
        x: [B, ...] inputs of d ≥ 2 numbers each, float32 or float64.  Second derivatives deserve float64:
            ``scalar_curvature(model.double(), x.double())``.
        layer: whose output is Φ: a submodule or its name (``"name#1"``: the output of its second call).  None: the
            model's own output.
        chunk_size: rows per forward pass (samples times pairs of directions).  Less needs less memory.

    Returns:
        [B], in units of 1/|Φ|²: features are NOT divided by √n here (a probe's ``normalize=True`` metric has curvature
        n·R).  ``nan`` at a sample where J has deficient rank, since no curvature is defined there.

    Raises:
        ProbeError: d = 1 (R is zero); n < d or J of deficient rank at every sample (R is undefined); a map whose second
            derivatives vanish identically, such as a ReLU network (R is zero almost everywhere: its curvature sits on
            the kinks, where no derivative sees it); an unknown layer; an operation without forward derivatives, or one
            whose second derivatives torch gets wrong (``linalg.solve``, ``det`` and their like; layer and instance
            normalisation, too, are rewritten for that reason, and a difference quotient of first derivatives at one
            sample a chunk stands guard over the rest).

    **The published formula.**  The code published with arXiv:2301.11375 computes R with a prefactor −3/4 for shallow
    networks (−3/(n³ det² g) in the sum over triples at d = 2).  With the Riemann tensor
        R^m_nab = ∂_a Γ^m_bn − ∂_b Γ^m_an + Γ^m_ar Γ^r_bn − Γ^m_br Γ^r_an,
    that value comes out when the sign of the two ΓΓ terms is flipped; the derivation above gives −1/4 (−1).  For one
    hidden layer, ∂_c g_ab is totally symmetric and the flip multiplies R by exactly 3, at finite and infinite width;
    for deeper maps it gives a number that is no multiple of R, may have the other sign, and depends on the coordinates,
    so it is no scalar.  What was checked: this function against Christoffel symbols by nested automatic differentiation
    in float64, against 50-digit arithmetic, and against surfaces of known curvature.  These tell the two signs apart:

    =========================================  ==================  =====  ============
    surface                                    at                  R      flipped sign
    =========================================  ==================  =====  ============
    S² as a graph (x, y, √(1−x²−y²))           (.5, .4)            2      0.6102
    S³ in angles                               (.9, .7, .4)        6      8.519
    flat plane (x + .3y², y − .2x³)            (.5, .4)            0      0.0583
    S² in angles (θ, φ), torus, pseudosphere   anywhere            equal  equal
    =========================================  ==================  =====  ============

    The last line is the usual test, and it passes with the wrong sign: a sphere in angles is not enough.

    Source: the Gauss equation, e.g. do Carmo, Riemannian Geometry, ch. 6.  Cost: d first- and d(d+1)/2 second-order
    directional derivatives (jvp of jvp) per sample; memory a few times n · max(d, chunk_size) numbers besides the
    passes.

    >>> def graph_of_the_sphere(x):
    ...     return torch.cat([x, (1 - x.square().sum(1, keepdim=True)).sqrt()], 1)
    >>> R = scalar_curvature(graph_of_the_sphere, torch.tensor([[0.5, 0.4]], dtype=torch.float64))
    >>> assert abs(R.item() - 2) < 1e-12
    """
    _check_input(x, chunk_size)
    module = _module_behind(model)
    label = "the model's output" if layer is None else f"layer {_name(layer)!r}"
    features = _feature_map(model, module, layer)
    # A plain callable has nothing to put back, but the settings of the process hold for it too.
    with measuring(nn.Module() if module is None else module), TwiceDifferentiable():
        x = x.detach().clone()  # made anew inside, because an inference tensor cannot carry a tangent
        if not x.shape[0]:
            return x.new_zeros(0)
        n, d = features(x[:1]).shape[1], x[0].numel()
        if n < d:
            raise ProbeError(
                f"{label} has {n} features for {d} inputs: with n < d the metric is singular everywhere and its "
                f"curvature undefined.\nRestrict the map to a slice of at most {n} dimensions:  "
                "scalar_curvature(lambda u: model(x0 + (u @ A).reshape(-1, *x0.shape)), u)"
            )
        try:
            parts = [_curvature(features, part, chunk_size, label) for part in x.split(max(1, chunk_size // d))]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ProbeError(
                f"the second directional derivatives of {label} at inputs {list(x.shape)} failed: {error}\n"
                "Likely an operation without a forward derivative. Measure a layer before it (layer='name'), or write "
                "that operation in differentiable torch functions."
            ) from error
    curvature, defect, bent = (torch.cat(values) for values in zip(*parts, strict=True))
    if not bool(bent.any()):
        raise ProbeError(_flat_message(label, module))
    if bool((defect == -torch.inf).all()):
        raise ProbeError(
            f"the Jacobian of {label} has rank < {d} at every one of the {x.shape[0]} samples, so its metric is "
            "singular and its curvature undefined. Likely an earlier layer has fewer features than the input has "
            "dimensions, or is dead.\n"
            "Restrict the map to a slice, or measure an earlier layer:  scalar_curvature(model, x, layer='name')"
        )
    return curvature + torch.where(defect == 0, 0.0, torch.nan)


def _curvature(features: FeatureMap, x: Tensor, chunk_size: int, label: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return, [B] each: R, the defect of J (see ``regular``), whether any second derivative is not zero."""
    samples, shape = x.shape[0], x.shape[1:]
    d = shape.numel()
    at_once = max(1, chunk_size // samples)

    columns = []
    identity = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, *shape)
    for directions in identity.split(at_once):
        P = len(directions)
        tangents = directions.repeat_interleave(samples, 0)
        column = torch.func.jvp(features, (_repeated(x, P),), (tangents,))[1]
        columns.append(column.unflatten(0, (P, samples)))
    J, scale, defect = regular(torch.cat(columns).permute(1, 2, 0))

    Q, triangle = torch.linalg.qr(J)
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    # Row i of the frame is the g-orthonormal tangent E_i.  One triangular solve, no LU.
    frame = torch.linalg.solve_triangular(triangle, eye, upper=True).transpose(1, 2) / scale[:, None, None]
    frame = frame.reshape(samples, d, *shape)
    checked = int((defect == 0).to(torch.uint8).argmax())
    if defect[checked] == 0:
        refuse_wrong_second_derivative(features, x[checked], frame[checked], label)

    mean, square = x.new_zeros(samples, Q.shape[1]), x.new_zeros(samples)
    bent = torch.zeros(samples, dtype=torch.bool, device=x.device)
    first, second = torch.triu_indices(d, d, device=x.device)
    for i, j in zip(first.split(at_once), second.split(at_once), strict=True):
        P = len(i)
        S = second_derivative(features, _repeated(x, P), _rows(frame, i), _rows(frame, j))
        S = S.unflatten(0, (P, samples))
        bent |= (S != 0).any(2).any(0)
        B = S.permute(1, 2, 0)
        for _ in range(2):  # once leaves a tangential rest of ε |S|, which a nearly flat map does not forgive
            B = B - Q @ (Q.transpose(1, 2) @ B)
        diagonal = (i == j).to(x.dtype)
        mean += (B * diagonal).sum(2)
        square += (B.square().sum(1) * (2 - diagonal)).sum(1)
    return mean.square().sum(1) - square, defect, bent


def _repeated(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *(1 for _ in x.shape[1:]))


def _rows(frame: Tensor, index: Tensor) -> Tensor:
    return frame[:, index].transpose(0, 1).flatten(0, 1)


def _check_input(x: Tensor, chunk_size: int) -> None:
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ProbeError(
            f"curvature needs a batch of inputs [B, ...] of float32 or float64; got {list(x.shape)} of {x.dtype}.\n"
            "Write x[None] for a single input, and x.double() (with model.double()) for the dtype."
        )
    d = x.shape[1:].numel()
    if d < 2:
        raise ProbeError(
            f"inputs of {d} number{'s' * (d != 1)} each: a curve has no intrinsic curvature, R = 0.\n"
            "Curvature starts at two dimensions:  x of shape [B, 2]"
        )
    if chunk_size < 1:
        raise ProbeError(f"chunk_size={chunk_size} holds no row. Write chunk_size=1024, or less where memory is short.")


def _module_behind(model: Callable[..., Any]) -> nn.Module | None:
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return unwrapped(owner) if isinstance(owner, nn.Module) else None


def _name(layer: str | nn.Module) -> str:
    return layer if isinstance(layer, str) else type(layer).__name__


def _feature_map(model: Callable[..., Any], module: nn.Module | None, layer: str | nn.Module | None) -> FeatureMap:
    """The map from a batch to the flat features [B, n] of the layer; hooks are there while it runs."""
    # A bound method (model.forward_features) is called as it is, a wrapper by what it wraps.
    call = module if isinstance(model, nn.Module) and module is not None else model
    if layer is None:
        return lambda x: _flat(_run(call, x), x, "the model's output")
    hooked, entry = _one_layer(module, layer)
    label = f"layer {entry!r}"

    def features(x: Tensor) -> Tensor:
        outputs: dict[str, Tensor] = {}

        def on_output(fired: str, _layer: str, output: Any) -> None:
            # Cloned, because an in-place activation after the layer would overwrite what was captured.
            outputs[fired] = _only_tensor(output, label).clone()

        with hooked.attached(on_output):
            _run(call, x)
        if entry not in outputs:
            raise ProbeError(
                f"{label} was called {len(outputs)} time(s) in the forward pass, so this call has no output.\n"
                "Name a layer that this forward pass runs:  [name for name, _ in model.named_modules()]"
            )
        # Returned and not kept: outside of the differentiated function a captured value is a dead wrapper.
        return _flat(outputs[entry], x, label)

    return features


def _run(call: Callable[..., Any], x: Tensor) -> Any:
    # Copies made inside the differentiated function: a module that writes to a buffer in eval mode may do so.
    owned = call.named_buffers() if isinstance(call, nn.Module) else ()
    buffers = {name: buffer.clone() for name, buffer in owned}
    return torch.func.functional_call(call, buffers, (x,)) if buffers else call(x)  # type: ignore[arg-type]


def _one_layer(module: nn.Module | None, layer: str | nn.Module) -> tuple[HookedModel, str]:
    """The module with the one layer to hook, and which of its calls is meant: ``name``, or ``name#1`` …."""
    if module is None:
        raise ProbeError(
            f"layer {_name(layer)!r} needs a module to hook, and the model is a plain callable.\n"
            "Pass the module:  scalar_curvature(model, x, layer='name')"
        )
    plain, hash_sign, number = layer.partition("#") if isinstance(layer, str) else (layer, "", "")
    if hash_sign and not number.isdigit():
        raise ProbeError(f"layer {layer!r} has no number. Write 'name#1' for the second call of a layer.")
    found = resolve(module, plain)
    if len(found) != 1:
        raise ProbeError(
            f"layer {_name(layer)!r} names {len(found)} layers, not one: {list(found)[:6]}.\n"
            f"Write one of them:  layer={next(iter(found))!r}"
        )
    call = f"#{int(number)}" if int(number or 0) else ""
    return HookedModel(module, found), next(iter(found)) + call


def _only_tensor(output: Any, label: str) -> Tensor:
    found = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    tensors = [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]
    if len(tensors) != 1:
        raise ProbeError(
            f"{label} is a {type(output).__name__} with {len(tensors)} floating-point tensors, where one feature map "
            "is needed.\n"
            "Choose one, by a layer inside (layer='name') or by a callable:  "
            "scalar_curvature(lambda x: model(x)['features'], x) with model.eval() before it"
        )
    return tensors[0]


def _flat(output: Any, x: Tensor, label: str) -> Tensor:
    output = _only_tensor(output, label)
    if output.ndim < 1 or output.shape[0] != x.shape[0]:
        raise ProbeError(
            f"{label} has shape {list(output.shape)} for {x.shape[0]} inputs: its first axis is not the batch, so no "
            "sample has features of its own.\n"
            "Wrap the model in one that moves the batch axis to the front:  output.movedim(1, 0)"
        )
    return output.reshape(x.shape[0], -1)


# Modules with a kink or a jump: a map that bends in these alone has no curvature away from the kinks.
_KINKED = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.Threshold),
    *(nn.Hardshrink, nn.Softshrink, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
)


def _flat_message(label: str, module: nn.Module | None) -> str:
    modules = [] if module is None else list(module.modules())
    kinked = sorted({type(m).__name__ for m in modules if isinstance(m, _KINKED)})
    cause = f" (it contains {', '.join(kinked)})" if kinked else ""
    return (
        f"all second derivatives of {label} vanish identically: the map is affine or piecewise linear{cause}. Its "
        "scalar curvature is zero almost everywhere (undefined where the Jacobian has rank < d); what curvature there "
        "is sits on the kinks, where no derivative sees it.\n"
        "Measure its volume element instead, tgp.measure(model, x, layers=...), or a smooth network: nn.GELU() for "
        "nn.ReLU()."
    )

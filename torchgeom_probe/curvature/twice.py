"""Second directional derivatives, forward over forward: what torch has wrong is rewritten or refused, the rest guarded.

In torch 2.14 the derivative of the forward derivative of ``silu`` (``mish``, ``glu`` …) is missing, while those of
layer and instance normalisation and of whatever goes through an LU factorisation exist and are WRONG, without an error:
their rules hold saved results for constants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torchgeom_probe.dual.ops import as_called
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor

FeatureMap: TypeAlias = Callable[[Tensor], Tensor]


def second_derivative(features: FeatureMap, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return ∂_u ∂_v Φ at every sample, by jvp of jvp.

    >>> x, u = torch.ones(1, 2), torch.ones(1, 2)
    >>> second_derivative(lambda x: x**3, x, u, u).tolist()
    [[6.0, 6.0]]
    """

    def along_u(y: Tensor) -> Tensor:
        return torch.func.jvp(features, (y,), (u,))[1]

    return torch.func.jvp(along_u, (x,), (v,))[1]


def _elementwise(function: FeatureMap) -> Callable[..., Tensor]:
    def rewritten(x: Tensor, inplace: bool = False) -> Tensor:
        value = function(x)
        return x.copy_(value) if inplace else value

    return rewritten


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * torch.sigmoid(gate)


def _layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_cudnn: bool,
) -> Tensor:
    value = _standardised(x, tuple(range(-len(normalized_shape), 0)), eps)
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_cudnn: bool,
) -> Tensor:
    if not use_input_stats:  # by running statistics it is an affine map, and torch's own is right
        return nn.functional.instance_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    value = _standardised(x, tuple(range(2, x.ndim)), eps)
    per_channel = (1, -1, *(1 for _ in x.shape[2:]))
    value = value if weight is None else value * weight.reshape(per_channel)
    return value if bias is None else value + bias.reshape(per_channel)


def _standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


class TwiceDifferentiable(TorchFunctionMode):
    """Write what torch cannot differentiate forward twice in operations that it can, and refuse the rest.

    >>> with TwiceDifferentiable():
    ...     bend = second_derivative(nn.functional.silu, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    >>> bend.item()
    0.5
    """

    _REWRITTEN: ClassVar[Mapping[str, Callable[..., Tensor]]] = {
        "silu": _elementwise(lambda x: x * torch.sigmoid(x)),
        "mish": _elementwise(lambda x: x * torch.tanh(nn.functional.softplus(x))),
        "hardsigmoid": _elementwise(lambda x: nn.functional.relu6(x + 3) / 6),
        "glu": _glu,
        "layer_norm": _layer_norm,
        "instance_norm": _instance_norm,
    }
    _LU = re.compile(r"(linalg_)?(det|logdet|slogdet|lu|lu_factor(_ex)?|lu_solve|solve(_ex)?|tensorsolve)")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self._LU.fullmatch(name):
            raise ProbeError(
                f"the feature map calls torch.{name}, whose second forward derivatives torch computes wrongly, without "
                "an error.\n"
                "Write it with what is sound: torch.linalg.inv, cholesky, solve_triangular or qr (log |det A| = "
                "qr(A).R.diagonal().abs().log().sum())."
            )
        kwargs = dict(as_called(func, kwargs))
        if name in ("svd", "linalg_svd") and _has_null_vectors(name, *args, **kwargs):
            raise ProbeError(
                "the feature map calls svd of a matrix that is not square with its null vectors, which torch takes for "
                "constants.\n"
                "Write torch.linalg.svd(A, full_matrices=False)"
            )
        rewritten = self._REWRITTEN.get(name)
        if rewritten is None:
            return func(*args, **kwargs)
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        return rewritten(*args, **kwargs)


def _has_null_vectors(name: str, A: Tensor, said: bool | None = None, *_: Any, **options: Any) -> bool:
    """Of ``torch.linalg.svd(A, full_matrices=True)``, or ``torch.svd(A, some=True)``."""
    said = options.get("full_matrices" if name == "linalg_svd" else "some", said is not False)
    return A.shape[-1] != A.shape[-2] and said is (name == "linalg_svd")


# Step of the difference quotient relative to |x|, its tolerance relative to the second derivative.
_STEPS = {torch.float64: (1e-2, 1e-3, 1e-4, 1e-5), torch.float32: (1e-1, 3e-2, 1e-2, 3e-3)}
_TOLERANCE = {torch.float64: 1e-2, torch.float32: 0.3}


def refuse_wrong_second_derivative(features: FeatureMap, x: Tensor, frame: Tensor, label: str) -> None:
    """Compare one second derivative with a difference quotient of first ones: not all of torch's are right.

    At one sample x [*shape], along a sum u of its frame [d, *shape] with unlike weights, so that every pair counts.
    |J u| = 1 gives the rounding error of the quotient, ε/h; the best of several steps decides.
    """
    d = len(frame)
    weights = torch.linspace(1, 2, d, dtype=x.dtype, device=x.device).reshape(d, *(1 for _ in x.shape))
    weights = torch.where(torch.arange(d, device=x.device).reshape(weights.shape) % 2 == 0, weights, -weights)
    u = (weights * frame).sum(0) / weights.square().sum().sqrt()
    second = second_derivative(features, x[None], u[None], u[None])[0]
    h = x.new_tensor(_STEPS[x.dtype]) * x.abs().amax().clamp(min=1e-2) / u.abs().amax()
    step = torch.cat([h, -h]).reshape(-1, *(1 for _ in x.shape))
    slopes = torch.func.jvp(features, (x + step * u,), (u.repeat(len(step), *(1 for _ in x.shape)),))[1]
    forward, backward = slopes.chunk(2)
    error = ((forward - backward) / (2 * h[:, None]) - second).norm(dim=1)
    allowed = _TOLERANCE[x.dtype] * second.norm() + 100 * torch.finfo(x.dtype).eps / h
    # A quotient that is not finite (a step out of the domain of the map) says nothing.
    if bool((error.isfinite() & (error > allowed)).any() & ~(error <= allowed).any()):
        raise ProbeError(
            f"a second derivative of {label} is wrong: along one direction torch has {second.norm().item():.4g}, and "
            f"differs by {error[error.isfinite()].min().item():.3g} from the difference quotient of its own first "
            "derivatives. Likely an operation whose second forward derivative torch gets wrong (it is so for LU "
            "factorisations), a custom autograd function, or a kink at this very point.\n"
            "Find it by measuring layer by layer (layer='name'), and write it in elementary torch functions."
        )

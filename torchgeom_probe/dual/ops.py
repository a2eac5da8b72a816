"""The other kinds of op: what asks about a tensor, what is piecewise constant, what cuts, what leaves torch."""

from __future__ import annotations

import torch

from torchgeom_probe.dual.registry import getters, named
from torchgeom_probe.dual.tensor import CONSTANT, CUTS, ESCAPES, METADATA

METADATA.update(
    getters(
        *"shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_cuda is_cpu is_sparse is_quantized is_mkldnn is_meta"
        " is_mps is_xpu is_xla is_nested names itemsize nbytes _version _base output_nr retains_grad _backward_hooks".split()
    )
)
METADATA.update(
    named(
        *"Tensor.size Tensor.dim Tensor.ndimension Tensor.stride Tensor.numel Tensor.nelement Tensor.element_size"
        " Tensor.is_contiguous Tensor.__len__ Tensor.__hash__ Tensor.get_device Tensor.storage_offset Tensor._is_view"
        " Tensor.is_inference Tensor.is_signed Tensor.is_same_size Tensor.is_shared Tensor.is_pinned Tensor.__repr__"
        " is_floating_point is_complex is_signed numel is_inference is_same_size get_device result_type can_cast"
        " Tensor.has_names Tensor.is_conj Tensor.is_neg is_conj is_neg Tensor._is_zerotensor _is_zerotensor".split()
    )
)
METADATA.add(torch.Tensor.__repr__)

CONSTANT.update(
    named(
        *"eq ne lt le gt ge equal greater greater_equal less less_equal not_equal isnan isinf isfinite isposinf isneginf isclose"
        " allclose isin logical_and logical_or logical_not logical_xor any all argmax argmin argsort sign signbit floor ceil"
        " round trunc fix floor_divide heaviside nonzero count_nonzero searchsorted bucketize bincount histc"
        " rand_like randn_like randint_like bernoulli multinomial one_hot is_nonzero"
        " Tensor.__eq__ Tensor.__ne__ Tensor.__lt__ Tensor.__le__ Tensor.__gt__ Tensor.__ge__ Tensor.__bool__ Tensor.__contains__"
        " Tensor.__floordiv__ Tensor.__rfloordiv__ Tensor.long Tensor.int Tensor.short Tensor.char Tensor.byte Tensor.bool"
        " Tensor.__and__ Tensor.__or__ Tensor.__invert__ Tensor.new_tensor Tensor.nonzero_static".split()
    )
)

CUTS.update([*named("detach", "Tensor.detach_"), *getters("data")])

ESCAPES.update(
    named(
        *"Tensor.item Tensor.tolist Tensor.numpy Tensor.__array__ Tensor.__float__ Tensor.__int__ Tensor.__index__"
        " Tensor.__complex__ Tensor.data_ptr Tensor.untyped_storage Tensor.storage Tensor.__dlpack__ Tensor.__format__".split()
    )
)

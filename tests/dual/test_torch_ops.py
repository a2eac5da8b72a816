"""torch's own table of ops with dual inputs: every op, in each of its forms, against two oracles.

The commonest ops of real models are tried on a few samples in every run, all of the table with ``-m slow``.
"""

from __future__ import annotations

import pytest
import torch
from dual.judge import Verdict, judged
from dual.tables import as_in_a_measurement, calls_of, op_db, passes

#: Ops whose memory is not initialised, which need a GPU, or which take and give no strided floating tensor.
LEFT_OUT = (
    "empty_like new_empty new_empty_strided empty_strided resize_ resize_as_ jiterator_ sparse_ to_sparse hash_tensor"
    " bmm_triton"
)

COMMON = (
    "abs add addmm addcmul baddbmm bmm cat clamp cos cumsum diagonal diff div_no_rounding_mode einsum exp expand"
    " fft_fft2 fft_rfft2 flatten gather __getitem__ index_add index_put index_select linalg_inv linalg_norm"
    " linalg_vector_norm log log1p log_softmax logsumexp masked_fill matmul max_reduction_with_dim max_binary mean"
    " mm mul nn_functional_avg_pool2d nn_functional_batch_norm nn_functional_bilinear nn_functional_conv1d"
    " nn_functional_conv2d nn_functional_conv_transpose2d nn_functional_cosine_similarity"
    " nn_functional_cross_entropy nn_functional_dropout nn_functional_elu nn_functional_embedding nn_functional_gelu"
    " nn_functional_glu nn_functional_grid_sample nn_functional_group_norm nn_functional_instance_norm"
    " nn_functional_interpolate_bilinear nn_functional_interpolate_nearest nn_functional_layer_norm"
    " nn_functional_leaky_relu nn_functional_linear nn_functional_max_pool2d nn_functional_normalize"
    " nn_functional_pad_constant nn_functional_pixel_shuffle nn_functional_prelu nn_functional_relu"
    " nn_functional_rms_norm nn_functional_scaled_dot_product_attention nn_functional_silu nn_functional_softplus"
    " nn_functional_unfold norm permute polar pow prod repeat_interleave reshape rsqrt scatter scatter_add select"
    " sigmoid softmax sort split sqrt squeeze stack std sub sum tanh to topk transpose tril unfold var view where"
).split()

#: Of these jvp is 1e-5 off, so that differences decide alone.
WRONG_JVP = {"cholesky_inverse"}

OPS = {op.formatted_name: op for op in op_db}
EVERY = [
    name
    for name, op in OPS.items()
    if torch.float64 in op.dtypes and not any(name.startswith(left_out) for left_out in LEFT_OUT.split())
]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of ops that it deprecates and of shapes in its samples


def verdicts(name: str, most: int = 16, *, layouts: bool = True) -> list[tuple[str, Verdict]]:
    with as_in_a_measurement():
        jvp = name not in WRONG_JVP
        return [(call, judged(*rest, jvp=jvp)) for call, *rest in calls_of(OPS[name], most, layouts=layouts)]


@pytest.mark.parametrize("name", COMMON)
def test_common_ops(name: str) -> None:
    passes("ops", name, verdicts(name, 2, layouts=False), all_of_it=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_op(name: str) -> None:
    passes("ops", name, verdicts(name), all_of_it=True)

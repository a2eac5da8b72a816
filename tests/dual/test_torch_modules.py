"""torch's own table of modules in eval mode with dual inputs, against the same two oracles as the ops.

The commonest modules are tried in every run, all of the table with ``-m slow``.
"""

from __future__ import annotations

import pytest
import torch
from dual.judge import ALL, FIRST, OTHERS, Verdict, is_smooth, judged
from dual.tables import as_in_a_measurement, module_db, passes
from torch import nn
from torch.utils._pytree import tree_leaves

COMMON = (
    "nn_AdaptiveAvgPool2d nn_AvgPool2d nn_BatchNorm2d nn_Bilinear nn_Conv1d nn_Conv2d nn_ConvTranspose2d nn_ELU nn_GELU"
    " nn_GRU nn_GroupNorm nn_InstanceNorm2d nn_LSTM nn_LayerNorm nn_LeakyReLU nn_Linear nn_LocalResponseNorm"
    " nn_MaxPool2d nn_MultiheadAttention nn_PReLU nn_RMSNorm nn_RNN nn_ReLU nn_SiLU nn_Softmax"
    " nn_TransformerDecoderLayer nn_TransformerEncoderLayer"
).split()
MODULES = {info.formatted_name: info for info in module_db}
EVERY = [name for name, info in MODULES.items() if torch.float64 in info.dtypes]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of shapes in its samples


def built(info: object, given: object) -> nn.Module:
    """The module with weights and statistics that are not those of its start, some of which are zero or one."""
    torch.manual_seed(0)
    made = info.module_cls(*given.args, **given.kwargs).double().eval()
    for name, buffer in made.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    for parameter in made.parameters():
        if not isinstance(parameter, nn.UninitializedParameter):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def verdicts(name: str, most: int = 12) -> list[tuple[str, Verdict]]:
    info, found = MODULES[name], []
    inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=False)
    with as_in_a_measurement():
        for n, given in enumerate(inputs[:: max(1, -(-len(inputs) // most))]):
            if given.forward_input is None:
                continue
            module = built(info, given.constructor_input)
            args, kwargs = given.forward_input.args, given.forward_input.kwargs
            several = sum(map(is_smooth, tree_leaves((args, kwargs)))) > 1
            for which in (ALL, FIRST, OTHERS) if several else (ALL,):
                found.append((f"input {n} {given.desc}", judged(module, args, kwargs, which)))
    return found


@pytest.mark.parametrize("name", COMMON)
def test_common_modules(name: str) -> None:
    passes("modules", name, verdicts(name, 3), all_of_it=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_module(name: str) -> None:
    passes("modules", name, verdicts(name), all_of_it=True)

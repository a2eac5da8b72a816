"""FSDP2 models on two ranks: the values, and the training after a measurement, are bit for bit those without."""

import math
import multiprocessing
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
from models import Tokens, cifar_resnet, mlp, vit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torchgeom_probe as tgp

ESTIMATORS = ("subspace:2", "exact", "topk:2", "logdet:1e-3", "trace", "directions:2")
#: name → (model, input, options of the probe); their blocks are sharded by themselves, and the rest with the root.
CASES = {
    "mlp": (mlp, lambda: torch.randn(4, 5), {"layers": ["1", "3"]}),
    "resnet": (cifar_resnet, lambda: torch.randn(2, 3, 8, 8), {"layers": ["layer1", "layer4"]}),
    "vit": (vit, lambda: torch.randn(2, 3, 12, 12), {"layers": ["blocks.0", "norm"]}),
    "tokens": (Tokens, lambda: torch.randint(0, 19, (2, 5)), {"layers": ["block"], "source": "embed"}),
    "gpt2": (None, lambda: torch.randint(0, 50, (2, 6)), {"layers": ["h.0", "ln_f"], "source": "wte"}),
}
BLOCKS = {"BasicBlock", "Block", "GPT2Block", "TransformerEncoderLayer"}


def made(name):
    torch.manual_seed(0)
    if name == "gpt2":
        transformers = pytest.importorskip("transformers")
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 50, "n_positions": 16}
        return transformers.GPT2Model(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).train()
    return CASES[name][0]().train()


def sharded(name, mesh):
    model = made(name)
    for module in model[::2] if name == "mlp" else [m for m in model.modules() if type(m).__name__ in BLOCKS]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model, x):
    """The weights after two steps, whole."""
    torch.manual_seed(2)  # of dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(x)
        output = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        output.square().mean().backward()
        optimizer.step()
    return [p.full_tensor().detach().clone() for p in model.parameters()]


def _rank(rank, mesh, store, name, estimators, answers):
    torch.set_num_threads(1)
    size = math.prod(mesh)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # torch's own, of GPT-2's output, in training alone too
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
        mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("replicated", "sharded")[-len(mesh) :])
        torch.manual_seed(1)
        x, options = CASES[name][1](), CASES[name][2]
        model, wrong = sharded(name, mesh), []
        for estimator in estimators:
            budget = 10**8 * (1 + rank)  # chunks of different sizes would leave the ranks waiting for each other
            plain = tgp.measure(made(name), x, estimator=estimator, **options)
            found = tgp.measure(model, x, estimator=estimator, memory_budget=budget, **options)
            for layer, g in plain.items():
                for mine, theirs in ((g.value, found[layer].value), (g.singular_values, found[layer].singular_values)):
                    wrong += [] if torch.equal(mine, theirs) else [(estimator, layer)]
        after = trained(model, x)
        wrong += [] if all(map(torch.equal, after, trained(sharded(name, mesh), x))) else ["training"]
        answers.put(str(wrong))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put(traceback.format_exc())


def compared(name, estimators, tmp_path, mesh=(2,)):
    size, context = math.prod(mesh), multiprocessing.get_context("fork")
    answers = context.Queue()
    arguments = (mesh, str(tmp_path / "store"), name, estimators, answers)
    ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(size)]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=550) for _ in ranks]
    for rank in ranks:
        rank.join(20)
    assert found == ["[]"] * size, "\n".join(found)


@pytest.mark.parametrize("name", ["mlp", pytest.param("resnet", marks=pytest.mark.slow)])
def test_values_and_training_are_bit_identical(name, tmp_path):
    compared(name, ("subspace:2", "topk:2"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_estimator(name, tmp_path):
    if name == "gpt2":
        pytest.importorskip("transformers")
    compared(name, ESTIMATORS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(4,), (2, 2)], ids=["sharded", "sharded and replicated"])
def test_four_ranks(mesh, tmp_path):
    compared("resnet", ("subspace:2", "topk:2"), tmp_path, mesh)


def test_a_data_set_is_not_shared_over_ranks_that_need_each_other(tmp_path):
    pytest.importorskip("pyarrow")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = fully_shard(nn.Sequential(nn.Linear(5, 3)), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(tgp.ProbeError, match=r"the model is sharded \(FSDP2\)(.|\n)*tgp.measure\(model, x\)"):
            tgp.measure_dataset(model, torch.randn(4, 5), path=tmp_path)
    finally:
        dist.destroy_process_group()


def test_data_parallel_is_measured_as_the_model_inside():
    model, x = mlp().eval(), torch.randn(4, 5)
    for layer, g in tgp.measure(nn.DataParallel(model), x, layers=["1"]).items():
        assert torch.equal(g.value, tgp.measure(model, x, layers=["1"])[layer].value)

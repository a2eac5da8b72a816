"""pushforward: values and gradients against an exact oracle, and what a training step around it keeps."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from loss.exact import exact_tangents
from models import cifar_resnet, mlp, resnet18, vit
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.loss.step import PushedLayer


class Encoder(nn.Module):
    def __init__(self, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 17, 0.0, "gelu", batch_first=True, norm_first=norm_first)
        self.enter, self.body = nn.Linear(7, 12), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.body(self.enter(x)).mean(1))


class Biased(nn.Module):
    """Attention with a learned bias for each head, and keys that the input knows nothing of."""

    def __init__(self):
        super().__init__()
        self.enter, self.head = nn.Linear(7, 24), nn.Linear(8, 5)
        self.bias, self.keys = nn.Parameter(torch.randn(1, 2, 4, 4)), nn.Parameter(torch.randn(1, 2, 4, 4))

    def forward(self, x):
        q, k, v = self.enter(x).view(len(x), 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        h = F.scaled_dot_product_attention(h, self.keys.expand(len(x), -1, -1, -1), v, scale=0.7)
        return self.head(h.mean(2).flatten(1))


def _conv(norm, act):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), norm, act, nn.Conv2d(6, 5, 3), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(20, 5),
    )  # fmt: skip


def _swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=28, window_size=7, embed_dim=12, depths=(2, 1), num_heads=(2, 3),
        num_classes=5, drop_path_rate=0.0,
    )  # fmt: skip


def _convnext():
    return timm.create_model(
        "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 12, 8, 12), num_classes=5, drop_path_rate=0.0
    )


#: name → (model, shape of x, layers)
MODELS = {
    "mlp": (mlp, (5,), ["1", "4"]),
    "layer_norm": (
        lambda: nn.Sequential(nn.Linear(5, 11), nn.LayerNorm(11), nn.Tanh(), nn.Linear(11, 3)),
        (5,),
        ["1", "3"],
    ),
    "batch_norm": (lambda: _conv(nn.BatchNorm2d(6), nn.ReLU(inplace=True)), (3, 7, 7), ["0", "7"]),
    "group_norm": (lambda: _conv(nn.GroupNorm(2, 6), nn.SiLU(inplace=True)), (3, 7, 7), ["0", "7"]),
    "instance_norm": (lambda: _conv(nn.InstanceNorm2d(6, affine=True), nn.Mish()), (3, 7, 7), ["2", "7"]),
    "cifar_resnet": (cifar_resnet, (3, 8, 8), ["layer1", "layer2.0.bn1", "fc"]),
    "timm_resnet18": (resnet18, (3, 16, 16), ["layer2", "fc"]),
    "vit": (vit, (3, 12, 12), ["blocks.0.attn", "blocks.1.norm1", "head"]),
    "swin": (_swin, (3, 28, 28), ["layers.0", "head"]),
    "convnext": (_convnext, (3, 32, 32), ["stages.1", "head"]),
    "biased": (Biased, (4, 7), ["", "head"]),
    "encoder": (Encoder, (4, 7), ["body.layers.0", "head"]),
    "encoder_norm_first": (lambda: Encoder(True), (4, 7), ["body.layers.1", "head"]),
}
TRAINED = ("batch_norm", "cifar_resnet", "timm_resnet18")
BATCH = 4


def built(name, *, train=False):
    make, shape, layers = MODELS[name]
    model = make().double().train(train)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at one or zero, where it starts
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(BATCH, *shape, dtype=torch.float64), layers


def few(size):
    """A transform to three features, by weights without a pattern."""
    return lambda out: out.flatten(1) @ torch.arange(1, 3 * size + 1, dtype=torch.float64).sin().view(size, 3)


def sizes(model, x, layers):
    found, handles = {}, []
    for name in layers:

        def hook(module, args, out, name=name):
            found[name] = out.flatten(1).shape[1]

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        copy.deepcopy(model)(x)
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def made_of(layer):
    """Every quantity that a penalty can be made of, in one number."""
    return (
        layer.trace.mean() + layer.length.mean() + layer.isometry.mean() + 0.1 * layer.log_volume.mean()
        + layer.log_volume_eps(0.1).mean() + layer.gram.sin().mean()
    )  # fmt: skip


def relative(found, exact):
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if a is not None or b is not None]
    apart = sum(((0 if a is None else a) - (0 if b is None else b)).square().sum() for a, b in pairs)
    return float((apart / sum(b.square().sum() for _, b in pairs if b is not None)).sqrt())


LARGE = {"timm_resnet18"}
PAIRS = [*((name, False) for name in MODELS), *((name, True) for name in TRAINED)]


@pytest.mark.parametrize(
    ("name", "train"), [pytest.param(*pair, marks=[pytest.mark.slow] * (pair[0] in LARGE)) for pair in PAIRS]
)
def test_gradients_are_those_of_the_exact_jacobian(name, train):
    model, x, layers = built(name)
    transforms = {layer: few(size) for layer, size in sizes(model, x, layers).items()}
    model.train(train)
    x.requires_grad_()
    directions = torch.randn(2, *x.shape, dtype=torch.float64)
    variables = [*model.parameters(), x]
    twin = copy.deepcopy(model)
    for layer in layers:
        step = tgp.pushforward(
            twin, x, layers=layer, directions=directions, transform=transforms[layer], normalize=False
        )
        # as drawn, so that every quantity has a meaning
        pushed = PushedLayer(step[layer].raw, "signs", x[0].numel(), 1.0)
        found = torch.autograd.grad(
            step.output.square().sum() + made_of(pushed), [*twin.parameters(), x], allow_unused=True
        )
        output, tangents = exact_tangents(model, layer, x, directions, transforms[layer])
        torch.testing.assert_close(step.output, output)
        torch.testing.assert_close(pushed.raw, tangents)
        exact = torch.autograd.grad(
            output.square().sum() + made_of(PushedLayer(tangents, "signs", x[0].numel(), 1.0)),
            variables,
            allow_unused=True,
        )
        assert relative(found, exact) < 1e-8, layer

"""TopK at full size, on the paper's network, beside the full Jacobian and its SVD in the same process.  Minutes: run
with -m slow -s."""

import math
import time

import pytest
import torch
from torch import nn
from torchgeom_probe.integrations.timm import cifar_resnet

import torchgeom_probe as tgp

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def _images():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return (images - 0.3) / 0.35, torch.tensor(data.target)


def _resnet(*, steps):
    torch.manual_seed(0)
    model = cifar_resnet("resnet34")
    images, labels = _images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(0, 1500, (32,))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1500:1600]).argmax(1) == labels[1500:1600]).float().mean().item()
    return model, images[1600:1604], accuracy


@pytest.mark.parametrize("steps", [0, 40], ids=["random", "trained"])
def test_topk_on_the_paper_network(steps):
    model, x, accuracy = _resnet(steps=steps)
    layer = "global_pool"
    probe = tgp.GeometryProbe(model, layers=[layer], estimator=tgp.TopK(k=10), normalize=False)
    probe.measure(x[:1])
    begun = time.process_time()
    cold = probe.measure(x)
    seconds = (time.process_time() - begun) / len(x)
    g = cold[layer]
    assert g.num_features == 512
    assert g.num_inputs == 3072

    def features(sample):
        return model.global_pool(model.forward_features(sample[None]))[0]

    for p in model.parameters():
        p.requires_grad_(False)
    begun = time.process_time()
    jacobians = [torch.func.jacrev(features, chunk_size=32)(sample).flatten(1) for sample in x]
    single = [torch.linalg.svdvals(j) for j in jacobians]
    dense_seconds = (time.process_time() - begun) / len(x)
    true = torch.stack([torch.linalg.svdvals(j.double())[:10] for j in jacobians])
    begun = time.process_time()
    whole = torch.autograd.functional.jacobian(
        lambda z: model.global_pool(model.forward_features(z)).sum(0), x[:1].requires_grad_(), create_graph=True
    )
    torch.linalg.svdvals(whole.detach().flatten(2).permute(1, 2, 0))
    authors_seconds = time.process_time() - begun

    error = (g.singular_values.log10() - true.log10()).abs().max(1).values
    total = (g.log_volume - true.log().sum(1)).abs()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3 * p.abs().mean() * torch.randn_like(p))
    warm, again = probe.measure(x, start=cold)[layer], probe.measure(x)[layer]
    print(
        f"\n{'trained' if steps else 'random'} (accuracy {accuracy:.2f}): products {g.num_products.tolist()}, "
        f"max |Δ log10 σ| {error.tolist()}, |Δ volume| {total.tolist()} ≤ bound {g.error_bound.tolist()}, "
        f"σ_10/σ_1 {(true[:, 9] / true[:, 0]).tolist()}; CPU seconds a sample {seconds:.1f}, jacrev + SVD "
        f"{dense_seconds:.1f} "
        f"({dense_seconds / seconds:.1f} times), the authors' way {authors_seconds:.1f} "
        f"({authors_seconds / seconds:.1f} times); "
        f"warm {warm.num_products.tolist()}, cold {again.num_products.tolist()}"
    )
    assert error.max() < 1e-3
    assert (total <= g.error_bound).all()
    assert (g.num_products <= 120).all()
    assert (warm.num_products <= 1.1 * again.num_products).all()
    assert ((warm.log_volume - again.log_volume).abs() <= warm.error_bound + again.error_bound).all()
    assert math.isfinite(single[0].sum().item())
    # Asked for, and missed since a start is judged by directions pushed before and after it: benchmarks/README.md.
    assert (warm.num_products <= 48).all()

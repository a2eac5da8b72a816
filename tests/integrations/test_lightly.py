"""lightly-style modules probed; a real Barlow Twins run with and without the callback."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchgeom_probe.integrations.lightly import BarlowTwinsProbe, TwoViewProbe, embedding_layers, encoder, views

import torchgeom_probe as tgp

pytestmark = [  # Lightning's own remarks
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings(r"ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]


def network():
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )


class TwoParts(nn.Module):
    def __init__(self, backbone=None, head=None):
        super().__init__()
        self.backbone = network() if backbone is None else backbone
        self.projection_head = (
            nn.Sequential(nn.Linear(28, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 5)) if head is None else head
        )


def pair(size=6, scale=0.3):
    x = torch.randn(size, 3, 5, 5)
    return x, x + scale * torch.randn(size, 3, 5, 5)


def test_the_views_of_a_batch():
    a, b = pair()
    targets, names = torch.arange(6), ("a",) * 6
    for batch in ([[a, b], targets, names], ((a, b), targets), [a, b], (a, b)):
        assert [v is w for v, w in zip(views(batch), (a, b), strict=True)] == [True, True]
    for batch in (a, [a, targets], [a, targets, names], [a]):
        assert [v is a for v in views(batch)] == [True]


@pytest.mark.parametrize("batch", [[], "text", {"x": 1}, [torch.arange(3)], [["a"], 1], 3])
def test_a_batch_without_views_is_refused(batch):
    with pytest.raises(tgp.ProbeError, match=r"no views in this batch, a \w+(.|\n)*\[x0, x1\]"):
        views(batch)


def test_the_encoder_is_the_modules_own_parts():
    module = TwoParts()
    x, _ = pair()
    network = encoder(module)
    assert network.backbone is module.backbone
    assert torch.equal(network(x), module.projection_head(module.backbone(x).flatten(1)))
    module.projection_head = None
    assert torch.equal(encoder(module)(x), module.backbone(x))
    assert embedding_layers(module) == ["backbone.3", "backbone"]


def test_compiled_parts_are_probed_as_what_they_are():
    module = TwoParts()
    x, _ = pair()
    plain = TwoViewProbe(module).measure(x)
    module.backbone = torch.compile(module.backbone, backend="eager")
    compiled = TwoViewProbe(torch.compile(module, backend="eager")).measure(x)
    assert list(plain) == list(compiled)
    for name in plain:
        assert torch.equal(plain[name].value, compiled[name].value)


def test_a_module_without_a_backbone_is_refused():
    with pytest.raises(tgp.ProbeError, match=r"Sequential has no backbone: it has '0'"):
        TwoViewProbe(nn.Sequential(nn.Linear(2, 3)))


def test_the_report_is_what_measure_gives_on_either_view():
    module, (a, b) = TwoParts(), pair()
    estimator = tgp.Subspace(k=3, seed=2)
    with TwoViewProbe(module, estimator=estimator, normalize=False) as probe:
        assert sorted(probe.layers) == sorted(embedding_layers(module))
        for view, x in enumerate((a, b)):
            report = probe.measure([[a, b], torch.zeros(6), ("",) * 6], view=view)
            expected = tgp.measure(encoder(module), x, layers=probe.layers, estimator=estimator, normalize=False)
            for name in expected:
                assert torch.equal(report[name].value, expected[name].value)
        with pytest.raises(tgp.ProbeError, match="view=2: this batch has 2 views"):
            probe.measure([a, b], view=2)
    with pytest.raises(tgp.ProbeError, match="closed"):
        probe.measure([a, b])


def test_expansion_along_the_views_against_explicit_jacobians():
    module, (a, b) = TwoParts().double().eval(), [x.double() for x in pair(size=3)]
    other = a + 0.1 * torch.randn_like(a)
    with TwoViewProbe(module) as probe:
        report = probe.augmentation([[a, b, other], torch.zeros(3)], seed=5)
    noise = torch.randn(2, *a.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for name, features in {
        "backbone": module.backbone,
        "projection_head.3": encoder(module),
        "projection_head.2": lambda x: module.projection_head[:3](module.backbone(x)),
    }.items():
        for i in range(3):
            J = torch.autograd.functional.jacobian(lambda x: features(x[None])[0], a[i]).flatten(1)  # noqa: B023
            J = J / math.sqrt(J.shape[0])
            for found, chords in (
                (report[name].along, [view[i] - a[i] for view in (b, other)]),
                (report[name].random, noise[:, i]),
            ):
                stretches = [(J @ v.flatten() / v.norm()).norm().log().item() for v in chords]
                assert found[i] == pytest.approx(sum(stretches) / 2, abs=1e-9)
    assert torch.equal(report["backbone"].value, report["backbone"].along - report["backbone"].random)


def test_a_backbone_that_averages_noise_away_shows_it():
    """Blurring keeps smooth directions and kills white noise: the difference is what the filter does."""
    module = TwoParts(nn.Sequential(nn.AvgPool2d(5), nn.Flatten(), nn.Linear(3, 3, bias=False)), nn.Identity())
    with torch.no_grad():
        module.backbone[2].weight.copy_(torch.eye(3))
    x = torch.randn(64, 3, 5, 5)
    brighter = x + 0.1
    with TwoViewProbe(module, layers=["backbone"]) as probe:
        layer = probe.augmentation([x, brighter])["backbone"]
    torch.testing.assert_close(layer.along, torch.full((64,), -math.log(75) / 2).double(), rtol=0, atol=1e-5)
    # ‖Jv‖² = χ²(3)/75/25 · (1/3) over d = 75 numbers: squeezed by more than two nats against brightness.
    assert layer.value.mean() - 4 * layer.value.std() / 8 > 1


def test_a_view_that_equals_the_first_is_counted_and_the_table_reads():
    module, (a, b) = TwoParts(), pair()
    b[2] = a[2]
    with TwoViewProbe(module) as probe:
        report = probe.augmentation([a, b])
    layer = report["backbone"]
    assert layer.value.isnan().tolist() == [False, False, True, False, False, False]
    assert layer.statistics()["nonfinite"] == 1
    lines = str(report).splitlines()
    for phrase in ("expansion [log ratio]", "along  random", "1 of 6", "log ‖Jv‖ towards the other views minus"):
        assert phrase in str(report)
    assert len(lines) == 3 + len(report)
    with pytest.raises(tgp.ProbeError, match="is no log-volume"):
        assert layer.log_volume


def test_views_of_another_shape_are_left_out():
    a, b = pair()
    crop = torch.randn(6, 3, 4, 4)
    with TwoViewProbe(TwoParts(), layers=["backbone"]) as probe:
        assert probe.augmentation([a, crop, b])["backbone"].along.shape == (6,)
        for lone in ([a, crop], a):
            with pytest.raises(tgp.ProbeError, match=r"a second view of the shape \(6, 3, 5, 5\)"):
                probe.augmentation(lone)


def test_a_probe_of_views_leaves_no_trace():
    module, batch = TwoParts(), pair()
    module.backbone.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes, state = [m.training for m in module.modules()], torch.get_rng_state()
    with TwoViewProbe(module) as probe:
        probe.measure(batch)
        probe.augmentation(batch)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in module.modules()]
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.filterwarnings(r"ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning")
def test_lightlys_own_heads():
    heads = pytest.importorskip("lightly.models.modules.heads")
    assert BarlowTwinsProbe is TwoViewProbe
    cases = {
        "projection_head": [
            (heads.BarlowTwinsProjectionHead(28, 16, 13), ["layers.2", "layers.5", "layers.6"]),
            (heads.SimCLRProjectionHead(28, 16, 13), ["layers.2", "layers.4"]),
            (heads.BYOLProjectionHead(28, 16, 13), ["layers.2", "layers.3"]),
            (heads.VICRegProjectionHead(28, 16, 13), ["layers.2", "layers.5", "layers.6"]),
        ],
        "student_head": [
            (heads.DINOProjectionHead(28, 16, 11, 13), ["layers.1", "layers.3", "layers.4", "last_layer"])
        ],
    }
    for head_name, pairs in cases.items():
        for head, ends in pairs:
            module = nn.Module()
            backbone_name = "student_backbone" if head_name == "student_head" else "backbone"
            module.add_module(backbone_name, network())
            module.add_module(head_name, head)
            module.add_module("teacher_backbone", network())
            with TwoViewProbe(module) as probe:
                report = probe.measure(pair())
                augmentation = probe.augmentation(pair())
            stages = [f"{backbone_name}.3", backbone_name]
            assert list(report) == [*stages, *(f"{head_name}.{end}" for end in ends)]
            assert list(augmentation) == list(report)
            for layer in report.values():
                assert layer.singular_values.isfinite().all()
                assert (layer.rank > 0).all()


class SimCLR(TwoParts):
    """As lightly's examples have it."""

    def __init__(self):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        super().__init__(head=SimCLRProjectionHead(28, 16, 13))
        self.criterion = NTXentLoss()

    def loss(self, pictures):
        return self.criterion(*(self.projection_head(self.backbone(x)) for x in pictures[:2]))


class BYOL(TwoParts):
    """With its momentum branch and prediction head."""

    def __init__(self):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__(head=BYOLProjectionHead(28, 16, 13))
        self.prediction_head = BYOLPredictionHead(13, 16, 13)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, pictures):
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        p0, p1 = (self.prediction_head(self.projection_head(self.backbone(x))) for x in pictures[:2])
        z0, z1 = (self.projection_head_momentum(self.backbone_momentum(x)).detach() for x in pictures[:2])
        return (self.criterion(p0, z1) + self.criterion(p1, z0)) / 2


class VICReg(TwoParts):
    """As lightly's examples have it."""

    def __init__(self):
        from lightly.loss import VICRegLoss
        from lightly.models.modules.heads import VICRegProjectionHead

        super().__init__(head=VICRegProjectionHead(28, 16, 13, num_layers=2))
        self.criterion = VICRegLoss()

    def loss(self, pictures):
        return self.criterion(*(self.projection_head(self.backbone(x)) for x in pictures[:2]))


class DINO(nn.Module):
    """Student and teacher, global views and a local crop."""

    def __init__(self):
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.teacher_backbone = network()
        self.teacher_head = DINOProjectionHead(28, 16, 11, 13)
        self.student_backbone = copy.deepcopy(self.teacher_backbone)
        self.student_head = DINOProjectionHead(28, 16, 11, 13, freeze_last_layer=1)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=13, warmup_teacher_temp_epochs=2)

    def loss(self, pictures):
        from lightly.models.utils import update_momentum

        update_momentum(self.student_backbone, self.teacher_backbone, m=0.9)
        update_momentum(self.student_head, self.teacher_head, m=0.9)
        teacher = [self.teacher_head(self.teacher_backbone(x)) for x in pictures[:2]]
        student = [self.student_head(self.student_backbone(x)) for x in pictures]
        return self.criterion(teacher, student, epoch=0)


@pytest.mark.filterwarnings(r"ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [SimCLR, BYOL, VICReg, DINO])
def test_modules_trained_by_lightlys_own_losses(kind):
    """Three steps with and without the probes: the same weights, and the trained branch is what was measured."""
    pytest.importorskip("lightly")

    def trained(probed):
        torch.manual_seed(3)
        module = kind()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            x = torch.randn(6, 3, 5, 5, generator=generator)
            pictures = [x, x + 0.3 * torch.randn(x.shape, generator=generator), x[..., :4, :4]]
            if probed:
                with TwoViewProbe(module) as probe:
                    probe.measure([pictures, torch.zeros(6), ("",) * 6])
                    probe.augmentation([pictures, torch.zeros(6), ("",) * 6])
            optimizer.zero_grad()
            module.loss(pictures).backward()
            optimizer.step()
        return module.eval(), pictures

    (without, _), (module, pictures) = trained(False), trained(True)
    for key, value in without.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key

    x, other, _ = (picture[:2] for picture in pictures)
    with TwoViewProbe(module) as probe:
        report, along = probe.measure([x, other]), probe.augmentation([x, other])
    branch = encoder(module)
    (backbone, body), *_, (head, _) = branch.named_children()
    assert [name for name in report if name.startswith(f"{head}.")]
    exact = {backbone: copy.deepcopy(body).double()}
    if kind is not DINO:  # whose head has an old-style weight norm, which no copy is made of
        exact[list(report)[-1]] = copy.deepcopy(branch).double()
    for layer, features in exact.items():
        for i in range(2):
            J = torch.autograd.functional.jacobian(lambda z: features(z[None])[0], x[i].double()).flatten(1)  # noqa: B023
            v = (other[i] - x[i]).double().flatten()
            stretch = (J @ v / v.norm()).norm() / math.sqrt(J.shape[0])
            assert along[layer].along[i] == pytest.approx(stretch.log().item(), abs=1e-4)


def barlow_twins(logger, callbacks, tmp_path):
    """Five real steps: lightly's transform, data set wrapper, head and loss on the paper's ResNet, narrow."""
    pl = pytest.importorskip("pytorch_lightning")
    from lightly.data import LightlyDataset
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules import BarlowTwinsProjectionHead
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    from PIL import Image
    from torchgeom_probe.integrations.timm import cifar_resnet

    class Photographs(torch.utils.data.Dataset):
        def __init__(self):
            pixels = torch.randint(0, 256, (40, 16, 16, 3), generator=torch.Generator().manual_seed(3))
            self.images = [Image.fromarray(p.to(torch.uint8).numpy()) for p in pixels]
            self.transform = None  # lightly's wrapper sets it

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.transform(self.images[index]), 0

    class BarlowTwins(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = cifar_resnet("resnet34", act="gelu", num_classes=0, channels=(8, 8, 16, 16))
            self.projection_head = BarlowTwinsProjectionHead(16, 32, 32)
            self.criterion = BarlowTwinsLoss()

        def training_step(self, batch, index):
            z0, z1 = (self.projection_head(self.backbone(x).flatten(1)) for x in batch[0])
            return self.criterion(z0, z1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    pl.seed_everything(1, verbose=False)
    module = BarlowTwins()
    transform = BYOLTransform(
        view_1_transform=BYOLView1Transform(input_size=16, gaussian_blur=0.0),
        view_2_transform=BYOLView2Transform(input_size=16, gaussian_blur=0.0),
    )
    images = LightlyDataset.from_torch_dataset(Photographs(), transform=transform)
    loader = torch.utils.data.DataLoader(images, batch_size=8, shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        max_epochs=1,
        logger=logger,
        callbacks=callbacks,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader)
    assert trainer.global_step == 5
    return module


@pytest.mark.slow
def test_five_real_barlow_twins_steps_with_the_callback(tmp_path):
    pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.loggers import TensorBoardLogger
    from torchgeom_probe.integrations.lightning import GeometryCallback

    logger = TensorBoardLogger(tmp_path, version=0)
    callback = GeometryCallback(
        layers=lambda name, module: name in ("backbone.layer2", "backbone", "projection_head.layers.6"),
        model=encoder,
        every=2,
        samples=4,
        on_error="raise",
    )
    without = barlow_twins(False, [], tmp_path)
    probed = barlow_twins(logger, [callback], tmp_path)
    for key, value in without.state_dict().items():
        assert torch.equal(value, probed.state_dict()[key]), key

    assert [step for step, _ in callback.history] == [0, 2, 4, 5]
    assert callback.monitor.x_probe.shape == (4, 3, 16, 16)
    events = EventAccumulator(logger.log_dir).Reload()
    for number, name in enumerate(("backbone.layer2", "backbone", "projection_head.layers.6")):
        medians = [(step, report[name].statistics()["median"]) for step, report in callback.history]
        # The running statistics lag behind after two steps, and the projector loses rank: such a point is
        # counted and not drawn.
        assert [(e.step, e.value) for e in events.Scalars(f"frame_volume/{number:02d}_{name}")] == [
            (step, pytest.approx(median)) for step, median in medians if math.isfinite(median)
        ]
        counted = [(e.step, e.value) for e in events.Scalars(f"z_geometry/nonfinite/{number:02d}_{name}")]
        assert [step for step, _ in counted] == [0, 2, 4, 5]
        assert {step for step, count in counted if count == 4} == {
            step for step, median in medians if math.isnan(median)
        }
    last = tgp.measure(encoder(probed), callback.monitor.x_probe, layers=["backbone.layer2"])
    torch.testing.assert_close(last["backbone.layer2"].value, callback.history[-1][1]["backbone.layer2"].value)

"""What the writer packs for the Geometry tab, unpacked by the tab's own reader and compared with where it came from."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchgeom_probe.integrations.tensorboard import TensorBoardWriter
from torchgeom_probe.integrations.tensorboard_packed import thumbnails
from unseen import Notes

import torchgeom_probe as tgp
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.monitor.samples import ProbeSamples
from torchgeom_probe.report import GeometryReport, LayerGeometry

pytest.importorskip("tensorboard")
pytest.importorskip("tensorboards")  # knows where the tab is
from torchgeom_tab.reading import Index

INF, NAN = math.inf, math.nan


def layer(name, value, *, r=3, **fields):
    value = torch.tensor(value, dtype=torch.float64)
    sigma = torch.arange(1, r * len(value) + 1, dtype=torch.float64).reshape(len(value), r).flip(-1) / 7
    known = {"estimand": "log √det g", "engine": "fused", "num_features": 11, "num_inputs": 7, "num_directions": r}
    return LayerGeometry(name, value=value, singular_values=sigma, normalized=True, **(known | fields))


def read(log_dir, run="."):
    index = Index({str(log_dir): None})
    index.update()
    return index, index.runs[run]


def unpacked(log_dir, kind, step, tag=""):
    index, run = read(log_dir)
    kept = run.records[kind, tag][step]
    return kept.head, index.unpacked(kept, *kept.head["arrays"])


def small_model():
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 5 * 7, 11), torch.nn.Tanh(), torch.nn.Linear(11, 4)
    )


def test_every_number_of_a_report_comes_back(tmp_path):
    first = layer("stem", [1.0, -INF, NAN, 4.0], rank=torch.tensor([3, 2, -1, 3]), extras={"scale": torch.arange(4.0)})
    last = layer("<b>", [5.0, 6.0, 7.0, 8.0], r=2, std_error=torch.full((4,), 0.5), unit="nat", quantity="frame_volume")
    writer = TensorBoardWriter(tmp_path)
    writer.write(7, GeometryReport({"stem": first, "<b>": last}))
    head, arrays = unpacked(tmp_path, "probe", 7)
    assert [told["name"] for told in head["layers"]] == ["stem", "<b>"]
    assert head["layers"][1]["heading"] == "log frame volume"
    assert (head["layers"][1]["n"], head["layers"][1]["d"], head["layers"][1]["k"]) == (11, 7, 2)
    np.testing.assert_array_equal(arrays["value"], torch.stack([first.value, last.value]).float())
    np.testing.assert_array_equal(arrays["rank"], [[3, 2, -1, 3], [NAN] * 4])
    np.testing.assert_array_equal(arrays["scale"], [[0, 1, 2, 3], [NAN] * 4])
    np.testing.assert_array_equal(arrays["std_error"], [[NAN] * 4, [0.5] * 4])
    np.testing.assert_allclose(np.exp(arrays["sigma"][0].astype("f8")), first.singular_values, rtol=1e-3)
    np.testing.assert_allclose(np.exp(arrays["sigma"][1, :, :2].astype("f8")), last.singular_values, rtol=1e-3)
    assert np.isnan(arrays["sigma"][1, :, 2]).all()
    for row, geometry in enumerate((first, last)):
        found = dict(zip(head["numbers"], arrays["statistics"][row].tolist(), strict=True))
        for name, value in geometry.statistics().items():
            assert found[name] == pytest.approx(np.float32(value), nan_ok=True), name


def test_a_monitor_tells_who_the_samples_are_once_and_what_is_predicted_at_every_probe(tmp_path):
    model, x, y = small_model(), torch.rand(6, 3, 5, 7), torch.tensor([0, 1, 2, 3, 0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    predicted, options = {}, {"every": 2, "layers": ["1"], "labels": y, "indices": range(20, 26)}
    with tgp.Monitor(model, x, writer=tmp_path, **options).follow(optimizer) as monitor:
        for _ in range(4):
            predicted[monitor.steps] = model(x).detach()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        predicted[4] = model(x).detach()
    assert not monitor.failures, monitor.last_error
    _, run = read(tmp_path)
    assert run.steps("samples") == [0]
    assert run.steps("probe") == [0, 2, 4]
    head, arrays = unpacked(tmp_path, "samples", 0)
    assert head["labels"] == y.tolist()
    assert head["indices"] == list(range(20, 26))
    np.testing.assert_array_equal(arrays["thumbnails"], thumbnails(x))
    for step in (0, 2, 4):
        _, arrays = unpacked(tmp_path, "probe", step)
        np.testing.assert_array_equal(arrays["predictions"], predicted[step].argmax(1))
        top = predicted[step].topk(2).values
        np.testing.assert_allclose(arrays["margin"], top[:, 0] - top[:, 1], rtol=1e-4, atol=1e-6)


def test_a_thumbnail_spans_each_channels_range_and_is_no_larger_than_64_pixels():
    x = torch.zeros(2, 3, 8, 12)
    x[1, 0], x[0, 1, 0, 0], x[:, 2] = 5.0, -3.0, 9.0  # a constant channel stays black
    found = thumbnails(x)
    assert found.shape == (2, 8, 12, 3)
    assert found.dtype == torch.uint8
    assert found[1, ..., 0].eq(255).all()
    assert found[0, ..., 0].eq(0).all()
    assert found[0, 0, 0, 1] == 0
    assert found[1, ..., 1].eq(255).all()
    assert found[..., 2].eq(0).all()
    assert thumbnails(torch.rand(1, 1, 200, 100)).shape == (1, 64, 32, 1)
    assert all(thumbnails(other) is None for other in (torch.rand(4, 7), torch.rand(2, 5, 9, 9), None, (x, x)))


def test_the_extreme_samples_of_images_have_their_leading_direction(tmp_path):
    x, value = torch.rand(8, 3, 5, 7), [3.0, 1.0, 7.0, 5.0, NAN, 2.0, 6.0, 4.0]
    v = torch.linalg.qr(torch.randn(8, 105, 2)).Q.mT
    report = GeometryReport({"a": layer("a", value, right_singular_vectors=v)})
    with tgp.GeometryProbe(small_model(), layers=["1"]) as probe:
        writer = TensorBoardWriter(tmp_path)
        writer.write_samples(1, ProbeSamples(probe, x))
        writer.write(1, report)
    _, arrays = unpacked(tmp_path, "probe", 1)
    assert arrays["extremes"].tolist() == [[2, 6, 3, 4, 1, 5]]  # what is not finite counts as least
    drawn = arrays["directions"][0, 1].astype("f8")
    wanted = v[6, 0].reshape(3, 5, 7).mean(0)
    np.testing.assert_allclose(drawn / 127, wanted / wanted.abs().max(), atol=0.005)


def test_the_forward_pass_for_predictions_is_made_for_who_asks():
    class Kept(tgp.Writer):
        def write_samples(self, step, samples):
            self.samples = samples

    model, passes = small_model(), Notes()
    model.register_forward_hook(lambda *_: passes.append(1))
    with tgp.Monitor(model, torch.rand(2, 3, 5, 7), layers=["1"], writer=(writer := Kept())) as monitor:
        monitor.probe_now()
        before = len(passes.read())
        assert writer.samples.decisions["predictions"].tolist() == model(monitor.x_probe).argmax(1).tolist()
        assert len(passes.read()) == before + 2  # one of them here
        assert writer.samples.decisions
        assert len(passes.read()) == before + 2


def test_a_writer_keeps_no_model(tmp_path):
    model, writer = small_model(), TensorBoardWriter(tmp_path)
    with tgp.Monitor(model, torch.rand(2, 3, 5, 7), layers=["1"], writer=writer) as monitor:
        monitor.probe_now()
    gone = weakref.ref(model)
    del model, monitor
    gc.collect()
    assert gone() is None


def test_a_model_without_logits_has_no_predictions(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh())
    monitor = tgp.Monitor(model, torch.rand(2, 3, 5, 7), layers=["1"], writer=tmp_path, on_error="raise")
    monitor.probe_now()
    monitor.close()
    _, arrays = unpacked(tmp_path, "probe", 0)
    assert "predictions" not in arrays
    assert "value" in arrays


def test_a_training_with_the_tabs_events_is_the_training_without(tmp_path):
    def trained(**watch):
        torch.manual_seed(3)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout(0.5),
            torch.nn.Flatten(), torch.nn.Linear(60, 4),
        )  # fmt: skip
        x, y = torch.rand(8, 3, 5, 7), torch.arange(8) % 4
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = tgp.Monitor(model, x, layers=["2"], every=1, labels=y, **watch) if watch else None
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if monitor is not None:
                monitor.step()
        return [*model.state_dict().values(), torch.random.get_rng_state()]

    assert all(map(torch.equal, trained(), trained(writer=tmp_path, on_error="raise")))


@pytest.mark.parametrize(
    ("labels", "seen"),
    [
        ([1, 2], "2 of type int"),
        ([], "0 of type none"),
        (torch.rand(3), "3 of type float"),
        (torch.zeros(3, 1), "3 of type list"),
    ],
    ids=["too few", "none", "floats", "columns"],
)
def test_labels_that_do_not_fit_are_refused(labels, seen):
    with pytest.raises(ProbeError, match=f"each of the 3 probe samples; got {seen}"):
        tgp.Monitor(torch.nn.Linear(2, 2), torch.rand(3, 2), labels=labels)


def test_a_map_is_written_as_its_numbers(tmp_path):
    model, x = small_model(), torch.rand(3, 3, 5, 7)
    plane = tgp.scan(model, tgp.Plane(*x, steps=6, extent=(-2, 2)), layers=["1", "2"], progress=False)
    line = tgp.scan(model, tgp.Line(x[0], x[1], steps=9), layers=["1"], progress=False)
    writer = TensorBoardWriter(tmp_path)
    writer.write_map("slice/plane", plane, 5)
    writer.write_map("line", line, 6)
    head, arrays = unpacked(tmp_path, "map", 5, "slice/plane")
    np.testing.assert_array_equal(arrays["value"], torch.stack(list(plane.value.values())).float())
    np.testing.assert_array_equal(arrays["predictions"], plane.predictions)
    np.testing.assert_array_equal(arrays["entropy"], plane.entropy.float())
    np.testing.assert_allclose(arrays["range"][1], [plane.value["2"].min(), plane.value["2"].max()], rtol=1e-6)
    np.testing.assert_allclose(arrays["corners"], plane.slice.corners, rtol=1e-6)
    np.testing.assert_array_equal(arrays["thumbnails"], thumbnails(x))
    assert head["extent"] == [-2, 2]
    head, arrays = unpacked(tmp_path, "map", 6, "line")
    np.testing.assert_array_equal(arrays["value"], line.value["1"][None].float())
    assert head["extent"] == [0, 1]


def test_a_study_is_written_as_its_profiles(tmp_path):
    torch.manual_seed(0)
    networks = [torch.nn.Sequential(torch.nn.Linear(2, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)) for _ in range(2)]
    options = {"layers": ["1"], "pairs": 20, "share": True, "progress": False}
    study = tgp.boundary_study(networks[0], torch.randn(120, 2), initial=networks[1], **options)
    TensorBoardWriter(tmp_path).write_study(study, 30)
    head, _ = unpacked(tmp_path, "profile", 30)
    (told,), effect = head["layers"], study["1"]
    assert told["offsets"] == list(effect.profile)
    assert told["trained"][0] == [float(estimate) for estimate in effect.profile.values()]
    assert told["initial"][2] == [estimate.interval[1] for estimate in effect.initial_profile.values()]
    assert told["sentence"] == str(effect)


def test_a_writer_that_is_not_torchs_own_gets_charts_alone():
    class Recorder:
        def __init__(self):
            self.tags = []

        def add_scalar(self, tag, value, step):
            self.tags.append(tag)

        def add_histogram(self, tag, values, step, bins):
            self.tags.append(tag)

        def add_text(self, tag, text, step):
            self.tags.append(tag)

        def add_custom_scalars(self, layout):
            pass

        def flush(self):
            pass

    writer = TensorBoardWriter(recorder := Recorder())
    writer.write(0, GeometryReport({"a": replace(layer("a", [1.0, 2.0]), quantity="log_volume")}))
    assert "logvol/00_a" in recorder.tags
    assert "geometry/probe" not in recorder.tags

"""Event files read back, a real TensorBoard server asked over HTTP, a resumed run, a disk that is full."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from blocks import run_block
from tensorboards import serving
from torchgeom_probe.integrations.tensorboard import EXTRA_TAGS, MONITOR_TAGS, TAGS, TensorBoardWriter

import torchgeom_probe as tgp
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.monitor.writers import Writer
from torchgeom_probe.report import GeometryReport, LayerGeometry

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

INF, NAN = math.inf, math.nan
GROUPS = ("logvol", "sigma_max", "z_geometry/rank", "z_geometry/nonfinite")


def layer(log_volume, *, k=3, **fields):
    volume = torch.tensor(log_volume, dtype=torch.float64)
    sigma = torch.arange(1, k * len(volume) + 1, dtype=torch.float64).reshape(len(volume), k).flip(-1) / 7
    return LayerGeometry(
        name="set by the report",
        estimand="√det VᵀgV",
        quantity=fields.pop("quantity", "log_volume"),
        engine="fused",
        value=volume,
        singular_values=sigma,
        rank=torch.where(volume.isneginf(), k - 1, k),
        log_pseudo_volume=torch.where(volume.isneginf(), -2.5, volume),
        num_features=11,
        num_inputs=7,
        num_directions=k,
        normalized=True,
        rank_tolerance=1e-6,
        **fields,
    )


def report(shift=0.0):
    layers = {
        "layer1": layer([v + shift for v in (-4.0, -1.0, 0.0, 2.0, 8.0)]),
        "layer2.0.conv#1": layer([v + shift for v in (-300.25, -300.5, -301.0, -302.0, -303.0)]),
        "": layer([-INF, NAN, -3.0 + shift, -INF, INF]),
    }
    return GeometryReport({name: replace(geometry, name=name) for name, geometry in layers.items()})


LABELS = {"layer1": "00_layer1", "layer2.0.conv#1": "01_layer2.0.conv_1", "": "02_model"}


def read(log_dir):
    return EventAccumulator(
        str(log_dir), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    ).Reload()


def written(log_dir, reports):
    writer = TensorBoardWriter(log_dir)
    for step, one in reports:
        writer.write(step, one)
    writer.close()
    return read(log_dir)


def test_it_is_a_writer(tmp_path):
    assert isinstance(TensorBoardWriter(tmp_path), Writer)


def test_every_value_comes_back_as_the_statistics_of_the_report(tmp_path):
    events = written(tmp_path, [(0, report()), (7, report(shift=0.5))])
    for step, one in ((0, report()), (7, report(shift=0.5))):
        for name, label in LABELS.items():
            numbers = one[name].statistics()
            expected = {
                f"logvol/{label}": numbers["median"],
                f"logvol_band/{label}/p10": numbers["p10"],
                f"logvol_band/{label}/p90": numbers["p90"],
                f"sigma_max/{label}": numbers["sigma_max"],
                f"z_geometry/rank/{label}": numbers["rank"],
                f"z_geometry/nonfinite/{label}": numbers["nonfinite"],
            }
            for tag, value in expected.items():
                (found,) = [e.value for e in events.Scalars(tag) if e.step == step]
                assert found == np.float32(value), tag
    # by hand, so that the comparison above cannot pass on a wrong statistic
    assert [e.value for e in events.Scalars("logvol/00_layer1")] == [0.0, 0.5]
    assert [e.value for e in events.Scalars("z_geometry/nonfinite/02_model")] == [4.0, 4.0]
    assert [e.value for e in events.Scalars("sigma_max/01_layer2.0.conv_1")] == [np.float32(15 / 7)] * 2
    assert [e.value for e in events.Scalars("z_geometry/log_pseudo_volume/02_model")] == [np.float32(-2.5)] * 2
    assert "z_geometry/log_pseudo_volume/00_layer1" not in events.Tags()["scalars"]


def test_histograms_hold_the_finite_samples_and_nothing_else(tmp_path):
    events = written(tmp_path, [(0, report())])
    (wide,) = events.Histograms("logvol_histogram/00_layer1")
    assert (wide.histogram_value.num, wide.histogram_value.min, wide.histogram_value.max) == (5, -4.0, 8.0)
    (deep,) = events.Histograms("logvol_histogram/01_layer2.0.conv_1")
    assert sum(deep.histogram_value.bucket) == 5
    assert len([count for count in deep.histogram_value.bucket if count]) == 5, (
        "samples a quarter of a nat apart share a bin"
    )
    (mixed,) = events.Histograms("logvol_histogram/02_model")
    assert (mixed.histogram_value.num, mixed.histogram_value.sum) == (1, -3.0)


@pytest.mark.parametrize(
    "values",
    [[2.0, 2.0], [-300.0, -300.0 + 1e-13, -300.0], [0.0] * 50 + [1e-9, 1e30], [5e-324, 0.0]],
    ids=["equal", "ulps apart", "far outlier", "denormal"],
)
def test_any_finite_samples_make_a_histogram(tmp_path, values):
    events = written(tmp_path, [(0, GeometryReport({"a": layer(values)}))])
    (histogram,) = events.Histograms("logvol_histogram/00_a")
    assert sum(histogram.histogram_value.bucket) == len(values)


def test_nothing_that_is_not_finite_reaches_a_chart(tmp_path):
    broken = layer([NAN, -INF, INF])
    broken = replace(broken, singular_values=torch.full((3, 3), NAN), extras={"trace": torch.tensor([NAN, INF, NAN])})
    huge = replace(layer([1.0, 2.0]), singular_values=torch.full((2, 3), 1e300, dtype=torch.float64))
    events = written(tmp_path, [(0, GeometryReport({"broken": broken, "huge": huge}))])
    tags = events.Tags()
    for tag in tags["scalars"]:
        assert all(math.isfinite(e.value) for e in events.Scalars(tag)), tag
    assert "logvol/00_broken" not in tags["scalars"]
    assert "sigma_max/01_huge" not in tags["scalars"], "1e300 overflows float32 and would be stored as inf"
    assert "logvol_histogram/00_broken" not in tags["histograms"]
    assert events.Scalars("z_geometry/nonfinite/00_broken")[0].value == 3


def test_what_other_estimators_measure_has_tags_of_its_own(tmp_path):
    one = layer(
        [1.0, 2.0, 4.0],
        extras={
            "trace": torch.tensor([3.0, 5.0, NAN]),
            "log_det": torch.tensor([-1.0, -7.0, -3.0]),
            "interval": torch.zeros(3, 2),
        },
        std_error=torch.tensor([0.5, 0.25, 0.125]),
    )
    events = written(tmp_path, [(0, GeometryReport({"a": one}))])
    found = {group: events.Scalars(f"z_geometry/{group}/00_a")[0].value for group in ("trace", "log_det", "std_error")}
    assert found == {"trace": 4.0, "log_det": -3.0, "std_error": 0.25}
    assert not {"z_geometry/error_bound/00_a", "z_geometry/interval/00_a"} & set(events.Tags()["scalars"])


def test_what_is_no_log_volume_and_has_no_rank_is_charted_as_a_value(tmp_path):
    one = replace(layer([1.0, 2.0, 4.0]), quantity="value", unit="", rank=None, log_pseudo_volume=None)
    events = written(tmp_path, [(0, GeometryReport({"a": replace(one, singular_values=torch.zeros(3, 0))}))])
    tags = events.Tags()
    charts = {"value/00_a": 2.0, "z_geometry/nonfinite/00_a": 0.0}
    assert {tag: events.Scalars(tag)[0].value for tag in charts} == charts
    assert set(tags["scalars"]) == {*charts, "value_band/00_a/p10", "value_band/00_a/p90"}
    assert tags["histograms"] == ["value_histogram/00_a"]
    proto = events.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(proto).item())
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    assert list(charts["value by layer"].multiline.tag) == [r"value/\d+_.*"]
    assert charts["00_a: p10, median, p90"].margin.series[0].value == "value/00_a"


def test_a_layer_keeps_its_number_and_a_hundred_layers_sort(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    assert writer.tags(report()) == LABELS
    assert writer.tags(GeometryReport({"": layer([1.0]), "new": layer([1.0])})) == {"": "02_model", "new": "03_new"}
    many = TensorBoardWriter(tmp_path).tags(GeometryReport({f"l{i}": layer([1.0]) for i in range(101)}))
    assert (many["l0"], many["l100"]) == ("000_l0", "100_l100")
    assert sorted(many.values()) == list(many.values())


def test_odd_characters_are_replaced_and_stay_distinct(tmp_path):
    names = ["a b", "a/b", "a#b", "größe", "(x)+"]
    labels = list(TensorBoardWriter(tmp_path).tags(GeometryReport({n: layer([1.0]) for n in names})).values())
    assert labels == ["00_a_b", "01_a_b", "02_a_b", "03_gr__e", "04__x__"]


def test_the_layout_shows_all_layers_in_one_chart_and_a_band_for_each(tmp_path):
    events = written(tmp_path, [(0, report()), (1, report())])
    protos = events.Tensors("custom_scalars__config__")
    assert len(protos) == 1
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(protos[0].tensor_proto).item())
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    scalars = events.Tags()["scalars"]
    (pattern,) = charts["log-volume by layer [nat]"].multiline.tag
    assert [tag for tag in scalars if re.match(pattern, tag)] == [f"logvol/{label}" for label in LABELS.values()]
    bands = [chart.margin.series[0] for title, chart in charts.items() if "p10" in title]
    assert [series.value for series in bands] == [f"logvol/{label}" for label in LABELS.values()]
    for series in bands:  # as they are, unescaped: the page looks them up by name
        assert {series.value, series.lower, series.upper} <= set(scalars)
        assert (series.lower[-3:], series.upper[-3:]) == ("p10", "p90")
    assert "custom_scalars__config__" not in written_without_layout(tmp_path / "other").Tags()["tensors"]


def written_without_layout(log_dir):
    writer = TensorBoardWriter(log_dir, layout=False, histograms=False)
    writer.write(0, report())
    writer.close()
    events = read(log_dir)
    assert events.Tags()["histograms"] == []
    return events


def test_the_conventions_are_written_once_and_again_when_they_change(tmp_path):
    raw = GeometryReport({"a": replace(layer([1.0]), name="a", normalized=False)})
    normalised = GeometryReport({"a": replace(layer([1.0]), name="a")})
    events = written(tmp_path, [(0, normalised), (1, normalised), (2, raw)])
    texts = events.Tensors("geometry/conventions/text_summary")
    assert [t.step for t in texts] == [0, 2]
    first, second = (tensor_util.make_ndarray(t.tensor_proto).item().decode() for t in texts)
    assert "| 00_a | `a` | √det VᵀgV | 11 | 7 | 3 | yes | 1 | fused |" in first
    assert "| 00_a | `a` | √det VᵀgV | 11 | 7 | 3 | no | 1 | fused |" in second
    assert "nats" in first


def test_every_write_ends_with_a_flush(tmp_path):
    events = MagicMock(spec=pytest.importorskip("torch.utils.tensorboard").SummaryWriter)
    writer = TensorBoardWriter(events)
    writer.write(3, report())
    assert events.method_calls[-1] == call.flush()
    figure = pytest.importorskip("matplotlib.figure").Figure()
    writer.write_map("slice", figure, 3)
    assert events.method_calls[-2:] == [call.add_figure("slice", figure, 3, close=False), call.flush()]


def test_closing_twice_is_closing_once(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(3, report())
    writer.close()
    writer.close()
    assert [e.step for e in read(tmp_path).Scalars("logvol/00_layer1")] == [3]


def test_nothing_is_on_disk_before_the_first_write(tmp_path):
    writer = TensorBoardWriter(tmp_path / "run")
    writer.close()
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_continues_at_its_step_without_doubles(tmp_path):
    written(tmp_path, [(step, report(shift=step)) for step in (0, 10, 20, 30)])
    events = written(tmp_path, [(step, report(shift=100 + step)) for step in (20, 30, 40)])
    points = [(e.step, e.value) for e in events.Scalars("logvol/00_layer1")]
    assert points == [(0, 0.0), (10, 10.0), (20, 120.0), (30, 130.0), (40, 140.0)]
    assert [e.step for e in events.Histograms("logvol_histogram/00_layer1")] == [0, 10, 20, 30, 40]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_a_run_begun_anew_in_its_directory_hides_the_old_one(tmp_path):
    written(tmp_path, [(step, report(shift=step)) for step in (0, 10)])
    events = written(tmp_path, [(0, report(shift=5.0))])
    assert [(e.step, e.value) for e in events.Scalars("logvol/00_layer1")] == [(0, 5.0)]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert "geometry/conventions/text_summary" in events.Tags()["tensors"]


def test_a_closed_writer_reopens_with_all_that_a_reader_needs(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2, 0):
        writer.write(step, report())
        writer.close()
    events = read(tmp_path)
    assert [e.step for e in events.Scalars("logvol/00_layer1")] == [0]
    latest = read(max(tmp_path.iterdir()))
    assert {"custom_scalars__config__", "geometry/conventions/text_summary"} <= set(latest.Tags()["tensors"])


def test_the_losses_of_another_writer_in_the_same_directory_are_not_hidden(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as training:
        for step in range(4):
            training.add_scalar("loss", step, step)
    written(tmp_path, [(2, report())])
    events = written(tmp_path, [(2, report())])
    assert [e.step for e in events.Scalars("loss")] == [0, 1, 2, 3]


def test_a_summary_writer_of_the_users_is_used_and_left_open(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as training:
        writer = TensorBoardWriter(training)
        assert writer.log_dir == str(tmp_path)
        writer.write(1, report())
        writer.close()
        training.add_scalar("loss", 0.5, 2)
    events = read(tmp_path)
    assert [e.step for e in events.Scalars("loss")] == [2]
    assert [e.step for e in events.Scalars("logvol/00_layer1")] == [1]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_figure_becomes_an_image_and_stays_open(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(2, 1), dpi=50)
    axes.imshow(np.arange(12).reshape(3, 4))
    writer = TensorBoardWriter(tmp_path)
    writer.write_map("slice/plane", figure, 40)
    writer.close()
    (image,) = read(tmp_path).Images("slice/plane")
    assert (image.step, image.width, image.height) == (40, 100, 50)
    assert image.encoded_image_string[:4] == b"\x89PNG"
    assert plt.fignum_exists(figure.number)
    plt.close(figure)


@pytest.mark.parametrize("wrong", [3, None, object()])
def test_neither_directory_nor_writer_is_refused(wrong):
    with pytest.raises(ProbeError, match=r"takes a directory or a SummaryWriter, not a \w+"):
        TensorBoardWriter(wrong)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProbeError, match=r"needs a directory, and .*file is a file"):
        TensorBoardWriter(tmp_path / "file")


def test_a_directory_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProbeError, match=r"could not be written to .*run"):
        TensorBoardWriter(tmp_path / "file" / "run").write(0, report())


def test_without_tensorboard_the_error_has_the_pip_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ProbeError, match=re.escape("pip install 'torchgeom_probe[tensorboard]'")):
        TensorBoardWriter(tmp_path)


def test_importing_the_module_loads_no_tensorboard():
    code = (
        "import sys, torchgeom_probe.integrations.tensorboard\n"
        "found = {m.split('.')[0] for m in sys.modules} & {'tensorboard', 'matplotlib', 'timm', 'lightly'}\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a file-size limit stands in for a full disk")
def test_a_full_disk_is_said_to_be_one_and_the_writer_recovers(tmp_path, tmp_path_factory):
    # The operating system itself refuses the bytes: RLIMIT_FSIZE, with its signal ignored, is an OSError on
    # write.
    code = textwrap.dedent(
        f"""
        import resource, signal, sys, threading
        from pathlib import Path
        sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
        from test_tensorboard import ProbeError, TensorBoardWriter, report
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        threading.excepthook = lambda *_: None  # the worker of the event file dies aloud
        writer = TensorBoardWriter({str(tmp_path)!r})
        writer.write(0, report())
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))  # less than is tried
        failed = 0
        for step in range(1, 6):
            try:
                writer.write(step, report())
            except ProbeError as error:
                message, failed = str(error), failed + 1
        assert failed, "the limit was not reached"
        files = len(list(Path({str(tmp_path)!r}).iterdir()))
        assert files == 1, "a full disk gets no empty event file at every probe"
        for words in ("could not be written", "disk is full", "File too large"):
            assert words in message, message
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        writer.write(9, report(shift=1.0))
        writer.close()
        """
    )
    returned, _, errors = run_block(code, tmp_path_factory.mktemp("block"))
    assert returned == 0, errors
    points = {e.step: e.value for e in read(tmp_path).Scalars("logvol/00_layer1")}
    assert (points[0], points[9]) == (0.0, 1.0)


def monitored(log_dir):
    """A training with probes at 0, 2, …, 8, of which the one at 4 raises, and a map at each third."""

    class Moody(torch.nn.Sequential):
        broken = False

        def forward(self, x):
            if self.broken and not self.training:
                raise ValueError("a probe came by")
            return super().forward(x)

    torch.manual_seed(0)
    model = Moody(torch.nn.Linear(4, 11), torch.nn.Tanh(), torch.nn.Linear(11, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 4)
    options = {"maps": {"slice/plane": tgp.Plane(x[0], x[1], x[2], steps=5)}, "maps_every": 3}
    options |= {"layers": ["1", "2"], "estimator": tgp.Exact(), "every": 2}
    with tgp.Monitor(model, x, writer=TensorBoardWriter(log_dir), **options).follow(optimizer) as monitor:

        def step():
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        for _ in range(3):
            step()
        model.broken = True
        with pytest.warns(RuntimeWarning, match="a probe came by"):
            step()
        model.broken = False
        for _ in range(4):
            step()
    assert monitor.failures == 1, monitor.last_error


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real TensorBoard over two sessions of one run, the second resumed."""
    log_dir = tmp_path_factory.mktemp("logs")
    written(log_dir / "run", [(step, report(shift=step)) for step in (0, 10, 20)])
    written(log_dir / "run", [(step, report(shift=100 + step)) for step in (20, 30)])
    monitored(log_dir / "monitored")
    with serving(log_dir, tmp_path_factory.mktemp("beside")) as ask:
        deadline = time.monotonic() + 90
        while True:
            tags = ask("plugin/scalars/tags")
            if len(tags.get("run", ())) >= 6 * len(LABELS) and len(tags.get("monitored", ())) >= 16:
                break
            assert time.monotonic() < deadline, tags
            time.sleep(0.2)
        yield ask


def test_the_docs_promise_the_tags_that_there_are():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    groups = {tag.split("/")[0] for tag in TAGS | EXTRA_TAGS}
    groups |= {"logvol", "frame_volume"}  # what CHART stands for
    texts = readme + TensorBoardWriter.__doc__
    named = re.findall(r"`(\w+/\w+)`", texts) + [f"{g}/…" for g in re.findall(r"`(\w+)/…`", texts)]
    assert named
    for tag in named:
        assert tag in TAGS | MONITOR_TAGS or (tag.endswith("/…") and tag[:-2] in groups), tag


def test_the_server_knows_every_tag_that_the_docs_promise(server):
    monitored = TAGS | EXTRA_TAGS | MONITOR_TAGS
    for run, labels, promised in (("run", LABELS.values(), TAGS), ("monitored", ["00_1", "01_2"], monitored)):
        # the text plugin adds a suffix of its own to every tag
        texts = [tag.removesuffix("/text_summary") for tag in server("plugin/text/tags")[run]]
        known = {*server("plugin/scalars/tags")[run], *server("plugin/histograms/tags")[run], *texts}
        wanted = {t.replace("NN_layer", label).replace("CHART", "logvol") for t in promised for label in labels}
        assert wanted <= known, wanted - known
        extras = {f"z_geometry/log_pseudo_volume/{LABELS['']}"} if run == "run" else set()
        assert known - wanted == extras, "a tag that the docs do not mention"


def test_the_server_shows_what_failed_the_share_and_a_slice_map_every_mth_probe(server):
    def points(tag):
        return [point[1:] for point in server("plugin/scalars/scalars", run="monitored", tag=tag)]

    # probes at 0, 2, 4, 6, 8; the one at 4 raised
    assert [step for step, _ in points("logvol/00_1")] == [0, 2, 6, 8]
    assert points("z_geometry/failures") == [[0, 0.0], [2, 0.0], [4, 1.0], [6, 1.0], [8, 1.0]]
    shares = points("z_geometry/overhead")
    assert [step for step, _ in shares] == [2, 4, 6, 8]
    assert all(0 < share < 1 for _, share in shares)
    (run,) = [run for run in server("plugin/geometry/runs")["runs"] if run["name"] == "monitored"]
    assert run["map"] == {"slice/plane": [0, 6]}  # every 3rd probe


def test_the_server_answers_with_the_values_and_the_resumed_run_has_no_doubles(server):
    for group in GROUPS:
        points = server("plugin/scalars/scalars", run="run", tag=f"{group}/00_layer1")
        assert [step for _, step, _ in points] == [0, 10, 20, 30], group
    volumes = server("plugin/scalars/scalars", run="run", tag="logvol/01_layer2.0.conv_1")
    assert [(step, value) for _, step, value in volumes] == [(0, -301.0), (10, -291.0), (20, -181.0), (30, -171.0)]
    histograms = server("plugin/histograms/histograms", run="run", tag="logvol_histogram/02_model")
    assert [entry[1] for entry in histograms] == [0, 10, 20, 30]


def test_the_server_draws_the_charts_of_the_layout(server):
    categories = server("plugin/custom_scalars/layout")["category"]
    charts = {chart["title"]: chart for category in categories for chart in category["chart"]}
    assert len(charts) == 2 + len(LABELS) + 2  # what there is of all layers, and the bands of both runs
    (pattern,) = charts["log-volume by layer [nat]"]["multiline"]["tag"]
    answer = server("plugin/custom_scalars/scalars", run="run", tag=pattern)
    assert answer["regex_valid"]
    assert set(answer["tag_to_events"]) == {f"logvol/{label}" for label in LABELS.values()}

"""A whole data set: the rows are those of measure(), in whatever way the run came to its end."""

import multiprocessing
import os
import random
import signal
import time
from collections import UserDict
from pathlib import Path

import pytest
import torch
from models import Tokens
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import torchgeom_probe as tgp
from torchgeom_probe.dataset import stream

pytest.importorskip("pyarrow")


class Synthetic(Dataset):
    """Samples that are made when they are asked for; some cannot be, one is not finite."""

    def __init__(self, length, *, bad=(), nan=()):
        self.length, self.bad, self.nan = length, bad, nan
        self.files = [f"folder/{index}.png" for index in range(length)]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError(f"sample {index} is truncated")
        x = torch.randn(5, generator=torch.Generator().manual_seed(index))
        return (x * torch.nan if index in self.nan else x), index % 3


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 3)).eval()


def measured(data, path, **options):
    options = {"layers": ["1", "2"], "estimator": tgp.Subspace(k=2), "label": 1, "progress": False} | options
    return tgp.measure_dataset(network(), data, path=path, **options)


def test_the_rows_are_those_of_measure(tmp_path):
    data = Synthetic(50, nan=[7])
    table = measured(DataLoader(data, 16, shuffle=True), tmp_path)
    x = torch.stack([data[i][0] for i in range(50)])
    report = tgp.measure(network(), x, layers=["1", "2"], estimator=tgp.Subspace(k=2))
    frame = table.layer("2")
    assert frame["index"].tolist() == list(range(50))
    assert frame["label"].tolist() == [i % 3 for i in range(50)]
    assert frame["file"][3] == "folder/3.png"
    for column, expected in {"frame_volume": report["2"].value, "scale": report["2"].scale}.items():
        torch.testing.assert_close(torch.tensor(frame[column]), expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    logits = network()(x)
    assert frame["prediction"].tolist() == [-1 if i == 7 else p for i, p in enumerate(logits.argmax(1).tolist())]
    two = logits.double().topk(2).values
    torch.testing.assert_close(torch.tensor(frame["margin"]), two[:, 0] - two[:, 1], equal_nan=True)
    assert (frame["num_inputs"].unique().tolist(), frame["num_features"].unique().tolist()) == ([5], [3])
    assert table.summary()["nonfinite"].tolist() == [1, 1]
    assert table.summary(by="label").loc[("1", 0), "count"] == 17
    assert table.failures() == {}


def test_samples_that_fail_are_named_and_the_run_goes_on(tmp_path):
    table = measured(Synthetic(40, bad=[0, 17, 39], nan=[5]), tmp_path, batch_size=8, num_workers=0)
    assert len(table) == 40
    assert table.failures() == {i: f"OSError: sample {i} is truncated" for i in (0, 17, 39)}
    assert "40 samples, 3 of them not measured\n  0: OSError: sample 0 is truncated" in str(table)
    assert table.layer("1")["frame_volume"].isna().tolist() == [i in (0, 5, 17, 39) for i in range(40)]
    assert table.to_pandas(["file"])["file"][17] == "folder/17.png"
    whole = table.to_pandas()
    assert table.compact().to_pandas().equals(whole)  # nan is nan there
    assert not (tmp_path / "parts").exists()


def test_samples_of_other_shapes_are_measured_alone(tmp_path):
    class Mixed(Synthetic):
        def __getitem__(self, index):
            return super().__getitem__(index)[0].repeat(3 if index == 11 else 1), index  # 15 numbers: too many

    table = measured(Mixed(20), tmp_path, batch_size=10)
    assert list(table.failures()) == [11]
    assert "15" in table.failures()[11]
    assert table.layer("2")["frame_volume"].notna().sum() == 19


def test_what_cannot_be_measured_at_all_is_said_at_once(tmp_path):
    class Wrong(Synthetic):
        def __getitem__(self, index):
            return torch.zeros(7), index

    with pytest.raises(tgp.ProbeError, match="the model's own forward pass fails on x of shape"):
        measured(Wrong(20), tmp_path / "a")
    with pytest.raises(
        tgp.ProbeError, match=r"no sample of the data set could be measured: OSError: sample 0(.|\n)*data\[0\]"
    ):
        measured(Synthetic(5, bad=range(5)), tmp_path / "b")


def test_another_measurement_is_refused_and_the_same_one_goes_on(tmp_path):
    data = Synthetic(20)
    first = measured(data, tmp_path).to_arrow()
    with pytest.raises(tgp.ProbeError, match=r"holds another measure_dataset: its estimator differ"):
        measured(data, tmp_path, estimator=tgp.Exact())
    with pytest.raises(tgp.ProbeError, match=r"its data, units differ|its data differ"):
        measured(Synthetic(30), tmp_path)
    assert measured(data, tmp_path).to_arrow().equals(first)
    assert measured(data, tmp_path).compact().to_arrow().equals(first)
    assert measured(data, tmp_path).to_arrow().equals(first)


def _worker(path, rank, size, length, seconds):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    stream.FLUSH_SECONDS = seconds
    measured(Synthetic(length, bad=[1, length - 1], nan=[3]), path, batch_size=8)


def _killed(path, ranks, length, *, times, after, flush=0.02):
    """Run on some ranks; kill all of them at a random moment, so often; then let other numbers of ranks end it."""
    context, drawn = multiprocessing.get_context("fork"), random.Random(0)
    for round in range(times + 1):
        size = ranks if round < times else 3
        workers = [context.Process(target=_worker, args=(path, r, size, length, flush)) for r in range(size)]
        for worker in workers:
            worker.start()
        if round < times:
            time.sleep(drawn.uniform(*after))
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)
        for worker in workers:
            worker.join()
        if round == times:
            assert [worker.exitcode for worker in workers] == [0] * size


def _same_bytes(tmp_path, length, **kills):
    quiet = measured(Synthetic(length, bad=[1, length - 1], nan=[3]), tmp_path / "quiet", batch_size=8)
    _killed(tmp_path / "killed", 2, length, **kills)
    table = measured(Synthetic(length, bad=[1, length - 1], nan=[3]), tmp_path / "killed", batch_size=8)
    assert table.to_arrow()["index"].to_pylist() == list(range(length))
    files = [t.compact().path / "table.parquet" for t in (quiet, table)]
    assert files[0].read_bytes() == files[1].read_bytes()
    return table


def test_killed_and_resumed_by_other_ranks_the_table_is_the_same_bytes(tmp_path):
    _same_bytes(tmp_path, 400, times=3, after=(0.1, 0.5))


@pytest.mark.slow
def test_20_000_samples_killed_20_times(tmp_path):
    _same_bytes(tmp_path, 20_000, times=20, after=(0.5, 3.0), flush=0.2)


def test_a_full_disk_and_ctrl_c(tmp_path, monkeypatch):
    written = stream.write_atomically
    monkeypatch.setattr(stream, "FLUSH_SECONDS", 0.0)
    full = [True]

    def on_a_full_disk(path, data):
        if full and "parts" in str(path):
            full.clear()
            raise OSError(28, "No space left on device")
        return written(path, data)

    monkeypatch.setattr(stream, "write_atomically", on_a_full_disk)
    with pytest.warns(RuntimeWarning, match=r"8 rows could not be written to .*No space left on device; they wait"):
        assert len(measured(Synthetic(24), tmp_path / "room", batch_size=8)) == 24

    def never(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream, "write_atomically", never)
    with pytest.raises(tgp.ProbeError, match=r"24 rows could not be written(.|\n)*Make room and call"), pytest.warns():
        measured(Synthetic(24), tmp_path / "none", batch_size=8)
    monkeypatch.setattr(stream, "write_atomically", written)

    class Stopped(Synthetic):
        def __getitem__(self, index):
            if index == 17:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    path = tmp_path / "stopped"
    with pytest.raises(
        KeyboardInterrupt, match=r"2 of 3 batches are in .*stopped, and the same call goes on from there"
    ):
        measured(Stopped(24), path, batch_size=8)
    assert not tgp.DatasetTable(path).complete
    with pytest.raises(tgp.ProbeError, match=r"is not complete: 2 of 3 units"):
        tgp.DatasetTable(path).compact()
    Stopped.__getitem__ = Synthetic.__getitem__
    assert len(measured(Stopped(24), path, batch_size=8).compact()) == 24


def test_iterables_and_their_order(tmp_path):
    batches = [(torch.randn(n, 5), torch.arange(n)) for n in (4, 4, 3)]
    first = measured(batches, tmp_path / "list").to_arrow()
    assert first["index"].to_pylist() == list(range(11))
    assert first["label"].to_pylist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    again = measured(iter(batches), tmp_path / "iterator").compact().to_arrow()
    assert again.equals(first)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(x, y) for batch in batches for x, y in zip(*batch, strict=True)])

    assert measured(Stream(), tmp_path / "stream", batch_size=4).to_arrow().equals(first)
    assert measured(DataLoader(Stream(), 4), tmp_path / "loader").to_arrow().equals(first)

    def stopping():
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="1 of unknown batches"):
        measured(stopping(), tmp_path / "stopping")
    with pytest.raises(tgp.ProbeError, match="batch 0 is another one than in the run that is resumed"):
        measured((batch for batch in batches[::-1]), tmp_path / "stopping")
    assert measured((batch for batch in batches), tmp_path / "stopping").to_arrow().equals(first)


def test_forms_of_a_batch(tmp_path):
    x, label = torch.randn(6, 5), torch.arange(6)
    expected = measured([(x, label)], tmp_path / "a").to_arrow()
    named = ["a"] * 6
    lightly = measured([([x, x + 1], label, named)], tmp_path / "b").to_arrow()
    assert lightly["file"].to_pylist() == named
    assert lightly.drop_columns("file").equals(expected.drop_columns("file"))
    forms = {
        "dict": ({"input": x, "labels": label, "idx": label}, "labels", None),
        "pixels": ({"pixels": x, "labels": label}, "labels", None),
        "first": ((label, x), 0, None),
        "named": ((label, x, x + 1), 0, 1),
        "keys": ({"a": x, "y": label}, "y", "a"),
    }
    for name, (batch, place, input) in forms.items():
        assert measured([batch], tmp_path / name, label=place, input=input).to_arrow().equals(expected), name
    tensor = measured(x, tmp_path / "tensor", label=None).to_arrow()
    assert tensor.equals(expected.drop_columns("label"))
    words = measured([(x, ["cat"] * 6)], tmp_path / "words").to_arrow()
    assert (words["label"].to_pylist(), words["file"].null_count) == (["cat"] * 6, 6)
    for batch, options, said in (
        ({"y": label}, {"label": "y"}, r"the model's input was not found in a dict of 'y'(.|\n)*input=0"),
        ((x,), {"label": 3}, r"label=3 is not in a tuple of Tensor"),
        ((x, label[:, None]), {}, r"label=1 is a tensor of shape \(6, 1\), not one label a sample"),
        ((x, label), {"input": "image"}, r"input='image' is not in a tuple of Tensor, Tensor"),
    ):
        with pytest.raises(tgp.ProbeError, match=said):
            measured([batch], tmp_path / said[:9], **options)


def test_which_samples_a_loader_means(tmp_path):
    data = TensorDataset(torch.randn(20, 5), torch.arange(20))
    part = measured(DataLoader(data, 4, sampler=SubsetRandomSampler([19, 2, 3])), tmp_path / "a").to_arrow()
    assert part["index"].to_pylist() == part["label"].to_pylist() == [2, 3, 19]
    part = measured(Subset(data, [5, 4]), tmp_path / "b").to_arrow()
    assert (part["index"].to_pylist(), part["label"].to_pylist()) == ([0, 1], [5, 4])
    with pytest.raises(tgp.ProbeError, match=r"draws its samples by a WeightedRandomSampler(.|\n)*Subset"):
        measured(DataLoader(data, 4, sampler=WeightedRandomSampler([1.0] * 20, 5)), tmp_path / "c")
    for data in ({"x": torch.randn(3, 5)}, 7):
        with pytest.raises(tgp.ProbeError, match=r"is no data set(.|\n)*tgp.measure\(model, x\)"):
            measured(data, tmp_path / "d")
    with pytest.raises(tgp.ProbeError, match="batch_size=0 must be at least 1"):
        measured(Synthetic(3), tmp_path / "d", batch_size=0)
    with pytest.raises(tgp.ProbeError, match="has tangents of one batch, and a data set has many"):
        measured(Synthetic(3), tmp_path / "d", estimator=tgp.Along(torch.zeros(1, 3, 5)))
    with pytest.raises(tgp.ProbeError, match="holds no measured data set"):
        tgp.DatasetTable(tmp_path / "d")


def test_padding_is_cut_off_and_a_network_without_classes_has_no_predictions(tmp_path):
    class Masked(Tokens):
        def forward(self, input_ids, attention_mask):
            return self.block(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)

    model, lengths = Masked().eval(), [3, 5, 3, 4]
    ids = torch.randint(0, 19, (4, 5))
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    options = {"layers": ["block"], "source": "embed", "estimator": "exact"}
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1])}
    table = tgp.measure_dataset(model, [batch], path=tmp_path, label="labels", **options)
    frame = table.layer("block")
    assert frame["num_features"].tolist() == frame["num_inputs"].tolist() == [8 * length for length in lengths]
    assert "prediction" not in frame
    for row, length in enumerate(lengths):
        x = {"input_ids": ids[row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}
        alone = tgp.measure(model, x, **options)["block"]
        torch.testing.assert_close(torch.tensor(frame["log_volume"][row]), alone.log_volume[0], rtol=1e-5, atol=1e-5)


def test_workers_augmentations_and_the_callers_random_numbers(tmp_path):
    class Augmented(Synthetic):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(5) + random.random(), y

    before = torch.get_rng_state(), random.getstate()
    alone = measured(Augmented(40), tmp_path / "a", batch_size=8).to_arrow()
    shared = measured(DataLoader(Augmented(40), 8, num_workers=2), tmp_path / "b").to_arrow()
    assert shared.equals(alone)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_the_callers_model_and_probe_are_as_they_were(tmp_path):
    model = network().train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    with tgp.GeometryProbe(model, layers=["1"]) as probe:
        tgp.measure_dataset(probe, Synthetic(20), path=tmp_path)
        assert probe.memory_budget is None
        assert probe._kept.found == {}
        tgp.measure_dataset(probe, Synthetic(20), path=tmp_path / "again")
        assert probe.left_out == {}
    assert model.training
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_rank_that_does_not_come_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(RuntimeWarning, match=r"batches of other ranks are missing(.|\n)*Run the same command again"):
        table = measured(Synthetic(40), tmp_path, batch_size=8)
    assert (len(table), table.complete) == (16, False)


def test_cost(tmp_path):
    probe = tgp.GeometryProbe(network(), layers=["1"])
    cost = probe.cost(DataLoader(Synthetic(40), 8))
    assert (cost.samples, cost.batch.samples) == (40, 8)
    assert cost.seconds == pytest.approx(40 / cost.samples_per_second)
    assert "40 samples, " in str(cost)
    with pytest.raises(tgp.ProbeError, match="does not say how many samples it has"):
        probe.cost(DataLoader([torch.zeros(2, 5)], batch_size=None))
    with pytest.raises(tgp.ProbeError, match="no sample of the data set could be loaded"):
        probe.cost(Synthetic(4, bad=range(4)))


def test_cost_where_the_first_samples_fail_and_on_the_models_device(tmp_path):
    probe = tgp.GeometryProbe(network(), layers=["1"])
    assert probe.cost(DataLoader(Synthetic(6, bad=range(3)), 3)).samples == 6
    rows = stream.Rows(probe, stream.Units.of(Synthetic(6), batch_size=3, num_workers=0, collate_fn=None))
    rows.device = torch.device("meta")  # in place of a GPU
    assert rows.input_of(rows.units[0]).is_meta


def test_batches_as_transformers_makes_them(tmp_path):
    x, label = torch.randn(6, 5), torch.arange(6)
    batches = [UserDict({"input": x[part], "labels": label[part]}) for part in ([0, 1, 2, 3], [4, 5])]
    table = measured(batches, tmp_path, label="labels").to_arrow()
    assert table["index"].to_pylist() == table["label"].to_pylist() == list(range(6))


def test_a_table_that_is_compacted_while_another_rank_reads_it(tmp_path, monkeypatch):
    table = measured(Synthetic(24), tmp_path, batch_size=8)
    listed = tgp.DatasetTable(tmp_path)
    parquet = pytest.importorskip("pyarrow.parquet")
    read = parquet.read_schema

    def too_late(file):
        if "parts" in str(file):
            table.compact()
        return read(file)

    monkeypatch.setattr(parquet, "read_schema", too_late)
    assert listed.complete
    assert len(listed) == 24


def test_a_table_that_cannot_be_compacted_leaves_nothing_behind(tmp_path, monkeypatch):
    table = measured(Synthetic(24), tmp_path, batch_size=8)
    before = sorted(tmp_path.rglob("*"))

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tgp.DatasetTable, "to_arrow", lambda self, columns=None, **options: full() if options else rows)
    rows = {"index": pytest.importorskip("pyarrow").chunked_array([[0]])}
    with pytest.raises(OSError, match="No space left"):
        table.compact()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_of_nothing_yet_can_be_printed(tmp_path):
    measured(Synthetic(8), tmp_path)
    for part in (tmp_path / "parts").iterdir():
        part.unlink()
    assert str(tgp.DatasetTable(tmp_path)).startswith("0 samples so far, 0 of them not measured")


def test_the_core_does_not_import_pyarrow():
    root = Path(tgp.__file__).parent
    assert "import pyarrow\n" not in (root / "dataset" / "stream.py").read_text().split("if TYPE_CHECKING")[0]

"""Files that are whole or not there; formats that other readers take, and that are the same again."""

import json
import math
import textwrap

import pytest
import safetensors.torch
import torch
from blocks import run_block

from torchgeom_probe import ProbeError
from torchgeom_probe.files import decoded, digest, encoded, finite_or_null, read, write_atomically, write_json

TENSORS = {
    "double": torch.randn(2, 3, dtype=torch.float64),
    "half": torch.randn(5).bfloat16(),
    "counts": torch.arange(7),
    "flags": torch.tensor([True, False]),
    "one": torch.tensor(3.5),
    "none": torch.empty(0, 3),
    "turned": torch.randn(3, 5).T,
    "special": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
}


def test_tensors_come_back_bit_by_bit_and_other_readers_take_them(tmp_path):
    metadata = {"layers": ["a", "b"], "nested": {"epsilon": 1e-3}, "none": None, "π": True}
    path = write_atomically(tmp_path / "x.safetensors", encoded(TENSORS, metadata, kind="Example"))
    tensors, again = read(path, kind="Example")
    assert again == metadata
    for found in (tensors, safetensors.torch.load_file(path)):
        assert set(found) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].nan_to_num(7.0), tensor.nan_to_num(7.0))
    assert math.copysign(1, tensors["special"][-1]) == -1


def test_equal_contents_give_equal_bytes_in_whatever_order():
    metadata = {str(i): i for i in range(20)}
    one = encoded(TENSORS, metadata, kind="Example")
    backwards = dict(reversed(TENSORS.items())), dict(reversed(metadata.items()))
    assert one == encoded(*backwards, kind="Example")
    tensors, again = decoded(one, kind="Example", origin="bytes")
    assert encoded(tensors, again, kind="Example") == one


def test_one_tensor_under_two_names_is_saved_twice():
    value = torch.randn(4)
    tensors, _ = decoded(encoded({"a": value, "b": value, "c": value[1:]}, {}, kind="X"), kind="X", origin="bytes")
    assert torch.equal(tensors["a"], tensors["b"])
    assert torch.equal(tensors["c"], value[1:])


def test_what_is_no_such_file_is_refused(tmp_path):
    path = write_atomically(tmp_path / "x", encoded(TENSORS, {}, kind="Example"))
    data = path.read_bytes()
    foreign = safetensors.torch.save({"a": torch.zeros(3)})
    for broken in (data[:-9], data[:40], b"", b"PNG" * 100, foreign):
        path.write_bytes(broken)
        with pytest.raises(ProbeError, match=r"x is no saved Example, or was cut short.*\n.*result.save\(path\)"):
            read(path, kind="Example")
    path.write_bytes(data)
    with pytest.raises(ProbeError, match=r"x holds a Example, not a SliceScan.*\n.*Example.load\(path\)"):
        read(path, kind="SliceScan")
    with pytest.raises(ProbeError, match=r"nothing is no file, so there is no Example to load.*\n.*result.save"):
        read(tmp_path / "nothing", kind="Example")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, tmp_path_factory):
    path = write_atomically(tmp_path / "results", b"old")
    script = f"""
        import resource, sys
        from torchgeom_probe.files import write_atomically
        # The system refuses the write half-way, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomically({str(path)!r}, b"new" * 1000)
        except OSError:
            sys.exit(7)
    """
    returned, _, errors = run_block(textwrap.dedent(script), tmp_path_factory.mktemp("block"))
    assert returned == 7, errors
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_the_bytes_are_on_the_disk_before_the_file_is_moved_into_place(tmp_path, monkeypatch):
    from torchgeom_probe import files

    order = []
    for name in ("fsync", "replace"):
        plain = getattr(files.os, name)
        monkeypatch.setattr(files.os, name, lambda *a, name=name, plain=plain: (order.append(name), plain(*a)))
    write_atomically(tmp_path / "x", b"data")
    assert order == ["fsync", "replace"]


def test_json_holds_no_number_that_is_not_finite(tmp_path):
    value = {"a": [1.5, math.inf, (math.nan, 2)], "b": torch.tensor([[1.0, -math.inf]]), 3: "å", "c": True}
    text = write_json(tmp_path / "x.json", value).read_text(encoding="utf-8")
    strict = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert strict == {"a": [1.5, None, [None, 2]], "b": [[1.0, None]], "3": "å", "c": True}
    assert "å" in text
    assert type(finite_or_null(True)) is bool


def test_a_digest_tells_types_shapes_bits_names_and_parts_apart():
    x = torch.arange(6.0)
    found = [
        digest(x),
        digest(x.double()),
        digest(x.reshape(2, 3)),
        digest(x + 2.0**-20),
        digest({"a": x}),
        digest({"b": x}),
        digest({"a": x, "b": x}),
        digest("a", x),
        digest("ab", "c"),
        digest("a", "bc"),
        digest(torch.empty(0)),
    ]
    assert len(set(found)) == len(found)
    assert digest({"a": x, "b": x + 1}) == digest({"b": x + 1, "a": x})
    assert digest(x.reshape(2, 3).T.contiguous()) == digest(x.reshape(2, 3).T)

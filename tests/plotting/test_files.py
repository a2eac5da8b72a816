"""Figures as files: whole, and PNG and PDF the same again."""

import numpy as np
import pytest

from torchgeom_probe import ProbeError, plot
from torchgeom_probe.plotting.files import save


@pytest.mark.parametrize("ending", [".png", ".pdf", ".svg"])
def test_saved_files_are_whole_and_png_and_pdf_the_same_again(ending, lines, tmp_path):
    first, second = (save(plot(lines), tmp_path / "new" / f"{i}{ending}", dpi=60) for i in "12")
    data = first.read_bytes()
    assert data.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[ending])
    assert len(data) > 10_000
    if ending != ".svg":
        assert data == second.read_bytes()
    if ending == ".png":
        from matplotlib import image

        pixels = image.imread(first)
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100


def test_what_is_no_file_of_a_figure_is_refused(lines, tmp_path):
    with pytest.raises(ProbeError, match=r"no .bmp.*\n.*map.png"):
        save(plot(lines), tmp_path / "map.bmp")
    with pytest.raises(ProbeError, match=r"no file without an ending"):
        save(plot(lines), tmp_path / "map")

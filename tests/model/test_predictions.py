"""From outputs to logits and decisions: against plain Python, and refusals that say what to write."""

import math

import pytest
import torch
from torch import nn

from torchgeom_probe import ProbeError
from torchgeom_probe.model.predictions import DECISIONS, decided, decisions, logits_of


def test_decisions_are_those_of_plain_python():
    logits = torch.randn(5, 7)
    found = decisions(logits)
    assert tuple(found) == DECISIONS
    for i, z in enumerate(logits.double().tolist()):
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v) / total for v in z]
        assert found["predictions"][i] == z.index(max(z))
        assert found["entropy"][i].item() == pytest.approx(-sum(v * math.log(v) for v in p))
        assert found["confidence"][i].item() == pytest.approx(max(p))
        first, second = sorted(z)[:-3:-1]
        assert found["margin"][i].item() == pytest.approx(first - second)


def test_a_saturated_softmax_still_has_an_entropy():
    entropy = decisions(torch.tensor([[0.0, 60.0], [0.0, 61.0]]))["entropy"]
    assert entropy[0] > entropy[1] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_have_no_class(bad):
    found = decisions(torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0]]))
    assert found["predictions"].tolist() == [2, -1]
    for key in ("entropy", "margin", "confidence"):
        assert found[key].isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("output", "readout", "message"),
    [
        ({"logits": torch.zeros(4, 3)}, None, r"the model gives a dict for 4 samples.*\n.*readout=lambda output"),
        (torch.zeros(4, 1), None, r"one number a sample, shape \(4, 1\).*\n.*torch.cat"),
        (torch.zeros(4, 3, 2), None, r"the model gives a tensor of shape \(4, 3, 2\) for 4 samples"),
        (torch.zeros(2, 3), None, r"a tensor of shape \(2, 3\) for 4 samples"),
        (torch.zeros(4, 3), lambda z: {}, "readout gives a dict for 4 samples"),
    ],
)
def test_what_is_no_logits_is_refused(output, readout, message):
    with pytest.raises(ProbeError, match=message):
        logits_of(output, readout=readout, batch=4)


def test_what_is_predicted_from_is_not_written_to():
    x = torch.randn(3, 4)
    kept = x.clone()
    decided(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), x, readout=None, batch=3)
    assert torch.equal(x, kept)

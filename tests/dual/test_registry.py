"""The table of rules: every op in it goes by a name, and has a case in the tests of its theme."""

import importlib
from pathlib import Path

from dual.rules.comparison import LABELS, cases_of

from torchgeom_probe.dual import RULES

#: Rules without an exact twin in float64 on the CPU, which have a test of their own.
ELSEWHERE = set(
    "float half bfloat16 chalf cfloat cuda empty_like new_empty normal_ uniform_ bernoulli_"
    " random_ exponential_ cauchy_ log_normal_ geometric_ t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_"
    " as_strided_ cross_entropy nll_loss linear_cross_entropy soft_margin_loss embedding cov new_tensor"
    " cond __deepcopy__ storage_offset".split()
)


def test_every_rule_has_a_case() -> None:
    assert set(LABELS) == set(RULES), "an op in the table that goes by no name"
    themes = [p.stem for p in Path(__file__).parent.glob("rules/test_*.py")]
    modules = [importlib.import_module(f"dual.rules.{theme}") for theme in themes]
    tables = [table for m in modules for table in (m.CASES, getattr(m, "DIFFERENCES", {}))]
    missing = {op for op in RULES if not any(cases_of(op, cases) for cases in tables)}
    bare = {LABELS[op][0] for op in missing if LABELS[op][1] not in ELSEWHERE}
    assert not bare, f"write a case for {sorted(bare)}"

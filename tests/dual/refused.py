"""Write down what a dual pass refuses of torch's tables:  python tests/dual/refused.py  (with tests/ on the path).

It writes the file of the installed minor version of torch; look at what the file gained before committing it.
"""

import json
import warnings
from pathlib import Path

import torch
from dual import test_torch_modules, test_torch_ops
from dual.tables import reasons

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = {
        "modules": {name: reasons(test_torch_modules.verdicts(name)) for name in test_torch_modules.EVERY},
        "ops": {name: reasons(test_torch_ops.verdicts(name)) for name in test_torch_ops.EVERY},
    }
    listed = {kind: {name: why for name, why in sorted(of.items()) if why} for kind, of in found.items()}
    version = "_".join(torch.__version__.split(".")[:2])
    path = Path(__file__).with_name(f"refused_by_torch_{version}.json")
    path.write_text(json.dumps(listed, indent=1) + "\n")

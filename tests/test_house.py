"""The house: which room may touch which, how large a file may grow, and that one list of options stays one list."""

import ast
import inspect
from pathlib import Path

import pytest

import torchgeom_probe as tgp
from torchgeom_probe.probe import ProbeOptions

ROOT = Path(tgp.__file__).parent
INTEGRATIONS = ROOT.parent / "integrations"

#: From the ground up: a room imports what stands in rows above its own, and itself.  Rooms of one row do not know each
#: other.
ORDER = [
    {"errors", "shapes", "files"},
    {"linalg"},
    {"dual"},
    {"model"},
    {"jacobian"},
    {"report"},
    {"estimators"},
    {"check"},
    {"probe"},
    {"curvature", "distributed"},
    {"slices"},
    {"boundary", "loss"},
    {"monitor", "dataset"},
    {"plotting"},
    {"cli", "reproduce", "integrations"},
]
RANK = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
#: The ground floor has an order of its own, and the top floor is one company.
ALLOWED = {("shapes", "errors"), ("files", "errors"), ("files", "shapes"), ("errors", "shapes")}
#: Closed forms know no model; the package itself gives the public names.
ALONE = {"analytic": {"linalg", "errors", "shapes", "files"}}


def _files():
    yield from sorted(ROOT.glob("*.py"))
    yield from sorted(p for p in ROOT.glob("*/**/*.py") if "integrations" not in p.parts[len(ROOT.parts) :])
    yield from sorted(INTEGRATIONS.glob("**/*.py"))


def _room(path):
    if INTEGRATIONS in path.parents:
        return "integrations"
    relative = path.relative_to(ROOT)
    return relative.stem if len(relative.parts) == 1 else relative.parts[0]


def _imports(tree):
    """(room, line, whether inside a function) of everything that a module imports from the package."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if node is not function
    }
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchgeom_probe":
            parts = node.module.split(".")[1:]
            for name in [parts[0]] if parts else [alias.name for alias in node.names]:
                yield name, node.lineno, id(node) in inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torchgeom_probe."):
                    yield alias.name.split(".")[1], node.lineno, id(node) in inside


def _misplaced(path, tree):
    room = _room(path)
    for name, line, inside in _imports(tree):
        if inside:  # those need a reason of their own, below
            continue
        where = f"{path.relative_to(ROOT.parent)}:{line}: {room} imports {name}"
        if room == "__init__" or name == room or name not in {*RANK, *ALONE}:
            continue
        if room in ALONE:
            if name not in ALONE[room]:
                yield where
        elif name in ALONE:
            if RANK[room] < RANK["curvature"]:
                yield where
        elif RANK[name] >= RANK[room] and (room, name) not in ALLOWED and RANK[room] < RANK["cli"]:
            yield where


@pytest.mark.parametrize("path", list(_files()), ids=lambda p: str(p.relative_to(ROOT.parent)))
def test_a_file_keeps_to_its_room(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert not list(_misplaced(path, tree))
    inner = [line for _, line, inside in _imports(tree) if inside]
    reasons = [line for line in inner if "#" not in text.splitlines()[line - 1]]
    assert not reasons, f"imports inside functions, lines {reasons}: say why in a comment beside it"
    assert len(text.splitlines()) <= 450, "a file is one idea"
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 - _docstring_lines(node) > 60
    ]
    assert not long
    wide = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 120]
    assert not wide, f"lines over 120 columns: {wide}"


def _docstring_lines(node):
    first = node.body[0]
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return first.end_lineno - first.lineno + 1 if is_text else 0


def test_the_check_of_the_order_can_fail():
    path = ROOT / "linalg" / "gram.py"
    assert list(_misplaced(path, ast.parse("from torchgeom_probe.report import LayerGeometry")))
    assert list(_misplaced(ROOT / "report.py", ast.parse("from torchgeom_probe.plotting import plot")))
    assert list(_misplaced(ROOT / "analytic" / "shallow.py", ast.parse("from torchgeom_probe import model")))
    assert not list(
        _misplaced(ROOT / "plotting" / "plot.py", ast.parse("from torchgeom_probe.report import LayerGeometry"))
    )


def test_few_files_lie_in_the_root():
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_the_options_of_a_probe_stand_in_one_list():
    parameters = inspect.signature(tgp.GeometryProbe).parameters
    assert list(ProbeOptions.__annotations__) == [name for name in parameters if name != "model"]
    for verb in (tgp.measure, tgp.scan, tgp.Monitor):
        own = inspect.signature(verb).parameters
        assert "options" in own, f"{verb.__name__} takes the probe's options as they are"
        assert not set(own) & set(ProbeOptions.__annotations__)


def test_every_public_verb_and_estimator_is_used_by_the_readme():
    readme = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    verbs = [n for n in tgp.__all__ if inspect.isfunction(getattr(tgp, n)) or _is_estimator(getattr(tgp, n))]
    assert len(verbs) > 10
    assert not [name for name in verbs if name not in readme]


def _is_estimator(thing):
    return isinstance(thing, type) and issubclass(thing, tgp.Estimator) and thing is not tgp.Estimator


def test_help_documents_every_argument_of_measure_and_begins_with_an_example():
    text = inspect.getdoc(tgp.measure)
    arguments = [name for name in inspect.signature(tgp.measure).parameters if name != "options"]
    for name in [*arguments, *ProbeOptions.__annotations__]:
        assert f"\n    {name}: " in text, name
    assert text.split("\n\n")[1].startswith(">>> ")

"""Annotations are checked at every call, of shapes too; and how a test comes past that."""

import ast
import contextlib
import functools

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import _import_hook
from jaxtyping._decorator import _destring_annotation

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, as it is to mypy


def checked(function):
    """Check the types of a function's arguments and result at every call; what mypy alone imports is any type."""
    if isinstance(function, type):
        return beartype(function, conf=_CONF)
    hints = {name: _destring_annotation(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    function.__annotations__ = hints
    checking = beartype(function, conf=_CONF)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return (function if jaxtyping.config.jaxtyping_disable else checking)(*args, **kwargs)

    return call


class Cheaply(_import_hook.JaxtypingTransformer):
    """Checks every annotation of a shape, and the types of what is public, where it costs little.

    A function inside a function is decorated at every call of the outer one (2 ms each): only where it has a shape.
    Where none is annotated, without jaxtyping's own frame around every call; the types of what is private mypy knows.
    """

    def visit_FunctionDef(self, node):
        if "Tensor, " in ast.unparse([node.args, node.returns or ast.Constant(None)]):
            return super().visit_FunctionDef(node)
        inside = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
        if not inside and (not node.name.startswith("_") or node.name.startswith("__")):
            (typechecker,) = self._typechecker.get_ast().keywords
            node.decorator_list.append(ast.copy_location(typechecker.value, node))
        self._parents.append(node)
        self.generic_visit(node)
        self._parents.pop()
        return node


def check_annotations(modules):
    """From their import on, check the annotations of these modules."""
    _import_hook.JaxtypingTransformer = Cheaply
    jaxtyping.install_import_hook(modules, "annotations.checked")


@contextlib.contextmanager
def shapes_unchecked():
    """Let a wrong shape reach the library's own refusal, where the test run checks annotations."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)

"""Calls with shapes that the annotations forbid, where a test wants to see the library's own refusal."""

import contextlib

import jaxtyping


@contextlib.contextmanager
def shapes_unchecked():
    """Let a wrong shape reach the library's own refusal, where the test run checks annotations."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)

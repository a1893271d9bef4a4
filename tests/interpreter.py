"""Triton's interpreter without work that changes no result of a test."""

from __future__ import annotations

import dataclasses
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def make_faster() -> None:
    """It rests on how Triton 3.9 does that work; a version that does it otherwise stays as it is."""
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        # Of every sum and product it would look whether int32 holds it. In a test's sizes it does; where it hardly does
        # test_the_largest_sizes compares results.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if hasattr(interpreter, "_LangPatchScope"):
        _patch_once_a_launch(interpreter._patch_lang, interpreter.GridExecutor.__call__)


def _patch_once_a_launch(patch: Any, run: Any) -> None:
    """Every call of a function inside of a kernel replaces triton.language's functions with the interpreter's, those
    that are there already: once a launch is enough."""
    patched: set[frozenset[int]] = set()

    def patch_what_is_not(function: Any) -> Any:
        # What is replaced depends on which of the two the function's module can see.
        seen = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch(function)

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()  # the launch before has restored them
        return run(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_not, launch

"""Shapes that run: at public borders tensors are annotated by their axes, and under pytest the annotations are checked.

`shaped` is the ten-line shim of the house: with NENGRAM_CHECK_SHAPES=1 (the tests set it) and jaxtyping and beartype installed
(`[test]`), every call of a decorated function is checked, and axes of one name must agree within a call. Otherwise it returns the
function as it is, and nothing is imported.
"""

import os
from collections.abc import Callable
from typing import Any

CHECKED = os.environ.get("NENGRAM_CHECK_SHAPES") == "1"

if CHECKED:
    from beartype import beartype
    from jaxtyping import Bool, Float, Int, jaxtyped

    def shaped(function: Callable) -> Callable:
        """Check the shapes and dtypes that `function` is annotated with, at every call."""
        return jaxtyped(typechecker=beartype)(function)

else:

    class _Unchecked:
        def __class_getitem__(cls, annotated: tuple[Any, str]) -> Any:
            return annotated[0]

    Bool = Float = Int = _Unchecked

    def shaped(function: Callable) -> Callable:
        """The function itself: shapes are checked under pytest only."""
        return function


__all__ = ["Bool", "Float", "Int", "shaped"]

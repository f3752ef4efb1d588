"""Compiled loops: numba with a disk cache, so that compilation is paid once per machine and never per process.

The loops are single-threaded and release the GIL; who wants more cores runs them from several Python threads. So there
is no numba thread pool that a fork could break. numba writes its cache files aside and renames them: processes that
compile at the same time do not harm each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# Arithmetic is neither reordered nor contracted, so that a result depends neither on which copy of a function runs
# (numba keeps one in every caller and may mix them) nor on the machine's instruction set.
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"nnan", "ninf"}, "error_model": "numpy"}


def compiled(function: Function) -> Function:
    """Compile a function of numpy arrays and numbers on its first call, and keep the result on disk.

    The cache lies in ``__pycache__``, in NUMBA_CACHE_DIR when that is set, or in the user's cache folder; where none
    can be written the function is compiled anew in every process.
    """
    try:
        return cast(Function, numba.njit(cache=True, **_OPTIONS)(function))
    except RuntimeError:
        return cast(Function, numba.njit(**_OPTIONS)(function))


def inlined(function: Function) -> Function:
    """Compile a helper into the loops that call it; a call left in a loop would keep it from being vectorised."""
    return cast(Function, numba.njit(forceinline=True, **_OPTIONS)(function))

"""Objects that only the garbage collector can free."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[list[object]]:
    """Prevent collections in the block. The list has the objects that the next one would free, after the block."""
    gc.collect()
    gc.disable()
    unreachable: list[object] = []
    try:
        yield unreachable
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        unreachable.extend(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()

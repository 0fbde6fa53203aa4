"""What makes a command start sooner."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Keep the garbage collector out of imports, and of what they made from then on.

    Importing torch, transformers and vLLM makes more than a million objects that stay: searching them for garbage again and
    again takes a quarter of the time, and each later collection would search them once more.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # what is never freed is reported by extension modules as a leak
        if was_enabled:
            gc.enable()

"""What a command does before anything else: import quickly, and take no more threads than it has cores."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def limit_threads(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> None:
    """Let torch, and vLLM's CPU engine in the same process, use no more threads than a container's quota has cores.

    torch counts the cores of the machine: with two of 64 granted, 64 threads wait for each other.

    Args:
        cpu_max: the cgroup's quota and period, microseconds; without such a file, or a quota, nothing changes.
    """
    import torch

    quota, period = cpu_max.read_text().split() if cpu_max.is_file() else ("max", "1")
    if quota != "max":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), -(-int(quota) // int(period)))))

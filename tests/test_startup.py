"""Before anything else."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlvr_lightning.startup import imports, limit_threads


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(
    ("cpu_max", "threads"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("800000 100000", 4), ("max 100000", 4), (None, 4)],
)
def test_threads_follow_the_quota_of_the_container(tmp_path: Path, cpu_max: str | None, threads: int):
    file = tmp_path / "cpu.max"
    if cpu_max is not None:
        file.write_text(cpu_max + "\n")
    limit_threads(file)
    assert torch.get_num_threads() == threads


def test_the_garbage_collector_rests_during_imports_only():
    assert gc.isenabled()
    with imports():
        assert not gc.isenabled()
        kept = [[]]
        kept.append(kept)
    assert gc.isenabled()
    gc.disable()
    try:
        with imports():
            pass
        assert not gc.isenabled()  # as it was found
    finally:
        gc.enable()

"""FSDP2 as this project uses it."""

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy with all processes in data parallel and none in tensor parallel.

    ``ModelParallelStrategy`` wants the data-parallel size as a number, and its ``auto`` means one tensor-parallel group per
    node; this takes the world size when it is known.

    Args:
        save_distributed_checkpoint: write one shard per rank (True) or one consolidated file.
        timeout_s: seconds after which a rank that waits for another gives up.
    """

    def __init__(self, *, save_distributed_checkpoint: bool = True, timeout_s: int = 1800) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(seconds=timeout_s),
        )

    def setup_environment(self) -> None:
        """Set the data-parallel size before the device mesh is built from it."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

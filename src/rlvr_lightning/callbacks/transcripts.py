"""Every rollout, on disk: what the model wrote, what it scored and why.

Training rollouts go to gzip files of 100 steps each. A step is one gzip member, appended and synced as a whole: a crash
loses at most the step in progress, and ``zcat``, pandas and `read_transcripts` can read while the run goes on.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from rlvr_lightning.callbacks.history import gather_rows
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.jsonl import dump, read_jsonl, write_lines
from rlvr_lightning.records import ProblemBatch

STEPS_PER_FILE = 100
TABLE_COLUMNS = ["step", "problem", "reward", "reason", "length", "text"]


class TranscriptCallback(Callback):
    """Writes training rollouts to ``<root>/rollouts/train-rank{r}-{first step:08d}.jsonl.gz``, each rank its own.

    List it after the callback that attaches the rollouts: they are then on the disk before the update, which may fail;
    otherwise they are written after it. An evaluation goes to ``<root>/rollouts/{set}-{policy version:08d}.jsonl``, all
    ranks in one file, when it is complete. The first batch of a fit drops what an earlier run left for its step and
    later ones.
    """

    def __init__(self, every_n_steps: int = 1, table_rows: int = 8) -> None:
        """Set up the W&B table ``samples``; the files hold every rollout of every step, whatever is given here.

        Args:
            every_n_steps: Steps between two tables.
            table_rows: Rollouts in a table; 0: no tables.
        """
        if every_n_steps < 1 or table_rows < 0:
            raise ConfigError(
                f"transcripts.every_n_steps is {every_n_steps} and transcripts.table_rows {table_rows}: set the first to 1 or "
                "more, the second to 0 (no table) or more"
            )
        self.every_n_steps, self.table_rows = every_n_steps, table_rows
        self._written: int | None = None
        self._evaluated: list[tuple[str, dict[str, Any]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for leftovers at the first batch: only that says which step the run resumes at."""
        self._written = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the rollouts if they are attached already."""
        if batch.rollouts is not None:
            self._write(trainer, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ProblemBatch, batch_idx: int
    ) -> None:
        """Write the rollouts if that is still to be done, and the table when it is due."""
        if self._written != batch.step:
            self._write(trainer, batch)
        if self.table_rows and batch.step % self.every_n_steps == 0:
            names = ["problem_id" if column == "problem" else column for column in TABLE_COLUMNS]
            data = [[row[name] for name in names] for row in transcript_rows(batch)[: self.table_rows]]
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_table("samples", columns=TABLE_COLUMNS, data=data, step=batch.step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an evaluation that was interrupted."""
        self._evaluated = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ProblemBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect; the sanity check before a fit sees a part of the set and is left out."""
        if not trainer.sanity_checking:
            self._evaluated += [(batch.name, row) for row in transcript_rows(batch)]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write each set's file. All ranks must call it: rank zero writes for all of them."""
        files: dict[str, list[dict[str, Any]]] = {}
        rows = gather_rows([{**row, "set": name} for name, row in self._evaluated])
        for row in sorted(rows, key=lambda row: (row["step"], row["slot"], row["sample"])):
            files.setdefault(f"{row.pop('set')}-{row['policy_version']:08d}.jsonl", []).append(row)
        self._evaluated = []
        if trainer.is_global_zero:
            for name, part in files.items():
                write_lines(Path(trainer.default_root_dir) / "rollouts" / name, part)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def _write(self, trainer: Trainer, batch: ProblemBatch) -> None:
        folder, rank = Path(trainer.default_root_dir) / "rollouts", trainer.global_rank
        if self._written is None:
            drop_steps_from(folder, batch.step, rank=rank, world_size=trainer.world_size)
        self._written = batch.step
        rows = transcript_rows(batch)
        if not rows:
            return
        folder.mkdir(parents=True, exist_ok=True)
        first = batch.step - batch.step % STEPS_PER_FILE
        with (folder / f"train-rank{rank}-{first:08d}.jsonl.gz").open("ab") as file:
            file.write(gzip.compress(b"".join(map(dump, rows)), compresslevel=6, mtime=0))
            file.flush()
            os.fsync(file.fileno())


def transcript_rows(batch: ProblemBatch) -> list[dict[str, Any]]:
    """Return one row per rollout, group after group; ``length`` in tokens, ``mean_logprob`` in nats per token."""
    return [
        {
            "step": batch.step,
            "slot": batch.slots[index],
            "problem_id": rollout.problem.id,
            "sample": sample,
            "reward": rollout.score.reward,
            "correct": rollout.score.correct,
            "reason": rollout.score.reason,
            "extracted": rollout.score.extracted,
            "finish_reason": rollout.completion.finish_reason,
            "length": len(rollout.completion.token_ids),
            "mean_logprob": fmean(rollout.completion.logprobs) if rollout.completion.logprobs else None,
            "text": rollout.completion.text,
            "policy_version": rollout.policy_version,
            "temperature": rollout.temperature,
        }
        for (index, sample), rollout in zip(batch.places, batch.rollouts or (), strict=True)
    ]


def read_transcripts(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a transcript file, gzip or plain, without a torn end.

    Raises:
        ValueError: The file is damaged before its end.
    """
    if Path(path).suffix != ".gz":
        yield from read_jsonl(path)
        return
    for _, member in _members(Path(path)):
        yield from map(json.loads, member.splitlines())


def drop_steps_from(folder: Path, step: int, *, rank: int, world_size: int) -> None:
    """Drop this rank's training rows of ``step`` and later, and a torn last member.

    Steps only grow within a file, so its end is cut off in place: at every moment the file is a run of whole members.
    Rank zero also cuts the files of ranks that no longer exist, after a resume on fewer GPUs.
    """
    for path in folder.glob("train-rank*.jsonl.gz"):
        match = re.fullmatch(r"train-rank(\d+)-(\d+)\.jsonl\.gz", path.name)
        if match is None or not (int(match[1]) == rank or (rank == 0 and int(match[1]) >= world_size)):
            continue
        if int(match[2]) >= step:
            path.unlink()
        elif int(match[2]) + STEPS_PER_FILE > step:
            ends = [end for end, member in _members(path) if json.loads(member.splitlines()[0])["step"] < step]
            os.truncate(path, max(ends, default=0))


def _members(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield every whole gzip member: where it ends in the file, and what it holds."""
    with path.open("rb") as file:
        rest = b""
        while True:
            inflate, parts = zlib.decompressobj(wbits=31), []  # 31: gzip headers, the largest window
            while not inflate.eof:
                chunk = rest or file.read(1 << 20)
                if not chunk:
                    return  # the end, or a member that was being written when the run died
                try:
                    parts.append(inflate.decompress(chunk))
                except zlib.error as error:
                    raise ValueError(f"{path}: damaged before byte {file.tell()}; move it away ({error})") from error
                rest = inflate.unused_data
            yield file.tell() - len(rest), b"".join(parts)

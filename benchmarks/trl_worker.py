"""Train with TRL's GRPOTrainer, one step per ``go``: started by vs_trl.py and time_to_accuracy.py, with a job file.

It runs in TRL's environment, and imports nothing of this project but the grader.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlvr_lightning.records import Completion, Problem
from rlvr_lightning.verify import Verifier
from vs_trl import Gate, versions


class GateCallback(TrainerCallback):
    """Waits before every step, and evaluates after it when that is due."""

    def __init__(self, gate: Gate, evaluate_every: int) -> None:
        self.gate = gate
        self.evaluate_every = evaluate_every
        self.evaluate: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the last step and wait for the next."""
        self.gate.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, outside the step."""
        if self.evaluate_every and state.global_step % self.evaluate_every == 0:
            self.gate.finish()
            started = time.perf_counter()
            self.gate.emit(kind="evaluation", accuracy=self.evaluate(), seconds=time.perf_counter() - started)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the last step."""
        self.gate.finish()


def grade(verifier: Verifier, answers: list[str], texts: list[str]) -> list[float]:
    """Return the reward of each completion, as the quickstart gives it."""
    pairs = [(Problem("", "?", answer), Completion((), (), text, "stop")) for answer, text in zip(answers, texts, strict=True)]
    return [score.reward for score in verifier(pairs)]


@torch.no_grad()
def accuracy(trainer: GRPOTrainer, evaluation: list[dict[str, str]], verifier: Verifier) -> float:
    """Return the share of problems that the policy answers correctly when it decodes greedily."""
    tokenizer, model = trainer.processing_class, trainer.model
    inputs = tokenizer([row["prompt"] for row in evaluation], return_tensors="pt", padding=True, padding_side="left")
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=trainer.max_completion_length,
        eos_token_id=trainer.eos_token_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.eval()
    tokens = model.generate(**inputs.to(model.device), generation_config=config)
    model.train()
    texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = grade(verifier, [row["answer"] for row in evaluation], texts)
    return sum(rewards) / len(rewards)


def main() -> None:
    gate = Gate()
    job = json.loads(Path(sys.argv[1]).read_text())
    verifier = Verifier()
    gate.emit(kind="about", versions=versions("trl", "torch", "transformers", "accelerate"), settings=job["config"])

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewards = grade(verifier, [job["answer"]] * len(completions), completions)
        gate.note(tokens=sum(map(len, completion_ids)), reward=sum(rewards) / len(rewards))
        return rewards

    callback = GateCallback(gate, job["evaluate_every"])
    rows = job["problems_per_step"] * job["config"]["max_steps"]  # its sampler wants every group of a step to be a row
    trainer = GRPOTrainer(
        model=job["model"],
        reward_funcs=reward,
        args=GRPOConfig(**job["config"]),
        train_dataset=Dataset.from_dict({"prompt": [job["prompt"]] * rows}),
        callbacks=[callback],
    )
    if trainer.processing_class(text=[job["prompt"]])["input_ids"] != [job["prompt_ids"]]:  # as it tokenizes prompts
        raise SystemExit("TRL would train on other prompt tokens")
    dtype = next(trainer.model.parameters()).dtype
    if dtype != torch.float32:
        raise SystemExit(f"TRL loaded weights of {dtype}, ours are float32")
    callback.evaluate = lambda: accuracy(trainer, job["evaluation"], verifier)
    trainer.train()
    gate.emit(kind="end")
    verifier.close()


if __name__ == "__main__":
    main()

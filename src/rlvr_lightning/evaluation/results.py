"""What ``rlvr test`` leaves on the disk, and how an interrupted one goes on.

``<root>/evaluation/`` holds ``<set>.jsonl`` with a row per sample, ``results.json`` once every set is complete, and
``state.json``, which says whose rows these are: an evaluation goes on only where model, weights and fingerprints are the same.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import fsum, nan
from pathlib import Path
from typing import Any

from rlvr_lightning.engines import Sampling
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.evaluation.statistics import accuracy, bootstrap_interval, mean_interval
from rlvr_lightning.jsonl import append_lines, read_jsonl, write_lines
from rlvr_lightning.metrics import REFLECTION_WORDS, RolloutMean, evaluation_metrics
from rlvr_lightning.records import Completion, Problem, Rollout, Score

Fingerprint = dict[str, str]
"""``prompt``, ``sampling``, ``grader``, ``data``, and ``id``, which stands for all of them."""


def digest(content: object) -> str:
    """Return twelve hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(*, prompt: str, sampling: str, grader: str, problems: Sequence[Problem]) -> Fingerprint:
    """Return what decides a set's number besides the policy.

    Args:
        prompt: the whole prompt of a question, as the model reads it: template, system message and examples.
        sampling: in words, see :func:`describe`.
        grader: its name.
        problems: the set, in order.
    """
    data = digest([[p.id, p.question, p.answer, p.choices] for p in problems])
    parts = {"prompt": digest(prompt), "sampling": sampling, "grader": grader, "data": data}
    return parts | {"id": digest(parts)}


def describe(sampling: Sampling, seed: int) -> str:
    """Return a sampling in words; the seed only where it decides anything.

    >>> describe(Sampling(rollouts_per_problem=8, temperature=0.6), 0), describe(Sampling(temperature=0, max_tokens=48), 0)
    ('8 at T=0.6, at most 3072 tokens, seed 0', '8 greedy, at most 48 tokens')
    """
    parts = [f"{sampling.rollouts_per_problem} at T={sampling.temperature:g}", f"at most {sampling.max_tokens} tokens"]
    if sampling.temperature == 0:
        return f"{sampling.rollouts_per_problem} greedy, {parts[1]}"
    return ", ".join([*parts, *([f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []), f"seed {seed}"])


def row_of(rollout: Rollout, sample: int) -> dict[str, Any]:
    """Return a rollout as a row of ``<set>.jsonl``; ``tokens`` is the length of the completion."""
    return {
        "id": rollout.problem.id,
        "sample": sample,
        "subject": rollout.problem.subject,
        "question": rollout.problem.question,
        "ground_truth": rollout.problem.answer,
        "response": rollout.completion.text,
        "tokens": len(rollout.completion.token_ids),
        "finish_reason": rollout.completion.finish_reason,
        "extracted": rollout.score.extracted,
        "reason": rollout.score.reason,
        "reward": rollout.score.reward,
        "correct": rollout.score.correct,
    }


def rollout_of(row: Mapping[str, Any], problem: Problem, policy_version: int) -> Rollout:
    """Return the rollout of a row. Its token ids and log-probs were not stored: zeros and nan stand for them."""
    length = row["tokens"]
    return Rollout(
        problem=problem,
        prompt_ids=(),
        completion=Completion((0,) * length, (nan,) * length, row["response"], row["finish_reason"]),
        score=Score(row["reward"], row["correct"], row["reason"], row["extracted"]),
        temperature=nan,
        policy_version=policy_version,
    )


def summarize(
    rollouts: Sequence[Rollout],
    samples_per_problem: int,
    *,
    likelihood: bool = False,
    reflection_words: Sequence[str] = REFLECTION_WORDS,
) -> dict[str, Any]:
    """Return metrics, intervals, subjects and reasons of a complete set, as results.json holds them.

    Args:
        rollouts: group-major.
        samples_per_problem: n.
        likelihood: the set was scored without sampling, so nothing but the accuracy means anything.
        reflection_words: what `metrics.ReflectionRate` looks for.
    """
    groups = [rollouts[i : i + samples_per_problem] for i in range(0, len(rollouts), samples_per_problem)]
    metrics: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for key, metric in evaluation_metrics(samples_per_problem, reflection_words=reflection_words).items():
        assert isinstance(metric, RolloutMean)
        if not key.startswith("reason_") and (key == "accuracy" or not likelihood):
            terms = [metric.terms(group) for group in groups]
            metrics[key] = fsum(map(fsum, terms)) / max(sum(map(len, terms)), 1)
            intervals[key] = list(bootstrap_interval(_verdicts(groups)) if key == "accuracy" else mean_interval(terms))
    subjects: dict[str, list[Sequence[Rollout]]] = defaultdict(list)
    for group in groups:
        subjects[group[0].problem.subject].append(group)
    return {
        "problems": len(groups),
        "samples_per_problem": samples_per_problem,
        "metrics": metrics,
        "intervals": intervals,
        "subjects": {
            subject: {
                "accuracy": accuracy(_verdicts(of)),
                "interval": list(bootstrap_interval(_verdicts(of))),
                "problems": len(of),
            }
            for subject, of in sorted(subjects.items())
            if subject
        },
        "reasons": dict(Counter(rollout.score.reason for rollout in rollouts)),
    }


def _verdicts(groups: Sequence[Sequence[Rollout]]) -> list[list[bool]]:
    return [[rollout.score.correct for rollout in group] for group in groups]


class EvaluationFolder:
    """``<root>/evaluation``. Every rank reads it; only rank zero may call what writes.

    Args:
        root: the run directory.
        policy: ``model``, ``policy_version`` and ``weights``, which tell one policy from another.
        fingerprints: of every set of this run.
    """

    def __init__(self, root: Path, policy: Mapping[str, Any], fingerprints: Mapping[str, Fingerprint]) -> None:
        self.path = root / "evaluation"
        self._policy = dict(policy)
        self._fingerprints = dict(fingerprints)
        self._earlier = self._read_state()

    def _read_state(self) -> dict[str, Any]:
        """Return the sets that this folder has, as far as they are ours.

        Raises:
            ConfigError: if they are not.
        """
        file = self.path / "state.json"
        if not file.is_file():
            return {}
        try:
            state = json.loads(file.read_text())
            sets, policy = state.pop("sets"), state
            different = [
                f"{key} was {policy.get(key)!r} and is {value!r}"
                for key, value in self._policy.items()
                if policy.get(key) != value
            ]
            for name, now in self._fingerprints.items():
                then = sets.get(name, {}).get("fingerprint", now)
                different += [f"{name}: {k} was {then[k]!r} and is {v!r}" for k, v in now.items() if k != "id" and then[k] != v]
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{file} is damaged: remove the folder {str(self.path)!r}, or choose another") from error
        if different:
            raise ConfigError(
                f"folder {str(self.path)!r} holds another evaluation:\n  " + "\n  ".join(different) + "\nset "
                "trainer.default_root_dir to another folder, remove this one, or go back to what it was made with"
            )
        return sets

    def finished(self, name: str, problems: Sequence[Problem], samples_per_problem: int) -> dict[int, list[Rollout]]:
        """Return the rollouts of every problem that an earlier run has finished, by the problem's position in the set."""
        if name not in self._earlier:
            return {}
        version: int = self._policy["policy_version"]
        rows: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
        for row in read_jsonl(self.path / f"{name}.jsonl"):
            rows[row["id"]][row["sample"]] = row
        return {
            slot: [rollout_of(rows[problem.id][sample], problem, version) for sample in range(samples_per_problem)]
            for slot, problem in enumerate(problems)
            if len(rows[problem.id]) == samples_per_problem
        }

    def start(self, known: Mapping[str, Mapping[int, Sequence[Rollout]]]) -> None:
        """Begin writing: keep what is known, drop everything else of the sets of this run."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "results.json").unlink(missing_ok=True)  # complete sets of earlier runs come back at the end
        for name, fp in self._fingerprints.items():
            self.write(name, known[name])
            seconds = self._earlier.get(name, {}).get("seconds", 0.0) if known[name] else 0.0
            self._earlier[name] = {"fingerprint": fp, "seconds": seconds}
        self._write_state()

    def append(self, name: str, rows: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Add the rows of finished problems, on the disk before this returns, and the time that they took."""
        append_lines(self.path / f"{name}.jsonl", rows, fsync=True)
        self._earlier[name]["seconds"] += seconds
        self._write_state()

    def write(self, name: str, rollouts: Mapping[int, Sequence[Rollout]]) -> None:
        """Replace a set's file by these rollouts, in order of problem and sample."""
        rows = [row_of(r, sample) for _, group in sorted(rollouts.items()) for sample, r in enumerate(group)]
        write_lines(self.path / f"{name}.jsonl", rows)

    def finish(self, summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Write results.json: the given summaries, with fingerprint and speed, and what earlier runs completed; return it."""
        for name, summary in summaries.items():
            entry = self._earlier[name]
            tokens = sum(row["tokens"] for row in read_jsonl(self.path / f"{name}.jsonl"))
            speed = tokens / entry["seconds"] if entry["seconds"] else 0.0
            entry["result"] = {**summary, "seconds": entry["seconds"], "tokens_per_s": speed}
        self._write_state()
        results = {
            "model": self._policy["model"],
            "policy_version": self._policy["policy_version"],
            "sets": {n: {"fingerprint": s["fingerprint"], **s["result"]} for n, s in self._earlier.items() if "result" in s},
        }
        _write_json(self.path / "results.json", results)
        return results

    def _write_state(self) -> None:
        _write_json(self.path / "state.json", {**self._policy, "sets": self._earlier})


def _write_json(path: Path, content: object) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)

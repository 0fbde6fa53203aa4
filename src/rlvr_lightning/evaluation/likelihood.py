"""Multiple choice without sampling: the answer is the choice to which the policy gives the highest log-likelihood.

It takes the learner's own forward pass, so it is the same with every engine. Source: EleutherAI/lm-evaluation-harness,
lm_eval/api/task.py (output type ``multiple_choice``) and lm_eval/api/model.py (how context and continuation are tokenized).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from rlvr_lightning.prompts import PromptTemplate
from rlvr_lightning.records import Completion, Problem, Rollout, Score

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlvr_lightning.batching import RolloutBatch

LENGTHS: "dict[str, Callable[[str], int]]" = {
    "acc": lambda text: 1,
    "acc_norm": len,
    "acc_bytes": lambda text: len(text.encode()),
}
"""What a choice's log-likelihood is divided by before the choices are compared."""


def choose(
    problems: Sequence[Problem],
    template: PromptTemplate,
    tokenizer: "PreTrainedTokenizerBase",
    logprobs: "Callable[[RolloutBatch], Tensor]",
    *,
    metric: Literal["acc", "acc_norm", "acc_bytes"],
    policy_version: int,
) -> list[Rollout]:
    """Return one rollout per problem: its completion is the text of the choice that the policy likes best.

    A tie goes to the earlier choice. Under FSDP2 every rank has to call this, also with no problems.

    Args:
        problems: [P] with their choices.
        template: from problem to context; a choice follows it after one space.
        tokenizer: the policy's; adds no special tokens here, as the harness does by default.
        logprobs: (B, S) log-probs of the completion tokens at temperature 1, on the policy's device.
        metric: how log-likelihoods of choices of different lengths are compared.
        policy_version: of the weights behind ``logprobs``.
    """
    from rlvr_lightning.batching import RolloutBatch

    candidates = [
        _candidate(problem, text, template, tokenizer, policy_version) for problem in problems for _, text in problem.choices
    ]
    # A rank without problems takes part in the collective forward pass with a row that nobody reads.
    anything = Rollout(Problem("", "", ""), (0,), Completion((0,), (0.0,), "", "stop"), Score(0, False, "wrong", None), 1.0, 0)
    data = RolloutBatch.from_rollouts(candidates or [anything])
    found = logprobs(data).cpu().double()
    rows = iter([(c, found[i][data.completion_mask[i]].tolist()) for i, c in enumerate(candidates)])
    chosen = []
    for problem in problems:
        scored = [(label, text, *next(rows)) for label, text in problem.choices]
        label, text, candidate, nats = max(scored, key=lambda choice: sum(choice[3]) / LENGTHS[metric](choice[1]))
        correct = label == problem.answer
        completion = Completion(candidate.completion.token_ids, tuple(nats), text, "stop")
        score = Score(float(correct), correct, "correct" if correct else "wrong", label)
        chosen.append(Rollout(problem, candidate.prompt_ids, completion, score, 1.0, policy_version))
    return chosen


def _candidate(
    problem: Problem, text: str, template: PromptTemplate, tokenizer: "PreTrainedTokenizerBase", policy_version: int
) -> Rollout:
    """Return context and choice as token ids, cut where the context alone would end."""
    context = template.text(problem, tokenizer)
    whole = tuple(tokenizer(f"{context} {text}", add_special_tokens=False).input_ids)
    # Tokenized together, as the model would read them; the choice keeps one token even if it melts into the context.
    cut = min(len(tokenizer(context, add_special_tokens=False).input_ids), len(whole) - 1)
    completion = Completion(whole[cut:], (0.0,) * (len(whole) - cut), text, "stop")
    return Rollout(problem, whole[:cut], completion, Score(0.0, False, "wrong", None), 1.0, policy_version)

"""What a run says of itself before it starts: problems, step, objective, engine, and what is left out."""

from rlvr_lightning.data import ProblemDataModule
from rlvr_lightning.engines import RolloutEngine, Sampling
from rlvr_lightning.module import RLVRModule


def describe_run(module: RLVRModule, data: ProblemDataModule, engine: RolloutEngine, sampling: Sampling, ranks: int) -> str:
    """Return the lines that open a training run."""
    updates, precision = module.updates_per_step, str(module.compute_dtype).removeprefix("torch.")
    groups, group = data.problems_per_step, sampling.rollouts_per_problem
    rollouts = groups * group
    skipped = {
        "reference pass (kl_coef is 0)": not module.uses_reference,
        "old-log-prob pass (one update per step: exactly on-policy)": not module.uses_old,
        "what rollouts have in common, the prompt above all (computed once)": module.policy.share is not False,
    }
    lines = [
        f"training on  {describe_problems(data)}",
        f"each step    {groups} groups x {group} rollouts = {rollouts} completions of at most {sampling.max_tokens} tokens at "
        f"temperature {sampling.temperature:g}; {updates} update(s) on {rollouts / updates:g} of them, "
        f"{rollouts / updates / ranks:g} per process, micro-batches of at most {module.tokens_per_micro_batch} tokens",
        f"objective    {module.objective}; advantage {module.advantage}",
        f"critic       {module.critic_config}" if module.critic_config is not None else "",
        f"engine       {type(engine).__name__}, learner in {precision} with float32 weights on {ranks} process(es)",
        f"skipped      {', '.join(what for what, is_so in skipped.items() if is_so) or 'nothing'}",
    ]
    return "\n".join(line for line in lines if line)


def describe_problems(data: ProblemDataModule) -> str:
    """Return what is trained on, how often each problem comes, and what is odd about the files, one line each."""
    problems, visits = data.train_problems, data.problems_per_step / len(data.train_problems)
    if len(problems) == 1:
        what = f"{problems[0].question!r} -> {problems[0].answer}, in every group"
    else:
        often = f"each {visits:g} times a step" if visits >= 1 else f"each once in {1 / visits:g} steps"
        what = f"{len(problems)} problems, {often}" + (" on average" if len(set(data.train_weights or ())) > 1 else "")
    notes = list(data.notes)
    if data.changes:
        notes.append(f"{len(data.changes)} of their questions and answers are changed on purpose: see perturbed.jsonl")
    rest = [f"... and {len(notes) - 8} more such lines (`rlvr problems FILE` shows all)"] if len(notes) > 8 else []
    return "\n             ".join([what, *notes[:8], *rest])

"""The objective against hand-computed numbers and against autograd of a second implementation in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.losses import (
    LossTerms,
    Objective,
    clipped_surrogate,
    dual_clipped,
    importance_weights,
    kl_estimate,
    kl_k3,
    sequence_ratio,
    token_weights,
)


def one(value: float) -> Tensor:
    return torch.tensor([[value]])


def terms(objective: Objective, *, logprobs: Tensor, **changes: Tensor | None) -> LossTerms:
    """The objective at ratio 1, without entropy and reference, unless ``changes`` say otherwise."""
    inputs: dict[str, Tensor | None] = {
        "entropy": torch.zeros_like(logprobs),
        "old_logprobs": logprobs.detach(),
        "reference_logprobs": None,
        "advantages": torch.ones(len(logprobs), 1),
    }
    return objective(logprobs=logprobs, **(inputs | changes))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.1, 2.0, -2.2),  # inside the clip: -1.1 * 2
        (1.5, 2.0, -2.4),  # clipped: -1.2 * 2
        (0.5, 2.0, -1.0),  # a good token that lost probability is not clipped: -0.5 * 2
        (1.5, -2.0, 3.0),  # a bad token that gained probability is not clipped: 1.5 * 2
        (0.5, -2.0, 1.6),  # clipped: 0.8 * 2
    ],
)
def test_surrogate_of_one_token(ratio: float, advantage: float, loss: float):
    torch.testing.assert_close(clipped_surrogate(one(ratio), one(advantage), 0.2, 0.2), one(loss))


def test_clip_bounds_are_separate():
    ratios = torch.tensor([[1.4, 0.6]])
    # high: min(1.4, 1.28) = 1.28; low, with A < 0: max(0.6, 0.9) = 0.9
    torch.testing.assert_close(clipped_surrogate(ratios, one(1.0), 0.1, 0.28)[0, 0], torch.tensor(-1.28))
    torch.testing.assert_close(clipped_surrogate(ratios, one(-1.0), 0.1, 0.28)[0, 1], torch.tensor(0.9))


def test_clip_stops_the_gradient_only_where_it_is_active():
    logprobs = torch.tensor([[0.5, -0.5, 0.05]]).exp().log().requires_grad_()  # ratios 1.65, 0.61, 1.05
    result = terms(Objective(), logprobs=logprobs, old_logprobs=torch.zeros(1, 3))
    result.surrogate.sum().backward()
    assert result.clipped.tolist() == [[1.0, 0.0, 0.0]]
    assert logprobs.grad is not None
    # d(-ratio * A)/dlogp = -ratio * A, or 0 where clipped
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, -math.exp(-0.5), -math.exp(0.05)]]))


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([[-0.3, -2.0], [-1.0, -0.1]], requires_grad=True)
    advantages = torch.tensor([[0.3536], [-2.4749]])
    result = terms(Objective(kl_coef=0.0, entropy_coef=0.0), logprobs=logprobs, advantages=advantages)
    result.total.sum().backward()
    # d/dlogp of -A * logp
    torch.testing.assert_close(logprobs.grad, -advantages.expand(2, 2))
    assert result.clipped.sum() == 0


def test_kl_of_one_token_by_hand():
    # d = -2 - -1 = -1: exp(-1) + 1 - 1 = 0.36788; d = 1: e - 2 = 0.71828; d = 5 would be 142.4, clamped to 10
    logprobs, reference = torch.tensor([[-1.0, -2.0, -6.0]]), torch.tensor([[-2.0, -1.0, -1.0]])
    torch.testing.assert_close(kl_k3(logprobs, reference), torch.tensor([[0.36788, 0.71828, 10.0]]), atol=1e-5, rtol=0)


def test_kl_and_its_gradient_are_exactly_zero_at_equal_policies():
    logprobs = torch.linspace(-20, 0, 101)[None].requires_grad_()
    kl = kl_k3(logprobs, logprobs.detach().clone())
    kl.sum().backward()
    assert kl.tolist() == [[0.0] * 101]
    assert logprobs.grad is not None
    assert logprobs.grad.abs().max() == 0


def test_kl_is_never_negative_even_for_differences_near_rounding():
    d = torch.linspace(-1e-3, 1e-3, 20001)[None]
    assert kl_k3(torch.zeros_like(d), d).min() >= 0


def test_kl_averages_to_the_true_divergence():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    expected = (policy * (policy / reference).log()).sum()  # 0.5 ln 2.5 + 0.2 ln 0.4 = 0.27489
    estimate = (policy * kl_k3(policy.log()[None], reference.log()[None])[0]).sum()  # expectation over the policy
    torch.testing.assert_close(estimate, expected)


def test_descending_the_kl_term_pulls_the_policy_to_the_reference():
    logprobs = one(-1.0).requires_grad_()  # more likely than under the reference
    terms(
        Objective(policy_coef=0.0, entropy_coef=0.0, kl_coef=1.0), logprobs=logprobs, reference_logprobs=one(-2.0)
    ).total.sum().backward()
    assert logprobs.grad is not None
    # d/dlogp (exp(ref - logp) - (ref - logp) - 1) = 1 - exp(-1) > 0: descent lowers logp
    torch.testing.assert_close(logprobs.grad, one(1 - math.exp(-1)))


@pytest.mark.parametrize("coef", [0.7, -0.7])
def test_a_positive_entropy_coef_rewards_entropy(coef: float):
    entropy = one(1.3).requires_grad_()
    result = terms(Objective(entropy_coef=coef), logprobs=one(-1.0), entropy=entropy, advantages=torch.zeros(1, 1))
    result.total.sum().backward()
    torch.testing.assert_close(result.total, one(-coef * 1.3))
    torch.testing.assert_close(entropy.grad, one(-coef))


def reference_loss(logits: Tensor, tokens: Tensor, old: Tensor, ref: Tensor, advantages: Tensor) -> Tensor:
    """0.9 * surrogate + 0.05 * KL - 0.02 * H, summed token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for b, s in torch.cartesian_prod(*map(torch.arange, tokens.shape)).tolist():
        p = torch.softmax(logits[b, s], dim=0)
        logp = p[tokens[b, s]].log()
        ratio, a = (logp - old[b, s]).exp(), advantages[b]
        clipped = min(max(ratio.item(), 0.8), 1.3)
        surrogate = -ratio * a if ratio.item() * a <= clipped * a else torch.as_tensor(-clipped * a)
        k3 = (ref[b, s] - logp).exp() - (ref[b, s] - logp) - 1
        total = total + 0.9 * surrogate + 0.05 * k3 + 0.02 * (p * p.log()).sum()
    return total


def test_value_and_gradient_equal_a_float64_reference():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, (4, 5), generator=generator)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64)
    with torch.no_grad():
        now = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    old = now + 0.3 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    ref = now + 0.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    expected = reference_loss(logits, tokens, old, ref, advantages)
    (expected_grad,) = torch.autograd.grad(expected, logits)

    log_p = logits.log_softmax(-1)
    result = Objective(policy_coef=0.9, kl_coef=0.05, entropy_coef=0.02, clip_high=0.3)(
        logprobs=log_p.gather(-1, tokens[..., None])[..., 0],
        entropy=-(log_p.exp() * log_p).sum(-1),
        old_logprobs=old,
        reference_logprobs=ref,
        advantages=advantages[:, None],
    )
    (grad,) = torch.autograd.grad(result.total.sum(), logits)
    assert 0 < result.clipped.sum() < 20  # both branches of the clip took part
    torch.testing.assert_close(result.total.sum(), expected)
    torch.testing.assert_close(grad, expected_grad)


def test_without_a_reference_the_kl_is_zero():
    result = terms(Objective(kl_coef=0.0), logprobs=torch.randn(2, 3))
    assert result.kl.tolist() == [[0.0] * 3] * 2


# --- every switch ------------------------------------------------------------------------------------------------------


def reference_term(objective: Objective, b: int, s: int, x: dict[str, Tensor]) -> Tensor:
    """The loss of one token by the formulas of the papers, as maximization of a gain, on scalars."""
    logp, old, a = x["logprobs"][b, s], x["old_logprobs"][b, s], x["advantages"][b, 0]
    ratio = logp.exp() / old.exp()
    if objective.policy_loss == "gspo":  # geometric mean of the row's ratios
        tokens = x["mask"][b].nonzero()[:, 0]
        ratio = (x["logprobs"][b, tokens].exp() / x["old_logprobs"][b, tokens].exp()).prod() ** (1 / len(tokens))
    bounded = min(max(ratio.item(), 1 - objective.clip_low), 1 + objective.clip_high)
    if objective.policy_loss == "cispo":
        gain = bounded * a * logp
    else:
        gain = ratio * a if ratio * a <= bounded * a else bounded * a
        if objective.dual_clip is not None and a < 0 and gain < objective.dual_clip * a:
            gain = objective.dual_clip * a
    if objective.importance_cap is not None:
        gain = gain * min((old.exp() / x["sampler_logprobs"][b, s].exp()).item(), objective.importance_cap)
    quotient = x["reference_logprobs"][b, s].exp() / logp.exp()
    kl = {
        "k1": -quotient.log(),
        "k2": quotient.log() ** 2 / 2,
        "k3": quotient - 1 - quotient.log(),
        "abs": quotient.log().abs(),
    }[objective.kl_estimator]
    assert isinstance(objective.kl_coef, float)
    return -0.9 * gain + (objective.kl_coef * kl if objective.kl_in == "loss" else 0) - 0.02 * x["entropy"][b, s]


def some_inputs() -> dict[str, Tensor]:
    """Four rows of five tokens in float64; the ratios reach from about 0.2 to 5; row 3 has one token."""
    g = torch.Generator().manual_seed(5)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(4, 5, generator=g, dtype=torch.float64)

    now = -2 + noise(0.7)
    return {
        "logprobs": now.clone().requires_grad_(),
        "entropy": noise(1.0).abs().requires_grad_(),
        "old_logprobs": now + noise(0.7),
        "reference_logprobs": now + noise(0.5),
        "sampler_logprobs": now + noise(0.9),
        "advantages": torch.tensor([[1.0], [-1.0], [0.5], [-2.0]], dtype=torch.float64),
        "mask": torch.arange(5) < torch.tensor([5, 4, 3, 1])[:, None],
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy_loss": "gspo"},
        {"policy_loss": "gspo", "clip_low": 0.05, "clip_high": 0.05},
        {"policy_loss": "cispo"},
        {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": 0.5},
        {"dual_clip": 1.1},
        {"policy_loss": "gspo", "dual_clip": 1.01},
        {"importance_cap": 1.5},
        {"policy_loss": "cispo", "importance_cap": 2.0},
        {"dual_clip": 1.1, "importance_cap": 2.0, "kl_estimator": "abs"},
        {"kl_estimator": "k1"},
        {"kl_estimator": "k2"},
        {"kl_in": "reward"},
    ],
    ids=str,
)
def test_every_switch_equals_a_reference_in_value_and_gradient(settings: dict[str, Any]):
    objective, x = Objective(**{"policy_coef": 0.9, "kl_coef": 0.05, "entropy_coef": 0.02} | settings), some_inputs()
    places = x["mask"].nonzero().tolist()
    expected = torch.stack([reference_term(objective, b, s, x) for b, s in places])
    result = objective(**x)
    inputs = (x["logprobs"], x["entropy"])
    for got, wanted in zip(
        torch.autograd.grad(result.total[x["mask"]].sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(result.total[x["mask"]], expected, atol=1e-12, rtol=1e-9)
    assert 0 < result.clipped[x["mask"]].sum() < len(places) or objective.policy_loss == "gspo"


def test_the_loss_of_the_papers_code_by_hand():
    # Two rows, 3 tokens. Ratios e^0.2 -> 1.2, e^-0.5 = 0.606531, 1; A = 0.3536 and -2.4749 (7 of 8 correct).
    # pg = (-1.2 * 0.3536 - 0.606531 * 0.3536 + 2.4749) / 3 = (-0.424320 - 0.214469 + 2.474900) / 3 = 0.612037
    # kl = (exp(-1) + exp(1) - 2 + 0) / 3 = (0.367879 + 0.718282) / 3 = 0.362054; entropy = (0.5 + 1 + 1.5) / 3 = 1
    # loss = 0.612037 - 0.001 * 1 + 0.001 * 0.362054 = 0.611399
    mask = torch.tensor([[True, True], [True, False]])
    result = Objective()(
        logprobs=torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]),
        entropy=torch.tensor([[0.5, 1.0], [1.5, 0.0]]),
        old_logprobs=torch.tensor([[-1.2, -1.5], [-0.5, 0.0]]),
        reference_logprobs=torch.tensor([[-2.0, -1.0], [-0.5, 0.0]]),
        advantages=torch.tensor([[0.3536], [-2.4749]]),
    )
    for value, by_hand in (
        (result.surrogate, 0.612037),
        (result.kl, 0.362054),
        (result.entropy, 1.0),
        (result.total, 0.611399),
    ):
        for reduction in ("token", "micro_batch"):  # one micro-batch: the same
            weights = token_weights(mask, reduction, num_tokens=3, num_rows=2)
            assert (value * weights).sum().item() == pytest.approx(by_hand, abs=1e-6)


def test_gspo_clips_whole_rows_and_shares_the_gradient():
    # Ratios 2 and 0.5 make 1; ratios 2 and 2 make 2, clipped at 1.2.
    logprobs = torch.tensor([[math.log(2), -math.log(2)], [math.log(2), math.log(2)]], requires_grad=True)
    inputs = {"old_logprobs": torch.zeros(2, 2), "mask": torch.ones(2, 2).bool(), "advantages": torch.tensor([[3.0], [1.0]])}
    result = terms(Objective(policy_loss="gspo"), logprobs=logprobs, **inputs)
    torch.testing.assert_close(result.surrogate, torch.tensor([[-3.0, -3.0], [-1.2, -1.2]]))
    assert result.clipped.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    result.surrogate.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-3.0, -3.0], [0.0, 0.0]]))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.integers(0, 3))
def test_the_sequence_ratio_ignores_padding_and_order(log_ratios: list[float], padding: int):
    width = len(log_ratios) + padding
    logprobs = torch.full((3, width), math.nan)
    logprobs[0, : len(log_ratios)] = torch.tensor(log_ratios)
    logprobs[1, padding:] = torch.tensor(log_ratios).flip(0)
    mask = ~logprobs.isnan()  # the last row is empty
    ratio = sequence_ratio(logprobs, torch.zeros(3, width), mask)
    expected = math.exp(sum(log_ratios) / len(log_ratios))
    torch.testing.assert_close(ratio[:, 0], torch.tensor([expected, expected, 1.0]))
    assert (ratio == ratio[:, :1]).all()


def test_at_ratio_one_every_policy_loss_has_the_same_gradient():
    advantages, mask = torch.tensor([[0.3536], [-2.4749]]), torch.ones(2, 3).bool()
    for policy_loss in ("clip", "gspo", "cispo"):
        logprobs = torch.tensor([[-0.3, -2.0, -1.0], [-1.0, -0.1, -5.0]], requires_grad=True)
        result = terms(Objective(policy_loss=policy_loss), logprobs=logprobs, advantages=advantages, mask=mask)
        result.surrogate.sum().backward()
        torch.testing.assert_close(logprobs.grad, -advantages.expand(2, 3))
        assert result.clipped.sum() == 0


def test_cispo_keeps_the_gradient_that_the_clip_stops():
    logprobs = torch.tensor([[1.0, -1.0]], requires_grad=True)  # ratios 2.7 and 0.37; the first one is clipped by PPO
    inputs = {"old_logprobs": torch.zeros(1, 2), "advantages": torch.tensor([[2.0]])}
    result = terms(Objective(policy_loss="cispo", clip_low=0.1, clip_high=0.3), logprobs=logprobs, **inputs)
    torch.testing.assert_close(result.surrogate, torch.tensor([[-1.3 * 2 * 1.0, -0.9 * 2 * -1.0]]))
    assert result.clipped.tolist() == [[1.0, 1.0]]
    result.surrogate.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-2.6, -1.8]]))


def test_the_dual_clip_bounds_bad_tokens_only():
    surrogate, advantages = torch.tensor([[10.0, 4.0], [-10.0, 10.0]]), torch.tensor([[-2.0], [2.0]])
    # A = -2: at most 3 * 2 = 6; A = 2: untouched
    assert dual_clipped(surrogate, advantages, 3.0).tolist() == [[6.0, 4.0], [-10.0, 10.0]]
    logprobs = torch.tensor([[math.log(5), math.log(2)]], requires_grad=True)
    inputs = {"old_logprobs": torch.zeros(1, 2), "advantages": torch.tensor([[-2.0]])}
    result = terms(Objective(dual_clip=3.0), logprobs=logprobs, **inputs)
    assert result.clipped.tolist() == [[1.0, 0.0]]
    result.surrogate.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 4.0]]))


def test_importance_weights_are_capped_and_have_no_gradient():
    old = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    weights = importance_weights(old, -torch.tensor([[1.5, 4.0, 0.25]]).log(), 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.5, 2.0, 0.25]]))
    assert not weights.requires_grad


def test_uncapped_importance_weights_turn_the_engines_mean_into_the_learners():
    learner, engine, f = (torch.tensor(v, dtype=torch.float64) for v in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [1.0, -3.0, 7.0]))
    weights = importance_weights(learner.log()[None], engine.log()[None], math.inf)[0]
    torch.testing.assert_close((engine * weights * f).sum(), (learner * f).sum())


@pytest.mark.parametrize(
    ("settings", "missing"), [({"policy_loss": "gspo"}, "mask"), ({"importance_cap": 2.0}, "sampler_logprobs")]
)
def test_an_input_that_a_switch_needs_is_asked_for_by_name(settings: dict[str, Any], missing: str):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.* needs {missing}"):
        terms(Objective(**settings), logprobs=one(-1.0))


# --- KL ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "by_hand"), [("k1", [1.0, -1.0]), ("k2", [0.5, 0.5]), ("k3", [0.367879, 0.718282]), ("abs", [1.0, 1.0])]
)
def test_kl_estimates_by_hand(estimator: Any, by_hand: list[float]):
    estimate = kl_estimate(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.0]]), estimator)
    torch.testing.assert_close(estimate, torch.tensor([by_hand]), atol=1e-6, rtol=0)


def test_which_estimators_have_the_value_and_which_the_gradient_of_the_divergence():
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    logprobs = logits.log_softmax(0)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for estimator, value, gradient in (("k1", exact, 0 * logits), ("k3", exact, None), ("k2", None, exact_gradient)):
        estimate = (logprobs.exp().detach() * kl_estimate(logprobs[None], reference[None], estimator)[0]).sum()
        if value is not None:
            torch.testing.assert_close(estimate, value)
        if gradient is not None:
            torch.testing.assert_close(torch.autograd.grad(estimate, logits, retain_graph=True)[0], gradient)


def test_a_kl_in_the_reward_is_measured_but_not_in_the_loss():
    logprobs = one(-1.0).requires_grad_()
    objective = Objective(kl_coef=5.0, kl_in="reward", entropy_coef=0.0)
    result = terms(objective, logprobs=logprobs, reference_logprobs=one(-2.0), advantages=torch.zeros(1, 1))
    assert result.kl.item() == pytest.approx(math.exp(-1))
    assert result.total.item() == 0
    assert objective.coefficients == {"surrogate": 1.0}
    assert objective.uses_kl


# --- what a token counts -----------------------------------------------------------------------------------------------


def cut(values: list[list[float]], reduction: Any, bounds: list[int]) -> float:
    """The loss of a mini-batch whose rows have these values per token, cut at these bounds."""
    num_tokens, num_rows = torch.tensor([sum(map(len, values)), sum(map(bool, values))], dtype=torch.float64)
    total = 0.0
    for begin, end in zip([0, *bounds], [*bounds, len(values)], strict=True):
        rows = values[begin:end]
        width = max(map(len, rows), default=0) + 1
        mask = torch.tensor([[s < len(row) for s in range(width)] for row in rows]).bool().reshape(len(rows), width)
        loss = torch.tensor([row + [9.0] * (width - len(row)) for row in rows]).double().reshape(len(rows), width)
        weights = token_weights(mask, reduction, num_tokens=num_tokens, num_rows=num_rows)
        assert weights[~mask].count_nonzero() == 0
        total += (loss * weights).sum().item()
    return total


ROWS = st.lists(st.lists(st.floats(-5, 5), max_size=6), min_size=1, max_size=8).filter(any)
BOUNDS = st.lists(st.integers(0, 8), max_size=4)


@given(ROWS, BOUNDS)
def test_token_and_sequence_means_do_not_depend_on_the_cut(values: list[list[float]], bounds: list[int]):
    bounds = sorted(min(b, len(values)) for b in bounds)
    rows = [row for row in values if row]
    assert cut(values, "token", bounds) == pytest.approx(sum(map(sum, rows)) / sum(map(len, rows)), abs=1e-6)
    assert cut(values, "sequence", bounds) == pytest.approx(sum(sum(row) / len(row) for row in rows) / len(rows), abs=1e-6)


@given(ROWS, BOUNDS)
def test_the_micro_batch_mean_is_that_of_the_papers_code(values: list[list[float]], bounds: list[int]):
    bounds = sorted(min(b, len(values)) for b in bounds)
    micros = [[row for row in values[i:j] if row] for i, j in zip([0, *bounds], [*bounds, len(values)], strict=True)]
    num_rows = sum(map(len, micros))
    expected = sum(sum(map(sum, rows)) / sum(map(len, rows)) * len(rows) / num_rows for rows in micros if rows)
    assert cut(values, "micro_batch", bounds) == pytest.approx(expected, abs=1e-6)


def test_the_micro_batch_mean_depends_on_the_cut():
    values = [[0.0], [1.0, 1.0, 1.0]]
    assert cut(values, "micro_batch", []) == pytest.approx(0.75)  # the token mean, 3 / 4
    assert cut(values, "micro_batch", [1]) == pytest.approx(0.5)  # the sequence mean, (0 + 1) / 2
    # Three rows of 1, 3 and 2 tokens: (1 / 3) * 0 + (2 / 3) * (3 / 5) = 0.4 or (2 / 3) * (3 / 4) + (1 / 3) * 0 = 0.5
    values.append([0.0, 0.0])
    assert cut(values, "micro_batch", [1]) == pytest.approx(0.4)
    assert cut(values, "micro_batch", [2]) == pytest.approx(0.5)


@given(st.integers(1, 5), st.integers(1, 6), BOUNDS, st.sampled_from(["token", "sequence", "micro_batch"]))
def test_the_weights_sum_to_one_and_are_equal_for_rows_of_equal_length(
    rows: int, length: int, bounds: list[int], reduction: str
):
    bounds = sorted(min(b, rows) for b in bounds)
    assert cut([[1.0] * length] * rows, reduction, bounds) == pytest.approx(1, abs=1e-6)
    one_token = [[1.0] + [0.0] * (length - 1)] + [[0.0] * length] * (rows - 1)
    assert cut(one_token, reduction, bounds) == pytest.approx(1 / (rows * length), abs=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence", "micro_batch"])
def test_a_micro_batch_without_tokens_weighs_nothing(reduction: Any):
    mask = torch.zeros(1, 4, dtype=torch.bool)
    for num_tokens, num_rows in ((7, 2), (0, 0)):
        assert token_weights(mask, reduction, num_tokens=num_tokens, num_rows=num_rows).tolist() == [[0.0] * 4]


# --- the configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (Objective(), "loss = surrogate + 0.001 * KL(policy || reference) - 0.001 * entropy"),
        (Objective(kl_coef=0.0, entropy_coef=0.0), "loss = surrogate"),
        (Objective(policy_coef=0.0), "loss = 0.001 * KL(policy || reference) - 0.001 * entropy"),
        (Objective(policy_coef=0.0, kl_coef=0.0), "loss = - 0.001 * entropy"),
        (Objective(policy_coef=2.0, kl_coef=0.0, entropy_coef=-0.5), "loss = 2 * surrogate + 0.5 * entropy"),
        (Objective(policy_coef=0.0, kl_coef=0.0, entropy_coef=0.0), "loss = 0 (nothing but weight decay moves the weights)"),
        (
            Objective(kl_in="reward", kl_coef=0.01, kl_estimator="k1"),
            "loss = surrogate - 0.001 * entropy, reward - 0.01 * KL(policy || reference) (kl_estimator=k1)",
        ),
        (Objective(kl_in="reward", kl_coef=0.0, entropy_coef=0.0), "loss = surrogate"),
        (
            Objective(
                kl_coef=0.0, entropy_coef=0.0, policy_loss="gspo", dual_clip=3.0, importance_cap=2.0, reduction="sequence"
            ),
            "loss = surrogate (policy_loss=gspo, dual_clip=3.0, importance_cap=2.0, reduction=sequence)",
        ),
    ],
)
def test_the_objective_reads_as_its_formula(objective: Objective, text: str):
    assert str(objective) == text


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": -0.001},
        {"policy_coef": -1.0},
        {"clip_low": -0.1},
        {"clip_high": -0.1},
        {"clip_low": 1.5},
        {"entropy_coef": math.nan},
        {"kl_coef": math.inf},
        {"dual_clip": 1.0},
        {"dual_clip": math.nan},
        {"importance_cap": 0.0},
    ],
    ids=str,
)
def test_an_impossible_value_is_refused_by_name(settings: dict[str, Any]):
    (name,) = settings
    with pytest.raises(ConfigError, match=rf"objective\.{name} is "):
        Objective(**settings)


def test_a_negative_entropy_coef_is_allowed():
    assert Objective(entropy_coef=-0.1).entropy_coef == -0.1


@pytest.mark.parametrize("name", ["policy_loss", "kl_estimator", "kl_in", "reduction"])
def test_an_unknown_choice_is_refused_with_the_known_ones(name: str):
    objective = Objective()
    object.__setattr__(objective, name, "mean")  # past the type check that only the tests have
    with pytest.raises(
        ConfigError,
        match=rf"objective\.{name} is 'mean': choose one of {getattr(Objective, name)}|choose one of k1, k2, k3, abs",
    ):
        objective.__post_init__()


def test_a_dual_clip_without_effect_is_refused():
    with pytest.raises(ConfigError, match="dual_clip has no effect with policy_loss cispo"):
        Objective(dual_clip=3.0, policy_loss="cispo")

"""The objective against hand-computed numbers and against autograd of a second implementation in float64."""

import math

import pytest
import torch
from torch import Tensor

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.losses import LossTerms, Objective, clipped_surrogate, kl_k3


def one(value: float) -> Tensor:
    return torch.tensor([[value]])


def terms(objective: Objective, *, logprobs: Tensor, **changes: Tensor | None) -> LossTerms:
    """The objective at ratio 1, without entropy and reference, unless ``changes`` say otherwise."""
    inputs: dict[str, Tensor | None] = {
        "entropy": torch.zeros_like(logprobs),
        "old_logprobs": logprobs.detach(),
        "reference_logprobs": None,
        "advantages": torch.ones(len(logprobs)),
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
    advantages = torch.tensor([0.3536, -2.4749])
    result = terms(Objective(kl_coef=0.0, entropy_coef=0.0), logprobs=logprobs, advantages=advantages)
    result.total.sum().backward()
    # d/dlogp of -A * logp
    torch.testing.assert_close(logprobs.grad, -advantages[:, None].expand(2, 2))
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
    result = terms(Objective(entropy_coef=coef), logprobs=one(-1.0), entropy=entropy, advantages=torch.zeros(1))
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
        advantages=advantages,
    )
    (grad,) = torch.autograd.grad(result.total.sum(), logits)
    assert 0 < result.clipped.sum() < 20  # both branches of the clip took part
    torch.testing.assert_close(result.total.sum(), expected)
    torch.testing.assert_close(grad, expected_grad)


def test_without_a_reference_the_kl_is_zero():
    result = terms(Objective(kl_coef=0.0), logprobs=torch.randn(2, 3))
    assert result.kl.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (Objective(), "loss = surrogate + 0.001 * KL(policy || reference) - 0.001 * entropy"),
        (Objective(kl_coef=0.0, entropy_coef=0.0), "loss = surrogate"),
        (Objective(policy_coef=0.0), "loss = 0.001 * KL(policy || reference) - 0.001 * entropy"),
        (Objective(policy_coef=0.0, kl_coef=0.0), "loss = - 0.001 * entropy"),
        (Objective(policy_coef=2.0, kl_coef=0.0, entropy_coef=-0.5), "loss = 2 * surrogate + 0.5 * entropy"),
        (Objective(policy_coef=0.0, kl_coef=0.0, entropy_coef=0.0), "loss = 0 (nothing but weight decay moves the weights)"),
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
    ],
    ids=str,
)
def test_an_impossible_value_is_refused_by_name(settings: dict[str, float]):
    (name,) = settings
    with pytest.raises(ConfigError, match=rf"objective\.{name} is "):
        Objective(**settings)


def test_a_negative_entropy_coef_is_allowed():
    assert Objective(entropy_coef=-0.1).entropy_coef == -0.1

"""Log-probs and entropy from hidden states, in one piece and in chunks."""

import math

import pytest
import torch
from torch import Tensor, nn

from rlvr_lightning import logprobs
from rlvr_lightning.logprobs import token_logprobs_and_entropy


def inputs(tokens: int = 23, hidden: int = 6, vocabulary: int = 11) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False)
    return torch.randn(tokens, hidden, requires_grad=True), torch.randint(vocabulary, (tokens,)), head


def values_and_gradients(temperature: float) -> list[Tensor]:
    """Both results, and the gradients of a loss that weighs every token of both differently."""
    hidden, targets, head = inputs()
    log_p, entropy = token_logprobs_and_entropy(hidden, targets, head, temperature)
    weights = torch.linspace(-1, 1, len(targets))
    (log_p @ weights + entropy @ weights.square()).backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return [log_p.detach(), entropy.detach(), hidden.grad, head.weight.grad]


def test_one_token_by_hand_with_the_temperature_inside():
    # logits (1, 0, 0) / T = (2, 0, 0) at T = 0.5: log p = 2 - ln(e^2 + 2) = -0.23954 for token 0, -2.23954 for token 1
    hidden, targets = torch.tensor([[1.0, 0.0, 0.0]] * 2), torch.tensor([0, 1])
    log_p, entropy = token_logprobs_and_entropy(hidden, targets, nn.Identity(), 0.5)
    torch.testing.assert_close(log_p, torch.tensor([-0.23954, -2.23954]), atol=1e-5, rtol=0)
    # p = (0.78699, 0.10651, 0.10651): 0.78699 * 0.23954 + 2 * 0.10651 * 2.23954 = 0.66557
    torch.testing.assert_close(entropy, torch.full((2,), 0.66557), atol=1e-5, rtol=0)


def test_a_uniform_distribution_has_entropy_ln_v():
    log_p, entropy = token_logprobs_and_entropy(torch.zeros(1, 7), torch.tensor([3]), nn.Identity(), 0.6)
    torch.testing.assert_close(entropy, torch.tensor([math.log(7)]))
    torch.testing.assert_close(log_p, torch.tensor([-math.log(7)]))


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_values_and_gradients_equal_a_float64_reference(temperature: float):
    hidden, targets, head = inputs()
    weights = torch.linspace(-1, 1, len(targets), dtype=torch.float64)
    h, w = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    p = torch.softmax(h @ w.T / temperature, dim=1)
    log_p, entropy = p[torch.arange(len(targets)), targets].log(), -(p * p.log()).sum(1)
    (log_p @ weights + entropy @ weights.square()).backward()
    expected = [log_p, entropy, h.grad, w.grad]
    for value, reference in zip(values_and_gradients(temperature), expected, strict=True):
        torch.testing.assert_close(value.double(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 22, 23])
def test_the_chunk_size_changes_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch, size: int):
    whole = values_and_gradients(0.6)
    monkeypatch.setattr(logprobs, "TOKENS_PER_CHUNK", size)
    for value, reference in zip(values_and_gradients(0.6), whole, strict=True):
        torch.testing.assert_close(value, reference, atol=2e-6, rtol=1e-5)


def test_no_more_than_a_chunk_of_logits_exists_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logprobs, "TOKENS_PER_CHUNK", 5)
    hidden, targets, head = inputs()
    calls: list[int] = []

    def spy(h: Tensor) -> Tensor:
        calls.append(len(h))
        return head(h)

    log_p, _ = token_logprobs_and_entropy(hidden, targets, spy, 1.0)
    assert calls == [5, 5, 5, 5, 3]
    log_p.sum().backward()
    assert sorted(calls[5:]) == [3, 5, 5, 5, 5]  # recomputed in the backward pass, not kept


def test_no_tokens_give_empty_results_that_still_carry_a_gradient():
    hidden, _, head = inputs(tokens=0)
    log_p, entropy = token_logprobs_and_entropy(hidden, torch.zeros(0, dtype=torch.long), head, 0.6)
    (log_p.sum() + entropy.sum()).backward()
    assert log_p.shape == entropy.shape == (0,)
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() == 0


def test_softmax_runs_in_float32_whatever_the_head_computes_in():
    hidden, targets, head = inputs()
    low = head.to(torch.bfloat16)
    log_p, entropy = token_logprobs_and_entropy(hidden.to(torch.bfloat16), targets, low, 0.6)
    expected = torch.log_softmax(low(hidden.to(torch.bfloat16)).float() / 0.6, dim=1)
    assert log_p.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(log_p, expected[torch.arange(len(targets)), targets])

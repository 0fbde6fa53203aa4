"""Log-probs and entropy from hidden states: values and gradients against the plain head, whatever the tiles."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from rlvr_lightning import logprobs
from rlvr_lightning.logprobs import token_logprobs_and_entropy


def inputs(
    tokens: int = 23, hidden: int = 6, vocabulary: int = 11, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, targets, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    h, w, b = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((tokens, hidden), (vocabulary, hidden), (vocabulary,))
    )
    return h.requires_grad_(), torch.randint(vocabulary, (tokens,), generator=generator), w.requires_grad_(), b.requires_grad_()


def plain_head(h: Tensor, targets: Tensor, w: Tensor, b: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    logits = linear(h, w, b)
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def gradients(log_p: Tensor, entropy: Tensor, *of: Tensor) -> list[Tensor]:
    """Return the gradients of a loss that weighs every token of both differently."""
    weights = torch.linspace(-1, 1, len(log_p), dtype=log_p.dtype)
    return list(torch.autograd.grad(log_p @ weights + entropy @ weights.square(), of))


def set_tiles(monkeypatch: pytest.MonkeyPatch, tokens: int, vocabulary: int) -> None:
    monkeypatch.setitem(logprobs.TILE_TOKENS, "cpu", tokens)
    monkeypatch.setitem(logprobs.TILE_LOGITS, "cpu", tokens * vocabulary)


def test_one_token_by_hand_with_the_temperature_inside():
    # logits (1, 0, 0) / T = (2, 0, 0) at T = 0.5: log p = 2 - ln(e^2 + 2) = -0.23954 for token 0, -2.23954 for token 1
    hidden, targets = torch.tensor([[1.0, 0.0, 0.0]] * 2), torch.tensor([0, 1])
    log_p, entropy = token_logprobs_and_entropy(hidden, targets, torch.eye(3), None, 0.5)
    torch.testing.assert_close(log_p, torch.tensor([-0.23954, -2.23954]), atol=1e-5, rtol=0)
    # p = (0.78699, 0.10651, 0.10651): 0.78699 * 0.23954 + 2 * 0.10651 * 2.23954 = 0.66557
    torch.testing.assert_close(entropy, torch.full((2,), 0.66557), atol=1e-5, rtol=0)


def test_a_uniform_distribution_has_entropy_ln_v():
    log_p, entropy = token_logprobs_and_entropy(torch.zeros(1, 7), torch.tensor([3]), torch.eye(7), None, 0.6)
    torch.testing.assert_close(entropy, torch.tensor([math.log(7)]))
    torch.testing.assert_close(log_p, torch.tensor([-math.log(7)]))


@given(
    tokens=st.integers(0, 40),
    vocabulary=st.integers(1, 90),
    tile=st.tuples(st.integers(1, 17), st.integers(1, 31)),
    temperature=st.floats(0.3, 2.0),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_equal_the_plain_heads_in_float64(
    tokens: int, vocabulary: int, tile: tuple[int, int], temperature: float, biased: bool, dtype: torch.dtype, seed: int
):
    h, targets, w, b = inputs(tokens, 6, vocabulary, dtype, seed)
    of = (h, w, b) if biased else (h, w)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_tiles(monkeypatch, *tile)
        values = token_logprobs_and_entropy(h, targets, w, b if biased else None, temperature)
        results = [*values, *gradients(*values, *of)]
    of64 = [x.detach().double().requires_grad_() for x in of]
    values64 = plain_head(of64[0], targets, of64[1], of64[2] if biased else None, temperature)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for result, expected in zip(results, [*values64, *gradients(*values64, *of64)], strict=True):
        assert result.dtype == dtype
        scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
        torch.testing.assert_close(result.double(), expected, atol=tolerance * scale, rtol=tolerance)


def test_gradcheck_over_tiles(monkeypatch: pytest.MonkeyPatch):
    set_tiles(monkeypatch, 2, 4)
    h, targets, w, b = inputs(tokens=5, hidden=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs_and_entropy(h, targets, w, b, 0.6), (h, w, b))


@pytest.mark.parametrize("tile", [(1, 1), (5, 4), (22, 10), (23, 11), (100, 100)])
def test_the_tiles_change_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]):
    h, targets, w, b = inputs()
    whole = token_logprobs_and_entropy(h, targets, w, b, 0.6)
    whole_gradients = gradients(*whole, h, w, b)
    set_tiles(monkeypatch, *tile)
    tiled = token_logprobs_and_entropy(h, targets, w, b, 0.6)
    for result, expected in zip([*tiled, *gradients(*tiled, h, w, b)], [*whole, *whole_gradients], strict=True):
        torch.testing.assert_close(result, expected, atol=5e-6, rtol=1e-5)


def test_two_calls_give_the_same_bits():
    h, targets, w, b = inputs(tokens=300, vocabulary=5000)
    runs = []
    for _ in range(2):
        values = token_logprobs_and_entropy(h, targets, w, b, 0.6)
        runs.append([*values, *gradients(*values, h, w, b)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_the_gradient_of_one_result_alone(which: int):
    h, targets, w, b = inputs()
    result = torch.autograd.grad(token_logprobs_and_entropy(h, targets, w, b, 0.6)[which].sum(), (h, w, b))
    expected = torch.autograd.grad(plain_head(h, targets, w, b, 0.6)[which].sum(), (h, w, b))
    torch.testing.assert_close(result, expected, atol=5e-6, rtol=1e-5)


def test_a_frozen_weight_gets_no_gradient_and_hidden_the_same_one():
    h, targets, w, b = inputs()
    expected = gradients(*token_logprobs_and_entropy(h, targets, w, b, 0.6), h)
    log_p, entropy = token_logprobs_and_entropy(h, targets, w.detach(), b.detach(), 0.6)
    assert log_p.grad_fn is not None
    assert [edge is None for edge, _ in log_p.grad_fn.next_functions] == [False, True, True, True]  # targets, weight, bias
    torch.testing.assert_close(gradients(log_p, entropy, h), expected, atol=0, rtol=0)


def test_a_frozen_trunk_trains_the_weight_alone():
    h, targets, w, _ = inputs()
    expected = gradients(*token_logprobs_and_entropy(h, targets, w, None, 0.6), w)
    torch.testing.assert_close(
        gradients(*token_logprobs_and_entropy(h.detach(), targets, w, None, 0.6), w), expected, atol=0, rtol=0
    )


def test_a_weight_shared_with_the_embedding_gets_both_gradients():
    _, targets, w, _ = inputs()
    results = [
        gradients(*head(torch.tanh(w[targets]), targets, w, None, 0.6), w) for head in (token_logprobs_and_entropy, plain_head)
    ]
    torch.testing.assert_close(*results, atol=5e-6, rtol=1e-5)


def test_without_gradients_nothing_is_kept():
    h, targets, w, b = inputs()
    with torch.no_grad():
        log_p, entropy = token_logprobs_and_entropy(h, targets, w, b, 0.6)
    assert log_p.grad_fn is None
    assert entropy.grad_fn is None


def test_no_tokens_give_empty_results_that_still_carry_a_gradient():
    h, targets, w, _ = inputs(tokens=0)
    log_p, entropy = token_logprobs_and_entropy(h, targets, w, None, 0.6)
    assert log_p.shape == entropy.shape == (0,)
    (log_p.sum() + entropy.sum()).backward()
    assert w.grad is not None
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_extreme_logits_stay_finite():
    h, targets, w, _ = inputs(vocabulary=40)
    for size in (1e4, 1e8):
        values = token_logprobs_and_entropy(h, targets, w * size, None, 0.6)
        assert all(x.isfinite().all() for x in [*values, *gradients(*values, h, w)])
        assert values[0].max() <= 0
        assert values[1].min() >= 0


def test_a_target_outside_the_vocabulary_is_seen():
    h, _, w, _ = inputs(tokens=3)
    log_p, entropy = token_logprobs_and_entropy(h, torch.tensor([-100, 11, 10]), w, None, 0.6)
    assert log_p.isnan().tolist() == [True, True, False]
    assert entropy.isfinite().all()


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backward_inside", [True, False])
def test_under_autocast_it_is_at_least_as_exact_as_the_plain_head(monkeypatch: pytest.MonkeyPatch, backward_inside: bool):
    set_tiles(monkeypatch, 100, 300)
    h, targets, w, b = inputs(tokens=250, hidden=64, vocabulary=1001)
    exact = [x.detach().double().requires_grad_() for x in (h, w, b)]
    exact_values = plain_head(exact[0], targets, exact[1], exact[2], 2.0)
    expected = [*exact_values, *gradients(*exact_values, *exact)]
    errors = []
    for head in (token_logprobs_and_entropy, plain_head):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = head(h, targets, w, b, 2.0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_inside):
            results = [*values, *gradients(*values, h, w, b)]
        assert all(x.dtype == torch.float32 for x in results)
        errors.append([relative_error(x, e) for x, e in zip(results, expected, strict=True)])
    for ours, plain in zip(*errors, strict=True):
        assert 1e-5 < ours < 1.1 * plain  # the products did run in bfloat16


def test_a_forward_outside_autocast_stays_exact_when_the_backward_runs_inside():
    h, targets, w, b = inputs()
    expected = gradients(*token_logprobs_and_entropy(h, targets, w, b, 0.6), h, w, b)
    values = token_logprobs_and_entropy(h, targets, w, b, 0.6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = torch.linspace(-1, 1, len(h))
        loss = (values[0] * weights).sum() + (values[1] * weights.square()).sum()
        torch.testing.assert_close(list(torch.autograd.grad(loss, (h, w, b))), expected, atol=5e-6, rtol=1e-5)


def test_bfloat16_inputs_give_float32_results_and_bfloat16_gradients(monkeypatch: pytest.MonkeyPatch):
    set_tiles(monkeypatch, 7, 5)
    h, targets, w, b = inputs(dtype=torch.bfloat16)
    values = token_logprobs_and_entropy(h, targets, w, b, 0.6)
    expected = plain_head(h.double(), targets, w.double(), b.double(), 0.6)
    for result, exact in zip(values, expected, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), exact, atol=0.1, rtol=0.02)
    for result, exact in zip(gradients(*values, h, w, b), gradients(*expected, h, w, b), strict=True):
        assert result.dtype == torch.bfloat16
        assert relative_error(result, exact.double()) < 0.02


PEAK = """
import sys, torch
from torch.nn.functional import linear
from rlvr_lightning.logprobs import token_logprobs_and_entropy
peak = lambda: next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
h, w = torch.randn(2048, 16, requires_grad=True), torch.randn(32768, 16, requires_grad=True)
t = torch.randint(32768, (2048,))
sum(x.sum() for x in token_logprobs_and_entropy(h[:8], t[:8], w, None, 0.6)).backward()  # loads what the first call loads
before = peak()
if sys.argv[1] == "tiled":
    log_p, entropy = token_logprobs_and_entropy(h, t, w, None, 0.6)
else:
    all_log_p = torch.log_softmax(linear(h, w) / 0.6, dim=1)
    log_p, entropy = all_log_p.gather(1, t[:, None]), -(all_log_p.exp() * all_log_p).sum(1)
(log_p.sum() + entropy.sum()).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_stays_far_below_one_copy_of_the_logits():
    logits = 2048 * 32768 * 4  # 268 MB
    tiled, plain = (
        int(subprocess.run([sys.executable, "-c", PEAK, kind], check=True, capture_output=True, text=True).stdout)
        for kind in ("tiled", "plain")
    )
    assert plain > 3 * logits
    assert tiled < 0.25 * logits

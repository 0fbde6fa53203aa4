"""How sure an accuracy is, and a difference of two: bootstrap intervals and a permutation test, in numpy.

Legend: ``P`` problems, ``k`` samples of a problem, ``c`` correct ones among them. The accuracy is the mean over problems
of c / k. Every function is deterministic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np
from numpy.typing import NDArray

from rlvr_lightning.errors import ConfigError

RESAMPLES = 10_000
LEVEL = 0.95
_MAX_EXACT_OPERATIONS = 100_000_000  # below a second

Correct = Sequence[Sequence[bool]] | NDArray[np.bool_]
"""[P][k] verdicts; k may differ between problems."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How much more accurate b is than a, on the same problems."""

    difference: float
    """Accuracy of b minus accuracy of a."""
    low: float
    """Lower end of the bootstrap interval of the difference."""
    high: float
    """Upper end."""
    p_value: float
    """Two-sided: the chance of a difference at least so large if a and b were interchangeable on every problem."""


def accuracy(correct: Correct) -> float:
    """Return the mean over problems of c / k.

    Raises:
        ConfigError: There is no problem, or one without samples.
    """
    k, c = _counts(correct).T
    return float((c / k).mean())


def bootstrap_interval(correct: Correct, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the accuracy, of 10,000 resamples.

    A resample draws P problems with replacement and, for each, its k samples with replacement. With k = 1 that is the
    usual bootstrap over problems; with k > 1 the interval is slightly too wide, as the noise of sampling enters twice. With
    few problems it is too narrow, and when all verdicts are equal it has no width.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; two-stage resampling as in Davison
    and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.

    Raises:
        ConfigError: There is no problem, or one without samples.
    """
    return _interval(*_resampled_accuracies(_counts(correct), seed=seed))


def mean_interval(terms: Sequence[Sequence[float]], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean over all terms, resampled as in `bootstrap_interval`.

    Args:
        terms: [P] lists of the numbers that each problem contributes; a list may be empty, as that of a problem without an
            answer is where only answers count.
        seed: of the resampling.

    Returns:
        Lower and upper end; of 10,000 resamples, or of as many as 8 million drawn terms allow, but at least 1,000.

    Raises:
        ConfigError: There is no problem.
    """
    lengths = np.array([len(row) for row in terms], dtype=np.int64)
    if len(lengths) == 0:
        raise ConfigError("statistics need at least one problem")
    width = max(int(lengths.max()), 1)
    table = np.zeros((len(terms), width))
    for row, values in zip(table, terms, strict=True):
        row[: len(values)] = values
    generator = np.random.default_rng(seed)
    resamples = int(np.clip(8_000_000 // table.size, 1000, RESAMPLES))
    chunk = max(1, 1_000_000 // table.size)
    means = [_resampled_means(table, lengths, min(chunk, resamples - done), generator) for done in range(0, resamples, chunk)]
    return _interval(np.concatenate(means))


def _resampled_means(
    table: NDArray[np.float64], lengths: NDArray[np.int64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return [resamples] means of problems, and of their terms, drawn with replacement."""
    problems = generator.integers(len(table), size=(resamples, len(table)))
    counts = lengths[problems]
    if table.shape[1] == 1:
        return (table[problems, 0] * counts).sum(1) / counts.sum(1).clip(min=1)
    picks = (generator.random((*problems.shape, table.shape[1])) * counts[..., None]).astype(np.int64)
    drawn = table[problems[..., None], picks] * (np.arange(table.shape[1]) < counts[..., None])
    return drawn.sum((1, 2)) / counts.sum(1).clip(min=1)


def paired_difference(a: Correct, b: Correct, *, seed: int = 0) -> PairedDifference:
    """Return accuracy(b) - accuracy(a) with its 95 % interval and p-value; row i of both is the same problem.

    The interval is that of `bootstrap_interval`, with the same resampled problems for a and b. The p-value is that of the
    paired permutation test: with d_i the difference of a and b on problem i and s_i = +1 or -1 at random,

        p = P(|sum_i s_i |d_i|| >= |sum_i d_i|).

    It is exact: the d_i are multiples of one fraction, so the distribution of the sum is a convolution over integers. With
    one sample per problem it is McNemar's exact (binomial) test. Only where problems have so many different numbers of
    samples that this would take long, it is estimated from 10,000 draws, observation included.

    Source: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses (2005); for the estimate, Phipson and Smyth,
    arXiv 1603.05766.

    Raises:
        ConfigError: a and b differ in the number of problems, there is none, or one has no samples.
    """
    counts_a, counts_b = _counts(a), _counts(b)
    if len(counts_a) != len(counts_b):
        raise ConfigError(f"{len(counts_a)} problems against {len(counts_b)}: a paired comparison needs the same problems")
    means_a, means_b = _resampled_accuracies(counts_a, counts_b, seed=seed)
    low, high = _interval(means_b - means_a)
    return PairedDifference(accuracy(b) - accuracy(a), low, high, _sign_flip_p_value(counts_a, counts_b, seed))


def _counts(correct: Correct) -> NDArray[np.int64]:
    """Return [P, 2]: k and c of every problem."""
    counts = np.array([(len(row), np.count_nonzero(row)) for row in correct], dtype=np.int64).reshape(-1, 2)
    if len(counts) == 0 or not counts[:, 0].all():
        raise ConfigError("statistics need at least one problem, and at least one sample of each")
    return counts


def _resampled_accuracies(*sides: NDArray[np.int64], seed: int) -> list[NDArray[np.float64]]:
    """Return [RESAMPLES] accuracies for every side, all on the same resampled problems.

    Problems with the same k and c are interchangeable, so a resample needs only how many of each kind it drew, which is
    multinomial. The correct ones among m * k samples drawn from m problems of a kind are binomial.
    """
    rng = np.random.default_rng(seed)
    num_problems = len(sides[0])
    kinds, sizes = np.unique(np.hstack(sides), axis=0, return_counts=True)
    drawn = rng.multinomial(num_problems, sizes / num_problems, size=RESAMPLES)  # [RESAMPLES, kinds]
    columns = kinds.T.reshape(len(sides), 2, -1)  # [sides, (k, c), kinds]
    return [(rng.binomial(drawn * k, c / k) / k).sum(axis=1) / num_problems for k, c in columns]


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _sign_flip_p_value(a: NDArray[np.int64], b: NDArray[np.int64], seed: int) -> float:
    unit = lcm(*np.unique(np.hstack([a[:, 0], b[:, 0]])).tolist())  # in Python integers, as this may be huge
    steps = [unit // kb * cb - unit // ka * ca for (ka, ca), (kb, cb) in zip(a.tolist(), b.tolist(), strict=True)]
    observed, sizes = abs(sum(steps)), [abs(step) for step in steps if step]
    total = sum(sizes)
    if total * len(sizes) > _MAX_EXACT_OPERATIONS:
        return _estimated_p_value(np.array([size / unit for size in sizes]), observed / unit, seed)
    # chances[t] that the differences with a plus add up to t; the signed sum is then 2 t - total.
    chances = np.zeros(total + 1)
    chances[0] = 1
    for size in sizes:
        chances[size:] = (chances[size:] + chances[:-size]) / 2
        chances[:size] /= 2
    sums = 2 * np.arange(total + 1) - total
    return min(1.0, float(chances[np.abs(sums) >= observed].sum()))


def _estimated_p_value(sizes: NDArray[np.float64], observed: float, seed: int) -> float:
    rng = np.random.default_rng(seed)
    values, problems = np.unique(sizes, return_counts=True)
    sums = (2 * rng.binomial(problems, 0.5, size=(RESAMPLES, len(values))) - problems) @ values
    return float((1 + np.count_nonzero(np.abs(sums) >= observed - 1e-9)) / (1 + RESAMPLES))

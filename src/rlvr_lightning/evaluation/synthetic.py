"""Problems made from a seed: no model can have seen the answers in its training data."""

import operator
from typing import TYPE_CHECKING

import numpy as np

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.records import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATIONS: "dict[str, tuple[str, Callable[[int, int], int]]]" = {
    "addition": ("+", operator.add),
    "subtraction": ("-", operator.sub),
    "multiplication": ("*", operator.mul),
}


def generate(recipe: str, count: int, seed: int) -> list[Problem]:
    """Return ``count`` problems, a pure function of the arguments (fewer if no more different ones exist).

    Args:
        recipe: ``arithmetic:OPERATION:DIGITS``, or ``reasoning_gym:TASK``.
        count: how many.
        seed: decides which.

    Raises:
        ConfigError: for an unknown recipe, or a task whose library is missing.
    """
    kind, _, rest = recipe.partition(":")
    if kind == "arithmetic":
        operation, _, digits = rest.partition(":")
        if operation in OPERATIONS and digits.isdigit() and 1 <= int(digits) <= 9:
            return arithmetic(operation, int(digits), count, seed)
    elif kind == "reasoning_gym":
        return reasoning_gym(rest, count, seed)
    raise ConfigError(
        f"generator {recipe!r} is unknown: write arithmetic:OPERATION:DIGITS with an operation of {', '.join(OPERATIONS)} and "
        "1 to 9 digits, or reasoning_gym:TASK"
    )


def arithmetic(operation: str, digits: int, count: int, seed: int) -> list[Problem]:
    """Return different problems on two numbers of exactly ``digits`` digits; differences are never negative."""
    sign, compute = OPERATIONS[operation]
    low, high = 10 ** (digits - 1), 10**digits
    width = high - low
    rng = np.random.default_rng((seed, digits, sorted(OPERATIONS).index(operation)))
    pairs: dict[tuple[int, int], None] = {}  # insertion order is the set's order
    if width <= 90:  # few enough to list: a draw without repetition
        drawn = [(low + int(i) // width, low + int(i) % width) for i in rng.permutation(width * width)]
    else:
        drawn = [(int(a), int(b)) for a, b in rng.integers(low, high, size=(2 * count + 16, 2))]
    for a, b in drawn:
        pairs[(max(a, b), min(a, b)) if operation == "subtraction" else (a, b)] = None
    return [
        Problem(
            id=f"{a}{sign}{b}",
            question=f"What is {a} {sign} {b}?",
            answer=str(compute(a, b)),
            source=f"arithmetic:{operation}:{digits}",
        )
        for a, b in list(pairs)[:count]
    ]


def reasoning_gym(task: str, count: int, seed: int) -> list[Problem]:
    """Return problems of a task of the library reasoning-gym (open-thought/reasoning-gym), which is optional.

    Answers are compared by the set's grader and not by the task's own scorer: choose tasks with one written form.
    """
    try:
        import reasoning_gym as library  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"generator reasoning_gym:{task} needs reasoning-gym: pip install reasoning-gym") from error
    try:
        rows = library.create_dataset(task, size=count, seed=seed)
    except ValueError as error:
        raise ConfigError(f"generator reasoning_gym:{task} is no task of the installed reasoning-gym: {error}") from error
    return [
        Problem(id=str(i), question=str(row["question"]), answer=str(row["answer"]), source=f"reasoning_gym:{task}")
        for i, row in enumerate(rows)
    ]

"""A grader of a user's own that never ends: found by its dotted path, stopped by the clock."""


def extract(response: str) -> str | None:
    return response or None


def compare(ground_truth: str, extracted: str) -> str:
    while extracted == "loop":
        pass
    return "correct" if extracted == ground_truth[::-1] else "wrong"

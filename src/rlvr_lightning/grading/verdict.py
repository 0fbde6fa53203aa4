"""What a comparison can say."""

from typing import Literal

Verdict = Literal["correct", "wrong", "unparsable", "error"]
"""``unparsable``: the answer cannot be read. ``error``: the ground truth cannot."""

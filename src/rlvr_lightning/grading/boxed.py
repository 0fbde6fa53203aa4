r"""Where the answer stands in a response: one linear scan for the last closed ``\boxed{...}``."""

import re

_BOXED = re.compile(r"\\boxed\s*")
_TOKEN = re.compile(
    r"(?P<open>\\boxed\s*\{)"
    r"|\\boxed\s*(?P<bare>[-+\u2212]?\.?\d[^\s{}$\\]*|(?<=\s)[A-Z]\b)"  # \boxed 5; not prose such as "\boxed and"
    r"|\\.|(?P<brace>[{}])",  # an escaped brace, or a backslash before a brace's own, is no brace
    re.DOTALL,
)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed ``\boxed{...}``, or None if there is none or it is empty.

    With ``</think>`` in the text only what follows the last one counts. A box around one other box means the inner one;
    a box around several means their list. Time is linear in the length of the text.

    >>> last_boxed(r"so \boxed{12.8}, that is \boxed{\boxed{\frac{64}{5}} mph}")
    '\\frac{64}{5}'
    """
    text = text.rpartition("</think>")[2]
    braces: list[tuple[int, int] | None] = []  # open braces; for a box (start, number of boxes closed before it)
    boxes: list[tuple[int, int, int]] = []  # closed boxes: (start, end, index of the first box inside)
    for token in _TOKEN.finditer(text):
        if token["open"]:
            braces.append((token.end(), len(boxes)))
        elif token["bare"]:
            boxes.append((*token.span("bare"), len(boxes)))
        elif token["brace"] == "{":
            braces.append(None)
        elif token["brace"] and braces and (box := braces.pop()):
            boxes.append((box[0], token.start(), box[1]))
    if not boxes:
        return None
    index = len(boxes) - 1
    while (first := boxes[index][2]) < index and boxes[index - 1][2] == first:  # exactly one box directly inside
        index -= 1
    start, end, first = boxes[index]
    content = text[start:end] if first == index else _BOXED.sub("", text[start:end])
    bare = text[start - 1] != "{"
    return (content.rstrip(".,;:!?") if bare else content).strip() or None

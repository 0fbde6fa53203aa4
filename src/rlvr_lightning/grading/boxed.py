r"""Where the answer stands in a response: one linear scan for the last closed ``\boxed{...}``."""

import re

_MAX_NESTED = 8
_BOXED = re.compile(r"\\boxed\s*")
_TOKEN = re.compile(
    r"(?P<open>\\boxed\s*\{)"
    r"|\\boxed\s*(?P<bare>[-+\u2212]?\.?\d(?:[^\s{}$\\]|\\circ)*|(?<=\s)[A-Z]\b)"  # \boxed 5; not prose such as "\boxed and"
    r"|\\.|(?P<brace>[{}])",  # an escaped brace, or a backslash before a brace's own, is no brace
    re.DOTALL,
)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed ``\boxed{...}``, or None if there is none or it is empty.

    With ``</think>`` in the text only what follows the last one counts. Boxes inside the last one
    are read as what is in them. Time is linear in the length of the text.

    >>> last_boxed(r"so \boxed{12.8}, that is \boxed{\boxed{\frac{64}{5}} mph}")
    '{\\frac{64}{5}} mph'
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
    start, end, first = boxes[-1]
    content = text[start:end]
    if first < len(boxes) - 1:  # boxes inside
        content = _BOXED.sub("", content).strip()
        for _ in range(_MAX_NESTED):
            if content[:1] != "{" or _closes(content) != len(content) - 1:
                break
            content = content[1:-1].strip()  # a box in a box, and nothing else
        content = content if content.strip("{} \n") else ""
    bare = text[start - 1] != "{"
    return (content.rstrip(".,;:!?") if bare else content).strip() or None


def _closes(text: str) -> int:
    """Return the index of the brace that closes the first one."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return token.start()
    return -1

r"""A small grammar of school and contest mathematics: tokens in, an immutable tree out. Nothing is evaluated here.

Precedence, loosest first: sums; products, quotients and juxtaposition (left to right); sign; power; factorial.
"""

from fractions import Fraction

from rlvr_lightning.grading.math.tokens import FUNCTIONS, Token, Unparsable
from rlvr_lightning.grading.math.tree import Expr, num, uses

_MAX_DEPTH = 40
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_GREEK = frozenset(
    (
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi "
        "psi omega Pi Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell hbar"
    ).split()
)
_FUNCTION_NAMES = frozenset(["f", "g", "F", "G", "\\phi", "\\varphi", "\\sigma", "\\tau"])
"""Letters that stand for a function in front of a bracket, and not for a factor."""
_TIMES = ("cdot", "times", "*")
_CLOSERS = {"(": ")", "[": "]", "{": "}", "lbrace": "rbrace"}


def parse(tokens: tuple[Token, ...]) -> Expr:
    """Return the tree of a whole expression.

    Raises:
        Unparsable: if the tokens are anything else.
    """
    parser = _Parser(tokens)
    tree = parser.infix()
    if parser.peek() is not None:
        raise Unparsable(f"unexpected {parser.peek()}")
    return tree


class _Parser:
    """Recursive descent over a token tuple."""

    def __init__(self, tokens: tuple[Token, ...]) -> None:
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def peek(self, ahead: int = 0) -> Token | None:
        index = self.at + ahead
        return self.tokens[index] if index < len(self.tokens) else None

    def sees(self, *texts: str) -> bool:
        token = self.peek()
        return token is not None and token.is_(*texts)

    def take(self, *texts: str) -> Token:
        token = self.peek()
        if token is None or (texts and not token.is_(*texts)):
            raise Unparsable(f"expected {' or '.join(texts) or 'more'}")
        self.at += 1
        return token

    def sum(self) -> Expr:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unparsable("nested too deeply")
        terms = [self.signed_product()]
        while self.sees("+", "-", "pm", "mp"):
            terms.append(self.signed_product())
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Expr("add", tuple(terms))

    def infix(self) -> Expr:
        r"""Read a sum, or what ``\over`` or ``\choose`` cuts in two."""
        inner = self.sum()
        for infix, op in (("over", "div"), ("choose", "binom")):
            if self.sees(infix):
                self.take()
                inner = Expr(op, (inner, self.sum()))
        return inner

    def group(self, closer: str) -> Expr:
        """Read up to a closing bracket."""
        inner = self.infix()
        self.take(closer)
        return inner

    def signed_product(self) -> Expr:
        """A sign covers the whole product: the value is the same, and -1 1/3 comes out as -(1 + 1/3)."""
        if self.sees("+"):
            self.take()
            return self.signed_product()
        for sign, op in (("-", "neg"), ("pm", "pm"), ("mp", "mp")):
            if self.sees(sign):
                self.take()
                return Expr(op, (self.signed_product(),))
        return self.product()

    def product(self) -> Expr:
        result = self.power()
        while (token := self.peek()) is not None:
            if token.is_(*_TIMES):
                self.take()
                result = Expr("mul", (result, self.signed_power()))
            elif token.is_("/"):
                self.take()
                result = Expr("div", (result, self.signed_power()))
            elif self.starts_factor(token):
                if token.kind == "num" and self.tokens[self.at - 1].kind == "num":
                    raise Unparsable("two numbers side by side")
                after = self.peek(1)
                if token.is_("{") and self.tokens[self.at - 1].kind == "num" and after and after.kind == "num":
                    raise Unparsable("two numbers side by side")
                result = Expr("mul", (result, self.power()))
            else:
                break
        return result

    def signed_power(self) -> Expr:
        if self.sees("-", "+"):
            negative = self.take().text == "-"
            inner = self.signed_power()
            return Expr("neg", (inner,)) if negative else inner
        return self.power()

    def starts_factor(self, token: Token) -> bool:
        if token.kind in ("num", "sym", "word"):
            return True
        if token.kind == "cmd":
            return token.text in _GREEK | FUNCTIONS or token.text in (
                "frac", "pi", "infty", "binom", "lfloor", "lceil", "overline", "overrightarrow", "vec", "hat", "bar", "angle",
                "triangle", "dot", "ddot", "tilde",
            )  # fmt: skip
        if token.is_("|"):
            return not self.bars
        return token.is_("(", "[", "{")

    def power(self) -> Expr:
        base = self.postfix()
        while self.sees("^"):
            after = self.peek(1)
            degree = after is not None and (
                after.is_("circ") or (after.is_("{") and (t := self.peek(2)) is not None and t.is_("circ"))
            )
            if degree:
                self.take("^")
                self.group_or_atom_of_degree()
                base = Expr("deg", (base,))
                continue
            self.take("^")
            return Expr("pow", (base, self.exponent()))
        return base

    def group_or_atom_of_degree(self) -> None:
        if self.sees("{"):
            self.take("{")
            self.take("circ")
            self.take("}")
        else:
            self.take("circ")

    def exponent(self) -> Expr:
        if self.sees("{"):
            self.take("{")
            inner = self.group("}")
            while self.sees("^"):  # {2}^{3}: a tower grows to the right
                self.take("^")
                inner = Expr("pow", (inner, self.exponent()))
            return inner
        if self.sees("-", "+"):
            return self.signed_power()
        atom = self.postfix()
        if self.sees("^"):
            self.take("^")
            return Expr("pow", (atom, self.exponent()))
        return atom

    def postfix(self) -> Expr:
        result = self.atom()
        while self.sees("!"):
            self.take()
            if self.sees("!"):
                raise Unparsable("double factorial")
            result = Expr("fact", (result,))
        return result

    def atom(self) -> Expr:
        token = self.take()
        if token.kind == "num":
            assert token.value is not None
            return self.mixed(token)
        if token.kind == "sym":
            return self.symbol(token.text)
        if token.kind == "word":
            return self.word(token)
        if token.kind in ("cmd", "punc"):
            if token.text in _CLOSERS and token.text != "lbrace":
                return self.group(_CLOSERS[token.text])
            if token.text == "|":
                self.bars += 1
                inner = self.sum()
                self.bars -= 1
                self.take("|")
                return Expr("abs", (inner,))
            if token.kind == "cmd":
                return self.command(token.text)
        raise Unparsable(f"unexpected {token.text}")

    def mixed(self, token: Token) -> Expr:
        r"""Read ``1\frac{1}{3}`` and ``1 1/3`` as sums, where the fraction is a proper one."""
        assert token.value is not None
        whole = num(token.value)
        if not token.text.isdigit():
            return whole
        start = self.at
        after, slash, below = self.peek(), self.peek(1), self.peek(2)
        if after is not None and after.is_("frac"):
            try:
                fraction = self.power_free_fraction()
            except Unparsable:
                fraction = None
            if fraction is not None:
                return Expr("add", (whole, fraction))
            self.at = start
        elif after and after.kind == "num" and after.spaced and slash and slash.is_("/") and below and below.kind == "num":
            self.at += 3
            if after.text.isdigit() and below.text.isdigit() and int(after.text) < int(below.text):
                return Expr("add", (whole, Expr("div", (num(int(after.text)), num(int(below.text))))))
            raise Unparsable("two numbers side by side")
        return whole

    def power_free_fraction(self) -> Expr | None:
        self.take("frac")
        top, bottom = self.argument(), self.argument()
        plain = all(e.op == "num" and e.args[0].denominator == 1 for e in (top, bottom))
        if not plain or not top.args[0] < bottom.args[0] or self.sees("^", "!"):
            return None
        return Expr("div", (top, bottom))

    def symbol(self, name: str) -> Expr:
        if self.sees("_"):
            self.take("_")
            name += "_" + self.raw_group()
        while self.sees("'"):
            self.take()
            name += "'"
        value = self.peek(1)
        closing = self.peek(2)
        if self.sees("(") and value and value.kind == "num" and closing and closing.is_(")"):
            self.at += 3  # I(0) is a value of I, not a product
            name += f"({value.text})"
        if self.sees("(") and name.rstrip("'") in _FUNCTION_NAMES:
            self.take("(")
            arguments = [self.sum()]
            while self.sees(","):
                self.take(",")
                arguments.append(self.sum())
            self.take(")")
            return Expr("call", (name, *arguments))
        constants = {"e": Expr("e"), "i": Expr("i")}
        return constants.get(name) or Expr("sym", (name,))

    def word(self, token: Token) -> Expr:
        """Up to three letters side by side are a product; a longer run is one name."""
        if len(token.text) > 3:
            return self.symbol(token.text)
        factors = [self.symbol(c) for c in token.text[:-1]]
        last: Expr = self.symbol(token.text[-1])
        if self.sees("^"):
            self.take("^")
            last = Expr("pow", (last, self.exponent()))
        for factor in reversed(factors):
            last = Expr("mul", (factor, last))
        return last

    def raw_group(self) -> str:
        """Return the spelling of a subscript."""
        if not self.sees("{"):
            return self.take().text
        self.take("{")
        parts, depth = [], 1
        while depth:
            token = self.take()
            depth += token.is_("{") - token.is_("}")
            parts.append(token.text)
        return "".join(parts[:-1])

    def argument(self) -> Expr:
        r"""Read one argument of a command: a group, a single digit of a number (``\frac12``), or one atom."""
        token = self.peek()
        if token is None:
            raise Unparsable("an argument is missing")
        if token.is_("{"):
            self.take("{")
            return self.group("}")
        if token.kind == "num" and token.text.isdigit() and len(token.text) > 1:
            rest = Token("num", token.text[1:], Fraction(int(token.text[1:])))
            self.tokens = (*self.tokens[: self.at], rest, *self.tokens[self.at + 1 :])
            return num(int(token.text[0]))
        if token.kind == "word" and len(token.text) > 1:
            rest = Token("word" if len(token.text) > 2 else "sym", token.text[1:])
            self.tokens = (*self.tokens[: self.at], rest, *self.tokens[self.at + 1 :])
            return Expr("sym", (token.text[0],))
        if token.kind == "num":
            self.take()
            assert token.value is not None
            return num(token.value)
        return self.postfix()

    def command(self, name: str) -> Expr:
        if name == "pi":
            return Expr("pi")
        if name == "infty":
            return Expr("inf")
        if name in _GREEK:
            return self.symbol("\\" + name)
        if name == "frac":
            return Expr("div", (self.argument(), self.argument()))
        if name == "binom":
            return Expr("binom", (self.argument(), self.argument()))
        if name in ("sqrt", "cbrt"):
            index = num(3 if name == "cbrt" else 2)
            if self.sees("["):
                self.take("[")
                index = self.sum()
                self.take("]")
            return Expr("root", (self.argument(), index))
        if name in ("lfloor", "lceil"):
            inner = self.sum()
            self.take("rfloor" if name == "lfloor" else "rceil")
            return Expr("floor" if name == "lfloor" else "ceil", (inner,))
        if name in ("overline", "overrightarrow", "vec", "hat", "bar", "angle", "triangle", "dot", "ddot", "tilde"):
            return Expr("sym", (f"\\{name} {self.raw_group()}",))
        if name in FUNCTIONS:
            return self.function(_ALIASES.get(name, name))
        raise Unparsable(f"no such command: {name}")

    def function(self, name: str) -> Expr:
        base: Expr | None = None
        exponent: Expr | None = None
        for _ in range(2):
            if self.sees("_") and name == "log":
                self.take("_")
                base = self.argument()
            elif self.sees("^"):
                self.take("^")
                exponent = self.exponent()
        inner = self.function_argument(angle=name not in ("ln", "log", "lg", "exp"))
        if exponent == Expr("neg", (num(1),)) and not name.startswith("arc"):
            name, exponent = "arc" + name, None
        if name == "lg":
            name, base = "log", num(10)
        result = Expr("div", (Expr("ln", (inner,)), Expr("ln", (base,)))) if base is not None else Expr(name, (inner,))
        if exponent is None and self.sees("^"):  # f(x)^2 is the square of the value
            self.take("^")
            exponent = self.exponent()
        return result if exponent is None else Expr("pow", (result, exponent))

    def function_argument(self, *, angle: bool) -> Expr:
        r"""Read what follows a function: a bracketed argument alone, else factors up to the next sign or function.

        A quotient ends the argument, except that of an angle: ``\sin \pi/6``.
        """
        if self.sees("(", "{", "[", "|"):
            return self.postfix()
        result = self.power() if not self.sees("-") else self.signed_power()
        while (token := self.peek()) is not None:
            if token.is_("/") and angle and uses(result, "pi"):
                self.take()
                result = Expr("div", (result, self.power()))
            elif self.starts_factor(token) and token.text not in FUNCTIONS - {"sqrt"} and not token.is_("(", "["):
                result = Expr("mul", (result, self.power()))
            else:
                break
        return result

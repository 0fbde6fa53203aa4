"""From a problem to the exact token ids that engine and learner both see: one tokenization, no drift."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.jsonl import read_jsonl
from rlvr_lightning.records import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."
"""What the paper appends to every training question (arXiv 2504.20571, appendix; ypwang61/One-Shot-RLVR data files)."""

PAPER_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
"""The paper's evaluation prompt for Qwen: this system message, the bare question, no suffix (arXiv 2504.20571, appendix)."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How a problem becomes a prompt."""

    suffix: str = ""
    """Appended to the question. The paper trains with " Let's think step by step and output the final answer within
    \\boxed{}." and evaluates without it (arXiv 2504.20571, appendix; ypwang61/One-Shot-RLVR data files)."""
    system: str | None = None
    """System message; None leaves it to the model's own chat template."""
    examples: Sequence[tuple[str, str]] = ()
    """In-context (question, answer) pairs, shown before the question."""
    examples_file: str | None = None
    """More of them from a jsonl file with ``question`` and ``response`` per row, such as ``evaluation/<set>.jsonl`` of an
    earlier ``rlvr test``: solutions that a model wrote. Rows whose ``correct`` is false are passed over."""
    num_examples: int | None = None
    """How many to show, the first ones; None shows all."""
    examples_as: Literal["turns", "text"] = "turns"
    """``turns``: earlier turns of the conversation. ``text``: everything inside the one user turn, question, newline,
    answer and an empty line each, as the paper's in-context baselines have it (arXiv 2504.20571, appendix)."""
    chat: bool = True
    """Use the tokenizer's chat template. False: plain text, examples and question separated by empty lines."""
    plain: str = "{question}\n"
    """Without a chat template: what stands around a question; an example's answer follows it."""

    def __post_init__(self) -> None:
        if self.plain.count("{question}") != 1:
            raise ConfigError(f"prompt.plain is {self.plain!r}: write {{question}} in it once, where the question goes")
        if self.num_examples is not None and self.num_examples < 0:
            raise ConfigError(f"prompt.num_examples is {self.num_examples}: set it to 0 or more, or to null for all")

    @cached_property
    def shots(self) -> tuple[tuple[str, str], ...]:
        """The examples that are shown, those of the file included.

        Raises:
            ConfigError: if the file does not hold as many as asked for.
        """
        shots = [(question, answer) for question, answer in self.examples]
        if self.examples_file is not None:
            shots += _solutions(self.examples_file)
        if self.num_examples is not None and len(shots) < self.num_examples:
            raise ConfigError(
                f"prompt.num_examples is {self.num_examples} but there are {len(shots)}: lower it, or give more in "
                "prompt.examples or prompt.examples_file"
            )
        return tuple(shots[: self.num_examples])

    def text(self, problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Return the prompt as text, special tokens of the chat template included.

        Raises:
            ConfigError: if ``chat`` is asked for and the tokenizer has no chat template.
        """
        question = problem.question + self.suffix
        shots = [(shown + self.suffix, answer) for shown, answer in self.shots]
        if not self.chat:
            parts = [self.plain.replace("{question}", shown) + answer for shown, answer in [*shots, (question, "")]]
            return "\n\n".join([*([self.system] if self.system else []), *parts])
        if not tokenizer.chat_template:
            raise ConfigError("this model's tokenizer has no chat template: set rollout.prompt.chat to false")
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        if self.examples_as == "text":
            question = "\n\n".join([*(f"{shown}\n{answer}" for shown, answer in shots), question])
        else:
            for shown, answer in shots:
                messages += [{"role": "user", "content": shown}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": question})
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def __call__(self, problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
        """Return the prompt's token ids: those of :meth:`text`, to which a plain prompt adds the tokenizer's own."""
        return tuple(tokenizer(self.text(problem, tokenizer), add_special_tokens=not self.chat).input_ids)


def _solutions(file: str) -> list[tuple[str, str]]:
    """Return (question, response) of the rows that are not marked as wrong."""
    try:
        rows = list(read_jsonl(file))
        shots = [(row["question"], row["response"]) for row in rows if row.get("correct", True)]
    except (ValueError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompt.examples_file {file!r} cannot be used ({error!r}): every row needs question and response"
        ) from error
    if not shots:
        raise ConfigError(f"prompt.examples_file {file!r} holds no solution: give a jsonl file with question and response")
    return shots

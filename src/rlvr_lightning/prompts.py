"""From a problem to the exact token ids that engine and learner both see: one tokenization, no drift."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.records import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How a problem becomes a prompt."""

    suffix: str = ""
    """Appended to the question. The paper trains with " Let's think step by step and output the final answer within
    \\boxed{}." and evaluates without it (arXiv 2504.20571, appendix; ypwang61/One-Shot-RLVR data files)."""
    system: str | None = None
    """System message; None leaves it to the model's own chat template."""
    examples: Sequence[tuple[str, str]] = ()
    """In-context (question, answer) pairs, shown before the question as earlier turns of the conversation."""
    chat: bool = True
    """Use the tokenizer's chat template. False: plain text, examples and question separated by blank lines."""

    def __call__(self, problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
        """Return the prompt's token ids, special tokens of the chat template included.

        Raises:
            ConfigError: if ``chat`` is asked for and the tokenizer has no chat template.
        """
        if not self.chat:
            shots = [f"{question}{self.suffix}\n{answer}" for question, answer in self.examples]
            parts = [*([self.system] if self.system else []), *shots, f"{problem.question}{self.suffix}\n"]
            return tuple(tokenizer("\n\n".join(parts)).input_ids)
        if not tokenizer.chat_template:
            raise ConfigError("this model's tokenizer has no chat template: set rollout.prompt.chat to false")
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for question, answer in self.examples:
            messages += [{"role": "user", "content": question + self.suffix}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": problem.question + self.suffix})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tuple(tokenizer(str(text), add_special_tokens=False).input_ids)

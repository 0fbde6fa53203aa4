"""A prompt is exactly the text that one would write by hand, tokenized once."""

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlvr_lightning.errors import ConfigError
from rlvr_lightning.prompts import PAPER_SUFFIX, PromptTemplate
from rlvr_lightning.records import Problem

PROBLEM = Problem("p", "What is 3 + 4?", "7")
EXAMPLES = [("What is 2 + 2?", "\\boxed{4}"), ("What is 1 + 1?", "\\boxed{2}")]


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose chat template writes ``role:content`` lines and then ``a:``."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    return tokenizer


def text(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(template(PROBLEM, tokenizer)))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PromptTemplate(), "user:What is 3 + 4?\na:"),
        (PromptTemplate(suffix=" Think."), "user:What is 3 + 4? Think.\na:"),
        (PromptTemplate(system="Add."), "system:Add.\nuser:What is 3 + 4?\na:"),
        (PromptTemplate(system=""), "system:\nuser:What is 3 + 4?\na:"),
        (
            PromptTemplate(examples=EXAMPLES),
            "user:What is 2 + 2?\nassistant:\\boxed{4}\nuser:What is 1 + 1?\nassistant:\\boxed{2}\nuser:What is 3 + 4?\na:",
        ),
        (
            PromptTemplate(system="Add.", suffix=" Go.", examples=EXAMPLES[:1]),
            "system:Add.\nuser:What is 2 + 2? Go.\nassistant:\\boxed{4}\nuser:What is 3 + 4? Go.\na:",
        ),
        (PromptTemplate(chat=False), "What is 3 + 4?\n"),
        (PromptTemplate(chat=False, suffix=" Think."), "What is 3 + 4? Think.\n"),
        (
            PromptTemplate(chat=False, system="Add.", suffix=" Go.", examples=EXAMPLES),
            "Add.\n\nWhat is 2 + 2? Go.\n\\boxed{4}\n\nWhat is 1 + 1? Go.\n\\boxed{2}\n\nWhat is 3 + 4? Go.\n",
        ),
    ],
)
def test_the_prompt_is_this_text(template: PromptTemplate, expected: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert text(template, tokenizer) == expected


def test_the_papers_suffix_follows_the_question_on_the_same_line(tokenizer: PreTrainedTokenizerBase) -> None:
    assert PAPER_SUFFIX == " Let's think step by step and output the final answer within \\boxed{}."
    assert text(PromptTemplate(suffix=PAPER_SUFFIX), tokenizer) == f"user:What is 3 + 4?{PAPER_SUFFIX}\na:"


def test_examples_may_be_lists_as_yaml_gives_them(tokenizer: PreTrainedTokenizerBase) -> None:
    lists = PromptTemplate(examples=[list(pair) for pair in EXAMPLES])  # type: ignore[misc]
    assert lists(PROBLEM, tokenizer) == PromptTemplate(examples=EXAMPLES)(PROBLEM, tokenizer)


def test_special_tokens_come_from_the_template_alone_in_a_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that adds a token of its own would double the one that the template wrote."""
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $0", special_tokens=[("<eos>", eos)])
    tokenizer.chat_template = "<eos>" + str(tokenizer.chat_template)
    chat, plain = PromptTemplate()(PROBLEM, tokenizer), PromptTemplate(chat=False)(PROBLEM, tokenizer)
    assert chat[0] == plain[0] == eos
    assert chat.count(eos) == plain.count(eos) == 1


def test_a_tokenizer_without_chat_template_is_refused_with_the_key_to_set(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template: set rollout\.prompt\.chat to false"):
        PromptTemplate()(PROBLEM, tokenizer)
    assert text(PromptTemplate(chat=False), tokenizer) == "What is 3 + 4?\n"

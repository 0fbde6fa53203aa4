"""A prompt is exactly the text that one would write by hand, tokenized once."""

import json
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


def test_examples_may_stand_inside_the_user_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Question, newline, answer, empty line, ..., question: the paper's in-context baselines."""
    template = PromptTemplate(system="S", examples=EXAMPLES, examples_as="text")
    assert text(template, tokenizer) == (
        "system:S\nuser:What is 2 + 2?\n\\boxed{4}\n\nWhat is 1 + 1?\n\\boxed{2}\n\nWhat is 3 + 4?\na:"
    )
    assert text(PromptTemplate(examples=EXAMPLES, examples_as="text", num_examples=1), tokenizer) == (
        "user:What is 2 + 2?\n\\boxed{4}\n\nWhat is 3 + 4?\na:"
    )


def test_a_solution_that_the_model_wrote_becomes_an_example(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "pi1.jsonl"
    rows = [("wrong", False), ("so 7", True), ("thus 7", True)]
    file.write_text("".join(json.dumps({"question": "3 + 4?", "response": r, "correct": c}) + "\n" for r, c in rows))
    template = PromptTemplate(examples_file=str(file), num_examples=1)
    assert text(template, tokenizer) == "user:3 + 4?\nassistant:so 7\nuser:What is 3 + 4?\na:"
    assert text(PromptTemplate(examples_file=str(file)), tokenizer).count("assistant:") == 2


@pytest.mark.parametrize("content", [None, "", '{"question": "q", "response": "r", "correct": false}\n', '{"question": "q"}\n'])
def test_a_file_without_a_solution_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "x.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"prompt\.examples_file .*x\.jsonl' (holds no solution|cannot be used)"):
        text(PromptTemplate(examples_file=str(file)), tokenizer)


def test_fewer_examples_than_asked_for_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"num_examples is 3 but there are 2: lower it"):
        text(PromptTemplate(examples=EXAMPLES, num_examples=3), tokenizer)
    with pytest.raises(ConfigError, match=r"num_examples is -1: set it to 0 or more"):
        PromptTemplate(num_examples=-1)


def test_plain_text_stands_around_the_question(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = PromptTemplate(chat=False, plain="Question: {question}\nAnswer:", examples=[("1?", " one")])
    assert text(plain, tokenizer) == "Question: 1?\nAnswer: one\n\nQuestion: What is 3 + 4?\nAnswer:"
    for wrong in ("Question:", "{question}{question}"):
        with pytest.raises(ConfigError, match=r"prompt\.plain is .*: write \{question\} in it once"):
            PromptTemplate(chat=False, plain=wrong)


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

"""The one forward pass, against a plain Hugging Face model that sees one row at a time."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from conftest import write_tiny_model
from rlvr_lightning import prefix_tree
from rlvr_lightning.batching import RolloutBatch
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.policy import LoRA, Policy, PolicyConfig, PolicyWeights
from rlvr_lightning.prefix_tree import BLOCK, PrefixTree
from rlvr_lightning.records import Completion, Problem, Rollout, Score

TEMPERATURE = 0.6
PROMPT = tuple(range(10, 22))
EOS = 0


def batch_of(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> RolloutBatch:
    """Rows of (prompt, completion)."""
    problem, score = Problem(id="p", question="?", answer="1"), Score(0.0, False, "wrong", None)
    return RolloutBatch.from_rollouts(
        [Rollout(problem, tuple(p), Completion(tuple(c), (0.0,) * len(c), "", "stop"), score, TEMPERATURE, 0) for p, c in rows]
    )


def one_prompt() -> RolloutBatch:
    """Lengths 1, 5 and 9; one completion is nothing but end-of-sequence, one holds it in the middle."""
    return batch_of([(PROMPT, [30, 31, EOS, 33, 34]), (PROMPT, [EOS]), (PROMPT, [*range(40, 48), EOS])])


def two_prompts() -> RolloutBatch:
    return batch_of([(PROMPT, [30, 31, EOS]), (PROMPT[:5], [50, 51, 52, 53]), (PROMPT, [EOS])])


def build(model: Path, **settings: object) -> Policy:
    return PolicyConfig(model=str(model), **settings).build()  # type: ignore[arg-type]


def naive(lm: torch.nn.Module, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies: every row alone, unpadded, all logits kept."""
    logprobs, entropy = torch.zeros(batch.input_ids.shape), torch.zeros(batch.input_ids.shape)
    for b in range(len(batch)):
        ids = batch.input_ids[b, : batch.lengths[b]]
        p = torch.softmax(lm(ids[None]).logits[0] / TEMPERATURE, dim=-1)
        for t in batch.completion_mask[b].nonzero()[:, 0].tolist():
            logprobs[b, t] = p[t - 1, ids[t]].log()
            entropy[b, t] = -(p[t - 1] * p[t - 1].log()).sum()
    return logprobs, entropy


def gradients(module: torch.nn.Module, values: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss that weighs every position of both arrays differently."""
    module.zero_grad()
    weights = torch.linspace(-1, 1, values[0].numel()).view_as(values[0])
    (values[0] * weights + values[1] * weights.square()).sum().backward()
    return {n.removeprefix("lm."): p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def stats(policy: Policy, batch: RolloutBatch, *, as_tree: bool = False) -> tuple[Tensor, Tensor]:
    result = policy(batch, as_tree=as_tree)
    return result.logprobs, result.entropy


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every tensor agrees within ``tolerance`` of its largest entry."""
    assert first.keys() == second.keys()
    for name in first:
        gap, scale = (first[name] - second[name]).abs().max(), second[name].abs().max()
        assert gap <= tolerance * scale, f"{name}: {gap:.1e} of {scale:.1e}"


def branches() -> RolloutBatch:
    """What sampling at a low temperature gives: repeated rows, rows that go on where others end, late and early branches."""
    return batch_of(
        [
            (PROMPT, [30, 31, 32, EOS]),
            (PROMPT, [30, 31, 32, EOS]),
            (PROMPT, [30, 31, 32]),  # cut at the limit: ends where others go on
            (PROMPT, [30, 31, 40, 41, 42, EOS]),
            (PROMPT, [50]),
            (PROMPT[:7], [*PROMPT[7:], 30]),  # a completion that is another row's prompt
            (PROMPT, [30, 31, 40, 41, 43]),
        ]
    )


BATCHES = [one_prompt, two_prompts, branches]


@pytest.mark.parametrize("as_tree", [True, False])
@pytest.mark.parametrize("make_batch", BATCHES)
def test_values_and_gradients_equal_one_row_at_a_time(tiny_model: Path, as_tree: bool, make_batch):
    policy = build(tiny_model)
    lm, batch = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), make_batch()
    ours, reference = stats(policy, batch, as_tree=as_tree), naive(lm, batch)
    torch.testing.assert_close(ours[0], reference[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], reference[1], atol=1e-5, rtol=1e-5)
    assert (ours[0][~batch.completion_mask] == 0).all()
    assert_same(gradients(policy, ours), gradients(lm, reference))


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([3, 7]), st.lists(st.sampled_from([EOS, 30]), min_size=1, max_size=12)), min_size=1))
def test_any_tree_gives_the_numbers_of_its_rows(two_layers: Policy, small_blocks: None, rows: list[tuple[int, list[int]]]):
    batch = batch_of([(PROMPT[:prompt], completion) for prompt, completion in rows])  # two tokens: they branch all the time
    torch.testing.assert_close(stats(two_layers, batch, as_tree=True), stats(two_layers, batch), atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def two_layers(tiny_model: Path) -> Policy:
    return build(tiny_model)


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """Trees of a test are small: without this they would be one block."""
    before, BLOCK["cpu"] = BLOCK["cpu"], 4
    yield
    BLOCK["cpu"] = before


@pytest.mark.parametrize("as_tree", [True, False])
def test_gradients_have_the_same_bits_every_time(tiny_model: Path, as_tree: bool):
    policy, generator = build(tiny_model), torch.Generator().manual_seed(0)
    rows = torch.randint(2, 96, (96, 24), generator=generator).tolist()
    batch = batch_of([(PROMPT, row) for row in rows for _ in range(2)])  # threads add up many branches of one prompt
    first, *others = (gradients(policy, stats(policy, batch, as_tree=as_tree)) for _ in range(20))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_every_distinct_prefix_is_computed_once(tiny_model: Path):
    policy, batch, tokens = build(tiny_model), branches(), []
    policy.lm.get_input_embeddings().register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    policy(batch, as_tree=True)
    prefixes = {tuple(batch.input_ids[b, :t].tolist()) for b in range(len(batch)) for t in range(1, batch.lengths[b])}
    assert tokens == [len(prefixes)]  # of those that predict something; 12 + 5 here


@pytest.mark.parametrize("window", [None, 5])
def test_the_backward_pass_of_the_cpu_is_that_of_autograd(window: int | None):
    batch = branches()
    blocks = PrefixTree.of(batch.input_ids, batch.lengths, batch.completion_mask).blocks
    nodes, generator = blocks[-1].nodes.stop, torch.Generator().manual_seed(0)
    inputs = [torch.randn(nodes, heads, 8, generator=generator, requires_grad=True) for heads in (6, 2, 2)]
    found = []
    for attend in (prefix_tree._AttendOnCPU.apply, prefix_tree._attend):
        output = attend(*inputs, blocks, window, 0.3)
        found.append([output, *torch.autograd.grad((output * torch.linspace(-1, 1, 8)).sum(), inputs)])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sliding_window_is_kept(tiny_model: Path, tmp_path: Path, checkpointing: bool):
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    values = {k: v for k, v in lm.config.to_dict().items() if k not in ("model_type", "architectures", "layer_types")}
    config = Qwen2Config(**values | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1})
    assert config.layer_types == ["full_attention", "sliding_attention"]
    folder = shutil.copytree(tiny_model, tmp_path / "sliding")
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    policy, batch = build(folder, gradient_checkpointing=checkpointing), branches()
    assert policy.check_sharing() is None
    tree, rows = stats(policy, batch, as_tree=True), stats(policy, batch)
    torch.testing.assert_close(tree, rows, atol=1e-5, rtol=1e-5)
    assert_same(gradients(policy, tree), gradients(policy, rows))
    whole = build(tiny_model)
    whole.lm.load_state_dict(policy.lm.state_dict(), strict=False)
    assert (stats(whole, batch)[0] - rows[0]).abs().max() > 1e-3  # the window mattered


def test_a_model_that_mixes_tokens_otherwise_is_found_out(tiny_model: Path):
    for share in (None, True):
        policy = build(tiny_model, share_prefixes=share)
        assert policy.check_sharing() is None
        assert policy.share is share
        # a convolution over the sequence, as state-space models and others have one
        policy.lm.get_decoder().layers[0].mlp.register_forward_hook(lambda _m, _i, out: out + out.roll(1, dims=1))
        if share:
            with pytest.raises(ConfigError, match=r"share_prefixes does not work with this model .*differ by"):
                policy.check_sharing()
        else:
            assert "differ" in (policy.check_sharing() or "")
            assert policy.share is False


def test_the_check_can_be_switched_off(tiny_model: Path):
    policy = build(tiny_model, check_sharing=False)
    policy.lm.get_decoder().layers[0].mlp.register_forward_hook(lambda _m, _i, out: out + out.roll(1, dims=1))
    assert policy.check_sharing() is None
    assert policy.share is None


def test_completions_of_one_token_need_only_the_prompt(tiny_model: Path):
    policy, batch = build(tiny_model), batch_of([(PROMPT, [EOS]), (PROMPT, [30])])
    torch.testing.assert_close(stats(policy, batch, as_tree=True), naive(policy.lm, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("as_tree", [True, False])
def test_the_content_of_the_padding_does_not_matter(tiny_model: Path, as_tree: bool):
    policy, batch = build(tiny_model), one_prompt()
    inside = torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
    noise = torch.randint(96, batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    noisy = replace(batch, input_ids=torch.where(inside, batch.input_ids, noise))
    assert not torch.equal(noisy.input_ids, batch.input_ids)
    clean = stats(policy, batch, as_tree=as_tree)
    assert torch.equal(torch.stack(stats(policy, noisy, as_tree=as_tree)), torch.stack(clean))
    found = gradients(policy, stats(policy, noisy, as_tree=as_tree))
    assert_same(found, gradients(policy, clean), tolerance=1e-6)


@pytest.mark.parametrize("as_tree", [True, False])
def test_without_completions_every_weight_gets_a_gradient_of_exactly_zero(tiny_model: Path, as_tree: bool):
    policy = build(tiny_model)
    found = gradients(policy, stats(policy, one_prompt().rows([0]).without_completions(), as_tree=as_tree))
    assert found.keys() == {n for n, _ in policy.lm.named_parameters()}  # so that every rank takes part in every reduction
    assert all(g.abs().max() == 0 for g in found.values())


@pytest.mark.parametrize("as_tree", [True, False])
def test_gradient_checkpointing_changes_neither_values_nor_gradients(tiny_model: Path, as_tree: bool):
    plain, saving, batch = build(tiny_model), build(tiny_model, gradient_checkpointing=True), branches()
    assert saving.lm.is_gradient_checkpointing
    assert saving.lm.training  # transformers checkpoints in training mode only
    ours, expected = stats(saving, batch, as_tree=as_tree), stats(plain, batch, as_tree=as_tree)
    torch.testing.assert_close(ours, expected)
    assert_same(gradients(saving, ours), gradients(plain, expected), tolerance=1e-6)


def test_gradient_checkpointing_runs_every_layer_twice(tiny_model: Path):
    policy, calls = build(tiny_model, gradient_checkpointing=True), []
    policy.lm.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    values = stats(policy, one_prompt())
    assert len(calls) == 1
    gradients(policy, values)
    assert len(calls) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_policy_in_bfloat16_has_the_bits_of_autocast(tmp_path: Path, tied: bool):
    folder, batch = write_tiny_model(tmp_path, tied=tied), branches()
    plain, frozen = build(folder), build(folder).freeze(torch.bfloat16)
    linear = frozen.lm.get_decoder().layers[0].mlp.up_proj.weight
    assert (linear.dtype, frozen.lm.get_input_embeddings().weight.dtype) == (torch.bfloat16, torch.float32)
    assert not any(p.requires_grad for p in frozen.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), torch.no_grad():
        for as_tree in (False, True):
            expected = stats(plain, batch, as_tree=as_tree)
            assert torch.equal(torch.stack(stats(frozen, batch, as_tree=as_tree)), torch.stack(expected))


def test_training_mode_does_not_switch_dropout_on(tiny_model: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "dropout")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    policy, batch = build(folder), one_prompt()
    assert policy.lm.config.attention_dropout == 0.5
    before = stats(policy, batch)
    policy.train()
    assert torch.equal(torch.stack(stats(policy, batch)), torch.stack(before))


# --- weights as an engine sees them ------------------------------------------------------------------------------------


def state_of(policy: Policy) -> dict[str, Tensor]:
    return dict(PolicyWeights(policy, torch.float32).tensors())


def adapted(model: Path) -> Policy:
    """A LoRA policy whose adapters do something: peft starts lora_B at zero."""
    policy = build(model, lora=LoRA(rank=4, alpha=8))
    torch.manual_seed(5)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def plain_with(model: Path, state: dict[str, Tensor]) -> torch.nn.Module:
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    missing, unexpected = lm.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return lm


@pytest.mark.parametrize("tied", [True, False])
def test_weights_have_hugging_face_names_and_no_tied_duplicate(tmp_path: Path, tied: bool):
    model = write_tiny_model(tmp_path / "model", tied=tied)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = {n: t for n, t in lm.state_dict().items() if not (tied and n == "lm_head.weight")}
    state = state_of(build(model))
    assert ("lm_head.weight" in state) == (not tied)
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def test_weights_of_adapters_are_merged_under_the_plain_names(tiny_model: Path):
    pytest.importorskip("peft")
    policy, batch = adapted(tiny_model), one_prompt()
    state = state_of(policy)
    assert state.keys() == state_of(build(tiny_model)).keys()
    merged = naive(plain_with(tiny_model, state), batch)
    torch.testing.assert_close(stats(policy, batch), merged, atol=1e-5, rtol=1e-5)
    base = naive(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), batch)
    assert (merged[0] - base[0]).abs().max() > 0.01  # the adapters mattered


def test_merging_follows_alpha_over_rank(tiny_model: Path):
    pytest.importorskip("peft")
    policy = adapted(tiny_model)
    layer = policy.lm.get_decoder().layers[0].self_attn.q_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 8 / 4
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(state_of(policy)[name], state_of(build(tiny_model))[name] + delta)


def test_without_adapters_is_the_base_model_and_only_inside(tiny_model: Path):
    pytest.importorskip("peft")
    policy, batch = adapted(tiny_model), one_prompt()
    base = stats(build(tiny_model), batch)[0]
    outside = stats(policy, batch)[0]
    with policy.without_adapters():
        torch.testing.assert_close(stats(policy, batch)[0], base, atol=1e-6, rtol=1e-6)
    assert torch.equal(stats(policy, batch)[0], outside)
    assert (outside - base).abs().max() > 0.01


def test_only_adapters_train_and_still_do_after_a_reference_pass(tiny_model: Path):
    pytest.importorskip("peft")
    policy = adapted(tiny_model)
    with policy.without_adapters():
        policy(one_prompt())
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    # 2 layers x (q, k, v, o, gate, up, down) x (A, B); neither the embedding nor the head
    assert len(trained) == 2 * 7 * 2
    assert gradients(policy, stats(policy, one_prompt())).keys() == {n.removeprefix("lm.") for n in trained}


def test_switching_adapters_off_means_nothing_without_lora(tiny_model: Path):
    policy, batch = build(tiny_model), one_prompt()
    with policy.without_adapters():
        inside = stats(policy, batch)[0]
    assert torch.equal(inside, stats(policy, batch)[0])


# --- loading -----------------------------------------------------------------------------------------------------------


def test_master_weights_are_float32_even_if_the_folder_stores_bfloat16(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "bf16"
    shutil.copytree(tiny_model, folder)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    lm.save_pretrained(folder)
    assert '"bfloat16"' in (folder / "config.json").read_text()
    policy = build(folder)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    stored = lm.get_input_embeddings().weight
    assert torch.equal(policy.lm.get_input_embeddings().weight, stored.float())


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path, tiny_model: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        build(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        build(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no embedded model 'Nope'"):
        PolicyConfig(model="embedded:Nope").build()
    no_weights = shutil.copytree(tiny_model, tmp_path / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match="cannot load the weights"):
        build(no_weights)


def test_a_model_that_scales_its_logits_is_refused(tiny_model: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "softcapped")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"final_logit_softcapping": 30.0,', 1))
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        build(folder)

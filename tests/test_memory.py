"""The memory plan against what autograd keeps, what vLLM is asked for, what peft adds, and what real runs take."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import write_tiny_model
from rlvr_lightning.batching import RolloutBatch
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.engines.vllm import VLLMEngine
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.memory import cgroup_memory, check, engine_settings, machine_memory
from rlvr_lightning.memory_plan import GIB, ModelSizes, Settings, plan_memory
from rlvr_lightning.policy import LoRA, Policy, PolicyConfig

SMALL = ModelSizes(
    parameters=134_515_008,
    linear=106_168_320,
    block=3_540_096,
    layers=30,
    hidden=576,
    queries=576,
    keys=192,
    feed_forward=1536,
    vocabulary=49152,
    tied=True,
)
"""SmolLM2-135M."""
RUN = Settings(model=SMALL, tokens_per_micro_batch=4096, rows=64, prompt_tokens=68, max_tokens=48, window=116)


# --- counted -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_weights(tied: bool, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model", tied=tied, layers=3)
    sizes, lm = ModelSizes.read(str(path)), PolicyConfig(model=str(path)).build().lm
    (path / "model.safetensors").unlink()
    assert ModelSizes.read(str(path)) == sizes
    assert sizes.parameters == sum(p.numel() for p in lm.parameters())
    assert sizes.head == lm.get_output_embeddings().weight.numel()
    linear = [m for m in lm.modules() if isinstance(m, torch.nn.Linear) and m is not lm.get_output_embeddings()]
    assert sizes.linear == sum(m.weight.numel() for m in linear)
    assert sizes.block == sum(p.numel() for p in lm.get_decoder().layers[0].parameters())


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"], r".*layers\.0\.mlp\.up_proj"])
def test_adapters_are_those_that_peft_adds(tiny_model: Path, modules: str | list[str]) -> None:
    pytest.importorskip("peft")
    lora = LoRA(rank=4, target_modules=modules)
    policy = PolicyConfig(model=str(tiny_model), lora=lora).build()
    added = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert ModelSizes.read(str(tiny_model), lora).adapters == added > 0


def kept(policy: Policy, tokens: int, *, as_tree: bool, bf16: bool) -> int:
    """Return the bytes that autograd keeps of one row of so many tokens, weights and their casts aside."""
    ids, mask = torch.randint(2, 90, (1, tokens + 1)), torch.zeros(1, tokens + 1, dtype=torch.bool)
    mask[:, -8:] = True
    weights = {p.shape for p in policy.parameters()} | {p.T.shape for p in policy.parameters() if p.dim() == 2}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    batch = RolloutBatch(ids, mask, torch.zeros(1, tokens + 1), (tokens + 1,), 1.0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        policy(batch, as_tree=as_tree)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("as_tree", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_keeps_what_the_formula_says(tmp_path: Path, as_tree: bool, bf16: bool, checkpointing: bool) -> None:
    path = str(write_tiny_model(tmp_path / "model", layers=4))
    sizes = ModelSizes.read(path)
    policy = PolicyConfig(model=path, gradient_checkpointing=checkpointing).build()
    # 97 and 193: no weight has such a side. The final norm keeps 8 H.
    a_token = (kept(policy, 193, as_tree=as_tree, bf16=bf16) - kept(policy, 97, as_tree=as_tree, bf16=bf16)) / 96
    layer = 4 * sizes.hidden if checkpointing else sizes.layer_activations(2 if bf16 else 4)
    assert a_token == pytest.approx(4 * layer + 8 * sizes.hidden, rel=0.03)


@pytest.mark.parametrize("window", [31, 32, 116, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_the_one_that_vllm_is_asked_for(tiny_model: Path, window: int, dtype: torch.dtype) -> None:
    from types import SimpleNamespace

    from rlvr_lightning.engines.vllm import cache_bytes

    weights: object = SimpleNamespace(model_path=str(tiny_model))
    settings = replace(
        RUN, model=ModelSizes.read(str(tiny_model)), engine="vllm", engine_itemsize=dtype.itemsize, window=window
    )
    assert plan_memory(settings).engine_cache * GIB == cache_bytes(weights, window, dtype)  # type: ignore[arg-type]


# --- sums by hand and invariants ---------------------------------------------------------------------------------------


def test_the_parts_of_the_quickstart_by_hand() -> None:
    plan = plan_memory(replace(RUN, reference=True, itemsize=2))
    assert plan.weights == plan.gradients == plan.optimizer / 2 == 4 * 134_515_008 / GIB
    assert plan.reference == pytest.approx((4 * (134_515_008 - 106_168_320) + 2 * 106_168_320) / GIB)
    # bytes a token of a layer: norms 4 * 4 * 576; read 5 * 576 + 2 * 576 + 2 * 192 + 4 * 1536, 2 bytes each
    assert SMALL.layer_activations(2) == 9216 + 2 * 10560
    assert plan.settings.micro_batch == 68 + 64 * 48  # one prompt, below the budget of 4096
    assert plan.activations == pytest.approx((31 * 30336 + 24 * 576) * 3140 / GIB)
    assert plan.total == pytest.approx(plan.learner + plan.update)


def test_adapters_train_alone_and_need_no_reference() -> None:
    plan = plan_memory(replace(RUN, reference=True, model=replace(SMALL, adapters=1_000_000)))
    assert plan.reference == 0
    assert plan.optimizer == 2 * plan.gradients == 8e6 / GIB
    assert plan.weights == 4 * 135_515_008 / GIB


def test_a_critic_is_a_decoder_that_trains() -> None:
    untied = replace(SMALL, tied=False, parameters=SMALL.parameters + SMALL.head)
    assert plan_memory(replace(RUN, critic=True)).critic == pytest.approx(16 * SMALL.parameters / GIB)
    assert plan_memory(replace(RUN, critic=True, model=untied)).critic == pytest.approx(16 * SMALL.parameters / GIB)


@given(world=st.integers(2, 64), low=st.booleans())
def test_shards_add_up_to_the_whole(world: int, low: bool) -> None:
    whole = replace(RUN, reference=True, critic=True, itemsize=4)
    one, many = plan_memory(whole), plan_memory(replace(whole, world_size=world, sharded=True, itemsize=2 if low else 4))
    for part in ("weights", "gradients", "optimizer", "reference", "critic"):
        assert getattr(many, part) * world == pytest.approx(getattr(one, part))
    assert many.gathered > 0
    assert one.gathered == 0


@given(
    capacity=st.floats(1, 200),
    low=st.booleans(),
    checkpointing=st.booleans(),
    engine=st.sampled_from(["hf", "vllm", "elsewhere"]),
    ranks=st.integers(1, 4),
)
def test_the_largest_budget_that_fits_fits_and_the_next_does_not(
    capacity: float, low: bool, checkpointing: bool, engine: str, ranks: int
) -> None:
    settings = replace(
        RUN,
        rows=10**6,
        capacity_gib=capacity,
        itemsize=2 if low else 4,
        checkpointing=checkpointing,
        engine=engine,
        local_ranks=ranks,
    )
    fit = plan_memory(settings).tokens_that_fit
    assert fit is not None
    room = 0.95 * capacity / ranks

    def held(tokens: int) -> float:
        plan = plan_memory(replace(settings, tokens_per_micro_batch=tokens))
        return plan.certain + plan.update

    least = settings.prompt_tokens + settings.max_tokens  # a micro-batch has at least one row
    assert fit < least or held(fit) <= room + 1e-6
    assert held(max(fit + 64, least)) > room


def test_the_share_that_is_recommended_for_vllm_leaves_room_for_the_learner() -> None:
    gpu = replace(RUN, device="cuda", engine="vllm", capacity_gib=80.0, engine_sleeps=True, engine_rows=64, itemsize=2)
    for settings in (gpu, replace(gpu, engine_sleeps=False), replace(gpu, capacity_gib=8.0)):
        plan = plan_memory(settings)
        assert plan.utilization
        better = plan_memory(replace(settings, gpu_memory_utilization=plan.utilization))
        assert better.total <= 0.95 * (settings.capacity_gib or 0)
    assert plan_memory(replace(gpu, capacity_gib=2.0)).utilization == 0
    assert plan_memory(RUN).utilization is None


def test_an_engine_that_sleeps_gives_its_memory_to_the_update() -> None:
    gpu = replace(RUN, device="cuda", engine="vllm", capacity_gib=80.0, itemsize=2)
    awake, asleep = plan_memory(gpu), plan_memory(replace(gpu, engine_sleeps=True))
    assert awake.total - asleep.total == pytest.approx(min(awake.engine, awake.update))


def test_sampling_during_updates_takes_both_at_once() -> None:
    plan = plan_memory(replace(RUN, engine="vllm", overlap=True))
    assert plan.total == pytest.approx(plan.learner + plan.engine + plan.sampling + plan.update)


def test_the_settings_of_every_engine_are_read() -> None:
    from rlvr_lightning.engines.server import VLLMServerEngine

    assert engine_settings(HFEngine(batch_size=16), "cpu", 64, 2)["engine_rows"] == 16
    inside = engine_settings(VLLMEngine(kv_cache_gib=2.0, dtype="float32", max_num_seqs=8), "cpu", 64, 2)
    beside = engine_settings(VLLMServerEngine(kv_cache_gib=2.0, dtype="float32", max_num_seqs=8), "cpu", 64, 2)
    assert not inside["own_process"]
    assert beside == inside | {"own_process": True}
    assert (inside["kv_cache_gib"], inside["engine_itemsize"], inside["engine_rows"]) == (2.0, 4, 8)
    assert engine_settings(VLLMServerEngine(urls=["http://127.0.0.1:1"]), "cpu", 64, 2) == {"engine": "elsewhere"}
    on_gpu = engine_settings(VLLMServerEngine(gpu_memory_utilization=0.3, sleep=False), "cuda", 64, 2)
    assert (on_gpu["gpu_memory_utilization"], on_gpu["engine_sleeps"]) == (0.3, False)
    assert engine_settings(VLLMEngine(), "cuda", 64, 2)["engine_sleeps"]


# --- verdicts ----------------------------------------------------------------------------------------------------------


def test_a_run_that_cannot_fit_is_refused_with_its_parts() -> None:
    plan = plan_memory(replace(RUN, capacity_gib=2.0, available_gib=1.5))
    with pytest.raises(ConfigError, match=r"does not fit: 2\.\d GiB whatever the rollouts.*\n  libraries"):
        check(plan)


def test_a_run_that_may_not_fit_is_a_warning_that_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    check(plan_memory(replace(RUN, capacity_gib=4.0, available_gib=3.9)))
    said = capsys.readouterr().out
    assert said.startswith("warning: memory may not fit: up to")
    assert "model.tokens_per_micro_batch: 4096 is too much, up to" in said


def test_a_run_that_fits_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    check(plan_memory(replace(RUN, capacity_gib=100.0, available_gib=90.0)))
    assert capsys.readouterr().out == ""


def test_ranks_of_one_machine_share_its_memory() -> None:
    four = replace(RUN, capacity_gib=30.0, world_size=4, local_ranks=4)
    total = plan_memory(four).total
    assert f"{4 * total:.1f} GiB (4 processes of {total:.1f})" in plan_memory(four).verdict()


def test_the_table_names_every_part_that_is_there() -> None:
    table = str(plan_memory(replace(RUN, reference=True)))
    assert [line.split()[0] for line in table.splitlines()][:5] == [
        "libraries",
        "weights",
        "gradients",
        "optimizer",
        "reference",
    ]
    assert "critic" not in table


# --- the machine -------------------------------------------------------------------------------------------------------


def test_the_strictest_limit_of_a_container_counts(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/pod/box\n")
    for folder, limit, used in (("pod", "4000", "1000"), ("pod/box", "max", "500")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(limit)
        (tmp_path / folder / "memory.current").write_text(used)
        (tmp_path / folder / "memory.stat").write_text("anon 1\ninactive_file 100\nactive_file 50\n")
    assert cgroup_memory(tmp_path, own) == (4000, 850)
    (tmp_path / "pod/box/memory.max").write_text("2000")
    assert cgroup_memory(tmp_path, own) == (2000, 350)


def test_version_one_is_read_and_its_huge_number_is_no_limit(tmp_path: Path) -> None:
    own, folder = tmp_path / "cgroup", tmp_path / "memory/box"
    own.write_text("4:memory:/box\n3:cpuset:/\n")
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("3000")
    (folder / "memory.usage_in_bytes").write_text("1000")
    (folder / "memory.stat").write_text("total_cache 7\n")
    assert cgroup_memory(tmp_path, own) == (3000, 1000)
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert cgroup_memory(tmp_path, own) == (math.inf, 0)


def test_no_container_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path, tmp_path / "none") == (math.inf, 0)


def test_memory_that_is_free_includes_ones_own() -> None:
    capacity, available = machine_memory("cpu")
    assert capacity is not None
    assert available is not None
    assert 0 < available <= capacity


# --- measured ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(
    "case", ["hf-fp32-kl", "vllm-bf16", "vllm-bf16-checkpointing", "vllm-bf16-kl-long", "vllm-bf16-lora", "vllm-bf16-critic"]
)
def test_the_plan_is_within_a_quarter_of_what_a_run_takes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from memory import measure

    found = measure(case)
    assert 0.8 * found["micro_batch"] < found["computed"], found  # the rollouts did reach the budget
    assert found["planned_gib"] == pytest.approx(found["measured_gib"], rel=0.25)

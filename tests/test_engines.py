"""One contract for every engine: the learner's distribution, the learner's current weights, and nothing hidden in between.

The model's own generation config is hostile on purpose (top-k 2, a repetition penalty, ...): an engine that lets any of it
through fails the parity tests. ``hf-copy`` is HFEngine as it runs beside a sharded learner, on a private copy; ``vllm-server``
attaches to a server that was started with the command of docs/engines.md.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from rlvr_lightning.batching import RolloutBatch
from rlvr_lightning.engines import RolloutEngine, Sampling, Sent, StaleEngineError
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.engines.process import server_command, server_environment
from rlvr_lightning.engines.server import VLLMServerEngine
from rlvr_lightning.engines.vllm import VLLMEngine
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.jsonl import read_jsonl
from rlvr_lightning.policy import LoRA, Policy, PolicyConfig, PolicyWeights
from rlvr_lightning.records import Completion, Problem, Rollout, Score
from rlvr_lightning.rollout import seed_for

WINDOW = 160
SHORT = (40, 7, 3, 22, 9)
LONG = tuple(2 + (i * i * 7 + 3 * i) % 80 for i in range(75))  # two whole cache blocks of vLLM, so that a prefix is shared
SECOND_EOS = 5
"""The end-of-sequence token of the config files; the tokenizer names token 0. A completion ends at either."""

EnginePool = Callable[..., RolloutEngine]


class ShardedWeights(PolicyWeights):
    """Weights of a learner whose model cannot be used in place."""

    @property
    def live_model(self) -> None:  # type: ignore[override]
        return None


class CopyingHFEngine(HFEngine):
    def sync(self, weights: PolicyWeights, version: int, *, window: int) -> None:  # type: ignore[override]
        super().sync(ShardedWeights(weights.policy, weights.dtype), version, window=window)


CLASSES: dict[str, type[RolloutEngine]] = {
    "hf": HFEngine,
    "hf-copy": CopyingHFEngine,
    "vllm": VLLMEngine,
    "vllm-process": VLLMServerEngine,
    "vllm-server": VLLMServerEngine,
}
SLOW = (pytest.mark.vllm, pytest.mark.slow)
SERVERS = [pytest.param("vllm-process", marks=SLOW), pytest.param("vllm-server", marks=SLOW)]
STARTED = ["hf", "hf-copy", pytest.param("vllm", marks=pytest.mark.vllm), SERVERS[0]]
"""Those that the tests start themselves, so that they can have another dtype."""
ENGINES = [*STARTED, SERVERS[1]]
DOCS = Path(__file__).resolve().parents[1] / "docs" / "engines.md"


def documented_command(number: int = 0) -> tuple[dict[str, str], list[str]]:
    """Return the variables and the words of a command of docs/engines.md; the CPU's is the first."""
    block = [b for b in re.findall(r"^```bash\n(.*?)^```", DOCS.read_text(), re.M | re.S) if "api_server" in b][number]
    words = shlex.split(block.replace("\\\n", " "))
    start = words.index("python")
    return dict(word.split("=", 1) for word in words[:start]), words[start:]


class RunningServer:
    """A server as its user starts it, on a free port of loopback."""

    def __init__(self, model: Path, log: Path, *, port: int | None = None, **changes: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = port or probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        variables, words = documented_command()
        values = {"model": model, "port": self.port, "dtype": "float32", "max_model_len": WINDOW}
        values |= {"kv_cache_memory_bytes": 16 * 2**20} | changes
        for key, value in values.items():
            words[words.index("--" + key.replace("_", "-")) + 1] = str(value)
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *words[1:]],
                env=os.environ | variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> "RunningServer":
        """Return when it answers."""
        for _ in range(3000):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        """End it and all that it started."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture(scope="module")
def model_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(tiny_model, folder)
    GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_k=2,
        top_p=0.3,
        repetition_penalty=1.5,
        no_repeat_ngram_size=2,
        min_new_tokens=3,
        suppress_tokens=list(range(10, 40)),
        eos_token_id=SECOND_EOS,
        pad_token_id=0,
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": SECOND_EOS}))
    return folder


@pytest.fixture(scope="module")
def url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RunningServer(model_folder, tmp_path_factory.mktemp("server") / "log")
    try:
        yield server.wait().url
    finally:
        server.kill()


@pytest.fixture(scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[EnginePool]:
    """Return engines by name and dtype, started once; the float32 vLLM is closed before the bfloat16 one starts."""
    engines: dict[tuple[str, str], RolloutEngine] = {}

    def get(name: str, dtype: str = "float32") -> RolloutEngine:
        if (name, dtype) not in engines:
            for other in [key for key in engines if key[0] == name]:
                engines.pop(other).close()
            given: dict[str, Any] = {"urls": [request.getfixturevalue("url")]} if name == "vllm-server" else {}
            engines[name, dtype] = CLASSES[name](dtype=dtype, **given)  # type: ignore[call-arg]
        return engines[name, dtype]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture
def policy(model_folder: Path) -> Policy:
    """A fresh learner for every test: each test syncs its own."""
    return PolicyConfig(model=str(model_folder)).build()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, pool: EnginePool, policy: Policy) -> RolloutEngine:
    """A float32 engine that holds the learner's weights as version 0."""
    engine = pool(request.param)
    sync(engine, policy, 0)
    return engine


def sync(engine: RolloutEngine, policy: Policy, version: int, dtype: torch.dtype = torch.float32) -> None:
    engine.sync(PolicyWeights(policy, dtype), version, window=WINDOW)


def sample(
    engine: RolloutEngine,
    prompt: Sequence[int] = LONG,
    *,
    group: int = 8,
    temperature: float = 1.0,
    max_tokens: int = 16,
    top_p: float = 1.0,
) -> list[Completion]:
    """Return ``group`` completions of one prompt, seeded as in training."""
    sampling = Sampling(rollouts_per_problem=group, temperature=temperature, max_tokens=max_tokens, top_p=top_p)
    return engine.generate([prompt], sampling, [seeds(group)])[0]


def seeds(count: int, step: int = 0) -> list[int]:
    return [seed_for(0, stream="train", step=step, slot=0, sample=i) for i in range(count)]


def greedy(engine: RolloutEngine, prompt: Sequence[int] = LONG) -> Completion:
    return sample(engine, prompt, group=1, temperature=0.0, max_tokens=24)[0]


def as_batch(prompt: Sequence[int], completions: Sequence[Completion], temperature: float) -> RolloutBatch:
    problem, score = Problem("p", "?", "1"), Score(0.0, False, "wrong", None)
    return RolloutBatch.from_rollouts([Rollout(problem, tuple(prompt), c, score, temperature, 0) for c in completions])


@torch.no_grad()
def gap(policy: Policy, prompt: Sequence[int], completions: Sequence[Completion], temperature: float = 1.0) -> Tensor:
    """Return learner minus engine, in nats, for every sampled token."""
    batch = as_batch(prompt, completions, temperature)
    return (policy(batch).logprobs - batch.sampler_logprobs)[batch.completion_mask]


@torch.no_grad()
def shake(tensor: Tensor, by: float = 0.2) -> None:
    tensor.add_(by * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))


def first_token_probabilities(policy: Policy, prompt: Sequence[int], temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        logits = policy.lm(input_ids=torch.tensor([list(prompt)])).logits[0, -1]
    return torch.softmax(logits / temperature, dim=-1)


# --- the learner's distribution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("temperature", [0.6, 0.8])
def test_logprobs_are_the_learners_at_the_sampling_temperature(
    engine: RolloutEngine, policy: Policy, temperature: float, prompt: Sequence[int]
) -> None:
    completions = sample(engine, prompt, temperature=temperature)
    assert gap(policy, prompt, completions, temperature).abs().max() < 1e-4
    assert gap(policy, prompt, completions, 1.0).abs().max() > 0.1  # so the comparison can see a wrong temperature


def test_greedy_tokens_are_the_learners_argmax_and_logprobs_are_at_temperature_one(
    engine: RolloutEngine, policy: Policy
) -> None:
    completion = greedy(engine)
    assert gap(policy, LONG, [completion]).abs().max() < 1e-4
    with torch.no_grad():
        logits = policy.lm(input_ids=torch.tensor([[*LONG, *completion.token_ids]])).logits[0, len(LONG) - 1 : -1]
    assert logits.argmax(-1).tolist() == list(completion.token_ids)


def test_first_tokens_are_drawn_with_the_learners_probabilities(engine: RolloutEngine, policy: Policy) -> None:
    count = 1000
    p = first_token_probabilities(policy, SHORT, temperature=0.8)
    drawn = [c.token_ids[0] for c in sample(engine, SHORT, group=count, temperature=0.8, max_tokens=1)]
    frequencies = torch.bincount(torch.tensor(drawn), minlength=len(p)) / count
    assert ((frequencies - p).abs() <= 4 * (p * (1 - p) / count).sqrt() + 1 / count).all()


def test_a_nucleus_cut_samples_from_the_nucleus_only(engine: RolloutEngine, policy: Policy) -> None:
    p, tokens = first_token_probabilities(policy, SHORT).sort(descending=True)
    nucleus = set(tokens[: int((p.cumsum(0) < 0.5).sum()) + 1].tolist())
    drawn = {c.token_ids[0] for c in sample(engine, SHORT, group=200, max_tokens=1, top_p=0.5)}
    uncut = {c.token_ids[0] for c in sample(engine, SHORT, group=200, max_tokens=1)}
    assert 1 < len(nucleus) < 20
    assert drawn == nucleus
    assert uncut > nucleus


@pytest.mark.parametrize(
    "name",
    [
        "hf",
        *(
            pytest.param(
                name,
                marks=[*SLOW[:count], pytest.mark.xfail(reason="vLLM's processed log-probs are renormalized over the nucleus")],
            )
            for name, count in (("vllm", 1), ("vllm-process", 2), ("vllm-server", 2))
        ),
    ],
)
def test_logprobs_under_a_nucleus_cut_are_those_before_the_cut(pool: EnginePool, policy: Policy, name: str) -> None:
    engine = pool(name)
    sync(engine, policy, 0)
    assert gap(policy, SHORT, sample(engine, SHORT, max_tokens=4, top_p=0.5)).abs().max() < 1e-4


# --- the learner's current weights ------------------------------------------------------------------------------------


def test_greedy_output_follows_the_weights_there_and_back(engine: RolloutEngine, policy: Policy) -> None:
    original = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    before = greedy(engine)
    for parameter in policy.parameters():
        shake(parameter)
    sync(engine, policy, 1)
    changed = greedy(engine)
    assert changed.token_ids != before.token_ids
    assert gap(policy, LONG, [changed]).abs().max() < 1e-4
    policy.load_state_dict(original)
    sync(engine, policy, 2)
    after = greedy(engine)
    assert after.token_ids == before.token_ids
    assert after.logprobs == pytest.approx(before.logprobs, abs=1e-5)


def test_a_change_of_the_embedding_alone_reaches_the_tied_head(engine: RolloutEngine, policy: Policy) -> None:
    assert policy.lm.get_output_embeddings().weight is policy.lm.get_input_embeddings().weight
    embedding = policy.lm.get_input_embeddings().weight
    unused = [i for i in range(len(embedding)) if i not in SHORT]
    with torch.no_grad():
        embedding[unused] *= 1.5  # rows that the prompt does not read: the first token changes through the head alone
    sync(engine, policy, 1)
    completions = sample(engine, SHORT)
    assert gap(policy, SHORT, completions).abs().max() < 1e-4


def test_no_key_or_value_of_old_weights_survives_a_sync(engine: RolloutEngine, policy: Policy) -> None:
    sample(engine, LONG)  # fills any prefix cache
    for name, parameter in policy.named_parameters():
        if "layers.0." in name:  # changes every key and value above it
            shake(parameter)
    sync(engine, policy, 1)
    assert gap(policy, LONG, sample(engine, LONG)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ENGINES)
def test_adapters_reach_the_engine_merged(pool: EnginePool, model_folder: Path, name: str) -> None:
    pytest.importorskip("peft")
    policy = PolicyConfig(model=str(model_folder), lora=LoRA(rank=4, alpha=8.0)).build()
    engine = pool(name)
    sync(engine, policy, 0)
    plain = greedy(engine)
    for key, parameter in policy.named_parameters():
        if "lora_B" in key:
            shake(parameter)
    sync(engine, policy, 1)
    assert greedy(engine).token_ids != plain.token_ids
    assert gap(policy, LONG, sample(engine)).abs().max() < 1e-4


def test_the_version_is_the_label_of_the_last_sync(engine: RolloutEngine, policy: Policy) -> None:
    assert engine.version == 0
    sync(engine, policy, 7)
    assert engine.version == 7


@pytest.mark.parametrize("name", ENGINES)
def test_the_checksum_is_that_of_the_weights_and_of_no_others(pool: EnginePool, policy: Policy, name: str) -> None:
    engine, weights = pool(name), PolicyWeights(policy, torch.float32)
    checksums = []
    for version in range(2):
        sent = Sent(weights, torch.float32)
        for _ in sent:
            pass
        sync(engine, policy, version)
        assert engine.checksum == (None if name == "hf" else sent.checksum)
        checksums.append(sent.checksum)
        with torch.no_grad():
            policy.lm.get_input_embeddings().weight[50, 3] += 1
    assert checksums[0] != checksums[1]


@pytest.mark.parametrize("name", SERVERS)
def test_weights_that_the_server_did_not_get_from_this_sync_are_refused(pool: EnginePool, policy: Policy, name: str) -> None:
    engine = pool(name)
    assert isinstance(engine, VLLMServerEngine)
    sync(engine, policy, 3)
    before = greedy(engine)
    assert engine._client is not None
    engine._client.call_all("/update_weight_version", {"new_version": "4-0123456789abcdef"}, timeout=10)
    with pytest.raises(StaleEngineError, match="'4-0123456789abcdef' and not '3-"):
        greedy(engine)
    assert engine.version is None
    sync(engine, policy, 3)
    assert greedy(engine) == before


def test_the_documented_commands_are_what_an_own_server_gets() -> None:
    for number, on_gpu in ((0, False), (1, True)):
        variables, words = documented_command(number)
        length = words[words.index("--max-model-len") + 1]
        ours = server_command("MODEL", dtype="bfloat16", window=int(length), max_num_seqs=256, on_gpu=on_gpu)
        places = {"--host", "127.0.0.1", "--port", "8000"}
        devices = {"--gpu-memory-utilization", "0.9", "--weight-transfer-config", '{"backend": "nccl"}'}
        caches = {"--kv-cache-memory-bytes", str(2**30)}
        assert set(words[1:]) - set(ours) == places | (devices if on_gpu else caches)
        assert set(ours[1:]) <= set(words)
        assert server_environment(on_gpu=on_gpu).items() <= variables.items()


@pytest.mark.parametrize("name", CLASSES)
def test_generate_before_the_first_sync_is_refused(name: str) -> None:
    engine = CLASSES[name]()
    assert engine.version is None
    with pytest.raises(RuntimeError, match=r"holds no weights: call sync\(\)"):
        sample(engine)


def test_an_engine_works_after_sleep_or_says_that_it_holds_no_weights(engine: RolloutEngine, policy: Policy) -> None:
    before = greedy(engine)
    engine.sleep()
    engine.sleep()
    if engine.version is None:
        sync(engine, policy, 0)
    assert greedy(engine).token_ids == before.token_ids


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_rollouts_of_one_prompt_all_differ(engine: RolloutEngine) -> None:
    assert len({c.token_ids for c in sample(engine, group=32)}) == 32


def test_a_seed_gives_the_same_completion_in_any_batch(engine: RolloutEngine) -> None:
    first = sample(engine, group=32)
    assert [c.token_ids for c in sample(engine, group=32)] == [c.token_ids for c in first]
    own, other = seeds(32), seeds(8, step=1)
    mixed = engine.generate(
        [SHORT, LONG], Sampling(rollouts_per_problem=8, temperature=1.0, max_tokens=16), [other, own[20:28][::-1]]
    )
    assert [c.token_ids for c in mixed[1]] == [c.token_ids for c in first[20:28][::-1]]
    for again, once in zip(mixed[1], first[20:28][::-1], strict=True):
        assert again.logprobs == pytest.approx(once.logprobs, abs=1e-5)


def test_another_seed_gives_another_completion(engine: RolloutEngine) -> None:
    sampling = Sampling(rollouts_per_problem=8, temperature=1.0, max_tokens=16)
    one, two = (engine.generate([LONG], sampling, [seeds(8, step)])[0] for step in (0, 1))
    assert not {c.token_ids for c in one} & {c.token_ids for c in two}


def test_prompts_of_different_lengths_do_not_disturb_each_other(engine: RolloutEngine) -> None:
    prompts = [SHORT, LONG, SHORT[:1], LONG[:33]]
    together = engine.generate(prompts, Sampling(rollouts_per_problem=1, temperature=0.0, max_tokens=24), [[0]] * 4)
    for prompt, completions in zip(prompts, together, strict=True):
        alone = greedy(engine, prompt)
        assert completions[0].token_ids == alone.token_ids
        assert completions[0].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


# --- where a completion ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [0, SECOND_EOS])
def test_a_stopped_completion_ends_with_its_end_of_sequence_token(engine: RolloutEngine, policy: Policy, eos: int) -> None:
    embedding = policy.lm.get_output_embeddings().weight
    with torch.no_grad():
        # A twin of the likeliest first token, so that about every tenth token ends its completion.
        embedding[eos] = embedding[first_token_probabilities(policy, SHORT).argmax()]
    sync(engine, policy, 1)
    completions = sample(engine, SHORT, group=64, max_tokens=12)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert eos in {c.token_ids[-1] for c in completions}
    assert len({len(c.token_ids) for c in completions}) > 3
    for c in completions:
        assert (c.finish_reason == "stop") == (c.token_ids[-1] in (0, SECOND_EOS))
        assert not {0, SECOND_EOS} & set(c.token_ids[:-1])
        assert len(c.token_ids) == len(c.logprobs)
        assert len(c.token_ids) == 12 if c.finish_reason == "length" else len(c.token_ids) <= 12
    assert gap(policy, SHORT, completions).abs().max() < 1e-4  # the decision to stop has a log-prob like any other


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_no_completion_is_longer_than_max_tokens(engine: RolloutEngine, max_tokens: int) -> None:
    completions = sample(engine, max_tokens=max_tokens)
    cut = [c for c in completions if c.finish_reason == "length"]
    assert cut
    assert all(len(c.token_ids) == max_tokens for c in cut)
    assert all(len(c.token_ids) <= max_tokens for c in completions)


def test_text_is_the_tokens_without_special_ones(engine: RolloutEngine, policy: Policy) -> None:
    embedding = policy.lm.get_output_embeddings().weight
    with torch.no_grad():
        for special in (0, 1):  # <eos> and <unk>
            embedding[special] = embedding[first_token_probabilities(policy, SHORT).argmax()]
    sync(engine, policy, 1)
    characters = {i: c for c, i in policy.tokenizer.get_vocab().items() if i not in (0, 1)}
    completions = sample(engine, SHORT, group=32)
    assert {0, 1} <= {t for c in completions for t in c.token_ids}
    assert all(c.text == "".join(characters.get(t, "") for t in c.token_ids) for c in completions)


# --- one engine at a time ---------------------------------------------------------------------------------------------


def test_hf_rows_per_call_do_not_change_the_completions(policy: Policy) -> None:
    narrow, wide = HFEngine(batch_size=3), HFEngine(batch_size=64)
    sync(narrow, policy, 0)
    sync(wide, policy, 0)
    assert [c.token_ids for c in sample(narrow)] == [c.token_ids for c in sample(wide)]


def test_a_private_copy_is_not_touched_by_updates_before_the_next_sync(pool: EnginePool, policy: Policy) -> None:
    engine = pool("hf-copy")
    sync(engine, policy, 0)
    before = greedy(engine)
    for parameter in policy.parameters():
        shake(parameter)
    assert greedy(engine) == before


@pytest.mark.parametrize("training", [True, False])
def test_hf_leaves_the_learners_mode_and_gradients_alone(model_folder: Path, training: bool) -> None:
    policy = PolicyConfig(model=str(model_folder), gradient_checkpointing=training).build()
    engine = HFEngine()
    sync(engine, policy, 0)
    completions = sample(engine)
    assert policy.lm.training == training
    assert all(p.requires_grad and p.grad is None for p in policy.parameters())
    assert gap(policy, LONG, completions).abs().max() < 1e-4


@pytest.mark.parametrize("name", [pytest.param("vllm", marks=pytest.mark.vllm), *SERVERS])
def test_vllm_says_that_it_was_started_for_fewer_tokens(pool: EnginePool, policy: Policy, name: str) -> None:
    engine = pool(name)
    sync(engine, policy, 0)
    with pytest.raises(ConfigError, match=f"started for {WINDOW} tokens and cannot serve {WINDOW + 1}"):
        engine.sync(PolicyWeights(policy, torch.float32), 1, window=WINDOW + 1)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: HFEngine(batch_size=0), "batch_size is 0"),
        (lambda: VLLMEngine(gpu_memory_utilization=1.5), "gpu_memory_utilization is 1.5"),
        (lambda: VLLMEngine(kv_cache_gib=0), "kv_cache_gib is 0"),
        (lambda: VLLMEngine(max_num_seqs=0), "max_num_seqs is 0"),
        (lambda: VLLMServerEngine(gpu_memory_utilization=0), "gpu_memory_utilization is 0"),
        (lambda: VLLMServerEngine(kv_cache_gib=-1), "kv_cache_gib is -1"),
        (lambda: VLLMServerEngine(max_num_seqs=0), "max_num_seqs is 0"),
        (lambda: VLLMServerEngine(start_timeout=0), "start_timeout is 0"),
        (lambda: VLLMServerEngine(sync_timeout=-1), "sync_timeout is -1"),
        (lambda: VLLMServerEngine(request_timeout=0), "request_timeout is 0"),
        (lambda: Sampling(rollouts_per_problem=0), "rollouts_per_problem is 0"),
        (lambda: Sampling(temperature=-0.1), "temperature is -0.1"),
        (lambda: Sampling(max_tokens=0), "max_tokens is 0"),
        (lambda: Sampling(top_p=0.0), "top_p is 0.0"),
        (lambda: Sampling(top_p=1.1), "top_p is 1.1"),
    ],
)
def test_impossible_settings_are_refused_at_construction(make: Callable[[], object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: set it"):
        make()


# --- bfloat16, last: the float32 vLLM makes room for this one ---------------------------------------------------------


@pytest.mark.parametrize("name", STARTED)
def test_bfloat16_engines_are_not_biased_against_a_bfloat16_learner(pool: EnginePool, policy: Policy, name: str) -> None:
    engine = pool(name, "bfloat16")
    sync(engine, policy, 0, torch.bfloat16)
    completions = sample(engine, LONG, group=256, temperature=0.8, max_tokens=24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        difference = gap(policy, LONG, completions, 0.8)
    assert len(difference) > 2000
    assert difference.mean().abs() < 0.01
    assert difference.abs().mean() < 0.1
    assert gap(policy, LONG, completions, 0.8).abs().mean() > 1e-3  # a float32 learner: so the engine was bfloat16


@pytest.mark.parametrize("name", STARTED)
def test_close_twice_leaves_an_engine_without_weights(pool: EnginePool, policy: Policy, name: str) -> None:
    engine = pool(name, "bfloat16")
    sync(engine, policy, 0, torch.bfloat16)
    engine.close()
    engine.close()
    assert engine.version is None
    with pytest.raises(RuntimeError, match="holds no weights"):
        sample(engine)


# --- time and memory of a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates_per_step", [1, 2])
def test_the_parts_of_a_step_add_up_to_it_without_the_evaluation_between_steps(
    tiny_model: Path, tmp_path: Path, updates_per_step: int
):
    command = [
        *("fit", "--model.policy.model", str(tiny_model), "--model.updates_per_step", str(updates_per_step)),
        *("--data", "SingleExampleDataModule", "--data.question", "3 + 4", "--data.answer", "7"),
        *("--data.problems_per_step", "2", "--data.evals", "{sums: builtin:addition_1digit}"),
        *("--rollout.engine", "rlvr_lightning.engines.hf.HFEngine"),
        *("--rollout.sampling.max_tokens", "8", "--rollout.eval_sampling.max_tokens", "48"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", str(4 * updates_per_step)),
        *("--trainer.val_check_interval", "1", "--trainer.default_root_dir", str(tmp_path)),
    ]
    subprocess.run([sys.executable, "-m", "rlvr_lightning", *command], check=True, stdout=subprocess.DEVNULL)
    lines = list(read_jsonl(tmp_path / "metrics.jsonl"))
    rows = [row for row in lines if "time/step_s" in row]
    assert len(rows) == 4
    for step, evaluation, following in zip(lines[1::2], lines[2::2], lines[3::2], strict=False):
        evaluation_s, following_s = evaluation["time"] - step["time"], following["time"] - evaluation["time"]
        assert following["time/step_s"] < following_s + evaluation_s / 2
    for row in rows:
        parts = {key: value for key, value in row.items() if key.startswith("time/") and key != "time/step_s"}
        assert row["time/wait_s"] == 0
        assert ("time/old_s" in parts) == (updates_per_step > 1)
        assert 0 <= row["time/step_s"] - sum(parts.values()) <= max(0.02 * row["time/step_s"], 0.02), parts
        assert 0 < row["memory/rss_gib"] <= row["memory/peak_gib"]
    assert rows[0]["memory/peak_gib"] <= rows[-1]["memory/peak_gib"] < psutil.virtual_memory().total / 2**30

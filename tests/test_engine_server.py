"""What goes wrong with vLLM servers: killed, stopped, started again, never up; learners that are killed, and several of them.

Every test with a server starts real processes. The contract of the engine itself is in test_engines.py.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lightning.engines import (
    EngineDiedError,
    RolloutEngine,
    Sampling,
    Sent,
    StaleEngineError,
    check_arrival,
    checksum_of,
    sum_of_bits,
)
from rlvr_lightning.engines.hf import HFEngine
from rlvr_lightning.engines.process import OwnServer
from rlvr_lightning.engines.server import VLLMServerEngine
from rlvr_lightning.engines.transfer import together, write_folder
from rlvr_lightning.errors import ConfigError
from rlvr_lightning.policy import Policy, PolicyConfig, PolicyWeights
from test_engines import LONG, SHORT, WINDOW, RunningServer, seeds, shake, sync

MANY = Sampling(rollouts_per_problem=32, temperature=1.0, max_tokens=80)
vllm = pytest.mark.vllm
slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(1800)  # a server takes 20 s to start, and several minutes where others use the same core


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def group_of(server: OwnServer) -> list[int]:
    return [p.pid for p in psutil.process_iter() if os.getpgid(p.pid) == server._supervisor.pid]


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def processes(engine: VLLMServerEngine) -> list[int]:
    """The own server's processes: supervisor, server, and what the server started."""
    assert engine._server is not None
    return engine._server.pids


def process_named(engine: VLLMServerEngine, what: str) -> int:
    return next(pid for pid in processes(engine)[1:] if what in " ".join(psutil.Process(pid).cmdline()))


def interrupted(engine: VLLMServerEngine, do: Callable[[], object]) -> tuple[EngineDiedError, float]:
    """Generate, do something after the first completion, and return the error and the seconds until it came."""
    done: list[float] = []

    def once(_: int, __: object) -> None:
        if not done:
            do()
            done.append(time.monotonic())

    with pytest.raises(EngineDiedError) as error:
        engine.generate([LONG, SHORT], MANY, [seeds(32), seeds(32, 1)], once)
    return error.value, time.monotonic() - done[0]


def tokens(engine: RolloutEngine) -> list[tuple[int, ...]]:
    return [c.token_ids for row in engine.generate([LONG, SHORT], MANY, [seeds(32), seeds(32, 1)]) for c in row]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return PolicyConfig(model=str(tiny_model)).build()


def belongings(pids: Sequence[int]) -> set[Path]:
    """Return the private folder of an own server's processes and the shared memory that they have open."""
    supervisor = psutil.Process(pids[0]).cmdline()
    shared = {m.path for pid in pids for m in psutil.Process(pid).memory_maps() if m.path.startswith("/dev/shm/psm_")}
    return {Path(path) for path in shared} | {Path(supervisor[supervisor.index(str(psutil.Process(pids[0]).ppid())) + 1])}


def are_gone(paths: set[Path]) -> bool:
    return not any(path.exists() for path in paths)


# --- bits --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), st.integers(1, 9))
def test_the_sum_of_bits_adds_up_over_joined_tensors_and_sees_a_changed_bit(seed: int, dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randint(-99, 99, (rows + 2, 8), generator=generator).to(dtype)
    assert (sum_of_bits(both[:rows]) + sum_of_bits(both[rows:])) % 2**64 == sum_of_bits(both)
    assert sum_of_bits(torch.cat([both, torch.zeros(3, 8, dtype=dtype)])) == sum_of_bits(both)
    assert sum_of_bits(both.T.contiguous().T) == sum_of_bits(both)
    memory = both.clone().view(torch.uint8)
    memory[int(torch.randint(rows, (1,), generator=generator)), 3] ^= 16
    assert sum_of_bits(memory) != sum_of_bits(both)


def test_the_sum_of_bits_takes_any_length_and_place() -> None:
    memory = torch.arange(100, dtype=torch.uint8)
    for start in range(9):
        for length in range(20):
            part = memory[start : start + length]
            whole = length // 8 * 8
            expected = int.from_bytes(b"", "little")
            for i in range(0, whole, 8):
                expected += int.from_bytes(bytes(part[i : i + 8].tolist()), "little", signed=True)
            assert sum_of_bits(part) == (expected + sum(part[whole:].tolist())) % 2**64


def test_a_checksum_depends_on_names_and_not_on_their_order() -> None:
    assert checksum_of({"a": 1, "b": 2}) == checksum_of({"b": 2, "a": 1})
    assert len({checksum_of(s) for s in ({"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1}, {"a": 1, "c": 2})}) == 4


def test_arrival_is_compared_by_name_joined_or_in_shares() -> None:
    sent, joined = {"l.q.w": 5, "l.k.w": 2**64 - 1, "n.w": 7}, {"qk": ["q", "k"]}
    check_arrival(sent, [{"l.qk.w": 4, "n.w": 7}], joined)
    check_arrival(sent, [{"l.qk.w": 1, "n.w": 7}, {"l.qk.w": 3, "n.w": 7}], joined)  # one split, one on both workers
    for held in ([{"l.qk.w": 5, "n.w": 7}], [{"l.qk.w": 4, "n.w": 8}], [{"n.w": 7}, {"n.w": 6}]):
        with pytest.raises(RuntimeError, match="the weights did not arrive: 1 of"):
            check_arrival(sent, held, joined)
    with pytest.warns(UserWarning, match="was not verified"):
        check_arrival(sent, [{"other": 3}], joined)


# --- files -------------------------------------------------------------------------------------------------------------


def test_a_folder_has_its_name_only_when_it_is_complete_and_the_rest_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr("rlvr_lightning.engines.transfer.FILE_BYTES", 100)
    tensors = {f"t{i}": torch.full((3, 5), float(i)) for i in range(7)}

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            assert not [f for f in tmp_path.iterdir() if not f.name.endswith(".partial")]
            yield name, tensor

    folder = write_folder(watched(), tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    files = sorted(folder.iterdir())
    assert len(files) == 4
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)

    taken: list[int] = []

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(4):
            taken.append(i)
            yield "the same name", torch.zeros(20) if i else torch.zeros(20).to("meta")

    with pytest.raises((NotImplementedError, RuntimeError)):
        write_folder(broken(), tmp_path)
    assert taken == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == [folder]


# --- before anything is started ------------------------------------------------------------------------------------------


def test_keys_without_effect_are_refused(tmp_path: Path) -> None:
    url = ["http://127.0.0.1:9"]
    for engine, message in (
        (VLLMServerEngine(urls=url, kv_cache_gib=1), "kv_cache_gib has no effect on servers that run already"),
        (VLLMServerEngine(urls=url, max_num_seqs=8), "max_num_seqs has no effect on servers"),
        (VLLMServerEngine(sleep=False), "sleep has no effect on a CPU"),
        (VLLMServerEngine(transport="ipc"), "transport is ipc and there is no GPU: set it to files"),
        (VLLMServerEngine(transport="nccl", urls=url), "transport is nccl and there is no GPU"),
        (VLLMServerEngine(folder=str(tmp_path / "nowhere")), "folder is .*nowhere: make it a folder"),
        (VLLMServerEngine(urls=["localhost:8000"]), "urls holds 'localhost:8000': write http://HOST:PORT"),
        (VLLMServerEngine(urls=["http://10.0.0.7:8000"]), "set rollout.engine.folder to a folder that both see"),
    ):
        if torch.cuda.is_available() and "GPU" in message + " CPU":
            continue
        with pytest.raises(ConfigError, match=message):
            engine.check()
    with pytest.raises(ConfigError, match="urls is empty"):
        VLLMServerEngine(urls=[])


def test_a_server_that_is_not_there_is_reported_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ConfigError, match=f"urls: the server at {url} is gone"):
            VLLMServerEngine(urls=[url]).check()
    assert time.monotonic() - started < 8


def test_a_server_that_accepts_and_never_answers_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"did not answer /health within 5\.0 s"):
            VLLMServerEngine(urls=[url]).check()


def test_what_an_engine_in_this_process_does_at_restart_is_to_close(policy: Policy) -> None:
    engine = HFEngine()
    sync(engine, policy, 0)
    engine.restart()
    assert engine.version is None
    sync(engine, policy, 0)
    assert len(tokens(engine)) == 64


# --- an own server -------------------------------------------------------------------------------------------------------


class KillingWeights(PolicyWeights):
    """Weights in whose middle something happens."""

    def __init__(self, policy: Policy, do: Callable[[], object]) -> None:
        super().__init__(policy, torch.float32)
        object.__setattr__(self, "do", do)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for i, pair in enumerate(super().tensors()):
            if i == 5:
                self.do()  # type: ignore[attr-defined]
            yield pair


@slow
@vllm
def test_an_own_server_that_is_killed_is_started_again_and_samples_the_same(policy: Policy) -> None:
    engine = VLLMServerEngine(request_timeout=120)
    try:
        sync(engine, policy, 0)
        before = tokens(engine)
        for victim, step in (("api_server", "generate"), ("VLLM::EngineCore", "generate"), ("VLLM::EngineCore", "sync")):
            pids = processes(engine)
            paths = belongings(pids)
            assert paths
            kill = lambda victim=victim: os.kill(process_named(engine, victim), signal.SIGKILL)  # noqa: E731
            if step == "generate":
                error, seconds = interrupted(engine, kill)
                assert seconds < 30
                assert "its log ends:" in str(error)
            else:
                with pytest.raises((EngineDiedError, RuntimeError)):
                    engine.sync(KillingWeights(policy, kill), 1, window=WINDOW)
            assert engine.version is None
            with pytest.raises(RuntimeError, match="holds no weights"):
                tokens(engine)
            engine.restart()
            assert engine.version is None
            assert not any(is_alive(pid) for pid in pids)
            assert are_gone(paths), paths
            sync(engine, policy, 1)
            assert tokens(engine) == before
        pids, paths = processes(engine), belongings(processes(engine))
        assert len(pids) >= 3  # supervisor, server, engine core
    finally:
        engine.close()
    assert not any(is_alive(pid) for pid in pids)
    assert are_gone(paths), paths
    engine.close()


LEARNER = """
import sys, torch
from rlvr_lightning.engines.server import VLLMServerEngine
from rlvr_lightning.policy import PolicyConfig, PolicyWeights

engine = VLLMServerEngine()
engine.sync(PolicyWeights(PolicyConfig(model=sys.argv[1]).build(), torch.float32), 0, window=160)
print(*engine._server.pids, flush=True)
sys.stdin.read()
"""


@slow
@vllm
@pytest.mark.multiprocess
def test_no_process_and_no_file_stays_of_a_learner_that_is_killed(tiny_model: Path) -> None:
    learner = subprocess.Popen(
        [sys.executable, "-c", LEARNER, str(tiny_model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert learner.stdout is not None
    pids = [int(pid) for pid in learner.stdout.readline().split()]
    assert len(pids) >= 3  # supervisor, server, engine core
    assert all(is_alive(pid) for pid in pids)
    paths = belongings(pids)
    assert paths
    learner.kill()
    learner.wait()
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids))
    assert are_gone(paths), paths


@slow
@vllm
def test_a_server_that_does_not_come_up_shows_its_log(policy: Policy) -> None:

    class Elsewhere(PolicyWeights):
        @property
        def model_path(self) -> str:
            return "/no/such/model"

    engine = VLLMServerEngine(kv_cache_gib=0.01)
    with pytest.raises(EngineDiedError, match=r"(?s)vLLM ended before it was up; its log ends:\n.*/no/such/model"):
        engine.sync(Elsewhere(policy, torch.float32), 0, window=WINDOW)
    assert engine.version is None
    hasty = VLLMServerEngine(start_timeout=1)
    with pytest.raises(EngineDiedError, match=r"(?s)was not up within start_timeout, 1 s: .*; its log ends:"):
        sync(hasty, policy, 0)


def test_a_supervised_command_ends_with_all_it_started_and_with_its_output_kept() -> None:
    script = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print('said', sys.argv[1:]); input()"
    server = OwnServer([sys.executable, "-c", script], {})
    assert wait_until(lambda: not server.alive)  # its input is empty, so it fails at once
    assert "EOFError" in server.log_tail()
    assert f"said ['--uds', '{server.socket}']" in server.log_tail()
    assert not [p for p in group_of(server) if is_alive(p)]
    server.stop()
    assert not server.folder.exists()
    assert server.pids == []
    server.stop()


def test_a_server_whose_supervisor_is_killed_still_ends_at_stop() -> None:
    server = OwnServer([sys.executable, "-c", "import time; time.sleep(60)"], {})
    assert wait_until(lambda: len(server.pids) == 2)
    supervisor, child = server.pids
    os.kill(supervisor, signal.SIGKILL)
    assert wait_until(lambda: not server.alive)
    assert is_alive(child)
    server.stop()
    assert wait_until(lambda: not is_alive(child))


# --- servers that run already -----------------------------------------------------------------------------------------------


@slow
@vllm
def test_a_given_server_that_stalls_or_serves_another_run_or_is_started_again_is_noticed(
    tiny_model: Path, policy: Policy, tmp_path: Path
) -> None:
    server = RunningServer(tiny_model, tmp_path / "log").wait()
    engine = VLLMServerEngine(urls=[server.url], request_timeout=3)
    again: RunningServer | None = None
    try:
        engine.check()
        sync(engine, policy, 0)
        before = tokens(engine)

        core = next(p.pid for p in psutil.Process(server.process.pid).children() if "EngineCore" in "".join(p.cmdline()))
        error, seconds = interrupted(engine, lambda: os.kill(core, signal.SIGSTOP))
        os.kill(core, signal.SIGCONT)
        assert 3 <= seconds < 10
        assert re.match(rf"no request was finished for 3 s and \d+ are missing: \d+ at {server.url}", str(error))
        engine.restart()
        sync(engine, policy, 0)
        assert tokens(engine) == before

        other = VLLMServerEngine(urls=[server.url])
        changed = PolicyConfig(model=str(tiny_model)).build()
        for parameter in changed.parameters():
            shake(parameter)
        sync(other, changed, 0)
        with pytest.raises(StaleEngineError, match="those of the last sync: it was started again, or another run uses it"):
            tokens(engine)
        other.close()
        sync(engine, policy, 0)

        for bad, message in (
            (VLLMServerEngine(urls=[server.url], dtype="bfloat16"), r"--dtype bfloat16 \(now float32"),
            (VLLMServerEngine(urls=[server.url]), r"--max-model-len 4096 \(now 160\)"),
        ):
            with pytest.raises(ConfigError, match=message):
                bad.sync(PolicyWeights(policy, torch.float32), 0, window=WINDOW if "dtype" in message else 4096)
            assert bad.version is None

        server.kill()
        with pytest.raises(EngineDiedError, match=f"the server at {server.url} is gone"):
            tokens(engine)
        again = RunningServer(tiny_model, tmp_path / "log2", port=server.port)
        engine.restart()  # waits for it
        assert engine.version is None
        sync(engine, policy, 1)
        assert tokens(engine) == before

        connected = engine._client
        assert connected is not None
        connected.call_all("/update_weight_version", {"new_version": "default"}, timeout=10)  # as after an unseen restart
        with pytest.raises(StaleEngineError, match="holds weights 'default'"):
            tokens(engine)
    finally:
        engine.close()
        server.kill()
        if again is not None:
            again.kill()


# --- several learner processes ----------------------------------------------------------------------------------------------


@dataclass
class Learner:
    """One of two processes; the second has nothing to say about the weights of a given server."""

    model: str
    urls: list[str] | None
    port: int
    out: str

    def __call__(self, rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        torch.distributed.init_process_group("gloo")
        policy = PolicyConfig(model=self.model).build()
        passes: list[int] = []
        weights = KillingWeights(policy, lambda: passes.append(1))
        engine = VLLMServerEngine(urls=self.urls)
        try:
            engine.check()
            engine.sync(weights, 0, window=WINDOW)
            first = tokens(engine)
            shake(policy.lm.get_input_embeddings().weight)
            torch.distributed.barrier()
            engine.sync(weights, 1, window=WINDOW)
            result = {"first": first, "second": tokens(engine), "checksum": engine.checksum, "passes": len(passes)}
            torch.save(result, f"{self.out}/{rank}.pt")
            with pytest.raises(RuntimeError, match="only rank 1 fails"):
                together(lambda: (_ for _ in ()).throw(RuntimeError("only rank 1 fails")) if rank else None)
        finally:
            torch.distributed.barrier()
            engine.close()
            torch.distributed.destroy_process_group()


@slow
@vllm
@pytest.mark.multiprocess
@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
def test_two_learner_processes_sample_the_same_from_own_servers_or_a_given_one(
    tiny_model: Path, policy: Policy, tmp_path: Path, given: bool
) -> None:
    server = RunningServer(tiny_model, tmp_path / "log").wait() if given else None
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        urls = None if server is None else [server.url]
        mp.spawn(Learner(str(tiny_model), urls, port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    finally:
        if server is not None:
            server.kill()
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one == two
    assert one["passes"] == 2  # every rank goes through the weights at each sync: they may be collective
    assert one["first"] != one["second"]
    sent = Sent(PolicyWeights(policy, torch.float32), torch.float32)
    for _ in sent:
        pass
    assert one["checksum"] != sent.checksum


# --- GPU --------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@slow
@vllm
@pytest.mark.skipif(not torch.cuda.is_available(), reason="weights travel by CUDA IPC: needs a GPU")
def test_weights_travel_by_ipc_to_an_own_server_and_back(tiny_model: Path) -> None:
    policy = PolicyConfig(model=str(tiny_model)).build().to("cuda")
    engine = VLLMServerEngine(transport="ipc", gpu_memory_utilization=0.2)
    try:
        engine.check()
        follows_the_weights(engine, policy)
        engine.sleep()
        assert engine.version is None
        follows_the_weights(engine, policy)
    finally:
        engine.close()


@pytest.mark.gpu
@slow
@vllm
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="weights travel by NCCL from one GPU to another: needs two")
def test_weights_travel_by_nccl_to_given_servers(tiny_model: Path) -> None:
    urls = os.environ.get("RLVR_TEST_SERVERS", "").split()
    if not urls:
        pytest.skip("start servers with the GPU command of docs/engines.md and name them in RLVR_TEST_SERVERS")
    policy = PolicyConfig(model=str(tiny_model)).build().to("cuda")
    engine = VLLMServerEngine(urls=urls, transport="nccl")
    try:
        engine.check()
        follows_the_weights(engine, policy)
    finally:
        engine.close()


def follows_the_weights(engine: VLLMServerEngine, policy: Policy) -> None:
    original = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    outputs = []
    for version, change in enumerate((False, True, False)):
        policy.load_state_dict(original)
        if change:
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        engine.sync(PolicyWeights(policy, torch.bfloat16), version, window=WINDOW)
        greedy = Sampling(rollouts_per_problem=1, temperature=0.0, max_tokens=24)
        outputs.append(engine.generate([LONG], greedy, [[0]])[0][0].token_ids)
    assert outputs[0] == outputs[2] != outputs[1]


@pytest.mark.parametrize(
    ("silence", "message"), [(1, "5 are missing: 2 at http"), (600, "closed")], ids=["silent", "closed meanwhile"]
)
def test_who_waits_for_a_server_that_says_nothing_is_told(silence: float, message: str) -> None:
    from rlvr_lightning.engines.client import Client

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        client = Client([f"http://127.0.0.1:{deaf.getsockname()[1]}"], connections=2)
        errors: list[Exception] = []

        def ask() -> None:
            try:
                list(client.answers("/x", [{}] * 5, silence=silence))
            except EngineDiedError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(3)
        client.close()
        client.close()
        thread.join(10)
        assert message in str(errors[0])
        with pytest.raises(EngineDiedError, match="closed"):
            client.call(0, "/x", timeout=600)

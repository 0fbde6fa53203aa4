"""A vLLM server as the learner needs it: its command line, what is checked of it, and its life as a process of one's own."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from rlvr_lightning.engines import ReplyError
from rlvr_lightning.errors import ConfigError

if TYPE_CHECKING:
    from rlvr_lightning.engines.client import Client

SUPERVISOR = Path(__file__).with_name("supervise.py")
MAX_NUM_SEQS = 256
LOG_LINES = 40
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells a learner about its place; a server among them would take it for its own."""


def server_command(
    model: str, *, dtype: str, window: int, max_num_seqs: int, on_gpu: bool, extra: Sequence[str] = ()
) -> list[str]:
    """Return the command that serves a model as :class:`~rlvr_lightning.engines.server.VLLMServerEngine` expects.

    Args:
        model: folder or hub id.
        dtype: of weights and activations.
        window: most tokens of a sequence, prompt and completion.
        max_num_seqs: most sequences decoded at the same time.
        on_gpu: on a GPU; else on a CPU.
        extra: more options, such as the address and the size of the cache.
    """
    options = [
        *("--model", model, "--dtype", dtype, "--max-model-len", str(window), "--max-num-seqs", str(max_num_seqs)),
        *("--worker-extension-cls", "rlvr_lightning.engines.worker.WeightReceiver"),
        *("--logprobs-mode", "processed_logprobs"),  # at the sampling temperature
        *("--generation-config", "vllm"),  # nothing hidden in the model's own generation config
        *("--load-format", "dummy" if on_gpu else "empty"),  # the real weights always come from the learner
        *("--skip-tokenizer-init", "--enable-scale-out"),  # token ids in, token ids out
        *("--enable-prefix-caching", "--seed", "0", "--max-num-batched-tokens", str(max(8192, window))),
        *("--disable-log-stats", "--disable-uvicorn-access-log"),
    ]
    if not on_gpu:
        # With per-request seeds the CPU build crashes on a prompt that is prefilled in two chunks.
        options += ["--enforce-eager", "--block-size", "32", "--no-enable-chunked-prefill"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options, *extra]


def server_environment(*, on_gpu: bool) -> dict[str, str]:
    """Return the variables that such a server needs beside those of its user."""
    # On a CPU: threads that no core is reserved for, and no worker process of its own, because its queue is polled without a
    # pause, also for a second after the last answer, on cores that the learner needs.
    on_cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return {"VLLM_SERVER_DEV_MODE": "1"} | ({} if on_gpu else on_cpu)


def own_server_start(
    model: str, keys: Mapping[str, Any], *, dtype: str, window: int, cache_bytes: int, ipc: bool
) -> tuple[list[str], dict[str, str]]:
    """Return command and variables of a server on this process's device.

    Args:
        model: folder or hub id.
        keys: those of the engine that only an own server has; None where the user left them out.
        dtype: of weights and activations.
        window: most tokens of a sequence.
        cache_bytes: of the key/value cache (CPU only).
        ipc: weights will come as memory handles.
    """
    on_gpu = torch.cuda.is_available()
    environment, extra = server_environment(on_gpu=on_gpu), ["--kv-cache-memory-bytes", str(cache_bytes)]
    if on_gpu:
        extra = ["--gpu-memory-utilization", str(keys["gpu_memory_utilization"] or 0.45)]
        extra += ["--enable-sleep-mode"] if keys["sleep"] is not False else []
        extra += ["--enforce-eager"] if keys["enforce_eager"] else []
        visible, device = os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.current_device()
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
    if ipc:
        extra += ["--weight-transfer-config", '{"backend": "ipc"}']
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the handles are pickled; the socket is private
    seqs = keys["max_num_seqs"] or MAX_NUM_SEQS
    return server_command(model, dtype=dtype, window=window, max_num_seqs=seqs, on_gpu=on_gpu, extra=extra), environment


def checked_settings(client: "Client", server: int, expected: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    """Return the settings of a running server.

    Args:
        client: the servers.
        server: place of this one.
        expected: ``max_model_len`` at least, ``dtype``, and ``weight_transfer``: a backend, or None for any.
        timeout: seconds for each request.

    Raises:
        ConfigError: if it would not sample what is expected of it; with the options to change.
    """
    address, advice = client.addresses[server], "start it with the command in docs/engines.md"
    try:
        client.call(server, "/weight_info", timeout=timeout)
        reply = client.call(server, "/collective_rpc", {"method": "rlvr_settings"}, timeout=timeout)
    except ReplyError as error:
        missing = "VLLM_SERVER_DEV_MODE=1" if error.status == 404 else "--worker-extension-cls"
        raise ConfigError(f"the server at {address} was started without {missing}: {advice}") from None
    try:
        client.call(server, "/inference/v1/generate", timeout=timeout)
    except ReplyError as error:  # 405 where it exists: it is no GET
        if error.status == 404:
            raise ConfigError(f"the server at {address} was started without --enable-scale-out: {advice}") from None
    settings, window, dtype = reply["results"][0], expected["max_model_len"], expected["dtype"]
    backend = expected["weight_transfer"]
    changes = {
        f"--max-model-len {window} (now {settings['max_model_len']})": settings["max_model_len"] < window,
        f"--dtype {dtype} (now {settings['dtype']}; or set rollout.engine.dtype to that)": settings["dtype"] != dtype,
        "--logprobs-mode processed_logprobs": settings["logprobs_mode"] != "processed_logprobs",
        "--generation-config vllm": settings["generation_config"] != "vllm",
        "--no-enable-chunked-prefill": settings["chunked_prefill_on_cpu"],
        f'--weight-transfer-config {{"backend": "{backend}"}}': backend not in (None, settings["weight_transfer"]),
    }
    if wrong := [change for change, needed in changes.items() if needed]:
        raise ConfigError(f"the server at {address} has to be started with {', '.join(wrong)}")
    return settings


class OwnServer:
    """A server that runs as a child, listens on a Unix socket in a private folder, and ends with this process.

    Args:
        command: from :func:`server_command`; the socket is added.
        environment: variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rlvr-server-"))  # readable by this user alone
        if len(str(self.folder)) > 60:  # a socket's path, vLLM's own included, has at most 107 characters
            self.folder.rmdir()
            self.folder = Path(tempfile.mkdtemp(prefix="rlvr-server-", dir="/tmp"))
        self.socket = self.folder / "http"
        self._log = self.folder / "log"
        private = {"TMPDIR": str(self.folder), "VLLM_RPC_BASE_PATH": str(self.folder)}
        inherited = {k: v for k, v in os.environ.items() if k not in RANKS and not k.startswith("TORCHELASTIC_")}
        inherited.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # set where vLLM runs in this process
        with self._log.open("wb") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, str(SUPERVISOR), str(os.getpid()), str(self.folder), *command, "--uds", str(self.socket)],
                env={**inherited, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1", **environment, **private},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether the server still runs."""
        return self._supervisor.poll() is None

    @property
    def pids(self) -> list[int]:
        """Every process of the server, the supervisor first."""
        try:
            supervisor = psutil.Process(self._supervisor.pid)
            return [supervisor.pid, *(child.pid for child in supervisor.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        if not self._log.is_file():
            return "(no log)"
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def stop(self) -> None:
        """End the server and all that it started, and remove its folder. Idempotent."""
        self._supervisor.terminate()
        try:
            self._supervisor.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        with suppress(ProcessLookupError):  # usually there is none of the group left
            os.killpg(self._supervisor.pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

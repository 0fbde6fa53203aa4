"""Train the quickstart with every engine and print what each reaches and costs.

    python benchmarks/engines.py [CASE...] --seeds 0 --out runs/engines [--json]
    python benchmarks/engines.py apart --steps 10 --repeats 3

Cases are vllm, vllm-process, vllm-server (started here, as docs/engines.md says), lora and overlap. ``apart`` gives the learner
one core and a server the other, and alternates runs without and with ``rollout.overlap``. Seconds are medians over the steps
of a run, without the first two and those that evaluate.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlvr_lightning.engines.process import server_command, server_environment
from rlvr_lightning.models import resolve_model
from rlvr_lightning.plots import read_curves

AHEAD = ["++rollout.overlap=true", "++model.objective.importance_cap=2"]
CASES = {
    "vllm": [],
    "vllm-process": ["rollout=vllm-process"],
    "vllm-server": ["rollout=vllm-server"],
    "lora": ["model=smollm2-lora"],
    "overlap": ["rollout=vllm-process", *AHEAD],
}
SETS = ("addition_1digit", "subtraction_1digit", "addition_2digit")
PARTS = ("step", "generate", "sync", "update")


@contextmanager
def server(core: int | None = None) -> Iterator[str]:
    """Run a vLLM server, on one core if asked; yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = resolve_model("embedded:SmolLM2-135M-Instruct")
    command = server_command(model, dtype="bfloat16", window=1024, max_num_seqs=256, on_gpu=False)
    command += ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", str(2**30)]
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(pinned(command, core), env=os.environ | server_environment(on_gpu=False), stdout=nowhere)
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(url):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    """Return whether a server is ready."""
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


def pinned(command: list[str], core: int | None) -> list[str]:
    """Return a command that runs on one core."""
    return command if core is None else ["env", "OMP_NUM_THREADS=1", "taskset", "-c", str(core), *command]


def train(folder: Path, overrides: list[str], core: int | None = None) -> dict[str, float]:
    """Train once; return last accuracies and median seconds of each part of a step."""
    command = [sys.executable, "-m", "rlvr_lightning", "sweep", "experiment=quickstart", f"hydra.run.dir={folder}", *overrides]
    subprocess.run(pinned(command, core), check=True, stdout=sys.stderr)
    curves = read_curves(folder)
    accuracy = {name: curves.get(f"val/{name}/accuracy", []) for name in SETS}
    found = {name: curve[-1][1] for name, curve in accuracy.items() if curve}
    evaluated = {step for curve in accuracy.values() for step, _ in curve}
    for part in PARTS:
        steps = [
            value for step, value in curves[f"time/{part}_s"] if step > 2 and not {step, step - 1} & evaluated
        ]  # one evaluates, or after one
        found[f"{part}_s"] = statistics.median(steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"apart, or some of {', '.join(CASES)}; default: all of these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3, help="of apart")
    parser.add_argument("--out", type=Path, default=Path("runs/engines"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    steps = [f"trainer.max_steps={args.steps}"]
    runs: list[tuple[str, int, dict[str, float]]] = []
    if args.cases == ["apart"]:
        steps += ["evaluate_first=false", f"trainer.val_check_interval={args.steps}"]
        for repeat in range(args.repeats):
            for case, extra in {"apart": [], "apart, overlap": AHEAD}.items():
                with server(core=1) as url:
                    folder = args.out / f"{case.replace(', ', '-')}-{repeat}"
                    overrides = ["rollout=vllm-server", f"rollout.engine.init_args.urls=[{url}]", *extra, *steps]
                    runs.append((case, repeat, train(folder, overrides, core=0)))
    else:
        for case in args.cases or CASES:
            for seed in args.seeds:
                folder, overrides = args.out / f"{case}-{seed}", [*CASES[case], *steps, f"seed_everything={seed}"]
                if case != "vllm-server":
                    runs.append((case, seed, train(folder, overrides)))
                    continue
                with server() as url:
                    runs.append((case, seed, train(folder, [*overrides, f"rollout.engine.init_args.urls=[{url}]"])))
    if args.json:
        print(json.dumps([{"case": case, "seed or repeat": number, **found} for case, number, found in runs], indent=2))
        return
    print(f"| case | seed or repeat | {' | '.join([*SETS, *(f'{part}, s' for part in PARTS)])} |")
    print("|---" * (2 + len(SETS) + len(PARTS)) + "|")
    for case, number, found in runs:
        cells = [f"{found[name]:.2f}" if name in found else "" for name in (*SETS, *(f"{part}_s" for part in PARTS))]
        print(f"| {case} | {number} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

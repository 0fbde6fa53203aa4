"""The ``rlvr`` command. Imports what a subcommand needs only when it runs, so that ``rlvr --help`` is instant."""

import os
import sys

HELP = """\
rlvr: train a reasoning model with verifiable rewards, from one example up

  rlvr quickstart                 one example, a real LLM, this machine: the whole loop in minutes
  rlvr fit ...                    train                     (`rlvr fit --help` lists every key)
  rlvr validate|test|predict ...  evaluate a model or a checkpoint (--ckpt_path)
  rlvr sweep ...                  compose conf/ with Hydra and train; -m runs every combination
  rlvr compare A B                two evaluated runs, problem by problem: intervals and p-values
  rlvr grade ...                  grade completions that are already in a file (`rlvr grade --help`)
  rlvr problems FILE ...          check data files: every bad row, copies, duplicates (`rlvr problems --help`)
  rlvr rank RUN --out FILE        rank training problems by how their accuracy varied (`rlvr rank --help`)
  rlvr export ...                 a checkpoint's policy as a Hugging Face folder (`rlvr export --help`)
  rlvr doctor [--config ...]      what this machine has, and whether a run fits (`rlvr doctor --help`)

  rlvr fit --model conf/model/smollm2.yaml --data conf/data/three-plus-four.yaml \\
           --rollout conf/rollout/vllm.yaml --trainer conf/trainer/cpu.yaml
  rlvr sweep -m experiment=quickstart model.objective.entropy_coef=0,0.001 trainer.max_steps=3
"""


def main() -> int:
    """Dispatch to a subcommand and turn bad input into one message and exit status 2."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        from rlvr_lightning import __version__

        print(__version__)
        return 0
    from rlvr_lightning.engines import EngineDiedError
    from rlvr_lightning.errors import ConfigError
    from rlvr_lightning.startup import imports

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with imports():
            if args[0] in ("fit", "validate", "test", "predict"):
                from rlvr_lightning.cli import main as run
            elif args[0] == "sweep":
                from rlvr_lightning.sweep import main as run
            elif args[0] == "quickstart":
                from rlvr_lightning.quickstart import main as run
            elif args[0] == "compare":
                from rlvr_lightning.evaluation.compare import main as run
            elif args[0] == "grade":
                from rlvr_lightning.grade import main as run
            elif args[0] == "problems":
                from rlvr_lightning.check import main as run
            elif args[0] == "export":
                from rlvr_lightning.export import main as run
            elif args[0] == "doctor":
                from rlvr_lightning.doctor import main as run
            elif args[0] == "rank":
                from rlvr_lightning.rank import main as run
            else:
                raise ConfigError(
                    f"no command {args[0]!r}: use quickstart, fit, validate, test, predict, sweep, compare, grade, problems, "
                    "rank, export or doctor"
                )
        return run(args)
    except ConfigError as error:
        print(f"rlvr: error: {error}", file=sys.stderr)
        return 2
    except EngineDiedError as error:
        print(f"rlvr: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rlvr: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""``rlvr export``: the policy of a checkpoint as a Hugging Face folder, without training."""

from pathlib import Path

from rlvr_lightning.errors import CommandParser


def main(args: list[str]) -> int:
    """Write the folder (the first word is ``export``); return the exit status."""
    parser = CommandParser(prog="rlvr export", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="run.yaml of the run")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="a file or folder under its checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, for vLLM, transformers and everybody else")
    options = parser.parse_args(args[1:])
    from rlvr_lightning.callbacks.export import export_checkpoint

    export_checkpoint(options.config, options.ckpt_path, options.out)
    print(f"written: {options.out}")
    return 0

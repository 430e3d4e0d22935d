"""`python -m flip_jax.downstream TASK --checkpoint C --data D [--out O] [--field=value ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flip_jax.huge_pages import restart_with_huge_pages
from flip_jax.settings import set_fields

EPILOG = """Fields are those of the task's `Settings`, for example
  attributes --epochs=20 --by=Male,Young
  suite --attributes.epochs=20
What they mean is in flip_jax/downstream/TASK.py and in docs/downstream.md.
Exit status: 0 done, 1 input that cannot be used."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; see `EPILOG`."""
    argv = sys.argv[1:] if argv is None else argv
    args, rest = _parser().parse_known_args(argv)
    command = ["python", "-m", "flip_jax.downstream", *argv]
    try:
        # After the command line is known to be well formed: importing JAX takes seconds.
        if args.task == "suite":
            from flip_jax.downstream import suite

            settings = suite.read_settings(args.config)
            suite.run(set_fields(settings, rest), args, command)
            return 0
        from flip_jax.downstream import tasks

        settings = set_fields(tasks.task_module(args.task).Settings(), rest)
        if args.config is not None or len(args.checkpoint) > 1:
            raise ValueError(f"--config and several --checkpoint are for suite, not {args.task}")
        out = args.out or Path("runs/downstream", args.task)
        backbone, data = tasks.open_inputs(args.checkpoint[0], args, args.cache or out / "features")
        report = tasks.run_task(args.task, settings, backbone, data, out, command)
        print(report.all_tables()[0].markdown())
        print(f"wrote {', '.join(str(out / name) for name in tasks.FILES)}")
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m flip_jax.downstream",
        description="What a frozen model is good for: one task, or all of them with suite.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    tasks = ("retrieval", "attributes", "slfir", "zero_shot", "parsing", "alignment", "multitask")
    add("task", choices=(*tasks, "suite"))
    add(
        "--checkpoint",
        action="append",
        required=True,
        help="workdir, checkpoint or export; with suite several times, to compare them",
    )
    add("--data", type=Path, required=True, help="folder of records, see docs/data.md")
    add("--out", type=Path, help="default: runs/downstream/TASK")
    add("--config", type=Path, help="with suite: a file with get_config() -> suite.Settings")
    add("--cache", type=Path, help="folder of cached features; default: OUT/features")
    add("--tokenizer", help="the vocabulary, where the name in the checkpoint leads nowhere")
    add("--limit", type=int, help="at most so many records of each split, to try things out")
    add("--batch-size", type=int, default=64, help="pictures that run at once; 64")
    add("--dtype", default="float32", help="float32 or bfloat16, of the encoder; float32")
    add("--threads", type=int, default=2, help="that decode pictures; 2")
    return parser


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())

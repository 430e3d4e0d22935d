"""`python -m flip_jax.main --config configs/demo.py [--workdir DIR] [--config.field=value ...]`.

A run of several processes: this command for each of them, see flip_jax/distributed.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from flip_jax import config
from flip_jax.huge_pages import restart_with_huge_pages

USAGE = """Any field of the config can be set on the command line, for example
  --config.data.path=data/faces --config.optim.lr=1e-4 --config.model.remat=dots
The fields, their defaults and what they mean are in flip_jax/config.py."""


log = logging.getLogger(__name__)

JOBS = {
    "eval_only": "evaluate the newest checkpoint",
    "print_sharding": "show how every array of the state is cut over the devices",
}


def parse(argv: list[str]) -> tuple[config.Config, Path, str]:
    """Command line -> (checked config, workdir, `train` or one of `JOBS`).

    Raises:
      ValueError: for a bad config file, field, value or workdir.
    """
    parser = argparse.ArgumentParser(
        "python -m flip_jax.main",
        description="Train FLIP, resuming by itself from the newest checkpoint of the workdir.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a file with get_config(), see configs/")
    parser.add_argument("--workdir", help="default: runs/<name of the config>")
    jobs = parser.add_mutually_exclusive_group()
    for name, what in JOBS.items():
        jobs.add_argument(
            f"--{name}", action="store_const", const=name, dest="job", default="train", help=what
        )
    args, fields = parser.parse_known_args(argv)
    cfg = config.from_arguments(config.load(args.config), fields)
    if "://" in (args.workdir or ""):
        raise ValueError(
            f"--workdir={args.workdir}: must be a folder; mount the bucket, see docs/scale.md"
        )
    workdir = Path(args.workdir or f"runs/{Path(args.config).stem}")
    return config.validate(cfg), workdir, args.job


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or stopped in good order, 1 after an error the user can mend."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        cfg, workdir, job = parse(sys.argv[1:] if argv is None else argv)
        # After the command line is known to be good: importing JAX takes seconds.
        from flip_jax import compile_cache, distributed, train

        if job != "print_sharding":
            compile_cache.keep_compiled(workdir)
        with distributed.session():
            if not distributed.is_main():
                logging.getLogger().setLevel(logging.ERROR)
            if job == "print_sharding":
                log.info(train.sharding_table(cfg))
            elif job == "eval_only":
                train.evaluate(cfg, workdir)
            else:
                train.train(cfg, workdir)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())

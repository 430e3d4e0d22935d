"""`python -m flip_jax.main --config configs/demo.py [--workdir DIR] [--config.field=value ...]`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from flip_jax import config

USAGE = """Any field of the config can be set on the command line, for example
  --config.data.path=data/faces --config.optim.lr=1e-4 --config.model.remat=dots
The fields, their defaults and what they mean are in flip_jax/config.py."""


def parse(argv: list[str]) -> tuple[config.Config, Path, bool]:
    """Command line -> (checked config, workdir, evaluate only).

    Raises:
      ValueError: for a bad config file, field or value.
    """
    parser = argparse.ArgumentParser(
        "python -m flip_jax.main",
        description="Train FLIP, resuming by itself from the newest checkpoint of the workdir.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a file with get_config(), see configs/")
    parser.add_argument("--workdir", type=Path, help="default: runs/<name of the config>")
    parser.add_argument("--eval_only", action="store_true", help="evaluate the newest checkpoint")
    args, rest = parser.parse_known_args(argv)
    cfg = config.load(args.config)
    fields = iter(rest)
    for item in fields:
        if not item.startswith("--config."):
            parser.error(f"unknown argument {item}")
        path, equals, value = item.removeprefix("--config.").partition("=")
        cfg = config.override(cfg, path, value if equals else next(fields, ""))
    workdir = args.workdir or Path("runs") / Path(args.config).stem
    return config.validate(cfg), workdir, args.eval_only


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or stopped in good order, 1 after an error the user can mend."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        cfg, workdir, eval_only = parse(sys.argv[1:] if argv is None else argv)
        # After the command line is known to be good: importing JAX takes seconds.
        from flip_jax import train

        train.evaluate(cfg, workdir) if eval_only else train.train(cfg, workdir)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

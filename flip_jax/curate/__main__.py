"""`python -m flip_jax.curate build --config FILE [--config.field=value ...]`, and `report`, for
which see `flip_jax.curate.quality.command`."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from types import ModuleType

from flip_jax import config
from flip_jax.curate.config import CurateConfig, validate
from flip_jax.curate.quality.history import place_of

USAGE = """Any field of the config can be set on the command line, for example
  --config.output.path=data/faces --config.faces.min_side=96 --config.beam.workers=2
The fields, their defaults and what they mean are in flip_jax/curate/config.py.
`python -m flip_jax.curate report --help` is about the report on a finished data set."""


def parse(argv: list[str]) -> CurateConfig:
    """Command line -> checked config.

    Raises:
      ValueError: for a bad config file, field or value.
    """
    parser = argparse.ArgumentParser(
        "python -m flip_jax.curate",
        description="Make face image-caption pairs; a build that was stopped goes on.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=["build"])
    parser.add_argument("--config", required=True, help="see configs/curate/")
    args, rest = parser.parse_known_args(argv)
    cfg = config.load(args.config, CurateConfig)
    fields = iter(rest)
    for item in fields:
        if not item.startswith("--config."):
            parser.error(f"unknown argument {item}")
        path, equals, value = item.removeprefix("--config.").partition("=")
        cfg = config.override(cfg, path, value if equals else next(fields, ""))
    return validate(cfg)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 after an error the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["report"]:
            logging.basicConfig(level=logging.CRITICAL)
            return _module("flip_jax.curate.quality.command").run(argv[1:])
        cfg = parse(argv)
        # In this process Beam has nothing to say but what lacks for clouds, and each error twice.
        local = cfg.beam.runner == "DirectRunner"
        logging.basicConfig(level=logging.CRITICAL if local else logging.INFO)
        counts = _module("flip_jax.curate.pipeline").build(cfg)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, count in sorted(counts.items(), key=lambda item: (place_of(item[0]), item[0])):
        print(f"{count:>12,}  {name}")
    return 0


def _module(name: str) -> ModuleType:
    """What does the work, once the command line is known to be good: importing Beam takes seconds.

    Raises:
      ImportError: naming the extra that brings what is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"curation needs {error.name}, which is not installed: pip install 'flip_jax[curate]'"
        ) from error


if __name__ == "__main__":
    sys.exit(main())

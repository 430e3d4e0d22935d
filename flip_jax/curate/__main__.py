"""`python -m flip_jax.curate build --config FILE [--config.field=value ...]`."""

from __future__ import annotations

import argparse
import logging
import sys

from flip_jax import config
from flip_jax.curate.config import CurateConfig, validate

USAGE = """Any field of the config can be set on the command line, for example
  --config.output.path=data/faces --config.faces.min_side=96 --config.beam.workers=2
The fields, their defaults and what they mean are in flip_jax/curate/config.py."""

STAGES = (
    *("input", "fetch", "opt-out", "read", "faces", "attributes", "captions", "rewrite"),
    *("hashes", "dedupe", "kept"),
)


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
    try:
        cfg = parse(sys.argv[1:] if argv is None else argv)
        # In this process Beam has nothing to say but what lacks for clouds, and each error twice.
        local = cfg.beam.runner == "DirectRunner"
        logging.basicConfig(level=logging.CRITICAL if local else logging.INFO)
        # After the command line is known to be good: importing Beam takes seconds.
        from flip_jax.curate.pipeline import build

        counts = build(cfg)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, count in sorted(counts.items(), key=lambda item: (_place(item[0]), item[0])):
        print(f"{count:>12,}  {name}")
    return 0


def _place(name: str) -> int:
    """Of a count's stage in a build."""
    stage = name.partition("/")[0]
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m flip_jax.curate report DATA --out DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flip_jax.curate.quality.report import CARD, ReportConfig, write_report


def run(arguments: list[str]) -> int:
    """Exit status: 0 done, 1 after an error the user can mend."""
    args = _parser().parse_args(arguments)
    try:
        cfg = ReportConfig(
            sample=args.sample,
            min_share=args.min_share,
            sheet=args.sheet,
            clip=args.clip,
            work=args.work,
            threads=args.threads,
        )
        told = write_report(args.data, args.out, cfg, overwrite=args.overwrite)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for text in told["warnings"]:
        print(f"WARNING: {text}")
    print(
        f"{told['pictures']['count']:,} pictures, {told['captions']['count']:,} captions; wrote "
        f"{args.out / CARD}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    defaults = ReportConfig()
    parser = argparse.ArgumentParser(
        prog="python -m flip_jax.curate report",
        description="Report on a data set: JSON, figures and a data card in Markdown.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder with manifest.json")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--overwrite", action="store_true", help="replace an older report")
    add("--sample", type=int, default=defaults.sample, help="pictures that are decoded")
    add("--clip", type=Path, metavar="FOLDER", help="CLIP model for the CLIP-IQA-type score")
    add("--work", type=Path, metavar="FOLDER", help="work folder of the build (default: DATA.work)")
    add("--min-share", type=float, default=defaults.min_share, help="warn of fewer people")
    add("--sheet", type=int, default=defaults.sheet, help="faces on the sheet; 0 = show none")
    add("--threads", type=int, default=defaults.threads)
    return parser

"""`python -m flip_jax.search`: build an index of faces and serve a page to search it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m flip_jax.search", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    index = commands.add_parser("index", help="embed the pictures of a data set")
    add = index.add_argument
    add("--checkpoint", type=Path, required=True, help="a workdir, a checkpoint or an export")
    add("--data", type=Path, required=True, help="folder of a data set")
    add("--split", default="test")
    add("--out", type=Path, required=True, help="folder of the index")
    add("--overwrite", action="store_true", help="replace an index in --out")
    add("--max-bad-fraction", type=float, default=0.01, help="of records that cannot be read")
    add("--threads", type=int, default=2, help="that decode and build the graph")
    serve = commands.add_parser("serve", help="open the page; stop it with Ctrl-C")
    add = serve.add_argument
    add("--index", type=Path, required=True, help="what `index` wrote")
    add("--checkpoint", type=Path, required=True, help="the one the index was made with")
    add("--data", type=Path, help="the data set, if it was moved since")
    add("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    add("--port", type=int, default=8000, help="0 = any free one")
    add("--rerank", type=int, default=32, help="best faces that ITM puts in order, 1 to 64")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 after an error the user can mend."""
    args = vars(parse(sys.argv[1:] if argv is None else argv))
    run = {"index": _index, "serve": _serve}[args.pop("command")]
    try:
        run(**args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# The imports come after the command line is known to be good: importing JAX takes seconds.
def _index(**options) -> None:
    _check_extra()
    from flip_jax.search.builder import build_index

    made = build_index(**options)
    how = "all are compared" if made.effort >= made.faces else f"{made.effort} candidates looked at"
    print(f"{options['out']}: {made.faces:,} faces, {made.left_out} left out; in a search {how}")


def _serve(**options) -> None:
    _check_extra()
    from flip_jax.search.server import serve

    serve(**options)


def _check_extra() -> None:
    try:
        import aiohttp  # noqa: F401
        import faiss  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; search needs: pip install 'flip_jax[search]'") from error


if __name__ == "__main__":
    sys.exit(main())

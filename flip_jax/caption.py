"""`python -m flip_jax.caption --checkpoint C PICTURE...` or `--data D --out captions.jsonl`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

EPILOG = """Writes one JSON object per line, {"picture": file or record id, "caption": text}.
With --data it also tells which attributes the captions state rightly and wrongly, where the records
have labels: a table, and OUT with the ending .scores.json.
Exit status: 0 done, 1 input that cannot be used."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; see `EPILOG`."""
    args = _parser().parse_args(argv)
    try:
        if bool(args.pictures) == (args.data is not None):
            raise ValueError("give pictures or --data, one of them")
        if args.data is not None and args.out is None:
            raise ValueError("--data needs --out, a file for the captions")
        if args.data is None and (args.split is not None or args.limit is not None):
            raise ValueError("--split and --limit are of --data")
        if args.out is not None and args.out.is_dir():
            raise ValueError(f"--out={args.out} is a folder; give a file for the captions")
        if not math.isfinite(args.length_penalty):
            raise ValueError(f"--length-penalty={args.length_penalty}: must be a finite number")
        # After the command line is known to be well formed: importing JAX takes seconds.
        _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m flip_jax.caption",
        description="Captions of pictures, by a model trained with loss.weights.caption.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURE", help="files")
    add("--checkpoint", required=True, help="workdir, checkpoint or export")
    add("--data", type=Path, help="folder of records, see docs/data.md")
    add("--split", help="of the data; test")
    add("--limit", type=int, help="at most so many records")
    add("--out", type=Path, help="file to write; for pictures default: print them")
    add("--beams", type=int, default=1, help="captions followed side by side; 1 = greedy")
    add("--max-length", type=int, help="tokens; default: as in training")
    add("--length-penalty", type=float, default=0.0, help="0 = the likeliest; 1 = per word")
    add("--batch-size", type=int, default=64, help="pictures that run at once; 64")
    add("--dtype", default="float32", help="float32 or bfloat16; float32")
    add("--tokenizer", help="the vocabulary, where the name in the checkpoint leads nowhere")
    return parser


def _run(args: argparse.Namespace) -> None:
    from flip_jax import api, caption_scores
    from flip_jax.downstream.face_data import FaceData
    from flip_jax.downstream.task_report import write_text

    model = api.load(
        args.checkpoint, tokenizer=args.tokenizer, dtype=args.dtype, batch_size=args.batch_size
    )
    options = {
        "beams": args.beams,
        "max_length": args.max_length,
        "length_penalty": args.length_penalty,
    }
    faces = None
    if args.data is None:
        names, pictures = args.pictures, args.pictures
    else:
        faces = FaceData(args.data, model.cfg.model.vision.image_size, limit=args.limit)
        faces = faces.split(args.split or "test")
        names, pictures = faces.ids, faces.images
    captions = []
    for start in range(0, len(names), args.batch_size):
        captions += model.caption(pictures[start : start + args.batch_size], **options)
    rows = zip(names, captions, strict=True)
    text = "".join(json.dumps({"picture": n, "caption": c}) + "\n" for n, c in rows)
    if args.out is None:
        print(text, end="")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, text)
    print(f"wrote {args.out}")
    if faces is not None and (faces.attributes >= 0).any():
        scores = caption_scores.compare(captions, faces, model.tokenizer)
        print(caption_scores.table(scores))
        path = args.out.with_suffix(".scores.json")
        write_text(path, json.dumps(caption_scores.plain(scores), indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())

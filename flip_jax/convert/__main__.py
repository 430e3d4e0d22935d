"""`python -m flip_jax.convert --from FORMAT SOURCE OUT` and `--to FORMAT CHECKPOINT OUT`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

DESCRIPTION = """Bring weights in, or give them out.

Every conversion runs source and target on the same fixed inputs, prints the error of each output
and keeps what it wrote only if all are below the tolerance; --to safetensors compares every bit."""

FORMATS = """formats
  --from flip   official .pth (`model`) or safetensors, with momentum and queue or without
  --from clip   image tower: Hugging Face CLIPModel or CLIPVisionModel folder or file, or OpenAI's
                names (a state dict, not a TorchScript archive)
  --from farl   image tower: released FaRL file (`state_dict`)
  --from bert   text tower without cross-attention: Hugging Face BERT folder or file
  --from dalle  visual tokenizer: encoder of DALL-E's dVAE, FlavaImageCodebook folder or file, or
                the state dict of OpenAI's encoder
  --to flip     .pth with the official names, order and layouts, momentum and queue included
  --to hf       folder for transformers: CLIPVisionModel, BlipTextModel, heads, tokenizer
  --to clip     image tower as a .pth with OpenAI's names, `visual.*`; --to farl: the same, under
                the key `state_dict` as in FaRL's files
  --to safetensors   folder for flip_jax.load: model.safetensors, config.json, vocab.txt

OUT of an import is a checkpoint: start a run from it with --config.init.checkpoint=OUT (flip),
--config.init.vision=OUT (clip, farl) or --config.init.text=OUT (bert). That of dalle is for
--config.loss.mim_tokenizer=OUT and takes no other options. See docs/convert.md."""

IMPORT_OPTIONS = (
    "image_size",
    "vision_heads",
    "text_heads",
    "as_reference",
    "allow_missing",
    "allow_unexpected",
    "seed",
)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m flip_jax.convert",
        description=DESCRIPTION,
        epilog=FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--from", dest="source_format", choices=("flip", "clip", "bert", "farl", "dalle")
    )
    direction.add_argument(
        "--to", dest="target_format", choices=("flip", "hf", "clip", "farl", "safetensors")
    )
    parser.add_argument("source", type=Path, help="what to read")
    parser.add_argument("out", type=Path, help="what to write; must not exist")
    parser.add_argument(
        "--tokenizer",
        help="vocabulary of the weights: hub name, folder, vocab.txt or `grammar`; default: the "
        "one stored with the weights, else bert-base-uncased",
    )
    imports = parser.add_argument_group("only with --from")
    imports.add_argument(
        "--image-size", type=int, help="resize the position tables to images of this many pixels"
    )
    imports.add_argument("--vision-heads", type=int, help="default: config.json, else width / 64")
    imports.add_argument("--text-heads", type=int, help="default: config.json, else width / 64")
    imports.add_argument(
        "--as-reference",
        action="store_true",
        help="as the official implementation: drop CLIP's last norm, BERT's type-0 vector",
    )
    for what in ("missing", "unexpected"):
        imports.add_argument(
            f"--allow-{what}",
            action="append",
            metavar="GLOB",
            default=[],
            help=f"tensors of the source that may be {what}; can be given several times",
        )
    imports.add_argument("--seed", type=int, default=0, help="of values the source lacks")
    args = parser.parse_args(argv)
    given = [n for n in IMPORT_OPTIONS if getattr(args, n) != parser.get_default(n)]
    if (args.target_format or args.source_format == "dalle") and given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        where = "only with --from" if args.target_format else "not with --from dalle"
        parser.error(f"{where}: {flags}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or failed; there is no output then."""
    args = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # After the command line is known to be good: importing JAX takes seconds.
    from flip_jax.convert.exporter import export_weights
    from flip_jax.convert.foreign import Options
    from flip_jax.convert.importer import import_weights

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if args.source_format == "dalle":
            from flip_jax.convert.dalle import import_dalle

            print(import_dalle(args.source, args.out))
        elif args.source_format:
            options = Options(
                tokenizer=args.tokenizer, **{name: getattr(args, name) for name in IMPORT_OPTIONS}
            )
            print(import_weights(args.source_format, args.source, args.out, options))
        else:
            print(export_weights(args.target_format, args.source, args.out, args.tokenizer))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

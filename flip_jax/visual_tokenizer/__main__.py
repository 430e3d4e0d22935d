"""`python -m flip_jax.visual_tokenizer train --data D --out DIR [--field=value ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EPILOG = """Fields are those of `Settings` in flip_jax/visual_tokenizer/command.py, for example
  --size=64 --codes=512 --steps=800
A run uses the result with --config.loss.mim_target=tokens, see docs/visual_tokenizer.md.
Exit status: 0 done, 1 input that cannot be used; there is no output then."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; see `EPILOG`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        "python -m flip_jax.visual_tokenizer",
        description="Train a discrete tokenizer of pictures (VQ-VAE) on the pictures of records.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("train",))
    parser.add_argument("--data", type=Path, required=True, help="folder of records")
    parser.add_argument("--out", type=Path, required=True, help="to be made; must not exist")
    args, rest = parser.parse_known_args(argv)
    try:
        # After the command line is known to be well formed: importing JAX takes seconds.
        from flip_jax.settings import set_fields
        from flip_jax.visual_tokenizer import command

        settings = set_fields(command.Settings(), rest)
        called = ["python", "-m", "flip_jax.visual_tokenizer", *argv]
        about = command.train(settings, args.data, args.out, called)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found, codes = about["held_out"], about["sizes"]["codes"]
    print(
        f"{found['pictures']} held-out pictures: PSNR {found['psnr']:.2f} dB (one colour each: "
        f"{found['psnr_of_means']:.2f} dB), perplexity {found['perplexity']:.0f}, "
        f"{found['codes_used']} of {codes} codes used; trained in {about['train_seconds']:.0f} s\n"
        f"wrote {args.out}. A run uses it with --config.loss.mim_target=tokens "
        f"--config.loss.mim_tokenizer={args.out} --config.model.mim_vocab={codes}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

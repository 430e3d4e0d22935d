"""`python -m flip_jax.compile --config configs/base.py --topology v5e:4x4`.

Compiles the train step for devices that need not be there and prints whether it fits, what it
exchanges and what a run would take.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path

from flip_jax import config
from flip_jax.compile import topology
from flip_jax.compile.sizes import with_pairs_per_chip

FITS, BAD_INPUT, DOES_NOT_FIT = 0, 1, 3

EPILOG = f"""{topology.known_names()}.
Any field of the config can be set, as for training: --config.model.remat=dots
Exit status: 0 it fits, 1 input that cannot be used, 3 it does not fit."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; see `EPILOG`."""
    args, fields = parse(sys.argv[1:] if argv is None else argv)
    try:
        if args.sweep is None:
            return run(args, fields)
        from flip_jax.compile.sweep import sweep

        return sweep(args, fields)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command line -> (its arguments, the `--config.field=value` among them)."""
    parser = argparse.ArgumentParser(
        "python -m flip_jax.compile",
        description="Compile the train step ahead of time: does it fit, and what will it cost?",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", action="append", required=True, help="a file with get_config(), see configs/")
    add("--topology", help="default: the devices that are here")
    add("--slices", type=int, default=1, help="TPU slices of this topology, joined by the network")
    add("--pairs-per-chip", help="sets data.batch_size, and with it queue and local_batch")
    add("--pairs", type=int, default=15_000_000, help="of the data set, for the hours; 15 million")
    add("--efficiency", type=float, help="share of the peak FLOP/s to assume; default 0.4")
    add("--price-per-chip-hour", type=float, help="in any currency")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--hlo", type=Path, metavar="FILE", help="write the partitioned program there")
    add(
        "--sweep",
        type=Path,
        metavar="DIR",
        help="several --config, and lists v5e:2x2,v5e:4x4 and 16,32 for --topology and "
        "--pairs-per-chip: each combination into DIR/sweep.csv and sweep.png; goes on where it "
        "stopped",
    )
    args, rest = parser.parse_known_args(argv)
    for item in rest:
        if not item.startswith("--config.") or "=" not in item:
            parser.error(f"unknown argument {item}; fields are set as --config.optim.lr=1e-4")
    return args, rest


def run(args: argparse.Namespace, fields: list[str]) -> int:
    """Compiles one step, prints and writes what is asked for."""
    if len(args.config) > 1:
        raise ValueError(f"{len(args.config)} --config: more than one needs --sweep DIR")
    for name in ("efficiency", "price_per_chip_hour", "pairs"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be above 0")
    for path in filter(None, (args.json, args.hlo)):
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
    cfg = config.from_arguments(config.load(args.config[0]), fields)
    topology.check_name(args.topology, args.slices)
    topology.prepare(args.topology)
    # Only now: what is set above is read when JAX starts.
    devices = topology.devices(args.topology, args.slices)
    if args.pairs_per_chip is not None:
        pairs = _integer("--pairs-per-chip", args.pairs_per_chip)
        cfg, notes = with_pairs_per_chip(cfg, len(devices), pairs)
        print("\n".join(notes))
    cfg = config.validate(cfg)
    return _compile(cfg, devices, args)


def _compile(cfg: config.Config, devices: list, args: argparse.Namespace) -> int:
    from flip_jax.compile import cost, report
    from flip_jax.compile.step import compile_step

    rows = cfg.data.batch_size
    steps_per_epoch = args.pairs // rows
    if steps_per_epoch == 0:
        raise ValueError(f"--pairs={args.pairs}: must be at least config.data.batch_size={rows}")
    steps = max(round(cfg.epochs * steps_per_epoch), 1)
    where = args.topology or "the devices here"
    where += f", {args.slices} slices" if args.slices > 1 else ""
    print(
        f"{args.config[0]} on {where}: {len(devices)} x {devices[0].device_kind}, batch {rows}, "
        f"queue {cfg.loss.queue_size}, remat {cfg.model.remat}, accum_steps "
        f"{cfg.optim.accum_steps}\ncompiling with {versions(args.topology)} ...",
        flush=True,
    )
    step = compile_step(cfg, devices, args.slices, steps_per_epoch, steps)
    estimate = cost.estimate(
        step, rows, steps, args.efficiency or cost.EFFICIENCY, args.price_per_chip_hour
    )
    mesh = " x ".join(f"{axis} {size}" for axis, size in step.mesh.items())
    if step.compile_seconds is None:
        print(f"mesh {mesh}; not compiled")
    else:
        print(
            f"mesh {mesh}; compiled in {step.compile_seconds:.0f} s with "
            f"{step.host_bytes / report.GIB:.1f} GiB of host memory"
        )
    span = f"for {cfg.epochs:g} epochs of {args.pairs:,} pairs: {steps:,} steps"
    print(report.table(step, estimate, span))
    if args.json:
        values = report.to_dict(step, estimate) | {
            "config": config.to_dict(cfg),
            "config_file": args.config[0],
            "topology": args.topology,
            "steps": steps,
            "versions": versions(args.topology),
        }
        args.json.write_text(json.dumps(values, indent=2), encoding="utf-8")
    if args.hlo:
        if step.hlo is None:
            raise ValueError(f"--hlo={args.hlo}: there is no program to write")
        args.hlo.write_text(step.hlo, encoding="utf-8")
    return DOES_NOT_FIT if step.memory.fits is False else FITS


def versions(name: str | None) -> str:
    """The compiler, in words."""
    packages = ["jax", *topology.compiler(name)]
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def _integer(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{flag}={text}: must be an integer; lists need --sweep DIR") from None


if __name__ == "__main__":
    sys.exit(main())

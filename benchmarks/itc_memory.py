"""ITC in chunks against the dense loss: memory per device, and time on one device, in one run.

    python benchmarks/itc_memory.py [--batches 4096 65536] [--queue 61440] [--steps 5]

Memory is what XLA plans for intermediate results of value and gradient on 8 simulated CPU devices,
all of the batch as candidates. Programs are compiled from shapes and not run, so that sizes can be
compared which fit no machine here; XLA cuts the dense loss over the devices. Time is measured at
smaller sizes on one device, the two in turns, after their losses and gradients were compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax import partition
from flip_jax.config import MeshConfig
from flip_jax.losses.itc import grouped_itc_loss
from flip_jax.losses.itc_sharded import sharded_itc_loss

DEVICES = 8
# (batch, queue): the reference's queue with the batch of a small run, and a large batch.
TIMED = ((8, 61_440), (2048, 8192))


def value_and_grad(name: str, batch: int, mesh: Mesh | None):
    """(embeds, twin_embeds, queue, group, temperature, alpha) -> loss and gradients, jitted."""
    options = {"same_group": "negative", "local_batch": batch}
    loss = grouped_itc_loss
    if name == "sharded":
        loss, options["mesh"] = sharded_itc_loss, mesh

    def f(*arguments):
        return loss(*arguments, **options)

    return jax.jit(jax.value_and_grad(f, argnums=(0, 4), has_aux=True))


def temp_mib(name: str, batch: int, queue: int, embed: int) -> float:
    """MiB of intermediate results on each of the devices."""
    mesh = partition.make_mesh(MeshConfig(), jax.devices())
    rows, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())

    def shape(*dims: int, dtype=jnp.float32, sharding=whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    embeds = {n: shape(batch, embed, sharding=rows) for n in ("image", "text")}
    queues = {n: shape(queue, embed) for n in ("image", "text")}
    queues["group"] = shape(queue, dtype=jnp.int32)
    group = shape(batch, dtype=jnp.int32, sharding=rows)
    arguments = (embeds, embeds, queues, group, shape(), shape())
    program = value_and_grad(name, batch, mesh).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


def random_arguments(batch: int, queue: int, embed: int) -> tuple:
    rng = np.random.default_rng(0)

    def pair(rows: int) -> dict[str, jax.Array]:
        x = rng.normal(size=(2, rows, embed)).astype(np.float32)
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
        return {"image": jnp.asarray(x[0]), "text": jnp.asarray(x[1])}

    queues = pair(queue) | {"group": jnp.full(queue, -1, jnp.int32)}
    return pair(batch), pair(batch), queues, jnp.arange(batch), jnp.float32(0.07), jnp.float32(0.4)


def seconds(batch: int, queue: int, embed: int, steps: int) -> dict[str, float]:
    """Median time of value and gradient on one device, dense and sharded in turns."""
    arguments = random_arguments(batch, queue, embed)
    sides = {name: value_and_grad(name, batch, None) for name in ("dense", "sharded")}
    dense, sharded = (jax.tree.leaves(f(*arguments)) for f in sides.values())
    for a, b in zip(sharded, dense, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * float(jnp.max(jnp.abs(b))))
    times = {name: [] for name in sides}
    for _ in range(steps):
        for name, f in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(f(*arguments))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[2**n for n in range(12, 17)])
    parser.add_argument("--queue", type=int, default=61_440)
    parser.add_argument("--embed", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, in turns")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)

    memory = []
    print(f"MiB per device, queue {args.queue}\n   batch      dense    sharded   ratio")
    for batch in args.batches:
        row = {n: temp_mib(n, batch, args.queue, args.embed) for n in ("dense", "sharded")}
        memory.append({"batch": batch, **row, "ratio": row["dense"] / row["sharded"]})
        print(f"{batch:8} {row['dense']:10.1f} {row['sharded']:10.1f} {memory[-1]['ratio']:7.1f}")

    timed = []
    print("seconds, one device\n   batch    queue      dense    sharded   ratio")
    for batch, queue in TIMED:
        row = seconds(batch, queue, args.embed, args.steps)
        timed.append({"batch": batch, "queue": queue, **row})
        timed[-1]["ratio"] = row["dense"] / row["sharded"]
        print(f"{batch:8} {queue:8} {row['dense']:10.3f} {row['sharded']:10.3f}", end="")
        print(f" {timed[-1]['ratio']:7.2f}")

    result = {
        "benchmark": "itc_memory",
        "devices": DEVICES,
        "queue": args.queue,
        "embed": args.embed,
        "temp_mib": memory,
        "seconds": timed,
        "jax": jax.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

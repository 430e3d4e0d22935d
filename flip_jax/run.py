"""What a run opens before its first step: mesh, vocabulary, data, evaluator, checkpoints."""

from __future__ import annotations

import importlib.metadata
import os
import signal
from pathlib import Path
from typing import Any

import jax

import flip_jax
from flip_jax import distributed, partition
from flip_jax.checkpoint import Checkpointer
from flip_jax.config import Config, to_dict
from flip_jax.data.gallery import Gallery
from flip_jax.data.pipeline import TrainPipeline
from flip_jax.data.records import RecordSource
from flip_jax.data.sources import write_drawn
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.downstream.retrieval import RetrievalEvaluator
from flip_jax.visual_tokenizer.saved import tokenizer_of


class Run:
    """The parts of one training run.

    Attributes:
      mesh, tokenizer, source (training records), pipeline, gallery, evaluator, checkpointer.
      visual_tokenizer: on the mesh, whole on each device; None without `loss.mim_target=tokens`.
      steps_per_epoch, total_steps, eval_steps (between evaluations; 0 = none in between).
      meta: what identifies the run in its checkpoints.

    Raises:
      ValueError, OSError: settings that do not fit the devices, the vocabulary or the data.
    """

    def __init__(self, cfg: Config, workdir: Path):
        self.cfg, self.workdir = cfg, workdir
        distributed.check_started()
        distributed.check_same(_program(cfg))
        self.mesh = partition.make_mesh(cfg.mesh)
        host_index, host_count = partition.host_slice(self.mesh)
        if cfg.data.batch_size % self.mesh.size:
            fits = cfg.data.batch_size // self.mesh.size * self.mesh.size
            raise ValueError(
                f"config.data.batch_size={cfg.data.batch_size}: must be a multiple of the "
                f"{self.mesh.size} devices of the mesh, for example {fits or self.mesh.size} or "
                f"{fits + self.mesh.size}"
            )
        parts, devices = cfg.optim.accum_steps, self.mesh.size
        if cfg.data.batch_size % (parts * devices):
            raise ValueError(
                f"config.optim.accum_steps={parts}: the {devices} devices of the mesh must divide "
                f"each part of data.batch_size={cfg.data.batch_size}, "
                f"{cfg.data.batch_size // parts} rows; take fewer parts or a larger batch"
            )
        distributed.check_shared(workdir)
        path = data_path(cfg, workdir)
        self.tokenizer = load_tokenizer(cfg)
        self.source = RecordSource(path, cfg.data.train_split)
        data = {"vocabulary": self.tokenizer.vocab_hash, "data": self.source.manifest_hash}
        self.visual_tokenizer, visual_digest = tokenizer_of(cfg) or (None, None)
        distributed.check_same(data | {"visual tokenizer": str(visual_digest)})
        self.visual_tokenizer = partition.replicated(self.visual_tokenizer, self.mesh)
        size = cfg.model.vision.image_size
        self.pipeline = TrainPipeline(
            self.source,
            self.tokenizer,
            cfg.data,
            size,
            cfg.seed,
            host_index,
            host_count,
            distributed.gather,
            region_patch=cfg.model.vision.patch_size if needs_regions(cfg) else None,
        )
        self.gallery = Gallery(
            RecordSource(path, cfg.data.eval_split),
            self.tokenizer,
            size,
            limit=cfg.eval.max_images,
            captions=cfg.eval.captions,
            threads=cfg.data.threads,
            host_index=host_index,
            host_count=host_count,
            gather=distributed.gather,
        )
        self.evaluator = RetrievalEvaluator(cfg, self.gallery, self.mesh)
        self.steps_per_epoch = self.pipeline.steps_per_epoch
        self.total_steps = max(round(cfg.epochs * self.steps_per_epoch), 1)
        every = cfg.eval.every_epochs
        self.eval_steps = max(round(every * self.steps_per_epoch), 1) if every else 0
        self.meta = {
            "config": to_dict(cfg),
            "vocab_hash": self.tokenizer.vocab_hash,
            "data_hash": self.source.manifest_hash,
            "visual_tokenizer": visual_digest,
        }
        self.checkpointer = Checkpointer(workdir, cfg.checkpoint, self.meta)

    def to_devices(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """The part of this host's rows that the step reads, on the mesh."""
        rows = {name: batch[name] for name in batch if name not in ("index", "bad")}
        return partition.to_global(rows, self.mesh)


def needs_regions(cfg: Config) -> bool:
    """Whether batches bring `regions`."""
    return cfg.loss.weights.mim > 0 and cfg.loss.mim_masking == "region"


def load_tokenizer(cfg: Config) -> Tokenizer:
    """The vocabulary of the config.

    Raises:
      ValueError: if its size is not `model.text.vocab_size`.
    """
    tokenizer = Tokenizer.load(cfg.data.tokenizer, cfg.model.text.max_length)
    if tokenizer.vocab_size != cfg.model.text.vocab_size:
        raise ValueError(
            f"config.model.text.vocab_size={cfg.model.text.vocab_size}: the vocabulary "
            f"{cfg.data.tokenizer!r} has {tokenizer.vocab_size} entries with [DEC] and [ENC]; set "
            f"--config.model.text.vocab_size={tokenizer.vocab_size} or another data.tokenizer"
        )
    return tokenizer


def data_path(cfg: Config, workdir: Path) -> Path:
    """The folder of records; drawn faces are rendered into the workdir on first use, by process 0.

    Raises:
      ValueError: if the config names no data.
    """
    if cfg.data.path is not None:
        return Path(cfg.data.path)
    if cfg.data.drawn.train_identities:
        if distributed.is_main():
            write_drawn(cfg.data.drawn, workdir / "data")
        distributed.gather(None)  # until it is there
        return workdir / "data"
    raise ValueError(
        "config.data.path is not set. `python -m flip_jax.data build --help` makes records from "
        "pictures and a table of captions or attributes; then add --config.data.path=FOLDER. "
        "To run without any data: --config configs/demo.py"
    )


def _program(cfg: Config) -> dict[str, str]:
    """What all processes must have in common, or they compile steps that do not fit together."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in packages}
    flags = {name: os.environ.get(name, "not set") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return {
        "the version of flip_jax": flip_jax.__version__,
        **versions,
        **flags,
        **_fields(to_dict(cfg), "config"),
    }


def _fields(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict):
        return {name: repr(value)}
    return {k: v for key in value for k, v in _fields(value[key], f"{name}.{key}").items()}


class StopSignal:
    """Context in which SIGTERM or Ctrl-C asks for a stop after the current step.

    With several processes one that is asked stops all, a second or two later, after the same step.
    A second Ctrl-C interrupts at once.
    """

    def __enter__(self) -> StopSignal:
        self.requested = False
        signals = (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._request) for number in signals}
        return self

    def due(self, step: int) -> bool:
        """Whether to stop after `step` steps; all processes ask once with every step."""
        return distributed.stops_at(step, self.requested)

    def _request(self, number: int, _: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

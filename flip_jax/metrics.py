"""What a run tells about itself: metric files, throughput, FLOPs, a progress line, a loss guard.

All of it works on numbers that are on the host already; nothing here waits for a device. In a run
of several processes only process 0 makes a `MetricsWriter` and a `ProgressReporter`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TextIO

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from flip_jax.config import Config, TextConfig, VisionConfig

# Dense bfloat16 FLOP/s of one JAX device, by the start of its `device_kind`; longer starts first.
# Sources: the vendors' data sheets (NVIDIA's list twice these numbers, with sparsity).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p calls itself so
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
}

# The log line: metric name, how it reads.
LINE = (
    ("loss", "loss {:.4f}"),
    ("loss_itc", "itc {:.4f}"),
    ("loss_sigmoid", "sigmoid {:.4f}"),
    ("loss_itm", "itm {:.4f}"),
    ("loss_mim", "mim {:.4f}"),
    ("mim_accuracy", "mim right {:.1%}"),
    ("loss_mim_rank", "mim rank {:.4f}"),
    ("loss_caption", "caption {:.4f}"),
    ("learning_rate", "lr {:.2e}"),
    ("temperature", "temperature {:.4f}"),
    ("grad_norm", "grad norm {:.3f}"),
    ("pairs_per_second", "{:.1f} pairs/s"),
    ("data_wait_share", "data wait {:.0%}"),
    ("mfu", "mfu {:.1%}"),
    ("bad_records", "bad records {:.0f}"),
)


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient norm became NaN or infinite."""


class MetricsWriter:
    """Appends to `workdir/metrics.jsonl`, one JSON object per call, and to TensorBoard files.

    Args:
      workdir: made if absent.
      start_step: the step the run starts or resumes at. Lines of later steps, which a killed run
        wrote after its last checkpoint, are dropped, as is a line cut off in the middle.

    Raises:
      OSError: `workdir` cannot be written.
    """

    def __init__(self, workdir: Path | str, start_step: int = 0):
        self._path = Path(workdir) / "metrics.jsonl"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_later_lines(self._path, start_step)
            self._file = self._path.open("a", encoding="utf-8")
            # TensorBoard hides what an earlier run wrote at or after `purge_step`.
            self._board = SummaryWriter(
                str(self._path.parent / "tensorboard"), purge_step=start_step + 1
            )
        except OSError as error:
            raise OSError(
                f"cannot write metrics to {self._path}: {error.strerror or error}; choose another "
                "workdir or change its permissions"
            ) from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the scalars of one step; NaN and infinity become null in the JSON line."""
        values = {name: float(value) for name, value in values.items()}
        line = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._file.write(json.dumps({"step": step} | line) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name.replace("@", "_at_"), value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _drop_later_lines(path: Path, start_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the last line of a killed run may be cut off
            # A run that starts afresh starts an empty file.
            if start_step and json.loads(line)["step"] <= start_step:
                kept.append(line + "\n")
    copy = path.with_suffix(".jsonl.new")
    copy.write_text("".join(kept), encoding="utf-8")
    os.replace(copy, path)


class StepTimer:
    """Throughput from the host's clock: `with timer.waiting()`, `timer.step()`, `timer.report()`.

    The host runs ahead of the device, so one step's time means nothing; over the steps between two
    reports it is right, because fetching the metrics for a report waits for the device.

    Args:
      pairs_per_step: image-text pairs of a step, over all devices.
      peak: FLOP/s of all devices together; None = unknown, then no MFU is reported.
    """

    def __init__(self, pairs_per_step: int, peak: float | None = None):
        self._pairs_per_step, self._peak = pairs_per_step, peak
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._steps, self._flops, self._waited, self._paused = 0, 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around `next(batches)`: counted as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation and saving: not counted at all."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def step(self, flops_per_pair: float) -> None:
        """One training step was started, of so much work, see `model_flops_per_pair`."""
        self._steps += 1
        self._flops += flops_per_pair * self._pairs_per_step

    def report(self) -> dict[str, float]:
        """Rates since the last report, empty if there was no step.

        Returns:
          `pairs_per_second`, `step_seconds`, `data_wait_share` (0..1) and, with a known peak,
          `mfu` (0..1, model FLOPs utilisation).
        """
        wall = time.perf_counter() - self._start - self._paused
        steps, waited, flops = self._steps, self._waited, self._flops
        self._restart()
        if steps == 0:
            return {}
        rates = {
            "pairs_per_second": steps * self._pairs_per_step / wall,
            "step_seconds": wall / steps,
            "data_wait_share": waited / wall,
        }
        if self._peak is not None:
            rates["mfu"] = flops / wall / self._peak
        return rates


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of `device`; None if it is not in `PEAK_FLOPS` (a CPU, say)."""
    kinds = sorted(PEAK_FLOPS, key=len, reverse=True)
    return next((PEAK_FLOPS[kind] for kind in kinds if device.device_kind.startswith(kind)), None)


@cache
def model_flops_per_pair(
    cfg: Config, tokens: int | None = None, part_tokens: int | None = None
) -> float:
    """FLOPs that the training step needs for one image-text pair: a matrix product is 2 m n k.

    Elementwise work and recomputation (`remat`) do not count. With N image tokens, S text tokens,
    D width, F MLP width, L layers, E the joint embedding, C the ITC candidates (index v: vision):

        ViT        2 (N_all - 1) 3p^2 D_v  +  L_v (8 N D_v^2 + 4 N^2 D_v + 4 N D_v F_v)
        MIM        as ViT on all tokens, its blocks more, and 2 M D_v 3p^2 for M hidden patches, or
                   2 M D_v V for V codes, without those of the tokenizer; with hard patches a
                   forward pass of the twin more
        text       L 4 S D^2  +  ((L - 1) S + 1) (4 D^2 + 4 S D + 4 D F)
        fusion     3 text  +  L 4 N D_v D  +  3 ((L - 1) S + 1) (4 D^2 + 4 N D)  +  3 * 4 D
        heads      2 D_v E + 2 D E
        captions   text, all tokens  +  L (4 N D_v D + 4 S D^2 + 4 S N D)  +  S (2 D^2 + 2 D V)

    The three fused rows of a pair are its own, one with a negative image and one with a negative
    text; cross-attention keys and values, 4 N D_v D, are computed once per image. Where only the
    first token is read (texts, the twin of the ViT, the ViT itself without ITM) the last layer
    computes no other, hence (L - 1) S + 1. A backward pass costs twice the forward pass, except
    that nothing flows back into pixels (the patch embedding counts twice, not three times). On top
    come the momentum twins (ViT on all tokens, text and heads, forward only), the ITC similarities
    (2 directions, each for online embeddings and for twins 2 C E for logits and 2 C E for the
    weighted sum of candidates, which makes the gradient) and those for hard negatives (2
    directions, each 2 B E). The sigmoid loss has no twins; its similarities are 2 B E for logits
    and twice 2 B E for the gradients.

    At base size this is 0.310 TFLOP; the reference, which computes all tokens of the last layers
    and the cross-attention keys and values of each of the three rows, needs 0.357.

    Args:
      cfg: the config of the run.
      tokens: columns of the batch's texts, S; None = `model.text.max_length`.
      part_tokens: S of the texts of the contrastive loss; None = the same.
    """
    vision, text, width = cfg.model.vision, cfg.model.text, cfg.model.text.width
    embed, batch = cfg.model.embed_dim, cfg.data.batch_size
    s = tokens or text.max_length
    n_all = vision.patches + 1
    n = n_all if vision.keep_patches is None else vision.keep_patches + 1

    def work(tower: VisionConfig | TextConfig, tokens: int, first_only: bool) -> float:
        d = tower.width
        keys_values, query = 4 * tokens * d**2, 4 * d**2 + 4 * tokens * d + 4 * d * tower.mlp_width
        queries = (tower.depth - 1) * tokens + (1 if first_only else tokens)
        return tower.depth * keys_values + queries * query

    patch_embed = 2 * vision.patches * 3 * vision.patch_size**2 * vision.width
    weights = cfg.loss.weights
    vit = work(vision, n, first_only=not (weights.itm or weights.caption))
    bert = work(text, part_tokens or s, first_only=True)
    crossing = (text.depth - 1) * s + 1
    cross = text.depth * 4 * n * vision.width * width
    cross += 3 * crossing * (4 * width**2 + 4 * n * width)
    fusion = 3 * work(text, s, first_only=True) + cross + 3 * 4 * width
    heads = 2 * vision.width * embed + 2 * width * embed

    online = 0
    if weights.contrastive or weights.caption:
        online += 2 * patch_embed + 3 * vit
    if weights.contrastive:
        online += 3 * (bert + heads)
    if weights.itm:
        online += 3 * fusion + 2 * 2 * batch * embed
    if weights.mim:
        blocks = work(replace(vision, depth=vision.depth + cfg.model.mim_depth), n_all, False)
        hidden = round(cfg.loss.mim_share * vision.patches)
        width_out = cfg.model.mim_vocab or 3 * vision.patch_size**2
        out = 2 * hidden * vision.width * width_out
        online += 2 * patch_embed + 3 * (blocks + out)
        if cfg.loss.mim_masking == "hard":  # the twin looks at all patches, forward only
            online += patch_embed + blocks
    if weights.caption:
        cross = 4 * n * vision.width * width + 4 * s * width**2 + 4 * s * n * width
        told = work(text, s, False) + text.depth * cross
        online += 3 * (told + 2 * s * width * (width + text.vocab_size))
    if not cfg.loss.has_twins:
        return float(online + (3 * 2 * batch * embed if weights.contrastive else 0))
    local = cfg.loss.local_batch if cfg.loss.candidates == "local" else batch
    similarities = 2 * 2 * 4 * (local + cfg.loss.queue_size) * embed
    twins = patch_embed + work(vision, n_all, first_only=True) + bert + heads
    return float(online + twins + similarities)


def check_finite(
    step: int,
    values: Mapping[str, float],
    record_ids: Iterable[str],
    last_checkpoint: int | None,
) -> None:
    """Stops a run whose loss or gradient norm is not a number.

    Args:
      step: of the values.
      values: loss parts, gradient norm and the like, on the host.
      record_ids: of the batch the values come from; read only if they are not finite.
      last_checkpoint: newest complete step on disk.

    Raises:
      NonFiniteLoss: with all of these and what to try.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if not bad:
        return
    numbers = ", ".join(f"{name}={float(value):.6g}" for name, value in values.items())
    raise NonFiniteLoss(
        f"step {step}: {', '.join(bad)} not finite ({numbers}). Records of the batch: "
        f"{', '.join(record_ids)}. {resume_from(last_checkpoint)}. Look at these records; if they "
        "are fine, resume with a lower optim.lr, with optim.clip_norm=1.0, with a higher "
        "loss.temperature_min, or with model.dtype=float32"
    )


def resume_from(last_checkpoint: int | None) -> str:
    """A sentence for messages."""
    if last_checkpoint is None:
        return "No checkpoint was written yet"
    return f"The last checkpoint is step {last_checkpoint}"


class ProgressReporter:
    """A progress bar on a terminal, plain lines anywhere else.

    Args:
      total_steps: steps of the whole run.
      start_step: where this process starts.
      batch_size: pairs per step, to count examples.
      stream: where to write; None = standard error.
    """

    def __init__(
        self, total_steps: int, start_step: int, batch_size: int, stream: TextIO | None = None
    ):
        self._total, self._batch_size = total_steps, batch_size
        self._stream = sys.stderr if stream is None else stream
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", file=self._stream)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def step(self) -> None:
        """One step was started."""
        if self._bar is not None:
            self._bar.update()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of a step: those named in `LINE` that are there, in that order."""
        parts = [text.format(values[name]) for name, text in LINE if name in values]
        head = f"step {step}/{self._total}, examples {step * self._batch_size}"
        line = ", ".join([head, *parts])
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

"""Checkpoints of a training run: written in the background, complete or absent, checked on reading.

The only file that imports Orbax. A step is a folder `workdir/checkpoints/<step>` of four items:

    params      the model; readable alone, on any machine (`load_params`)
    opt_state   the optimizer state; a NamedTuple is stored as a dict of its fields
    momentum    `twins`, the momentum encoders, and `queue`, their past features
    meta        JSON: step, layout version, config, vocabulary and data hashes, versions, metrics,
                and shape, dtype and digest of every array

An array is named by the path of its keys, `vit/blocks/attn/query/kernel`. A step counts once its
folder holds Orbax's commit file, which is written last; folders without it (a killed process, a
full disk) are never read and never deleted, only replaced when the same step is saved again.

Orbax stores no checksum of array data, so each array gets a digest at saving which is compared at
restoring.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

import flip_jax
from flip_jax import distributed
from flip_jax.config import CheckpointConfig
from flip_jax.named_arrays import describe, mismatches, named_leaves, nested
from flip_jax.same_run import check_same_run
from flip_jax.step_folder import (
    COMMIT_FILE,
    FOLDER,
    LAYOUT_VERSION,
    META_FILE,
    CheckpointError,
    brief,
    complete_steps,
    damaged,
    incomplete_steps,
    json_crc32,
    read_step_meta,
    step_folder,
    writable_folder,
)

BEST_METRIC = "mean_recall"
# With several processes the clock of process 0 decides for all; asking it costs a broadcast.
CLOCK_EVERY_STEPS = 20

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the train state under `workdir/checkpoints`.

    The state is a dict with `step` (int32 scalar), `params`, `opt_state`, `momentum` and `queue`.
    In a run of several processes every process calls every method, at the same steps, and
    `workdir` is a folder all of them see.

    Args:
      workdir: folder of the run; made if absent.
      cfg: when to save and what to keep.
      meta: what identifies the run, stored with each step and compared at restoring; must hold
        `config` (the config as a dict), `vocab_hash` and `data_hash`; JSON types only.

    Raises:
      CheckpointError: `workdir` cannot be written.
      ValueError: a field of `cfg` is out of range, or `meta` lacks a key.
    """

    def __init__(self, workdir: Path | str, cfg: CheckpointConfig, meta: Mapping[str, Any]):
        if cfg.keep_last < 1:
            raise ValueError(
                f"checkpoint.keep_last is {cfg.keep_last}; it must be at least 1, or a run could "
                "not be resumed"
            )
        if missing := {"config", "vocab_hash", "data_hash"} - set(meta):
            raise ValueError(f"checkpoint meta lacks {sorted(missing)}")
        self._cfg = cfg
        self._meta = json.loads(json.dumps(meta))  # as it will be read: tuples become lists
        self._folder = writable_folder(Path(workdir) / FOLDER)
        self._manager = ocp.CheckpointManager(self._folder, options=_options(cfg))
        self._own: set[int] = set()  # steps of this run: saved or restored by this object
        self._pending: int | None = None  # step whose files are still being written
        self._last_save = time.monotonic()
        if leftovers := incomplete_steps(self._folder):
            _log.warning("unfinished checkpoints in %s are left alone: %s", self._folder, leftovers)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """Newest complete step on disk, or None; with several processes, as process 0 sees it."""
        return distributed.gather(max(complete_steps(self._folder), default=None))[0]

    def due(self, step: int) -> bool:
        """Whether `every_steps` or `every_minutes` asks for a save; all processes get one answer.

        With several processes the minutes are looked at every `CLOCK_EVERY_STEPS` steps.
        """
        cfg = self._cfg
        if cfg.every_steps is not None and step % cfg.every_steps == 0:
            return True
        several = jax.process_count() > 1
        if cfg.every_minutes is None or (several and step % CLOCK_EVERY_STEPS):
            return False
        due = time.monotonic() - self._last_save >= 60 * cfg.every_minutes
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(due))) if several else due

    def save(
        self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Starts writing `state`; returns once it is copied, the files follow in the background.

        The buffers of `state` may be donated right after the call.

        Args:
          step: optimizer steps done; equal to `state["step"]`.
          state: the train state.
          metrics: numbers to store along; `keep_best` ranks by `mean_recall`. A step is written
            once, so evaluate first and save then.

        Returns:
          False if this run has this step on disk already; nothing is written then.

        Raises:
          CheckpointError: this save could not start, or the previous one failed in the
            background. Complete older steps are intact.
        """
        self._wait()
        if step != int(state["step"]):
            raise ValueError(f"save of step {step}, but the state's step is {int(state['step'])}")
        if step in self._own:
            return False
        self._set_aside_newer(step)
        items = {name: named_leaves(tree) for name, tree in _items(state).items()}
        meta = _step_meta(self._meta, step, items, metrics or {})
        score = meta["metrics"].get(BEST_METRIC, -math.inf)
        arrays = {name: ocp.args.PyTreeSave(nested(leaves)) for name, leaves in items.items()}
        self._pending = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta)),
                metrics={BEST_METRIC: score if math.isfinite(score) else -math.inf},
                force=True,
            )
        except Exception as error:
            self._fail(error)
        self._last_save = time.monotonic()
        return True

    def restore(self, target_state: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
        """Reads a step into the structure, dtypes and shardings of `target_state`.

        Meshes and device counts may differ from those at saving.

        Args:
          target_state: the train state as arrays or `jax.ShapeDtypeStruct` with shardings.
          step: None = the newest complete step. With an older one, the newer ones are renamed
            (`<step>.set-aside-...`) when this object first saves.

        Raises:
          FileNotFoundError: no such complete step.
          ValueError: the checkpoint belongs to another model or vocabulary, or its arrays do
            not match `target_state`; all differences are listed.
          CheckpointError: stored data is damaged; names the arrays and the older steps.
        """
        self._wait()
        folder = step_folder(self._folder, self.latest_step() if step is None else step)
        meta = read_step_meta(folder)
        check_same_run(meta, self._meta, folder)
        trees = {}
        if missing := sorted(set(_items(target_state)) - set(meta["arrays"])):
            raise ValueError(
                f"{folder} has no {', '.join(missing)}, which this run needs (the one that wrote "
                "it had no contrastive loss?). Start in a new workdir, from its weights: "
                "--config.init.checkpoint="
            )
        for item, tree in _items(target_state).items():
            leaves = _read_arrays(folder, item, meta["arrays"][item], named_leaves(tree))
            trees[item] = jax.tree.unflatten(jax.tree.structure(tree), leaves.values())
        self._own.add(meta["step"])
        momentum = trees.get("momentum", {"twins": {}, "queue": {}})
        return {
            "step": jax.device_put(np.int32(meta["step"]), target_state["step"].sharding),
            "params": trees["params"],
            "opt_state": trees["opt_state"],
            "momentum": momentum["twins"],
            "queue": momentum["queue"],
        }

    def close(self) -> None:
        """Waits until all files are written. Raises CheckpointError if the last save failed."""
        try:
            self._wait()
        finally:
            self._manager.close()

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(error)
        if self._pending is not None:
            self._own.add(self._pending)
            self._pending = None

    def _fail(self, error: Exception) -> None:
        """Removes the unfinished folder of the pending step and raises CheckpointError."""
        step, self._pending = self._pending, None
        if jax.process_index() == 0 and step in incomplete_steps(self._folder):
            _remove(self._folder / str(step))
        self._manager.reload()  # it listed the step as soon as the save began
        raise CheckpointError(
            f"checkpoint of step {step} could not be written to {self._folder}: {brief(error)}. "
            f"Complete steps there: {complete_steps(self._folder)}. Check free space, quota and "
            "permissions, then start the run again: it resumes from the newest complete step"
        ) from error

    def _set_aside_newer(self, step: int) -> None:
        # After restore(step=older) the abandoned newer steps would count as the latest and push
        # the steps of this run out of `keep_last`.
        newer = [s for s in complete_steps(self._folder) if s >= step and s not in self._own]
        if not newer:
            return
        multihost_utils.sync_global_devices("flip_jax set aside newer checkpoints")
        if jax.process_index() == 0:
            for old in newer:
                aside = self._folder / f"{old}.set-aside-{time.time_ns()}"
                (self._folder / str(old)).rename(aside)
        multihost_utils.sync_global_devices("flip_jax newer checkpoints set aside")
        self._manager.reload()
        _log.warning("run continues before steps %s: their folders are renamed", newer)


def newest_step(path: Path | str) -> Path:
    """The folder of the newest complete step, to read several things of one and the same.

    A training that goes on may finish another step between two reads of its workdir. With several
    processes, which all call this, the folder is the one that process 0 sees.

    Args:
      path: as for `load_params`.

    Raises:
      FileNotFoundError: no complete checkpoint there.
    """
    folder = str(step_folder(Path(path), None)) if distributed.is_main() else None
    return Path(distributed.gather(folder)[0])


def load_params(
    path: Path | str, *, only: str | None = None, target: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Reads the parameters alone, on any machine.

    Args:
      path: a workdir or its checkpoints folder (newest complete step), or one step's folder.
      only: glob over array names, e.g. `vit/*`; `*` also matches `/`.
      target: nested dict of arrays or `jax.ShapeDtypeStruct` with shardings that what is read
        must match exactly. None: numpy arrays of the stored shapes and dtypes.

    Returns:
      Nested dict of arrays.

    Raises:
      FileNotFoundError: no complete checkpoint there.
      ValueError: `only` matches nothing, or names, shapes or dtypes differ from `target`.
      CheckpointError: stored data is damaged.
    """
    folder = step_folder(Path(path), None)
    meta = read_step_meta(folder)
    arrays = meta["arrays"]["params"]
    stored = {name: arrays[name] for name in fnmatch.filter(arrays, only or "*")}
    if not stored:
        groups = sorted({name.split("/")[0] for name in arrays})
        raise ValueError(f"only={only!r} matches no parameter of {folder}; top names: {groups}")
    if target is None:
        wanted = _as_stored(stored)
    else:
        wanted = named_leaves(target)
    return nested(_read_arrays(folder, "params", stored, wanted))


def read_meta(path: Path | str, step: int | None = None) -> dict[str, Any]:
    """Reads a step's `meta`; `path` as for `load_params`, `step` None = the newest complete."""
    return read_step_meta(step_folder(Path(path), step))


def _remove(folder: Path) -> None:
    """Removes what a failed save left. Other arrays of it may be written for a moment longer."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        if not folder.exists():
            return


def _options(cfg: CheckpointConfig) -> ocp.CheckpointManagerOptions:
    def score(metrics: Mapping[str, float]) -> float:
        return metrics[BEST_METRIC]

    # Not `max_to_keep`: together with `best_fn` it would drop the latest step when a metric falls.
    policies = [preserve.LatestN(cfg.keep_last)]
    if cfg.keep_best:
        policies.append(preserve.BestN(get_metric_fn=score, n=cfg.keep_best))
    if cfg.keep_every_steps is not None:
        policies.append(preserve.EveryNSteps(cfg.keep_every_steps))
    return ocp.CheckpointManagerOptions(
        preservation_policy=preserve.AnyPreservationPolicy(policies),
        best_fn=score,  # without it metrics are not stored
        # Renaming a folder is not atomic on object stores and their mounts; one file is.
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
    )


def _step_meta(
    meta: Mapping[str, Any],
    step: int,
    items: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """The run's `meta` with what describes one step, and its checksum."""
    meta = {
        **meta,
        "step": step,
        "layout_version": LAYOUT_VERSION,
        "versions": {m.__name__: m.__version__ for m in (flip_jax, jax, ocp)},
        "metrics": dict(metrics),
        "arrays": {name: describe(leaves) for name, leaves in items.items()},
    }
    return meta | {"meta_crc32": json_crc32(meta)}


def _items(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored, each on its own; momentum only where the run has it."""
    items = {"params": state["params"], "opt_state": state["opt_state"]}
    momentum = {"twins": state["momentum"], "queue": state["queue"]}
    return items | ({"momentum": momentum} if jax.tree.leaves(momentum) else {})


def _read_arrays(
    folder: Path, item: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """The arrays `stored` describes, where and as `wanted` says; numpy if it names no sharding."""
    if problems := mismatches(stored, wanted):
        raise ValueError(
            f"{item} of {folder} does not fit: {'; '.join(problems)}. Restore with the config the "
            "checkpoint was written with (see its meta)"
        )
    restore_args = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding)
        if getattr(leaf, "sharding", None)
        else ocp.RestoreArgs(restore_type=np.ndarray)
        for name, leaf in wanted.items()
    }
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(
                folder / item,
                args=ocp.args.PyTreeRestore(
                    nested(dict.fromkeys(wanted, 0)),
                    restore_args=nested(restore_args),
                    partial_restore=True,
                ),
            )
    except Exception as error:
        raise damaged(folder, f"{item} cannot be read: {brief(error)}") from error
    leaves = named_leaves(tree)
    found = describe(leaves)
    if wrong := [f"{item}/{name}" for name in wanted if found[name] != stored[name]]:
        raise damaged(folder, f"other content than was saved in {', '.join(wrong)}")
    return {name: leaves[name] for name in wanted}


def save_weights(
    folder: Path | str,
    params: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    momentum: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint without optimizer state: one step's folder, step 0.

    `load_params`, `load_momentum` and `read_meta` read it; `Checkpointer.restore` does not.

    Args:
      folder: to be made; must not be there.
      params: nested dict of arrays, all parameters or only a part (`vit`, `bert`).
      meta: as for `Checkpointer`.
      momentum: `twins`, `queue`, or both.

    Raises:
      CheckpointError: it cannot be written; nothing is left then.
    """
    folder = Path(folder).resolve()
    trees = {"params": params} | ({"momentum": momentum} if momentum else {})
    items = {name: named_leaves(tree) for name, tree in trees.items()}
    meta = _step_meta(json.loads(json.dumps(meta)), 0, items, {})
    parent = writable_folder(folder.parent)
    try:
        with tempfile.TemporaryDirectory(dir=parent) as unfinished:
            step = Path(unfinished, "0")
            # Item by item: Orbax takes twice the memory of all it writes at once.
            for name, leaves in items.items():
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
                    writer.save(step / name, args=ocp.args.PyTreeSave(nested(leaves)))
            (step / META_FILE).parent.mkdir()
            (step / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
            (step / COMMIT_FILE).touch()
            step.rename(folder)
    except Exception as error:
        raise CheckpointError(f"{folder} could not be written: {brief(error)}") from error


def load_momentum(path: Path | str) -> dict[str, Any]:
    """Reads the momentum twins and the queue as numpy arrays; `path` as for `load_params`.

    Returns:
      Nested dict with `twins` and `queue`, or what of them is stored; empty if neither is.
    """
    folder = step_folder(Path(path), None)
    stored = read_step_meta(folder)["arrays"].get("momentum", {})
    return nested(_read_arrays(folder, "momentum", stored, _as_stored(stored))) if stored else {}


def _as_stored(stored: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(array["shape"], jnp.dtype(array["dtype"]))
        for name, array in stored.items()
    }

"""The train state, the train step, the training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, use_abstract_mesh

from flip_jax import checkpoint, partition
from flip_jax.config import Config
from flip_jax.convert.init import initial_state
from flip_jax.downstream.retrieval import Retrieval
from flip_jax.losses.flip import flip_loss
from flip_jax.models import flip
from flip_jax.models.visual_tokenizer import VisualTokenizer
from flip_jax.optim import hard_share, learning_rate, make_optimizer, target_alpha
from flip_jax.profile import StepProfile
from flip_jax.report import write_results
from flip_jax.run import Run, StopSignal
from flip_jax.same_run import check_same_run
from flip_jax.step_log import StepLog

Array = jax.Array
log = logging.getLogger(__name__)


class TrainState(TypedDict):
    """Everything a run carries from step to step; only arrays, no random keys."""

    step: Array  # int32 scalar: steps done
    params: flip.Params
    opt_state: optax.OptState
    momentum: flip.Params  # the twins, see flip.twin_params
    queue: dict[str, Array]  # image, text [Q, E], group [Q], pointer
    # The last two are empty without ITC, see `LossConfig.has_twins`.


def init_state(cfg: Config, tx: optax.GradientTransformation) -> TrainState:
    """A fresh state from `cfg.seed`; jit-able."""
    params_key, queue_key = jax.random.split(jax.random.key(cfg.seed))
    params = flip.init_params(cfg.model, cfg.loss.temperature, params_key)
    momentum, queue = {}, {}
    if cfg.loss.has_twins:
        momentum = jax.tree.map(jnp.copy, flip.twin_params(params))
        queue = flip.init_queue(cfg.loss.queue_size, cfg.model.embed_dim, queue_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        momentum=momentum,
        queue=queue,
    )


def make_train_step(
    cfg: Config,
    tx: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    alpha: optax.Schedule,
    mesh: Mesh | None = None,
    hard_share: optax.Schedule = lambda _: 0.0,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The step as a pure function (state, batch, tokenizer=None) -> (state, metrics); not jitted.

    `tokenizer` is the frozen one of `loss.mim_target=tokens`: an argument, or its weights would be
    constants of the compiled step. `hard_share` is of `loss.mim_masking=hard`.

    `mesh` has the rows of the batch on all of its devices; None = one device.

    Order, as in the reference: clamp the temperature, move the twins towards the online weights,
    then losses, gradient, AdamW, and the twins' embeddings into the queue. Randomness is
    fold_in(seed, step). `batch` may bring `negatives`, which then replace the drawn ones.
    """
    graphdef = flip.build(cfg.model)

    def step(
        state: TrainState, batch: dict[str, Array], tokenizer: VisualTokenizer | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        number = state["step"]
        params = dict(state["params"])
        params["temperature"] = jnp.clip(
            params["temperature"], cfg.loss.temperature_min, cfg.loss.temperature_max
        )
        momentum, queue = state["momentum"], state["queue"]
        if momentum:
            momentum = flip.update_twin(momentum, params, cfg.loss.momentum)

        def loss_of(params: flip.Params) -> tuple[Array, dict[str, Any]]:
            return flip_loss(
                params,
                momentum,
                queue,
                batch,
                alpha(number),
                jax.random.fold_in(jax.random.key(cfg.seed), number),
                cfg=cfg,
                graphdef=graphdef,
                mesh=mesh,
                negatives=batch.get("negatives"),
                tokenizer=tokenizer,
                hard_share=hard_share(number),
            )

        grads, aux = jax.grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        if queue:
            queue = flip.enqueue(queue, **aux["twin_embeds"], group=batch["group"])
        new_state = TrainState(
            step=number + 1,
            params=optax.apply_updates(params, updates),
            opt_state=opt_state,
            momentum=momentum,
            queue=queue,
        )
        metrics = aux["metrics"] | {
            "temperature": params["temperature"],
            "alpha": jnp.asarray(alpha(number), jnp.float32),
            "learning_rate": learning_rate(number),
            "grad_norm": optax.tree.norm(grads),
        }
        return new_state, metrics

    def step_on_mesh(*arguments: Any) -> tuple[TrainState, dict[str, Array]]:
        with use_abstract_mesh(mesh.abstract_mesh):  # where the towers find it
            return step(*arguments)

    return step if mesh is None else step_on_mesh


class Compiled:
    """State and step as jitted functions on a mesh.

    Attributes:
      target: the train state as `jax.ShapeDtypeStruct` with shardings.
      init: () -> a fresh state.
      step: (state, device batch, visual tokenizer or None) -> (state, metrics); the state's
        buffers are donated.
      unmasked: config and step of unmasked tuning, on all patches.
      masked_steps: after so many steps the run goes over to that.
    """

    def __init__(self, cfg: Config, mesh: Mesh, steps_per_epoch: int, steps: int):
        rate = learning_rate(cfg.optim, steps_per_epoch, steps)
        tx = make_optimizer(cfg.optim, rate)
        shapes = jax.eval_shape(lambda: init_state(cfg, tx))
        shardings = partition.state_shardings(shapes, mesh)
        self.target = jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            shapes,
            shardings,
        )
        self.init = jax.jit(lambda: init_state(cfg, tx), out_shardings=shardings)

        def jitted(cfg: Config) -> Callable[..., Any]:
            schedules = rate, target_alpha(cfg, steps_per_epoch)
            step = make_train_step(cfg, tx, *schedules, mesh, hard_share(steps))
            return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

        self.step = jitted(cfg)
        vision = replace(cfg.model.vision, keep_patches=None)
        unmasked = replace(cfg, model=replace(cfg.model, vision=vision))
        self.unmasked = unmasked, jitted(unmasked)
        self.masked_steps = steps - round(cfg.unmasked_epochs * steps_per_epoch)


def sharding_table(cfg: Config) -> str:
    """How every array of the train state is cut over the devices; reads no data.

    Raises:
      ValueError: if `cfg.mesh` does not fit the devices.
    """
    compiled = Compiled(cfg, partition.make_mesh(cfg.mesh), steps_per_epoch=1, steps=1)
    return partition.sharding_table(compiled.target)


def train(cfg: Config, workdir: Path) -> Retrieval | None:
    """Train from the newest checkpoint of `workdir`, or from the start; evaluate; report.

    SIGTERM or Ctrl-C saves after the current step (and its evaluation, if one is due) and returns.

    Returns:
      the final evaluation; None if a signal ended the run early.

    Raises:
      ValueError, OSError: settings, data or folders that cannot be used.
      metrics.NonFiniteLoss: a loss is not a number; nothing is saved from that step on.
    """
    run = Run(cfg, workdir)
    compiled = Compiled(cfg, run.mesh, run.steps_per_epoch, run.total_steps)
    # The signal is caught until the last files of the checkpointer are written.
    with StopSignal() as stop, run.checkpointer as checkpointer:
        step = checkpointer.latest_step() or 0
        if step:
            state = checkpointer.restore(compiled.target)
        else:
            state = initial_state(cfg, compiled.init())
        if step >= run.total_steps:
            log.info("step %d is the last one already: nothing to train", step)
            result = run.evaluator(state["params"])
        else:
            step, result = _train_from(step, state, run, compiled, stop)
    if result is None:
        log.info("stopped: step %d is saved, the same command goes on from there", step)
    else:
        write_results(workdir, step, result, run.gallery)
    return result


def _train_from(
    step: int, state: TrainState, run: Run, compiled: Compiled, stop: StopSignal
) -> tuple[int, Retrieval | None]:
    """The loop: returns the step it ended at, and the final evaluation if that is the last one."""
    total = run.total_steps
    profile = StepProfile(run.cfg.profile, run.workdir / "profile")
    take_step = compiled.step
    with StepLog(run, step) as steps, run.pipeline.batches(step) as batches, profile:
        if step == 0:
            steps.evaluate(0, state)
        while step < total and not stop.due(step):
            with steps.timer.waiting():
                batch = next(batches)
            if step >= compiled.masked_steps and take_step is compiled.step:
                cfg, take_step = compiled.unmasked
                steps.begin(step, cfg)
            step += 1
            profile.begin(step)
            state, metrics = take_step(state, run.to_devices(batch), run.visual_tokenizer)
            profile.end(step, metrics)
            steps.add(step, metrics, batch)
            if step % run.cfg.log_every_steps == 0:
                steps.flush()
            if step == total:
                break
            if run.eval_steps and step % run.eval_steps == 0:
                steps.save(step, state, steps.evaluate(step, state).metrics())
            elif run.checkpointer.due(step):
                steps.save(step, state)
        if step < total:
            steps.save(step, state)
            return step, None
        result = steps.evaluate(step, state)
        steps.save(step, state, result.metrics())
        return step, result


def evaluate(cfg: Config, workdir: Path) -> Retrieval:
    """Evaluate the newest checkpoint of `workdir`; print and write the results.

    Raises:
      ValueError: if there is none, or it is of another model.
    """
    if not (workdir / checkpoint.FOLDER).is_dir():
        raise ValueError(f"--workdir={workdir}: no checkpoint to evaluate; train first")
    run = Run(cfg, workdir)
    compiled = Compiled(cfg, run.mesh, run.steps_per_epoch, run.total_steps)
    with run.checkpointer:
        folder = checkpoint.newest_step(workdir)
        meta = checkpoint.read_meta(folder)
        check_same_run(meta, run.meta, workdir)
        params = checkpoint.load_params(folder, target=compiled.target["params"])
        result = run.evaluator(params)
    write_results(workdir, meta["step"], result, run.gallery)
    return result

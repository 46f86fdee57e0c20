"""The training loop: joins data, model, step, evaluation and checkpoints; nothing else does."""

import collections
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mambaout_jax import config as configuration
from mambaout_jax.data.pipeline import EvalBatches, TrainBatches
from mambaout_jax.errors import UserError
from mambaout_jax.evaluation import evaluate
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.training import checkpoint
from mambaout_jax.training.build import build_model, build_preprocessing, build_recipe
from mambaout_jax.training.losses import Losses
from mambaout_jax.training.optimizer import make_optimizer
from mambaout_jax.training.progress import Progress
from mambaout_jax.training.recorder import Recorder, read_rows
from mambaout_jax.training.schedule import make_schedule, schedule_steps
from mambaout_jax.training.sharding import check_batch, global_batch, make_mesh, state_shardings
from mambaout_jax.training.state import TrainState, init_params, init_state
from mambaout_jax.training.step import Recipe, compile_eval_step, compile_train_step
from mambaout_jax.weights.finetune import initial_params
from mambaout_jax.weights.store import WeightsInfo

logger = logging.getLogger(__name__)

# Roles of the root key, which is the seed's.
INIT_KEY, TRAIN_KEY = 0, 1
DEVICE_PREFETCH = 2  # batches that are on the device before their step


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run is made of, before it has a state or a workdir."""

    config: ConfigDict
    mesh: Mesh
    batches: TrainBatches
    eval_batches: EvalBatches
    model: MambaOut
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    recipe: Recipe
    total_steps: int

    def every(self, duration: str) -> int:
        """Turns a duration of the configuration into steps."""
        return configuration.duration_steps(
            duration,
            steps_per_epoch=self.batches.steps_per_epoch,
            batch_size=self.config.batch_size,
        )

    def initial_state(self, key: jax.Array, params: Any = None) -> TrainState:
        """Returns the state before the first step, with new parameters or these. Traceable."""
        if params is None:
            params = init_params(key, self.model, self.config.data.image_size)
        return init_state(params, self.optimizer, ema=self.config.optimizer.ema_decay > 0)


def build_run(config: ConfigDict) -> Run:
    """Builds a run from its configuration; writes nothing.

    Raises:
        UserError: names what is amiss in the configuration, the data or the devices.
    """
    configuration.check(config)
    mesh = make_mesh(config.mesh.fsdp)
    check_batch(config.batch_size, config.accumulate_steps, mesh, "batch_size")
    check_batch(config.eval.batch_size, 1, mesh, "eval.batch_size")
    model = build_model(config)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = TrainBatches(config, **process)
    if not batches.steps_per_epoch:
        raise UserError(
            f"config.batch_size {config.batch_size} is more than the "
            f"{batches.num_examples} training examples: choose a smaller one"
        )
    schedule = make_schedule(config, batches.steps_per_epoch)
    _, _, total_steps = schedule_steps(config, batches.steps_per_epoch)
    return Run(
        config=config,
        mesh=mesh,
        batches=batches,
        eval_batches=EvalBatches(config, **process),
        model=model,
        schedule=schedule,
        optimizer=make_optimizer(config, schedule),
        recipe=build_recipe(config, batches.steps_per_epoch),
        total_steps=total_steps,
    )


def train(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains, evaluates and saves; resumes the run that the workdir holds.

    Raises:
        UserError: when something of the user's is amiss; the workdir is then left as it was.
    """
    run = build_run(config)
    root = jax.random.key(config.seed)
    init_key, train_key = (jax.random.fold_in(root, role) for role in (INIT_KEY, TRAIN_KEY))
    abstract = jax.eval_shape(run.initial_state, init_key)
    shardings = state_shardings(abstract, run.mesh)
    params = None
    if config.init_from and not checkpoint.has_checkpoint(workdir):
        params, report = initial_params(config.init_from, run.model, init_key)
        logger.info("%s", report)
    new = configuration.claim_workdir(workdir, config)
    try:
        with checkpoint.open_checkpoints(workdir, config.checkpoint.keep) as saved:
            latest = saved.latest_step()
            if latest is not None and latest >= run.total_steps:
                logger.info("finished already: %s", summary(run, workdir, saved.best_step()))
                return
            losses = Losses()
            if latest is None:
                begin = jax.jit(run.initial_state, out_shardings=shardings)
                state = begin(init_key, params)
                logger.info("%s", parameter_overview.get_parameter_overview(state.params))
            else:
                target = checkpoint.abstract_state(abstract, shardings)
                state, data = checkpoint.restore(saved, latest, target)
                run.batches.restore(data["batches"])
                losses = Losses(**data["losses"])
                logger.info("resumed at step %d of %d", latest, run.total_steps)
            train_loop(run, state, shardings, train_key, losses, workdir, saved)
            saved.wait_until_finished()
            logger.info("finished: %s", summary(run, workdir, saved.best_step()))
    except UserError:
        if new and not (workdir / "metrics.csv").exists() and jax.process_index() == 0:
            workdir.rmtree(missing_ok=True)  # nothing in it is worth keeping yet
        raise
    finally:
        run.batches.close()


def train_loop(
    run: Run,
    state: TrainState,
    shardings: TrainState,
    key: jax.Array,
    losses: Losses,
    workdir: epath.Path,
    saved: Any,
) -> None:
    """Runs the steps that are left, evaluating and saving when it is time."""
    config, total = run.config, run.total_steps
    train_step = compile_train_step(run.model, run.optimizer, run.recipe, shardings, run.mesh)
    eval_step = compile_eval_step(run.model, run.recipe, shardings.params, run.mesh)
    start = int(state.step)
    primary = jax.process_index() == 0
    recorder = Recorder(workdir, start, config.log.wandb_project, enabled=primary)
    progress = Progress(total, start, config.batch_size, run.every(config.log.every), primary)
    eval_every, save_every = run.every(config.eval.every), run.every(config.checkpoint.every)
    batches = on_device(run.batches, run.mesh)
    for step in range(start + 1, total + 1):
        with progress.waiting():
            batch = next(batches)
        rate = float(run.schedule(step - 1))
        state, metrics = train_step(state, batch, key)
        losses.push(step, metrics["loss"])
        if shown := progress.update(step, losses.last, rate):
            recorder.scalars(step, {"train/loss": losses.last, "learning_rate": rate, **shown})
        results = None
        if step % eval_every == 0 or step == total:
            train_loss = losses.mean()
            results = evaluate(eval_step, state.eval_params, run.eval_batches, run.mesh)
            epoch = step / run.batches.steps_per_epoch
            recorder.row(
                {
                    "step": step,
                    "epoch": epoch,
                    "learning_rate": rate,
                    "train_loss": train_loss,
                    "eval_loss": results["loss"],
                    "top1": results["top1"],
                    "top5": results["top5"],
                }
            )
            progress.line(
                f"epoch {epoch:g}/{total / run.batches.steps_per_epoch:g}: train loss "
                f"{train_loss:.4f}, eval loss {results['loss']:.4f}, top-1 {results['top1']:.2f}%, "
                f"top-5 {results['top5']:.2f}%, lr {rate:.2e}"
            )
        if step % save_every == 0 or step == total:
            data = {"batches": run.batches.state() | {"step": step}, "losses": losses.state()}
            checkpoint.save(saved, state, data, weights_info(run, results).to_json(), results)
        if results:
            progress.restart(step)
    progress.close()
    recorder.close()


def on_device(
    batches: Iterator[dict[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Yields global batches; the transfer of the next ones is already under way."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        queue.append(global_batch({key: batch[key] for key in ("image", "label")}, mesh))
        if len(queue) == DEVICE_PREFETCH:
            yield queue.popleft()


def weights_info(run: Run, results: dict[str, float] | None) -> WeightsInfo:
    """Returns what a checkpoint says of its weights."""
    return WeightsInfo(
        model=run.config.model.name,
        num_classes=run.config.data.num_classes,
        preprocessing=build_preprocessing(run.config),
        class_names=tuple(run.batches.class_names),
        source="mambaout_jax",
        averaged=run.config.optimizer.ema_decay > 0,
        metrics=results or {},
    )


def summary(run: Run, workdir: epath.Path, best_step: int | None) -> str:
    """Returns one line on a finished run."""
    rows = {row["step"]: row for row in read_rows(workdir / "metrics.csv")}
    parts = [f"{run.total_steps} steps"]
    if run.total_steps in rows:
        parts.append(f"top-1 {rows[run.total_steps]['top1']:.2f}%")
    if best_step in rows:
        parts.append(f"best {rows[best_step]['top1']:.2f}% at step {best_step}")
    return f"{', '.join(parts)}; checkpoints, metrics.csv and curves.png are in {workdir}"

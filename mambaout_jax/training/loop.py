"""The training loop: joins data, model, step, evaluation and checkpoints; nothing else does."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from clu import parameter_overview
from etils import epath
from ml_collections import ConfigDict

from mambaout_jax import config as configuration
from mambaout_jax.build import Run, build_run, weights_info
from mambaout_jax.errors import PreemptedError, UserError
from mambaout_jax.inference.evaluate import compile_eval_step, evaluate
from mambaout_jax.runtime import goodput, preemption
from mambaout_jax.runtime.goodput import Goodput
from mambaout_jax.runtime.processes import all_or_none, check_alike
from mambaout_jax.runtime.profiler import Profiler
from mambaout_jax.runtime.sharding import on_device, state_shardings
from mambaout_jax.runtime.workdir import hold_workdir
from mambaout_jax.training import checkpoint
from mambaout_jax.training.losses import Losses, NonFiniteLossError
from mambaout_jax.training.progress import Progress
from mambaout_jax.training.recorder import Recorder, read_rows
from mambaout_jax.training.skipping import batch_number, skipping
from mambaout_jax.training.state import TrainState
from mambaout_jax.training.step import compile_train_step
from mambaout_jax.weights.finetune import initial_params

logger = logging.getLogger(__name__)

# Roles of the root key, which is the seed's.
INIT_KEY, TRAIN_KEY = 0, 1


@dataclasses.dataclass
class Position:
    """Where a run stands: all that its next steps follow from."""

    state: TrainState
    losses: Losses
    skipped: list[int]  # numbers of the batches that were left out

    def data(self, run: Run) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it beside the state, as JSON keeps it."""
        next_batch = batch_number(int(self.state.step), self.skipped)
        return {
            "batches": run.batches.state() | {"step": next_batch},
            "losses": self.losses.state(),
            "skipped": self.skipped,
            "world": world(),
        }


@dataclasses.dataclass(frozen=True)
class Session:
    """What one command works with, from its start to its end."""

    workdir: epath.Path
    saved: ocp.CheckpointManager
    goodput: Goodput
    asked_to_end: Callable[[int], bool]


def train(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains, evaluates and saves; resumes the run that the workdir holds.

    Raises:
        UserError: when something of the user's is amiss; the workdir is then left as it was.
        PreemptedError: when the machine asked for it; the run is saved.
    """
    check_alike(
        configuration=json.dumps(configuration.shared(config), sort_keys=True), workdir=str(workdir)
    )
    workdir = epath.Path(workdir)
    root = jax.random.key(config.seed)
    init_key, train_key = (jax.random.fold_in(root, role) for role in (INIT_KEY, TRAIN_KEY))
    params = None
    with all_or_none():
        run = build_run(config)
        abstract = jax.eval_shape(run.initial_state, init_key)
        shardings = state_shardings(abstract, run.mesh)
        if config.init_from and not checkpoint.has_checkpoint(workdir):
            params, report = initial_params(config.init_from, run.model, init_key)
            logger.info("%s", report)
    logger.info("training pictures by %s", run.batches.made_by)
    with contextlib.ExitStack() as stack:
        stack.callback(run.batches.close)
        stack.enter_context(
            hold_workdir(workdir, configuration.flatten(config), configuration.FREE_KEYS)
        )
        saved = stack.enter_context(checkpoint.open_checkpoints(workdir, config.checkpoint.keep))
        latest = saved.latest_step()
        if latest is not None and latest >= run.total_steps:
            logger.info("finished already: %s", summary(run, workdir, saved.best_step()))
            return
        clock = stack.enter_context(contextlib.closing(Goodput()))
        asked_to_end = stack.enter_context(preemption.watch())
        session = Session(workdir, saved, clock, asked_to_end)

        def begin() -> TrainState:
            return jax.jit(run.initial_state, out_shardings=shardings)(init_key, params)

        target = checkpoint.abstract_state(abstract, shardings)
        done = train_past_bad_batches(run, begin, target, train_key, session)
        with clock.of(goodput.SAVE):
            checkpoint.finish(saved)
        if done < run.total_steps:
            raise PreemptedError(f"saved at step {done} of {run.total_steps}")
        logger.info("finished: %s", summary(run, workdir, saved.best_step()))


def train_past_bad_batches(
    run: Run,
    begin: Callable[[], TrainState],
    target: TrainState,
    key: jax.Array,
    session: Session,
) -> int:
    """Trains from the newest checkpoint, or from the beginning where there is none.

    After a loss that is not finite it does so again, without that loss's batch.

    Returns:
        The number of steps that are done.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    skipped: list[int] = []
    while True:
        position = newest_position(run, target, session) or first_position(run, begin())
        position.skipped = sorted({*position.skipped, *skipped})
        try:
            return train_loop(run, position, shardings, key, session)
        except NonFiniteLossError as error:
            skipped = skip_or_stop(run, error, position.skipped, session)


def skip_or_stop(
    run: Run, error: NonFiniteLossError, skipped: list[int], session: Session
) -> list[int]:
    """Returns the batches to leave out from the last checkpoint on, the bad one among them.

    Raises:
        UserError: when no more may be left out.
    """
    checkpoint.finish(session.saved)
    latest = session.saved.latest_step()
    good = "the beginning" if latest is None else f"checkpoint {latest}, the last good one"
    if len(skipped) >= run.config.skip_bad_batches:
        raise UserError(
            f"{error}; the same command resumes from {good}. Try a lower "
            "config.schedule.learning_rate, config.optimizer.clip_norm, or config.skip_bad_batches"
        )
    batch = batch_number(error.step - 1, skipped)
    logger.warning("%s: going back to %s, and leaving out batch %d", error, good, batch)
    return [*skipped, batch]


def newest_position(run: Run, target: TrainState, session: Session) -> Position | None:
    """Returns where the newest whole checkpoint stands, None without any.

    Raises:
        UserError: when it is another run's, or none is whole.
    """
    checkpoint.check_model(session.saved, weights_info(run, None))
    found = checkpoint.restore_newest(session.saved, target)
    if not found:
        return None
    state, data = found
    run.batches.restore(data["batches"])
    logger.info("resumed at step %d of %d", int(state.step), run.total_steps)
    if data.get("world") != world():
        logger.info("it was saved by %s; now there are %s", data.get("world"), world())
    return Position(state, Losses(**data["losses"]), data.get("skipped", []))


def first_position(run: Run, state: TrainState) -> Position:
    """Returns where a run stands before its first step."""
    run.batches.restore(run.batches.state() | {"step": 0})
    logger.info("%s", parameter_overview.get_parameter_overview(state.params))
    return Position(state, Losses(), [])


def train_loop(
    run: Run, position: Position, shardings: TrainState, key: jax.Array, session: Session
) -> int:
    """Runs the steps that are left, evaluating and saving when it is time.

    Returns:
        The number of steps that are done: fewer than all, when the machine asked to end.
    """
    config, total, workdir, clock = run.config, run.total_steps, session.workdir, session.goodput
    train_step = compile_train_step(run.model, run.optimizer, run.recipe, shardings, run.mesh)
    eval_step = compile_eval_step(run.model, run.recipe, shardings.params, run.mesh)
    start, losses = int(position.state.step), position.losses
    primary = jax.process_index() == 0
    eval_every, save_every = run.every(config.eval.every), run.every(config.checkpoint.every)
    numbered = skipping(run.batches, batch_number(start, position.skipped), position.skipped)
    batches = on_device(numbered, run.mesh)
    with contextlib.ExitStack() as stack:
        recorder = Recorder(workdir, start, config.log.wandb_project, enabled=primary)
        stack.callback(recorder.close)
        every = run.every(config.log.every)
        progress = Progress(total, start, config.batch_size, every, clock, primary)
        stack.callback(progress.close)
        profiler = Profiler(workdir / "tensorboard", start, run.every(config.profile))
        stack.callback(profiler.close)
        for step in range(start + 1, total + 1):
            with clock.of(goodput.WAIT):
                batch = next(batches)
            rate = float(run.schedule(step - 1))
            with profiler.step(step):
                position.state, metrics = train_step(position.state, batch, key)
            losses.push(step, metrics["loss"])
            if shown := progress.update(step, losses.last, rate):
                recorder.scalars(step, {"train/loss": losses.last, "learning_rate": rate, **shown})
            results = None
            if step % eval_every == 0 or step == total:
                train_loss = losses.mean()
                with clock.of(goodput.EVALUATE):
                    params = position.state.eval_params
                    results = evaluate(eval_step, params, run.eval_batches, run.mesh)
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
                    f"{train_loss:.4f}, eval loss {results['loss']:.4f}, "
                    f"top-1 {results['top1']:.2f}%, top-5 {results['top5']:.2f}%, lr {rate:.2e}"
                )
            ends = step < total and session.asked_to_end(step)
            if step % save_every == 0 or step == total or ends:
                with clock.of(goodput.SAVE):
                    data, info = position.data(run), weights_info(run, results).to_json()
                    recorder.flush()
                    checkpoint.save(session.saved, position.state, data, info, results)
            if results:
                progress.line(clock.line())
                recorder.scalars(step, {f"goodput/{k}": v for k, v in clock.shares().items()})
                progress.restart(step)
            if ends:
                return step
    return total


def world() -> str:
    """Returns how many devices and processes there are, in words."""
    return f"{jax.device_count()} devices in {jax.process_count()} processes"


def summary(run: Run, workdir: epath.Path, best_step: int | None) -> str:
    """Returns one line on a finished run."""
    rows = {row["step"]: row for row in read_rows(workdir / "metrics.csv")}
    parts = [f"{run.total_steps} steps"]
    if run.total_steps in rows:
        parts.append(f"top-1 {rows[run.total_steps]['top1']:.2f}%")
    if best_step in rows:
        parts.append(f"best {rows[best_step]['top1']:.2f}% at step {best_step}")
    return f"{', '.join(parts)}; checkpoints, metrics.csv and curves.png are in {workdir}"

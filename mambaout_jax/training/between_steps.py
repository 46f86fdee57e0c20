"""What the loop does between steps: log lines, evaluations and checkpoints."""

import dataclasses
import logging
import math

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mambaout_jax.data.workers import WorkerLostError
from mambaout_jax.inference.evaluate import StoppedError, describe, evaluate
from mambaout_jax.runtime import goodput
from mambaout_jax.runtime.goodput import Goodput
from mambaout_jax.runtime.memory import DeviceMemoryError
from mambaout_jax.runtime.preemption import StopRequest
from mambaout_jax.runtime.workdir import keep_record
from mambaout_jax.training import checkpoint
from mambaout_jax.training.out_of_memory import memory_to_evaluate
from mambaout_jax.training.pictures import draw
from mambaout_jax.training.programs import Programs
from mambaout_jax.training.progress import Progress
from mambaout_jax.training.recorder import MASKS, Recorder
from mambaout_jax.training.run import Position, Run

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Session:
    """What is open while a run trains."""

    workdir: epath.Path
    manager: ocp.CheckpointManager
    clock: Goodput
    stop: StopRequest
    recorder: Recorder
    progress: Progress


def log_interval(run: Run, position: Position, session: Session) -> None:
    """Reads the losses since the last log line, and shows the interval."""
    position.losses.read()
    rate = learning_rate(run, position.step)
    shown = session.progress.show(position.step, position.losses.last, rate)
    values = {"train/loss": position.losses.last, "learning_rate": rate}
    values |= {"train/skipped_steps": position.losses.bad} | shown
    session.recorder.scalars(position.step, values)


def evaluate_and_record(
    run: Run, position: Position, programs: Programs, session: Session
) -> dict[str, float] | None:
    """Evaluates, and records a row; None and `position.evaluated` False when asked to stop."""
    step, steps = position.step, run.steps
    position.losses.read()
    try:
        with session.clock.of(goodput.EVALUATE), memory_to_evaluate(run):
            params = position.state.eval_params
            parts = programs.eval_step, params, run.eval_batches, run.mesh, session.stop.reached
            results = evaluate(*parts, run.task.measures.results)
    except StoppedError:
        position.evaluated = False
        return None
    except DeviceMemoryError:
        # As for a stop: no step is lost, and the resumed run evaluates first.
        position.evaluated = False
        if jax.process_count() == 1 and session.manager.latest_step() != step:
            save(run, position, None, session, wait=True)
        raise
    except WorkerLostError as lost:
        if jax.process_count() > 1:  # the others wait for this process's part of the evaluation
            raise
        logger.warning("%s", lost)
        session.stop.request(str(lost))
        position.evaluated = False
        return None
    rate, epoch = learning_rate(run, step), step / steps.per_epoch
    row = {
        "step": step,
        "epoch": epoch,
        "learning_rate": rate,
        "train_loss": position.losses.mean(),
    }
    columns = run.task.measures.columns
    row |= {column: results.get(name, math.nan) for column, name in columns.items()}
    session.recorder.row(row)
    position.rows = session.recorder.rows
    loss = f"eval loss {results['loss']:.4f}, " if "loss" in results else ""
    logger.info(
        "epoch %g/%g: train loss %.4f, %s%s, lr %.2e",
        *(epoch, steps.total / steps.per_epoch, row["train_loss"], loss),
        *(describe(results, digits=2), rate),
    )
    if programs.pictures is not None:
        with session.clock.of(goodput.EVALUATE), memory_to_evaluate(run):
            predicted = programs.pictures.predict(params)
            if session.recorder.enabled:
                name = f"{session.recorder.title}\nstep {step}: {describe(results, digits=2)}"
                session.recorder.picture(step, MASKS, draw(programs.pictures, predicted, name))
    shares = session.clock.shares()
    session.recorder.scalars(step, {f"goodput/{part}": shares[part] for part in shares})
    session.progress.restart(step)
    return results


def late_evaluation(run: Run, position: Position, programs: Programs, session: Session) -> None:
    """Evaluates at the step where the run was stopped, and adds the result to its checkpoint."""
    position.evaluated = True
    if results := evaluate_and_record(run, position, programs, session):
        info = run.weights_info(results)
        checkpoint.amend(session.manager, position.step, position.data(run), info, results)


def save(
    run: Run, position: Position, results: dict[str, float] | None, session: Session, *, wait: bool
) -> None:
    """Starts to save a checkpoint; `wait` as in `checkpoint.save`."""
    position.losses.read()
    with session.clock.of(goodput.SAVE):
        keep_record(session.workdir, run.record)
        info = run.weights_info(results)
        session.recorder.flush()
        data = position.data(run)
        checkpoint.save(session.manager, position.state, data, info, results, wait=wait)
    session.progress.restart(position.step)


def learning_rate(run: Run, step: int) -> float:
    """Returns the learning rate that a step, counted from 1, was taken with."""
    return float(run.schedule(step - 1, np))

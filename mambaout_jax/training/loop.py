"""The training loop: joins data, model, step, evaluation and checkpoints; nothing else does."""

import collections
import contextlib
import logging
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mambaout_jax.bucket import absolute
from mambaout_jax.data.workers import WorkerLostError
from mambaout_jax.errors import PreemptedError
from mambaout_jax.inference.evaluate import NAMES
from mambaout_jax.models.flops import count_total
from mambaout_jax.runtime import goodput
from mambaout_jax.runtime.devices import peak_flops
from mambaout_jax.runtime.goodput import Goodput
from mambaout_jax.runtime.preemption import StopRequest
from mambaout_jax.runtime.processes import all_or_none
from mambaout_jax.runtime.profiler import Profiler
from mambaout_jax.runtime.sharding import global_batch, state_shardings
from mambaout_jax.runtime.workdir import hold_workdir
from mambaout_jax.training import checkpoint
from mambaout_jax.training.between_steps import (
    Session,
    evaluate_and_record,
    late_evaluation,
    log_interval,
    save,
)
from mambaout_jax.training.metrics import LossMeter
from mambaout_jax.training.out_of_memory import memory_to_train
from mambaout_jax.training.programs import Programs, compile_programs
from mambaout_jax.training.progress import Progress
from mambaout_jax.training.recorder import (
    METRICS,
    POSITION_COLUMNS,
    Recorder,
    import_in_background,
    read_rows,
    repair,
)
from mambaout_jax.training.restore import abstract_state, check_model, restore_newest
from mambaout_jax.training.run import Position, Run, world
from mambaout_jax.training.state import TrainState
from mambaout_jax.weights.finetune import initial_params
from mambaout_jax.weights.info import SCORES, score

logger = logging.getLogger(__name__)

# Roles of the root key, which is made of the seed.
INIT_KEY, TRAIN_KEY = 0, 1
_BATCHES_SENT = 2  # to the devices when a step is dispatched, its own among them


def train(run: Run, workdir: epath.Path, stop: StopRequest) -> None:
    """Trains, evaluates and saves; resumes the run that the workdir holds.

    Raises:
        UserError: when the user has to fix something; a new workdir without a step is removed.
        PreemptedError: when the run was asked to stop; it is saved.
    """
    clock = Goodput()
    with all_or_none():
        workdir = absolute(workdir)
    root = jax.random.key(run.seed)
    init_key, train_key = (jax.random.fold_in(root, role) for role in (INIT_KEY, TRAIN_KEY))
    abstract = jax.eval_shape(run.initial_state, init_key)
    shardings = state_shardings(abstract, run.mesh)
    target = abstract_state(abstract, shardings)
    with contextlib.ExitStack() as stack:
        stack.callback(clock.close)
        stack.callback(run.batches.close)
        stack.enter_context(hold_workdir(workdir, run.record, run.free_keys, run.added_keys))
        # Inside `hold_workdir`, which removes a new workdir after a UserError.
        stack.enter_context(memory_to_train(run))
        manager = stack.enter_context(checkpoint.open_checkpoints(workdir, run.keep_checkpoints))
        position = newest_position(run, target, manager, workdir)
        if position and position.step >= run.steps.total and position.evaluated:
            with all_or_none():
                if jax.process_index() == 0:
                    repair(workdir, position.rows, title(run, workdir), columns(run))
            logger.info("finished already: %s", summary(run, position, manager, workdir))
            return
        meanwhile = import_in_background if jax.process_index() == 0 else lambda: None
        resumed = position is not None
        with clock.of(goodput.COMPILE):
            programs = compile_programs(run, target, train_key, init_key, resumed, meanwhile)
        if position is None:
            position = first_position(run, init_key, programs)
        session = open_session(run, position, workdir, manager, clock, stop, stack)
        stop.saves = True
        train_loop(run, position, programs, session)
        logger.info("%s", clock.line())
        if position.step < run.steps.total or not position.evaluated:
            raise PreemptedError(f"saved at step {position.step} of {run.steps.total}")
        logger.info("finished: %s", summary(run, position, manager, workdir))


def newest_position(
    run: Run, target: TrainState, manager: ocp.CheckpointManager, workdir: epath.Path
) -> Position | None:
    """Returns the position of the newest undamaged checkpoint, None without any.

    Raises:
        UserError: when it is another run's, or all are damaged.
    """
    check_model(manager, run.weights_info())
    found = restore_newest(manager, target)
    if not found:
        return None
    state, data = found
    step = int(state.step)
    run.batches.restore(data["batches"])
    rows = data.get("rows")
    if rows is None:  # a run of an older version
        rows = read_rows(workdir / METRICS, columns(run))
        rows = [row for row in rows if row["step"] <= step]
    logger.info("resumed at step %d of %d", step, run.steps.total)
    if data.get("world") != world():
        logger.info("it was saved by %s; now there are %s", data.get("world"), world())
    losses = LossMeter(run.max_bad_steps, **data["losses"])
    return Position(step, state, losses, rows, data.get("evaluated", True))


def first_position(run: Run, init_key: jax.Array, programs: Programs) -> Position:
    """Returns the position before the first step.

    Raises:
        UserError: when the weights to start from cannot be read, or do not fit.
    """
    params = None
    if run.init_from:
        params, report = initial_params(run.init_from, run.model, init_key)
        logger.info("%s", report)
    run.batches.restore(run.batches.state() | {"step": 0})
    return Position(0, programs.initial_state(params), LossMeter(run.max_bad_steps), [])


def open_session(
    run: Run,
    position: Position,
    workdir: epath.Path,
    manager: ocp.CheckpointManager,
    clock: Goodput,
    stop: StopRequest,
    stack: contextlib.ExitStack,
) -> Session:
    """Opens the recorder and the progress display, which `stack` closes."""
    primary = jax.process_index() == 0
    height, width = run.image_size
    layer = count_total(run.model, (height, width, 3))
    logger.info(
        "%s: %s parameters, %.3g GMACs at %dx%d; training images by %s",
        run.model_name,
        f"{layer.params:,}",
        layer.macs / 1e9,
        height,
        width,
        run.batches.made_by,
    )
    # Two FLOPs per multiply-accumulate; a training step takes three forward passes.
    peak = peak_flops(jax.devices()[0].device_kind)
    images = peak * jax.device_count() / (6 * layer.macs) if peak else None
    recorder = stack.enter_context(
        Recorder(
            workdir,
            position.step,
            position.rows,
            title=title(run, workdir),
            measures=run.task.measures.columns,
            wandb_project=run.wandb_project,
            enabled=primary,
        )
    )
    total, batch_size = run.steps.total, run.batch_size
    progress = Progress(total, position.step, batch_size, clock, images, primary)
    stack.callback(progress.close)
    return Session(workdir, manager, clock, stop, recorder, progress)


def train_loop(run: Run, position: Position, programs: Programs, session: Session) -> None:
    """Runs the steps that are left, with evaluations and saves, until the end or a stop request.

    Between two log lines nothing is read from the devices, and nothing else is computed on them.
    A batch is sent to the devices before the step ahead of it is dispatched: on a GPU a copy waits
    for all steps dispatched before it, because its memory may be one that they use.
    """
    steps, clock, progress = run.steps, session.clock, session.progress
    sent: collections.deque[dict[str, jax.Array]] = collections.deque()
    with contextlib.closing(
        Profiler(session.workdir / "tensorboard", position.step, steps.profile)
    ) as profiler:
        if not position.evaluated:
            late_evaluation(run, position, programs, session)
        first = position.step
        while position.step < steps.total and position.evaluated:
            with clock.waiting_for_batch():
                while len(sent) < min(_BATCHES_SENT, steps.total - position.step):
                    batch = next_batch(run, session)
                    inputs = {name: batch[name] for name in ("image", "label")}
                    sent.append(global_batch(inputs, run.mesh))
            step = position.step + 1
            with profiler.step(step):
                start = time.perf_counter()
                position.state, metrics = programs.train_step(position.state, sent.popleft())
            position.step = step
            clock.dispatched(start, metrics["loss"])
            position.losses.push(step, metrics["loss"])
            progress.advance()
            if step % steps.log_every == 0:
                log_interval(run, position, session)
            elif step == first + 1:  # the rates leave out the first step and the loader's start
                progress.restart(step)
            results = None
            if step % steps.evaluate_every == 0 or step == steps.total:
                results = evaluate_and_record(run, position, programs, session)
            stopping = not position.evaluated or session.stop.reached()
            last = step == steps.total or stopping
            if step % steps.save_every == 0 or last:
                save(run, position, results, session, wait=last)
            if stopping and step < steps.total:
                return


def next_batch(run: Run, session: Session) -> dict[str, np.ndarray]:
    """Returns the next batch; the death of a loader's worker is a request to stop.

    The step is taken with new workers, since all processes must stop at the same step.

    Raises:
        WorkerLostError: when a new worker dies, too.
    """
    try:
        return next(run.batches)
    except WorkerLostError as lost:
        logger.warning("%s", lost)
        session.stop.request(str(lost))
    return next(run.batches)


def columns(run: Run) -> tuple[str, ...]:
    """Returns the columns of metrics.csv."""
    return (*POSITION_COLUMNS, *run.task.measures.columns)


def title(run: Run, workdir: epath.Path) -> str:
    """Returns the title of the curves."""
    return f"{workdir.name}: {run.model_name} on {run.eval_batches.name}"


def summary(
    run: Run, position: Position, manager: ocp.CheckpointManager, workdir: epath.Path
) -> str:
    """Returns one line on a finished run."""
    rows, best = {row["step"]: row for row in position.rows}, manager.best_step()
    parts = [f"{run.steps.total} steps"]
    if run.steps.total in rows:
        last = rows[run.steps.total]
        name = next(NAMES[key] for key in SCORES if key in last)
        parts.append(f"{name} {score(last):.2f}%")
    if best in rows:
        parts.append(f"best {score(rows[best]):.2f}% at step {best}")
    return f"{', '.join(parts)}; checkpoints, metrics.csv and curves.png are in {workdir}"

"""What to change when a run does not fit into memory, the least first."""

import contextlib
from collections.abc import Iterator, Sequence

import jax.numpy as jnp

from mambaout_jax.runtime.memory import host_memory_for, memory_for
from mambaout_jax.training.run import Run


@contextlib.contextmanager
def memory_to_train(run: Run) -> Iterator[None]:
    """Turns an error about memory in training into `training_message` or `host_message`."""
    with (
        host_memory_for(host_message),
        memory_for(lambda reason: training_message(run, reason)),
    ):
        yield


def memory_to_evaluate(run: Run) -> contextlib.AbstractContextManager[None]:
    """Turns an error about memory in an evaluation during training into `evaluation_message`."""
    return memory_for(lambda reason: evaluation_message(run, reason))


def training_message(run: Run, reason: str) -> str:
    """Returns the sentence for training; `reason` is XLA's."""
    devices, parts = run.mesh.size, run.recipe.accumulate_steps
    images = f"{counted(run.batch_size // (devices * parts), 'image')} per device"
    if parts > 1:
        images += f" in each of {parts} parts"
    resumable, others = [], ["a smaller config.batch_size"]
    more = range(parts + 1, run.batch_size // devices + 1)
    if finer := next((n for n in more if run.batch_size % (n * devices) == 0), None):
        resumable.append(f"config.accumulate_steps={finer} (or more)")
    if not run.model.remat:
        resumable.append("config.model.remat=True")
    if run.mesh.shape["fsdp"] < devices:
        resumable.append(f"config.mesh.fsdp={devices}")
    resumable.append("the same command on more devices")
    if run.model.dtype != jnp.bfloat16:
        others.insert(0, "config.model.dtype=bfloat16")
    if run.teacher:
        others.append("a smaller config.distillation.teacher")
    plan = ""
    if run.mesh.devices.flat[0].platform == "tpu":
        plan = "; tools/plan_tpu.py computes beforehand what fits"
    return (
        f"not enough memory on {counted(devices, 'device')} to train {run.model_name} with "
        f"config.batch_size={run.batch_size}, {images} ({reason}): try {either(resumable)}, "
        f"with which a run may be resumed, or else {either(others)} in a new --workdir{plan}"
    )


def evaluation_message(run: Run, reason: str) -> str:
    """Returns the sentence for an evaluation during training; `reason` is XLA's."""
    size, devices = run.eval_batch_size, run.mesh.size
    smaller = "a smaller config.eval.batch_size" if size > devices else "more devices"
    return (
        f"not enough memory on {counted(devices, 'device')} to evaluate {run.model_name} with "
        f"config.eval.batch_size={size}, {counted(size // devices, 'image')} per device, while it "
        f"trains ({reason}): resume the run with {smaller}"
    )


def host_message(reason: str) -> str:
    """Returns the sentence for a host that has too little memory; `reason` is Python's."""
    return (
        f"not enough memory on this host ({reason}): free some, or try fewer config.data.workers, "
        "with which a run may be resumed, or else a smaller config.batch_size in a new --workdir"
    )


def either(choices: Sequence[str]) -> str:
    """Returns "A", "A or B" or "A, B or C"."""
    return " or ".join(part for part in (", ".join(choices[:-1]), choices[-1]) if part)


def counted(number: int, noun: str) -> str:
    """Returns "1 device" or "8 devices"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

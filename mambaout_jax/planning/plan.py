"""The plan of a run on a slice of TPUs: memory, collectives, time, from one compilation."""

import dataclasses
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from mambaout_jax.build import build_steps
from mambaout_jax.config import check
from mambaout_jax.errors import UserError
from mambaout_jax.planning.program import Kernel, Program, lower_step, read_program
from mambaout_jax.planning.schedule import count_kernels
from mambaout_jax.planning.topology import Generation, exceeds_memory, find_topology, slice_devices
from mambaout_jax.runtime.sharding import check_batch, make_mesh


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip's memory. Arguments are the state, which the step changes in place."""

    arguments: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """All of it at once."""
        return self.arguments + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Plan:
    """The compiler's figures for a step, per chip; times in seconds."""

    generation: Generation
    chips: int
    images: int  # a chip and step
    parts: int  # that these are accumulated from, one after the other
    total_steps: int
    memory: Memory
    program: Program
    kernels: dict[Kernel, int]  # cycles of a call: counted, or of its transfers if those are more
    lowering: float
    compilation: float
    processor: float  # seconds of all threads, in the compilation

    @property
    def estimated(self) -> int:
        """Cycles of XLA's own operations."""
        return sum(operation.cycles for operation in self.program.operations)

    @property
    def counted(self) -> int:
        """Cycles of our kernels."""
        return sum(self.kernels[kernel] * calls for kernel, calls in self.program.kernels.items())

    @property
    def collective_bytes(self) -> int:
        """Bytes of all collectives of a step."""
        return sum(size for _, size in self.program.collectives.values())

    @property
    def step(self) -> float:
        """Seconds a step, no collective hidden behind computation, none waiting for input."""
        cycles = self.estimated + self.counted
        transfer = 2 * self.collective_bytes / self.generation.links if self.chips > 1 else 0.0
        return cycles / self.generation.clock + transfer

    @property
    def largest(self) -> int:
        """Images a chip and part that fit if temporaries grow with the images: a multiple of 8."""
        free = self.generation.memory * 2**30 - self.memory.arguments - self.memory.code
        return int(free / (self.memory.temporaries / (self.images / self.parts))) // 8 * 8


def make_plan(config: ConfigDict, topology: str, examples: int) -> Plan:
    """Compiles the training step of a config for a topology; call `load_compiler` before.

    Args:
        config: the run's configuration.
        topology: a slice, such as "v5e:4x4".
        examples: training examples of an epoch.

    Raises:
        UserError: when the topology is unknown, the batch or the mesh does not divide over its
            chips, or the step does not fit into their memory.
    """
    check(config)
    generation, _ = find_topology(topology)
    mesh = make_mesh(config.mesh.fsdp, slice_devices(topology))
    check_batch(config.batch_size, config.accumulate_steps, mesh, "batch_size")
    check_batch(config.eval.batch_size, 1, mesh, "eval.batch_size")
    steps_per_epoch = examples // config.batch_size
    if not steps_per_epoch:
        raise UserError(
            f"config.batch_size {config.batch_size} is more than the {examples} training "
            "examples: choose a smaller one"
        )
    started = time.perf_counter()
    lowered = lower_step(config, mesh, steps_per_epoch)
    compiling, processor = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _too_large(error, config, topology, mesh.size) from None
    compiled_at, processor = time.perf_counter(), time.process_time() - processor
    program = read_program(str(compiled.as_text()), config.accumulate_steps)
    memory = _memory(compiled)
    counted = count_kernels(program.kernels, topology)
    bytes_per_cycle = generation.bandwidth / generation.clock
    return Plan(
        generation=generation,
        chips=mesh.size,
        images=config.batch_size // mesh.size,
        parts=config.accumulate_steps,
        total_steps=build_steps(config, steps_per_epoch).total,
        memory=memory,
        program=program,
        kernels={
            kernel: max(cycles, round(kernel.size / bytes_per_cycle))
            for kernel, cycles in counted.items()
        },
        lowering=compiling - started,
        compilation=compiled_at - compiling,
        processor=processor,
    )


def _memory(compiled: Any) -> Memory:
    sizes = compiled.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Memory(
        arguments=sizes.argument_size_in_bytes + outputs,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )


def _too_large(error: Exception, config: ConfigDict, topology: str, chips: int) -> Exception:
    """Returns the user's error when memory is what a compilation lacked, else the error itself."""
    sizes = exceeds_memory(error)
    if sizes is None:
        return error
    parts = config.accumulate_steps
    images = config.batch_size // chips // parts
    enough = next(
        (n for n in range(2, images) if images % n == 0 and sizes[0] / n < 0.9 * sizes[1]), images
    )
    return UserError(
        f"{images} images per chip of {topology} need {sizes[0]:.2f} GiB of memory and there are "
        f"{sizes[1]:.2f}: try --config.accumulate_steps={parts * enough}, "
        "--config.model.remat=True, more chips or a smaller --config.batch_size"
    )


def describe(plan: Plan, price: float | None = None) -> str:
    """Returns the plan as lines of text, with the cost of the run at a price per chip hour."""
    gib, memory, generation = 2**30, plan.memory, plan.generation
    parts = f" in {plan.parts} parts" if plan.parts > 1 else ""
    cycles = plan.estimated + plan.counted
    hours = plan.total_steps * plan.step / 3600
    cost = "" if price is None else f", {hours * plan.chips * price:,.0f} at {price} each"
    kinds = [
        f"{count} {kind}, {size / 1e6:.1f} MB"
        for kind, (count, size) in sorted(plan.program.collectives.items())
    ]
    lines = {
        "chips": f"{plan.chips}, {plan.images} images each per step{parts}",
        "memory": f"{memory.peak / gib:.2f} of {generation.memory} GiB per chip: "
        f"{memory.arguments / gib:.2f} state and batch, {memory.temporaries / gib:.2f} "
        f"temporaries, {memory.code / gib:.2f} code",
        "collectives": f"{'; '.join(kinds) or 'none'}, per chip and step",
        "largest batch": f"{plan.largest} images per chip{' and part' if parts else ''}, "
        "if temporaries grow with the batch (not compiled)",
        "cycles": f"{cycles / 1e6:.1f} M per chip: XLA's estimate "
        f"{plan.estimated / 1e6:.1f} M, counted in the kernels {plan.counted / 1e6:.1f} M",
        "step": f"{plan.step * 1e3:.1f} ms: cycles at {generation.clock / 1e9} GHz plus twice the "
        f"communicated bytes at {generation.links / 1e9:.0f} GB/s, without overlap",
        "images/s": f"{plan.chips * plan.images / plan.step:,.0f}, "
        f"{plan.images / plan.step:,.0f} per chip, if input and host keep up",
        "whole run": f"{plan.total_steps:,} steps, {hours:.1f} hours without evaluation: "
        f"{hours * plan.chips:,.0f} chip hours{cost}",
        "compilation": f"{plan.compilation:.0f} s ({plan.processor:.0f} s of CPU time), "
        f"{plan.lowering:.0f} s to lower",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {line}" for name, line in lines.items())

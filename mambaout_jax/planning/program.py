"""The training step as a compiled program: how it is lowered, what the compiler says of it."""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mambaout_jax.build import build_model, build_optimizer, build_recipe, build_schedule
from mambaout_jax.errors import UserError
from mambaout_jax.runtime.sharding import state_shardings
from mambaout_jax.training.state import init_params, init_state
from mambaout_jax.training.step import compile_train_step
from mambaout_jax.training.task import TASKS

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def lower_step(config: ConfigDict, mesh: Mesh, steps_per_epoch: int) -> jax.stages.Lowered:
    """Lowers the training step of a configuration, over a mesh of any devices.

    Raises:
        UserError: the configuration has a teacher.
    """
    if config.distillation.teacher:
        raise UserError("a plan has no teacher: expected --config.distillation.teacher=''")
    network, recipe = build_model(config), build_recipe(config, steps_per_epoch)
    optimizer = build_optimizer(config, build_schedule(config, steps_per_epoch))
    size, ema = config.data.image_size, config.optimizer.ema_decay > 0
    state = jax.eval_shape(
        lambda key: init_state(init_params(key, network, (size, size)), optimizer, ema=ema),
        jax.random.key(0),
    )
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    if TASKS[config.task].dense:
        batch["label"] = jax.ShapeDtypeStruct((config.batch_size, size, size), jnp.uint8)
    step: Any = compile_train_step(network, optimizer, recipe, state_shardings(state, mesh), mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(state, batch, jax.ShapeDtypeStruct((2,), jnp.uint32))


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of XLA's own: the cycles estimated of it in a step, and where it is from."""

    cycles: int
    name: str
    scope: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of ours: its name, its operands' types and shapes, and the bytes of its arrays."""

    name: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    size: int

    def __str__(self) -> str:
        """Returns the name and the first map's shape."""
        return f"{self.name} {self.operands[0][1]}"


@dataclasses.dataclass(frozen=True)
class Program:
    """Operations, kernels and collectives of a compiled module, for one device.

    `kernels` counts the calls of each kernel; `collectives` has the operations and their bytes, of
    the larger of operand and result, by kind.
    """

    operations: tuple[Operation, ...]
    kernels: collections.Counter[Kernel]
    collectives: dict[str, tuple[int, int]]


def read_program(text: str, parts: int = 1) -> Program:
    """Reads a compiled step.

    Its loop over `parts` of a batch counts so often. Other loops count as often as their condition
    allows if it compares a counter, which starts at 0, with a constant, as that of a selective scan
    does; else once.
    """
    operations, kernels = [], collections.Counter[Kernel]()
    loops = _trips(text, parts)
    for computation, trips in loops.items():
        for line in _body(text, computation):
            name = re.match(r"\s+(?:ROOT )?%([\w.-]+) = ", line)
            if name and 'custom_call_target="tpu_custom_call"' in line:
                kernels[_read_kernel(re.sub(r"[.\d]+$", "", name[1]), line)] += trips
            elif name and (cycles := re.search(r'"estimated_cycles":"(\d+)"', line)):
                scope = re.search(r'op_name="([^"]*)"', line)
                scope_name = scope[1] if scope else ""
                operations.append(Operation(int(cycles[1]) * trips, name[1], scope_name))
    return Program(tuple(operations), kernels, _read_collectives(text, loops))


def _read_kernel(name: str, line: str) -> Kernel:
    (results,) = _match(r" = (.*?) custom-call\(", line)
    operands = _shapes(line[line.index("operand_layout_constraints") :].split("}}")[0])
    # All operands of a depthwise kernel but the last are one array, of which each reads other rows.
    arrays = (operands[0], operands[-1]) if name.startswith("depthwise") else operands
    return Kernel(name, operands, sum(_tiled_size(*a) for a in (*arrays, *_shapes(results))))


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in re.findall(r"(bf16|f32)\[([\d,]*)\]", text)
    )


def _tiled_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of an array whose last axis is padded to whole registers of 128 lanes."""
    *others, channels = shape
    return _BYTES[dtype] * math.prod(others) * -(-channels // 128) * 128


def _body(text: str, computation: str) -> list[str]:
    found = re.search(
        rf"^(?:ENTRY )?%?{re.escape(computation)} \(.*?^\}}", text, re.MULTILINE | re.DOTALL
    )
    return found[0].splitlines() if found else []


def _trips(text: str, parts: int) -> dict[str, int]:
    """Returns how often the entry and each loop's body run."""
    (entry,) = _match(r"^ENTRY %?([\w.-]+) \(", text)
    trips, open_bodies = {entry: 1}, [entry]
    while open_bodies:
        computation = open_bodies.pop()
        for line in _body(text, computation):
            if body := re.search(r" while\(.*body=%?([\w.-]+)", line):
                over_parts = 'op_name="jit(train_step)/while"' in line
                trips[body[1]] = trips[computation] * (parts if over_parts else _limit(text, line))
                open_bodies.append(body[1])
    return trips


def _limit(text: str, loop: str) -> int:
    """Returns the trips of a loop by its condition, 1 if that does not tell."""
    condition = "\n".join(_body(text, _match(r"condition=%?([\w.-]+)", loop)[0]))
    name = re.search(r"compare\(%[\w.-]+, %([\w.-]+)\), direction=LT", condition)
    limit = name and re.search(rf"%{re.escape(name[1])} = s32\S* constant\((\d+)\)", condition)
    return int(limit[1]) if limit else 1


def _match(pattern: str, text: str) -> tuple[Any, ...]:
    found = re.search(pattern, text, re.MULTILINE)
    if not found:
        raise ValueError(
            f"libtpu writes modules otherwise than expected: no {pattern} in {text[:200]}"
        )
    return found.groups()


def _read_collectives(text: str, loops: dict[str, int]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    shapes = dict(re.findall(r"^\s+(?:ROOT )?%([\w.-]+) = (.*?) [a-z][\w-]*\(", text, re.MULTILINE))
    pattern = rf" = (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(([^)]*)\)"
    for computation, trips in _calls(text, loops).items():
        lines = "\n".join(_body(text, computation))
        for result, kind, start, operands in re.findall(pattern, lines):
            given = sum(_size(shapes.get(name, "")) for name in re.findall(r"%([\w.-]+)", operands))
            taken = _size(result) - given if start and result.startswith("(") else _size(result)
            count, size = found.get(kind, (0, 0))
            found[kind] = count + trips, size + trips * max(given, taken)
    return found


def _calls(text: str, loops: dict[str, int]) -> dict[str, int]:
    """Returns how often the entry, the loops' bodies and what these call run."""
    calls = dict(loops)
    for computation, trips in loops.items():
        called = re.findall(r"calls=%?([\w.-]+)", "\n".join(_body(text, computation)))
        calls |= {name: trips for name in called if name not in loops}
    return calls


def _size(shape: str) -> int:
    return sum(
        _BYTES.get(dtype, 4) * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )

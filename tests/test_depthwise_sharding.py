"""Depthwise convolution inside larger programs: a sharded batch, remat, export."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mambaout_jax.ops import depthwise_conv2d

N, H, W, C = 16, 5, 6, 12


def loss(x, kernel, implementation):
    y = depthwise_conv2d(x, kernel, implementation=implementation)
    return (y * jnp.cos(y)).sum()


def example():
    random = np.random.RandomState(0)
    x = random.standard_normal((N, H, W, C)).astype(np.float32)
    return x, random.standard_normal((3, 3, 1, C)).astype(np.float32)


def gradients(implementation):
    return jax.value_and_grad(lambda x, kernel: loss(x, kernel, implementation), (0, 1))


def gathered_elements(module: str) -> list[int]:
    """Returns the element count of each all-gather's result in a compiled module."""
    shapes = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather", module)
    return [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]


@pytest.mark.parametrize("implementation", ["auto", "shifted", "pallas_tpu"])
def test_a_sharded_batch_stays_sharded_and_gives_the_same_gradients(implementation):
    assert jax.device_count() == 8
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    batch, replicated = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec())
    )

    def in_mesh(x, kernel):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients(implementation)(x, kernel)

    step = jax.jit(
        in_mesh,
        in_shardings=(batch, replicated),
        out_shardings=(replicated, (batch, replicated)),
    )
    x, kernel = example()
    compiled = step.lower(x, kernel).compile()
    assert gathered_elements(compiled.as_text()) == []
    assert "all-reduce" in compiled.as_text()
    actual = compiled(jax.device_put(x, batch), jax.device_put(kernel, replicated))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        actual,
        gradients("xla")(x, kernel),
    )


def test_the_search_for_all_gathers_finds_one():
    mesh = jax.make_mesh((8,), ("data",))
    batch, replicated = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec())
    )
    gather = jax.jit(lambda x: x * 2, in_shardings=batch, out_shardings=replicated)
    assert gathered_elements(gather.lower(example()[0]).compile().as_text()) == [N * H * W * C]


@pytest.mark.parametrize("implementation", ["shifted", "pallas_tpu"])
def test_remat_changes_nothing(implementation):
    # Small integers: every sum is exact, whatever its order.
    x, kernel = (np.round(array) for array in example())

    def square(x, kernel):
        return (depthwise_conv2d(x, kernel, implementation=implementation) ** 2).sum()

    plain = jax.jit(jax.value_and_grad(square, (0, 1)))(x, kernel)
    again = jax.jit(jax.value_and_grad(jax.checkpoint(square), (0, 1)))(x, kernel)
    jax.tree.map(np.testing.assert_array_equal, plain, again)


def exported(platform: str, images: int = N) -> jax.export.Exported:
    """Returns the step of "auto", lowered here for the platform."""
    x, kernel = example()
    return jax.export.export(jax.jit(gradients("auto")), platforms=[platform])(x[:images], kernel)


def test_auto_chooses_for_the_platform_that_is_lowered_for():
    assert "stablehlo.convolution" not in exported("cpu").mlir_module()
    assert exported("rocm").mlir_module().count("stablehlo.convolution") == 3
    tpu = exported("tpu").mlir_module()
    assert "stablehlo.convolution" not in tpu
    assert tpu.count("@tpu_custom_call") == 3
    few = exported("tpu", images=7).mlir_module()
    assert few.count("stablehlo.convolution") == 3
    assert "@tpu_custom_call" not in few


def test_an_exported_step_gives_the_same_gradients():
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        exported("cpu").call(*example()),
        gradients("xla")(*example()),
    )

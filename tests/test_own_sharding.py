"""`jax.jit(model.apply)` with images that the user sharded: right, split and with the kernels."""

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import golden
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mambaout_jax
from mambaout_jax.ops.sharded import images_on_device

P = PartitionSpec
SMALL = {"depths": (1, 1, 1, 1), "widths": (8, 12, 16, 24), "num_classes": 10}


def loss_and_logits(model, params, images):
    logits = model.apply({"params": params}, images)
    return (logits**2).sum(), logits


def make_gradient(model):
    """Returns params, images -> (gradients, logits), jitted."""
    return jax.jit(
        jax.grad(lambda params, images: loss_and_logits(model, params, images), has_aux=True)
    )


@pytest.fixture(scope="module")
def expected():
    """Returns model, parameters, images and the results of one device."""
    model = mambaout_jax.create_model("test_mambaout", **SMALL)
    params, images = golden.params(model), golden.images(0, 16, 32)
    return model, params, images, make_gradient(model)(params, images)


def assert_equal(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


CASES = list(
    itertools.product(
        (AxisType.Auto, AxisType.Explicit),
        (P("data"), P(("data", "fsdp"))),
        (False, True),
        (False, True),
    )
)
# Every pair of values of two arguments is in the first test cases; the rest are slow tests.
FIRST = [case for case in CASES if (CASES.index(case).bit_count() % 2) == 0]


@pytest.mark.parametrize(
    ("kind", "spec", "in_context", "params_on_mesh"),
    [*FIRST, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case not in FIRST)],
)
def test_a_batch_on_a_mesh(expected, kind, spec, in_context, params_on_mesh):
    assert jax.device_count() == 8
    model, params, images, (gradients, logits) = expected
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(kind, kind))
    images = jax.device_put(images, NamedSharding(mesh, spec))
    if params_on_mesh:
        params = jax.device_put(params, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        got = jax.jit(model.apply)({"params": params}, images)
        assert_equal(make_gradient(model)(params, images), (gradients, logits))
    assert_equal(got, logits)
    assert got.sharding.shard_shape(got.shape)[0] < 16


@pytest.mark.parametrize("spec", [P(None, "data"), P(None, None, "data")])
def test_images_in_parts(expected, spec):
    model, params, images, (_, logits) = expected
    mesh = Mesh(np.array(jax.devices()), ("data",))
    images = jax.device_put(images, NamedSharding(mesh, spec))
    assert_equal(jax.jit(model.apply)({"params": params}, images), logits)


def test_in_shardings_and_a_batch_that_the_devices_do_not_divide(expected):
    model, params, images, (_, logits) = expected
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    apply = jax.jit(model.apply, in_shardings=(whole, split))
    assert_equal(apply({"params": params}, images), logits)
    on_mesh = jax.device_put(params, whole)
    assert_equal(jax.jit(model.apply)({"params": on_mesh}, images[:3]), logits[:3])


def test_the_users_own_shard_map_and_pmap(expected):
    model, params, images, (gradients, logits) = expected
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def part(params, images):
        gradients, logits = make_gradient(model)(params, images)
        return jax.lax.psum(gradients, "data"), logits

    for names in ({"data", "model"}, {"data"}):  # all axes, or one, the other being automatic
        got = jax.jit(
            jax.shard_map(
                part,
                mesh=mesh,
                in_specs=(P(), P("data")),
                out_specs=(P(), P("data")),
                axis_names=names,
                check_vma=False,
            )
        )(params, images)
        assert_equal(got, (gradients, logits))
    apply = jax.shard_map(model.apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    assert_equal(jax.jit(apply)({"params": params}, images), logits)
    apply = jax.pmap(model.apply, in_axes=(None, 0))
    got = apply({"params": params}, images.reshape(8, 2, 32, 32, 3))
    assert_equal(got.reshape(16, 10), logits)


@pytest.mark.parametrize(
    ("kind", "spec", "expected"),
    [
        (AxisType.Auto, P("data"), [2, 4]),  # of automatic axes, all that divide the batch count
        (AxisType.Explicit, P("data"), [4, 4]),
        (AxisType.Explicit, P(("data", "model")), [2, 2]),
    ],
)
def test_images_of_a_device(kind, spec, expected):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    images = jax.numpy.zeros((16, 2, 2, 3))
    assert images_on_device(images) == 16
    counts = []

    def count(x):
        counts.append(images_on_device(x))
        return x

    images = jax.device_put(images, NamedSharding(mesh, spec))
    jax.make_jaxpr(count)(images)
    jax.make_jaxpr(jax.shard_map(count, mesh=mesh, in_specs=spec, out_specs=spec))(images)
    assert counts == expected


TPU = """
import contextlib, json, logging, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import mambaout_jax
from mambaout_jax.planning.topology import load_compiler, slice_devices
load_compiler()
warnings = []
logger = logging.getLogger("mambaout_jax.ops.kernels")
logger.addFilter(lambda record: warnings.append(record.getMessage()))
model = mambaout_jax.create_model("test_mambaout", **json.loads(sys.argv[1]))
images = jax.ShapeDtypeStruct((32, 32, 32, 3), jnp.float32)
params = jax.eval_shape(model.init, jax.random.key(0), images)
gradient = jax.grad(lambda params, images: (model.apply(params, images) ** 2).sum())
def on(tree, sharding):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)
lowered = {}
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = Mesh(np.array(slice_devices("v5e:2x2")), ("data",), axis_types=(kind,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    for name, function in (("apply", model.apply), ("gradient", gradient)):
        of = f"{kind.name} {name}"
        lowered[of] = jax.jit(function).lower(on(params, whole), on(images, split))
        lowered[f"{of}, params anywhere"] = jax.jit(function).lower(params, on(images, split))
        jitted = jax.jit(function, in_shardings=(whole, split))
        with jax.set_mesh(mesh):
            lowered[f"{of}, in_shardings and set_mesh"] = jitted.lower(params, images)
        if kind == AxisType.Auto:
            lowered[f"{of}, in_shardings"] = jitted.lower(params, images)
kernels = {of: step.as_text().count("@tpu_custom_call") for of, step in lowered.items()}
compiled = lowered["Auto gradient"].compile().as_text()
print(json.dumps([kernels, warnings, compiled.count("tpu_custom_call"),
                  "all-gather" in compiled]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_lowering_for_a_slice_of_tpus():
    # In a process of its own: libtpu reads its flags once, and keeps its devices.
    command = [sys.executable, "-c", TPU, json.dumps(SMALL)]
    environment = os.environ | {"XLA_FLAGS": ""}  # libtpu does not know the CPU's flags
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    kernels, warnings, compiled, gathered = json.loads(done.stdout.splitlines()[-1])
    for name, count in kernels.items():
        expected = 4 if "apply" in name else 12
        assert count == (0 if name.endswith("in_shardings") else expected), name
    assert len(kernels) == 14
    (warning,) = warnings  # of the two without a mesh, once
    assert "XLA cannot split a kernel over 4 devices" in warning
    assert "`with jax.set_mesh(mesh):`" in warning
    assert compiled == 12
    assert not gathered

"""The selective scan: against a loop in float64, and against the Mamba layer of transformers."""

import functools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mambaout_jax.errors import UserError
from mambaout_jax.ops import kernels, selective_scan
from mambaout_jax.ops.selective_scan import xla
from mambaout_jax.ops.selective_scan.xla import CHUNK

ALL = tuple(range(6))


def example(length, n=2, channels=3, state=4):
    random = np.random.RandomState(length)
    x, weight = random.standard_normal((2, n, length, channels))
    delta = np.logaddexp(0, random.standard_normal((n, length, channels)) - 2)
    a = -np.exp(random.standard_normal((channels, state)))
    b, c = random.standard_normal((2, n, length, state))
    return (x, delta, a, b, c, random.standard_normal(channels)), weight


def loop(x, delta, a, b, c, d):
    h = np.zeros((*x[:, 0].shape, a.shape[1]))
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        new = delta[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        h = np.exp(delta[:, t, :, None] * a) * h + new
        y[:, t] = (h * c[:, t, None]).sum(-1) + d * x[:, t]
    return y


@functools.partial(jax.jit, static_argnames="implementation")
def output_and_gradients(args, weight, implementation):
    y, transpose = jax.vjp(
        lambda *args: selective_scan(*args, implementation=implementation), *args
    )
    return y, *transpose(weight)


def in_float32(arrays):
    return tuple(np.float32(array) for array in arrays)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 49, 196])
def test_chunks_equal_the_scan_and_the_loop_in_float64(length):
    args, weight = example(length)
    run = functools.partial(output_and_gradients, in_float32(args), np.float32(weight))
    plain, chunked = run(implementation="scan"), run(implementation="chunked")
    for ours, theirs in zip(chunked, plain, strict=True):
        scale = max(1, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)
    np.testing.assert_allclose(plain[0], loop(*args), rtol=0, atol=1e-5)
    # Each gradient, against a difference of the loop in a random direction.
    for argument in ALL:
        direction = np.random.RandomState(argument).standard_normal(args[argument].shape)
        ends = []
        for sign in (1, -1):
            moved = list(args)
            moved[argument] = args[argument] + sign * 1e-6 * direction
            ends.append((loop(*moved) * weight).sum())
        expected = (ends[0] - ends[1]) / 2e-6
        found = (np.float64(plain[1 + argument]) * direction).sum()
        assert abs(found - expected) < 2e-4 * max(1, abs(expected))


def test_auto_is_chunked_for_more_than_one_chunk_and_keeps_no_state_of_each_step():
    def kept(length, implementation):
        args, _ = example(length)
        _, transpose = jax.eval_shape(
            functools.partial(
                jax.vjp, functools.partial(selective_scan, implementation=implementation)
            ),
            *in_float32(args),
        )
        return max(leaf.size for leaf in jax.tree.leaves(transpose))

    n, channels, state = 2, 3, 4
    states = 8 * CHUNK * n * channels * state
    assert kept(8 * CHUNK, "scan") >= states
    assert kept(8 * CHUNK, "chunked") < states / 2
    assert kept(8 * CHUNK, "auto") == kept(8 * CHUNK, "chunked")
    assert kept(CHUNK, "auto") == kept(CHUNK, "scan")


def test_bfloat16_has_states_of_float32():
    args, _ = example(40)
    half = tuple(jnp.asarray(array, jnp.bfloat16) for array in args)
    y = selective_scan(*half)
    assert y.dtype == jnp.bfloat16
    exact = selective_scan(*(array.astype(jnp.float32) for array in half))
    np.testing.assert_allclose(np.float32(y), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_on_a_mesh(kind):
    args, weight = example(CHUNK + 4, n=8)
    args, weight = in_float32(args), np.float32(weight)
    expected = output_and_gradients(args, weight, "chunked")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    batch, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    placed = [jax.device_put(x, batch if x.ndim == 3 else whole) for x in (*args, weight)]
    with jax.set_mesh(mesh):
        found = output_and_gradients(tuple(placed[:-1]), placed[-1], "chunked")
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(1, float(np.abs(theirs).max()))
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)


def test_an_exported_scan_takes_any_batch_on_any_platform():
    args, _ = example(CHUNK + 4, channels=4)
    batch = jax.export.symbolic_shape("batch")
    shapes = [
        jax.ShapeDtypeStruct((*batch, *array.shape[1:]) if array.ndim == 3 else array.shape, "f4")
        for array in args
    ]
    program = jax.export.export(jax.jit(selective_scan), platforms=("cpu", "cuda", "tpu"))(*shapes)
    args = in_float32(args)
    expected = output_and_gradients(args, np.float32(args[0]), "chunked")[0]
    np.testing.assert_allclose(program.call(*args), expected, rtol=0, atol=1e-5)


def test_bad_arguments():
    args = in_float32(example(5)[0])
    with pytest.raises(UserError, match=r"expected x and delta \[N, L, E\], .* got \(2, 4, 3\)"):
        selective_scan(args[0][:, :4], *args[1:])
    with pytest.raises(UserError, match="L at least 1"):
        selective_scan(*(array[:, :0] if array.ndim == 3 else array for array in args))
    with pytest.raises(UserError, match="unknown implementation 'fast' of selective_scan"):
        selective_scan(*args, implementation="fast")
    with pytest.raises(UserError, match="'triton' takes at most 32 states, got 33"):
        selective_scan(*in_float32(example(5, state=33)[0]), implementation="triton")
    with pytest.raises(UserError, match="'triton' cannot be used, choose 'auto': its kernels are"):
        output_and_gradients(args, args[0], "triton")


@pytest.mark.parametrize(
    ("length", "state", "capability", "expected"),
    [(40, 4, (9, 0), True), (16, 4, (9, 0), False), (40, 33, (9, 0), False), (40, 4, None, False)],
)
def test_auto_takes_the_kernel_on_a_gpu(length, state, capability, expected, monkeypatch, caplog):
    called = kernel_calls(monkeypatch, capability)
    args = in_float32(example(length, state=state)[0])
    traced = jax.jit(lambda *args: selective_scan(*args)).trace(*args)  # anew
    traced.lower(lowering_platforms=("cuda",))
    assert bool(called) == expected
    assert ("XLA's slower selective scans" in caplog.text) == (capability is None)


def kernel_calls(monkeypatch, capability):
    """Returns a list that grows with each use of the kernel; `chunked` is lowered in its place."""
    monkeypatch.setattr(kernels, "compute_capability", lambda: capability)
    kernels._warn_once.cache_clear()
    called = []

    def forward(*args, **options):
        called.append(options)
        return xla.forward(*args, **options)

    for name in ("jax_triton", "mambaout_jax.ops.selective_scan.triton_kernels"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(forward=forward))
    return called


def test_auto_does_without_jax_triton(monkeypatch, caplog):
    called = kernel_calls(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    traced = jax.jit(lambda *args: selective_scan(*args)).trace(*in_float32(example(40)[0]))
    traced.lower(lowering_platforms=("cuda",))
    assert not called
    (record,) = caplog.records
    assert record.message.startswith("using XLA's slower selective scans")
    assert "jax_triton is not installed" in record.message


def test_a_program_for_any_batch_takes_no_kernel(monkeypatch):
    called = kernel_calls(monkeypatch, (9, 0))
    (n,) = jax.export.symbolic_shape("n")
    args = [
        jax.ShapeDtypeStruct((n, *array.shape[1:]) if array.ndim == 3 else array.shape, array.dtype)
        for array in in_float32(example(40)[0])
    ]
    jax.export.export(jax.jit(selective_scan), platforms=["cuda"])(*args)
    assert not called


def mamba_layer(p, x):
    """Mamba's layer, of weights in torch's shapes, with `selective_scan`; x is [N, L, C]."""
    state, kernel = p["A_log"].shape[1], p["conv1d.weight"]
    z, gate = jnp.split(x @ p["in_proj.weight"].T, 2, axis=-1)
    padded = jnp.pad(z, ((0, 0), (kernel.shape[-1] - 1, 0), (0, 0)))
    z = sum(
        padded[:, i : i + z.shape[1]] * kernel[None, None, :, 0, i] for i in range(kernel.shape[-1])
    )
    z = jax.nn.silu(z + p["conv1d.bias"][None, None])
    projected = z @ p["x_proj.weight"].T
    rank = projected.shape[-1] - 2 * state
    delta, b, c = jnp.split(projected, (rank, rank + state), axis=-1)
    delta = jax.nn.softplus(delta @ p["dt_proj.weight"].T + p["dt_proj.bias"][None, None])
    y = selective_scan(z, delta, -jnp.exp(p["A_log"]), b, c, p["D"])
    return (y * jax.nn.silu(gate)) @ p["out_proj.weight"].T


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 49, 196, 3136])
def test_mambas_layer_equals_that_of_transformers(length):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    mamba = pytest.importorskip(
        "transformers.models.mamba.modeling_mamba", reason="transformers is not installed"
    )
    config = mamba.MambaConfig(
        hidden_size=4, state_size=16, expand=2, time_step_rank=1, num_hidden_layers=1,
        use_mambapy=False,
    )  # fmt: skip
    theirs = mamba.MambaMixer(config, layer_idx=0).eval()
    random = np.random.RandomState(length)
    for name, parameter in theirs.named_parameters():
        noise = random.standard_normal(parameter.shape) * (0.1 if parameter.ndim == 1 else 0.3)
        start = parameter.detach().numpy() if name in ("A_log", "D", "dt_proj.bias") else 0
        parameter.data = torch.tensor(np.float32(start + noise))
    x, weight = np.float32(random.standard_normal((2, 1, length, 4)))
    inputs = torch.tensor(x, requires_grad=True)
    expected = getattr(theirs, "slow_forward", theirs.forward)(inputs)
    (expected * torch.tensor(weight)).sum().backward()

    params = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    y, transpose = jax.jit(lambda p, x: jax.vjp(mamba_layer, p, x))(params, x)
    gradients, dx = transpose(weight)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=0, atol=1e-4)
    pairs = {name: (gradients[name], p.grad) for name, p in theirs.named_parameters()}
    for name, (ours, grad) in {**pairs, "x": (dx, inputs.grad)}.items():
        scale = max(1, float(grad.abs().max()))
        error = float(np.abs(ours - grad.numpy()).max()) / scale
        assert error < 1e-4, f"{name}: {error}"

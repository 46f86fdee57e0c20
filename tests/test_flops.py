"""Counts of parameters and multiply-accumulates: pinned, and checked against published figures."""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from mambaout_jax.__main__ import main
from mambaout_jax.errors import UserError
from mambaout_jax.models.flops import (
    attention_block_macs,
    count_layers,
    count_total,
    long_sequence,
)
from mambaout_jax.models.mambaout import create_model
from mambaout_jax.models.ssm import STATE
from mambaout_jax.models.variants import VARIANTS
from mambaout_jax.ops.selective_scan import xla

MACS = {
    "mambaout_femto": 1_156_177_152,
    "mambaout_kobe": 1_515_186_432,
    "mambaout_tiny": 4_486_040_064,
    "mambaout_small": 8_960_334_336,
    "mambaout_base": 15_826_206_720,
    "mambaout_small_rw": 8_958_676_416,
    "mambaout_base_short_rw": 16_308_448_576,
    "mambaout_base_tall_rw": 16_147_860_288,
    "mambaout_base_wide_rw": 17_781_468_544,
    "mambaout_base_plus_rw": 19_192_367_488,
    "test_mambaout": 49_153_536,
}
PUBLISHED = {  # in units of 1e9
    "mambaout_femto": "1.2",
    "mambaout_kobe": "1.5",
    "mambaout_tiny": "4.5",
    "mambaout_small": "9.0",
    "mambaout_base": "15.8",
}


def test_the_models_command_prints_exact_counts_that_round_to_the_published_ones(capsys):
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {row["model"]: row["macs"] for row in listed["variants"]} == MACS
    assert {row["model"]: row["params"] for row in listed["variants"]} == {
        name: variant.params for name, variant in VARIANTS.items()
    }
    assert {name: f"{MACS[name] / 1e9:.1f}" for name in PUBLISHED} == PUBLISHED
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert "mambaout_tiny            26,545,096       4.49 G         82.74   83.45" in table


def test_a_block_by_hand():
    """LN 5 C, fc1 C 2h, depthwise 49 c, fc2 h C for each position."""
    model = create_model("mambaout_base_wide_rw", depthwise="xla")
    layers = {layer.path: layer for layer in count_layers(model, (64, 64, 3))}
    block = layers[("stages_2", "blocks_1")]
    width, hidden, conv, positions = 512, 3 * 512, 768, 4 * 4
    macs = 5 * width + width * 2 * hidden + 49 * conv + hidden * width
    assert block.macs == positions * macs
    norm_and_scale = 3 * width
    fc1, dwconv, fc2 = (width + 1) * 2 * hidden, 50 * conv, (hidden + 1) * width
    assert block.params == norm_and_scale + fc1 + dwconv + fc2
    assert block.shape == (4, 4, width)


def test_a_layer_counts_its_parts():
    model = create_model("test_mambaout", depthwise="xla")
    layers = count_layers(model, (64, 48, 3))
    total = layers[0]
    assert total.path == ()
    assert total == count_total(model, (64, 48, 3))
    for parent in layers:
        children = [
            layer
            for layer in layers
            if layer.path[:-1] == parent.path and len(layer.path) == len(parent.path) + 1
        ]
        if children:
            assert parent.macs == sum(layer.macs for layer in children)
            own = parent.params - sum(layer.params for layer in children)
            assert own == (parent.shape[-1] if parent.kind == "GatedCNNBlock" else 0)


def test_the_summary_command(capsys):
    assert main(["summary", "mambaout_femto", "--depth=1", "--size=288", "--classes=10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "layer", "stem", "stages_0", "stages_1", "stages_2", "stages_3", "head", "mambaout_femto"
    ]  # fmt: skip
    model = create_model("mambaout_femto", num_classes=10, depthwise="xla")
    total = count_total(model, (288, 288, 3))
    assert lines[-1].split()[-2:] == [f"{total.params:,}", f"{total.macs:,}"]
    for arguments, message in (
        (["mambaout_fmto"], "did you mean 'mambaout_femto'?"),
        (["mambaout_femto", "--size=16"], "at least 32 pixels"),
        (["mambaout_femto", "--size=0"], "--size is 0"),
        (["mambaout_femto", "--depth=-1"], "--depth is -1"),
    ):
        assert main(["summary", *arguments]) == 1
        assert message in capsys.readouterr().err


def count_products(jaxpr):
    """Returns the multiply-accumulates of all matrix products and convolutions of a program."""
    total = 0
    for equation in jaxpr.eqns:
        result = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += result * math.prod(left[axis] for axis in contracted)
        if equation.primitive.name == "conv_general_dilated":
            *taps, inputs, _ = equation.invars[1].aval.shape
            total += result * math.prod(taps) * inputs
        if reference := equation.params.get("reference"):  # of ops.lowering.call_for_target
            call = functools.partial(reference, **dict(equation.params["options"]))
            inputs = [var.aval for var in equation.invars]
            total += count_products(jax.make_jaxpr(call)(*inputs).jaxpr)
        total += sum(count_products(inner) for inner in jaxprs_in_params(equation.params))
    return total


def count_multiplications(jaxpr):
    """Returns the products of numbers of a program, and those of the bodies of its loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "mul":
            total += math.prod(equation.outvars[0].aval.shape)
        inner = sum(map(count_multiplications, jaxprs_in_params(equation.params)))
        total += inner * equation.params.get("length", 1)
    return total


def traced(model, size):
    images = jnp.zeros((1, size, size, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    return params, jax.make_jaxpr(model.apply)(params, images).jaxpr


def multiplications_of_scan(length, channels):
    tokens, coefficients = jnp.zeros((1, length, channels)), jnp.zeros((1, length, STATE))
    args = tokens, tokens, jnp.zeros((channels, STATE)), coefficients, coefficients, tokens[0, 0]
    return count_multiplications(jax.make_jaxpr(xla.scan)(*args).jaxpr)


@pytest.mark.parametrize(
    ("mixer", "kernel_size"),
    [("conv", 3), ("conv", 13), ("conv_ssm", 7), ("conv_ssm_bidirectional", 5), ("none", 7)],
)
def test_each_mixer_counts_as_its_program(mixer, kernel_size):
    widths, depths, size = (16, 16, 32, 32), (1, 1, 1, 1), 64
    model = create_model(
        "test_mambaout", depths=depths, widths=widths, expansion_ratio=2.0, depthwise="xla",
        token_mixer=mixer, kernel_size=kernel_size,
    )  # fmt: skip
    params, jaxpr = traced(model, size)
    total = count_total(model, (size, size, 3))
    assert total.params == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    scans = {"conv_ssm": 1, "conv_ssm_bidirectional": 2}.get(mixer, 0)
    stages = zip((16, 8, 4, 2), widths, strict=True)
    scanned = scans * sum(multiplications_of_scan(side**2, width) for side, width in stages)
    layers = count_layers(model, (size, size, 3))
    norms = sum(5 * math.prod(layer.shape) for layer in layers if layer.kind == "LayerNorm")
    assert total.macs == count_products(jaxpr) + scanned + norms


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_vits_count_as_their_program(attention):
    options = {"depth": 2, "width": 24, "heads": 3, "image_size": 64, "num_classes": 5}
    model = create_model("vit_tiny_patch16_224", attention=attention, **options)
    params, jaxpr = traced(model, 64)
    total = count_total(model, (64, 64, 3))
    assert total.params == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    norms = 5 * 24 * (2 * 2 * 17 + 1)
    assert total.macs == count_products(jaxpr) + norms


def test_the_formula_counts_a_transformer_block():
    width, tokens = 24, 10

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x += nn.MultiHeadDotProductAttention(3)(x)
            return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(x)))

    x = jnp.zeros((1, tokens, width))
    with jax.numpy_rank_promotion("allow"):
        params = jax.eval_shape(Block().init, jax.random.key(0), x)
        jaxpr = jax.make_jaxpr(Block().apply)(params, x)
    assert sum(attention_block_macs(width, tokens)) == count_products(jaxpr.jaxpr)


def test_six_widths_of_tokens_are_a_long_sequence(capsys):
    linear, quadratic = attention_block_macs(384, long_sequence(384))
    assert linear == quadratic
    assert main(["flops", "--width=384"]) == 0
    short = capsys.readouterr().out
    assert "752,640,000" in short  # 24 * 384**2 * 196 + 4 * 384 * 196**2
    assert "conv (MambaOut)           470,550,528" in short
    projections, scan = (24 + 2 * 16) + 24, 4 * 16 + 2  # for each token and channel, of rank 24
    ssm = 2 * 196 * 384 * (projections + scan)
    assert f"conv_ssm                  {470_550_528 + ssm:,}" in short
    assert main(["flops", "--kernel-size=8"]) == 1
    assert "kernel_size is 8: expected one of 3, 5" in capsys.readouterr().err
    assert "L = 196 <= 6D = 2,304: not a long sequence" in short
    assert main(["flops", "--width=384", "--size", "800", "1280"]) == 0
    assert "L = 4,000 > 6D = 2,304: a long sequence" in capsys.readouterr().out
    assert main(["flops", "--patch=0"]) == 1
    assert "expected a positive" in capsys.readouterr().err


def test_shapes_are_of_the_outputs_without_padding():
    layers = count_layers(create_model("mambaout_base", depthwise="xla"), (64, 96, 3))
    shapes = {layer.path: layer.shape for layer in layers}
    assert shapes["stages_0", "blocks_0", "fc1"] == (16, 24, 2 * 341)
    assert shapes["stages_0", "blocks_0", "conv"] == (16, 24, 128)
    assert shapes["stages_0", "blocks_0", "fc2"] == (16, 24, 128)
    assert shapes["stages_3",] == (2, 3, 768)
    assert shapes["head",] == (1000,)


def test_a_shape_that_the_network_does_not_take_is_an_error():
    with pytest.raises(UserError, match="at least 32"):
        count_total(create_model("test_mambaout"), (16, 64, 3))

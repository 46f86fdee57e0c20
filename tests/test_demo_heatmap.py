"""The class activation map is each position's contribution to a logit."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_weights

from demo.heatmap import class_activation_map, overlay


@pytest.fixture(scope="module")
def network():
    model = small_weights.INFO.create_model()
    return model, golden.params(model)


@pytest.mark.parametrize(("size", "level", "side"), [(64, 1, 8), (224, 3, 7)])
def test_it_is_the_first_order_change_of_the_logit_by_position(network, size, level, side):
    """Scaling one position's activations changes the logit by its value in the map."""
    model, params = network
    images, classes = golden.images(3, 2, size), jnp.array([5, 900])
    heat = class_activation_map(params, images, classes, model=model)
    assert heat.shape == (2, side, side)
    variables = {"params": params}
    features = jax.jit(lambda x: model.apply(variables, x, method="features"))(images)[level]

    def rest(network, x):
        for stage in network.stages[level + 1 :]:
            x = stage(x)
        return network.head(x)

    @jax.jit
    def logit(factors):
        logits = model.apply(variables, features * factors[..., None], method=rest)
        return logits[jnp.arange(2), classes]

    step = 1e-2
    for position in ((0, 0), (1, 0), (side - 1, 3)):
        moved = jnp.zeros((2, side, side)).at[:, *position].set(step)
        change = (logit(1 + moved) - logit(1 - moved)) / (2 * step)
        np.testing.assert_allclose(heat[:, *position], change, rtol=2e-2, atol=1e-3)


def test_another_class_has_another_map(network):
    model, params = network
    images = golden.images(3, 2, 64)
    one, other = (
        class_activation_map(params, images, jnp.array([c, c]), model=model) for c in (5, 900)
    )
    assert not np.allclose(one, other)
    assert jax.dtypes.result_type(one) == jnp.float32


def test_overlay_is_brightest_where_the_map_is():
    image = np.full((64, 64, 3), 100, np.uint8)
    painted = overlay(image, np.array([[0.0, 2.0], [-5.0, 0.0]]))
    assert painted.shape == image.shape
    assert painted.dtype == np.uint8
    assert painted[8, 56].sum() > painted[8, 8].sum()
    black = [50, 50, 52]  # half the image, half the darkest colour of inferno
    np.testing.assert_allclose(painted[56, 8], black, atol=2)
    np.testing.assert_allclose(overlay(image, np.zeros((2, 2)))[0, 0], black, atol=2)

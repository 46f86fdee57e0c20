"""The class activation map is each position's contribution to a logit."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_weights

from mambaout_jax import preprocess_image
from mambaout_jax.errors import UserError
from mambaout_jax.inference.explain import Explainer
from mambaout_jax.inference.heatmap import class_activation_map, overlay
from mambaout_jax.inference.predictor import Predictor


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


def test_an_explanation_is_a_prediction_with_its_map(tmp_path):
    """Enlarged by a whole factor; by its path or its content."""
    names = tuple("abcdef")
    weights = small_weights.write(tmp_path / "w", num_classes=6, class_names=names)
    (file,) = small_weights.write_images(tmp_path / "images", 1)
    explainer = Explainer(weights)
    found = explainer(file.read_bytes())
    (prediction,) = Predictor.load(weights).predict_files([file])
    assert list(found.classes) == [guess.label for guess in prediction.best]
    assert found.image.shape == found.heat.shape == (320, 320, 3)
    small = preprocess_image(file, explainer.info.preprocessing)
    np.testing.assert_array_equal(found.image[5::10, 5::10], small)
    assert np.abs(found.heat.astype(int) - found.image).max() > 10
    assert explainer.device == "8 x cpu"
    with pytest.raises(UserError, match="the file cannot be decoded"):
        explainer(b"text", "the file")

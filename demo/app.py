"""Serves a page that classifies an image and shows the class activation map of the best class.

gradio requires Pillow below 13, so install it into a virtual environment of its own:

    python -m venv demo-env
    demo-env/bin/pip install '.[demo]'
    demo-env/bin/python demo/app.py --weights=mambaout_tiny

With the path of a checkpoint it needs no network.
"""

import argparse
import os
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from mambaout_jax.errors import UserError

HEIGHT = 320  # of the images on the page, in pixels
MAX_UPLOAD = "50mb"  # the server refuses larger files


def build(name_or_path):
    """Returns the page.

    Raises:
        UserError: there are no such weights, or gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise UserError("the demo needs gradio: pip install 'mambaout_jax[demo]'") from None
    import jax.numpy as jnp
    import numpy as np
    from heatmap import class_activation_map, overlay

    from mambaout_jax.data.preprocess import normalize, preprocess_image
    from mambaout_jax.inference.predictor import Predictor
    from mambaout_jax.weights.load import read_weights

    params, info = read_weights(name_or_path)
    model = info.create_model()
    predictor = Predictor(model, params, info, batch_size=1)
    preprocessing = info.preprocessing

    def classify(path):
        if path is None:
            raise gradio.Error("Choose an image first.", print_exception=False)
        try:
            image = preprocess_image(path, preprocessing, "the file")
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        values, indices = predictor.predict_images(image[None])
        pixels = normalize(image[None], preprocessing.mean, preprocessing.std)
        heat = class_activation_map(params, pixels, jnp.asarray(indices[:, 0]), model=model)
        best = zip(indices[0].tolist(), values[0].tolist(), strict=True)
        probabilities = {predictor.labels[index]: value for index, value in best}
        times = max(1, HEIGHT // len(image))
        shown = image.repeat(times, axis=0).repeat(times, axis=1)
        return probabilities, overlay(shown, np.asarray(heat[0]))

    upload = gradio.Image(label="Image", sources=["upload"], height=HEIGHT)
    # The file as it is: gradio's own step would decode it and encode it again.
    upload.preprocess = lambda payload: None if payload is None else payload.path
    return gradio.Interface(
        classify,
        upload,
        [
            gradio.Label(num_top_classes=5, label="Classes"),
            gradio.Image(label="Class activation map", interactive=False, height=HEIGHT),
        ],
        title=f"MambaOut: {info.model}",
        flagging_mode="never",
    )


def main(argv=None):
    """Serves the page until it is interrupted; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python demo/app.py --weights=mambaout_tiny --port=8000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--weights",
        default="mambaout_tiny",
        metavar="NAME_OR_PATH",
        help="a variant, a name on the hub or a checkpoint (default: mambaout_tiny)",
    )
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    args = parser.parse_args(argv)
    try:
        if not 0 < args.port < 2**16:
            raise UserError(f"--port is {args.port}: expected a number from 1 to {2**16 - 1}")
        page = build(args.weights)
        try:
            page.launch(server_name="127.0.0.1", server_port=args.port, max_file_size=MAX_UPLOAD)
        except OSError:
            raise UserError(
                f"port {args.port} is in use: choose another with --port={args.port + 1}"
            ) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

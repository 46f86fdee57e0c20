"""A page that classifies a picture and shows what its class rests on.

    pip install mambaout_jax[demo]
    python demo/app.py --model=mambaout_tiny.in1k

With a checkpoint's path for --model it needs no network.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from mambaout_jax.errors import UserError

HEIGHT = 320  # of the pictures on the page, in pixels


def build(name_or_path):
    """Returns the page.

    Raises:
        UserError: when there are no such weights, or gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise UserError("the demo needs gradio: pip install mambaout_jax[demo]") from None
    import jax.numpy as jnp
    import numpy as np
    from heatmap import evidence_map, overlay

    from mambaout_jax.data.preprocess import normalize, preprocess_image
    from mambaout_jax.inference.predictor import Predictor
    from mambaout_jax.weights.load import read_weights

    params, info = read_weights(name_or_path)
    model = info.create_model()
    predictor = Predictor(model, params, info, batch_size=1)
    preprocessing = info.preprocessing

    def classify(path):
        if path is None:
            raise gradio.Error("Choose a picture first.", print_exception=False)
        try:
            picture = preprocess_image(Path(path).read_bytes(), preprocessing, "the file")
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        values, indices = predictor.predict_images(picture[None])
        pixels = normalize(picture[None], preprocessing.mean, preprocessing.std)
        heat = evidence_map(params, pixels, jnp.asarray(indices[:, 0]), model=model)
        best = zip(indices[0].tolist(), values[0].tolist(), strict=True)
        answer = {predictor.labels[index]: value for index, value in best}
        times = max(1, HEIGHT // len(picture))
        shown = picture.repeat(times, axis=0).repeat(times, axis=1)
        return answer, overlay(shown, np.asarray(heat[0]))

    upload = gradio.Image(label="Picture", sources=["upload"], height=HEIGHT)
    # The file as it is: gradio's own step would decode it and encode it anew.
    upload.preprocess = lambda payload: None if payload is None else payload.path
    return gradio.Interface(
        classify,
        upload,
        [
            gradio.Label(num_top_classes=5, label="Classes"),
            gradio.Image(label="What the first class rests on", interactive=False, height=HEIGHT),
        ],
        title=f"MambaOut: {info.model}",
        flagging_mode="never",
    )


def main(argv=None):
    """Serves the page until it is interrupted; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="mambaout_tiny.in1k", help="a hub's name or a checkpoint"
    )
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    try:
        if not 0 < args.port < 2**16:
            raise UserError(f"--port is {args.port}: expected a number from 1 to {2**16 - 1}")
        page = build(args.model)
        try:
            page.launch(server_name="127.0.0.1", server_port=args.port)
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

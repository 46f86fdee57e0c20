"""Serves a page that classifies an image and shows where the best class is seen, or its mask.

gradio requires Pillow below 13, so install it into a virtual environment of its own:

    python -m venv demo-env
    demo-env/bin/pip install '.[demo]'
    demo-env/bin/python demo/app.py --weights=mambaout_tiny

With --weights=test_mambaout.digits, or the path of a checkpoint, it needs no network. Of weights
of a segmentation network it shows the predicted mask.
"""

import argparse
import dataclasses
import functools
import html
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from mambaout_jax.errors import UserError
from mambaout_jax.models.pretrained import EMBEDDED, PRETRAINED

MAX_UPLOAD = "50mb"  # the server refuses larger files
MAX_SIDE = 2048  # pixels, to which larger images are shrunk before their masks are predicted
HEIGHT = 320  # of the images on the page, in pixels
CSS = ".image-frame img { object-fit: contain }"  # small images are enlarged
TITLES = {
    "classification": """# What is in the image?
Choose an image of your own, or click an example. MambaOut names the five classes that it finds most
likely, and shows where it sees the first one.""",
    "segmentation": """# What is where in the image?
Choose an image of your own, or click an example. MambaOut finds the class of each pixel, and shows
them as colours over the image.""",
}
# The colours of matplotlib's "inferno", in which heat maps are drawn.
HEAT_LEGEND = """<div style="display: flex; gap: 8px; align-items: center; font-size: 14px">
<span>no part of it</span><div style="flex: 1; height: 12px; border-radius: 6px; background:
linear-gradient(to right, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4)"></div>
<span>speaks for it most</span></div>"""
MASK_LEGEND = """<ul style="display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0; padding: 0;
list-style: none; font-size: 14px">{}</ul>"""
MASK_ENTRY = """<li style="display: flex; gap: 6px; align-items: center"><span style="width: 14px;
height: 14px; border-radius: 3px; background: rgb{}"></span>{} {:.1%}</li>"""


@dataclasses.dataclass(frozen=True)
class Network:
    """What the page shows of a network.

    Attributes:
        info: the description of its weights.
        device: what it runs on, in words.
        predict: a file's path to the values of the page's label, image and legend.
    """

    info: Any
    device: str
    predict: Callable[[str], tuple]


def open_network(name_or_path):
    """Reads weights of either task.

    Raises:
        UserError: there are no such weights, or they cannot be shown.
    """
    import jax

    from mambaout_jax.inference.explain import Explainer
    from mambaout_jax.inference.mask_predictor import MaskPredictor
    from mambaout_jax.weights.load import read_weights

    params, info = read_weights(name_or_path)
    if info.task == "segmentation":
        predict = functools.partial(predict_mask, MaskPredictor.from_weights(params, info))
        return Network(info, f"1 x {jax.local_devices()[0].device_kind}", predict)
    explainer = Explainer((params, info))
    return Network(info, explainer.device, functools.partial(predict_classes, explainer))


def predict_classes(explainer, path):
    """Returns the best classes of a file and the heat map of the first one, for the page."""
    import gradio

    found = explainer(path, "the file")
    best = next(iter(found.classes))
    heat = gradio.Image(found.heat, label=f"Where it sees: {best}")
    return gradio.Label(found.classes, visible=True), heat, HEAT_LEGEND


def predict_mask(predictor, path):
    """Returns the mask of a file over its image, and the classes in it, for the page."""
    import gradio
    import numpy as np

    from mambaout_jax.data.decoding import decode
    from mambaout_jax.data.preprocess import read_image_file
    from mambaout_jax.data.segmentation import drawing

    image = decode(read_image_file(path), "the file")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    labels, names = predictor.predict_image(image), predictor.class_names
    over = drawing.overlay(np.asarray(image), labels, len(names))
    entries = (
        MASK_ENTRY.format(entry.colour, html.escape(entry.name), entry.share)
        for entry in drawing.legend(labels, names)
    )
    legend = MASK_LEGEND.format("".join(entries))
    return gradio.Label(visible=False), gradio.Image(over, label="Mask over the image"), legend


def classes_of(info):
    """Returns the classes that the weights know, in words."""
    if info.num_classes == 1000 and info.task == "classification":
        return "1,000 kinds of things (ImageNet-1k)"
    names = info.class_names or ()
    known = ", ".join(names) if len(names) <= 12 else ", ".join((*names[:3], "…"))
    return f"{info.num_classes:,} classes{f' ({known})' if known else ''}"


def write_examples(folder):
    """Writes digits and shapes of the package, finds gradio's photographs; returns them by kind."""
    import gradio
    from PIL import Image

    from mambaout_jax.data.shapes.images import make_files
    from mambaout_jax.data.sources import Dataset, open_source

    digits = open_source(Dataset("tfds", "digits", "", "train", "validation", 10), "validation")
    files = [folder / f"digit-{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        digit = Image.open(io.BytesIO(digits[number]["image"]))
        digit.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC).save(file)
    shapes = [folder / f"shapes-{number}.png" for number in range(4)]
    for number, file in enumerate(shapes):
        file.write_bytes(make_files("validation", number)[0])
    photographs = Path(gradio.__file__).parent / "media_assets" / "images"
    names = ("cheetah1.jpg", "lion.jpg", "bus.png", "tower.jpg")
    shown = [str(photographs / name) for name in names if (photographs / name).exists()]
    return {
        "digits": [str(file) for file in files],
        "shapes": [str(file) for file in shapes],
        "photographs": shown,
    }


def kind_of(info):
    """Returns the kind of examples that weights are for."""
    from mambaout_jax.data.shapes.images import CLASSES

    if info.task == "segmentation":
        return "shapes" if info.class_names == CLASSES else "photographs"
    return "digits" if info.num_classes == 10 else "photographs"


def build(name_or_path, folder):
    """Returns the page.

    Args:
        name_or_path: the weights that it starts with.
        folder: for the files of its examples.

    Raises:
        UserError: there are no such weights, or gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise UserError("the demo needs gradio: pip install 'mambaout_jax[demo]'") from None
    open_weights = functools.lru_cache(maxsize=4)(open_network)
    examples = write_examples(folder)

    def examples_of(name):
        return examples[kind_of(open_weights(name).info)] or examples["digits"]

    def about(network):
        model, devices = network.info.model, network.device
        return f"{model}, which knows {classes_of(network.info)}. It runs on {devices} with JAX."

    def predict(path, name):
        if path is None:
            raise gradio.Error("Choose an image first.", print_exception=False)
        try:
            return open_weights(name).predict(path)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    def choose(name):
        try:
            network = open_weights(name)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        files = examples_of(name)
        samples = gradio.Dataset(samples=[[file] for file in files])
        title = TITLES[network.info.task]
        return title, files[0], samples, about(network), *predict(files[0], name)

    first = examples_of(name_or_path)  # a mistake is reported before the page is served
    network = open_weights(name_or_path)
    network.predict(first[0])  # compiles
    classification = network.info.task == "classification"
    known = [name for name, entry in PRETRAINED.items() if entry.num_classes in (10, 1000)]
    with gradio.Blocks(title="MambaOut") as page:
        title = gradio.Markdown(TITLES[network.info.task])
        with gradio.Row():
            with gradio.Column(min_width=280):
                image = gradio.Image(
                    first[0], label="Image", sources=["upload"], height=HEIGHT, type="filepath"
                )
                # The file as it is: gradio's own step would decode it and encode it again.
                image.preprocess = lambda payload: None if payload is None else payload.path
                samples = gradio.Dataset(
                    components=[gradio.Image(visible=False)],
                    samples=[[file] for file in first],
                    label="Examples",
                )
                model = gradio.Dropdown(
                    list(dict.fromkeys([name_or_path, EMBEDDED, *known])),
                    value=name_or_path,
                    label="Model",
                )
            with gradio.Column(min_width=280):
                label = gradio.Label(num_top_classes=5, label="Most likely", visible=classification)
                shown = gradio.Image(
                    label="Where it sees it" if classification else "Mask over the image",
                    interactive=False,
                    height=HEIGHT,
                    format="png",
                    buttons=["download", "fullscreen"],  # "share" would upload it to the hub
                )
                legend = gradio.HTML(HEAT_LEGEND if classification else "")
        footer = gradio.Markdown(about(network))
        inputs, outputs = [image, model], [label, shown, legend]
        image.upload(predict, inputs, outputs)
        samples.click(lambda sample: sample[0], samples, image, show_progress="hidden").then(
            predict, inputs, outputs
        )
        model.input(choose, model, [title, image, samples, footer, *outputs])
        page.load(predict, inputs, outputs)
    return page


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
        help="a variant, a name on the hub or a checkpoint, also of a segmentation network "
        f"(default: mambaout_tiny); {EMBEDDED} needs no network",
    )
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    args = parser.parse_args(argv)
    try:
        if not 0 < args.port < 2**16:
            raise UserError(f"--port is {args.port}: expected a number from 1 to {2**16 - 1}")
        with tempfile.TemporaryDirectory() as folder:
            page = build(args.weights, Path(folder))
            try:
                page.launch(
                    server_name="127.0.0.1",
                    server_port=args.port,
                    max_file_size=MAX_UPLOAD,
                    allowed_paths=[folder],
                    css=CSS,
                )
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

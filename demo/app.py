"""Serves a page that classifies an image and shows where the best class is seen.

gradio requires Pillow below 13, so install it into a virtual environment of its own:

    python -m venv demo-env
    demo-env/bin/pip install '.[demo]'
    demo-env/bin/python demo/app.py --weights=mambaout_tiny

With --weights=test_mambaout.digits, or the path of a checkpoint, it needs no network.
"""

import argparse
import functools
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from mambaout_jax.errors import UserError
from mambaout_jax.models.pretrained import EMBEDDED, PRETRAINED

MAX_UPLOAD = "50mb"  # the server refuses larger files
HEIGHT = 320  # of the images on the page, in pixels
TITLE = """# What is in the image?
Choose an image of your own, or click an example. MambaOut names the five classes that it finds most
likely, and shows where it sees the first one."""
# The colours of matplotlib's "inferno", in which heat maps are drawn.
LEGEND = """<div style="display: flex; gap: 8px; align-items: center; font-size: 14px">
<span>no part of it</span><div style="flex: 1; height: 12px; border-radius: 6px; background:
linear-gradient(to right, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4)"></div>
<span>speaks for it most</span></div>"""


def classes_of(info):
    """Returns what the weights classify, in words."""
    if info.num_classes == 1000:
        return "1,000 kinds of things (ImageNet-1k)"
    names = info.class_names or ()
    known = ", ".join(names) if len(names) <= 12 else ", ".join((*names[:3], "…"))
    return f"{info.num_classes:,} classes{f' ({known})' if known else ''}"


def write_examples(folder):
    """Writes the package's handwritten digits and gradio's photographs; returns them by kind."""
    import gradio
    from PIL import Image

    from mambaout_jax.data.sources import Dataset, open_source

    digits = open_source(Dataset("tfds", "digits", "", "train", "validation", 10), "validation")
    files = [folder / f"digit-{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        digit = Image.open(io.BytesIO(digits[number]["image"]))
        digit.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC).save(file)
    photographs = Path(gradio.__file__).parent / "media_assets" / "images"
    names = ("cheetah1.jpg", "lion.jpg", "bus.png", "tower.jpg")
    shown = [str(photographs / name) for name in names if (photographs / name).exists()]
    return {"digits": [str(file) for file in files], "photographs": shown}


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
    from mambaout_jax.inference.explain import Explainer

    open_weights = functools.lru_cache(maxsize=4)(Explainer)
    examples = write_examples(folder)

    def examples_of(name):
        kind = "digits" if open_weights(name).info.num_classes == 10 else "photographs"
        return examples[kind] or examples["digits"]

    def about(explainer):
        model, devices = explainer.info.model, explainer.device
        return f"{model}, which knows {classes_of(explainer.info)}. It runs on {devices} with JAX."

    def classify(path, name):
        if path is None:
            raise gradio.Error("Choose an image first.", print_exception=False)
        try:
            found = open_weights(name)(path, "the file")
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        best = next(iter(found.classes))
        return found.classes, gradio.Image(found.heat, label=f"Where it sees: {best}")

    def choose(name):
        try:
            explainer = open_weights(name)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        files = examples_of(name)
        samples = gradio.Dataset(samples=[[file] for file in files])
        return files[0], samples, about(explainer), *classify(files[0], name)

    first = examples_of(name_or_path)  # a mistake is reported before the page is served
    open_weights(name_or_path)(first[0])  # compiles
    known = [name for name, entry in PRETRAINED.items() if entry.num_classes in (10, 1000)]
    with gradio.Blocks(title="MambaOut") as page:
        gradio.Markdown(TITLE)
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
                label = gradio.Label(num_top_classes=5, label="Most likely")
                heat = gradio.Image(label="Where it sees it", interactive=False, height=HEIGHT)
                gradio.HTML(LEGEND)
        footer = gradio.Markdown(about(open_weights(name_or_path)))
        image.upload(classify, [image, model], [label, heat])
        samples.click(lambda sample: sample[0], samples, image, show_progress="hidden").then(
            classify, [image, model], [label, heat]
        )
        model.input(choose, model, [image, samples, footer, label, heat])
        page.load(classify, [image, model], [label, heat])
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
        help="a variant, a name on the hub or a checkpoint (default: mambaout_tiny); "
        f"{EMBEDDED} needs no network",
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

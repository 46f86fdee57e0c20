"""The demo in a real Chromium: upload a file, click an example, choose a model, at two widths."""

import contextlib
import dataclasses
import http.client
import io
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import golden
import numpy as np
import pytest
import small_weights
from flax.traverse_util import path_aware_map
from PIL import Image

from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.data.segmentation import drawing
from mambaout_jax.data.shapes.images import CLASSES
from mambaout_jax.inference.mask_predictor import MaskPredictor
from mambaout_jax.inference.predictor import Predictor
from mambaout_jax.weights.load import read_weights
from mambaout_jax.weights.store import save_weights

ROOT = Path(__file__).parents[1]
APP = ROOT / "demo" / "app.py"
NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights") / "w"
    return small_weights.write(directory, num_classes=6, class_names=NAMES)


@pytest.fixture(scope="module")
def mask_weights(tmp_path_factory):
    """A segmentation network that finds several classes in noise: its running means are zero."""
    overrides = {**small_weights.INFO.overrides, "channels": 8}
    info = dataclasses.replace(
        small_weights.INFO,
        model="upernet_test_mambaout",
        num_classes=len(CLASSES),
        class_names=CLASSES,
        preprocessing=Preprocessing(size=64),
        overrides=overrides,
    )
    params = path_aware_map(
        lambda path, x: 0 * x if path[-1] == "mean" else x, golden.params(info.create_model())
    )
    directory = tmp_path_factory.mktemp("mask_weights") / "w"
    save_weights(directory, params, info)
    return directory


@contextlib.contextmanager
def serving(weights, log):
    """The page's address, and its port."""
    pytest.importorskip("gradio", reason="the demo needs gradio (extra: demo)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(APP), f"--weights={weights}", f"--port={port}"]
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
    try:
        for _ in range(1500):
            assert server.poll() is None, log.read_text()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", port
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def page(weights, tmp_path_factory):
    with serving(weights, tmp_path_factory.mktemp("log") / "log.txt") as served:
        yield served


@pytest.fixture(scope="module")
def mask_page(mask_weights, tmp_path_factory):
    with serving(mask_weights, tmp_path_factory.mktemp("log") / "log.txt") as served:
        yield served


@pytest.fixture(params=["page", "mask_page"])
def any_page(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium drives the browser (extra: browser)"
    )
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1200,900")
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options=options, service=service) as opened:
        yield opened


def shown_classes(browser):
    """Returns the classes on the page, the best one first."""
    lines = browser.find_element("tag name", "body").text.splitlines()
    if "Most likely" not in lines:
        return []
    known = {*NAMES, *"0123456789"}
    rows = lines[lines.index("Most likely") + 2 :]  # the best one is shown above as well
    return [line for line in rows if line in known][:5]


def text_of(browser):
    return browser.find_element("tag name", "body").text


def shows_classes(browser):
    text = text_of(browser)
    return "%" in text and "Where it sees: " in text and len(shown_classes(browser)) == 5


def shown_legend(browser):
    """Returns the lines of a mask's legend."""
    items = "[...document.querySelectorAll('ul li[style]')]"
    return browser.execute_script(f"return {items}.map(item => item.textContent)")


def open_page(browser, url, width=1200, height=900):
    """Opens the page at a width, and waits for the first example's classes or mask."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(url)
    wait = WebDriverWait(browser, 120, ignored_exceptions=[StaleElementReferenceException])
    wait.until(lambda b: shows_classes(b) or shown_legend(b))
    return wait


def upload(browser, url, file, *size):
    """Opens the page and uploads a file; returns an object that waits for the page."""
    wait = open_page(browser, url, *size)
    browser.find_element("css selector", "input[type=file]").send_keys(str(file))
    return wait


def predicted(weights, file):
    (prediction,) = Predictor.load(weights).predict_files([file])
    return [guess.label for guess in prediction.best]


def test_upload_classes_and_heat_map(page, browser, weights, tmp_path):
    file = tmp_path / "image.png"
    small_weights.image(0).convert("L").save(file)
    wait = open_page(browser, page[0])
    before, expected = shown_classes(browser), predicted(weights, file)
    assert before != expected, "the case must tell the two apart"
    wait = upload(browser, page[0], file)
    wait.until(lambda b: shown_classes(b) == expected)
    wait.until(lambda b: f"Where it sees: {expected[0]}" in text_of(b))


def test_nothing_is_empty_and_the_text_says_what_to_do(page, browser):
    open_page(browser, page[0])
    text = text_of(browser)
    assert "Choose an image of your own, or click an example." in text
    assert "speaks for it most" in text
    assert "test_mambaout, which knows 6 classes (ant, bee, cat, dog, elk, fox)." in text
    assert "It runs on 1 x cpu" in text
    images = browser.find_elements("css selector", ".image-frame img")
    assert len([image for image in images if image.is_displayed()]) >= 2
    assert browser.find_elements("css selector", "button[aria-label=Download], [title=Download]")
    assert not browser.find_elements("css selector", "[aria-label=Share], [title=Share]")


def choose(browser, wait, name):
    browser.find_element("css selector", "input[role=combobox]").click()

    def shown(browser):  # an option that is still fading in has no text
        options = browser.find_elements("css selector", "[role=option]")
        return [option for option in options if name in option.text]

    (option,) = wait.until(shown)
    option.click()


def choose_digits(browser, wait):
    """Chooses the network of the package, which needs no network."""
    choose(browser, wait, "test_mambaout.digits")
    wait.until(lambda b: "10 classes (0, 1, 2" in text_of(b) and shown_classes(b)[:1] == ["8"])
    wait.until(lambda b: len(b.find_elements("css selector", ".gallery-item")) == 5)


def test_another_model_and_its_examples(page, browser):
    wait = open_page(browser, page[0])
    choose_digits(browser, wait)
    browser.find_elements("css selector", ".gallery-item")[1].click()
    wait.until(lambda b: shown_classes(b)[:1] == ["2"] and "Where it sees: 2" in text_of(b))


@pytest.mark.parametrize(
    ("width", "height", "name"), [(1200, 900, "demo"), (390, 1640, "demo_phone")]
)
def test_it_fits_a_desk_and_a_phone(page, browser, tmp_path, width, height, name):
    wait = open_page(browser, page[0], width, height)
    choose_digits(browser, wait)
    wait.until(lambda b: "processing" not in text_of(b))
    assert fits(browser, width)
    folder = Path(os.environ.get("DEMO_SCREENSHOTS", tmp_path))
    assert browser.save_screenshot(str(folder / f"{name}.png"))
    assert (folder / f"{name}.png").stat().st_size > 10_000


def images_on(browser):
    """Returns the addresses of the images in frames, with their sizes on the page."""
    images = browser.find_elements("css selector", ".image-frame img")
    return {image.get_attribute("src"): image.size for image in images if image.is_displayed()}


def fits(browser, width):
    """Says whether the page is no wider than the window, but for a scrollbar."""
    return width - 20 < browser.execute_script("return document.body.scrollWidth") <= width


def expected_mask(weights, file):
    """Returns the overlay and the lines of the legend, as `predict --masks` has them."""
    predictor = MaskPredictor.from_weights(*read_weights(weights))
    (found,) = predictor.predict_files([file])
    entries = drawing.legend(found.labels, predictor.class_names)
    legend = [f"{entry.name} {entry.share:.1%}" for entry in entries]
    return drawing.overlay(found.image, found.labels, len(CLASSES)), legend


@pytest.mark.parametrize(
    ("width", "height", "name"), [(1200, 900, "demo_masks"), (390, 1640, "demo_masks_phone")]
)
def test_upload_mask_and_legend(mask_page, browser, mask_weights, tmp_path, width, height, name):
    file = tmp_path / "image.png"
    small_weights.image(1, (90, 64)).save(file)
    overlay, legend = expected_mask(mask_weights, file)
    assert len(legend) > 1, "the case must have several classes"
    wait = upload(browser, mask_page[0], file, width, height)
    wait.until(lambda b: shown_legend(b) == legend)
    wait.until(lambda b: "processing" not in text_of(b))
    text = text_of(browser)
    assert "Mask over the image" in text
    assert "MambaOut finds the class of each pixel" in text
    assert "upernet_test_mambaout, which knows 7 classes (background, striped disc, " in text
    assert not [part for part in ("Most likely", "Where it sees", "speaks for it") if part in text]
    (uploaded, _), (shown, size) = images_on(browser).items()
    assert size["height"] > 200, "a small image is enlarged"
    pixels = {}
    for address in (uploaded, shown):
        with urllib.request.urlopen(address) as answer:
            pixels[address] = np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))
    np.testing.assert_array_equal(pixels[uploaded], small_weights.image(1, (90, 64)))
    np.testing.assert_array_equal(pixels[shown], overlay)
    assert fits(browser, width)
    folder = Path(os.environ.get("DEMO_SCREENSHOTS", tmp_path))
    assert browser.save_screenshot(str(folder / f"{name}.png"))


def test_from_masks_to_classes_and_back(mask_page, browser, mask_weights):
    wait = open_page(browser, mask_page[0])
    assert len(browser.find_elements("css selector", ".gallery-item")) == 4
    first = shown_legend(browser)
    choose_digits(browser, wait)
    assert shows_classes(browser)
    assert "What is in the image?" in text_of(browser)
    assert not shown_legend(browser)
    choose(browser, wait, str(mask_weights))
    wait.until(lambda b: shown_legend(b) == first)
    assert "What is where in the image?" in text_of(browser)
    assert "Most likely" not in text_of(browser)


def test_names_are_text_and_large_images_are_shrunk(tmp_path):
    pytest.importorskip("gradio", reason="the demo needs gradio (extra: demo)")

    class Halves:
        class_names = ("<b>left</b>", "right", "nowhere")

        def predict_image(self, image):
            labels = np.zeros((image.height, image.width), np.uint8)
            labels[:, image.width // 4 :] = 1
            return labels

    Image.new("RGB", (4096, 8)).save(tmp_path / "wide.png")
    _, shown, legend = runpy.run_path(str(APP))["predict_mask"](Halves(), tmp_path / "wide.png")
    assert "</span>right 75.0%</li><li" in legend
    assert "</span>&lt;b&gt;left&lt;/b&gt; 25.0%</li></ul>" in legend
    assert "background: rgb(0, 128, 0)" in legend
    assert "nowhere" not in legend
    with Image.open(shown.value["path"]) as overlay:
        assert overlay.size == (2048, 4)


def test_a_file_that_is_not_an_image_is_reported_on_the_page(any_page, browser, tmp_path):
    (tmp_path / "notes.jpg").write_text("notes")
    wait = upload(browser, any_page[0], tmp_path / "notes.jpg")
    wait.until(lambda b: "the file cannot be decoded (not an image)" in text_of(b))


def post(port, size):
    """Posts a file of `size` bytes to the server, and returns the status and the answer."""
    head = (
        b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n"
        b"Content-Type: image/png\r\n\r\n"
    )
    tail = b"\r\n--x--\r\n"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(len(head) + size + len(tail)))
    connection.endheaders(head)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before its end
        for start in range(0, size, 1 << 20):
            connection.send(bytes(min(1 << 20, size - start)))
        connection.send(tail)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_server_refuses_an_upload_above_the_limit(page):
    assert post(page[1], 1 << 20)[0] == 200
    status, message = post(page[1], 600 << 20)
    assert status == 413
    assert "maximum allowed size" in message


def test_the_page_says_that_a_file_is_too_large(any_page, browser, tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(60 << 20)
    wait = upload(browser, any_page[0], tmp_path / "large.png")
    wait.until(lambda b: "size" in text_of(b).lower() and "maximum" in text_of(b).lower())


def test_a_port_in_use(page, weights):
    command = [sys.executable, str(APP), f"--weights={weights}", f"--port={page[1]}"]
    result = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"error: port {page[1]} is in use: choose another with --port={page[1] + 1}"


def test_no_weights():
    pytest.importorskip("gradio", reason="the demo needs gradio (extra: demo)")
    result = subprocess.run(
        [sys.executable, str(APP), "--weights=nope.pth"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")


def test_a_port_out_of_range(capsys):
    assert runpy.run_path(str(APP))["main"](["--weights=x", "--port=70000"]) == 1
    assert capsys.readouterr().err == "error: --port is 70000: expected a number from 1 to 65535\n"

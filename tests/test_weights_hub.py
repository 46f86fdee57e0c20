"""The hub: huggingface_hub itself against a local server that speaks its protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import golden
import pytest
from hub_server import HubServer, serving
from safetensors.numpy import save_file

import mambaout_jax
from mambaout_jax.weights.integrity import digest

ROOT = Path(__file__).parents[1]
NAME = "mambaout_femto.in1k"
# Loads each name, and prints the outcome as a line of JSON.
SCRIPT = """
import json, sys, time
time.sleep = lambda seconds: None  # between the retries of huggingface_hub
import mambaout_jax
from mambaout_jax.errors import UserError
from mambaout_jax.weights.integrity import digest

for name in sys.argv[1:]:
    try:
        params, info = mambaout_jax.read_weights(name)
        print(json.dumps({"digest": digest(params), "info": info.to_json()}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


def load(names, home, endpoint, **environment):
    """Runs SCRIPT in a process of its own: the hub's settings are read at import."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {
        **inherited,
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def femto(tmp_path_factory):
    meta, _ = golden.load("mambaout_femto-timm-224")
    tensors = golden.weights(meta["state_dict"], meta["seed"])
    path = tmp_path_factory.mktemp("hub") / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path, digest(mambaout_jax.from_torch(tensors, "mambaout_femto"))


@pytest.fixture(scope="module")
def cached(femto, tmp_path_factory):
    """A cache that the first download filled, the outcome, and the server's requests."""
    home = tmp_path_factory.mktemp("home")
    server = HubServer({f"timm/{NAME}": {"model.safetensors": femto[0]}}, cuts=1)
    with serving(server):
        (answer,) = load([NAME], home, server.url, HF_TOKEN="hf_secret")
    return home, answer, server.requests


def test_a_name_is_fetched_converted_and_described(femto, cached):
    _, answer, _ = cached
    assert answer["digest"] == femto[1]
    info = answer["info"]
    assert (info["model"], info["num_classes"], info["source"]) == ("mambaout_femto", 1000, NAME)
    assert info["preprocessing"]["size"] == 224


def test_a_transfer_that_broke_off_is_resumed_and_the_token_sent(femto, cached):
    _, _, requests = cached
    path = f"/timm/{NAME}/resolve/main/model.safetensors"
    requests = [request for request in requests if request[1] == path]
    ranges = [range_ for method, _, range_, _ in requests if method == "GET"]
    assert ranges[0] in (None, "bytes=0-")
    assert len(ranges) == 2
    assert 0 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) < femto[0].stat().st_size
    assert {token for _, _, _, token in requests} == {"Bearer hf_secret"}


def test_the_cache_serves_offline_and_a_damaged_one_is_refused(femto, cached):
    home, _, _ = cached
    dead = "http://127.0.0.1:9"
    found, missing, unknown = load(
        [NAME, "mambaout_kobe.in1k", "mambaout_kobi.in1k"], home, dead, HF_HUB_OFFLINE="1"
    )
    assert found["digest"] == femto[1]
    (default,) = load(["mambaout_femto"], home, dead, HF_HUB_OFFLINE="1")
    assert default == found, "a variant's name stands for its default weights"
    assert "timm/mambaout_kobe.in1k is not in the cache" in missing["error"]
    assert "HF_HUB_OFFLINE is set: unset it, or give the path" in missing["error"]
    assert "did you mean 'mambaout_kobe.in1k'" in unknown["error"]

    (blob,) = [path for path in home.rglob("blobs/*") if path.stat().st_size > 1000]
    data = bytearray(blob.read_bytes())
    data[-1000] ^= 1
    blob.write_bytes(data)
    (damaged,) = load([NAME], home, dead, HF_HUB_OFFLINE="1")
    assert "is damaged: remove" in damaged["error"]


def test_a_refusal_of_the_hub_is_one_sentence(tmp_path):
    repositories = {
        "timm/mambaout_kobe.in1k": 404,
        "timm/mambaout_tiny.in1k": 401,
        "timm/mambaout_small.in1k": 500,
        "timm/mambaout_base.in1k": {},
    }
    with serving(HubServer(repositories)) as server:
        names = [name.removeprefix("timm/") for name in repositories]
        answers = load(names, tmp_path, server.url)
        url = server.url
    errors = [answer["error"] for answer in answers]
    for name, error in zip(names, errors, strict=True):
        assert f"timm/{name}/model.safetensors" in error or "timm/mambaout_small" in error
        assert url in error
        assert "\n" not in error
    for error in (errors[0], errors[1], errors[3]):
        assert "or needs a token to show it: set HF_TOKEN" in error


def test_a_network_that_is_down_is_one_sentence(tmp_path):
    (answer,) = load([NAME], tmp_path, "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in answer["error"]
    assert "check the network" in answer["error"]
    assert "\n" not in answer["error"]


def test_without_a_network_the_sentence_is_all_that_is_printed(tmp_path):
    """No log of huggingface_hub's tries and no chain of its errors, also with logging set up."""
    code = f"""
import logging, time
time.sleep = lambda seconds: None
logging.basicConfig(level=logging.INFO)
import mambaout_jax
mambaout_jax.load_pretrained("{NAME}")
"""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **inherited,
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert done.stderr.count("Traceback") == 1
    assert not [line for line in lines if "Retrying" in line or "huggingface_hub" in line]
    assert lines[-1].startswith("mambaout_jax.errors.UserError: timm/mambaout_femto.in1k is not in")

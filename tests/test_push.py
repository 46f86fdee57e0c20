"""Pushing to the hub and loading from it: huggingface_hub itself against a local server."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import golden
import jax
import numpy as np
import pytest
from hub_server import HubServer, serving
from safetensors.numpy import load, save

import mambaout_jax
from mambaout_jax import config as configuration
from mambaout_jax import model_card
from mambaout_jax.__main__ import main
from mambaout_jax.errors import UserError
from mambaout_jax.weights.hub_config import from_timm, to_timm
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.store import save_weights

NAME = "user/digits"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on which the token hf_write may write the repositories of `user`."""
    import huggingface_hub.constants as constants

    server = HubServer({}, tokens={"hf_write": "user"})
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server has LFS alone
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's retries
    with serving(server):
        yield server


@pytest.fixture(scope="module")
def digits():
    return mambaout_jax.read_weights("test_mambaout.digits")


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def make_run(folder, digits):
    """Writes what a run of the quickstart leaves: a checkpoint, its record, metrics, curves."""
    params, info = digits
    record = configuration.flatten(configuration.load_config("configs/quickstart.py"))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(record | {"seed": 3}))
    (folder / "metrics.csv").write_text("step,top1\n1320,98.3\n")
    (folder / "curves.png").write_bytes(b"\x89PNG of curves")
    metrics = {"loss": 0.25, "top1": 98.333, "top5": 100.0}
    save_weights(
        folder / "checkpoints" / "1320", params, dataclasses.replace(info, metrics=metrics)
    )
    return folder


def test_a_run_travels_through_the_hub(hub, digits, tmp_path, capsys):
    run = make_run(tmp_path / "run", digits)
    assert main(["push", str(run), NAME, "--private"]) == 0
    assert capsys.readouterr().out == f"pushed {run} to {hub.url}/{NAME}\n"
    names = ["README.md", "config.json", "curves.png", "mambaout_jax.json", "metrics.csv",
             "model.safetensors", "run_config.json"]  # fmt: skip
    assert hub.commits == [(NAME, "main", names)]
    assert hub.private == {NAME}
    assert {auth for *_, auth in hub.requests} <= {"Bearer hf_write", None}
    params, info = mambaout_jax.read_weights(f"hf-hub:{NAME}")
    equal(params, digits[0])
    assert info.class_names == tuple("0123456789")
    assert info.preprocessing == digits[1].preprocessing
    files = hub.repositories[NAME]
    card = files["README.md"].decode()
    assert "| top-1 | 98.33% |" in card
    assert "| parameters | 193,130 |" in card
    assert "![The run's curves](curves.png)" in card
    assert "mambaout-jax train --config=quickstart --workdir=DIR --config.seed=3\n" in card
    assert load(files["model.safetensors"])["head.fc.bias"].shape == (10,)


def test_a_branch_has_its_own_weights(hub, digits):
    params, info = digits
    mambaout_jax.push_to_hub(params, NAME, info=info)
    halves = jax.tree.map(lambda p: p / 2, params)
    assert mambaout_jax.push_to_hub(halves, NAME, info=info, revision="half") == f"{hub.url}/{NAME}"
    equal(mambaout_jax.load_pretrained(f"hf-hub:{NAME}@half")[1], halves)
    equal(mambaout_jax.load_pretrained(f"hf-hub:{NAME}")[1], params)
    mambaout_jax.push_to_hub(halves, NAME, info=info)  # a second push is a second commit
    equal(mambaout_jax.load_pretrained(f"hf-hub:{NAME}")[1], halves)
    with pytest.raises(UserError, match=r"user/digits has no revision 'gone'"):
        mambaout_jax.read_weights(f"hf-hub:{NAME}@gone")


def test_an_upload_that_broke_off_commits_nothing_and_continues(hub, digits, tmp_path):
    run = make_run(tmp_path / "run", digits)
    hub.broken_from = 1000
    with pytest.raises(
        UserError, match=r"cannot push to user/digits on http.*nothing is committed"
    ):
        mambaout_jax.push_to_hub(run, NAME)
    assert hub.commits == []
    assert list(hub.repositories[NAME]) == [".gitattributes"]
    assert len(hub.stored) == 1  # the curves
    hub.broken_from, before = float("inf"), len(hub.requests)
    mambaout_jax.push_to_hub(run, NAME)
    assert [method for method, *_ in hub.requests[before:]].count("PUT") == 1
    assert len(hub.commits) == 1
    equal(mambaout_jax.read_weights(f"hf-hub:{NAME}")[0], digits[0])


def test_a_repository_of_timm_is_read_by_its_config(hub):
    meta, _ = golden.load("test_mambaout-timm-160")
    tensors = golden.weights(meta["state_dict"], meta["seed"])
    config = {"architecture": "test_mambaout", "num_classes": len(tensors["head.fc.bias"])}
    config["pretrained_cfg"] = {"input_size": [3, 160, 192], "interpolation": "bilinear",
                                "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.25] * 3}  # fmt: skip
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": save(tensors)}
    hub.repositories["timm/mine"] = files
    params, info = mambaout_jax.read_weights("hf-hub:timm/mine")
    equal(params, mambaout_jax.from_torch(tensors, "test_mambaout"))
    found = info.preprocessing
    assert (found.size, found.interpolation, found.crop_pct) == ((160, 192), "bilinear", 0.9)
    assert (found.mean, found.std, info.class_names) == ((0.5,) * 3, (0.25,) * 3, None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {}, "'digits' is not a repository name: expected OWNER/NAME"),
        (NAME, {"token": "hf_gone"}, "does not know this token: set HF_TOKEN to a token that may"),
        ("other/digits", {}, "this token may not write other/digits"),
        ("user/resnet", {}, "user/resnet exists and holds the architecture 'resnet50', not 'test"),
        ("user/novel", {}, "user/novel exists and holds no MambaOut, not 'test_mambaout': choose"),
        ("user/public", {"private": True}, "user/public exists and is public: change that in its"),
        ("user/a..b", {}, "'user/a..b' is not a repository name"),
    ],
)
def test_pushes_that_are_refused_leave_nothing(hub, digits, name, options, message):
    config = json.dumps({"architecture": "resnet50"}).encode()
    hub.repositories |= {"user/resnet": {"config.json": config}, "user/novel": {"novel.txt": b""}}
    hub.repositories |= {"user/public": {".gitattributes": b""}}
    before = set(hub.repositories)
    with pytest.raises(UserError, match=message):
        mambaout_jax.push_to_hub(digits[0], name, info=digits[1], **options)
    assert not hub.commits
    assert not hub.stored
    assert set(hub.repositories) == before


def test_without_a_token_or_a_network(hub, digits, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"cannot push to user/digits on http://127.0.0.1:9 \(.*refu"
    ):
        mambaout_jax.push_to_hub(digits[0], NAME, info=digits[1])
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(UserError, match=r"no token to push to user/digits: set HF_TOKEN, or run"):
        mambaout_jax.push_to_hub(digits[0], NAME, info=digits[1])
    assert not hub.requests


def test_repositories_that_cannot_be_read(hub, digits):
    mambaout_jax.push_to_hub(digits[0], NAME)  # without info: found by the shapes
    files = hub.repositories[NAME]
    config = json.loads(files["config.json"])
    assert (config["architecture"], config["num_classes"]) == ("test_mambaout", 10)
    good = dict(files)
    for changed, message in (
        ({"config.json": b'{"architecture": "resnet50"}'}, "'resnet50': expected a MambaOut"),
        ({"config.json": b"{"}, "is damaged"),
        ({"config.json": b'{"architecture": "mambaout_tiny"}'}, "config.json of .* is damaged"),
        ({"model.safetensors": save({"x": np.zeros(3)})}, "these are not MambaOut weights"),
    ):
        hub.repositories["user/bad"] = good | changed
        with pytest.raises(UserError, match=message):
            mambaout_jax.read_weights("hf-hub:user/bad")
    other = jax.tree.map(lambda p: p / 2, digits[0])
    tensors = mambaout_jax.to_torch(other, "test_mambaout")
    hub.repositories["user/bad"] = good | {"model.safetensors": save(tensors)}
    with pytest.raises(UserError, match=r"is not what its mambaout_jax.json describes"):
        mambaout_jax.read_weights("hf-hub:user/bad")
    for name in ("hf-hub:digits", "hf-hub:user/", "hf-hub:a/b/c", "hf-hub:@main"):
        with pytest.raises(UserError, match=rf"^'{name}' is not a repository: expected hf-hub:OW"):
            mambaout_jax.read_weights(name)
    with pytest.raises(UserError, match=r"has no user/gone/config.json"):
        mambaout_jax.read_weights("hf-hub:user/gone")
    with pytest.raises(UserError, match=r"are test_mambaout's, not mambaout_tiny's"):
        mambaout_jax.read_weights(f"hf-hub:{NAME}", model="mambaout_tiny")
    with pytest.raises(UserError, match=r"parameters fit no variant: expected info="):
        mambaout_jax.push_to_hub({"x": np.zeros(3)}, NAME)


def test_timms_config_and_ours_say_the_same():
    preprocessing = mambaout_jax.Preprocessing(size=(64, 96), crop_pct=0.9, crop_mode="squash")
    overrides = {"depths": (1, 1, 1, 1), "widths": (8, 12, 16, 24), "conv_ratio": 1.25}
    info = WeightsInfo("mambaout_tiny", 3, preprocessing, overrides, ("a", "b", "c"), "x")
    config = json.loads(json.dumps(to_timm(info)))
    assert config["model_args"] == {
        "depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24], "conv_ratio": 1.25
    }  # fmt: skip
    assert from_timm(config, "x") == info
    with pytest.raises(UserError, match="no option for act='silu'"):
        to_timm(dataclasses.replace(info, overrides={"act": "silu"}))
    with pytest.raises(UserError, match="vit_tiny is not a MambaOut: expected one of"):
        to_timm(dataclasses.replace(info, model="vit_tiny"))
    with pytest.raises(UserError, match="have no classes"):
        to_timm(dataclasses.replace(info, num_classes=0))
    config["model_args"]["kernel_size"] = 3
    assert from_timm(config, "x").overrides == {**overrides, "kernel_size": 3}
    config["model_args"]["ls_init_value"] = 0.1
    with pytest.raises(UserError, match=r"timm's option ls_init_value=0\.1"):
        from_timm(config, "x")


def test_the_command_of_a_run_names_the_nearest_config(monkeypatch, tmp_path):
    record = configuration.flatten(configuration.load_config("configs/femto.py"))
    record |= {"batch_size": 512, "augment.crop_scale": [0.5, 1.0], "log.every": "1 steps"}
    assert model_card.run_command(record) == (
        "mambaout-jax train --config=femto --workdir=DIR "
        "'--config.augment.crop_scale=(0.5, 1.0)' --config.batch_size=512"
    )
    monkeypatch.setattr(model_card, "shipped_folder", lambda: tmp_path)
    assert model_card.run_command(record) == ""


TIMM = """
import sys, timm, torch, numpy as np
model = timm.create_model(f"hf-hub:{sys.argv[1]}", pretrained=True).eval()
config = timm.data.resolve_data_config({}, model=model)
assert list(config["input_size"]) == [3, 32, 32], config
assert model.pretrained_cfg["label_names"] == list("0123456789")
images = torch.from_numpy(np.load(sys.argv[2]).transpose(0, 3, 1, 2).copy())
np.save(sys.argv[3], model(images).detach().numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, {"depths": (1, 1, 2, 1), "widths": (8, 12, 16, 24)}])
def test_timm_loads_it_and_gives_the_same_logits(hub, digits, overrides, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed (extra: verify)")
    params, info = digits
    if overrides:
        info = dataclasses.replace(info, overrides=overrides)
        params = golden.params(info.create_model())
    mambaout_jax.push_to_hub(params, NAME, info=info, private=True)
    images = golden.images(0, 4, 32)
    np.save(tmp_path / "images.npy", images)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    script = [sys.executable, "-c", TIMM, NAME, tmp_path / "images.npy", tmp_path / "logits.npy"]
    subprocess.run(script, env=environment, check=True)
    logits = info.create_model().apply({"params": params}, images)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits, atol=2e-4)

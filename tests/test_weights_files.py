"""PyTorch files: identified, unwrapped, converted to float32, written and refused."""

import argparse
import importlib.util
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mambaout_jax
from mambaout_jax.errors import UserError
from mambaout_jax.models.mambaout import create_model
from mambaout_jax.models.variants import VARIANTS
from mambaout_jax.weights import identify, torch_file
from mambaout_jax.weights.store import load_weights, save_weights
from mambaout_jax.weights.torch_layout import torch_tensors

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
NAME = "test_mambaout"


@pytest.fixture(scope="module")
def tensors():
    meta, _ = golden.load("test_mambaout-timm-160")
    return golden.weights(meta["state_dict"], meta["seed"])


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def shapes_of(name, layout, num_classes=1000):
    model = create_model(name, num_classes=num_classes)
    return {tensor.name: tensor.shape for tensor in torch_tensors(model, layout)}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layout", ["timm", "original"])
def test_every_variant_is_found_by_its_tensors(name, layout):
    if VARIANTS[name].rw and layout == "original":
        with pytest.raises(UserError, match="timm layout only"):
            shapes_of(name, layout)
        return
    shapes = shapes_of(name, layout, num_classes=37)
    assert identify.find_layout(shapes) == layout
    assert identify.find_variant_of(shapes) == name
    assert identify.find_classes(shapes) == 37


def test_an_ambiguous_or_unknown_variant_is_asked_for():
    shapes = shapes_of("mambaout_base_wide_rw", "timm")
    distinguishing = ("fc2.weight", "conv.bias", "norm.weight")
    vague = {name: shape for name, shape in shapes.items() if not name.endswith(distinguishing)}
    with pytest.raises(UserError, match=r"mambaout_small_rw or mambaout_base_wide_rw: name"):
        identify.find_variant_of(vague)
    fewer = {name: shape for name, shape in shapes.items() if not name.startswith("stages.3.")}
    with pytest.raises(UserError, match="fit none of the known variants: name the model"):
        identify.find_variant_of(fewer)
    with pytest.raises(UserError, match="not MambaOut weights"):
        identify.find_layout({"conv1.weight": (64, 3, 7, 7)})


def test_errors_are_listed_together_with_the_variant_that_fits(tensors):
    with pytest.raises(UserError) as error:
        mambaout_jax.from_torch(tensors, "mambaout_femto")
    assert "do not fit mambaout_femto, they fit test_mambaout with num_classes=1000" in str(error)
    broken = dict(tensors)
    del broken["stem.conv1.bias"]
    broken["stem.conv2.bias"] = np.zeros(3, np.float32)
    broken["extra"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        mambaout_jax.from_torch(broken, NAME)
    assert str(error.value) == (
        "the weights do not fit test_mambaout: extra is unexpected; stem.conv1.bias is missing; "
        "stem.conv2.bias is (3,), expected (16,)"
    )
    with pytest.raises(UserError, match="they fit test_mambaout with num_classes=1000"):
        mambaout_jax.from_torch(tensors, NAME, num_classes=10)


def test_values_that_are_not_weights_are_refused(tensors):
    broken = dict(tensors)
    for i, value in enumerate((np.nan, np.inf, -np.inf, 1e300)):
        name = f"stages.2.blocks.{i % 3}.fc{1 + i // 3}.bias"
        broken[name] = broken[name].astype(np.float64)
        broken[name][5] = value
    broken["stem.conv1.bias"] = broken["stem.conv1.bias"].astype(np.int32)
    with pytest.raises(UserError) as error:
        mambaout_jax.from_torch(broken, NAME)
    assert str(error.value).count("not finite") == 4
    assert "stem.conv1.bias is of type int32" in str(error.value)
    broken["stem.conv1.bias"] = tensors["stem.conv1.bias"]
    params = mambaout_jax.from_torch(broken, NAME, allow_non_finite=True)
    assert np.isnan(params["stages_2"]["blocks_0"]["fc1"]["bias"][5])


def test_to_torch_refuses_what_is_not_the_models(tensors):
    params = mambaout_jax.from_torch(tensors, NAME)
    with pytest.raises(UserError, match="do not fit mambaout_femto"):
        mambaout_jax.to_torch(params, "mambaout_femto")
    with pytest.raises(UserError, match="timm layout only"):
        mambaout_jax.to_torch(params, NAME, layout="original")
    with pytest.raises(UserError, match="unknown layout 'keras'"):
        mambaout_jax.to_torch(params, NAME, layout="keras")


def test_load_pretrained_takes_a_file_and_a_checkpoint(tensors, tmp_path):
    save_file(tensors, tmp_path / "w.safetensors")
    model, params = mambaout_jax.load_pretrained(tmp_path / "w.safetensors")
    assert model == create_model(NAME)
    assert_equal(params, mambaout_jax.from_torch(tensors, NAME))
    _, info = mambaout_jax.read_weights(tmp_path / "w.safetensors")
    assert (info.model, info.num_classes, info.source) == (NAME, 1000, "w.safetensors")
    assert info.preprocessing == mambaout_jax.preprocessing(NAME)
    save_weights(tmp_path / "dir", params, info)
    model, restored = mambaout_jax.load_pretrained(tmp_path / "dir", dtype=jnp.bfloat16)
    assert model == create_model(NAME, dtype=jnp.bfloat16)
    assert_equal(restored, params)
    with pytest.raises(UserError, match="are test_mambaout's, not mambaout_tiny's"):
        mambaout_jax.read_weights(tmp_path / "dir", model="mambaout_tiny")


def test_a_hub_name_for_a_file_brings_its_preprocessing(tmp_path, monkeypatch):
    variant = "mambaout_base_plus_rw"
    monkeypatch.setitem(VARIANTS, variant, VARIANTS[NAME])
    meta, _ = golden.load("test_mambaout-timm-160")
    tensors = golden.weights(meta["state_dict"], meta["seed"])
    save_file(tensors, tmp_path / "w.safetensors")
    name = f"{variant}.sw_e150_r384_in12k_ft_in1k"
    _, info = mambaout_jax.read_weights(tmp_path / "w.safetensors", model=name)
    assert info.model == variant
    assert info.preprocessing == mambaout_jax.preprocessing(name)
    assert (info.preprocessing.shape, info.preprocessing.crop_mode) == ((384, 384), "squash")
    with pytest.raises(UserError, match=r"head.fc.bias is \(1000,\), expected \(11821,\)"):
        mambaout_jax.read_weights(tmp_path / "w.safetensors", model=f"{variant}.sw_e150_in12k")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_mambaout", "test_mambaout has no pretrained weights"),
        ("mambaout_tiny.in2k", r"did you mean 'mambaout_tiny\.in1k'"),
        ("here/there/mambaout.bin", "there are no weights"),
        ("nothing", r"there are no weights 'nothing' \(expected a directory, a file"),
        (
            "mambaout_femtoo",
            "there are no weights 'mambaout_femtoo'; did you mean 'mambaout_femto.in1k'[?]",
        ),
        ("absent.safetensors", "there is no file absent.safetensors"),
        ("absent.pth", "there is no file absent.pth"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(UserError, match=message):
        mambaout_jax.load_pretrained(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "w.onnx").write_bytes(b"onnx")
    with pytest.raises(UserError, match=r"w.onnx: expected a file that ends in \.safetensors"):
        mambaout_jax.load_pretrained(tmp_path / "w.onnx")
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="truncated, damaged"):
        mambaout_jax.load_pretrained(tmp_path / "w.safetensors")


def write_header(path, entries, size):
    """Writes a .safetensors file of `size` bytes of data, which take no room on the disk."""
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_huge_tensor_too_many_is_refused_before_it_is_read(tensors, tmp_path):
    entries, end = {}, 0
    for name, array in tensors.items():
        entries[name] = entry("F32", array.shape, end, end + array.nbytes)
        end += array.nbytes
    huge = 1 << 36
    entries["extra"] = entry("F32", [huge // 4], end, end + huge)
    write_header(tmp_path / "w.safetensors", entries, end + huge)
    with pytest.raises(UserError, match="do not fit test_mambaout: extra is unexpected"):
        mambaout_jax.read_weights(tmp_path / "w.safetensors", model=NAME)


def test_memory_that_runs_out_is_reported(tmp_path):
    """Then the library's Rust code panics, which is no Exception."""
    size = 1 << 33
    write_header(tmp_path / "w.safetensors", {"x": entry("F32", [size // 4], 0, size)}, size)
    code = """
import resource, sys
from pathlib import Path
from mambaout_jax.errors import UserError
from mambaout_jax.weights.torch_file import read_state_dict
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (9 << 30)  # enough to map the file, not to copy it
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    read_state_dict(Path(sys.argv[1]))
except UserError as error:
    print(error, end="")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w.safetensors")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "fit into memory" in done.stdout
    assert "\n" not in done.stdout


def test_types_that_numpy_lacks_are_named(tmp_path):
    entries = {"stem.conv1.bias": entry("F8_E4M3", [8], 0, 8)}
    write_header(tmp_path / "w.safetensors", entries, 8)
    with pytest.raises(UserError, match=r"stem.conv1.bias of type F8_E4M3: expected F32, F16"):
        mambaout_jax.load_pretrained(tmp_path / "w.safetensors")


def test_a_pipe_is_refused_and_not_read(tmp_path):
    for name in ("w.safetensors", "w.pth"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} is not a regular file"):
            mambaout_jax.load_pretrained(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_float_types_become_float32_and_are_named(tensors, tmp_path, dtype):
    cast = {name: array.astype(dtype) for name, array in tensors.items()}
    save_file(cast, tmp_path / "w.safetensors")
    file = torch_file.read_state_dict(tmp_path / "w.safetensors")
    assert file.describe() == f"78 {np.dtype(dtype)}, converted to float32"
    _, params = mambaout_jax.load_pretrained(tmp_path / "w.safetensors")
    widened = {name: array.astype(np.float32) for name, array in cast.items()}
    assert_equal(params, mambaout_jax.from_torch(widened, NAME))


def test_prefixes_are_removed(tensors, tmp_path):
    prefixed = {f"module._orig_mod.{name}": array for name, array in tensors.items()}
    save_file(prefixed, tmp_path / "w.safetensors")
    file = torch_file.read_state_dict(tmp_path / "w.safetensors")
    assert file.tensors.keys() == tensors.keys()
    assert "prefix 'module.' removed, prefix '_orig_mod.' removed" in file.describe()
    prefixed["stem.conv1.bias"] = tensors["stem.conv1.bias"]
    save_file(prefixed, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"holds stem.conv1.bias twice"):
        torch_file.read_state_dict(tmp_path / "w.safetensors")


def test_safetensors_there_and_back_is_bit_identical(tensors, tmp_path):
    tensors = dict(tensors)
    shape = tensors["stem.conv2.weight"].shape
    bits = np.random.default_rng(0).integers(0, 2**32, shape, dtype=np.uint32)
    bits &= ~np.uint32(1 << 30)  # any float below 2
    tensors["stem.conv2.weight"] = bits.view(np.float32)
    tensors["stem.conv2.bias"][:2] = -0.0, 1e-45
    save_file(tensors, tmp_path / "w.safetensors")
    model, params = mambaout_jax.load_pretrained(tmp_path / "w.safetensors")
    path = tmp_path / "back.safetensors"
    torch_file.write_state_dict(path, mambaout_jax.to_torch(params, model))
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].tobytes() == array.tobytes()
    assert os.stat(path).st_mode & 0o444 == 0o444
    assert {path.name for path in tmp_path.iterdir()} == {"w.safetensors", "back.safetensors"}


def test_outputs_that_cannot_be_written(tensors, tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        torch_file.write_state_dict(tmp_path / "w.safetensors", tensors)
    assert (tmp_path / "w.safetensors").read_text() == "mine"
    with pytest.raises(UserError, match=r"cannot write .*absent"):
        torch_file.write_state_dict(tmp_path / "absent" / "v.safetensors", tensors)
    with pytest.raises(UserError, match="expected a name that ends in"):
        torch_file.write_state_dict(tmp_path / "v.npz", tensors)

    def full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_file, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        torch_file.write_state_dict(tmp_path / "v.safetensors", tensors)
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"it needs 1.8 MB, and 1.0 MB are free"):
        torch_file.write_state_dict(tmp_path / "v.safetensors", tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_pth_without_torch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'mambaout_jax\[torch\]'"):
        mambaout_jax.load_pretrained(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"pip install 'mambaout_jax\[torch\]'"):
        torch_file.write_state_dict(tmp_path / "v.pth", {})
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


@needs_torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", ["", "model", "state_dict", "state_dict_ema"])
def test_pth_in_every_wrapping(tensors, tmp_path, wrapper, zipped):
    import torch

    content = {f"module.{name}": torch.from_numpy(x) for name, x in tensors.items()}
    for name, tensor in content.items():
        if tensor.ndim == 4:
            content[name] = tensor.contiguous(memory_format=torch.channels_last)
    if wrapper:
        flags = argparse.Namespace(lr=4e-3, model=NAME)
        content = {wrapper: content, "epoch": 299, "args": flags, "arch": NAME}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    file = torch_file.read_state_dict(tmp_path / "w.pth")
    assert file.wrapper == wrapper
    for name, array in tensors.items():
        assert file.tensors[name].tobytes() == array.tobytes()
    _, params = mambaout_jax.load_pretrained(tmp_path / "w.pth")
    assert_equal(params, mambaout_jax.from_torch(tensors, NAME))


@needs_torch
def test_averaged_weights_are_preferred_and_the_others_are_named(tensors, tmp_path):
    import torch

    plain = {name: torch.from_numpy(array) for name, array in tensors.items()}
    averaged = {name: 2 * tensor for name, tensor in plain.items()}
    path = tmp_path / "w.pt"
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, path)
    file = torch_file.read_state_dict(path)
    assert file.describe() == "78 float32, under 'state_dict_ema' ('state_dict' ignored)"
    np.testing.assert_array_equal(file.tensors["stem.conv1.bias"], averaged["stem.conv1.bias"])
    torch.save({"state_dict": plain, "state_dict_ema": None}, path)
    assert torch_file.read_state_dict(path).wrapper == "state_dict"


@needs_torch
def test_half_precision_pth(tensors, tmp_path):
    import torch

    for dtype, kind in ((torch.float16, "float16"), (torch.bfloat16, "float32")):
        cast = {name: torch.from_numpy(array).to(dtype) for name, array in tensors.items()}
        torch.save(cast, tmp_path / "w.pth")
        file = torch_file.read_state_dict(tmp_path / "w.pth")
        assert {str(array.dtype) for array in file.tensors.values()} == {kind}
        for name, tensor in cast.items():
            np.testing.assert_array_equal(file.tensors[name], tensor.float().numpy())


class Code:
    """A pickle of this creates a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@needs_torch
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tensors, tmp_path, zipped):
    import torch

    content = {name: torch.from_numpy(array) for name, array in tensors.items()}
    content["code"] = Code(tmp_path / "ran")
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"more than tensors .* save the model's state_dict\(\)"):
        mambaout_jax.load_pretrained(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@needs_torch
def test_bytes_that_torch_did_not_write_are_refused_and_not_run(tmp_path):
    for content in (np.random.default_rng(0).bytes(5000), pickle.dumps(Code(tmp_path / "ran"))):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged, or a pickle of something other"):
            mambaout_jax.load_pretrained(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@needs_torch
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list: expected a state dict"),
        ({}, "not MambaOut weights"),
        ({"model": {"stem.conv1.weight": 3}}, "stem.conv1.weight as int: expected a dense tensor"),
    ],
)
def test_pth_that_hold_something_else(tmp_path, content, message):
    import torch

    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        mambaout_jax.load_pretrained(tmp_path / "w.pth")


@needs_torch
def test_views_into_a_larger_storage_are_refused(tensors, tmp_path):
    import torch

    content = {name: torch.from_numpy(array) for name, array in tensors.items()}
    content["stem.conv1.bias"] = torch.zeros(16)[:8]
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"stem.conv1.bias, a view into a larger storage"):
        mambaout_jax.load_pretrained(tmp_path / "w.pth")


@needs_torch
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_pth_of_types_that_numpy_lacks(tmp_path, dtype):
    import torch

    content = {"stem.conv1.bias": torch.zeros(8).to(getattr(torch, dtype))}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"stem.conv1.bias as {dtype} tensor .*: expected a dense"):
        mambaout_jax.load_pretrained(tmp_path / "w.pth")


@needs_torch
def test_pth_with_compressed_members_is_refused(tensors, tmp_path):
    """Torch would map them into memory and take the compressed bytes for numbers."""
    import torch

    torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as stored:
        contents = {name: stored.read(name) for name in stored.namelist()}
    for packed in (set(contents), {next(name for name in contents if name.endswith("/data/7"))}):
        with zipfile.ZipFile(tmp_path / "packed.pth", "w") as archive:
            for name, content in contents.items():
                kind = zipfile.ZIP_DEFLATED if name in packed else zipfile.ZIP_STORED
                archive.writestr(name, content, kind)
        with pytest.raises(UserError, match=r"packed.pth is compressed \(\w+/.*save it again"):
            mambaout_jax.load_pretrained(tmp_path / "packed.pth")


@needs_torch
@pytest.mark.parametrize("case", ["mambaout_femto-original-224", "test_mambaout-timm-160"])
def test_pth_there_and_back_is_bit_identical(tmp_path, case):
    import torch

    meta, _ = golden.load(case)
    tensors = golden.weights(meta["state_dict"], meta["seed"])
    params = mambaout_jax.from_torch(tensors, meta["variant"])
    layout = "original" if "original" in case else "timm"
    back = mambaout_jax.to_torch(params, meta["variant"], layout=layout)
    torch_file.write_state_dict(tmp_path / "w.pth", back)
    loaded = torch.load(tmp_path / "w.pth", weights_only=True)
    assert loaded.keys() == tensors.keys()
    for name, array in tensors.items():
        assert loaded[name].numpy().tobytes() == array.tobytes()
    assert_equal(mambaout_jax.load_pretrained(tmp_path / "w.pth")[1], params)


def test_the_golden_cases_answer_alike_after_the_whole_way_round(tmp_path):
    for case in golden.CASES:
        meta, answers = golden.load(case)
        save_file(
            golden.weights(meta["state_dict"], meta["seed"]), tmp_path / f"{case}.safetensors"
        )
        params, info = mambaout_jax.read_weights(tmp_path / f"{case}.safetensors")
        assert info.model == meta["variant"]
        save_weights(tmp_path / case, params, info)
        params, info = load_weights(tmp_path / case)
        images = golden.images(meta["image_seed"], meta["batch"], meta["size"])
        with jax.default_matmul_precision("highest"):
            logits = jax.jit(info.create_model().apply)({"params": params}, images)
        np.testing.assert_allclose(logits, answers["logits"], rtol=0, atol=1e-4)

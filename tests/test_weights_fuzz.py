"""Files and checkpoints with random damage: never a silently wrong model, never a raw traceback.

What is correct depends on the kind of damage:

- `REFUSED`: a UserError of one line.
- `SAME`: a UserError, or parameters that are bit for bit those of the original (the damage is in
  bytes without meaning, such as padding).
- `VALUES`: as `SAME`, or the file is a valid one with other numbers. A format without checksums
  (.safetensors, torch's old .pth) cannot notice this; then only the damaged numbers may differ, and
  the digest must.

`pytest -n 0 -s -m '' tests/test_weights_fuzz.py` prints the counts of docs/weights.md.
"""

import collections
import importlib.util
import io
import json
import os
import runpy
import shutil
import struct
import zipfile
from pathlib import Path

import golden
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save

import mambaout_jax
from mambaout_jax.errors import UserError
from mambaout_jax.inference.export import export_model
from mambaout_jax.weights.integrity import digest

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
SEEDS = 20  # of each kind of mutation
REFUSED, SAME, VALUES = "refused", "same", "values"


def original_tensors():
    meta, _ = golden.load("test_mambaout-timm-160")
    return golden.weights(meta["state_dict"], meta["seed"])


TENSORS = original_tensors()
PARAMS = flatten_dict(mambaout_jax.from_torch(TENSORS, "test_mambaout"))
DIGEST = digest(mambaout_jax.from_torch(TENSORS, "test_mambaout"))


def check(path, expected, numbers=1):
    """Reads a damaged file and returns the outcome.

    `numbers` is how many numbers the damage may have changed.
    """
    try:
        params, info = mambaout_jax.read_weights(path)
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
    assert "Traceback" not in message
    if message:
        return REFUSED
    assert expected != REFUSED
    assert info.model == "test_mambaout"
    flat = flatten_dict(params)
    differing = sum(np.sum(flat[key].view("u4") != PARAMS[key].view("u4")) for key in PARAMS)
    assert differing <= (numbers if expected == VALUES else 0)
    assert (digest(params) == DIGEST) == (differing == 0)
    return VALUES if differing else SAME


# Damage to a .safetensors file: (random, bytes of the original) to bytes.


def split(data):
    """Returns the header's text and the numbers' bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def join(header, numbers):
    header = json.dumps(header).encode() if isinstance(header, dict) else bytes(header)
    return struct.pack("<Q", len(header)) + header + numbers


def flip(random, data, start, end, change=None):
    """Returns `data` with a bit, or by `change` some of a byte's, flipped in [start, end)."""
    data = bytearray(data)
    data[random.integers(start, end)] ^= change or 1 << random.integers(8)
    return bytes(data)


def truncate(random, data):
    return data[: random.integers(len(data))]


def append(random, data):
    return data + random.bytes(random.integers(1, 100))


def flip_length(random, data):
    return flip(random, data, 0, 8)


def change_header(random, data):
    header, numbers = split(data)
    return join(flip(random, header, 0, len(header), random.integers(1, 256)), numbers)


def change_number(random, data):
    return flip(random, data, len(data) - len(split(data)[1]), len(data))


def swap_offsets(random, data):
    header, numbers = split(data)
    header = json.loads(header)
    while True:
        a, b = random.choice(sorted(header), 2)
        if header[a]["shape"] != header[b]["shape"]:
            break
    keys = "data_offsets"
    header[a][keys], header[b][keys] = header[b][keys], header[a][keys]
    return join(header, numbers)


def resave(change):
    """Returns damage that changes a random tensor and saves all of them."""

    def mutate(random, data):
        tensors = dict(TENSORS)
        change(random, tensors, str(random.choice(sorted(tensors))))
        return save(tensors)

    mutate.__name__ = change.__name__
    return mutate


@resave
def drop(random, tensors, name):
    del tensors[name]


@resave
def rename(random, tensors, name):
    tensors[name + str(random.integers(10))] = tensors.pop(name)


@resave
def misshape(random, tensors, name):
    array = tensors[name]
    changes = [array[:-1], np.concatenate([array, array[:1]]), array[None], array.reshape(-1, 1, 1)]
    tensors[name] = np.ascontiguousarray(changes[random.integers(len(changes))])


@resave
def not_finite(random, tensors, name):
    array = tensors[name].copy()
    array.flat[random.integers(array.size)] = random.choice([np.nan, np.inf, -np.inf])
    tensors[name] = array


@resave
def other_type(random, tensors, name):
    types = [np.int32, np.uint8, np.int64, np.bool_]
    tensors[name] = tensors[name].astype(types[random.integers(len(types))])


SAFETENSORS = [
    (truncate, REFUSED),
    (append, REFUSED),
    (flip_length, REFUSED),
    (change_header, SAME),
    (change_number, VALUES),
    (swap_offsets, REFUSED),
    (drop, REFUSED),
    (rename, REFUSED),
    (misshape, REFUSED),
    (not_finite, REFUSED),
]


def run(path, mutations, original, **options):
    """Reads SEEDS files of each kind of damage, none of them equal to the original."""
    for mutate, expected in mutations:
        outcomes: collections.Counter[str] = collections.Counter()
        for seed in range(SEEDS):
            mutated = mutate(np.random.default_rng(seed), original)
            assert mutated != original
            path.write_bytes(mutated)
            outcomes[check(path, expected, **options)] += 1
        print(f"\n| {path.suffix} {mutate.__name__} | {dict(outcomes)} |", end="")


def test_the_original_is_read(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(save(TENSORS))
    assert check(tmp_path / "w.safetensors", SAME) == SAME


def test_safetensors(tmp_path):
    assert SEEDS * len(SAFETENSORS) == 200
    run(tmp_path / "w.safetensors", SAFETENSORS, save(TENSORS))


def test_safetensors_of_other_types(tmp_path):
    run(tmp_path / "w.safetensors", [(other_type, REFUSED)], save(TENSORS))


# Damage to a .pth file.


def torch_bytes(content, zipped):
    import torch

    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def torch_tensors():
    import torch

    return {name: torch.from_numpy(array) for name, array in TENSORS.items()}


def change_byte(random, data):
    return flip(random, data, 0, len(data), random.integers(1, 256))


def change_start(random, data):
    return flip(random, data, 0, 20_000, random.integers(1, 256))


def change_end(random, data):
    return flip(random, data, len(data) - 10_000, len(data), random.integers(1, 256))


def zero_page(random, data):
    start = 512 * random.integers(len(data) // 512 - 1)
    return data[:start] + bytes(512) + data[start + 512 :]


class Code:
    """Creates a directory when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@needs_torch
def test_pth(tmp_path):
    mutations = [
        (truncate, REFUSED),
        (change_byte, SAME),
        (change_start, SAME),
        (change_end, SAME),
        (zero_page, SAME),
    ]
    run(tmp_path / "w.pth", mutations, torch_bytes(torch_tensors(), zipped=True))


@needs_torch
def test_pth_with_a_compressed_member(tmp_path):
    """A member that is compressed is refused, damaged or not."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes(torch_tensors(), zipped=True))) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(5 * SEEDS):
        random = np.random.default_rng(seed)
        packed = io.BytesIO()
        chosen = random.choice([name for name in contents if "/data/" in name])
        with zipfile.ZipFile(packed, "w") as archive:
            for name, content in contents.items():
                kind = zipfile.ZIP_DEFLATED if name == chosen else zipfile.ZIP_STORED
                archive.writestr(name, content, kind)
        (tmp_path / "w.pth").write_bytes(change_byte(random, packed.getvalue()))
        outcomes[check(tmp_path / "w.pth", REFUSED)] += 1
    print(f"\n| .pth with a compressed member | {dict(outcomes)} |", end="")


@needs_torch
def test_pth_of_the_old_format(tmp_path):
    mutations = [
        (truncate, REFUSED),
        (append, SAME),
        (change_byte, VALUES),
        (change_start, VALUES),
        (change_end, VALUES),
    ]
    run(tmp_path / "w.pth", mutations, torch_bytes(torch_tensors(), zipped=False))


@needs_torch
@pytest.mark.parametrize("zipped", [True, False])
def test_pth_with_code_anywhere(tmp_path, zipped):
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        code = Code(str(tmp_path / "ran"))
        content = dict(torch_tensors())
        place = random.integers(4)
        if place == 0:
            content = {"state_dict": content, "hook": code}
        elif place == 1:
            content[str(random.choice(sorted(content)))] = code
        elif place == 2:
            content = [content, code]
        else:
            content = code
        (tmp_path / "w.pth").write_bytes(torch_bytes(content, zipped))
        assert check(tmp_path / "w.pth", REFUSED) == REFUSED
        assert not (tmp_path / "ran").exists()


# Flipped bits in a checkpoint of a run, and in an exported network.

FLIPS = [40, pytest.param(200, marks=pytest.mark.slow)]
RUN = Path(__file__).parent / "checkpoints" / "run-1" / "checkpoints" / "3"


def read_quietly(path):
    """Returns what `read_weights` does; None for a UserError, which must be one line."""
    try:
        return mambaout_jax.read_weights(path)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return None


@pytest.mark.parametrize("flips", FLIPS)
def test_a_checkpoint_of_a_run(tmp_path, flips):
    """A bit of the average weights or the description; half of the time each file is as likely."""
    original, info = mambaout_jax.read_weights(RUN)
    files = sorted(
        path
        for item in ("ema_params", "meta")
        for path in (RUN / item).rglob("*")
        if path.is_file() and path.name != "commit_success.txt"
    )
    sizes = np.array([path.stat().st_size for path in files])
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(flips):
        random = np.random.default_rng(seed)
        file = files[random.choice(len(files), p=None if seed % 2 else sizes / sizes.sum())]
        copy = tmp_path / str(seed)
        shutil.copytree(RUN, copy)
        damaged = copy / file.relative_to(RUN)
        damaged.write_bytes(flip(random, damaged.read_bytes(), 0, damaged.stat().st_size))
        found = read_quietly(copy)
        outcomes[SAME if found else REFUSED] += 1
        if found:
            assert found[1] == info
            assert digest(found[0]) == digest(original)
        shutil.rmtree(copy)
    print(f"\n| checkpoint of a run, flipped bits | {dict(outcomes)} |", end="")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers (extra: export)")
    path = tmp_path_factory.mktemp("exported") / "network.zip"
    params, info = mambaout_jax.read_weights(RUN)
    export_model(path, info.create_model(), params, info, platforms=["cpu"])
    return path


@pytest.mark.parametrize("flips", FLIPS)
def test_an_exported_network(exported, tmp_path, flips):
    """Its reader raises, or computes the same logits."""
    load = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "run_exported.py"))["load"]
    images = np.random.RandomState(0).randint(0, 256, (1, 32, 48, 3), np.uint8)

    def answer(path):
        network, labels = load(path)
        preprocessing = np.load(path)["preprocessing.json"]
        return np.asarray(network(images)).tobytes(), labels, preprocessing

    original, data = answer(exported), exported.read_bytes()
    outcomes: collections.Counter[str] = collections.Counter()
    path = tmp_path / "network.zip"
    for seed in range(flips):
        path.write_bytes(flip(np.random.default_rng(seed), data, 0, len(data)))
        try:
            found = answer(path)
        except Exception:
            found = None
        outcomes[SAME if found else REFUSED] += 1
        assert found in (None, original)
    print(f"\n| exported zip, flipped bits | {dict(outcomes)} |", end="")

"""Validation counts what the model's own answers count, over checkpoints, labels and subsets."""

import csv
import json

import jax
import numpy as np
import pytest
import small_weights

from mambaout_jax import load_pretrained, preprocess_image
from mambaout_jax.__main__ import main
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.errors import UserError
from mambaout_jax.inference.predictor import Predictor
from mambaout_jax.inference.validate import expand_weights
from mambaout_jax.labels import imagenet_wordnet_ids
from mambaout_jax.models.pretrained import list_pretrained

CLASSES = 7
COUNT = 19  # pictures: no multiple of the batch


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two checkpoints of seven classes."""
    folder = tmp_path_factory.mktemp("runs")
    names = imagenet_wordnet_ids()[:CLASSES]
    for seed in range(2):
        name = folder / f"run{seed}"
        small_weights.write(name, seed, num_classes=CLASSES, class_names=names)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise in class folders of ImageNet's names; the n-th file is ILSVRC2012_val_n."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.RandomState(0)
    labels = np.concatenate([np.arange(CLASSES), rng.randint(0, CLASSES, COUNT - CLASSES)])
    for number, label in enumerate(labels):
        folder = root / "validation" / imagenet_wordnet_ids()[label]
        folder.mkdir(parents=True, exist_ok=True)
        small_weights.picture(number).save(folder / f"ILSVRC2012_val_{number + 1:08d}.png")
    return root


@pytest.fixture(scope="module")
def logits(runs, data):
    """The first checkpoint's logits [pictures, classes] and the labels, in the files' numbers."""
    model, params = load_pretrained(runs / "run0")
    p = small_weights.INFO.preprocessing
    files = sorted(data.rglob("*.png"), key=lambda file: file.name)
    images = np.stack([preprocess_image(file.read_bytes(), p) for file in files])
    answer = jax.jit(model.apply)({"params": params}, normalize(images, p.mean, p.std))
    labels = [imagenet_wordnet_ids().index(file.parent.name) for file in files]
    return np.asarray(answer), np.array(labels)


def run(data, *arguments, tmp_path):
    """Returns the exit status and the rows that were written."""
    out = tmp_path / "out.json"
    common = ["--data=folder", f"--data-dir={data}", "--batch-size=8", f"--json={out}"]
    status = main(["validate", *map(str, arguments), *common])
    return status, json.loads(out.read_text()) if out.exists() else []


def hits(logits, right):
    """Returns top-1 and top-5 in percent: `right` is a set of classes for each row."""
    order = np.argsort(-logits, axis=1)
    top1 = [row[0] in good for row, good in zip(order, right, strict=True)]
    top5 = [bool(set(row[:5]) & good) for row, good in zip(order, right, strict=True)]
    return 100 * np.mean(top1), 100 * np.mean(top5)


def test_many_checkpoints_by_wildcard_to_csv_and_json(runs, data, logits, tmp_path, capsys):
    status, rows = run(data, runs / "run?", f"--csv={tmp_path / 'out.csv'}", tmp_path=tmp_path)
    assert status == 0
    assert [row["weights"] for row in rows] == [str(runs / "run0"), str(runs / "run1")]
    top1, top5 = hits(logits[0], [{label} for label in logits[1]])
    assert 0 < top1 < top5 < 100, "the case must tell the two apart"
    assert rows[0]["top1"] == pytest.approx(top1)
    assert rows[0]["top5"] == pytest.approx(top5)
    assert rows[0]["top1_err"] == pytest.approx(100 - top1)
    assert rows[0]["examples"] == COUNT
    assert rows[0]["size"] == "32x32"
    assert rows[0]["crop_pct"] == 0.9
    with (tmp_path / "out.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == table
    assert f"run0: top-1 {top1:.3f}%, top-5 {top5:.3f}% of 19 pictures" in capsys.readouterr().out


def test_real_labels(runs, data, logits, tmp_path):
    rng = np.random.RandomState(1)
    real = [rng.permutation(CLASSES)[: number % 3].tolist() for number in range(COUNT)]
    (tmp_path / "real.json").write_text(json.dumps(real))
    _, rows = run(data, runs / "run0", f"--real={tmp_path / 'real.json'}", tmp_path=tmp_path)
    counted = [number for number in range(COUNT) if real[number]]
    top1, top5 = hits(logits[0][counted], [set(real[number]) for number in counted])
    assert rows[0]["examples"] == len(counted) < COUNT
    assert (rows[0]["top1"], rows[0]["top5"]) == pytest.approx((top1, top5))


def test_a_subset_of_the_classes(runs, data, logits, tmp_path):
    subset = [5, 1, 3]
    (tmp_path / "subset.txt").write_text(f"5\n{imagenet_wordnet_ids()[1]}\n3\n\n")
    arguments = [runs / "run0", f"--subset={tmp_path / 'subset.txt'}"]
    _, rows = run(data, *arguments, tmp_path=tmp_path)
    kept = np.isin(logits[1], subset)
    masked = np.where(np.isin(np.arange(CLASSES), subset), logits[0][kept], -np.inf)
    top1, _ = hits(masked, [{label} for label in logits[1][kept]])
    assert rows[0]["examples"] == kept.sum()
    assert rows[0]["top1"] == pytest.approx(top1)
    assert rows[0]["top5"] == 100


def test_a_data_set_of_the_subset_alone(runs, data, logits, tmp_path):
    subset = [1, 3, 5]
    for label in subset:
        name = imagenet_wordnet_ids()[label]
        (tmp_path / "validation").mkdir(exist_ok=True)
        (tmp_path / "validation" / name).symlink_to(data / "validation" / name)
    (tmp_path / "subset.txt").write_text("\n".join(map(str, subset)))
    arguments = [runs / "run0", f"--subset={tmp_path / 'subset.txt'}"]
    _, alone = run(tmp_path, *arguments, tmp_path=tmp_path)
    _, whole = run(data, *arguments, tmp_path=tmp_path)
    assert alone[0]["top1"] == whole[0]["top1"]
    assert alone[0]["examples"] == whole[0]["examples"] == np.isin(logits[1], subset).sum()


def test_the_batch_shrinks_until_memory_suffices(runs, data, tmp_path, monkeypatch, caplog):
    dispatch = Predictor._dispatch

    def limited(self, images):
        if self.batch_size > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
        return dispatch(self, images)

    _, expected = run(data, runs / "run0", tmp_path=tmp_path)
    monkeypatch.setattr(Predictor, "_dispatch", limited)
    arguments = [str(runs / "run0"), "--data=folder", f"--data-dir={data}", "--batch-size=32"]
    assert main(["validate", *arguments, f"--json={tmp_path / 'shrunk.json'}"]) == 0
    assert json.loads((tmp_path / "shrunk.json").read_text()) == expected
    assert [record.message.split()[-1] for record in caplog.records] == ["16", "8"]


def test_too_little_memory_for_one_picture_a_device(runs, data, tmp_path, monkeypatch, capsys):
    def never(self, images):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

    monkeypatch.setattr(Predictor, "_dispatch", never)
    assert run(data, runs / "run0", tmp_path=tmp_path) == (1, [])
    assert "one picture a device" in capsys.readouterr().err


def test_other_errors_of_the_device_are_not_taken_for_memory(runs, data, tmp_path, monkeypatch):
    def fail(self, images):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(Predictor, "_dispatch", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run(data, runs / "run0", tmp_path=tmp_path)


def test_the_digits_of_the_package(tmp_path, capsys):
    weights = small_weights.write(tmp_path / "w", num_classes=10)
    assert main(["validate", str(weights), "--data=digits", "--batch-size=64"]) == 0
    assert " pictures" in capsys.readouterr().out


def test_a_checkpoint_that_fails_does_not_keep_the_others(runs, data, tmp_path, capsys):
    status, rows = run(data, tmp_path / "no.pth", runs / "run0", tmp_path=tmp_path)
    assert status == 1
    assert [row["weights"] for row in rows] == [str(runs / "run0")]
    assert f"error: {tmp_path / 'no.pth'}: " in capsys.readouterr().err


def test_wildcards():
    assert expand_weights(["mambaout_base_*_rw.sw_e500*", "a.pth"]) == [
        *(name for name in list_pretrained() if "e500" in name),
        "a.pth",
    ]
    with pytest.raises(UserError, match="matches 'nothing\\*'"):
        expand_weights(["nothing*"])


def test_mistakes(runs, data, tmp_path, capsys):
    run0 = runs / "run0"
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "numbers.json").write_text("[1, 2]")
    (tmp_path / "short.json").write_text("[[1]]")
    (tmp_path / "out_of_range").write_text("99\n")
    (tmp_path / "twice").write_text("1\n1\n")
    (tmp_path / "nothing").write_text("\n")
    for option, expected in (
        (f"--real={tmp_path / 'bad.json'}", "cannot be read"),
        (f"--real={tmp_path / 'numbers.json'}", "cannot be read"),
        (f"--real={tmp_path / 'short.json'}", "has no real labels"),
        (f"--real={tmp_path / 'none.json'}", "cannot be read"),
        (f"--subset={tmp_path / 'out_of_range'}", "'99' is no class"),
        (f"--subset={tmp_path / 'twice'}", "line 2: '1' stands there twice"),
        (f"--subset={tmp_path / 'nothing'}", "is empty"),
        (f"--subset={tmp_path / 'missing'}", "cannot be read"),
        ("--split=test", "no split 'test'"),
    ):
        assert run(data, run0, option, tmp_path=tmp_path)[0] == 1, option
        assert expected in capsys.readouterr().err, option
    three = small_weights.write(tmp_path / "three", num_classes=3)
    assert run(data, three, tmp_path=tmp_path) == (1, [])
    assert "has 7 classes: expected the weights' 3" in capsys.readouterr().err


def test_where_nothing_can_be_written_nothing_is_measured(runs, data, tmp_path, capsys):
    for path in (tmp_path / "no" / "out.csv", tmp_path):
        assert run(data, runs / "run0", f"--csv={path}", tmp_path=tmp_path) == (1, [])
        printed = capsys.readouterr()
        assert f"cannot write {path}" in printed.err
        assert not printed.out

"""Data sets: torchvision's folders, and files of one's own through all four commands."""

import hashlib
import io
import zipfile

import numpy as np
import pytest
import torch
from conftest import TINY

import analyze
import gtn
import nas


@pytest.mark.parametrize(
    ("dataset", "place"), [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py")]
)
def test_no_data_and_no_download(tmp_path, monkeypatch, capsys, dataset, place):
    def offline(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    where = [
        "--set",
        f"dataset={dataset}",
        "--data",
        str(tmp_path / "mistyped" / "data"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    status = gtn.run("gtn.py", gtn.main, ["--config", "A", *where])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1), error
    for remedy in (str(tmp_path / "mistyped" / "data" / place), "--data", "--config quick"):
        assert remedy in error
    assert list(tmp_path.iterdir()) == []


def test_no_memory_for_the_data(monkeypatch, capsys):
    def exhausted(*_, **__):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr("torchvision.datasets.MNIST", exhausted)
    status = gtn.run("gtn.py", gtn.main, ["--config", "A"])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert "MemoryError: Unable to allocate" in error


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([11, 0], "labels must be 0 to K - 1"),
        ([-1, 0], "labels must be 0 to K - 1"),
        ([0], "labels must be 2 whole numbers"),
    ],
)
def test_labels_that_are_none(labels, message, monkeypatch):
    class MNIST:
        def __init__(self, folder, train, download):
            self.data = torch.zeros(2, 28, 28, dtype=torch.uint8)
            self.targets = torch.tensor(labels)

    monkeypatch.setattr("torchvision.datasets.MNIST", MNIST)
    with pytest.raises(gtn.InputError, match=message):
        gtn.load_data("mnist", "nowhere", torch.device("cpu"))


def arrays(classes=3, shape=(20, 24, 3), count=120, validation=True, column=True):
    """{name: array} of noise, whose brightness grows with its label."""
    generator = np.random.default_rng(0)
    content = {}
    for part in ("train", "val", "test") if validation else ("train", "test"):
        labels = np.arange(count, dtype=np.uint8) % classes
        noise = generator.integers(0, 100, (count, *shape))
        bright = (labels * (150 // classes)).reshape(count, *[1] * len(shape))
        content[f"{part}_images"] = (noise + bright).astype(np.uint8)
        content[f"{part}_labels"] = labels[:, None] if column else labels
    return content


def command(program, capsys, *arguments):
    """(exit status, output, error) of a program inside this process."""
    capsys.readouterr()
    status = gtn.run(program.__name__, program.main, [*map(str, arguments)])
    return status, *capsys.readouterr()


COLOUR = arrays()
GREY = arrays(12, (8, 28), validation=False, column=False)


@pytest.mark.parametrize(("content", "classes"), [(COLOUR, 3), (GREY, 12)])
def test_images_of_ones_own_through_all_commands(tmp_path, capsys, monkeypatch, content, classes):
    monkeypatch.chdir(tmp_path)
    np.savez_compressed("my.npz", **content)
    train = ["--set", *TINY, "dataset=my.npz", "name=mine", "batch_size=5", "--outer-steps", 2]
    status, output, error = command(gtn, capsys, *train)
    assert status == 0, error
    folder = tmp_path / "runs" / "mine-learned-s0"
    _, saved = gtn.read_teacher(folder / "teacher.pt")
    assert saved["classes"] == classes
    expected = [[0, 1, 2, 0, 1]] * 3
    if classes == 12:
        expected = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 0, 1, 2]]
    assert saved["curriculum"].labels.tolist() == expected
    sha256 = hashlib.sha256((tmp_path / "my.npz").read_bytes()).hexdigest()
    assert gtn.read(folder / "config.json")["data_sha256"] == saved["data_sha256"] == sha256

    evaluation = ["--evaluate", folder / "teacher.pt", "--learners", 3]
    status, output, error = command(gtn, capsys, *evaluation)
    assert (status, output.count("(3 fresh learners)")) == (0, 3), error
    search = [folder / "teacher.pt", "--architectures", 2, "--truth-steps", 3]
    status, output, error = command(nas, capsys, *search)
    assert status == 0, error
    assert [line["classes"] for line in gtn.read(next(folder.rglob("nas.jsonl")))] == [classes] * 2
    with pytest.raises(SystemExit, match="0"):
        analyze.main([])
    assert (tmp_path / "runs" / "figures" / "mine-learned-s0-images.png").exists()

    other = content | {"test_images": 255 - content["test_images"]}
    np.savez_compressed("my.npz", **other)
    for program, arguments in ((gtn, [*train, "--resume"]), (gtn, evaluation), (nas, search)):
        status, output, error = command(program, capsys, *arguments)
        assert (status, output, error.count("\n")) == (2, "", 1)
        assert "was trained on other images than this my.npz" in error


def test_validation_is_a_sixth_of_training_if_the_file_has_none(tmp_path):
    path = tmp_path / "my.npz"
    np.savez(path, **GREY)
    data = gtn.load_data(str(path), "", torch.device("cpu"))
    assert (len(data.train.labels), len(data.validation.labels)) == (100, 20)
    assert data.train.images.shape[1:] == (1, 8, 28)
    parts = [data.train, data.validation]
    pixels = torch.cat([part.images for part in parts]) * data.std + data.mean
    restored = (255 * pixels).round().to(torch.uint8).numpy()[:, 0]
    given = GREY["train_images"]
    pairs = zip(restored, torch.cat([part.labels for part in parts]).tolist(), strict=True)
    expected = zip(given, GREY["train_labels"].tolist(), strict=True)
    assert {(x.tobytes(), k) for x, k in pairs} == {(x.tobytes(), k) for x, k in expected}
    assert len(data.validation.labels.unique()) > 6  # drawn at random
    assert data.train.images.mean().abs() < 1e-5
    assert data.train.images.std() == pytest.approx(1, abs=1e-4)


def test_images_that_are_sorted_by_class_are_shuffled(tmp_path):
    """The first of validation and test count, in validation and after each inner step."""
    order = np.argsort(COLOUR["train_labels"].flatten(), kind="stable")
    np.savez(tmp_path / "my.npz", **{key: x[order] for key, x in COLOUR.items()})
    data = gtn.load_data("moved/my.npz", tmp_path, torch.device("cpu"))  # found in the folder
    for split in data[:3]:
        assert gtn.first(split, 30).labels.bincount(minlength=3).min() > 3
        brightness = split.images.mean((1, 2, 3))
        means = [brightness[split.labels == k].mean() for k in range(3)]
        assert means == sorted(means)  # each image has its own label still


def test_torchvision_s_last_10_000_images_are_for_validation(monkeypatch):
    class CIFAR10:
        def __init__(self, folder, train, download):
            count = 10_020 if train else 10
            self.data = np.arange(count * 8 * 8 * 3).astype(np.uint8).reshape(count, 8, 8, 3)
            self.data[:, 0, 0, 1] = 7
            self.targets = [i % 10 for i in range(count)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", CIFAR10)
    data = gtn.load_data("cifar10", "nowhere", torch.device("cpu"))
    sizes = [len(part.labels) for part in (data.train, data.validation, data.test)]
    assert (sizes, data.classes, data.sha256) == ([20, 10_000, 10], 10, None)
    assert data.train.images.shape == (20, 3, 8, 8)
    green = data.validation.images[:, 1, 0, 0] * data.std[1] + data.mean[1]
    torch.testing.assert_close(green, torch.full_like(green, 7 / 255))


def changed(**changes):
    """The arrays of an .npz in colour, some of them changed; None leaves one out."""
    return {key: x for key, x in (COLOUR | changes).items() if x is not None}


def with_label(value, name="train_labels"):
    labels = COLOUR[name].astype(np.int64)
    labels[labels == 1] = value
    return changed(**{name: labels})


images = COLOUR["train_images"]
DAMAGES = [
    (changed(test_labels=None), "test_labels is not a file in the archive"),
    (changed(train_images=None), "train_images is not a file in the archive"),
    (changed(val_labels=None), "val_labels is not a file in the archive"),
    (changed(val_images=None), "val_images is not a file in the archive"),
    (changed(train_images=images.astype(object)), "allow_pickle=False"),
    (changed(train_images=images / 255), "train_images must be uint8"),
    (changed(train_images=images.astype(np.int8)), "train_images must be uint8"),
    (changed(train_images=images / np.nan), "train_images must be uint8"),
    (
        changed(train_images=np.repeat(images, 2, 3)[..., :4]),
        "train_images must be uint8 of 1 or 3 channels",
    ),
    (changed(train_images=images[0, 0, 0, 0]), "train_images must be uint8"),
    (changed(train_images=images[0, 0]), "train_images must be uint8"),
    (changed(train_images=images[:, :18]), "multiples of 4: 16 x 24 would do"),
    (changed(train_images=np.repeat(images, 7, 1)), "8 to 128 pixels, multiples of 4: 128 x 24"),
    (changed(train_images=images[:, :4]), "multiples of 4: 8 x 24 would do"),
    (changed(test_images=images[..., 0]), "images must be of one size"),
    (changed(train_images=0 * images), "a channel is the same"),
    (changed(train_images=images[:-1]), "train_labels must be 119 whole numbers"),
    (changed(train_labels=COLOUR["train_labels"] / 1), "train_labels must be 120 whole numbers"),
    (changed(test_images=images[:0], test_labels=np.zeros(0, int)), "test_labels must be 0 whole"),
    (with_label(-1), "labels must be 0 to K - 1"),
    (with_label(5), "labels must be 0 to K - 1"),
    (with_label(3, "test_labels"), "labels must be 0 to K - 1"),
    (changed(train_labels=0 * COLOUR["train_labels"]), "of 2 to 1,000 classes"),
    (changed(train_images=images[:9], train_labels=COLOUR["train_labels"][:9]), "at most 9"),
]


def refused(tmp_path, capsys, *settings):
    """The one line with which gtn.py refuses my.npz."""
    before = sorted(tmp_path.iterdir())
    where = ["--runs", tmp_path / "runs", "--set", *TINY, f"dataset={tmp_path / 'my.npz'}"]
    status, output, error = command(gtn, capsys, *where, *settings)
    assert (status, output, error.count("\n")) == (2, "", 1), error
    assert sorted(tmp_path.iterdir()) == before
    return error


@pytest.mark.parametrize(("content", "message"), DAMAGES)
def test_a_file_that_cannot_be_used(tmp_path, capsys, content, message):
    np.savez(tmp_path / "my.npz", **content)
    assert message in refused(tmp_path, capsys)


def huge():
    """An .npz of a few bytes whose header claims 100 GB of images."""
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (10**8, 32, 32)}
    np.lib.format.write_array_header_1_0(header, shape)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("train_images.npy", header.getvalue() + bytes(100))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [None, b"", b"hello", huge()])
def test_what_is_no_file_of_images(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "my.npz").write_bytes(content)
    assert f"cannot read {tmp_path / 'my.npz'} (" in refused(tmp_path, capsys)


def test_more_classes_than_synthetic_images(tmp_path, capsys):
    np.savez(tmp_path / "my.npz", **GREY)
    error = refused(tmp_path, capsys, "inner_steps=2", "batch_size=5")
    assert "inner_steps * batch_size must be at least 12" in error

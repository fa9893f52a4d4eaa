"""Data sets: torchvision's folders, and files of one's own through all four commands."""

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
    monkeypatch.setattr("urllib.request.urlopen", None)  # offline
    folder = tmp_path / "mistyped" / "data"
    where = ["--data", folder, "--runs", tmp_path / "runs", "--set", f"dataset={dataset}"]
    status, _, error = command(gtn, capsys, "--config", "A", *where)
    assert (status, error.count("\n")) == (2, 1), error
    for remedy in (str(folder / place), "--data", "--config quick"):
        assert remedy in error
    assert list(tmp_path.iterdir()) == []


def arrays(classes=3, shape=(20, 24, 3), parts=("train", "val", "test")):
    """{name: array} of noise, whose brightness grows with its label."""
    generator, labels = np.random.default_rng(0), np.arange(120, dtype=np.uint8) % classes
    bright = (labels * (150 // classes)).reshape(120, *[1] * len(shape))
    content = {}
    for part in parts:
        noise = generator.integers(0, 100, (120, *shape))
        content[f"{part}_images"] = (noise + bright).astype(np.uint8)
        content[f"{part}_labels"] = labels[:, None] if "val" in parts else labels
    return content


def command(program, capsys, *arguments):
    """(exit status, output, error) of a program inside this process."""
    capsys.readouterr()
    status = gtn.run(program.__name__, program.main, [*map(str, arguments)])
    return status, *capsys.readouterr()


COLOUR = arrays()
GREY = arrays(12, (8, 28), ("train", "test"))


@pytest.mark.parametrize(("content", "classes"), [(COLOUR, 3), (GREY, 12)])
def test_images_of_ones_own_through_all_commands(tmp_path, capsys, monkeypatch, content, classes):
    monkeypatch.chdir(tmp_path)
    np.savez_compressed("my.npz", **content)
    train = ["--set", *TINY, "dataset=my.npz", "name=mine", "batch_size=5", "--outer-steps", 2]
    assert command(gtn, capsys, *train)[0] == 0
    folder = tmp_path / "runs" / "mine-learned-s0"
    _, saved = gtn.read_teacher(folder / "teacher.pt")
    assert saved["classes"] == classes
    expected = [[0, 1, 2, 0, 1]] * 3
    if classes == 12:
        expected = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 0, 1, 2]]
    assert saved["curriculum"].labels.tolist() == expected
    evaluation = ["--evaluate", folder / "teacher.pt", "--learners", 3]
    search = [folder / "teacher.pt", "--architectures", 2, "--truth-steps", 3]
    for program, arguments in ((gtn, evaluation), (nas, search)):
        status, _, error = command(program, capsys, *arguments)
        assert status == 0, error
    result = gtn.read(next(folder.rglob("nas.json")))
    assert [line["classes"] for line in result["architectures"]] == [classes] * 2
    analyze.main([])
    assert (tmp_path / "runs" / "figures" / "mine-learned-s0-images.png").exists()

    other = content | {"test_images": 255 - content["test_images"]}
    np.savez_compressed("my.npz", **other)
    for program, arguments in ((gtn, [*train, "--resume"]), (gtn, evaluation), (nas, search)):
        status, output, error = command(program, capsys, *arguments)
        assert (status, output, error.count("\n")) == (2, "", 1)
        assert "was trained on other images than this my.npz" in error


def test_a_file_is_shuffled_and_a_sixth_of_training_kept_for_validation(tmp_path):
    order = np.argsort(GREY["train_labels"], kind="stable")  # sorted by class
    content = {key: x[order] for key, x in GREY.items()}
    np.savez(tmp_path / "my.npz", **content)
    data = gtn.load_data("moved/my.npz", tmp_path, torch.device("cpu"))  # found in the folder
    assert data.train.images.shape == (100, 1, 8, 28)

    def pairs(images, labels):
        return {(x.tobytes(), k) for x, k in zip(images, labels.tolist(), strict=True)}

    for name, *parts in (("train", data.train, data.validation), ("test", data.test)):
        pixels = torch.cat([part.images for part in parts]) * data.std + data.mean
        images = (255 * pixels).round().to(torch.uint8).numpy()
        expected = pairs(content[f"{name}_images"], content[f"{name}_labels"])
        assert pairs(images, torch.cat([part.labels for part in parts])) == expected
    for split in (data.validation, data.test):
        assert len(gtn.first(split, 20).labels.unique()) > 6
    assert data.train.images.mean().abs() < 1e-5
    assert data.train.images.std() == pytest.approx(1, abs=1e-4)


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
    (changed(train_images=images.astype(object)), "allow_pickle=False"),
    (changed(train_images=images / 255), "train_images must be uint8"),
    (changed(train_images=images[..., :2]), "train_images must be uint8 of 1 or 3 channels"),
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
    shape = {"descr": "|u1", "fortran_order": False, "shape": (10**8, 32, 32)}
    np.lib.format.write_array_header_1_0(header := io.BytesIO(), shape)
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
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

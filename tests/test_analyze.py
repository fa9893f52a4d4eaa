"""Figures and tables of runs and searches that are made up here, so that every number in them is known."""

import base64
import dataclasses
import functools
import io
import json
import re
from html.parser import HTMLParser

import matplotlib.colors
import numpy as np
import pytest
import torch
from conftest import shell
from PIL import Image

import analyze
import draw
import gtn

SMALL = {"inner_steps": 3, "batch_size": 12, "latent_size": 2, "hidden_size": 4, "generator_filters": 2,
         "filters": (2, 3), "outer_steps": 6}  # fmt: skip
DEVICE = "a device <b>"


def make_run(folder, seed=0, variant="learned", steps=6, shape=(1, 8, 8), end=True, evaluation=None, **changes):
    """A run folder whose numbers follow from its seed; evaluation: its step; returns its Config."""
    config = gtn.Config(**{"name": "toy", "dataset": "glyphs"} | SMALL | changes, variant=variant, seed=seed)
    folder = folder / f"{config.name}-{config.variant}-s{config.seed}"
    command = f"python gtn.py --variant {variant} --seed {seed} --resume"
    settings = {"config": dataclasses.asdict(config), "environment": {"device": DEVICE, "command": command}}
    gtn.write_json(folder / "config.json", settings)
    generator, T = np.random.default_rng([seed, gtn.VARIANTS.index(variant)]), config.inner_steps
    lines = [{"event": "start", "step": 0, **settings}]
    for step in range(steps + 1):
        rates = {"lr": [0.01 * (seed + 1)] * T, "momentum": [0.5 + 0.01 * step] * T}
        accuracy = gtn.summary([0.1 * seed + 0.05 * step] * 2)
        lines.append({"event": "validation", "step": step, "seconds": 60.0 * step, "accuracy": accuracy, **rates})
        if step < steps:
            loss = {"meta_loss": 2.0 + seed - step / 10, "gradient_norm": 1.0}
            lines.append({"event": "step", "step": step + 1, "seconds": 60.0 * (step + 1), **loss})
    test = {order: gtn.summary(generator.uniform(0.4, 0.9, 4).tolist()) for order in gtn.ORDERS}
    if end:
        lines.append({"event": "end", "step": steps, "seconds": 60.0 * steps, "test": test, "peak_memory": {}})
    gtn.write_file(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    torch.manual_seed(seed)
    images, channels = torch.randn(500, *shape), shape[0]
    split = gtn.Split(images, torch.arange(500) % 10)
    data = gtn.Data(split, split, split, torch.zeros(channels), torch.ones(channels))
    teacher = gtn.Teacher(config, shape)
    gtn.save(folder, teacher, torch.optim.Adam(teacher.parameters()), data, steps, 60.0 * steps)
    if evaluation is not None:
        row = {"architecture": "training", "transductive": None}
        row |= {order: gtn.summary(generator.uniform(0.4, 0.9, 7).tolist()) for order in gtn.ORDERS}
        curve = generator.uniform(0.1, 0.9, (5, T)).tolist()
        gtn.write_json(folder / "evaluation.json", settings | {"step": evaluation, "rows": [row], "curve": curve})
    return folder


def make_snapshots(folder, steps=(0, 1, 2, 4)):
    config = gtn.Config(**json.loads((folder / "config.json").read_text())["config"])
    shape = gtn.read_teacher(folder / "teacher.pt")[1]["curriculum"].images.shape[1:]
    for step in steps:
        images = (torch.randn(shape) * config.image_scale / 2).clamp(-2, 2).half()
        gtn.write_tensors(folder / "snapshots" / f"{step:06d}.pt", step=step, images=images)


def make_search(folder, n=12):
    """A nas.json of n architectures."""
    generator = np.random.default_rng(0)
    truth = generator.uniform(0.9, 0.99, n)
    rows = [
        {"index": i, "filters": [4, 8], "kernels": [3, 3], "pooling": "max", "normalization": "instance",
         "parameters": 1000 * (i + 1), "multiply_adds": 5000 * (i + 2), "teacher": x - generator.uniform(0.1, 0.14),
         "control": x - generator.uniform(0.3, 0.5), "truth": [{"validation": x - 0.001}, {"validation": x + 0.001}],
         "seconds": {"teacher": 0.4, "control": 0.5, "truth": 40.0}}
        for i, x in enumerate(truth)
    ]  # fmt: skip

    def correlation(value):
        return {
            "value": value,
            "low": None if value is None else value - 0.1,
            "high": None if value is None else value + 0.05,
        }

    values = {"teacher": 0.81, "control": 0.52, "parameters": 0.43, "multiply_adds": None, "ceiling": 0.93}
    correlations = {
        method: {"spearman": {"all": correlation(x), "top half": correlation(x and x - 0.2)},
                 "kendall": {"all": correlation(x and x - 0.1), "top half": correlation(x and x - 0.3)},
                 "precision": correlation(x)}
        for method, x in values.items()
    }  # fmt: skip
    best = {method: {"index": i, "test": 0.98 + 0.001 * i} for i, method in enumerate(("teacher", "control", "truth"))}
    content = {
        "teacher": "runs/x/teacher.pt", "real": None, "seed": 3, "space": "widths",
        "config": dataclasses.asdict(gtn.Config(**SMALL)),
        "environment": {"device": DEVICE, "command": "python nas.py runs/x/teacher.pt"},
        "truth": {"steps": 782, "repeats": 2, "recipe": "AdamW, one cycle"}, "architectures": rows,
        "correlations": correlations, "cost_ratio": 100.0,
        "seconds": {"teacher": {"mean": 0.4}, "control": {"mean": 0.5}, "truth": {"mean": 40.0}},
        "best": best | {"random": {"test": 0.95, "std": 0.01, "n": n}},
    }  # fmt: skip
    gtn.write_json(folder / "nas.json", content)
    return content


@pytest.fixture
def one_experiment(tmp_path):
    """{variant: runs}: two seeds of `learned` with evaluations, one `real` without, one `random` just begun."""
    for seed in (0, 1):
        make_run(tmp_path, seed, evaluation=6)
    make_run(tmp_path, variant="real")
    make_run(tmp_path, variant="random", steps=0, end=False)
    runs, _, _, damaged = analyze.read_folder(tmp_path, "*")
    experiments, remarks = analyze.group_runs(runs)
    assert (list(experiments), remarks, damaged) == (["toy"], [], [])
    return experiments["toy"]


@pytest.fixture(scope="module")
def few_glyphs():
    data = gtn.load_data("glyphs", "", torch.device("cpu"))
    return gtn.Data(*(gtn.Split(x.images[:400], x.labels[:400]) for x in data[:3]), data.mean, data.std)


@pytest.fixture
def run_analyze(tmp_path, capsys, monkeypatch, few_glyphs):
    """analyze's command line inside this process on tmp_path / "runs": (exit status, output, error)."""
    monkeypatch.setattr(gtn, "load_data", lambda *_: few_glyphs)
    monkeypatch.setattr(analyze, "train_classifier", functools.partial(analyze.train_classifier, steps=3))

    def run(*arguments):
        places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--device", "cpu"]
        return analyze.main([*places, *arguments]), *capsys.readouterr()

    return run


def hexes(lines):
    return [matplotlib.colors.to_hex(line.get_color()).upper() for line in lines]


def labels_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_running_mean_and_aggregate_by_hand():
    assert draw.running_mean(np.array([1.0, 2, 6, 3]), 3).tolist() == [1.5, 3, 11 / 3, 4.5]
    assert draw.running_mean(np.array([1.0, 5]), 1).tolist() == [1, 5]
    x, mean, std = draw.aggregate([([0, 1, 2], [1.0, 2, 3]), ([0, 2], [3.0, 7])])
    assert x.tolist() == [0, 1, 2]
    assert mean.tolist() == [2, 2, 5]
    assert std.tolist() == [2**0.5, None, 8**0.5]


def test_colours_can_be_told_apart():
    assert list(draw.COLOURS) == list(gtn.VARIANTS)
    rgb = np.array([matplotlib.colors.to_rgb(c) for c in draw.COLOURS.values()])
    lightness = np.sort(rgb @ [0.2126, 0.7152, 0.0722])
    assert np.diff(lightness).min() > 0.04  # even without any colour


def test_training_curves(one_experiment):
    figure, caption, missing = draw.draw_training(one_experiment)
    accuracy, loss = figure.axes
    assert (accuracy.get_ylabel(), loss.get_ylabel(), loss.get_xlabel()) == (
        "validation accuracy", "meta-loss (nats)", "outer steps")  # fmt: skip
    assert labels_of(figure) == ["learned", "real"]
    means = [line for line in loss.lines if line.get_linestyle() == "-"]
    assert hexes(means) == [draw.COLOURS["learned"], draw.COLOURS["real"]]
    np.testing.assert_allclose(means[0].get_ydata(), [2.5 - step / 10 for step in range(6)])
    points = [line for line in loss.lines if line.get_linestyle() == "None"]
    np.testing.assert_allclose(points[1].get_ydata(), [3 - step / 10 for step in range(6)])  # seed 1, raw
    band = loss.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(band[:, 1].max(), 2.5 + 0.5**0.5)
    np.testing.assert_allclose(accuracy.lines[2].get_ydata(), [0.05 + 0.05 * step for step in range(7)])
    assert "n = 2 learners a point" in caption
    assert missing == [("toy-random-s0", "no outer step yet", "python gtn.py --variant random --seed 0 --resume")]


def test_smoothing_leaves_the_raw_points(tmp_path):
    run = analyze.read_run(make_run(tmp_path, steps=80), [])
    loss = draw.draw_training({"learned": [run]}).figure.axes[1]
    points, mean = (line.get_ydata() for line in loss.lines)
    np.testing.assert_array_equal(points, run.log["meta_loss"][1])
    np.testing.assert_allclose(mean[40], points[38:43].mean())
    assert len(loss.collections[0].get_paths()) == 0 or np.isnan(loss.collections[0].get_paths()[0].vertices).all()


def test_box_plots(one_experiment):
    figure, caption, missing = draw.draw_orders(one_experiment)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        f"{variant}, {order}" for variant in ("learned", "real") for order in gtn.ORDERS
    ]
    tests = [run.evaluation["test"]["batch-shuffled"] for run in one_experiment["learned"]]
    medians = [x.get_xdata()[0] for x in axes.lines if x.get_linewidth() == 2]
    assert medians[1] == np.median(np.concatenate(tests))
    assert medians[3] == np.median(one_experiment["real"][0].log["test"]["in order"])
    seeds = [line for line in axes.lines if line.get_marker() == "|"]
    np.testing.assert_allclose(seeds[1].get_xdata(), [x.mean() for x in tests])
    assert len(axes.patches) == 6
    assert matplotlib.colors.to_hex(axes.patches[5].get_edgecolor()).upper() == draw.COLOURS["real"]
    assert "n = 14 learned, 4 real" in caption
    assert [name for name, *_ in missing] == ["toy-random-s0"]
    assert missing[0][2].endswith("toy-random-s0/teacher.pt")


def test_accuracy_after_each_inner_step_and_reference_points(tmp_path):
    budget = {"dataset": "mnist", "inner_steps": 20, "batch_size": 32, "name": "A"}
    folder = make_run(tmp_path, evaluation=6, **budget)
    run = analyze.read_run(folder, [])
    figure, caption, _ = draw.draw_steps({"learned": [run]})
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), run.evaluation["curve"].mean(0))
    assert axes.lines[0].get_xdata().tolist() == [*range(1, 21)]
    points = {
        (line.get_xdata()[0], line.get_ydata()[0]): hexes([line])[0] for line in axes.lines[1:] if len(line.get_xdata())
    }
    colours = draw.COLOURS
    assert points == {
        (32, 0.985): colours["learned"], (32, 0.957): colours["random"],
        (20, 0.973): colours["learned"], (20, 0.974): colours["random_fixed"], (20, 0.929): colours["random"],
    }  # fmt: skip
    assert labels_of(figure) == ["learned", "paper, 32 x 128", "earlier run, 20 x 32"]
    assert "n = 5 learned" in caption
    other = analyze.read_run(make_run(tmp_path, evaluation=6, name="toy"), [])
    assert len(draw.draw_steps({"learned": [other]}).figure.axes[0].lines) == 1  # known figures are of MNIST


def test_known_figures_belong_to_a_data_set_and_budget():
    config = gtn.make_config("paper")
    assert draw.known("paper", config) == {"in order": 0.985, "batch-shuffled": 0.974, "all-shuffled": 0.969}
    assert draw.known("paper", dataclasses.replace(config, dataset="kmnist")) == {}
    assert draw.known("paper", gtn.make_config("A")) == {}
    earlier = "earlier run (transductive)"
    assert draw.known(earlier, gtn.make_config("C", variant="random_fixed"))["in order"] == 0.952
    assert draw.known(earlier, gtn.make_config("B", variant="learned")) == {"in order": 0.961, "batch-shuffled": 0.677}
    assert draw.known(earlier, gtn.make_config("B", variant="real")) == {}


def test_learned_rates(one_experiment, tmp_path):
    panels = draw.draw_rates(one_experiment).figure.axes
    assert [axes.get_ylabel() for axes in panels] == ["inner learning rate", "momentum"] * 2
    assert [axes.get_xlabel() for axes in panels] == ["outer steps"] * 2 + ["inner step"] * 2
    np.testing.assert_allclose(panels[0].lines[0].get_ydata(), (0.01 * 0.02) ** 0.5)  # geometric: a rate is a scale
    band = panels[0].collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], 2**0.5 * 0.01 * 2 ** np.array([-(0.5**0.5), 0.5**0.5]))
    np.testing.assert_allclose(panels[1].lines[0].get_ydata(), [0.5 + 0.01 * step for step in range(7)])
    np.testing.assert_allclose(panels[3].lines[0].get_ydata(), 0.56)
    assert panels[3].lines[0].get_xdata().tolist() == [1, 2, 3]


def test_images_of_the_curriculum(tmp_path):
    run = analyze.read_run(make_run(tmp_path), [])
    figure, caption, _ = draw.draw_images(run)
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == "0 0 1 1 2 3 4 5 6 7 8 9".split()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "2", "3"]
    (image,) = axes.images
    sheet, images = image.get_array(), run.teacher["curriculum"].images
    assert sheet.shape == (3 * 9, 12 * 9)
    np.testing.assert_array_equal(sheet[1:9, 10:18], images[0, 10, 0])  # label 0's second image
    np.testing.assert_array_equal(sheet[19:27, 100:108], images[2, 9, 0])
    assert sheet[0].mask.all()
    assert sheet[:, 9].mask.all()
    assert image.norm.vmin == -image.norm.vmax == -2
    assert image.get_interpolation() == "nearest"
    np.testing.assert_allclose(image.cmap(image.norm(0.0))[:3], 1, atol=0.04)  # zero is white
    size = axes.get_window_extent().size / sheet.shape[::-1]
    np.testing.assert_allclose(size, round(size[0]))  # whole pixels of the screen for one of an image
    assert "all 3 inner steps" in caption
    assert "all 12 images" in caption


def test_many_images_and_colours(tmp_path):
    run = analyze.read_run(make_run(tmp_path, shape=(3, 8, 8), batch_size=40, variant="pixels"), [])
    run = run._replace(
        teacher=run.teacher | {"mean": torch.tensor([0.5, 0.4, 0.3]), "std": torch.tensor([0.1, 0.2, 0.3])}
    )
    figure, caption, _ = draw.draw_images(run)
    sheet, pixel = figure.axes[0].images[0].get_array(), run.teacher["curriculum"].images[1, 3, :, 2, 4]
    assert sheet.shape == (3 * 9, 20 * 9, 3)
    np.testing.assert_allclose(
        sheet[9 + 1 + 2, 6 * 9 + 1 + 4],
        (pixel * torch.tensor([0.1, 0.2, 0.3]) + torch.tensor([0.5, 0.4, 0.3])).clamp(0, 1),
    )
    assert "the first 2 images of each label, 20 of 40" in caption


def test_labels_that_differ_from_step_to_step_keep_their_columns():
    index = draw.by_label(torch.tensor([[3, 3, 3, 0], [9, 0, 0, 3]]), 2)
    assert index[0, [0, 3, 9]].tolist() == [[3, -1], [0, 1], [-1, -1]]
    assert index[1, [0, 3, 9]].tolist() == [[1, 2], [3, -1], [0, -1]]
    picked = draw.pick(torch.arange(8.0).view(2, 4, 1, 1, 1), index.flatten(1))
    assert picked[1, [0, 1, 6]].flatten().tolist() == [5, 6, 7]
    assert picked[1, 7].isnan().all()


def test_real_images_stand_under_their_labels(tmp_path):
    run = analyze.read_run(make_run(tmp_path, variant="real", batch_size=30), [])
    axes = draw.draw_images(run).figure.axes[0]
    sheet, (images, labels, *_) = axes.images[0].get_array(), run.teacher["curriculum"]
    columns = [int(tick.get_text()) for tick in axes.get_xticklabels()]
    for t in range(3):
        label = int(labels[t, 0])  # its first image is the batch's
        left = 9 * columns.index(label) + 1
        np.testing.assert_array_equal(sheet[9 * t + 1 : 9 * t + 9, left : left + 8], images[t, 0, 0])


def test_classes_along_the_curriculum(tmp_path):
    run = analyze.read_run(make_run(tmp_path, inner_steps=45), [])
    figure, caption, _ = draw.draw_classes(run)
    axes, images = figure.axes[0], run.teacher["curriculum"].images
    columns = [int(tick.get_text()) for tick in axes.get_xticklabels()]
    assert (columns[0], columns[-1], len(columns)) == (1, 45, 20)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [*map(str, range(10))]
    sheet = axes.images[0].get_array()
    np.testing.assert_array_equal(sheet[7 * 9 + 1 : 8 * 9, -8:], images[44, 7, 0])
    assert "20 of the 45" in caption


def test_animation(tmp_path):
    folder = make_run(tmp_path)
    make_snapshots(folder)
    run = analyze.read_run(folder, [])
    animation = draw.draw_growth(run).figure
    image, title = animation._func(3)
    assert title.get_text() == "outer step 4"
    np.testing.assert_array_equal(image.get_array()[1:9, 1:9], run.snapshots[3][1][0, 0].float())
    gif = Image.open(io.BytesIO(analyze.encode(animation)))
    assert (gif.format, gif.n_frames) == ("GIF", 4)


def test_ranking_of_architectures(tmp_path):
    content = make_search(tmp_path / "nas")
    search = analyze.read_search(tmp_path / "nas" / "nas.json", tmp_path)
    figure, caption, _ = draw.draw_search(search)
    values, ranks, cost, _ = figure.axes
    points = values.collections[0]
    truth = [np.mean([x["validation"] for x in row["truth"]]) for row in content["architectures"]]
    expected = [[row["teacher"], y] for row, y in zip(content["architectures"], truth, strict=True)]
    np.testing.assert_allclose(points.get_offsets(), expected)
    np.testing.assert_array_equal(points.get_array(), [row["parameters"] for row in content["architectures"]])
    best = np.argmax(truth)
    assert ranks.collections[0].get_offsets()[best][1] == 1
    assert sorted(ranks.collections[0].get_offsets()[:, 0]) == [*range(1, 13)]
    texts = labels_of(figure)
    assert texts[0] == "teacher: Spearman 0.81 [0.71, 0.86], Kendall 0.71 [0.61, 0.76]"
    assert texts[3] == "multiply-adds: Spearman undefined, Kendall undefined"
    assert texts[4].startswith("noise ceiling: Spearman 0.93 [0.83, 0.98]")
    spots = {bar.get_label().split(":")[0]: bar[0].get_xydata()[0] for bar in cost.containers}
    assert spots["teacher"].tolist() == [0.4, 0.81]
    np.testing.assert_allclose(spots["real data, same steps"], [0.5 * 1.15, 0.52])  # set apart from the teacher
    assert spots["parameter count"][0] < 0.4
    assert "n = 12 architectures" in caption
    assert "AdamW, one cycle, 782 steps, mean of 2" in caption
    table = analyze.search_table(search)
    assert table[1] == ["teacher", "0.81 [0.71, 0.86]", "0.61 [0.51, 0.66]", "0.71 [0.61, 0.76]", "0.51 [0.41, 0.56]",
                        "0.81 [0.71, 0.86]", "0.4", "0.9800"]  # fmt: skip
    assert table[4][1:3] == ["undefined", "undefined"]
    assert table[-1][-1] == "0.950 +- 0.010 (n = 12)"
    assert "search seed 3" in search["origin"]


def test_result_table_equals_the_files(one_experiment, tmp_path):
    header, *rows = analyze.result_table({"toy": one_experiment})
    rows = {(row[1], row[2]): dict(zip(header, row, strict=True)) for row in rows}
    assert list(rows) == [(variant, order) for variant in ("learned", "real") for order in gtn.ORDERS]
    files = [json.loads((tmp_path / f"toy-learned-s{seed}" / "evaluation.json").read_text()) for seed in (0, 1)]
    for order in gtn.ORDERS:
        accuracies = np.array([file["rows"][0][order]["accuracies"] for file in files])
        row = rows["learned", order]
        assert row["test accuracy"] == f"{accuracies.mean():.3f} +- {accuracies.std(ddof=1):.3f}"
        assert (row["n"], row["seeds"], row["outer steps"], row["minutes"]) == ("14", "2", "6", "6.0")
        assert row["std of seeds' means"] == f"{accuracies.mean(1).std(ddof=1):.3f}"
        assert row["device"] == DEVICE
    end = json.loads((tmp_path / "toy-real-s0" / "log.jsonl").read_text().splitlines()[-1])["test"]["in order"]
    assert rows["real", "in order"]["test accuracy"] == f"{end['mean']:.3f} +- {end['std']:.3f}"
    assert rows["real", "in order"]["std of seeds' means"] == "-"


def test_table_shows_what_others_report(tmp_path):
    make_run(tmp_path, dataset="mnist", inner_steps=10, batch_size=16, variant="random", name="C")
    experiments, _ = analyze.group_runs(analyze.read_folder(tmp_path, "*")[0])
    header, row, shuffled, _ = analyze.result_table(experiments)
    at = header.index("earlier run (transductive)")
    assert (row[at - 1], row[at], shuffled[at]) == ("-", "0.855", "0.850")


def test_an_evaluation_of_an_older_teacher_is_not_used(tmp_path):
    run = analyze.read_run(make_run(tmp_path, evaluation=5), [])
    assert draw.measured(run) is run.log
    assert [name for name, *_ in draw.draw_steps({"learned": [run]}).missing] == ["toy-learned-s0"]
    unfinished = run._replace(log=run.log | {"test": None})
    assert draw.measured(unfinished) == {}
    assert draw.measured(unfinished._replace(teacher=None, log=None)) is run.evaluation  # nothing says that it is older


def test_runs_are_averaged_only_where_seeds_alone_differ(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, seed)
    make_run(tmp_path, 2, outer_lr=0.5, checkpoint_every=1.0)
    make_run(tmp_path, 3, checkpoint_every=1.0)
    make_run(tmp_path, variant="real", inner_steps=2)
    make_run(tmp_path / "copy", 1)
    runs = analyze.read_folder(tmp_path, "*")[0]
    experiments, remarks = analyze.group_runs(runs)
    assert {
        name: {v: [run.config.seed for run in runs] for v, runs in e.items()} for name, e in experiments.items()
    } == {
        "toy": {"learned": [0, 1, 3]},
        "toy with outer_lr=0.5": {"learned": [2]},
        "toy with inner_steps=2": {"real": [0]},
    }
    assert len(remarks) == 3
    assert "toy-real-s0 with" in remarks[0]
    assert remarks[1].startswith("left out: ")
    assert "toy-learned-s1, which has the settings and the seed of" in remarks[1]
    assert "toy-learned-s2 with" in remarks[2]


def test_difficulty(tmp_path, few_glyphs):
    run = analyze.read_run(make_run(tmp_path, shape=(1, 28, 28)), [])
    data = few_glyphs
    theta, architecture, accuracy = analyze.train_classifier(data, steps=40)
    assert accuracy > 0.7
    images, labels = run.teacher["curriculum"][:2]
    confidence = analyze.confidence(theta, architecture, run.teacher["curriculum"])
    with torch.no_grad():
        probability = gtn.learner(theta, images[2], architecture).softmax(1)[range(12), labels[2]].mean()
    assert confidence.shape == (3,)
    np.testing.assert_allclose(confidence[2], probability, rtol=1e-5)

    teacher = gtn.read_teacher(run.folder / "teacher.pt")[0]
    losses = analyze.next_batch_losses(teacher, data, "in order", 2)
    start, curriculum, learner = gtn.fresh_learner(teacher, data, 1)
    trained = gtn.train_learner(start, gtn.Curriculum(*(x[:2] for x in curriculum)), learner)
    logits = gtn.learner(trained, curriculum.images[2], learner)
    expected = torch.nn.functional.cross_entropy(logits, curriculum.labels[2])
    assert losses.shape == (2, 2)
    np.testing.assert_allclose(losses[1, 1], expected.detach(), rtol=1e-5)

    judge = functools.partial(analyze.difficulty, judge=lambda dataset: (data, theta, architecture, accuracy))
    figure, caption, _ = draw.draw_difficulty({"learned": [run]}, judge)
    top, bottom = figure.axes
    np.testing.assert_allclose(top.lines[0].get_ydata(), confidence)
    assert bottom.lines[0].get_xdata().tolist() == [2, 3]
    np.testing.assert_allclose(
        bottom.lines[0].get_ydata()[1], np.mean(analyze.next_batch_losses(teacher, data, "in order")[:, 1])
    )
    assert labels_of(figure) == ["learned", "in order", "batch-shuffled"]
    assert "n = 3, seed of learned 0" in caption
    missing = draw.draw_difficulty({"learned": [run]}, lambda taught: "no data there").missing
    assert missing == [("glyphs", "no data there", "python analyze.py --data DIR")]


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.cells = [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.cells.append(text)


def test_everything_from_the_command_line(run_analyze, tmp_path):
    for seed in (0, 1):
        folder = make_run(tmp_path / "runs", 1 - seed, evaluation=6, shape=(1, 28, 28))
    make_snapshots(folder)  # of seed 0
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"event": "step", "st')  # still being written
    make_search(folder / "nas")
    status, output, error = run_analyze()
    assert (status, error) == (0, "")
    out = tmp_path / "out"
    names = "training orders steps rates difficulty learned-s0-classes learned-s0-images learned-s1-images"
    pictures = sorted(
        [f"toy-{name}.png" for name in names.split()]
        + ["toy-learned-s0-growth.gif", "ranking-toy-learned-s0-nas-ranking.png"]
    )
    assert sorted(path.name for path in out.iterdir()) == sorted([*pictures, "README.md", "report.html"])
    assert "10 figures of 2 runs and 1 searches" in output
    command = "python gtn.py --seed 0 --variant random_fixed (the others likewise)"
    assert f"left out: variants of toy (random_fixed, random, pixels, real): no such run: {command}" in output
    assert "nas.py" not in output
    with Image.open(out / "toy-steps.png") as image:
        assert image.width == 960

    markdown = (out / "README.md").read_text()
    assert sorted(re.findall(r"!\[.*?\]\((.*?)\)", markdown)) == pictures
    for text in (
        "seed 0, 1",
        "6 outer steps",
        "a device \\<b>",
        "`python gtn.py --variant VARIANT --seed SEED`",
        "n = 14 learned",
    ):
        assert text in markdown
    files = [json.loads((tmp_path / f"runs/toy-learned-s{seed}/evaluation.json").read_text()) for seed in (0, 1)]
    accuracies = np.array([file["rows"][0]["in order"]["accuracies"] for file in files])
    assert (
        f"| toy | learned | in order | {accuracies.mean():.3f} +- {accuracies.std(ddof=1):.3f} | 14 | 2 |" in markdown
    )

    page = Page(out / "report.html")
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 10
    for source in images:
        kind, data = re.fullmatch(r"data:image/(png|gif);base64,(.*)", source).groups()
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == kind.upper()
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "a", "b")
        assert not {"href", "srcset", "action"} & set(attributes)
    assert not re.search(r"url\(|@import|https?:", re.sub('base64,[^"]*', "", (out / "report.html").read_text()))
    assert DEVICE in page.cells  # as text, not as markup
    assert f"{accuracies.mean():.3f} +- {accuracies.std(ddof=1):.3f}" in page.cells


DAMAGED = ["config.json", "log.jsonl", "teacher.pt", "evaluation.json", "snapshots/000002.pt", "nas.json"]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize(
    "damage", [lambda content: content[len(content) // 2 :], lambda content: b"{}\n"], ids=["cut", "other"]
)
def test_a_damaged_file_is_named_and_the_rest_is_drawn(run_analyze, tmp_path, name, damage, monkeypatch):
    encode = analyze.encode  # of the pictures none, which takes a tenth of the time
    monkeypatch.setattr(analyze, "encode", lambda x: encode(x) if isinstance(x, analyze.FuncAnimation) else b"")
    folder = make_run(tmp_path / "runs", evaluation=6)
    make_run(tmp_path / "runs", 1, evaluation=6)
    make_snapshots(folder)
    make_search(folder)
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    status, _, error = run_analyze()
    assert status == 1
    assert error.count("\n") == 1
    assert error.startswith("analyze.py: warning: skipped: ")
    assert str(path) in error
    assert (tmp_path / "out" / "toy-training.png").exists()
    assert "toy-learned-s1-images.png" in (tmp_path / "out" / "README.md").read_text()


def test_damaged_numbers(tmp_path):
    folder = make_run(tmp_path, evaluation=6)
    for name, old, new in (
        ("log.jsonl", '"meta_loss": 2.0', '"meta_loss": NaN'),
        ("log.jsonl", '"lr": [0.01,', '"lr": [0.01, 0.01,'),
        ("evaluation.json", '"seed": 0', '"seed": 1'),
    ):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))
        damaged = []
        analyze.read_run(folder, damaged)
        assert damaged == [folder / name]
        (folder / name).write_text(text)


def test_a_teacher_of_another_run(tmp_path):
    folder, other = make_run(tmp_path), make_run(tmp_path, 1)
    (other / "teacher.pt").replace(folder / "teacher.pt")
    damaged = []
    assert analyze.read_run(folder, damaged).teacher is None
    assert damaged == [folder / "teacher.pt"]


def test_a_run_that_has_only_begun(run_analyze, tmp_path):
    folder = make_run(tmp_path / "runs", steps=0, end=False)
    (folder / "log.jsonl").write_text((folder / "log.jsonl").read_text().splitlines(keepends=True)[0])
    status, output, error = run_analyze("--data", str(tmp_path))
    assert (status, error) == (0, "")
    assert (
        "left out: training (toy-learned-s0): no outer step yet: python gtn.py --variant learned --seed 0 --resume"
        in output
    )
    assert "left out: growth (toy-learned-s0): no snapshots: python gtn.py --variant learned --seed 0\n" in output
    (folder / "teacher.pt").unlink()
    (folder / "log.jsonl").unlink()
    status, output, _ = run_analyze()
    assert status == 0
    assert "0 figures of 1 runs" in output


def test_select(run_analyze, tmp_path):
    make_run(tmp_path / "runs")
    make_run(tmp_path / "runs", variant="real")
    status, output, _ = run_analyze("--select", "*-real-*")
    assert status == 0
    assert "of 1 runs" in output
    status, output, error = run_analyze("--select", "A-*")
    assert (status, output) == (2, "")
    assert error == (
        f"analyze.py: error: no run that --select 'A-*' matches in {tmp_path / 'runs'}: make one with "
        "`python gtn.py --config A --variant learned`, or name another folder: --runs\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run in runs: make one with `python gtn.py --config A --variant learned`"),
        (["--runs", "."], "no run in .: make one"),
        (["--device", "tpu"], "--device tpu: must be auto, cpu or cuda"),
        (["--nosuch"], "unrecognized arguments: --nosuch"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert analyze.main(arguments) == 2
    output, error = capsys.readouterr()
    assert (output, error.count("\n")) == ("", 1)
    assert error.startswith("analyze.py: error: ")
    assert message in error
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_cannot_be_written(run_analyze, tmp_path):
    make_run(tmp_path / "runs")
    (tmp_path / "out").write_text("a file")
    status, _, error = run_analyze()
    assert status == 2
    assert error.startswith(f"analyze.py: error: cannot write {tmp_path / 'out'}")
    assert (tmp_path / "out").read_text() == "a file"


def test_real_runs_through_the_real_command_line(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "2")[0] == 0
    teacher = str(tmp_path / "runs" / "quick-learned-s0" / "teacher.pt")
    assert run_gtn("--evaluate", teacher, "--learners", "2")[0] == 0
    result = shell("--runs", tmp_path / "runs", "--out", tmp_path / "out", script="analyze.py")
    assert (result.returncode, result.stderr) == (0, "")
    pages = (tmp_path / "out" / "README.md").read_text()
    row = json.loads((tmp_path / "runs" / "quick-learned-s0" / "evaluation.json").read_text())["rows"][0]["in order"]
    assert f"| quick | learned | in order | {row['mean']:.3f} +- {row['std']:.3f} | 2 | 1 |" in pages
    assert "quick-difficulty.png" in pages


def test_memory_of_a_benchmark(tmp_path, capsys):
    methods, shapes = {"full graph": 2, "one-step segments": 1}, ((8, 32), (16, 32), (32, 128))
    rows = [
        {"inner_steps": T, "batch_size": B, "method": method, "base": 100, "images": 1, "peak": peak * T * B}
        for T, B in shapes
        for method, peak in methods.items()
    ]
    where = {"device": "a machine", "threads": 2, "command": "python tests/benchmark.py"}
    gtn.write_json(tmp_path / "runs" / "benchmark.json", {"environment": where, "memory": {"rows": rows}})
    full, segments, base = draw.draw_memory({"memory": {"rows": rows}}).figure.axes[0].lines
    assert full.get_xydata().tolist() == [[8, 512], [16, 1024]]
    assert segments.get_xydata().tolist() == [[8, 256], [16, 512]]
    assert list(base.get_ydata()) == [100, 100]
    assert analyze.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "a machine, 2 threads; `python tests/benchmark.py`." in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "benchmark-memory.png").exists()
    (tmp_path / "runs" / "benchmark.json").write_text('{"format": 1, "memory": {"rows": [{}]}}')
    assert analyze.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 1
    assert "benchmark.json is damaged" in capsys.readouterr().err

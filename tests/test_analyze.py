"""Figures and tables of runs and searches that are made up here, so that every number in them
is known."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, shell

import analyze
import gtn
import nas

DEVICE = "a <b>device</b> | of ours"
SIZES = {
    "inner_steps": 3,
    "batch_size": 12,
    "latent_size": 2,
    "hidden_size": 4,
    "generator_filters": 2,
}
TESTS = dict(zip(gtn.ORDERS, ([0.5, 0.7], [0.4, 0.6], [0.2, 0.4]), strict=True))


def make_run(folder, seed=0, variant="learned", steps=4, teacher=False, **changes):
    """A run folder below `folder`, every number of which follows from its arguments; returns it."""
    settings = {"name": "toy", "dataset": "glyphs", "filters": (2, 3), "outer_steps": 4} | SIZES
    config = gtn.Config(**settings | changes, variant=variant, seed=seed)
    folder, T = folder / f"{config.name}-{config.condition}-s{seed}", config.inner_steps
    command = f"python gtn.py --variant {variant} --seed {seed} --resume"
    environment = {"device": DEVICE, "command": command}
    origin = {"config": dataclasses.asdict(config), "environment": environment}
    gtn.write(folder / "config.json", origin)
    log = []
    for step in range(steps + 1):
        validation = {"accuracy": {"mean": 1 - 0.5 / (1 + step) / 4**seed}}
        validation["lr"] = [0.01 * 4**seed * t for t in range(1, T + 1)]
        validation["momentum"] = [0.5 + 0.1 * step] * T
        event = {"step": step, "seconds": 30.0 * step * (1 + seed)}
        log.append(event | {"event": "validation"} | validation)
        log.append(event | {"event": "step", "meta_loss": 4.0**seed / (1 + step)})
    gtn.write(folder / "log.jsonl", log)
    tests = [(order, False, [x + 0.1 * seed for x in test]) for order, test in TESTS.items()]
    tests.append((config.order, True, [[k * t / 10 for t in range(T)] for k in (1, 3)]))
    names = "order", "every_step", "accuracies"
    rows = [dict(zip(names, test, strict=True)) for test in tests]
    gtn.write(folder / "evaluation.json", {"step": steps, "rows": rows})
    if teacher:
        torch.manual_seed(seed)
        split, one = gtn.Split(torch.randn(50, 1, 8, 8), torch.arange(50) % 10), torch.ones(1)
        phi, data = gtn.Teacher(config, (1, 8, 8), 10), gtn.Data(split, split, split, 0 * one, one)
        gtn.save(folder, phi, torch.optim.Adam(phi.parameters()), data, steps, log)
    return folder


def read_runs(folder):
    """The runs below a folder."""
    return [analyze.read_run(path, []) for path in sorted(folder.rglob("config.json"))]


def read(folder):
    """({variant: runs} of the runs of one name, the first one's config)."""
    runs = read_runs(folder)
    ((_, variants),) = analyze.group_runs(runs)[0].items()
    return variants, runs[0].config


def run(*arguments):
    """Exit status of analyze's command line, inside this process."""
    try:
        return gtn.run("analyze.py", analyze.main, [*map(str, arguments)])
    except SystemExit as end:
        return end.code


def curve(axes):
    """Points [N, 2] of the line `learned`."""
    return next(line.get_xydata() for line in axes.lines if line.get_label() == "learned")


def test_running_mean_and_mean_over_seeds_by_hand():
    values = np.array([100.0, 10, 4, 1, 7, 3, 2])
    assert analyze.running_mean(values, 2).tolist() == [100, 10, 5, 4, 3.4, 3.25, 4]
    axes, x = analyze.Figure().subplots(), np.arange(3)
    series = [(x, np.array([1.0, 1, 4])), (x[::2], np.array([4.0, 1]))]
    analyze.draw_mean(axes, series, gtn.Config(), log=True)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [2, 2**0.5, 2])
    top = axes.collections[0].get_paths()[0].vertices[:, 1].max()
    np.testing.assert_allclose(top, 2 * np.exp(np.log(4) / 2**0.5))


def test_training_and_rates(tmp_path):
    make_run(tmp_path)
    make_run(tmp_path, 1)
    error, loss = map(curve, analyze.draw_training(*read(tmp_path))[0].axes)
    expected = [(step, 0.25 / (1 + step)) for step in range(5)]  # geometric: of 1/2 and 1/8
    np.testing.assert_allclose(error, expected)
    np.testing.assert_allclose(loss, [(step, 8 * x) for step, x in expected])
    inner_lr, inner_momentum = map(curve, analyze.draw_rates(*read(tmp_path))[0].axes)
    np.testing.assert_allclose(inner_lr, [(1, 0.02), (2, 0.04), (3, 0.06)])
    np.testing.assert_allclose(inner_momentum[:, 1], 0.9)


def test_orders_and_steps_beside_known_figures_of_the_same_budget(tmp_path):
    budget = {"name": "A", "dataset": "mnist", "outer_steps": 5000}
    budget |= {"inner_steps": 20, "batch_size": 32}
    for seed, variant in ((0, "learned"), (1, "learned"), (0, "real")):
        make_run(tmp_path, seed, variant, **budget)
    axes = analyze.draw_orders(*read(tmp_path))[0].axes[0]
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels == [f"{x}, {order}" for x in ("learned", "real") for order in gtn.ORDERS]
    shuffled = [line for line in axes.lines if set(line.get_ydata()) == {1}]
    means = [x.get_xdata() for x in shuffled if x.get_marker() == "|"]
    np.testing.assert_allclose(means, [[0.5, 0.6]])
    medians = [x for x in axes.lines if len(x.get_xdata()) and np.allclose(x.get_xdata(), 0.55)]
    assert medians  # of .4, .6, .5 and .7
    known = [x.get_xydata().tolist() for x in axes.lines if x.get_marker() == "s"]
    assert known == [[[0.973, 0]], [[0.763, 1]]]  # of `learned` alone
    curve = analyze.draw_steps(*read(tmp_path))[0].axes[0].lines[0]
    np.testing.assert_allclose(curve.get_xydata(), [(1 + t, 0.2 * t) for t in range(20)])


def test_teachers_trained_under_an_order(tmp_path):
    """Each beside what the paper reports for it, and apart from what shuffling afterwards does."""
    budget = {"name": "paper", "dataset": "mnist", "outer_steps": 2000}
    budget |= {"inner_steps": 32, "batch_size": 128}
    for variant, order in [*(("learned", order) for order in gtn.ORDERS), ("random", "in order")]:
        make_run(tmp_path, variant=variant, order=order, **budget)
    rows = analyze.result_table(read(tmp_path)[0].values())[1:]
    assert ["learned-batch-shuffled", "batch-shuffled", "0.500 +- 0.141"] in [x[1:4] for x in rows]
    assert {(x[1], x[2]): x[7] for x in rows if x[7] != "-"} == {
        ("learned", "in order"): "0.985",
        ("learned-batch-shuffled", "batch-shuffled"): "0.974",
        ("learned-all-shuffled", "all-shuffled"): "0.969",
        ("random", "in order"): "0.957",
    }


def test_overview(tmp_path, monkeypatch):
    """A teacher's images as real ones look, and accuracies beside those of real data."""
    product = tmp_path / "toy.pt"
    folder = make_run(tmp_path, teacher=True)
    (folder / "teacher.pt").rename(product)  # its curriculum, published
    monkeypatch.chdir(folder)
    assert analyze.read_run(Path("config.json"), []).teacher["step"] == 4
    make_run(tmp_path, variant="real")
    groups, _ = analyze.group_runs(read_runs(tmp_path))
    strip, axes = analyze.draw_overview(groups)[0].axes
    content = gtn.read(product)
    images = content["curriculum"]["images"] * content["std"] + content["mean"]
    shown = strip.images[0].get_array()
    assert shown.shape == (3 * 8, 3 * 8)
    np.testing.assert_allclose(shown[8:16, 16:], images[2, 1, 0].clamp(0, 1))  # label 1, step 3
    lines = [line for line in axes.lines if line.get_label().startswith("trained on")]
    np.testing.assert_allclose([line.get_ydata() for line in lines], [[0, 0.2, 0.4]] * 2)
    other = analyze.read_run(make_run(tmp_path, 1) / "config.json", [])
    assert other.teacher == {}  # the published one is of seed 0


def test_real_steps_that_equal_those_of_a_teacher(tmp_path):
    """Its learners have 0.5 and 0.7, halfway between those after 20 and 80 real steps: 40."""
    budget = {"dataset": "fashion", "batch_size": 12, "name": "t"}
    folders = [make_run(tmp_path, inner_steps=20, **budget)]
    for T, mean in ((10, 0.3), (20, 0.5), (80, 0.7)):
        budget["name"] = f"worth-{T}"
        folders.append(make_run(tmp_path, variant="real", inner_steps=T, **budget))
        row = {"order": "in order", "every_step": False, "accuracies": [mean - 0.1, mean + 0.1]}
        gtn.write(folders[-1] / "evaluation.json", {"step": 4, "rows": [row]})
    for change in ({"batch_size": 11}, {"filters": (2, 4)}, {"order": "all-shuffled"}):
        settings = budget | {"name": f"other-{len(folders)}", "inner_steps": 40} | change
        folders.append(make_run(tmp_path, variant="real", **settings))
    settings = budget | {"name": "longer", "filters": (4, 4), "outer_steps": 5}
    folders.append(make_run(tmp_path, steps=5, inner_steps=20, **settings))
    runs = [analyze.read_run(folder / "config.json", []) for folder in folders]
    figure, caption = analyze.draw_equivalents(analyze.comparisons(runs))
    (line,) = [x for x in figure.axes[0].lines if x.get_marker() == "*"]
    np.testing.assert_allclose(line.get_xydata(), [(20, 0.6), (40, 0.6)])
    assert "fashion 20 steps for 40 real ones [17, over 80]" in caption
    assert analyze.comparisons(runs[:3]) == analyze.comparisons(runs[1:]) == []
    assert analyze.comparisons(runs)[0][0] is runs[0]
    runs[0].evaluation["in order"] -= 0.35  # worse than 10 real steps
    (pair,) = analyze.comparisons(runs)
    assert "for under 10 real ones [under 10, 14]" in analyze.draw_equivalents([pair])[1]
    assert run("--runs", tmp_path) == 0  # the comparison is the figure of its real data
    pictures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert {name.split("-")[0] for name in pictures} == {"equivalents", "t", "other", "longer"}
    page = (tmp_path / "figures" / "README.md").read_text()
    assert "In no other figure than `equivalents`: worth-10, worth-20, worth-80." in page
    make_run(tmp_path, 1, "real", inner_steps=10, **budget | {"name": "worth-10"})
    (tmp_path / "worth-10-real-s1" / "evaluation.json").unlink()  # still training: has a section
    assert run("--runs", tmp_path) == 0
    assert (tmp_path / "figures" / "worth-10-training.png").exists()


def test_robustness_figure(tmp_path):
    errors = {"none": [0.9, 0.1, 0.3], "weight": [0.2, 0.4, 0.6]}
    content = {"settings": [{}, {}, {}], "errors": errors}
    gtn.write(tmp_path / "a" / "robustness.json", content)
    (axes,) = analyze.draw_robustness(content)[0].axes
    points = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert points == [*errors.values()]
    assert run("--runs", tmp_path, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "a-errors.png").exists()


def test_images_figure(tmp_path):
    folder = make_run(tmp_path, teacher=True, steps=0)
    run = analyze.read_run(folder / "config.json", [])
    axes = analyze.draw_images(run)[0].axes[0]
    sheet, curriculum = axes.images[0].get_array(), run.teacher["curriculum"]
    for t in range(3):
        for column, i in enumerate(curriculum.labels[t].sort(stable=True).indices):
            tile = sheet[9 * t + 1 : 9 * t + 9, 9 * column + 1 : 9 * column + 9]
            np.testing.assert_array_equal(tile, curriculum.images[t, i, 0])
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert "".join(ticks) == "001123456789"


def test_the_images_of_a_long_curriculum_fit_on_a_page(tmp_path):
    folder = make_run(tmp_path, teacher=True, steps=0, inner_steps=58)
    figure, caption = analyze.draw_images(analyze.read_run(folder / "config.json", []))
    rows = [int(tick.get_text()) for tick in figure.axes[0].get_yticklabels()]
    assert rows == [*range(1, 59, 3)]
    assert "20 of 58 inner steps" in caption


def test_commands_are_quoted_for_a_shell(tmp_path):
    path = make_run(tmp_path, steps=2) / "config.json"
    content = gtn.read(path)
    command = shlex.join(["python", "gtn.py", "--data", "my data", "--set", "filters=[2,3]"])
    content["environment"]["command"] = command
    gtn.write(path, content)
    unfinished = analyze.read_run(path, [])
    assert analyze.next_command(unfinished).endswith(f": {command} --resume")
    finished = unfinished._replace(log={"step": 4})
    assert analyze.next_command(finished) is None
    killed = finished._replace(evaluation={"step": 4})  # in its test
    assert "toy-learned-s0: not tested, 4 of 4 outer steps: " in analyze.next_command(killed)


def test_pictures_have_names_of_their_own_and_links_are_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(analyze.Figure, "savefig", lambda *_, **__: None)
    search = gtn.read(ROOT / "results" / "widths" / "nas.json")
    for name in ("a", "b"):
        gtn.write(tmp_path / "runs" / name / "nas" / "nas.json", search)
    linked = make_run(tmp_path / "elsewhere")
    (tmp_path / "runs" / "link").symlink_to(linked)
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    out = tmp_path / "out"
    assert run("--runs", tmp_path / "runs", "--out", out) == 0
    names = ["a-nas-ranking", "b-nas-ranking"]
    names += [f"toy-{name}" for name in ("orders", "rates", "steps", "training")]
    assert sorted(path.stem for path in out.glob("*.png")) == names


def test_two_pictures_of_one_name(tmp_path, capsys):
    search = gtn.read(ROOT / "results" / "widths" / "nas.json")
    for name in ("a-b", "a/b"):
        gtn.write(tmp_path / "runs" / name / "nas.json", search)
    assert run("--runs", tmp_path / "runs", "--out", tmp_path / "out") == 2
    assert "2 pictures would be a-b-ranking.png: rename a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_page_that_somebody_else_wrote_stays(tmp_path, capsys):
    make_run(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    assert run("--runs", tmp_path, "--out", tmp_path) == 2
    assert "README.md was not made by analyze.py: choose another --out" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not list(tmp_path.glob("*.png"))


def test_result_table(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, seed)
    _, row, *others = analyze.result_table(read(tmp_path)[0].values())
    std, between = np.std([0.5, 0.7, 0.6, 0.8], ddof=1), 0.1 / 2**0.5
    expected = ["toy", "learned", "in order", f"0.650 +- {std:.3f}", "4", "2", f"{between:.3f}"]
    assert (row, len(others)) == ([*expected, *"--", "4", "2.0, 4.0", DEVICE], 2)
    (tmp_path / "toy-learned-s0/log.jsonl").unlink()
    assert analyze.result_table(read(tmp_path)[0].values())[1][-2] == "-, 4.0"
    make_run(tmp_path / "batch", normalization="batch")
    rows = analyze.result_table(read(tmp_path / "batch")[0].values())[1:]
    assert [row[2] for row in rows] == [f"{order}, transductive" for order in gtn.ORDERS]


def test_runs_that_differ_in_more_than_the_seed_are_left_out(tmp_path):
    make_run(tmp_path)
    make_run(tmp_path, 1, checkpoint_every=1.0, flat=True)
    make_run(tmp_path, 2, outer_lr=0.5)
    make_run(tmp_path, variant="real", inner_steps=2)
    make_run(tmp_path / "copy", 1)
    groups, remarks = analyze.group_runs(read_runs(tmp_path))
    seeds = {name: [x.config.seed for x in same] for name, same in groups["toy"].items()}
    assert seeds == {"learned": [0, 1]}
    reasons = [re.search(r"its (.*) does.*(s\d)$", x).groups() for x in remarks]
    assert reasons == [("seed", "s1"), ("outer_lr", "s0"), ("inner_steps", "s0")]


def test_ranking():
    search = gtn.read(ROOT / "results" / "widths" / "nas.json")
    top, bottom, _ = analyze.draw_search(search)[0].axes
    np.testing.assert_allclose(top.collections[0].get_offsets()[0], [0.934, (0.9904 + 0.9899) / 2])
    marks = [(bar.get_label(), *bar[0].get_xydata()[0].round(3)) for bar in bottom.containers]
    assert ("all", 0.693, -0.2) in marks  # the teacher's
    assert ("given both sizes", 0.218, 0.2) in marks
    assert bottom.get_yticklabels()[0].get_text() == "teacher (0.822 s)"
    low_and_high = bottom.containers[0][2][0].get_segments()[0][:, 0]
    np.testing.assert_allclose(low_and_high.round(2), (0.49, 0.84))
    table = {row[0]: row[1:] for row in nas.ranking_table(search)}
    halves = "0.01 [-0.36, 0.48]", "-0.28 [-0.52, 0.34]"
    rest = "0.00 [0.00, 0.00]", "0.822", "8.53", "0.9916", "0.9914"
    assert table["teacher"] == ["0.69 [0.49, 0.84]", *halves, "0.22 [0.02, 0.45]", *rest]
    for row in search["correlations"]["teacher"]["spearman"].values():
        row["low"] = row["high"] = None  # too few architectures for intervals
    assert len(analyze.draw_search(search)[0].axes[1].containers) == len(marks)


def test_command_line_pages_and_default_folder(tmp_path):
    make_run(tmp_path, teacher=True)
    make_run(tmp_path, variant="real", steps=2)
    result, out = shell("--runs", tmp_path, script="analyze.py"), tmp_path / "figures"
    assert (result.returncode, result.stderr) == (0, "")
    resume = "python gtn.py --variant real --seed 0 --resume\n"
    assert f"toy-real-s0: not finished, 2 of 4 outer steps: {resume}" in result.stdout
    names = "training", "orders", "steps", "rates", "learned-s0-images"
    pictures = {"overview.png", *(f"toy-{name}.png" for name in names)}
    assert {path.name for path in out.iterdir()} == {*pictures, "README.md", "report.html"}
    markdown, page = ((out / name).read_text() for name in ("README.md", "report.html"))
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", markdown)) == pictures
    assert "a &lt;b&gt;device&lt;/b&gt; | of ours" in page
    assert "| a &lt;b&gt;device&lt;/b&gt; \\| of ours |" in markdown
    assert not re.search(
        r"<(script|link|iframe|a|b)\b|href|url\(|@import|https?:", re.sub('base64,[^"]*', "", page)
    )


@pytest.mark.parametrize("content", [b"\xff{", b"{}\n", b"[1]\n", b""])
def test_damaged_files_are_named_and_the_rest_is_drawn(tmp_path, capsys, monkeypatch, content):
    monkeypatch.setattr(analyze.Figure, "savefig", lambda *_, **__: None)  # takes most of the time
    damaged, out = make_run(tmp_path), tmp_path / "out"
    names = ["log.jsonl", "evaluation.json", "teacher.pt", "nas.json", "copy/config.json"]
    make_run(tmp_path, 1)
    (damaged / "copy").mkdir()
    for name in names:
        (damaged / name).write_bytes(content)
    assert run("--runs", tmp_path, "--out", out) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(names)
    assert all(any(f"skipped {damaged / name} (" in line for line in errors) for name in names)
    table = (out / "README.md").read_text()
    assert "| toy | learned | in order | 0.700 +- 0.141 | 2 | 1 |" in table


def test_nothing_to_draw(tmp_path, capsys):
    assert run("--runs", tmp_path) == 2
    assert capsys.readouterr().err.startswith(
        f"analyze.py: error: nothing to draw in {tmp_path}: make a run with"
    )
    assert [*tmp_path.iterdir()] == []

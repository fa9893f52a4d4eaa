"""nas.py: statistics of ranks by hand, one architecture's measurements, searches that stop and
go on."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, shell, tiny

import gtn
import nas
from gtn import Architecture

SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(nas, "RESAMPLES", 20)


def test_rank_correlations_by_hand():
    x, y = np.array([1, 2, 3, 4, 5]), np.array([2, 1, 4, 3, 5])
    assert nas.spearman(x, y) == pytest.approx(1 - 6 * 4 / (5 * 24), abs=1e-15)  # four differ by 1
    x, y = np.array([1, 2, 2, 3]), np.array([1, 3, 2, 4])
    assert nas.ranks(x).tolist() == [1, 2.5, 2.5, 4]
    assert nas.spearman(x, y) == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-15)
    x, y = np.array([6, 5, 4, 3, 2, 1]), np.array([3, 5, 4, 9, 8, 7])
    assert nas.spearman_of_best(x, y) == pytest.approx(-0.5)  # of 3, 5 and 4
    assert nas.spearman_of_best(y, x) == pytest.approx(1)  # of 9, 8 and 7, whose x are 3, 2, 1


def test_partial_correlation_by_hand():
    """By the inverse of the matrix of correlations."""
    x, y, z, w = values = np.random.default_rng(1).normal(size=(4, 20))
    ranks = values.argsort().argsort()
    for given in ((z,), (z, w)):
        precision = np.linalg.inv(np.corrcoef(ranks[: 2 + len(given)]))
        expected = -precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1])
        assert nas.spearman(x, y, given) == pytest.approx(expected, abs=1e-12)
        assert nas.spearman(x, y, (*given, 2 * z)) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(nas.spearman(x, y, (w, x)))  # nothing of x is left


def with_sizes(**methods):
    """Methods as `nas.correlations` wants them; sizes that are noise."""
    generator, n = np.random.default_rng(9), len(next(iter(methods.values())))
    return (
        {"teacher": generator.normal(size=n)}
        | dict(zip(nas.SIZES, generator.normal(size=(2, n)), strict=True))
        | methods
    )


def test_bootstrap_intervals_against_resampled_lists(monkeypatch):
    """100 resamples drawn out as lists, with ties in the method, give the same numbers."""
    generator, n = np.random.default_rng(3), 11
    truth, method = generator.normal(size=n), generator.integers(0, 4, n)
    methods = with_sizes(method=method)
    monkeypatch.setattr(nas, "RESAMPLES", 100)
    result = nas.correlations(methods, [truth.tolist()], 5)["method"]
    counts = np.random.default_rng([5, gtn.BOOTSTRAP]).multinomial(n, np.full(n, 1 / n), 100)
    best_by = {"all": (truth, n), "half by truth": (truth, 6), "half by score": (method, 6)}
    for subset, (by, size) in best_by.items():
        values = []
        for count in [np.ones(n, int), *counts]:
            drawn = np.arange(n).repeat(count)
            drawn = drawn[np.argsort(-by[drawn], kind="stable")][:size]
            if len(set(method[drawn])) > 1 and len(set(truth[drawn])) > 1:
                values.append(nas.spearman(method[drawn], truth[drawn]))
        expected = values[0], *np.percentile(values[1:], [2.5, 97.5])
        estimate = [*result["spearman"][subset].values()][:3]
        assert estimate == pytest.approx(expected, abs=1e-12)


def test_the_published_ranking_follows_from_its_measurements(monkeypatch):
    monkeypatch.setattr(nas, "RESAMPLES", 1000)  # as it was published
    published = gtn.read(ROOT / "results" / "search-fashion" / "nas.json")
    again = nas.conclude(published["architectures"], published)["correlations"]
    for method, statistic in itertools.product(again, ("spearman", "partial")):
        for subset, row in again[method][statistic].items():
            expected = published["correlations"][method][statistic][subset]
            difference = expected.pop("teacher minus this")
            assert row.pop("teacher minus this") == pytest.approx(difference)
            assert row == pytest.approx(expected)


def test_the_ceiling_differences_and_what_is_undefined(monkeypatch):
    monkeypatch.setattr(nas, "ENOUGH", 5)
    a, b, c = [1.0, 2, 3, 4, 5], [2.0, 1, 4, 3, 5], [5.0, 4, 3, 2, 1]
    ceiling = nas.correlations(with_sizes(teacher=a), [a, b, c], 0)["ceiling"]["spearman"]
    assert ceiling["all"]["value"] == pytest.approx((0.8 - 1 - 0.8) / 3)  # the mean over pairs
    assert ceiling["half by score"]["value"] == pytest.approx((0.5 + 0.5 - 1 - 1 - 0.5 - 0.5) / 6)
    found = nas.correlations(with_sizes(teacher=a, rival=b, same=[7] * 5), [a, b], 0)
    truth = np.mean([a, b], 0)
    difference = found["rival"]["spearman"]["all"]["teacher minus this"]["value"]
    assert difference == pytest.approx(nas.spearman(a, truth) - nas.spearman(b, truth))
    same = found["teacher"]["spearman"]["all"]["teacher minus this"]
    assert set(same.values()) == {0.0}  # paired: not a spread
    nothing = {"value": None, "low": None, "high": None}
    nothing = nothing | {"teacher minus this": nothing}
    assert found["same"]["spearman"] == dict.fromkeys(
        ("all", "half by truth", "half by score"), nothing
    )
    single = nas.correlations(with_sizes(teacher=b), [a], 0)  # no second training
    assert single["ceiling"]["spearman"]["all"] == nothing


def test_sizes_by_hand():
    """Two blocks of convolution and normalization, and the head."""
    architecture = Architecture((2, 3), (3, 5), "max", "instance", 0)
    parameters = (2 * 9 + 4) + (3 * 2 * 25 + 6) + (10 * 3 * 49 + 10)
    multiply_adds = 2 * 9 * 784 + 3 * 2 * 25 * 196 + 10 * 3 * 49
    expected = {"parameters": parameters, "multiply_adds": multiply_adds}
    assert nas.sizes(architecture, (1, 28, 28)) == expected


def test_architectures_are_distinct_and_a_longer_list_begins_with_a_shorter_one():
    config = gtn.Config(name="small", filters=((1, 8), (1, 8)))
    every = nas.sample_architectures(config, 10, 64, 3)
    assert len(set(every)) == 64  # the whole space
    assert nas.sample_architectures(config, 10, 5, 3) == every[:5]
    assert nas.sample_architectures(config, 10, 5, 4) != every[:5]
    with pytest.raises(gtn.InputError, match="100000: the space of small has 64"):
        nas.sample_architectures(config, 10, 100_000, 3)


def test_a_score_is_the_mean_over_learners_and_rates_after_three_passes():
    teacher, data, *_ = tiny()
    architecture = Architecture((6,), (3,), "max", "instance", 0)
    settings = {"seed": 4, "config": {"validation_images": 50}}
    curriculum = teacher(data)
    split = gtn.first(data.validation, 50)
    # drawn anew for every pass, so that each shows
    passes = [curriculum._replace(lr=rate * curriculum.lr) for rate in (8, 4, 16)]
    thrice = gtn.Curriculum(*map(torch.cat, zip(*passes, strict=True)))
    turns = itertools.cycle(passes)
    means = []
    for rate in (1, 2):
        for k in range(2):
            with gtn.seeded(4, gtn.SHORT_TRAINING, k, *repr(architecture).encode()):
                theta = gtn.init_learner(architecture, SHAPE).double()
            *_, (theta, _) = gtn.unroll(theta, thrice._replace(lr=rate * thrice.lr), architecture)
            means.append(gtn.accuracy(theta, split, architecture))
    assert len(set(means)) > 1

    def draw(_):
        return next(turns)

    draw.config = gtn.Config(variant="random")
    for source in (lambda _: thrice, nas.teacher_source(draw, {})):
        assert nas.score(source, architecture, data, settings) == pytest.approx(np.mean(means))
    for variant in ("learned", "random"):
        draw.config = gtn.Config(variant=variant, order="all-shuffled")
        images = nas.teacher_source(draw, {"curriculum": curriculum})(data).images
        assert images.shape == thrice.images.shape
        assert not torch.equal(images[:5], curriculum.images)
        assert set(images.flatten().tolist()) == set(curriculum.images.flatten().tolist())


def test_truth_is_of_whole_epochs(monkeypatch):
    """60 images, batches of 20: every three steps all images once, until the network knows them."""
    _, data, *_ = tiny()
    wrong = data.train._replace(labels=(data.train.labels + 1) % 10)
    data = data._replace(validation=data.train, test=wrong)
    architecture = Architecture((9, 9), (3, 3), "max", "instance", 0)
    logits, seen = gtn.logits, []
    monkeypatch.setattr(nas, "BATCH", 20)
    monkeypatch.setattr(gtn, "logits", lambda *a: seen.append(a[1]) or logits(*a))
    result = nas.train_fully(architecture, data, 90, 0, 1)
    same = (torch.cat(seen[:90])[:, None] == data.train.images).flatten(2).all(2)
    epochs = same.nonzero()[:, 1].view(30, 60)
    assert (epochs.sort().values == torch.arange(60)).all()
    assert not torch.equal(epochs[0], epochs[1])
    assert result["validation"] > 0.9
    assert result["test"] < 0.1


def test_the_control_is_the_best_of_its_grid_on_the_same_real_batches(monkeypatch):
    (teacher, data, *_), taught = tiny(), []

    def train_briefly(source, architecture, data, _):
        curriculum = source(data)
        taught.append((curriculum, architecture))
        return 1 - abs(curriculum.lr[0].item() - 0.1) - abs(curriculum.momentum[-1].item() - 0.5)

    monkeypatch.setattr(nas, "train_briefly", train_briefly)
    space = gtn.Config(filters=((1, 9), (1, 9)))
    found = nas.tune_control(space, teacher.config, data, {"seed": 0}, 15)
    assert (found["lr"], found["momentum"]) == (0.1, 0.5)
    assert len(found["grid"]) == 10
    assert len({architecture for _, architecture in taught}) == nas.TUNED
    for curriculum, _ in taught:
        assert torch.equal(curriculum.images, taught[0][0].images)
        assert len(curriculum.images) == found["steps"] == 15
        assert all(
            (x == data.train.images).flatten(1).all(1).any()
            for x in curriculum.images.flatten(0, 1)
        )


@pytest.fixture
def few(monkeypatch):
    """60 images a split of 8x8 pixels, a pattern for each class and noise, as glyphs."""
    generator = torch.Generator().manual_seed(0)
    patterns, *noise = torch.randn(4, 60, *SHAPE, generator=generator)
    labels = torch.arange(60) % 10
    splits = [gtn.Split(patterns[labels] + x, labels) for x in noise]
    data = gtn.Data(*splits, torch.zeros(1), torch.ones(1))
    monkeypatch.setattr(gtn, "load_data", lambda *_: data)
    return data


@pytest.fixture
def teacher(few, tmp_path):
    """A tiny teacher.pt, of a variant that draws a new curriculum for every learner."""
    settings = [*TINY, *"kernels=[1,3] normalization=batch outer_steps=1 name=t".split()]
    where = ["--device", "cpu", "--runs", str(tmp_path), "--variant", "random"]
    assert gtn.run("gtn.py", gtn.main, [*where, "--set", *settings]) == 0
    return tmp_path / "t-random-s0" / "teacher.pt"


def search(*arguments):
    """Exit status of nas.py's command line inside this process, 3 architectures."""
    usual = "--truth-steps 2 --architectures 3 --device cpu".split()
    return gtn.run("nas.py", nas.main, [*usual, *map(str, arguments)])


def refused(capsys, message, *arguments):
    """Whether nas.py ends with status 2 and one line that has the message."""
    capsys.readouterr()
    status, (output, error) = search(*arguments), capsys.readouterr()
    return (status, output, error.count("\n")) == (2, "", 1) and message in error


def without_seconds(lines):
    return [x | {"seconds": None} for x in lines]


def test_a_search_end_to_end(teacher, few, capsys):
    """Every architecture's line is what it measures alone, in another order; picks follow from
    the lines."""
    assert search(teacher) == 0
    result = gtn.read(teacher.with_name("nas-t-s0") / "nas.json")
    output = capsys.readouterr().out
    for text in ("no intervals: they need 8 architectures", "transductive: ", "\nrandom pick "):
        assert text in output
    source = gtn.read_teacher(teacher)[0]
    assert list(result["controls"]) == ["control"]
    lines = result["architectures"]
    control = [result["controls"]["control"][key] for key in ("steps", "lr", "momentum")]
    sources = {
        "teacher": [nas.teacher_source(*gtn.read_teacher(teacher))],
        "control": [nas.control_source(source.config, 0, *control)],
    }
    for x in reversed(lines):
        again = nas.add_scores(nas.architecture_of(x)._asdict(), few, sources, result)
        again = nas.add_truth(again, few, result)
        assert without_seconds([x]) == without_seconds(
            [again | {key: x[key] for key in ("filters", "kernels")}]
        )
        assert x["truth"][0] != x["truth"][1]
    test, best = [np.mean([t["test"] for t in x["truth"]]) for x in lines], result["best"]
    truth = [np.mean([t["validation"] for t in x["truth"]]) for x in lines]
    first = test[max(range(3), key=lambda i: truth[i])]  # of three architectures, all are first
    for method in ("teacher", "multiply_adds"):
        pick = max(range(3), key=lambda i: lines[i][method])
        assert best[method] == pytest.approx(
            {"index": pick, "test": test[pick], "shortlist": first}
        )
    expected = {"mean": np.mean(test), "std": np.std(test, ddof=1), "best": max(test), "n": 3}
    assert best["random"] == pytest.approx(expected | {"shortlist": first})
    assert result["teacher_seconds"] == gtn.read(teacher)["seconds"]


def test_what_a_teacher_costs():
    """It took 100 seconds, and takes 1 for each of four architectures."""
    lines = [{"seconds": {"teacher": 1.0, "control": 9.0, "truth": 5.0}}] * 4
    settings = {"teacher_seconds": 100, "controls": {"control": {"seconds": 10}}}
    assert nas.costs(lines, settings) == {
        "teacher": {"mean": 1.0, "shared": 26.0},
        "control": {"mean": 9.0, "shared": 11.5},
        "truth": {"mean": 5.0, "shared": 5.0},
    }


@pytest.mark.parametrize("where", ["add_scores", "add_truth"])
def test_interrupted_resumed_and_continued_equals_straight(
    where, teacher, capsys, monkeypatch, tmp_path
):
    a, b, add, times = tmp_path / "a", tmp_path / "b", getattr(nas, where), []

    def interrupted(*arguments):
        assert refused(capsys, "is in use by another process", teacher, "--out", a, "--resume")
        times.append(1)
        if len(times) == 2:
            raise KeyboardInterrupt
        return add(*arguments)

    monkeypatch.setattr(nas, where, interrupted)
    assert search(teacher, "--out", a) == 130
    monkeypatch.setattr(nas, where, add)
    first = (a / "nas.jsonl").read_text()
    assert first.count("\n") == {"add_scores": 1, "add_truth": 4}[where]
    (a / "nas.jsonl").write_text(first + '{"filters": [1')  # killed while it wrote
    assert (
        search(teacher, "--out", b, "--resume", "--architectures", 4) == 0
    )  # nothing there to resume
    monkeypatch.setattr(nas, "tune_control", None)  # its grid is not searched again
    assert search(teacher, "--out", a, "--resume", "--architectures", 4) == 0
    lines, straight = (gtn.read(x / "nas.json")["architectures"] for x in (a, b))
    assert without_seconds(lines) == without_seconds(straight)
    measured = json.loads(first.splitlines()[-1])["seconds"]  # to the seconds: not measured again
    assert any(line["seconds"]["teacher"] == measured["teacher"] for line in lines)
    if where == "add_truth":
        assert measured in [line["seconds"] for line in lines]


def test_the_ranking_by_the_teacher_comes_before_full_training(teacher, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(nas, "train_fully", stop)
    assert search(teacher) == 130
    lines = gtn.read(teacher.with_name("nas-t-s0") / "nas.jsonl")
    transductive, _, header, *rows = capsys.readouterr().out.splitlines()
    assert transductive.startswith("transductive")
    assert header.split() == nas.architecture_table(lines)[0]
    assert search(teacher, "--resume") == 130
    written = gtn.read(teacher.with_name("nas-t-s0") / "nas.jsonl")
    assert written == lines  # no truth that was not measured
    shown = [row.split()[-3:] for row in rows if row]
    scores = sorted((line["teacher"] for line in lines), reverse=True)
    assert [row[0] for row in shown] == [f"{x:.4f}" for x in scores]
    assert {row[2] for row in shown} == {"-"}


def test_the_best_of_several_teachers_counts(teacher, few, capsys, tmp_path):
    """Real data is read after the steps of one and of all; what does not go together is refused."""
    worse, other = tmp_path / "worse.pt", tmp_path / "other.pt"
    content = gtn.read(teacher)
    rates = content["teacher"]["log_lr"] + 3
    gtn.write(worse, content | {"teacher": content["teacher"] | {"log_lr": rates}})
    assert search(teacher, worse, "--architectures", 4) == 0
    result = gtn.read(teacher.with_name("nas-t-s0") / "nas.json")
    assert [control["steps"] for control in result["controls"].values()] == [9, 18]
    search_json = teacher.with_name("nas-t-s0") / "search.json"
    whole = gtn.read(search_json)
    damaged = whole["controls"] | {"control_all": whole["controls"]["control"] | {"lr": "x"}}
    gtn.write(search_json, whole | {"controls": damaged})
    message = f"cannot read {search_json}"
    assert refused(capsys, message, teacher, worse, "--architectures", 5, "--resume")
    for line in result["architectures"]:
        assert line["teacher"] == max(line["teacher scores"])
    assert any(len(set(line["teacher scores"])) == 2 for line in result["architectures"])
    alone = tmp_path / "alone"
    assert search(worse, "--architectures", 4, "--out", alone) == 0
    scores = [line["teacher"] for line in gtn.read(alone / "nas.json")["architectures"]]
    assert scores == [line["teacher scores"][1] for line in result["architectures"]]
    assert result["teacher_seconds"] == 2 * content["seconds"]
    message = "teachers must be different files with the same dataset, inner_steps and batch_size"
    assert refused(capsys, message, teacher, worse, teacher)
    gtn.write(other, content | {"config": content["config"] | {"dataset": "fashion"}})
    assert refused(capsys, message, teacher, other)
    assert refused(capsys, "a search with other sha256", worse, teacher, "--resume", "--out", alone)


def test_ranks_share_the_architectures(teacher, monkeypatch, tmp_path):
    """The first of two ranks measures every second architecture, and has the others from the
    second one."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert search(teacher, "--out", one, "--architectures", 5) == 0
    lines = gtn.read(one / "nas.json")["architectures"]

    def gathered(new):  # first the scores of all, then the truth
        last = all("truth" in line for line in new.values())
        others = [{key: x[key] for key in x if last or key != "truth"} for x in lines]
        return dict(enumerate(others)) | new

    monkeypatch.setattr(gtn, "WORLD", 2)
    monkeypatch.setattr(gtn, "gathered", gathered)
    for name in ("init_process_group", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, lambda *_: None)
    assert search(teacher, "--out", two, "--architectures", 5) == 0
    written = gtn.read(two / "nas.jsonl")
    assert without_seconds([x for x in written if "truth" in x]) == without_seconds(lines[::2])
    assert gtn.read(one / "nas.json")["correlations"] == gtn.read(two / "nas.json")["correlations"]


def test_refused_input(teacher, capsys, tmp_path):
    other, content = tmp_path / "other.pt", gtn.read(teacher)
    gtn.write(other, content | {"mean": content["mean"] + 0.002})
    for message, *arguments in [
        ("other.pt was trained on other images than this glyphs", other),
        ("--architectures 1: must be from 2 to", teacher, "--architectures", 1),
        ("--truth-steps 0: must be from 1 to", teacher, "--truth-steps", 0),
        ("unknown config 'nosuch': configs.json has quick", teacher, "--space", "nosuch"),
    ]:
        assert refused(capsys, message, *arguments), message
    assert not list(tmp_path.glob("**/nas*"))
    result = shell("nosuch.pt", script="nas.py", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_a_folder_is_not_overwritten(teacher, capsys, tmp_path, monkeypatch):
    out, settings, log = (tmp_path / name for name in ("a", "a/search.json", "a/nas.jsonl"))
    assert search(teacher, "--out", out) == 0
    before = {path: path.read_bytes() for path in (settings, log)}
    monkeypatch.setattr(nas, "add_scores", None)  # nothing is measured from now on
    monkeypatch.setattr(nas, "add_truth", None)
    gtn.write(tmp_path / "other.pt", gtn.read(teacher) | {"seconds": 7.0})
    for arguments, message in [
        ([teacher], "holds this search: continue it with --resume"),
        ([teacher, "--resume", "--truth-steps", 3], "holds a search with other truth"),
        ([tmp_path / "other.pt", "--resume"], "holds a search with other sha256"),
    ]:
        assert refused(capsys, f"{out} {message}", *arguments, "--out", out), arguments
    *rest, line = before[log].decode().splitlines()
    rest = "\n".join(rest) + "\n"
    damages = {"teacher": "0.5"}, {"control": math.nan}, {"truth": []}
    damaged = [(log, rest + json.dumps(json.loads(line) | x) + "\n") for x in damages]
    scores = {key: x for key, x in json.loads(line).items() if key != "truth"}
    damaged.append((log, json.dumps(scores | {"control": math.nan}) + "\n"))
    damaged.append((log, json.dumps(scores | {"teacher": 10**400}) + "\n"))
    rates = {"controls": {"control": {"steps": 3, "lr": "x", "momentum": 0.5, "seconds": 1}}}
    damaged.append((settings, json.dumps(json.loads(before[settings]) | rates)))
    damaged.append((settings, json.dumps(json.loads(before[settings]) | {"controls": {}})))
    nan = json.dumps(json.loads(before[settings]) | {"controls": {"control": {"lr": math.nan}}})
    for path, text in [*damaged, (settings, nan), (settings, "{"), (log, rest + "{}\n")]:
        path.write_text(text)
        assert refused(capsys, f"cannot read {path}", teacher, "--out", out, "--resume"), text
        path.write_bytes(before[path])
    log.write_text(rest + line + "\n" + rest)  # scores after the truth change nothing
    assert search(teacher, "--out", out, "--resume") == 0  # finished: reported again
    assert "ranked by" not in capsys.readouterr().out

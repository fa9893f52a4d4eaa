"""nas.py: statistics of ranks by hand, one architecture's measurements, searches that stop and
go on."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, shell, tiny
from torch.utils.flop_counter import FlopCounterMode

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
    """Of residuals of ranks; given one variable, and where it decides, by the textbook's
    formula."""
    generator = np.random.default_rng(1)
    x, y, z, w = generator.normal(size=(4, 20))
    ranks = [np.argsort(np.argsort(values)) for values in (x, y, z, w)]
    design = np.column_stack([np.ones(20), *ranks[2:]])
    rest = [rank - design @ np.linalg.lstsq(design, rank, rcond=None)[0] for rank in ranks[:2]]
    assert nas.spearman(x, y, (z, w)) == pytest.approx(np.corrcoef(rest)[0, 1], abs=1e-12)
    xy, xz, yz = (np.corrcoef(ranks[i], ranks[j])[0, 1] for i, j in ((0, 1), (0, 2), (1, 2)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert nas.spearman(x, y, (z,)) == pytest.approx(expected, abs=1e-12)
    assert nas.spearman(x, y, (z, 2 * z)) == pytest.approx(expected, abs=1e-12)
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
    best_by = {"all": (truth, n), "top half": (truth, 6), "own half": (method, 6)}
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
    """To three decimals, as an earlier implementation of the bootstrap by weights has it."""
    monkeypatch.setattr(nas, "RESAMPLES", 1000)
    published = gtn.read(ROOT / "results" / "search" / "nas.json")
    lines = published["architectures"]
    methods = {name: [x[name] for x in lines] for name in ("teacher", "control", *nas.SIZES)}
    repeats = np.array([[repeat["validation"] for repeat in x["truth"]] for x in lines]).T
    result = nas.correlations(methods, repeats, published["seed"])
    for name, statistic in itertools.product(methods, ("spearman", "partial")):
        for subset in ("all", "top half"):
            expected = published["correlations"][name][statistic][subset]
            difference = expected.pop("teacher minus this")
            row = result[name][statistic][subset]
            assert row.pop("teacher minus this") == pytest.approx(difference, abs=5e-4)
            assert row == pytest.approx(expected, abs=5e-4)


def test_the_ceiling_differences_and_what_is_undefined(monkeypatch):
    monkeypatch.setattr(nas, "ENOUGH", 5)
    a, b, c = [1.0, 2, 3, 4, 5], [2.0, 1, 4, 3, 5], [5.0, 4, 3, 2, 1]
    ceiling = nas.correlations(with_sizes(teacher=a), [a, b, c], 0)["ceiling"]["spearman"]
    assert ceiling["all"]["value"] == pytest.approx((0.8 - 1 - 0.8) / 3)  # the mean over pairs
    assert ceiling["own half"]["value"] == pytest.approx((0.5 + 0.5 - 1 - 1 - 0.5 - 0.5) / 6)
    found = nas.correlations(with_sizes(teacher=a, rival=b, same=[7] * 5), [a, b], 0)
    truth = np.mean([a, b], 0)
    difference = found["rival"]["spearman"]["all"]["teacher minus this"]["value"]
    assert difference == pytest.approx(nas.spearman(a, truth) - nas.spearman(b, truth))
    same = found["teacher"]["spearman"]["all"]["teacher minus this"]
    assert set(same.values()) == {0.0}  # paired: not a spread
    nothing = {"value": None, "low": None, "high": None}
    nothing = nothing | {"teacher minus this": nothing}
    halves = {"all": nothing, "top half": nothing}
    assert found["same"] == {"spearman": halves | {"own half": nothing}, "partial": halves}
    single = nas.correlations(with_sizes(teacher=b), [a], 0)  # no second training
    assert single["ceiling"]["spearman"]["all"] == nothing


def test_sizes_by_hand_and_of_a_real_forward():
    architecture = Architecture((2, 3), (3, 5), "max", "instance", 0)
    learner = gtn.make_learner(architecture, (1, 28, 28))
    found = nas.sizes(architecture, (1, 28, 28))
    assert found["parameters"] == sum(p.numel() for p in learner.parameters())
    assert found["multiply_adds"] == 2 * 9 * 784 + 3 * 2 * 25 * 196 + 10 * 3 * 49
    several = gtn.Config(
        filters=((4, 30),) * 3, least_blocks=1, kernels=(3, 5), pooling=("max", "average")
    )
    for architecture in nas.sample_architectures(several, 10, 6, 0):
        theta, found = (
            gtn.init_learner(architecture, (3, 30, 22)),
            nas.sizes(architecture, (3, 30, 22)),
        )
        with FlopCounterMode(display=False) as counter:
            gtn.logits(theta, torch.zeros(2, 3, 30, 22), architecture)
        assert found["parameters"] == len(theta)
        assert (
            2 * 2 * found["multiply_adds"] == counter.get_total_flops()
        )  # two images; an add and a multiply


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
    for source in (thrice, lambda _: next(turns)):
        assert nas.score(source, architecture, data, settings) == pytest.approx(np.mean(means))


def test_truth_is_of_whole_epochs(monkeypatch):
    """60 images, batches of 20: every three steps all images once, until the network knows them."""
    _, data, *_ = tiny()
    data = data._replace(validation=data.train, test=gtn.first(data.train, 31))
    architecture = Architecture((9, 9), (3, 3), "max", "instance", 0)
    logits, seen = gtn.logits, []

    def watched(theta, images, architecture):
        seen.append((theta, images))
        return logits(theta, images, architecture)

    monkeypatch.setattr(nas, "BATCH", 20)
    monkeypatch.setattr(gtn, "logits", watched)
    result = nas.train_fully(architecture, data, 90, 0, 1)
    steps = []
    for _, images in seen[:90]:
        same = (images[:, None] == data.train.images).flatten(2).all(2)
        steps.append(same.nonzero()[:, 1])
    epochs = torch.cat(steps).view(30, 60)
    assert (epochs.sort().values == torch.arange(60)).all()
    assert not torch.equal(epochs[0], epochs[1])
    theta = seen[-1][0]
    for name in ("validation", "test"):  # both of images that it has seen
        split = getattr(data, name)
        assert result[name] == gtn.accuracy(theta, split, architecture) > 0.9


def test_the_control_is_the_best_of_its_grid_on_the_same_real_batches(monkeypatch):
    (teacher, data, *_), taught = tiny(), []

    def train_briefly(curriculum, architecture, *_):
        taught.append((curriculum, architecture))
        return 1 - abs(curriculum.lr[0].item() - 0.1) - abs(curriculum.momentum[-1].item() - 0.5)

    monkeypatch.setattr(nas, "train_briefly", train_briefly)
    space = gtn.Config(filters=((1, 9), (1, 9)))
    found = nas.tune_control(space, teacher.config, data, {"seed": 0}, 15)
    assert found["seconds"] > 0
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
    """60 images a split of 8x8 pixels, a pattern for each class and noise, which
    `gtn.load_data` returns."""
    generator = torch.Generator().manual_seed(0)
    patterns, labels = torch.randn(10, *SHAPE, generator=generator), torch.arange(60) % 10
    splits = [
        gtn.Split(patterns[labels] + torch.randn(60, *SHAPE, generator=generator), labels)
        for _ in range(3)
    ]
    data = gtn.Data(*splits, torch.zeros(1), torch.ones(1))
    monkeypatch.setattr(gtn, "load_data", lambda *_: data)
    return data


@pytest.fixture
def teacher(few, tmp_path):
    """A tiny teacher.pt, of a variant that draws a new curriculum for every learner."""
    settings = [
        "--set",
        *TINY,
        "variant=random",
        "kernels=[1,3]",
        "normalization=batch",
        "outer_steps=1",
        "dataset=glyphs",
        "name=t",
    ]
    assert gtn.run("gtn.py", gtn.main, ["--device", "cpu", "--runs", str(tmp_path), *settings]) == 0
    return tmp_path / "t-random-s0" / "teacher.pt"


def search(*arguments):
    """Exit status of nas.py's command line inside this process, 3 architectures."""
    usual = "--truth-steps 2 --architectures 3 --device cpu".split()
    return gtn.run("nas.py", nas.main, [*usual, *map(str, arguments)])


def refused(capsys, message, *arguments):
    """Whether nas.py ends with status 2 and one line that has the message."""
    capsys.readouterr()
    status, (output, error) = search(*arguments), capsys.readouterr()
    return (status, output, error.count("\n"), error[:14]) == (
        2,
        "",
        1,
        "nas.py: error:",
    ) and message in error


def without_seconds(lines):
    return [x | {"seconds": None} for x in lines]


def test_a_search_end_to_end(teacher, few, capsys):
    """Every architecture's line is what it measures alone, in another order; picks follow from
    the lines."""
    assert search(teacher) == 0
    result = gtn.read(teacher.with_name("nas-t-s0") / "nas.json")
    row = result["correlations"]["control"]["spearman"]["all"]
    assert (row["low"], row["high"]) == (None, None)  # of three architectures
    assert nas.interval({"value": 0.5, "low": None, "high": None}) == "0.50 -"
    assert "no intervals: they need 8 architectures" in capsys.readouterr().out
    source = gtn.read_teacher(teacher)[0]
    assert list(result["controls"]) == ["control"]
    lines = result["architectures"]
    control = [result["controls"]["control"][key] for key in ("steps", "lr", "momentum")]
    curriculum = nas.control_curriculum(source.config, few, 0, *control)
    sources = {"teacher": [source], "control": [curriculum]}
    for x in reversed(lines):
        again = nas.measure(nas.architecture_of(x), few, sources, result)
        assert without_seconds([x]) == without_seconds(
            [again | {key: x[key] for key in ("filters", "kernels")}]
        )
        assert x["truth"][0] != x["truth"][1]
    test, best = [np.mean([t["test"] for t in x["truth"]]) for x in lines], result["best"]
    truth = [np.mean([t["validation"] for t in x["truth"]]) for x in lines]
    first = test[max(range(3), key=lambda i: truth[i])]  # of three architectures, all are first
    for method in ("teacher", "multiply_adds"):
        pick = max(range(3), key=lambda i: lines[i][method])
        assert best[method] == pytest.approx({"index": pick, "test": test[pick], "first": first})
    expected = {"mean": np.mean(test), "std": np.std(test, ddof=1), "best": max(test), "n": 3}
    assert best["random"] == pytest.approx(expected | {"first": first})
    cost = result["seconds"]["teacher"]
    assert cost["shared"] == cost["mean"] + gtn.read(teacher)["seconds"] / 3


def test_what_a_teacher_costs(capsys):
    """It took 100 seconds, and takes 1 for each of four architectures."""
    line = {"teacher": 0.5, "control": 0.5, "parameters": 1, "multiply_adds": 1}
    line |= {
        "truth": [{"validation": 0.5, "test": 0.5}],
        "seconds": {"teacher": 1.0, "control": 9.0, "truth": 5.0},
    }
    settings = {"seed": 0, "teacher_seconds": 100, "controls": {"control": {"seconds": 10}}}
    settings["space"] = {"normalization": "batch"}
    seconds = nas.conclude([line] * 4, settings)["seconds"]
    assert seconds["teacher"] == {"mean": 1.0, "shared": 26.0}
    assert seconds["control"] == {"mean": 9.0, "shared": 11.5}
    assert seconds["truth"] == {"mean": 5.0, "shared": 5.0}
    shape = {"filters": [2], "kernels": [3], "pooling": "max"}
    nas.report(nas.conclude([line | shape] * 4, settings))
    output = capsys.readouterr().out
    assert output.startswith("transductive: ")
    (row,) = [x for x in output.splitlines() if x.startswith("control  ")]
    assert "  9        11.5  " in row


def test_interrupted_resumed_and_continued_equals_straight(teacher, capsys, monkeypatch, tmp_path):
    a, b, measure = tmp_path / "a", tmp_path / "b", nas.measure

    def interrupted(*arguments):
        assert refused(capsys, "is in use by another process", teacher, "--out", a, "--resume")
        if gtn.read(a / "nas.jsonl"):
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(nas, "measure", interrupted)
    assert search(teacher, "--out", a) == 130
    monkeypatch.setattr(nas, "measure", measure)
    first = (a / "nas.jsonl").read_text()
    (a / "nas.jsonl").write_text(first + '{"filters": [1')  # killed while it wrote
    assert (
        search(teacher, "--out", b, "--resume", "--architectures", 4) == 0
    )  # nothing there to resume
    monkeypatch.setattr(nas, "tune_control", None)  # its grid is not searched again
    assert search(teacher, "--out", a, "--resume", "--architectures", 4) == 0
    assert (a / "nas.jsonl").read_text().startswith(first)  # to the seconds: not measured again
    assert without_seconds(gtn.read(a / "nas.jsonl")) == without_seconds(gtn.read(b / "nas.jsonl"))


def test_the_best_of_several_teachers_counts(teacher, few, capsys, tmp_path):
    """Real data is read after the steps of one and of all; what does not go together is refused."""
    worse, bare, other = (tmp_path / f"{name}.pt" for name in ("worse", "bare", "other"))
    content = gtn.read(teacher)
    rates = content["teacher"]["log_lr"] + 3
    gtn.write(worse, content | {"teacher": content["teacher"] | {"log_lr": rates}})
    assert search(teacher, worse, "--architectures", 4) == 0
    result = gtn.read(teacher.with_name("nas-t-s0") / "nas.json")
    assert [control["steps"] for control in result["controls"].values()] == [9, 18]
    for line in result["architectures"]:
        assert line["teacher"] == max(line["teacher scores"])
        assert len(line["teacher scores"]) == 2
    assert any(len(set(line["teacher scores"])) == 2 for line in result["architectures"])
    alone = tmp_path / "alone"
    assert search(worse, "--architectures", 4, "--out", alone) == 0
    scores = [line["teacher"] for line in gtn.read(alone / "nas.jsonl")]
    assert scores == [line["teacher scores"][1] for line in result["architectures"]]
    assert set(result["correlations"]) >= {"teacher", "control", "control_all", "ceiling"}
    cost = result["seconds"]["teacher"]
    assert cost["shared"] == cost["mean"] + 2 * content["seconds"] / 4
    message = "teachers must differ, in one dataset, inner_steps and batch_size"
    assert refused(capsys, message, teacher, worse, teacher)
    config = content["config"]
    gtn.write(other, content | {"config": config | {"dataset": "fashion"}})
    assert refused(capsys, message, teacher, other)
    without = {k: x for k, x in content["teacher"].items() if "generator" not in k}
    gtn.write(bare, content | {"teacher": without})
    assert refused(capsys, f"cannot read {bare}", teacher, bare)
    assert refused(capsys, "a search with other sha256", worse, teacher, "--resume", "--out", alone)


def test_ranks_share_the_architectures(teacher, monkeypatch, tmp_path):
    """The first of two ranks measures every second architecture, and has the others from the
    second one."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert search(teacher, "--out", one, "--architectures", 5) == 0
    lines = gtn.read(one / "nas.jsonl")
    others = {nas.architecture_of(x): x for x in lines[1::2]}
    monkeypatch.setattr(gtn, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda _: None)
    gather = lambda shares, mine: shares.__setitem__(slice(None), [mine, others])  # noqa: E731
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert search(teacher, "--out", two, "--architectures", 5) == 0
    assert without_seconds(gtn.read(two / "nas.jsonl")) == without_seconds(lines[::2])
    assert gtn.read(one / "nas.json")["correlations"] == gtn.read(two / "nas.json")["correlations"]


def test_refused_input(teacher, capsys, few, tmp_path, monkeypatch):
    for name in ("mean", "std"):
        gtn.write(
            tmp_path / f"{name}.pt", (content := gtn.read(teacher)) | {name: content[name] + 0.002}
        )
        assert refused(
            capsys,
            f"{name}.pt was trained on other images than this glyphs",
            tmp_path / f"{name}.pt",
        )
    for flag, least in {"--architectures": 2, "--truth-steps": 1}.items():
        assert refused(
            capsys, f"{flag} {least - 1}: must be from {least} to", teacher, flag, least - 1
        )
    assert refused(
        capsys, "unknown config 'nosuch': configs.json has quick", teacher, "--space", "nosuch"
    )
    monkeypatch.setattr(
        gtn, "load_data", lambda *_: few._replace(train=gtn.Split(few.train.images[..., :7], None))
    )
    assert refused(capsys, "was trained on other images", teacher)
    assert not list(tmp_path.glob("**/nas*"))
    result = shell("nosuch.pt", script="nas.py", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_a_folder_is_not_overwritten(teacher, capsys, tmp_path, monkeypatch):
    out, settings, log = (tmp_path / name for name in ("a", "a/search.json", "a/nas.jsonl"))
    assert search(teacher, "--out", out) == 0
    before = {path: path.read_bytes() for path in (settings, log)}
    monkeypatch.setattr(nas, "measure", None)  # nothing is measured from now on
    gtn.write(tmp_path / "other.pt", gtn.read(teacher) | {"seconds": 7.0})
    for arguments, message in [
        ([teacher], "holds this search: continue it with --resume"),
        ([teacher, "--resume", "--truth-steps", 3], "holds a search with other truth"),
        ([tmp_path / "other.pt", "--resume"], "holds a search with other sha256"),
        ([teacher, "--resume", "--space", "nas"], "holds a search with other space"),
    ]:
        assert refused(capsys, f"{out} {message}", *arguments, "--out", out), arguments
    line, rest = before[log].decode().split("\n", 1)
    damages = [
        {"teacher": "0.5"},
        {"control": math.nan},
        {"truth": []},
        {"seconds": {}},
    ]
    damaged = [(log, json.dumps(json.loads(line) | damage) + "\n" + rest) for damage in damages]
    for path, text in [*damaged, (settings, "{"), (log, "{}\n" + rest)]:
        path.write_text(text)
        assert refused(capsys, f"cannot read {path}", teacher, "--out", out, "--resume"), text
        path.write_bytes(before[path])
    assert search(teacher, "--out", out, "--resume") == 0  # finished: reported again

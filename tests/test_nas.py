"""nas.py: statistics of ranks by hand, one architecture's measurements, searches that stop and go on."""

import collections
import functools
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, shell
from torch.utils.flop_counter import FlopCounterMode

import gtn
import nas
from gtn import Architecture

ONE = np.ones((1, 4))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------- statistics


def test_rank_correlations_by_hand():
    x, y = np.array([1, 2, 3, 4, 5]), np.array([2, 1, 4, 3, 5])
    one = np.ones((1, 5))
    assert nas.spearman(x, y, one) == pytest.approx(1 - 6 * 4 / (5 * 24), abs=1e-15)  # four ranks differ by one
    assert nas.kendall(x, y, one) == pytest.approx((8 - 2) / 10, abs=1e-15)
    assert nas.spearman(x, -10.0 * x, one) == nas.kendall(x, -10.0 * x, one) == -1
    assert nas.spearman(x, np.exp(x), one) == nas.kendall(x, np.exp(x), one) == 1


def test_rank_correlations_with_ties_by_hand():
    x, y = np.array([1, 2, 2, 3]), np.array([1, 3, 2, 4])  # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    assert nas.spearman(x, y, ONE) == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-15)
    assert nas.kendall(x, y, ONE) == pytest.approx(5 / math.sqrt(5 * 6), abs=1e-15)
    x, y = np.array([1, 1, 2, 2]), np.array([1, 2, 2, 1])
    assert nas.spearman(x, y, ONE) == nas.kendall(x, y, ONE) == 0


def average_ranks(values):
    return np.array([sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values])


def kendall_by_counting(x, y):
    entries = list(zip(x.tolist(), y.tolist(), strict=True))
    pairs = [((a > c) - (a < c), (b > d) - (b < d)) for a, b in entries for c, d in entries]
    return sum(a * b for a, b in pairs) / math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))


def test_weights_are_repetitions():
    generator = np.random.default_rng(0)
    x, y, counts = (generator.integers(0, 4, n) for n in ((30, 12), (30, 12), (30, 12)))
    seen = 0
    for a, b, n in zip(x, y, counts, strict=True):
        c, d = a.repeat(n), b.repeat(n)
        if len(set(c)) > 1 and len(set(d)) > 1:
            expected = np.corrcoef(average_ranks(c), average_ranks(d))[0, 1]
            assert nas.spearman(a, b, n[None]) == pytest.approx(expected, abs=1e-12)
            assert nas.kendall(a, b, n[None]) == pytest.approx(kendall_by_counting(c, d), abs=1e-12)
            seen += 1
    assert seen > 20


def test_the_top_and_its_precision_by_hand():
    values = np.array([3, 5, 4, 1])
    assert nas.top(values, ONE, 2).tolist() == [[0, 1, 1, 0]]
    assert nas.top(np.array([3, 5, 3, 1]), ONE, 2).tolist() == [[0.5, 1, 0.5, 0]]  # one place for two
    assert nas.top(values, np.array([[1, 3, 0, 2]]), 4).tolist() == [[1, 3, 0, 0]]
    assert nas.top(values, np.array([[1, 3, 0, 2]]), 2).tolist() == [[0, 2, 0, 0]]

    x, one = np.arange(30.0), np.ones((1, 30))
    y = x.copy()
    assert nas.precision(x, y, one) == 1
    y[[0, 29]] = y[[29, 0]]  # one of the best three by x is the worst by y
    assert nas.precision(x, y, one) == pytest.approx(2 / 3)
    x[26:30] = 26.0  # four share the first three places: 28, 27, (26 or 0), of y's best three 0, 28, 27
    assert nas.precision(x, y, one) == pytest.approx((3 / 4 + 3 / 4) / 3)
    assert nas.precision(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 4]), ONE) == 1  # of 4: the best one


def test_what_is_undefined_is_none():
    repeats = [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]
    nothing = {"value": None, "low": None, "high": None}
    found = nas.correlations({"same": [7, 7, 7, 7]}, repeats[:1], 0)
    for method in ("same", "ceiling"):  # constant; no second repeat
        assert found[method]["spearman"] == found[method]["kendall"] == {"all": nothing, "top half": nothing}
        assert found[method]["precision"] == nothing
    found = nas.correlations({"fine": [1, 2, 3, 4]}, repeats, 0)
    assert found["ceiling"]["spearman"]["all"]["value"] == -1
    assert found["fine"]["spearman"]["all"] == nothing  # truth, the mean, is constant
    json.dumps(found, allow_nan=False)


def test_bootstrap_intervals_against_resampled_lists():
    generator, n = np.random.default_rng(3), 11
    truth, method = generator.normal(size=n), generator.integers(0, 4, n)
    found = nas.correlations({"method": method.tolist()}, [truth.tolist()], 5, resamples=200)["method"]
    half = np.argsort(-truth)[:6]
    expected = np.corrcoef(average_ranks(method), average_ranks(truth))[0, 1]
    assert found["spearman"]["all"]["value"] == pytest.approx(expected, abs=1e-12)
    expected = np.corrcoef(average_ranks(method[half]), average_ranks(truth[half]))[0, 1]
    assert found["spearman"]["top half"]["value"] == pytest.approx(expected, abs=1e-12)
    assert found["kendall"]["top half"]["value"] == pytest.approx(kendall_by_counting(method[half], truth[half]))
    resampled = collections.defaultdict(list)
    for counts in np.random.default_rng([5, 5]).multinomial(n, np.full(n, 1 / n), 200):
        drawn = np.arange(n).repeat(counts)
        top = drawn[np.argsort(-truth[drawn])][:6]
        for name, index in {"all": drawn, "top half": top}.items():
            if len(set(method[index])) > 1 and len(set(truth[index])) > 1:
                resampled[name].append(kendall_by_counting(method[index], truth[index]))
    assert 100 < len(resampled["top half"]) <= len(resampled["all"]) <= 200
    for name, values in resampled.items():
        interval = [found["kendall"][name][bound] for bound in ("low", "high")]
        assert interval == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=1e-12)


def test_the_ceiling_is_the_mean_over_pairs_of_repeats():
    a, b, c = [1.0, 2, 3, 4, 5], [2.0, 1, 4, 3, 5], [5.0, 4, 3, 2, 1]
    found = nas.correlations({}, [a, b, c], 0)["ceiling"]
    assert found["spearman"]["all"]["value"] == pytest.approx((0.8 - 1 - 0.8) / 3)
    assert found["kendall"]["all"]["value"] == pytest.approx((0.6 - 1 - 0.6) / 3)


# ------------------------------------------------------------------------- architectures, their size


def test_size_by_hand_and_by_pytorch():
    found = nas.size(Architecture((2, 3), (3, 3)), (1, 28, 28))
    assert found["parameters"] == (2 * 9 + 2 + 2) + (3 * 2 * 9 + 3 + 3) + (10 * 3 * 49 + 10)
    assert found["multiply_adds"] == 2 * 9 * 784 + 3 * 2 * 9 * 196 + 10 * 3 * 49
    for shape in ((1, 28, 28), (3, 32, 32), (1, 30, 22)):
        for architecture in nas.sample_architectures("wide", 5, "layer", shape, 0):
            theta = gtn.init_learner(architecture, shape)
            with FlopCounterMode(display=False) as counter:
                gtn.learner(theta, torch.zeros(2, *shape), architecture)
            found = nas.size(architecture, shape)
            assert found["parameters"] == len(theta)
            assert 2 * 2 * found["multiply_adds"] == counter.get_total_flops()  # two images; an add and a multiply


def test_architectures_are_distinct_and_the_first_of_a_longer_list():
    shape = (1, 28, 28)
    few, many = (nas.sample_architectures("wide", n, "instance", shape, 3) for n in (5, 400))
    assert many[:5] == few
    assert len(set(many)) == 400
    assert nas.sample_architectures("wide", 5, "instance", shape, 4) != few
    assert {len(a.filters) for a in many} == {1, 2, 3}  # a fourth block would leave one pixel, without variance
    deep = nas.sample_architectures("wide", 400, "layer", shape, 3)
    assert {len(a.filters) for a in deep} == {1, 2, 3, 4}
    assert {f for a in deep for f in a.filters} == set(range(4, 129))
    assert {k for a in deep for k in a.kernels} == {3, 5}
    assert {a.pooling for a in deep} == {"max", "average"}
    assert all(len(a.kernels) == len(a.filters) and a.normalization == "layer" for a in deep)


def test_the_whole_space_of_widths_and_one_more():
    whole = nas.sample_architectures("widths", 63 * 127, "batch", (1, 28, 28), 0)
    assert {a.filters for a in whole} == {(a, b) for a in range(1, 64) for b in range(1, 128)}
    assert {(a.kernels, a.pooling, a.normalization) for a in whole} == {((3, 3), "max", "batch")}
    with pytest.raises(gtn.InputError, match=r"--architectures 8002: --space widths has only 8001"):
        nas.sample_architectures("widths", 63 * 127 + 1, "batch", (1, 28, 28), 0)
    with pytest.raises(gtn.InputError, match="has only 500 for"):  # a single block of 4-128, 2 kernels, 2 poolings
        nas.sample_architectures("wide", 501, "instance", (1, 4, 4), 0)


# --------------------------------------------------------------------------- one architecture's measurements


def tiny(tiny_problem, **changes):
    teacher, data, *_ = tiny_problem(**changes)
    return teacher.config, data, lambda data: gtn.Curriculum(*(x.detach() for x in teacher(data)))


def test_teaching_an_architecture_is_gtn_by_hand(tiny_problem):
    _, data, source = tiny(tiny_problem, normalization="batch")
    architecture = Architecture((3, 2), (5, 3), "average", "batch")
    found, seconds = nas.train_briefly(source, data, 50, architecture, 8)
    with gtn.seeded(8, 3, 2, 3, 2, 5, 3, 0):
        theta = gtn.init_learner(architecture, (1, 8, 8), dtype=torch.float64)
    curriculum = source(data)
    theta = gtn.train_learner(theta, curriculum, architecture)
    with torch.no_grad():
        logits = gtn.learner(theta, data.validation.images[:50], architecture, curriculum.images[-1])
    assert found == (logits.argmax(1) == data.validation.labels[:50]).sum().item() / 50
    assert 0 < seconds < 60


def test_truth_is_adamw_over_whole_epochs(tiny_problem, monkeypatch):
    """60 images, batches of 20: every three steps all images once; the result is plain PyTorch's on these batches."""
    _, data, _ = tiny(tiny_problem)
    # on what it has seen it gets something right; 31 and 60 images: no accuracy above 0 fits both
    data = data._replace(validation=data.train, test=gtn.Split(*(x[:31] for x in data.train)))
    monkeypatch.setattr(nas, "BATCH", 20)
    original, seen = gtn.learner, []
    monkeypatch.setattr(gtn, "learner", lambda *a, **k: (seen.append((a, k)), original(*a, **k))[1])
    architecture = Architecture((2, 3), (3, 3), normalization="batch")
    found, _ = nas.train_fully(data, architecture, 5, 0, 0)
    monkeypatch.setattr(gtn, "learner", original)
    batches = [images for (_, images, *_), _ in seen[:5]]
    order = [[(data.train.images == image).flatten(1).all(1).nonzero().item() for image in batch] for batch in batches]
    assert sorted(order[0] + order[1] + order[2]) == list(range(60))
    assert len(set(order[3] + order[4])) == 40
    assert order[3] != order[0]

    with gtn.seeded(0, 4, 0, 2, 2, 3, 3, 3, 1):
        theta = gtn.leaf(gtn.init_learner(architecture, (1, 8, 8), dtype=torch.float64))
    optimizer = torch.optim.AdamW([theta], lr=1.0, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=5)
    for index in order:
        loss = torch.nn.functional.cross_entropy(
            original(theta, data.train.images[index], architecture), data.train.labels[index]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    trained = seen[-1][0][0]
    assert torch.equal(theta, trained)
    for name in ("validation", "test"):
        expected = gtn.accuracy(theta, getattr(data, name), architecture, data.train.images[order[-1]])
        assert found[name] == expected > 0


def test_repeats_of_truth_differ(tiny_problem):
    _, data, _ = tiny(tiny_problem)
    architecture = Architecture((4, 4), (3, 3))
    (a, _), (b, _), (c, _) = (nas.train_fully(data, architecture, 8, 0, repeat) for repeat in (0, 1, 0))
    assert a == c != b


def test_the_control_takes_the_best_of_the_grid(tiny_problem, monkeypatch):
    config, data, _ = tiny(tiny_problem)
    taught = []

    def train_briefly(source, data, images, architecture, seed):
        lr, momentum = source(data)[2:]
        taught.append((architecture, len(lr)))
        return 1 - abs(lr[0].item() - 0.1) - abs(momentum[-1].item() - 0.5), 0.0

    monkeypatch.setattr(nas, "train_briefly", train_briefly)
    found = nas.tune_control("widths", config, data, 0)
    assert (found["lr"], found["momentum"]) == (0.1, 0.5)
    assert len(found["grid"]) == 10
    best = max(row["validation"] for row in found["grid"])
    assert best == pytest.approx(1, abs=1e-6)
    architectures = {a for a, _ in taught}
    assert len(architectures) == 4
    assert not architectures & set(nas.sample_architectures("widths", 4, "instance", (1, 8, 8), 0))
    assert {steps for _, steps in taught} == {5}


# ------------------------------------------------------------------------------------------ searches


@functools.cache
def few_glyphs():
    data = gtn.load_data("glyphs", "", torch.device("cpu"))
    return gtn.Data(*(gtn.Split(x.images[:60], x.labels[:60]) for x in data[:3]), data.mean, data.std)


@pytest.fixture
def few(monkeypatch):
    """Glyphs, 60 images a split, which `gtn.load_data` returns from now on."""
    data = few_glyphs()
    monkeypatch.setattr(gtn, "load_data", lambda *_: data)
    return data


@pytest.fixture
def make_teacher(few, tmp_path):
    """A function (variant, *settings) -> path of a tiny teacher.pt on glyphs."""

    def make(variant="learned", *settings):
        settings = [*TINY, f"variant={variant}", "outer_steps=1", *settings]
        runs = tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        assert gtn.main(["--device", "cpu", "--runs", str(runs), "--set", *settings]) == 0
        return next(runs.glob("*/teacher.pt"))

    return make


@pytest.fixture
def run_nas(capsys, few):
    """nas.py's command line inside this process: (exit status, output, error)."""

    def run(teacher, *arguments):
        usual = ["--truth-steps", "2", "--architectures", "3", "--device", "cpu"]
        capsys.readouterr()
        status = nas.main([str(teacher), *usual, *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def without_seconds(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_search_end_to_end(make_teacher, run_nas):
    teacher = make_teacher()
    status, output, error = run_nas(teacher, "--architectures", 4, "--also", "5,6", "7")
    assert status == 0, error
    folder = teacher.parent / "nas-widths-s0"
    assert sorted(p.name for p in folder.iterdir()) == ["nas.json", "nas.jsonl", "search.json"]
    result, lines = json.loads((folder / "nas.json").read_text()), read(folder / "nas.jsonl")
    assert result["architectures"] == lines
    assert [x["index"] for x in lines] == [0, 1, 2, 3, 4, 5]
    assert [x["filters"] for x in lines[4:]] == [[5, 6], [7]]
    fields = set(
        "index filters kernels pooling normalization parameters multiply_adds teacher control truth seconds".split()
    )
    for x in lines:
        assert set(x) == fields
        assert len(x["truth"]) == 2
        accuracies = [x["teacher"], x["control"], *(t[split] for t in x["truth"] for split in ("validation", "test"))]
        assert all(0 <= a <= 1 for a in accuracies)
        assert all(x["seconds"][name] > 0 for name in ("teacher", "control", "truth"))
    expected = set("format teacher real seed space config environment truth architectures correlations seconds "
                   "cost_ratio best control sha256".split())  # fmt: skip
    assert set(result) == expected
    assert (result["teacher"], result["real"], result["seed"], result["space"]) == (str(teacher), None, 0, "widths")
    assert (result["truth"]["steps"], result["truth"]["repeats"]) == (2, 2)
    assert len(result["control"]["grid"]) == 10
    assert set(result["correlations"]) == {"teacher", "control", "parameters", "multiply_adds", "ceiling"}
    for x in lines:
        assert f"{'-'.join(map(str, x['filters']))}={x['parameters']}" in output
        assert re.search(rf"{'-'.join(map(str, x['filters']))} +{x['parameters']:,} +{x['multiply_adds']:,}", output)
    for word in ("Spearman", "Kendall", "precision", "ceiling", "top half", "best by teacher", "random", "grid"):
        assert word in output
    assert max(map(len, output.splitlines())) <= 100 + len(str(folder))
    assert "6/6" in error


def test_nas_json_by_hand(tmp_path):
    truth = {"steps": 1, "repeats": 2, "recipe": ""}
    origin = {"seed": 0, "truth": truth}
    values = [
        (0.2, 0.9, (0.6, 0.8), (0.5, 0.7)),
        (0.8, 0.1, (0.7, 0.6), (0.9, 0.7)),
        (0.5, 0.5, (0.9, 0.8), (0.8, 0.6)),
    ]
    architectures = [Architecture((f,), (3,)) for f in (1, 2, 3)]
    for i in (2, 0, 1):  # in the order of finishing
        teacher, control, validation, test = values[i]
        line = architectures[i]._asdict() | {
            "index": 9, "parameters": i, "multiply_adds": -i, "teacher": teacher, "control": control,
            "truth": [{"validation": v, "test": t} for v, t in zip(validation, test, strict=True)],
            "seconds": {"teacher": 1 + i, "control": 3, "truth": 100.0},
        }  # fmt: skip
        gtn.append_log(tmp_path / "nas.jsonl", line)
    result = nas.conclude(tmp_path, architectures, origin)
    assert [(x["index"], x["filters"]) for x in result["architectures"]] == [(0, [1]), (1, [2]), (2, [3])]
    assert result["best"]["teacher"] == {"index": 1, "test": pytest.approx(0.8)}
    assert result["best"]["control"] == {"index": 0, "test": pytest.approx(0.6)}
    assert result["best"]["truth"] == {"index": 2, "test": pytest.approx(0.7)}
    assert result["best"]["random"] == {"test": pytest.approx(0.7), "std": pytest.approx(0.1), "n": 3}
    assert result["seconds"]["teacher"] == {"mean": 2, "total": 6}
    assert result["cost_ratio"] == 50
    values = {name: x["spearman"]["all"]["value"] for name, x in result["correlations"].items()}  # truth: .7, .65, .85
    assert values == {"teacher": -0.5, "control": 0.5, "parameters": 0.5, "multiply_adds": -0.5, "ceiling": -0.0} | {
        "ceiling": pytest.approx(np.corrcoef([1, 2, 3], [2.5, 1, 2.5])[0, 1])
    }
    assert json.loads((tmp_path / "nas.json").read_text()) == {"format": 1} | result


def test_an_architecture_does_not_depend_on_the_others(make_teacher, run_nas, few, tmp_path):
    teacher = make_teacher("random")
    real = make_teacher("real")
    for n in (2, 4):
        assert run_nas(teacher, "--real", real, "--architectures", n, "--out", tmp_path / str(n))[0] == 0
    two, four = (without_seconds(read(tmp_path / str(n) / "nas.jsonl")) for n in (2, 4))
    assert four[:2] == two
    assert len(four) == 4
    sources = {"teacher": nas.read_source(teacher, "cpu")[2]}
    origin = {"seed": 0, "truth": {"steps": 2, "repeats": 2}, "config": {"validation_images": 50}}
    for line in reversed(four):  # in another order, with other random numbers drawn between
        torch.rand(3)
        architecture = Architecture(tuple(line["filters"]), tuple(line["kernels"]), line["pooling"])
        again = nas.measure(few, sources, architecture, origin)
        assert (again["teacher"], again["truth"]) == (line["teacher"], line["truth"])


def test_what_a_source_returns(make_teacher, few):
    for variant in gtn.VARIANTS:
        path = make_teacher(variant)
        config, content, source = nas.read_source(path, torch.device("cpu"))
        assert config.variant == variant
        one, two = source(few), source(few)
        assert torch.equal(one.images, two.images) == (variant not in ("random", "real"))
        assert torch.equal(one.images, content["curriculum"].images) == (variant not in ("random", "real"))
        assert torch.equal(one.lr, content["curriculum"].lr)


def test_a_search_of_more_architectures_continues_one_of_fewer(make_teacher, run_nas, tmp_path):
    teacher, real = make_teacher(), make_teacher("real")
    assert run_nas(teacher, "--real", real, "--out", tmp_path / "more", "--architectures", 2)[0] == 0
    two = read(tmp_path / "more" / "nas.jsonl")
    assert run_nas(teacher, "--real", real, "--out", tmp_path / "more", "--architectures", 3, "--resume")[0] == 0
    three = read(tmp_path / "more" / "nas.jsonl")
    assert three[:2] == two  # to the seconds: not measured again
    assert run_nas(teacher, "--real", real, "--out", tmp_path / "straight", "--architectures", 3)[0] == 0
    assert without_seconds(read(tmp_path / "straight" / "nas.jsonl")) == without_seconds(three)


def test_interrupted_and_resumed_equals_straight(make_teacher, run_nas, monkeypatch, tmp_path):
    teacher = make_teacher()
    original, calls, folder = nas.measure, [], tmp_path / "search"

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(nas, "measure", interrupted)
    monkeypatch.setattr(sys, "argv", ["nas.py", "a teacher.pt", "--resume", "--seed", "0"])
    status, output, error = run_nas(teacher, "--out", folder)
    assert status == 130
    assert error.splitlines()[-1].endswith("continue with python nas.py 'a teacher.pt' --seed 0 --resume")
    assert "Spearman" not in output
    first = read(folder / "nas.jsonl")
    assert len(first) == 1
    with open(folder / "nas.jsonl", "a") as file:
        file.write('{"index": 1, "filt')  # killed while it wrote
    search = (folder / "search.json").read_text()
    monkeypatch.setattr(nas, "tune_control", None)  # its grid is not searched again
    assert run_nas(teacher, "--out", folder, "--resume")[0] == 0
    assert len(calls) == 2 + 2
    lines = read(folder / "nas.jsonl")
    assert lines[0] == first[0]
    assert json.loads(search)["control"] == json.loads((folder / "search.json").read_text())["control"]
    calls.extend([None] * 9)
    before = (folder / "nas.jsonl").read_bytes()
    assert run_nas(teacher, "--out", folder, "--resume")[0] == 0  # finished: reported again
    assert len(calls) == 4 + 9
    assert (folder / "nas.jsonl").read_bytes() == before
    monkeypatch.undo()


def test_resume_starts_a_search_that_is_not_there(make_teacher, run_nas):
    teacher = make_teacher()
    assert run_nas(teacher, "--real", make_teacher("real"), "--resume", "--repeats", 1)[0] == 0
    result = json.loads((teacher.parent / "nas-widths-s0" / "nas.json").read_text())
    ceiling = result["correlations"]["ceiling"]
    assert ceiling["spearman"]["all"] == ceiling["precision"] == {"value": None, "low": None, "high": None}


def test_the_control_of_a_real_teacher(make_teacher, run_nas, few):
    teacher, real = make_teacher(), make_teacher("real", "inner_lr=0.07", "momentum=0.8")
    assert run_nas(teacher, "--real", real, "--space", "wide", "--architectures", 2)[0] == 0
    result = json.loads((teacher.parent / "nas-wide-s0" / "nas.json").read_text())
    curriculum = gtn.read_teacher(real)[1]["curriculum"]
    assert result["control"] == {"lr": curriculum.lr.tolist(), "momentum": curriculum.momentum.tolist(), "grid": None}
    assert (result["real"], result["space"]) == (str(real), "wide")
    line = result["architectures"][0]
    architecture = Architecture(tuple(line["filters"]), tuple(line["kernels"]), line["pooling"], line["normalization"])
    with gtn.seeded(0, 3, *nas.key(architecture)):
        theta = gtn.init_learner(architecture, (1, 28, 28))
        images, labels = gtn.sample(few.train, 3, 10)
    curriculum = curriculum._replace(images=images, labels=labels)
    theta = gtn.train_learner(theta, curriculum, architecture)
    split = gtn.Split(*(x[:50] for x in few.validation))
    assert gtn.accuracy(theta, split, architecture, images[-1]) == line["control"]


REFUSED = [
    (["--architectures", "0"], "--architectures 0: must be at least 2"),
    (["--architectures", "1"], "--architectures 1: must be at least 2"),
    (["--architectures", "9000"], "--architectures 9000: --space widths has only 8001"),
    (["--truth-steps", "-1"], "--truth-steps -1: must be a whole number from 1"),
    (["--repeats", "0"], "--repeats 0: must be a whole number from 1"),
    (["--seed", "-1"], "--seed -1: must be a whole number from 0"),
    (["--space", "narrow"], "--space narrow: must be one of widths, wide"),
    (["--device", "tpu"], "--device tpu: must be auto, cpu or cuda"),
    (["--also", "4,4,4,4,4"], "5 conv blocks are too deep for images of 28x28"),
    (["--also", "4,0"], "--also [(4, 0)]: must be the filters of each conv block"),
    (["--also", "many"], "--also ['many']: must be the filters"),
    (["--real", "nosuch.pt"], "cannot read nosuch.pt"),
    (["--nosuch"], "unrecognized arguments: --nosuch"),
    (["--repeats", "x"], "argument --repeats: invalid int value: 'x'"),
]


def test_bad_input(make_teacher, run_nas):
    teacher = make_teacher()
    for arguments, message in REFUSED:
        status, output, error = run_nas(teacher, *arguments)
        assert (status, output, error.count("\n")) == (2, "", 1), (arguments, error)
        assert error.startswith("nas.py: error: ")
        assert message in error
    assert not list(teacher.parent.glob("nas*"))


def test_teachers_that_are_none(make_teacher, run_nas, tmp_path):
    teacher = make_teacher()
    good = torch.load(teacher, weights_only=True)
    (tmp_path / "cut.pt").write_bytes(teacher.read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({key: x for key, x in good.items() if key != "mean"}, tmp_path / "lacks.pt")
    torch.save(good | {"mean": good["mean"] + 0.1}, tmp_path / "other.pt")
    torch.save(good | {"std": torch.ones(3)}, tmp_path / "colour.pt")
    other = "trained on other images than the glyphs"
    for name, message in {
        "nosuch.pt": "cannot read", ".": "cannot read", "cut.pt": "is damaged", "text.pt": "is damaged",
        "lacks.pt": "is damaged", "other.pt": other, "colour.pt": other,
    }.items():  # fmt: skip
        status, output, error = run_nas(tmp_path / name)
        assert (status, output, error.count("\n")) == (2, "", 1), (name, error)
        assert message in error
        assert name in error
    assert not list(tmp_path.glob("nas*"))


def test_data_of_another_size_than_the_teacher_knows(make_teacher, run_nas, few, monkeypatch):
    teacher = make_teacher()
    train = gtn.Split(few.train.images[..., :27], few.train.labels)
    monkeypatch.setattr(gtn, "load_data", lambda *_: few._replace(train=train))
    status, output, error = run_nas(teacher)
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert "trained on other images than the glyphs found here: name its folder with --data" in error


def test_a_control_of_another_kind(make_teacher, run_nas):
    teacher = make_teacher()
    for real, message in {
        make_teacher("pixels"): "variant=pixels, not real",
        make_teacher("real", "inner_steps=2"): "inner_steps=2, not 3",
    }.items():
        status, output, error = run_nas(teacher, "--real", real)
        assert (status, output, error.count("\n")) == (2, "", 1)
        assert message in error


def test_a_folder_is_not_overwritten(make_teacher, run_nas, tmp_path):
    teacher, real = make_teacher(), make_teacher("real")
    folder = teacher.parent / "nas-widths-s0"
    assert run_nas(teacher, "--real", real)[0] == 0
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for arguments, message in {
        (): "holds this search: continue it with --resume",
        ("--resume", "--truth-steps", 3): "holds a search with truth={'steps': 2",
        ("--resume", "--repeats", 3): "'repeats': 2",
        ("--resume", "--space", "wide", "--out", folder): "space=widths, now wide",
        ("--resume", "--seed", 1, "--out", folder): "seed=0, now 1",
    }.items():
        status, output, error = run_nas(teacher, "--real", real, *arguments)
        assert (status, output, error.count("\n")) == (2, "", 1)
        assert message in error
    other = make_teacher("random")
    assert "sha256={'teacher': " in run_nas(other, "--real", real, "--out", folder, "--resume")[2]
    assert "'real': None" in run_nas(teacher, "--out", folder, "--resume")[2]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before

    lacks = {key: value for key, value in json.loads(before["nas.jsonl"].splitlines()[0]).items() if key != "seconds"}
    for name, damage in [("search.json", "{"), ("nas.jsonl", "{}\n"), ("nas.jsonl", json.dumps(lacks) + "\n")]:
        (folder / name).write_text(damage)
        status, output, error = run_nas(teacher, "--real", real, "--resume")
        assert (status, output, error.count("\n")) == (2, "", 1)
        assert f"{name} is damaged" in error
        (folder / name).write_bytes(before[name])
    (folder / "search.json").unlink()
    assert "no search.json" in run_nas(teacher, "--real", real, "--resume")[2]
    (tmp_path / "file").write_text("mine")
    status, output, error = run_nas(teacher, "--real", real, "--out", tmp_path / "file")
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert "cannot write" in error
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------------------ real command lines

FEW = """
import sys, torch
sys.path.insert(0, {root!r})
import gtn, nas
splits, mean, std = torch.load({data!r})
gtn.load_data = lambda *_: gtn.Data(*(gtn.Split(*x) for x in splits), mean, std)
sys.exit(nas.main())
"""


def test_two_processes_find_what_one_finds(make_teacher, run_nas, few, tmp_path):
    teacher, real = make_teacher("random"), make_teacher("real")
    arguments = ["--real", real, "--seed", 5]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does
    assert run_nas(teacher, *arguments, "--out", tmp_path / "one")[0] == 0
    torch.set_num_threads(threads)
    torch.save(([tuple(x) for x in few[:3]], few.mean, few.std), tmp_path / "data")
    (tmp_path / "few.py").write_text(FEW.format(root=str(ROOT), data=str(tmp_path / "data")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, tmp_path / "few.py"]
    usual = ["--truth-steps", 2, "--architectures", 3, "--device", "cpu"]
    command = [*torchrun, teacher, *usual, *arguments, "--out", tmp_path / "two"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Spearman") == 1
    one, two = (json.loads((tmp_path / name / "nas.json").read_text()) for name in ("one", "two"))
    assert without_seconds(one["architectures"]) == without_seconds(two["architectures"])
    assert (one["correlations"], one["best"]) == (two["correlations"], two["best"])


def test_other_ranks_come_after_rank_0_and_end_where_it_failed(monkeypatch):
    told = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, _: told.append(tensor.item()))
    assert nas.rank_0_first(lambda: len(told), 0) == 0  # before the others are told
    with pytest.raises(gtn.InputError):
        nas.rank_0_first(lambda: nas.parse_arguments(["--nosuch"]), 0)
    assert told == [1, 0]
    with pytest.raises(SystemExit) as end:
        nas.rank_0_first(lambda: told.append("never"), 1)
    assert (end.value.code, told) == (2, [1, 0, 0])
    monkeypatch.setattr(dist, "broadcast", lambda tensor, _: tensor.fill_(1))
    assert nas.rank_0_first(lambda: 7, 1) == 7


def test_ranks_share_the_architectures_out(monkeypatch, tmp_path):
    monkeypatch.setattr(nas, "train_briefly", lambda *_: None)
    monkeypatch.setattr(nas, "measure", lambda data, sources, architecture, origin: {"filters": architecture.filters})
    monkeypatch.setattr(nas, "read_done", lambda *_: {Architecture((4,), (3,)): None})
    architectures = [Architecture((f,), (3,)) for f in range(7)]
    origin = {"seed": 0, "truth": {"repeats": 1}, "config": {"validation_images": 1}}
    for rank, expected in enumerate([[0, 3, 6], [1], [2, 5]]):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setattr(gtn, "rank_and_world", lambda rank=rank: (rank, 3))
        nas.measure_all(tmp_path / str(rank), None, {"teacher": None}, architectures, origin)
        assert [x["index"] for x in read(tmp_path / str(rank) / "nas.jsonl")] == expected


def test_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        nas.main(["--help"])
    output = capsys.readouterr().out
    for flag in "architectures space also seed real truth-steps repeats data device out resume".split():
        assert f"--{flag}" in output
    result = shell(tmp_path / "nosuch.pt", script="nas.py", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []

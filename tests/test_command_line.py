"""The command line: what it prints, what it refuses, and that a seed fixes everything."""

import json
import random
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, TINY, shell

import gtn


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder):
    return [line["meta_loss"] for line in read(folder / "log.jsonl") if line["event"] == "step"]


def test_a_run_end_to_end(tmp_path):
    result = shell("--outer-steps", 3, "--runs", tmp_path, "--seed", 7, "--device", "cpu", "--set", *TINY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "quick-learned-s7"
    for text in (
        "3 outer steps",
        "test accuracy, in order",
        "all-shuffled",
        "(2 fresh learners)",
        "next: python gtn.py",
    ):
        assert text in result.stdout
    assert "meta_loss=" in result.stderr
    assert "validation=" in result.stderr
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "log.jsonl",
        "snapshots",
        "teacher.pt",
    ]

    lines = read(folder / "log.jsonl")
    events = ["start", "validation", "step", "step", "validation", "step", "validation", "end"]
    assert [line["event"] for line in lines] == events
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 2, 3, 3, 3]
    config = json.loads((folder / "config.json").read_text())
    assert lines[0]["config"] == config["config"]
    assert config["config"]["inner_steps"] == 3
    assert config["config"]["filters"] == [[2, 3], [3, 4]]
    assert set(config["config"]) == {f.name for f in gtn.dataclasses.fields(gtn.Config)}
    where = config["environment"]
    assert where["torch"] == torch.__version__
    assert where["python"] == sys.version.split()[0]
    assert where["threads"] >= 1
    assert "--seed 7" in where["command"]
    end = lines[-1]
    assert set(end["test"]) == set(gtn.ORDERS)
    assert all(0 <= x <= 1 and figures["n"] == 2 for figures in end["test"].values() for x in figures["accuracies"])
    assert 50 < end["peak_memory"]["process"] < 3000
    assert lines[1]["accuracy"]["n"] == 2
    assert len(lines[1]["lr"]) == len(lines[1]["momentum"]) == 3

    teacher, content = gtn.read_teacher(folder / "teacher.pt")
    assert content["step"] == 3
    assert torch.equal(teacher(None).images, content["curriculum"].images)


def test_one_seed_gives_one_run(run_gtn, tmp_path):
    for runs in ("one", "two"):
        status, _, error = run_gtn("--outer-steps", "3", "--variant", "random", "--device", "cpu")
        assert status == 0, error
        (tmp_path / "runs").rename(tmp_path / runs)
    one, two = tmp_path / "one" / "quick-random-s0", tmp_path / "two" / "quick-random-s0"
    assert len(losses(one)) == 3
    assert losses(one) == losses(two)
    states = [gtn.read_teacher(folder / "teacher.pt")[0].state_dict() for folder in (one, two)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    run_gtn("--outer-steps", "3", "--variant", "random", "--device", "cpu", "--seed", "1")
    assert losses(tmp_path / "runs" / "quick-random-s1") != losses(one)


@pytest.mark.parametrize("variant", gtn.VARIANTS)
def test_variants_run_and_are_evaluated(run_gtn, tmp_path, variant):
    status, _, error = run_gtn("--outer-steps", "2", "--variant", variant)
    assert status == 0, error
    teacher = tmp_path / "runs" / f"quick-{variant}-s0" / "teacher.pt"
    status, output, error = run_gtn("--evaluate", str(teacher), "--learners", "2")
    assert status == 0, error
    evaluation = json.loads(teacher.with_name("evaluation.json").read_text())
    rows = {row["architecture"]: row for row in evaluation["rows"]}
    assert list(rows) == ["training", "half width", "double width", "one more block"]
    end = read(teacher.with_name("log.jsonl"))[-1]["test"]
    for order in gtn.ORDERS:
        assert rows["training"][order] == end[order]  # the same learners, from the file alone
    assert rows["training"]["transductive"] is None
    for name in ("half width", "double width", "one more block"):
        assert [rows[name][order] is None for order in gtn.ORDERS] == [False, True, True]
    assert torch.tensor(evaluation["curve"]).shape == (2, 3)
    assert f"{rows['training']['in order']['mean']:.3f}" in output


def test_an_evaluation_is_not_done_twice(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "1")[0] == 0
    teacher = tmp_path / "runs" / "quick-learned-s0" / "teacher.pt"
    for learners, resume, done in ((2, [], False), (2, ["--resume"], True), (3, ["--resume"], False), (2, [], False)):
        status, output, error = run_gtn("--evaluate", str(teacher), "--learners", str(learners), *resume)
        assert (status, "is there, of 2 learners after 1 outer steps" in output) == (0, done), error
        rows = json.loads(teacher.with_name("evaluation.json").read_text())["rows"]
        assert rows[0]["in order"]["n"] == learners


def test_transductive_figures_of_batch_normalisation(run_gtn, tmp_path):
    settings = [*TINY, "normalization=batch", "filters=[4,5]"]
    status, _, error = run_gtn("--outer-steps", "1", settings=settings)
    assert status == 0, error
    run_gtn("--evaluate", str(tmp_path / "runs" / "quick-learned-s0" / "teacher.pt"), "--learners", "3")
    evaluation = json.loads((tmp_path / "runs" / "quick-learned-s0" / "evaluation.json").read_text())
    row = evaluation["rows"][0]
    assert row["transductive"]["n"] == 3
    assert row["transductive"]["accuracies"] != row["in order"]["accuracies"]


def test_an_architecture_too_deep_to_evaluate(run_gtn, tmp_path):
    status, _, error = run_gtn("--outer-steps", "1", "--set", "filters=[2,2,2]")
    assert status == 0, error
    teacher = tmp_path / "runs" / "quick-learned-s0" / "teacher.pt"
    status, _, error = run_gtn("--evaluate", str(teacher), "--learners", "2")
    assert status == 0, error
    rows = json.loads(teacher.with_name("evaluation.json").read_text())["rows"]
    assert [row["in order"] is None for row in rows] == [False, False, False, True]


def test_help_lists_flags_configs_and_fields():
    result = shell("--help")
    assert result.returncode == 0
    flags = "config variant seed outer-steps device data runs set resume stop-after max-minutes evaluate learners"
    for flag in flags.split():
        assert f"--{flag}" in result.stdout
    for field in gtn.dataclasses.fields(gtn.Config):
        assert f"\n  {field.name} = {json.dumps(field.default)}" in result.stdout
    for name in gtn.load_configs():
        assert f"\n  {name} " in result.stdout


def test_configs_hold_differences_alone():
    defaults = {f.name: f.default for f in gtn.dataclasses.fields(gtn.Config)}
    configs = gtn.load_configs()
    for name, changes in configs.items():
        assert all(json.dumps(defaults[key]) != json.dumps(value) for key, value in changes.items()), name
    shapes = {name: (c.dataset, c.inner_steps, c.batch_size) for name in configs for c in [gtn.make_config(name)]}
    assert shapes.pop("quick")[0] == "glyphs"
    assert shapes == {
        "A": ("mnist", 20, 32), "B": ("mnist", 10, 32), "C": ("mnist", 10, 16), "nas": ("mnist", 20, 32),
        "paper": ("mnist", 32, 128),
    }  # fmt: skip
    assert gtn.make_config("A").filters == (64, 128)
    assert gtn.make_config("paper").filters == ((32, 63), (64, 127))


REFUSED = [
    (["--config", "nosuch"], "unknown config 'nosuch'"),
    (["--variant", "nosuch"], 'variant="nosuch": must be one of learned'),
    (["--set", "nosuch=1"], "unknown field 'nosuch'"),
    (["--set", "inner_steps=many"], 'inner_steps="many": must be a whole number from 1'),
    (["--set", "inner_steps"], "must be KEY=VALUE"),
    (["--set", "inner_steps=0"], "inner_steps=0: must be a whole number from 1"),
    (["--set", "batch_size=0"], "batch_size=0: must be a whole number from 2"),
    (["--set", "batch_size=2.5"], "batch_size=2.5: must be a whole number from 2"),
    (["--set", "filters=[0,4]"], "filters=[0, 4]: must be a list"),
    (["--set", "filters=[]"], "filters=[]: must be a list"),
    (["--set", "filters=[[5,4]]"], "a list with a number"),
    (["--set", "filters=[4,4,4,4,4,4]"], "too deep for images of 28x28"),
    (["--set", "outer_lr=NaN"], "outer_lr=NaN: must be a number above 0"),
    (["--set", "outer_beta1=1"], "outer_beta1=1.0: must be a number from 0 to below 1"),
    (["--set", "momentum=1"], "momentum=1.0: must be a number above 0 and below 1"),
    (["--set", "name=../elsewhere"], "name="),
    (["--set", "per_step=1"], "per_step=1: must be true or false"),
    (["--outer-steps", "0"], "outer_steps=0: must be a whole number from 1"),
    (["--outer-steps", "x"], "argument --outer-steps: invalid int value: 'x'"),
    (["--seed", "-1"], "seed=-1: must be a whole number from 0"),
    (["--stop-after", "0"], "--stop-after 0: must be a whole number from 1"),
    (["--max-minutes", "-1"], "--max-minutes -1.0: must be a number from 0"),
    (["--device", "tpu"], "--device tpu: must be auto, cpu or cuda"),
    (["--nosuch"], "unrecognized arguments: --nosuch"),
    (["--evaluate", "nosuch.pt"], "cannot read nosuch.pt"),
    (["--evaluate", "nosuch.pt", "--set", "seed=1"], "--evaluate goes with --learners"),
    (["--evaluate", "nosuch.pt", "--learners", "0"], "--learners 0: must be a whole number from 1"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input(run_gtn, tmp_path, arguments, message):
    status, output, error = run_gtn(*arguments)
    assert status == 2
    assert error.startswith("gtn.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert output == ""
    assert not (tmp_path / "runs").exists()


def test_bad_input_through_the_real_command_line(tmp_path):
    result = shell("--set", "filters=[[1,2,3]]", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(run_gtn):
    status, _, error = run_gtn("--device", "cuda")
    assert status == 2
    assert "no CUDA device" in error


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_no_data_and_no_download(tmp_path, monkeypatch, capsys, dataset):
    def offline(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    status = gtn.main(
        ["--config", "A", "--set", f"dataset={dataset}", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")]
    )
    error = capsys.readouterr().err
    assert status == 2
    for remedy in (str(tmp_path), "--data", "--config quick"):
        assert remedy in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{\n "quick": {,}\n}',
            "enclosed in double quotes: line 2 column 12",
        ),
        ("[1]", "configs.json is damaged, or not what it should be (ValueError: line 1"),
        ('{"quick": {"inner_stepz": 3}}', "unknown field 'inner_stepz'"),
        ("\xff", "configs.json is damaged"),
        ("", "line 1 column 1"),
        (None, "configs.json: No such file or directory"),
    ],
)
def test_bad_configs_file(tmp_path, text, message):
    shutil.copy(ROOT / "gtn.py", tmp_path)
    if text is not None:
        (tmp_path / "configs.json").write_text(text, encoding="latin-1")
    result = shell("--outer-steps", 1, script=tmp_path / "gtn.py", cwd=tmp_path)
    assert result.returncode == 2
    assert "configs.json" in result.stderr or "inner_stepz" in result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_malformed_input_never_ends_in_a_traceback(tmp_path, monkeypatch, capsys):
    """200 random mutations of configs.json and of --set: an InputError's one line, or a valid Config."""
    generator = random.Random(0)
    original = (ROOT / "configs.json").read_text()
    fields = [f.name for f in gtn.dataclasses.fields(gtn.Config)]
    values = ["", "-1", "0", "1e400", "1e5", "NaN", "Infinity", "null", "[]", "{}", "[[[]]]", '"', "true", "9" * 400,
              "x", "[1,[2,3]]", "[[3,2]]", '["a"]', "[" * 5000, "\ud800", "é", "1" * 5000, "..", "\0"]  # fmt: skip
    shutil.copy(ROOT / "gtn.py", tmp_path)
    monkeypatch.setattr(gtn, "__file__", str(tmp_path / "gtn.py"))
    monkeypatch.setattr(gtn, "train", lambda *_: 0)
    monkeypatch.setattr(gtn, "load_data", lambda *_: None)
    refused = 0
    for i in range(200):
        text, arguments = list(original), []
        if i % 2:
            for _ in range(generator.randint(1, 5)):
                at = generator.randrange(len(text))
                text[at : at + generator.randint(0, 9)] = generator.choice(
                    ['"', "{", "}", "[", ",", ":", "\n", "\\", "é", "0"]
                )
        else:
            arguments = ["--set", f"{generator.choice([*fields, 'nosuch', ''])}={generator.choice(values)}"]
        (tmp_path / "configs.json").write_text("".join(text))
        status = gtn.main(["--runs", str(tmp_path / "runs"), *arguments])
        error = capsys.readouterr().err
        assert status in (0, 2)
        assert (error.count("\n"), error.startswith("gtn.py: error: ")) == ((1, True) if status else (0, False)), error
        refused += status == 2
    assert refused > 100


def test_a_meta_loss_that_is_not_finite_stops_the_run(run_gtn, tmp_path, monkeypatch):
    original, calls = gtn.meta_gradient, []

    def explode(*arguments):
        calls.append(1)
        loss, *gradients = original(*arguments)
        return loss * (float("nan") if len(calls) == 3 else 1), *gradients

    monkeypatch.setattr(gtn, "meta_gradient", explode)
    status, _, error = run_gtn("--outer-steps", "5")
    line = error.splitlines()[-1]
    assert status == 2
    for text in ("meta-loss nan", "at outer step 2", "gradient norm"):
        assert text in line
    rate = float(re.search(r"inner learning rate ([\d.]+):", line)[1])
    assert rate == pytest.approx(0.005, rel=0.041)  # two steps of Adam, 0.02 each on its logarithm
    assert rate != 0.005
    teacher, content = gtn.read_teacher(tmp_path / "runs" / "quick-learned-s0" / "teacher.pt")
    assert content["step"] == 2
    assert all(p.isfinite().all() for p in teacher.state_dict().values())


def test_mnist_through_the_command_line(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gtn, "load_data", lambda *_: mnist._replace(test=gtn.Split(*(x[:500] for x in mnist.test))))
    settings = ["filters=[4,8]", "validation_images=200", "test_learners=1", "inner_steps=2"]
    assert gtn.main(["--config", "C", "--outer-steps", "1", "--runs", str(tmp_path), "--set", *settings]) == 0
    assert "C-learned-s0" in capsys.readouterr().out

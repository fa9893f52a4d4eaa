"""The real command line with a tiny budget: runs, evaluation, configs, everything that is
refused."""

import itertools
import json
import re
import sys

import pytest
import torch
from conftest import ROOT, TINY, shell

import gtn


def test_a_run_end_to_end(tmp_path):
    flags = ["--outer-steps", 3, "--runs", "", "--seed", 7, "--device", "cpu"]
    result = shell(*flags, "--set", *TINY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "quick-learned-s7"
    assert f"runs/{folder.name}: 3 outer steps" in result.stdout
    assert re.search(r"\nall-shuffled +0\.\d+ \+- 0\.\d+ \(2 fresh learners\)", result.stdout)
    lines = [line for line in result.stderr.splitlines() if "validation 0." in line]
    assert [line.split(",")[0] for line in lines] == [
        f"quick-learned-s7: outer step {step}" for step in (2, 3)
    ]
    assert result.stderr.count("\n") == len(lines)
    assert "\r" not in result.stderr  # no bar where there is no terminal
    files = ["checkpoint.pt", "config.json", "evaluation.json", "log.jsonl", "teacher.pt"]
    assert sorted(p.name for p in folder.iterdir()) == files

    lines = gtn.read(folder / "log.jsonl")
    assert [
        line["event"] for line in lines
    ] == "start validation step step validation step validation".split()
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 2, 3, 3]
    assert lines[1]["accuracy"]["n"] == 2
    assert len(lines[1]["lr"]) == len(lines[1]["momentum"]) == 3
    config = gtn.read(folder / "config.json")
    assert set(config["config"]) == {f.name for f in gtn.dataclasses.fields(gtn.Config)}
    assert (config["config"]["inner_steps"], config["config"]["filters"]) == (3, [[2, 3], [3, 4]])
    where = config["environment"]
    assert (where["torch"], where["python"]) == (torch.__version__, sys.version.split()[0])
    assert where["threads"] >= 1
    assert "--seed 7" in where["command"]
    teacher, content = gtn.read_teacher(folder / "teacher.pt")
    assert content["step"] == 3
    assert torch.equal(teacher(None).images, content["curriculum"].images)


@pytest.mark.parametrize("kind", [*gtn.VARIANTS, "learned-all-shuffled", "pixels-batch-shuffled"])
def test_variants_run_and_are_evaluated(run_gtn, tmp_path, kind):
    variant, _, order = kind.partition("-")
    orders = sorted(gtn.ORDERS, key=lambda x: x != (order or "in order"))  # its own comes first
    status, _, error = run_gtn(
        "--outer-steps", "2", "--variant", variant, "--set", f"order={orders[0]}"
    )
    assert status == 0, error
    teacher = tmp_path / "runs" / f"quick-{kind}-s0" / "teacher.pt"
    rows = gtn.read(teacher.with_name("evaluation.json"))["rows"]
    first = {(row["order"], row["every_step"]): row for row in rows}
    assert list(first) == [*((order, False) for order in orders), (orders[0], True)]
    assert torch.tensor(first[orders[0], True]["accuracies"]).shape == (1, 3)
    for learners in (3, 3, 2):  # more are measured, fewer are not
        status, output, error = run_gtn("--evaluate", teacher, "--learners", learners)
        assert status == 0, error
        rows = gtn.read(teacher.with_name("evaluation.json"))["rows"]
        assert [row["n"] for row in rows] == [3, 3, 3, 1]
        for row, order in zip(rows, orders, strict=False):
            assert row["order"] == order
            assert row["accuracies"][:2] == first[order, False]["accuracies"]  # the same learners
            assert f"{row['mean']:.3f} +- {row['std']:.3f} (3 fresh learners" in output


def test_an_evaluation_goes_on_where_it_was_stopped(run_gtn, tmp_path, monkeypatch):
    assert run_gtn("--outer-steps", "1")[0] == 0
    teacher = tmp_path / "runs" / "quick-learned-s0" / "teacher.pt"
    original = gtn.evaluate
    measured = []

    def stopped_after(count):
        def evaluate(teacher, data, split, learners, *test):
            if len(measured) == count:
                raise KeyboardInterrupt
            measured.append(test)
            return original(teacher, data, split, learners, *test)

        return evaluate

    monkeypatch.setattr(gtn, "evaluate", stopped_after(2))
    status, _, error = run_gtn("--evaluate", teacher, "--learners", 10)
    assert (status, error.count("\n")) == (130, 1)
    monkeypatch.setattr(gtn, "evaluate", stopped_after(None))
    assert run_gtn("--evaluate", teacher, "--learners", 10)[0] == 0
    expected = [*((order, False) for order in gtn.ORDERS), ("in order", True)]
    assert measured == expected
    assert run_gtn("--evaluate", teacher, "--learners", 10)[0] == 0
    assert len(measured) == 4


def test_another_teacher_of_the_folder_has_rows_of_its_own(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "1")[0] == 0
    folder = tmp_path / "runs" / "quick-learned-s0"
    before = (folder / "evaluation.json").read_bytes()
    content = gtn.read(folder / "teacher.pt")
    content["curriculum"]["lr"] *= 100
    gtn.write(folder / "B.pt", content)
    assert run_gtn("--evaluate", folder / "B.pt", "--learners", 2)[0] == 0
    assert (folder / "evaluation.json").read_bytes() == before
    assert gtn.read(folder / "B-evaluation.json")["rows"][0]["n"] == 2
    gtn.write(folder / "teacher.pt", content)
    assert run_gtn("--evaluate", folder / "teacher.pt", "--learners", 1)[0] == 0
    assert [row["n"] for row in gtn.read(folder / "evaluation.json")["rows"]] == [1] * 4


def test_an_evaluation_that_cannot_be_written_is_refused_before_the_work(
    run_gtn, tmp_path, monkeypatch
):
    assert run_gtn("--outer-steps", "1")[0] == 0
    teacher = tmp_path / "runs" / "quick-learned-s0" / "teacher.pt"
    (teacher.with_name("evaluation.json.tmp")).mkdir()
    monkeypatch.setattr(gtn, "evaluate", None)
    status, output, error = run_gtn("--evaluate", teacher, "--learners", 5)
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert "evaluation.json" in error


@pytest.mark.parametrize("variant", gtn.VARIANTS)
def test_plain_sgd_and_an_adam_without_momentum(run_gtn, tmp_path, variant):
    settings = [*TINY, "momentum=0", "outer_beta1=0", "order=in order", "test_learners=1"]
    assert run_gtn("--outer-steps", "2", "--variant", variant, settings=settings)[0] == 0
    folder = tmp_path / "runs" / f"quick-{variant}-s0"
    momentum = gtn.read_teacher(folder / "teacher.pt")[1]["curriculum"].momentum
    assert momentum.max() < 1e-4


def test_rows_of_an_evaluation(run_gtn, tmp_path):
    """Batch normalization is transductive, every row says so."""
    settings = [*TINY, "normalization=batch"]
    status, output, error = run_gtn("--outer-steps", "1", settings=settings)
    assert status == 0, error
    assert output.count(" fresh learners, transductive)") == 3
    rows = gtn.read(tmp_path / "runs" / "quick-learned-s0" / "evaluation.json")["rows"]
    assert all(row["transductive"] for row in rows)
    assert [row["order"] for row in rows] == [*gtn.ORDERS, "in order"]
    assert [row["n"] for row in rows] == [2, 2, 2, 1]


def test_help_lists_every_setting():
    result = shell("--help")
    assert result.returncode == 0
    for field in gtn.dataclasses.fields(gtn.Config):
        pattern = rf"^  {field.name} = .+\n      \w+.*\(.+\)$"
        assert re.search(pattern, result.stdout, re.MULTILINE), field.name


def test_configs_hold_differences_alone():
    defaults = {f.name: f.default for f in gtn.dataclasses.fields(gtn.Config)}
    configs = json.loads((ROOT / "configs.json").read_text())
    for name, changes in configs.items():
        assert all(
            json.dumps(defaults[key]) != json.dumps(value) for key, value in changes.items()
        ), name
    shapes = {
        name: (c.dataset, c.inner_steps, c.batch_size)
        for name in configs
        for c in [gtn.make_config(name)]
    }
    expected = {
        "quick": ("glyphs", 10, 32),
        "A": ("mnist", 20, 32),
        "B": ("mnist", 10, 32),
        "C": ("mnist", 10, 16),
        "cifar10": ("cifar10", 20, 32),
    }
    assert shapes.items() >= (expected | {"paper": ("mnist", 32, 128)}).items()
    assert gtn.make_config("A").filters == (64, 128)
    assert gtn.make_config("B", ["seed=3", "filters=[1,[2,3]]", "seed=4"]).seed == 4


REFUSED = [
    ("--config nosuch", "unknown config 'nosuch'"),
    ("--variant nosuch", 'variant="nosuch": must be one of learned'),
    ("--set order=sorted", 'order="sorted": must be one of in order, batch-shuffled, all-shuffled'),
    ("--set nosuch=1", "unknown setting 'nosuch'"),
    ("--set inner_steps=many", 'inner_steps="many": must be from 1 to 100,000, like 20'),
    ("--set inner_steps", 'inner_steps="": must be from 1'),
    ("--set inner_steps=0", "inner_steps=0: must be from 1"),
    ("--set batch_size=1", "batch_size=1: must be from 2"),
    ("--set batch_size=2.5", "batch_size=2.5: must be from 2"),
    ("--set filters=[0,4]", "filters=[0, 4]: must be from 1 to 65,535, like [64, 128]"),
    ("--set filters=[]", "filters=[]: must be"),
    ("--set filters=[[5,4]]", "filters=[[5, 4]]: must be"),
    ("--set filters=[[5,6,7]]", "filters=[[5, 6, 7]]: must be"),
    ("--set kernels=[3,4]", "kernels=[3, 4]: must be a list of 1, 3, 5, 7, like [3]"),
    ("--set kernels=[[3,5]]", "kernels=[[3, 5]]: must be a list"),
    ("--set filters=[4,4,4,4,4,4]", "too deep? (6 conv blocks, images [1, 28, 28]"),
    ("--set outer_lr=NaN", "outer_lr=NaN: must be from 0 to 1, like 0.02"),
    ("--set outer_beta1=1", "outer_beta1=1: must be from 0 to 0.9999, like 0.5"),
    ("--set name=../elsewhere", "name="),
    ("--set name=123", "name=123: must be letters, digits, - and _, like"),
    ("--set flat=1", "flat=1: must be one of false, true, like false"),
    ("--set hidden_size=2000000000", "hidden_size=2000000000: must be from 1 to 100,000"),
    ("--set inner_steps=2147483647", "inner_steps=2147483647: must be"),
    ("--set meta_batch_size=2000000000", "meta_batch_size=2000000000: must be"),
    ("--set filters=[1048575]", "filters=[1048575]: must be"),
    ("--set hidden_size=100000 generator_filters=100000", "out of memory: reduce batch_size"),
    ("--outer-steps 0", "outer_steps=0: must be from 1 to 10,000,000"),
    ("--outer-steps x", 'outer_steps="x": must be from 1 to 10,000,000'),
    ("--seed -1", "seed=-1: must be from 0"),
    ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    *[("--device cuda", "--device cuda: process 0, but 0 CUDA devices are here")]
    * (not torch.cuda.is_available()),
    ("--nosuch", "unrecognized arguments: --nosuch"),
    ("--evaluate nosuch.pt", "cannot read nosuch.pt"),
    ("--evaluate nosuch.pt --seed 0", "--evaluate goes with --learners"),
    ("--evaluate nosuch.pt --config A", "--evaluate goes with --learners"),
    ("--evaluate nosuch.pt --runs here", "--evaluate goes with --learners"),
    ("--init nosuch.pt", "cannot read nosuch.pt"),
    ("--evaluate nosuch.pt --learners 0", "--learners: must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_input(run_gtn, tmp_path, arguments, message):
    status, output, error = run_gtn(*arguments.split())
    assert (status, output, error.count("\n")) == (2, "", 1), error
    assert error.startswith("gtn.py: error: ")
    assert message in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("size", ["filters=[65535,65535]", "filters=[65535] batch_size=1000"])
def test_what_does_not_fit_into_memory(tmp_path, size):
    """In a process of its own: what has been allocated by then is given back."""
    result = shell(
        "--runs", tmp_path, "--device", "cpu", "--set", *TINY, *size.split(), cwd=tmp_path
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "gtn.py: error: out of memory: reduce batch_size"
    )
    assert "Traceback" not in result.stderr


def test_bad_input_through_the_real_command_line(tmp_path):
    result = shell("--set", "x" * 5000 + "=1", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "x" * 60 in result.stderr
    assert "x" * 61 not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_setting_is_an_input_error():
    """Every field with every value: a valid Config, or an error of one line."""
    values = [
        "",
        "null",
        "[]",
        "{}",
        "[[[]]]",
        '"',
        "9" * 400,
        *"-1 0 1e400 1e5 NaN Infinity true x".split(),
    ]
    values += [
        "[1,[2,3]]",
        "[[3,2]]",
        '["a"]',
        "[" * 5000,
        "\ud800",
        "é",
        "1" * 5000,
        "..",
        "\0",
        "[3,true]",
        "[3.0]",
    ]
    refused = []
    for name, value in itertools.product([*gtn.Config.__dataclass_fields__, "nosuch", ""], values):
        try:
            gtn.make_config("A", [f"{name}={value}"])
        except gtn.InputError as error:
            refused.append(str(error))
    assert len(refused) > 500
    assert not any("\n" in line for line in refused)


def test_damaged_configs(tmp_path, monkeypatch):
    monkeypatch.setattr(gtn, "__file__", str(tmp_path / "gtn.py"))
    for text in ("", "{", "[1]", '{"A": 1}', '{"A": {"nosuch": 1}}', '{"B": {}}'):
        (tmp_path / "configs.json").write_text(text)
        with pytest.raises(gtn.InputError):
            gtn.make_config("A")


def test_a_run_that_is_not_finite_stops_with_its_last_good_teacher(run_gtn, tmp_path, monkeypatch):
    original, calls = gtn.meta_gradient, []

    def explode(*arguments):
        calls.append(1)
        loss, *gradients = original(*arguments)
        return loss * (float("nan") if len(calls) == 3 else 1), *gradients

    monkeypatch.setattr(gtn, "meta_gradient", explode)
    status, _, error = run_gtn("--outer-steps", "50")
    line = error.splitlines()[-1]
    assert status == 2
    for text in ("outer step 3 diverged", "name=NAME", "reduce outer_lr", "--init"):
        assert text in line
    advice = line.split("--init ")[1].split()[0]
    assert advice == str(tmp_path / "runs" / "quick-learned-s0" / "teacher.pt")
    teacher, content = gtn.read_teacher(tmp_path / "runs" / "quick-learned-s0" / "teacher.pt")
    assert content["step"] == int(re.search(r"outer step (\d+)", line)[1]) - 1
    assert all(p.isfinite().all() for p in teacher.state_dict().values())

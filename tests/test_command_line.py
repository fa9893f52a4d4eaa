"""The real command line with a tiny budget: runs, evaluation, configs, everything that is
refused."""

import itertools
import json
import re

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
    lines = [line.partition(", validation 0.")[0] for line in result.stderr.splitlines()]
    assert lines == [f"quick-learned-s7: outer step {step}" for step in (2, 3)]  # no bar
    files = ["checkpoint.pt", "config.json", "evaluation.json", "log.jsonl", "teacher.pt"]
    assert sorted(p.name for p in folder.iterdir()) == files

    log = gtn.read(folder / "log.jsonl")
    events = "start validation step step validation step validation".split()
    assert [(x["event"], x["step"]) for x in log] == [
        *zip(events, (0, 0, 1, 2, 2, 3, 3), strict=True)
    ]
    assert log[1]["accuracy"]["n"] == 2
    assert len(log[1]["lr"]) == len(log[1]["momentum"]) == 3
    content = gtn.read(folder / "config.json")
    assert content["config"].items() >= {"inner_steps": 3, "filters": [[2, 3], [3, 4]]}.items()
    assert "--seed 7" in content["environment"]["command"]
    teacher, content = gtn.read_teacher(folder / "teacher.pt")
    assert content["step"] == 3
    assert torch.equal(teacher(None).images, content["curriculum"].images)


@pytest.mark.parametrize("kind", [*gtn.VARIANTS, "learned-all-shuffled", "pixels-batch-shuffled"])
def test_variants_run_and_are_evaluated(run_gtn, tmp_path, monkeypatch, kind):
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
    for learners in (3, 2):  # more are measured, fewer are not, nor said to be
        monkeypatch.setattr(gtn, "environment", lambda _, n=learners: {"device": n})
        status, output, error = run_gtn("--evaluate", teacher, "--learners", learners)
        assert status == 0, error
        content = gtn.read(teacher.with_name("evaluation.json"))
        rows = content["rows"]
        assert content["environment"] == {"device": 3}
        assert [row["n"] for row in rows] == [3, 3, 3, 1]
        for row, order in zip(rows, orders, strict=False):
            assert row["order"] == order
            assert row["accuracies"][:2] == first[order, False]["accuracies"]  # the same learners
            assert f"{row['mean']:.3f} +- {row['std']:.3f} (3 fresh learners" in output


def test_an_evaluation_goes_on_where_it_was_stopped(run_gtn, tmp_path, monkeypatch):
    assert run_gtn("--outer-steps", "1")[0] == 0
    teacher = tmp_path / "runs" / "quick-learned-s0" / "teacher.pt"
    original, begun = gtn.evaluate, []

    def evaluate(teacher, data, split, learners, *test):
        begun.append(test)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return original(teacher, data, split, learners, *test)

    monkeypatch.setattr(gtn, "evaluate", evaluate)
    results = [run_gtn("--evaluate", teacher, "--learners", 10) for _ in range(3)]
    assert [status for status, *_ in results] == [130, 0, 0]
    first, second, third = ((order, False) for order in gtn.ORDERS)
    assert begun == [first, second, third, third, ("in order", True)]


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


def test_another_teacher_of_the_folder_has_rows_of_its_own(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "1")[0] == 0
    folder = tmp_path / "runs" / "quick-learned-s0"
    before = (folder / "evaluation.json").read_bytes()
    content = gtn.read(folder / "teacher.pt")
    content["curriculum"]["lr"] *= 100
    for name in ("B.pt", "teacher.pt"):
        assert (folder / "evaluation.json").read_bytes() == before
        gtn.write(folder / name, content)
        assert run_gtn("--evaluate", folder / name, "--learners", 1)[0] == 0
    for name in ("B-evaluation.json", "evaluation.json"):
        assert [row["n"] for row in gtn.read(folder / name)["rows"]] == [1] * 4


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        gtn.main(["--help"])
    output = capsys.readouterr().out
    for field in gtn.dataclasses.fields(gtn.Config):
        pattern = rf"^  {field.name} = .+\n      \w+.*\(.+\)$"
        assert re.search(pattern, output, re.MULTILINE), field.name


def test_configs_hold_differences_alone():
    defaults = {f.name: f.default for f in gtn.dataclasses.fields(gtn.Config)}
    for name, changes in json.loads((ROOT / "configs.json").read_text()).items():
        for key, value in changes.items():
            assert json.dumps(defaults[key]) != json.dumps(value), (name, key)
        gtn.make_config(name)
    config = gtn.make_config("B", ["seed=3", "filters=[1,[2,3]]", "seed=4", "name=20"])
    expected = 10, (1, (2, 3)), 4, "20"
    assert (config.inner_steps, config.filters, config.seed, config.name) == expected


REFUSED = [
    ("--config nosuch", "unknown config 'nosuch'"),
    ("--variant nosuch", 'variant="nosuch": must be one of learned'),
    ("--set nosuch=1", "unknown setting 'nosuch'"),
    ("--set inner_steps=many", 'inner_steps="many": must be from 1 to 100,000, like 20'),
    ("--set inner_steps=0", "inner_steps=0: must be from 1"),
    ("--set filters=[0,4]", "filters=[0, 4]: must be from 1 to 65,535, like [64, 128]"),
    ("--set filters=[[5,4]]", "filters=[[5, 4]]: must be"),
    ("--set kernels=[3,4]", "kernels=[3, 4]: must be a list of 1, 3, 5, 7, like [3]"),
    ("--set filters=[4,4,4,4,4,4]", "too deep? (6 conv blocks, images [1, 28, 28]"),
    ("--set outer_lr=NaN", "outer_lr=NaN: must be from 0 to 1, like 0.02"),
    ("--set outer_beta1=1", "outer_beta1=1: must be from 0 to 0.9999, like 0.5"),
    ("--set name=../elsewhere", "must be letters, digits, ., - and _"),
    ("--set flat=1", "flat=1: must be one of false, true, like false"),
    ("--set hidden_size=100000 generator_filters=100000", "out of memory: reduce batch_size"),
    ("--outer-steps x", 'outer_steps="x": must be from 1 to 10,000,000'),
    ("--seed -1", "seed=-1: must be from 0"),
    ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    *[("--device cuda", "--device cuda: no CUDA device 0, there are 0")]
    * (not torch.cuda.is_available()),
    ("--runs /dev/null", "Not a directory"),
    ("--nosuch", "unrecognized arguments: --nosuch"),
    ("--evaluate nosuch.pt", "cannot read nosuch.pt"),
    ("--evaluate nosuch.pt --seed 0", "--evaluate goes with --learners"),
    ("--init nosuch.pt", "cannot read nosuch.pt"),
    ("--learners 5", "--learners: must be at least 1, and goes with --evaluate"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_input(run_gtn, tmp_path, arguments, message):
    status, output, error = run_gtn(*arguments.split())
    assert (status, output, error.count("\n")) == (2, "", 1), error
    assert error.startswith("gtn.py: error: ")
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_bad_input_through_the_real_command_line(tmp_path):
    result = shell("--set", "x" * 5000 + "=1", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "x" * 60 in result.stderr
    assert "x" * 61 not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_setting_is_an_input_error():
    """Every field with every value: a valid Config, or an error of one line."""
    values = 'null [] {} [[[]]] " -1 0 1e400 NaN true x [1,[2,3]] [[3,2]] ["a"] é [3,true]'.split()
    values += ["", "9" * 400, "1" * 5000, "[" * 5000, "\ud800", "\0"]
    refused = []
    for name, value in itertools.product([*gtn.Config.__dataclass_fields__, "nosuch", ""], values):
        try:
            gtn.make_config("A", [f"{name}={value}"])
        except gtn.InputError as error:
            refused.append(str(error))
    assert len(refused) > 500
    assert not any("\n" in line for line in refused)


def test_a_run_that_is_not_finite_stops_with_its_last_good_teacher(run_gtn, tmp_path, monkeypatch):
    original, calls = gtn.meta_gradient, []

    def explode(*arguments):
        calls.append(1)
        loss, *gradients = original(*arguments)
        return loss * (float("nan") if len(calls) == 3 else 1), *gradients

    monkeypatch.setattr(gtn, "meta_gradient", explode)
    status, _, error = run_gtn("--outer-steps", "50")
    path = tmp_path / "runs" / "quick-learned-s0" / "teacher.pt"
    assert status == 2
    for text in ("outer step 3 diverged", "name=NAME", "reduce outer_lr", f"--init {path} "):
        assert text in error.splitlines()[-1]
    teacher, content = gtn.read_teacher(path)
    assert content["step"] == 2
    assert all(p.isfinite().all() for p in teacher.state_dict().values())

"""What the tests share: a tiny float64 problem, and the real command line with a tiny budget."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gtn  # noqa: E402

TINY = """filters=[[2,3],[3,4]] inner_steps=3 batch_size=10 latent_size=4 hidden_size=8
generator_filters=4 meta_batch_size=16 validate_every=2 validation_learners=2 validation_images=50
test_learners=2 checkpoint_every=0""".split()


def tiny(normalization="instance", **changes):
    """(teacher, data, theta, architecture, batches), all float64, 8x8 images."""
    torch.manual_seed(0)
    sizes = {
        "inner_steps": 5,
        "batch_size": 4,
        "latent_size": 3,
        "hidden_size": 5,
        "generator_filters": 4,
    }
    settings = {"filters": (4, 3), "meta_batch_size": 12, "meta_loss_every": 2, "inner_lr": 0.05}
    config = gtn.Config(**sizes | settings | changes, normalization=normalization)
    images, one = torch.randn(3, 60, 1, 8, 8, dtype=torch.float64), torch.ones(1).double()
    splits = [gtn.Split(x, torch.randint(10, (60,))) for x in images]
    data = gtn.Data(*splits, 0 * one, one)
    teacher = gtn.Teacher(config, (1, 8, 8), 10).double()
    architecture = gtn.sample_architecture(config, 10)
    theta = gtn.init_learner(architecture, (1, 8, 8)).double()
    theta += 0.1 * torch.randn_like(theta)  # no zeros or ones that would hide a wrong derivative
    losses = [t % config.meta_loss_every == 0 for t in reversed(range(config.inner_steps))]
    batches = [gtn.sample(data.train, 12) if yes else None for yes in losses]
    return teacher, data, theta, architecture, batches


def as_module(theta, architecture, image_shape):
    """gtn's learner as an ordinary module whose parameters are those of theta."""
    module = gtn.make_learner(architecture, image_shape).to(theta)
    module.load_state_dict(gtn.to_parameters(theta, module))
    return module


@functools.cache
def few_glyphs(dataset="glyphs", folder="", device=None, load=gtn.load_data):
    """The first 400 images of each split of a data set."""
    data = load(dataset, folder, torch.device("cpu"))
    return gtn.Data(
        *(gtn.Split(*(x[:400] for x in split)) for split in data[:3]), data.mean, data.std
    )


def stopping(outer_step, stop_after):
    """gtn.outer_step, until somebody presses Ctrl-C after so many outer steps."""

    def step_or_stop(teacher, optimizer, data, step, *replay):
        if step == stop_after:
            raise KeyboardInterrupt
        return outer_step(teacher, optimizer, data, step, *replay)

    return step_or_stop


@pytest.fixture
def run_gtn(tmp_path, capsys, monkeypatch):
    """gtn's command line inside this process, tiny settings, runs under tmp_path: (exit
    status, output, error)."""
    monkeypatch.setattr(gtn, "load_data", few_glyphs)

    def run(*arguments, settings=TINY, stop_after=None):
        where = ["--runs", str(tmp_path / "runs"), "--set", *settings]
        if "--evaluate" in arguments:
            where = []
        with mock.patch.object(gtn, "outer_step", stopping(gtn.outer_step, stop_after)):
            capsys.readouterr()
            status = gtn.run("gtn.py", gtn.main, [*where, "--device", "cpu", *map(str, arguments)])
            return status, *capsys.readouterr()

    return run


def shell(*arguments, script="gtn.py", **options):
    """The real command line: subprocess.run of `python gtn.py ...`, or of `python` and the
    words of a list."""
    words = script if isinstance(script, list) else [ROOT / script]
    command = [sys.executable, *map(str, words), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": ""}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, **options
    )

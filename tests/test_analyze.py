"""Figures and tables of runs and searches that are made up here, so that every number in them is known."""

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
from conftest import ROOT, shell
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
         "control": x - generator.uniform(0.3, 0.5), "truth": [{"validation": x - 0.001, "test": x}, {"validation": x + 0.001, "test": x}],
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
        "seconds": {key: {"mean": x, "total": n * x} for key, x in (("teacher", 0.4), ("control", 0.5), ("truth", 40.0))},
        "best": best | {"random": {"test": 0.95, "std": 0.01, "n": n}},
    }  # fmt: skip
    gtn.write_json(folder / "nas.json", content)
    return content

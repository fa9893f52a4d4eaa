"""The benchmark measures the same thing by every method: exact in float64, at a tiny size."""

import importlib.util

import benchmark
import pytest
import torch

import gtn

METHODS = ["full graph", "flat", *["higher"] * bool(importlib.util.find_spec("higher"))]


@pytest.fixture
def config():
    return gtn.make_config("A", benchmark.TINY)


def test_methods_have_one_meta_gradient(config):
    assert max(benchmark.check(config, METHODS, torch.device("cpu")).values()) < 1e-12


@pytest.mark.parametrize("part", [1, 2, 3])
def test_another_meta_gradient_is_refused_and_nothing_timed(config, monkeypatch, part):
    def wrong(*problem):
        found = list(right(*problem))
        found[part] = found[part] * (1 + 1e-8)
        return found

    right = gtn.meta_gradient_flat
    monkeypatch.setattr(gtn, "meta_gradient_flat", wrong)
    monkeypatch.setattr(benchmark, "time", None)  # has no clock
    with pytest.raises(gtn.InputError, match=r"A: flat has another meta-gradient, by 1\.0e-08: nothing was timed"):
        benchmark.speed(config, METHODS, 1, "cpu")


def test_a_record_has_every_round(config):
    record = benchmark.speed(config, METHODS, 4, "cpu")
    assert list(record) == METHODS
    assert all(len(row["seconds"]) == 4 and min(row["seconds"]) > 0 for row in record.values())

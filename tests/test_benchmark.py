"""The benchmark measures the same thing by every method: exact in float64, at a tiny size."""

import benchmark
import pytest
import torch

import gtn

KINDS = ["full graph", "one-step segments"]


@pytest.fixture
def config():
    """Config A at the size of --quick."""
    return benchmark.make_config("A", quick=True)


def test_methods_have_one_meta_gradient(config, monkeypatch):
    differences, operations = benchmark.check(KINDS, config, torch.device("cpu"), torch.float64)
    assert differences["one-step segments"] < 1e-12
    assert operations["full graph"] < operations["one-step segments"] < 2 * operations["full graph"]

    def wrong(*problem):
        loss, d_images, *others = right(*problem)
        return loss, d_images * (0.99 if problem[-1] == 1 else 1), *others

    right = gtn.meta_gradient
    monkeypatch.setattr(gtn, "meta_gradient", wrong)
    with pytest.raises(gtn.InputError, match=r"A: the meta-gradient of one-step segments differs .* nothing was timed"):
        benchmark.check(KINDS, config, torch.device("cpu"), torch.float64)


def test_learners_trained_together_are_those_trained_alone(config):
    teacher, data = benchmark.make_problem(config, torch.device("cpu"), torch.float64)
    architecture = gtn.sample_architecture(config)
    thetas = [gtn.init_learner(architecture, benchmark.IMAGE_SHAPE, dtype=torch.float64) for _ in range(3)]
    together = benchmark.train_together(thetas, teacher(data).detach(), architecture)
    alone = torch.stack([gtn.train_learner(theta, teacher(data), architecture) for theta in thetas]).detach()
    assert (alone - torch.stack(thetas)).abs().amax() > 1e-3
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)


def test_a_record_has_every_round(config):
    record = benchmark.speed(config, KINDS, 2, "cpu", keep=False)
    assert len(record["matrix_product_rates"]) == 2
    for row in record["methods"].values():
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0 < row["operations"]

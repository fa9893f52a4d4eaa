"""Exact values: meta-gradient, optimizer, learner, teacher, data."""

import dataclasses
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from torch import nn

import gtn


def phi_gradient(teacher, data, theta, architecture, batches, segment):
    """Meta-loss and {name: d meta-loss / d parameter of the teacher}, by gtn.meta_gradient."""
    teacher.config = dataclasses.replace(teacher.config, segment=segment)
    teacher.zero_grad()
    curriculum = teacher(data)
    loss, *gradients = gtn.meta_gradient(theta, curriculum, architecture, data.train, batches, segment)
    torch.autograd.backward((curriculum.images, curriculum.lr, curriculum.momentum), gradients)
    return loss, {name: p.grad.clone() for name, p in teacher.named_parameters()}


def finite_differences(teacher, data, theta, architecture, batches, step=1e-6):
    """{name: central differences of the meta-loss in every coordinate}; the meta-loss written out once more."""

    def meta_loss():
        curriculum, velocity, losses = teacher(data).detach(), torch.zeros_like(theta), []
        weights = theta
        for t, rows in enumerate(batches):
            weights = weights.detach().requires_grad_()
            logits = gtn.learner(weights, curriculum.images[t], architecture)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, curriculum.labels[t]), weights)
            velocity = curriculum.momentum[t] * velocity + gradient
            weights = (weights - curriculum.lr[t] * velocity).detach()
            if rows is not None:
                logits = gtn.learner(weights, data.train.images[rows], architecture, reference=curriculum.images[t])
                losses.append(F.cross_entropy(logits, data.train.labels[rows]))
        return sum(losses) / len(losses)

    def difference(coordinates, i):
        value = coordinates[i].item()
        coordinates[i] = value + step
        above = meta_loss()
        coordinates[i] = value - step
        below = meta_loss()
        coordinates[i] = value
        return (above - below) / (2 * step)

    differences = {}
    for name, parameter in teacher.named_parameters():
        coordinates = parameter.data.view(-1)
        values = [difference(coordinates, i) for i in range(len(coordinates))]
        differences[name] = torch.stack(values).view_as(parameter)
    return differences


def relative_errors(computed, expected):
    return {name: ((computed[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected}


@pytest.mark.parametrize("normalization", gtn.NORMALIZATIONS)
def test_meta_gradient_equals_finite_differences(tiny_problem, normalization):
    teacher, *problem = tiny_problem(normalization)
    expected = finite_differences(teacher, *problem)
    assert {"latent", "log_lr", "logit_momentum", "generator.0.weight", "generator.11.bias"} <= set(expected)
    for segment in (teacher.config.inner_steps, 1):
        errors = relative_errors(phi_gradient(teacher, *problem, segment)[1], expected)
        assert max(errors.values()) < 1e-6, (segment, errors)


def test_finite_differences_notice_a_first_order_meta_gradient(tiny_problem, monkeypatch):
    teacher, *problem = tiny_problem()
    expected = finite_differences(teacher, *problem)
    original = torch.autograd.grad

    def forgetful(outputs, inputs, grad_outputs=None, create_graph=False, materialize_grads=True):
        return original(outputs, inputs, grad_outputs, allow_unused=True, materialize_grads=True)

    monkeypatch.setattr(torch.autograd, "grad", forgetful)
    for segment in (5, 1):
        errors = relative_errors(phi_gradient(teacher, *problem, segment)[1], expected)
        assert errors["latent"] == pytest.approx(1)  # nothing at all reaches the images
        assert errors["log_lr"] > 1e-3


@pytest.mark.parametrize("normalization", gtn.NORMALIZATIONS)
@pytest.mark.parametrize("variant", ["learned", "random_fixed", "pixels"])
def test_segments_equal_the_full_graph(tiny_problem, normalization, variant):
    teacher, *problem = tiny_problem(normalization, variant=variant, inner_steps=7)
    loss, expected = phi_gradient(teacher, *problem, 7)
    for segment in (1, 2, 3, 100):
        other_loss, gradient = phi_gradient(teacher, *problem, segment)
        assert other_loss == pytest.approx(loss.item(), abs=1e-12)
        for name in expected:
            torch.testing.assert_close(gradient[name], expected[name], rtol=1e-10, atol=1e-12)


def test_meta_loss_every_counts_from_the_last_inner_step(tiny_problem):
    for every, expected in ((1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (5, [5]), (9, [5])):
        *_, batches = tiny_problem(meta_loss_every=every)
        assert [t for t, rows in enumerate(batches, 1) if rows is not None] == expected


def test_inner_optimizer_equals_torch_sgd():
    torch.manual_seed(0)
    theta = torch.randn(12, dtype=torch.float64)
    velocity, reference = torch.zeros_like(theta), theta.clone().requires_grad_()
    optimizer = torch.optim.SGD([reference], lr=0.07, momentum=0.8)
    for _ in range(5):
        gradient = torch.randn_like(theta)
        theta, velocity = gtn.sgd(theta, velocity, gradient, 0.07, 0.8)
        reference.grad = gradient
        optimizer.step()
        torch.testing.assert_close(theta, reference.detach(), rtol=0, atol=1e-12)


def as_module(theta, architecture, image_shape):
    """The same learner in plain PyTorch."""
    layers, (channels, height, width) = [], image_shape
    for filters, kernel in zip(architecture.filters, architecture.kernels, strict=True):
        norm = {
            "layer": nn.GroupNorm(1, filters), "instance": nn.InstanceNorm2d(filters, affine=True),
            "batch": nn.BatchNorm2d(filters, track_running_stats=False),
        }[architecture.normalization]  # fmt: skip
        pool = nn.MaxPool2d(2) if architecture.pooling == "max" else nn.AvgPool2d(2)
        layers += [nn.Conv2d(channels, filters, kernel, padding="same", bias=False), pool, norm, nn.LeakyReLU(0.01)]
        channels, height, width = filters, height // 2, width // 2
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, 10)).double()
    *values, weight, bias = gtn.parameters(theta, architecture, image_shape)
    weight = weight.view(10, height, width, channels).permute(0, 3, 1, 2).flatten(1)  # as nn.Flatten has it
    for parameter, value in zip(module.parameters(), [*values, weight, bias], strict=True):
        parameter.data.copy_(value)
    return module


@pytest.mark.parametrize("normalization", gtn.NORMALIZATIONS)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("filters", "kernels", "pooling"), [((4, 6), (3, 3), "max"), ((5, 3, 2), (5, 3, 5), "average")]
)
def test_learner_is_the_network_it_says(normalization, channels, filters, kernels, pooling):
    torch.manual_seed(0)
    architecture = gtn.Architecture(filters, kernels, pooling, normalization)
    image_shape = (channels, 16, 16)
    theta = gtn.init_learner(architecture, image_shape, dtype=torch.float64)
    theta += 0.1 * torch.randn_like(theta)
    images = torch.randn(6, *image_shape, dtype=torch.float64)
    expected = as_module(theta, architecture, image_shape)(images)
    torch.testing.assert_close(gtn.learner(theta, images, architecture), expected, rtol=1e-10, atol=1e-10)


def test_sampled_learners_have_the_parameters_of_their_size():
    torch.manual_seed(0)
    config = gtn.Config(filters=((32, 63), (64, 127)))
    seen = set()
    for _ in range(300):
        architecture = gtn.sample_architecture(config)
        (f1, f2) = architecture.filters
        seen.update([f1, -f2])
        count = len(gtn.init_learner(architecture, (1, 28, 28)))
        assert count == (9 * f1 + 2 * f1) + (9 * f1 * f2 + 2 * f2) + (10 * 49 * f2 + 10)
    assert {32, 63, -64, -127} <= seen  # both ends included
    assert min(-x for x in seen if x < 0) == 64
    assert max(x for x in seen if x > 0) == 63


def test_initialisation():
    torch.manual_seed(0)
    architecture, image_shape = gtn.Architecture((64, 128), (3, 3)), (1, 28, 28)
    theta = gtn.init_learner(architecture, image_shape)
    conv1, scale, shift, conv2, _, _, weight, bias = gtn.parameters(theta, architecture, image_shape)
    assert conv2.is_contiguous(memory_format=torch.channels_last)
    gain = 2 / (1 + 0.01**2)
    assert conv1.var().item() == pytest.approx(gain / 9, rel=0.15)
    assert conv2.var().item() == pytest.approx(gain / (9 * 64), rel=0.02)
    assert scale.eq(1).all()
    assert all(p.eq(0).all() for p in (shift, weight, bias))


def without_padding(theta, widest, filters, image_shape):
    """The parameters of a padded learner's own filters: theta of the learner that has these alone."""
    *blocks, weight, bias = gtn.parameters(theta, widest, image_shape)
    parts, channels = [], image_shape[0]
    for f, weights, scale, shift in zip(filters, blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        parts += [weights[:f, :channels].permute(0, 2, 3, 1), scale[:f], shift[:f]]
        channels = f
    parts += [weight.view(10, -1, widest.filters[-1])[..., :channels], bias]
    return torch.cat([x.flatten() for x in parts])


@pytest.mark.parametrize("normalization", ["instance", "batch"])
def test_a_padded_learner_is_the_learner_without_padding(normalization):
    """After training, and in its meta-gradient; and its padding stays zero."""
    torch.manual_seed(0)
    config = gtn.Config(filters=((2, 5), (1, 4), (3, 6)), normalization=normalization)
    image_shape, seen = (2, 16, 16), []
    images, labels = torch.randn(5, 4, *image_shape, dtype=torch.float64), torch.randint(10, (5, 4))
    lr, momentum = torch.full((5,), 0.05, dtype=torch.float64), torch.full((5,), 0.7, dtype=torch.float64)
    curriculum = gtn.Curriculum(images, labels, lr, momentum)
    real = gtn.Split(torch.randn(30, *image_shape, dtype=torch.float64), torch.randint(10, (30,)))
    problem = real, torch.randint(30, (5, 7))
    for _ in range(6):
        padded, widest = gtn.padded_learner(config, image_shape, dtype=torch.float64)
        scales = gtn.parameters(padded, widest, image_shape)[1:-2:3]
        small = widest._replace(filters=tuple(int(scale.sum()) for scale in scales))
        seen.append(small.filters)
        theta = without_padding(padded, widest, small.filters, image_shape)
        expected = gtn.meta_gradient(theta, curriculum, small, *problem, 2)
        for x, y in zip(gtn.meta_gradient(padded, curriculum, widest, *problem, 2), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
        padded = gtn.train_learner(padded, curriculum, widest)
        theta = gtn.train_learner(theta, curriculum, small)
        found = without_padding(padded, widest, small.filters, image_shape)
        torch.testing.assert_close(found, theta, rtol=1e-9, atol=1e-12)
        assert padded.count_nonzero() == found.count_nonzero()
    assert len(set(seen)) > 3
    assert widest.filters == (5, 4, 6)


def test_a_padded_learner_starts_as_any():
    """With the variance of Kaiming's initialisation, and every number of filters of its ranges."""
    torch.manual_seed(0)
    config, image_shape, variances, filters = gtn.Config(filters=((8, 12), (50, 54))), (1, 28, 28), [], []
    for _ in range(200):
        theta, widest = gtn.padded_learner(config, image_shape)
        conv1, scale1, _, conv2, scale2, *_ = gtn.parameters(theta, widest, image_shape)
        f1, f2 = int(scale1.sum()), int(scale2.sum())
        filters.append((f1, f2))
        variances.append((conv1[:f1].var().item() * 9, conv2[:f2, :f1].var().item() * 9 * f1))
    assert np.mean(variances, axis=0) == pytest.approx([2, 2], rel=0.03)
    assert [set(found) for found in zip(*filters, strict=True)] == [{8, 9, 10, 11, 12}, {50, 51, 52, 53, 54}]


@pytest.mark.parametrize(("normalization", "deepest"), [("layer", 4), ("batch", 4), ("instance", 3)])
def test_too_deep_for_the_image(normalization, deepest):
    def shapes(blocks):
        return gtn.parameter_shapes(gtn.Architecture((4,) * blocks, (3,) * blocks, "max", normalization), (1, 28, 28))

    assert shapes(deepest)[-2] == (10, 4 * (28 // 2**deepest) ** 2)
    with pytest.raises(gtn.InputError, match=f"{deepest + 1} conv blocks are too deep for images of 28x28"):
        shapes(deepest + 1)


@pytest.mark.parametrize("normalization", gtn.NORMALIZATIONS)
def test_predictions_do_not_depend_on_the_other_images(tiny_problem, normalization):
    _, data, theta, architecture, _ = tiny_problem(normalization)
    reference, images = data.train.images[:8], data.test.images[8:20]
    together = gtn.learner(theta, images, architecture, reference)
    alone = torch.cat([gtn.learner(theta, image[None], architecture, reference) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    leaking = gtn.learner(theta, images, architecture)
    assert torch.allclose(leaking, together) == (normalization != "batch")


@pytest.mark.parametrize(("shape", "module"), [((6, 5), nn.BatchNorm1d), ((6, 2, 4, 3), nn.BatchNorm2d)])
def test_batch_norm_is_pytorchs_for_each_inner_step(shape, module):
    torch.manual_seed(0)
    ours, theirs = gtn.BatchNorm(shape[1], 6).double(), module(shape[1], track_running_stats=False).double()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.data.copy_(nn.init.normal_(p))
    steps = 3 + torch.randn(4, *shape, dtype=torch.float64)
    expected = torch.cat([theirs(x) for x in steps])
    torch.testing.assert_close(ours(steps.flatten(0, 1)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("normalization", gtn.NORMALIZATIONS)
def test_the_loss_on_many_real_images_is_their_mean(tiny_problem, normalization):
    """It is taken in parts; so are its gradients in theta and, where it is read, in the last synthetic batch."""
    _, data, theta, architecture, _ = tiny_problem(normalization)
    rows, reference = torch.randint(60, (300,)), data.test.images[:8]
    found = gtn.pulled_from_real(theta, data.train, rows, architecture, reference)
    inputs = gtn.leaf(theta), gtn.leaf(reference)
    loss = F.cross_entropy(
        gtn.learner(inputs[0], data.train.images[rows], architecture, inputs[1]), data.train.labels[rows]
    )
    expected = loss.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_variants(tiny_problem):
    for variant in gtn.VARIANTS:
        teacher, data, *_ = tiny_problem(variant=variant, batch_size=12)
        first, second = teacher(data), teacher(data)
        assert first.images.shape == (5, 12, 1, 8, 8)
        assert first.lr.tolist() == pytest.approx([0.05] * 5)
        assert first.momentum.tolist() == pytest.approx([0.5] * 5)
        assert torch.equal(first.images, second.images) == (variant in ("learned", "random_fixed", "pixels")), variant
        learned = {name.split(".")[0] for name, _ in teacher.named_parameters()}
        expected = {"learned": {"latent", "generator"}, "pixels": {"images"}, "real": set()}.get(variant, {"generator"})
        assert learned == expected | {"log_lr", "logit_momentum"}, variant
        if variant in ("learned", "random_fixed"):
            assert teacher.latent.shape == (5, 12, 3)
            assert teacher.latent.requires_grad == (variant == "learned")
        if variant != "real":
            assert first.labels[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_real_variant_teaches_with_training_images(tiny_problem):
    teacher, data, *_ = tiny_problem(variant="real")
    curriculum = teacher(data)
    pairs = {(tuple(x.flatten().tolist()), int(y)) for x, y in zip(*data.train, strict=True)}
    drawn = zip(curriculum.images.flatten(0, 1), curriculum.labels.flatten(), strict=True)
    assert all((tuple(x.flatten().tolist()), int(y)) in pairs for x, y in drawn)


def test_every_variant_takes_outer_steps(tiny_problem):
    for variant in gtn.VARIANTS:
        teacher, data, *_ = tiny_problem(variant=variant, outer_steps=3)
        optimizer = torch.optim.Adam(teacher.parameters())
        before = {name: p.clone() for name, p in teacher.named_parameters()}
        for step in range(2):
            meta_loss, norm, _ = gtn.outer_step(teacher, optimizer, data, step)
            assert 0 < meta_loss < 20
            assert norm > 0
        assert all((p != before[name]).any() for name, p in teacher.named_parameters()), variant


def steps_of_a_rank(rank, world, learners, steps, folder):
    """Outer steps in this process, one of `world`; the teacher's parameters and the losses end in a file."""
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    teacher, data, *_ = tiny(learners_per_step=learners, filters=((2, 4), (3, 5)), variant="random")
    optimizer = torch.optim.Adam(teacher.parameters())
    losses = torch.stack([gtn.outer_step(teacher, optimizer, data, step) for step in range(steps)])
    torch.save([losses, *(p.detach() for p in teacher.parameters())], folder / f"{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_ranks_are_one_process_with_two_learners(tmp_path):
    """Own learners, architectures, latent inputs and real batches on each rank; the same phi on both and on one."""
    arguments = (2, 2, 3, tmp_path)
    torch.multiprocessing.spawn(steps_of_a_rank, arguments, nprocs=2)
    steps_of_a_rank(0, 1, 4, 3, tmp_path)
    one, *ranks = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for rank in ranks:
        for x, y in zip(rank, one, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_learners_of_an_outer_step_are_averaged(tiny_problem):
    """The gradient of two learners per step is the mean of the two learners' own."""
    teacher, data, *_ = tiny_problem(learners_per_step=2, outer_lr=1e-30)  # phi stays
    optimizer = torch.optim.SGD(teacher.parameters())
    meta_loss, *_ = gtn.outer_step(teacher, optimizer, data, 5)
    both = [p.grad.clone() for p in teacher.parameters()]
    losses, singles = [], []
    for k in range(2):
        optimizer.zero_grad()
        with gtn.seeded(teacher.config.seed, 3, 5, k):
            losses.append(gtn.teach(teacher, data))
        singles.append([p.grad.clone() for p in teacher.parameters()])
    assert losses[0] != losses[1]
    torch.testing.assert_close(meta_loss, sum(losses) / 2)
    for mean, *each in zip(both, *singles, strict=True):
        torch.testing.assert_close(mean, sum(each) / 2)


def test_an_outer_step_draws_by_seed_and_step_alone(tiny_problem):
    teacher, data, *_ = tiny_problem(outer_lr=1e-30)  # phi stays
    optimizer = torch.optim.SGD(teacher.parameters())
    first = gtn.outer_step(teacher, optimizer, data, 3)
    stream = torch.get_rng_state()
    torch.randn(5)
    assert gtn.outer_step(teacher, optimizer, data, 4)[0] != first[0]
    assert torch.equal(gtn.outer_step(teacher, optimizer, data, 3), first)
    torch.set_rng_state(stream)
    expected = torch.randn(5)
    torch.set_rng_state(stream)
    gtn.outer_step(teacher, optimizer, data, 3)
    assert torch.equal(torch.randn(5), expected)  # and leaves everybody else's numbers alone


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def to_cuda(x):
    """A tensor, or a tuple of such, on the CUDA device."""
    return type(x)(*map(to_cuda, x)) if isinstance(x, tuple) else x.cuda()


@on_cuda
@pytest.mark.parametrize("normalization", gtn.NORMALIZATIONS)
def test_cuda_gives_the_same_meta_gradient(tiny_problem, normalization):
    teacher, data, theta, architecture, batches = tiny_problem(normalization)
    _, expected = phi_gradient(teacher, data, theta, architecture, batches, 2)
    batches = [rows if rows is None else rows.cuda() for rows in batches]
    _, gradient = phi_gradient(teacher.cuda(), to_cuda(data), theta.cuda(), architecture, batches, 2)
    for name in expected:
        torch.testing.assert_close(gradient[name].cpu(), expected[name], rtol=1e-8, atol=1e-10)


@on_cuda
@pytest.mark.parametrize("variant", ["learned", "random"])
def test_a_replayed_graph_is_the_ordinary_step(tiny_problem, variant):
    phi = []
    for replay in (False, True):
        teacher, data, *_ = tiny_problem(variant=variant)
        teacher, data = teacher.cuda(), to_cuda(data)
        optimizer = torch.optim.Adam(teacher.parameters())
        learn = gtn.replayed(gtn.teach, teacher, data) if replay else None
        losses = [gtn.outer_step(teacher, optimizer, data, step, learn) for step in range(8)]
        phi.append([torch.stack(losses), *teacher.parameters()])
    for ordinary, replayed in zip(*phi, strict=True):
        torch.testing.assert_close(replayed, ordinary, rtol=1e-8, atol=1e-10)


def test_an_unroll_without_graph_keeps_none(tiny_problem):
    teacher, data, theta, architecture, _ = tiny_problem()
    for state in gtn.unroll(*gtn.at_rest(theta), teacher(data).detach(), architecture):
        assert all(part.grad_fn is None for part in state)


def test_learning_rate_follows_the_cosine(tiny_problem):
    teacher, data, *_ = tiny_problem(outer_steps=4, outer_lr=0.08, outer_lr_end=0.25)
    optimizer = torch.optim.Adam(teacher.parameters())
    rates = [(gtn.outer_step(teacher, optimizer, data, step), optimizer.param_groups[0]["lr"])[1] for step in range(4)]
    assert rates == pytest.approx([0.08, 0.08 - 0.06 * 0.1464466094, 0.05, 0.02 + 0.06 * 0.1464466094])


def test_scalar_learning_rate_and_momentum(tiny_problem):
    teacher, *problem = tiny_problem(per_step=False)
    assert teacher.log_lr.shape == (1,)
    scalar = phi_gradient(teacher, *problem, 1)[1]
    each, *problem = tiny_problem(per_step=True)
    per_step = phi_gradient(each, *problem, 1)[1]
    for name in ("log_lr", "logit_momentum"):
        torch.testing.assert_close(scalar[name].sum(), per_step[name].sum(), rtol=1e-9, atol=1e-12)


def test_orders(tiny_problem):
    teacher, data, *_ = tiny_problem(inner_steps=6)
    curriculum = teacher(data)
    assert curriculum.shuffled("in order") is curriculum
    torch.manual_seed(1)
    batches, everything = curriculum.shuffled("batch-shuffled"), curriculum.shuffled("all-shuffled")
    rows = {tuple(x.flatten().tolist()) for x in curriculum.images}
    assert {tuple(x.flatten().tolist()) for x in batches.images} == rows
    assert not torch.equal(batches.images, curriculum.images)
    assert {tuple(x.flatten().tolist()) for x in everything.images} != rows

    def pairs(c):
        images_labels = zip(c.images.flatten(0, 1), c.labels.flatten(), strict=True)
        return sorted((*x.flatten().tolist(), int(y)) for x, y in images_labels)

    assert pairs(curriculum) == pairs(batches) == pairs(everything)
    assert torch.equal(everything.lr, curriculum.lr)


def test_fresh_learners_depend_on_their_number_alone(tiny_problem):
    teacher, data, *_ = tiny_problem(variant="random", filters=((2, 9), (2, 9)))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    two, four = (gtn.evaluate(teacher, data, data.test, n) for n in (2, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert gtn.evaluate(teacher, data, data.test, 2) == two == four[:2]
    assert len({float(gtn.fresh_learner(teacher, data, k)[0][0].sum()) for k in range(4)}) == 4
    theta, _, architecture = gtn.fresh_learner(teacher, data, 3)
    shuffled, _, other = gtn.fresh_learner(teacher, data, 3, "all-shuffled")
    assert architecture == other
    assert torch.equal(theta, shuffled)


def test_accuracy_and_its_curve(tiny_problem):
    teacher, data, *_ = tiny_problem()
    (curve,) = gtn.accuracy_curve(teacher, data, data.test, 1)
    assert len(curve) == 5
    assert [curve[-1]] == gtn.evaluate(teacher, data, data.test, 1)
    theta, curriculum, architecture = gtn.fresh_learner(teacher, data, 0)
    theta = gtn.train_learner(theta, curriculum, architecture)
    right = sum(gtn.learner(theta, x[None], architecture).argmax() == y for x, y in zip(*data.test, strict=True))
    assert curve[-1] == pytest.approx(right.item() / 60)


def test_summary_by_hand():
    figures = gtn.summary([0.5, 0.7, 0.9])
    assert figures["mean"] == pytest.approx(0.7)
    assert figures["std"] == pytest.approx(0.2)
    assert figures["n"] == 3
    assert gtn.summary([0.5])["std"] is None


def test_glyphs():
    started = time.monotonic()
    data = gtn.load_data("glyphs", "nowhere", torch.device("cpu"))
    assert time.monotonic() - started < 5
    again = gtn.load_data("glyphs", "nowhere", torch.device("cpu"))
    assert torch.equal(data.test.images, again.test.images)
    assert not set(gtn.FONTS) & set(gtn.TEST_FONTS)
    images = torch.cat([split.images for split in data[:3]]).flatten(1)
    assert images.shape == (25_000, 784)
    assert len(torch.unique(images, dim=0)) == 25_000  # disjoint
    for split in data[:3]:
        assert split.labels.bincount().tolist() == [len(split.labels) // 10] * 10
    unseen = [image.flatten().tolist() for image in (data.test.images[1:1000:2] * data.std + data.mean)]
    drawn, _ = gtn.draw_glyphs(2_500, gtn.TEST_FONTS, torch.Generator().manual_seed(2))
    torch.testing.assert_close(torch.tensor(unseen), drawn[:500].flatten(1), rtol=0, atol=1e-5)  # every second one
    assert data.train.images.mean().item() == pytest.approx(0, abs=1e-3)
    assert data.train.images.std().item() == pytest.approx(1, abs=1e-3)


def test_mnist(mnist):
    assert [tuple(split.images.shape) for split in mnist[:3]] == [(n, 1, 28, 28) for n in (50_000, 10_000, 10_000)]
    assert mnist.mean.item() == pytest.approx(0.1307, abs=1e-3)
    assert mnist.std.item() == pytest.approx(0.3081, abs=1e-3)
    assert mnist.test.labels[:5].tolist() == [7, 2, 1, 0, 4]

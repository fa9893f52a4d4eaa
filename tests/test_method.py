"""Exact values: meta-gradient, optimizer, learner, teacher, data."""

import dataclasses
import functools
import importlib.util
import itertools

import benchmark
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, as_module, tiny

import gtn

NORMALIZATIONS = tuple(gtn.NORMALIZATIONS)
CASES = [
    *((kind, "in order") for kind in NORMALIZATIONS),
    ("instance", "all-shuffled"),
]


def taught(teacher, data):
    """The curriculum that a learner meets, the same each time."""
    with gtn.seeded(1):
        return teacher(data).shuffled(teacher.config.order)


def phi_gradient(teacher, data, theta, architecture, batches, flat=False):
    """Meta-loss and {name: d meta-loss / d parameter of the teacher}, by the full graph or flat."""
    teacher.config = dataclasses.replace(teacher.config, flat=flat)
    teacher.zero_grad()
    curriculum = taught(teacher, data)
    method = gtn.meta_gradient_flat if flat else gtn.meta_gradient
    loss, *gradients = method(theta, curriculum, architecture, batches)
    torch.autograd.backward((curriculum.images, curriculum.lr, curriculum.momentum), gradients)
    return loss, {name: p.grad.clone() for name, p in teacher.named_parameters()}


def written_out(teacher, data, theta, architecture, batches):
    """The meta-loss, its inner loop written out with torch.optim.SGD."""
    theta, losses = gtn.leaf(theta.clone()), []
    sgd = torch.optim.SGD([theta])
    with torch.no_grad():
        curriculum = taught(teacher, data)
    for images, labels, lr, momentum, real in zip(*curriculum, batches, strict=True):
        sgd.param_groups[0].update(lr=lr.item(), momentum=momentum.item())
        sgd.zero_grad()
        F.cross_entropy(gtn.logits(theta, images, architecture), labels).backward()
        sgd.step()
        if real is not None:
            outputs = gtn.logits(theta.detach(), real.images, architecture)
            losses.append(F.cross_entropy(outputs, real.labels))
    return sum(losses) / len(losses)


@functools.cache
def finite_differences(normalization, order, step=2e-7):
    """{name: central differences of the meta-loss in every coordinate of phi}."""
    teacher, *problem = tiny(normalization, order=order, inner_steps=3)

    def difference(coordinates, i):
        value = coordinates[i].item()
        coordinates[i] = value + step
        above = written_out(teacher, *problem)
        coordinates[i] = value - step
        below = written_out(teacher, *problem)
        coordinates[i] = value
        return (above - below) / (2 * step)

    differences = {}
    for name, parameter in teacher.named_parameters():
        coordinates = parameter.data.view(-1)
        numbers = [difference(coordinates, i) for i in range(len(coordinates))]
        differences[name] = torch.stack(numbers).view_as(parameter)
    return differences


def relative_errors(computed, expected):
    return {k: ((computed[k] - x).norm() / x.norm()).item() for k, x in expected.items()}


@pytest.mark.parametrize(("normalization", "order"), CASES)
def test_meta_gradient_equals_finite_differences(normalization, order):
    teacher, *problem = tiny(normalization, order=order, inner_steps=3)
    expected = finite_differences(normalization, order)
    for flat in (False, True):
        errors = relative_errors(phi_gradient(teacher, *problem, flat)[1], expected)
        assert max(errors.values()) < 1e-5, (flat, errors)


def test_finite_differences_notice_a_first_order_meta_gradient(monkeypatch):
    teacher, *problem = tiny(inner_steps=3)
    expected = finite_differences("instance", "in order")
    original = torch.autograd.grad

    def forgetful(outputs, inputs, grad_outputs=None, **_):
        return original(outputs, inputs, grad_outputs, allow_unused=True, materialize_grads=True)

    monkeypatch.setattr(torch.autograd, "grad", forgetful)
    for flat in (False, True):
        errors = relative_errors(phi_gradient(teacher, *problem, flat)[1], expected)
        assert errors["latent"] == pytest.approx(1)  # nothing at all reaches the images
        assert errors["log_lr"] > 1e-3


def nesterov(theta, velocity, images, labels, lr, _, architecture, create_graph=False):
    """Another inner_step, with weight decay and a momentum of its own."""
    loss = F.cross_entropy(gtn.logits(theta, images, architecture), labels)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=create_graph)
    gradient = gradient + 0.01 * theta
    velocity = 0.9 * velocity + gradient
    return theta - lr * (gradient + 0.9 * velocity), velocity


@pytest.mark.parametrize("variant", ["learned", "random_fixed", "pixels"])
@pytest.mark.parametrize("inner_step", [gtn.inner_step, nesterov])
def test_flat_equals_the_full_graph(monkeypatch, variant, inner_step):
    """Both follow whatever inner optimizer there is."""
    monkeypatch.setattr(gtn, "inner_step", inner_step)
    teacher, *problem = tiny(variant=variant, inner_steps=7)
    loss, expected = phi_gradient(teacher, *problem)
    flat_loss, gradient = phi_gradient(teacher, *problem, flat=True)
    sgd = pytest.approx(written_out(teacher, *problem).item(), abs=1e-12)
    assert (loss.item() == sgd) == (inner_step is not nesterov)
    assert flat_loss == pytest.approx(loss.item(), abs=1e-12)
    for name in expected:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["flat", *["higher"] * bool(importlib.util.find_spec("higher"))])
def test_what_the_benchmark_times_is_one_meta_gradient(method):
    config, gradients = gtn.make_config("A", [*TINY, "meta_loss_every=2"]), []
    for name in ("full graph", method):
        teacher, step = benchmark.make_step(name, config, torch.device("cpu"), torch.float64)
        step(0)
        gradients.append([p.grad for p in teacher.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("order", "every", "expected"),
    [
        ("in order", 1, [1, 2, 3, 4, 5]),
        ("batch-shuffled", 2, [1, 3, 5]),
        ("all-shuffled", 5, [5]),
        ("in order", 9, [5]),
    ],
)
def test_what_a_learner_meets(monkeypatch, order, every, expected):
    """Images in an order of its own; meta-losses, counted from the last inner step."""
    teacher, data, theta, architecture, _ = tiny(order=order, meta_loss_every=every)
    met, original = [], gtn.meta_gradient
    monkeypatch.setattr(gtn, "meta_gradient", lambda *a: met.append(a) or original(*a))
    for key in (1, 2):
        with gtn.seeded(key):
            gtn.add_meta_gradient(teacher, data, architecture, theta)
        with gtn.seeded(key):
            assert torch.equal(met[-1][1].images, teacher(data).shuffled(order).images)
        batches = met[-1][-1]
        assert [t for t, x in enumerate(batches, 1) if x and len(x.labels) == 12] == expected
    assert torch.equal(met[0][1].images, met[1][1].images) == (order == "in order")


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_the_shipped_learner(normalization, pooling):
    """Layer by layer; changes with gtn.make_learner."""
    torch.manual_seed(0)
    architecture = gtn.Architecture((4, 6), (3, 5), pooling, normalization, 7)
    theta = gtn.init_learner(architecture, (2, 16, 12)).double()
    theta += 0.1 * torch.randn_like(theta)
    module = as_module(theta, architecture, (2, 16, 12))
    assert torch.equal(gtn.to_vector(module.parameters()), theta)
    named = dict(module.named_parameters())
    images = torch.randn(6, 2, 16, 12, dtype=torch.float64)

    def weight_and_bias(layer):
        bias = named.pop(f"{layer}.bias", None)
        if normalization != "weight":
            return named.pop(f"{layer}.weight"), bias
        name = f"{layer}.parametrizations.weight"
        g, v = named.pop(f"{name}.0.g"), named.pop(f"{name}.original")
        return (g[:, None] * F.normalize(v.flatten(1))).view_as(v), bias

    x = images
    for layer, filters, kernel in ((0, 4, 3), (4, 6, 5)):
        x = F.conv2d(x, *weight_and_bias(layer), padding=kernel // 2)
        x = F.max_pool2d(x, 2) if pooling == "max" else F.avg_pool2d(x, 2)
        if normalization not in ("weight", "none"):
            dims = {"instance": (2, 3), "layer": (1, 2, 3), "batch": (0, 2, 3)}[normalization]
            variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
            scale, shift = (p.view(filters, 1, 1) for p in weight_and_bias(layer + 2))
            x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
        x = F.leaky_relu(x, 0.01)
    x = F.leaky_relu(F.linear(x.flatten(1), *weight_and_bias(9)), 0.01)
    x = F.linear(x, *weight_and_bias(11))
    assert not named
    torch.testing.assert_close(gtn.logits(theta, images, architecture), x)


def test_the_shipped_initialisation():
    """Changes with gtn.make_learner."""
    torch.manual_seed(0)
    architecture = gtn.Architecture((64, 128), (3, 3), "max", "instance", 50)
    theta = gtn.init_learner(architecture, (1, 28, 28))
    parameters = gtn.to_parameters(theta, gtn.blueprint(architecture, (1, 28, 28)))
    conv1, scale, shift, conv2, _, _, hidden, zero, last, bias = parameters.values()
    assert conv1.var().item() == pytest.approx(2 / 9, rel=0.15)
    assert conv2.var().item() == pytest.approx(2 / (9 * 64), rel=0.02)
    assert scale.eq(1).all()
    assert hidden.std().item() == pytest.approx(0.002, rel=0.02)
    torch.testing.assert_close(last @ last.T, torch.eye(10))
    assert all(p.eq(0).all() for p in (shift, zero, bias))
    learner = gtn.make_learner(architecture._replace(hidden_units=0), (1, 28, 28))
    assert learner[9].weight.eq(0).all()
    learner = gtn.make_learner(architecture._replace(normalization="weight"), (1, 28, 28))
    assert learner[9].weight.var().item() == pytest.approx(2 / (128 * 49), rel=0.02)
    assert learner[11].weight.var().item() == pytest.approx(2 / 50, rel=0.15)


def stock_layers():
    """{type: (layer, its input)} of the modules of which learners and generators are made."""
    torch.manual_seed(0)
    found = {}
    for normalization, pooling in itertools.product(NORMALIZATIONS, ("max", "average")):
        architecture = gtn.Architecture((2,), (3,), pooling, normalization, 3, classes=3)
        chains = [(gtn.make_learner(architecture, (1, 8, 8)), torch.randn(3, 1, 8, 8))]
        config = gtn.Config(latent_size=2, hidden_size=3, generator_filters=2)
        chains.append((gtn.make_generator(config, (1, 8, 8), 3), torch.randn(3, 5)))
        for chain, x in chains:
            x = x.double()
            for layer in chain.double():
                groups = getattr(layer, "num_groups", "")  # of GroupNorm: instance or layer
                found[f"{type(layer).__name__}{groups}"] = layer, x
                x = layer(x).detach()
    return found


@pytest.mark.parametrize("name", stock_layers())
def test_second_derivatives_of_every_layer(name):
    """gradcheck alone passes for PyTorch's own weight_norm, whose second derivative is wrong."""
    layer, x = stock_layers()[name]
    named = dict(layer.named_parameters())

    def output(x, *parameters):
        values = dict(zip(named, parameters, strict=True))
        return torch.func.functional_call(layer, values, x)

    inputs = [(y + 0.1 * torch.randn_like(y)).detach().requires_grad_() for y in named.values()]
    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(output, (x, *inputs))
    assert torch.autograd.gradgradcheck(output, (x, *inputs))


def test_sampled_learners_reach_both_ends():
    torch.manual_seed(0)
    config = gtn.Config(filters=((32, 63), (64, 127)))
    pairs = [gtn.sample_architecture(config, 10).filters for _ in range(600)]
    first, second = zip(*pairs, strict=True)
    assert (min(first), max(first), min(second), max(second)) == (32, 63, 64, 127)


def test_a_learner_with_running_state_is_refused(monkeypatch):
    monkeypatch.setitem(gtn.NORMALIZATIONS, "batch", torch.nn.BatchNorm2d)
    with pytest.raises(gtn.InputError, match=r"no running state, such as 2\.running_mean"):
        gtn.blueprint(gtn.Architecture((3,), (3,), "max", "batch", 77), (3, 8, 8))


def test_a_cuda_graph_is_of_one_architecture():
    torch.manual_seed(0)
    several = {"filters": (64, (64, 127))}, {"kernels": (3, 5)}, {"pooling": ("max", "average")}
    for settings in ({}, {"kernels": (5,), "pooling": ("average",)}, {"least_blocks": 1}, *several):
        config = gtn.Config(**settings)
        architectures = {gtn.sample_architecture(config, 10) for _ in range(20)}
        assert gtn.cuda_graph_possible(config) == (len(architectures) == 1), settings


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_predictions_do_not_depend_on_the_other_images(normalization):
    """Except with batch normalization, which is called transductive."""
    _, data, theta, architecture, _ = tiny(normalization)
    images = data.test.images[8:20]
    together = gtn.logits(theta, images, architecture)
    alone = torch.cat([gtn.logits(theta, image[None], architecture) for image in images])
    assert torch.allclose(together, alone, rtol=1e-10) == (normalization != "batch")
    if normalization != "batch":  # more images than go through the network at once
        many = gtn.Split(images.repeat(20, 1, 1, 1), torch.arange(240) % 7)
        loss = F.cross_entropy(together.repeat(20, 1), many.labels)
        torch.testing.assert_close(
            gtn.real_loss(theta, many, architecture), loss, rtol=1e-10, atol=1e-12
        )


def test_variants():
    for variant in gtn.VARIANTS:
        teacher, data, *_ = tiny(variant=variant, batch_size=12)
        first, second = teacher(data), teacher(data)
        assert first.images.shape == (5, 12, 1, 8, 8)
        assert first.lr.tolist() == pytest.approx([0.05] * 5)
        assert first.momentum.tolist() == pytest.approx([0.5] * 5)
        assert torch.equal(first.images, second.images) == (
            variant in ("learned", "random_fixed", "pixels")
        ), variant
        learned = {name.split(".")[0] for name, _ in teacher.named_parameters()}
        expected = {"learned": {"latent", "generator"}, "pixels": {"images"}, "real": set()}.get(
            variant, {"generator"}
        )
        assert learned == expected | {"log_lr", "logit_momentum"}, variant
        if variant != "real":
            assert first.labels[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert tiny(momentum=0)[0](data).momentum.max() < 1e-4  # plain SGD


def test_learners_of_an_outer_step_are_averaged():
    """Two, drawn by seed, step and number alone: the mean of their losses and gradients."""
    teacher, data, *_ = tiny(learners_per_step=2, outer_lr=0)  # phi stays
    optimizer, losses = torch.optim.SGD(teacher.parameters()), []
    result = gtn.outer_step(teacher, optimizer, data, 5)
    both = [p.grad.clone() for p in teacher.parameters()]
    norm = torch.cat([g.flatten() for g in both]).norm().item()
    optimizer.zero_grad()
    for k in range(2):
        with gtn.seeded(teacher.config.seed, gtn.META_TRAINING, 5, k):
            architecture = gtn.sample_architecture(teacher.config, 10)
            theta = gtn.init_learner(architecture, (1, 8, 8)).double()
            losses.append(gtn.add_meta_gradient(teacher, data, architecture, theta).item())
    assert losses[0] != losses[1]
    assert result == pytest.approx((sum(losses) / 2, norm))
    for mean, p in zip(both, teacher.parameters(), strict=True):
        torch.testing.assert_close(mean, p.grad / 2)


def test_learning_rate_follows_the_cosine():
    teacher, data, *_ = tiny(outer_steps=4, outer_lr=0.08, outer_lr_end=0.25)
    optimizer, rates = torch.optim.Adam(teacher.parameters()), []
    for step in range(4):
        gtn.outer_step(teacher, optimizer, data, step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.08, 0.05 + 0.03 / 2**0.5, 0.05, 0.05 - 0.03 / 2**0.5])


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def to_cuda(x):
    """A tensor, or those in a tuple, on the CUDA device."""
    if isinstance(x, tuple):
        return type(x)(*map(to_cuda, x))
    return x.cuda() if torch.is_tensor(x) else x


@on_cuda
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_cuda_gives_the_same_meta_gradient(normalization):
    teacher, data, theta, architecture, batches = tiny(normalization)
    for flat in (False, True):
        _, expected = phi_gradient(teacher.cpu(), data, theta, architecture, batches, flat)
        there = [real if real is None else to_cuda(real) for real in batches]
        _, gradient = phi_gradient(
            teacher.cuda(), to_cuda(data), theta.cuda(), architecture, there, flat
        )
        for name in expected:
            torch.testing.assert_close(gradient[name].cpu(), expected[name], rtol=1e-8, atol=1e-10)


@on_cuda
@pytest.mark.parametrize("variant", ["learned", "random"])
def test_a_replayed_graph_is_the_ordinary_step(variant):
    phi = []
    for replay in (False, True):
        teacher, data, *_ = tiny(variant=variant)
        teacher, data = teacher.cuda(), to_cuda(data)
        optimizer = torch.optim.Adam(teacher.parameters())
        captured = gtn.capture_graph(teacher, data) if replay else None
        losses = [gtn.outer_step(teacher, optimizer, data, step, captured) for step in range(8)]
        phi.append([torch.tensor(losses), *teacher.parameters()])
    for ordinary, replayed in zip(*phi, strict=True):
        torch.testing.assert_close(replayed, ordinary, rtol=1e-8, atol=1e-10)


def test_orders():
    curriculum = (made := tiny())[0](made[1])

    def batches(order):
        """(a pixel, the label) of each image in each batch."""
        images, labels, *rates = curriculum.shuffled(order)
        assert rates == [curriculum.lr, curriculum.momentum]
        pixels = images[:, :, 0, 3, 3].tolist()
        return [[*zip(*batch, strict=True)] for batch in zip(pixels, labels.tolist(), strict=True)]

    plain, shuffled, mixed = map(batches, gtn.ORDERS)
    assert torch.equal(curriculum.shuffled("in order").images, curriculum.images)
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled) != sorted(mixed)
    assert set().union(*plain) == set().union(*mixed)


@pytest.mark.parametrize(("normalization", "order"), CASES)
def test_evaluation_by_hand(normalization, order):
    teacher, data, *_ = tiny(normalization, order=order)
    row = gtn.evaluate(teacher, data, gtn.first(data.test, 30), 1, every_step=True)
    with gtn.seeded(teacher.config.seed, gtn.TEST_LEARNERS, 0), torch.no_grad():
        architecture = gtn.sample_architecture(teacher.config, 10)
        theta = gtn.init_learner(architecture, (1, 8, 8)).double()
        curriculum = teacher(data).shuffled(order)
    _, *states = gtn.unroll(theta, curriculum, architecture)
    assert all(theta.grad_fn is None for theta, _ in states)  # no graph outlives its step

    def fraction_right(theta, count):
        predictions = gtn.logits(theta, data.test.images[:count], architecture).argmax(1)
        return (predictions == data.test.labels[:count]).double().mean().item()

    assert row["accuracies"] == [pytest.approx([fraction_right(theta, 30) for theta, _ in states])]
    names = {"order": order, "every_step": True}
    assert row.items() >= (names | {"transductive": normalization == "batch", "n": 1}).items()
    expected = [pytest.approx(fraction_right(states[-1][0], 60))]
    for same in (None, order):
        row = gtn.evaluate(teacher, data, data.test, 1, same)
        assert row["accuracies"] == expected
    assert ("transductive" in gtn.in_words(row)) == (normalization == "batch")


def test_glyphs(monkeypatch):
    draw, fonts = gtn.draw_glyphs, []
    monkeypatch.setattr(gtn, "draw_glyphs", lambda *a: fonts.append({*a[1]}) or draw(*a))
    data = gtn.load_data("glyphs", "nowhere", torch.device("cpu"))
    assert len(fonts[1] - fonts[0]) == len(fonts[1]) / 2  # half of the test is unseen
    images = torch.cat([split.images for split in data[:3]]).flatten(1)
    assert torch.unique(images, dim=0).shape == (25_000, 784)  # disjoint
    for split in data[:3]:
        assert split.labels.bincount().tolist() == [len(split.labels) // 10] * 10
    std, mean = torch.std_mean(data.train.images)
    assert (mean.item(), std.item()) == pytest.approx((0, 1), abs=1e-3)

"""Exact values: meta-gradient, optimizer, learner, teacher, data."""

import dataclasses
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
    *(("instance", order) for order in gtn.ORDERS[1:]),
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


@torch.no_grad()
def written_out(teacher, data, theta, architecture, batches):
    """The meta-loss, its inner loop written out once more."""
    curriculum, velocity, losses = taught(teacher, data), torch.zeros_like(theta), []
    for t, real in enumerate(batches):
        with torch.enable_grad():
            weights = theta.detach().requires_grad_()
            loss = F.cross_entropy(
                gtn.logits(weights, curriculum.images[t], architecture), curriculum.labels[t]
            )
            (gradient,) = torch.autograd.grad(loss, weights)
        velocity = curriculum.momentum[t] * velocity + gradient
        theta = theta - curriculum.lr[t] * velocity
        if real is not None:
            losses.append(
                F.cross_entropy(gtn.logits(theta, real.images, architecture), real.labels)
            )
    return sum(losses) / len(losses)


def finite_differences(teacher, *problem, step=2e-7):
    """{name: central differences of the meta-loss in every coordinate of phi}."""

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
        differences[name] = torch.stack(
            [difference(coordinates, i) for i in range(len(coordinates))]
        ).view_as(parameter)
    return differences


def relative_errors(computed, expected):
    return {
        name: ((computed[name] - expected[name]).norm() / expected[name].norm()).item()
        for name in expected
    }


@pytest.mark.parametrize(("normalization", "order"), CASES)
def test_meta_gradient_equals_finite_differences(normalization, order):
    teacher, *problem = tiny(normalization, order=order)
    expected = finite_differences(teacher, *problem)
    assert {"latent", "log_lr", "logit_momentum", "generator.0.weight", "generator.11.bias"} <= set(
        expected
    )
    for flat in (False, True):
        errors = relative_errors(phi_gradient(teacher, *problem, flat)[1], expected)
        assert max(errors.values()) < 1e-5, (flat, errors)


def test_finite_differences_notice_a_first_order_meta_gradient(monkeypatch):
    teacher, *problem = tiny()
    expected = finite_differences(teacher, *problem)
    original = torch.autograd.grad

    def forgetful(outputs, inputs, grad_outputs=None, **_):
        return original(outputs, inputs, grad_outputs, allow_unused=True, materialize_grads=True)

    monkeypatch.setattr(torch.autograd, "grad", forgetful)
    for flat in (False, True):
        errors = relative_errors(phi_gradient(teacher, *problem, flat)[1], expected)
        assert errors["latent"] == pytest.approx(1)  # nothing at all reaches the images
        assert errors["log_lr"] > 1e-3


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("variant", ["learned", "random_fixed", "pixels"])
def test_flat_equals_the_full_graph(normalization, variant):
    teacher, *problem = tiny(normalization, variant=variant, inner_steps=7)
    (loss, expected), (flat_loss, gradient) = (
        phi_gradient(teacher, *problem, flat) for flat in (False, True)
    )
    assert loss == pytest.approx(written_out(teacher, *problem).item(), abs=1e-12)
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
    ("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (5, [5]), (9, [5])]
)
def test_meta_loss_every_counts_from_the_last_inner_step(monkeypatch, every, expected):
    teacher, data, theta, architecture, _ = tiny(meta_loss_every=every)
    original, found = gtn.meta_gradient, []
    monkeypatch.setattr(
        gtn, "meta_gradient", lambda *arguments: found.extend(arguments[-1]) or original(*arguments)
    )
    gtn.add_meta_gradient(teacher, data, architecture, theta)
    assert [
        t for t, real in enumerate(found, 1) if real is not None and len(real.labels) == 12
    ] == expected


def test_an_unroll_is_torch_sgd_on_the_network():
    """theta_t of a curriculum, with learning rates and momenta of their own, against
    torch.optim.SGD."""
    teacher, data, theta, architecture, _ = tiny()
    curriculum = teacher(data)
    curriculum = gtn.Curriculum(*(x.detach() for x in curriculum))._replace(
        lr=torch.linspace(0.05, 0.1, 5).double(), momentum=torch.linspace(0.3, 0.9, 5).double()
    )
    reference = theta.clone().requires_grad_()
    optimizer = torch.optim.SGD([reference])
    _, *states = gtn.unroll(theta, curriculum, architecture)
    for (found, _), images, labels, lr, momentum in zip(states, *curriculum, strict=True):
        assert found.grad_fn is None  # no graph outlives its step
        optimizer.param_groups[0].update(lr=lr.item(), momentum=momentum.item())
        optimizer.zero_grad()
        F.cross_entropy(gtn.logits(reference, images, architecture), labels).backward()
        optimizer.step()
        torch.testing.assert_close(found.detach(), reference.detach(), rtol=0, atol=1e-12)


def other_inner_step(kind):
    """Nesterov's momentum with weight decay, or gradient descent without any momentum."""

    def inner_step(theta, velocity, images, labels, lr, momentum, architecture, create_graph=False):
        loss = F.cross_entropy(gtn.logits(theta, images, architecture), labels)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=create_graph)
        if kind == "plain":
            return theta - lr * gradient, velocity
        gradient = gradient + 0.01 * theta
        velocity = momentum * velocity + gradient
        return theta - lr * (gradient + momentum * velocity), velocity

    return inner_step


@pytest.mark.parametrize("kind", ["nesterov", "plain"])
def test_another_inner_optimizer_needs_another_inner_step_alone(monkeypatch, kind):
    teacher, *problem = tiny()
    sgd, _ = phi_gradient(teacher, *problem)
    monkeypatch.setattr(gtn, "inner_step", other_inner_step(kind))
    loss, expected = phi_gradient(teacher, *problem)
    flat_loss, gradient = phi_gradient(teacher, *problem, flat=True)
    assert loss != sgd
    assert flat_loss == pytest.approx(loss.item(), abs=1e-12)
    for name in expected:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("hidden_units", [0, 7])
def test_logits_are_the_module_s(normalization, channels, hidden_units):
    torch.manual_seed(0)
    kernels = (5, 3, 5)
    architecture = gtn.Architecture((5, 3, 2), kernels, "max", normalization, hidden_units)
    image_shape = (channels, 16, 16)
    theta = gtn.init_learner(architecture, image_shape).double()
    theta += 0.1 * torch.randn_like(theta)
    learner = as_module(theta, architecture, image_shape)
    assert torch.equal(gtn.to_vector(learner.parameters()), theta)
    images = torch.randn(6, *image_shape, dtype=torch.float64)
    expected = learner(images)
    torch.testing.assert_close(gtn.logits(theta, images, architecture), expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_the_shipped_learner(normalization, pooling):
    """Layer by layer; changes with gtn.make_learner."""
    torch.manual_seed(0)
    architecture = gtn.Architecture((4, 6), (3, 5), pooling, normalization, 7)
    theta = gtn.init_learner(architecture, (2, 16, 12)).double()
    theta += 0.1 * torch.randn_like(theta)
    module = as_module(theta, architecture, (2, 16, 12))
    named = dict(module.named_parameters())
    images = torch.randn(6, 2, 16, 12, dtype=torch.float64)

    def weight_and_bias(layer):
        bias = named.pop(f"{layer}.bias", None)
        if normalization != "weight":
            return named.pop(f"{layer}.weight"), bias
        name = f"{layer}.parametrizations.weight"
        pairs = zip(named.pop(f"{name}.0.g"), named.pop(f"{name}.original"), strict=True)
        return torch.stack([g * v / v.square().sum().sqrt() for g, v in pairs]), bias

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
    conv1, scale, shift, conv2, _, _, hidden, zero, weight, bias = parameters.values()
    assert conv1.var().item() == pytest.approx(2 / 9, rel=0.15)
    assert conv2.var().item() == pytest.approx(2 / (9 * 64), rel=0.02)
    assert scale.eq(1).all()
    assert hidden.var().item() == pytest.approx(2 / (128 * 49), rel=0.02)
    assert all(p.eq(0).all() for p in (shift, zero, weight, bias))
    learner = gtn.make_learner(architecture._replace(normalization="weight"), (1, 28, 28))
    for layer, fan_in in ((0, 9), (4, 9 * 64), (9, 128 * 49), (11, 50)):
        assert learner[layer].weight.var().item() == pytest.approx(2 / fan_in, rel=0.15)


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


def test_sampled_learners_are_of_their_size():
    torch.manual_seed(0)
    config = gtn.Config(filters=((32, 63), (64, 127)))
    pairs = [gtn.sample_architecture(config, 10).filters for _ in range(600)]
    first, second = zip(*pairs, strict=True)
    assert (min(first), max(first), min(second), max(second)) == (32, 63, 64, 127)  # both ends
    architecture = gtn.Architecture((5, 7), (3, 3), "max", "instance", 0)
    parameters = gtn.make_learner(architecture, (1, 28, 28)).parameters()
    assert len(gtn.init_learner(architecture, (1, 28, 28))) == sum(p.numel() for p in parameters)


def test_a_learner_with_running_state_is_refused(monkeypatch):
    stateful = lambda *_: torch.nn.Sequential(torch.nn.BatchNorm2d(3))  # noqa: E731
    monkeypatch.setattr(gtn, "make_learner", stateful)
    gtn.blueprint.cache_clear()
    with pytest.raises(gtn.InputError, match=r"no running state, such as 0\.running_mean"):
        gtn.blueprint(gtn.Architecture((3,), (3,), "max", "batch", 0), (3, 8, 8))
    gtn.blueprint.cache_clear()


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({}, True),
        ({"kernels": (5,), "pooling": ("average",)}, True),
        ({"filters": (64, (64, 127))}, False),
        ({"kernels": (3, 5)}, False),
        ({"pooling": ("max", "average")}, False),
        ({"least_blocks": 1}, False),
    ],
)
def test_a_cuda_graph_is_of_one_architecture(settings, possible):
    config = gtn.Config(**settings)
    assert gtn.cuda_graph_possible(config) == possible
    torch.manual_seed(0)
    assert possible == (len({gtn.sample_architecture(config, 10) for _ in range(20)}) == 1)


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


@pytest.mark.parametrize("batch_size", [3, 10, 16])
def test_batches_too_small_for_every_class_take_turns(batch_size):
    """Labels go on where the step before ended; from ten images on every step has them all."""
    teacher, data, *_ = tiny(batch_size=batch_size, inner_steps=10)
    labels = teacher(data).labels
    assert labels.shape == (10, batch_size)
    if batch_size < 10:
        assert labels.flatten().tolist() == [i % 10 for i in range(10 * batch_size)]
    else:
        assert labels.tolist() == [[i % 10 for i in range(batch_size)]] * 10


def test_learners_of_an_outer_step_are_averaged():
    """The gradient of two learners per step is the mean of the two learners' own."""
    teacher, data, *_ = tiny(learners_per_step=2, outer_lr=0)  # phi stays
    optimizer, singles, losses = torch.optim.SGD(teacher.parameters()), [], []
    result = gtn.outer_step(teacher, optimizer, data, 5)
    both = [p.grad.clone() for p in teacher.parameters()]
    assert result.gradient_norm == pytest.approx(
        torch.cat([g.flatten() for g in both]).norm().item()
    )
    for k in range(2):
        optimizer.zero_grad()
        with gtn.seeded(teacher.config.seed, gtn.META_TRAINING, 5, k):
            architecture = gtn.sample_architecture(teacher.config, 10)
            theta = gtn.init_learner(architecture, (1, 8, 8)).double()
            losses.append(gtn.add_meta_gradient(teacher, data, architecture, theta).item())
        singles.append([p.grad.clone() for p in teacher.parameters()])
    assert losses[0] != losses[1]
    assert result.meta_loss == pytest.approx(sum(losses) / 2)
    for mean, *each in zip(both, *singles, strict=True):
        torch.testing.assert_close(mean, sum(each) / 2)


def test_an_outer_step_draws_by_seed_and_step_alone():
    teacher, data, *_ = tiny(outer_lr=0)  # phi stays
    optimizer = torch.optim.SGD(teacher.parameters())
    first = gtn.outer_step(teacher, optimizer, data, 3)
    stream = torch.get_rng_state()
    torch.randn(5)
    assert gtn.outer_step(teacher, optimizer, data, 4).meta_loss != first.meta_loss
    assert gtn.outer_step(teacher, optimizer, data, 3) == first
    torch.set_rng_state(stream)
    expected = torch.randn(5)
    torch.set_rng_state(stream)
    gtn.outer_step(teacher, optimizer, data, 3)
    assert torch.equal(torch.randn(5), expected)  # and leaves everybody else's numbers alone


def test_learning_rate_follows_the_cosine():
    teacher, data, *_ = tiny(outer_steps=4, outer_lr=0.08, outer_lr_end=0.25)
    optimizer = torch.optim.Adam(teacher.parameters())
    rates = [
        (gtn.outer_step(teacher, optimizer, data, step), optimizer.param_groups[0]["lr"])[1]
        for step in range(4)
    ]
    assert rates == pytest.approx(
        [0.08, 0.08 - 0.06 * 0.1464466094, 0.05, 0.02 + 0.06 * 0.1464466094]
    )


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def to_cuda(x):
    """A tensor, or a tuple of such, on the CUDA device."""
    return type(x)(*map(to_cuda, x)) if isinstance(x, tuple) else x.cuda()


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
    teacher, data, *_ = tiny(inner_steps=6)
    for rates in (teacher.log_lr, teacher.logit_momentum):
        rates.data += torch.arange(6)  # no two inner steps are alike
    curriculum = teacher(data)
    assert all(map(torch.equal, curriculum, curriculum.shuffled("in order")))
    torch.manual_seed(1)
    batches, everything = curriculum.shuffled("batch-shuffled"), curriculum.shuffled("all-shuffled")
    rows, *others = ([x.sum().item() for x in c.images] for c in (curriculum, batches, everything))
    assert rows != others[0]
    assert sorted(rows) == pytest.approx(sorted(others[0]))
    assert sorted(rows) != pytest.approx(sorted(others[1]))
    for other in (batches, everything):
        expected, found = (
            torch.stack([c.images.sum((2, 3, 4)), c.labels]).flatten(1) for c in (curriculum, other)
        )
        torch.testing.assert_close(
            *(x[:, x[0].argsort()] for x in (found, expected))
        )  # each image keeps its label
        assert torch.equal(other.lr, curriculum.lr)
        assert torch.equal(other.momentum, curriculum.momentum)


@pytest.mark.parametrize("order", gtn.ORDERS)
def test_a_teacher_is_trained_under_its_order(monkeypatch, order):
    """Every learner meets the images in an order of its own, and its meta-gradient is of that
    order."""
    teacher, data, theta, architecture, _ = tiny(order=order)
    met, original = [], gtn.meta_gradient
    monkeypatch.setattr(gtn, "meta_gradient", lambda *a: met.append(a) or original(*a))
    for key in (1, 2):
        with gtn.seeded(key):
            gtn.add_meta_gradient(teacher, data, architecture, theta)
        with gtn.seeded(key):
            assert torch.equal(met[-1][1].images, teacher(data).shuffled(order).images)
    assert torch.equal(met[0][1].images, met[1][1].images) == (order == "in order")


@pytest.mark.parametrize(("normalization", "order"), CASES)
def test_evaluation_by_hand(normalization, order):
    teacher, data, *_ = tiny(normalization, order=order)
    row = gtn.evaluate(teacher, data, gtn.first(data.test, 30), 1, every_step=True)
    with gtn.seeded(teacher.config.seed, gtn.TEST_LEARNERS, 0), torch.no_grad():
        architecture = gtn.sample_architecture(teacher.config, 10)
        theta = gtn.init_learner(architecture, (1, 8, 8)).double()
        curriculum = teacher(data).shuffled(order)
    _, *states = gtn.unroll(theta, curriculum, architecture)

    def fraction_right(theta, count):
        predictions = gtn.logits(theta, data.test.images[:count], architecture).argmax(1)
        return (predictions == data.test.labels[:count]).double().mean().item()

    assert row["accuracies"] == [pytest.approx([fraction_right(theta, 30) for theta, _ in states])]
    names = {"order": order, "every_step": True}
    assert row.items() >= (names | {"transductive": normalization == "batch", "n": 1}).items()
    expected = [pytest.approx(fraction_right(states[-1][0], 60))]
    for same in (None, order):
        assert gtn.evaluate(teacher, data, data.test, 1, same)["accuracies"] == expected


def test_glyphs(monkeypatch):
    drawn, draw = [], gtn.draw_glyphs
    monkeypatch.setattr(
        gtn, "draw_glyphs", lambda *arguments: drawn.append(arguments[1]) or draw(*arguments)
    )
    data = gtn.load_data("glyphs", "nowhere", torch.device("cpu"))
    assert len(set(gtn.FONTS)) == len(gtn.FONTS)
    assert len(set(drawn[1]) - set(drawn[0])) == len(drawn[1]) / 2  # half of the test is unseen
    images = torch.cat([split.images for split in data[:3]]).flatten(1)
    assert images.shape == (25_000, 784)
    assert len(torch.unique(images, dim=0)) == 25_000  # disjoint
    for split in data[:3]:
        assert split.labels.bincount().tolist() == [len(split.labels) // 10] * 10
    assert data.train.images.mean().item() == pytest.approx(0, abs=1e-3)
    assert data.train.images.std().item() == pytest.approx(1, abs=1e-3)

"""Generative Teaching Networks in one file (Such et al., arXiv 1912.07768).

A teacher makes synthetic images; a fresh learner trains on them for a few SGD steps (the inner loop); its loss on real
data is differentiated through that training, and the teacher follows this meta-gradient (the outer step).

    python gtn.py           # embedded glyphs, no download: a minute or two on two CPU cores; --help: every setting
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import inspect
import io
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
import warnings
import zipfile
from collections import namedtuple
from pathlib import Path

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import distributed, nn
    from torch.utils.checkpoint import checkpoint
    from torchvision import datasets, transforms
    from tqdm import tqdm
except KeyboardInterrupt:
    sys.exit(130)  # without a traceback: these take seconds, and nothing has begun

CLASSES, FORMAT = 10, 1  # of every data set below; of the files that a run leaves
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says


class InputError(Exception):
    """Something the user can mend: printed as one line, exit status 2."""


# ------------------------------------------------------------------------------------------ config

VARIANTS = ("learned", "random_fixed", "random", "pixels", "real")
ORDERS = ("in order", "batch-shuffled", "all-shuffled")
DATASETS = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}  # torchvision's
CHOICES = {"variant": VARIANTS, "order": ORDERS, "dataset": (*DATASETS, "glyphs")}
CHOICES |= {"normalization": ("layer", "instance", "batch"), "kernels": (1, 3, 5, 7), "pooling": ("max", "average")}
LEAST = {"seed": 0, "least_blocks": 0, "hidden_units": 0, "batch_size": 2, "inner_lr": 1e-9}  # else 1; of floats 0
MOST = {"seed": 2**31 - 1, "outer_steps": 10**7, "momentum": 0.9999, "outer_beta1": 0.9999, "outer_beta2": 0.9999}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. paper: arXiv 1912.07768; earlier run: github.com/GoodAI/GTN; ours: found here."""

    name: str = "A"  # set by --config, or yours; a run lies in <name>-<kind>-s<seed>
    variant: str = "learned"  # generator with learned, random_fixed or random latent input; pixels; real
    order: str = "in order"  # or batch-shuffled, all-shuffled: drawn for every learner, in training and in test
    seed: int = 0  # fixes everything on a CPU, bit for bit
    dataset: str = "mnist"  # mnist, fashion, kmnist, cifar10: torchvision; glyphs: embedded
    # curriculum and teacher
    inner_steps: int = 20  # T; earlier run: A 20, B and C 10; paper: 32
    batch_size: int = 32  # B, images per inner step; earlier run: 32, C 16; paper: 128
    latent_size: int = 64  # numbers per image; earlier run: 64; paper: 128
    hidden_size: int = 512  # units of the generator's first layer; paper: 1024
    generator_filters: int = 64  # at 1/4 of the image size, half of it at 1/2; paper: 128, 64
    image_scale: float = 2.0  # pixels are scale * tanh; paper: 2
    inner_lr: float = 0.005  # alpha at the start; paper: 0.02, where (64, 128) filters diverge
    momentum: float = 0.5  # mu at the start; paper: 0.5
    # learner, meta-gradient and outer step
    filters: tuple = (64, 128)  # per conv block; [low, high]: sampled for every learner
    least_blocks: int = 0  # so many of these blocks, or more: sampled; 0: all of them
    kernels: tuple = (3,)  # of a block, sampled if several, of 1, 3, 5, 7
    pooling: tuple = ("max",)  # of a learner, sampled if several, of max, average
    hidden_units: int = 0  # of a layer between the last conv block and the logits, 0: none; paper: 256
    normalization: str = "instance"  # layer, instance: per sample; batch: of the last synthetic batch
    meta_batch_size: int = 256  # real images per meta-loss; earlier run: 1024; paper: 128
    meta_loss_every: int = 10  # inner steps from one meta-loss to the next, the last always; paper: 1
    flat: bool = False  # memory that hardly grows with T, for a fifth more time
    outer_steps: int = 5000  # length of Adam's cosine schedule; earlier run: 5000; paper: 2000
    outer_lr: float = 0.02  # paper: 0.02; earlier run: 0.01
    outer_lr_end: float = 0.1  # fraction of outer_lr at the end; paper: 0.1
    outer_beta1: float = 0.5  # ours: 0.5, better after 25 and 50 outer steps; paper: 0.9
    outer_beta2: float = 0.999  # Adam's default
    learners_per_step: int = 1  # fresh learners averaged per outer step, by each rank of torchrun
    cuda_graph: bool = True  # CUDA: replay a learner's meta-gradient as one graph
    # bookkeeping
    validate_every: int = 100  # outer steps
    validation_learners: int = 2  # fresh learners per validation
    validation_images: int = 2000  # images per validation
    test_learners: int = 10  # fresh learners for the test accuracy at the end
    checkpoint_every: float = 60.0  # seconds; 0: after every outer step

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value, kind = field.name, getattr(self, field.name), type(field.default)
            if type(value) is list:
                value = tuple(tuple(v) if type(v) is list else v for v in value)
            words, valid = f"like {json.dumps(field.default)}", type(value) in (kind, int if kind is float else kind)
            if name in CHOICES:
                chosen = value if kind is tuple else (value,)
                words = f"{'some' if kind is tuple else 'one'} of {', '.join(map(str, CHOICES[name]))}"
                valid = valid and chosen and all(type(x) in (int, str) and x in CHOICES[name] for x in chosen)
            elif kind in (int, float):
                low, high = LEAST.get(name, int(kind is int)), MOST.get(name, 10**5)
                words, valid = f"{words}, from {low} to {high:,}", valid and low <= value <= high
            elif kind is tuple:
                ranges = [f if type(f) is tuple and len(f) == 2 else (f, f) for f in value] if valid else []
                valid = ranges and all(type(a) is type(b) is int and 1 <= a <= b < 2**16 for a, b in ranges)
                words = f"{words}: from 1 to 65,535, [low, high] for a number to sample"
            elif name == "name":
                words, valid = f"{words}: letters, digits, - and _", valid and re.fullmatch(r"\w[\w.-]{0,99}", value)
            if not valid:
                raise InputError(f"{name}={json.dumps(value)[:60]}: must be {words}")
            object.__setattr__(self, name, value)
        if self.order != "in order" and self.variant in ("random", "real"):
            raise InputError(f"order={self.order}: must be in order with variant={self.variant}, which has none")

    @property
    def kind(self):
        """What the learner is taught with, in names of folders and in figures: learned, learned-batch-shuffled, ..."""
        return self.variant if self.order == "in order" else f"{self.variant}-{self.order}"


# -------------------------------------------------------------------------------------------- data

Split = namedtuple("Split", "images labels")  # [N, C, H, W] float, normalised; [N] int64
Data = namedtuple("Data", "train validation test mean std")  # on the device; mean, std [C] of training pixels in 0..1

TEACHER, TEST_LEARNERS, CURRICULUM, META_TRAINING = 0, 1, 2, 3  # what random numbers are for
SHORT_TRAINING, FULL_TRAINING, ARCHITECTURES, TUNING, BOOTSTRAP = 4, 5, 6, 7, 8  # in nas.py


@contextlib.contextmanager
def seeded(*key):
    """Inside, random numbers depend on the key alone, as seed, purpose, step, learner; outside nothing is disturbed."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        yield


def load_data(dataset, folder, device):
    """The Data of a data set, on the device. Raises InputError where its files cannot be had."""
    images, labels, test_images, test_labels = images_and_labels(dataset, folder)
    train = len(images) - (4_000 if dataset == "glyphs" else 10_000)
    std, mean = torch.std_mean(images[:train], dim=(0, 2, 3))
    parts = (images[:train], labels[:train]), (images[train:], labels[train:]), (test_images, test_labels)
    splits = (Split(((x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).to(device), y.to(device)) for x, y in parts)
    return Data(*splits, mean.to(device), std.to(device))


def sample(split, *shape):
    """Random images [*shape, C, H, W] and labels [*shape] of a split, with replacement."""
    index = torch.randint(len(split.labels), shape, device=split.labels.device)
    return Split(split.images[index], split.labels[index])


# ----------------------------------------------------------------------------------------- teacher


class Curriculum(namedtuple("Curriculum", "images labels lr momentum")):
    """What a learner trains on: images [T, B, C, H, W], labels [T, B] int64, lr [T], momentum [T]."""

    def shuffled(self, order):
        """Its batches, or all its images, in random order; lr and momentum stay with the step. Differentiable."""
        if order not in ("batch-shuffled", "all-shuffled"):
            return self
        size = self.labels.shape[1] if order == "batch-shuffled" else 1  # images that stay together
        index = torch.rand(self.labels.numel() // size, device=self.lr.device).argsort()  # a CUDA graph draws it anew
        images, labels = (x.reshape(-1, size, *x.shape[2:]).index_select(0, index).view_as(x) for x in self[:2])
        return self._replace(images=images, labels=labels)


def make_generator(config, image_shape):
    """Latent input and one-hot label [B, latent + 10] to images in -1..1 [B, C, H, W] (paper, section 3.1)."""
    channels, height, width = image_shape
    wide, narrow = config.generator_filters, max(1, config.generator_filters // 2)
    return nn.Sequential(
        nn.Linear(config.latent_size + CLASSES, config.hidden_size, bias=False),
        nn.BatchNorm1d(config.hidden_size, track_running_stats=False),
        nn.LeakyReLU(0.1),
        nn.Linear(config.hidden_size, wide * (height // 4) * (width // 4)),
        nn.Unflatten(1, (wide, height // 4, width // 4)),
        nn.BatchNorm2d(wide, track_running_stats=False),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(narrow, track_running_stats=False),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(narrow, channels, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels, track_running_stats=False),  # ours: without it most pixels soon saturate
        nn.Tanh(),
    )


class Teacher(nn.Module):
    """Everything that is meta-learned, phi: generator, latent input, inner learning rate and momentum.

    Called with real data (which only the variant `real` reads) it returns a Curriculum, differentiable in phi.
    """

    def __init__(self, config, image_shape):
        super().__init__()
        self.config, T, B = config, config.inner_steps, config.batch_size
        # logarithm and logit keep the learning rate positive and the momentum within (0, 1)
        self.log_lr = nn.Parameter(torch.full((T,), config.inner_lr).log())
        self.logit_momentum = nn.Parameter(torch.full((T,), config.momentum).logit())
        if config.variant == "pixels":
            self.images = nn.Parameter(torch.randn(T, B, *image_shape))
        elif config.variant != "real":
            self.generator = make_generator(config, image_shape)
            if config.variant != "random":
                kind = nn.Parameter if config.variant == "learned" else nn.Buffer
                self.latent = kind(torch.randn(T, B, config.latent_size))

    def forward(self, data):
        config, T, B = self.config, self.config.inner_steps, self.config.batch_size
        lr, momentum = self.log_lr.exp(), self.logit_momentum.sigmoid()
        labels = (torch.arange(B, device=lr.device) % CLASSES).repeat(T, 1)
        if config.variant == "real":
            return Curriculum(*sample(data.train, T, B), lr, momentum)
        if config.variant == "pixels":
            return Curriculum(self.images, labels, lr, momentum)
        latent = lr.new_empty(T, B, config.latent_size).normal_() if config.variant == "random" else self.latent
        inputs = torch.cat([latent, F.one_hot(labels, CLASSES).to(latent)], 2)
        make = self.generator
        if config.flat:  # holds no graph, and makes each step's images again for their gradient
            make = functools.partial(checkpoint, make, use_reentrant=False, preserve_rng_state=False)
        images = torch.stack([config.image_scale * make(step) for step in inputs])
        return Curriculum(images, labels, lr, momentum)


# ----------------------------------------------------------------------------------------- learner


# a learner's network: filters and (odd) kernel size per conv block; units of a layer before the logits, 0 for none
Architecture = namedtuple("Architecture", "filters kernels pooling normalization hidden_units")


def network(x, architecture, parameter, reference=None):
    """The learner, from images x [N, C, H, W] to logits [N, 10]: change it here, and everything follows.

    parameter(initialise, *shape) is the learner's next parameter, and says how it starts. Batch statistics are those of
    `reference`, the last synthetic batch, so that predictions are independent; None: of x. InputError: x is too small.
    """
    kind, size = architecture.normalization, "x".join(map(str, x.shape[2:]))
    counted = len(x)  # of how many rows the batch statistics are
    dims = {"layer": (1, 2, 3), "instance": (2, 3), "batch": (0, 2, 3)}[kind]
    if kind == "batch" and reference is not None:
        x, counted = torch.cat([reference, x]), len(reference)

    def mean(x):  # of all that is normalised together; a sum, because the derivative of one costs nothing
        x = x[:counted] if kind == "batch" else x
        return x.sum(dims, keepdim=True) / math.prod(x.shape[d] for d in dims)

    for filters, kernel in zip(architecture.filters, architecture.kernels, strict=True):
        if (x.shape[2] // 2) * (x.shape[3] // 2) < (2 if kind == "instance" else 1):  # one pixel has no variance
            raise InputError(f"{len(architecture.filters)} conv blocks are too deep for images of {size}")
        weight = parameter(nn.init.kaiming_normal_, filters, kernel, kernel, x.shape[1])  # channels-last is faster
        x = F.conv2d(x, weight.permute(0, 3, 1, 2), padding=kernel // 2)
        x = max_pool(x) if architecture.pooling == "max" else F.avg_pool2d(x, 2)
        x = x - mean(x)
        scale, shift = parameter(nn.init.ones_, filters, 1, 1), parameter(nn.init.zeros_, filters, 1, 1)
        x = F.leaky_relu(torch.addcmul(shift, x, scale / (mean(x.square()) + 1e-5).sqrt()))
    x = (x if counted == len(x) else x[counted:]).permute(0, 2, 3, 1)
    if units := architecture.hidden_units:
        weight = parameter(nn.init.kaiming_normal_, units, *x.shape[1:])
        x = F.leaky_relu(F.linear(x.flatten(1), weight.flatten(1), parameter(nn.init.zeros_, units)))
    weight = parameter(nn.init.zeros_, CLASSES, *x.shape[1:])  # ours: Kaiming's cost 2 points (results/README.md)
    return F.linear(x.flatten(1), weight.flatten(1), parameter(nn.init.zeros_, CLASSES))


def max_pool(x):
    """2x2 max pooling as a gather, whose derivatives of every order are gathers and scatters: faster than PyTorch's."""
    index = F.max_pool2d(x.detach(), 2, return_indices=True)[1].permute(0, 2, 3, 1)
    pooled = x.permute(0, 2, 3, 1).flatten(1, 2).gather(1, index.flatten(1, 2))
    return pooled.unflatten(1, index.shape[1:3]).permute(0, 3, 1, 2)


@functools.cache
def declared_parameters(architecture, image_shape):
    """[(initialise, shape)] of all that `network` asks for, in order; computes nothing."""
    declared = []

    def declare(initialise, *shape):
        declared.append((initialise, shape))
        return torch.empty(shape, device="meta")

    network(torch.empty(1, *image_shape, device="meta"), architecture, declare)
    return declared


def init_learner(architecture, image_shape, widest=None):
    """theta_0 [P], all parameters of a fresh learner in one vector, padded with zeros to the size of `widest`.

    Padding is exact, but for layer normalisation: a filter that is zero, and unread, has no gradient.
    """
    parts = [torch.zeros(shape) for _, shape in declared_parameters(widest or architecture, image_shape)]
    for part, (initialise, shape) in zip(parts, declared_parameters(architecture, image_shape), strict=True):
        part[tuple(map(slice, shape))] = initialise(torch.empty(shape))
    return torch.cat([part.flatten() for part in parts])


def logits(theta, images, architecture, reference=None):
    """Logits [N, 10] of the learner with parameters theta for images [N, C, H, W]: a pure function (see `network`)."""
    shapes = [shape for _, shape in declared_parameters(architecture, images.shape[1:])]
    parts = theta.split([math.prod(shape) for shape in shapes])
    views = iter([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
    return network(images, architecture, lambda *_: next(views), reference)


def sample_architecture(config, widest=False):
    """An Architecture of the config's search space: a new draw, or the one with the most of everything."""

    def draw(options):
        return options[-1 if widest or len(options) == 1 else int(torch.randint(len(options), ()))]

    blocks = len(config.filters)
    filters = config.filters[: draw(range(min(config.least_blocks or blocks, blocks), blocks + 1))]
    filters = tuple(draw(range(f[0], f[1] + 1)) if type(f) is tuple else f for f in filters)
    kernels = tuple(draw(config.kernels) for _ in filters)
    return Architecture(filters, kernels, draw(config.pooling), config.normalization, config.hidden_units)


# ------------------------------------------------------------------- inner loop and meta-gradient
#   theta_t  learner's parameters after t inner steps     alpha_t   inner learning rate, mu_t momentum
#   v_t      velocity                                     lambda_t  adjoint: dL/d(theta_t, v_t)
#   g_t      gradient of the loss on synthetic batch t    phi       all that the teacher learns
#
#   inner step (paper, section 3.1)    v_{t+1} = mu_t v_t + g_t(theta_t),  theta_{t+1} = theta_t - alpha_t v_{t+1}
#   meta-loss L, meta-gradient dL/dphi: L is the mean over chosen t of the loss of theta_t on real data


def leaf(x):
    """The same numbers without history, ready to be differentiated in."""
    return x.detach().requires_grad_(x.is_floating_point())


def inner_step(theta, velocity, images, labels, lr, momentum, architecture, create_graph=False):
    """(theta, velocity) after a step of SGD with momentum, as torch.optim.SGD takes it, on one batch."""
    loss = F.cross_entropy(logits(theta, images, architecture), labels)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=create_graph)
    velocity = momentum * velocity + gradient
    return theta - lr * velocity, velocity


def unroll(theta, curriculum, architecture, create_graph=False):
    """Train from theta_0 on a curriculum; yields (theta_t, v_t) for t = 0, ..., T, differentiable with create_graph."""
    state = leaf(theta), torch.zeros_like(theta)
    yield state
    for batch in zip(*curriculum, strict=True):
        theta, velocity = inner_step(*state, *batch, architecture, create_graph)
        state = (theta, velocity) if create_graph else (leaf(theta), velocity.detach())
        yield state


def real_loss(theta, real, architecture, reference):
    """A learner's loss on real data (a Split), given the synthetic batch that it has just learned from."""
    parts = [logits(theta, part, architecture, reference) for part in real.images.split(128)]  # small: for the cache
    return F.cross_entropy(torch.cat(parts), real.labels)


def meta_gradient(theta, curriculum, architecture, batches):
    """Meta-loss and its gradient in the curriculum: (loss, d images [T, B, C, H, W], d lr [T], d momentum [T]).

    batches: for each inner step the real data (a Split) on which the loss is taken after it, or None.
    """
    curriculum = Curriculum(*map(leaf, curriculum))
    _, *states = unroll(theta, curriculum, architecture, create_graph=True)
    taught = zip(states, batches, curriculum.images, strict=True)
    losses = [real_loss(theta, real, architecture, last) for (theta, _), real, last in taught if real]
    meta_loss = torch.stack(losses).mean()
    return meta_loss.detach(), *torch.autograd.grad(meta_loss, (curriculum.images, curriculum.lr, curriculum.momentum))


def meta_gradient_flat(theta, curriculum, architecture, batches):
    """The same numbers, to rounding, in memory that hardly grows with T.

    A first sweep trains the learner and keeps its velocities; a second one, from the last step to the first, undoes a
    step, takes it again with its graph, and pulls the adjoint lambda_{t+1} back through it.
    """
    velocities, adjoint, meta_loss = [], [torch.zeros_like(theta)] * 2, 0
    for state in unroll(theta, Curriculum(*(x.detach() for x in curriculum)), architecture):
        velocities.append(state[1])
    theta = state[0]
    gradients = [torch.empty_like(x) for x in (curriculum.images, curriculum.lr, curriculum.momentum)]
    for t in reversed(range(len(batches))):
        images, labels, lr, momentum = (leaf(x[t]) for x in curriculum)
        theta, velocity = leaf(theta + lr * velocities[t + 1]), leaf(velocities[t])
        outputs = inner_step(theta, velocity, images, labels, lr, momentum, architecture, create_graph=True)
        weights = adjoint
        if batches[t]:  # the meta-loss is one more output, of weight 1
            loss = real_loss(outputs[0], batches[t], architecture, images) / sum(map(bool, batches))
            meta_loss = meta_loss + loss.detach()
            outputs, weights = (*outputs, loss), (*adjoint, torch.ones_like(loss))
        inputs = theta, velocity, images, lr, momentum
        *adjoint, gradients[0][t], gradients[1][t], gradients[2][t] = torch.autograd.grad(outputs, inputs, weights)
    return meta_loss, *gradients


def add_meta_gradient(teacher, data, theta, architecture):
    """Train one fresh learner from theta_0 and add its meta-gradient in phi to phi's .grad; returns the meta-loss."""
    config, curriculum = teacher.config, teacher(data).shuffled(teacher.config.order)
    chosen = [left % config.meta_loss_every == 0 for left in reversed(range(config.inner_steps))]  # the last, always
    batches = [sample(data.train, config.meta_batch_size) if yes else None for yes in chosen]
    method = meta_gradient_flat if config.flat else meta_gradient
    meta_loss, *gradients = method(theta, curriculum, architecture, batches)
    taught = curriculum.images, curriculum.lr, curriculum.momentum
    pairs = [(x, g) for x, g in zip(taught, gradients, strict=True) if x.requires_grad]  # real images do not
    torch.autograd.backward(*zip(*pairs, strict=True))
    return meta_loss


def outer_step(teacher, optimizer, data, step, replay=None):
    """One step on phi along the mean meta-gradient of fresh learners: [meta-loss, gradient norm, norm of phi after]."""
    config, learners, image_shape = teacher.config, teacher.config.learners_per_step, data.train.images.shape[1:]
    widest = sample_architecture(config, widest=True) if replay else None
    progress = (1 - math.cos(math.pi * step / config.outer_steps)) / 2
    optimizer.param_groups[0]["lr"] = config.outer_lr * (1 + (config.outer_lr_end - 1) * progress)
    optimizer.zero_grad(set_to_none=False)  # a CUDA graph adds to the same addresses
    meta_loss, phi = torch.zeros_like(data.mean[0]), [*teacher.parameters()]
    for k in range(RANK * learners, (RANK + 1) * learners):
        with seeded(config.seed, META_TRAINING, step, k):
            architecture = sample_architecture(config)
            theta = init_learner(architecture, image_shape, widest).to(data.mean)
            meta_loss += replay(theta) if replay else add_meta_gradient(teacher, data, theta, architecture)
    for x in (meta_loss, *(p.grad for p in phi)):
        if WORLD > 1:
            distributed.all_reduce(x)
        x /= learners * WORLD
    optimizer.step()
    # the learning rate, too: its logarithm may be finite where it is not
    norms = [nn.utils.get_total_norm(x) for x in ([p.grad for p in phi], [*phi, teacher.log_lr.exp()])]
    return torch.stack([meta_loss, *norms]).tolist()


def captured(teacher, data):
    """`add_meta_gradient` as one CUDA graph of thousands of kernels: a function of theta_0, padded to the widest."""
    widest = sample_architecture(teacher.config, widest=True)
    theta = init_learner(widest, data.train.images.shape[1:]).to(data.mean)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.backends.cudnn.benchmark = True  # finds its fastest kernel for each shape; the graph keeps these
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up off the default stream, as capture asks
        for _ in range(3):
            add_meta_gradient(teacher, data, theta, widest)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):  # records, computes nothing
        meta_loss = add_meta_gradient(teacher, data, theta, widest)

    def replay(theta_0):
        theta.copy_(theta_0)
        graph.replay()
        return meta_loss.clone()

    return replay


# -------------------------------------------------------------------------------------- evaluation

TESTED = {  # made of the one that the teacher was trained with
    "training": lambda a: a,
    "double width": lambda a: a._replace(filters=tuple(2 * f for f in a.filters)),
    "one more block": lambda a: a._replace(filters=(*a.filters, a.filters[-1]), kernels=(*a.kernels, 3)),
}


@torch.no_grad()
def accuracy(theta, split, architecture, reference):
    """Fraction of a split that the learner gets right; reference: the last synthetic batch (None: transductive)."""
    found = [logits(theta, images, architecture, reference).argmax(1) for images in split.images.split(1000)]
    return (torch.cat(found) == split.labels).double().mean().item()


def evaluate(teacher, data, split, learners, order=None, tested="training"):
    """`summary` of the accuracies on a split of learners 0, 1, ..., which no teacher has met; `tested`: their kind.

    order: one of ORDERS, by default the teacher's; or "transductive" or "every step" (T accuracies of each), in that.
    """
    found, config = [], teacher.config
    for k in tqdm(range(learners), f"{tested}, {order or config.order}", leave=False, delay=10):
        with seeded(config.seed, TEST_LEARNERS, k), torch.no_grad():
            architecture = TESTED[tested](sample_architecture(config))
            theta = init_learner(architecture, split.images.shape[1:]).to(data.mean)
            curriculum = teacher(data).shuffled(order if order in ORDERS else config.order)
        _, *states = unroll(theta, curriculum, architecture)
        references = [None] * len(states) if order == "transductive" else curriculum.images
        taught = [*zip(states, references, strict=True)][0 if order == "every step" else -1 :]
        curve = [accuracy(theta, split, architecture, reference) for (theta, _), reference in taught]
        found.append(curve if order == "every step" else curve[0])
    return summary(found)


def summary(accuracies):
    """Mean, standard deviation (None for one) and n of accuracies [n] or [n][T], and these."""
    std = np.std(accuracies, axis=0, ddof=1).tolist() if len(accuracies) > 1 else None
    return {"mean": np.mean(accuracies, axis=0).tolist(), "std": std, "n": len(accuracies), "accuracies": accuracies}


def in_words(figures):
    """A summary as 'mean +- std (n fresh learners)'."""
    found = (np.atleast_1d(figures[key]) for key in ("mean", "std") if figures[key] is not None)
    return " +- ".join(" ".join(f"{x:.3f}" for x in row) for row in found) + f" ({figures['n']} fresh learners)"


# ------------------------------------------------------------------------------------------- files

FONTS = "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif DejaVuSerif-Bold STIXGeneral".split()
FONTS += ["STIXGeneralBol", "STIXGeneralItalic", "cmr10"]
TEST_FONTS = ["DejaVuSans-BoldOblique", "DejaVuSerif-Italic", "STIXGeneralBolIta", "cmb10", "cmss10", "cmtt10"]


def draw_glyphs(count, fonts, seed):
    """`count` distorted digits in matplotlib's fonts: images [count, 1, 28, 28] in 0..1 and labels [count]."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    glyphs, distort, labels = {}, transforms.RandomAffine(15, (0.04, 0.04), (0.85, 1.1)), torch.arange(count) % CLASSES
    for font, digit in ((font, digit) for font in fonts for digit in range(CLASSES)):
        picture, path = Image.new("L", (99, 99)), Path(get_data_path(), "fonts", "ttf", f"{font}.ttf")
        ImageDraw.Draw(picture).text((50, 50), str(digit), 255, ImageFont.truetype(str(path), 48), "mm")
        glyphs[font, digit] = ImageOps.expand(ImageOps.pad(picture.crop(picture.getbbox()), (20, 20)), 4)
    with seeded(seed):
        chosen = [(fonts[torch.randint(len(fonts), ())], label) for label in labels.tolist()]
        images = [np.array(distort(glyphs[font_and_digit])) for font_and_digit in chosen]
        images = torch.from_numpy(np.stack(images))[:, None] / 255
        images += 0.15 * torch.rand(count, 1, 1, 1) * torch.randn(images.shape)
    return images.clamp(0, 1), labels


def images_and_labels(dataset, folder):
    """[training images, labels, test images, labels] of a data set, pixels in 0..1."""
    if dataset == "glyphs":  # half of the test images in fonts that are not trained on
        return [*draw_glyphs(20_000, FONTS, 0), *draw_glyphs(5_000, FONTS[: len(TEST_FONTS)] + TEST_FONTS, 1)]
    name, found = DATASETS[dataset], []
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            for train in (True, False):
                part = getattr(datasets, name)(folder, train=train, download=True)
                images, labels = torch.as_tensor(part.data).float() / 255, torch.as_tensor(part.targets)
                if len(images) != len(labels) or labels.amin() < 0 or labels.amax() >= CLASSES:
                    raise ValueError(f"labels must be {len(images):,} from 0 to {CLASSES - 1}")
                found += [images.permute(0, 3, 1, 2) if images.dim() == 4 else images[:, None], labels]
    except Exception as error:  # offline, no such folder, read-only, damaged files: the remedy is the same
        what = f"no whole {name} in {Path(folder)}, nor a download of it ({' '.join(str(error).split())[:150]})"
        raise InputError(f"{what}: put its files there, or choose another --data DIR, or --config quick") from None
    return found


@contextlib.contextmanager
def reading(path):
    """Whatever a missing, damaged or hostile file raises inside becomes one InputError that names the file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the error says enough
            yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split('. ')[0].split())[:150]}"
        raise InputError(f"cannot read {path}: missing, damaged, or not what it should be ({reason})") from None


def read(path):
    """The content of a .json or .pt (a dict) or a .jsonl (a list of dicts, without a last line that has no end yet)."""
    with reading(path):
        if path.suffix == ".json":
            return dict(json.loads(path.read_text("utf-8")))
        if path.suffix == ".jsonl":
            return [dict(json.loads(line)) for line in path.read_text("utf-8").split("\n")[:-1]]
        content = torch.load(path, map_location="cpu", weights_only=True)  # executes nothing that the file holds
        if zipfile.ZipFile(path).testzip() or content["format"] != FORMAT:
            raise ValueError(f"it has other bytes than were written, or a format that is not {FORMAT}")
        return content


def write(path, content):
    """Write what `read` reads, or bytes; a kill or a full disk leaves the old file or the new one, never a part."""
    if path.suffix == ".pt":
        torch.save({"format": FORMAT, **content}, buffer := io.BytesIO())
        content = buffer.getvalue()
    elif path.suffix == ".json":
        content = (json.dumps({"format": FORMAT, **content}, indent=1, allow_nan=False) + "\n").encode()
    elif path.suffix == ".jsonl":
        content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in content).encode()
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; what was there before is intact") from None


@contextlib.contextmanager
def locked(folder):
    """Inside, a folder is this process's, however that ends; InputError where it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"{folder} is in use by another process") from None
    finally:
        os.close(handle)


def read_teacher(path, device="cpu", data=None):
    """The Teacher of a .pt and its content, the Curriculum on the device; InputError if of other images than `data`."""
    content = read(path)
    with reading(path):
        config, curriculum = Config(**content["config"]), Curriculum(**content["curriculum"])
        T, B, image_shape = config.inner_steps, config.batch_size, tuple(curriculum.images.shape[2:])
        with torch.device("meta"):  # allocates nothing: the file's own tensors come in
            teacher = Teacher(config, image_shape)
        teacher.load_state_dict(content["teacher"], assign=True)
        tensors = *curriculum, content["mean"], content["std"]
        shapes = (T, B, *image_shape), (T, B), (T,), (T,), image_shape[:1], image_shape[:1]
        numbers = [x for x in (*teacher.state_dict().values(), *tensors) if x is not curriculum.labels]
        good = content["step"] in range(config.outer_steps + 1) and [tuple(x.shape) for x in tensors] == [*shapes]
        if not good or not all(x.dtype == torch.float32 and x.isfinite().all() for x in numbers):
            raise ValueError("step, or a tensor's numbers, type or shape, is not what its config asks for")
        F.one_hot(curriculum.labels, CLASSES)  # raises where these are no labels
    gaps = [(content[key] - getattr(data, key).cpu()).abs().max() for key in ("mean", "std")] if data else [0]
    if max(gaps) > 1e-3 or (data and data.train.images.shape[1:] != image_shape):
        raise InputError(f"{path} was trained on other images than this {config.dataset}: see --data")
    return teacher.to(device), content | {"curriculum": Curriculum(*(x.to(device) for x in curriculum))}


def environment(device):
    """Where a result comes from: device, versions, CPU threads, command, git commit ("-dirty" if changed, or None)."""
    git = "git describe --always --dirty --abbrev=40 '--exclude=*'"
    told = subprocess.run(git, shell=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    cpu = f"{os.uname().machine} CPU, {torch.backends.cpu.get_cpu_capability()}"
    where = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu, "ranks": WORLD}
    where |= {"python": sys.version.split()[0], "torch": str(torch.__version__), "threads": torch.get_num_threads()}
    return where | {"command": subprocess.list2cmdline(["python", *sys.argv]), "commit": told.stdout.strip() or None}


# ---------------------------------------------------------------------------------------- programs


def begin(config, data, folder, resume):
    """A new run, or the one in the folder: (teacher, optimizer, outer step, log)."""
    image_shape, path = data.train.images.shape[1:], folder / "checkpoint.pt"
    declared_parameters(sample_architecture(config, widest=True), image_shape)  # raises where they are too deep
    if RANK == 0 and (folder / "config.json").exists():
        with reading(folder / "config.json"):
            ours, theirs = vars(config), vars(Config(**read(folder / "config.json")["config"]))
        other = "; ".join(f"{key}={theirs[key]!r}, now {ours[key]!r}" for key in ours if ours[key] != theirs[key])
        if other or not resume:
            run = f"a run with {other}:" if other else "this run: continue it with --resume, or"
            raise InputError(f"{folder} holds {run} choose another --runs, or --set name=NAME")
    with seeded(config.seed, TEACHER):
        teacher, content = Teacher(config, image_shape).to(data.mean.device), {"step": 0, "log": []}
    if path.exists():
        teacher, content = read_teacher(path, data.mean.device, data)
    optimizer = torch.optim.Adam(teacher.parameters(), config.outer_lr, (config.outer_beta1, config.outer_beta2))
    with reading(path):
        optimizer.load_state_dict(content.get("optimizer", optimizer.state_dict()))
        return teacher, optimizer, int(content["step"]), list(content["log"])


def save(folder, teacher, optimizer, data, step, log):
    """Write teacher.pt, log.jsonl and checkpoint.pt; of a teacher that draws a new curriculum for every learner one."""
    with torch.no_grad(), seeded(teacher.config.seed, CURRICULUM):
        curriculum = {key: x.cpu().clone() for key, x in teacher(data)._asdict().items()}
    content = {"config": dataclasses.asdict(teacher.config), "step": step, "seconds": log[-1]["seconds"]}
    content |= {"teacher": {key: x.cpu() for key, x in teacher.state_dict().items()}}
    content |= {"curriculum": curriculum, "mean": data.mean.cpu(), "std": data.std.cpu()}
    write(folder / "teacher.pt", content)
    write(folder / "log.jsonl", log)
    write(folder / "checkpoint.pt", content | {"optimizer": optimizer.state_dict(), "log": log})


def train(config, data, folder, resume=False, stop_after=None):
    """Meta-train to the end of the schedule, or until `stop_after` outer steps in all; returns how many there are."""
    teacher, optimizer, step, log = begin(config, data, folder, resume)
    started, saved = time.monotonic() - (log[-1]["seconds"] if log else 0), time.monotonic()
    alike = not config.least_blocks and len(config.kernels) == len(config.pooling) == 1  # but for their filters
    exact = alike and (config.normalization != "layer" or all(type(f) is int for f in config.filters))
    replay = captured(teacher, data) if data.mean.is_cuda and config.cuda_graph and exact else None
    last, origin = min(config.outer_steps, stop_after or config.outer_steps), environment(data.mean.device)
    if data.mean.is_cuda and config.cuda_graph and not exact:
        tqdm.write(f"{folder.name}: no CUDA graph, which needs learners that differ in their filters alone")
    bar = tqdm(range(step + 1, last + 1), folder.name, config.outer_steps, initial=step, disable=RANK > 0)

    def note(event, **fields):
        log.append({"event": event, "step": step, "seconds": time.monotonic() - started, **fields})

    def validate():
        rates = {"lr": teacher.log_lr.exp().tolist(), "momentum": teacher.logit_momentum.sigmoid().tolist()}
        some = Split(*(x[: config.validation_images] for x in data.validation))
        note("validation", accuracy=evaluate(teacher, data, some, config.validation_learners), **rates)
        bar.set_postfix_str(f"validation {log[-1]['accuracy']['mean']:.3f}")

    with bar, locked(folder) if RANK == 0 else contextlib.nullcontext():
        note("resume" if log else "start", environment=origin)
        if RANK == 0 and step == 0:
            write(folder / "config.json", {"config": dataclasses.asdict(config), "environment": origin})
            validate()
            save(folder, teacher, optimizer, data, step, log)
        for step in bar:
            found = outer_step(teacher, optimizer, data, step - 1, replay)  # meta-loss, gradient norm, norm of phi
            if not all(map(math.isfinite, found)):
                raise InputError(f"outer step {step} diverged; {folder}/teacher.pt is good: reduce outer_lr, inner_lr")
            note("step", meta_loss=found[0], gradient_norm=found[1])
            if RANK == 0 and (step % config.validate_every == 0 or step == config.outer_steps):
                validate()
            if RANK == 0 and (step == last or time.monotonic() - saved >= config.checkpoint_every):
                save(folder, teacher, optimizer, data, step, log)
                saved = time.monotonic()
    return step


def evaluate_file(path, learners, data, device, resume):
    """--evaluate: print test accuracies of fresh learners, keep them in evaluation.json; `resume`: what is missing."""
    teacher, content = read_teacher(path, device, data)
    output, done, few = path.with_name("evaluation.json"), {}, 1 + learners // 10
    if resume and output.exists() and (old := read(output)).get("step") == content["step"]:
        with reading(output):
            done = {(row["architecture"], row["order"], row["n"]): row for row in old["rows"]}
    origin = {"config": dataclasses.asdict(teacher.config), "environment": environment(device), "step": content["step"]}
    own, leaks = teacher.config.order, teacher.config.normalization == "batch"  # per sample nothing can leak
    orders = [own, *(order for order in ORDERS if order != own), *["transductive"] * leaks]
    wanted = [("training", order, learners) for order in orders] + [("training", "every step", few)]
    for name, order, n in wanted + [(name, own, few) for name in [*TESTED][1:]]:
        if (name, order, n) not in done:
            some = Split(*(x[: 1000 if order == "every step" else None] for x in data.test))
            with contextlib.suppress(InputError):  # one more block may be too deep for the images
                row = evaluate(teacher, data, some, n, order, name)
                done[name, order, n] = {"architecture": name, "order": order} | row
            write(output, origin | {"rows": [*done.values()]})
        if (name, order, n) in done:
            print(f"{name:<16}{order:<16}{in_words(done[name, order, n])}")


def make_config(name="quick", settings=(), **flags):
    """The Config of an entry of configs.json, changed by "KEY=VALUE" settings, then by flags that are not None."""
    configs = read(Path(__file__).with_name("configs.json"))
    if type(configs.get(name)) is not dict:
        raise InputError(f"unknown config {name[:60]!r}: configs.json has {', '.join(configs)}")
    changes = {"name": name, **configs[name]}
    for text in settings:
        key, _, value = text.partition("=")
        with contextlib.suppress(ValueError, RecursionError):  # a bare word is a string: variant=random
            value = json.loads(value)
        changes[key] = value
    if unknown := [key for key in changes if key not in Config.__dataclass_fields__]:
        raise InputError(f"unknown setting {unknown[0][:60]!r}: --help lists them all")
    return Config(**changes | {key: value for key, value in flags.items() if value is not None})


def argument_parser(**options):
    """An ArgumentParser with the flags of every command here, --device and --data, whose errors are InputErrors."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def fail(message):
        raise InputError(message)

    parser.error = fail
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--data", default=os.environ.get("GTN_DATA") or "data", help="data sets (default: $GTN_DATA)")
    return parser


def choose_device(name):
    """The torch.device for auto, cpu or cuda. Raises InputError where it is not there."""
    number, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()  # torchrun's number
    if name == "cpu" or (name == "auto" and not devices):
        return torch.device("cpu")
    if name not in ("auto", "cuda") or number >= devices:
        raise InputError(f"--device {name[:60]}: must be auto, cpu or cuda; {devices} CUDA devices are here")
    torch.cuda.set_device(number)
    torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions do anyway
    return torch.device("cuda", number)


def run(program, command, arguments):
    """Exit status of command(arguments), alone or as one of torchrun's ranks; what a user can mend ends in one line."""
    with contextlib.suppress(OSError, ValueError):  # no Linux, or less memory allowed already
        if not torch.cuda.is_available():  # what cannot fit fails at once
            free = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]
            resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(free), -1))
    try:
        if WORLD > 1:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        command(arguments)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return 0
    except (InputError, OSError) as error:
        line, status = f"error: {error}", 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            time.sleep(5 * bool(RANK))  # where rank 0 has ended, torchrun ends this rank before it complains
            raise
        line, status = "error: out of memory: choose smaller sizes, batch_size and meta_batch_size first, or flat", 2
    except KeyboardInterrupt:
        line, status = "interrupted: all files are whole; --resume continues a run, an evaluation or a search", 130
    print(f"{program}: {line}", file=sys.stderr)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's own, longer report then ends with the line
        write(Path(report), {"message": line})
    return status


def main(arguments=None):
    """The command line of gtn.py."""
    settings = re.findall(r"^    (?:# |\w+: \w+ = ).*$", inspect.getsource(Config), re.MULTILINE)
    parser = argument_parser(description=__doc__.splitlines()[0], epilog="\n".join(["settings:", *settings]))
    add = parser.add_argument
    add("--config", default="quick", help="entry of configs.json (default: quick)")
    add("--variant", help=f"what the learner is taught with: {', '.join(VARIANTS)}")
    add("--seed", type=int, help="fixes everything on a CPU")
    add("--outer-steps", type=int, help="outer steps planned: the length of the schedule")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override settings: JSON or a word")
    add("--runs", help="folder of the run folders (default: runs)")
    add("--resume", action="store_true", help="continue the run in its folder; skip what --evaluate has done")
    add("--stop-after", type=int, help="stop with a checkpoint after this many outer steps in all")
    add("--evaluate", type=Path, metavar="TEACHER.pt", help="measure a teacher anew (see --resume), train none")
    add("--learners", type=int, help="fresh learners of the test (default: test_learners; of --evaluate 100)")
    args = parser.parse_args(arguments)
    if any(x is not None and x < 1 for x in (args.learners, args.stop_after)):
        parser.error("--learners, --stop-after: must be at least 1")
    device = choose_device(args.device)
    if args.evaluate:
        if args.set or {args.variant, args.seed, args.outer_steps, args.stop_after} != {None}:
            parser.error("--evaluate goes with --learners, --data, --device and --resume alone")
        data = load_data(read_teacher(args.evaluate)[0].config.dataset, args.data, device)
        return evaluate_file(args.evaluate, args.learners or 100, data, device, args.resume)
    config = make_config(args.config, args.set, variant=args.variant, seed=args.seed, outer_steps=args.outer_steps)
    folder = Path(args.runs or "runs") / f"{config.name}-{config.kind}-s{config.seed}"
    data = load_data(config.dataset, args.data, device)
    steps = train(config, data, folder, args.resume, args.stop_after)
    if RANK == 0:
        print(f"{folder}: {steps} of {config.outer_steps} outer steps")
    if RANK == 0 and steps == config.outer_steps:
        evaluate_file(folder / "teacher.pt", args.learners or config.test_learners, data, device, resume=True)


if __name__ == "__main__":
    sys.exit(run("gtn.py", main, sys.argv[1:]))

"""Generative Teaching Networks in one file (Such et al., arXiv 1912.07768).

A teacher makes synthetic images. A freshly initialised learner trains on them for a few
SGD steps (the inner loop). Its loss on real data is differentiated through the whole of
that training, and the teacher takes a step against this meta-gradient (the outer step).

    python gtn.py           # embedded glyphs, no download: minutes on two CPU cores
    python gtn.py --help    # all settings
"""

import argparse
import contextlib
import dataclasses
import fcntl
import fnmatch
import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint
from torchvision import datasets, transforms
from tqdm import tqdm

# torchrun starts WORLD copies of this program and numbers them by RANK
TORCHRUN = distributed.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
NO_BAR = RANK > 0 or None  # tqdm hides its bar if True, and outside a terminal if None


class InputError(Exception):
    """An error that the user can fix: printed as one line, exit status 2."""


# ---- config ----

VARIANTS = (  # what a learner trains on
    "learned",  # images of a generator, whose latent input is learned, too
    "random_fixed",  # the same, with a latent input that is drawn once
    "random",  # the same, with a latent input drawn anew for every learner
    "pixels",  # images that are learned directly
    "real",  # real images
)
ORDERS = ("in order", "batch-shuffled", "all-shuffled")
DATASETS = {  # torchvision's names
    "mnist": "MNIST",
    "fashion": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
}
NORMALIZATIONS = {  # of activations; "weight" is in WeightNorm
    "instance": lambda filters: nn.GroupNorm(filters, filters),
    "layer": lambda filters: nn.GroupNorm(1, filters),
    "batch": lambda filters: nn.BatchNorm2d(filters, track_running_stats=False),
    "weight": nn.Identity,
    "none": nn.Identity,
}


def setting(default, meaning, low=1, high=10**5, choices=None, free=False):
    """A field of Config, with all that --help and `checked` need; free: --resume may change it."""
    about = {"meaning": meaning, "low": low, "high": high, "choices": choices, "free": free}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run; paper: arXiv 1912.07768; earlier run: github.com/GoodAI/GTN."""

    name: str = setting("A", "starts the run folder's name")
    variant: str = setting("learned", "what the learner trains on", choices=VARIANTS)
    order: str = setting("in order", "images, shuffled anew for every learner", choices=ORDERS)
    seed: int = setting(0, "fixes everything on a CPU", low=0, high=2**31 - 1)
    dataset: str = setting(
        "mnist",
        "real images; a file holds train_images [N, H, W] or [N, H, W, C] uint8, train_labels [N], "
        "test_images, test_labels and, if you like, val_images, val_labels",
        choices=(*DATASETS, "glyphs", "*.npz"),
    )
    # curriculum and teacher
    inner_steps: int = setting(20, "T, SGD steps of a learner; earlier run: 20 or 10; paper: 32")
    batch_size: int = setting(
        32, "B, images per inner step; earlier run: 32 or 16; paper: 128", low=2
    )
    latent_size: int = setting(64, "latent numbers per image; paper: 128")
    hidden_size: int = setting(512, "units of the generator's first layer; paper: 1024")
    generator_filters: int = setting(
        64, "of its first feature maps; then half as many; paper: 128, 64"
    )
    image_scale: float = setting(2.0, "pixels are image_scale * tanh; paper: 2", low=0)
    inner_lr: float = setting(
        0.005, "alpha at the start; paper: 0.02, which diverges here", low=1e-9
    )
    momentum: float = setting(0.5, "mu at the start; paper: 0.5", low=0, high=0.9999)
    # learner
    filters: tuple = setting(
        (64, 128), "one entry a conv block; [low, high]: sampled; paper: 64, 128", high=65535
    )
    least_blocks: int = setting(0, "fewest of these blocks to sample; 0: always all", low=0)
    kernels: tuple = setting(
        (3,), "kernel sizes; several: sampled for each block", choices=(1, 3, 5, 7)
    )
    pooling: tuple = setting(
        ("max",), "several: sampled for each learner", choices=("max", "average")
    )
    hidden_units: int = setting(0, "of a layer before the logits, 0: none; paper: 256", low=0)
    normalization: str = setting(
        "instance", "of the learner, after pooling", choices=(*NORMALIZATIONS,)
    )
    # meta-gradient and outer step
    meta_batch_size: int = setting(256, "real images per meta-loss; earlier run: 1024; paper: 128")
    meta_loss_every: int = setting(10, "inner steps from one meta-loss to the next; paper: 1")
    flat: bool = setting(False, "memory that hardly grows with T", choices=(False, True), free=True)
    outer_steps: int = setting(
        5000, "length of the schedule; earlier run: 5000; paper: 2000", high=10**7
    )
    outer_lr: float = setting(
        0.02, "of Adam at the start; paper: 0.02; earlier run: 0.01", low=0, high=1
    )
    outer_lr_end: float = setting(0.1, "fraction of outer_lr at the end; paper: 0.1", low=0)
    outer_beta1: float = setting(0.5, "paper: 0.9, slower at first", low=0, high=0.9999)
    outer_beta2: float = setting(0.999, "PyTorch: 0.999", low=0, high=0.9999)
    learners_per_step: int = setting(1, "fresh learners per outer step and process")
    cuda_graph: bool = setting(
        True, "on CUDA, if learners have one architecture", choices=(False, True), free=True
    )
    # validation, test and files
    validate_every: int = setting(100, "outer steps", free=True)
    validation_learners: int = setting(2, "fresh learners", free=True)
    validation_images: int = setting(2000, "images per validation", free=True)
    test_learners: int = setting(10, "fresh learners at the end", free=True)
    checkpoint_every: float = setting(60.0, "seconds; 0: every outer step", low=0, free=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))

    @property
    def condition(self):
        """The variant, and its order unless that is "in order"; names folders and curves."""
        return self.variant if self.order == "in order" else f"{self.variant}-{self.order}"


# ---- data ----

# Random streams, one per purpose. Every draw is seeded by (seed, purpose, step, learner), never by
# what was drawn before: so a run can be resumed, or shared by processes, and stays the same.
TEACHER, TEST_LEARNERS, CURRICULUM, META_TRAINING = range(4)
SHORT_TRAINING, FULL_TRAINING, ARCHITECTURES, TUNING, BOOTSTRAP = range(4, 9)

Split = namedtuple("Split", "images labels")  # [N, C, H, W] float, normalized; [N] int64
# mean and std [C] of pixels in 0..1; the SHA-256 of a file
Data = namedtuple("Data", "train validation test mean std classes sha256", defaults=[10, None])

FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif
DejaVuSerif-Bold STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10
DejaVuSans-BoldOblique DejaVuSerif-Italic STIXGeneralBolIta cmb10 cmss10 cmtt10""".split()


@contextlib.contextmanager
def seeded(*key):
    """Inside, random numbers follow from the key (seed, purpose, ...); outside nothing changes."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        yield


def draw_glyph(font, digit):
    """A digit in one of matplotlib's fonts, a PIL image of 28 x 28 grey pixels."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    path = Path(get_data_path(), "fonts", "ttf", f"{font}.ttf")
    canvas = Image.new("L", (99, 99))
    typeface = ImageFont.truetype(str(path), 48)
    ImageDraw.Draw(canvas).text((50, 50), str(digit), 255, typeface, "mm")
    return ImageOps.expand(ImageOps.pad(canvas.crop(canvas.getbbox()), (20, 20)), 4)


def draw_glyphs(count, fonts, seed):
    """Distorted, noisy digits: images [count, 1, 28, 28] in 0..1 and labels [count]."""
    glyphs = {(font, digit): draw_glyph(font, digit) for font in fonts for digit in range(10)}
    distort = transforms.RandomAffine(degrees=15, translate=(0.04, 0.04), scale=(0.85, 1.1))
    labels = torch.arange(count) % 10
    with seeded(seed):
        chosen = [(fonts[torch.randint(len(fonts), ())], label) for label in labels.tolist()]
        images = np.stack([distort(glyphs[font_and_digit]) for font_and_digit in chosen])
        images = torch.from_numpy(images)[:, None] / 255
        images += 0.15 * torch.rand(count, 1, 1, 1) * torch.randn(images.shape)
    return images.clamp(0, 1), labels


def to_tensors(images, labels, name=""):
    """Images [N, C, H, W] in 0..1 and labels [N].

    From uint8 arrays [N, H, W] or [N, H, W, C], and [N] or [N, 1]; ValueError for any others.
    """
    images = np.asarray(images)
    labels = np.asarray(labels)
    channels = images.shape[3:]
    if images.dtype != np.uint8 or images.ndim < 3 or channels not in ((), (1,), (3,)):
        must_be = "must be uint8 of 1 or 3 channels, [N, H, W] or [N, H, W, C]"
        raise ValueError(f"{name}images {must_be}")
    N, *sides = images.shape[:3]
    fitting = [min(max(4 * round(side / 4), 8), 128) for side in sides]
    if sides != fitting:
        must_have = "must have sides of 8 to 128 pixels, multiples of 4"
        raise ValueError("{}images {}: {} x {} would do".format(name, must_have, *fitting))
    if N == 0 or labels.dtype.kind not in "iu" or labels.shape not in ((N,), (N, 1)):
        raise ValueError(f"{name}labels must be {N:,} whole numbers, one for each image")
    images = torch.from_numpy(images).float() / 255
    images = images.permute(0, 3, 1, 2) if channels else images[:, None]
    return images, torch.from_numpy(labels.astype(np.int64).reshape(N))


def download(dataset, folder):
    """Parts (images, labels) of a data set of torchvision: training and test."""
    name = DATASETS[dataset]
    place = Path(folder, "cifar-10-batches-py" if dataset == "cifar10" else f"{name}/raw")
    missing = [path for path in (place, *place.parents) if not path.exists()]
    try:
        with reading(place):
            load = getattr(datasets, name)
            parts = [load(folder, train=training, download=True) for training in (True, False)]
            return [to_tensors(part.data, part.targets) for part in parts]
    except InputError as error:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()
        advice = "put its files there, or choose --data DIR or --config quick"
        raise InputError(f"{error}: {advice}") from None


def read_npz(path):
    """Parts (images, labels) of a file, shuffled: training, validation if it has any, test."""
    parts = []
    with reading(path), np.load(path) as file, seeded(0):  # executes nothing
        has_validation = {"val_images", "val_labels"} & {*file}
        for name in ("train_", "val_", "test_") if has_validation else ("train_", "test_"):
            part = to_tensors(file[f"{name}images"], file[f"{name}labels"], name)
            order = torch.randperm(len(part[1]))  # else the first of many may be of one class
            parts.append([x[order] for x in part])
    return parts


def load_data(dataset, folder, device):
    """The Data of a data set. Raises InputError if its files cannot be had, or used."""
    validation_size = 10_000
    sha256 = None
    if dataset == "glyphs":  # half of the test images are in fonts that are not trained on
        validation_size = 4_000
        parts = [draw_glyphs(20_000, FONTS[:10], 0)]
        parts.append(draw_glyphs(5_000, FONTS[:6] + FONTS[10:], 1))
    elif dataset in DATASETS:
        parts = download(dataset, folder)
    else:
        path = Path(dataset)
        elsewhere = Path(folder, path.name)
        if elsewhere.exists() and not path.exists():
            path = elsewhere
        parts = read_npz(path)
        validation_size = math.ceil(len(parts[0][1]) / 6)
        sha256 = sha256_of(path)
    if len(parts) == 2:  # the last images for training are kept for validation
        (images, labels), test = parts
        count = len(images) - validation_size
        parts = (images[:count], labels[:count]), (images[count:], labels[count:]), test
    images, labels = parts[0]
    classes = len(labels.unique())
    if classes not in range(2, 1001) or not all(
        0 <= labels.amin() <= labels.amax() < classes for _, labels in parts
    ):
        must_be = "labels must be 0 to K - 1, of 2 to 1,000 classes, each left for training"
        raise InputError(f"{dataset}: {must_be}")
    std, mean = torch.std_mean(images, dim=(0, 2, 3))
    if std.amin() == 0:
        raise InputError(f"{dataset}: a channel is the same in all pixels of all images")
    if len({images.shape[1:] for images, _ in parts}) > 1:
        raise InputError(f"{dataset}: images must be of one size")
    splits = []
    for images, labels in parts:
        images = (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        splits.append(Split(images.to(device), labels.to(device)))
    return Data(*splits, mean.to(device), std.to(device), classes, sha256)


def sample(split, *shape):
    """Random images [*shape, C, H, W] and labels [*shape] of a split, with replacement."""
    index = torch.randint(len(split.labels), shape, device=split.labels.device)
    return Split(split.images[index], split.labels[index])


def first(split, count):
    """The first `count` images and labels of a split."""
    return Split(split.images[:count], split.labels[:count])


# ---- teacher ----


class Curriculum(namedtuple("Curriculum", "images labels lr momentum")):
    """What a learner trains on: images [T, B, C, H, W], labels [T, B], lr [T], momentum [T]."""

    def shuffled(self, order):
        """Its batches, or all its images, in random order; lr and momentum keep their step."""
        if order == "in order":
            return self
        images_per_piece = self.labels.shape[1] if order == "batch-shuffled" else 1
        count = self.labels.numel() // images_per_piece
        index = torch.rand(count, device=self.lr.device).argsort()  # a CUDA graph can replay it

        def rearrange(x):
            pieces = x.reshape(count, images_per_piece, *x.shape[2:])
            return pieces.index_select(0, index).view_as(x)

        return self._replace(images=rearrange(self.images), labels=rearrange(self.labels))


def make_generator(config, image_shape, classes):
    """From latent input and one-hot label [B, latent + K] to images in -1..1 [B, C, H, W].

    Paper, section 3.1; batch statistics are those of one inner step.
    """
    channels, height, width = image_shape
    filters = config.generator_filters
    half = max(1, filters // 2)
    stateless = {"track_running_stats": False}
    return nn.Sequential(
        nn.Linear(config.latent_size + classes, config.hidden_size, bias=False),
        nn.BatchNorm1d(config.hidden_size, **stateless),
        nn.LeakyReLU(0.1),
        nn.Linear(config.hidden_size, filters * (height // 4) * (width // 4)),
        nn.Unflatten(1, (filters, height // 4, width // 4)),
        nn.BatchNorm2d(filters, **stateless),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(filters, half, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(half, **stateless),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(half, channels, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels, **stateless),  # else most pixels soon saturate
        nn.Tanh(),
    )


class Teacher(nn.Module):
    """All that is meta-learned, phi: generator, latent input, inner learning rate, momentum.

    Makes a differentiable Curriculum; only the variant `real` reads the data.
    """

    def __init__(self, config, image_shape, classes):
        super().__init__()
        self.config = config
        self.classes = classes
        T = config.inner_steps
        B = config.batch_size
        # a logarithm keeps the learning rate positive, a logit the momentum within (0, 1);
        # 1e-6 because the logit of 0 would be infinite
        self.log_lr = nn.Parameter(torch.full((T,), config.inner_lr).log())
        self.logit_momentum = nn.Parameter(torch.full((T,), config.momentum).logit(1e-6))
        if config.variant == "pixels":
            self.images = nn.Parameter(torch.randn(T, B, *image_shape))
        elif config.variant != "real":
            self.generator = make_generator(config, image_shape, classes)
            if config.variant != "random":
                learned = config.variant == "learned"
                latent = torch.randn(T, B, config.latent_size)
                self.latent = nn.Parameter(latent) if learned else nn.Buffer(latent)

    def forward(self, data):
        config = self.config
        T = config.inner_steps
        B = config.batch_size
        lr = self.log_lr.exp()
        momentum = self.logit_momentum.sigmoid()
        if config.variant == "real":
            return Curriculum(*sample(data.train, T, B), lr, momentum)
        # labels count through the classes, and begin anew in batches that have room for all
        labels = torch.arange(T * B, device=lr.device).view(T, B)
        if self.classes <= B:
            labels = labels[:1].expand(T, B)
        labels = labels % self.classes
        if config.variant == "pixels":
            return Curriculum(self.images, labels, lr, momentum)
        if config.variant == "random":
            latent = lr.new_empty(T, B, config.latent_size).normal_()
        else:
            latent = self.latent
        inputs = torch.cat([latent, F.one_hot(labels, self.classes).to(latent)], 2)
        make = self.generator
        if config.flat:  # keep no graph, and make the images once more for their gradient
            options = {"use_reentrant": False, "preserve_rng_state": False}
            make = functools.partial(checkpoint, make, **options)
        images = torch.stack([config.image_scale * make(step) for step in inputs])
        return Curriculum(images, labels, lr, momentum)


# ---- learner ----


Architecture = namedtuple(
    "Architecture", "filters kernels pooling normalization hidden_units classes", defaults=[10]
)


class MaxPool(nn.Module):
    """2x2 max pooling as a gather: its derivatives of every order are fast on a CPU."""

    def forward(self, x):
        _, index = F.max_pool2d(x.detach(), 2, return_indices=True)
        return x.flatten(2).gather(2, index.flatten(2)).view_as(index)


class WeightNorm(nn.Module):
    """Weights g v / |v|, with |v| of each output channel (paper, section 3.1).

    Written out, because PyTorch's weight_norm has a wrong second derivative on a CPU
    (results/NOTES.md).
    """

    def __init__(self, v):
        super().__init__()
        self.g = nn.Parameter(v.detach().flatten(1).norm(dim=1))

    def forward(self, v):
        scale = self.g / v.flatten(1).norm(dim=1)
        return v * scale.view(-1, *[1] * (v.dim() - 1))


def make_learner(architecture, image_shape):
    """The learner, from images [N, C, H, W] to logits [N, K]: change it here.

    Any module without running state will do.
    """
    channels, height, width = image_shape
    layers = []
    for filters, kernel in zip(architecture.filters, architecture.kernels, strict=True):
        convolution = nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight)
        pool = MaxPool() if architecture.pooling == "max" else nn.AvgPool2d(2)
        normalize = NORMALIZATIONS[architecture.normalization](filters)
        layers += [convolution, pool, normalize, nn.LeakyReLU()]
        channels = filters
        height //= 2
        width //= 2
    layers.append(nn.Flatten())
    features = channels * height * width
    output = nn.Linear(architecture.hidden_units or features, architecture.classes)
    nn.init.zeros_(output.weight)  # Kaiming's cost 2 points (results/NOTES.md)
    nn.init.zeros_(output.bias)
    if architecture.hidden_units:  # then this layer starts near zero instead, for the same reason
        hidden = nn.Linear(features, architecture.hidden_units)
        nn.init.normal_(hidden.weight, std=0.002)
        nn.init.zeros_(hidden.bias)
        nn.init.orthogonal_(output.weight)
        layers += [hidden, nn.LeakyReLU()]
    layers.append(output)
    if architecture.normalization == "weight":
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)  # a weight of 0 has no direction
            if isinstance(layer, nn.Conv2d | nn.Linear):
                register_parametrization(layer, "weight", WeightNorm(layer.weight))
    return nn.Sequential(*layers)


@functools.cache
def blueprint(architecture, image_shape):
    """A learner without memory: its code, and its parameters' names and shapes.

    Raises InputError if it does not suit such images.
    """
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        learner = make_learner(architecture, image_shape)
        for name, _ in learner.named_buffers():
            raise InputError(f"make_learner: learners must have no running state, such as {name}")
        try:
            learner(torch.empty(1, *image_shape))  # one image: an error where 1x1 is normalized
        except (ValueError, RuntimeError) as error:
            size = f"{len(architecture.filters)} conv blocks, images {[*image_shape]}"
            raise InputError(f"make_learner fails, too deep? ({size}: {str(error)[:80]})") from None
    return learner


def to_vector(parameters):
    """theta [P], all parameters in one vector; those of convolutions with channels last."""
    parts = [p.permute(0, 2, 3, 1) if p.dim() == 4 else p for p in parameters]
    return torch.cat([part.flatten() for part in parts])


def to_parameters(theta, learner):
    """{name: view of theta [P]}, the inverse of `to_vector` for this learner."""
    named = dict(learner.named_parameters())
    parts = theta.split([p.numel() for p in named.values()])
    for (name, p), part in zip(named.items(), parts, strict=True):
        if p.dim() == 4:  # a convolution is faster in this memory layout
            named[name] = part.view(p.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        else:
            named[name] = part.view(p.shape)
    return named


def logits(theta, images, architecture):
    """Logits [N, K] of the learner with parameters theta [P] for images [N, C, H, W]."""
    learner = blueprint(architecture, images.shape[1:])
    return torch.func.functional_call(learner, to_parameters(theta, learner), images)


def init_learner(architecture, image_shape):
    """theta_0 [P], the parameters of a fresh learner."""
    return to_vector(make_learner(architecture, image_shape).parameters()).detach()


def sample_architecture(config, classes):
    """A random Architecture of the config's search space, for so many classes."""

    def choose(options):
        return options[int(torch.randint(len(options), ()))] if len(options) > 1 else options[0]

    most = len(config.filters)
    least = min(config.least_blocks or most, most)
    blocks = config.filters[: choose(range(least, most + 1))]
    filters = tuple(choose(range(f[0], f[1] + 1)) if type(f) is tuple else f for f in blocks)
    kernels = tuple(choose(config.kernels) for _ in blocks)
    pooling = choose(config.pooling)
    rest = config.normalization, config.hidden_units, classes
    return Architecture(filters, kernels, pooling, *rest)


def check_depth(config, data):
    """Raises InputError if images are too small for all blocks."""
    all_blocks = dataclasses.replace(config, least_blocks=0)  # 0: always all
    blueprint(sample_architecture(all_blocks, data.classes), data.train.images.shape[1:])


# ---- inner loop and meta-gradient ----
#   theta_t   learner's parameters after t steps      alpha_t, mu_t   inner learning rate, momentum
#   v_t       velocity                                lambda_t        adjoint dL/d(theta_t, v_t)
#   g_t       gradient of the loss on batch t         phi             all that the teacher learns
#
#   inner step (paper, section 3.1)  v_{t+1} = mu_t v_t + g_t(theta_t)
#                                    theta_{t+1} = theta_t - alpha_t v_{t+1}
#   meta-loss L                      mean over chosen t of the loss of theta_t on real data
#   meta-gradient                    dL/dphi


def leaf(x):
    """The same numbers without their history, as an input to differentiate by."""
    return x.detach().requires_grad_(x.is_floating_point())


def inner_step(theta, velocity, images, labels, lr, momentum, architecture, create_graph=False):
    """(theta, velocity) after a step of SGD with momentum, as torch.optim.SGD takes it.

    images [B, C, H, W], labels [B], lr [], momentum []: change the inner optimizer here.
    """
    loss = F.cross_entropy(logits(theta, images, architecture), labels)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=create_graph)
    velocity = momentum * velocity + gradient
    return theta - lr * velocity, velocity


def unroll(theta, curriculum, architecture, create_graph=False):
    """Train from theta_0 on a curriculum: yields (theta_t, v_t) for t = 0, ..., T.

    Differentiable with create_graph; else no graph outlives its step.
    """
    state = leaf(theta), torch.zeros_like(theta)
    yield state
    for batch in zip(*curriculum, strict=True):
        theta, velocity = inner_step(*state, *batch, architecture, create_graph)
        state = (theta, velocity) if create_graph else (leaf(theta), velocity.detach())
        yield state


def real_loss(theta, real, architecture):
    """A learner's cross-entropy on real data (a Split), in nats."""
    parts = real.images.split(128)  # for a CPU's cache
    outputs = torch.cat([logits(theta, part, architecture) for part in parts])
    return F.cross_entropy(outputs, real.labels)


def meta_gradient(theta, curriculum, architecture, batches):
    """Meta-loss, and its gradient in the curriculum's images, lr and momentum.

    batches[t]: real data (a Split) for a loss of theta_{t+1}, or None.
    Returns (loss [], images [T, B, C, H, W], lr [T], momentum [T]); `add_meta_gradient` goes on to
    phi.
    """
    curriculum = Curriculum(*map(leaf, curriculum))
    _, *states = unroll(theta, curriculum, architecture, create_graph=True)
    losses = []
    for (theta_t, _), real in zip(states, batches, strict=True):
        if real is not None:
            losses.append(real_loss(theta_t, real, architecture))
    meta_loss = torch.stack(losses).mean()
    inputs = curriculum.images, curriculum.lr, curriculum.momentum
    gradients = torch.autograd.grad(meta_loss, inputs, materialize_grads=True)
    return meta_loss.detach(), *gradients


def meta_gradient_flat(theta, curriculum, architecture, batches):
    """The same numbers, to rounding, in memory that hardly grows with T: the adjoint method.

    A first sweep trains the learner and keeps its states. A second one, from the last step to
    the first, takes a step again with its graph and pulls the adjoint lambda_{t+1} back through it.
    """
    curriculum = Curriculum(*(x.detach() for x in curriculum))
    states = theta.new_empty(len(batches) + 1, 2, len(theta))  # one piece leaves no gaps in memory
    for t, state in enumerate(unroll(theta, curriculum, architecture)):
        states[t] = torch.stack(state).detach()
    adjoint = [torch.zeros_like(x) for x in state]  # lambda_T; its meta-loss comes in below
    gradients = [
        torch.empty_like(x) for x in (curriculum.images, curriculum.lr, curriculum.momentum)
    ]
    count = sum(real is not None for real in batches)
    meta_loss = 0
    for t in reversed(range(len(batches))):
        state = [leaf(x) for x in states[t]]
        images, labels, lr, momentum = (leaf(x[t]) for x in curriculum)
        outputs = inner_step(*state, images, labels, lr, momentum, architecture, create_graph=True)
        output_weights = adjoint
        if batches[t] is not None:  # this step's share of the meta-loss: one more output, weight 1
            loss = real_loss(outputs[0], batches[t], architecture) / count
            meta_loss = meta_loss + loss.detach()
            outputs = (*outputs, loss)
            output_weights = (*adjoint, torch.ones_like(loss))
        inputs = (*state, images, lr, momentum)
        pulled_back = torch.autograd.grad(outputs, inputs, output_weights, materialize_grads=True)
        adjoint = pulled_back[:2]
        for gradient, of_step in zip(gradients, pulled_back[2:], strict=True):
            gradient[t] = of_step
    return meta_loss, *gradients


# ---- outer step ----

OuterStep = namedtuple("OuterStep", "meta_loss gradient_norm")


def add_meta_gradient(teacher, data, architecture, theta):
    """Train a learner from theta_0, add its meta-gradient to phi's .grad; return the meta-loss."""
    config = teacher.config
    curriculum = teacher(data).shuffled(config.order)
    batches = [None] * config.inner_steps
    for t in range(config.inner_steps)[:: -config.meta_loss_every]:  # backwards from the last
        batches[t] = sample(data.train, config.meta_batch_size)
    method = meta_gradient_flat if config.flat else meta_gradient
    meta_loss, *gradients = method(theta, curriculum, architecture, batches)
    outputs = curriculum.images, curriculum.lr, curriculum.momentum
    if config.variant == "real":  # nothing of the teacher is in real images
        outputs, gradients = outputs[1:], gradients[1:]
    torch.autograd.backward(outputs, gradients)
    return meta_loss


def outer_step(teacher, optimizer, data, step, replay=None):
    """One step of Adam on phi along the mean meta-gradient of fresh learners.

    step counts from 0; replay (see `capture_graph`) knows its architecture.
    """
    config = teacher.config
    learners = config.learners_per_step
    phi = [*teacher.parameters()]
    progress = (1 - math.cos(math.pi * step / config.outer_steps)) / 2
    decay = 1 + (config.outer_lr_end - 1) * progress
    optimizer.param_groups[0]["lr"] = config.outer_lr * decay
    optimizer.zero_grad(set_to_none=False)  # a CUDA graph adds to the same addresses
    meta_loss = 0
    for k in range(RANK * learners, (RANK + 1) * learners):
        with seeded(config.seed, META_TRAINING, step, k):
            architecture = sample_architecture(config, data.classes)
            theta = init_learner(architecture, data.train.images.shape[1:]).to(data.mean)
            add = replay or functools.partial(add_meta_gradient, teacher, data, architecture)
            meta_loss = meta_loss + add(theta)
    for x in (meta_loss, *(p.grad for p in phi)):
        if WORLD > 1:
            distributed.all_reduce(x)
        x /= learners * WORLD
    optimizer.step()
    gradient_norm = nn.utils.get_total_norm([p.grad for p in phi])
    return OuterStep(*torch.stack([meta_loss, gradient_norm]).tolist())


def cuda_graph_possible(config):
    """Whether all learners have one architecture, as one CUDA graph needs it."""
    single = len(config.kernels) == len(config.pooling) == 1 and not config.least_blocks
    return single and all(type(filters) is int for filters in config.filters)


def capture_graph(teacher, data):
    """`add_meta_gradient` as one CUDA graph: a function of theta_0; draws follow `seeded`."""
    architecture = sample_architecture(teacher.config, data.classes)
    theta = init_learner(architecture, data.train.images.shape[1:]).to(data.mean)
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    torch.backends.cudnn.benchmark = True  # the graph keeps the fastest kernels
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture needs a warm-up
        for _ in range(3):
            add_meta_gradient(teacher, data, architecture, theta)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):  # records, computes nothing
        meta_loss = add_meta_gradient(teacher, data, architecture, theta)

    def replay(theta_0):
        theta.copy_(theta_0)
        graph.replay()
        return meta_loss.clone()

    return replay


# ---- evaluation ----


@torch.no_grad()
def accuracy(theta, split, architecture):
    """The fraction of a split that the learner gets right, 1,000 images at a time."""
    outputs = [logits(theta, images, architecture) for images in split.images.split(1000)]
    predictions = torch.cat(outputs).argmax(1)
    return (predictions == split.labels).double().mean().item()


def evaluate(teacher, data, split, learners, order=None, every_step=False):
    """Accuracy of fresh learners, unseen in training: a row of evaluation.json.

    order: one of ORDERS, by default the teacher's. every_step: T accuracies, after each inner step.
    """
    config = teacher.config
    order = order or config.order
    accuracies = {}
    share = range(RANK, learners, WORLD)
    for k in tqdm(share, order, leave=False, delay=10, disable=NO_BAR):
        with seeded(config.seed, TEST_LEARNERS, k), torch.no_grad():
            architecture = sample_architecture(config, data.classes)
            theta = init_learner(architecture, split.images.shape[1:]).to(data.mean)
            curriculum = teacher(data).shuffled(order)
        _, *states = unroll(theta, curriculum, architecture)
        if every_step:
            accuracies[k] = [accuracy(theta, split, architecture) for theta, _ in states]
        else:
            accuracies[k] = accuracy(states[-1][0], split, architecture)
    accuracies = gathered(accuracies)
    transductive = config.normalization == "batch"  # predictions depend on each other
    row = {"order": order, "every_step": every_step, "transductive": transductive}
    return row | summary([accuracies[k] for k in range(learners)])


def gathered(results):
    """The dicts of all processes in one."""
    shares = [results] * WORLD  # each is overwritten, if there are several
    if WORLD > 1:
        distributed.all_gather_object(shares, results)
    return {key: x for share in shares for key, x in share.items()}


def summary(accuracies):
    """{mean, std (None if n = 1), n, accuracies} of accuracies [n] or [n][T]."""
    n = len(accuracies)
    std = np.std(accuracies, axis=0, ddof=1).tolist() if n > 1 else None
    mean = np.mean(accuracies, axis=0).tolist()
    return {"mean": mean, "std": std, "n": n, "accuracies": accuracies}


def in_words(row):
    """A summary as 'mean +- std (n fresh learners)'."""
    spread = f" +- {row['std']:.3f}" if row["n"] > 1 else ""
    remark = ", transductive" if row.get("transductive") else ""
    return f"{row['mean']:.3f}{spread} ({row['n']} fresh learners{remark})"


# ---- files ----


@contextlib.contextmanager
def reading(path):
    """What a missing, damaged or hostile file raises inside becomes an InputError."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the error says enough
            yield
    except Exception as error:
        reason = " ".join(str(error).split(". ")[0].split())[:150]
        reason = f"{type(error).__name__}: {reason}"
        raise InputError(f"cannot read {path} ({reason})") from None


def sha256_of(path):
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path):
    """The content of a .json or .pt (a dict), or a .jsonl (its finished lines)."""
    with reading(path):
        if path.suffix == ".json":
            return dict(json.loads(path.read_text("utf-8")))
        if path.suffix == ".jsonl":
            return [dict(json.loads(line)) for line in path.read_text("utf-8").split("\n")[:-1]]
        content = torch.load(path, map_location="cpu", weights_only=True)  # executes nothing
        if zipfile.ZipFile(path).testzip():
            raise ValueError("other bytes than were written")
        return content


def write(path, content):
    """Write bytes, or what `read` reads; a kill or a full disk leaves the old file or the new.

    Only rank 0 writes.
    """
    if RANK > 0:
        return
    if path.suffix == ".pt":
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    elif path.suffix == ".json":
        content = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
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
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"cannot write {path}: {error.strerror}; what was there before is intact"
        ) from None


@contextlib.contextmanager
def locked(folder):
    """Lock the folder. Raises InputError if another process has it."""
    if RANK > 0:
        yield
        return
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
    """The Teacher and the content of a .pt, with a Curriculum on the device.

    Raises InputError for a damaged file, and for one that was trained on other images than `data`.
    """
    content = read(path)
    with reading(path):
        config = Config(**content["config"])
        curriculum = Curriculum(**content["curriculum"])
        image_shape = curriculum.images.shape[2:]
        with torch.device("meta"):  # the file's own tensors come in
            teacher = Teacher(config, image_shape, content.get("classes", 10))
        teacher.load_state_dict(content["teacher"], assign=True)
        T, B = config.inner_steps, config.batch_size
        channels = image_shape[:1]
        expected = [(T, B, *image_shape), (T, B), (T,), (T,), channels, channels]
        tensors = [*curriculum, content["mean"], content["std"]]
        floats = [*teacher.state_dict().values(), *tensors[:1], *tensors[2:]]  # not the labels
        F.one_hot(curriculum.labels, teacher.classes)  # raises an error if these are no labels
        if (
            [x.shape for x in tensors] != expected
            or not all(x.dtype == torch.float32 and x.isfinite().all() for x in floats)
            or content["step"] not in range(config.outer_steps + 1)
            or content["seconds"] < 0
        ):
            raise ValueError("step, seconds or tensors do not fit the config")
    if data:
        here = data.train.images.shape[1:], data.classes, data.sha256
        there = image_shape, teacher.classes, content.get("data_sha256")
        pixels = torch.stack([content["mean"] - data.mean.cpu(), content["std"] - data.std.cpu()])
        if here != there or pixels.abs().max() > 1e-3:
            images = f"other images than this {config.dataset}"
            raise InputError(f"{path} was trained on {images}: see --data")
    curriculum = Curriculum(*(x.detach().to(device) for x in curriculum))
    return teacher.to(device), content | {"curriculum": curriculum}


def environment(device):
    """Where a result comes from; a commit ends in "-dirty" if files have changed."""
    git = "git describe --always --dirty --abbrev=40 '--exclude=*'"  # by a shell: may be missing
    here = Path(__file__).parent
    answer = subprocess.run(git, shell=True, capture_output=True, text=True, cwd=here)
    cpu = f"{os.uname().machine} CPU, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "ranks": WORLD,
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": answer.stdout.strip() or None,
    }


# ---- training and testing ----


def begin(config, data, folder, resume, init=None):
    """A new run, or the one in the folder: (teacher, optimizer, outer steps done, log).

    A new run starts from the phi of the teacher in the file `init`, if there is one.
    """
    image_shape = data.train.images.shape[1:]
    check_depth(config, data)
    size = len(data.train.labels)
    if config.meta_batch_size > size:
        raise InputError(f"meta_batch_size: must be at most {size:,}, all images for training")
    if config.inner_steps * config.batch_size < data.classes:
        must_be = f"must be at least {data.classes}, an image of each class"
        raise InputError(f"inner_steps * batch_size {must_be}")
    if RANK == 0:
        refuse_other_run(config, folder, resume)
    content = {"step": 0, "log": []}
    path = folder / "checkpoint.pt"
    if path.exists():
        teacher, content = read_teacher(path, data.mean.device, data)
        teacher.config = config  # --resume may change free settings
    else:
        with seeded(config.seed, TEACHER):
            teacher = Teacher(config, image_shape, data.classes).to(data.mean.device)
        if init:
            source = read_teacher(init)[0]
            shapes = [{k: x.shape for k, x in t.state_dict().items()} for t in (source, teacher)]
            if source.classes != data.classes or shapes[0] != shapes[1]:
                raise InputError(f"--init {init}: must be of this variant and these sizes")
            teacher.load_state_dict(source.state_dict())
    betas = config.outer_beta1, config.outer_beta2
    optimizer = torch.optim.Adam(teacher.parameters(), config.outer_lr, betas)
    with reading(path):
        if "optimizer" in content:
            optimizer.load_state_dict(content["optimizer"])
        return teacher, optimizer, int(content["step"]), list(content["log"])


def refuse_other_run(config, folder, resume):
    """Raises InputError if the folder holds files that this run must not touch."""
    elsewhere = "choose another --runs, or --set name=NAME"
    names = "config.json", "checkpoint.pt", "teacher.pt", "log.jsonl", "evaluation.json"
    present = [name for name in names if (folder / name).exists()]
    if present in ([], ["config.json"]):  # the second: killed before the first checkpoint
        return
    for name in ("config.json", "checkpoint.pt"):
        if name not in present:
            holds = f"holds {', '.join(present)}, but no {name} to resume from"
            raise InputError(f"{folder} {holds}: {elsewhere}")
    path = folder / "config.json"
    with reading(path):
        there = vars(Config(**read(path)["config"]))
    changes = []
    for field in dataclasses.fields(config):
        now = getattr(config, field.name)
        if now != there[field.name] and not field.metadata["free"]:
            changes.append(f"{field.name}={there[field.name]!r}, now {now!r}")
    if changes:
        raise InputError(f"{folder} holds a run with {'; '.join(changes)}: {elsewhere}")
    if not resume:
        raise InputError(f"{folder} holds this run: continue it with --resume, or {elsewhere}")


def save(folder, teacher, optimizer, data, step, log):
    """Write log.jsonl, teacher.pt (with one sampled curriculum) and checkpoint.pt."""
    with torch.no_grad(), seeded(teacher.config.seed, CURRICULUM):
        curriculum = teacher(data)._asdict()
    content = {
        "config": dataclasses.asdict(teacher.config),
        "step": step,
        "seconds": log[-1]["seconds"],
        "teacher": {name: x.cpu() for name, x in teacher.state_dict().items()},
        "curriculum": {name: x.detach().cpu().clone() for name, x in curriculum.items()},
        "classes": data.classes,
        "data_sha256": data.sha256,
        "mean": data.mean.cpu(),
        "std": data.std.cpu(),
    }
    checkpoint = content | {"optimizer": optimizer.state_dict(), "log": log}
    files = {"log.jsonl": log, "teacher.pt": content, "checkpoint.pt": checkpoint}
    # after a kill between two writes, --resume must find no file without a checkpoint, and no
    # checkpoint that is newer than the others
    for name in files if step else reversed(files):
        write(folder / name, files[name])


def validate(teacher, data):
    """Accuracy of fresh learners and learned rates, for the log."""
    config = teacher.config
    split = first(data.validation, config.validation_images)
    return {
        "accuracy": evaluate(teacher, data, split, config.validation_learners),
        "lr": teacher.log_lr.exp().tolist(),
        "momentum": teacher.logit_momentum.sigmoid().tolist(),
    }


def train(config, data, folder, resume=False, init=None):
    """Meta-train to the end of the schedule. Raises InputError if training diverges."""
    teacher, optimizer, step, log = begin(config, data, folder, resume, init)
    replay = None
    if data.mean.is_cuda and config.cuda_graph and cuda_graph_possible(config):
        replay = capture_graph(teacher, data)
    origin = environment(data.mean.device)
    started = time.monotonic() - (log[-1]["seconds"] if log else 0)
    steps = range(step + 1, config.outer_steps + 1)
    bar = tqdm(steps, folder.name, config.outer_steps, initial=step, disable=NO_BAR)

    def add_line(event, **fields):  # of the present step of the loop below
        seconds = time.monotonic() - started
        log.append({"event": event, "step": step, "seconds": seconds, **fields})

    with bar, locked(folder):
        add_line("resume" if log else "start", environment=origin)
        if len(log) == 1:
            about = {"config": dataclasses.asdict(config), "environment": origin}
            write(folder / "config.json", about | {"data_sha256": data.sha256})
            add_line("validation", **validate(teacher, data))
            save(folder, teacher, optimizer, data, step, log)
        saved = time.monotonic()
        for step in bar:
            result = outer_step(teacher, optimizer, data, step - 1, replay)
            if not math.isfinite(sum(result)):
                advice = "reduce inner_lr or momentum, then outer_lr"
                if step > 1:
                    advice = f"reduce outer_lr; --init {folder}/teacher.pt goes on from here"
                raise InputError(
                    f"outer step {step} diverged: in a new run (--set name=NAME ...), {advice}"
                )
            add_line("step", **result._asdict())
            last = step == config.outer_steps
            if step % config.validate_every == 0 or last:
                add_line("validation", **validate(teacher, data))
                if RANK == 0:
                    mean = log[-1]["accuracy"]["mean"]
                    bar.write(
                        f"{folder.name}: outer step {step}, validation {mean:.3f}", sys.stderr
                    )
            if last or time.monotonic() - saved >= config.checkpoint_every:
                save(folder, teacher, optimizer, data, step, log)
                saved = time.monotonic()


def evaluate_file(path, learners, data, device):
    """Test fresh learners of a teacher's file: print rows, and write them to evaluation.json.

    Rows of this very file that already have as many learners are only printed.
    """
    teacher, content = read_teacher(path, device, data)
    config = teacher.config
    name = "evaluation.json" if path.name == "teacher.pt" else f"{path.stem}-evaluation.json"
    output = path.with_name(name)
    result = {"config": dataclasses.asdict(config), "environment": environment(device)}
    result["step"] = content["step"]
    result["sha256"] = sha256_of(path)
    rows = {}
    if output.exists():
        there = read(output)
        with reading(output):
            if there.get("sha256") == result["sha256"]:
                rows = {(row["order"], row["every_step"]): row for row in there["rows"]}
    orders = sorted(ORDERS, key=lambda order: order != config.order)  # its own comes first
    tests = {(order, False): learners for order in orders}
    tests[config.order, True] = 1 + learners // 10
    for (order, every_step), n in tests.items():
        row = rows.get((order, every_step))
        if not row or row["n"] < n:
            write(output, result | {"rows": [*rows.values()]})  # an error comes before the work
            split = first(data.test, 1000) if every_step else data.test
            row = evaluate(teacher, data, split, n, order, every_step)
            rows[order, every_step] = row
            write(output, result | {"rows": [*rows.values()]})
        if RANK == 0 and not every_step:
            print(f"{order:<16}{in_words(row)}")


# ---- command line ----


def requirement(field):
    """What a setting must be, in words."""
    about = field.metadata
    if about["choices"]:
        number = "a list of" if type(field.default) is tuple else "one of"
        return f"{number} {', '.join(str(x).lower() for x in about['choices'])}"
    if type(field.default) is str:
        return "letters, digits, ., - and _"
    return f"from {about['low']} to {about['high']:,}"


def is_allowed(value, example, about):
    """Whether a value has the example's type and is within a setting's bounds or choices."""
    if about["choices"]:
        listed = any(fnmatch.fnmatch(str(value), str(x)) for x in about["choices"])
        return listed and type(value) is type(example)
    if type(example) is str:
        return type(value) is str and re.fullmatch(r"\w[\w.-]{0,99}", value)
    if type(value) is tuple:  # [low, high]
        ordered = len(value) == 2 and all(is_allowed(x, example, about) for x in value)
        return ordered and value[0] <= value[1]
    return type(value) in (int, type(example)) and about["low"] <= value <= about["high"]


def checked(field, value):
    """The value as Config keeps it, lists as tuples. Raises InputError if it is not allowed."""
    default = field.default
    if type(value) is list:
        value = tuple(tuple(x) if type(x) is list else x for x in value)
    if type(default) is tuple:
        valid = type(value) is tuple and value != ()
        valid = valid and all(is_allowed(x, default[0], field.metadata) for x in value)
    else:
        valid = type(value) is not tuple and is_allowed(value, default, field.metadata)
    if not valid:
        must_be = f"must be {requirement(field)}, like {json.dumps(default)}"
        raise InputError(f"{field.name}={json.dumps(value)[:60]}: {must_be}")
    return float(value) if type(default) is float else value


def make_config(name="quick", settings=()):
    """The Config of an entry of configs.json, changed by "KEY=VALUE" settings.

    Raises InputError for unknown names and values that are not allowed.
    """
    configs = read(Path(__file__).with_name("configs.json"))
    if type(configs.get(name)) is not dict:
        raise InputError(f"unknown config {name[:60]!r}: configs.json has {', '.join(configs)}")
    changes = {"name": name, **configs[name]}
    for text in settings:
        key, _, value = text.partition("=")
        if type(getattr(Config, key, "")) is not str:
            with contextlib.suppress(ValueError, RecursionError):  # `checked` says what is wrong
                value = json.loads(value)
        changes[key] = value
    for key in changes:
        if key not in Config.__dataclass_fields__:
            raise InputError(f"unknown setting {key[:60]!r}: --help lists them all")
    return Config(**changes)


def argument_parser(**options):
    """An ArgumentParser with --device and --data, whose errors are InputErrors."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(formatter_class=plain, **options)

    def fail(message):
        raise InputError(message)

    parser.error = fail
    folder = os.environ.get("GTN_DATA") or "data"
    devices = "auto", "cpu", "cuda"
    parser.add_argument("--device", default="auto", choices=devices, help="(default: auto)")
    parser.add_argument("--data", default=folder, help="folder of data sets (default: $GTN_DATA)")
    return parser


def choose_device(name):
    """The torch.device for auto, cpu or cuda. Raises InputError if it is not there."""
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    index = int(os.environ["LOCAL_RANK"]) if TORCHRUN else 0
    if index >= count:
        raise InputError(f"--device {name}: no CUDA device {index}, there are {count}")
    torch.cuda.set_device(index)
    torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions do anyway
    return torch.device("cuda", index)


def run(program, command, arguments):
    """Exit status of command(arguments); an error that the user can fix is one line, and 2."""
    status = 2
    try:
        if WORLD > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend)
        command(arguments)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return 0
    except (InputError, OSError) as error:
        line = f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("alloc|out of mem", str(error)):
            raise
        line = "error: out of memory: reduce batch_size, meta_batch_size, or choose flat=true"
    except KeyboardInterrupt:
        status = 130
        line = "interrupted: all files are whole; gtn.py and nas.py continue with --resume"
    print(f"{program}: {line}", file=sys.stderr)
    return status


def main(arguments=None):
    """The command line of gtn.py: train a teacher and evaluate it, or evaluate one."""
    settings = ["settings (their defaults, meanings and bounds), for --set:"]
    for field in dataclasses.fields(Config):
        settings.append(f"  {field.name} = {json.dumps(field.default)}")
        settings.append(f"      {field.metadata['meaning']} ({requirement(field)})")
    parser = argument_parser(description=__doc__.splitlines()[0], epilog="\n".join(settings))
    add = parser.add_argument
    add("--config", help="entry of configs.json (default: quick)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="see below")
    for name in ("variant", "seed", "outer_steps"):
        short = {"dest": "set", "action": "append", "metavar": "VALUE"}
        short["type"] = f"{name}={{}}".format  # "seed=7" of 7
        add(f"--{name.replace('_', '-')}", help=f"the same as --set {name}=...", **short)
    add("--runs", help="folder of all run folders (default: runs)")
    add("--resume", action="store_true", help="continue the run in the folder, if there is one")
    add("--init", type=Path, metavar="TEACHER.pt", help="start a new run from its phi")
    add("--evaluate", type=Path, metavar="TEACHER.pt", help="evaluate it instead of training")
    add("--learners", type=int, help="for each order, with --evaluate (default: 100)")
    args = parser.parse_args(arguments)
    if args.learners is not None and (args.learners < 1 or not args.evaluate):
        parser.error("--learners: must be at least 1, and goes with --evaluate")
    device = choose_device(args.device)
    if args.evaluate:
        if args.set or args.config or args.runs or args.init:
            parser.error("--evaluate goes with --learners, --data, --device and --resume alone")
        data = load_data(read_teacher(args.evaluate)[0].config.dataset, args.data, device)
        return evaluate_file(args.evaluate, args.learners or 100, data, device)
    config = make_config(args.config or "quick", args.set)
    folder = Path(args.runs or "runs", f"{config.name}-{config.condition}-s{config.seed}")
    data = load_data(config.dataset, args.data, device)
    train(config, data, folder, args.resume, args.init)
    if RANK == 0:
        print(f"{folder}: {config.outer_steps} outer steps")
    if WORLD > 1:
        distributed.barrier()  # until rank 0 has written teacher.pt
    evaluate_file(folder / "teacher.pt", config.test_learners, data, device)


if __name__ == "__main__":
    sys.exit(run("gtn.py", main, sys.argv[1:]))

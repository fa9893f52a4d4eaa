"""Generative Teaching Networks in one file (Such et al., arXiv 1912.07768).

A teacher makes synthetic images; a freshly initialised learner trains on them for a few SGD steps
(the inner loop); its loss on real data is differentiated through the whole of that training, and
the teacher follows this meta-gradient (the outer step). The file reads in that order: config, data,
teacher, learner, inner loop and meta-gradient, evaluation, files, training, command line.

    python gtn.py                                  # embedded glyphs, no download: 90 seconds on two CPU cores
    python gtn.py --config A --variant learned     # MNIST, 20 inner steps of 32 images, 1.3 s an outer step there
    python gtn.py --help                           # every flag, config and field

The first one ends with

    runs/quick-learned-s0: 240 outer steps; config.json, log.jsonl, checkpoint.pt and teacher.pt are there
      test accuracy, in order        0.964 +- 0.005 (10 fresh learners)
      test accuracy, batch-shuffled  0.860 +- 0.072 (10 fresh learners)
      test accuracy, all-shuffled    0.796 +- 0.071 (10 fresh learners)
    next: python gtn.py --evaluate runs/quick-learned-s0/teacher.pt
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import io
import json
import math
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from tqdm import tqdm

CLASSES = 10  # of every data set below
FORMAT = 1  # version of the files that a run leaves


class InputError(Exception):
    """Something the user can mend: printed as one line, exit status 2."""


@contextlib.contextmanager
def reading(path):
    """Whatever a missing, damaged or hostile file raises inside becomes one InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or 'it is no such file'}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"{path} is damaged, or not what it should be ({type(error).__name__}: {reason})") from None


# ------------------------------------------------------------------------------------------ config

VARIANTS = ("learned", "random_fixed", "random", "pixels", "real")
DATASETS = ("mnist", "fashion", "kmnist", "cifar10", "glyphs")
NORMALIZATIONS = ("layer", "instance", "batch")


def are_filters(blocks):
    """Whether each conv block has a number of filters, or low <= high to sample it from."""
    ranges = [b if isinstance(b, tuple) and len(b) == 2 else (b, b) for b in blocks]
    return (
        bool(ranges) and all(type(n) is int for r in ranges for n in r) and all(1 <= x <= y < 2**20 for x, y in ranges)
    )


# what is valid: a test, and the same in words
COUNT = (lambda x: 1 <= x < 2**31, "a whole number from 1 to 2**31 - 1")
BATCH = (lambda x: 2 <= x < 2**31, "a whole number from 2 to 2**31 - 1")  # batch normalisation needs two
SEED = (lambda x: 0 <= x < 2**31, "a whole number from 0 to 2**31 - 1")
POSITIVE = (lambda x: 0 < x < 1e9, "a number above 0 and below 1e9")
NOT_NEGATIVE = (lambda x: 0 <= x < 1e9, "a number from 0 to below 1e9")
FRACTION = (lambda x: 0 < x < 1, "a number above 0 and below 1")
BETA = (lambda x: 0 <= x < 1, "a number from 0 to below 1")
FILTERS = (are_filters, "a list with a number of at least 1, or [low, high], for each conv block")
NAME = (re.compile(r"\w[\w.-]{0,99}").fullmatch, "letters, digits, '_', '.' and '-'")
VARIANT, DATASET, NORMALIZATION = (
    (names.__contains__, f"one of {', '.join(names)}") for names in (VARIANTS, DATASETS, NORMALIZATIONS)
)
SWITCH = (lambda x: True, "true or false")


def setting(default, source, valid):
    """A field of `Config`: its default, unit and source, and what is valid."""
    return dataclasses.field(default=default, metadata={"source": source, "valid": valid})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run; `configs.json` names differences. Raises InputError on a bad value."""

    # experiment
    name: str = setting("A", "set by --config, or yours; a run lies in <name>-<variant>-s<seed>", NAME)
    variant: str = setting(
        "learned", "images of a generator whose latent input is learned, fixed or random; pixels; real data", VARIANT
    )
    seed: int = setting(0, "fixes everything on a CPU, bit for bit", SEED)
    dataset: str = setting("mnist", "glyphs: embedded; the others: torchvision", DATASET)
    # curriculum
    inner_steps: int = setting(20, "T; earlier run: A 20, B and C 10; paper: 32", COUNT)
    batch_size: int = setting(32, "B, images per inner step; earlier run: 32, C 16; paper: 128", BATCH)
    # teacher
    latent_size: int = setting(64, "numbers per image; earlier run: 64; paper: 128", COUNT)
    hidden_size: int = setting(512, "units of the generator's first layer; paper: 1024", COUNT)
    generator_filters: int = setting(64, "at 1/4 of the image size, half of it at 1/2; paper: 128, 64", COUNT)
    image_scale: float = setting(2.0, "pixels are scale * tanh; paper: 2", POSITIVE)
    inner_lr: float = setting(0.005, "alpha at the start; paper: 0.02, where (64, 128) filters diverge", POSITIVE)
    momentum: float = setting(0.5, "mu at the start; paper: 0.5", FRACTION)
    per_step: bool = setting(True, "alpha and mu are learned for each inner step; paper: yes", SWITCH)
    # learner
    filters: tuple = setting((64, 128), "per conv block; [low, high]: sampled for every outer step", FILTERS)
    normalization: str = setting("instance", "layer, instance: per sample; batch: of the last synthetic batch",
                                 NORMALIZATION)  # fmt: skip
    # meta-gradient
    meta_batch_size: int = setting(256, "real images per meta-loss; earlier run: 1024; paper: 128", COUNT)
    meta_loss_every: int = setting(10, "inner steps from one meta-loss to the next, the last always; paper: 1",
                                   COUNT)  # fmt: skip
    segment: int = setting(20, "inner steps whose graph is held at a time; 1: least memory, a third slower", COUNT)
    # outer optimizer: Adam with cosine decay
    outer_steps: int = setting(5000, "length of the schedule; earlier run: 5000; paper: 2000", COUNT)
    outer_lr: float = setting(0.02, "paper: 0.02; earlier run: 0.01", POSITIVE)
    outer_lr_end: float = setting(0.1, "fraction of outer_lr at the end; paper: 0.1; 1: constant", NOT_NEGATIVE)
    outer_beta1: float = setting(0.5, "ours: 0.5, better after 25 and 50 outer steps; paper: 0.9", BETA)
    outer_beta2: float = setting(0.999, "Adam's default", BETA)
    learners_per_step: int = setting(1, "fresh learners averaged per outer step, by each rank of torchrun", COUNT)
    cuda_graph: bool = setting(True, "CUDA: replay a learner's meta-gradient as one graph, sampled filters padded",
                               SWITCH)  # fmt: skip
    # bookkeeping
    validate_every: int = setting(100, "outer steps", COUNT)
    validation_learners: int = setting(2, "fresh learners per validation", COUNT)
    validation_images: int = setting(2000, "images per validation", COUNT)
    test_learners: int = setting(10, "fresh learners for the test accuracy at the end", COUNT)
    checkpoint_every: float = setting(60.0, "seconds; 0: after every outer step", NOT_NEGATIVE)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind, (valid, words) = getattr(self, field.name), type(field.default), field.metadata["valid"]
            if kind is float and type(value) is int and abs(value) < 2**53:
                value = float(value)
            if kind is tuple and isinstance(value, list):
                value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
            if type(value) is not kind or not valid(value):
                example = json.dumps(field.default)
                raise InputError(f"{field.name}={json.dumps(value)}: must be {words}, such as {example}")
            object.__setattr__(self, field.name, value)


def load_configs():
    """Named experiments: {name: {field: value}}, the differences from `Config`'s defaults."""
    path = Path(__file__).with_name("configs.json")
    with reading(path):
        configs = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(configs, dict) or not all(isinstance(changes, dict) for changes in configs.values()):
            raise ValueError("line 1: must be an object of objects, {name: {field: value}}")
    return configs


def make_config(name="quick", settings=(), **flags):
    """The Config of a named experiment, changed by "KEY=VALUE" settings, then by flags that are not None."""
    configs, fields = load_configs(), {f.name: f for f in dataclasses.fields(Config)}
    if name not in configs:
        raise InputError(f"unknown config {name!r}: configs.json has {', '.join(configs)}")
    changes = {"name": name, **configs[name]}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text!r}: must be KEY=VALUE, such as --set inner_steps=5")
        with contextlib.suppress(ValueError, RecursionError):  # a bare word is a string: variant=random
            value = json.loads(value)
        changes[key] = value
    changes.update({key: value for key, value in flags.items() if value is not None})
    if unknown := [key for key in changes if key not in fields]:
        raise InputError(f"unknown field {unknown[0]!r}: must be one of {', '.join(fields)}")
    return Config(**changes)


# -------------------------------------------------------------------------------------------- data


@contextlib.contextmanager
def seeded(*key):
    """Inside, random numbers depend on the key (whole numbers) alone; outside, their stream is undisturbed."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        yield


class Split(NamedTuple):
    """images [N, C, H, W] float, normalised; labels [N] int64."""

    images: torch.Tensor
    labels: torch.Tensor


class Data(NamedTuple):
    """The whole data set on the device; mean and std [C] of the training pixels (in 0..1) normalise it."""

    train: Split
    validation: Split
    test: Split
    mean: torch.Tensor
    std: torch.Tensor


DEJAVU = [f"DejaVu{style}" for style in ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "Serif", "Serif-Bold")]
FONTS = [*DEJAVU, "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10"]
TEST_FONTS = ["DejaVuSans-BoldOblique", "DejaVuSerif-Italic", "STIXGeneralBolIta", "cmb10", "cmss10", "cmtt10"]


def glyph_bitmaps(font, size=28, height=19):
    """The ten digits of one of matplotlib's fonts, `height` pixels tall and centred: [10, size, size] in 0..1."""
    from matplotlib import ft2font, get_data_path

    face = ft2font.FT2Font(str(Path(get_data_path(), "fonts", "ttf", f"{font}.ttf")))
    face.set_size(size, 72)
    bitmaps = torch.zeros(CLASSES, size, size)
    for digit in range(CLASSES):
        face.set_text(str(digit))
        face.draw_glyphs_to_bitmap()
        ink = torch.from_numpy(np.array(face.get_image())).float() / 255
        rows, columns = ink.amax(1).nonzero(), ink.amax(0).nonzero()
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        width = round(height * ink.shape[1] / ink.shape[0])
        top, left = (size - height) // 2, (size - width) // 2
        ink = F.interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
        bitmaps[digit, top : top + height, left : left + width] = ink
    return bitmaps


def draw_glyphs(count, fonts, generator):
    """`count` distorted digits: images [count, 1, 28, 28] in 0..1 and labels [count], drawn from `fonts`."""

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, generator=generator)

    labels = torch.arange(count) % CLASSES
    bitmaps = torch.stack([glyph_bitmaps(font) for font in fonts])
    images = bitmaps[torch.randint(len(fonts), (count,), generator=generator), labels][:, None]
    angle, shear, scale = uniform(-0.25, 0.25), uniform(-0.2, 0.2), uniform(0.85, 1.2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    x, y = uniform(-0.1, 0.1), uniform(-0.1, 0.1)
    affine = torch.stack([cos, shear * cos - sin, x, sin, shear * sin + cos, y], 1).view(count, 2, 3)
    images = F.grid_sample(images, F.affine_grid(affine, images.shape, align_corners=False), align_corners=False)
    thick = uniform(-0.5, 1).clamp(min=0).view(-1, 1, 1, 1)  # a third of the digits keep their font's weight
    images = torch.lerp(images, F.max_pool2d(images, 3, stride=1, padding=1), thick)
    noise = uniform(0.0, 0.15).view(-1, 1, 1, 1) * torch.randn(images.shape, generator=generator)
    return (images + noise).clamp(0, 1), labels


def glyphs():
    """Embedded digits: 20,000 for training and validation, 5,000 for test, half from fonts never trained on."""
    parts = [(20_000, FONTS), (2_500, FONTS), (2_500, TEST_FONTS)]
    drawn = [draw_glyphs(n, fonts, torch.Generator().manual_seed(i)) for i, (n, fonts) in enumerate(parts)]
    (images, labels), *test = drawn
    test_images, test_labels = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*test, strict=True))  # alternate
    return images, labels, test_images, test_labels, 4_000


def torchvision_images(dataset, folder):
    """(training images, labels, test images, labels, validation size) of a torchvision data set, pixels in 0..1."""
    import torchvision.datasets

    name = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}[dataset]
    place = Path(folder, "cifar-10-batches-py" if name == "CIFAR10" else f"{name}/raw")
    arrays = []
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its progress would bury our one line
            for train in (True, False):
                part = getattr(torchvision.datasets, name)(folder, train=train, download=True)
                images = torch.as_tensor(part.data).float() / 255
                arrays += [images.permute(0, 3, 1, 2) if images.dim() == 4 else images[:, None]]
                arrays += [torch.as_tensor(part.targets)]
    except Exception as error:  # offline, no such folder, read-only, damaged files: the remedy is the same
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"no {name} in {place}, and it cannot be downloaded ({reason[0]}): put its files there, or name "
            "another folder with --data, or use --config quick"
        ) from None
    return (*arrays, 10_000)


def load_data(dataset, folder, device):
    """The Data of a data set, on the device. Raises InputError where its files cannot be had."""
    if dataset == "glyphs":
        images, labels, test_images, test_labels, validation = glyphs()
    else:
        images, labels, test_images, test_labels, validation = torchvision_images(dataset, folder)
    train = len(images) - validation
    std, mean = torch.std_mean(images[:train], dim=(0, 2, 3))
    splits = [(images[:train], labels[:train]), (images[train:], labels[train:]), (test_images, test_labels)]
    return Data(
        *(Split(((x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).to(device), y.to(device)) for x, y in splits),
        mean.to(device), std.to(device),
    )  # fmt: skip


def sample(split, *shape):
    """Random images [*shape, C, H, W] and labels [*shape] of a split, with replacement."""
    index = torch.randint(len(split.labels), shape, device=split.labels.device)
    return Split(split.images[index], split.labels[index])


# ----------------------------------------------------------------------------------------- teacher


class Curriculum(NamedTuple):
    """What a learner trains on: images [T, B, C, H, W], labels [T, B] int64, lr [T], momentum [T]."""

    images: torch.Tensor
    labels: torch.Tensor
    lr: torch.Tensor
    momentum: torch.Tensor

    def detach(self):
        """The same numbers without a graph."""
        return Curriculum(*(x.detach() for x in self))

    def shuffled(self, order):
        """The same images in another order: batch-shuffled permutes T, all-shuffled T x B; lr and momentum stay."""
        T, B = self.labels.shape
        if order == "in order":
            return self
        index = torch.randperm(T)[:, None] * B + torch.arange(B) if order == "batch-shuffled" else torch.randperm(T * B)
        index = index.to(self.labels.device).view(T, B)
        return self._replace(images=self.images.flatten(0, 1)[index], labels=self.labels.flatten()[index])


class BatchNorm(nn.Module):
    """Batch normalisation of [T * B, C, ...] by the statistics of each inner step's B; images become channels-last."""

    def __init__(self, channels, batch_size):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.batch_size = batch_size

    def forward(self, x):
        y = x.movedim(1, -1)
        z = y.reshape(len(x) // self.batch_size, -1, y.shape[-1])  # [T, B * pixels, C]
        z = z.mT.unsqueeze(3)  # [T, C, B * pixels, 1], as one image for each inner step
        z = normalize(z, self.weight, self.bias, "instance", len(z))
        return z.squeeze(3).mT.reshape(y.shape).movedim(-1, 1)


def make_generator(config, image_shape):
    """Latent input and one-hot label [T * B, latent + 10] to images in -1..1 [T * B, C, H, W] (paper, section 3.1).

    Starts at a quarter of the image size; transposed convolutions double it twice.
    """
    channels, height, width = image_shape
    batch = config.batch_size
    wide, narrow = config.generator_filters, max(1, config.generator_filters // 2)
    return nn.Sequential(
        nn.Linear(config.latent_size + CLASSES, config.hidden_size, bias=False),
        BatchNorm(config.hidden_size, batch),
        nn.LeakyReLU(0.1),
        nn.Linear(config.hidden_size, wide * (height // 4) * (width // 4)),
        nn.Unflatten(1, (wide, height // 4, width // 4)),
        BatchNorm(wide, batch),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False),
        BatchNorm(narrow, batch),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(narrow, channels, 4, stride=2, padding=1, bias=False),
        BatchNorm(channels, batch),  # ours: without it most pixels soon saturate
        nn.Tanh(),
    )


class BySegment(torch.autograd.Function):
    """make(inputs) [T, ...], `size` inner steps at a time; no graph is held, each part is made again for its gradient.

    The generator's gradients are added to .grad on the way: for backward(), not torch.autograd.grad.
    """

    @staticmethod
    def forward(context, inputs, make, size):
        context.save_for_backward(inputs)
        context.make, context.size, images = make, size, None
        for start in range(0, len(inputs), size):
            part = make(inputs[start : start + size].detach())
            if images is None:  # a list of parts would leave holes in the heap
                images = part.new_empty(len(inputs), *part.shape[1:])
            images[start : start + size] = part
        return images

    @staticmethod
    def backward(context, d_images):
        inputs = leaf(*context.saved_tensors)
        with torch.enable_grad():
            for x, d_part in zip(inputs.split(context.size), d_images.split(context.size), strict=True):
                torch.autograd.backward(context.make(x), d_part)
        return inputs.grad, None, None


class Teacher(nn.Module):
    """Everything that is meta-learned, phi: generator, latent input, inner learning rate and momentum.

    Called with real data (which only the variant `real` reads) it returns a Curriculum, differentiable in phi by
    backward() (see BySegment).
    """

    def __init__(self, config, image_shape):
        super().__init__()
        self.config = config
        T, B = config.inner_steps, config.batch_size
        learned_steps = T if config.per_step else 1
        # logarithm and logit keep the learning rate positive and the momentum within (0, 1)
        self.log_lr = nn.Parameter(torch.full((learned_steps,), config.inner_lr).log())
        self.logit_momentum = nn.Parameter(torch.full((learned_steps,), config.momentum).logit())
        self.register_buffer("labels", (torch.arange(B) % CLASSES).repeat(T, 1))
        if config.variant == "pixels":
            self.images = nn.Parameter(torch.randn(T, B, *image_shape))
        elif config.variant != "real":
            self.generator = make_generator(config, image_shape)
            latent = torch.randn(T, B, config.latent_size)
            if config.variant == "learned":
                self.latent = nn.Parameter(latent)
            elif config.variant == "random_fixed":
                self.register_buffer("latent", latent)

    def forward(self, data):
        T, B = self.labels.shape
        lr, momentum = self.log_lr.exp().expand(T), self.logit_momentum.sigmoid().expand(T)
        if self.config.variant == "real":
            return Curriculum(*sample(data.train, T, B), lr, momentum)
        if self.config.variant == "pixels":
            return Curriculum(self.images, self.labels, lr, momentum)
        if self.config.variant == "random":
            latent = torch.randn(T, B, self.config.latent_size, device=lr.device, dtype=lr.dtype)
        else:
            latent = self.latent
        inputs = torch.cat([latent, F.one_hot(self.labels, CLASSES).to(latent)], 2)
        if self.config.segment < T:
            inputs.requires_grad_()  # learned or not: else backward() would not reach BySegment, nor the generator
            images = BySegment.apply(inputs, self.make, self.config.segment)
        else:
            images = self.make(inputs)
        return Curriculum(images, self.labels, lr, momentum)

    def make(self, inputs):
        """The generator's images [T, B, C, H, W] for inputs [T, B, latent + 10] of any number of inner steps."""
        images = self.generator(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        return self.config.image_scale * images


# ----------------------------------------------------------------------------------------- learner


class Architecture(NamedTuple):
    """A learner: conv blocks (convolution, 2x2 pooling, normalisation, leaky ReLU), then a linear layer."""

    filters: tuple
    kernels: tuple  # one odd size for each block
    pooling: str = "max"  # or "average"
    normalization: str = "instance"


def filter_ranges(config):
    """(low, high) of each conv block, both ends included."""
    return [f if isinstance(f, tuple) else (f, f) for f in config.filters]


def sample_architecture(config):
    """An Architecture of the config: its fixed filters, or a new draw from its ranges."""
    filters = tuple(int(torch.randint(low, high + 1, ())) for low, high in filter_ranges(config))
    return Architecture(filters, (3,) * len(filters), normalization=config.normalization)


def parameter_shapes(architecture, image_shape):
    """Shapes of what theta holds: for each block weight, scale, shift; then the linear layer's weight and bias, that
    weight's columns in the order height, width, channel.

    Raises InputError where the pooling of that many blocks leaves too little of the image.
    """
    channels, height, width = image_shape
    shapes, blocks = [], len(architecture.filters)
    for filters, kernel in zip(architecture.filters, architecture.kernels, strict=True):
        shapes += [(filters, channels, kernel, kernel), (filters,), (filters,)]
        channels, height, width = filters, height // 2, width // 2
    if height * width < (2 if architecture.normalization == "instance" else 1):  # one pixel has no variance
        raise InputError(f"{blocks} conv blocks are too deep for images of {image_shape[1]}x{image_shape[2]}")
    return [*shapes, (CLASSES, channels * height * width), (CLASSES,)]


def parameters(theta, architecture, image_shape):
    """Views of theta [P] as `parameter_shapes` has them; convolutions' weights are channels-last."""
    shapes = parameter_shapes(architecture, image_shape)
    views = []
    for part, shape in zip(theta.split([math.prod(shape) for shape in shapes]), shapes, strict=True):
        if len(shape) == 4:
            filters, channels, *kernel = shape
            views.append(part.view(filters, *kernel, channels).permute(0, 3, 1, 2))
        else:
            views.append(part.view(shape))
    return views


def init_learner(architecture, image_shape, device="cpu", dtype=torch.float32):
    """theta_0 [P], one vector: Kaiming normal convolutions, scales of one, the rest zero.

    The linear layer's weights too, where the paper has Kaiming's: with them config B is at 0.906, not 0.927, after 150
    outer steps (validation accuracy, 10 learners, seed 0).
    """
    size = sum(map(math.prod, parameter_shapes(architecture, image_shape)))
    theta = torch.zeros(size, device=device, dtype=dtype)
    *blocks, _, _ = parameters(theta, architecture, image_shape)
    for weight, scale in zip(blocks[::3], blocks[1::3], strict=True):
        nn.init.kaiming_normal_(weight, a=0.01)  # the learner's leaky ReLU
        nn.init.ones_(scale)
    return theta


def padded_learner(config, image_shape, device="cpu", dtype=torch.float32):
    """(theta_0, Architecture) of a learner of sampled filters, padded with zeros to the widest of its ranges.

    Its shapes are always the same, as a CUDA graph asks, and it is exactly the learner of the sampled filters: where
    weights, scale and shift of a filter and all that reads it are zero (the linear layer starts there), so are their
    gradients. Not so with `layer` normalisation, whose means are over the padding too.
    """
    ranges = filter_ranges(config)
    widest = Architecture(tuple(high for _, high in ranges), (3,) * len(ranges), normalization=config.normalization)
    theta = init_learner(widest, image_shape, device, dtype)
    *blocks, _, _ = parameters(theta, widest, image_shape)
    inputs = torch.ones(image_shape[0], device=device, dtype=dtype)
    for (low, high), weight, scale in zip(ranges, blocks[::3], blocks[1::3], strict=True):
        kept = torch.arange(high, device=device) < torch.randint(low, high + 1, (), device=device)
        weight *= inputs[:, None, None] * (len(inputs) / inputs.sum()).sqrt()  # Kaiming's fan-in is what is read
        weight *= kept[:, None, None, None]
        scale *= kept
        inputs = kept.to(dtype)
    return theta, widest


class Convolution(torch.autograd.Function):
    """Convolution of x [N, C, H, W] with weight [F, C, K, K], zero padding that keeps the size.

    PyTorch's double backward takes the gradient in the weight as a convolution with kernels as large as the image;
    written out as what it is, the gradient of a convolution, config A's outer step takes a tenth less on a CPU.
    """

    @staticmethod
    def forward(context, x, weight):
        context.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(context, d_out):
        x, weight = context.saved_tensors
        return F.conv_transpose2d(d_out, weight, padding=weight.shape[-1] // 2), WeightGradient.apply(x, weight, d_out)


class WeightGradient(torch.autograd.Function):
    """The gradient of `Convolution` in its weight, bilinear in x and d_out; of the weight it needs the shape alone."""

    @staticmethod
    def forward(context, x, weight, d_out):
        context.save_for_backward(x, d_out)
        context.padding = weight.shape[-1] // 2
        return nn.grad.conv2d_weight(x, weight.shape, d_out, padding=context.padding)

    @staticmethod
    def backward(context, d_weight):
        x, d_out = context.saved_tensors
        d_x = F.conv_transpose2d(d_out, d_weight, padding=context.padding)
        return d_x, None, F.conv2d(x, d_weight, padding=context.padding)


def convolve(x, weight):
    """Convolution with zero padding that keeps the size."""
    if x.shape[1] > 3:
        return Convolution.apply(x, weight)
    # Few channels: as matrix products, which leave the result channels-last as the kernels downstream want it; a
    # product for each image, for one of all of them would take its gradient in the weight on a single core.
    # F.unfold, which makes the same patches, would launch a CUDA kernel for each image.
    kernel, margin = weight.shape[-1], weight.shape[-1] // 2
    patches = F.pad(x, (margin,) * 4).unfold(2, kernel, 1).unfold(3, kernel, 1)  # [N, C, H, W, K, K]
    patches = patches.permute(0, 1, 4, 5, 2, 3).flatten(1, 3).flatten(2).mT
    products = torch.bmm(patches, weight.flatten(1).t().contiguous().expand(len(x), -1, -1))
    return products.transpose(1, 2).unflatten(2, x.shape[2:])


class MaxPool(torch.autograd.Function):
    """2x2 max pooling; PyTorch's own loses the memory layout, and adds zeros, in its double backward."""

    @staticmethod
    def forward(context, x):
        pooled, index = F.max_pool2d(x, 2, return_indices=True)
        context.save_for_backward(index)
        context.size = x.shape[2:]
        return pooled

    @staticmethod
    def backward(context, d_pooled):
        return Unpool.apply(d_pooled, *context.saved_tensors, context.size)


class Unpool(torch.autograd.Function):
    """The gradient of `MaxPool`: each number goes to where the maximum was, and its own gradient comes from there."""

    @staticmethod
    def forward(context, d_pooled, index, size):
        context.save_for_backward(index)
        if not d_pooled.is_cuda:  # on CUDA it would lose the memory layout
            return F.max_unpool2d(d_pooled, index, 2, output_size=size)
        d_pooled, index = Unpool.by_pixel(d_pooled), Unpool.by_pixel(index)
        zeros = d_pooled.new_zeros(len(index), size.numel(), index.shape[2])
        return zeros.scatter_(1, index, d_pooled).unflatten(1, size).permute(0, 3, 1, 2)

    @staticmethod
    def by_pixel(x):
        """[N, C, H, W] to [N, H * W, C], which channels-last memory is."""
        return x.permute(0, 2, 3, 1).flatten(1, 2)

    @staticmethod
    def backward(context, u):
        (index,) = context.saved_tensors
        u = Unpool.by_pixel(u).gather(1, Unpool.by_pixel(index))
        return u.unflatten(1, index.shape[2:]).permute(0, 3, 1, 2), None, None


class Normalize(torch.autograd.Function):
    """z * scale + shift, where z = (x - mean) * factor, factor = 1 / sqrt(variance + 1e-5), over `dims` of x.

    x is [N, C, H, W], scale and shift [C, 1, 1]. Its double backward takes a third of the time of group_norm's.
    """

    @staticmethod
    def forward(context, x, scale, shift, dims):
        z = x - x.mean(dims, keepdim=True)
        factor = torch.rsqrt(z.square().mean(dims, keepdim=True) + 1e-5)
        z *= factor
        context.save_for_backward(x, z, factor, scale, factor * scale)
        context.dims = dims
        return torch.addcmul(shift, z, scale)

    @staticmethod
    def backward(context, d_y):
        return *NormalizeGradient.apply(d_y, *context.saved_tensors, context.dims), None


class NormalizeGradient(torch.autograd.Function):
    """The gradients of `Normalize` in x, scale and shift, from h = dL/dy, by the means of g = h * scale and of g * z:

    d_x = factor * (g - mean(g) - z * mean(g * z)), d_scale = sum(h * z), d_shift = sum(h).

    Its own derivative, in h, scale and (through z and factor) x, is as explicit: sums over an image's pixels, the
    few numbers that follow from them, and one weighted sum of h, u and z. All means are negated, so that every term
    is added: an operation spared is a CUDA kernel spared.
    """

    @staticmethod
    def forward(context, h, x, z, factor, scale, weight, dims):
        sums = NormalizeGradient.sums(h, h * z)
        means = NormalizeGradient.minus_means(scale * sums, x, dims)  # of g and g * z
        constant, slope = factor * means
        context.save_for_backward(h, x, z, factor, scale, weight, sums, means, slope)
        context.dims = dims
        d_x = torch.addcmul(constant, h, weight).addcmul_(z, slope)
        d_shift, d_scale = sums.sum(1)
        return d_x, d_scale, d_shift

    @staticmethod
    def sums(*images):
        """Over the pixels of each of K [N, C, H, W]: [K, N, C, 1, 1]."""
        totals = images[0].new_empty(len(images), *images[0].shape[:2], 1, 1)
        for x, total in zip(images, totals, strict=True):
            torch.sum(x, (2, 3), keepdim=True, out=total)
        return totals

    @staticmethod
    def minus_means(sums, x, dims):
        """Sums over pixels, [K, N, C, 1, 1], to negated means over `dims` of x."""
        others = [1 + d for d in dims if d < 2]
        return (sums.sum(others, keepdim=True) if others else sums) / -math.prod(x.shape[d] for d in dims)

    @staticmethod
    def backward(context, u, u_scale, u_shift):
        h, x, z, factor, scale, weight, sums, means, slope = context.saved_tensors
        u_sums = NormalizeGradient.sums(u, u * z, u * h)
        u_means = NormalizeGradient.minus_means(u_sums[:2], x, context.dims)
        (ug_mean,) = NormalizeGradient.minus_means(scale * u_sums[2:], x, context.dims)
        h_mean, hz_mean = NormalizeGradient.minus_means(u_scale * sums, x, context.dims)
        d_scale = torch.addcmul(u_sums[2], u_means[0], sums[0]).addcmul_(u_means[1], sums[1])
        shift_left = torch.addcmul(u_shift, weight, u_means[0])
        scale_left = torch.addcmul(u_scale, weight, u_means[1])
        d_h = torch.addcmul(shift_left, u, weight).addcmul_(z, scale_left)
        products = u_means[:, None] * means
        constant = torch.addcmul(h_mean, factor, products[0, 1] + products[1, 0])
        rest = torch.addcmul(hz_mean, factor, (ug_mean + products[0, 0]).add_(products[1, 1], alpha=3))
        weights = factor * torch.stack(torch.broadcast_tensors(constant, scale_left, slope, rest))
        d_x = torch.addcmul(weights[0], h, weights[1]).addcmul_(u, weights[2]).addcmul_(z, weights[3])
        return d_h, d_x, None, None, (factor * d_scale).sum(0), None, None


class Slope(torch.autograd.Function):
    """values * slope of the leaky ReLU at x: 1 where x is positive, else 0.01.

    Linear in values, it is its own derivative; PyTorch's leaky ReLU adds zeros in its double backward.
    """

    @staticmethod
    def forward(context, values, x):
        context.save_for_backward(x)
        return torch.ops.aten.leaky_relu_backward(values, x, 0.01, False)

    @staticmethod
    def backward(context, d_values):
        return Slope.apply(d_values, *context.saved_tensors), None


def normalize(x, scale, shift, kind, statistics):
    """Normalisation of x [N, C, H, W]; batch statistics are those of its first `statistics` rows."""
    dims = {"layer": (1, 2, 3), "instance": (2, 3), "batch": (0, 2, 3)}[kind]
    scale, shift = scale.view(-1, 1, 1), shift.view(-1, 1, 1)
    if kind == "batch" and statistics < len(x):
        variance, mean = torch.var_mean(x[:statistics], dims, correction=0, keepdim=True)
        return torch.addcmul(shift, (x - mean) * torch.rsqrt(variance + 1e-5), scale)
    return Normalize.apply(x, scale, shift, dims)


def learner(theta, images, architecture, reference=None):
    """Logits [N, 10] for images [N, C, H, W]: a pure function of its arguments.

    With batch normalisation the statistics are those of `reference` images (the last synthetic batch), so that
    a prediction never depends on the other real images; without a reference, those of `images` themselves.
    """
    x, statistics = images, len(images)
    if architecture.normalization == "batch" and reference is not None:
        x, statistics = torch.cat([reference, images]), len(reference)
    *blocks, weight, bias = parameters(theta, architecture, images.shape[1:])
    for i in range(0, len(blocks), 3):
        x = convolve(x, blocks[i])
        # pooled before normalisation and activation: a quarter of their work
        x = MaxPool.apply(x) if architecture.pooling == "max" else F.avg_pool2d(x, 2)
        x = normalize(x, blocks[i + 1], blocks[i + 2], architecture.normalization, statistics)
        x = Slope.apply(x, x.detach())  # leaky ReLU
    x = x if statistics == len(x) else x[statistics:]
    # with the bias in it, as in F.linear, this product takes three times as long on CUDA
    return x.permute(0, 2, 3, 1).flatten(1) @ weight.t() + bias


# ------------------------------------------------------------------- inner loop and meta-gradient
#
#   theta_t  learner's parameters after t inner steps     phi       all that the teacher learns
#   v_t      velocity                                     alpha_t   inner learning rate, mu_t momentum
#   g_t      gradient of the loss on synthetic batch t    lambda_t  adjoint: dL/d(theta_t, v_t)
#
#   inner step (paper, section 3.1)    v_{t+1} = mu_t v_t + g_t(theta_t),  theta_{t+1} = theta_t - alpha_t v_{t+1}
#   meta-loss                          L = mean over chosen t of the loss of theta_t on real data
#   meta-gradient                      dL/dphi, through theta_T, ..., theta_1


def sgd(theta, velocity, gradient, lr, momentum):
    """One step of SGD with momentum as a pure function: (theta, velocity), as torch.optim.SGD computes it."""
    velocity = momentum * velocity + gradient
    return theta - lr * velocity, velocity


def unroll(theta, velocity, curriculum, architecture, create_graph=False):
    """The curriculum's inner steps from (theta, velocity); yields (theta, velocity) after each of them.

    With create_graph these can be differentiated in the first theta and velocity and in the curriculum; without, no
    step's graph outlives the step.
    """
    for images, labels, lr, momentum in zip(*curriculum, strict=True):
        logits = learner(theta, images, architecture)
        loss = F.cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=create_graph)
        theta, velocity = sgd(theta, velocity, gradient, lr, momentum)
        if not create_graph:
            theta = leaf(theta)
        yield theta, velocity


def leaf(x):
    """The same numbers without history, ready to be differentiated in."""
    return x.detach().requires_grad_()


def at_rest(theta):
    """The state (theta, velocity) before the first inner step."""
    return leaf(theta), torch.zeros_like(theta)


def pulled_from_real(theta, real, rows, architecture, reference):
    """A learner's loss on rows [N] of real data (a Split) and its gradients in theta and in reference, the synthetic
    batch it has just learned from; on a CPU by 128 images at a time, which takes less memory.
    """
    theta, reference, total = leaf(theta), leaf(reference), 0
    gradients = torch.zeros_like(theta), torch.zeros_like(reference)  # the latter stay zero if it is not read
    for part in rows.split(len(rows) if rows.is_cuda else 128):
        logits = learner(theta, real.images[part], architecture, reference)
        loss = F.cross_entropy(logits, real.labels[part], reduction="sum") / len(rows)
        found = torch.autograd.grad(loss, (theta, reference), materialize_grads=True)
        for gradient, g in zip(gradients, found, strict=True):
            gradient += g
        total = total + loss.detach()
    return total, *gradients


def meta_gradient(theta, curriculum, architecture, real, batches, segment):
    """Meta-loss and its exact gradient in the curriculum: (loss, d images [T, B, C, H, W], d lr [T], d momentum [T]).

    By segments, so that memory hardly grows with T: a first sweep trains the learner and keeps only its velocities; a
    second one goes from the last segment to the first, recomputes each with its graph, pulls the adjoint back through
    it, and undoes the steps before it to find where its predecessor began: theta_t = theta_{t+1} + alpha_t v_{t+1}.
    segment >= T is the plain full graph; same numbers, to rounding.

    real: a Split; batches: for each inner step the rows [N] of it on which the loss is taken, or None.
    """
    T, losses_taken, curriculum = len(batches), sum(rows is not None for rows in batches), curriculum.detach()
    starts = range(0, T, segment)
    velocities = theta.new_zeros(starts[-1] + 1, len(theta))  # v_0, v_1, ... up to the last segment's first
    theta, states = leaf(theta), unroll(*at_rest(theta), curriculum, architecture)
    for t in range(starts[-1]):
        theta, velocities[t + 1] = next(states)

    meta_loss, adjoint = 0, [torch.zeros_like(theta)] * 2
    gradients = [torch.empty_like(x) for x in (curriculum.images, curriculum.lr, curriculum.momentum)]
    for start in reversed(starts):
        steps = slice(start, start + segment)
        first = leaf(theta), leaf(velocities[start])
        images, labels, lr, momentum = (x[steps] for x in curriculum)
        images, lr, momentum = inputs = leaf(images), leaf(lr), leaf(momentum)
        part = Curriculum(images, labels, lr, momentum)
        outputs, weights = [], []
        states = unroll(*first, part, architecture, create_graph=True)
        for state, reference, rows in zip(states, images, batches[steps], strict=True):
            if rows is not None:  # first-order and at once: no graph waits for the segment's gradient
                loss, *pulled = pulled_from_real(state[0], real, rows, architecture, reference)
                meta_loss = meta_loss + loss / losses_taken
                outputs += [state[0], reference]
                weights += [g / losses_taken for g in pulled]
        if start > 0:  # theta_0 and v_0 are not the teacher's
            inputs = *first, *inputs
        *adjoint, d_images, d_lr, d_momentum = torch.autograd.grad([*outputs, *state], inputs, [*weights, *adjoint])
        for gradient, found in zip(gradients, (d_images, d_lr, d_momentum), strict=True):
            gradient[steps] = found
        for t in reversed(range(max(0, start - segment), start)):
            theta = theta.detach() + curriculum.lr[t] * velocities[t + 1]
    return meta_loss, *gradients


def meta_batches(data, config):
    """For each inner step the rows [N] of the real training data of its meta-loss, or None (`meta_loss_every`)."""
    T, every, n = config.inner_steps, config.meta_loss_every, len(data.train.labels)
    shape, device = (config.meta_batch_size,), data.mean.device
    return [None if (T - t) % every else torch.randint(n, shape, device=device) for t in range(1, T + 1)]


def teach(teacher, data, padded=False):
    """Train one fresh learner and add its meta-gradient in phi to the .grad of phi; returns the meta-loss."""
    config, place = teacher.config, (data.train.images.shape[1:], data.mean.device, data.mean.dtype)
    if padded:
        theta, architecture = padded_learner(config, *place)
    else:
        architecture = sample_architecture(config)
        theta = init_learner(architecture, *place)
    curriculum = teacher(data)
    batches = meta_batches(data, config)
    meta_loss, *gradients = meta_gradient(theta, curriculum, architecture, data.train, batches, config.segment)
    outputs = zip((curriculum.images, curriculum.lr, curriculum.momentum), gradients, strict=True)
    outputs, gradients = zip(*[(x, g) for x, g in outputs if x.requires_grad], strict=True)  # `real` has no images
    torch.autograd.backward(outputs, gradients)
    return meta_loss


def replayed(function, *arguments, warm_up=3):
    """function(*arguments) as a function without arguments that, after `warm_up` ordinary calls, replays a CUDA graph.

    Thousands of small kernels are then launched as one. Every call must do the same with tensors at the same
    addresses; random numbers are drawn anew. Returns a tensor, as `function` must.
    """
    graph, side, calls, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, None

    def call():
        nonlocal calls, result
        calls += 1
        if calls <= warm_up:  # off the default stream, as capture asks
            side.wait_stream(torch.cuda.current_stream())
            torch.backends.cudnn.benchmark = True  # finds its fastest kernel for each shape; the graph keeps these
            with torch.cuda.stream(side):
                value = function(*arguments)
            torch.backends.cudnn.benchmark = False
            torch.cuda.current_stream().wait_stream(side)
            return value
        if result is None:
            with torch.cuda.graph(graph):  # records, computes nothing
                result = function(*arguments)
        graph.replay()
        return result.clone()

    return call


def rank_and_world():
    """(number of this process, number of processes) of torchrun; (0, 1) without it."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def average(tensors, learners):
    """Replace sums over `learners` fresh learners of each rank by their mean over all ranks, in place."""
    world = rank_and_world()[1]
    if world > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        distributed.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view_as(x))
    if learners * world > 1:
        for x in tensors:
            x /= learners * world


def outer_step(teacher, optimizer, data, step, learn=None):
    """One step on phi along the mean meta-gradient of fresh learners: a tensor [3], meta-loss, gradient norm
    and the largest inner learning rate before the step.

    Its random numbers depend on the config's seed, the step and the learner's number alone, so that neither a stop
    nor the division of the learners among ranks changes them. Waits for no CUDA device. learn: `teach`, replayed.
    """
    config, (rank, _) = teacher.config, rank_and_world()
    progress = (1 - math.cos(math.pi * step / config.outer_steps)) / 2
    for group in optimizer.param_groups:
        group["lr"] = config.outer_lr * (1 + (config.outer_lr_end - 1) * progress)
    optimizer.zero_grad(set_to_none=False)  # a graph adds to the same addresses
    meta_loss, learners = data.mean.new_zeros(()), config.learners_per_step
    for k in range(rank * learners, (rank + 1) * learners):
        with seeded(config.seed, 3, step, k):
            meta_loss += learn() if learn else teach(teacher, data)
    gradients = [p.grad for p in teacher.parameters()]
    average([meta_loss, *gradients], learners)
    rate = teacher.log_lr.detach().exp().amax()
    optimizer.step()
    return torch.stack([meta_loss, nn.utils.get_total_norm(gradients), rate])


# -------------------------------------------------------------------------------------- evaluation

ORDERS = ("in order", "batch-shuffled", "all-shuffled")


def fresh_learner(teacher, data, k, order="in order", change=None):
    """Learner k, which no teacher has met, before training: (theta_0, curriculum in that order, architecture).

    Depends on the config's seed and k alone: it starts the same in every order, however many learners there are.
    change: a function of the sampled Architecture, for one that the teacher was not trained with.
    """
    with seeded(teacher.config.seed, 1, k), torch.no_grad():
        architecture = sample_architecture(teacher.config)
        architecture = change(architecture) if change else architecture
        theta = init_learner(architecture, data.test.images.shape[1:], data.mean.device, data.mean.dtype)
        return theta, teacher(data).shuffled(order), architecture


def train_learner(theta, curriculum, architecture):
    """theta_T of a learner that starts at theta_0; keeps no graph."""
    ((theta, _),) = deque(unroll(*at_rest(theta), curriculum.detach(), architecture), maxlen=1)
    return theta


@torch.no_grad()
def accuracy(theta, split, architecture, reference):
    """Fraction of a split's images that the learner gets right; inductive, given the last synthetic batch as
    reference (see `learner`). Without a reference, batch statistics are those of 1,000 test images: transductive.
    """
    correct = 0
    for images, labels in zip(split.images.split(1000), split.labels.split(1000), strict=True):
        correct += (learner(theta, images, architecture, reference).argmax(1) == labels).sum()
    return float(correct) / len(split.labels)


def evaluate(teacher, data, split, learners, order="in order", change=None, inductive=True):
    """Accuracies on `split` of `learners` fresh learners after their inner steps, as a list."""
    accuracies = []
    for k in range(learners):
        theta, curriculum, architecture = fresh_learner(teacher, data, k, order, change)
        theta = train_learner(theta, curriculum, architecture)
        accuracies.append(accuracy(theta, split, architecture, curriculum.images[-1] if inductive else None))
    return accuracies


def accuracy_curve(teacher, data, split, learners):
    """For each of `learners` fresh learners its accuracies on `split` after 1, ..., T inner steps."""
    curves = []
    for k in range(learners):
        theta, curriculum, architecture = fresh_learner(teacher, data, k)
        states = unroll(*at_rest(theta), curriculum, architecture)
        steps = zip(states, curriculum.images, strict=True)
        curves.append([accuracy(theta, split, architecture, reference) for (theta, _), reference in steps])
    return curves


def summary(accuracies):
    """Mean, standard deviation (None for one) and n of a list of accuracies, and the list itself."""
    std = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
    return {"mean": float(np.mean(accuracies)), "std": std, "n": len(accuracies), "accuracies": accuracies}


# ------------------------------------------------------------------------------------------- files
#
# A run folder holds config.json, log.jsonl (one JSON object per line, readable while it runs), teacher.pt
# (the product) and checkpoint.pt (all that resuming needs).


def write_file(path, content):
    """Write bytes so that a kill or a full disk leaves the old file or the new one, never a part; InputError."""
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
        raise InputError(f"cannot write {path}: {error.strerror}; what was there before is intact") from None


def write_json(path, content):
    """Write a dict as JSON."""
    write_file(path, (json.dumps({"format": FORMAT, **content}, indent=1) + "\n").encode())


def write_tensors(path, **content):
    """Write tensors and plain values by name, so that torch.load(weights_only=True) reads them."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_file(path, buffer.getvalue())


def read_tensors(path):
    """What `write_tensors` wrote, on the CPU; executes nothing that the file holds."""
    with reading(path), warnings.catch_warnings(action="ignore"):  # of foreign pickles: the error says enough
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']!r}, this code reads format {FORMAT}")
        return content


def append_log(path, line):
    """Append one JSON object to a log.jsonl; InputError where that cannot be."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def read_log(path, fields=("event", "step")):
    """The lines of a log.jsonl as dicts that have the fields; a last line that is still being written is left out."""
    with reading(path):
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        if not all(set(fields) <= set(line) for line in lines):
            raise ValueError(f"a line without {' or '.join(fields)}")
        return lines


def read_teacher(path, device="cpu"):
    """The Teacher of a teacher.pt and the file's content, `curriculum` as a Curriculum, on the device."""
    content = read_tensors(path)
    with reading(path):
        config, curriculum = Config(**content["config"]), Curriculum(**content["curriculum"])
        T, B, image_shape = config.inner_steps, config.batch_size, curriculum.images.shape[2:]
        expected = (T, B, *image_shape), (T, B), (T,), (T,)
        if len(image_shape) != 3 or expected != tuple(tuple(x.shape) for x in curriculum):
            raise ValueError(f"the curriculum's shapes are not {expected}")
        if not all(x.isfinite().all() for x in curriculum) or curriculum.labels.amax() >= CLASSES:
            raise ValueError("the curriculum has numbers that are not finite, or unknown labels")
    teacher = Teacher(config, image_shape)
    with reading(path):
        teacher.load_state_dict(content["teacher"])
    return teacher.to(device), content | {"curriculum": Curriculum(*(x.to(device) for x in curriculum))}


def environment(device):
    """Where a result comes from: versions, device, CPU threads, command, git commit ("-dirty" if changed, or None)."""
    commit = None
    with contextlib.suppress(OSError):  # no git
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    cpu = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "ranks": rank_and_world()[1],
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit or None,
    }


def peak_memory():
    """Peak memory of the process, and of CUDA tensors, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"process": process / 2**20, "cuda": torch.cuda.max_memory_allocated() / 2**20}


# ---------------------------------------------------------------------------------------- training


def published(teacher, data):
    """The Curriculum that teacher.pt and the snapshots show; of `random` and `real` one draw, the same every time."""
    with torch.no_grad(), seeded(teacher.config.seed, 2):
        return teacher(data).detach()


def save(folder, teacher, optimizer, data, step, seconds):
    """Write teacher.pt, then checkpoint.pt."""
    config = dataclasses.asdict(teacher.config)
    curriculum = {key: x.cpu().clone() for key, x in published(teacher, data)._asdict().items()}
    state = {key: x.cpu() for key, x in teacher.state_dict().items()}
    write_tensors(folder / "teacher.pt", config=config, step=step, teacher=state, curriculum=curriculum,
                  mean=data.mean.cpu(), std=data.std.cpu())  # fmt: skip
    write_tensors(folder / "checkpoint.pt", config=config, step=step, seconds=seconds, teacher=state,
                  optimizer=optimizer.state_dict())  # fmt: skip


SNAPSHOT_IMAGES = 40  # at most


def is_snapshot(step):
    """Whether the images are kept after this outer step: four times for each doubling."""
    return step < 2 or int(4 * math.log2(step)) > int(4 * math.log2(step - 1))


def save_snapshot(folder, teacher, data, step):
    """Keep images of the last inner step in snapshots/<step>.pt, if it is time."""
    if is_snapshot(step) and teacher.config.variant != "real":
        images = published(teacher, data).images[-1, :SNAPSHOT_IMAGES]
        write_tensors(folder / "snapshots" / f"{step:06d}.pt", step=step, images=images.half().cpu())


def restore(path, teacher, optimizer):
    """Continue from a checkpoint.pt: teacher and Adam; returns (step, seconds so far)."""
    content = read_tensors(path)
    with reading(path):
        teacher.load_state_dict(content["teacher"])
        optimizer.load_state_dict(content["optimizer"])
        for p, state in optimizer.state.items():  # which load_state_dict does not check
            if not p.shape == state["exp_avg"].shape == state["exp_avg_sq"].shape:
                raise ValueError("Adam's state is of another shape")
        return int(content["step"]), float(content["seconds"])


def check_folder(folder, config, resume):
    """True if the folder holds this config's run, to be resumed; InputError where a run would be overwritten."""
    path = folder / "config.json"
    if not path.exists():
        return False
    with reading(path):
        theirs = dataclasses.asdict(Config(**json.loads(path.read_text())["config"]))
    ours = dataclasses.asdict(config)
    if other := [f"{key}={theirs[key]!r}, now {ours[key]!r}" for key in ours if theirs[key] != ours[key]]:
        raise InputError(f"{folder} holds a run with {'; '.join(other)}: choose another --runs, or --set name=NAME")
    if not resume:
        raise InputError(f"{folder} holds this run: continue it with --resume, or choose another --runs")
    return (folder / "checkpoint.pt").exists()


def begin(config, data, folder, resume):
    """A new run or, if `resume` finds one in the folder, an old one: (teacher, optimizer, step, seconds so far).

    Rank 0 alone reads and writes; the other ranks receive what it has.
    """
    image_shape, (rank, world), step, seconds = data.train.images.shape[1:], rank_and_world(), 0, 0.0
    with seeded(config.seed, 0):
        parameter_shapes(sample_architecture(config), image_shape)  # an InputError before anything is written
        teacher = Teacher(config, image_shape).to(data.mean.device)
    optimizer = torch.optim.Adam(teacher.parameters(), config.outer_lr, (config.outer_beta1, config.outer_beta2))
    if rank == 0:
        found, lines = check_folder(folder, config, resume), []
        origin = {"config": dataclasses.asdict(config), "environment": environment(data.mean.device)}
        if found:
            step, seconds = restore(folder / "checkpoint.pt", teacher, optimizer)
            # what came after the checkpoint will come again: validation n, too, follows checkpoint n
            lines = [x for x in read_log(folder / "log.jsonl") if x["step"] + (x["event"] == "validation") <= step]
        else:
            write_json(folder / "config.json", origin)
        size = {"learners": world * config.learners_per_step}
        size["meta_batch"] = size["learners"] * config.meta_batch_size
        lines.append({"event": "resume" if found else "start", "step": step, **size, **origin})
        write_file(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        if not found:
            save(folder, teacher, optimizer, data, step, seconds)
            save_snapshot(folder, teacher, data, step)
    if world > 1:
        state = [step, teacher.state_dict(), optimizer.state_dict()]
        distributed.broadcast_object_list(state, device=data.mean.device)
        step, teacher_state, optimizer_state = state
        teacher.load_state_dict(teacher_state)
        optimizer.load_state_dict(optimizer_state)
    return teacher, optimizer, step, seconds


def validate(teacher, data):
    """Fields of the log: accuracy of fresh learners on validation images, inner learning rate and momentum."""
    config = teacher.config
    split = Split(*(x[: config.validation_images] for x in data.validation))
    accuracies = evaluate(teacher, data, split, config.validation_learners)
    lr, momentum = teacher.log_lr.exp().tolist(), teacher.logit_momentum.sigmoid().tolist()
    return {"accuracy": summary(accuracies), "lr": lr, "momentum": momentum}


@contextlib.contextmanager
def signals_noted():
    """Ctrl-C and SIGTERM append to a list instead of ending the process in the middle of a step."""
    noted = []
    before = {number: signal.signal(number, lambda n, _: noted.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(yes, device):
    """Whether `yes` holds on any rank, so that all of them stop after the same outer step."""
    flag = torch.tensor(float(yes), device=device)
    if rank_and_world()[1] > 1:
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def train(config, data, folder, resume=False, stop_after=None, max_minutes=None):
    """Meta-train to the end of the schedule, or stop early with a checkpoint: after `stop_after` outer steps in
    all, after `max_minutes` of this call, or on Ctrl-C. Returns the exit status.

    Raises InputError where meta-loss or meta-gradient is not finite; the last good files stay.
    """
    log_path, begun, rank, device = folder / "log.jsonl", time.monotonic(), rank_and_world()[0], data.mean.device
    if resume and log_path.exists() and (lines := read_log(log_path)) and lines[-1]["event"] == "end":
        return 0 if rank else report(folder, **lines[-1])
    teacher, optimizer, step, seconds = begin(config, data, folder, resume)
    started, saved, shown = time.monotonic() - seconds, time.monotonic(), {}
    last_step = min(config.outer_steps, stop_after or config.outer_steps)
    exact = config.normalization != "layer" or all(low == high for low, high in filter_ranges(config))
    learn = replayed(teach, teacher, data, True) if device.type == "cuda" and config.cuda_graph and exact else None
    unread, read_every = [], 10 if device.type == "cuda" else 1  # reading waits for the device

    def log(event, step, **fields):
        line = {"event": event, "step": step, "seconds": time.monotonic() - started, **fields}
        if rank == 0:
            append_log(log_path, line)
        return line

    bar = tqdm(total=config.outer_steps, initial=step, desc=folder.name, unit="step", disable=rank > 0)
    with bar, signals_noted() as signals:
        stop = False
        while step < last_step and not stop:
            if rank == 0 and step % config.validate_every == 0:
                accuracy = log("validation", step, **validate(teacher, data))["accuracy"]
                shown["validation"] = f"{accuracy['mean']:.3f}"
            unread.append(outer_step(teacher, optimizer, data, step, learn))
            step += 1
            bar.update()
            if rank == 0:
                save_snapshot(folder, teacher, data, step)
            if len(unread) < read_every and step < last_step and step % config.validate_every:
                continue
            for n, (meta_loss, norm, rate) in enumerate(torch.stack(unread).tolist(), step - len(unread)):
                if not math.isfinite(meta_loss + norm):
                    where, good = f"at outer step {n}, inner learning rate {rate:.4g}", folder / "teacher.pt"
                    raise InputError(f"meta-loss {meta_loss}, gradient norm {norm} {where}: stopped; {good} is the "
                                     "last good teacher")  # fmt: skip
                log("step", n + 1, meta_loss=meta_loss, gradient_norm=norm)
            unread.clear()
            bar.set_postfix(meta_loss=f"{meta_loss:.3f}", **shown, refresh=False)
            late = max_minutes is not None and time.monotonic() - begun >= 60 * max_minutes
            stop = any_rank(bool(signals) or late, device)
            if rank == 0 and (stop or step == last_step or time.monotonic() - saved >= config.checkpoint_every):
                save(folder, teacher, optimizer, data, step, time.monotonic() - started)
                saved = time.monotonic()
    if rank > 0:
        return 0
    if step < config.outer_steps or signals:
        command = re.sub(r" --(resume|stop-after[ =]\d+)(?= |$)", "", shlex.join(["python", *sys.argv]))
        print(f"stopped after {step} of {config.outer_steps} outer steps; continue with\n  {command} --resume")
        return 128 + signals[0] if signals else 0
    log("validation", step, **validate(teacher, data))
    test = {order: summary(evaluate(teacher, data, data.test, config.test_learners, order)) for order in ORDERS}
    return report(folder, **log("end", step, test=test, peak_memory=peak_memory()))


def spread(figures):
    """A summary as 'mean +- std'."""
    if figures is None:
        return "-"
    return f"{figures['mean']:.3f}" + ("" if figures["std"] is None else f" +- {figures['std']:.3f}")


def report(folder, test, step, **_):
    """The last lines of a run: where the files are, test accuracy, what to run next. Returns exit status 0."""
    print(f"{folder}: {step} outer steps; config.json, log.jsonl, checkpoint.pt and teacher.pt are there")
    for order, figures in test.items():
        print(f"  test accuracy, {order:<15} {spread(figures)} ({figures['n']} fresh learners)")
    where = "".join(re.findall(r" --(?:data|device)[ =]\S+", shlex.join(sys.argv)))
    print(f"next: python gtn.py --evaluate {shlex.quote(str(folder / 'teacher.pt'))}{where}")
    return 0


UNSEEN = {
    "training": None,
    "half width": lambda a: a._replace(filters=tuple(max(1, f // 2) for f in a.filters)),
    "double width": lambda a: a._replace(filters=tuple(2 * f for f in a.filters)),
    "one more block": lambda a: a._replace(filters=(*a.filters, a.filters[-1]), kernels=(*a.kernels, 3)),
}


def evaluate_file(path, learners, data_folder, device, resume=False):
    """--evaluate: test accuracy of fresh learners in every order, in order of architectures the teacher was not
    trained with (10 learners at most), and after every inner step (10 at most, 1,000 test images); prints a table
    and writes evaluation.json beside the teacher; with `resume` only if that is not done yet. Returns exit status 0.
    """
    teacher, content = read_teacher(path, device)
    output = Path(path).with_name("evaluation.json")
    if resume and output.exists():
        with reading(output):
            done = json.loads(output.read_text())
            if done["step"] == content["step"] and (n := done["rows"][0]["in order"]["n"]) >= learners:
                print(f"{output} is there, of {n} learners after {done['step']} outer steps")
                return 0
    config, few, rows = teacher.config, min(learners, 10), []
    data = load_data(config.dataset, data_folder, device)
    if data.test.images.shape[1:] != content["curriculum"].images.shape[2:]:
        raise InputError(f"{path} does not teach images of the size of {config.dataset}")
    columns = [(order, order, True) for order in ORDERS]
    if config.normalization == "batch":  # per sample nothing can leak
        columns.append(("transductive", "in order", False))
    print(f"{'architecture':<16}{'learners':>8}" + "".join(f"{column:>18}" for column in (*ORDERS, "transductive")))
    for name, change in tqdm(UNSEEN.items(), leave=False):
        row, n = {"architecture": name, "transductive": None}, few if change else learners
        row |= dict.fromkeys(ORDERS)
        with contextlib.suppress(InputError):  # one more block may be too deep for the images: null
            for column, order, inductive in columns:
                if change and order != "in order":
                    continue  # shuffled, an architecture that the teacher knows says enough
                row[column] = summary(evaluate(teacher, data, data.test, n, order, change, inductive))
        rows.append(row)
        cells = [spread(row[column]) for column in (*ORDERS, "transductive")]
        tqdm.write(f"{name:<16}{n:>8}" + "".join(f"{cell:>18}" for cell in cells))
    curve = np.array(accuracy_curve(teacher, data, Split(*(x[:1000] for x in data.test)), few))
    print(f"after each inner step ({few} learners):", " ".join(f"{x:.3f}" for x in curve.mean(0)))
    origin = {"teacher": str(path), "config": dataclasses.asdict(config), "environment": environment(device)}
    result = {"step": content["step"], "rows": rows, "curve": curve.tolist(), "peak_memory": peak_memory()}
    write_json(output, origin | result)
    print(f"written to {output}")
    return 0


# ------------------------------------------------------------------------------------ command line


def argument_parser(**options):
    """An ArgumentParser with the flags of every command here, --device and --data, whose errors are InputErrors."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def fail(message):
        raise InputError(message)

    parser.error = fail
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--data", default=os.environ.get("GTN_DATA", "data"), metavar="DIR",
                        help="folder of the data sets (default: $GTN_DATA, else data)")  # fmt: skip
    return parser


def parse_arguments(arguments):
    """The command line; --help also lists every config and every field with its default and source."""
    configs = "\n".join(f"  {name:<8}{json.dumps(changes)}" for name, changes in load_configs().items())
    fields = "\n".join(
        f"  {f.name + ' = ' + json.dumps(f.default):<34}{f.metadata['source']}" for f in dataclasses.fields(Config)
    )
    parser = argument_parser(
        prog="gtn.py",
        description="Train a Generative Teaching Network and measure it on fresh learners.",
        epilog=f"configs (what differs from the defaults):\n{configs}\n\nfields, their defaults and where these come "
        f"from (earlier run: a PyTorch implementation of A, B and C by others; ours: found here):\n{fields}",
    )
    add = parser.add_argument
    add("--config", default="quick", metavar="NAME", help="entry of configs.json (default: quick)")
    add("--variant", metavar="NAME", help=f"what the learner is taught with: {', '.join(VARIANTS)}")
    add("--seed", type=int, metavar="N", help="fixes everything on a CPU")
    add("--outer-steps", type=int, metavar="N", help="outer steps planned: the length of the schedule")
    add("--runs", default="runs", metavar="DIR", help="folder of the run folders (default: runs)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields: JSON or a word")
    add("--resume", action="store_true", help="continue the run in its folder; skip what --evaluate has done")
    add("--stop-after", type=int, metavar="K", help="stop with a checkpoint after K outer steps in all")
    add("--evaluate", metavar="TEACHER", help="measure a teacher.pt on fresh learners instead of training one")
    add("--learners", type=int, default=100, metavar="N", help="fresh learners of --evaluate (default: 100)")
    add("--max-minutes", type=float, metavar="M", help="stop with a checkpoint after M minutes of this call")
    args = parser.parse_args(arguments)
    for name, (test, words) in {"stop_after": COUNT, "learners": COUNT, "max_minutes": NOT_NEGATIVE}.items():
        if (value := getattr(args, name)) is not None and not test(value):
            parser.error(f"--{name.replace('_', '-')} {value}: must be {words}")
    extra = [name for name in ("variant", "seed", "outer_steps", "stop_after", "max_minutes") if getattr(args, name)]
    if args.evaluate and (extra or args.set):
        parser.error("--evaluate goes with --learners, --data, --device, --resume alone: the teacher brings its config")
    return args


def choose_device(name):
    """The torch.device for auto, cpu or cuda. Raises InputError where it is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", 0))  # of torchrun
    if number >= torch.cuda.device_count():
        raise InputError(f"rank {number} has no CUDA device: at most --nproc-per-node {torch.cuda.device_count()} here")
    torch.cuda.set_device(number)
    torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions do anyway
    return torch.device("cuda", number)


def keep_freed_memory():
    """Let the process keep what it frees (glibc only): giving it back after every tensor costs page faults."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def ranks_joined():
    """Inside, the processes that torchrun started work together; yields this one's number (0 without torchrun)."""
    if not distributed.is_torchelastic_launched():
        yield 0
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(days=30))  # a rank may wait for another's share
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def main(arguments=None):
    """The command line; returns the exit status."""
    try:
        args = parse_arguments(arguments)
        keep_freed_memory()
        if args.evaluate:
            return evaluate_file(args.evaluate, args.learners, args.data, choose_device(args.device), args.resume)
        config = make_config(args.config, args.set, variant=args.variant, seed=args.seed, outer_steps=args.outer_steps)
        folder = Path(args.runs, f"{config.name}-{config.variant}-s{config.seed}")
        device = choose_device(args.device)
        with ranks_joined() as rank:
            if rank == 0:
                check_folder(folder, config, args.resume)  # before the data, for a quick answer
            data = load_data(config.dataset, args.data, device)
            return train(config, data, folder, args.resume, args.stop_after, args.max_minutes)
    except InputError as error:
        print(f"gtn.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gtn.py: interrupted; --resume continues a run at its last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

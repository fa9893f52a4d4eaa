"""Time and memory of one outer step, beside the library `higher`.

    pip install higher                   # once, to measure it too; without it the rest is measured
    python tests/benchmark.py            # all of it, to results/benchmark.json; needs 12 GiB of memory
    python tests/benchmark.py --quick    # whether it works: tiny networks, about a minute

An outer step is gtn.outer_step with one fresh learner and an optimizer that moves nothing, by

    full graph    gtn.meta_gradient
    flat          gtn.meta_gradient_flat, and a generator that holds no graph: --set flat=true
    CUDA graph    the full graph, recorded once and replayed: the default on CUDA
    higher        the learner as an nn.Module, trained by higher's differentiable SGD

First all must give the same meta-gradient. They take turns, round by round, on the same learners and random numbers.
Every configuration, and every measurement of memory, gets a fresh process, which keeps freed memory as gtn.py does.
"""

import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gtn

IMAGE_SHAPE = (1, 28, 28)
TINY = """inner_steps=4 batch_size=6 filters=[3,5] hidden_size=8 generator_filters=4 meta_batch_size=16
meta_loss_every=2""".split()
TOLERANCE = 1e-9  # in float64, where methods differ by rounding alone, about 1e-14
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # as gtn.run has it


def module(theta, architecture):
    """gtn's learner (max pooling, instance normalisation) as an nn.Module that starts at theta."""
    layers, (channels, height, width) = [], IMAGE_SHAPE
    for filters, kernel in zip(architecture.filters, architecture.kernels, strict=True):
        layers += [nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False), nn.MaxPool2d(2)]
        layers += [nn.GroupNorm(filters, filters), nn.LeakyReLU(0.01)]
        channels, height, width = filters, height // 2, width // 2
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, gtn.CLASSES)).to(theta)
    shapes = [shape for _, shape in gtn.declared_parameters(architecture, IMAGE_SHAPE)]
    parts = theta.split([math.prod(shape) for shape in shapes])
    for p, part, shape in zip(network.parameters(), parts, shapes, strict=True):
        value = part.view(shape).movedim(-1, 1) if len(shape) == 4 else part  # gtn's weights are channels-last
        p.data.copy_(value.reshape(p.shape))
    return network


def meta_gradient_by_higher(theta, curriculum, architecture, batches):
    """gtn.meta_gradient by the library higher, which keeps the full graph."""
    import higher

    network, losses = module(theta, architecture), []
    images, labels, lr, momentum = map(gtn.leaf, curriculum)
    with higher.innerloop_ctx(network, torch.optim.SGD(network.parameters(), lr=1, momentum=1)) as (learner, sgd):
        for x, y, alpha, mu, real in zip(images, labels, lr, momentum, batches, strict=True):
            sgd.step(F.cross_entropy(learner(x), y), override={"lr": [alpha], "momentum": [mu]})
            if real:
                losses.append(F.cross_entropy(learner(real.images), real.labels))
    meta_loss = torch.stack(losses).mean()
    return meta_loss.detach(), *torch.autograd.grad(meta_loss, (images, lr, momentum))


def make_config(name, settings=()):
    """The Config of a name with one learner per step, fixed filters (the middle of a range) and an outer_lr of 0."""
    config = gtn.make_config(name, settings)
    filters = tuple(sum(f) // 2 if type(f) is tuple else f for f in config.filters)
    return dataclasses.replace(config, filters=filters, outer_lr=0.0, learners_per_step=1)


def make_step(method, config, device, dtype=torch.float32):
    """(teacher, step): step(n) takes outer step n and leaves its meta-gradient in the teacher's .grad."""
    with gtn.seeded(config.seed, gtn.TEACHER):  # real images are random numbers: they take as long as any others
        split = gtn.Split(torch.randn(2000, *IMAGE_SHAPE).to(device, dtype), torch.randint(10, (2000,)).to(device))
        teacher = gtn.Teacher(dataclasses.replace(config, flat=method == "flat"), IMAGE_SHAPE)
        for p in (teacher.log_lr, teacher.logit_momentum):
            p.data += 0.1 * torch.randn_like(p)  # no two inner steps are alike
    teacher, data = teacher.to(device, dtype), gtn.Data(*[split] * 3, *torch.tensor([[0], [1]]).to(split.images))
    optimizer = torch.optim.SGD(teacher.parameters())
    capture = functools.cache(lambda: gtn.captured(teacher, data))
    meta_gradient = meta_gradient_by_higher if method == "higher" else gtn.meta_gradient

    def step(n):
        with mock.patch.object(gtn, "meta_gradient", meta_gradient):
            gtn.outer_step(teacher, optimizer, data, n, capture() if method == "CUDA graph" else None)

    return teacher, step


def check(config, methods, device):
    """{method: relative difference (Euclidean norm) of its meta-gradient from the full graph's, in float64}.

    The largest of three: over learning rates, momenta and the rest. Raises InputError above the TOLERANCE.
    """
    expected, differences = None, {}
    for method in methods:
        teacher, step = make_step(method, config, device, torch.float64)
        step(0)
        lr, momentum, *others = (p.grad.flatten() for p in teacher.parameters())  # in Teacher's order
        found = lr, momentum, torch.cat(others)
        expected = expected or found
        differences[method] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        if not (off := differences[method]) <= TOLERANCE:
            raise gtn.InputError(f"{config.name}: {method} has another meta-gradient, by {off:.1e}: nothing was timed")
    return differences


def speed(config, methods, rounds, device_name):
    """{method: its difference, and its seconds of every round}."""
    device = gtn.choose_device(device_name)
    differences = check(make_config(config.name, TINY), methods, device)
    steps = {method: make_step(method, config, device)[1] for method in methods}
    for step in [*steps.values()] * 2:  # warm up
        step(0)
    times = {method: [] for method in methods}
    for n in range(rounds):
        for method in methods[n % len(methods) :] + methods[: n % len(methods)]:
            start = time.perf_counter()
            steps[method](n)  # ends by reading numbers: CUDA has then done all of it
            times[method].append(time.perf_counter() - start)
    return {method: {"seconds": times[method], "difference": differences[method]} for method in methods}


def memory(config, method, device_name):
    """MiB of the process, or of CUDA's tensors: `base` before the first outer step, `peak` after three."""

    def peak():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    device = gtn.choose_device(device_name)
    _, step = make_step(method, config, device)
    base = peak()
    for n in range(3):
        step(n)
    return {"base": base, "peak": peak()}


def fresh_process(function, *arguments):
    """function(*arguments) in a process of its own, whose peak is at least its parent's: that has to stay small."""
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, KEEP_FREED_MEMORY), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def measure_speed(config, methods, rounds, device_name):
    """The record of one configuration; prints its table."""
    record = fresh_process(speed, config, methods, rounds, device_name)
    medians = {method: statistics.median(r["seconds"]) for method, r in record.items()}
    print(f"\n{config.name:<12}  seconds      min      max  higher/this  base MiB  peak MiB  difference")
    for method, r in record.items():
        ratio = medians["higher"] / medians[method] if "higher" in medians else None
        used = fresh_process(memory, config, method, device_name)
        r |= {"median": medians[method], "times_faster_than_higher": ratio, "memory": used}
        times = "".join(f"{x:9.3f}" for x in (medians[method], min(r["seconds"]), max(r["seconds"])))
        others = f"{used['base']:10.0f}{used['peak']:10.0f}{r['difference']:12.0e}"
        print(f"{method:<12}{times}{format(ratio, '13.2f') if ratio else '-':>13}{others}")
    return record


def measure_memory(config, lengths, device_name):
    """The record of memory against inner steps T; prints its table. growth: flat's from T = 16 to 128, a fraction."""
    rows, beyond = [], {}
    print("\nmemory, MiB    T  images    base    peak")
    for T in lengths:
        images = 2 * T * config.batch_size * math.prod(IMAGE_SHAPE) * 4 / 2**20  # and their gradient
        for method in ("full graph", "flat"):
            used = fresh_process(memory, dataclasses.replace(config, inner_steps=T), method, device_name)
            print(f"{method:<12}{T:4}{images:8.0f}{used['base']:8.0f}{used['peak']:8.0f}")
            rows.append({"method": method, "inner_steps": T, "images": images, **used})
        beyond[T] = used["peak"] - images  # of flat
    growth = beyond[128] / beyond[16] - 1
    print(f"beyond the images, flat grows by {growth:.1%} from T = 16 to 128")
    return {"rows": rows, "growth": growth}


def main(arguments=None):
    """The command line."""
    parser = gtn.argument_parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    add, parts = parser.add_argument, ("speed", "memory")
    add("--configs", nargs="+", default=["A", "B", "C"], metavar="NAME", help="entries of configs.json to time")
    add("--parts", nargs="+", default=parts, choices=parts, help="what is measured; memory of config A alone")
    add("--rounds", type=int, default=5, help="times every method is timed (default: 5)")
    add("--out", type=Path, default=Path("results/benchmark.json"), help="default: results/benchmark.json")
    add("--quick", action="store_true", help="tiny networks: whether it works, not how fast")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    device, settings = gtn.choose_device(args.device), TINY if args.quick else ()
    methods = ["full graph", "flat", *["CUDA graph"] * (device.type == "cuda"), "higher"]
    if not importlib.util.find_spec("higher"):
        print(f"without {methods.pop()}, which is not installed: pip install higher")
    result = {"environment": gtn.environment(device), "speed": {}}
    for config in [make_config(name, settings) for name in args.configs] if "speed" in args.parts else []:
        result["speed"][config.name] = measure_speed(config, methods, args.rounds, args.device)
        gtn.write(args.out, result)
    if "memory" in args.parts:
        lengths = (16, 128) if args.quick else (8, 16, 32, 64, 128)
        result["memory"] = measure_memory(make_config("A", settings), lengths, args.device)
        gtn.write(args.out, result)
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    sys.exit(gtn.run("benchmark.py", main, sys.argv[1:]))

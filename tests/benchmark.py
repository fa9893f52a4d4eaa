"""Time and memory of one outer step, beside the library `higher`.

    python tests/benchmark.py    # to results/benchmark.json; needs 12 GiB of memory; without higher, the rest

One fresh learner's meta-gradient, and an optimizer that moves nothing, by

    full graph    gtn.meta_gradient
    flat          gtn.meta_gradient_flat, and a generator that holds no graph: --set flat=true
    CUDA graph    the full graph, recorded once and replayed: the default on CUDA
    higher        the learner as an nn.Module, trained by higher's differentiable SGD (pip install higher)

First all must give the same meta-gradient. They take turns, round by round, on the same learners and random numbers.
"""

import dataclasses
import importlib.util
import math
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gtn

IMAGE_SHAPE = (1, 28, 28)
TINY = "inner_steps=4 batch_size=6 filters=[3,5] hidden_size=8 meta_batch_size=16 meta_loss_every=2".split()
TOLERANCE = 1e-9  # in float64, where methods differ by rounding alone, about 1e-14


def module(theta, architecture):
    """gtn's learner (max pooling, instance normalisation) as an nn.Module that starts at theta."""
    layers, (channels, height, width) = [], IMAGE_SHAPE
    for filters, kernel in zip(architecture.filters, architecture.kernels, strict=True):
        layers += [nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False), nn.MaxPool2d(2)]
        layers += [nn.GroupNorm(filters, filters), nn.LeakyReLU(0.01)]
        channels, height, width = filters, height // 2, width // 2
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, gtn.CLASSES)).to(theta)
    shapes = [shape for _, shape in gtn.declared_parameters(architecture, IMAGE_SHAPE)]
    parts = theta.split([p.numel() for p in network.parameters()])
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
            sgd.step(nn.functional.cross_entropy(learner(x), y), override={"lr": [alpha], "momentum": [mu]})
            if real:
                losses.append(nn.functional.cross_entropy(learner(real.images), real.labels))
    meta_loss = torch.stack(losses).mean()
    return meta_loss.detach(), *torch.autograd.grad(meta_loss, (images, lr, momentum))


def make_step(method, config, device, dtype=torch.float32):
    """(teacher, step): step(n) takes outer step n and leaves its meta-gradient in the teacher's .grad."""
    config = dataclasses.replace(config, flat=method == "flat", outer_lr=0.0, learners_per_step=1)
    with gtn.seeded(config.seed, gtn.TEACHER):  # real images are random numbers: they take as long as any others
        split = gtn.Split(torch.randn(2000, *IMAGE_SHAPE).to(device, dtype), torch.randint(10, (2000,)).to(device))
        teacher = gtn.Teacher(config, IMAGE_SHAPE)
        teacher.log_lr.data += 0.1 * torch.randn_like(teacher.log_lr)  # no two inner steps are alike
    teacher, data = teacher.to(device, dtype), gtn.Data(*[split] * 3, *torch.tensor([[0], [1]]).to(split.images))
    optimizer = torch.optim.SGD(teacher.parameters())
    replay = gtn.captured(teacher, data) if method == "CUDA graph" else None
    meta_gradient = meta_gradient_by_higher if method == "higher" else gtn.meta_gradient

    def step(n):
        with mock.patch.object(gtn, "meta_gradient", meta_gradient):
            gtn.outer_step(teacher, optimizer, data, n, replay)

    return teacher, step


def check(config, methods, device):
    """{method: relative difference of its meta-gradient, the largest of rates', momenta's and the rest's}."""
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
    differences = check(gtn.make_config(config.name, TINY), methods, device)
    record = {method: {"seconds": [], "difference": x} for method, x in differences.items()}
    steps = {method: make_step(method, config, device)[1] for method in methods}
    for step in [*steps.values()] * 2:  # warm up
        step(0)
    for n in range(rounds):
        for method in methods[n % len(methods) :] + methods[: n % len(methods)]:
            start = time.perf_counter()
            steps[method](n)  # ends by reading numbers: CUDA has then done all of it
            record[method]["seconds"].append(time.perf_counter() - start)
    return record


def memory(config, method, device_name):
    """Largest number of MiB of the process, or of CUDA's tensors, in three outer steps."""
    device = gtn.choose_device(device_name)
    _, step = make_step(method, config, device)
    for n in range(3):
        step(n)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def fresh_process(function, *arguments):
    """function(*arguments) in a process of its own; its peak is at least its parent's, which has to stay small."""
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # spawned, not forked
        return pool.submit(function, *arguments).result()


def measure_speed(config, methods, rounds, device_name):
    """The record of one configuration, which is printed, too."""
    record = fresh_process(speed, config, methods, rounds, device_name)
    for method, row in record.items():
        row["median"] = statistics.median(row["seconds"])
        row["peak"] = fresh_process(memory, config, method, device_name)
        print(f"{config.name}, {method}: {row['median']:.3f} s (median of {rounds}), {row['peak']:.0f} MiB")
    for row in record.values() if "higher" in record else ():
        row["times_faster_than_higher"] = record["higher"]["median"] / row["median"]
    return record


def measure_memory(config, lengths, device_name):
    """The record of memory against inner steps T; growth: of flat, beyond the images, from T = 16 to 128."""
    rows = []
    for T in lengths:
        images = 2 * T * config.batch_size * math.prod(IMAGE_SHAPE) * 4 / 2**20  # and their gradient
        for method in ("full graph", "flat"):
            peak = fresh_process(memory, dataclasses.replace(config, inner_steps=T), method, device_name)
            rows.append({"method": method, "inner_steps": T, "images": images, "peak": peak})
    beyond = {row["inner_steps"]: row["peak"] - row["images"] for row in rows if row["method"] == "flat"}
    return {"rows": rows, "growth": beyond[128] / beyond[16] - 1}


def main(arguments=None):
    """The command line."""
    parser = gtn.argument_parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=["A", "B", "C"], help="of configs.json, to time")
    parser.add_argument("--rounds", type=int, default=5, help="times every method is timed (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark.json"), help="file to write")
    args = parser.parse_args(arguments)
    device = gtn.choose_device(args.device)
    methods = ["full graph", "flat", *["CUDA graph"] * (device.type == "cuda")]
    methods += ["higher"] * bool(importlib.util.find_spec("higher"))
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # as in gtn.run
    result = {"environment": gtn.environment(device), "speed": {}}
    for name in args.configs:
        result["speed"][name] = measure_speed(gtn.make_config(name), methods, args.rounds, args.device)
    result["memory"] = measure_memory(gtn.make_config("A"), (8, 16, 32, 64, 128), args.device)
    gtn.write(args.out, result)


if __name__ == "__main__":
    sys.exit(gtn.run("benchmark.py", main, sys.argv[1:]))

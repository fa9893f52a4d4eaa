"""Time and memory of one outer step, beside the library `higher`.

    python tests/benchmark.py    # to results/benchmark.json; needs 12 GiB of memory

One fresh learner's meta-gradient, and an optimizer that moves nothing, by

    full graph    gtn.meta_gradient
    flat          gtn.meta_gradient_flat, and a generator that keeps no graph: --set flat=true
    CUDA graph    the full graph, recorded once and replayed: the default on CUDA
    higher        the same network of stock layers, trained by higher's differentiable SGD,
                  if it is there (pip install higher)

They take turns, round by round, on the same learners and random numbers. A test compares their
meta-gradients.
"""

import dataclasses
import importlib.util
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
from conftest import ROOT, as_module
from torch import nn

import gtn

IMAGE_SHAPE = (1, 28, 28)


def meta_gradient_by_higher(theta, curriculum, architecture, batches):
    """gtn.meta_gradient by the library higher, which keeps the full graph."""
    import higher

    network = as_module(theta, architecture, IMAGE_SHAPE)
    for i, layer in enumerate(network):  # all stock layers, as higher's users have them
        if isinstance(layer, gtn.MaxPool):
            network[i] = nn.MaxPool2d(2)
    losses = []
    images, labels, lr, momentum = map(gtn.leaf, curriculum)
    sgd = torch.optim.SGD(network.parameters(), lr=1, momentum=1)
    with higher.innerloop_ctx(network, sgd) as (learner, optimizer):
        for x, y, alpha, mu, real in zip(images, labels, lr, momentum, batches, strict=True):
            loss = nn.functional.cross_entropy(learner(x), y)
            optimizer.step(loss, override={"lr": [alpha], "momentum": [mu]})
            if real is not None:
                losses.append(nn.functional.cross_entropy(learner(real.images), real.labels))
    meta_loss = torch.stack(losses).mean()
    return meta_loss.detach(), *torch.autograd.grad(meta_loss, (images, lr, momentum))


def make_step(method, config, device, dtype=torch.float32):
    """(teacher, step): step(n) takes outer step n and leaves its meta-gradient in the
    teacher's .grad."""
    config = dataclasses.replace(config, flat=method == "flat", outer_lr=0.0, learners_per_step=1)
    with gtn.seeded(config.seed, gtn.TEACHER):  # noise takes as long as real images
        images, labels = torch.randn(2000, *IMAGE_SHAPE), torch.randint(10, (2000,))
        teacher = gtn.Teacher(config, IMAGE_SHAPE, 10)
        teacher.log_lr.data += 0.1 * torch.randn(config.inner_steps)  # no two steps are alike
    teacher = teacher.to(device, dtype)
    split = gtn.Split(images.to(device, dtype), labels.to(device))
    one = split.images.new_ones(1)
    data = gtn.Data(split, split, split, 0 * one, one)
    optimizer = torch.optim.SGD(teacher.parameters())
    replay = gtn.capture_graph(teacher, data) if method == "CUDA graph" else None
    meta_gradient = meta_gradient_by_higher if method == "higher" else gtn.meta_gradient

    def step(n):
        with mock.patch.object(gtn, "meta_gradient", meta_gradient):
            gtn.outer_step(teacher, optimizer, data, n, replay)

    return teacher, step


def speed(config, methods, rounds, device_name):
    """{method: its seconds of every round}."""
    device = gtn.choose_device(device_name)
    steps = {method: make_step(method, config, device)[1] for method in methods}
    seconds = {method: [] for method in methods}
    for n in range(-2, rounds):  # the first two warm up
        for method in methods[n % len(methods) :] + methods[: n % len(methods)]:
            start = time.perf_counter()
            steps[method](max(n, 0))  # ends by reading numbers: CUDA has then done all of it
            seconds[method].append(time.perf_counter() - start)
    return {method: times[2:] for method, times in seconds.items()}


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
    """function(*arguments) in a process of its own; its peak is at least its parent's, which
    has to stay small."""
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # spawned, not forked
        return pool.submit(function, *arguments).result()


def main(arguments=None):
    """The command line."""
    parser = gtn.argument_parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--configs", nargs="+", default=["A", "B", "C"], help="of configs.json, to time")
    add("--rounds", type=int, default=5, help="times every method is timed (default: 5)")
    args = parser.parse_args(arguments)
    device = gtn.choose_device(args.device)
    methods = ["full graph", "flat", *["CUDA graph"] * (device.type == "cuda")]
    methods += ["higher"] * bool(importlib.util.find_spec("higher"))
    result = {"environment": gtn.environment(device), "speed": {}}
    for config in map(gtn.make_config, args.configs):
        rows = result["speed"][config.name] = {}
        times = fresh_process(speed, config, methods, args.rounds, args.device)
        for method, seconds in times.items():
            median = statistics.median(seconds)
            peak = fresh_process(memory, config, method, args.device)
            rows[method] = {"seconds": seconds, "median": median, "peak": peak}
            print(f"{config.name}, {method}: {median:.3f} s (of {args.rounds}), {peak:.0f} MiB")
    lengths = 8, 16, 32, 64, 128
    configs = [dataclasses.replace(gtn.make_config("A"), inner_steps=T) for T in lengths]
    result["memory"] = {"inner_steps": lengths}
    for method in methods[:2]:
        peaks = [fresh_process(memory, config, method, args.device) for config in configs]
        result["memory"][method] = peaks
    gtn.write(ROOT / "results" / "benchmark.json", result)


if __name__ == "__main__":
    sys.exit(gtn.run("benchmark.py", main, sys.argv[1:]))

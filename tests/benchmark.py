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
import math
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

from conftest import as_module

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
    with higher.innerloop_ctx(network, torch.optim.SGD(network.parameters(), lr=1, momentum=1)) as (
        learner,
        sgd,
    ):
        for x, y, alpha, mu, real in zip(images, labels, lr, momentum, batches, strict=True):
            sgd.step(
                nn.functional.cross_entropy(learner(x), y),
                override={"lr": [alpha], "momentum": [mu]},
            )
            if real is not None:
                losses.append(nn.functional.cross_entropy(learner(real.images), real.labels))
    meta_loss = torch.stack(losses).mean()
    return meta_loss.detach(), *torch.autograd.grad(meta_loss, (images, lr, momentum))


def make_step(method, config, device, dtype=torch.float32):
    """(teacher, step): step(n) takes outer step n and leaves its meta-gradient in the
    teacher's .grad."""
    config = dataclasses.replace(config, flat=method == "flat", outer_lr=0.0, learners_per_step=1)
    with gtn.seeded(
        config.seed, gtn.TEACHER
    ):  # real images are random numbers: they take as long as any others
        split = gtn.Split(
            torch.randn(2000, *IMAGE_SHAPE).to(device, dtype), torch.randint(10, (2000,)).to(device)
        )
        teacher = gtn.Teacher(config, IMAGE_SHAPE, 10)
        teacher.log_lr.data += 0.1 * torch.randn_like(
            teacher.log_lr
        )  # no two inner steps are alike
    teacher, data = (
        teacher.to(device, dtype),
        gtn.Data(*[split] * 3, *torch.tensor([[0], [1]]).to(split.images)),
    )
    optimizer = torch.optim.SGD(teacher.parameters())
    replay = gtn.capture_graph(teacher, data) if method == "CUDA graph" else None
    meta_gradient = meta_gradient_by_higher if method == "higher" else gtn.meta_gradient

    def step(n):
        with mock.patch.object(gtn, "meta_gradient", meta_gradient):
            gtn.outer_step(teacher, optimizer, data, n, replay)

    return teacher, step


def speed(config, methods, rounds, device_name):
    """{method: its seconds of every round}."""
    device, record = gtn.choose_device(device_name), {method: {"seconds": []} for method in methods}
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
    """function(*arguments) in a process of its own; its peak is at least its parent's, which
    has to stay small."""
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # spawned, not forked
        return pool.submit(function, *arguments).result()


def measure_speed(config, methods, rounds, device_name):
    """The record of one configuration, which is printed, too."""
    record = fresh_process(speed, config, methods, rounds, device_name)
    for method, row in record.items():
        row["median"] = statistics.median(row["seconds"])
        row["peak"] = fresh_process(memory, config, method, device_name)
        time_and_memory = f"{row['median']:.3f} s (median of {rounds}), {row['peak']:.0f} MiB"
        print(f"{config.name}, {method}: {time_and_memory}")
    for row in record.values() if "higher" in record else ():
        row["times_faster_than_higher"] = record["higher"]["median"] / row["median"]
    return record


def measure_memory(config, lengths, device_name):
    """The record of memory against inner steps T; growth: of flat, from T = 16 to 128.

    Growth is beyond the images and their gradient.
    """
    rows = []
    for T in lengths:
        images = (
            2 * T * config.batch_size * math.prod(IMAGE_SHAPE) * 4 / 2**20
        )  # and their gradient
        for method in ("full graph", "flat"):
            peak = fresh_process(
                memory, dataclasses.replace(config, inner_steps=T), method, device_name
            )
            rows.append({"method": method, "inner_steps": T, "images": images, "peak": peak})
    beyond = {
        row["inner_steps"]: row["peak"] - row["images"] for row in rows if row["method"] == "flat"
    }
    return {"rows": rows, "growth": beyond[128] / beyond[16] - 1}


def main(arguments=None):
    """The command line."""
    parser = gtn.argument_parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--configs", nargs="+", default=["A", "B", "C"], help="of configs.json, to time"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="times every method is timed (default: 5)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/benchmark.json"), help="file to write"
    )
    args = parser.parse_args(arguments)
    device = gtn.choose_device(args.device)
    methods = ["full graph", "flat", *["CUDA graph"] * (device.type == "cuda")]
    methods += ["higher"] * bool(importlib.util.find_spec("higher"))
    result = {"environment": gtn.environment(device), "speed": {}}
    for name in args.configs:
        result["speed"][name] = measure_speed(
            gtn.make_config(name), methods, args.rounds, args.device
        )
    result["memory"] = measure_memory(gtn.make_config("A"), (8, 16, 32, 64, 128), args.device)
    gtn.write(args.out, result)


if __name__ == "__main__":
    sys.exit(gtn.run("benchmark.py", main, sys.argv[1:]))

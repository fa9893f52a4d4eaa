"""Time, arithmetic and memory of one outer step, beside the libraries `higher` and `torchopt`.

    pip install higher torchopt          # once, to measure them too; without them the rest is measured
    python tests/benchmark.py            # all of it, to results/benchmark.json; needs 8 GiB of memory
    python tests/benchmark.py --quick    # whether it works: tiny networks, seconds

An outer step is here one fresh learner: the teacher's curriculum, the inner loop, the meta-gradient in phi; not Adam's
step on phi. Every method gets the same teacher, initial learner, real batches and random numbers, and keeps freed
memory. `higher` and `torchopt` train the learner as an nn.Module, each by its own differentiable SGD. First all
methods must give the same meta-gradient. Ranges of filters are replaced by their middle; real images are random
numbers, which take as long as any others. On a CPU the libraries are timed once more in a process that gives freed
memory back, as every process does that does not ask otherwise ("unkept").

Every configuration, and every measurement of memory, gets a fresh process; within a configuration the methods take
turns, round by round. On CUDA matrix products and convolutions are in TF32, the measured matrix product too.
The JSON holds this run alone, every round of it; memory is in MiB.
"""

import argparse
import copy
import dataclasses
import functools
import importlib
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gtn

IMAGE_SHAPE = (1, 28, 28)
PARTS = ("speed", "memory", "vmap")
TINY = {"inner_steps": 4, "batch_size": 6, "filters": (3, 5), "hidden_size": 8, "generator_filters": 4,
        "meta_batch_size": 16, "meta_loss_every": 2}  # fmt: skip
# Training amplifies rounding: in float32 config A's meta-gradient, by whichever method, is about 3e-3 away from the one
# in float64, where the methods agree to 1e-14: float64 is the sharp check, float32 is for the sizes that are timed.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-2}

# ------------------------------------------------------------------------------------- the libraries


def module(theta, architecture):
    """`gtn.learner` (max pooling, instance normalisation) as an nn.Module that starts at theta."""
    layers, (channels, height, width) = [], IMAGE_SHAPE
    for filters, kernel in zip(architecture.filters, architecture.kernels, strict=True):
        layers += [nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False), nn.MaxPool2d(2)]
        layers += [nn.GroupNorm(filters, filters), nn.LeakyReLU(0.01)]
        channels, height, width = filters, height // 2, width // 2
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, gtn.CLASSES)).to(theta)
    *values, weight, bias = gtn.parameters(theta, architecture, IMAGE_SHAPE)
    weight = weight.view(gtn.CLASSES, height, width, channels).permute(0, 3, 1, 2).flatten(1)  # as nn.Flatten has it
    with torch.no_grad():
        for p, value in zip(network.parameters(), [*values, weight, bias], strict=True):
            p.copy_(value)
    return network


def higher_meta_gradient(theta, curriculum, architecture, real, batches, segment):
    """`gtn.meta_gradient` by the library higher, which keeps the full graph."""
    import higher

    network = module(theta, architecture)
    images, lr, momentum = inputs = [gtn.leaf(x) for x in (curriculum.images, curriculum.lr, curriculum.momentum)]
    losses = []
    with higher.innerloop_ctx(network, torch.optim.SGD(network.parameters(), lr=1, momentum=1)) as (learner, sgd):
        for x, y, alpha, mu, rows in zip(images, curriculum.labels, lr, momentum, batches, strict=True):
            sgd.step(F.cross_entropy(learner(x), y), override={"lr": [alpha], "momentum": [mu]})
            if rows is not None:
                losses.append(F.cross_entropy(learner(real.images[rows]), real.labels[rows]))
    loss = torch.stack(losses).mean()
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def torchopt_meta_gradient(theta, curriculum, architecture, real, batches, segment):
    """The same by torchopt, with one momentum for all steps: d momentum [T] is its gradient, divided among them."""
    import torchopt

    network = module(theta, architecture)
    images, lr, momentum = inputs = [gtn.leaf(x) for x in (curriculum.images, curriculum.lr, curriculum.momentum[0])]
    sgd = torchopt.MetaSGD(network, lr=lr.take, momentum=momentum)  # lr: a schedule, called with the step's number
    losses = []
    for x, y, rows in zip(images, curriculum.labels, batches, strict=True):
        sgd.step(F.cross_entropy(network(x), y))
        if rows is not None:
            losses.append(F.cross_entropy(network(real.images[rows]), real.labels[rows]))
    loss = torch.stack(losses).mean()
    *gradients, d_momentum = torch.autograd.grad(loss, inputs)
    return loss.detach(), *gradients, d_momentum.expand(len(batches)) / len(batches)


LIBRARIES = {"higher": higher_meta_gradient, "torchopt": torchopt_meta_gradient}


def available(device_name):
    """(the methods that can run here, a line for each library that cannot); imports the libraries."""
    missing, cuda = [], gtn.choose_device(device_name).type == "cuda"
    methods = ["full graph", "one-step segments", *["CUDA graph"] * cuda]
    for library in LIBRARIES:
        try:
            importlib.import_module(library)
            methods.append(library)
        except ImportError as error:
            missing.append(f"without {library}: {error} (pip install {library})")
    return methods, missing


# ---------------------------------------------------------------------------------- what is measured


def make_problem(config, device, dtype=torch.float32):
    """(teacher, data): inner learning rates differ from step to step, momenta do not (see torchopt)."""
    with gtn.seeded(config.seed, 0):
        split = gtn.Split(torch.randn(2000, *IMAGE_SHAPE).to(device, dtype), torch.randint(10, (2000,)).to(device))
        data = gtn.Data(split, split, split, split.images.new_zeros(1), split.images.new_ones(1))
        teacher = gtn.Teacher(config, IMAGE_SHAPE)
        with torch.no_grad():
            teacher.log_lr += 0.1 * torch.randn_like(teacher.log_lr)
    return teacher.to(device, dtype), data


def make_step(method, teacher, data):
    """(a copy of the teacher, a function n -> meta-loss that leaves outer step n's meta-gradient in its .grad)."""
    config, teacher = teacher.config, copy.deepcopy(teacher)
    teacher.config = dataclasses.replace(config, segment=1 if method == "one-step segments" else config.inner_steps)
    learn = functools.partial(gtn.teach, teacher, data)
    learn = gtn.replayed(learn) if method == "CUDA graph" else learn

    def step(n):
        teacher.zero_grad(set_to_none=False)  # a CUDA graph adds to the same addresses
        meta_gradient = LIBRARIES.get(method, gtn.meta_gradient)
        with gtn.seeded(config.seed, 3, n), mock.patch.object(gtn, "meta_gradient", meta_gradient):
            return learn()

    return teacher, step


def check(methods, config, device, dtype):
    """Each method's largest relative difference from the full graph's meta-gradient, and its counted arithmetic.

    The difference, by Euclidean norm, is the largest over what gives the images (latent input and generator), over
    the learning rates and over the momenta. Raises InputError above the TOLERANCE. A multiply-add counts as two
    floating-point operations; only matrix products and convolutions are counted, as often as they are done.
    """
    from torch.utils.flop_counter import FlopCounterMode  # 70 MiB that the measurements of memory shall not hold

    problem, expected, differences, operations = make_problem(config, device, dtype), None, {}, {}
    for method in methods:
        teacher, step = make_step(method, *problem)
        for _ in range(3 if method == "CUDA graph" else 0):  # the fourth is the first from the graph
            step(0)
        with FlopCounterMode(display=False) as counter:
            step(0)
        operations[method] = counter.get_total_flops()
        lr, momentum, *images = (p.grad.flatten() for p in teacher.parameters())  # in Teacher's order
        found = [torch.cat(images), lr, momentum]
        expected = expected or found
        pairs = list(zip(found, expected, strict=True))
        if method == "torchopt":
            pairs[2] = tuple(g.sum() for g in pairs[2])
        differences[method] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        if not differences[method] <= TOLERANCE[dtype]:
            error = f"differs from the full graph's by {differences[method]:.1e}, more than {TOLERANCE[dtype]:.0e}"
            raise gtn.InputError(f"{config.name}: the meta-gradient of {method} {error}: nothing was timed")
        if method == "CUDA graph":
            operations[method] = operations["full graph"]  # the same; a replay shows nothing to count
    return differences, operations


def seconds(function, *arguments):
    """Wall seconds of one call, CUDA's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    function(*arguments)
    wait()
    return time.perf_counter() - start


def matrix_product_rate(device):
    """Floating-point operations per second of a large float32 matrix product, best of three."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device)
    return 2 * n**3 / min(seconds(torch.matmul, a, a) for _ in range(3))


def speed(config, methods, rounds, device_name, keep=True):
    """The record of one configuration: for each method its differences, operations and seconds of every round."""
    if keep:
        gtn.keep_freed_memory()
    device = gtn.choose_device(device_name)
    exact, _ = check(methods, dataclasses.replace(config, **TINY), device, torch.float64)
    torch.set_float32_matmul_precision("highest")  # TF32 rounds to 5e-4, so that it could hide an error
    torch.backends.cudnn.allow_tf32 = False
    differences, operations = check(methods, config, device, torch.float32)
    torch.backends.cudnn.allow_tf32 = True
    gtn.choose_device(device_name)  # as it was

    problem, times, rates = make_problem(config, device), {method: [] for method in methods}, []
    steps = {method: make_step(method, *problem)[1] for method in methods}
    for step in steps.values():
        for _ in range(4 if device.type == "cuda" else 1):
            step(0)
    for n in tqdm(range(rounds), desc=config.name, leave=False):
        rates.append(matrix_product_rate(device))
        for method in methods[n % len(methods) :] + methods[: n % len(methods)]:
            times[method].append(seconds(steps[method], n))
    keys = ("difference_float64", "difference", "operations", "seconds")
    rows = {m: dict(zip(keys, (exact[m], differences[m], operations[m], times[m]), strict=True)) for m in methods}
    return {"config": dataclasses.asdict(config), "matrix_product_rates": rates, "methods": rows}


def memory(config, method, device_name):
    """MiB of the process or of CUDA tensors: `base` before outer steps, `peak` after a few; `images`: theirs alone."""
    gtn.keep_freed_memory()
    device = gtn.choose_device(device_name)
    kind, steps = ("cuda", 5) if device.type == "cuda" else ("process", 3)
    teacher, step = make_step(method, *make_problem(config, device))
    torch.optim.Adam(teacher.parameters())  # loads 110 MiB of PyTorch, which every run holds
    base = gtn.peak_memory()[kind]
    for n in range(steps):
        step(n)
    T, B, numbers = config.inner_steps, config.batch_size, torch.Size(IMAGE_SHAPE).numel()
    return {"method": method, "inner_steps": T, "batch_size": B, "images": T * B * numbers * 4 / 2**20,
            "base": base, "peak": gtn.peak_memory()[kind]}  # fmt: skip


def train_together(thetas, curriculum, architecture):
    """theta_T [K, P] of learners that start at `thetas`, as `gtn.train_learner` gives it.

    With PyTorch's own operations: torch.func cannot map gtn's.
    """
    operations = {
        "convolve": lambda x, weight: F.conv2d(x, weight, padding=weight.shape[-1] // 2),
        "MaxPool": SimpleNamespace(apply=lambda x: F.max_pool2d(x, 2)),
        "normalize": lambda x, scale, shift, kind, statistics: F.group_norm(x, len(scale), scale, shift),
        "Slope": SimpleNamespace(apply=lambda x, _: F.leaky_relu(x, 0.01)),
    }

    def loss(theta, images, labels):
        return F.cross_entropy(gtn.learner(theta, images, architecture), labels)

    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))
    theta, velocity = gtn.at_rest(torch.stack(thetas))
    with mock.patch.multiple(gtn, **operations), torch.no_grad():
        for images, labels, lr, momentum in zip(*curriculum, strict=True):
            theta, velocity = gtn.sgd(theta, velocity, gradient(theta, images, labels), lr, momentum)
    return theta


def vectorized(config, rounds, device_name, learners=8):
    """Seconds of every round to train `learners` on one curriculum, one after another and together by vmap."""
    gtn.keep_freed_memory()
    device = gtn.choose_device(device_name)
    teacher, data = make_problem(config, device)
    architecture = gtn.sample_architecture(config)
    with gtn.seeded(config.seed, 1), torch.no_grad():
        curriculum = teacher(data)
        thetas = [gtn.init_learner(architecture, IMAGE_SHAPE, device) for _ in range(learners)]

    def one_after_another():
        trained = [gtn.train_learner(theta, curriculum, architecture) for theta in thetas]
        return torch.stack(trained)

    together = functools.partial(train_together, thetas, curriculum, architecture)
    a, b = (train().detach() for train in (together, one_after_another))
    difference = float((a - b).norm() / b.norm())
    if not difference <= 1e-2:
        raise gtn.InputError(f"learners trained together differ by {difference:.1e} from those trained alone")
    times = [(seconds(one_after_another), seconds(together)) for _ in range(rounds)]
    alone, vmap = map(list, zip(*times, strict=True))
    return {"filters": config.filters, "learners": learners, "difference": difference,
            "seconds": {"one after another": alone, "together": vmap}}  # fmt: skip


# ------------------------------------------------------------------------------------------- report


def fresh_process(function, *arguments):
    """function(*arguments) in a process of its own; on Linux it inherits its parent's peak memory, so keep that low."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            what = f"{function.__name__} of {getattr(arguments[0], 'name', arguments[0])}"
            raise gtn.InputError(f"{what} ended early, probably for lack of memory: see --configs, --parts") from None


def show(title, header, rows):
    """Print an aligned table; its first column is words, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for first, *others in (header, *rows):
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))


def measure_speed(config, methods, rounds, device_name):
    """The record of one configuration, with medians, ratios and shares; prints its table."""
    record, rows = fresh_process(speed, config, methods, rounds, device_name), []
    best, by_method = max(record["matrix_product_rates"]), record["methods"]
    for method, r in by_method.items():
        memory_used, median = fresh_process(memory, config, method, device_name), statistics.median(r["seconds"])
        ratio = statistics.median(by_method["higher"]["seconds"]) / median if "higher" in by_method else None
        rate = r["operations"] / median
        r |= {"median": median, "memory": memory_used}
        r |= {"times_faster_than_higher": ratio, "share_of_matrix_product": rate / best}
        if method in LIBRARIES and gtn.choose_device(device_name).type == "cpu":
            alone = fresh_process(speed, config, [method], rounds, device_name, False)["methods"][method]
            r["seconds_unkept"] = alone["seconds"]
        unkept = f"{statistics.median(r['seconds_unkept']):.3f}" if "seconds_unkept" in r else "-"
        rows.append([method, f"{median:.3f}", f"{min(r['seconds']):.3f}", f"{max(r['seconds']):.3f}",
                     unkept, f"{ratio:.2f}" if ratio else "-",
                     f"{memory_used['base']:.0f}", f"{memory_used['peak']:.0f}",
                     f"{r['operations'] / 1e9:.1f}", f"{rate / 1e9:.1f}", f"{rate / best:.0%}",
                     f"{r['difference']:.0e}", f"{r['difference_float64']:.0e}"])  # fmt: skip
    header = "method seconds min max unkept higher/this base,MiB peak,MiB GFLOP GFLOP/s share difference float64"
    show(f"{config.name}: one outer step; share of a matrix product's {best / 1e9:.1f} GFLOP/s", header.split(), rows)
    return record


def measure_memory(base, quick, rounds, device_name):
    """The record of memory against inner steps, and of many images per step: full graph against one-step segments."""
    kinds, rows = ("full graph", "one-step segments"), []
    wide = dataclasses.replace(base, inner_steps=4 if quick else 32, batch_size=12 if quick else 128)
    configs = [dataclasses.replace(base, inner_steps=T) for T in ((2, 4) if quick else (8, 16, 32, 64, 128))]
    for config in tqdm([*configs, wide], desc="memory", leave=False):
        rows += [fresh_process(memory, config, method, device_name) for method in kinds]
    methods = fresh_process(speed, wide, kinds, rounds, device_name)["methods"]
    full, segments = (statistics.median(methods[kind]["seconds"]) for kind in kinds)
    ratios = {"memory": rows[-2]["peak"] / rows[-1]["peak"], "time": segments / full}
    ratios["memory_beyond_base"] = (rows[-2]["peak"] - rows[-2]["base"]) / (rows[-1]["peak"] - rows[-1]["base"])
    keys = ["method", "inner_steps", "batch_size", "base", "peak", "images"]
    show("memory, MiB", keys, [[r["method"], *(f"{r[key]:.0f}" for key in keys[1:])] for r in rows])
    print(f"T = {wide.inner_steps}, B = {wide.batch_size}: the full graph peaks {ratios['memory']:.2f} times higher, "
          f"{ratios['memory_beyond_base']:.2f} times beyond the base; "
          f"one-step segments take {ratios['time']:.2f} of its time")  # fmt: skip
    return {"rows": rows, "wide": ratios | {"seconds": {kind: methods[kind]["seconds"] for kind in kinds}}}


def measure_vmap(base, quick, rounds, device_name):
    """The records of learners trained together, for several widths; prints their table."""
    widths, records, rows = [(2, 3)] if quick else [(8, 16), (32, 64), (64, 128)], [], []
    for filters in tqdm(widths, desc="vmap", leave=False):
        r = fresh_process(vectorized, dataclasses.replace(base, filters=filters), rounds, device_name)
        records.append(r)
        alone, together = (r["learners"] / statistics.median(times) for times in r["seconds"].values())
        r["learners_per_second"] = {"one after another": alone, "together": together}
        rows.append([str(filters), f"{alone:.2f}", f"{together:.2f}", f"{together / alone:.2f}"])
    title = f"{r['learners']} learners on one curriculum, learners per second"
    show(title, ["filters", "one after another", "together (vmap)", "ratio"], rows)
    return records


def parse_arguments(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__.splitlines()[0])

    def fail(message):
        raise gtn.InputError(message)

    parser.error, add = fail, parser.add_argument
    add("--configs", nargs="+", default=["A", "B", "C", "paper"], metavar="NAME", help="entries of configs.json")
    add("--parts", nargs="+", default=PARTS, choices=PARTS, help="what is measured (default: all)")
    add("--rounds", type=int, default=5, metavar="N", help="times every method is timed (default: 5)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--out", default="results/benchmark.json", metavar="FILE", help="default: results/benchmark.json")
    add("--quick", action="store_true", help="tiny networks: whether it works, not how fast")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        fail(f"--rounds {args.rounds}: must be a whole number of at least 1")
    return args


def make_config(name, quick):
    """The Config of a name with fixed filters: the middle of a range."""
    config = gtn.make_config(name)
    filters = tuple(sum(f) // 2 if isinstance(f, tuple) else f for f in config.filters)
    return dataclasses.replace(config, **({"filters": filters, "segment": 1} | (TINY if quick else {})))


def main(arguments=None):
    """The command line; returns the exit status."""
    try:
        args = parse_arguments(arguments)
        device, out = gtn.choose_device(args.device), Path(args.out)
        configs = {name: make_config(name, args.quick) for name in args.configs}
        result = {"environment": gtn.environment(device)}
        if "speed" in args.parts:
            methods, missing = fresh_process(available, args.device)
            print("\n".join(missing))
            result["speed"] = {}
            for name, config in configs.items():
                result["speed"][name] = measure_speed(config, methods, args.rounds, args.device)
                gtn.write_json(out, result)
        for part, measure in (("memory", measure_memory), ("vmap", measure_vmap)):
            if part in args.parts:
                result[part] = measure(make_config("A", args.quick), args.quick, args.rounds, args.device)
                gtn.write_json(out, result)
        print(f"\nwritten to {out}")
        return 0
    except gtn.InputError as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

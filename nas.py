"""Neural architecture search with a trained teacher (Such et al., arXiv 1912.07768).

Ranks random architectures by the accuracy that each reaches after the few SGD steps of a teacher's curriculum, and
measures what the ranking is worth: its rank correlation with the truth, the accuracy after full training on real data.

    python nas.py runs/quick-learned-s0/teacher.pt --architectures 12 --truth-steps 100   # 2 minutes on two CPU cores
    python nas.py TEACHER.pt                            # 64 architectures, to nas-widths-s0 beside the teacher
    python nas.py --help                                # every flag
    torchrun --nproc-per-node 2 nas.py TEACHER.pt       # the same result, architectures shared out among processes

  teacher   validation accuracy of a fresh learner after the T inner steps of the teacher's curriculum
  control   the same learner after T steps on real batches of that size, inner learning rate and momentum tuned
  size      its parameters, and its multiply-adds for one image
  truth     validation accuracy after full training, the mean over `--repeats` seeds

The noise ceiling is the rank correlation of truth under one seed with truth under another. It compares single
trainings, the methods are compared with the mean over the seeds, which has less noise: a method may come out above
the ceiling. Everything is chosen on validation images; test accuracy is reported, and decides nothing.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
import shlex
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed
from tqdm import tqdm

import gtn
from gtn import Architecture, InputError

# ------------------------------------------------------------------------------------ search space

SPACES = {  # for each possible number of conv blocks every block's (low, high) of filters; kernel sizes; poolings
    "widths": ([((1, 63), (1, 127))], [3], ["max"]),
    "wide": ([((4, 128),) * blocks for blocks in (1, 2, 3, 4)], [3, 5], ["max", "average"]),
}


def sample_architectures(space, count, normalization, image_shape, *seed):
    """`count` distinct Architectures of a space, none too deep for images [C, H, W]; a longer list begins with them.

    Raises InputError where the space has fewer.
    """
    (depths, kernels, poolings), possible, size = SPACES[space], [], 0
    for ranges in depths:
        n = len(ranges)
        with contextlib.suppress(InputError):  # too deep
            gtn.parameter_shapes(Architecture((1,) * n, (3,) * n, normalization=normalization), image_shape)
            possible.append(ranges)
            size += math.prod(high - low + 1 for low, high in ranges) * len(kernels) ** n * len(poolings)
    if size < count:
        raise InputError(f"--architectures {count}: --space {space} has only {size} for images of {[*image_shape]}")
    generator, found = np.random.default_rng(seed), {}  # a dict: distinct, in order

    def pick(options):
        return options[generator.integers(len(options))]

    while len(found) < count:
        ranges = pick(possible)
        filters, sizes = (tuple(map(pick, x)) for x in ([range(a, b + 1) for a, b in ranges], [kernels] * len(ranges)))
        found[Architecture(filters, sizes, pick(poolings), normalization)] = None
    return list(found)


def describe(architecture):
    """An architecture in a word: filters, then kernels that are not all 3, then a pooling that is not max."""
    kernels = "" if set(architecture.kernels) == {3} else "/" + "-".join(map(str, architecture.kernels))
    return "-".join(map(str, architecture.filters)) + kernels + ("/average" if architecture.pooling != "max" else "")


def size(architecture, image_shape):
    """The parameters, and the multiply-adds of convolutions and linear layer for one image."""
    *blocks, weight, bias = map(math.prod, gtn.parameter_shapes(architecture, image_shape))
    _, height, width = image_shape
    convolutions = [n * (height >> i) * (width >> i) for i, n in enumerate(blocks[::3])]  # each pooling halves both
    return {"parameters": sum(blocks) + weight + bias, "multiply_adds": sum(convolutions) + weight}


# -------------------------------------------------------------------- one architecture's measurements

BATCH, PEAK_LR, DECAY = 128, 0.02, 0.01
RECIPE = f"AdamW, one-cycle learning rate up to {PEAK_LR}, weight decay {DECAY}, batches of {BATCH}"


def key(architecture):
    """Whole numbers that identify an architecture: a seed made of them does not depend on what else is ranked."""
    blocks = len(architecture.filters)
    return blocks, *architecture.filters, *architecture.kernels, int(architecture.pooling == "max")


def clock(device):
    """Seconds, once the device has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_briefly(source, data, images, architecture, seed):
    """(accuracy on the first `images` validation images, seconds) of a fresh learner after T inner steps.

    source: a function of the data that returns a Curriculum. Seed and architecture fix theta_0, whatever the source.
    """
    began, device = clock(data.mean.device), data.mean.device
    with gtn.seeded(seed, 3, *key(architecture)), torch.no_grad():
        theta = gtn.init_learner(architecture, data.train.images.shape[1:], device, data.mean.dtype)
        curriculum = source(data)
    theta = gtn.train_learner(theta, curriculum, architecture)
    split = gtn.Split(*(x[:images] for x in data.validation))
    return gtn.accuracy(theta, split, architecture, curriculum.images[-1]), clock(device) - began


def train_fully(data, architecture, steps, seed, repeat):
    """({"validation", "test"}: accuracies, seconds without the test) after real training by RECIPE.

    An epoch is a random permutation of the training images. The last batch is the reference (see gtn.learner).
    """
    began, device, images = clock(data.mean.device), data.mean.device, len(data.train.labels)
    with gtn.seeded(seed, 4, repeat, *key(architecture)):
        theta = gtn.init_learner(architecture, data.train.images.shape[1:], device, data.mean.dtype)
        epochs = [torch.randperm(images, device=device) for _ in range(math.ceil(steps * BATCH / images))]
    theta, batches = gtn.leaf(theta), torch.cat(epochs)[: steps * BATCH].view(steps, BATCH)
    optimizer = torch.optim.AdamW([theta], PEAK_LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for index in batches:
        logits = gtn.learner(theta, data.train.images[index], architecture)
        optimizer.zero_grad()
        F.cross_entropy(logits, data.train.labels[index]).backward()
        optimizer.step()
        schedule.step()
    reference = data.train.images[batches[-1]]
    validation = gtn.accuracy(theta, data.validation, architecture, reference)
    seconds = clock(device) - began
    return {"validation": validation, "test": gtn.accuracy(theta, data.test, architecture, reference)}, seconds


def real_batches(config, data, lr, momentum, **_):
    """The control's source: T batches of real data, at one inner learning rate and momentum."""
    config = dataclasses.replace(config, variant="real", inner_lr=lr, momentum=momentum, per_step=False)
    return gtn.Teacher(config, data.train.images.shape[1:]).to(data.mean.device)


def tune_control(space, config, data, seed):
    """{"lr", "momentum", "grid"}: the best of a grid by the mean accuracy of 4 architectures, drawn by another seed."""
    architectures = sample_architectures(space, 4, config.normalization, data.train.images.shape[1:], seed, 7)
    grid = []
    for lr, momentum in tqdm(list(itertools.product((0.003, 0.01, 0.03, 0.1, 0.3), (0.5, 0.9))), "control's grid"):
        source = real_batches(config, data, lr, momentum)
        accuracies = [train_briefly(source, data, config.validation_images, a, seed)[0] for a in architectures]
        grid.append({"lr": lr, "momentum": momentum, "validation": float(np.mean(accuracies))})
    best = max(grid, key=lambda row: row["validation"])
    return {"lr": best["lr"], "momentum": best["momentum"], "grid": grid}


# ----------------------------------------------------------------------------- statistics of ranks
#
# Of values x, y [n] under weights [R, n] at once: weight w makes an entry count as w equal ones. Weights of one give
# the statistic itself, multinomial counts its bootstrap resamples. nan, undefined, where x or y is constant.


def signs(values):
    """[n, n]: at (j, i) 1 where value i is above value j, -1 where it is below, 0 for a tie."""
    return np.sign(values - values[:, None])


def spearman(x, y, weights):
    """Spearman's rank correlation [R]: Pearson's correlation of ranks, ties having their average rank."""
    a, b = weights @ signs(x), weights @ signs(y)  # twice the distance from the mean rank
    return (weights * a * b).sum(1) / np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))


def kendall(x, y, weights):
    """Kendall's tau-b [R]: concordant minus discordant pairs, over the geometric mean of pairs untied in x and in y."""
    a, b = signs(x), signs(y)
    both, in_x, in_y = (((weights @ pairs) * weights).sum(1) for pairs in (a * b, a * a, b * b))
    return both / np.sqrt(in_x * in_y)


def top(values, weights, k):
    """What is left of the weights if only the k best values stay; ties at the border share the room there is."""
    better, tied = weights @ (values[:, None] > values), weights @ (values[:, None] == values)
    return weights * np.clip((k - better) / np.maximum(tied, 1e-9), 0, 1)


def precision(x, y, weights):
    """Share [R] of the top 10 % by x (at least one) also in that by y; the expectation where ties fall at random."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.full(len(weights), np.nan)
    k = max(1, len(x) // 10)
    return (top(x, weights, k) * top(y, weights, k) / np.maximum(weights, 1e-9)).sum(1) / k


def estimate(statistic, pairs, weights):
    """{"value", "low", "high"} of the statistic's mean over pairs (x, y): with weights[0], and the 95 % percentiles
    with the others, those left out with which it is undefined. None for what is undefined."""
    with np.errstate(invalid="ignore"):
        value, *resampled = np.mean([statistic(x, y, weights) for x, y in pairs] or [[np.nan]], axis=0).tolist()
    defined = [v for v in resampled if not math.isnan(v)]
    if math.isnan(value) or not defined:
        return {"value": None if math.isnan(value) else value, "low": None, "high": None}
    low, high = np.percentile(defined, [2.5, 97.5]).tolist()
    return {"value": value, "low": low, "high": high}


def correlations(methods, repeats, seed, resamples=1000):
    """{method: {"spearman", "kendall", "precision"}} against truth, as nas.json has them, and of the method "ceiling".

    methods: {name: values [n]}; repeats [R, n]: truth under every seed, and truth is its mean. "top half": the better
    half by truth, rounded up. The bootstrap resamples architectures, the same ones for every method.
    """
    truth, n = np.mean(repeats, axis=0), len(repeats[0])
    resampled = np.random.default_rng([seed, 5]).multinomial(n, np.full(n, 1 / n), resamples)
    weights = np.concatenate([np.ones((1, n)), resampled])
    subsets = {"all": weights, "top half": top(truth, weights, (n + 1) // 2)}
    pairs = {name: [(np.array(values), truth)] for name, values in methods.items()}
    pairs["ceiling"] = list(itertools.combinations(np.array(repeats), 2))
    ranks = {"spearman": spearman, "kendall": kendall}
    return {
        method: {name: {s: estimate(f, p, w) for s, w in subsets.items()} for name, f in ranks.items()}
        | {"precision": estimate(precision, p, weights)}
        for method, p in pairs.items()
    }


# ------------------------------------------------------------------------------------------ search
#
# A folder holds search.json (settings, control's grid), nas.jsonl (a line for each architecture as it finishes) and,
# at the end, nas.json (everything).

IDENTITY = ("filters", "kernels", "pooling", "normalization")
MEASURED = ("parameters", "multiply_adds", "teacher", "control", "truth", "seconds")
ALIKE = ("dataset", "inner_steps", "batch_size", "normalization")  # of a teacher and its control


def read_source(path, device):
    """A teacher.pt: its config, its content with the file's sha256, and a function of the data that returns a
    Curriculum: the file's or, where the variant draws one for every learner, a new one."""
    teacher, content = gtn.read_teacher(path, device)
    with gtn.reading(path):
        content["sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    drawn_anew = teacher.config.variant in ("random", "real")
    return teacher.config, content, teacher if drawn_anew else lambda data: content["curriculum"]


def load_data(path, content, folder, device):
    """The data of a teacher.pt; InputError unless image size and pixel statistics are those that it trained on."""
    name = content["config"]["dataset"]
    data = gtn.load_data(name, folder, device)
    with gtn.reading(path):
        same = all(torch.allclose(content[k].to(device), getattr(data, k), atol=1e-3) for k in ("mean", "std"))
    if not same or content["curriculum"].images.shape[2:] != data.train.images.shape[1:]:
        raise InputError(f"{path} was trained on other images than the {name} found here: name its folder with --data")
    return data


def read_done(folder, repeats):
    """{Architecture: its line of nas.jsonl}; a last line that was never finished is left out."""
    path = folder / "nas.jsonl"
    lines = gtn.read_log(path, IDENTITY + MEASURED) if path.exists() else []
    with gtn.reading(path):
        if any(len(line["truth"]) != repeats for line in lines):
            raise ValueError("a line with another number of repeats")
        return {Architecture(*(tuple(x[f]) if type(x[f]) is list else x[f] for f in IDENTITY)): x for x in lines}


def check_folder(folder, origin, resume):
    """The `control` of search.json, or None; InputError for another search's folder, or this one's without resume."""
    path = folder / "search.json"
    if not path.exists():
        if read_done(folder, origin["truth"]["repeats"]):
            raise InputError(f"{folder} holds a nas.jsonl, but no search.json: choose another --out")
        return None
    with gtn.reading(path):
        theirs = json.loads(path.read_text())
        control = {key: theirs["control"][key] for key in ("lr", "momentum", "grid")}
        settings = [key for key in ("seed", "space", "truth", "sha256") if theirs[key] != origin[key]]
    if settings:
        other = "; ".join(f"{key}={theirs[key]}, now {origin[key]}" for key in settings)
        raise InputError(f"{folder} holds a search with {other}: choose another --out")
    if not resume:
        raise InputError(f"{folder} holds this search: continue it with --resume, or choose another --out")
    return control


def begin(args, rank):
    """What is settled before the first architecture is trained: folder, data, {"teacher", "control"}: sources, the
    architectures, and nas.json's fields on where it comes from. Rank 0 also mends nas.jsonl, and writes search.json;
    the others read it afterwards. Raises InputError where something does not fit."""
    device = gtn.choose_device(args.device)
    config, content, teacher = read_source(args.teacher, device)
    theirs, real, control = read_source(args.real, device) if args.real else (None, {}, None)
    expected = {"variant": "real"} | {field: getattr(config, field) for field in ALIKE} if args.real else {}
    if other := [f"{f}={getattr(theirs, f)}, not {x}" for f, x in expected.items() if getattr(theirs, f) != x]:
        raise InputError(f"--real {args.real} has {'; '.join(other)}")
    origin = {
        "teacher": args.teacher, "real": args.real, "seed": args.seed, "space": args.space,
        "config": dataclasses.asdict(config), "environment": gtn.environment(device),
        "truth": {"steps": args.truth_steps, "repeats": args.repeats, "recipe": RECIPE},
        "sha256": {"teacher": content["sha256"], "real": real.get("sha256")},
    }  # fmt: skip
    folder = Path(args.out or Path(args.teacher).with_name(f"nas-{args.space}-s{args.seed}"))
    origin["control"] = check_folder(folder, origin, args.resume or rank > 0)
    done, data = read_done(folder, args.repeats), load_data(args.teacher, content, args.data, device)
    shape = data.train.images.shape[1:]
    architectures = sample_architectures(args.space, args.architectures, config.normalization, shape, args.seed)
    architectures += [Architecture(f, (3,) * len(f), normalization=config.normalization) for f in args.also]
    sizes = {a: size(a, shape)["parameters"] for a in architectures}  # distinct; an InputError for one too deep
    if rank == 0:
        gtn.write_file(folder / "nas.jsonl", "".join(json.dumps(line) + "\n" for line in done.values()).encode())
        print(f"{len(sizes)} architectures (filters of each conv block=parameters)")
        print(textwrap.fill("  ".join(f"{describe(a)}={n}" for a, n in sizes.items()), 100, break_on_hyphens=False))
    if args.real:
        lr, momentum = (x.tolist() for x in real["curriculum"][2:])
        origin["control"] = {"lr": lr, "momentum": momentum, "grid": None}
    else:
        origin["control"] = origin["control"] or tune_control(args.space, config, data, args.seed)
        control = real_batches(config, data, **origin["control"])
    if rank == 0:
        gtn.write_json(folder / "search.json", origin)
    return folder, data, {"teacher": teacher, "control": control}, list(sizes), origin


def measure(data, sources, architecture, origin):
    """An architecture's line of nas.jsonl, but for its index."""
    seed, truth, images = origin["seed"], origin["truth"], origin["config"]["validation_images"]
    found = {name: train_briefly(source, data, images, architecture, seed) for name, source in sources.items()}
    trained = [train_fully(data, architecture, truth["steps"], seed, repeat) for repeat in range(truth["repeats"])]
    found["truth"] = [figures for figures, _ in trained], float(np.mean([seconds for _, seconds in trained]))
    accuracies, seconds = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    return architecture._asdict() | size(architecture, data.train.images.shape[1:]) | accuracies | {"seconds": seconds}


def measure_all(folder, data, sources, architectures, origin):
    """Append each architecture that is missing to nas.jsonl, in this process those whose index is rank modulo ranks."""
    rank, ranks = gtn.rank_and_world()
    mine, done = list(enumerate(architectures))[rank::ranks], read_done(folder, origin["truth"]["repeats"])
    missing = [(i, a) for i, a in mine if a not in done]
    for _, architecture in missing[:1]:  # the first use of everything is slow, and its seconds would count
        train_briefly(sources["teacher"], data, origin["config"]["validation_images"], architecture, origin["seed"])
    bar = tqdm(total=len(mine), initial=len(mine) - len(missing), desc=folder.name, unit="net", disable=rank > 0)
    with bar:
        for index, architecture in missing:
            gtn.append_log(folder / "nas.jsonl", {"index": index} | measure(data, sources, architecture, origin))
            bar.update()


def conclude(folder, architectures, origin):
    """Write nas.json, all measurements and what follows from them, and return it."""
    done = read_done(folder, origin["truth"]["repeats"])
    lines = [done[architecture] | {"index": i} for i, architecture in enumerate(architectures)]
    repeats, test = (np.array([[x[k] for x in line["truth"]] for line in lines]).T for k in ("validation", "test"))
    methods = {name: [x[name] for x in lines] for name in ("teacher", "control", "parameters", "multiply_adds")}
    seconds = {name: [x["seconds"][name] for x in lines] for name in ("teacher", "control", "truth")}
    seconds = {name: {"mean": float(np.mean(s)), "total": float(np.sum(s))} for name, s in seconds.items()}
    chosen = {"teacher": methods["teacher"], "control": methods["control"], "truth": repeats.mean(0)}
    test, best = test.mean(0).tolist(), {name: int(np.argmax(values)) for name, values in chosen.items()}
    best = {name: {"index": i, "test": test[i]} for name, i in best.items()}
    result = origin | {
        "architectures": lines,
        "correlations": correlations(methods, repeats, origin["seed"]),
        "seconds": seconds,
        "cost_ratio": seconds["truth"]["mean"] / seconds["teacher"]["mean"],
        "best": best | {"random": {"test": float(np.mean(test)), "std": float(np.std(test, ddof=1)), "n": len(test)}},
    }
    gtn.write_json(folder / "nas.json", result)
    return result


# ------------------------------------------------------------------------------------------ report


def table(title, *rows):
    """Print rows of strings as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def interval(figures):
    """An estimate as 'value [low, high]'."""
    value, low, high = ("-" if x is None else f"{x:.2f}" for x in figures.values())
    return "undefined" if value == "-" else f"{value} [{low}, {high}]"


def report(architectures, result):
    """Print what nas.json says: the architectures by the teacher's rank, correlations, cost, the best."""
    control, truth, names = result["control"], result["truth"], [describe(a) for a in architectures]
    rows = [
        (str(rank), names[x["index"]], f"{x['parameters']:,}", f"{x['multiply_adds']:,}", f"{x['teacher']:.4f}",
         f"{x['control']:.4f}", f"{np.mean([t['validation'] for t in x['truth']]):.4f}")
        for rank, x in enumerate(sorted(result["architectures"], key=lambda x: -x["teacher"]), 1)
    ]  # fmt: skip
    rows = rows if len(rows) <= 20 else [*rows[:10], ("...", *[""] * 6), *rows[-5:]]
    head = ("rank", "architecture", "parameters", "multiply-adds", "teacher", "control", "truth")
    table("validation accuracies, by the teacher's rank", head, *rows)
    print(f"  teacher and control: {result['config']['validation_images']} validation images at most, after "
          f"{result['config']['inner_steps']} steps")  # fmt: skip
    print(f"  truth: after {truth['steps']} steps, mean of {truth['repeats']}; {truth['recipe']}")
    if control["grid"]:
        print(f"  control: learning rate {control['lr']}, momentum {control['momentum']}, of the grid (accuracy)")
        grid = [f"{x['lr']},{x['momentum']}({x['validation']:.3f})" for x in control["grid"]]
        print(textwrap.indent(textwrap.fill("  ".join(grid), 96), "    "))
    rows = [
        (method if s == "all" else "", s, *(interval(figures[f][s]) for f in ("spearman", "kendall")),
         interval(figures["precision"]) if s == "all" else "")
        for method, figures in result["correlations"].items() for s in ("all", "top half")
    ]  # fmt: skip
    title = "rank correlation with truth [95 % bootstrap interval]; ceiling: one training with another"
    table(title, ("", "", "Spearman", "Kendall", "precision of the top 10 %"), *rows)
    seconds = ((name, f"{s['mean']:.3g}", f"{s['total']:.3g}") for name, s in result["seconds"].items())
    table(f"seconds (truth costs {result['cost_ratio']:.0f} times the teacher)", ("", "each", "total"), *seconds)
    *best, random = result["best"].items()
    rows = [(f"best by {name}", names[x["index"]], f"{x['test']:.4f}") for name, x in best]
    random = random[1]
    table("test accuracy after full training", *rows,
          ("random", f"mean of {random['n']}", f"{random['test']:.4f} +- {random['std']:.4f}"))  # fmt: skip


# ------------------------------------------------------------------------------------ command line


def parse_arguments(arguments):
    """The command line; InputError for what is not valid."""
    parser = gtn.argument_parser(prog="nas.py", description="Rank random architectures with a trained teacher.")
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="a teacher.pt")
    add("--architectures", type=int, default=64, metavar="N", help="how many to sample (default: 64)")
    add("--space", default="widths", metavar="NAME", help="widths (default): 2 conv blocks of 1-63 and 1-127 filters; "
        "wide: 1 to 4 of 4-128, kernels of 3 or 5, max or average pooling")  # fmt: skip
    add("--also", nargs="+", default=[], metavar="F,F", help="rank these too, by the filters of their conv blocks")
    add("--seed", type=int, default=0, metavar="N", help="fixes everything on a CPU (default: 0)")
    add("--real", metavar="TEACHER", help="teacher.pt of variant real for the control (default: a grid is searched)")
    add("--truth-steps", type=int, default=782, metavar="N", help="of full training (default: 782, 2 epochs of MNIST)")
    add("--repeats", type=int, default=2, metavar="R", help="full trainings of each architecture (default: 2)")
    add("--out", metavar="DIR", help="folder of the results (default: nas-SPACE-sSEED beside the teacher)")
    add("--resume", action="store_true", help="continue the search in its folder, if there is one")
    args = parser.parse_args(arguments)
    with contextlib.suppress(ValueError):  # else they stay words, which are no filters
        args.also = [tuple(int(n) for n in filters.split(",")) for filters in args.also]
    for name, (test, words) in {
        "architectures": (lambda n: 2 <= n < 2**31, "at least 2: one alone has no rank"),
        "space": (SPACES.__contains__, f"one of {', '.join(SPACES)}"),
        "also": (lambda also: all(map(gtn.are_filters, also)), "the filters of each conv block, such as 32,64,128"),
        "seed": gtn.SEED, "truth_steps": gtn.COUNT, "repeats": gtn.COUNT,
    }.items():  # fmt: skip
        if not test(value := getattr(args, name)):
            parser.error(f"--{name.replace('_', '-')} {value}: must be {words}")
    return args


def rank_0_first(function, rank):
    """function() on rank 0, then on the others, which end with exit status 2 where it did not succeed."""
    succeeded = torch.zeros(1)
    try:
        if rank == 0:
            result = function()
            succeeded += 1
            return result
    finally:
        if distributed.is_initialized():
            distributed.broadcast(succeeded, 0)
    return function() if succeeded else sys.exit(2)


def search(arguments, rank):
    """All of it, in this process of torchrun's or alone."""
    folder, *found, origin = rank_0_first(lambda: begin(parse_arguments(arguments), rank), rank)
    measure_all(folder, *found, origin)
    if distributed.is_initialized():
        distributed.barrier()
    if rank == 0:
        report(found[-1], conclude(folder, found[-1], origin))
        print(f"\nwritten to {folder / 'nas.json'}")


def main(arguments=None):
    """The command line; returns the exit status."""
    rank = 0
    try:
        gtn.keep_freed_memory()
        with gtn.ranks_joined() as rank:
            search(arguments, rank)
        return 0
    except InputError as error:
        print(f"nas.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            command = re.sub(r" --resume(?= |$)", "", shlex.join(["python", *sys.argv]))
            print(f"nas.py: interrupted; what is done is kept, continue with {command} --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

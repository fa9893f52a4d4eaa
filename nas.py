"""Neural architecture search with a trained teacher (Such et al., arXiv 1912.07768).

Ranks random architectures by the accuracy that each reaches after the few SGD steps of a teacher's curriculum, and
measures what the ranking is worth: its rank correlation with the truth, the accuracy after full training on real data.

    python nas.py runs/quick-learned-s0/teacher.pt --architectures 12 --truth-steps 100   # 2 minutes on two CPU cores
    python nas.py TEACHER.pt                            # 64 architectures, to nas-widths-s0 beside the teacher
    torchrun --nproc-per-node 2 nas.py TEACHER.pt       # the same result, architectures shared out among processes

  teacher     validation accuracy of a fresh learner after the T inner steps of the teacher's curriculum
  control     the same, from the same theta_0, on T real batches (one set for all architectures) at tuned rates
  parameters  of the learner; multiply_adds: of its network, for one image
  truth       validation accuracy after full training, the mean over `--repeats` seeds
  ceiling     one full training against another; the mean over the seeds has less noise, so a method may come out above

Everything is chosen on validation images; test accuracy is reported, and decides nothing.
"""

import contextlib
import hashlib
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import gtn

# ------------------------------------------------------------------------------------ search space

SPACES = {  # possible numbers of conv blocks; (low, high) of each block's filters; kernel sizes; poolings
    "widths": ((2,), ((1, 63), (1, 127)), (3,), ("max",)),
    "wide": ((1, 2, 3, 4), ((4, 128),) * 4, (3, 5), ("max", "average")),
}


def sample_architectures(space, count, normalization, image_shape, *key):
    """`count` distinct Architectures that fit images [C, H, W], fixed by the key; a longer list begins with them."""
    depths, ranges, kernels, poolings = SPACES[space]
    random, found = np.random.default_rng(key), {}  # a dict: distinct, in order
    for _ in range(20 * count):
        n = random.choice(depths)
        filters = tuple(int(random.integers(low, high + 1)) for low, high in ranges[:n])
        kernel_sizes, pooling = tuple(random.choice(kernels, n).tolist()), str(random.choice(poolings))
        architecture = gtn.Architecture(filters, kernel_sizes, pooling, normalization)
        with contextlib.suppress(gtn.InputError):  # too deep
            gtn.declared_parameters(architecture, image_shape)
            found[architecture] = None
        if len(found) == count:
            return list(found)
    raise gtn.InputError(f"--architectures {count}: more than --space {space} has for images of {[*image_shape]}")


def sizes(architecture, image_shape):
    """Number of parameters, and of multiply-adds for one image [C, H, W], as `gtn.network` has them."""
    parameters = sum(math.prod(shape) for _, shape in gtn.declared_parameters(architecture, image_shape))
    with FlopCounterMode(display=False) as counter, torch.device("meta"):  # computes nothing
        gtn.network(torch.empty(1, *image_shape), architecture, lambda _, *shape: torch.empty(shape))
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}


# -------------------------------------------------------------------- one architecture's measurements

BATCH, PEAK_LR, DECAY = 128, 0.02, 0.01
RECIPE = f"AdamW, one-cycle learning rate up to {PEAK_LR}, weight decay {DECAY}, batches of {BATCH}"


def train_briefly(source, architecture, data, images, seed):
    """Accuracy on the first `images` validation images after T inner steps; seed and architecture alone fix theta_0."""
    with gtn.seeded(seed, gtn.SHORT_TRAINING, *repr(architecture).encode()), torch.no_grad():
        theta = gtn.init_learner(architecture, data.train.images.shape[1:]).to(data.mean)
        curriculum = source(data) if callable(source) else source  # drawn for every learner
    *_, (theta, _) = gtn.unroll(theta, curriculum, architecture)
    split = gtn.Split(*(x[:images] for x in data.validation))
    return gtn.accuracy(theta, split, architecture, curriculum.images[-1])


def train_fully(architecture, data, steps, seed, repeat):
    """{"validation", "test"}: accuracies after RECIPE on real data in random order, new for every epoch."""
    with gtn.seeded(seed, gtn.FULL_TRAINING, repeat, *repr(architecture).encode()):
        theta = gtn.leaf(gtn.init_learner(architecture, data.train.images.shape[1:]).to(data.mean))
        epochs = math.ceil(steps * BATCH / len(data.train.labels))
        order = torch.cat([torch.randperm(len(data.train.labels), device=theta.device) for _ in range(epochs)])
    optimizer = torch.optim.AdamW([theta], PEAK_LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for index in order[: steps * BATCH].split(BATCH):
        images, labels = data.train.images[index], data.train.labels[index]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(gtn.logits(theta, images, architecture), labels).backward()
        optimizer.step()
        schedule.step()
    return {name: gtn.accuracy(theta, getattr(data, name), architecture, images) for name in ("validation", "test")}


def control_curriculum(config, data, seed, lr, momentum):
    """Real batches, as many and as large as the teacher's, which the seed alone fixes."""
    with gtn.seeded(seed, gtn.SHORT_TRAINING):
        batches = gtn.sample(data.train, config.inner_steps, config.batch_size)
    return gtn.Curriculum(*batches, *(data.mean.new_full((config.inner_steps,), x) for x in (lr, momentum)))


def tune_control(space, config, data, seed):
    """{"lr", "momentum", "grid"}: the best of a grid by the mean accuracy of 4 architectures of another stream."""
    shape, grid = data.train.images.shape[1:], []
    architectures = sample_architectures(space, 4, config.normalization, shape, seed, gtn.TUNING)
    for lr, momentum in tqdm([*itertools.product((0.003, 0.01, 0.03, 0.1, 0.3), (0.5, 0.9))], "control's grid"):
        control = control_curriculum(config, data, seed, lr, momentum)
        found = [train_briefly(control, a, data, config.validation_images, seed) for a in architectures]
        grid.append({"lr": lr, "momentum": momentum, "validation": float(np.mean(found))})
    return max(grid, key=lambda row: row["validation"]) | {"grid": grid}


def measure(architecture, data, sources, settings):
    """What nas.json says of an architecture; seconds of truth: for one training, with validation and test."""
    seed, truth, images = settings["seed"], settings["truth"], settings["config"]["validation_images"]
    line, times = architecture._asdict() | sizes(architecture, data.train.images.shape[1:]), [time.perf_counter()]
    for name, source in sources.items():
        line[name] = train_briefly(source, architecture, data, images, seed)
        times.append(time.perf_counter())
    line["truth"] = [train_fully(architecture, data, truth["steps"], seed, r) for r in range(truth["repeats"])]
    times.append(times[-1] + (time.perf_counter() - times[-1]) / truth["repeats"])  # of one training
    return line | {"seconds": dict(zip((*sources, "truth"), np.diff(times).tolist(), strict=True))}


# ------------------------------------------------------------------------------ statistics of ranks
#
# Of values x, y [n] under weights [R, n]: weight w makes an entry count as w equal ones. Weights of one give the value
# itself, multinomial counts bootstrap resamples. nan, undefined, where x or y is constant.


def spearman(x, y, weights):
    """Spearman's rank correlation [R]: Pearson's correlation of ranks, ties having their average rank."""
    a, b = (weights @ np.sign(z - z[:, None]) for z in (x, y))  # twice the distance from the mean rank
    return (weights * a * b).sum(1) / np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))


def kendall(x, y, weights):
    """Kendall's tau-b [R]: concordant minus discordant pairs, over the geometric mean of pairs untied in x and in y."""
    a, b = (np.sign(z - z[:, None]) for z in (x, y))  # [n, n]: which of a pair is above the other
    both, in_x, in_y = (((weights @ pairs) * weights).sum(1) for pairs in (a * b, a * a, b * b))
    return both / np.sqrt(in_x * in_y)


def estimate(statistic, pairs, weights):
    """The mean over pairs (x, y) with weights[0], and its 95 % interval with the others; None where it is undefined."""
    with np.errstate(invalid="ignore"):
        values = np.mean([statistic(x, y, weights) for x, y in pairs] or np.full((1, len(weights)), np.nan), axis=0)
    defined = [x for x in values[1:] if not math.isnan(x)]
    found = values[0], *(np.percentile(defined, [2.5, 97.5]) if defined else (np.nan, np.nan))
    return {n: None if math.isnan(x) else float(x) for n, x in zip(("value", "low", "high"), found, strict=True)}


def correlations(methods, repeats, seed, resamples=1000):
    """{method: {"spearman" and "kendall": {"all" and "top half" by truth: estimate}}}, also of the method "ceiling".

    methods: {name: values [n]}; repeats [R, n]: truth under each seed, whose mean is truth. All share their resamples.
    """
    truth, n = np.mean(repeats, axis=0), len(repeats[0])
    resampled = np.random.default_rng([seed, gtn.BOOTSTRAP]).multinomial(n, np.full(n, 1 / n), resamples)
    weights = np.concatenate([np.ones((1, n)), resampled])
    better, tied = weights @ (truth[:, None] > truth), weights @ (truth[:, None] == truth)
    share = np.clip(((n + 1) // 2 - better) / np.maximum(tied, 1e-9), 0, 1)  # ties at the border share the room
    subsets, statistics = {"all": weights, "top half": weights * share}, {"spearman": spearman, "kendall": kendall}
    compared = {name: [(np.array(values), truth)] for name, values in methods.items()}
    compared["ceiling"] = list(itertools.combinations(np.array(repeats), 2))
    return {
        name: {key: {s: estimate(f, pairs, w) for s, w in subsets.items()} for key, f in statistics.items()}
        for name, pairs in compared.items()
    }


def conclude(lines, settings):
    """The content of nas.json: settings, all measurements and what follows from them."""
    repeats, test = (np.array([[t[split] for t in x["truth"]] for x in lines]).T for split in ("validation", "test"))
    methods = {name: [x[name] for x in lines] for name in ("teacher", "control", "parameters", "multiply_adds")}
    test, seconds, best = test.mean(0), {}, {}
    for name in ("teacher", "control", "truth"):
        times, index = [x["seconds"][name] for x in lines], int(np.argmax(methods.get(name, repeats.mean(0))))
        seconds[name] = {"mean": float(np.mean(times)), "total": float(np.sum(times))}
        best[name] = {"index": index, "test": float(test[index])}
    best["random"] = {"test": float(test.mean()), "std": float(test.std(ddof=1)), "n": len(test)}
    found = {"architectures": lines, "correlations": correlations(methods, repeats, settings["seed"]), "best": best}
    return settings | found | {"seconds": seconds, "cost_ratio": seconds["truth"]["mean"] / seconds["teacher"]["mean"]}


def report(result):
    """Print nas.json: the architectures by the teacher's rank, correlations, cost, what each method would pick."""
    lines, best = result["architectures"], result["best"]
    names = [f"{[*x['filters']]} {[*x['kernels']]} {x['pooling']}" for x in lines]
    print(f"{'rank architecture':<48}parameters  multiply-adds  teacher  control    truth")
    for rank, i in enumerate(np.argsort([-x["teacher"] for x in lines], kind="stable"), 1):
        if rank <= 10 or rank > len(lines) - 5:
            x, truth = lines[i], np.mean([t["validation"] for t in lines[i]["truth"]])
            print(f"{rank:<5}{names[i]:<43}{x['parameters']:>10,}{x['multiply_adds']:>15,}", end="")
            print(f"{x['teacher']:>9.4f}{x['control']:>9.4f}{truth:>9.4f}")
    print("\nrank correlation with truth [95 % bootstrap interval], nan where it is undefined")
    for name, found in result["correlations"].items():
        for subset in ("all", "top half"):
            numbers = [x for f in ("spearman", "kendall") for x in found[f][subset].values()]
            words = "{:<15}{:<10}Spearman {:5.2f} [{:5.2f}, {:5.2f}]   Kendall {:5.2f} [{:5.2f}, {:5.2f}]"
            print(words.format(name, subset, *np.array(numbers, float)))
    print(f"\nseconds each (truth costs {result['cost_ratio']:.0f} times the teacher), test accuracy of its best")
    for name, x in result["seconds"].items():
        print(f"{name:<15}{x['mean']:<10.3g}{best[name]['test']:.4f} {names[best[name]['index']]}")
    print("{:<25}{test:.4f} +- {std:.4f}, n = {n}".format("random", **best["random"]))


# ------------------------------------------------------------------------------------------ search


def begin(folder, settings, resume, config, data):
    """(control, {Architecture: its line}) of the search in the folder, or of a new one.

    Raises InputError for the folder of another search, for this one's without resume, and for damaged files.
    """
    path, log, done = folder / "search.json", folder / "nas.jsonl", {}
    lines = gtn.read(log) if log.exists() else []
    if not lines and not path.exists():
        gtn.write(path, settings | {"control": tune_control(settings["space"], config, data, settings["seed"])})
    content = gtn.read(path)
    with gtn.reading(path):
        other = [name for name in ("seed", "space", "truth", "sha256") if content[name] != settings[name]]
        if not math.isfinite(content["control"]["lr"] * content["control"]["momentum"]):
            raise ValueError("a number is not finite")
    if other or (lines and not resume):
        what = f"a search with other {', '.join(other)}" if other else "this search: continue it with --resume"
        raise gtn.InputError(f"{folder} holds {what}, or choose another --out")
    with gtn.reading(log):
        for x in lines:
            numbers = [x[name] for name in ("parameters", "multiply_adds", "teacher", "control")]
            numbers += [x["seconds"][name] for name in ("teacher", "control", "truth")]
            numbers += [t[split] for t in x["truth"] for split in ("validation", "test")]
            finite = np.isfinite([*numbers, *x["filters"], *x["kernels"]]).all()
            if not finite or len(x["truth"]) != settings["truth"]["repeats"]:
                raise ValueError("a number is missing, or not finite")
            done[gtn.Architecture(tuple(x["filters"]), tuple(x["kernels"]), x["pooling"], x["normalization"])] = x
    gtn.write(log, lines)  # without a last line that was never finished
    return content["control"], done


def search(args, device):
    """All of it, alone or as one of torchrun's ranks; the folder gets search.json, nas.jsonl, at the end nas.json."""
    teacher, content = gtn.read_teacher(args.teacher, device)
    config, curriculum, space, seed = teacher.config, content["curriculum"], args.space, args.seed
    data = gtn.load_data(config.dataset, args.data, device)
    theirs, ours = torch.cat([content["mean"], content["std"]]).to(data.mean), torch.cat([data.mean, data.std])
    kind, shape = config.normalization, data.train.images.shape[1:]
    if curriculum.images.shape[2:] != shape or not torch.allclose(theirs, ours, rtol=0, atol=1e-3):
        raise gtn.InputError(f"{args.teacher} was trained on other images than this {config.dataset}: see --data")
    architectures = sample_architectures(space, args.architectures, kind, shape, seed, gtn.ARCHITECTURES)
    sha256 = hashlib.sha256(args.teacher.read_bytes()).hexdigest()
    settings = {"teacher": str(args.teacher), "sha256": sha256, "seed": seed, "space": space, "config": vars(config)}
    settings["truth"] = {"steps": args.truth_steps, "repeats": args.repeats, "recipe": RECIPE}
    settings["environment"] = gtn.environment(device)
    folder = args.out or args.teacher.with_name(f"nas-{space}-s{seed}")
    with gtn.locked(folder) if gtn.RANK == 0 else contextlib.nullcontext():
        begun = [begin(folder, settings, args.resume, config, data) if gtn.RANK == 0 else None]
        if gtn.WORLD > 1:
            torch.distributed.broadcast_object_list(begun)
        settings["control"], done = begun[0]
        control = control_curriculum(config, data, seed, settings["control"]["lr"], settings["control"]["momentum"])
        kept = teacher if config.variant in ("random", "real") else lambda _: curriculum.shuffled(config.order)
        sources = {"teacher": kept, "control": control}
        missing = [a for a in architectures if a not in done][gtn.RANK :: gtn.WORLD]
        for architecture in tqdm(missing, folder.name, unit="net", disable=gtn.RANK > 0):
            done[architecture] = measure(architecture, data, sources, settings)
            with open(folder / "nas.jsonl", "ab") as file:  # one write a line: ranks share the file
                file.write((json.dumps(done[architecture], allow_nan=False) + "\n").encode())
        shares = [done] * gtn.WORLD
        if gtn.WORLD > 1:
            torch.distributed.all_gather_object(shares, done)
        done = dict(pair for share in shares for pair in share.items())
        if gtn.RANK == 0:
            result = conclude([done[a] for a in architectures], settings)
            gtn.write(folder / "nas.json", result)
            report(result)
            print(f"\nwritten to {folder / 'nas.json'}")


def main(arguments=None):
    """The command line of nas.py."""
    parser = gtn.argument_parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("teacher", type=Path, metavar="TEACHER.pt", help="of a run of gtn.py")
    add("--architectures", type=int, default=64, help="how many to sample (default: 64)")
    add("--space", default="widths", choices=SPACES, help="widths (default) or wide: see SPACES in nas.py")
    add("--seed", type=int, default=0, help="fixes everything on a CPU (default: 0)")
    add("--truth-steps", type=int, default=782, help="of full training (default: 782, 2 epochs of MNIST)")
    add("--repeats", type=int, default=2, help="full trainings of each architecture (default: 2)")
    add("--out", type=Path, metavar="DIR", help="folder of the results (default: nas-SPACE-sSEED beside the teacher)")
    add("--resume", action="store_true", help="continue the search in its folder, if there is one")
    args = parser.parse_args(arguments)
    for name, least in {"architectures": 2, "seed": 0, "truth_steps": 1, "repeats": 1}.items():
        if not least <= getattr(args, name) <= 10**6:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from {least} to 1,000,000")
    search(args, gtn.choose_device(args.device))


if __name__ == "__main__":
    sys.exit(gtn.run("nas.py", main, sys.argv[1:]))

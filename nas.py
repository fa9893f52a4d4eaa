"""Neural architecture search with a trained teacher (Such et al., arXiv 1912.07768).

Ranks random architectures by the accuracy that each reaches after the few SGD steps of a teacher's curriculum, and
measures what the ranking is worth: its rank correlation with the truth, beside what costs less.

    python nas.py TEACHER.pt --architectures 16         # of the space that the teacher was trained on
    python nas.py TEACHER.pt --resume                   # 64 architectures, those 16 among them
    torchrun --nproc-per-node 2 nas.py TEACHER.pt       # the same result, architectures shared out among processes

  teacher     validation accuracy of fresh learners after three passes over the teacher's curriculum of T inner steps
  control     the same, from the same theta_0, on 3 T real batches (one set for all architectures) at tuned rates
  parameters  of the learner; multiply_adds: of its network, for one image
  truth       validation accuracy after full training, the mean over `--repeats` seeds
  ceiling     one full training against another; corrected: what a method without noise would reach against their mean

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

try:
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from tqdm import tqdm

    import gtn
except KeyboardInterrupt:
    sys.exit(130)  # see gtn.py

# ------------------------------------------------------------------------------------ search space

SIZES = "parameters", "multiply_adds"


def sizes(architecture, image_shape):
    """Number of parameters, and of multiply-adds for one image [C, H, W], as `gtn.network` has them."""
    parameters = sum(math.prod(shape) for _, shape in gtn.declared_parameters(architecture, image_shape))
    with FlopCounterMode(display=False) as counter, torch.device("meta"):  # computes nothing
        gtn.network(torch.empty(1, *image_shape), architecture, lambda _, *shape: torch.empty(shape))
    return dict(zip(SIZES, (parameters, counter.get_total_flops() // 2), strict=True))


def sample_architectures(config, band, count, image_shape, *key):
    """`count` distinct Architectures of a config's space, with multiply-adds within the band, fixed by the key.

    A longer list begins with them. Raises InputError where there are not so many.
    """
    found = {}  # a dict: distinct, in order
    with gtn.seeded(*key):
        for _ in range(50 * count):
            architecture = gtn.sample_architecture(config)
            if architecture not in found and band[0] <= sizes(architecture, image_shape)["multiply_adds"] <= band[1]:
                found[architecture] = None
            if len(found) == count:
                return list(found)
    within = f"of {band[0]:,} to {band[1]:,} multiply-adds, of which {len(found)} were found"
    raise gtn.InputError(f"--architectures {count}: more than the space of {config.name} has {within}")


# -------------------------------------------------------------------- one architecture's measurements

BATCH, PEAK_LR, DECAY = 64, 0.02, 0.01
RECIPE = f"AdamW, one-cycle learning rate up to {PEAK_LR}, weight decay {DECAY}, batches of {BATCH}"
PASSES, LEARNERS, RATES = 3, 2, (1, 2)  # of a score, the mean over learners at multiples of the learning rates


def train_briefly(source, architecture, data, settings, rate=1, k=0):
    """Validation accuracy of learner k after PASSES x T inner steps; its randomness: seed, k and architecture alone."""
    with gtn.seeded(settings["seed"], gtn.SHORT_TRAINING, k, *repr(architecture).encode()), torch.no_grad():
        theta = gtn.init_learner(architecture, data.train.images.shape[1:]).to(data.mean)
        curriculum = source
        if callable(source):  # a teacher, which may draw images or an order anew for every pass
            passes = [source(data) for _ in range(PASSES)]
            curriculum = gtn.Curriculum(*map(torch.cat, zip(*passes, strict=True)))
    *_, (theta, _) = gtn.unroll(theta, curriculum._replace(lr=rate * curriculum.lr), architecture)
    split = gtn.Split(*(x[: settings["config"]["validation_images"]] for x in data.validation))
    return gtn.accuracy(theta, split, architecture, curriculum.images[-1])


def score(source, architecture, data, settings):
    """Mean accuracy of LEARNERS at each of RATES: that an architecture trains at both says more than the better one."""
    pairs = itertools.product(RATES, range(LEARNERS))
    return float(np.mean([train_briefly(source, architecture, data, settings, rate, k) for rate, k in pairs]))


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
    """Real batches, as large as the teacher's, for as many steps, all different; the seed alone fixes them."""
    steps = PASSES * config.inner_steps
    with gtn.seeded(seed, gtn.SHORT_TRAINING):
        batches = gtn.sample(data.train, steps, config.batch_size)
    return gtn.Curriculum(*batches, *(data.mean.new_full((steps,), x) for x in (lr, momentum)))


def tune_control(space, config, data, settings):
    """{"lr", "momentum", "grid", "seconds"}: the best of a grid by the mean accuracy of 4 other architectures."""
    started, shape, grid = time.perf_counter(), data.train.images.shape[1:], []
    architectures = sample_architectures(space, settings["band"], 4, shape, settings["seed"], gtn.TUNING)
    for lr, momentum in tqdm([*itertools.product((0.003, 0.01, 0.03, 0.1, 0.3), (0.5, 0.9))], "control's grid"):
        control = control_curriculum(config, data, settings["seed"], lr, momentum)
        found = [train_briefly(control, architecture, data, settings) for architecture in architectures]
        grid.append({"lr": lr, "momentum": momentum, "validation": float(np.mean(found))})
    best = max(grid, key=lambda row: row["validation"])
    return best | {"grid": grid, "seconds": time.perf_counter() - started}


def measure(architecture, data, sources, settings):
    """What nas.json says of an architecture; seconds of truth: for one training, with validation and test."""
    truth, line = settings["truth"], architecture._asdict() | sizes(architecture, data.train.images.shape[1:])
    times = [time.perf_counter()]
    for name, source in sources.items():
        line[name] = score(source, architecture, data, settings)
        times.append(time.perf_counter())
    line["truth"] = [
        train_fully(architecture, data, truth["steps"], settings["seed"], r) for r in range(truth["repeats"])
    ]
    times.append(times[-1] + (time.perf_counter() - times[-1]) / truth["repeats"])  # of one training
    return line | {"seconds": dict(zip((*sources, "truth"), np.diff(times).tolist(), strict=True))}


# ------------------------------------------------------------------------------ statistics of ranks
#
# Of values x, y [n] under weights [R, n]: weight w makes an entry count as w equal ones. Weights of one give the value
# itself, multinomial counts bootstrap resamples. nan, undefined, where x or y is constant, or what is given decides it.


def spearman(x, y, weights, given=()):
    """Spearman's rank correlation [R], Pearson's of ranks, ties having their average rank; partial, where values
    `given` are held fixed: of what is left of the ranks after linear regression on the ranks of those."""
    ranks = np.stack([weights @ np.sign(z - z[:, None]) for z in (x, y, *given)], 1)  # twice the distance from the mean
    covariance = np.einsum("rin,rjn,rn->rij", ranks, ranks, weights)
    a, b = covariance[:, :2, 2:], np.linalg.pinv(covariance[:, 2:, 2:], hermitian=True)
    rest = covariance[:, :2, :2] - a @ b @ a.transpose(0, 2, 1)
    variance = np.diagonal(rest, axis1=1, axis2=2)
    variance = np.where(variance > 1e-9 * np.diagonal(covariance[:, :2, :2], axis1=1, axis2=2), variance, np.nan)
    return rest[:, 0, 1] / np.sqrt(variance.prod(1))


def kendall(x, y, weights):
    """Kendall's tau-b [R]: concordant minus discordant pairs, over the geometric mean of pairs untied in x and in y."""
    a, b = (np.sign(z - z[:, None]) for z in (x, y))  # [n, n]: which of a pair is above the other
    both, in_x, in_y = (((weights @ pairs) * weights).sum(1) for pairs in (a * b, a * a, b * b))
    return both / np.sqrt(in_x * in_y)


def estimate(values):
    """{"value", "low", "high"} of values [1 + R]: the first, and the 95 % interval of the others; None: undefined."""
    defined = values[1:][~np.isnan(values[1:])]
    found = values[0], *(np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan))
    return {n: None if math.isnan(x) else float(x) for n, x in zip(("value", "low", "high"), found, strict=True)}


def correlations(methods, repeats, seed, resamples=1000):
    """{method: {statistic: {"all" and "top half" by truth: estimate, with that of "teacher minus this"}}}.

    methods: {name: values [n]}; repeats [R, n]: truth under each seed, whose mean is truth. Statistics: spearman,
    kendall, and partial: spearman given both sizes. All share their resamples, and so the differences are paired.
    """
    truth, n = np.mean(repeats, axis=0), len(repeats[0])
    resampled = np.random.default_rng([seed, gtn.BOOTSTRAP]).multinomial(n, np.full(n, 1 / n), resamples)
    weights = np.concatenate([np.ones((1, n)), resampled])
    better, tied = weights @ (truth[:, None] > truth), weights @ (truth[:, None] == truth)
    share = np.clip(((n + 1) // 2 - better) / np.maximum(tied, 1e-9), 0, 1)  # ties at the border share the room
    subsets, methods = {"all": weights, "top half": weights * share}, {name: np.array(x) for name, x in methods.items()}
    given, values, found = [methods[name] for name in SIZES], {}, {}
    statistics = {"spearman": spearman, "kendall": kendall, "partial": lambda *a: spearman(*a, given)}
    for (key, f), (subset, w) in itertools.product(statistics.items(), subsets.items()):
        with np.errstate(invalid="ignore", divide="ignore"):
            for name, x in methods.items():
                values[name, key, subset] = f(x, truth, w)
            pairs = [f(x, y, w) for x, y in itertools.combinations(np.array(repeats), 2)]
            values["ceiling", key, subset] = one = np.mean(pairs or np.full((1, len(w)), np.nan), 0)
            # Spearman and Brown's reliability of a mean; its root is the correlation with it. Not of Kendall's
            reliability = len(repeats) * one / (1 + (len(repeats) - 1) * one)
            values["corrected", key, subset] = np.sqrt(reliability) if key != "kendall" else np.nan * one
    for (name, key, subset), x in values.items():
        difference = estimate(values["teacher", key, subset] - x)
        found.setdefault(name, {}).setdefault(key, {})[subset] = estimate(x) | {"teacher minus this": difference}
    return found


def conclude(lines, settings):
    """The content of nas.json: settings, all measurements and what follows from them."""
    repeats, test = (np.array([[t[split] for t in x["truth"]] for x in lines]).T for split in ("validation", "test"))
    methods = {name: [x[name] for x in lines] for name in ("teacher", "control", *SIZES)}
    test, seconds, best = test.mean(0), {}, {}
    for name, values in (methods | {"truth": repeats.mean(0)}).items():
        best[name] = {"index": (index := int(np.argmax(values))), "test": float(test[index])}
    for name in ("teacher", "control", "truth"):
        seconds[name] = {
            "mean": (mean := float(np.mean([x["seconds"][name] for x in lines]))),
            "total": mean * len(lines),
        }
    best["random"] = {
        "mean": float(test.mean()),
        "std": float(test.std(ddof=1)),
        "best": float(test.max()),
        "n": len(test),
    }
    preparation = {"teacher": settings["teacher_seconds"], "control": settings["control"]["seconds"]}
    for name, once in preparation.items():
        if once is not None:  # an old teacher.pt does not know how long it was trained
            saved = seconds["truth"]["mean"] - seconds[name]["mean"]
            seconds[name] |= {"once": once, "shared": seconds[name]["mean"] + once / len(lines)}
            seconds[name]["pays from"] = math.ceil(once / saved) if saved > 0 else None
    found = {"architectures": lines, "correlations": correlations(methods, repeats, settings["seed"]), "best": best}
    return settings | found | {"seconds": seconds}


def interval(estimate):
    """An estimate in words: '0.69 [0.48, 0.84]', or '-' where it is undefined."""
    numbers = [estimate[key] for key in ("value", "low", "high")]
    return "-" if None in numbers else "{:.2f} [{:.2f}, {:.2f}]".format(*numbers)


def report(result):
    """Print nas.json: the architectures by the teacher's rank, what each method's ranking is worth and costs."""
    lines, best, seconds = result["architectures"], result["best"], result["seconds"]
    print(f"{'rank architecture':<48}parameters  multiply-adds  teacher  control    truth")
    for rank, i in enumerate(np.argsort([-x["teacher"] for x in lines], kind="stable"), 1):
        if rank <= 10 or rank > len(lines) - 5:
            x, truth = lines[i], np.mean([t["validation"] for t in lines[i]["truth"]])
            name = f"{[*x['filters']]} {[*x['kernels']]} {x['pooling']}"
            print(f"{rank:<5}{name:<43}{x['parameters']:>10,}{x['multiply_adds']:>15,}", end="")
            print(f"{x['teacher']:>9.4f}{x['control']:>9.4f}{truth:>9.4f}")
    print("\nSpearman's correlation with the truth [95 % bootstrap interval]; seconds each; test accuracy of the best")
    row = "{:<15}{:<21}{:<21}{:<21}{:<22}{:<9}{}".format
    print(row("ranked by", "all", "better half", "given both sizes", "teacher minus it", "seconds", "test"))
    for name, found in result["correlations"].items():
        cells = found["spearman"]["all"], found["spearman"]["top half"], found["partial"]["all"]
        key = {"ceiling": "truth"}.get(name, name)
        cost, pick = seconds.get(key, {}).get("mean"), best.get(key, {}).get("test")
        words = [*map(interval, cells), interval(cells[0]["teacher minus this"]) if name != "teacher" else ""]
        print(row(name, *words, f"{cost:.3g}" if cost else "", f"{pick:.4f}" if pick else ""))
    print("{:<109}{mean:.4f} +- {std:.4f}, best {best:.4f} of {n}".format("random pick", **best["random"]))
    if "once" in seconds["teacher"]:
        once, shared, least = (seconds["teacher"][key] for key in ("once", "shared", "pays from"))
        pays = f"cheaper than the truth from {least} architectures on" if least else "dearer than the truth"
        print(f"training the teacher took {once:.0f} s, its share makes it {shared:.3g} s each: {pays}")


# ------------------------------------------------------------------------------------------ search


def architecture_of(x):
    """The Architecture of a line of nas.jsonl."""
    return gtn.Architecture(
        tuple(x["filters"]), tuple(x["kernels"]), *(x[name] for name in gtn.Architecture._fields[2:])
    )


def begin(folder, settings, resume, space, config, data):
    """(control, {Architecture: its line}) of the search in the folder, or of a new one.

    Raises InputError for the folder of another search, for this one's without resume, and for damaged files.
    """
    path, log, done = folder / "search.json", folder / "nas.jsonl", {}
    lines = gtn.read(log) if log.exists() else []
    if not lines and not path.exists():
        gtn.write(path, settings | {"control": tune_control(space, config, data, settings)})
    content = gtn.read(path)
    with gtn.reading(path):
        other = [key for key in ("seed", "space", "band", "score", "truth", "sha256") if content[key] != settings[key]]
        if not math.isfinite(math.prod(content["control"][key] for key in ("lr", "momentum", "seconds"))):
            raise ValueError("a number is not finite")
    if other or (lines and not resume):
        what = f"a search with other {', '.join(other)}:" if other else "this search: continue it with --resume, or"
        raise gtn.InputError(f"{folder} holds {what} choose another --out")
    with gtn.reading(log):
        for x in lines:
            numbers = [x[name] for name in ("teacher", "control", *SIZES)]
            numbers += [x["seconds"][name] for name in ("teacher", "control", "truth")]
            numbers += [t[split] for t in x["truth"] for split in ("validation", "test")]
            finite = np.isfinite([*numbers, *x["filters"], *x["kernels"]]).all()
            if not finite or len(x["truth"]) != settings["truth"]["repeats"]:
                raise ValueError("a number is missing, or not finite")
            done[architecture_of(x)] = x
    gtn.write(log, lines)  # without a last line that was never finished
    return content["control"], done


def search(args, device):
    """All of it, alone or as one of torchrun's ranks; the folder gets search.json, nas.jsonl, at the end nas.json."""
    data = gtn.load_data(gtn.read_teacher(args.teacher)[0].config.dataset, args.data, device)
    teacher, content = gtn.read_teacher(args.teacher, device, data)
    config, curriculum, seed = teacher.config, content["curriculum"], args.seed
    space, shape = gtn.make_config(args.space) if args.space else config, data.train.images.shape[1:]
    architectures = sample_architectures(space, args.multiply_adds, args.architectures, shape, seed, gtn.ARCHITECTURES)
    settings = {"teacher": str(args.teacher), "sha256": hashlib.sha256(args.teacher.read_bytes()).hexdigest()}
    settings |= {"teacher_seconds": content.get("seconds"), "config": vars(config), "seed": seed}
    fields = "name", "filters", "least_blocks", "kernels", "pooling", "normalization", "hidden_units"
    settings |= {"space": {key: getattr(space, key) for key in fields}, "band": args.multiply_adds}
    settings |= {"score": {"passes": PASSES, "learners": LEARNERS, "rates": RATES}}
    settings |= {"truth": {"steps": args.truth_steps, "repeats": args.repeats, "recipe": RECIPE}}
    settings |= {"environment": gtn.environment(device)}
    settings = json.loads(json.dumps(settings))  # as it is read again
    folder = args.out or args.teacher.with_name(f"nas-{space.name}-s{seed}")
    with gtn.locked(folder) if gtn.RANK == 0 else contextlib.nullcontext():
        begun = [begin(folder, settings, args.resume, space, config, data) if gtn.RANK == 0 else None]
        if gtn.WORLD > 1:
            torch.distributed.broadcast_object_list(begun)
        settings["control"], done = begun[0]
        control = control_curriculum(config, data, seed, settings["control"]["lr"], settings["control"]["momentum"])
        kept = teacher if config.variant in ("random", "real") else lambda _: curriculum.shuffled(config.order)
        sources, missing = {"teacher": kept, "control": control}, [a for a in architectures if a not in done]
        for architecture in tqdm(missing[gtn.RANK :: gtn.WORLD], folder.name, unit="net", disable=gtn.RANK > 0):
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
    add("--space", metavar="CONFIG", help="sample as this entry of configs.json does (default: as the teacher did)")
    band = {"type": int, "nargs": 2, "default": [0, 10**12], "metavar": ("LOW", "HIGH")}
    add("--multiply-adds", **band, help="keep architectures within this band, for one image")
    add("--seed", type=int, default=0, help="fixes everything on a CPU (default: 0)")
    add("--truth-steps", type=int, default=800, help=f"of full training, of {BATCH} images each (default: 800)")
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

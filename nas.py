"""Neural architecture search with trained teachers (Such et al., arXiv 1912.07768).

Ranks random architectures by the accuracy that each reaches after the few SGD steps of a
teacher's curriculum, by the best of several teachers, and measures what the ranking is worth.

    python nas.py TEACHER.pt --architectures 16    # of the space that the teacher was trained on
    python nas.py TEACHER.pt --resume              # 64 architectures, those 16 among them
    python nas.py TEACHER.pt OTHER.pt --space search
    torchrun --nproc-per-node 2 nas.py TEACHER.pt  # the same result by two processes

  teacher      validation accuracy after three passes over a teacher's curriculum of T steps:
               the mean of two learners, each at once and twice the learning rates
  control      the same, from the same theta_0, on 3 T real batches with tuned rates
  control_all  the same, on as many real batches as all teachers have together
  truth        validation accuracy after full training, the mean over `--repeats` seeds

The ranking by the teacher is printed before full training. Test accuracy is reported, and never
chooses an architecture.
"""

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

# ---- search space ----

SIZES = "parameters", "multiply_adds"


def sizes(architecture, image_shape):
    """Numbers of parameters, and of multiply-adds for one image [C, H, W]."""
    learner = gtn.blueprint(architecture, image_shape)
    with FlopCounterMode(display=False) as counter:  # the meta device computes nothing
        learner(torch.empty(1, *image_shape, device="meta"))
    parameters = sum(p.numel() for p in learner.parameters())
    return dict(zip(SIZES, (parameters, counter.get_total_flops() // 2), strict=True))


def sample_architectures(space, classes, count, *key):
    """`count` distinct Architectures of the space of a Config.

    The key fixes them, and a longer list begins with a shorter one. Raises InputError if there
    are not so many.
    """
    sampled = {}  # a dict: distinct, in order
    repeated = 0
    with gtn.seeded(*key):
        while len(sampled) < count and repeated < 10_000:
            architecture = gtn.sample_architecture(space, classes)
            repeated = repeated + 1 if architecture in sampled else 0
            sampled[architecture] = None
    if len(sampled) < count:
        has = f"the space of {space.name} has {len(sampled)}, see --space"
        raise gtn.InputError(f"--architectures {count}: {has}")
    return [*sampled]


# ---- measurements of one architecture ----

BATCH = 64
PEAK_LR = 0.02
DECAY = 0.01
RECIPE = f"AdamW, one-cycle learning rate up to {PEAK_LR}, weight decay {DECAY}, batches of {BATCH}"
PASSES = 3  # over a curriculum
LEARNERS = 2  # for each of the rates; the score is the mean of all
RATES = (1, 2)  # factors of the learning rates
TUNED = 8  # architectures, on which a control's rates are tuned


def train_briefly(source, architecture, data, settings, rate=1, k=0):
    """Validation accuracy of learner k after its inner steps, fixed by seed and arguments.

    source: a function of data that returns a Curriculum. theta_0 is the same for all rates.
    """
    key = settings["seed"], gtn.SHORT_TRAINING, k, *repr(architecture).encode()
    with gtn.seeded(*key), torch.no_grad():
        theta = gtn.init_learner(architecture, data.train.images.shape[1:]).to(data.mean)
        curriculum = source(data)
    faster = curriculum._replace(lr=rate * curriculum.lr)
    *_, (theta, _) = gtn.unroll(theta, faster, architecture)
    split = gtn.first(data.validation, settings["config"]["validation_images"])
    return gtn.accuracy(theta, split, architecture)


def score(source, architecture, data, settings):
    """Mean accuracy of LEARNERS at each of RATES, which says more than the better of the two."""
    pairs = itertools.product(RATES, range(LEARNERS))
    return float(np.mean([train_briefly(source, architecture, data, settings, *x) for x in pairs]))


def train_fully(architecture, data, steps, seed, repeat):
    """{"validation", "test"}: accuracies after RECIPE, every epoch in a random order of its own."""
    size = len(data.train.labels)
    epochs = math.ceil(steps * BATCH / size)
    with gtn.seeded(seed, gtn.FULL_TRAINING, repeat, *repr(architecture).encode()):
        theta = gtn.init_learner(architecture, data.train.images.shape[1:]).to(data.mean)
        orders = [torch.randperm(size, device=theta.device) for _ in range(epochs)]
    theta = gtn.leaf(theta)
    optimizer = torch.optim.AdamW([theta], PEAK_LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for index in torch.cat(orders)[: steps * BATCH].split(BATCH):
        outputs = gtn.logits(theta, data.train.images[index], architecture)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(outputs, data.train.labels[index]).backward()
        optimizer.step()
        schedule.step()
    splits = {"validation": data.validation, "test": data.test}
    return {name: gtn.accuracy(theta, split, architecture) for name, split in splits.items()}


def teacher_source(teacher, content):
    """PASSES over the curriculum, a function of data; `random` and `real` draw it anew for each."""

    def source(data):
        passes = []
        for _ in range(PASSES):
            drawn = teacher.config.variant in ("random", "real")
            curriculum = teacher(data) if drawn else content["curriculum"]
            passes.append(curriculum.shuffled(teacher.config.order))
        return gtn.Curriculum(*map(torch.cat, zip(*passes, strict=True)))

    return source


def control_source(config, seed, steps, lr, momentum):
    """Real batches, as large as the teacher's, a function of data; the seed alone fixes them."""

    def source(data):
        with gtn.seeded(seed, gtn.SHORT_TRAINING):
            batches = gtn.sample(data.train, steps, config.batch_size)
        rates = [data.mean.new_full((steps,), x) for x in (lr, momentum)]
        return gtn.Curriculum(*batches, *rates)

    return source


def control_sources(settings, config):
    """{control: [its source]} of a search.json."""
    sources = {}
    for name, control in settings["controls"].items():
        numbers = [control[key] for key in ("steps", "lr", "momentum")]
        sources[name] = [control_source(config, settings["seed"], *numbers)]
    return sources


def tune_control(space, config, data, settings, steps):
    """{"steps", "lr", "momentum", ...}: the best of a grid, on other architectures.

    By one learner of each at these very rates: a quarter of a score's time.
    """
    started = time.perf_counter()
    seed = settings["seed"]
    with gtn.seeded(seed, gtn.TUNING):
        others = [gtn.sample_architecture(space, data.classes) for _ in range(TUNED)]
    grid = []
    pairs = [*itertools.product((0.003, 0.01, 0.03, 0.1, 0.3), (0.5, 0.9))]
    for lr, momentum in tqdm(pairs, "control's grid", disable=None):
        source = control_source(config, seed, steps, lr, momentum)
        accuracies = [train_briefly(source, other, data, settings) for other in others]
        grid.append({"lr": lr, "momentum": momentum, "validation": float(np.mean(accuracies))})
    best = max(grid, key=lambda row: row["validation"])
    return best | {"steps": steps, "grid": grid, "seconds": time.perf_counter() - started}


def add_scores(line, data, sources, settings):
    """The line of nas.jsonl of an architecture, with its sizes and what it learns briefly.

    sources: {method: [source, ...]}, of which the best score counts.
    """
    architecture = architecture_of(line)
    line = line | sizes(architecture, data.train.images.shape[1:])
    seconds = {"truth": 0}  # until `add_truth`
    for name, several in sources.items():
        started = time.perf_counter()
        line[f"{name} scores"] = [score(x, architecture, data, settings) for x in several]
        line[name] = max(line[f"{name} scores"])
        seconds[name] = time.perf_counter() - started
    return line | {"seconds": seconds}


def add_truth(line, data, settings):
    """The same line with its accuracies after full training, and the seconds of one training."""
    repeats = settings["truth"]["repeats"]
    arguments = architecture_of(line), data, settings["truth"]["steps"], settings["seed"]
    started = time.perf_counter()
    truth = [train_fully(*arguments, repeat) for repeat in range(repeats)]
    seconds = (time.perf_counter() - started) / repeats
    return line | {"truth": truth, "seconds": line["seconds"] | {"truth": seconds}}


# ---- statistics of ranks ----

RESAMPLES = 1000  # of the bootstrap
ENOUGH = 8  # architectures for an interval
SHORTLIST = 5  # the first of a ranking, of which full training would take the best


def ranks(x):
    """Ranks of values [n], from 1 to n; equal values share the mean of theirs."""
    x = np.asarray(x)
    below = (x[:, None] > x).sum(1)
    equal = (x[:, None] == x).sum(1)
    return below + (equal + 1) / 2


def spearman(x, y, given=()):
    """Spearman's rank correlation of values x and y [n]: Pearson's of their ranks.

    Partial, if others are given: of what a linear regression on their ranks leaves. nan if nothing
    varies.
    """
    design = np.stack([np.ones(len(x)), *map(ranks, given)], 1)
    projection = design @ np.linalg.pinv(design)
    a = ranks(x) - projection @ ranks(x)
    b = ranks(y) - projection @ ranks(y)
    variances = (a @ a) * (b @ b)
    return a @ b / math.sqrt(variances) if variances > 1e-9 else math.nan


def best_half(values):
    """Indices of the better half of values [n]."""
    return np.argsort(-values, kind="stable")[: (len(values) + 1) // 2]


def spearman_of_best(x, y):
    """Spearman's correlation within the better half by x, as the paper reports it."""
    index = best_half(x)
    return spearman(x[index], y[index])


def statistics(methods, repeats):
    """{(method, statistic, subset): value}; half by truth, half by score: the better halves.

    methods: {name: values [n]}; repeats [R, n]: full training under each seed.
    """
    truth = repeats.mean(0)
    half = best_half(truth)
    given = [methods[name] for name in SIZES]
    tests = {
        ("spearman", "all"): spearman,
        ("spearman", "half by truth"): lambda x, y: spearman(x[half], y[half]),
        ("spearman", "half by score"): spearman_of_best,
        ("partial", "all"): lambda x, y: spearman(x, y, given),
    }
    values = {}
    for test, correlation in tests.items():
        for name, x in methods.items():
            values[name, *test] = correlation(x, truth)
        pairs = itertools.permutations(repeats, 2)  # the first of a pair may choose the half
        agreements = [correlation(x, y) for x, y in pairs]
        values["ceiling", *test] = np.mean(agreements or math.nan)
    return values


def estimate(values):
    """{"value", "low", "high"}: the first value, and the 95 % interval of the others, or None."""
    value, *resampled = values
    defined = [x for x in resampled if not math.isnan(x)]
    low, high = np.percentile(defined, [2.5, 97.5]) if defined else (math.nan, math.nan)
    numbers = {"value": value, "low": low, "high": high}
    return {key: None if math.isnan(x) else float(x) for key, x in numbers.items()}


def correlations(methods, repeats, seed):
    """{method: {statistic: {subset: estimate, with that of "teacher minus this"}}}.

    By a bootstrap over architectures, whose resamples all methods share: differences are paired.
    """
    methods = {name: np.array(x) for name, x in methods.items()}
    repeats = np.array(repeats)
    n = repeats.shape[1]
    generator = np.random.default_rng([seed, gtn.BOOTSTRAP])
    counts = generator.multinomial(n, np.full(n, 1 / n), RESAMPLES if n >= ENOUGH else 0)
    samples = []
    for count in [np.ones(n, int), *counts]:  # the first is the sample itself
        index = np.arange(n).repeat(count)
        sample = {name: x[index] for name, x in methods.items()}
        samples.append(statistics(sample, repeats[:, index]))
    result = {}
    for name, statistic, subset in samples[0]:
        values = [sample[name, statistic, subset] for sample in samples]
        teacher = [sample["teacher", statistic, subset] for sample in samples]
        row = estimate(values) | {"teacher minus this": estimate(np.subtract(teacher, values))}
        result.setdefault(name, {}).setdefault(statistic, {})[subset] = row
    return result


# ---- results ----


def expected_best(truth, test):
    """Expected test accuracy of the best by truth among SHORTLIST random architectures."""
    k = min(SHORTLIST, len(test))
    # the i-th best is it if the k - 1 others all come after it
    draws = [math.comb(len(test) - 1 - i, k - 1) for i in range(len(test))]
    return np.average(test[np.argsort(-truth, kind="stable")], weights=draws)


def conclude(lines, settings):
    """The content of nas.json: settings, measurements and what follows from them."""
    validation = np.array([[repeat["validation"] for repeat in x["truth"]] for x in lines]).T
    test = np.array([[repeat["test"] for repeat in x["truth"]] for x in lines]).mean(1)
    names = "teacher", *settings["controls"], *SIZES
    methods = {name: [x[name] for x in lines] for name in names}
    truth = validation.mean(0)
    best = {}
    for name, values in (methods | {"truth": truth}).items():
        order = np.argsort(-np.array(values), kind="stable")
        picked = max(order[:SHORTLIST], key=lambda i: truth[i])
        best[name] = {"index": int(order[0]), "test": test[order[0]], "shortlist": test[picked]}
    picks = gtn.summary(test.tolist())
    best["random"] = {key: picks[key] for key in ("mean", "std", "n")}
    best["random"] |= {"shortlist": expected_best(truth, test), "best": max(test.tolist())}
    return settings | {
        "architectures": lines,
        "correlations": correlations(methods, validation, settings["seed"]),
        "best": best,
        "seconds": costs(lines, settings),
    }


def costs(lines, settings):
    """Seconds of each method for an architecture, and with its preparation shared out."""
    preparation = {"teacher": settings["teacher_seconds"], "truth": 0}
    preparation |= {name: control["seconds"] for name, control in settings["controls"].items()}
    seconds = {}
    for name, once in preparation.items():
        mean = float(np.mean([x["seconds"][name] for x in lines]))
        seconds[name] = {"mean": mean, "shared": mean + once / len(lines)}
    return seconds


def interval(row):
    """An estimate in words: '0.69 [0.48, 0.84]'; '-' for what is undefined."""
    if row["value"] is None:
        return "-"
    bounds = "-" if row["low"] is None else f"[{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['value']:.2f} {bounds}"


def architecture_table(lines):
    """Rows of text, the header first: the best architectures by the teacher."""
    table = [["rank", "architecture", "parameters", "multiply-adds", "teacher", "control", "truth"]]
    for line in sorted(lines, key=lambda line: -line["teacher"])[:10]:
        name = f"{[*line['filters']]} {[*line['kernels']]} {line['pooling']}"
        numbers = [f"{line[size]:,}" for size in SIZES]
        numbers += [f"{line[method]:.4f}" for method in ("teacher", "control")]
        truth = [repeat["validation"] for repeat in line.get("truth", ())]
        numbers.append(f"{np.mean(truth):.4f}" if truth else "-")
        table.append([str(len(table)), name, *numbers])
    return table


def ranking_table(result):
    """Rows of text, the header first: how well each method ranks, and at what cost."""
    halves = "half by truth", "half by score"
    header = ["Spearman with the truth", "all", *halves, "given both sizes"]
    header += ["teacher minus it", "seconds", "with preparation"]
    header += ["test accuracy of its best", f"of {SHORTLIST}"]
    table = [header]
    for name, row in result["correlations"].items():
        method = "truth" if name == "ceiling" else name
        estimates = [row["spearman"][subset] for subset in ("all", *halves)]
        estimates.append(row["partial"]["all"])
        cost = result["seconds"].get(method, {})  # none of counting
        best = result["best"][method]
        cells = [name, *map(interval, estimates)]
        cells.append(interval(estimates[0]["teacher minus this"]))
        cells += [f"{cost[key]:.3g}" if key in cost else "-" for key in ("mean", "shared")]
        cells += [f"{best[key]:.4f}" for key in ("test", "shortlist")]
        table.append(cells)
    random = result["best"]["random"]
    picks = "{mean:.4f} +- {std:.4f}, best {best:.4f} (n = {n})".format(**random)
    return [*table, ["random pick", *["-"] * 7, picks, f"{random['shortlist']:.4f}"]]


def print_table(table):
    """Print rows of text as a table, and an empty line."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    print(flush=True)


def report(result):
    """Print the tables of a nas.json."""
    print_table(architecture_table(result["architectures"]))
    print_table(ranking_table(result))
    if len(result["architectures"]) < ENOUGH:
        print(f"no intervals: they need {ENOUGH} architectures")


# ---- search ----


def architecture_of(line):
    """The Architecture of a line of nas.jsonl."""
    fields = [line[name] for name in gtn.Architecture._fields]
    return gtn.Architecture(*(tuple(x) if type(x) is list else x for x in fields))


def begin(folder, settings, resume, space, config, data):
    """A new search, or the one in the folder: (controls, {Architecture: its line}).

    Raises InputError for another search, or this one without `resume`, and for damaged files.
    """
    path = folder / "search.json"
    log = folder / "nas.jsonl"
    lines = gtn.read(log) if log.exists() else []
    steps = PASSES * config.inner_steps
    lengths = {"control": steps}
    if len(settings["teachers"]) > 1:
        lengths["control_all"] = steps * len(settings["teachers"])
    if not lines and not path.exists():
        controls = {}
        for name, length in lengths.items():
            controls[name] = tune_control(space, config, data, settings, length)
        gtn.write(path, settings | {"controls": controls})
    there = gtn.read(path)
    with gtn.reading(path):
        json.dumps(there, allow_nan=False)  # raises an error for NaN
        keys = "seed", "space", "score", "truth", "sha256"
        changes = [key for key in keys if there[key] != settings[key]]
        if not changes:  # raises an error now, not after hours, if a number is damaged
            for name in lengths:
                control_sources(there, config)[name][0](data)
    if changes or (lines and not resume):
        which = "this search: continue it with --resume, or"
        if changes:
            which = f"a search with other {', '.join(changes)}:"
        raise gtn.InputError(f"{folder} holds {which} choose another --out")
    with gtn.reading(log):
        lines.sort(key=lambda line: "truth" in line)  # of two lines, the one with its truth counts
        done = {architecture_of(line): line for line in lines}
        truth = [{"validation": 0, "test": 0}] * settings["truth"]["repeats"]
        lines = [{"truth": truth} | line for line in done.values()]
        if lines:  # raises an error now, too
            json.dumps(conclude(lines, settings | there), allow_nan=False)
            architecture_table(lines)
            if {len(line["truth"]) for line in lines} != {len(truth)}:
                raise ValueError("other repeats than in search.json")
    gtn.write(log, done.values())  # without a last line that was never finished
    return there["controls"], done


def describe(args, contents, config, space, device):
    """What search.json says of a search, as JSON has it."""
    fields = "filters kernels pooling normalization hidden_units name least_blocks".split()
    settings = {
        "teachers": [*map(str, args.teachers)],
        "sha256": [*map(gtn.sha256_of, args.teachers)],
        "teacher_seconds": sum(content["seconds"] for content in contents),
        "config": vars(config),
        "seed": args.seed,
        "space": {name: getattr(space, name) for name in fields},
        "score": {"passes": PASSES, "learners": LEARNERS, "rates": RATES},
        "truth": {"steps": args.truth_steps, "repeats": args.repeats, "recipe": RECIPE},
        "environment": gtn.environment(device),
    }
    return json.loads(json.dumps(settings))  # with lists, to compare with what is there


def measured(folder, lines, field, add, *arguments):
    """The lines, those without the field after `add`; torchrun's processes share these."""
    missing = [i for i, line in enumerate(lines) if field not in line]
    new = {}
    for i in tqdm(missing[gtn.RANK :: gtn.WORLD], field, unit="net", disable=gtn.NO_BAR):
        new[i] = add(lines[i], *arguments)
        with open(folder / "nas.jsonl", "ab") as file:  # one write a line, for all processes
            file.write((json.dumps(new[i], allow_nan=False) + "\n").encode())
    new = gtn.gathered(new)
    return [new.get(i, line) for i, line in enumerate(lines)]


def search(args, device):
    """All of it; the folder gets search.json, nas.jsonl, and at the end nas.json."""
    configs = [gtn.read_teacher(path)[0].config for path in args.teachers]
    kinds = {(x.dataset, x.inner_steps, x.batch_size) for x in configs}
    if len(kinds) > 1 or len({gtn.sha256_of(path) for path in args.teachers}) < len(configs):
        same = "the same dataset, inner_steps and batch_size"
        raise gtn.InputError(f"teachers must be different files with {same}")
    config = configs[0]
    data = gtn.load_data(config.dataset, args.data, device)
    teachers, contents = zip(
        *(gtn.read_teacher(x, device, data) for x in args.teachers), strict=True
    )
    space = gtn.make_config(args.space) if args.space else config
    gtn.check_depth(space, data)
    key = args.seed, gtn.ARCHITECTURES
    architectures = sample_architectures(space, data.classes, args.architectures, *key)
    settings = describe(args, contents, config, space, device)
    folder = args.out or args.teachers[0].with_name(f"nas-{space.name}-s{args.seed}")
    with gtn.locked(folder):
        begun = [None]
        if gtn.RANK == 0:
            begun = [begin(folder, settings, args.resume, space, config, data)]
        if gtn.WORLD > 1:
            torch.distributed.broadcast_object_list(begun)
        settings["controls"], done = begun[0]
        sources = {"teacher": [*map(teacher_source, teachers, contents)]}
        sources |= control_sources(settings, config)
        if gtn.RANK == 0 and space.normalization == "batch":
            print("transductive: predictions depend on each other")
        lines = [done.get(x, x._asdict()) for x in architectures]
        lines = measured(folder, lines, "teacher", add_scores, data, sources, settings)
        if gtn.RANK == 0 and not all("truth" in line for line in lines):
            print("ranked by the teacher, before full training, which takes longer:")
            print_table(architecture_table(lines))
        lines = measured(folder, lines, "truth", add_truth, data, settings)
        if gtn.RANK == 0:
            result = conclude(lines, settings)
            gtn.write(folder / "nas.json", result)
            report(result)
            print(f"written to {folder / 'nas.json'}")


def main(arguments=None):
    """The command line of nas.py."""
    parser = gtn.argument_parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help_teachers = "files of gtn.py; the best score of several counts"
    add("teachers", type=Path, nargs="+", metavar="TEACHER.pt", help=help_teachers)
    add("--architectures", type=int, default=64, help="how many to sample (default: 64)")
    add("--space", metavar="CONFIG", help="config (default: the first teacher's)")
    add("--seed", type=int, default=0, help="fixes everything on a CPU (default: 0)")
    add("--truth-steps", type=int, default=800, help="steps of full training (default: 800)")
    add("--repeats", type=int, default=2, help="full trainings of one (default: 2)")
    add("--out", type=Path, help="folder to write (default: nas-SPACE-sSEED beside the teacher)")
    add("--resume", action="store_true", help="continue the search in its folder")
    args = parser.parse_args(arguments)
    for name, least in {"architectures": 2, "seed": 0, "truth_steps": 1, "repeats": 1}.items():
        number = getattr(args, name)
        if not least <= number <= 10**6:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} {number}: must be from {least} to 1,000,000")
    search(args, gtn.choose_device(args.device))


if __name__ == "__main__":
    sys.exit(gtn.run("nas.py", main, sys.argv[1:]))

"""Every figure and table, from the files that gtn.py and nas.py leave.

    python analyze.py                                # of the runs below runs/, into runs/figures/
    python analyze.py --runs results --out figures   # of those that are published here

It writes report.html (one page that needs no network), README.md, and their pictures. The file
reads in this order: reading, tables, figures, pages, command line.
"""

import argparse
import base64
import collections
import dataclasses
import glob
import html
import io
import itertools
import re
import shlex
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

import gtn
import nas

# Test accuracies that others report on MNIST, in gtn.ORDERS, by source, (inner steps, batch size,
# outer steps) and variant. The paper trained and tested a teacher under each order; its "no
# curriculum" is `random`. The earlier run (github.com/GoodAI/GTN, one seed) shuffled teachers that
# were trained in order: medians.
PAPER = "paper (trained under the order)"
EARLIER = "earlier run (transductive)"
KNOWN = {
    PAPER: {(32, 128, 2000): {"learned": (0.985, 0.974, 0.969), "random": (0.957,)}},
    EARLIER: {
        (20, 32, 5000): {
            "learned": (0.973, 0.763),
            "random_fixed": (0.974, 0.695),
            "random": (0.929, 0.928),
        },
        (10, 32, 5000): {
            "learned": (0.961, 0.677),
            "random_fixed": (0.962, 0.666),
            "random": (0.901, 0.898),
        },
        (10, 16, 5000): {
            "learned": (0.953, 0.576),
            "random_fixed": (0.952, 0.625),
            "random": (0.855, 0.850),
        },
    },
}


def known(source, config, order):
    """The accuracy that a source reports for a config, tested in that order, or None."""
    budget = config.inner_steps, config.batch_size, config.outer_steps
    trained = order if source == PAPER else "in order"
    if config.dataset != "mnist" or config.order != trained:
        return None
    accuracies = KNOWN[source].get(budget, {}).get(config.variant, ())
    return dict(zip(gtn.ORDERS, accuracies, strict=False)).get(order)


# ---- reading ----

BUDGET = "dataset", "inner_steps", "batch_size"  # the same in all runs of a name
# the same in a teacher and the real data that it is compared with
LEARNER = "batch_size filters least_blocks kernels pooling hidden_units normalization".split()
# may differ in runs of one mean
INCIDENTAL = {x.name for x in dataclasses.fields(gtn.Config) if x.metadata["free"]} | {"seed"}

# A run folder; log, evaluation and teacher are {} where the file is missing or damaged
Run = collections.namedtuple("Run", "folder config device command log evaluation teacher")


def attempt(damaged, path, read, *arguments):
    """read(path, ...), or {} without such a file; a damaged one is named and joins the list."""
    try:
        return read(path, *arguments) if path.exists() else {}
    except Exception as error:  # whatever a damaged file raises: the others are drawn
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"analyze.py: skipped {path} ({reason})", file=sys.stderr)
        damaged.append(path)
        return {}


def read_log(path, T):
    """Arrays error, meta_loss [2, N] (outer steps, values), lr, momentum [T]; step, minutes."""
    lines = gtn.read(path)
    steps = [x for x in lines if x["event"] == "step"]
    checks = [x for x in lines if x["event"] == "validation"]
    errors = [(x["step"], 1 - x["accuracy"]["mean"]) for x in checks]
    losses = [(x["step"], x["meta_loss"]) for x in steps]
    return {
        "error": np.array(errors, float).reshape(-1, 2).T,
        "meta_loss": np.array(losses, float).reshape(-1, 2).T,
        "lr": np.array(checks[-1]["lr"], float).reshape(T),
        "momentum": np.array(checks[-1]["momentum"], float).reshape(T),
        "step": lines[-1]["step"],
        "minutes": lines[-1]["seconds"] / 60,
    }


def read_evaluation(path, T):
    """The teacher's outer step, and accuracies of learners: by order [n], "every step" [n, T]."""
    content = gtn.read(path)
    evaluation = {"step": int(content["step"])}
    for row in content["rows"]:
        accuracies = np.array(row["accuracies"], float)
        if row["every_step"]:
            evaluation["every step"] = accuracies.reshape(-1, T)
        else:
            evaluation[row["order"]] = accuracies.reshape(-1)
    return evaluation


def files_below(folder, name):
    """Paths of all files of that name, each once, also in folders that are links."""
    paths = glob.glob(f"{glob.escape(str(folder))}/**/{name}", recursive=True)
    each = {Path(path).resolve(): Path(path) for path in sorted(paths, reverse=True)}
    return sorted(each.values())


def read_run(path, damaged):
    """The Run of a config.json."""
    content = gtn.read(path)
    folder = path.parent
    config = gtn.Config(**content["config"])
    origin = content["environment"]
    T = config.inner_steps
    teacher = folder / "teacher.pt"
    if config.condition == "learned" and not teacher.exists():
        teacher = folder / f"../{config.name}.pt"  # its curriculum, published

    def read_teacher(path):
        content = gtn.read_teacher(path)[1]
        return content if content["config"]["seed"] == config.seed else {}

    return Run(
        folder,
        config,
        device=str(origin["device"]),
        command=[part for part in shlex.split(origin["command"]) if part != "--resume"],
        log=attempt(damaged, folder / "log.jsonl", read_log, T),
        evaluation=attempt(damaged, folder / "evaluation.json", read_evaluation, T),
        teacher=attempt(damaged, teacher, read_teacher),
    )


def group_runs(runs):
    """({config's name: {condition: runs}}, a line for each run that does not fit the first)."""

    def place(run):
        config = run.config
        variant = gtn.VARIANTS.index(config.variant)
        return config.name, variant, gtn.ORDERS.index(config.order), config.seed

    groups = {}
    remarks = []
    for run in sorted(runs, key=place):
        conditions = groups.setdefault(run.config.name, {})
        same = conditions.get(run.config.condition, [])
        twins = [x for x in same if x.config.seed == run.config.seed]
        model = (twins or same or next(iter(conditions.values()), [run]))[0]
        settings = vars(run.config)
        keys = [key for key in settings if key not in INCIDENTAL] if same else BUDGET
        differences = [key for key in keys if settings[key] != vars(model.config)[key]]
        if twins:
            differences = differences or ["seed"]
        if differences:
            reason = f"its {', '.join(differences)} does not go with {model.folder}"
            remarks.append(f"left out: {run.folder}: {reason}")
        else:
            conditions.setdefault(run.config.condition, []).append(run)
    return groups, remarks


def next_command(run):
    """A line that says how far an unfinished run is, and the command that continues it; or None."""
    steps = run.config.outer_steps
    step = run.log.get("step", steps)
    if step == steps and {*gtn.ORDERS} <= {*run.evaluation}:
        return None
    missing = "tested" if step == steps else "finished"
    command = shlex.join([*run.command, "--resume"])
    return f"{run.folder}: not {missing}, {step:,} of {steps:,} outer steps: {command}"


# ---- tables ----


def evaluated(runs, order):
    """Accuracies of the fresh learners of each run that was tested in that order."""
    return [run.evaluation[order] for run in runs if order in run.evaluation]


def number(x):
    """A number in three decimals, '-' for None."""
    return "-" if x is None else f"{x:.3f}"


def result_table(curves):
    """Rows of text, the header first: test accuracy of each list of runs, by order."""
    header = ["config", "trained with", "tested", "test accuracy", "n", "seeds"]
    header += ["std of seeds' means", *KNOWN, "outer steps", "minutes of each seed", "device"]
    table = [header]
    for runs, order in itertools.product(curves, gtn.ORDERS):
        tests = evaluated(runs, order)
        if not tests:
            continue
        config = runs[0].config
        pooled = gtn.summary(np.concatenate(tests))
        means = gtn.summary([x.mean() for x in tests])
        minutes = [f"{run.log['minutes']:.1f}" if run.log else "-" for run in runs]
        transductive = ", transductive" if config.normalization == "batch" else ""
        row = [config.name, config.condition, order + transductive]
        spread = f" +- {number(pooled['std'])}" if pooled["n"] > 1 else ""
        row += [number(pooled["mean"]) + spread, str(pooled["n"])]
        row += [str(means["n"]), number(means["std"])]
        row += [number(known(source, config, order)) for source in KNOWN]
        row.append(", ".join(sorted({f"{x.evaluation['step']:,}" for x in runs if x.evaluation})))
        row.append(", ".join(minutes))
        row.append("; ".join(dict.fromkeys(run.device for run in runs)))
        table.append(row)
    return table


# ---- figures ----

# Okabe and Ito's colours, which colour-blind readers can tell apart
PALETTE = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#D55E00"
COLOURS = dict(zip(gtn.VARIANTS, PALETTE, strict=False))
LINES = dict(zip(gtn.ORDERS, ("-", "--", ":"), strict=True))
METHODS = {
    "teacher": "teacher",
    "control": "real data, same steps",
    "control_all": "real data, steps of all teachers",
    "parameters": "parameter count",
    "multiply_adds": "multiply-adds",
    "ceiling": "noise ceiling",
}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def new_figure(config, height, *grid, title="", **options):
    """A Figure 960 pixels wide, of that height (inches), with a title, and its axes."""
    figure = Figure(figsize=(6.4, height), layout="constrained")
    budget = f"{config.inner_steps} inner steps x {config.batch_size} images"
    remark = ", transductive" if config.normalization == "batch" else ""
    dataset = Path(config.dataset).name
    text = f"{config.name}: {dataset}, {budget}{remark}{title}"
    figure.suptitle(text, size=11, parse_math=False)
    return figure, figure.subplots(*grid, **options)


def logarithmic(axis):
    """A logarithmic axis, with ticks at 1, 2 and 5 in plain numbers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())


class AccuracyLocator(FixedLocator):
    """Ticks at accuracies that are often compared; evenly spaced if under three are seen."""

    def __call__(self):
        low, high = sorted(self.axis.get_view_interval())
        inside = [x for x in self.locs if low <= x <= high]
        return inside if len(inside) > 2 else MaxNLocator(4).tick_values(low, high)


def spaced_by_error(axis):
    """An axis of accuracies, spaced like the logarithm of the error to tell those near 1 apart."""
    functions = (lambda x: -np.log10(np.maximum(1 - x, 1e-4))), (lambda y: 1 - 10.0**-y)
    set_scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    set_scale("function", functions=functions)
    ticks = [0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998]
    axis.set_major_locator(AccuracyLocator(ticks))
    axis.set_major_formatter("{x:g}")


def running_mean(values, width):
    """Mean of each of values [N] and up to `width` neighbours on either side.

    At most half of those before it count, so that the fast fall at the start does not spread.
    """
    halves = [min(width, i // 2) for i in range(len(values))]
    return np.array([values[i - half : i + half + 1].mean() for i, half in enumerate(halves)])


def draw_mean(axes, series, config, log=False, **options):
    """The mean of series [(x [N], y [N]), ...] as a line, one standard deviation as a band.

    In the colour of the config's variant and the dashes of its order. log: of logarithms.
    """
    xs = np.unique(np.concatenate([x for x, _ in series]))
    rows = [np.interp(xs, x, np.log(y) if log else y, left=np.nan, right=np.nan) for x, y in series]
    table = np.ma.masked_invalid(rows)  # of one series there is no standard deviation
    mean = table.mean(0)
    std = table.std(0, ddof=1)
    low, mean, high = (np.ma.exp(y) if log else y for y in (mean - std, mean, mean + std))
    colour = COLOURS[config.variant]
    marker = "" if len(xs) > 1 else "o"
    axes.plot(xs, mean, color=colour, linestyle=LINES[config.order], marker=marker, **options)
    axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def draw_training(conditions, config):
    """Validation error and meta-loss over outer steps: the paper's figure of curricula."""
    figure, panels = new_figure(config, 5.8, 2, sharex=True)
    names = {"error": "validation error", "meta_loss": "meta-loss (nats)"}
    for axes, (key, name) in zip(panels, names.items(), strict=True):
        for condition, runs in conditions.items():
            config = runs[0].config
            colour = COLOURS[config.variant]
            series = [(x, np.maximum(y, 1e-4)) for x, y in (r.log[key] for r in runs if r.log)]
            series = [(x, y) for x, y in series if x.size]
            smooth = []
            for x, y in series:
                axes.plot(x, y, ".", color=colour, alpha=0.25, markersize=4, markeredgewidth=0)
                smooth.append((x, np.exp(running_mean(np.log(y), len(x) // 40))))
            if smooth:
                draw_mean(axes, smooth, config, log=True, label=condition)
        axes.set(ylabel=name)
        logarithmic(axes.yaxis)
    panels[1].set(xlabel="outer steps")
    caption = (
        "1 - validation accuracy, of learners in the teacher's own order, and meta-loss. "
        "Dots: single values; lines: running mean of the logarithm, over seeds; "
        "bands: one standard deviation over seeds."
    )
    return figure, caption


def draw_orders(conditions, config):
    """Box plots of test accuracy in each order."""
    boxes = []
    for (condition, runs), order in itertools.product(conditions.items(), gtn.ORDERS):
        if values := evaluated(runs, order):
            boxes.append((f"{condition}, {order}", runs[0].config, order, values))
    figure, axes = new_figure(config, 1.3 + 0.26 * len(boxes))
    spaced_by_error(axes.xaxis)
    for y, (_, config, order, values) in enumerate(boxes):
        options = {"widths": 0.6, "orientation": "horizontal", "manage_ticks": False, "sym": "."}
        box = axes.boxplot(np.concatenate(values), positions=[y], **options)
        colour = COLOURS[config.variant]
        for line in itertools.chain(*box.values()):
            line.set(color=colour, markeredgecolor=colour, linewidth=1.5)
        if len(values) > 1:
            means = [x.mean() for x in values]
            axes.plot(means, [y] * len(means), "k|", markersize=12, label="mean of one seed")
        for source, marker in zip(KNOWN, "*s", strict=True):
            if accuracy := known(source, config, order):
                look = {"markerfacecolor": "none", "markersize": 7, "label": source}
                axes.plot(accuracy, y, f"k{marker}", **look)
    axes.set_yticks(range(len(boxes)), [label for label, *_ in boxes])
    axes.set(xlabel="test accuracy", ylim=(len(boxes) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    caption = (
        "Test accuracy with the curriculum in order, with its batches shuffled along the inner "
        "steps, and with all its images shuffled. Teachers were trained in order, unless their "
        "name says otherwise. Boxes: median and quartiles."
    )
    return figure, caption


def draw_steps(conditions, config):
    """Test accuracy after each inner step."""
    figure, axes = new_figure(config, 4.4)
    spaced_by_error(axes.yaxis)
    for condition, runs in conditions.items():
        config = runs[0].config
        values = evaluated(runs, "every step")
        if not values:
            continue
        series = [(1 + np.arange(len(curve)), curve) for curve in np.concatenate(values)]
        draw_mean(axes, series, config, label=f"{condition} (n = {len(series)})")
    axes.set(xlabel="inner steps", ylabel="test accuracy")
    caption = (
        "Accuracy of n fresh learners on 1,000 test images after each inner step; bands: one "
        "standard deviation."
    )
    return figure, caption


def draw_rates(conditions, config):
    """Learned inner learning rate and momentum."""
    figure, panels = new_figure(config, 3.2, 1, 2)
    names = {"lr": "inner learning rate", "momentum": "momentum"}
    for axes, (key, name) in zip(panels, names.items(), strict=True):
        for condition, runs in conditions.items():
            curves = [run.log[key] for run in runs if run.log]
            if curves:
                series = [(1 + np.arange(len(curve)), curve) for curve in curves]
                draw_mean(axes, series, runs[0].config, log=key == "lr", label=condition)
        axes.set(xlabel="inner step", ylabel=name)
    logarithmic(panels[0].yaxis)
    caption = (
        "Rates at the last validation; bands: one standard deviation over seeds, of the learning "
        "rate's logarithm."
    )
    return figure, caption


def draw_overview(groups):
    """Images of teachers along the inner steps, and the accuracy after each, for each data set.

    Of runs whose name has a teacher, and real data to compare it with.
    """
    columns = {}
    for conditions in groups.values():
        both = [conditions.get(variant, []) for variant in ("learned", "real")]
        if all(evaluated(runs, "every step") for runs in both) and both[0][0].teacher:
            columns.setdefault(both[0][0].config.dataset, conditions)
    if not columns:
        return Figure(), ""
    figure = Figure(figsize=(4.8 * len(columns), 3.2), layout="constrained")
    options = {"squeeze": False, "sharex": "col", "height_ratios": (1, 2.4)}
    panels = figure.subplots(2, len(columns), **options)
    for (strip, axes), (dataset, conditions) in zip(panels.T, columns.items(), strict=True):
        run = conditions["learned"][0]
        images = run.teacher["curriculum"].images[:, :3]
        pixels = images.movedim(2, 4) * run.teacher["std"] + run.teacher["mean"]
        sheet = pixels.clamp(0, 1).permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)
        T = run.config.inner_steps
        look = {"aspect": "auto", "interpolation": "nearest", "cmap": "gray", "vmin": 0, "vmax": 1}
        strip.imshow(sheet.squeeze(2).numpy(), extent=(0.5, T + 0.5, 0, 1), **look)
        strip.axis("off")
        title = f"{Path(dataset).name}: images of a teacher"
        strip.set_title(title, size=11, parse_math=False)
        sources = {"learned": "its images", "real": "real images"}
        for (name, source), height in zip(sources.items(), (4, -14), strict=True):
            curves = np.concatenate(evaluated(conditions[name], "every step"))
            series = [(1 + np.arange(T), curve) for curve in curves]
            draw_mean(axes, series, conditions[name][0].config, label=f"trained on {source}")
            end = curves[:, -1].mean()
            place = {"xytext": (0, height), "textcoords": "offset points", "ha": "right"}
            axes.annotate(f"{end:.2f}", (T, end), color=COLOURS[name], **place)
        axes.set(xlabel="SGD step", ylabel="test accuracy", ylim=(0, 1))
    caption = (
        "Above: the first three images in each of a teacher's batches. Below: "
        "accuracy of fresh learners on 1,000 test images after each step on such batches, and on "
        "real ones; bands: one standard deviation over learners."
    )
    return figure, caption


def equal_steps(accuracy, steps, accuracies):
    """SGD steps after which accuracies [S] reach one, interpolated in their logarithm; 0 or inf."""
    rising = np.maximum.accumulate(accuracies)
    return np.exp(np.interp(accuracy, rising, np.log(steps), left=-np.inf, right=np.inf))


def comparisons(runs):
    """(a run of `learned`, {inner steps: runs of `real`}) of each data set that has both.

    Real data of the teacher's batch size and learner, for at least three numbers of inner steps.
    """
    result = []
    for dataset in gtn.DATASETS:
        tested = [x for x in runs if x.config.dataset == dataset and "in order" in x.evaluation]
        teachers = [x for x in tested if x.config.condition == "learned"]
        for teacher in sorted(teachers, key=lambda run: -run.config.outer_steps):
            real = {}
            for run in tested:
                here, there = (vars(x.config) for x in (run, teacher))
                same = all(here[key] == there[key] for key in LEARNER)
                if same and run.config.condition == "real":
                    real.setdefault(run.config.inner_steps, []).append(run)
            if len(real) >= 3:
                result.append((teacher, real))
                break  # one teacher, of the most outer steps
    return result


def draw_equivalents(compared):
    """How many real SGD steps the steps of a teacher are worth, for each of the `comparisons`."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    spaced_by_error(axes.yaxis)
    logarithmic(axes.xaxis)
    worth = []
    for (teacher, real), colour in zip(compared, PALETTE, strict=False):
        dataset = teacher.config.dataset
        steps = sorted(real)
        tests = [np.concatenate(evaluated(real[T], "in order")) for T in steps]
        summaries = [gtn.summary(test) for test in tests]
        mean = np.array([x["mean"] for x in summaries])
        std = np.array([x["std"] or 0 for x in summaries])  # None of a single learner
        axes.errorbar(steps, mean, std, color=colour, marker=".", label=f"{dataset}: real data")
        accuracy = teacher.evaluation["in order"].mean()
        bounds = [equal_steps(accuracy, steps, mean + shift * std) for shift in (0, 1, -1)]
        ends = [teacher.config.inner_steps, np.clip(bounds[0], steps[0], steps[-1])]
        look = {"color": colour, "linestyle": ":", "marker": "*", "markevery": [0]}
        axes.plot(ends, [accuracy, accuracy], label=f"{dataset}: a teacher's steps", **look)
        beyond = {0: f"under {steps[0]}", np.inf: f"over {steps[-1]}"}
        equal, low, high = (beyond.get(x, f"{x:,.0f}") for x in bounds)
        axes.annotate(equal, (ends[1], accuracy), ha="right", va="bottom", color=colour)
        worth.append(f"{dataset} {ends[0]} steps for {equal} real ones [{low}, {high}]")
    axes.set(xlabel="SGD steps", ylabel="test accuracy")
    caption = (
        "Test accuracy of fresh learners after so many SGD steps on real batches, with rates that "
        "were learned for each number of steps (bars: one standard deviation), and after those of "
        f"a teacher: {'; '.join(worth)}. In brackets: if the learners on real data are one "
        "standard deviation better, or worse."
    )
    return figure, caption


def draw_images(run):
    """The first 20 images of up to 20 batches of a teacher.pt, sorted by label.

    Grey ones are shown in a colour map that is white at 0.
    """
    curriculum = run.teacher["curriculum"]
    config = run.config
    steps = np.linspace(0, config.inner_steps - 1, min(config.inner_steps, 20)).round().astype(int)
    labels, index = curriculum.labels[steps, :20].sort(dim=1, stable=True)
    images = curriculum.images[torch.from_numpy(steps)[:, None], index]
    T, N = index.shape
    framed = F.pad(images, (1, 0, 1, 0), value=torch.nan)
    sheet = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    height, width, channels = sheet.shape
    title = f"\n{config.condition}, seed {config.seed}"
    inches = min(5 / width, 10 / height)  # for a pixel
    figure, axes = new_figure(config, height * inches + 0.9, title=title)
    figure.set_layout_engine("compressed")  # for axes of a fixed shape
    sharp = {"interpolation": "nearest"}  # pixels as they are
    if channels == 1:
        limit = images.abs().max()
        shown = axes.imshow(sheet[..., 0].numpy(), "RdBu_r", vmin=-limit, vmax=limit, **sharp)
        figure.colorbar(shown, ax=axes, label="pixel value", fraction=0.03)
    else:
        pixels = sheet * run.teacher["std"] + run.teacher["mean"]
        axes.imshow(pixels.clamp(0, 1).nan_to_num(1).numpy(), **sharp)
    same = (labels == labels[0]).all()  # real images have other labels in every batch
    legible = width * inches / N > 0.09 * len(str(labels.max().item()))
    texts = labels[0].tolist() if same and legible else [""] * N
    axes.set_xticks((np.arange(N) + 0.5) * width / N, texts)
    rows = steps + 1 if height * inches / T > 0.12 else [""] * T
    axes.set_yticks((np.arange(T) + 0.5) * height / T, rows)
    axes.set(xlabel="label" if same else "sorted by label", ylabel="inner step")
    axes.grid(visible=False)
    columns = f"{N} of the {config.batch_size} images of the batch"
    return figure, f"Rows: {T} of {config.inner_steps} inner steps; columns: {columns}."


def draw_search(search):
    """A teacher's accuracy against full training, and how well each method ranks."""
    config = gtn.Config(**search["config"])
    rows = search["architectures"]
    title = f"\n{len(rows)} architectures, space {search['space']['name']}"
    figure, (top, bottom) = new_figure(config, 7.2, 2, title=title)
    by_teacher = [row["teacher"] for row in rows]
    truth = [np.mean([repeat["validation"] for repeat in row["truth"]]) for row in rows]
    colours = {"c": [row["multiply_adds"] for row in rows], "norm": "log", "cmap": "viridis"}
    figure.colorbar(top.scatter(by_teacher, truth, s=22, **colours), ax=top, label="multiply-adds")
    spaced_by_error(top.xaxis)
    spaced_by_error(top.yaxis)
    top.set(xlabel="validation accuracy by the teacher")
    top.set(ylabel="validation accuracy\nafter full training")
    draw_correlations(bottom, search)
    full = search["truth"]
    origin = search["environment"]
    caption = (
        f"Full training: {full['recipe']}, {full['steps']:,} steps, mean of {full['repeats']}; "
        "noise ceiling: one full training against another. Bars: 95 % intervals. In brackets: "
        f"the time for an architecture. {origin['device']}; `{origin['command']}`."
    )
    return figure, caption


def draw_correlations(axes, search):
    """Spearman's correlation of each method with full training, in three ways, with intervals."""
    names = [name for name in METHODS if name in search["correlations"]]
    kinds = {
        "all": ("spearman", "all"),
        "better half by its own score": ("spearman", "half by score"),
        "given both sizes": ("partial", "all"),
    }
    labels = []
    for y, name in enumerate(names):
        for i, (kind, (statistic, subset)) in enumerate(kinds.items()):
            row = search["correlations"][name][statistic][subset]
            if row["value"] is None:
                continue
            low, high = (row["value"] if row[x] is None else row[x] for x in ("low", "high"))
            bar = [[row["value"] - low], [high - row["value"]]]
            look = {"fmt": "osv"[i], "color": PALETTE[i], "capsize": 3, "label": kind}
            axes.errorbar(row["value"], y + (i - 1) / 5, xerr=bar, **look)
        cost = search["seconds"].get("truth" if name == "ceiling" else name)
        labels.append(f"{METHODS[name]} ({cost['mean']:.3g} s)" if cost else METHODS[name])
    axes.set_yticks(range(len(names)), labels)
    axes.set(xlabel="Spearman correlation with full training", ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)


def draw_robustness(content):
    """Validation errors of many settings for each normalization, from a robustness.json."""
    errors = content["errors"]
    figure = Figure(figsize=(6.4, 0.5 * len(errors) + 1), layout="constrained")
    axes = figure.subplots()
    options = {"widths": 0.7, "showfliers": False, "orientation": "horizontal"}
    axes.boxplot([*errors.values()], tick_labels=[*errors], **options)
    for y, values in enumerate(errors.values(), 1):
        spread = np.linspace(-0.25, 0.25, len(values))  # points of one setting at one height
        axes.plot(values, y + spread, "o", color=PALETTE[0], alpha=0.6, markersize=4)
    logarithmic(axes.xaxis)
    axes.set(xlabel="validation error", ylabel="normalization")
    caption = (
        f"{len(content['settings'])} settings drawn at random, the same for each normalization "
        "of the learner, one point each (0.9: by chance, or diverged); boxes: median and quartiles."
    )
    return figure, caption


# ---- pages ----

MADE = "mean +- standard deviation of n learners"  # in every page that was made here

HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Figures</title><style>
body { font: 16px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% }
table { display: block; overflow-x: auto; white-space: nowrap; font-size: 85% }
table { border-collapse: collapse }
td { border-bottom: 1px solid #ccc; padding: .2rem .6rem }
tr:first-child { font-weight: bold }</style>"""


def image_block(name, figure, caption):
    """The block (see `write_pages`) of a figure, with one legend for all panels."""
    legend = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    return "img", caption, re.sub(r"[^\w.-]+", "-", name), buffer.getvalue()


def write_pages(out, blocks):
    """Pictures, README.md and report.html, from blocks.

    ("h2" or "p", text), ("table", rows) or ("img", caption, name, bytes). `Code` in a text is shown
    as code, and nothing else in it as markup. Raises InputError if two pictures have one name.
    """
    names = collections.Counter(block[2] for block in blocks if block[0] == "img")
    for name, count in names.items():
        if count > 1:
            advice = "rename a folder below --runs"
            raise gtn.InputError(f"{count} pictures would be {name}.png: {advice}")

    def rich(text):
        return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))

    def plain(text):
        return html.escape(text, quote=False).replace("|", "\\|")

    markdown = []
    page = [HEAD]
    for kind, content, *image in blocks:
        if kind == "table":
            lines = [f"| {' | '.join(map(plain, row))} |" for row in content]
            markdown.append("\n".join([lines[0], "| --- " * len(content[0]) + "|", *lines[1:]]))
            cells = ["".join(f"<td>{rich(cell)}</td>" for cell in row) for row in content]
            rows = "\n".join(f"<tr>{row}</tr>" for row in cells)
            page.append(f"<table>{rows}</table>")
            continue
        if kind == "img":
            name, png = image
            gtn.write(out / f"{name}.png", png)
            markdown.append(f"![{name}]({name}.png)")
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            page.append(f'<img alt="{name}" src="{source}">')
        markdown.append("## " * (kind == "h2") + plain(content))
        page.append(f"<h2>{rich(content)}</h2>" if kind == "h2" else f"<p>{rich(content)}</p>")
    gtn.write(out / "README.md", ("\n\n".join(markdown) + "\n").encode())
    gtn.write(out / "report.html", "\n".join(page).encode())


def run_blocks(name, conditions):
    """All that is drawn of the runs of one config, after the commands that made them."""
    runs = [run for same in conditions.values() for run in same]
    commands = {}  # a dict: distinct, in order
    for run in runs:
        command = shlex.join(run.command)
        flag = r" --(variant|seed)[ =]\S+"
        command = re.sub(flag, lambda match: f" --{match[1]} {match[1].upper()}", command)
        commands[f"`{command}`"] = None
    blocks = [("h2", name), ("p", "; ".join(commands))]
    for draw in (draw_training, draw_orders, draw_steps, draw_rates):
        figure, caption = draw(conditions, runs[0].config)
        if any(axes.has_data() for axes in figure.axes):
            blocks.append(image_block(f"{name}-{draw.__name__[5:]}", figure, caption))
    for run in runs:
        if run.teacher:
            label = f"{name}-{run.config.condition}-s{run.config.seed}-images"
            blocks.append(image_block(label, *draw_images(run)))
    return blocks


def name_of(path, folder):
    """The name of a file's place below the folder of the runs."""
    return "-".join(path.parent.relative_to(folder).parts) or folder.resolve().name


def robustness_blocks(path, folder):
    """All that is drawn of a robustness.json."""
    name = name_of(path, folder)
    return [("h2", name), image_block(f"{name}-errors", *draw_robustness(gtn.read(path)))]


def search_blocks(path, folder):
    """All that is drawn of a nas.json."""
    search = gtn.read(path)
    name = name_of(path, folder)
    figure = image_block(f"{name}-ranking", *draw_search(search))
    table = [[METHODS.get(row[0], row[0]), *row[1:]] for row in nas.ranking_table(search)]
    return [("h2", name), ("table", table), figure]


# ---- command line ----


def main(arguments):
    """The command line of analyze.py; it exits with status 1 if a damaged file was skipped."""
    description = "Draw whatever gtn.py and nas.py have left."
    parser = argparse.ArgumentParser(prog="analyze.py", description=description)
    parser.add_argument("--runs", help="folder of the runs (default: runs)")
    parser.add_argument("--out", type=Path, help="folder to write (default: figures in --runs)")
    args = parser.parse_args(arguments)
    folder = Path(args.runs or "runs")
    out = args.out or folder / "figures"
    damaged = []
    for path in (out / "README.md", out / "report.html"):
        if path.exists() and MADE not in path.read_text("utf-8", errors="replace"):
            raise gtn.InputError(f"{path} was not made by analyze.py: choose another --out")
    paths = files_below(folder, "config.json")
    runs = [run for path in paths if (run := attempt(damaged, path, read_run, damaged))]
    groups, remarks = group_runs(runs)
    command = shlex.join(["python", "analyze.py", *arguments])
    made = f"Made by `{command}`; {MADE}."
    blocks = [("h2", "Results"), ("p", made)]
    curves = [same for conditions in groups.values() for same in conditions.values()]
    table = result_table(curves)
    if len(table) > 1:
        blocks.append(("table", table))
    matplotlib.rcParams.update(STYLE)
    compared = comparisons([*itertools.chain(*curves)])
    for draw, argument in ((draw_overview, groups), (draw_equivalents, compared)):
        figure, caption = draw(argument)
        if any(axes.has_data() for axes in figure.axes):
            blocks.append(image_block(draw.__name__[5:], figure, caption))
    shown = {x.folder for _, real in compared for same in real.values() for x in same}
    only_there = []
    for name, conditions in groups.items():
        if {x.folder for same in conditions.values() for x in same} <= shown:
            only_there.append(name)
        else:
            blocks += run_blocks(name, conditions)
    if only_there:
        text = f"In no other figure than `equivalents`: {', '.join(only_there)}."
        blocks.append(("p", text))
    for path in files_below(folder, "robustness.json"):
        blocks += attempt(damaged, path, robustness_blocks, folder)
    for path in files_below(folder, "nas.json"):
        blocks += attempt(damaged, path, search_blocks, folder)
    pictures = sum(kind == "img" for kind, *_ in blocks)
    if pictures == 0:
        advice = "make a run with python gtn.py, or name another --runs"
        raise gtn.InputError(f"nothing to draw in {folder}: {advice}")
    write_pages(out, blocks)
    remarks += filter(None, map(next_command, runs))
    print("\n".join([*remarks, f"{pictures} figures; open {out / 'report.html'}"]))
    if damaged:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(gtn.run("analyze.py", main, sys.argv[1:]))

"""The figures of analyze.py: a function for each, and before them what others report, colours and helpers.

A function takes what its figure shows (the runs of one experiment by variant, a run, or a search; see analyze.py) and
returns a `Drawn`. Nothing here reads or writes files.
"""

import re
import shlex
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

import gtn

DPI, WIDTH = 150, 6.4  # inches: 960 pixels, readable at half the width of a screen
STYLE = {"font.size": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False,
         "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": DPI}  # fmt: skip
# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = dict(zip(gtn.VARIANTS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000"), strict=True))
METHODS = {  # of ranking architectures: words, colour, marker
    "teacher": ("teacher", "#0072B2", "o"), "control": ("real data, same steps", "#000000", "s"),
    "parameters": ("parameter count", "#D55E00", "^"), "multiply_adds": ("multiply-adds", "#56B4E9", "v"),
    "ceiling": ("noise ceiling", "#009E73", "D"),
}  # fmt: skip
# Test accuracies that others report on MNIST: {source: {(inner steps, batch, variant): {order: accuracy}}}. The paper
# took 2,000 outer steps and calls `random` "no curriculum". The earlier run (github.com/GoodAI/GTN) took 5,000 with one
# seed and normalised with the statistics of the test images (transductive); shuffled, its figures are medians.
KNOWN = {
    "paper": {
        (32, 128, "learned"): {"in order": 0.985, "batch-shuffled": 0.974, "all-shuffled": 0.969},
        (32, 128, "random"): {"in order": 0.957},
    },
    "earlier run (transductive)": {
        (T, B, variant): {"in order": in_order, "batch-shuffled": shuffled}
        for T, B, *rows in (
            (20, 32, (0.973, 0.763), (0.974, 0.695), (0.929, 0.928)),
            (10, 32, (0.961, 0.677), (0.962, 0.666), (0.901, 0.898)),
            (10, 16, (0.953, 0.576), (0.952, 0.625), (0.855, 0.850)),
        )
        for variant, (in_order, shuffled) in zip(gtn.VARIANTS[:3], rows, strict=True)
    },
}
MARKS = dict(zip(KNOWN, "*s", strict=True))


def known(source, config):
    """{order: accuracy} that a source reports for a config's data set, budget and variant; {} where it does not."""
    found = KNOWN[source].get((config.inner_steps, config.batch_size, config.variant), {})
    return found if config.dataset == "mnist" else {}


def measured(run):
    """`step`, `test` (and `curve`) of a run's evaluation, unless its teacher has trained on; else of its log; or {}."""
    step = run.teacher["step"] if run.teacher else run.log["step"] if run.log else None
    if run.evaluation and step in (None, run.evaluation["step"]):
        return run.evaluation
    return run.log if run.log and run.log["test"] else {}


def command_of(run, variant=None):
    """The command that made a run, or that would make one of another variant."""
    command = re.sub(r" --(resume|(stop-after|max-minutes)[ =]\S+)(?= |$)", "", str(run.environment.get("command")))
    return re.sub(r" --variant[ =]\S+", "", command) + f" --variant {variant}" if variant else command


# ----------------------------------------------------------------------------------------- helpers


class Drawn(NamedTuple):
    """A figure or animation (None: nothing to draw), its caption, and what is missing: [(name, reason, command)]."""

    figure: Figure
    caption: str = ""
    missing: tuple = ()


def new_figure(height, *grid, **options):
    """A Figure of the common width and that height (inches), and its axes."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(*grid, **options)


def plain_log(axis):
    """Ticks of a logarithmic axis at 1, 2 and 5, in plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())


def legend(figure, **options):
    """One legend for all panels, each label once."""
    if entries := {k: h for axes in figure.axes for h, k in zip(*axes.get_legend_handles_labels(), strict=True)}:
        figure.legend(entries.values(), entries.keys(), **{"loc": "outside upper center", "ncols": 5} | options)


def running_mean(values, window):
    """Centred mean over `window` (odd, at most N) of the values [N], over fewer at both ends."""
    weights = np.ones(window)
    return np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")


def aggregate(series):
    """(x, mean, standard deviation) of series [(x [N], y [N]), ...] that may end at different x; the standard
    deviation is masked where fewer than two of them have a value."""
    xs = np.unique(np.concatenate([x for x, _ in series]))
    table = np.ma.masked_all((len(series), len(xs)))
    for row, (x, y) in enumerate(series):
        table[row, np.searchsorted(xs, x)] = y
    return xs, table.mean(0), table.std(0, ddof=1)


def draw_mean(axes, series, colour, geometric=False, **options):
    """The mean of the series as a line, in a band of one standard deviation; geometric: both of the logarithms."""
    x, mean, std = aggregate([(x, np.log(y) if geometric else y) for x, y in series])
    low, mean, high = (np.ma.exp(y) if geometric else y for y in (mean - std, mean, mean + std))
    axes.plot(x, mean, color=colour, marker="" if len(x) > 1 else "o", **options)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def by_label(labels, limit):
    """Where in batches with labels [T, B] the first images of each label are: [T, 10, n <= limit], -1 for none."""
    counts = F.one_hot(labels, gtn.CLASSES).sum(1)
    index = torch.full((len(labels), gtn.CLASSES, min(limit, int(counts.amax()))), -1)
    for t, label in np.ndindex(*index.shape[:2]):
        found = (labels[t] == label).nonzero()[: index.shape[2], 0]
        index[t, label, : len(found)] = found
    return index


def pick(images, index):
    """Of images [T, B, C, H, W] those at index [T, N], NaN where it is -1: [T, N, C, H, W]."""
    picked = images[torch.arange(len(index))[:, None], index].float()
    picked[index < 0] = torch.nan
    return picked


def mosaic(pictures, run):
    """Pictures [rows, columns, C, H, W] on a sheet [rows (H + 1), columns (W + 1)(, 3)] with gaps of NaN, or white."""
    sheet = F.pad(pictures, (1, 0, 1, 0), value=torch.nan).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    if sheet.shape[2] == 1:
        return sheet[..., 0].numpy()
    return (sheet * run.teacher["std"] + run.teacher["mean"]).clamp(0, 1).nan_to_num(1).numpy()


def show_pictures(pictures, run, rows, columns, names, width=1100):
    """(Figure, its image) of pictures [rows, columns, C, H, W], each pixel a whole number of the screen's; grey ones in
    a map that is white at zero, coloured ones as they are. rows, columns: labels; names: of x and y; width: pixels."""
    sheet, grey = mosaic(pictures, run), pictures.shape[2] == 1
    zoom = max(1, round(width / sheet.shape[1]))
    generated = run.config.variant not in ("pixels", "real")
    limit = run.config.image_scale if generated else np.nanmax(np.abs(sheet))
    height, width = zoom * sheet.shape[0], zoom * sheet.shape[1]
    left, right, bottom, top = 100, 150 if grey else 20, 15, 95  # pixels around the sheet
    total = np.array([left + width + right, bottom + height + top])
    figure = Figure(figsize=total / DPI, dpi=DPI)
    axes = figure.add_axes([left / total[0], bottom / total[1], width / total[0], height / total[1]])
    image = axes.imshow(sheet, "RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
    if grey:
        size = min(height, 500)
        bar = [(left + width + 20) / total[0], (bottom + height - size) / total[1], 20 / total[0], size / total[1]]
        figure.colorbar(image, figure.add_axes(bar)).set_label("pixel value" * (size > 150), size=12)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=12)
    axes.xaxis.set_label_position("top")
    axes.set_yticks((np.arange(len(rows)) + 0.5) * len(sheet) / len(rows), rows)
    axes.set_xticks((np.arange(len(columns)) + 0.5) * sheet.shape[1] / len(columns), columns)
    axes.set_xlabel(names[0], size=12)
    axes.set_ylabel(names[1], size=12)
    return figure, image


# ----------------------------------------------------------------------------------------- figures


def not_evaluated(variants, key):
    """Entries of `Drawn.missing` for the runs of which `key` has not been measured."""
    runs = [run for runs in variants.values() for run in runs if key not in measured(run)]
    reason, command = "no evaluation.json of its teacher", "python gtn.py --evaluate {}"
    return [(run.folder.name, reason, command.format(shlex.quote(str(run.folder / "teacher.pt")))) for run in runs]


def counted(groups):
    """'n = 30 learned, 10 real' of {variant: what is to be counted}."""
    return "n = " + ", ".join(f"{len(group)} {variant}" for variant, group in groups.items())


def draw_training(variants):
    """Validation accuracy and meta-loss over outer steps."""
    figure, panels = new_figure(5.6, 2, sharex=True)
    missing, learners = [], set()
    for variant, runs in variants.items():
        started = [run for run in runs if run.log and run.log["step"]]
        missing += [(x.folder.name, "no outer step yet", f"{command_of(x)} --resume") for x in runs if x not in started]
        learners |= {run.log["learners"] for run in started}
        for axes, key in zip(panels, ("accuracy", "meta_loss"), strict=True):
            series = [run.log[key] for run in started if run.log[key].size]
            for x, y in series:
                some = slice(None, None, 1 + len(x) // 400)
                axes.plot(x[some], y[some], ".", color=COLOURS[variant], alpha=0.3, markersize=4, markeredgewidth=0)
            if smooth := [(x, running_mean(y, 1 + 2 * (len(x) // 40))) for x, y in series]:
                draw_mean(axes, smooth, COLOURS[variant], label=variant)
    panels[0].set(ylabel="validation accuracy")
    panels[1].set(ylabel="meta-loss (nats)", xlabel="outer steps", yscale="log")
    plain_log(panels[1].yaxis)
    legend(figure)
    caption = (
        f"Validation accuracy (n = {' or '.join(map(str, learners))} learners a point) and meta-loss: as logged and "
        "a running mean over a twentieth of it, averaged over seeds. Bands: one standard deviation over seeds."
    )
    return Drawn(figure if learners else None, caption, missing)


def draw_orders(variants):
    """Box plots of test accuracy, in order and shuffled."""
    tests = {v: [measured(run)["test"] for run in runs if measured(run)] for v, runs in variants.items()}
    tests = {v: {order: [test[order] for test in found] for order in gtn.ORDERS} for v, found in tests.items() if found}
    boxes = [(v, order) for v in tests for order in gtn.ORDERS]
    figure, axes = new_figure(1 + 0.26 * len(boxes))
    for y, (variant, order) in enumerate(boxes):
        values, line = tests[variant][order], {"color": COLOURS[variant], "linewidth": 1.2}
        box = axes.boxplot(
            np.concatenate(values), positions=[y], widths=0.6, orientation="horizontal", manage_ticks=False,
            patch_artist=True, boxprops={**line}, whiskerprops=line, capprops=line, medianprops=line | {"linewidth": 2},
            flierprops={"marker": ".", "markersize": 3, "markeredgecolor": COLOURS[variant]},
        )  # fmt: skip
        box["boxes"][0].set_facecolor((COLOURS[variant], 0.25))
        if len(values) > 1:
            axes.plot([x.mean() for x in values], [y] * len(values), "k|", markersize=8, label="mean of one seed")
        for source, mark in MARKS.items():
            if accuracy := known(source, variants[variant][0].config).get(order):
                axes.plot(accuracy, y, f"k{mark}", markerfacecolor="none", markersize=7, label=source)
    axes.set_yticks(range(len(boxes)), [", ".join(box) for box in boxes])
    axes.set(xlabel="test accuracy", ylim=(len(boxes) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)
    legend(figure)
    n = counted({variant: np.concatenate(values["in order"]) for variant, values in tests.items()})
    caption = f"Test accuracy ({n} fresh learners), taught in order, with the batches shuffled along the inner steps, "
    caption += "and with all images shuffled. Boxes: median and quartiles."
    return Drawn(figure if boxes else None, caption, not_evaluated(variants, "test"))


def draw_steps(variants):
    """Test accuracy after each inner step, beside what others report."""
    figure, axes = new_figure(4.4)
    found = {v: [measured(run)["curve"] for run in runs if "curve" in measured(run)] for v, runs in variants.items()}
    curves = {v: np.concatenate(curves) for v, curves in found.items() if curves}
    for variant, curve in curves.items():
        draw_mean(axes, [(1 + np.arange(len(y)), y) for y in curve], COLOURS[variant], label=variant)
    config = next(iter(variants.values()))[0].config
    budget = config.inner_steps, config.batch_size
    for source, table in KNOWN.items() if config.dataset == "mnist" else ():
        for T, B, variant in [key for key in table if source == "paper" or key[:2] == budget]:
            look = {"marker": MARKS[source], "linestyle": "", "markerfacecolor": "none", "markeredgewidth": 1.6}
            size = 12 - 2.5 * gtn.VARIANTS.index(variant)  # so that no mark hides another
            axes.plot(T, table[T, B, variant]["in order"], color=COLOURS[variant], markersize=size, **look)
            axes.plot([], [], color="0.4", label=f"{source.split(' (')[0]}, {T} x {B}", **look)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"inner steps of {config.batch_size} images", ylabel="test accuracy")
    axes.grid(alpha=0.3)
    legend(figure, ncols=3)
    caption = (
        f"Accuracy on 1,000 test images after each inner step ({counted(curves)} fresh learners); bands: one standard "
    )
    caption += "deviation. Marks, in the colours of the variants: what others report after the last step."
    return Drawn(figure if curves else None, caption, not_evaluated(variants, "curve"))


def draw_rates(variants):
    """Learned inner learning rate and momentum, over outer steps and over inner steps."""
    logged = {v: [run for run in runs if run.log and len(run.log["lr"])] for v, runs in variants.items()}
    config = next(iter(variants.values()))[0].config
    rows = 1 + config.per_step
    figure, panels = new_figure(0.8 + 2.2 * rows, rows, 2, squeeze=False, sharey="col")
    for column, (key, name) in enumerate({"lr": "inner learning rate", "momentum": "momentum"}.items()):
        for variant, runs in logged.items():
            if runs:
                series = [(run.log["accuracy"][0], run.log[key].mean(1)) for run in runs]
                draw_mean(panels[0, column], series, COLOURS[variant], geometric=key == "lr", label=variant)
            if runs and config.per_step:
                series = [(1 + np.arange(config.inner_steps), run.log[key][-1]) for run in runs]
                draw_mean(panels[1, column], series, COLOURS[variant], geometric=key == "lr")
        for axes, x in zip(panels[:, column], ("outer steps", "inner step"), strict=False):
            axes.set(ylabel=name, xlabel=x, yscale="log" if key == "lr" else "linear")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if key == "lr":
                plain_log(axes.yaxis)
    legend(figure)
    per_step = " (mean over inner steps) and, at the last validation, over inner steps" if config.per_step else ""
    caption = f"Learned inner learning rate and momentum, over outer steps{per_step}. Bands: one standard deviation "
    return Drawn(figure if any(logged.values()) else None, caption + "over seeds, of the learning rate's logarithm.")


def draw_difficulty(variants, measure):
    """Whether the curriculum grows harder. measure(runs by variant): (classifier's accuracy, {variant: ([confidences
    [T] of each seed], {order: losses [learners, T - 1]})}), see analyze.py, or a text that says what it lacks."""
    taught = {v: [run for run in runs if run.teacher] for v, runs in variants.items()}
    if not (taught := {v: runs for v, runs in taught.items() if runs}):
        return Drawn(None)
    if isinstance(result := measure(taught), str):
        dataset = next(iter(taught.values()))[0].config.dataset
        return Drawn(None, missing=[(dataset, result, "python analyze.py --data DIR")])
    figure, (top, bottom) = new_figure(5.6, 2, sharex=True)
    accuracy, figures = result
    for variant, (confidences, losses) in figures.items():
        T, learners = len(confidences[0]), len(losses["in order"])
        draw_mean(top, [(1 + np.arange(T), y) for y in confidences], COLOURS[variant], label=variant)
        draw_mean(bottom, [(1 + np.arange(1, T), y) for y in losses["in order"]], COLOURS[variant])
        bottom.plot(1 + np.arange(1, T), losses["batch-shuffled"].mean(0), ":", color=COLOURS[variant])
    for order, line in (("in order", "-"), ("batch-shuffled", ":")):
        bottom.plot([], [], line, color="gray", label=order)
    top.set(ylabel="classifier's confidence\nin the label")
    bottom.set(ylabel="learner's loss on\nthe next batch (nats)", xlabel="inner step", yscale="log")
    plain_log(bottom.yaxis)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, ncols=4)
    first = ", ".join(f"{variant} {runs[0].config.seed}" for variant, runs in taught.items())
    caption = (
        f"Above: probability that a classifier of real images (validation accuracy {accuracy:.3f}) gives to the label, "
        f"and one standard deviation over seeds. Below: loss of learners (n = {learners}, seed of {first}) on each "
        "batch just before they train on it, and one standard deviation over them."
    )
    return Drawn(figure, caption)


def draw_images(run):
    """The curriculum's images: rows are inner steps, columns the batch."""
    if not run.teacher:
        return Drawn(None, missing=[(run.folder.name, "no teacher.pt", command_of(run))])
    curriculum, T, B = run.teacher["curriculum"], run.config.inner_steps, run.config.batch_size
    index = by_label(curriculum.labels, 2)
    labels = torch.arange(gtn.CLASSES).repeat_interleave(index.shape[2])
    used = (index.flatten(1) >= 0).any(0)
    pictures = pick(curriculum.images, index.flatten(1)[:, used])
    figure, _ = show_pictures(pictures, run, range(1, T + 1), labels[used].tolist(), ("label", "inner step"))
    n = pictures.shape[1]
    columns = f"all {B} images" if n == B else f"the first {index.shape[2]} images of each label, {n} of {B},"
    draw = {"random": " One draw of the latent input.", "real": " One draw of real images."}.get(run.config.variant, "")
    return Drawn(figure, f"Rows: all {T} inner steps; columns: {columns} of the batch.{draw}")


def draw_classes(run):
    """How an image of each class changes along the inner steps of a run with a teacher: a row for each class."""
    curriculum, T = run.teacher["curriculum"], run.config.inner_steps
    steps = np.unique(np.linspace(0, T - 1, min(T, 20)).round().astype(int))
    pictures = pick(curriculum.images[steps], by_label(curriculum.labels[steps], 1).flatten(1)).transpose(0, 1)
    figure, _ = show_pictures(pictures, run, range(gtn.CLASSES), steps + 1, ("inner step", "label"))
    return Drawn(figure, f"The first image of each label in the batches of {len(steps)} of the {T} inner steps.")


def draw_growth(run):
    """An animation of the last inner step's images over the outer steps of a run with a teacher."""
    if not run.snapshots:
        missing = [(run.folder.name, "no snapshots", command_of(run))] if run.config.variant != "real" else ()
        return Drawn(None, missing=missing)
    index = by_label(run.teacher["curriculum"].labels[-1:], 3)[0].T
    steps, images = zip(*run.snapshots, strict=True)
    pictures = [pick(x.expand(len(index), *x.shape), index) for x in images]
    figure, image = show_pictures(pictures[-1], run, [""] * len(index), range(gtn.CLASSES), ("label", ""), width=600)
    title = figure.text(0.02, 0.97, "", size=12, va="top")

    def show(i):
        image.set_data(mosaic(pictures[i], run))
        title.set_text(f"outer step {steps[i]:,}")
        return image, title

    caption = f"Images of the last inner step, at most {len(index)} of each label, after {len(steps)} outer steps."
    return Drawn(FuncAnimation(figure, show, len(steps), init_func=lambda: ()), caption)


def estimate(figure):
    """A correlation of a nas.json and its interval, as text."""
    low, value, high = ("?" if figure[key] is None else f"{figure[key]:.2f}" for key in ("low", "value", "high"))
    return "undefined" if figure["value"] is None else f"{value} [{low}, {high}]"


def draw_search(search):
    """Accuracy by the teacher against full training, the ranks of both, and each method's cost against its worth."""
    figure = Figure(figsize=(WIDTH, 7.5), dpi=DPI, layout="constrained")
    panels = figure.subplot_mosaic([["values", "ranks"], ["cost", "cost"]])
    arrays, truth = search["arrays"], search["truth"]
    look = {"c": arrays["parameters"], "norm": "log", "cmap": "viridis", "s": 20}
    points = panels["values"].scatter(arrays["teacher"], arrays["truth"], **look)
    panels["ranks"].scatter(*((-arrays[key]).argsort().argsort() + 1 for key in ("teacher", "truth")), **look)
    figure.colorbar(points, ax=[panels["values"], panels["ranks"]], label="parameters")
    panels["values"].set(xlabel="accuracy by the teacher", ylabel="accuracy after full training")
    panels["ranks"].set(xlabel="rank by the teacher (1 is best)", ylabel="rank after full training")
    seconds = {key: value["mean"] for key, value in search["seconds"].items()}
    free, axes = min(seconds.values()) / 4, panels["cost"]
    seconds |= {"parameters": free / 1.3, "multiply_adds": free * 1.3, "ceiling": seconds["truth"]}
    seconds["control"] *= 1.15  # as costly as the teacher: set apart, or its bar would hide the other
    for method, (words, colour, marker) in METHODS.items():
        rho, tau = (search["correlations"][method][key]["all"] for key in ("spearman", "kendall"))
        y, low, high = (np.nan if rho[key] is None else rho[key] for key in ("value", "low", "high"))
        bars = {"yerr": [[max(0, y - low)], [max(0, high - y)]], "capsize": 3, "linestyle": ""}
        label = f"{words}: Spearman {estimate(rho)}, Kendall {estimate(tau)}"
        axes.errorbar(seconds[method], y, **bars, color=colour, marker=marker, label=label)
    axes.set(xlabel="seconds for an architecture", ylabel="Spearman correlation\nwith full training", xscale="log")
    plain_log(axes.xaxis)
    axes.axvspan(free / 3, free * 2, color="0.94", zorder=0)
    axes.text(free / 2.7, 0.5, "nothing trained", rotation=90, va="center", transform=axes.get_xaxis_transform())
    legend(figure, loc="outside lower center", ncols=1)
    caption = (
        f"n = {len(arrays['truth'])} architectures, accuracy on validation images. Full training: {truth['recipe']}, "
        f"{truth['steps']:,} steps, mean of {truth['repeats']}. Bars and brackets: 95 % bootstrap intervals. "
        "Noise ceiling: full training against full training under another seed. Real data stands a little to the right."
    )
    return Drawn(figure, caption)


def draw_memory(benchmark):
    """Peak memory of an outer step against the number of inner steps, of a benchmark.json."""
    figure, axes = new_figure(3.8)
    rows = benchmark["memory"]["rows"]
    batch = rows[0]["batch_size"]
    for method, colour, marker in (("full graph", "#D55E00", "s"), ("one-step segments", "#0072B2", "o")):
        found = [row for row in rows if row["method"] == method and row["batch_size"] == batch]
        axes.plot(
            [x["inner_steps"] for x in found], [x["peak"] for x in found], color=colour, marker=marker, label=method
        )
    axes.plot([x["inner_steps"] for x in found], [x["base"] for x in found], ":", color="0.4", label="before the first")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"inner steps of {batch} images", ylabel="peak memory (MiB)", ylim=0)
    axes.grid(alpha=0.3)
    legend(figure)
    caption = "Peak memory of the process after a few outer steps with the full graph and with one-step segments, and "
    return Drawn(figure, caption + "before the first outer step.")

"""Every figure and table, from the files that gtn.py and nas.py leave.

    python analyze.py                                  # of the runs below runs/, into runs/figures/
    python analyze.py --runs results --out figures     # those that are published here

It writes README.md, report.html (one page that needs no network) and their pictures. The file reads in this order:
reading, tables, figures, pages, command line.
"""

import argparse
import base64
import collections
import html
import io
import itertools
import re
import shlex
import sys
from pathlib import Path

try:
    import matplotlib
    import numpy as np
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    import gtn
    import nas
except KeyboardInterrupt:
    sys.exit(130)  # see gtn.py

# Test accuracies that others report on MNIST, in gtn.ORDERS, by source, (inner steps, batch size, outer steps) and
# variant. The paper trained and tested a teacher under each order; its "no curriculum" is `random`. The earlier run
# (github.com/GoodAI/GTN, one seed) shuffled teachers that were trained in order: medians.
PAPER, EARLIER = "paper (trained under the order)", "earlier run (transductive)"
KNOWN = {
    PAPER: {(32, 128, 2000): {"learned": (0.985, 0.974, 0.969), "random": (0.957,)}},
    EARLIER: {
        (20, 32, 5000): {"learned": (0.973, 0.763), "random_fixed": (0.974, 0.695), "random": (0.929, 0.928)},
        (10, 32, 5000): {"learned": (0.961, 0.677), "random_fixed": (0.962, 0.666), "random": (0.901, 0.898)},
        (10, 16, 5000): {"learned": (0.953, 0.576), "random_fixed": (0.952, 0.625), "random": (0.855, 0.850)},
    },
}


def known(source, config, order):
    """The accuracy that a source reports for a config, tested in that order; None where it reports none."""
    found = KNOWN[source].get((config.inner_steps, config.batch_size, config.outer_steps), {}).get(config.variant, ())
    trained = order if source == PAPER else "in order"
    same = config.dataset == "mnist" and config.order == trained
    return dict(zip(gtn.ORDERS, found, strict=False)).get(order) if same else None


# ----------------------------------------------------------------------------------------- reading

BUDGET = "dataset", "inner_steps", "batch_size"  # the same in all runs of a name
INCIDENTAL = "seed", "checkpoint_every", "flat", "cuda_graph"  # may differ between runs that are averaged


# A run folder; log, evaluation and teacher are {} where the file is missing or damaged
Run = collections.namedtuple("Run", "folder config device command log evaluation teacher")


def attempt(damaged, path, read, *arguments):
    """read(path, ...); {} where there is no such file, or a damaged one: that is named, and joins the list."""
    try:
        return read(path, *arguments) if path.exists() else {}
    except Exception as error:  # whatever a damaged file raises: the others are drawn
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"analyze.py: skipped {path} ({reason})", file=sys.stderr)
        damaged.append(path)
        return {}


def read_log(path, T):
    """Arrays error, meta_loss [2, N] (outer steps, values), lr, momentum [N, T]; last outer step, minutes."""
    lines = gtn.read(path)
    steps, checks = ([x for x in lines if x["event"] == event] for event in ("step", "validation"))
    return {
        "error": np.array([(x["step"], 1 - x["accuracy"]["mean"]) for x in checks], float).reshape(-1, 2).T,
        "meta_loss": np.array([(x["step"], x["meta_loss"]) for x in steps], float).reshape(-1, 2).T,
        "lr": np.array([x["lr"] for x in checks], float).reshape(len(checks), T),
        "momentum": np.array([x["momentum"] for x in checks], float).reshape(len(checks), T),
        "step": max(int(x["step"]) for x in lines),
        "minutes": max(float(x.get("seconds", 0)) for x in lines) / 60,
    }


def read_evaluation(path, T):
    """The teacher's outer step, and accuracies of fresh learners by order: [n], of "every step" [n, T]."""
    content = gtn.read(path)
    rows = {row["order"]: row["accuracies"] for row in content["rows"] if row["architecture"] == "training"}
    tests = {order: np.array(x, float).reshape((-1, T) if order == "every step" else -1) for order, x in rows.items()}
    return {"step": int(content["step"]), **tests}


def read_run(path, damaged):
    """The Run of a config.json."""
    content, folder = gtn.read(path), path.parent
    config, where = gtn.Config(**content["config"]), content["environment"]
    command = re.sub(r" --(resume|stop-after[ =]\S+)(?= |$)", "", str(where["command"]))
    log = attempt(damaged, folder / "log.jsonl", read_log, config.inner_steps)
    evaluation = attempt(damaged, folder / "evaluation.json", read_evaluation, config.inner_steps)
    teacher = attempt(damaged, folder / "teacher.pt", lambda path: gtn.read_teacher(path)[1])
    return Run(folder, config, str(where["device"]), command, log, evaluation, teacher)


def group_runs(runs):
    """({config's name: {kind: runs}}, a line for each run that does not fit the first of its name and kind)."""
    groups, remarks, rank = {}, [], [*gtn.VARIANTS, *(run.config.variant for run in runs)]
    runs = sorted(runs, key=lambda run: (gtn.ORDERS.index(run.config.order), run.config.seed))
    for run in sorted(runs, key=lambda run: (run.config.name, rank.index(run.config.variant))):
        kinds = groups.setdefault(run.config.name, {})
        same = kinds.get(run.config.kind, [])
        first = (same or next(iter(kinds.values()), [run]))[0]
        ours, theirs = vars(run.config), vars(first.config)
        keys = [key for key in ours if key not in INCIDENTAL] if same else BUDGET
        other = [key for key in keys if ours[key] != theirs[key]]
        if other or run.config.seed in [x.config.seed for x in same]:
            remarks.append(f"left out: {run.folder}: its {', '.join(other) or 'seed'} does not go with {first.folder}")
        else:
            kinds.setdefault(run.config.kind, []).append(run)
    return groups, remarks


def next_command(run):
    """A line with what a run lacks and the command that supplies it, or None."""
    step, path = run.log.get("step", 0), shlex.quote(str(run.folder / "teacher.pt"))
    if run.log and step < run.config.outer_steps:
        return f"{run.folder}: {step:,} of {run.config.outer_steps:,} outer steps: {run.command} --resume"
    if run.teacher and (run.evaluation.get("step", -1) < step or "every step" not in run.evaluation):
        data = "".join(re.findall(r" --data[ =]\S+", run.command))
        return f"{run.folder}: no whole evaluation.json: python gtn.py --evaluate {path}{data}"


# ------------------------------------------------------------------------------------------ tables


def evaluated(runs, order):
    """Accuracies of the fresh learners of each run that was tested in that order."""
    return [run.evaluation[order] for run in runs if order in run.evaluation]


def result_table(groups):
    """Rows of text, the header first: test accuracy by config, kind and order, beside what others report."""
    header = ["config", "trained with", "tested", "test accuracy", "n", "seeds", "std of seeds' means"]
    rows = [[*header, *KNOWN, "outer steps", "minutes", "device"]]
    found = [runs for kinds in groups.values() for runs in kinds.values()]
    for runs, order in itertools.product(found, (*gtn.ORDERS, "transductive")):
        if tests := evaluated(runs, order):
            config = runs[0].config
            pooled, means = gtn.summary([*np.concatenate(tests)]), gtn.summary([x.mean() for x in tests])
            figures = [pooled["mean"], pooled["std"], means["std"], *(known(x, config, order) for x in KNOWN)]
            mean, std, *others = ("-" if x is None else f"{x:.3f}" for x in figures)
            steps = sorted({f"{run.evaluation['step']:,}" for run in runs if run.evaluation})
            minutes = [run.log["minutes"] for run in runs if run.log]
            row = [config.name, config.kind, order, f"{mean} +- {std}", str(pooled["n"]), str(means["n"]), *others]
            row += [", ".join(steps), f"{np.mean(minutes):.1f}" if minutes else "-"]
            rows.append([*row, ", ".join(sorted({run.device for run in runs}))])
    return rows


def order_table(groups):
    """Rows of text, the header first: both experiments with orders, apart, where teachers were trained under one."""
    header = ["config", "trained with", "order", "trained in order, tested in this", "trained and tested in this"]
    rows = [[*header, PAPER, EARLIER]]
    for name, kinds in groups.items():
        found = {(runs[0].config.variant, runs[0].config.order): runs for runs in kinds.values()}
        variants = dict.fromkeys(variant for variant, order in found if order != "in order")
        pairs = [*itertools.product(variants, gtn.ORDERS), *[("random", "in order")] * bool(variants)]
        for variant, order in pairs:
            plain, own = found.get((variant, "in order"), []), found.get((variant, order), [])
            tests = [[x for test in evaluated(runs, order) for x in test] for runs in (plain, own)]
            cells = [gtn.in_words(gtn.summary(x)) if x else "-" for x in tests]
            others = [known(x, runs[0].config, order) if runs else None for x, runs in ((PAPER, own), (EARLIER, plain))]
            rows.append([name, variant, order, *cells, *(f"{x:.3f}" if x else "-" for x in others)])
    return rows


def search_table(search):
    """Rows of text, the header first: how well each method ranks, what it costs, how good its best architecture is."""
    header = ["ranked by", "Spearman, all", "better half", "given both sizes", "Kendall, all", "teacher minus it"]
    rows = [[*header, "seconds each", "test accuracy of its best"]]
    for method, figures in search["correlations"].items():
        key, spearman = "truth" if method == "ceiling" else method, figures["spearman"]
        found = spearman["all"], spearman["top half"], figures["partial"]["all"], figures["kendall"]["all"]
        row = [METHODS.get(method, method), *map(nas.interval, (*found, spearman["all"]["teacher minus this"]))]
        cost, best = search["seconds"].get(key), search["best"].get(key)
        rows.append([*row, f"{cost['mean']:.3g}" if cost else "-", f"{best['test']:.4f}" if best else "-"])
    picks = "{mean:.4f} +- {std:.4f}, best {best:.4f} (n = {n})".format(**search["best"]["random"])
    return [*rows, ["random pick", *"------", picks]]


# ----------------------------------------------------------------------------------------- figures

# Okabe and Ito's colours, which colour-blind readers can tell apart; a variant that gtn.py does not know is grey
PALETTE = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#D55E00"
COLOURS = collections.defaultdict(lambda: "0.5", zip(gtn.VARIANTS, itertools.cycle(PALETTE), strict=False))
LINES = dict(zip(gtn.ORDERS, ("-", "--", ":"), strict=True))
LINES = dict(zip(gtn.ORDERS, ("-", "--", ":"), strict=True))
METHODS = {"teacher": "teacher", "control": "real data, same steps", "parameters": "parameter count"}
METHODS |= {"multiply_adds": "multiply-adds", "ceiling": "noise ceiling", "corrected": "the same, corrected"}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
STYLE |= {"xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False, "savefig.dpi": 150}


def new_figure(config, height, *grid, title="", **options):
    """A Figure 960 pixels wide, of that height (inches), under a title that says of what it is, and its axes."""
    figure = Figure(figsize=(6.4, height), layout="constrained")
    budget = f"{config.inner_steps} inner steps x {config.batch_size} images"
    figure.suptitle(f"{config.name}: {config.dataset}, {budget}{title}", size=11)
    return figure, figure.subplots(*grid, **options)


def logarithmic(axes, axis):
    """A logarithmic axis, with ticks at 1, 2 and 5 in plain numbers."""
    axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())


class AccuracyLocator(FixedLocator):
    """Ticks at accuracies that are often compared; evenly spaced ones where fewer than two of those are in view."""

    def __call__(self):
        low, high = sorted(self.axis.get_view_interval())
        seen = [x for x in self.locs if low <= x <= high]
        return seen if len(seen) > 1 else MaxNLocator(4).tick_values(low, high)


def spaced_by_error(axis, set_scale):
    """An axis of accuracies, spaced like the logarithm of the error, so that those near 1 can be told apart."""
    set_scale("function", functions=(lambda a: -np.log10(np.maximum(1 - a, 1e-4)), lambda y: 1 - 10.0**-y))
    axis.set_major_locator(AccuracyLocator([0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998]))
    axis.set_major_formatter("{x:g}")


def running_mean(values, width):
    """Mean of each of values [N] and of up to `width` neighbours on either side, at most half of those before it: the
    fast fall at the start does not spread."""
    halves = [min(width, i // 2) for i in range(len(values))]
    return np.array([values[i - half : i + half + 1].mean() for i, half in enumerate(halves)])


def draw_mean(axes, series, config, log=False, **options):
    """The mean of series [(x [N], y [N]), ...] as a line in the colour of the config's variant and the dashes of its
    order, one standard deviation as a band; log: of logarithms."""
    xs = np.unique(np.concatenate([x for x, _ in series]))
    rows = [np.interp(xs, x, np.log(y) if log else y, left=np.nan, right=np.nan) for x, y in series]
    table = np.ma.masked_invalid(rows)  # of one series there is no standard deviation
    mean, std = table.mean(0), table.std(0, ddof=1)
    low, mean, high = (np.ma.exp(y) if log else y for y in (mean - std, mean, mean + std))
    look = {"color": COLOURS[config.variant], "linestyle": LINES[config.order], "marker": "" if len(xs) > 1 else "o"}
    axes.plot(xs, mean, **look, **options)
    axes.fill_between(xs, low, high, color=look["color"], alpha=0.2, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def draw_training(kinds, config):
    """Validation error and meta-loss over outer steps: the paper's figure of curricula."""
    figure, panels = new_figure(config, 5.8, 2, sharex=True)
    for axes, key, name in zip(panels, ("error", "meta_loss"), ("validation error", "meta-loss (nats)"), strict=True):
        for kind, runs in kinds.items():
            config, colour = runs[0].config, COLOURS[runs[0].config.variant]
            series = [(x, np.maximum(y, 1e-4)) for x, y in (run.log[key] for run in runs if run.log) if x.size]
            for x, y in series:
                axes.plot(x, y, ".", color=colour, alpha=0.25, markersize=4, markeredgewidth=0)
            if smooth := [(x, np.exp(running_mean(np.log(y), len(x) // 40))) for x, y in series]:
                draw_mean(axes, smooth, config, log=True, label=kind)
            if key == "error" and (accuracy := known(PAPER, config, config.order)):
                mark = {"color": colour, "markerfacecolor": "none", "markersize": 10, "linestyle": ""}
                axes.plot(2000, 1 - accuracy, marker="*", **mark)
                axes.plot([], [], "k*", markerfacecolor="none", markersize=10, label=PAPER)
        axes.set(ylabel=name)
        logarithmic(axes, axes.yaxis)
    panels[1].set(xlabel="outer steps")
    caption = "1 - validation accuracy, of learners in the teacher's own order, and meta-loss. Dots: as logged; lines: "
    return figure, caption + "running mean of the logarithm, over seeds; bands: one standard deviation over seeds."


def draw_orders(kinds, config):
    """Box plots of test accuracy in each order."""
    names = itertools.product(kinds, (*gtn.ORDERS, "transductive"))
    boxes = [(kind, order, values) for kind, order in names if (values := evaluated(kinds[kind], order))]
    figure, axes = new_figure(config, 1.3 + 0.26 * len(boxes))
    spaced_by_error(axes.xaxis, axes.set_xscale)
    for y, (kind, order, values) in enumerate(boxes):
        config = kinds[kind][0].config
        options = {"widths": 0.6, "orientation": "horizontal", "manage_ticks": False, "sym": "."}
        box = axes.boxplot(np.concatenate(values), positions=[y], **options)
        for line in itertools.chain(*box.values()):
            line.set(color=COLOURS[config.variant], markeredgecolor=COLOURS[config.variant], linewidth=1.5)
        if len(values) > 1:
            axes.plot([x.mean() for x in values], [y] * len(values), "k|", markersize=12, label="mean of one seed")
        for source, mark in zip(KNOWN, "*s", strict=True):
            if accuracy := known(source, config, order):
                axes.plot(accuracy, y, f"k{mark}", markerfacecolor="none", markersize=7, label=source)
    axes.set_yticks(range(len(boxes)), [f"{kind}, {order}" for kind, order, _ in boxes])
    axes.set(xlabel="test accuracy", ylim=(len(boxes) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    caption = (
        "Test accuracy with the curriculum in order, with its batches shuffled along the inner steps, and with all "
    )
    caption += (
        "its images shuffled. Teachers were trained in order unless their name says in which other order. Boxes: "
    )
    return figure, caption + "median and quartiles."


def draw_steps(kinds, config):
    """Test accuracy after each inner step."""
    figure, axes = new_figure(config, 4.4)
    spaced_by_error(axes.yaxis, axes.set_yscale)
    for i, (kind, runs) in enumerate(kinds.items()):
        config = runs[0].config
        if values := evaluated(runs, "every step"):
            series = [(1 + np.arange(len(curve)), curve) for curve in np.concatenate(values)]
            draw_mean(axes, series, config, label=f"{kind} (n = {len(series)})")
        for source, mark in zip(KNOWN, "*s", strict=True) if values else ():
            if accuracy := known(source, config, config.order):
                look = {"marker": mark, "linestyle": "", "markerfacecolor": "none", "markeredgewidth": 1.6}
                axes.plot(config.inner_steps, accuracy, color=COLOURS[config.variant], markersize=12 - 2 * i, **look)
                axes.plot([], [], color="0.4", label=source, **look)
    axes.set(xlabel="inner steps", ylabel="test accuracy")
    caption = "Accuracy of n fresh learners on 1,000 test images after each inner step; bands: one standard deviation. "
    return figure, caption + "Marks, in the colours of the variants: what others report after the last step."


def draw_rates(kinds, config):
    """Learned inner learning rate and momentum, over outer steps and over inner steps."""
    figure, panels = new_figure(config, 5.4, 2, 2, sharey="col")
    for (top, bottom), key, name in zip(panels.T, ("lr", "momentum"), ("inner learning rate", "momentum"), strict=True):
        for kind, runs in kinds.items():
            if logs := [run.log for run in runs if run.log and run.log[key].size]:
                look = {"config": runs[0].config, "log": key == "lr", "label": kind}
                draw_mean(top, [(log["error"][0], log[key].mean(1)) for log in logs], **look)
                draw_mean(bottom, [(1 + np.arange(log[key].shape[1]), log[key][-1]) for log in logs], **look)
        top.set(xlabel="outer steps", ylabel=name)
        bottom.set(xlabel="inner step", ylabel=name)
        for axes in (top, bottom) if key == "lr" else ():
            logarithmic(axes, axes.yaxis)
    caption = "Above: over outer steps, mean over inner steps. Below: over inner steps, at the last validation. Bands: "
    return figure, caption + "one standard deviation over seeds, of the learning rate's logarithm."


def draw_images(run):
    """The first 20 images of each batch of a teacher.pt, sorted by label; grey ones in a map that is white at 0."""
    curriculum, config = run.teacher["curriculum"], run.config
    labels, index = curriculum.labels[:, :20].sort(dim=1, stable=True)
    images, (T, N) = curriculum.images[torch.arange(len(index))[:, None], index], index.shape
    sheet = F.pad(images, (1, 0, 1, 0), value=torch.nan).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    grey, (height, width) = sheet.shape[2] == 1, sheet.shape[:2]
    figure, axes = new_figure(config, 5 * height / width + 0.9, title=f"\n{config.kind}, seed {config.seed}")
    figure.set_layout_engine("compressed")  # for axes of a fixed shape
    if grey:
        picture = axes.imshow(sheet[..., 0].numpy(), "RdBu_r", vmin=-images.abs().max(), vmax=images.abs().max())
        figure.colorbar(picture, ax=axes, label="pixel value", fraction=0.03)
    else:
        axes.imshow((sheet * run.teacher["std"] + run.teacher["mean"]).clamp(0, 1).nan_to_num(1).numpy())
    same = (labels == labels[0]).all()  # real images have other labels in every batch
    axes.set_xticks((np.arange(N) + 0.5) * width / N, labels[0].tolist() if same else [""] * N)
    axes.set_yticks((np.arange(T) + 0.5) * height / T, range(1, T + 1))
    axes.set(xlabel="label" if same else "sorted by label", ylabel="inner step")
    axes.grid(visible=False)
    return figure, f"Rows: all {T} inner steps; columns: {N} of the {config.batch_size} images of the batch."


def draw_search(search):
    """A teacher's accuracy against full training, and each method's cost against its worth, of a nas.json."""
    config, rows, full = gtn.Config(**search["config"]), search["architectures"], search["truth"]
    title = f"\n{len(rows)} architectures, space {search['space']['name']}"
    figure, (top, bottom) = new_figure(config, 6.8, 2, title=title)
    means = [np.mean([trained["validation"] for trained in row["truth"]]) for row in rows]
    look = {"c": [row["multiply_adds"] for row in rows], "norm": "log", "cmap": "viridis", "s": 22}
    figure.colorbar(top.scatter([row["teacher"] for row in rows], means, **look), ax=top, label="multiply-adds")
    spaced_by_error(top.xaxis, top.set_xscale)
    spaced_by_error(top.yaxis, top.set_yscale)
    top.set(xlabel="validation accuracy by the teacher", ylabel="validation accuracy\nafter full training")
    teacher, control, truth = (search["seconds"][key]["mean"] for key in ("teacher", "control", "truth"))
    free = teacher / 4  # real data is as costly as the teacher: set apart, or its bar would hide the other
    x = {"teacher": teacher, "control": 1.3 * control, "ceiling": truth, "corrected": 1.4 * truth}
    x |= {"parameters": free / 1.3, "multiply_adds": 1.3 * free}
    for (method, figures), colour, marker in zip(search["correlations"].items(), PALETTE, "osv^Dp*", strict=False):
        for shift, key, face in ((1, "spearman", colour), (1.1, "partial", "none")):
            value, low, high = (figures[key]["all"][name] for name in ("value", "low", "high"))
            if None not in (value, low, high) and method in x:
                bar = {"yerr": [[value - low], [high - value]], "capsize": 3, "linestyle": "", "markerfacecolor": face}
                label = {"label": METHODS[method]} if key == "spearman" else {}
                bottom.errorbar(shift * x[method], value, **bar, color=colour, marker=marker, **label)
    bottom.set(xlabel="seconds for an architecture", ylabel="Spearman correlation\nwith full training")
    logarithmic(bottom, bottom.xaxis)
    bottom.axvspan(free / 3, free * 2, color="0.94", zorder=0)
    bottom.text(free / 2.7, 0.5, "nothing trained", rotation=90, va="center", transform=bottom.get_xaxis_transform())
    caption = f"Full training: {full['recipe']}, {full['steps']:,} steps, mean of {full['repeats']}; noise ceiling: "
    caption += "one against another; corrected: what a method without noise would reach against their mean. Hollow: "
    caption += "given both sizes. Bars: 95 % intervals. Hollow marks, corrected and real data stand to the right of "
    caption += f"their cost, to be seen. {config.kind}, seed {config.seed}; "
    return figure, caption + f"{search['environment']['device']}; `{search['environment']['command']}`."


# ------------------------------------------------------------------------- pages and command line

HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Figures</title><style>
body { font: 16px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem } img { max-width: 100% }
table { border-collapse: collapse; font-size: 85%; display: block; overflow-x: auto; white-space: nowrap }
td { border-bottom: 1px solid #ccc; padding: .2rem .6rem } tr:first-child { font-weight: bold }</style>"""


def picture(name, figure, caption):
    """The block (see `write_pages`) of a figure, with one legend for all panels."""
    if labels := {k: h for axes in figure.axes for h, k in zip(*axes.get_legend_handles_labels(), strict=True)}:
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3)
    figure.savefig(buffer := io.BytesIO(), metadata={"Software": None})
    return "img", caption, re.sub(r"[^\w.-]+", "-", name), buffer.getvalue()


def write_pages(out, blocks):
    """Pictures, README.md and report.html, from blocks: ("h2" or "p", text), ("table", rows), ("img", caption, name,
    bytes). `Code` in a text is shown as code, and nothing else in it as markup."""

    def rich(text):
        return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))

    def plain(text):
        return html.escape(text, quote=False).replace("|", "\\|")

    markdown, page = [], [HEAD]
    for kind, content, *picture in blocks:
        if kind == "table":
            lines = [f"| {' | '.join(map(plain, row))} |" for row in content]
            markdown.append("\n".join([lines[0], "| --- " * len(content[0]) + "|", *lines[1:]]))
            rows = ["<tr>" + "".join(f"<td>{rich(cell)}</td>" for cell in row) for row in content]
            page.append("<table>" + "\n".join(rows) + "</table>")
            continue
        if kind == "img":
            name, image = picture
            gtn.write(out / f"{name}.png", image)
            markdown.append(f"![{name}]({name}.png)")
            page.append(f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(image).decode()}">')
        markdown.append("## " * (kind == "h2") + plain(content))
        page.append(f"<h2>{rich(content)}</h2>" if kind == "h2" else f"<p>{rich(content)}</p>")
    gtn.write(out / "README.md", ("\n\n".join(markdown) + "\n").encode())
    gtn.write(out / "report.html", "\n".join(page).encode())


def run_blocks(name, kinds):
    """All that is drawn of the runs of one config, after the commands that made them."""
    runs = [run for found in kinds.values() for run in found]
    commands = [re.sub(r" --(variant|seed)[ =]\S+", lambda m: f" --{m[1]} {m[1].upper()}", run.command) for run in runs]
    blocks = [("h2", name), ("p", "; ".join(f"`{command}`" for command in dict.fromkeys(commands)))]
    for draw in (draw_training, draw_orders, draw_steps, draw_rates):
        figure, caption = draw(kinds, runs[0].config)
        if any(axes.has_data() for axes in figure.axes):
            blocks.append(picture(f"{name}-{draw.__name__[5:]}", figure, caption))
    names = {f"{name}-{run.config.kind}-s{run.config.seed}-images": run for run in runs if run.teacher}
    return blocks + [picture(name, *draw_images(run)) for name, run in names.items()]


def search_blocks(path):
    """All that is drawn of a nas.json."""
    search, name = gtn.read(path), path.parent.resolve().name
    return [("h2", name), ("table", search_table(search)), picture(f"{name}-ranking", *draw_search(search))]


def main(arguments):
    """The command line of analyze.py; it exits with status 1 where a damaged file was skipped."""
    parser = argparse.ArgumentParser(prog="analyze.py", description="Draw whatever gtn.py and nas.py have left.")
    parser.add_argument("--runs", help="folder of the runs (default: runs)")
    parser.add_argument("--out", type=Path, help="folder to write (default: figures in that of the runs)")
    args, damaged = parser.parse_args(arguments), []
    runs = Path(args.runs or "runs")
    out = args.out or runs / "figures"
    found = [attempt(damaged, path, read_run, damaged) for path in sorted(runs.rglob("config.json"))]
    groups, remarks = group_runs([run for run in found if run])
    made = f"Made by `{shlex.join(['python', 'analyze.py', *arguments])}`; mean +- standard deviation of n learners."
    tables = result_table(groups), order_table(groups)
    blocks = [("h2", "Results"), ("p", made), *(("table", table) for table in tables if len(table) > 1)]
    matplotlib.rcParams.update(STYLE)
    for name, kinds in groups.items():
        blocks += run_blocks(name, kinds)
    for path in sorted(runs.rglob("nas.json")):
        blocks += attempt(damaged, path, search_blocks)
    if not (pictures := sum(kind == "img" for kind, *_ in blocks)):
        raise gtn.InputError(f"nothing to draw in {runs}: make a run with python gtn.py, or name another --runs")
    write_pages(out, blocks)
    remarks += filter(None, [next_command(run) for run in found if run])
    print("\n".join([*remarks, f"{pictures} figures; open {out / 'report.html'}"]))
    sys.exit(1 if damaged else 0)


if __name__ == "__main__":
    sys.exit(gtn.run("analyze.py", main, sys.argv[1:]))

"""Every figure and result table, from whatever runs of gtn.py and searches of nas.py left.

    python analyze.py                                  # what lies under runs/ is drawn into figures/
    python analyze.py --runs results --select 'A-*'    # of another folder some runs alone

It writes figures/README.md, figures/report.html (one page that needs no network) and their pictures, and says in a
line each what it left out and which command supplies it. The file reads in this order: reading, difficulty, tables,
pages, command line. How a figure looks stands in draw.py.
"""

import base64
import collections
import functools
import html
import io
import json
import re
import shlex
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation, PillowWriter
from tqdm import tqdm

import draw
import gtn

FIRST_COMMAND = "python gtn.py --config A --variant learned"
SAME_RESULTS = "variant", "seed", "checkpoint_every", "segment", "cuda_graph"  # an average may mix these

# ----------------------------------------------------------------------------------------- reading


class Run(NamedTuple):
    """What a run folder holds; None for each file that is missing or damaged."""

    folder: Path
    config: gtn.Config
    environment: dict
    log: dict
    teacher: dict
    evaluation: dict
    snapshots: list


def attempt(read, path, damaged, *arguments):
    """read(path, ...); None where no such file is, or a damaged one: that gets a warning and a place in the list."""
    try:
        return read(path, *arguments) if path.exists() else None
    except gtn.InputError as error:
        print(f"analyze.py: warning: skipped: {error}", file=sys.stderr)
        damaged.append(path)


def finite(values, *shape):
    """A float array of that shape (-1: any); ValueError where it holds other numbers."""
    if not np.isfinite(array := np.array(values, float).reshape(shape)).all():
        raise ValueError("a number is not finite")
    return array


def read_log(path, config):
    """Arrays of a log.jsonl: meta_loss, accuracy [2, N] (outer steps, values), lr, momentum [N, T or 1]; learners of a
    validation, outer step, minutes, and `test`: the final accuracies by order, or None."""
    lines = gtn.read_log(path)
    with gtn.reading(path):
        steps, checks, ends = ([x for x in lines if x["event"] == e] for e in ("step", "validation", "end"))
        width = config.inner_steps if config.per_step else 1
        return {
            "meta_loss": finite([(x["step"], x["meta_loss"]) for x in steps], -1, 2).T,
            "accuracy": finite([(x["step"], x["accuracy"]["mean"]) for x in checks], -1, 2).T,
            "lr": finite([x["lr"] for x in checks], -1, width),
            "momentum": finite([x["momentum"] for x in checks], -1, width),
            "learners": checks[-1]["accuracy"]["n"] if checks else 0,
            "step": int(lines[-1]["step"]) if lines else 0,
            "minutes": max((x["seconds"] for x in lines if "seconds" in x), default=0) / 60,
            "test": {k: finite(ends[-1]["test"][k]["accuracies"], -1) for k in gtn.ORDERS} if ends else None,
        }


def read_teacher(path, config):
    """The content of a run's teacher.pt, without the teacher itself."""
    teacher, content = gtn.read_teacher(path)
    with gtn.reading(path):
        if teacher.config != config:
            raise ValueError("it is of another run than config.json")
        return {key: content[key] for key in ("step", "curriculum", "mean", "std")}


def read_evaluation(path, config):
    """The step, `test` (accuracies by order and, if measured, transductive) and curve of a run's evaluation.json."""
    with gtn.reading(path):
        content = json.loads(path.read_text())
        if gtn.Config(**content["config"]) != config:
            raise ValueError("it is of another run than config.json")
        row = next(row for row in content["rows"] if row["architecture"] == "training")
        test = {key: finite(row[key]["accuracies"], -1) for key in (*gtn.ORDERS, "transductive") if row[key]}
        return {"step": int(content["step"]), "test": test, "curve": finite(content["curve"], -1, config.inner_steps)}


def read_snapshot(path, config):
    """(outer step, images [B, C, H, W]) of a snapshot of the last inner step."""
    content = gtn.read_tensors(path)
    with gtn.reading(path):
        images = content["images"]
        n = min(config.batch_size, gtn.SNAPSHOT_IMAGES)
        if images.dim() != 4 or len(images) != n or not images.isfinite().all():
            raise ValueError(f"its images are not {n} with finite pixels")
        return int(content["step"]), images


def read_search(path, folder):
    """The content of a nas.json, `arrays`: what its methods and truth say of each architecture, name and origin."""
    with gtn.reading(path):
        content = json.loads(path.read_text())
        rows = content["architectures"]
        arrays = {key: finite([row[key] for row in rows], len(rows)) for key in draw.METHODS if key != "ceiling"}
        arrays["truth"] = finite([[x["validation"] for x in row["truth"]] for row in rows], len(rows), -1).mean(1)
        config, where = gtn.Config(**content["config"]), content["environment"]
        origin = (
            f"Teacher of config {config.name}, variant {config.variant}, seed {config.seed}; space {content['space']}, "
            f"search seed {content['seed']}; {where['device']}; `{where['command']}`."
        )
        name = "ranking " + path.parent.relative_to(folder).as_posix()
        search = content | {"arrays": arrays, "origin": origin, "name": name}
        search_table(search), draw.draw_search(search)  # what they lack is missed here, where the file can be named
        return search


def read_benchmark(path):
    """The content of a benchmark.json, with its origin."""
    with gtn.reading(path):
        content = json.loads(path.read_text())
        if "memory" in content:
            draw.draw_memory(content)  # what it lacks is missed here, where the file can be named
        where = content["environment"]
        return content | {"origin": f"{where['device']}, {where['threads']} threads; `{where['command']}`."}


def read_run(folder, damaged):
    """The Run in a folder, or None where its config.json is damaged."""

    def read_config(path):
        with gtn.reading(path):
            content = json.loads(path.read_text())
            return gtn.Config(**content["config"]), dict(content["environment"])

    if origin := attempt(read_config, folder / "config.json", damaged):
        files = ((read_log, "log.jsonl"), (read_teacher, "teacher.pt"), (read_evaluation, "evaluation.json"))
        content = [attempt(read, folder / name, damaged, origin[0]) for read, name in files]
        snapshots = [attempt(read_snapshot, p, damaged, origin[0]) for p in sorted(folder.glob("snapshots/*.pt"))]
        return Run(folder, *origin, *content, [x for x in snapshots if x])


def read_folder(folder, select):
    """(runs, searches, benchmarks, damaged files) below a folder, of places whose name or path the glob matches."""

    def places(name):
        found = [path.parent for path in sorted(folder.rglob(name))]
        return [x for x in found if fnmatch(x.name, select) or fnmatch(x.relative_to(folder).as_posix(), select)]

    damaged, folders, searches, benchmarks = [], *map(places, ("config.json", "nas.json", "benchmark.json"))
    if not folders + searches + benchmarks:
        what = "run" if select == "*" or not folder.is_dir() else f"run that --select {shlex.quote(select)} matches"
        raise gtn.InputError(f"no {what} in {folder}: make one with `{FIRST_COMMAND}`, or name another folder: --runs")
    runs = [read_run(x, damaged) for x in folders]
    searches = [attempt(read_search, x / "nas.json", damaged, folder) for x in searches]
    benchmarks = [attempt(read_benchmark, x / "benchmark.json", damaged) for x in benchmarks]
    return *([x for x in found if x] for found in (runs, searches, benchmarks)), damaged


def group_runs(runs):
    """({experiment: {variant: runs by seed}}, remarks). Runs of a variant differ in seed alone: of several settings
    the commonest keeps the config's name, and any other makes an experiment of its own, named after what differs."""

    def settings(run):
        return tuple((key, value) for key, value in vars(run.config).items() if key not in SAME_RESULTS)

    def budget(run):
        return run.config.dataset, run.config.inner_steps, run.config.batch_size

    def commonest(key, runs):
        value = collections.Counter(map(key, runs)).most_common(1)[0][0]
        return [run for run in runs if key(run) == value]

    experiments, remarks = {}, []
    for run in sorted(runs, key=lambda run: run.config.seed):
        namesakes = commonest(budget, [x for x in runs if x.config.name == run.config.name])
        usual = commonest(settings, [x for x in namesakes if x.config.variant == run.config.variant] or namesakes)[0]
        name = run.config.name
        if other := [f"{key}={value}" for key, value in settings(run) if getattr(usual.config, key) != value]:
            name = f"{name} with {', '.join(other)}"
            remarks.append(f"not averaged: {run.folder} with {usual.folder}; it is drawn as '{name}'")
        same = experiments.setdefault(name, {}).setdefault(run.config.variant, [])
        if twins := [x for x in same if x.config.seed == run.config.seed]:
            remarks.append(f"left out: {run.folder}, which has the settings and the seed of {twins[0].folder}")
        else:
            same.append(run)
    return {name: {v: e[v] for v in gtn.VARIANTS if v in e} for name, e in sorted(experiments.items())}, remarks


# -------------------------------------------------------------------------------------- difficulty


def train_classifier(data, steps=300):
    """(parameters, architecture, validation accuracy) of a small network trained with Adam on real images."""
    architecture = gtn.Architecture((16, 32), (3, 3))
    with gtn.seeded(0):
        theta = gtn.leaf(gtn.init_learner(architecture, data.train.images.shape[1:], data.mean.device))
        adam = torch.optim.Adam([theta], 0.003)
        for _ in range(steps):
            images, labels = gtn.sample(data.train, 64)
            adam.zero_grad()
            F.cross_entropy(gtn.learner(theta, images, architecture), labels).backward()
            adam.step()
    some = gtn.Split(*(x[:2000] for x in data.validation))
    return theta, architecture, gtn.accuracy(theta, some, architecture, None)


@torch.no_grad()
def confidence(theta, architecture, curriculum):
    """Mean probability that a network gives to the labels of each inner step's images: [T]."""
    images, labels = (x.to(theta.device) for x in (curriculum.images, curriculum.labels))
    logits = torch.stack([gtn.learner(theta, batch, architecture) for batch in images])
    return logits.softmax(2).gather(2, labels[..., None]).mean((1, 2)).cpu().numpy()


def next_batch_losses(teacher, data, order, learners=3):
    """Loss (nats) of fresh learners after inner step t on batch t + 1: [learners, T - 1]."""
    losses = np.empty((learners, teacher.config.inner_steps - 1))
    for k, row in enumerate(losses):
        theta, curriculum, architecture = gtn.fresh_learner(teacher, data, k, order)
        states = gtn.unroll(*gtn.at_rest(theta), curriculum, architecture)
        for t, (theta, _) in zip(range(len(row)), states):  # noqa: B905, the last step has no next batch
            with torch.no_grad():
                logits = gtn.learner(theta, curriculum.images[t + 1], architecture, reference=curriculum.images[t])
                row[t] = F.cross_entropy(logits, curriculum.labels[t + 1])
    return losses


def difficulty(variants, judge):
    """What draw.draw_difficulty draws. judge(dataset): data and a trained classifier, or a text where there is none."""
    if isinstance(judged := judge(next(iter(variants.values()))[0].config.dataset), str):
        return judged
    data, theta, architecture, accuracy = judged
    figures = {}
    for variant, runs in variants.items():
        if runs[0].teacher["curriculum"].images.shape[2:] != data.train.images.shape[1:]:
            return f"images of another size than {runs[0].folder} teaches"
        teacher = gtn.read_teacher(runs[0].folder / "teacher.pt", data.mean.device)[0]
        losses = {order: next_batch_losses(teacher, data, order) for order in ("in order", "batch-shuffled")}
        figures[variant] = [confidence(theta, architecture, run.teacher["curriculum"]) for run in runs], losses
    return accuracy, figures


# ------------------------------------------------------------------------------ tables and origins


def span(numbers):
    """'5,000', or '50-5,000' where they differ."""
    return "-".join(f"{x:,}" for x in sorted({min(numbers), max(numbers)}))


def result_table(experiments):
    """Rows of text, the header first: test accuracy of every variant and order, beside what others report."""
    header = "config, variant, order, test accuracy, n, seeds, std of seeds' means".split(", ")
    rows = [[*header, *draw.KNOWN, "outer steps", "minutes", "device"]]
    groups = [(name, v, runs, order) for name, e in experiments.items() for v, runs in e.items()
              for order in (*gtn.ORDERS, "transductive")]  # fmt: skip
    for name, variant, runs, order in groups:
        if runs := [run for run in runs if order in draw.measured(run).get("test", {})]:
            tests = [draw.measured(run)["test"][order] for run in runs]
            pooled = gtn.summary(np.concatenate(tests).tolist())
            figures = [gtn.summary([float(x.mean()) for x in tests])["std"]]
            figures += [draw.known(source, runs[0].config).get(order) for source in draw.KNOWN]
            minutes = [run.log["minutes"] for run in runs if run.log]
            rows.append([
                name, variant, order, gtn.spread(pooled), str(pooled["n"]), str(len(runs)),
                *("-" if x is None else f"{x:.3f}" for x in figures),
                span([draw.measured(run)["step"] for run in runs]), f"{np.mean(minutes):.1f}" if minutes else "-",
                "; ".join(dict.fromkeys(str(run.environment.get("device")) for run in runs)),
            ])  # fmt: skip
    return rows


def search_table(search):
    """Rows of text, the header first: how well each method ranks, what it costs, how good its best architecture is."""
    ranks = [(name, part) for name in ("spearman", "kendall") for part in ("all", "top half")]
    header = [name.title() + ", top half" * (part != "all") for name, part in ranks]
    rows = [["ranking by", *header, "precision of the top 10 %", "seconds for one", "test accuracy of its best"]]
    for method, (words, *_) in draw.METHODS.items():
        key, figures = "truth" if method == "ceiling" else method, search["correlations"][method]
        cells = [draw.estimate(x) for x in (*(figures[name][part] for name, part in ranks), figures["precision"])]
        cost, best = search["seconds"].get(key), search["best"].get(key)
        rows.append([words, *cells, f"{cost['mean']:.3g}" if cost else "-", f"{best['test']:.4f}" if best else "-"])
    random = search["best"]["random"]
    return [*rows, ["random pick", *["-"] * 6, f"{gtn.spread(random | {'mean': random['test']})} (n = {random['n']})"]]


def origin(runs):
    """Where runs come from, as a caption says it: config, variants, seeds, outer steps, devices, commands."""
    config, commands = runs[0].config, [draw.command_of(run) for run in runs]
    if len(runs) > 1:  # one command for all that differ in these flags alone
        commands = [re.sub(r" --(variant|seed)[ =]\S+", lambda m: f" --{m[1]} {m[1].upper()}", x) for x in commands]
    parts = [
        f"Config {config.name} ({config.dataset}, {config.inner_steps} inner steps of {config.batch_size})",
        f"variant {', '.join(dict.fromkeys(run.config.variant for run in runs))}",
        f"seed {', '.join(map(str, sorted({run.config.seed for run in runs})))}",
        f"{span([(run.teacher or run.log or {'step': 0})['step'] for run in runs])} outer steps",
        *dict.fromkeys(str(run.environment.get("device")) for run in runs),
        *(f"`{command}`" for command in dict.fromkeys(commands)),
    ]
    return "; ".join(parts) + "."


# ------------------------------------------------------------------------------------------- pages

HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Figures</title><style>
body { font: 16px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem } img { max-width: 100% }
table { border-collapse: collapse; font-size: 85%; display: block; overflow-x: auto; white-space: nowrap }
td { border-bottom: 1px solid #ccc; padding: .2rem .6rem } tr:first-child { font-weight: bold }
</style>"""


def write_pages(out, blocks):
    """README.md and report.html from blocks: ("h2" or "p", text), ("table", rows), ("img", title, file, bytes). `Code`
    in a text is shown as code, and nothing else in it as markup."""

    def rich(text):
        return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))

    def plain(text):
        parts = text.split("`")
        return "`".join([part if i % 2 else re.sub(r"([|*<&])", r"\\\1", part) for i, part in enumerate(parts)])

    markdown, page = [], [HEAD]
    for kind, content, *picture in blocks:
        if kind == "table":
            lines = [f"| {' | '.join(map(plain, row))} |" for row in content]
            markdown.append("\n".join([lines[0], "| --- " * len(content[0]) + "|", *lines[1:]]))
            rows = ["".join(f"<td>{rich(cell)}</td>" for cell in row) for row in content]
            page.append("<table>" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "</table>")
        elif kind == "img":
            file, image = picture
            markdown.append(f"![{plain(content)}]({file})")
            source = f"data:image/{file[-3:]};base64,{base64.b64encode(image).decode()}"
            page.append(f'<img alt="{rich(content)}" src="{source}">')
        else:
            markdown.append({"h2": "## ", "h3": "### ", "p": ""}[kind] + plain(content))
            page.append(f"<{kind}>{rich(content)}</{kind}>")
    gtn.write_file(out / "README.md", ("\n\n".join(markdown) + "\n").encode())
    gtn.write_file(out / "report.html", "\n".join(page).encode())


def encode(figure):
    """A figure as the bytes of a PNG, an animation as those of a GIF."""
    if isinstance(figure, FuncAnimation):
        with tempfile.TemporaryDirectory() as folder:
            figure.save(Path(folder, "figure.gif"), PillowWriter(fps=2.5))
            return Path(folder, "figure.gif").read_bytes()
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    return buffer.getvalue()


# ------------------------------------------------------------------------------------ command line


def plan(experiments, searches, benchmarks, judge):
    """What there is to draw, in order: (section, title, of what, function, its arguments, origin)."""
    measure = functools.partial(difficulty, judge=judge)
    for name, variants in experiments.items():
        runs = [run for runs in variants.values() for run in runs]
        for title in ("training", "orders", "steps", "rates", "difficulty"):
            arguments = [variants, measure] if title == "difficulty" else [variants]
            yield name, title, name, getattr(draw, f"draw_{title}"), arguments, origin(runs)
        for run in runs:
            what = f"{name}-{run.config.variant}-s{run.config.seed}"
            titles = ("images", "classes", "growth") if run is variants[run.config.variant][0] else ("images",)
            for title in titles if run.teacher else ("images",):
                yield name, title, what, getattr(draw, f"draw_{title}"), [run], origin([run])
    for search in searches:
        yield search["name"], "ranking", search["name"], draw.draw_search, [search], search["origin"]
    for benchmark in (x for x in benchmarks if "memory" in x):
        yield "benchmark", "memory", "benchmark", draw.draw_memory, [benchmark], benchmark["origin"]


def analyze(args):
    """Draw all that the runs allow; returns the exit status: 1 where a damaged file was skipped."""
    folder, out, device = Path(args.runs), Path(args.out), gtn.choose_device(args.device)
    runs, searches, benchmarks, damaged = read_folder(folder, args.select)
    experiments, remarks = group_runs(runs)
    missing = collections.defaultdict(list)  # {(title, reason): [(name, command), ...]}
    for name, variants in experiments.items():
        for variant in (x for x in gtn.VARIANTS if x not in variants):
            command = draw.command_of(next(iter(variants.values()))[0], variant)
            missing[f"variants of {name}", "no such run"].append((variant, command))
    if not searches:
        teacher = shlex.quote(str(runs[0].folder / "teacher.pt")) if runs else "TEACHER.pt"
        missing["ranking", "no nas.json"] = [("architectures", f"python nas.py {teacher}")]

    @functools.lru_cache(1)
    def judge(dataset):
        try:
            data = gtn.load_data(dataset, args.data, device)
        except gtn.InputError as error:
            return str(error)
        return data, *train_classifier(data)

    made = f"Made by `{shlex.join(['python', *sys.argv])}`. Accuracies: mean +- standard deviation of n fresh learners."
    results = result_table(experiments)
    blocks, sections = [("h2", "Results"), ("p", made), *([("table", results)] if len(results) > 1 else [])], set()
    tables = {search["name"]: search_table(search) for search in searches}
    for section, title, what, function, arguments, source in tqdm(
        [*plan(experiments, searches, benchmarks, judge)], disable=None
    ):
        if section not in sections:
            sections.add(section)
            blocks += [("h2", section), *([("table", tables[section])] if section in tables else [])]
        drawn = function(*arguments)
        for name, reason, command in drawn.missing:
            missing[title, reason].append((name, command))
        if drawn.figure:
            suffix = "gif" if isinstance(drawn.figure, FuncAnimation) else "png"
            file, image = re.sub(r"[^\w.-]+", "-", f"{what}-{title}.{suffix}"), encode(drawn.figure)
            gtn.write_file(out / file, image)
            heading = f"{what}: {title}"
            blocks += [("h3", heading), ("img", heading, file, image), ("p", f"{drawn.caption} {source}")]
    write_pages(out, blocks)
    for (title, reason), entries in missing.items():
        names = ", ".join([name for name, _ in entries][:4]) + f" and {len(entries) - 4} more" * (len(entries) > 4)
        likewise = " (the others likewise)" * (len(entries) > 1)
        remarks.append(f"left out: {title} ({names}): {reason}: {entries[0][1]}{likewise}")
    pictures = sum(block[0] == "img" for block in blocks)
    print("\n".join(remarks))
    print(f"{pictures} figures of {len(runs)} runs and {len(searches)} searches; open {out / 'report.html'}")
    return 1 if damaged else 0


def main(arguments=None):
    """The command line; returns the exit status."""
    try:
        parser = gtn.argument_parser(prog="analyze.py", description="Draw every figure and table that the runs allow.")
        parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of the runs (default: runs)")
        parser.add_argument("--out", default="figures", metavar="DIR", help="folder to write (default: figures)")
        parser.add_argument("--select", default="*", metavar="GLOB", help="only folders of this name, such as 'A-*'")
        with matplotlib.rc_context(draw.STYLE):
            return analyze(parser.parse_args(arguments))
    except gtn.InputError as error:
        print(f"analyze.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("analyze.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

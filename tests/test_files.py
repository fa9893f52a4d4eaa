"""Runs that last: resume, interruption, kill, damaged files, full disks, use without this code."""

import errno
import io
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, as_module, few_glyphs, shell, tiny
from test_data import COLOUR

import gtn
import nas


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*.*")}


def comparable(folder):
    """What two runs must share bit for bit: the log without its times, the tensors, the test
    accuracies."""
    lines = gtn.read(folder / "log.jsonl")
    log = [x | {"seconds": 0} for x in lines if x["event"] in ("step", "validation")]
    content, optimizer = (
        gtn.read(folder / "teacher.pt"),
        gtn.read(folder / "checkpoint.pt")["optimizer"],
    )
    tensors = [*content["teacher"].values(), *content["curriculum"].values()]
    tensors += [x for moments in optimizer["state"].values() for x in moments.values()]
    rows = gtn.read(folder / "evaluation.json")["rows"]
    return log, rows, [x.numpy().tobytes() for x in tensors]


def few_settings(folder, order):
    """Settings of a tiny run on a file, which a process has sooner than glyphs."""
    np.savez(folder / "few.npz", **COLOUR)
    settings = [*TINY, f"order={order}", f"dataset={folder / 'few.npz'}", "test_learners=3"]
    return ["--device", "cpu", "--set", *settings]


def test_torchrun(tmp_path):
    """Two processes, stopped and resumed: the losses of one process with two learners."""
    settings = ["--outer-steps", 4, *few_settings(tmp_path, "all-shuffled")]
    torchrun = ["-m", *"torch.distributed.run --standalone --nproc-per-node 2".split()]
    stopped = tmp_path / "stopped.py"
    lines = ["import sys", f"sys.path[:0] = {str(ROOT)!r}, {str(ROOT / 'tests')!r}"]
    lines += ["import gtn, conftest", "gtn.outer_step = conftest.stopping(gtn.outer_step, 2)"]
    lines += ["sys.exit(gtn.run('gtn.py', gtn.main, sys.argv[1:]))"]
    stopped.write_text("\n".join(lines))
    two = [*settings, "--runs", tmp_path / "two"]
    assert shell(*two, script=[*torchrun, stopped]).returncode == 1
    result = shell(*two, "--resume", script=[*torchrun, ROOT / "gtn.py"])
    assert (result.returncode, result.stdout.count("all-shuffled  ")) == (0, 1), result.stderr
    one = [*settings, "learners_per_step=2", "test_learners=1", "--runs", tmp_path / "one"]
    assert shell(*one).returncode == 0
    folders = [tmp_path / name / "quick-learned-all-shuffled-s0" for name in ("two", "one")]
    logs = [gtn.read(folder / "log.jsonl") for folder in folders]
    assert [line["event"] for line in logs[0]].count("resume") == 1
    assert [log[0]["environment"]["ranks"] for log in logs] == [2, 1]
    losses = [[line["meta_loss"] for line in log if line["event"] == "step"] for log in logs]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    teacher, _ = gtn.read_teacher(folders[0] / "teacher.pt")
    data = gtn.load_data(teacher.config.dataset, "", torch.device("cpu"))
    row = gtn.read(folders[0] / "evaluation.json")["rows"][0]
    assert row["accuracies"] == gtn.evaluate(teacher, data, data.test, 3)["accuracies"]


def test_a_folder_is_not_overwritten(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "2")[0] == 0
    before = contents(tmp_path)
    assert run_gtn("--outer-steps", "2", "--resume")[0] == 0  # there is nothing to do
    assert contents(tmp_path) == before
    changed = "a run with outer_steps=2, now 3"
    for steps, more, message in ((2, [], "--resume, or"), (3, ["--resume"], changed)):
        status, _, error = run_gtn("--outer-steps", steps, *more)
        assert (status, error.count("\n")) == (2, 1)
        assert message in error
    for missing in ("checkpoint.pt", "config.json"):  # a published run has no checkpoint
        path = tmp_path / "runs" / "quick-learned-s0" / missing
        path.rename(tmp_path / missing)
        status, _, error = run_gtn("--outer-steps", "2", "--resume")
        assert (status, error.count("\n")) == (2, 1)
        assert f"but no {missing} to resume from: choose another --runs" in error
        (tmp_path / missing).rename(path)
    assert contents(tmp_path) == before


def test_what_cannot_change_the_result_may_change_on_resume(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "3", stop_after=1)[0] == 130
    free = ["flat=true", "cuda_graph=false", "checkpoint_every=9", "validate_every=3"]
    free += ["validation_learners=1", "validation_images=40", "test_learners=1"]
    status, _, error = run_gtn("--outer-steps", "3", "--resume", settings=[*TINY, *free])
    assert status == 0, error
    folder = tmp_path / "runs" / "quick-learned-s0"
    assert gtn.read(folder / "teacher.pt")["config"]["flat"]
    lines = [line for line in gtn.read(folder / "log.jsonl") if line["event"] == "validation"]
    assert [(line["step"], line["accuracy"]["n"]) for line in lines] == [(0, 2), (3, 1)]


def test_a_run_from_another_teacher(run_gtn, tmp_path):
    runs = tmp_path / "runs"
    pixels = ["--outer-steps", "2", "--variant", "pixels"]
    assert run_gtn(*pixels)[0] == 0
    source = runs / "quick-pixels-s0" / "teacher.pt"
    content = gtn.read(source)
    assert not content["curriculum"]["images"].requires_grad
    init = [*pixels, "--init", source, "--seed"]
    assert run_gtn(*init, "1", stop_after=0)[0] == 130
    phi = gtn.read(runs / "quick-pixels-s1" / "teacher.pt")["teacher"]
    assert all(map(torch.equal, phi.values(), content["teacher"].values()))
    message = f"--init {source}: must be of this variant and these sizes"
    assert message in run_gtn(*init, "2", "--set", "inner_steps=4")[2]
    gtn.write(source, content | {"classes": 11})  # the shapes of pixels fit
    assert message in run_gtn(*init, "2")[2]
    assert not [*runs.glob("*-s2")]


def test_a_run_that_is_stopped_between_any_two_files(run_gtn, tmp_path, monkeypatch):
    """config.json, then three files for each of two outer steps and before them."""
    original = gtn.write
    for stop in (2, 3, 4, 8, 9, 10):
        written = []

        def write(path, content, written=written, stop=stop):
            written.append(path.name)
            if len(written) == stop:
                raise KeyboardInterrupt
            original(path, content)

        monkeypatch.setattr(gtn, "write", write)
        assert run_gtn("--outer-steps", "2", "--seed", stop)[0] == 130
        monkeypatch.setattr(gtn, "write", original)
        status, _, error = run_gtn("--outer-steps", "2", "--seed", stop, "--resume")
        assert status == 0, error
        folder = tmp_path / "runs" / f"quick-learned-s{stop}"
        assert gtn.read_teacher(folder / "teacher.pt")[1]["step"] == 2, written
        assert gtn.read(folder / "log.jsonl")[-1]["step"] == 2, written


def start(folder, steps, *more):
    """A run in another process, whose learners meet batches in random order."""
    folder.mkdir(exist_ok=True)
    arguments = ["--outer-steps", steps, "--runs", folder, *more]
    arguments += few_settings(folder, "batch-shuffled")
    command = [sys.executable, ROOT / "gtn.py", *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # faster for networks as small as these
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=one_thread)


def checkpoint_step(folder):
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else -1


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 60
    while checkpoint_step(folder) < step:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_ctrl_c_and_a_second_process(run_gtn, monkeypatch):
    def outer_step(*_):
        status, _, error = run_gtn("--outer-steps", "3", "--resume")
        assert (status, error.count("\n")) == (2, 1)
        assert error.endswith("is in use by another process\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(gtn, "outer_step", outer_step)
    status, _, error = run_gtn("--outer-steps", "3")
    assert (status, error.count("\n")) == (130, 1)
    assert "continue with --resume" in error


def test_kill_9_at_random_moments(tmp_path):
    """Killed again and again, a run ends with the very teacher of the run that nobody disturbed."""
    kills, moment, steps = 3, random.Random(0), 150
    folder = tmp_path / "killed" / "quick-learned-batch-shuffled-s0"
    undisturbed = start(tmp_path / "straight", steps)
    for _ in range(kills):
        before = checkpoint_step(folder)
        process = start(tmp_path / "killed", steps, "--resume")
        wait_for_step(folder, max(before, 0) + 1, process)
        time.sleep(moment.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.communicate()
        assert before < checkpoint_step(folder) < steps
        assert gtn.read_teacher(folder / "teacher.pt")[1]["step"] >= checkpoint_step(folder)
        gtn.read(folder / "log.jsonl")
        gtn.read(folder / "config.json")
    for process in (start(tmp_path / "killed", steps, "--resume"), undisturbed):
        process.communicate(timeout=240)
        assert process.returncode == 0
    assert comparable(folder) == comparable(tmp_path / "straight" / folder.name)


class Hostile:
    """A pickle that would leave a file behind if it were executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def packed(value):
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def damages(content, tmp_path):
    """Files that must be refused, made of the bytes of a good one."""
    good, hostile = torch.load(io.BytesIO(content)), {"teacher": Hostile(tmp_path / "executed")}
    yield from (content[:size] for size in (0, 10, len(content) // 2, len(content) - 1))
    largest = max(good["teacher"].values(), key=torch.numel).numpy().tobytes()
    at = content.index(largest) + len(largest) // 2
    yield content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]  # a flipped bit
    yield from (b"hello\n", pickle.dumps({"config": {}}), packed([1, 2]))
    yield from (pickle.dumps(hostile), packed(hostile))
    for key in ("step", "teacher", "config", "mean", *["log"] * ("optimizer" in good)):
        yield packed({name: x for name, x in good.items() if name != key})
    curriculum, log_lr, std = good["curriculum"], good["teacher"]["log_lr"], good["std"]
    images, labels = curriculum["images"], curriculum["labels"]
    changes = {
        "classes": [11, "10", 2 * 10**9],
        "data_sha256": [64 * "0"],
        "step": [2.5, "1", -1, 4],
        "std": [std[[0, 0]], std * torch.nan, std + 0.002],  # the last: of other images
    }
    parts = {
        ("teacher", "log_lr"): [log_lr[:2], log_lr * torch.nan, "hello"],
        ("config", "hidden_size"): [2 * 10**9],
        ("config", "filters"): ["many"],
        ("config", "nosuch"): [1],
        ("curriculum", "images"): [images.double(), images[..., :27], images * torch.nan],
        ("curriculum", "labels"): [labels - 1, labels + 5, labels.float(), labels[:2]],
        ("curriculum", "momentum"): [torch.ones(4)],
    }
    yield from (packed(good | {key: x}) for key, values in changes.items() for x in values)
    for (part, key), values in parts.items():
        yield from (packed(good | {part: good[part] | {key: x}}) for x in values)


def test_damaged_files_are_refused_in_one_line(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "3", stop_after=1)[0] == 130
    folder, executed = tmp_path / "runs" / "quick-learned-s0", tmp_path / "executed"
    commands = {
        "teacher.pt": ["--evaluate", folder / "teacher.pt", "--learners", "1"],
        "checkpoint.pt": ["--outer-steps", "3", "--resume"],
    }
    for name, command in commands.items():
        good = (folder / name).read_bytes()
        for number, content in enumerate(damages(good, tmp_path)):
            (folder / name).write_bytes(content)
            others = contents(folder)
            status, _, error = run_gtn(*command)
            assert (status, error.count("\n")) == (2, 1), (name, number, error)
            assert name in error, (name, number, error)
            assert contents(folder) == others, number
            assert not executed.exists(), number
        (folder / name).write_bytes(good)
        assert run_gtn(*command)[0] == 0
    pickle.loads(pickle.dumps(Hostile(executed))).close()  # the check of the check
    assert executed.exists()


def test_a_full_disk_leaves_the_old_files(run_gtn, tmp_path, monkeypatch):
    assert run_gtn("--outer-steps", "4", stop_after=1)[0] == 130
    folder = tmp_path / "runs" / "quick-learned-s0"
    before = contents(folder)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, _, error = run_gtn("--outer-steps", "4", "--resume")
    assert status == 2
    assert "No space left on device; what was there before is intact" in error.splitlines()[-1]
    assert contents(folder) == before
    assert run_gtn("--outer-steps", "4", "--resume")[0] == 0


@pytest.mark.parametrize("product", sorted((ROOT / "results").glob("*.pt")))
def test_a_published_curriculum_is_a_teacher_without_a_generator(run_gtn, monkeypatch, product):
    """Its pixels, rates and momenta are the curriculum; another data set is refused."""
    teacher, content = gtn.read_teacher(product)
    assert (teacher.config.variant, content["step"]) == ("pixels", teacher.config.outer_steps)
    for x, expected in zip(teacher(None), content["curriculum"], strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)
    monkeypatch.setattr(gtn, "load_data", lambda *_: few_glyphs())
    status, output, error = run_gtn("--evaluate", product)
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert "other images than this" in error


def readme(text):
    """The README's Python that has this text."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if text in block]
    return block


def test_readme_quotes_the_definition():
    signature, _, body = readme("def meta_gradient(").partition("\n")
    source = (ROOT / "gtn.py").read_text()
    assert signature in source
    assert body in source


def test_readme_s_residual_network_is_a_learner(run_gtn, monkeypatch):
    """The README's own network: meta-gradients agree, a run and sizes follow."""
    names = dict(vars(gtn))
    exec(readme("def make_learner("), names)
    monkeypatch.setattr(gtn, "make_learner", names["make_learner"])
    monkeypatch.setattr(gtn, "blueprint", gtn.blueprint.__wrapped__)  # caches nothing
    teacher, data, theta, architecture, batches = tiny(filters=(3,))
    images, curriculum = data.test.images, teacher(data)
    module = as_module(theta, architecture, (1, 8, 8))
    torch.testing.assert_close(gtn.logits(theta, images, architecture), module(images))
    results = [
        method(theta, curriculum, architecture, batches)
        for method in (gtn.meta_gradient, gtn.meta_gradient_flat)
    ]
    for full, flat in zip(*results, strict=True):
        torch.testing.assert_close(flat, full, rtol=1e-9, atol=1e-12)
    assert nas.sizes(architecture, (1, 8, 8))["parameters"] == len(theta)
    assert run_gtn("--outer-steps", "2")[0] == 0


def test_readme_snippet_trains_a_fresh_network(run_gtn, tmp_path, monkeypatch, capsys):
    """The README's plain PyTorch on quick's curriculum, against gtn's own fresh learners."""
    snippet = readme("torch.optim.SGD")
    assert "gtn" not in snippet
    snippet = snippet.replace("results/mnist.pt", "runs/quick-learned-s0/teacher.pt")
    settings = "filters=[24,48] test_learners=1 validation_learners=1 validate_every=1000".split()
    assert run_gtn("--outer-steps", "20", settings=settings)[0] == 0
    data = few_glyphs()
    teacher, _ = gtn.read_teacher(tmp_path / "runs" / "quick-learned-s0" / "teacher.pt")
    expected = gtn.evaluate(teacher, data, data.test, 8)["mean"]
    pixels = ((data.test.images * data.std + data.mean) * 255).round().byte()
    stored = types.SimpleNamespace(data=pixels[:, 0], targets=data.test.labels)
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *_, **__: stored)
    monkeypatch.chdir(tmp_path)
    for seed in range(8):
        torch.manual_seed(seed)
        exec(snippet, {})
    lines = re.findall("^accuracy (.*)", capsys.readouterr().out, re.MULTILINE)
    assert np.mean([*map(float, lines)]) == pytest.approx(expected, abs=0.05)
    assert expected > 0.7

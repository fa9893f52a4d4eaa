"""Runs that last: resume, interruption, kill, damaged files, full disks, use without this code."""

import errno
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, shell

import gtn


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*.*")}


def comparable(folder):
    """What two runs must share bit for bit: the log without its times, the teacher's tensors, the snapshots."""
    lines = [line for line in read(folder / "log.jsonl") if line["event"] in ("step", "validation", "end")]
    lines = [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory")} for line in lines]
    content = torch.load(folder / "teacher.pt", weights_only=True)
    snapshots = {p.name: torch.load(p, weights_only=True)["images"] for p in folder.glob("snapshots/*.pt")}
    tensors = {**content["teacher"], **content["curriculum"], **snapshots}
    return lines, {key: x.numpy().tobytes() for key, x in tensors.items()}


@pytest.mark.parametrize("variant", ["learned", "random"])
def test_stopped_and_resumed_equals_straight(tmp_path, variant):
    def run(runs, *more):
        arguments = ["--variant", variant, "--outer-steps", 4, "--device", "cpu", "--runs", tmp_path / runs, *more]
        return shell(*arguments, "--set", *TINY)

    assert run("straight").returncode == 0
    stopped = run("halves", "--stop-after", 2)
    assert stopped.returncode == 0
    assert "stopped after 2 of 4 outer steps" in stopped.stdout
    command = stopped.stdout.splitlines()[-1]
    assert command.endswith("--resume")
    assert "--stop-after" not in command
    assert run("halves", "--resume").returncode == 0
    straight, halves = (tmp_path / runs / f"quick-{variant}-s0" for runs in ("straight", "halves"))
    assert comparable(straight) == comparable(halves)
    events = [line["event"] for line in read(halves / "log.jsonl")]
    assert events.count("start") == events.count("resume") == 1


def test_torchrun(tmp_path):
    """Two processes, stopped and resumed: rank 0's files, and the losses of one process with two learners."""
    settings = ["--config", "quick", "--device", "cpu", "--outer-steps", 4, "--set", *TINY, "test_learners=1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "gtn.py"]
    for more in (["--stop-after", 2], ["--resume"]):
        result = shell(*settings, "--runs", tmp_path / "two", *more, script=torchrun)
        assert result.returncode == 0, result.stderr
    assert result.stdout.count("test accuracy, in order") == 1
    assert shell(*settings, "learners_per_step=2", "--runs", tmp_path / "one").returncode == 0
    two, one = (read(tmp_path / name / "quick-learned-s0" / "log.jsonl") for name in ("two", "one"))
    assert [line["event"] for line in two].count("resume") == 1
    assert {(line["learners"], line["meta_batch"]) for line in (two[0], one[0])} == {(2, 32)}
    assert (two[0]["environment"]["ranks"], one[0]["environment"]["ranks"]) == (2, 1)
    losses = [[line["meta_loss"] for line in log if line["event"] == "step"] for log in (two, one)]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_snapshots_of_the_last_inner_step(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "9")[0] == 0
    folder = tmp_path / "runs" / "quick-learned-s0"
    steps = [gtn.read_tensors(path)["step"] for path in sorted(folder.glob("snapshots/*.pt"))]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    last = gtn.read_tensors(folder / "snapshots" / "000008.pt")["images"]
    assert last.shape == (10, 1, 28, 28)
    final = gtn.read_teacher(folder / "teacher.pt")[1]["curriculum"].images[-1]
    assert 0 < (last - final).abs().mean() < 0.1  # one outer step apart
    assert [s for s in range(9, 5001) if gtn.is_snapshot(s)][:6] == [10, 12, 14, 16, 20, 23]
    assert sum(map(gtn.is_snapshot, range(5001))) < 60


def test_max_minutes_stops_with_a_checkpoint(run_gtn, tmp_path):
    status, output, _ = run_gtn("--outer-steps", "3", "--max-minutes", "0")
    assert status == 0
    assert "stopped after 1 of 3 outer steps" in output
    status, output, _ = run_gtn("--outer-steps", "3", "--resume")
    assert (status, "test accuracy" in output) == (0, True)


def test_resume_starts_what_is_not_there_and_reports_what_is_done(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "2", "--resume")[0] == 0
    before = (tmp_path / "runs" / "quick-learned-s0" / "log.jsonl").read_bytes()
    status, output, _ = run_gtn("--outer-steps", "2", "--resume")
    assert status == 0
    assert "test accuracy, in order" in output
    assert (tmp_path / "runs" / "quick-learned-s0" / "log.jsonl").read_bytes() == before


def test_a_folder_is_not_overwritten(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "2")[0] == 0
    folder = tmp_path / "runs" / "quick-learned-s0"
    before = contents(folder)
    status, _, error = run_gtn("--outer-steps", "2")
    assert status == 2
    assert "--resume" in error
    assert "--runs" in error
    status, _, error = run_gtn("--outer-steps", "3", "--resume")
    assert status == 2
    assert "outer_steps=2, now 3" in error
    assert contents(folder) == before


def start(tmp_path, steps, *more):
    arguments = ["--outer-steps", steps, "--device", "cpu", "--runs", tmp_path, *more, "--set", *TINY]
    command = [sys.executable, str(ROOT / "gtn.py"), *map(str, arguments)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # faster for networks as small as these
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=one_thread)


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "log.jsonl").exists() and f'"step": {step},' in (folder / "log.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    process, folder = start(tmp_path, 100_000), tmp_path / "quick-learned-s0"
    wait_for_step(folder, 3, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    stopped = int(re.search(r"stopped after (\d+) of 100000 outer steps", output)[1])
    assert output.rstrip().endswith("--resume")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == stopped
    assert read(folder / "log.jsonl")[-1]["step"] == stopped


def checkpoint_step(folder):
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else -1


def test_kill_9_at_random_moments(tmp_path, request):
    """Killed again and again, a run ends with the very teacher of the run that nobody disturbed."""
    kills, moment = request.config.getoption("--kills"), random.Random(0)
    steps = 50 * kills
    assert start(tmp_path / "straight", steps).wait(timeout=240) == 0
    folder = tmp_path / "killed" / "quick-learned-s0"
    for _ in range(kills):
        before = checkpoint_step(folder)
        process = start(tmp_path / "killed", steps, "--resume")
        while checkpoint_step(folder) <= max(before, 0) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.communicate()
        assert before < checkpoint_step(folder) < steps
        assert gtn.read_teacher(folder / "teacher.pt")[1]["step"] >= checkpoint_step(folder)
        gtn.read_log(folder / "log.jsonl")
        json.loads((folder / "config.json").read_text())
    assert start(tmp_path / "killed", steps, "--resume").wait(timeout=240) == 0
    assert comparable(folder) == comparable(tmp_path / "straight" / "quick-learned-s0")


class Hostile:
    """A pickle that would leave a file behind if it were executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def damages(content, tmp_path):
    """(what, bytes) of files that must be refused, made of a good one."""
    generator, loaded = random.Random(0), torch.load(io.BytesIO(content), weights_only=True)

    def packed(value):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    for _ in range(10):
        yield "cut", content[: generator.randrange(1, len(content))]
    yield "empty", b""
    yield "text", b"hello\n"
    yield "another format", packed(loaded | {"format": 99})
    yield "no dict", packed([1, 2])
    yield "lacks the teacher", packed({k: v for k, v in loaded.items() if k != "teacher"})
    yield "another shape", packed(loaded | {"teacher": loaded["teacher"] | {"log_lr": torch.zeros(7)}})
    if "optimizer" in loaded:
        adam = loaded["optimizer"]
        other = adam["state"][0] | {"exp_avg": torch.zeros(7)}
        yield (
            "another shape of Adam's state",
            packed(loaded | {"optimizer": adam | {"state": adam["state"] | {0: other}}}),
        )
    yield "hostile pickle", pickle.dumps({"format": 1, "teacher": Hostile(tmp_path / "executed")})
    yield "hostile torch file", packed({"format": 1, "teacher": Hostile(tmp_path / "executed")})


def test_damaged_files_are_refused_in_one_line(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "3", "--stop-after", "1")[0] == 0
    folder = tmp_path / "runs" / "quick-learned-s0"
    commands = {"teacher.pt": ["--evaluate", str(folder / "teacher.pt"), "--learners", "1"],
                "checkpoint.pt": ["--outer-steps", "3", "--resume"]}  # fmt: skip
    for name, command in commands.items():
        good, seen = (folder / name).read_bytes(), 0
        for what, content in damages(good, tmp_path):
            (folder / name).write_bytes(content)
            (tmp_path / "executed").unlink(missing_ok=True)
            others = contents(folder)
            status, _, error = run_gtn(*command)
            assert (status, error.count("\n")) == (2, 1), (name, what, error)
            assert name in error
            assert not (tmp_path / "executed").exists(), what
            assert contents(folder) == others, what
            seen += 1
        assert seen == (19 if name == "checkpoint.pt" else 18)
        (folder / name).write_bytes(good)
        assert run_gtn(*command)[0] == 0


def test_hostile_pickle_would_run_without_weights_only(tmp_path):
    """The check of the check: an ordinary unpickling does execute it."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


def test_damaged_curriculum(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "1")[0] == 0
    path = tmp_path / "runs" / "quick-learned-s0" / "teacher.pt"
    good = torch.load(path, weights_only=True)
    for key, value in {"images": good["curriculum"]["images"][:, :, :, :27], "lr": torch.full((3,), torch.nan),
                       "labels": good["curriculum"]["labels"] + 5, "momentum": torch.ones(4)}.items():  # fmt: skip
        torch.save(good | {"curriculum": good["curriculum"] | {key: value}}, path)
        with pytest.raises(gtn.InputError, match=r"teacher\.pt is damaged"):
            gtn.read_teacher(path)


def test_a_full_disk_leaves_the_old_files(run_gtn, tmp_path, monkeypatch):
    assert run_gtn("--outer-steps", "4", "--stop-after", "1")[0] == 0
    folder = tmp_path / "runs" / "quick-learned-s0"
    before = {name: (folder / name).read_bytes() for name in ("teacher.pt", "checkpoint.pt", "config.json")}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, _, error = run_gtn("--outer-steps", "4", "--resume")
    assert status == 2
    assert "No space left on device" in error.splitlines()[-1]
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(folder.glob("*.tmp"))
    assert run_gtn("--outer-steps", "4", "--resume")[0] == 0


def test_a_file_size_limit_is_a_full_disk(tmp_path):
    """The real thing, by the kernel: writing fails half-way."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = shell("--outer-steps", 1, "--runs", tmp_path, "--set", *TINY, preexec_fn=limit)
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert re.match(r"gtn.py: error: cannot write .*(teacher|checkpoint)\.pt: File too large", line)
    assert not list(tmp_path.glob("*/*.pt"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder(run_gtn, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o555)
    status, _, error = run_gtn("--outer-steps", "1")
    assert status == 2
    assert "Permission denied" in error


def test_ctrl_c_in_the_last_outer_step(run_gtn, tmp_path, monkeypatch):
    original = gtn.outer_step

    def interrupted(teacher, optimizer, data, step, learn):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(teacher, optimizer, data, step, learn)

    with monkeypatch.context() as patch:
        patch.setattr(gtn, "outer_step", interrupted)
        status, output, _ = run_gtn("--outer-steps", "2")
    assert status == 130
    assert "stopped after 2 of 2" in output
    status, output, _ = run_gtn("--outer-steps", "2", "--resume")
    assert (status, "test accuracy" in output) == (0, True)


def test_runs_is_a_file(run_gtn, tmp_path):
    (tmp_path / "runs").write_text("mine")
    status, _, error = run_gtn("--outer-steps", "1")
    assert (status, error.count("\n")) == (2, 1)
    assert (tmp_path / "runs").read_text() == "mine"


def test_a_half_written_last_line_of_the_log(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "step", "step": 1}\n{"event": "step", "step": 2}\n{"eve')
    assert [line["step"] for line in gtn.read_log(log)] == [1, 2]
    log.write_text("{}\n")
    with pytest.raises(gtn.InputError, match="a line without event or step"):
        gtn.read_log(log)


FLAT = """
import resource, torch, gtn
split = gtn.Split(torch.randn(50, 1, 28, 28), torch.randint(10, (50,)))
data = gtn.Data(split, split, split, torch.zeros(1), torch.ones(1))
teacher = gtn.Teacher(gtn.Config(inner_steps=2, batch_size=10, filters=(8, 8), generator_filters=4), (1, 28, 28))
for _ in range(2):
    gtn.evaluate(teacher, data, data.test, 500)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_evaluation_holds_no_graph():
    """Peak memory after 500 fresh learners and after 1,000, in a process of its own: one graph is about 1 MB."""
    result = subprocess.run([sys.executable, "-c", FLAT], capture_output=True, text=True, cwd=ROOT, timeout=120)
    first, second = map(int, result.stdout.split())
    assert second <= 1.05 * first


def test_readme_snippet_trains_a_fresh_network(tmp_path, monkeypatch):
    """The README's plain PyTorch on quick's curriculum, against --evaluate on the same teacher."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = [block for block in blocks if "torch.optim.SGD" in block]
    assert "gtn" not in re.sub(r'"[^"]*"', "", snippet)
    settings = ["filters=[24,48]", "test_learners=1", "validation_learners=1", "validate_every=1000"]
    run = shell("--outer-steps", 80, "--device", "cpu", "--set", *settings, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    data = gtn.load_data("glyphs", "", torch.device("cpu"))
    test = gtn.Split(*(x[::5] for x in data.test))
    teacher, _ = gtn.read_teacher(tmp_path / "runs" / "quick-learned-s0" / "teacher.pt")
    expected = gtn.summary(gtn.evaluate(teacher, data, test, 8))["mean"]
    monkeypatch.chdir(tmp_path)
    accuracies = []
    for seed in range(8):
        torch.manual_seed(seed)
        exec(snippet, names := {})
        with torch.no_grad():
            accuracies.append((names["network"](test.images).argmax(1) == test.labels).float().mean().item())
    assert gtn.summary(accuracies)["mean"] == pytest.approx(expected, abs=0.03)
    assert expected > 0.6


def test_first_batch_snippet_shuffles_all_but_the_first(tmp_path, run_gtn, monkeypatch, capsys):
    """The script of results/orders.md as it stands, with 3 learners instead of 100."""
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "results" / "orders.md").read_text(), re.DOTALL)[1]
    status, _, error = run_gtn("--outer-steps", "1", "--set", "name=paper", "inner_steps=6")
    assert status == 0, error
    original = gtn.read_teacher(tmp_path / "runs" / "paper-learned-s0" / "teacher.pt")[1]["curriculum"]
    met, train = [], gtn.train_learner
    monkeypatch.setattr(gtn, "train_learner", lambda *learner: met.append(learner[1]) or train(*learner))
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace("range(100)", "range(3)"), {})
    assert re.findall(r"^(\S+) \{'mean': ", capsys.readouterr().out, re.MULTILINE) == [*gtn.ORDERS[1:]]
    assert len(met) == 6
    for i, curriculum in enumerate(met):
        assert torch.equal(curriculum.images[0], original.images[0])
        assert torch.equal(curriculum.lr, original.lr)
        assert not torch.equal(curriculum.images, original.images)
        pieces = 1 if i < 3 else 2  # whole batches move, or single images
        both = (x.flatten(0, pieces - 1).flatten(1).tolist() for x in (curriculum.images, original.images))
        found, expected = (sorted(images) for images in both)
        assert found == expected

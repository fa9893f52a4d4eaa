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

import pytest
import torch
from conftest import ROOT, TINY, few_glyphs, shell, tiny

import gtn
import nas


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*.*")}


def comparable(folder):
    """What two runs must share bit for bit: the log without its times, the tensors, the test
    accuracies."""
    lines = [
        line for line in gtn.read(folder / "log.jsonl") if line["event"] in ("step", "validation")
    ]
    content, checkpoint = gtn.read(folder / "teacher.pt"), gtn.read(folder / "checkpoint.pt")
    moments = {
        f"{i} {key}": x for i, m in checkpoint["optimizer"]["state"].items() for key, x in m.items()
    }
    tensors = {**content["teacher"], **content["curriculum"], **moments}
    rows = gtn.read(folder / "evaluation.json")["rows"]
    times = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return times, rows, {key: x.numpy().tobytes() for key, x in tensors.items()}


def test_torchrun(tmp_path):
    """Two processes, stopped, refused, resumed: rank 0's files, the losses of one process with
    two learners."""
    settings = [
        "--device",
        "cpu",
        "--outer-steps",
        4,
        "--set",
        *TINY,
        "test_learners=1",
        "order=all-shuffled",
    ]
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
    ]
    stopped = tmp_path / "stopped.py"
    lines = ["import sys", f"sys.path[:0] = {str(ROOT)!r}, {str(ROOT / 'tests')!r}"]
    lines += ["import gtn, conftest", "gtn.outer_step = conftest.stopping(gtn.outer_step, 2)"]
    lines += ["sys.exit(gtn.run('gtn.py', gtn.main, sys.argv[1:]))"]
    stopped.write_text("\n".join(lines))
    calls = [(stopped, []), (ROOT / "gtn.py", []), (ROOT / "gtn.py", ["--resume"])]
    results = [
        shell(*settings, "--runs", tmp_path / "two", *more, script=[*torchrun, program])
        for program, more in calls
    ]
    assert [result.returncode for result in results] == [1, 1, 0], results
    assert results[-1].stdout.count("all-shuffled  ") == 1
    assert results[1].stderr.count("gtn.py: error: ") == 1, results[1].stderr
    assert shell(*settings, "learners_per_step=2", "--runs", tmp_path / "one").returncode == 0
    two, one = (
        gtn.read(tmp_path / name / "quick-learned-all-shuffled-s0" / "log.jsonl")
        for name in ("two", "one")
    )
    assert [line["event"] for line in two].count("resume") == 1
    assert (two[0]["environment"]["ranks"], one[0]["environment"]["ranks"]) == (2, 1)
    folder = tmp_path / "two" / "quick-learned-all-shuffled-s0"
    evaluation = folder / "evaluation.json"
    rows = gtn.read(evaluation)["rows"]
    evaluation.unlink()
    program = [*torchrun, ROOT / "gtn.py"]
    arguments = ["--evaluate", folder / "teacher.pt", "--learners", 3, "--device", "cpu"]
    assert shell(*arguments, script=program).returncode == 0
    shared = gtn.read(evaluation)["rows"]
    assert [row["n"] for row in shared] == [3, 3, 3, 1]
    assert [row["accuracies"][:1] for row in shared] == [row["accuracies"] for row in rows]
    losses = [[line["meta_loss"] for line in log if line["event"] == "step"] for log in (two, one)]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_folder_is_not_overwritten(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "2")[0] == 0
    before = contents(tmp_path)
    assert run_gtn("--outer-steps", "2", "--resume")[0] == 0  # there is nothing to do
    assert contents(tmp_path) == before
    status, _, error = run_gtn("--outer-steps", "2")
    assert (status, error.count("\n")) == (2, 1)
    assert "--resume" in error
    assert "--runs" in error
    status, _, error = run_gtn("--outer-steps", "3", "--resume")
    assert (status, error.count("\n")) == (2, 1)
    assert "a run with outer_steps=2, now 3" in error
    for missing in ("checkpoint.pt", "config.json"):  # a published run has no checkpoint
        path = tmp_path / "runs" / "quick-learned-s0" / missing
        path.rename(tmp_path / missing)
        for arguments in ([], ["--resume"]):
            status, _, error = run_gtn("--outer-steps", "2", *arguments)
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
    status, _, error = run_gtn("--outer-steps", "3", "--resume", "--set", "inner_lr=0.1")
    assert status == 2
    assert "a run with inner_lr=0.005, now 0.1: choose" in error


def test_a_run_from_another_teacher(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "2")[0] == 0
    source = tmp_path / "runs" / "quick-learned-s0" / "teacher.pt"
    init = ["--outer-steps", "2", "--init", source]
    assert run_gtn(*init, "--seed", "1", stop_after=0)[0] == 130
    phi = gtn.read(tmp_path / "runs" / "quick-learned-s1" / "teacher.pt")["teacher"]
    for name, x in gtn.read(source)["teacher"].items():
        assert torch.equal(phi[name], x), name
    status, _, error = run_gtn(*init, "--seed", "2", "--set", "inner_steps=4")
    assert (status, error.count("\n")) == (2, 1)
    assert f"--init {source}: must be of this variant and these sizes" in error
    gtn.write(source, gtn.read(source) | {"classes": 11})
    assert f"cannot read {source}" in run_gtn(*init, "--seed", "2")[2]
    pixels = [*init, "--variant", "pixels", "--seed", "2"]
    assert run_gtn("--outer-steps", "2", "--variant", "pixels")[0] == 0
    source = tmp_path / "runs" / "quick-pixels-s0" / "teacher.pt"
    assert not gtn.read(source)["curriculum"]["images"].requires_grad
    gtn.write(source, gtn.read(source) | {"classes": 11})  # the shapes of pixels fit
    pixels[pixels.index("--init") + 1] = source
    assert f"--init {source}: must be of this variant and these sizes" in run_gtn(*pixels)[2]
    assert not [*(tmp_path / "runs").glob("*-s2")]


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


def start(tmp_path, steps, *more):
    """A run in another process, whose learners meet batches in random order."""
    arguments = ["--outer-steps", steps, "--device", "cpu", "--runs", tmp_path, *more]
    arguments += ["--set", *TINY, "test_learners=1", "order=batch-shuffled"]
    command = [sys.executable, str(ROOT / "gtn.py"), *map(str, arguments)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # faster for networks as small as these
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored, and inherited so, in the background
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=one_thread
    )


def checkpoint_step(folder):
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else -1


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 60
    while checkpoint_step(folder) < step:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_ctrl_c_and_a_second_process(tmp_path):
    folder, process = tmp_path / "quick-learned-batch-shuffled-s0", start(tmp_path, 100_000)
    wait_for_step(folder, 2, process)
    second = start(tmp_path, 100_000, "--resume")
    _, error = second.communicate(timeout=60)
    assert second.returncode == 2
    assert error.splitlines()[-1].endswith("is in use by another process")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("gtn.py: interrupted")
    assert "--resume continues" in error
    assert checkpoint_step(folder) >= 2


def test_kill_9_at_random_moments(tmp_path, request):
    """Killed again and again, a run ends with the very teacher of the run that nobody disturbed."""
    kills, moment = request.config.getoption("--kills"), random.Random(0)
    steps, folder = 50 * kills, tmp_path / "killed" / "quick-learned-batch-shuffled-s0"
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
    """(what, bytes) of files that must be refused, made of a good one."""
    generator, loaded = random.Random(0), torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(5):
        yield "cut", content[: generator.randrange(1, len(content))]
    largest = max(loaded["teacher"].values(), key=torch.numel).numpy().tobytes()
    at = content.index(largest) + len(largest) // 2
    yield "a flipped bit", content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    yield "empty", b""
    yield "text", b"hello\n"
    yield "a foreign pickle", pickle.dumps({"config": {}})
    for classes in (1, 11, "10", 2 * 10**9):
        yield f"{classes} classes", packed(loaded | {"classes": classes})
    yield "another file's", packed(loaded | {"data_sha256": 64 * "0"})
    yield "no dict", packed([1, 2])
    yield "hostile pickle", pickle.dumps({"teacher": Hostile(tmp_path / "executed")})
    yield "hostile torch file", packed({"teacher": Hostile(tmp_path / "executed")})
    resumable = "optimizer" in loaded
    for key in ("step", "teacher", "config", "mean", *["log"] * resumable):
        yield f"without {key}", packed({k: v for k, v in loaded.items() if k != key})
    for value in (torch.zeros(7), "hello"):
        yield "another log_lr", packed(loaded | {"teacher": loaded["teacher"] | {"log_lr": value}})
    for step in (2.5, "1", -1, 4, 10**9):
        yield f"step {step}", packed(loaded | {"step": step})
    sizes = {
        "hidden_size": 2 * 10**9,
        "latent_size": 10**7,
        "inner_steps": 10**5,
        "filters": "many",
        "nosuch": 1,
    }
    for key, value in sizes.items():
        yield f"{key}={value}", packed(loaded | {"config": loaded["config"] | {key: value}})
    nan, curriculum = torch.tensor(torch.nan), loaded["curriculum"]
    for name, x in loaded["teacher"].items():
        yield f"nan {name}", packed(loaded | {"teacher": loaded["teacher"] | {name: x * nan}})
    for x in (torch.ones(2), nan.repeat(1), 0.002 + loaded["std"]):  # the last: of other images
        yield f"std {x}", packed(loaded | {"std": x})
    images, labels = curriculum["images"], curriculum["labels"]
    changes = [
        ("images", x)
        for x in (images.double(), images.long(), images.cfloat(), images[..., :27], images * nan)
    ]
    changes += [("labels", x) for x in (labels - 1, labels + 5, labels.float(), labels[:2])]
    for key, x in [*changes, ("lr", torch.full((3,), torch.nan)), ("momentum", torch.ones(4))]:
        yield f"another {key}", packed(loaded | {"curriculum": curriculum | {key: x}})


def test_damaged_files_are_refused_in_one_line(run_gtn, tmp_path):
    assert run_gtn("--outer-steps", "3", stop_after=1)[0] == 130
    folder = tmp_path / "runs" / "quick-learned-s0"
    commands = {
        "teacher.pt": ["--evaluate", folder / "teacher.pt", "--learners", "1"],
        "checkpoint.pt": ["--outer-steps", "3", "--resume"],
    }
    for name, command in commands.items():
        good, seen = (folder / name).read_bytes(), 0
        for what, content in damages(good, tmp_path):
            (folder / name).write_bytes(content)
            (tmp_path / "executed").unlink(missing_ok=True)
            others = contents(folder)
            status, _, error = run_gtn(*command)
            assert (status, error.count("\n")) == (2, 1), (name, what, error)
            assert name in error, (name, what, error)
            assert not (tmp_path / "executed").exists(), what
            assert contents(folder) == others, what
            seen += 1
        assert seen > 20, seen
        (folder / name).write_bytes(good)
        assert run_gtn(*command)[0] == 0
    pickle.loads(pickle.dumps(Hostile(tmp_path / "executed"))).close()  # the check of the check
    assert (tmp_path / "executed").exists()


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


def test_runs_that_cannot_be_written(run_gtn, tmp_path):
    (tmp_path / "runs").write_text("mine")
    status, _, error = run_gtn("--outer-steps", "1")
    assert (status, error.splitlines()[-1][:14]) == (2, "gtn.py: error:")
    assert (tmp_path / "runs").read_text() == "mine"


@pytest.mark.parametrize(("dataset", "steps"), [("cifar10", 3000), ("fashion", 1000)])
def test_a_published_curriculum_is_a_teacher_without_a_generator(
    run_gtn, tmp_path, monkeypatch, dataset, steps
):
    """Its pixels, rates and momenta are the curriculum; a damaged one and another data set's are
    refused."""
    product = ROOT / "results" / f"{dataset}.pt"
    assert product.stat().st_size < 8 * 10**6
    teacher, content = gtn.read_teacher(product)
    curriculum = teacher(None)
    for name, x in content["curriculum"]._asdict().items():
        torch.testing.assert_close(getattr(curriculum, name), x, rtol=1e-6, atol=0)
    assert (teacher.config.dataset, content["step"]) == (dataset, steps)
    assert content["made_by"].startswith(f"variant learned, {steps:,} outer steps")
    damaged = tmp_path / f"{dataset}.pt"
    damaged.write_bytes(product.read_bytes()[:-100])
    monkeypatch.setattr(gtn, "load_data", lambda *_: few_glyphs())
    for path, message in ((damaged, f"cannot read {damaged}"), (product, "other images than this")):
        status, output, error = run_gtn("--evaluate", path)
        assert (status, output, error.count("\n")) == (2, "", 1)
        assert message in error


def test_readme_quotes_the_definition():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    signature, _, body = blocks[0].partition("\n")
    source = (ROOT / "gtn.py").read_text()
    assert signature in source
    assert body in source


def test_readme_s_residual_network_is_a_learner(run_gtn, tmp_path, monkeypatch):
    """The README's own network: meta-gradients agree, a teacher learns, files and sizes follow."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = [block for block in blocks if "def make_learner(" in block]
    names = dict(vars(gtn))
    exec(snippet, names)
    monkeypatch.setattr(gtn, "make_learner", names["make_learner"])
    gtn.blueprint.cache_clear()
    try:
        _, data, theta, architecture, batches = tiny(filters=(3,))
        teacher = gtn.Teacher(gtn.Config(inner_steps=5, batch_size=4), (1, 8, 8), 10).double()
        curriculum = teacher(data)
        results = [
            method(theta, curriculum, architecture, batches)
            for method in (gtn.meta_gradient, gtn.meta_gradient_flat)
        ]
        for full, flat in zip(*results, strict=True):
            torch.testing.assert_close(flat, full, rtol=1e-9, atol=1e-12)
        settings = [*TINY, "filters=[8]", "inner_steps=8", "batch_size=20", "meta_batch_size=64"]
        status, _, error = run_gtn("--outer-steps", "25", settings=settings)
        assert status == 0, error
        lines = gtn.read(tmp_path / "runs" / "quick-learned-s0" / "log.jsonl")
        losses = [line["meta_loss"] for line in lines if line["event"] == "step"]
        assert losses[-1] < 0.9 * losses[0]
        parameters = nas.sizes(architecture, (1, 8, 8))["parameters"]
        assert parameters == len(theta) == 3 * 9 + 3 * 3 + 2 * (9 * 9 + 3 * 3) + 10 * 3 * 4 + 10
    finally:
        gtn.blueprint.cache_clear()


def test_readme_snippet_trains_a_fresh_network(tmp_path, monkeypatch, capsys):
    """The README's plain PyTorch on quick's curriculum, against gtn's own fresh learners."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = [block for block in blocks if "torch.optim.SGD" in block]
    assert "gtn" not in re.sub(r'"[^"]*"', "", snippet.partition("\nimport gtn")[0])
    settings = [
        "filters=[24,48]",
        "test_learners=1",
        "validation_learners=1",
        "validate_every=1000",
    ]
    run = shell("--outer-steps", 60, "--device", "cpu", "--set", *settings, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    data = few_glyphs()
    teacher, _ = gtn.read_teacher(tmp_path / "runs" / "quick-learned-s0" / "teacher.pt")
    expected = gtn.evaluate(teacher, data, data.test, 8)["mean"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gtn, "load_data", lambda *_: data)
    for seed in range(8):
        torch.manual_seed(seed)
        exec(snippet, {})
    accuracies = [
        float(x) for x in re.findall(r"^accuracy (.*)", capsys.readouterr().out, re.MULTILINE)
    ]
    assert gtn.summary(accuracies)["mean"] == pytest.approx(expected, abs=0.05)
    assert expected > 0.4

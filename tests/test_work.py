"""Nobody's work is lost: older runs, damaged metrics, other processes, outputs that fail, signals,
and crashes."""

import errno
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import engine.loop
from engine.checkpoint import load_checkpoint, write_whole
from engine.config import TrainConfig, UserError, command_line
from engine.corpus import Corpus
from engine.train import Run, Stopped
from engine.terminal import LOCKS, Output, lock, run_script, unlock_all
from tests.helpers import (
    ROOT,
    copy_of,
    load,
    make_quick,
    refuse,
    script,
    snapshot,
    train,
    training_options,
)
from tests.test_engine import (
    Killed,
    ToyCorpus,
    equal_states,
    sum_of_weights,
    toy_run,
)
from textldm import GPT

# ---- A toy that learns
#
# Evaluations are of the steps 2, 4 and 5. The second of them is the best.

LOSSES = {2: 2.0, 4: 1.0, 5: 3.0}
SCHEDULE = dict(max_steps=5, eval_interval=2)


def learn(run, at_step=None, at_evaluation=None):
    """A loop that changes the weights by random numbers. Calls at_step and at_evaluation with the
    number of the step."""

    def evaluate():
        if at_evaluation is not None:
            at_evaluation(run.step)
        return dict(loss=LOSSES[run.step]), f"judged after step {run.step}"

    (optimizer,) = [part for part in run.parts.values() if part is not run.model]
    for step in run.steps(evaluate):
        if at_step is not None:
            at_step(step)
        for _, share, generator in run.micro_batches(ToyCorpus(), sum_of_weights):
            run.add(dict(loss=torch.rand((), generator=generator)), share)
            for p in run.model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        run.end_step(torch.tensor(2.0), 0.1)


def learnt(out, **options):
    """The folder of a toy run, new or resumed, that nothing disturbs."""
    torch.manual_seed(0)
    learn(toy_run(out, **SCHEDULE, **options))
    return out


def results(out):
    """What a run leaves: two checkpoints and the metrics."""
    last = load_checkpoint(out / "toy_last.pt", "toy", "")
    kept = load_checkpoint(out / "toy.pt", "toy", "")
    return dict(last), dict(kept), (out / "toy.jsonl").read_text()


def assert_same(out, expected):
    found = results(out)
    assert found[2] == expected[2]
    for a, b in zip(expected[:2], found[:2]):
        for part in a:
            assert equal_states(a[part], b[part]), part


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run leaves that nothing disturbs."""
    return results(learnt(tmp_path_factory.mktemp("undisturbed")))


# ---- The same command again

OLDER = [["toy_last.pt"], ["toy.pt"], ["toy_last.pt", "toy.pt"]]


@pytest.mark.parametrize("names", OLDER)
def test_an_older_run_is_not_replaced(tmp_path, names):
    learnt(tmp_path)
    unlock_all()
    for name in {"toy_last.pt", "toy.pt"} - set(names):
        (tmp_path / name).unlink()
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as e:
        learnt(tmp_path)
    for words in ("holds an earlier run", "--resume", "another --out", "--overwrite"):
        assert words in str(e.value)
    assert snapshot(tmp_path) == before


def test_a_script_does_not_replace_an_older_run_and_says_so_in_one_line(home, tmp_path, capsys):
    home = copy_of(home, tmp_path)
    refuse(capsys, "--overwrite", "baselines/gpt.py", *training_options(home), keep=home)
    said = capsys.readouterr().out + capsys.readouterr().err
    assert "Traceback" not in said
    train(home, "baselines/gpt.py", "--overwrite", "--seed=2", steps=1)
    assert load_checkpoint(home / "out/gpt_last.pt", "gpt", "")["seed"] == 2
    assert load_checkpoint(home / "out/gpt.pt", "gpt", "")["step"] == 1
    assert len((home / "out/gpt.jsonl").read_text().splitlines()) == 2


def test_the_runs_of_other_stages_are_not_in_the_way(tmp_path):
    (tmp_path / "vae.pt").touch()
    (tmp_path / "dit_last.pt").touch()
    learnt(tmp_path)


def test_overwrite_replaces(tmp_path, undisturbed):
    learnt(tmp_path, seed=2)
    learnt(tmp_path, overwrite=True)
    assert_same(tmp_path, undisturbed)


def fail(step):
    raise Killed


def test_a_run_that_did_nothing_is_replaced_and_one_that_did_is_not(tmp_path):
    """A user lowers --batch_size after the first step failed, and gives the command again."""
    with pytest.raises(Killed):
        learn(toy_run(tmp_path, **SCHEDULE), fail)
    assert load_checkpoint(tmp_path / "toy_last.pt", "toy", "")["step"] == 0
    learnt(tmp_path)

    def fail_later(step):
        if step == 1:
            raise Killed

    with pytest.raises(Killed):
        learn(toy_run(tmp_path, **SCHEDULE, overwrite=True), fail_later)
    (tmp_path / "toy.pt").unlink()
    assert load_checkpoint(tmp_path / "toy_last.pt", "toy", "")["step"] == 0
    with pytest.raises(UserError, match="holds an earlier run"):
        learnt(tmp_path)


def test_a_resumed_run_with_nothing_to_do_says_so_and_changes_no_checkpoint(tmp_path, capsys):
    learnt(tmp_path)
    before = snapshot(tmp_path)
    capsys.readouterr()
    learnt(tmp_path, resume=True)
    assert snapshot(tmp_path) == before
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "toy: all 5 steps are done; a larger --max_steps goes on"
    assert not any("wrote" in line or "warning" in line for line in said)


# ---- Metrics


def drop(path):
    path.unlink()


def empty(path):
    path.write_text("")


def cut_in_a_line(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_between_lines(path):
    path.write_text("".join(path.read_text().splitlines(True)[:2]))


def nonsense(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def spoil_a_line(line):
    def spoil(path):
        lines = path.read_text().splitlines(True)
        path.write_text("".join([lines[0], line, *lines[2:]]))

    return spoil


DAMAGES = dict(
    missing=drop,
    empty=empty,
    cut_in_a_line=cut_in_a_line,
    cut_between_lines=cut_between_lines,
    nonsense=nonsense,
    bad_line=spoil_a_line("{{}\n"),
    no_step=spoil_a_line('{"loss": 1}\n'),
    no_dict=spoil_a_line("[1, 2]\n"),
    no_number=spoil_a_line('{"step": "x"}\n'),
    deep=spoil_a_line("[" * 100_000 + "\n"),
)


def stop_in_step(number):
    def stop(step):
        if step == number - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def stopped(out, number):
    """The folder of a toy run that a signal ends after a step."""
    torch.manual_seed(0)
    with pytest.raises(SystemExit):
        learn(toy_run(out, **SCHEDULE), stop_in_step(number))
    return out


@pytest.mark.parametrize("how", DAMAGES)
def test_a_run_whose_metrics_are_damaged_goes_on_to_the_same_bits(
    tmp_path, undisturbed, how, capsys
):
    stopped(tmp_path, 3)
    DAMAGES[how](tmp_path / "toy.jsonl")
    capsys.readouterr()
    learnt(tmp_path, resume=True)
    assert "toy.jsonl has lost metrics; the run goes on without them" in capsys.readouterr().out
    last, kept, metrics = results(tmp_path)
    assert equal_states(last, undisturbed[0])
    assert equal_states(kept, undisturbed[1])
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert [line["step"] for line in lines if "norm" in line][-2:] == [4, 5]
    assert set(metrics.splitlines()) < set(undisturbed[2].splitlines())


MORE = ['{"step": 4, "loss"', '{"step": 4, "loss": 1}\n', "\n\n", ""]


@pytest.mark.parametrize("more", MORE)
def test_metrics_that_lost_nothing_are_no_reason_to_warn(tmp_path, undisturbed, more, capsys):
    stopped(tmp_path, 3)
    with open(tmp_path / "toy.jsonl", "a") as f:
        f.write(more)
    learnt(tmp_path, resume=True)
    assert "warning" not in capsys.readouterr().out
    assert_same(tmp_path, undisturbed)


def test_a_run_that_has_no_metrics_yet_is_no_reason_to_warn(tmp_path, capsys):
    run = toy_run(tmp_path, **SCHEDULE)
    run.cfg.log_interval = 100
    with pytest.raises(SystemExit):
        learn(run, stop_in_step(1))
    assert (tmp_path / "toy.jsonl").read_text() == ""
    learnt(tmp_path, resume=True)
    assert "warning" not in capsys.readouterr().out


# ---- Two processes in a folder


@pytest.fixture
def other_process(tmp_path):
    """The id of a process that holds the lock of tmp_path."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        lock(tmp_path)
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_is_one_processs_until_it_ends(tmp_path, other_process):
    before = snapshot(tmp_path)
    for options in (dict(), dict(resume=True), dict(overwrite=True)):
        with pytest.raises(UserError, match="another process writes to .*another --out"):
            learnt(tmp_path, **options)
    assert snapshot(tmp_path) == before
    os.kill(other_process, signal.SIGKILL)
    os.waitid(os.P_PID, other_process, os.WEXITED | os.WNOWAIT)
    learnt(tmp_path)


def can_lock(folder):
    """Whether a new process gets the lock of a folder."""
    pid = os.fork()
    if not pid:
        LOCKS.clear()  # those of this process
        code = 1
        try:
            lock(folder)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_script_holds_its_folder_until_it_ends_and_however_it_ends(tmp_path):
    def main():
        learn(toy_run(tmp_path, **SCHEDULE, overwrite=True), look)

    def look(step):
        assert not can_lock(tmp_path)
        assert not can_lock(tmp_path / ".." / tmp_path.name)
        lock(tmp_path / ".." / tmp_path.name)  # this process has it, by whatever name

    def main_that_fails():
        learn(toy_run(tmp_path, **SCHEDULE, overwrite=True), fail)

    run_script(main)
    assert can_lock(tmp_path)
    with pytest.raises(Killed):
        run_script(main_that_fails)
    assert can_lock(tmp_path)


def test_where_a_drive_has_no_locks_there_is_none(tmp_path, monkeypatch):
    def flock(*given):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    learnt(tmp_path)


# ---- Outputs that fail

SIGNS = "café ☕ 日本 \ud800 ✓"


class Failing(io.StringIO):
    """A stream that fails at its second write, or at each flush."""

    def __init__(self, error, at_flush=False):
        super().__init__()
        self.error, self.at_flush = error, at_flush
        self.writes = 0

    def write(self, text):
        self.writes += 1
        if self.writes > 1 and not self.at_flush:
            raise self.error
        return super().write(text)

    def flush(self):
        if self.at_flush:
            raise self.error


FULL = OSError(errno.ENOSPC, "No space left on device")
STREAMS = dict(
    broken=lambda: Failing(BrokenPipeError(errno.EPIPE, "Broken pipe")),
    broken_at_flush=lambda: Failing(BrokenPipeError(errno.EPIPE, "Broken pipe"), True),
    full=lambda: Failing(FULL),
    full_at_flush=lambda: Failing(FULL, True),
    no_terminal=lambda: Failing(OSError(errno.EIO, "Input/output error")),
    closed=lambda: Failing(ValueError("I/O operation on closed file.")),
    none=lambda: None,
    ascii=lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    latin_1=lambda: io.TextIOWrapper(io.BytesIO(), encoding="latin-1"),
    cp1252=lambda: io.TextIOWrapper(io.BytesIO(), encoding="cp1252"),
    utf_8=lambda: io.TextIOWrapper(io.BytesIO(), encoding="utf-8"),
)


@pytest.mark.parametrize("how", STREAMS)
@pytest.mark.parametrize("which", ["stdout", "stderr"])
def test_a_run_goes_on_whatever_its_output_does(
    tmp_path, undisturbed, how, which, monkeypatch, capsys
):
    stream = STREAMS[how]()
    monkeypatch.setattr(sys, which, stream)

    def say(step):
        for _ in range(3):
            print(SIGNS, file=getattr(sys, which))

    def main():
        torch.manual_seed(0)
        learn(toy_run(tmp_path, **SCHEDULE), say, say)

    run_script(main)
    assert getattr(sys, which) is stream
    assert_same(tmp_path, undisturbed)
    warnings = capsys.readouterr().err.count("warning: output is lost")
    is_told = which == "stdout" and how in ("full", "full_at_flush", "no_terminal")
    assert warnings == is_told
    if how in ("ascii", "latin_1"):
        assert b" ? ?? ? ?\n" in stream.buffer.getvalue()


def test_what_an_output_does_not_have_is_a_question_mark():
    raw = io.BytesIO()
    output = Output(io.TextIOWrapper(raw, encoding="ascii"))
    print("é", "x", file=output, flush=True)
    assert raw.getvalue() == b"? x\n"


def test_what_is_dropped_may_have_any_sign():
    output = Output(Failing(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    print("a line", file=output)
    null = output.stream
    assert null.name == os.devnull
    print(SIGNS, file=output, flush=True)
    assert output.stream is null


def test_an_output_has_what_its_stream_has():
    """tqdm and others look at it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    output = Output(stream)
    assert output.encoding == "latin-1"
    assert not output.isatty()
    assert output.write("abc") == 3


# Starts scripts as a shell does, and takes little time: the processes are copies of one that has
# imported torch. Each ends as Python ends, without the second that it takes to tidy up.
COPIES = """
import io
import json
import os
import runpy
import sys
import traceback

import torch._dynamo  # what an optimizer imports, and takes seconds

import baselines.gpt
import sample
from engine.corpus import Corpus
from tests.helpers import few_fixed_batches

Corpus.fixed_batches = few_fixed_batches


def open_output(where, log):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    if where == "closed":
        os.close(1)
        sys.stdout = sys.__stdout__ = None
        return
    if where == "broken":
        reader, output = os.pipe()
        os.close(reader)
    else:
        path = "/dev/full" if where == "full" else f"{log}.out"
        output = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.close(output)
    encoding = "ascii" if where == "ascii" else "utf-8"
    sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding, closefd=False)


def run(script, arguments):
    sys.argv = [script, *arguments]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except Exception as e:
        print("Exception ignored:", e, file=sys.stderr)
        code = 120
    sys.stderr.flush()
    os._exit(code)


codes = []
for script, arguments, where, log in json.load(sys.stdin):
    pid = os.fork()
    if pid == 0:
        open_output(where, log)
        run(script, arguments)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""
PLACES = ["good", "broken", "full", "closed", "ascii"]


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))


@pytest.fixture(scope="module")
def copies(home, tmp_path_factory):
    """For each place of stdout the folder of a run, and (script, place) -> exit code and stderr."""
    folder = tmp_path_factory.mktemp("copies")
    jobs = []
    for place in PLACES:
        options = [*training_options(home, 2), "--block_size=16", "--out", folder / place]
        jobs.append(("baselines/gpt.py", options, place, folder / f"train_{place}"))
        options = ["--model", home / "out/gpt.pt", "--prompt=café ☕", "--n=3", "--length=4"]
        jobs.append(("sample.py", options, place, folder / f"sample_{place}"))
    done = subprocess.run(
        [sys.executable, "-c", COPIES],
        input=json.dumps(jobs, default=str),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    endings = {}
    for (path, _, place, log), code in zip(jobs, json.loads(done.stdout)):
        endings[path, place] = (code, log.read_text())
    return folder, endings


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("path", ["baselines/gpt.py", "sample.py"])
def test_a_script_ends_well_wherever_its_output_goes(copies, path, place):
    code, error = copies[1][path, place]
    assert code == 0, error
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    assert error.count("warning: output is lost") == (place == "full")


@pytest.mark.parametrize("place", PLACES)
def test_checkpoints_are_the_same_wherever_the_output_goes(copies, place):
    folder = copies[0]
    for name in ("gpt.pt", "gpt_last.pt", "gpt.jsonl"):
        assert (folder / place / name).read_bytes() == (folder / "good" / name).read_bytes()


def test_the_output_of_a_script_is_whole_where_it_can_be(copies):
    folder = copies[0]
    said = (folder / "train_good.out").read_text(encoding="utf-8").splitlines()
    assert said[0].startswith("gpt: 0.0M parameters")
    assert said[-1].startswith("gpt: wrote ")
    texts = (folder / "sample_good.out").read_text(encoding="utf-8")
    assert texts.count("café ☕|") == 3
    in_ascii = (folder / "sample_ascii.out").read_text(encoding="ascii")
    assert in_ascii.count("caf? ?|") == 3
    assert not (folder / "train_closed.out").exists()


SHELLS = [
    ("{python} baselines/gpt.py {train} | head -n 1", "gpt: 0.0M parameters"),
    ("{python} sample.py {sample} >&-", ""),
]


@pytest.mark.parametrize("command, expected", SHELLS)
def test_a_shell_closes_an_output(home, tmp_path, command, expected):
    options = [*training_options(home, steps=2), "--block_size=16", "--out", tmp_path]
    command = command.format(
        python=sys.executable,
        train=" ".join(map(str, options)),
        sample=f"--model={home}/out/gpt.pt --prompt=ab --length=2",
    )
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    for words in ("Traceback", "Exception ignored", "warning", "error"):
        assert words not in done.stderr
    assert done.stdout.startswith(expected)
    if expected:
        assert load_checkpoint(tmp_path / "gpt_last.pt", "gpt", "")["step"] == 2
        assert len(done.stdout.splitlines()) == 1


# ---- Files that are no files

CONTENTS = ["a text ☕\n", dict(kind="toy", x=torch.ones(2))]


def written(path, content):
    """Whether a file has this content."""
    if isinstance(content, str):
        return path.read_text(encoding="utf-8") == content
    return equal_states(load_checkpoint(path, "toy", ""), content)


@pytest.mark.parametrize("content", CONTENTS, ids=["text", "checkpoint"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path, content, is_there):
    """Through two links, of which one is relative."""
    (tmp_path / "far").mkdir()
    target = tmp_path / "far/target"
    if is_there:
        target.write_text("what was there")
    (tmp_path / "far/near").symlink_to("target")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far/near")
    write_whole(link, content)
    assert link.is_symlink()
    assert (tmp_path / "far/near").is_symlink()
    assert not target.is_symlink()
    assert written(target, content)
    assert len(list(tmp_path.rglob("*"))) == 4, "nothing else is left"


def test_a_link_to_nowhere_is_refused(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "none/target")
    with pytest.raises(UserError, match="cannot write"):
        write_whole(link, "text")
    assert link.is_symlink()


def test_a_new_file_is_whole_or_not_there(tmp_path, monkeypatch):
    def save_a_half(content, file):
        file.write(b"half")
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", save_a_half)
    with pytest.raises(UserError, match="cannot write .*No space"):
        write_whole(tmp_path / "new.pt", CONTENTS[1])
    assert list(tmp_path.iterdir()) == []


def read_in_background(path):
    """A list that fills with the content of a pipe, and the thread that reads it."""
    found = []
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    thread.start()
    return found, thread


@pytest.mark.parametrize("content", CONTENTS, ids=["text", "checkpoint"])
def test_a_pipe_is_written_to(tmp_path, content):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found, thread = read_in_background(pipe)
    write_whole(pipe, content)
    thread.join(5)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
    (tmp_path / "copy").write_bytes(found[0])
    assert written(tmp_path / "copy", content)


def make_device(path, minor):
    """A device as /dev/null (3) or /dev/full (7) is, of this test alone."""
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, minor))
        open(path, "wb").close()
    except OSError:
        pytest.skip("this user may not make devices here")


def test_a_device_is_written_to(tmp_path):
    make_device(tmp_path / "null", 3)
    for content in CONTENTS:
        write_whole(tmp_path / "null", content)
    assert (tmp_path / "null").is_char_device()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_device_is_refused(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    for content in CONTENTS:
        with pytest.raises(UserError, match="cannot write .*full"):
            write_whole(tmp_path / "full", content)
    assert os.path.exists("/dev/full")
    assert len(list(tmp_path.iterdir())) == 1


def test_samples_go_through_pipes_and_links(home, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    where = ["--model", home / "out/gpt.pt", "--prompt=ab", "--length=2", "--device=cpu"]
    found, thread = read_in_background(tmp_path / "pipe")
    script("sample.py", *where, f"--output={tmp_path / 'pipe'}")
    thread.join(5)
    script("sample.py", *where, f"--output={tmp_path / 'link'}")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == found[0]
    assert json.loads(found[0])["prompt"] == "ab"


# ---- Signals

ALL_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send_at(number, *signals):
    """Sends signals when it is called with this number, and expects the first to end it."""

    def send(step):
        if step != number:
            return
        try:
            os.kill(os.getpid(), signals[0])
            raise AssertionError("the evaluation goes on")
        finally:
            for other in signals[1:]:
                os.kill(os.getpid(), other)

    return send


def resume_stopped(out, undisturbed, at_step, at_evaluation, expected):
    torch.manual_seed(0)
    run = toy_run(out, **SCHEDULE)
    words = f"toy: stopped after step {expected}; the same command with --resume goes on from there"
    with pytest.raises(SystemExit, match=words):
        learn(run, at_step, at_evaluation)
    assert load_checkpoint(out / "toy_last.pt", "toy", "")["step"] == expected
    learnt(out, resume=True)
    assert_same(out, undisturbed)


@pytest.mark.parametrize("number", ALL_SIGNALS)
@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_signal_in_a_step_loses_nothing(tmp_path, undisturbed, number, step):
    def send(now):
        if now == step - 1:
            os.kill(os.getpid(), number)

    resume_stopped(tmp_path, undisturbed, send, None, step)


@pytest.mark.parametrize("number", ALL_SIGNALS)
@pytest.mark.parametrize("step", LOSSES)
def test_a_signal_ends_an_evaluation_and_loses_nothing(tmp_path, undisturbed, number, step):
    resume_stopped(tmp_path, undisturbed, None, send_at(step, number), step)


@pytest.mark.parametrize("step", LOSSES)
def test_signals_that_follow_each_other_are_as_one(tmp_path, undisturbed, step):
    """Those after the first come while the evaluation ends."""
    send = send_at(step, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM)
    resume_stopped(tmp_path, undisturbed, None, send, step)


def test_only_the_first_signal_raises(tmp_path):
    """The next one may come where nothing catches it, between the evaluation and the loop."""
    run = toy_run(tmp_path, **SCHEDULE)
    run.is_evaluating = True
    with pytest.raises(Stopped):
        run.on_signal(signal.SIGTERM, None)
    run.on_signal(signal.SIGTERM, None)
    assert len(run.signals) == 2


def test_a_signal_while_a_run_is_saved_before_an_evaluation_ends_it_there(tmp_path, undisturbed):
    class SlowRun(Run):
        def save(self):
            super().save()
            if self.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    def refuse_last(step):
        assert step < 5, "no evaluation begins after a signal"

    torch.manual_seed(0)
    run = toy_run(tmp_path, **SCHEDULE)
    run.__class__ = SlowRun
    with pytest.raises(SystemExit, match="stopped after step 5"):
        learn(run, None, refuse_last)
    learnt(tmp_path, resume=True)
    assert_same(tmp_path, undisturbed)


def test_a_signal_after_the_last_evaluation_does_not_undo_it(tmp_path, undisturbed, capsys):
    class LateRun(Run):
        def write(self, **line):
            super().write(**line)
            if self.step == 5 and "val" in line:
                os.kill(os.getpid(), signal.SIGTERM)

    torch.manual_seed(0)
    run = toy_run(tmp_path, **SCHEDULE)
    run.__class__ = LateRun
    learn(run)
    assert "is of step 4" in capsys.readouterr().out.splitlines()[-1]
    assert_same(tmp_path, undisturbed)


def test_nothing_is_written_after_an_evaluation_that_a_signal_ended(tmp_path):
    """It may have left the model between two states."""

    def spoil(step):
        for p in run.model.parameters():
            p.data.fill_(math.nan)
        os.kill(os.getpid(), signal.SIGTERM)

    run = toy_run(tmp_path, **SCHEDULE)
    with pytest.raises(SystemExit):
        learn(run, None, spoil)
    for tensor in load_checkpoint(tmp_path / "toy_last.pt", "toy", "")["model"].values():
        assert tensor.isfinite().all()


def test_what_catches_all_errors_does_not_catch_a_signal(tmp_path):
    def catch(step):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pass
        raise AssertionError("the evaluation goes on")

    with pytest.raises(SystemExit, match="stopped after step 2"):
        learn(toy_run(tmp_path, **SCHEDULE), None, catch)


def test_a_signal_that_nohup_ignores_is_ignored(tmp_path, undisturbed):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def send(step):
        os.kill(os.getpid(), signal.SIGHUP)

    torch.manual_seed(0)
    learn(toy_run(tmp_path, **SCHEDULE), send, send)
    assert_same(tmp_path, undisturbed)


class FirstProcess(Run):
    """The first of several processes. Remembers what it was told of all."""

    sums = []

    def sum_of_all(self, x):
        self.sums.append(x)
        return x


class SecondProcess(Run):
    """Another one, which is told the same."""

    def sum_of_all(self, x):
        return FirstProcess.sums.pop(0)


@pytest.mark.parametrize("step", [None, *LOSSES])
def test_all_processes_wait_for_each_other_equally_often(tmp_path, monkeypatch, capsys, step):
    """If one waits once more, it waits forever. A signal strikes in the first one's evaluation."""
    ends = []
    FirstProcess.sums.clear()
    send = None
    if step is not None:
        send = send_at(step, signal.SIGTERM)
    for rank, run_type in enumerate((FirstProcess, SecondProcess)):
        monkeypatch.setattr("tests.test_engine.Run", run_type)
        monkeypatch.setenv("RANK", str(rank))
        if not rank:
            assert not FirstProcess.sums
        run = toy_run(tmp_path, **SCHEDULE, overwrite=True)
        if not rank:
            assert len(FirstProcess.sums) == 1, "no process writes before each has looked"
            assert not list(tmp_path.iterdir())
        try:
            learn(run, None, None if rank else send)
        except SystemExit:
            pass
        ends.append(run.step)
    assert FirstProcess.sums == []
    assert ends[0] == ends[1] == (step or 5)
    assert capsys.readouterr().out.count("toy: wrote") == (step is None)


# ---- Crashes


class Crash:
    """A process that ends in the n-th write of a file, counted from 0, before it or after it."""

    def __init__(self, n, is_after):
        self.left, self.is_after = n, is_after

    def __call__(self, path, content):
        self.left -= 1
        if self.left < 0 and not self.is_after:
            raise Killed
        write_whole(path, content)
        if self.left < 0:
            raise Killed


@pytest.mark.parametrize("is_after", [False, True])
def test_a_crash_at_any_write_loses_nothing_that_was_saved(
    tmp_path, undisturbed, monkeypatch, is_after
):
    """Writes are of the start, and before and after each evaluation."""
    n = 0
    while True:
        out = tmp_path / str(n)
        torch.manual_seed(0)
        try:
            with monkeypatch.context() as m:
                m.setattr(engine.loop, "write_whole", Crash(n, is_after))
                learn(toy_run(out, **SCHEDULE))
            break
        except Killed:
            pass
        learnt(out, resume=(out / "toy_last.pt").exists())
        assert_same(out, undisturbed)
        n += 1
    assert n == 9


@pytest.mark.parametrize("step", LOSSES)
def test_a_crash_in_an_evaluation_loses_nothing(tmp_path, undisturbed, step):
    """The resumed run evaluates before its first step."""

    def crash(now):
        if now == step:
            raise Killed

    torch.manual_seed(0)
    with pytest.raises(Killed):
        learn(toy_run(tmp_path, **SCHEDULE), None, crash)
    events = []
    run = toy_run(tmp_path, **SCHEDULE, resume=True)
    learn(run, events.append, lambda step: events.append(f"evaluate {step}"))
    assert events[0] == f"evaluate {step}"
    assert_same(tmp_path, undisturbed)


# ---- Errors are one line


def compile_for_nobody(model):
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    return torch._dynamo.optimize(backend)(model)


def use_a_broken_compiler():
    compile_for_nobody(torch.nn.Linear(2, 2))(torch.ones(2, 2))


def allocate_with_torch():
    torch.empty(1 << 55)


def allocate_with_numpy():
    np.empty(1 << 50)


def open_nothing():
    open("/none/such")


def raises(error):
    def main():
        raise error

    return main


ERRORS = [
    (allocate_with_torch, "out of memory"),
    (allocate_with_numpy, "out of memory"),
    (raises(MemoryError()), "out of memory (MemoryError)"),
    (raises(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")), "out of memory"),
    (raises(RuntimeError("MPS backend out of memory (a: 1)")), "out of memory"),
    (raises(RuntimeError("DefaultCPUAllocator: not enough memory: you")), "out of memory"),
    (use_a_broken_compiler, "--compile does not work here"),
    (open_nothing, "No such file or directory: '/none/such'"),
    (raises(PermissionError(errno.EACCES, "Permission denied", "out")), "Permission denied"),
    (raises(FULL), "No space left on device"),
    (raises(OSError("the device is gone")), "the device is gone"),
    (raises(UserError("a sentence")), "a sentence"),
    (raises(KeyboardInterrupt()), "stopped"),
]


@pytest.mark.parametrize("main, words", ERRORS)
def test_what_a_user_can_mend_is_one_line_and_code_2(main, words, capsys):
    with pytest.raises(SystemExit) as e:
        run_script(main)
    assert e.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), RuntimeError("shapes differ")])
def test_what_a_user_cannot_mend_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error)):
        run_script(raises(error))


def test_after_a_run_had_no_memory_the_same_command_with_less_starts(
    home, tmp_path, monkeypatch, capsys
):
    make_quick(monkeypatch)
    options = [*training_options(home, steps=2), "--out", tmp_path]
    with monkeypatch.context() as m:
        m.setattr(GPT, "forward", lambda *given: np.empty(1 << 50))
        refuse(capsys, "table in the README", "baselines/gpt.py", *options)
    assert (tmp_path / "gpt_last.pt").exists()
    script("baselines/gpt.py", *options, "--batch_size=2")
    assert load_checkpoint(tmp_path / "gpt_last.pt", "gpt", "")["step"] == 2


# ---- Folders


def test_nanogpts_folder_with_a_vocabulary_of_its_own_is_refused(tmp_path):
    """Its tokens would be read as GPT-2's."""
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(dict(vocab_size=100)))
    with pytest.raises(UserError, match="meta.pkl.*data/prepare.py"):
        Corpus(tmp_path, "train", 16)


def test_a_meta_json_beats_a_stray_meta_pkl(home, tmp_path):
    home = copy_of(home, tmp_path)
    (home / "data/meta.pkl").write_bytes(b"x")
    assert Corpus(home / "data", "train", 16).tokenizer["encoding"] == "bpe"


def test_the_home_folder_has_a_short_name_in_all_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sample_config = load("sample.py").SampleConfig
    vae_config = load("train_vae.py").VAEStage
    paths = ("data", "out", "vae", "teacher", "model", "prompts", "output")
    found = {}
    for config_type in (TrainConfig, sample_config, vae_config):
        names = [name for name in paths if hasattr(config_type, name)]
        monkeypatch.setattr(sys, "argv", ["x", *(f"--{name}=~/some" for name in names)])
        (config,) = command_line("", config_type)
        for name in names:
            found[name] = getattr(config, name)
    assert found == {name: f"{tmp_path}/some" for name in paths}


def test_a_script_writes_and_reads_below_the_home_folder(home, tmp_path, monkeypatch):
    make_quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").symlink_to(home / "data")
    options = training_options(home, steps=1)
    script("baselines/gpt.py", *options, "--data=~/corpus", "--out=~/run")
    assert (tmp_path / "run/gpt_last.pt").exists()
    assert not (tmp_path / "~").exists()

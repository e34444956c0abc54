"""Breaks training and its files on purpose, and counts how many faults do no harm. All should.

    python bench/faults.py kill     # SIGKILL at random moments, often while a checkpoint is written
    python bench/faults.py term     # SIGTERM at random moments, often in an evaluation
    python bench/faults.py disk     # a disk that is full at a random checkpoint
    python bench/faults.py fuzz     # truncated, flipped and edited files: checkpoints and corpora
    python bench/faults.py kill --stages=cola_vae,cola_dit,ldlm      # the variants

After each fault the run is resumed. Weights, averages, optimisers and metrics must then be those of
an undisturbed run, to the bit.

Needs fork, so it does not run on Windows. Each run has one thread, because other numbers of threads
add in other orders.
"""

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch

import engine.loop
from engine.checkpoint import load_checkpoint
from engine.terminal import run_script

SMALL = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=32",
    "--batch_size=16",
    "--accumulate=2",
    "--max_steps=24",
    "--eval_interval=4",
    "--log_interval=1",
    "--device=cpu",
]
FAULT_SIGNALS = dict(kill=signal.SIGKILL, term=signal.SIGTERM)


class Stage(NamedTuple):
    """A stage of training: a script, and what it reads and writes."""

    script: str  # name of a module with main()
    first: list  # arguments before the options
    name: str  # of its files, as in NAME.pt
    kind: str  # of its checkpoints
    reads: str = ""  # the stage whose checkpoint it reads, if any
    option: str = ""  # names that checkpoint
    writes_text: bool = False  # whether sample.py is tested with its checkpoint


STAGES = dict(
    gpt=Stage("baselines.gpt", [], "gpt", "gpt"),
    vae=Stage("train_vae", [], "vae", "vae", "gpt", "--teacher"),
    dit=Stage("train_dit", [], "dit", "dit", "vae", "--vae", True),
    cola_vae=Stage("variants.cola_dlm", ["vae"], "vae", "causal_vae", "gpt", "--teacher"),
    cola_dit=Stage("variants.cola_dlm", ["dit"], "dit", "cola_dlm", "cola_vae", "--vae", True),
    ldlm=Stage("variants.ldlm", [], "dit", "ldlm", "gpt", "--teacher", True),
)


# ---- Processes -----------------------------------------------------------------------------------


def start(script, arguments, log, before=None):
    """Runs the main of a script in a forked process, after before(). Returns the id of the process.
    A traceback ends it with code 99."""
    module = importlib.import_module(script)
    pid = os.fork()
    if pid:
        return pid
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 99
    try:
        if before is not None:
            before()
        sys.argv = [script, *map(str, arguments)]
        run_script(module.main)
        code = 0
    except SystemExit as e:
        code = exit_code(e)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(e):
    """The code with which Python ends at a SystemExit. Prints its text, if it has one."""
    if e.code is None:
        return 0
    if isinstance(e.code, int):
        return e.code
    print(e.code, flush=True)
    return 1


def is_running(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def finish(pid, seconds=120):
    """The exit code of a process; -9 and the like for signals. A process that hangs is killed, and
    has the code None."""
    until = time.time() + seconds
    while time.time() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


# ---- Undisturbed runs ----------------------------------------------------------------------------


def arguments_of(home, stage, out):
    """The command line of a stage that writes to the folder out."""
    stage = STAGES[stage]
    arguments = [*stage.first, f"--data={home}/data", f"--out={out}", *SMALL]
    if stage.reads:
        arguments.append(f"{stage.option}={checkpoint_of(home, stage.reads)}")
    return arguments


def checkpoint_of(home, stage):
    """The checkpoint that the undisturbed run of a stage wrote."""
    return home / "ref" / stage / f"{STAGES[stage].name}.pt"


def make_home(home, stages):
    """Makes a corpus of names, and an undisturbed run of each stage and of those that it reads.
    Returns a dict: stage -> seconds."""
    run_or_fail(home, "data.prepare", ["names", f"--out={home}/data", "--vocab_size=400"])
    seconds = {}
    for stage in stages:
        make_reference(home, stage, seconds)
    return seconds


def make_reference(home, stage, seconds):
    if stage in seconds:
        return
    if STAGES[stage].reads:
        make_reference(home, STAGES[stage].reads, seconds)
    began = time.time()
    run_or_fail(home, STAGES[stage].script, arguments_of(home, stage, home / "ref" / stage))
    seconds[stage] = time.time() - began


def run_or_fail(home, script, arguments):
    code = finish(start(script, arguments, home / "log"))
    if code != 0:
        sys.exit(f"{script} ended with code {code}: {(home / 'log').read_text()}")


def is_same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


def differences(home, stage, out):
    """The names of what differs between the run in out and the undisturbed one."""
    name, kind = STAGES[stage].name, STAGES[stage].kind
    ref = home / "ref" / stage
    expected = load_checkpoint(ref / f"{name}_last.pt", kind, "")
    found = load_checkpoint(out / f"{name}_last.pt", kind, "")
    wrong = [key for key in expected if not is_same(expected[key], found.get(key))]
    if (ref / f"{name}.jsonl").read_text() != (out / f"{name}.jsonl").read_text():
        wrong.append("metrics")
    return wrong


# ---- Faults of runs ------------------------------------------------------------------------------


class Fault:
    """One fault: how it is prepared in the process of the run, and how it strikes.

    mode: kill, term or disk. where: in a write, in an evaluation, or anywhere. last: the checkpoint
    to resume. seconds: how long an undisturbed run takes."""

    def __init__(self, mode, where, last, seconds, rng):
        self.mode = mode
        self.in_write = where == "write"
        self.in_evaluation = where == "evaluation"
        self.out = last.parent
        self.last = last
        self.hit_a_write = False
        # Drawn here, because a forked process has a copy of rng.
        self.delay = rng.uniform(0, (0.5 if self.in_write else 0.8) * seconds)
        self.evaluation = rng.randrange(1, 7)
        self.delay_in_evaluation = rng.uniform(0, 0.02)
        self.failing_write = rng.randrange(2, 14)
        self.room = rng.randrange(1000, 100_000)

    def prepare(self):
        if self.in_write:
            slow_down_disk()
        if self.in_evaluation:
            number = FAULT_SIGNALS[self.mode]
            strike_evaluation(self.evaluation, self.delay_in_evaluation, number)
        if self.mode == "disk":
            fill_disk(self.failing_write, self.room)

    def strike(self, pid):
        """Sends the signal, if the fault is one, at a random moment after the first checkpoint."""
        if self.mode == "disk" or self.in_evaluation:
            return  # the process of the run strikes itself
        while not self.last.exists() and is_running(pid):
            time.sleep(0.001)
        time.sleep(self.delay)
        while self.in_write and not self.is_writing() and is_running(pid):
            pass
        os.kill(pid, FAULT_SIGNALS[self.mode])
        self.hit_a_write = self.in_write and self.is_writing()

    def is_writing(self):
        return any(self.out.glob("*.tmp"))

    def is_expected(self, code, said):
        """Whether a run should end so: with this exit code, and these words."""
        if self.mode == "kill":
            return code == -signal.SIGKILL
        if self.mode == "term":
            return code == 1 and "goes on" in said
        return code == 2 and "cannot write" in said


def slow_down_disk():
    """Makes each write take long enough to strike in it."""
    fsync = os.fsync

    def slow_fsync(file):
        time.sleep(0.05)
        fsync(file)

    os.fsync = slow_fsync


def strike_evaluation(evaluation, delay, number):
    """Sends a signal in this evaluation of a run, counted from 1, after some seconds."""
    steps = engine.loop.Run.steps
    left = evaluation

    def steps_and_strike(self, evaluate, keep_latest=False):
        def evaluate_and_strike():
            nonlocal left
            left -= 1
            if left == 0:
                threading.Timer(delay, os.kill, (os.getpid(), number)).start()
            return evaluate()

        return steps(self, evaluate_and_strike, keep_latest)

    engine.loop.Run.steps = steps_and_strike


def fill_disk(failing_write, room):
    """Lets no file of more than `room` bytes be written in this write of a run, counted from 1."""
    write_whole = engine.loop.write_whole
    left = failing_write
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_or_fail(path, content):
        nonlocal left
        left -= 1
        if left == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            write_whole(path, content)
        finally:  # what the run says of it goes to a file too
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    engine.loop.write_whole = write_or_fail  # loop.py imports it by name


def break_runs(home, mode, stages, trials, rng):
    seconds = make_home(home, stages)
    for stage in stages:
        good, writing, hits = 0, 0, 0
        while hits < trials:
            where = "anywhere"
            if mode == "kill" and hits % 3 == 0:
                where = "write"
            elif mode != "disk" and hits % 3 == 1:
                where = "evaluation"
            last = home / "trial" / f"{STAGES[stage].name}_last.pt"
            fault = Fault(mode, where, last, seconds[stage], rng)
            wrong = break_run(home, stage, fault)
            if wrong is None:
                continue
            hits += 1
            writing += fault.hit_a_write
            if wrong:
                print(f"{stage}, fault {hits}: {wrong}", flush=True)
            else:
                good += 1
        line = f"{mode} {stage}: {good} of {trials} ended with the same bits"
        if mode == "kill":
            line += f", {writing} struck while a file was being written"
        print(line, flush=True)


def break_run(home, stage, fault):
    """Breaks a run and resumes it. Returns a list of what is wrong then, or None if the run was
    done before the fault struck."""
    log, script = home / "log", STAGES[stage].script
    shutil.rmtree(fault.out, ignore_errors=True)
    arguments = arguments_of(home, stage, fault.out)
    pid = start(script, arguments, log, fault.prepare)
    fault.strike(pid)
    code = finish(pid)
    said = log.read_text()
    if code == 0:
        return None
    if not fault.is_expected(code, said):
        return ["exit code", code, said[-300:]]
    if not fault.last.exists():
        return ["resume", "there is no checkpoint"]
    resumed = finish(start(script, [*arguments, "--resume"], log))
    if resumed != 0:
        return ["resume", resumed, log.read_text()[-300:]]
    return differences(home, stage, fault.out)


# ---- Damaged files -------------------------------------------------------------------------------


class Reader(NamedTuple):
    """A file, and a script that reads it."""

    path: Path
    script: str
    arguments: list


def readers_of(home, stages):
    """A list of Readers of the checkpoints of the stages, and of the corpus."""
    readers = []
    short = "--max_steps=1"
    for name in stages:
        stage = STAGES[name]
        command = [*arguments_of(home, name, home / "new"), short]
        if stage.reads:
            readers.append(Reader(checkpoint_of(home, stage.reads), stage.script, command))
        if stage.writes_text:
            path = checkpoint_of(home, name)
            readers.append(Reader(path, "sample", sample_arguments(home, name)))
            resume = [*arguments_of(home, name, path.parent), "--resume"]
            last = path.with_name(f"{stage.name}_last.pt")
            readers.append(Reader(last, stage.script, resume))
    command = [*arguments_of(home, "gpt", home / "new"), short]
    readers.append(Reader(home / "data/train.bin", "baselines.gpt", command))
    readers.append(Reader(home / "data/meta.json", "baselines.gpt", command))
    command = [make_compressed_documents(home), f"--out={home}/new", "--encoding=bpe"]
    command += ["--vocab_size=270", "--val_fraction=0.2"]
    readers.append(Reader(home / "docs.jsonl.zst", "data.prepare", command))
    return readers


def sample_arguments(home, stage):
    arguments = [f"--model={checkpoint_of(home, stage)}", "--steps=2", "--prompt=greek"]
    if STAGES[stage].option == "--vae":
        arguments.append(f"--vae={checkpoint_of(home, STAGES[stage].reads)}")
    return [*arguments, "--device=cpu"]


def make_compressed_documents(home):
    """The path of a small corpus of documents, compressed."""
    import zstandard

    lines = []
    for i, text in enumerate(["greek", "latin", "arabic"] * 300):
        lines.append(json.dumps({"text": f"{text} letter {i}"}) + "\n")
    path = home / "docs.jsonl.zst"
    path.write_bytes(zstandard.compress("".join(lines).encode()))
    return path


def damage(path, rng):
    """The content of a file with a random damage, and a description of it."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    has_fields = path.suffix in (".json", ".pt")
    how = rng.choice(["cut", "flip", "field" if has_fields else "noise"])
    if how == "cut":
        damaged = damaged[: rng.randrange(len(whole))]
    elif how == "flip":
        for _ in range(rng.choice([1, 1, 8])):
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    elif how == "noise":
        at = rng.randrange(len(whole))
        damaged[at : at + 16] = rng.randbytes(16)
    else:
        damaged, how = edit_field(path, rng)
    return bytes(damaged), how


def edit_field(path, rng):
    """The content of a .json or .pt file with another value in one field, and a description."""
    is_json = path.suffix == ".json"
    if is_json:
        content = json.loads(path.read_text())
    else:
        content = torch.load(path, weights_only=True)
    holders = [content]
    for key in ("config", "tokenizer"):
        if content.get(key):
            holders.append(content[key])
    holder = rng.choice(holders)
    key = rng.choice(list(holder))
    values = [None, -1, 0, 2**40, 1e300, "x", [], {}, "../../x", "O"]
    values.append("int8" if is_json else torch.zeros(1))
    holder[key] = rng.choice(values)
    how = f"{key} = {holder[key]!r}"
    if is_json:
        return json.dumps(content).encode(), how
    with tempfile.NamedTemporaryFile() as file:
        torch.save(content, file.name)
        return Path(file.name).read_bytes(), how


def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))


def fuzz(home, stages, trials, rng):
    """Damages one file at a time. A trial is good if a script refuses the file in a sentence, with
    exit code 2, or runs as if it had other data. It must not change any other file."""
    make_home(home, stages)
    readers = readers_of(home, stages)
    refused, ran = 0, 0
    for _ in range(trials):
        reader = rng.choice(readers)
        code, wrong = fuzz_once(home, reader, rng)
        if wrong:
            print(wrong, flush=True)
        elif code:
            refused += 1
        else:
            ran += 1
    print(
        f"fuzz: {refused + ran} of {trials} ended well "
        f"({refused} in a sentence and exit code 2, {ran} in a run)",
        flush=True,
    )


def fuzz_once(home, reader, rng):
    """Damages the file of a reader and runs its script. Returns the exit code, and a description of
    what went wrong, or an empty text."""
    whole = reader.path.read_bytes()
    damaged, how = damage(reader.path, rng)
    reader.path.write_bytes(damaged)
    files = {}
    for path in [*(home / "ref").rglob("*"), *(home / "data").rglob("*")]:
        if path.is_file():
            files[path] = path.read_bytes()
    code = finish(start(reader.script, reader.arguments, home / "log", limit_memory), 60)
    said = (home / "log").read_text()
    changed = []
    for path, content in files.items():
        if not path.exists() or path.read_bytes() != content:
            changed.append(path.name)
            path.write_bytes(content)
    if reader.arguments[-1] == "--resume" and code == 0:
        changed = []  # a resumed run writes where it was
    reader.path.write_bytes(whole)
    shutil.rmtree(home / "new", ignore_errors=True)
    wrong = ""
    if code not in (0, 2) or changed or "Traceback" in said:
        wrong = f"{reader.path.name}, {how}: exit {code}, changed {changed}: {said[-400:]}"
    return code, wrong


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["kill", "term", "disk", "fuzz"])
    parser.add_argument("--trials", type=int, help="faults for each stage (50; fuzz: 200 in all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--stages",
        default="gpt,vae,dit",
        help=f"which, with commas, of {', '.join(STAGES)} (gpt,vae,dit)",
    )
    args = parser.parse_args()
    stages = args.stages.split(",")
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        parser.error(f"--stages: {', '.join(unknown)} is none of {', '.join(STAGES)}")
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as home:
        if args.mode == "fuzz":
            fuzz(Path(home), stages, args.trials or 200, rng)
        else:
            break_runs(Path(home), args.mode, stages, args.trials or 50, rng)


if __name__ == "__main__":
    main()

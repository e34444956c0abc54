"""Breaks training and its files on purpose, and counts what was lost. All of it should say "50 of 50" and "200 of 200".

    python bench/faults.py kill         # SIGKILL at random moments, a third of them while a checkpoint is being written
    python bench/faults.py term         # SIGTERM at random moments
    python bench/faults.py disk         # a disk that is full at a random checkpoint (a limit on the size of files)
    python bench/faults.py fuzz         # truncated, flipped and edited checkpoints, bins, meta.json and .jsonl.zst

After each fault the run is resumed, and its weights, averages, optimisers and metrics must be those of a run without one, to the bit.
Needs fork, so no Windows. Runs go in one thread each, as other numbers of threads add in other orders.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "data")]
import torch

import prepare
import sample
import textldm
import train_dit
import train_gpt
import train_vae

STAGES = dict(gpt=train_gpt, vae=train_vae, dit=train_dit)
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--batch_size=16", "--accumulate=2", "--max_steps=24", "--eval_interval=4",
         "--log_interval=1", "--device=cpu"]


def start(module, arguments, log, before=lambda: None):
    """Runs a script's main in a forked process; returns its id. A traceback ends it with code 99."""
    pid = os.fork()
    if pid:
        return pid
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    code = 99
    try:
        before()
        sys.argv = [module.__name__, *map(str, arguments)]
        textldm.run(module.main)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else print(e.code, flush=True) or int(e.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def running(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def finish(pid, seconds=120):
    """The exit code of a process; -9 and the like for signals, None if it hangs."""
    until = time.time() + seconds
    while time.time() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)


def arguments(home, stage, out):
    more = dict(gpt=[], vae=[f"--teacher={home}/ref/gpt.pt"], dit=[f"--vae={home}/ref/vae.pt"])[stage]
    return [f"--data={home}/data", f"--out={out}", *SMALL, *more]


def make_home(home):
    """A corpus of names and an undisturbed run of each stage; returns the seconds of each."""
    assert finish(start(prepare, ["names", f"--out={home}/data", "--vocab_size=400"], home / "log")) == 0, (home / "log").read_text()
    seconds = {}
    for stage, module in STAGES.items():
        began = time.time()
        assert finish(start(module, arguments(home, stage, home / "ref"), home / "log")) == 0, (home / "log").read_text()
        seconds[stage] = time.time() - began
    return seconds


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def lost(home, stage, out):
    """What differs between a run and the undisturbed one."""
    states = [textldm.load_checkpoint(folder / f"{stage}_last.pt", stage, "") for folder in (home / "ref", out)]
    wrong = [k for k in states[0] if not same(states[0][k], states[1].get(k))]
    return wrong + ["metrics"] * ((home / f"ref/{stage}.jsonl").read_text() != (out / f"{stage}.jsonl").read_text())


def break_runs(home, mode, trials, rng):
    seconds = make_home(home)
    for stage, module in STAGES.items():
        good, writing, hits = 0, 0, 0
        while hits < trials:
            out, last = home / "trial", home / f"trial/{stage}_last.pt"
            shutil.rmtree(out, ignore_errors=True)
            in_write = mode == "kill" and hits % 3 == 0

            def before():
                if in_write:  # a slow disk, so that there is a moment to strike
                    fsync = os.fsync
                    os.fsync = lambda f: time.sleep(0.05) or fsync(f)
                if mode == "disk":
                    write, left = textldm.write_whole, [rng.randrange(2, 9)]

                    def full(path, content):
                        left[0] -= 1
                        if not left[0]:
                            resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(1000, 100_000), resource.RLIM_INFINITY))
                        write(path, content)
                    textldm.write_whole = full
            pid = start(module, arguments(home, stage, out), home / "log", before)
            if mode != "disk":
                while not last.exists() and running(pid):
                    time.sleep(0.001)
                if in_write:
                    time.sleep(rng.uniform(0, 0.5 * seconds[stage]))
                    while not list(out.glob("*.tmp")) and running(pid):
                        pass
                else:
                    time.sleep(rng.uniform(0, 0.8 * seconds[stage]))
                os.kill(pid, signal.SIGKILL if mode == "kill" else signal.SIGTERM)
            tmp = bool(list(out.glob("*.tmp")))
            code, said = finish(pid), (home / "log").read_text()
            if code == 0:
                continue  # it was done before the fault struck
            hits, writing = hits + 1, writing + (in_write and tmp)
            expected = dict(kill=code == -9, term=code == 1 and "goes on" in said, disk=code == 2 and "cannot write" in said)[mode]
            resumed = finish(start(module, [*arguments(home, stage, out), "--resume"], home / "log")) if last.exists() else None
            wrong = ["exit code", code, said[-300:]] if not expected else ["resume", (home / "log").read_text()[-300:]] if resumed != 0 else lost(home, stage, out)
            good += not wrong
            if wrong:
                print(f"{stage}, fault {hits}: {wrong}", flush=True)
        print(f"{mode} {stage}: {good} of {trials} ended with the same bits" + f", {writing} struck while a file was being written" * (mode == "kill"), flush=True)


def fuzz(home, trials, rng):
    """Damages one file at a time. Good: a sentence and exit code 2, or a run as if other data had been given; nothing else changed."""
    make_home(home)
    import zstandard
    lines = "".join(json.dumps({"text": f"{t} letter {i}"}) + "\n" for i, t in enumerate(["greek", "latin", "arabic"] * 300))
    (home / "docs.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    ref, data, short = home / "ref", home / "data", ["--max_steps=1"]
    runs = {  # file: a script that reads it
        ref / "gpt.pt": (train_vae, [*arguments(home, "vae", home / "new"), *short]), ref / "vae.pt": (train_dit, [*arguments(home, "dit", home / "new"), *short]),
        ref / "dit.pt": (sample, [f"--out={ref}", "--steps=2", "--prompt=greek", "--device=cpu"]),
        ref / "dit_last.pt": (train_dit, [*arguments(home, "dit", ref), "--resume"]),
        data / "train.bin": (train_gpt, [*arguments(home, "gpt", home / "new"), *short]), data / "meta.json": (train_gpt, [*arguments(home, "gpt", home / "new"), *short]),
        home / "docs.jsonl.zst": (prepare, [home / "docs.jsonl.zst", f"--out={home}/new", "--encoding=bpe", "--vocab_size=270", "--val_fraction=0.2"])}
    tally = dict(refused=0, ran=0)
    for trial in range(trials):
        path = rng.choice(list(runs))
        whole, how = path.read_bytes(), rng.choice(["cut", "flip", "field" if path.suffix in (".json", ".pt") else "noise"])
        damaged = bytearray(whole)
        if how == "cut":
            damaged = damaged[: rng.randrange(len(whole))]
        elif how == "flip":
            for _ in range(rng.choice([1, 1, 8])):
                damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        elif how == "noise":
            at = rng.randrange(len(whole))
            damaged[at : at + 16] = rng.randbytes(16)
        else:
            content = json.loads(whole) if path.suffix == ".json" else torch.load(path, weights_only=True)
            holder = rng.choice([x for x in (content, content.get("config"), content.get("tokenizer")) if x])
            key, value = rng.choice(list(holder)), rng.choice([None, -1, 0, 2**40, 1e300, "x", [], {}, "../../x", "O", torch.zeros(1) if path.suffix == ".pt" else "int8"])
            holder[key], how = value, f"{key} = {value!r}"
            if path.suffix == ".json":
                damaged = json.dumps(content).encode()
            else:
                torch.save(content, home / "edited")
                damaged = (home / "edited").read_bytes()
        path.write_bytes(damaged)
        others = {p: p.read_bytes() for p in [*ref.iterdir(), *data.iterdir()] if p.is_file()}
        limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        code = finish(start(*runs[path], home / "log", limit), 60)
        said = (home / "log").read_text()
        changed = [p.name for p in others if not p.exists() or p.read_bytes() != others[p]]
        changed = [] if runs[path][1][-1] == "--resume" and code == 0 else changed  # a resumed run writes where it was
        if code in (0, 2) and not changed and "Traceback" not in said:
            tally["refused" if code else "ran"] += 1
        else:
            print(f"{path.name}, {how}: exit {code}, changed {changed}: {said[-400:]}", flush=True)
        for p, content in others.items():
            p.write_bytes(content)
        path.write_bytes(whole)
        shutil.rmtree(home / "new", ignore_errors=True)
    print(f"fuzz: {sum(tally.values())} of {trials} ended well ({tally['refused']} in a sentence and exit code 2, {tally['ran']} in a run)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["kill", "term", "disk", "fuzz"])
    parser.add_argument("--trials", type=int, help="faults for each stage (50; fuzz: 200)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as home:
        if args.mode == "fuzz":
            fuzz(Path(home), args.trials or 200, rng)
        else:
            break_runs(Path(home), args.mode, args.trials or 50, rng)


if __name__ == "__main__":
    main()

"""The training loop: values worked out by hand on a toy, and laws over all seven stages."""

import json
import math
import os
import pkgutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn as nn

import engine.train
from engine.checkpoint import load_checkpoint
from engine.config import TrainConfig, UserError
from engine.train import Stage, learning_rate, minutes, train, update_average
from tests.helpers import ROOT, make_quick, script, snapshot, training_options
from tests.helpers import train as train_script
from textldm import TARGET, TransformerConfig, make_batch, weighted_mean

# ---- A toy ---------------------------------------------------------------------------------------


class Toy(nn.Module):
    """One number, whose loss is its squared distance from the tokens."""

    def __init__(self):
        super().__init__()
        self.config = TransformerConfig()
        self.number = nn.Parameter(torch.zeros(1, 1))

    def forward(self, batch):
        return weighted_mean((self.number - batch.tokens).square(), batch.weight)

    def judge(self):
        """The best of the evaluations is the first."""
        return dict(loss=self.number.item()), "judged"


class ToyCorpus:
    """Rows of one token each, a number that is drawn and is the weight too."""

    N = 80
    identity = dict(tokenizer={}, data="toy")

    def batch(self, rng, B, N):
        tokens = torch.full((B, N), 1 + rng.random())
        return make_batch(tokens, torch.full((B, N), TARGET), tokens)


def run_toy(folder, evaluate=lambda toy: toy.judge(), scale=1, **options):
    """Trains a Toy. Options are those of its TrainConfig and of its Stage. Returns for each
    micro-batch the length of its rows, their token, and the seed of its loss."""
    seen = []

    def loss_of(net, batch, generator, step):
        B, N = batch.tokens.shape
        seen.append((N, batch.tokens[0, 0].item(), generator.initial_seed()))
        return dict(loss=scale * net(batch))

    values = dict(out=str(folder), device="cpu", batch_size=1, max_steps=2, eval_interval=1)
    values |= dict(log_interval=1, warmup=0, learning_rate=0.1, weight_decay=0.0) | options
    identity = dict(kind=values.pop("kind", "toy"))
    more = {key: values.pop(key) for key in ("has_average", "keeps_latest") if key in values}
    stage = Stage("toy", TrainConfig(**values), ToyCorpus(), Toy(), identity, **more)
    train(stage, loss_of, lambda batch: batch.weight.sum(), evaluate)
    return seen


def lines_of(folder, name="toy"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def state_of(folder, end=""):
    return load_checkpoint(folder / f"toy{end}.pt", "toy", "")


def test_micro_batches_weigh_as_their_tokens_and_gradients_have_norm_1(tmp_path, monkeypatch):
    gradients = []
    step = torch.optim.AdamW.step

    def remember(self, *given):
        gradients.append(self.param_groups[0]["params"][0].grad.item())
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    seen = run_toy(tmp_path, accumulate=2)
    N, token, _ = np.array(seen[:2]).T  # of the first step, where the number is 0
    first = lines_of(tmp_path)[0]
    assert first["loss"] == pytest.approx((N * token**3).sum() / (N * token).sum())
    slope = 2 * (N * token**2).sum() / (N * token).sum()
    assert first["norm"] == pytest.approx(slope), "before it is clipped"
    assert gradients == pytest.approx([-1, -1], abs=1e-4)


def test_the_learning_rate_by_hand():
    cfg = TrainConfig(learning_rate=1.0, warmup=4)
    rates = [learning_rate(cfg, step, 12) for step in (0, 1, 3, 4, 8, 12, 99)]
    assert rates == pytest.approx([0.25, 0.5, 1, 1, 0.55, 0.1, 0.1])
    assert learning_rate(TrainConfig(muon=True, warmup=0), 0, 9) == pytest.approx(4e-3)
    assert learning_rate(TrainConfig(muon=False, warmup=0), 0, 9) == pytest.approx(1e-3)


@pytest.mark.parametrize("step, decay", [(0, 2 / 11), (1, 3 / 12), (10**6, 0.999)])
def test_the_decay_of_the_average_grows_to_0_999(step, decay):
    average, model = Toy(), Toy()
    average.number.data.fill_(1)
    update_average(average.requires_grad_(False), model, step)
    assert average.number.item() == pytest.approx(decay)


def test_what_is_judged_and_kept_is_the_average(tmp_path):
    run_toy(tmp_path, has_average=True, max_steps=1)
    (weight,) = state_of(tmp_path, "_last")["model"].values()
    (kept,) = state_of(tmp_path)["model"].values()
    assert lines_of(tmp_path)[-1]["val"]["loss"] == kept == pytest.approx(weight * 9 / 11)


def losses(*values):
    """What evaluations return, one after another."""
    values = iter(values)
    return lambda toy: (dict(loss=next(values)), "")


@pytest.mark.parametrize("keeps_latest, kept", [(False, 2), (True, 4)])
def test_the_best_is_kept_or_the_latest_but_none_that_is_not_finite(tmp_path, keeps_latest, kept):
    evaluate = losses(3.0, 1.0, 2.0, 2.5, math.nan)
    run_toy(tmp_path, evaluate, keeps_latest=keeps_latest, max_steps=5)
    assert state_of(tmp_path)["step"] == kept
    found = [line["val"]["loss"] for line in lines_of(tmp_path) if "val" in line]
    assert found[:4] == [3, 1, 2, 2.5]


def test_more_steps_go_on_at_the_last_rate_and_do_not_replace_the_best(tmp_path, capsys):
    run_toy(tmp_path, losses(1.0, 2.0))
    run_toy(tmp_path, resume=True)
    assert "all 2 steps are done; a larger --max_steps goes on" in capsys.readouterr().out
    run_toy(tmp_path, losses(1.5, 1.5), max_steps=4, resume=True)
    assert state_of(tmp_path)["step"] == 1
    rates = [line["lr"] for line in lines_of(tmp_path) if "lr" in line]
    assert rates == pytest.approx([0.1, 0.055, 0.01, 0.01])


REFUSED = [
    ({}, "holds an earlier run; --resume goes on"),
    (dict(resume=True, overwrite=True), "exclude each other"),
    (dict(resume=True, kind="toys"), "holds a toy, where a toys is needed; without --resume"),
    (dict(resume=True, seed=2), "another seed; resume with the same"),
    (dict(resume=True, batch_size=2), "another batch_size;"),
    (dict(resume=True, accumulate=2), "another accumulate;"),
    (dict(resume=True, warmup=3), "another warmup;"),
    (dict(resume=True, weight_decay=0.5), "another weight_decay;"),
]


@pytest.mark.parametrize("options, words", REFUSED, ids=str)
def test_an_earlier_run_is_spared(tmp_path, options, words):
    run_toy(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=words):
        run_toy(tmp_path, **options)
    assert snapshot(tmp_path) == before


def test_an_earlier_run_is_replaced_on_request_or_if_it_had_only_begun(tmp_path):
    run_toy(tmp_path, max_steps=3)
    with pytest.raises(UserError, match="step 0: loss is not finite; --resume at a lower"):
        run_toy(tmp_path, scale=math.inf, overwrite=True)
    assert lines_of(tmp_path) == []
    last = state_of(tmp_path, "_last")
    assert last["step"] == last["model"]["number"] == 0, "its weights are not spoilt"
    (tmp_path / "toy.pt").unlink()  # the one of the first run
    run_toy(tmp_path)
    assert state_of(tmp_path, "_last")["step"] == 2


def test_rows_and_noise_depend_on_seed_step_and_micro_batch(tmp_path, monkeypatch):
    def drawn(name, **options):
        return run_toy(tmp_path / name, **(dict(eval_interval=99, max_steps=40) | options))

    both = drawn("both", accumulate=2)
    lengths, tokens, seeds = map(set, zip(*both))
    assert lengths == {40, 50, 60, 70, 80}
    assert len(tokens) == len(seeds) == 80
    assert not set(both) & set(drawn("seed", seed=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: None)
    assert drawn("both", resume=True, max_steps=41), "two processes of one micro-batch are this run"
    monkeypatch.setenv("RANK", "1")
    assert drawn("second") == both[1::2]


def test_the_time_of_the_whole_is_told_after_25_steps(tmp_path, monkeypatch, capsys):
    """20 steps of 3 seconds each were timed, and there are 100."""
    clock = SimpleNamespace(perf_counter=iter([0.0, 60.0]).__next__)
    monkeypatch.setattr(engine.train, "time", clock)
    run_toy(tmp_path, max_steps=100, eval_interval=100)
    assert "toy: about 5 minutes on this machine" in "".join(capsys.readouterr())
    told = [minutes(seconds) for seconds in (89, 91, 5300, 5400)]
    assert told == ["89 seconds", "2 minutes", "88 minutes", "1.5 hours"]


# ---- Runs that end -------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends without warning."""


def end_at(monkeypatch, place, n, how):
    """Ends the process before the n-th call of a function, by a signal or a kill."""
    function, calls = pkgutil.resolve_name(place), []

    def counting(*given, **options):
        calls.append(given)
        if len(calls) == n:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), getattr(signal, how))
        return function(*given, **options)

    monkeypatch.setattr(place, counting)


def equal(a, b):
    """Whether two states of tensors, lists, dicts and numbers are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


def check_equal(out, expected, name, kind):
    """Checkpoints are equal to the bit, and each line of metrics is there once."""
    for file in (f"{name}.pt", f"{name}_last.pt"):
        state = load_checkpoint(expected / file, kind, "")
        found = load_checkpoint(out / file, kind, "")
        assert [key for key in state if not equal(state[key], found.get(key))] == [], file
    metrics = f"{name}.jsonl"
    assert (out / metrics).read_text() == (expected / metrics).read_text()


PLACES = [("torch.optim.AdamW.step", 3), ("tests.test_training.Toy.judge", 1)]
# The first write is of the run's start. After step 2 the model is written, and then the run. After
# step 4 the model is written where the latest is kept, and else the run.
PLACES += [("os.replace", n) for n in (2, 3, 4)]


@pytest.mark.parametrize("how", ["kill", "SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("kept", ["has_average", "keeps_latest"])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, monkeypatch, kept, place, how):
    options = dict({kept: True}, max_steps=5, eval_interval=2)
    run_toy(tmp_path / "whole", **options)
    with monkeypatch.context() as m, pytest.raises((Killed, SystemExit)) as e:
        end_at(m, *place, how)
        run_toy(tmp_path / "out", **options)
    assert how == "kill" or "the same command with --resume goes on" in str(e.value)
    with open(tmp_path / "out/toy.jsonl", "a") as f:
        f.write('{"step": 4, "loss"')  # half a line
    run_toy(tmp_path / "out", resume=True, **options)
    check_equal(tmp_path / "out", tmp_path / "whole", "toy", "toy")


# ---- All stages ----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A stage that a script trains."""

    command: str
    name: str  # of its files
    kind: str
    needs: str = ""
    has_average: bool = False


TEACHER = "--teacher={home}/out/gpt.pt"
KINDS = [
    Kind("baselines/gpt.py", "gpt", "gpt"),
    Kind("train_vae.py", "vae", "vae", TEACHER),
    Kind("train_dit.py", "dit", "dit", "--vae={home}/out/vae.pt", True),
    Kind("baselines/masked.py", "masked", "masked", "", True),
    Kind("variants/ldlm.py", "dit", "ldlm", TEACHER + " --channels=8 --coder_layers=1", True),
    Kind("variants/cola_dlm.py vae", "vae", "causal_vae", TEACHER),
    Kind("variants/cola_dlm.py dit", "dit", "cola_dlm", "--vae={causal}/vae.pt", True),
]


@pytest.fixture(scope="module")
def causal(home, tmp_path_factory):
    """A folder with a VAE of Cola DLM's."""
    out = tmp_path_factory.mktemp("causal")
    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        train_script(home, "variants/cola_dlm.py vae", "--teacher=none", "--out", out, steps=1)
    return out


@pytest.fixture(scope="module", params=KINDS, ids=[stage.kind for stage in KINDS])
def stage(request, home, causal, tmp_path_factory):
    """A Kind, a function that trains it for three steps, and the folder of an undisturbed run."""
    kind = request.param

    def run(out, *more):
        needs = kind.needs.format(home=home, causal=causal).split()
        with pytest.MonkeyPatch.context() as m:
            make_quick(m)
            options = ["--block_size=16", "--out", out, *needs, *more]
            train_script(home, kind.command, *options, steps=3)

    whole = tmp_path_factory.mktemp("whole")
    run(whole)
    return kind, run, whole


def test_a_resumed_stage_equals_an_undisturbed_one(stage, tmp_path, monkeypatch):
    """Of three steps the first is interrupted, and then the third is killed."""
    kind, run, whole = stage
    for how, n, *resume in (("SIGTERM", 1), ("kill", 2, "--resume")):
        with monkeypatch.context() as m, pytest.raises((Killed, SystemExit)):
            end_at(m, "torch.optim.AdamW.step", n, how)
            run(tmp_path, *resume)
    assert load_checkpoint(tmp_path / f"{kind.name}_last.pt", kind.kind, "")["step"] == 2
    run(tmp_path, "--resume")
    check_equal(tmp_path, whole, kind.name, kind.kind)
    state = load_checkpoint(tmp_path / f"{kind.name}.pt", kind.kind, "")
    assert state["tokenizer"]["encoding"] == "bpe" and "AdamW" not in state


def test_an_average_of_zeros_is_judged_and_the_global_seed_counts_for_nothing(
    stage, tmp_path, monkeypatch
):
    kind, run, whole = stage
    zero_grad = torch.optim.AdamW.zero_grad

    def forget(average, model, step):
        for p in average.parameters():
            p.data.zero_()

    def reseed(self):
        torch.manual_seed(99)
        zero_grad(self)

    monkeypatch.setattr(engine.train, "update_average", forget)
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", reseed)
    run(tmp_path)
    for line, other in zip(lines_of(tmp_path, kind.name), lines_of(whole, kind.name)):
        assert (line != other) == (kind.has_average and "val" in line)


def test_two_processes_compute_what_two_micro_batches_do(home, tmp_path, monkeypatch):
    """Of the VAE. This process is the first, with the variables that torchrun sets."""
    options = [*training_options(home, 2), "--eval_interval=1", "--teacher=none", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    script("train_vae.py", *options, one, "--accumulate=2")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    command = [sys.executable, ROOT / "train_vae.py", *options, two]
    second = subprocess.Popen(list(map(str, command)), env=dict(os.environ, **shared, RANK="1"))
    for name, value in dict(shared, RANK="0").items():
        monkeypatch.setenv(name, value)
    script("train_vae.py", *options, two)
    assert second.wait() == 0
    assert lines_of(one, "vae")[0]["loss"] == pytest.approx(lines_of(two, "vae")[0]["loss"])
    one, two = [load_checkpoint(out / "vae.pt", "vae", "") for out in (one, two)]
    assert one["accumulate"] == two["accumulate"] == 2
    for name, x in one["model"].items():
        assert torch.allclose(x, two["model"][name], atol=1e-5), name

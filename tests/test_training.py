"""The training loop: values worked out by hand on a toy, and one law over all seven stages."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn as nn

import engine.train
from engine.checkpoint import load_checkpoint
from engine.config import TrainConfig, UserError
from engine.corpus import Corpus
from engine.train import Stage, learning_rate, minutes, train, update_average
from tests.helpers import (
    ROOT,
    SIZES,
    few_fixed_batches,
    load,
    make_quick,
    run_module,
    short_samples,
    snapshot,
)
from tests.helpers import train as train_script
from textldm import TARGET, make_batch, weighted_mean

# ---- A toy ---------------------------------------------------------------------------------------


@dataclass
class ToyConfig:
    block_size: int = 4


class Toy(nn.Module):
    """One number, whose loss is its squared distance from the tokens."""

    def __init__(self):
        super().__init__()
        self.config = ToyConfig()
        self.number = nn.Parameter(torch.zeros(1, 1))

    def forward(self, batch):
        return weighted_mean((self.number - batch.tokens).square(), batch.weight)


class ToyCorpus:
    """Row i of micro-batch i of a step has the token 1 + i, with weight 1 + 2 i."""

    N = 4
    identity = dict(tokenizer={}, data="toy")

    def __init__(self):
        self.drawn = 0

    def batch(self, rng, B, N):
        i = self.drawn % 2
        self.drawn += 1
        tokens = torch.full((B, 1), 1 + i)
        return make_batch(tokens, torch.full((B, 1), TARGET), torch.full((B, 1), 1.0 + 2 * i))


def loss_of(net, batch, generator, step):
    return dict(loss=net(batch))


def weight_of(batch):
    return batch.weight.sum()


def run_toy(folder, losses=(), evaluate=None, kind="toy", **options):
    """Trains a Toy. losses: what its evaluations return. Returns its Stage."""
    values = dict(out=str(folder), device="cpu", batch_size=1, max_steps=2, eval_interval=1)
    values |= dict(log_interval=1, warmup=0, learning_rate=0.1, weight_decay=0.0)
    more = {key: options.pop(key) for key in ("has_average", "keeps_latest") if key in options}
    cfg = TrainConfig(**(values | options))
    stage = Stage("toy", cfg, ToyCorpus(), Toy(), dict(kind=kind), **more)
    losses = iter(losses)

    def judge(model):
        return dict(loss=next(losses, 0.0)), "judged"

    train(stage, loss_of, weight_of, evaluate or judge)
    return stage


def lines_of(folder, name="toy"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def number_of(folder, end=""):
    return load_checkpoint(folder / f"toy{end}.pt", "toy", "")["model"]["number"].item()


def test_micro_batches_weigh_as_their_tokens(tmp_path):
    """At 0 the losses are 1 and 4 with weights 1 and 3, so the mean is 13/4 and its slope -7/2."""
    run_toy(tmp_path, accumulate=2, max_steps=1)
    first = lines_of(tmp_path)[0]
    assert first["loss"] == pytest.approx(13 / 4)
    assert first["norm"] == pytest.approx(7 / 2), "before it is clipped"
    assert first["lr"] == pytest.approx(0.1 * (0.55 + 0.45))


def test_gradients_are_clipped_to_norm_1_and_taken_away(tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def remember(self, *given):
        seen.append(self.param_groups[0]["params"][0].grad.item())
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    run_toy(tmp_path, accumulate=2, max_steps=3)
    assert seen == pytest.approx([-1, -1, -1], abs=1e-4)


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
    judged = []

    def evaluate(model):
        judged.append(model.number.item())
        return dict(loss=0.0), ""

    run_toy(tmp_path, evaluate=evaluate, has_average=True, max_steps=1)
    weight = number_of(tmp_path, "_last")
    assert judged == [number_of(tmp_path)] == pytest.approx([weight * 9 / 11])


@pytest.mark.parametrize("keeps_latest, kept", [(False, 2), (True, 4)])
def test_the_best_is_kept_or_the_latest_but_none_that_is_not_finite(tmp_path, keeps_latest, kept):
    losses = [3.0, 1.0, 2.0, 2.5, math.nan]
    run_toy(tmp_path, losses, keeps_latest=keeps_latest, max_steps=5)
    assert load_checkpoint(tmp_path / "toy.pt", "toy", "")["step"] == kept
    assert [line["val"]["loss"] for line in lines_of(tmp_path) if "val" in line][:4] == losses[:4]


def test_a_worse_model_does_not_replace_the_best_after_resume(tmp_path):
    run_toy(tmp_path, [1.0, 2.0])
    run_toy(tmp_path, [1.5, 1.5], max_steps=4, resume=True)
    assert load_checkpoint(tmp_path / "toy.pt", "toy", "")["step"] == 1


def test_more_steps_go_on_at_the_last_rate(tmp_path):
    run_toy(tmp_path)
    run_toy(tmp_path, max_steps=4, resume=True)
    rates = [line["lr"] for line in lines_of(tmp_path) if "lr" in line]
    assert rates == pytest.approx([0.1, 0.055, 0.01, 0.01])


DIFFERENT = [dict(seed=2), dict(batch_size=2), dict(accumulate=2), dict(warmup=3)]
DIFFERENT += [dict(weight_decay=0.5)]


@pytest.mark.parametrize("other", DIFFERENT)
def test_another_run_is_not_resumed(tmp_path, other):
    run_toy(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"another {next(iter(other))};"):
        run_toy(tmp_path, resume=True, **other)
    assert snapshot(tmp_path) == before


def test_processes_count_as_micro_batches(tmp_path, monkeypatch):
    run_toy(tmp_path, accumulate=2)
    assert load_checkpoint(tmp_path / "toy_last.pt", "toy", "")["accumulate"] == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engine.train.dist, "init_process_group", lambda *a, **k: None)
    run_toy(tmp_path, accumulate=1, max_steps=3, resume=True)  # the same run
    with pytest.raises(UserError, match="another accumulate"):
        run_toy(tmp_path, accumulate=2, max_steps=4, resume=True)


@pytest.mark.parametrize("options, words", [({}, "earlier run"), (dict(overwrite=True), "")])
def test_an_earlier_run_is_replaced_on_request_only(tmp_path, options, words):
    run_toy(tmp_path, max_steps=3)
    before = snapshot(tmp_path)
    if not words:
        run_toy(tmp_path, **options)
        assert load_checkpoint(tmp_path / "toy_last.pt", "toy", "")["step"] == 2
        return
    with pytest.raises(UserError, match=words):
        run_toy(tmp_path, **options)
    assert snapshot(tmp_path) == before
    with pytest.raises(UserError, match="exclude each other"):
        run_toy(tmp_path, resume=True, overwrite=True)


def test_what_is_not_finite_ends_the_run_and_spoils_nothing(tmp_path):
    with pytest.raises(UserError, match="step 0: loss is not finite; --resume at a lower"):
        run_toy(tmp_path, learning_rate=0.1, accumulate=1, max_steps=1, kind=spoil_next_batch())
    assert number_of(tmp_path, "_last") == 0


def spoil_next_batch():
    """Makes the toy's next loss infinite, and returns its kind."""
    forward = Toy.forward

    def spoilt(self, batch):
        Toy.forward = forward
        return forward(self, batch) * math.inf

    Toy.forward = spoilt
    return "toy"


def test_the_time_of_the_whole_is_told_after_25_steps(tmp_path, monkeypatch, capsys):
    """20 steps of 3 seconds each were timed, and there are 100."""
    clock = SimpleNamespace(perf_counter=iter([0.0, 60.0]).__next__)
    monkeypatch.setattr(engine.train, "time", clock)
    run_toy(tmp_path, max_steps=100, eval_interval=100)
    assert "toy: about 5 minutes on this machine" in "".join(capsys.readouterr())
    assert [minutes(x) for x in (89, 91, 5300, 5400)] == [
        "89 seconds", "2 minutes", "88 minutes", "1.5 hours"
    ]  # fmt: skip


def test_two_processes_compute_what_two_micro_batches_do(home, tmp_path):
    """Under torchrun, the VAE, whose buffers the first process measures."""
    options = ["--data", home / "data", *SIZES, "--max_steps=2", "--eval_interval=1", "--no-muon"]
    options += ["--batch_size=4", "--device=cpu", "--log_interval=1", "--teacher=none"]
    both = [tmp_path / "one", tmp_path / "two"]
    run_module(load("train_vae.py"), "train_vae.py", *options, "--accumulate=2", "--out", both[0])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "train_vae.py", *options, "--out", both[1]]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    one, two = [load_checkpoint(out / "vae.pt", "vae", "") for out in both]
    assert one["accumulate"] == two["accumulate"] == 2
    for name, x in one["model"].items():
        assert torch.allclose(x, two["model"][name], atol=1e-5), name
    lines = [lines_of(out, "vae") for out in both]
    assert lines[0][0]["loss"] == pytest.approx(lines[1][0]["loss"], abs=1e-5)


# ---- All stages ----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A stage that a script trains."""

    command: str
    name: str  # of its files
    kind: str
    has_average: bool = False
    keeps_latest: bool = False


KINDS = [
    Kind("baselines/gpt.py", "gpt", "gpt"),
    Kind("train_vae.py", "vae", "vae"),
    Kind("train_dit.py", "dit", "dit", True),
    Kind("baselines/masked.py", "masked", "masked", True),
    Kind("variants/ldlm.py", "dit", "ldlm", True, True),
    Kind("variants/cola_dlm.py vae", "vae", "causal_vae"),
    Kind("variants/cola_dlm.py dit", "dit", "cola_dlm", True),
]


@pytest.fixture(scope="module")
def inputs(home, tmp_path_factory):
    """For each kind the options that name what its script reads."""
    causal = tmp_path_factory.mktemp("causal")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Corpus, "fixed_batches", few_fixed_batches)
        given = ["--out", causal, "--teacher", home / "out/gpt.pt"]
        train_script(home, "variants/cola_dlm.py vae", *given, steps=2)
    teacher = ["--teacher", home / "out/gpt.pt"]
    options = dict(gpt=[], masked=[], vae=teacher, causal_vae=teacher)
    options["ldlm"] = [*teacher, "--channels=8", "--coder_layers=1"]
    options["dit"] = ["--vae", home / "out/vae.pt"]
    options["cola_dlm"] = ["--vae", causal / "vae.pt"]
    return dict(options, data=home / "data")


def run_stage(stage, inputs, out, *more):
    """Runs the script of a stage with small networks on short rows, for four steps."""
    path, *which = stage.command.split()
    module = load(path)
    for name in ("continue_texts", "continue_in_blocks"):
        if hasattr(module, name):
            setattr(module, name, short_samples)
    options = ["--data", inputs["data"], "--out", out, *SIZES, "--block_size=16"]
    options += ["--batch_size=8", "--log_interval=1", "--device=cpu"]
    options += ["--max_steps=4", "--eval_interval=2", *inputs[stage.kind]]
    run_module(module, path, *which, *options, *more)


@pytest.fixture(scope="module", params=KINDS, ids=[stage.kind for stage in KINDS])
def whole(request, inputs, tmp_path_factory):
    """A stage, and the folder of four steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        run_stage(request.param, inputs, out)
    return request.param, out


class Killed(BaseException):
    """The process ends without warning."""


def end(name):
    """What ends a process: nothing that it can catch, or a signal that it waits for."""
    if name == "kill":
        raise Killed
    os.kill(os.getpid(), signal.SIGINT if name == "Ctrl-C" else signal.SIGTERM)


def disturb(monkeypatch, place, how):
    """Makes the loop end at a place: in its third step, at the n-th write of a checkpoint (before
    or after it), at a line of metrics, or in an evaluation."""
    if place == "step":
        draw = engine.train.Run.draw

        def drawing(self, step):
            if step == 3:
                end(how)
            return draw(self, step)

        monkeypatch.setattr(engine.train.Run, "draw", drawing)
    elif place == "evaluation":
        keep = engine.train.Run.keep

        def keeping(self, val):
            end(how)
            keep(self, val)

        monkeypatch.setattr(engine.train.Run, "keep", keeping)
    else:
        n, when = place
        whole, calls = engine.train.write_whole, []

        def writing(path, content):
            calls.append(path)
            if len(calls) == n and when == "before":
                end(how)
            whole(path, content)
            if len(calls) == n and when == "after":
                end(how)

        monkeypatch.setattr(engine.train, "write_whole", writing)


def equal(a, b):
    """Whether two states of tensors, lists, dicts and numbers are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


PLACES = [("step", "kill"), ("step", "SIGTERM"), ("evaluation", "kill"), ("evaluation", "Ctrl-C")]


@pytest.mark.parametrize("place, how", PLACES, ids=str)
def test_a_resumed_run_equals_an_undisturbed_one(whole, inputs, tmp_path, place, how):
    check_resumed(whole, inputs, tmp_path, place, how)


# A run of four steps writes NAME_last.pt at its start, and after steps 2 and 4 NAME.pt (if this
# model is kept) and NAME_last.pt. These three stages keep models in three ways.
@pytest.mark.parametrize("whole", [KINDS[0], KINDS[1], KINDS[4]], indirect=True)
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_was_killed_while_it_wrote_equals_it_too(whole, inputs, tmp_path, n, when):
    check_resumed(whole, inputs, tmp_path, (n, when), "kill")


def check_resumed(whole, inputs, tmp_path, place, how):
    """To the bit, and each line of metrics is there once."""
    stage, out = whole
    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        disturb(m, place, how)
        with pytest.raises((Killed, SystemExit)) as e:
            run_stage(stage, inputs, tmp_path)
        if how != "kill":
            assert "the same command with --resume goes on" in str(e.value)
    with open(tmp_path / f"{stage.name}.jsonl", "a") as f:
        f.write('{"step": 4, "loss"')  # half a line
    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        run_stage(stage, inputs, tmp_path, "--resume")
    for name in (f"{stage.name}.pt", f"{stage.name}_last.pt"):
        expected = load_checkpoint(out / name, stage.kind, "")
        found = load_checkpoint(tmp_path / name, stage.kind, "")
        different = [key for key in expected if not equal(expected[key], found.get(key))]
        assert different == [], name
    metrics = f"{stage.name}.jsonl"
    assert (tmp_path / metrics).read_text() == (out / metrics).read_text()


def test_a_checkpoint_says_what_it_is(whole):
    stage, out = whole
    state = load_checkpoint(out / f"{stage.name}.pt", stage.kind, "")
    last = load_checkpoint(out / f"{stage.name}_last.pt", stage.kind, "")
    assert state["config"]["n_embd"] == 16 and state["config"]["vocab_size"] == 300
    assert state["tokenizer"]["encoding"] == "bpe" and "AdamW" not in state
    assert last["step"] == last["horizon"] == 4
    assert ("Muon" in last) == (stage.kind not in ("vae", "causal_vae"))
    is_averaged = not equal(dict(last["model"]), dict(last["average"]))
    assert is_averaged == stage.has_average
    assert stage.keeps_latest <= (state["step"] == 4)


def test_what_is_judged_is_the_average(whole, inputs, tmp_path):
    """An average that is always zero changes the evaluations, and not the steps."""
    stage, out = whole

    def forget(average, model, step):
        for p in average.parameters():
            p.data.zero_()

    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        m.setattr(engine.train, "update_average", forget)
        run_stage(stage, inputs, tmp_path)
    lines, undisturbed = [lines_of(folder, stage.name) for folder in (tmp_path, out)]
    is_equal = {key: set() for key in ("val", "norm")}
    for line, other in zip(lines, undisturbed):
        is_equal["val" if "val" in line else "norm"].add(line == other)
    assert is_equal == dict(norm={True}, val={not stage.has_average})


def test_losses_draw_from_the_generator_of_their_micro_batch_alone(whole, inputs, tmp_path):
    """Another global seed changes nothing after the first step began."""
    stage, out = whole
    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        draw = engine.train.Run.draw

        def drawing(self, step):
            torch.manual_seed(99)
            np.random.seed(99)
            return draw(self, step)

        m.setattr(engine.train.Run, "draw", drawing)
        run_stage(stage, inputs, tmp_path)
    metrics = f"{stage.name}.jsonl"
    assert (tmp_path / metrics).read_text() == (out / metrics).read_text()


def test_rows_and_noise_of_a_step_depend_on_seed_step_and_micro_batch(tmp_path):
    class Rows(ToyCorpus):
        N = 80

        def batch(self, rng, B, N):
            seen.append((N, rng.random()))
            return super().batch(rng, B, N)

    seen = []
    cfg = TrainConfig(out=str(tmp_path), device="cpu", accumulate=2)
    run = SimpleNamespace(rank=0, cfg=cfg, device=torch.device("cpu"), corpus=Rows())
    first = engine.train.Run.draw(run, 5)
    again = engine.train.Run.draw(run, 5)
    assert seen[:2] == seen[2:], "the same step draws the same"
    assert [g.initial_seed() for _, g in first] == [g.initial_seed() for _, g in again]
    run.rank, run.cfg = 1, replace(cfg, accumulate=1)
    engine.train.Run.draw(run, 5)
    assert seen[4] == seen[1], "process 1 has the micro-batch 1"
    for step in range(200):
        engine.train.Run.draw(run, step)
    assert {N for N, _ in seen} == {40, 50, 60, 70, 80}


def test_the_weight_of_a_micro_batch_is_what_its_loss_is_a_mean_by():
    tokens = torch.arange(6).view(2, 3)
    segment = torch.tensor([[0, 1, 1], [0, 0, 1]])
    weight = torch.tensor([[1, 1, 0.1], [1, 1, 0.1]])
    batch = make_batch(tokens, segment, weight)
    assert load("train_vae.py").weight_of(batch).item() == pytest.approx(4.2)
    assert load("train_dit.py").weight_of(batch).item() == pytest.approx(1.2)

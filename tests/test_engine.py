"""Properties of engine/, and of the loop that each training script has of its own."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import engine.evaluation
import engine.loop
import engine.muon
import textldm
from engine.checkpoint import (
    build,
    copy_blocks,
    load_checkpoint,
    load_gpt_state,
    read_tensors,
    write_whole,
)
from engine.config import TrainConfig, UserError, make_config
from engine.corpus import Corpus
from engine.evaluation import rows_with_other_contexts
from engine.terminal import pick_dtype
from engine.train import Run, minutes, recompute_blocks, set_learning_rate
from engine.muon import Muon, make_optimizers, orthogonal
from engine.statistics import feature_statistics
from tests.helpers import (
    ROOT,
    SIZES,
    copy_of,
    few_fixed_batches,
    load,
    make_quick,
    run_module,
    short_samples,
    snapshot,
    train,
)
from textldm import (
    GPT,
    TARGET,
    Block,
    DiTConfig,
    TextDiT,
    TextVAE,
    TransformerConfig,
    VAEConfig,
    flow_loss,
    make_batch,
    teacher_features,
)

SMALL = dict(n_layer=2, n_head=2, n_embd=16)
N, V, C = 12, 50, 6
MATRIX_OF_A_BLOCK = re.compile(r"(^|\.)h\.\d+\.(attn|mlp)\.c_\w+\.weight$")


class Loop(NamedTuple):
    """A training script, or a stage of one. Each has a loop of its own."""

    command: str
    name: str  # of its checkpoints
    kind: str
    has_average: bool = False
    keeps_latest: bool = False  # not the best


LOOPS = [
    Loop("baselines/gpt.py", "gpt", "gpt"),
    Loop("train_vae.py", "vae", "vae"),
    Loop("train_dit.py", "dit", "dit", has_average=True),
    Loop("baselines/masked.py", "masked", "masked", has_average=True),
    Loop("variants/ldlm.py", "dit", "ldlm", has_average=True, keeps_latest=True),
    Loop("variants/cola_dlm.py vae", "vae", "causal_vae"),
    Loop("variants/cola_dlm.py dit", "dit", "cola_dlm", has_average=True),
]
BY_KIND = {loop.kind: loop for loop in LOOPS}
every_loop = pytest.mark.parametrize("loop", LOOPS, ids=list(BY_KIND))
both_vaes = pytest.mark.parametrize("kind", ["vae", "causal_vae"])
all_dits = pytest.mark.parametrize("kind", ["dit", "ldlm", "cola_dlm"])
both_dits = pytest.mark.parametrize("kind", ["dit", "cola_dlm"])


# ---- Helpers


def randomise(model, scale=0.3):
    """Weights as of a trained model: nothing is zero, so that every path matters."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data = scale * torch.randn(p.shape, generator=generator)
        if ".ln_" in f".{name}" and name.endswith("weight"):
            p.data += 1
    return model.eval()


def some_rows(rows=4, seed=0):
    """Rows of a context, a target and a tail."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V - 1, (rows, N), generator=generator)
    place = torch.arange(N)
    cuts = torch.arange(rows) % 4 + 2
    ends = N - torch.arange(rows) % 3
    tokens[place >= ends[:, None] - 1] = V - 1
    segment = (place >= cuts[:, None]).long()
    weight = torch.where(place < ends[:, None], 1.0, textldm.TAIL_WEIGHT)
    return make_batch(tokens, segment, weight)


def copy_of_state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal_states(a, b):
    """Whether two nested states of tensors, lists, dicts and numbers are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal_states(x, y) for x, y in zip(a, b))
    return a == b


def gradient_norm(model):
    """The norm of all gradients. 0 where there is none."""
    total = 0.0
    for p in model.parameters():
        if p.grad is not None:
            total += p.grad.double().square().sum().item()
    return math.sqrt(total)


def lines_of(path):
    """The lines of metrics of a run: those of steps, and those of evaluations."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if "norm" in line]
    evaluations = [line for line in lines if "val" in line]
    return steps, evaluations


@pytest.fixture
def quick(monkeypatch):
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def causal(home, tmp_path_factory):
    """The folder of a causal VAE."""
    out = tmp_path_factory.mktemp("causal")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Corpus, "fixed_batches", few_fixed_batches)
        teacher = home / "out/gpt.pt"
        train(home, "variants/cola_dlm.py vae", "--out", out, "--teacher", teacher, steps=2)
    return out


@pytest.fixture(scope="module")
def inputs(home, causal):
    """For each kind of checkpoint the options that name what its script reads."""
    teacher = ["--teacher", home / "out/gpt.pt"]
    return dict(
        gpt=[],
        vae=teacher,
        dit=["--vae", home / "out/vae.pt"],
        masked=[],
        ldlm=[*teacher, "--channels=8", "--coder_layers=1"],
        causal_vae=teacher,
        cola_dlm=["--vae", causal / "vae.pt"],
        data=home / "data",
    )


def run_loop(loop, inputs, out, *more, run_type=Run):
    """Runs a training script of small networks on short rows, with another type of Run. Returns its
    Run."""
    path, *stage = loop.command.split()
    module = load(path)
    for name in ("continue_texts", "continue_in_blocks"):
        if hasattr(module, name):
            setattr(module, name, short_samples)
    runs = []

    def make_run(*given):
        runs.append(run_type(*given))
        return runs[-1]

    module.Run = make_run
    options = [
        "--data",
        inputs["data"],
        "--out",
        out,
        *SIZES,
        "--block_size=16",
        "--batch_size=8",
        "--log_interval=1",
        "--device=cpu",
        *inputs[loop.kind],
        *more,
    ]
    run_module(module, path, *stage, *options)
    return runs[-1]


class UntrainedRun(Run):
    """A run that takes no step."""

    def steps(self, evaluate, keep_latest=False):
        return iter(())


# ---- Muon, and which parameters it is for


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors(shape, dtype, tolerance):
    matrix = torch.randn(1, *shape)
    u, _, vt = torch.linalg.svd(matrix[0], full_matrices=False)
    around = u.T @ orthogonal(matrix, dtype)[0].float() @ vt.T
    singular_values = around.diag()
    assert (around - singular_values.diag()).abs().max() < tolerance
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_muon_steps_along_the_orthogonalised_momentum(shape, dtype, tolerance):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([p], 0.0, dtype)
    set_learning_rate(optimizer, 1.0)
    mean = torch.zeros(shape)
    for gradient in torch.randn(3, *shape):
        before = p.detach().clone()
        p.grad = gradient
        mean = 0.95 * mean + 0.05 * gradient
        optimizer.step()
        nesterov = 0.05 * gradient + 0.95 * mean
        step = 0.2 * max(shape) ** 0.5 * orthogonal(nesterov[None], dtype)[0].float()
        assert torch.allclose(p - before, -step, atol=0.1 * tolerance)
    root_mean_square = (p - before).square().mean().sqrt()
    assert 0.1 < root_mean_square < 0.3, "as long as a step of AdamW"


def test_muon_is_that_of_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has had it since 2.9")
    start = torch.randn(8, 20)
    a = nn.Parameter(start.clone())
    b = nn.Parameter(start.clone())
    ours = Muon([a], 0.1, torch.bfloat16)
    theirs = torch.optim.Muon([b], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    set_learning_rate(ours, 0.01)
    for gradient in torch.randn(4, 8, 20):
        a.grad = gradient
        b.grad = gradient.clone()
        ours.step()
        theirs.step()
    assert torch.allclose(a, b, atol=1e-3)
    assert not torch.allclose(a, start, atol=1e-2)


def test_muon_multiplies_matrices_of_a_shape_at_once_and_each_by_itself():
    start = torch.randn(3, 8, 20)
    gradients = torch.randn(3, 8, 20)
    together = [nn.Parameter(x.clone()) for x in start]
    apart = [nn.Parameter(x.clone()) for x in start]
    groups = [together, *([p] for p in apart)]
    for parameters, given in zip(groups, (gradients, *gradients[:, None])):
        optimizer = Muon(parameters, 0.1, torch.float32)
        set_learning_rate(optimizer, 0.1)
        for p, gradient in zip(parameters, given):
            p.grad = gradient.clone()
        optimizer.step()
    for a, b in zip(together, apart):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("muon", [False, True])
def test_weight_decay_is_of_matrices_alone(muon):
    model = nn.ModuleList([nn.Embedding(5, 8), Block(8, 2), nn.Linear(8, 3)])
    for p in model.parameters():
        p.data.fill_(1)
        p.grad = torch.zeros_like(p)
    cfg = TrainConfig(weight_decay=0.5, muon=muon)
    optimizers = make_optimizers(model, Block, cfg, torch.float32)
    assert len(optimizers) == 1 + muon
    for optimizer in optimizers:
        set_learning_rate(optimizer, 0.1)
        for _ in range(3):
            optimizer.step()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            assert torch.allclose(p, torch.full_like(p, 0.95**3), atol=1e-4), name


@pytest.mark.parametrize("stage", ["gpt", "dit"])
def test_muons_state_is_of_the_matrices_of_blocks(home, stage):
    state = load_checkpoint(home / f"out/{stage}_last.pt", stage, "")
    sizes = [x.dim() for name, x in state["model"].items() if name != "latent_of"]
    of_blocks = 4 * SMALL["n_layer"]
    counts = []
    for optimizer in ("Muon", "AdamW"):
        for group in state[optimizer]["param_groups"]:
            counts.append(len(group["params"]))
    assert counts == [of_blocks, sizes.count(2) - of_blocks, sizes.count(1)]


# ---- What a training script does in a step
#
# Each script has its own copy of the loop, so each is watched.


class Micro(NamedTuple):
    """What a script did with one micro-batch."""

    share: float
    gradient: float  # the norm of the gradients so far
    has_drawn: bool  # from the generator of the micro-batch
    weights: list  # the sums of weights of all weighted means


class CountedNet:
    """A model, with the number of its calls. It stands for a compiled one."""

    def __init__(self, model):
        self.model = model
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *inputs, **options):
        self.calls += 1
        return self.model(*inputs, **options)


class WatchedRun(Run):
    """A run of three steps of two micro-batches that remembers what the script does.

    The shares of the second step are 0 and 1. The gradients of a step get a norm. The validation
    losses are given. The third step has a high number, where all schedules have ended."""

    numbers = (0, 1, 100_000)
    norms = (1000.0, 0.5, 10.0)
    val_losses = (2.0, 1.0, 3.0)

    def __init__(self, *given):
        super().__init__(*given)
        self.net = CountedNet(self.model)
        self.first_states = (copy_of_state(self.model), copy_of_state(self.average))
        self.norms_at_start = []
        self.micros = [[], [], []]
        self.reports = [[], [], []]
        self.optimizer_steps = [[], [], []]
        self.checked_norms = []
        self.ends = []
        self.kept = []
        self.judged = set()
        self.is_judging = False
        self.dtypes = set()
        self.moved_the_global_generator = False
        self.weights = []  # filled by weighted_mean, see `watched`
        for name, model in (("model", self.model), ("average", self.average)):
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_hook(self.hook(name))

    def hook(self, name):
        def on_forward(layer, inputs, output):
            self.dtypes.add(output.dtype)
            if self.is_judging:
                self.judged.add(name)

        return on_forward

    def steps(self, evaluate, keep_latest=False):
        def judge():
            self.is_judging = True
            numbers, text = evaluate()
            self.is_judging = False
            return dict(numbers, loss=self.val_losses[self.step - 1]), text

        for step in super().steps(judge, keep_latest):
            yield self.numbers[step]

    def micro_batches(self, corpus, weight_of):
        self.norms_at_start.append(gradient_norm(self.model))
        for batch, share, generator in super().micro_batches(corpus, weight_of):
            if self.step == 1:
                share = torch.tensor(float(len(self.micros[1])))
            before = generator.get_state()
            before_global = torch.get_rng_state()
            self.weights.clear()
            yield batch, share, generator
            has_drawn = not torch.equal(before, generator.get_state())
            if not torch.equal(before_global, torch.get_rng_state()):
                self.moved_the_global_generator = True
            micro = Micro(float(share), gradient_norm(self.model), has_drawn, list(self.weights))
            self.micros[self.step].append(micro)

    def add(self, losses, share):
        super().add(losses, share)
        values = {name: value.item() for name, value in losses.items()}
        self.reports[self.step].append(values)

    def sum_gradients(self):
        super().sum_gradients()
        scale = self.norms[self.step] / gradient_norm(self.model)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad *= scale

    def require_finite(self, norm):
        super().require_finite(norm)
        self.checked_norms.append(float(norm))

    def on_optimizer_step(self, optimizer, arguments, options):
        rates = {group["lr"] for group in optimizer.param_groups}
        event = (type(optimizer).__name__, gradient_norm(self.model), rates)
        self.optimizer_steps[self.step].append(event)

    def end_step(self, norm, learning_rate):
        states = (copy_of_state(self.model), copy_of_state(self.average))
        self.ends.append((float(norm), learning_rate, *states))
        super().end_step(norm, learning_rate)

    def keep(self, val, is_kept):
        self.kept.append(copy_of_state(self.average))
        super().keep(val, is_kept)


class Watched(NamedTuple):
    loop: Loop
    run: WatchedRun
    muon_dtypes: set

    @property
    def steps(self):
        return lines_of(self.run.metrics)[0]

    def checkpoint(self, end=""):
        path = self.run.out / f"{self.loop.name}{end}.pt"
        return load_checkpoint(path, self.loop.kind, "")


@pytest.fixture(scope="module", params=LOOPS, ids=list(BY_KIND))
def watched(request, inputs, tmp_path_factory):
    """What a script did in a WatchedRun. It multiplies in bf16."""
    loop = request.param
    out = tmp_path_factory.mktemp("watched")
    weights = []
    muon_dtypes = set()
    weighted_mean = textldm.weighted_mean

    class ThisRun(WatchedRun):
        def __init__(self, *given):
            super().__init__(*given)
            self.weights = weights
            self.remove_hook = register_optimizer_step_pre_hook(self.on_optimizer_step).remove

    def remember_weights(x, weight):
        weights.append(weight.float().sum().item())
        return weighted_mean(x, weight)

    def remember_dtype(x, dtype):
        muon_dtypes.add(dtype)
        return orthogonal(x, dtype)

    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        m.setattr(textldm, "weighted_mean", remember_weights)
        m.setattr(engine.muon, "orthogonal", remember_dtype)
        m.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        m.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        options = ["--max_steps=3", "--accumulate=2", "--eval_interval=1", "--warmup=2", "--muon"]
        run = run_loop(loop, inputs, out, *options, run_type=ThisRun)
    run.remove_hook()
    return Watched(loop, run, muon_dtypes)


def test_each_step_begins_without_gradients(watched):
    assert watched.run.norms_at_start == [0, 0, 0]


def test_micro_batches_count_by_their_share(watched):
    """The first micro-batch of the second step has share 0, so it has no gradient."""
    none, all_of_it = watched.run.micros[1]
    assert none.share == 0
    assert none.gradient == 0
    assert all_of_it.share == 1
    assert all_of_it.gradient > 0


def test_shares_are_of_the_weights_that_the_loss_is_a_mean_by(watched):
    for step in (0, 2):
        shares = [micro.share for micro in watched.run.micros[step]]
        assert sum(shares) == pytest.approx(1)
        assert shares[0] != pytest.approx(0.5, abs=1e-4), "these two tell nothing"
        by_weight = []
        for first, second in zip(*(micro.weights for micro in watched.run.micros[step])):
            by_weight.append(first / (first + second))
        # Of rows in blocks a share also counts the first blocks, which some rows do not train.
        tolerance = 0.2 if watched.loop.kind == "cola_dlm" else 1e-5
        assert any(x == pytest.approx(shares[0], rel=tolerance) for x in by_weight)


def test_the_metrics_are_means_over_micro_batches(watched):
    run = watched.run
    for line, (a, b), (first, second) in zip(watched.steps, run.micros, run.reports):
        for name in first:
            mean = a.share * first[name] + b.share * second[name]
            assert line[name] == pytest.approx(mean, rel=1e-4, abs=1e-6), name


def test_the_loss_of_a_micro_batch_draws_from_its_generator_alone(watched):
    draws = [micro.has_drawn for micros in watched.run.micros for micro in micros]
    assert draws == [watched.loop.kind != "gpt"] * 6
    assert not watched.run.moved_the_global_generator


def test_gradients_are_summed_over_processes_and_then_clipped_to_norm_1(watched):
    clipped = []
    for events in watched.run.optimizer_steps:
        _, norm, _ = events[0]  # each optimizer takes its own gradients away
        clipped.append(norm)
    assert clipped == pytest.approx([1, 0.5, 1], rel=1e-4)


def test_the_norm_that_is_checked_and_logged_is_that_before_clipping(watched):
    norms = pytest.approx(WatchedRun.norms, rel=1e-4)
    assert watched.run.checked_norms == norms
    assert [end[0] for end in watched.run.ends] == norms
    assert [line["norm"] for line in watched.steps] == norms


def test_each_optimizer_takes_each_step_once_at_the_rate_of_the_step(watched):
    run = watched.run
    for step, number in enumerate(WatchedRun.numbers):
        rate = run.learning_rate(number)
        events = [(name, rates) for name, _, rates in run.optimizer_steps[step]]
        assert events == [("AdamW", {rate}), ("Muon", {rate})]
        assert run.ends[step][1] == rate
        assert watched.steps[step]["lr"] == rate
    rates = [line["lr"] for line in watched.steps]
    assert len(set(rates)) == 3, "these steps tell rates apart"


def test_the_optimizers_have_each_parameter_once_and_muon_the_matrices_of_blocks(watched):
    model = watched.run.model
    names = {p: name for name, p in model.named_parameters()}
    muon = [names[p] for group in watched.run.parts["Muon"].param_groups for p in group["params"]]
    matrices, vectors = watched.run.parts["AdamW"].param_groups
    in_adamw = [names[p] for p in (*matrices["params"], *vectors["params"])]
    assert sorted([*muon, *in_adamw]) == sorted(names.values())
    assert set(muon) == {name for name in names.values() if MATRIX_OF_A_BLOCK.search(name)}
    assert all(p.dim() > 1 for p in matrices["params"])
    assert all(p.dim() == 1 for p in vectors["params"])
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.01, 0)


def test_the_average_follows_the_weights_at_its_rate(watched):
    """By a decay that grows to 0.999: (2 + step) / (11 + step). Buffers are averaged too."""
    run = watched.run
    if not watched.loop.has_average:
        assert run.average is run.model
        return
    average = dict(run.first_states[1])
    for step, (_, _, weights, found) in zip(WatchedRun.numbers, run.ends):
        decay = min(0.999, (2 + step) / (11 + step))
        for name in average:
            average[name] = decay * average[name] + (1 - decay) * weights[name]
            assert torch.allclose(found[name], average[name], atol=1e-6), (step, name)
    assert not equal_states(average, weights)


def test_the_average_begins_as_the_weights(watched):
    weights, average = watched.run.first_states
    assert equal_states(weights, average)


def test_the_average_is_what_is_judged(watched):
    judged = "average" if watched.loop.has_average else "model"
    assert judged in watched.run.judged
    if watched.loop.has_average:
        assert watched.run.judged == {"average"}


def test_the_average_is_what_is_kept_where_it_was_best_or_the_latest(watched):
    step = 3 if watched.loop.keeps_latest else 2
    kept = watched.checkpoint()
    assert kept["step"] == step
    assert equal_states(dict(kept["model"]), watched.run.kept[step - 1])


def test_a_checkpoint_says_what_it_is(watched):
    state = watched.checkpoint()
    assert state["kind"] == watched.loop.kind
    assert state["tokenizer"]["encoding"] == "bpe"
    assert state["config"]["n_embd"] == 16
    assert state["config"]["vocab_size"] == 300
    assert "data" in state
    assert "AdamW" not in state, "what only a resumed run needs is in the other file"


def test_the_checkpoint_to_resume_has_one_state_for_each_part(watched):
    state = watched.checkpoint("_last")
    parts = {"model", "average", "AdamW", "Muon"}
    assert watched.run.parts.keys() == parts
    for name in parts:
        now = watched.run.parts[name].state_dict()
        assert equal_states(dict(state[name]), dict(now)), name
    assert state["step"] == 3
    assert state["horizon"] == 3


def test_what_is_trained_is_the_net_that_may_be_compiled(watched):
    """LDLM calls parts of its model, and is not compiled."""
    calls = watched.run.net.calls
    if watched.loop.kind == "ldlm":
        assert calls == 0
    else:
        assert calls >= 6, "in each of six micro-batches"


def test_networks_and_optimisers_multiply_in_bf16_where_the_hardware_does(watched):
    """In training and in evaluations."""
    assert watched.run.dtypes == {torch.bfloat16}
    assert watched.muon_dtypes == {torch.bfloat16}


HARDWARE = [
    (True, "AVX512", torch.bfloat16),
    (False, "AVX512", torch.float32),
    (True, "AVX2", torch.float32),
]


@pytest.mark.parametrize("instructions, capability, dtype", HARDWARE)
def test_networks_and_optimiser_multiply_in_what_the_hardware_has(
    home, tmp_path, monkeypatch, capsys, instructions, capability, dtype
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    seen = set()
    forward = GPT.forward

    def remember_dtype(x, dtype):
        seen.add(dtype)
        return orthogonal(x, dtype)

    def remember_output(*given):
        output = forward(*given)
        seen.add(output.dtype)
        return output

    monkeypatch.setattr(engine.muon, "orthogonal", remember_dtype)
    monkeypatch.setattr(GPT, "forward", remember_output)
    train(home, "baselines/gpt.py", f"--out={tmp_path}", steps=1)
    assert seen == {dtype}
    said = capsys.readouterr().out.split("multiplies in ")[1].split(",")[0]
    assert str(dtype)[-2:] in said


class SpoiltRun(Run):
    """A run whose second step has gradients that are not finite."""

    def sum_gradients(self):
        super().sum_gradients()
        if self.step == 1:
            next(p for p in self.model.parameters() if p.grad is not None).grad[0] = math.nan


class SpoiltReport(SpoiltRun):
    """The same, with a loss that is not finite."""

    def add(self, losses, share):
        if self.step == 1:
            losses = dict(losses, loss=losses["loss"] * math.inf)
        super().add(losses, share)


@every_loop
def test_what_is_not_finite_is_named_and_not_saved(loop, inputs, tmp_path, quick, capsys):
    for run_type, what in ((SpoiltRun, "the gradient"), (SpoiltReport, "loss")):
        with pytest.raises(SystemExit) as e:
            options = ["--max_steps=3", "--overwrite"]
            run_loop(loop, inputs, tmp_path, *options, run_type=run_type)
        assert e.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: step 1: {what} is not finite"), error
        state = load_checkpoint(tmp_path / f"{loop.name}_last.pt", loop.kind, "")
        assert state["step"] == 0
        for tensor in state["model"].values():
            assert tensor.isfinite().all()


def test_a_rate_that_is_too_high_is_named_and_saves_nothing(home, tmp_path, capsys):
    home = copy_of(home, tmp_path)
    before = (home / "out/vae_last.pt").read_bytes()
    with pytest.raises(SystemExit):
        train(home, "train_vae.py", "--resume", "--learning_rate=1e38", steps=9)
    error = capsys.readouterr().err
    for word in ("step", "loss", "is not finite", "lower --learning_rate"):
        assert word in error
    assert (home / "out/vae_last.pt").read_bytes() == before


class CountingRun(Run):
    """A run that counts how often the first block is computed in a step."""

    def __init__(self, *given):
        super().__init__(*given)
        self.calls = 0
        blocks = [m for m in self.model.modules() if isinstance(m, Block)]
        trained = next(b for b in blocks if b.ln_1.weight.requires_grad)
        trained.ln_1.register_forward_pre_hook(self.count)

    def count(self, layer, inputs):
        self.calls += 1

    def end_step(self, norm, learning_rate):
        self.calls_in_step = self.calls
        super().end_step(norm, learning_rate)


@pytest.mark.parametrize("loop", LOOPS[:-1], ids=list(BY_KIND)[:-1])
def test_recompute_computes_blocks_again_and_learns_the_same(loop, inputs, tmp_path, quick):
    runs = []
    norms = []
    for option in ("--no-recompute", "--recompute"):
        out = tmp_path / option
        runs.append(run_loop(loop, inputs, out, "--max_steps=1", option, run_type=CountingRun))
        norms.append(lines_of(out / f"{loop.name}.jsonl")[0][0]["norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert runs[1].calls_in_step == runs[0].calls_in_step + 1


def test_the_dit_of_blocks_is_not_recomputed(inputs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_loop(BY_KIND["cola_dlm"], inputs, tmp_path, "--recompute")
    assert "--recompute is for TextLDM and LDLM" in capsys.readouterr().err


def test_recomputed_blocks_give_the_same_gradients():
    """The backward pass computes a block again, and not for the guess, which has no gradient."""
    found = []
    for is_recomputed in (False, True):
        options = dict(predict_tokens=True, self_condition=True, adaln=True)
        config = DiTConfig(**SMALL, block_size=N, vocab_size=V, channels=C, **options)
        dit = randomise(TextDiT(config), scale=0.1)
        if is_recomputed:
            recompute_blocks(dit, Block)
        calls = []
        dit.transformer.h[0].ln_1.register_forward_pre_hook(lambda *_: calls.append(1))
        z_0 = torch.randn(4, N, C, generator=torch.Generator().manual_seed(1))
        flow_loss(dit, some_rows(), z_0, torch.Generator().manual_seed(2)).backward()
        found.append((len(calls), {name: p.grad for name, p in dit.named_parameters()}))
    (once, expected), (again, gradients) = found
    assert once == 2, "for the guess, and for the loss"
    assert again == 3
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-6), name


# ---- What the stages give to their losses


class BetaRun(Run):
    """A run of steps 0, 5, 10 and 99 on counted tokens, with random weights."""

    numbers = (0, 5, 10, 99)

    def __init__(self, *given):
        super().__init__(*given)
        randomise(self.model)
        self.betas = []

    def steps(self, evaluate, keep_latest=False):
        for step in super().steps(evaluate, keep_latest):
            yield self.numbers[step]

    def micro_batches(self, corpus, weight_of):
        for batch, share, generator in super().micro_batches(corpus, weight_of):
            yield batch._replace(weight=batch.counted.float()), share, generator

    def add(self, losses, share):
        super().add(losses, share)
        self.betas.append(((losses["loss"] - losses["ce"]) / losses["kl"]).item())


@both_vaes
def test_beta_grows_from_zero_over_its_warm_up(kind, inputs, tmp_path, quick):
    options = ["--beta=0.5", "--beta_warmup=10", "--teacher=none", "--max_steps=4"]
    run = run_loop(BY_KIND[kind], inputs, tmp_path, *options, run_type=BetaRun)
    assert run.betas == pytest.approx([0, 0.25, 0.5, 0.5], abs=1e-3)


def test_the_teachers_statistics_are_of_counted_tokens():
    teacher = randomise(GPT(TransformerConfig(**SMALL, block_size=N + 1, vocab_size=V)))
    batches = [some_rows(8, seed=i) for i in range(2)]
    mean, std = feature_statistics(teacher, batches)
    features = []
    for batch in batches:
        features.append(teacher_features(teacher, batch.tokens)[batch.weight == 1])
    features = torch.cat(features)
    assert torch.allclose(mean, features.mean(0), atol=1e-5)
    assert torch.allclose(std, features.std(0), atol=1e-5)


@pytest.mark.parametrize("kind", ["vae", "causal_vae", "ldlm"])
def test_each_stage_with_a_teacher_knows_the_statistics_of_its_features(
    kind, inputs, tmp_path, monkeypatch
):
    seen = []

    def remember_batches(corpus, n, device):
        batches = few_fixed_batches(corpus, n, device)
        if corpus.path.stem == "train" and n == 16:
            seen.append((corpus, batches))
        return batches

    monkeypatch.setattr(Corpus, "fixed_batches", remember_batches)
    run = run_loop(BY_KIND[kind], inputs, tmp_path, run_type=UntrainedRun)
    state = load_gpt_state(str(inputs["vae"][1]))
    teacher = GPT(make_config(TransformerConfig, state["config"]))
    teacher.load_state_dict(state["model"])
    mean, std = feature_statistics(teacher, seen[-1][1])
    name = "hidden" if kind == "ldlm" else "teacher"
    found_mean = run.model.get_buffer(f"{name}_mean")
    found_std = run.model.get_buffer(f"{name}_std")
    # The scripts compute in bf16 where the hardware has it.
    assert torch.allclose(found_mean, mean, atol=0.02 * std.max().item())
    assert torch.allclose(found_std, std, rtol=0.05)


class OnlyRowsRun(Run):
    """A run that looks at the rows of a step, and takes none."""

    def steps(self, evaluate, keep_latest=False):
        return iter([0])

    def micro_batches(self, corpus, weight_of):
        self.rows, self.corpus = self.draw(corpus, 0)[0][0], corpus
        raise UserError("seen enough")


@every_loop
def test_each_stage_trains_on_rows_of_its_kind(loop, inputs, tmp_path, quick, capsys):
    """Cut between tokens, or not at all (rows in blocks)."""
    runs = []

    def make_run(*given):
        runs.append(OnlyRowsRun(*given))
        return runs[-1]

    with pytest.raises(SystemExit):
        run_loop(loop, inputs, tmp_path, run_type=make_run)
    assert "seen enough" in capsys.readouterr().err
    (run,) = runs
    is_in_blocks = loop.kind in ("causal_vae", "cola_dlm")
    assert (type(run.corpus).__name__ == "BlockCorpus") == is_in_blocks
    assert bool((run.rows.segment == TARGET).all()) == is_in_blocks
    assert run.corpus.path.stem == "train"
    assert run.model.config.block_size == run.corpus.N


# ---- Evaluation


class RandomRun(Run):
    """A run of random weights. What is judged is the average."""

    def __init__(self, *given):
        super().__init__(*given)
        scale = dict(ldlm=0.3, dit=0.4).get(self.identity["kind"], 0.2)
        randomise(self.model, scale)
        randomise(self.average, scale)


class DeafRun(RandomRun):
    """A run whose DiT reads nothing when it is judged."""

    def __init__(self, *given):
        super().__init__(*given)
        dit = getattr(self.average, "dit", self.average)
        width = dit.to_output.out_features

        def forward(x, *given, places=None):
            if places is None:
                return torch.zeros(*x.shape[:2], width)
            return torch.zeros(len(places), width)

        dit.forward = forward


@all_dits
def test_shuffled_contexts_are_of_other_rows(kind, inputs, tmp_path, quick):
    tables = []
    for run_type in (RandomRun, DeafRun):
        out = tmp_path / run_type.__name__
        options = ["--max_steps=1", "--learning_rate=1e-9"]
        run_loop(BY_KIND[kind], inputs, out, *options, run_type=run_type)
        evaluations = lines_of(out / "dit.jsonl")[1]
        tables.append(evaluations[0]["val"]["table"])
    random, deaf = tables
    assert [row["t"] for row in random] == pytest.approx(np.arange(1, 10) / 10)
    for row in random:
        assert abs(row["shuffled"] - row["loss"]) > 1e-3
    for row in deaf:
        assert row["shuffled"] == row["loss"], "one that reads no context"


def test_another_rows_context_is_long_enough():
    needed = [3, 1, 5, 9]
    lengths = [6, 2, 4, 8]
    others = rows_with_other_contexts(needed, lengths)
    assert others == [2, 2, 3, 3], "the next one that is longer, or its own where there is none"


# ---- A run


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = TransformerConfig(n_layer=1, n_head=1, n_embd=2, block_size=16)
        self.layer = nn.Linear(2, 3)


class ToyCorpus:
    """Rows of random tokens and of random weights."""

    N = 16

    def batch(self, rng, B, N):
        tokens = torch.from_numpy(rng.integers(9, size=(B, N)))
        weight = torch.from_numpy(rng.random((B, N))).float()
        return make_batch(tokens, torch.full((B, N), TARGET), weight)


def toy_run(out, **options):
    cfg = TrainConfig(out=str(out), device="cpu", batch_size=2, log_interval=1, **options)
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters())
    return Run("toy", cfg, model, model, [optimizer], dict(kind="toy", tokenizer={}))


def sum_of_weights(batch):
    return batch.weight.sum()


def judge_nothing():
    return dict(loss=1.0), "judged"


def take_steps(run, before_step=None, after_step=None, evaluate=judge_nothing, keep_latest=False):
    """A loop whose loss is 1."""
    for step in run.steps(evaluate, keep_latest):
        if before_step is not None:
            before_step(step)
        for _, share, _ in run.micro_batches(ToyCorpus(), sum_of_weights):
            run.add(dict(loss=torch.tensor(1.0)), share)
        run.end_step(torch.tensor(2.0), 0.1)
        if after_step is not None:
            after_step(run.step)


def test_each_micro_batch_has_rows_and_random_numbers_of_its_own(tmp_path):
    numbers = set()
    rows = set()
    for seed in (1, 2):
        run = toy_run(tmp_path, accumulate=2, seed=seed)
        for step in range(3):
            for batch, generator in run.draw(ToyCorpus(), step):
                numbers.add(torch.rand((), generator=generator).item())
                rows.add(tuple(batch.tokens.flatten().tolist()))
    assert len(numbers) == 12, "of two seeds, three steps and two micro-batches"
    assert len(rows) == 12


def test_the_rows_of_a_step_depend_on_its_number_alone(tmp_path):
    a = toy_run(tmp_path).draw(ToyCorpus(), 5)
    b = toy_run(tmp_path).draw(ToyCorpus(), 5)
    for (batch, generator), (same_batch, same_generator) in zip(a, b):
        assert torch.equal(batch.tokens, same_batch.tokens)
        assert torch.equal(generator.get_state(), same_generator.get_state())


def test_processes_share_out_the_micro_batches_of_one(tmp_path):
    one = toy_run(tmp_path, accumulate=4).draw(ToyCorpus(), 3)
    several = []
    for rank in range(2):
        run = toy_run(tmp_path, accumulate=2)
        run.rank = rank
        several += run.draw(ToyCorpus(), 3)
    assert len(several) == 4
    for (batch, generator), (same_batch, same_generator) in zip(one, several):
        assert torch.equal(batch.tokens, same_batch.tokens)
        assert torch.equal(generator.get_state(), same_generator.get_state())


def test_the_rows_of_a_micro_batch_share_a_random_length(tmp_path):
    run = toy_run(tmp_path)
    lengths = set()
    for step in range(60):
        ((batch, _),) = run.draw(ToyCorpus(), step)
        lengths.add(batch.tokens.shape[1])
    assert lengths == {8, 10, 12, 14, 16}, "from a half of a row in eighths"


def test_shares_are_of_the_weight_of_all_micro_batches(tmp_path):
    run = toy_run(tmp_path, accumulate=3)
    given = list(run.micro_batches(ToyCorpus(), sum_of_weights))
    weights = [batch.weight.sum().item() for batch, _, _ in given]
    shares = [share.item() for _, share, _ in given]
    assert len(set(weights)) == 3
    assert shares == pytest.approx([weight / sum(weights) for weight in weights])


def test_two_micro_batches_are_one_of_all_their_rows(inputs, tmp_path, quick):
    """The loss of the GPT, and the norm of its gradient."""

    class RowsRun(Run):
        def __init__(self, *given):
            super().__init__(*given)
            self.first_model = copy_of_state(self.model)
            self.batches = []

        def draw(self, corpus, step):
            drawn = super().draw(corpus, step)
            if step == 0:
                self.batches = [batch for batch, _ in drawn]
            return drawn

    options = ["--max_steps=1", "--accumulate=2"]
    run = run_loop(BY_KIND["gpt"], inputs, tmp_path, *options, run_type=RowsRun)
    a, b = run.batches
    assert a.counted.sum() != b.counted.sum()
    length = max(a.tokens.shape[1], b.tokens.shape[1])

    def padded(name, value):
        rows = []
        for batch in (a, b):
            x = getattr(batch, name)
            rows.append(nn.functional.pad(x, (0, length - x.shape[1]), value=value))
        return torch.cat(rows)

    both = make_batch(padded("tokens", 299), padded("segment", TARGET), padded("weight", 0.0))
    gpt = run.model
    gpt.load_state_dict(run.first_model)
    gpt.zero_grad()
    with run.autocast:
        loss = load("baselines/gpt.py").gpt_loss(gpt, both)
    loss.backward()
    (line,) = lines_of(tmp_path / "gpt.jsonl")[0]
    tolerance = 1e-5 if pick_dtype(run.device) == torch.float32 else 1e-2
    assert line["loss"] == pytest.approx(loss.item(), rel=tolerance)
    assert line["norm"] == pytest.approx(gradient_norm(gpt), rel=tolerance)


def test_rows_that_are_drawn_ahead_are_those_of_the_next_step(tmp_path):
    run = toy_run(tmp_path, accumulate=2)
    for step in range(3):
        run.step = step
        given = [batch for batch, _, _ in run.micro_batches(ToyCorpus(), sum_of_weights)]
        expected = [batch for batch, _ in toy_run(tmp_path, accumulate=2).draw(ToyCorpus(), step)]
        for batch, same in zip(given, expected):
            assert torch.equal(batch.tokens, same.tokens)


def test_the_report_of_a_step_begins_anew(tmp_path):
    run = toy_run(tmp_path, max_steps=3, accumulate=2)
    take_steps(run)
    steps, _ = lines_of(tmp_path / "toy.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [line["loss"] for line in steps] == pytest.approx([1, 1, 1])
    assert [line["norm"] for line in steps] == [2, 2, 2]


def test_lines_of_metrics_come_at_their_interval(tmp_path):
    run = toy_run(tmp_path, max_steps=6)
    run.cfg.log_interval = 3
    take_steps(run)
    steps, _ = lines_of(tmp_path / "toy.jsonl")
    assert [line["step"] for line in steps] == [3, 6]


def test_the_rate_warms_up_and_falls_to_a_tenth_by_a_cosine(tmp_path):
    run = toy_run(tmp_path, max_steps=110, warmup=10, learning_rate=2.0)
    assert run.learning_rate(0) == pytest.approx(0.2)
    assert run.learning_rate(4) == pytest.approx(1.0)
    assert run.learning_rate(10) == pytest.approx(2.0)
    assert run.learning_rate(60) == pytest.approx(1.1), "half way, between 2 and 0.2"
    assert run.learning_rate(110) == pytest.approx(0.2)
    assert run.learning_rate(999) == pytest.approx(0.2)


@pytest.mark.parametrize("muon, peak", [(True, 4e-3), (False, 1e-3)])
def test_the_default_rate_is_that_of_the_optimiser(tmp_path, muon, peak):
    assert toy_run(tmp_path, muon=muon, warmup=0).learning_rate(0) == pytest.approx(peak)


def judge_by(run, losses):
    """An evaluation that finds these losses after the steps 1, 2 and so on."""

    def evaluate():
        return dict(loss=losses[run.step - 1]), f"judged after step {run.step}"

    return evaluate


@pytest.mark.parametrize("interval, expected", [(2, [2, 4, 5]), (5, [5]), (9, [5])])
def test_evaluations_come_at_their_interval_and_at_the_end(tmp_path, interval, expected):
    run = toy_run(tmp_path, max_steps=5, eval_interval=interval)
    times = []

    def evaluate():
        times.append(run.step)
        return dict(loss=1.0), ""

    take_steps(run, evaluate=evaluate)
    assert times == expected
    _, evaluations = lines_of(tmp_path / "toy.jsonl")
    assert [line["step"] for line in evaluations] == expected


def test_an_evaluation_computes_in_the_precision_of_training_and_says_its_text(tmp_path, capsys):
    run = toy_run(tmp_path, max_steps=1)
    run.autocast = torch.autocast("cpu", torch.bfloat16)
    seen = []

    def evaluate():
        seen.append(torch.is_autocast_enabled("cpu"))
        return dict(loss=1.0), "what was found"

    take_steps(run, lambda step: seen.append(torch.is_autocast_enabled("cpu")), evaluate=evaluate)
    assert seen == [False, True]
    assert "what was found" in capsys.readouterr().out


def test_only_the_first_process_judges_saves_and_speaks(tmp_path, capsys):
    run = toy_run(tmp_path, max_steps=3, eval_interval=1)
    capsys.readouterr()
    run.rank = 1
    take_steps(run, evaluate=fails_with(AssertionError("the second process judges")))
    assert run.step == 3
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("is_latest, kept", [(False, 2), (True, 4)])
def test_the_best_checkpoint_is_kept_or_where_asked_the_latest(tmp_path, is_latest, kept):
    run = toy_run(tmp_path, max_steps=4, eval_interval=1)
    losses = (2.0, 1.0, 4.0, 3.0)
    take_steps(run, evaluate=judge_by(run, losses), keep_latest=is_latest)
    assert load_checkpoint(tmp_path / "toy.pt", "toy", "")["step"] == kept
    assert load_checkpoint(tmp_path / "toy_last.pt", "toy", "")["step"] == 4
    _, evaluations = lines_of(tmp_path / "toy.jsonl")
    assert [line["val"]["loss"] for line in evaluations] == list(losses)


@pytest.mark.parametrize("is_latest, kept", [(False, 1), (True, 3)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_whose_validation_loss_is_not_finite_is_not_kept(
    tmp_path, capsys, value, is_latest, kept
):
    """The run goes on, and knows what was best before."""
    run = toy_run(tmp_path, max_steps=4, eval_interval=1)
    losses = (1.0, value, 2.0, value)
    take_steps(run, evaluate=judge_by(run, losses), keep_latest=is_latest)
    said = capsys.readouterr().out
    assert said.count(f"warning: the validation loss is {value}; this model is not kept") == 2
    assert load_checkpoint(tmp_path / "toy.pt", "toy", "")["step"] == kept
    assert load_checkpoint(tmp_path / "toy_last.pt", "toy", "")["step"] == 4
    assert said.splitlines()[-1].endswith(f"{tmp_path}/toy.pt is of step {kept}")


def test_a_run_that_kept_no_model_does_not_name_one(tmp_path, capsys):
    run = toy_run(tmp_path, max_steps=1)
    take_steps(run, evaluate=judge_by(run, [math.nan]))
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"toy: wrote {tmp_path}/toy_last.pt (to --resume)"
    )
    assert not (tmp_path / "toy.pt").exists()


def test_the_first_line_says_what_is_trained_and_where(home, tmp_path, capsys):
    train(home, "baselines/gpt.py", f"--out={tmp_path}", steps=1)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("gpt: 0.0M parameters on cpu, which multiplies in ")
    corpus = Corpus(home / "data", "train", 64)
    assert said[0].endswith(f"; rows of {corpus.N + 1} tokens")
    files = f"{tmp_path}/gpt_last.pt (to --resume); {tmp_path}/gpt.pt is of step 1"
    assert said[-1] == f"gpt: wrote {files}"


TIMES = [(89, "89 seconds"), (91, "2 minutes"), (600, "10 minutes"), (9000, "2.5 hours")]


@pytest.mark.parametrize("seconds, text", TIMES)
def test_times_are_said_in_their_unit(seconds, text):
    assert minutes(seconds) == text


@pytest.mark.parametrize("whole_over_this", [0, 10])
def test_the_time_of_a_run_is_estimated_after_its_first_steps(
    tmp_path, monkeypatch, capsys, whole_over_this
):
    """Of 20 steps, here in 40 seconds."""
    clock = iter((100.0, 140.0))

    class Time:
        @staticmethod
        def perf_counter():
            return next(clock)

    monkeypatch.setattr(engine.loop, "time", Time)
    run = toy_run(tmp_path, max_steps=300)
    run.whole_over_this = whole_over_this

    def stop(step):
        if step == 26:
            run.signals.append(signal.SIGTERM)

    with pytest.raises(SystemExit):
        take_steps(run, after_step=stop)
    said = [line for line in capsys.readouterr().out.splitlines() if "about" in line]
    expected = "toy: about 10 minutes on this machine"
    if whole_over_this:
        expected += "; all three stages of README's first command about 1.7 hours"
    assert said == [expected]


@pytest.mark.parametrize("options", [[], ["--batch_size=8"]])
def test_the_time_of_the_first_command_is_estimated_without_options_alone(
    home, tmp_path, monkeypatch, options
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/names").symlink_to(home / "data")
    module = load("baselines/gpt.py")
    runs = []

    def make_run(*given):
        runs.append(UntrainedRun(*given))
        return runs[-1]

    module.Run = make_run
    run_module(module, "baselines/gpt.py", *options)
    assert runs[0].whole_over_this == (0 if options else module.FIRST_COMMAND)


# ---- Signals, and resuming


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_step_finish_and_saves_it(tmp_path, number):
    run = toy_run(tmp_path, max_steps=9)

    def send(step):
        if step == 2:
            os.kill(os.getpid(), number)

    words = "toy: stopped after step 3; the same command with --resume"
    with pytest.raises(SystemExit, match=words):
        take_steps(run, before_step=send)
    assert load_checkpoint(tmp_path / "toy_last.pt", "toy", "")["step"] == 3
    assert [line["step"] for line in lines_of(tmp_path / "toy.jsonl")[0]] == [1, 2, 3]


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    run = toy_run(tmp_path, max_steps=2)

    def send(step):
        if step == 0:
            assert signal.getsignal(signal.SIGINT) == run.on_signal
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL

    with pytest.raises(SystemExit):
        take_steps(run, before_step=send)


def test_a_new_run_replaces_the_checkpoint_and_metrics_of_an_older_one(tmp_path):
    take_steps(toy_run(tmp_path, max_steps=2))
    run = toy_run(tmp_path, max_steps=2, overwrite=True)

    def look(step):
        if step == 0:
            assert load_checkpoint(tmp_path / "toy_last.pt", "toy", "")["step"] == 0
            assert (tmp_path / "toy.jsonl").read_text() == ""

    take_steps(run, before_step=look)


def test_a_resumed_run_knows_its_best(tmp_path):
    losses = (1.0, 3.0, 2.0)
    run = toy_run(tmp_path, max_steps=1, eval_interval=1)
    take_steps(run, evaluate=judge_by(run, losses))
    run = toy_run(tmp_path, max_steps=3, eval_interval=1, resume=True)
    take_steps(run, evaluate=judge_by(run, losses))
    assert load_checkpoint(tmp_path / "toy.pt", "toy", "")["step"] == 1
    assert load_checkpoint(tmp_path / "toy_last.pt", "toy", "")["step"] == 3


class Killed(BaseException):
    pass


class KilledRun(Run):
    """A run that ends without warning in its fourth step. The third is in the metrics, and in no
    checkpoint."""

    def micro_batches(self, corpus, weight_of):
        if self.step == 3:
            raise Killed
        return super().micro_batches(corpus, weight_of)


class KilledInEvaluation(Run):
    """A run that ends without warning in its first evaluation."""

    def steps(self, evaluate, keep_latest=False):
        def judge():
            evaluate()
            raise Killed

        return super().steps(judge, keep_latest)


class KilledAfterEvaluation(Run):
    """A run that ends without warning when the evaluation is in the metrics, and the model is in no
    file."""

    def write(self, **line):
        super().write(**line)
        if "val" in line:
            raise Killed


class StoppedInEvaluation(Run):
    """A run that is asked to stop in its first evaluation."""

    def steps(self, evaluate, keep_latest=False):
        def judge():
            evaluate()
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the evaluation goes on")

        return super().steps(judge, keep_latest)


class StoppedRun(Run):
    """A run that is asked to stop in its third step."""

    def micro_batches(self, corpus, weight_of):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().micro_batches(corpus, weight_of)


INTERRUPTIONS = dict(
    killed=(KilledRun, Killed, None, 2),
    stopped=(StoppedRun, SystemExit, "stopped after step 3; the same command", 3),
    killed_in_evaluation=(KilledInEvaluation, Killed, None, 2),
    killed_after_evaluation=(KilledAfterEvaluation, Killed, None, 2),
    stopped_in_evaluation=(StoppedInEvaluation, SystemExit, "stopped after step 2; the same", 2),
)


@pytest.fixture(scope="module", params=LOOPS, ids=list(BY_KIND))
def whole(request, inputs, tmp_path_factory):
    """The loop, and the folder of four steps that were not interrupted."""
    loop = request.param
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        run_loop(loop, inputs, out, "--max_steps=4", "--eval_interval=2")
    return loop, out


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_resume_equals_no_interruption(whole, how, inputs, tmp_path, quick):
    check_resumed(whole, how, inputs, tmp_path)


# One whose evaluation changes nothing, one that standardises latents, one that keeps the latest.
@pytest.mark.parametrize("whole", [BY_KIND[k] for k in ("gpt", "vae", "ldlm")], indirect=True)
@pytest.mark.parametrize("how", [how for how in INTERRUPTIONS if "evaluation" in how])
def test_resume_equals_no_interrupted_evaluation(whole, how, inputs, tmp_path, quick):
    check_resumed(whole, how, inputs, tmp_path)


def check_resumed(whole, how, inputs, tmp_path):
    """A resumed run equals an undisturbed one to the bit, and has each line of metrics once,
    whether the last step was saved or is done again."""
    loop, out = whole
    options = ["--max_steps=4", "--eval_interval=2"]
    run_type, error, words, saved = INTERRUPTIONS[how]
    with pytest.raises(error, match=words):
        run_loop(loop, inputs, tmp_path, *options, run_type=run_type)
    last = f"{loop.name}_last.pt"
    metrics = f"{loop.name}.jsonl"
    assert load_checkpoint(tmp_path / last, loop.kind, "")["step"] == saved
    with open(tmp_path / metrics, "a") as f:
        f.write('{"step": 4, "loss"')  # half a line
    run_loop(loop, inputs, tmp_path, *options, "--resume")
    for name in (last, f"{loop.name}.pt"):
        expected = load_checkpoint(out / name, loop.kind, "")
        resumed = load_checkpoint(tmp_path / name, loop.kind, "")
        assert resumed.keys() == expected.keys()
        for part in expected:
            assert equal_states(expected[part], resumed[part]), (name, part)
    assert (tmp_path / metrics).read_text() == (out / metrics).read_text()


def test_the_same_command_again_is_refused_and_changes_no_byte(
    whole, inputs, tmp_path, quick, capsys
):
    """Also where only the model is left, or only what --resume needs."""
    loop, out = whole
    for missing in (None, f"{loop.name}.pt", f"{loop.name}_last.pt"):
        again = tmp_path / str(missing)
        shutil.copytree(out, again)
        if missing:
            (again / missing).unlink()
        before = snapshot(again)
        with pytest.raises(SystemExit) as e:
            run_loop(loop, inputs, again, "--max_steps=4", "--eval_interval=2")
        assert e.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        for words in ("an earlier run", "--resume", "another --out", "--overwrite"):
            assert words in error
        assert snapshot(again) == before


def rates_of(home):
    return [line["lr"] for line in lines_of(home / "out/gpt.jsonl")[0]]


def test_more_steps_go_on_at_the_last_rate(home, tmp_path):
    home = copy_of(home, tmp_path)
    train(home, "baselines/gpt.py", "--warmup=0", "--overwrite")
    train(home, "baselines/gpt.py", "--warmup=0", "--resume", steps=6)
    rates = rates_of(home)
    assert len(rates) == 6
    assert rates[0] > rates[3] > rates[4]
    assert rates[4] == rates[5]
    assert rates[4] == pytest.approx(0.1 * rates[0])


def test_more_steps_go_on_with_the_warm_up(home, tmp_path):
    home = copy_of(home, tmp_path)
    train(home, "baselines/gpt.py", "--resume", "--warmup=100", steps=6)
    rates = rates_of(home)
    assert len(rates) == 6
    assert rates[4:] == pytest.approx([5 / 4 * rates[3], 6 / 4 * rates[3]])


FALLS = [
    ("gpt", 0.97),
    ("vae", 0.97),
    ("dit", 0.97),
    ("causal_vae", 0.97),
    ("cola_dlm", 0.97),
    ("masked", 0.99),
]


@pytest.mark.parametrize("kind, fall", FALLS)
def test_training_learns_and_remembers(kind, fall, inputs, tmp_path, quick):
    loop = BY_KIND[kind]
    options = ["--max_steps=90", "--eval_interval=30", "--learning_rate=1e-2", "--warmup=0"]
    run_loop(loop, inputs, tmp_path, *options)
    steps, evaluations = lines_of(tmp_path / f"{loop.name}.jsonl")
    losses = [line["val"]["loss"] for line in evaluations]
    assert len(steps) == 90
    assert len(losses) == 3
    assert min(losses) < fall * losses[0]
    best = load_checkpoint(tmp_path / f"{loop.name}.pt", kind, "")
    last = load_checkpoint(tmp_path / f"{loop.name}_last.pt", kind, "")
    assert best["step"] == (30, 60, 90)[losses.index(min(losses))]
    is_averaged = not equal_states(dict(last["model"]), dict(last["average"]))
    assert is_averaged == loop.has_average


def test_the_metrics_have_all_terms_of_each_step(home):
    steps, _ = lines_of(home / "out/vae.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {"ce", "kl", "cos", "accuracy", "loss", "norm", "lr"} <= steps[1].keys()


# ---- Several processes


TWO_PROCESSES = """
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine.corpus import Corpus
from engine.train import Run
from tests.helpers import few_fixed_batches, load, run_module

Corpus.fixed_batches = few_fixed_batches
rank = int(os.environ["RANK"])
ports = os.environ["PORTS"].split()
out = Path(sys.argv[1])
options = sys.argv[2:]

# The first process group: do two processes reach each other at all?
os.environ["MASTER_PORT"] = ports[0]
try:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
except Exception:
    sys.exit(77)
(out / f"{rank}.met").touch()

run = Run.__new__(Run)
run.world, run.rank, run.device = 2, rank, torch.device("cpu")
run.model = torch.nn.Linear(2, 2)
run.model.register_buffer("mean", torch.full((3,), float(rank + 5)))
run.model.weight.grad = torch.full((2, 2), float(rank + 1))
run.sum_gradients()
found = dict(
    gradient=run.model.weight.grad.flatten().tolist(),
    has_other_gradient=run.model.bias.grad is not None,
    buffer=run.model.mean.tolist(),
    sum=run.sum_of_all(torch.tensor(rank + 1.0)).item(),
)
dist.destroy_process_group()

# The second: training.
os.environ["MASTER_PORT"] = ports[1]
run_module(load("train_vae.py"), "train_vae.py", *options, "--out", out / "two")

# The third: training that fails.
os.environ["MASTER_PORT"] = ports[2]
failing = [*options, "--out", out / "failing", "--learning_rate=1e38", "--warmup=0"]
try:
    run_module(load("train_vae.py"), "train_vae.py", *failing)
except SystemExit as e:
    found["code"] = e.code
(out / f"{rank}.json").write_text(json.dumps(found))
"""


def free_ports(number):
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def start_two(*arguments):
    """Two processes of TWO_PROCESSES, in fp32 and as torchrun would start them. Returns their exit
    codes, with None for one that had to be killed."""
    environment = dict(
        os.environ,
        MASTER_ADDR="127.0.0.1",
        PORTS=" ".join(map(str, free_ports(3))),
        WORLD_SIZE="2",
        OMP_NUM_THREADS="1",
        ATEN_CPU_CAPABILITY="default",
    )
    command = [sys.executable, "-c", TWO_PROCESSES, *map(str, arguments)]
    started = []
    for rank in range(2):
        mine = dict(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        process = subprocess.Popen(command, cwd=ROOT, env=mine, stdout=subprocess.DEVNULL)
        started.append(process)
    end = time.monotonic() + 100
    while time.monotonic() < end and None in [process.poll() for process in started]:
        time.sleep(0.05)
    codes = [process.poll() for process in started]
    for process in started:
        process.kill()
        process.wait()
    return codes


@pytest.fixture(scope="module")
def two_processes(home, tmp_path_factory):
    """The options of the training, its folder, and what each process found. Skips where two
    processes do not reach each other."""
    out = tmp_path_factory.mktemp("processes")
    options = [
        "--data",
        home / "data",
        "--teacher",
        home / "out/gpt.pt",
        "--max_steps=6",
        "--eval_interval=6",
        "--batch_size=8",
        "--log_interval=1",
        "--device=cpu",
        *SIZES,
    ]
    codes = start_two(out, *options)
    have_met = all((out / f"{rank}.met").exists() for rank in range(2))
    if not have_met:  # one exits with 77, or waits for the other until it is killed
        pytest.skip("two processes of torch's gloo do not reach each other on this machine")
    assert codes == [0, 0]
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    return options, out, found


def test_gradients_are_summed_and_buffers_are_those_of_the_first_process(two_processes):
    _, _, found = two_processes
    for one in found:
        assert one["gradient"] == [3, 3, 3, 3], "1 + 2"
        assert not one["has_other_gradient"]
        assert one["buffer"] == [5, 5, 5]
        assert one["sum"] == 3


def test_two_processes_learn_what_one_does(two_processes, tmp_path, monkeypatch, quick):
    """As torchrun runs them, against one process with two micro-batches in a step."""
    options, out, _ = two_processes
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")  # so fp32
    run_module(load("train_vae.py"), "train_vae.py", *options, "--out", tmp_path, "--accumulate=2")
    numbers = []
    for folder in (tmp_path, out / "two"):
        steps, _ = lines_of(folder / "vae.jsonl")
        numbers.append(np.array([(line["loss"], line["norm"]) for line in steps]))
    one, two = numbers
    assert len(one) == 6
    assert two == pytest.approx(one, rel=2e-3)
    assert two[0] == pytest.approx(one[0], rel=1e-5)


def test_both_processes_say_what_is_not_finite_and_end(two_processes):
    _, _, found = two_processes
    assert [one["code"] for one in found] == [2, 2]


# ---- Checkpoints


@pytest.mark.parametrize("content", ["a text\n", dict(kind="toy", x=torch.ones(2))])
def test_a_file_is_written_whole(tmp_path, content):
    path = tmp_path / "file.pt"
    write_whole(path, "what was there")
    write_whole(path, content)
    if isinstance(content, str):
        assert path.read_text() == content
    else:
        assert equal_states(load_checkpoint(path, "toy", ""), content)
    assert list(tmp_path.iterdir()) == [path]


def fails_with(error):
    def fail(*given, **named):
        raise error

    return fail


FAILURES = [
    ("torch.save", RuntimeError("disk full")),
    ("os.fsync", OSError("disk full")),
    ("os.replace", OSError("disk full")),
]


@pytest.mark.parametrize("name, error", FAILURES)
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch, name, error):
    path = tmp_path / "file.pt"
    write_whole(path, dict(kind="toy", x=torch.zeros(2)))
    before = path.read_bytes()
    monkeypatch.setattr(f"engine.checkpoint.{name}", fails_with(error))
    with pytest.raises(UserError, match="cannot write .*disk full.*what was there is as it was"):
        write_whole(path, dict(kind="toy", x=torch.ones(2)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_flipped_bit_anywhere_in_the_tensors_is_found(home, tmp_path):
    whole = (home / "out/vae.pt").read_bytes()
    places = []
    with zipfile.ZipFile(home / "out/vae.pt") as file:
        for info in file.infolist():
            if "/data/" in info.filename and info.file_size:
                with file.open(info) as entry:
                    places.append(whole.index(entry.read()) + info.file_size // 2)
    assert len(places) > 20
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 4
        (tmp_path / "flipped.pt").write_bytes(flipped)
        with pytest.raises(UserError, match="is no whole checkpoint"):
            load_checkpoint(tmp_path / "flipped.pt", "vae", "")


def test_a_compressed_checkpoint_is_refused(home, tmp_path):
    """It might claim any size."""
    with zipfile.ZipFile(home / "out/vae.pt") as source:
        with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as target:
            for info in source.infolist():
                target.writestr(info.filename, source.read(info))
    with pytest.raises(ValueError, match="damaged"):
        read_tensors(tmp_path / "small.pt")


def test_a_model_takes_the_tensors_of_its_checkpoint_and_no_memory_of_its_own(home):
    """So it takes no memory for what a config claims."""
    devices = set()

    class Observed(TextVAE):
        def __init__(self, config):
            super().__init__(config)
            devices.update(x.device.type for x in self.state_dict().values())

    state = load_checkpoint(home / "out/vae.pt", "vae", "")
    vae = build(Observed, VAEConfig, state)
    assert devices == {"meta"}
    assert equal_states(dict(vae.state_dict()), dict(state["model"]))
    assert vae.wte.weight.data_ptr() == state["model"]["wte.weight"].data_ptr()
    assert vae.wte.weight.dtype == torch.float32


def test_copied_blocks_compute_what_their_originals_do():
    """A DiT that begins as the decoder, of two to four layers. Its gates are closed as ever."""
    vae = randomise(TextVAE(VAEConfig(**SMALL, block_size=N, vocab_size=V, channels=C)))
    options = dict(SMALL, n_layer=4)
    dit = TextDiT(DiTConfig(**options, vocab_size=V, channels=C, adaln=True))
    copy_blocks(vae.decoder.h, dit.transformer.h)
    position = torch.arange(N)
    h = torch.randn(3, N, 16)
    time_emb = dit.time_embedding(torch.full((3,), 0.5))
    shut = dit.transformer.h[0](h, position=position, time_emb=time_emb)
    assert torch.allclose(shut, h)
    for i, block in enumerate(dit.transformer.h):
        block.adaln = None
        expected = vae.decoder.h[i // 2](h, position=position)
        assert torch.equal(block(h, position=position), expected)


@both_dits
def test_a_dit_begins_as_the_decoder_of_its_width_alone(kind, inputs, tmp_path, quick):
    is_copied = []
    vae = load_checkpoint(inputs[kind][1], ("vae", "causal_vae"), "")["model"]
    name = "h.1.mlp.c_fc.weight"
    for option in ("--from_decoder", "--no-from_decoder", "--n_embd=32", "--n_head=1"):
        run = run_loop(BY_KIND[kind], inputs, tmp_path, option, run_type=UntrainedRun)
        ours = run.model.transformer.get_parameter(name)
        is_copied.append(torch.equal(ours, vae[f"decoder.{name}"]))
        average = run.average.transformer.get_parameter(name)
        assert torch.equal(average, ours)
    assert is_copied == [True, False, False, False]

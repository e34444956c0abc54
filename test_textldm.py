"""Properties of TextLDM, on CPU, with no network: python -m pytest

Each test guards one thing, and fails when that thing is broken (we broke each once to see).
"""

import contextlib
import gzip
import importlib.util
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import textldm
import train_dit
import train_vae
from sample import generate
from textldm import (CONTEXT, GPT, PADDING, TARGET, Batch, Corpus, DiTConfig, TextDiT, TextVAE, TrunkConfig, UserError, VAEConfig,
                     continue_texts, denoising_loss, euler, flow_loss, guided_estimate, load_checkpoint, teacher_features,
                     write_whole)

ROOT = Path(__file__).parent
EOT, V, C, N = 49, 50, 6, 12
ONE = torch.zeros(N, dtype=torch.long)  # block: TextLDM's target is one
SMALL = dict(n_layer=2, n_head=2, n_embd=16)
DOCUMENTS = ["greek small letter alpha", "greek small letter beta", "latin capital letter a with grave",
             "cyrillic letter zhe", "arabic letter alef", "café ☕ naïve", "one two three four five six"] * 40


def randomise(model, seed=0, scale=0.3):
    """Weights as of a trained model: nothing zero, so that every path matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data = scale * torch.randn(p.shape, generator=generator) + (".ln_" in f".{name}" and name.endswith("weight"))
    return model.eval()


def make_batch(rows=4, n=N, seed=0):
    """Rows of a context, a target, and a tail."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V - 1, (rows, n), generator=generator)
    cuts, ends = torch.arange(rows) + 2, n - torch.arange(rows) % 3
    at = torch.arange(n)
    tokens[at >= ends[:, None] - 1] = EOT
    segment = (at >= cuts[:, None]).long()
    return Batch(tokens, segment, torch.where(at < ends[:, None], 1.0, textldm.TAIL_WEIGHT))


@pytest.fixture
def vae():
    return randomise(TextVAE(VAEConfig(**SMALL, block_size=N, vocab_size=V, channels=C, teacher_embd=16)))


@pytest.fixture(params=[False, True], ids=["velocity", "tokens"])
def dit(request):
    dit = randomise(TextDiT(DiTConfig(**SMALL, block_size=N, vocab_size=V, channels=C, predict_tokens=request.param)), scale=0.1)
    dit.to_output.weight.data *= 30 if request.param else 1  # sure of its tokens
    dit.latent_of.normal_(generator=torch.Generator().manual_seed(1))
    return dit


@pytest.fixture(autouse=True)
def alone():
    """Each test has the same luck, whichever ran before it. Training takes over Ctrl-C and SIGTERM; a test gives them back."""
    torch.manual_seed(0)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


def all_of(z):  # the mask that hides nothing
    return torch.ones(len(z), 1, 1, 1, dtype=torch.bool)


def loss_on(dit, vae, batch, seed):
    return flow_loss(dit, vae.latents(batch.tokens, batch.segment), batch, torch.Generator().manual_seed(seed))[0]


def load(path):
    """A script as a module of its own, made anew."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path, *arguments):
    """Runs a script's main in this process, as the command line would."""
    module = load(path)
    old, sys.argv = sys.argv, [path, *map(str, arguments)]
    try:
        textldm.run(module.main)
    finally:
        sys.argv = old


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small corpus and one checkpoint of each kind, made by the scripts themselves."""
    home = tmp_path_factory.mktemp("home")
    jsonl(home / "docs.jsonl", [f"{t} {i}" for i, t in enumerate(DOCUMENTS)])
    script("data/prepare.py", home / "docs.jsonl", "--out", home / "data", "--encoding=bpe", "--vocab_size=300",
           "--layout=documents", "--val_fraction=0.2")
    train(home, "bench/train_gpt.py")
    train(home, "train_vae.py")
    train(home, "train_dit.py")
    return home


def train(home, path, *more, steps=4):
    sizes = [f"--{k}={v}" for k, v in SMALL.items()]
    script(path, "--data", home / "data", "--out", home / "out", *sizes, f"--max_steps={steps}", "--eval_interval=2",
           "--batch_size=8", "--log_interval=1", "--device=cpu", *more)


# ---------------------------------------------------------------------------------------------------------
# Who sees whom


def test_encoder_leaks_nothing_between_context_and_target(vae):
    tokens, segment, _ = make_batch()
    z = vae.latents(tokens, segment)
    for changed, other in ((TARGET, CONTEXT), (CONTEXT, TARGET)):
        z_2 = vae.latents(torch.where(segment == changed, (tokens + 7) % V, tokens), segment)
        assert torch.equal(z[segment == other], z_2[segment == other])
        assert not torch.allclose(z[segment == changed], z_2[segment == changed])


def test_one_masked_pass_equals_two_separate_ones(vae):
    tokens, segment, _ = make_batch()
    z, logits = vae.latents(tokens, segment), vae.decode(vae.latents(tokens, segment), segment)
    for i in range(len(tokens)):
        for part in (CONTEXT, TARGET):
            at = segment[i] == part
            alone = tokens[i, at][None]
            assert torch.allclose(vae.latents(alone, torch.zeros_like(alone)), z[i, at], atol=1e-4)
            assert torch.allclose(vae.decode(z[i, at][None], torch.zeros_like(alone)), logits[i, at], atol=1e-3)


def test_dit_target_sees_context_and_context_is_clean(dit):
    _, segment, _ = make_batch()
    x = torch.randn(4, N, C, requires_grad=True)
    output = dit(x, segment, torch.full((4, 1), 0.5), torch.zeros_like(x))
    targets = make_batch().targets  # the output layer may be asked for them alone
    assert torch.equal(output[segment == TARGET], dit(x, segment, torch.full((4, 1), 0.5), torch.zeros_like(x), places=targets))
    grad, = torch.autograd.grad(output[segment == TARGET].sum(), x)
    assert (grad[segment == CONTEXT] != 0).any(-1).all()
    z_0, eps, t, given = torch.randn(4, N, C), torch.randn(4, N, C), torch.full((4, 1), 0.7), []
    dit.forward = lambda x, *_, places: given.append(x) or output.flatten(0, 1)[places]
    denoising_loss(dit, z_0, z_0, make_batch(), t, eps, ONE)                    # context untouched at any t, target noised
    given, = given
    assert torch.equal(given[segment == CONTEXT], z_0[segment == CONTEXT])
    assert torch.allclose(given[segment == TARGET], (0.3 * z_0 + 0.7 * eps)[segment == TARGET])


@pytest.mark.parametrize("drop", (0.0, 1.0))
def test_a_dropped_context_is_not_seen(vae, dit, drop):
    batch, dit.config.context_drop = make_batch(), drop
    z_0 = torch.randn(4, N, C)
    other = torch.where((batch.segment == CONTEXT)[..., None], torch.randn(4, N, C), z_0)
    losses = []
    for vae.latents in (lambda *_: z_0, lambda *_: other):
        losses.append(loss_on(dit, vae, batch, 0))
    assert torch.equal(*losses) == (drop == 1)


def test_padding_changes_no_number(vae, dit):
    batch = make_batch()
    pad = 5
    padded = Batch(torch.nn.functional.pad(batch.tokens, (0, pad), value=EOT), torch.nn.functional.pad(batch.segment, (0, pad), value=PADDING),
                   torch.nn.functional.pad(batch.weight, (0, pad)))
    features = torch.randn(4, N + pad, 16)
    a, b = vae(batch, features[:, :N]), vae(padded, features)
    assert all(torch.allclose(a[k], b[k], rtol=1e-4) for k in a), (a, b)
    z, t, mask = vae.latents(*padded[:2]), torch.tensor(0.6), (padded.segment != PADDING)[:, None, None]
    assert torch.allclose(z[:, :N], vae.latents(*batch[:2]), atol=1e-5)
    for scale in (1, 3):
        a = guided_estimate(dit.train(), z[:, :N], t, z[:, :N], z[:, :N], batch.segment, all_of(z), scale)
        b = guided_estimate(dit.train(), z, t, z, z, padded.segment, mask, scale)
        assert torch.allclose(a, b[:, :N], rtol=1e-4, atol=1e-4), scale
    means = []
    for b in (batch, padded):
        vae.standardise([b])
        means.append(torch.cat((vae.z_mean, vae.z_std)))
    assert torch.allclose(*means, atol=1e-5)


def test_reports_count_up_to_the_first_end_of_text_only(vae):
    batch = make_batch()
    report = vae(batch)
    logits = vae.decode(vae.posterior(*batch[:2])[0], batch.segment)
    counted = batch.counted
    ce = torch.nn.functional.cross_entropy(logits[counted], batch.tokens[counted])
    assert report["ce"].item() == pytest.approx(ce.item(), rel=1e-4)
    assert (batch.tokens[~counted] == EOT).all() and (batch.tokens == EOT)[counted].sum() == 4


# ---------------------------------------------------------------------------------------------------------
# The losses


def test_vae_loss_is_ce_plus_kl_minus_cosine(vae):
    batch = make_batch()
    features = torch.randn(4, N, 16)
    mu, logvar, h = vae.posterior(*batch[:2])
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mu, (0.5 * logvar).exp()),
                                           torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(-1)
    report = vae(batch, features)
    assert report["kl"].item() == pytest.approx(kl[batch.counted].mean().item(), rel=1e-4)
    batch = batch._replace(weight=batch.counted.float())
    report = {k: v.item() for k, v in vae(batch, features, beta=0.25).items()}
    assert report["loss"] == pytest.approx(report["ce"] + 0.25 * report["kl"] - vae.config.repa * report["cos"], rel=1e-4)


def test_repa_is_a_cosine_of_standardised_features(vae):
    mu = torch.randn(2, N, C)
    vae.teacher_mean.normal_()
    vae.teacher_std.uniform_(0.5, 2)
    with torch.no_grad():
        same = vae.to_teacher(mu) * vae.teacher_std + vae.teacher_mean
    assert torch.allclose(vae.alignment(mu, same), torch.ones(2, N), atol=1e-5)
    assert torch.allclose(vae.alignment(mu, same * 3 - 2 * vae.teacher_mean), torch.ones(2, N), atol=1e-5)  # scale-free


@pytest.mark.parametrize("repa_latents", (True, False))
def test_repa_shapes_the_latents_or_as_in_the_paper_the_features_behind_them(repa_latents):
    vae = randomise(TextVAE(VAEConfig(**SMALL, vocab_size=V, channels=C, teacher_embd=16, repa_latents=repa_latents)))
    features, grads = torch.randn(4, N, 16), []
    for vae.config.repa in (0, 1):  # their difference is what the alignment asks for
        vae.zero_grad()
        vae(make_batch(), features)["loss"].backward()
        grads.append([p.grad.clone() for p in (vae.to_posterior.weight, vae.encoder.ln_f.weight)])
    latents, encoder = ((b - a).abs().max() > 1e-4 for a, b in zip(*grads))
    assert latents == repa_latents and encoder


def test_the_teacher_receives_no_gradient(vae):
    teacher = randomise(GPT(TrunkConfig(**SMALL, block_size=N + 1, vocab_size=V)))
    features = teacher_features(teacher, make_batch().tokens, EOT)
    assert not features.requires_grad
    features = features.detach().requires_grad_()
    vae(make_batch(), features)["loss"].backward()
    assert features.grad is None and vae.wte.weight.grad.abs().sum() > 0
    assert vae.to_teacher.weight.grad.abs().sum() > 0


def test_teacher_features_are_third_to_last_and_aligned():
    teacher = randomise(GPT(TrunkConfig(n_layer=5, n_head=2, n_embd=16, block_size=N + 1, vocab_size=V)))
    tokens = make_batch().tokens
    features = teacher_features(teacher, tokens, EOT)
    whole = teacher.hidden_states(torch.cat((torch.full((4, 1), EOT), tokens), 1), 3)  # blocks 3, 4, 5: the third from the end
    assert torch.equal(features, whole[:, 1:])


def test_standardised_latents_have_mean_0_and_std_1(vae):
    batches = [make_batch(64, seed=i) for i in range(4)]
    vae.standardise(batches)
    z = torch.cat([vae.latents(b.tokens, b.segment)[b.counted] for b in batches])
    assert z.mean(0).abs().max() < 1e-4 and (z.std(0) - 1).abs().max() < 1e-3


def test_active_channels_are_those_that_vary(vae):
    """By the variance of the means over tokens, from 0.01 on."""
    batches = [make_batch(64, seed=i) for i in range(2)]
    for variances, active in (([0, 0.005, 0.02, 0.3, 0.8, 4], 4), ([0.009] * 6, 0), ([0.011] * 6, 6)):
        mu = torch.cat([vae.posterior(b.tokens, b.segment)[0][b.counted] for b in batches])
        vae.to_posterior.weight.data[:C] *= (torch.tensor(variances) / mu.var(0)).sqrt()[:, None].nan_to_num()
        assert vae.standardise(batches) == active
        randomise(vae)


def test_an_untrained_dit_predicts_zero(vae):
    dit = TextDiT(DiTConfig(**SMALL, channels=C, predict_tokens=False))
    z_0, eps, batch = torch.randn(4, N, C), torch.randn(4, N, C), make_batch()
    loss, *_ = denoising_loss(dit, z_0, z_0, batch, torch.rand(4, 1), eps, ONE)
    assert torch.allclose(loss, (eps - z_0).square().mean(-1)[batch.segment == TARGET])


def test_an_exact_velocity_has_no_loss_and_its_estimate_is_the_data(dit):
    if dit.config.predict_tokens:
        return
    z_0, eps, batch = torch.randn(4, N, C), torch.randn(4, N, C), make_batch()
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])[:, None]
    dit.forward = lambda x, s, t, guess, places: ((x - z_0) / t[..., None])[s == TARGET]
    loss, *of = denoising_loss(dit, z_0, z_0, batch, t, eps, ONE)
    assert loss.max() < 1e-8 and torch.allclose(dit.estimate(*of), z_0[batch.segment == TARGET], atol=1e-5)


def test_self_conditioning_tells_some_rows_what_a_first_pass_estimated_of_the_targets(dit):
    batch = make_batch()
    segment = batch.segment
    z_0, eps, t, forward, guesses, seen = torch.randn(4, N, C), torch.randn(4, N, C), torch.rand(4, 1), dit.forward, [], []
    dit.forward = lambda x, segment, t, guess, places: seen.append(x) or guesses.append(guess.clone()) or forward(x, segment, t, guess, places=places)
    loss, output, *_ = denoising_loss(dit, z_0, z_0, batch, t, eps, ONE, n_guess=2)
    x = seen[1]
    first, guess = guesses
    assert not first.any() and not guess[2:].any() and not guess.requires_grad
    alone = forward(x, segment, t, torch.zeros_like(x))
    assert torch.allclose(*((segment == TARGET)[:2, :, None] * g for g in (guess[:2], dit.estimate(alone, x, t)[:2])), atol=1e-5)
    assert not torch.allclose(alone[:2][segment[:2] == TARGET], output[: (segment[:2] == TARGET).sum()], atol=1e-3)
    elsewhere = torch.where((segment == CONTEXT)[..., None], guess + 1, guess)  # there an estimate means nothing
    assert torch.equal(forward(x, segment, t, elsewhere, places=batch.targets), output)


def test_recomputed_blocks_give_the_same_gradients(vae, dit):
    found = []
    for recompute in (False, True):
        dit.trunk.recompute, calls = recompute, []
        hook = dit.trunk.h[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        dit.zero_grad()
        loss_on(dit, vae, make_batch(), 0).backward()
        hook.remove()
        found.append((calls, [p.grad for p in dit.parameters()]))
    (once, a), (twice, b) = found
    assert len(twice) == len(once) + 1, "the backward pass computes it again, and not for the guess"
    assert all(x is y is None or torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b))


def test_flow_loss_learns_from_targets_alone(vae, dit):
    """The gradient does not depend on what is asked of context positions."""
    batch = make_batch()
    loss = loss_on(dit, vae, batch, 0)
    all_context = batch._replace(weight=torch.where(batch.segment == CONTEXT, 100.0, batch.weight))
    assert torch.equal(loss_on(dit, vae, all_context, 0), loss)
    more_tail = batch._replace(weight=torch.where((batch.segment == TARGET) & (batch.weight < 1), 1.0, batch.weight))
    assert not torch.equal(loss_on(dit, vae, more_tail, 0), loss)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_muon_steps_along_an_orthogonal_matrix(shape):
    """Of the same singular vectors as the momentum, all singular values near 1, in fp32 and in bf16, and as long as a step of AdamW."""
    gradients = torch.randn(3, *shape)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        u, _, vt = torch.linalg.svd(gradients[0], full_matrices=False)
        around = u.T @ textldm.orthogonal(gradients[:1], dtype)[0].float() @ vt.T
        assert (around - around.diag().diag()).abs().max() < tolerance and 0.6 < around.diag().min() and around.diag().max() < 1.3
        p = torch.nn.Parameter(torch.zeros(shape))
        optimizer = textldm.Muon([p], 0.0, dtype)
        optimizer.param_groups[0]["lr"] = 1.0
        momentum = torch.zeros(shape)
        for p.grad in gradients:
            before, momentum = p.detach().clone(), 0.95 * momentum + 0.05 * p.grad
            optimizer.step()
            step = 0.2 * max(shape) ** 0.5 * textldm.orthogonal((0.05 * p.grad + 0.95 * momentum)[None], dtype)[0].float()
            assert torch.allclose(p - before, -step, atol=0.1 * tolerance)
        assert 0.1 < (p - before).square().mean().sqrt() < 0.3


def test_muon_is_that_of_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has had it since 2.9")
    start, gradients = torch.randn(8, 20), torch.randn(4, 8, 20)
    a, b = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours, theirs = textldm.Muon([a], 0.1, torch.bfloat16), torch.optim.Muon([b], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours.param_groups[0]["lr"] = 0.01
    for a.grad in gradients:
        b.grad = a.grad.clone()
        ours.step(), theirs.step()
    assert torch.allclose(a, b, atol=1e-3) and not torch.allclose(a, start, atol=1e-2)


@pytest.mark.parametrize("instructions, capability, dtype", [(True, "AVX512", torch.bfloat16), (False, "AVX512", torch.float32), (True, "AVX2", torch.float32)])
def test_networks_and_optimiser_multiply_in_what_the_hardware_has(home, tmp_path, monkeypatch, capsys, instructions, capability, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    seen, orthogonal, forward = set(), textldm.orthogonal, GPT.forward
    monkeypatch.setattr(textldm, "orthogonal", lambda x, dtype: seen.add(dtype) or orthogonal(x, dtype))
    monkeypatch.setattr(GPT, "forward", lambda *x: seen.add((y := forward(*x)).dtype) or y)
    train(home, "bench/train_gpt.py", f"--out={tmp_path}", steps=1)
    assert seen == {dtype} and str(dtype)[-2:] in capsys.readouterr().out.split("multiplies in ")[1].split(",")[0]


def test_no_step_waits_for_a_gpu(vae, dit, cola, monkeypatch):
    """On torch's meta device, whose tensors have shapes and no values, whatever asks for one raises. So nothing in the losses of all stages, in their backward
    passes and in the steps of the sampler does; `train` asks once a step, for the norm of the gradient."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **more: contextlib.nullcontext())  # it does not know the device
    teacher = randomise(GPT(TrunkConfig(**SMALL, block_size=N + 1, vocab_size=V)))
    batch, joint = make_batch().to("meta"), ldlm().to("meta")
    vae, dit, teacher, blocks = (net.to("meta") for net in (vae, dit, teacher, cola[1]))
    with pytest.raises(Exception, match="meta"):
        bool(batch.weight.any())
    z_0 = vae.latents(batch.tokens, batch.segment)
    losses = [vae(batch, teacher_features(teacher, batch.tokens, EOT))["loss"], flow_loss(dit, z_0, batch, None)[0],
              flow_loss(blocks, z_0, make_batch()._replace(segment=torch.full((4, N), TARGET)).to("meta"), None)[0],
              textldm.joint_loss(joint, batch, None, 3)["loss"], textldm.cross_entropy(teacher(batch.tokens), batch.tokens).mean()]
    sum(losses).backward()
    z = textldm.denoise(dit, z_0, z_0, batch.segment, all_of(z_0).to("meta"), steps=3, cfg_scale=2.0)
    assert z.shape == z_0.shape and joint.dit.times(torch.rand(5, device="meta")).shape == (5,)


def test_every_parameter_learns_in_bf16(vae, dit):
    """Also where the estimate for self-conditioning is made without gradients, in the same autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        loss_on(dit, vae, make_batch(), 0).backward()
    assert not [k for k, p in dit.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_posterior_learns_the_cross_entropy_of_targets(vae):
    batch, seen = make_batch(), []
    dit = randomise(TextDiT(DiTConfig(**SMALL, vocab_size=V, channels=C)), scale=0.1)
    forward = dit.forward
    dit.forward = lambda *x, places: seen.append(forward(*x)) or (seen[-1] if places is None else seen[-1].flatten(0, 1)[places])
    loss = loss_on(dit, vae, batch, 0)
    weight = batch.weight * (batch.segment == TARGET)
    nll = -seen[-1].log_softmax(-1).gather(-1, batch.tokens[..., None])[..., 0]
    assert loss.item() == pytest.approx(((nll * weight).sum() / weight.sum()).item(), rel=1e-5)


def test_an_exact_posterior_samples_tokens_as_often_as_they_are():
    """Data: one of three tokens at each position, independently. With the true p(token | z_t) the flow ends on their latents."""
    p = torch.tensor([0.6, 0.3, 0.1])
    dit = TextDiT(DiTConfig(**SMALL, vocab_size=3, channels=2, adaln=False, self_condition=False))
    dit.latent_of.copy_(torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -2.0]]))
    segment, now = torch.full((1, 4000), TARGET), {}
    for name, f in dict(from_latent=lambda x: x, segment_emb=lambda s: 0.0, trunk=lambda h, mask, e: h,
                        to_output=lambda z: p.log() - ((z[..., None, :] - (1 - now["t"]) * dit.latent_of) / now["t"]).square().sum(-1) / 2).items():
        delattr(dit, name)
        setattr(dit, name, f)
    z = euler(lambda z, t, guess: now.update(t=t) or dit.estimate(dit(z, segment, t[None, None], guess), z, t[None, None]),
              torch.randn(1, 4000, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(1, 0, 201))
    distance, token = (z[0, :, None] - dit.latent_of).norm(dim=-1).min(-1)
    assert distance.quantile(0.99) < 0.02 and ((token.bincount() / 4000) - p).abs().max() < 0.02


def test_a_low_temperature_points_to_the_likeliest_token_and_leaves_other_velocities(dit):
    x, segment, t = torch.randn(4, N, C), make_batch().segment, torch.full((4, 1), 0.5)
    output = dit(x, segment, t, torch.zeros_like(x))
    warm, cold = (dit.estimate(output, x, t, temperature) for temperature in (1.0, 0.0))
    if dit.config.predict_tokens:
        assert not torch.allclose(warm, cold) and torch.allclose(cold, dit.latent_of[output.argmax(-1)], atol=1e-4)
    else:
        assert torch.equal(warm, cold)


def test_latents_of_tokens_are_their_means(vae):
    batches = [make_batch(64, seed=i) for i in range(3)]
    table = train_dit.latents_of_tokens(vae, batches)
    for token in (3, EOT, V - 2):
        own = [vae.latents(torch.tensor([[token]]), torch.tensor([[TARGET]]))[0]]
        own += [vae.latents(b.tokens, b.segment)[b.counted & (b.tokens == token)] for b in batches]
        assert torch.allclose(table[token], torch.cat(own).mean(0), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# The sampler


def test_guidance_scale_1_is_the_conditional_model_and_0_the_unconditional(dit):
    _, segment, _ = make_batch()
    context, z, guess, t = torch.randn(4, N, C), torch.randn(4, N, C), torch.randn(4, N, C), torch.tensor(0.4)
    is_target = (segment == TARGET)[..., None]
    both = [torch.where(is_target, z, x) for x in (context, 0.0)]
    conditional, unconditional = (dit.estimate(dit(x, segment, t.expand(4, 1), guess), x, t.expand(4, 1)) for x in both)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    for scale, z_0 in ((1, conditional), (1 + 1e-7, conditional), (0, unconditional), (3, unconditional + 3 * (conditional - unconditional))):
        new = guided_estimate(dit, z, t, guess, context, segment, all_of(z), scale)
        assert torch.allclose(new[segment == TARGET], z_0[segment == TARGET], atol=1e-4), scale


def test_euler_integrates_a_constant_velocity_exactly():
    v, z = torch.randn(2, N, C), torch.randn(2, N, C)
    for steps in (1, 7, 50):
        times = TextDiT(DiTConfig(**SMALL, channels=C, predict_tokens=False)).times(torch.linspace(1, 0, steps + 1))
        assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
        assert torch.allclose(euler(lambda z, t, guess: z - t * v, z, times), z - v, atol=1e-5)


def test_another_path_is_another_interpolant(monkeypatch):
    """A cosine path for the straight one: the derivatives make a velocity, of which `estimate` finds the data, and sampling arrives where it should."""
    angle = lambda t: math.pi / 2 * torch.as_tensor(t)
    monkeypatch.setattr(textldm, "interpolant", lambda t: (angle(t).cos(), angle(t).sin(), -math.pi / 2 * angle(t).sin(), math.pi / 2 * angle(t).cos()))
    dit, (z_0, eps, t) = TextDiT(DiTConfig(**SMALL, channels=C, predict_tokens=False, self_condition=False)), (torch.randn(4, N, C), torch.randn(4, N, C), torch.rand(4, 1))
    at, batch = lambda t: angle(t).cos() * z_0 + angle(t).sin() * eps, make_batch()
    dit.forward = lambda x, *_, places: ((at(t[..., None] + 1e-3) - at(t[..., None] - 1e-3)) / 2e-3).flatten(0, 1)[places]
    loss, output, z_t, times = denoising_loss(dit, z_0, z_0, batch, t, eps, ONE)
    assert loss.max() < 1e-4 and torch.allclose(dit.estimate(output, z_t, times), z_0[batch.segment == TARGET], atol=1e-2)
    mean, std = 0.7, 0.4  # of the data: the flow takes eps to mean + std eps
    share = lambda t: angle(t).cos() * std**2 / ((angle(t).cos() * std) ** 2 + angle(t).sin() ** 2)
    estimate, errors = lambda z, t, guess: mean + share(t) * (z - angle(t).cos() * mean), []
    for steps in (50, 100, 200):
        z = euler(estimate, eps.double(), torch.linspace(1, 0, steps + 1).double())
        errors.append((z - (mean + std * eps)).abs().max().item())
    assert errors[0] < 0.1 and all(1.6 < a / b < 2.4 for a, b in zip(errors, errors[1:])), errors


def test_euler_error_halves_when_steps_double():
    """Data N(m, s^2): z_t is normal with variance q = ((1-t)s)^2 + t^2, so E[eps - z_0 | z_t] is linear in z_t, and
    the flow takes eps to m + s eps."""
    m, s = 0.7, 0.4
    eps = torch.linspace(-2, 2, 41, dtype=torch.float64)

    def velocity(z, t):
        q = ((1 - t) * s) ** 2 + t**2
        return -m + (t - (1 - t) * s**2) / q * (z - (1 - t) * m)

    estimate, errors = lambda z, t, guess: z - t * velocity(z, t), []
    for steps in (50, 100, 200, 400):
        times = TextDiT(DiTConfig(**SMALL, channels=C, predict_tokens=False, t_mean=0.0, t_std=1.5)).times(torch.linspace(1, 0, steps + 1)).double()
        errors.append((euler(estimate, eps, times) - (m + s * eps)).abs().max().item())
    ratios = [a / b for a, b in zip(errors, errors[1:])]
    assert errors[0] < 0.1 and all(1.6 < r < 2.4 for r in ratios), (errors, ratios)


def test_sampling_grid_follows_the_training_times():
    times = TextDiT(DiTConfig(**SMALL, channels=C, predict_tokens=False, t_mean=0.8, t_std=0.7)).times(torch.linspace(1, 0, 101))[1:-1]
    logits = (torch.logit(times.double()) - 0.8) / 0.7
    assert torch.allclose(logits, torch.special.ndtri(torch.linspace(1, 0, 101).double())[1:-1], atol=1e-3)


def test_same_seed_same_text_whatever_the_neighbours(vae, dit):
    prompts = [[1, 2, 3], [4], []]
    text = continue_texts(vae, dit, prompts, 6, EOT, steps=5, seed=3)
    assert text == continue_texts(vae, dit, prompts, 6, EOT, steps=5, seed=3)
    assert text != continue_texts(vae, dit, prompts, 6, EOT, steps=5, seed=4)
    assert text[1:2] == continue_texts(vae, dit, [[5, 6, 7, 8, 9, 10], [4]], 6, EOT, steps=5, seed=3)[1:]


def test_texts_stop_at_the_end_of_text(vae, dit):
    vae.to_tokens = lambda z, segment: torch.tensor([[1, 2, 3, EOT, 5, EOT], [1, 2, 3, 4, 5, 6]])
    assert continue_texts(vae, dit, [[7], [7]], 5, EOT, steps=2) == [[2, 3, EOT], [2, 3, 4, 5, 6]]


def test_each_step_is_told_what_the_one_before_estimated(vae, dit, monkeypatch):
    told, made, real = [], [], textldm.guided_estimate
    monkeypatch.setattr(textldm, "guided_estimate", lambda *a, **more: told.append(a[3]) or made.append(real(*a, **more)) or made[-1])
    continue_texts(vae, dit, [[1, 2], [3]], 6, EOT, steps=4)
    assert not told[0].any() and all(a is b for a, b in zip(told[1:], made)) and len(told) == 4
    assert not torch.equal(*(real(dit, made[0], torch.tensor(0.5), guess, made[0], make_batch().segment[:2, : made[0].shape[1]], all_of(made[0]), 2.0)
                             for guess in (made[0], 0 * made[0])))


# Cola DLM: blocks, each given all before it

@pytest.fixture
def cola(vae):
    """A VAE and a DiT of blocks of 3 latents, with weights as of trained ones."""
    vae.config.causal = True
    dit = randomise(TextDiT(DiTConfig(**SMALL, block_size=N, vocab_size=V, channels=C, latent_block=3)), scale=0.1)
    dit.to_output.weight.data *= 30
    dit.latent_of.normal_(generator=torch.Generator().manual_seed(1))
    return vae, dit


def test_a_block_sees_the_clean_ones_before_it_and_itself(cola):
    """Over every pair of blocks: by gradients, and, where a first pass is told to the second, by change."""
    _, dit = cola
    batch, block = make_batch()._replace(segment=torch.full((4, N), TARGET)), (torch.arange(N) + 2) // 3
    M, z_0 = int(block[-1]) + 1, torch.randn(4, N, C)
    context, eps = (torch.randn(4, N, C, requires_grad=True) for _ in range(2))
    run = lambda context, eps, n: denoising_loss(dit, z_0, context, batch, torch.rand(4, M, generator=torch.Generator().manual_seed(0)), eps, block, n)[1].view(4, N, -1)
    output, told = run(context, eps, 0), run(context, eps, 4).detach()
    for i in range(M):
        of_context, of_noise = torch.autograd.grad(output[:, block == i].sum(), (context, eps), retain_graph=True)
        for j in range(M):
            assert (of_context[:, block == j] != 0).any() == (j < i), (i, j)
            assert (of_noise[:, block == j] != 0).any() == (j == i), (i, j)
    for j in range(M):
        elsewhere = torch.where((block == j)[:, None], torch.randn(4, N, C), 0.0)
        by_context, by_noise = ((run(*x, 4) - told).abs().amax(dim=(0, 2)) > 1e-5 for x in ((context + elsewhere, eps), (context, eps + elsewhere)))
        assert torch.equal(by_context, block > j) and torch.equal(by_noise, block == j)


def test_rows_from_the_middle_do_not_teach_how_texts_begin(cola, tmp_path):
    vae, dit = cola
    batch, seen = make_batch(), []
    cut_off = torch.tensor([True, False, True, False])
    whole = batch._replace(segment=torch.ones_like(batch.segment), weight=torch.ones_like(batch.weight))
    some = whole._replace(weight=whole.weight.masked_fill(cut_off[:, None] & (torch.arange(N) == 0), 0))
    forward = dit.forward
    dit.forward = lambda *x, **more: seen.append((forward(*x, **more), more)) or seen[-1][0]
    loss_on(dit, vae, some, 1)
    output, block = seen[-1][0].detach().requires_grad_(), (seen[-1][1]["when"][N:] - 1)
    dit.forward = lambda *x, **more: output[: len(more["places"])]
    gradient, = torch.autograd.grad(loss_on(dit, vae, some, 1), output)
    assert (block == 0).sum() > 1
    assert torch.equal(gradient.abs().sum(-1).view(4, N) > 0, ~(cut_off[:, None] & (block == 0)))
    # and Corpus marks such rows, and no other
    jsonl(tmp_path / "docs.jsonl", [" ".join(f"{i}{j}" for j in range(30)) for i in range(40)])
    script("data/prepare.py", tmp_path / "docs.jsonl", "--out", tmp_path / "d", "--encoding=bpe", "--vocab_size=300", "--layout=documents", "--val_fraction=0.2")
    corpus = Corpus(tmp_path / "d", "train", 16, whole=True)
    rows = corpus.batch(np.random.default_rng(0), 200, 16)
    begins = {tuple(corpus.tokens[i : i + 16]) for i in [0, *corpus.ends[:-1]]}
    assert [tuple(row) in begins for row in rows.tokens.tolist()] == (rows.weight[:, 0] == 1).tolist() and 0 < rows.weight[:, 0].sum() < 200
    assert (rows.weight[:, 1:] == 1).all() and (rows.segment == TARGET).all()


def test_the_vae_of_blocks_looks_back_only_and_all_the_way(cola):
    vae, _ = cola
    tokens, segment = torch.randint(1, V - 1, (1, N)), torch.full((1, N), TARGET)
    z, wte = torch.randn(1, N, C, requires_grad=True), vae.wte(tokens).detach().requires_grad_()
    vae.wte.forward = lambda tokens: wte
    for x, y in ((wte, vae.posterior(tokens, segment)[0]), (z, vae.decode(z, segment))):
        sees = torch.stack([torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0 for i in range(N)])
        assert torch.equal(sees, torch.ones(N, N).tril().bool())


def test_each_block_has_its_time_and_all_is_clean_before_it(cola):
    _, dit = cola
    seen, forward, block = [], dit.forward, (torch.arange(N) + 1) // 3
    dit.forward = lambda *x, **more: seen.append((x, more)) or forward(*x, **more)
    z_0, eps, t = torch.randn(4, N, C), torch.randn(4, N, C), torch.rand(4, 5)
    denoising_loss(dit, z_0, z_0, make_batch()._replace(segment=torch.full((4, N), TARGET)), t, eps, block)
    (x, segment, times, guess), more = seen[0]
    at = times[:, more["when"]]
    assert torch.equal(more["position"], torch.arange(N).repeat(2)) and torch.equal(more["places"].view(4, N), torch.arange(4 * 2 * N).view(4, 2 * N)[:, N:])
    assert not at[:, :N].any() and torch.equal(at[:, N:], t[:, block]) and torch.equal(x[:, :N], z_0)
    assert torch.allclose(x[:, N:], z_0 + at[:, N:, None] * (eps - z_0), atol=1e-6)
    # and the network knows them apart: another time in one block changes that block alone
    other = times.clone()
    other[:, 2] += 0.3
    changed = (forward(x, segment, other, guess, **more) - forward(x, segment, times, guess, **more)).view(4, N, -1).abs().amax(dim=(0, 2)) > 1e-6
    assert torch.equal(changed, block == 1)


@pytest.mark.parametrize("scale", (1.0, 2.0))
def test_what_is_kept_of_the_history_is_what_reading_it_again_would_give(cola, scale):
    """Against one pass over all that was ever read and the noisy block, with the mask of training, over several documents and rows."""
    vae, dit = cola
    read, forward, luck, history, outputs, kept = vae.to_tokens, dit.forward, torch.Generator().manual_seed(5), [], [], []
    prompts, W, b = [[1, 2, 3, 4, 5, 6, 7], [8, 9], []], N, 3
    now, B = torch.zeros(3), 3 * (1 if scale == 1 else 2)
    documents = torch.tensor([[-1] * (7 - len(p)) + [0] * len(p) for p in prompts])

    def both(x, segment, t, guess, mask, position, memory, keep=0, places=None):
        output = forward(x, segment, t, guess, mask, position=position, memory=memory, keep=keep, places=places)
        if segment[0, 0] == CONTEXT:
            history.append(x)
            kept.append(memory[0][0].shape[2])
        else:
            whole, n = torch.cat((*history, x), dim=1), x.shape[1]
            kind = torch.cat((torch.full((whole.shape[1] - n,), CONTEXT), segment[0]))
            block = (torch.arange(whole.shape[1]) - 7) // b
            near = torch.arange(whole.shape[1]) >= (7 + (block[:, None] + 1) * b).clamp(min=7) - W
            label = torch.cat((documents, now[:, None].expand(3, n).long()), dim=1).repeat(B // 3, 1)
            seen = textldm.who_sees_whom(kind, block) & textldm.same_segment(label) & near
            again = forward(whole, kind.expand(B, -1), torch.cat((torch.zeros(B, 1), t), dim=1), torch.cat((torch.zeros(B, whole.shape[1] - n, C), guess), dim=1),
                            seen, when=(kind == TARGET).long())[:, -n:]
            assert torch.allclose(output, again, atol=1e-4)
            outputs.append(output)
        return output

    def new_block(z, seen):
        nonlocal documents, now
        tokens = torch.where(torch.rand(seen.shape, generator=luck) < 0.05, EOT, read(z, seen))
        documents = torch.cat((documents, now[:, None].expand(3, b).long()), dim=1)
        now = now + (tokens[:, -b:] == EOT).any(1)
        return tokens

    dit.forward, vae.to_tokens = both, new_block
    textldm.continue_in_blocks(vae, dit, prompts, 13 * b, EOT, 4, None, steps=3, cfg_scale=scale, temperature=1.0)
    assert len(outputs) >= 13 * 3 and now.min() > 0 and max(kept) <= W - b < 7 + 13 * b
    assert all(not x[3:].any() for x in history), "guidance is against no history"


def test_blocks_stop_or_go_on_and_do_not_depend_on_neighbours(cola):
    vae, dit = cola
    prompts = [[1, 2, 3], [4], []]
    texts = continue_texts(vae, dit, prompts, 0, EOT, steps=3, seed=3)
    assert [len(text) == N - len(p) or text[-1] == EOT for text, p in zip(texts, prompts)] == [True] * 3
    assert texts[1:2] == continue_texts(vae, dit, [[5, 6, 7, 8, 9], [4]], 0, EOT, steps=3, seed=3)[1:]
    seen = []
    long = continue_texts(vae, dit, prompts[:1], 50, EOT, steps=3, seed=3, callback=lambda t, texts: seen.append(list(texts[0])))
    assert len(long[0]) == 50 and long[0][: len(texts[0])] == texts[0]
    assert all(b[: len(a)] == a for a, b in zip(seen, seen[1:])) and len(seen) > 15, "what was shown never changes"


def test_textldm_is_as_it_was_before_there_were_blocks(vae, dit):
    """The forward pass of part 5, written out: equal to the bit."""
    batch, z_0, eps, t = make_batch(), torch.randn(4, N, C), torch.randn(4, N, C), torch.rand(4, 1)
    _, output, *_ = denoising_loss(dit, z_0, z_0, batch, t, eps, torch.zeros(N, dtype=torch.long))
    target = (batch.segment == TARGET)[..., None]
    h = dit.from_latent(torch.where(target, (1 - t[..., None]) * z_0 + t[..., None] * eps, z_0)) + dit.segment_emb(batch.segment)
    e = dit.time_embedding(t[:, 0])
    for block in dit.trunk.h:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaln(e)[:, None].chunk(6, dim=-1)
        q, k, v = block.attn.c_attn(block.ln_1(h) * (1 + scale_1) + shift_1).view(4, N, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q, k = (textldm.rotate(x, torch.arange(N)) for x in (q, k))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, N, 16)
        h = h + gate_1 * block.attn.c_proj(y)
        h = h + gate_2 * block.mlp(block.ln_2(h) * (1 + scale_2) + shift_2)
    assert torch.equal(output, dit.to_output(dit.trunk.ln_f(h)[batch.segment == TARGET]))


def test_a_dit_begins_as_the_decoder_of_its_width(vae):
    dit = TextDiT(DiTConfig(**SMALL | dict(n_layer=4), vocab_size=V, channels=C))
    train_dit.begin_as_decoder(dit, vae)
    segment, at_half = torch.full((3, N), TARGET), dit.time_embedding(torch.full((3, 1), 0.5))
    h, both = torch.randn(3, N, 16), textldm.same_segment(segment)
    assert torch.allclose(h, dit.trunk.h[0](h, at_half, position=torch.arange(N), mask=both))  # its gates are closed as ever
    for i, block in enumerate(dit.trunk.h):
        block.adaln = None
        assert torch.equal(block(h, position=torch.arange(N), mask=both), vae.decoder.h[i // 2](h, position=torch.arange(N), mask=both))
    wider = TextDiT(DiTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=V, channels=C))
    before = [p.clone() for p in wider.parameters()]
    train_dit.begin_as_decoder(wider, vae)
    assert all(torch.equal(a, b) for a, b in zip(before, wider.parameters()))


def test_the_callback_sees_the_way_from_noise(vae, dit):
    seen = []
    text = continue_texts(vae, dit, [[1, 2]], 6, EOT, steps=8, callback=lambda t, texts: seen.append((t, texts)))
    assert [t for t, _ in seen] == sorted((t for t, _ in seen), reverse=True) and seen[0][0] == 1 and len(seen) == 8
    assert seen[-1][1] == text  # the last step goes where the last velocity points
    data, ways = torch.randn(2, 3, C), []
    end = euler(lambda z, t, guess: data, torch.randn(2, 3, C), torch.linspace(1, 0, 6), lambda t, z_0: ways.append(z_0))
    assert len(ways) == 5 and all(z_0 is data for z_0 in ways) and torch.allclose(end, data, atol=1e-5)


def test_times_are_told_apart():
    dit = TextDiT(DiTConfig(**SMALL, vocab_size=V, channels=C))
    dit.time_mlp = torch.nn.Identity()
    a, b = dit.time_embedding(torch.tensor([0.1, 0.12]))
    assert (a - b).abs().max() > 0.5


# ---------------------------------------------------------------------------------------------------------
# GPT


def test_attention_is_softmax_attention():
    attention = randomise(textldm.Attention(16, 2))
    x = torch.randn(3, N, 16)
    q, k, v = (y.view(3, N, 2, 8).transpose(1, 2) for y in attention.c_attn(x).split(16, -1))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(N, N).triu(1).bool(), -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(3, N, 16)
    assert torch.allclose(attention(x, causal=True), attention.c_proj(y), atol=1e-4)


def test_rotary_attention_sees_distances_only():
    q, k = torch.randn(2, 1, 2, 1, 8).expand(2, 1, 2, N, 8)  # the same query and key at every position
    scores = textldm.rotate(q, torch.arange(N)) @ textldm.rotate(k, torch.arange(N)).mT
    for distance in range(-N + 1, N):
        same = scores.diagonal(distance, dim1=-2, dim2=-1)
        assert torch.allclose(same, same[..., :1].expand_as(same), atol=1e-4)
    assert not torch.allclose(scores[..., 0, 1], scores[..., 0, 3], atol=1e-2)


def test_gpt_loads_hugging_face_layout(tmp_path):
    gpt = randomise(GPT(TrunkConfig(n_layer=3, n_head=4, n_embd=32, block_size=20, vocab_size=V)))
    state = {f"transformer.{k}": v.T.contiguous() if ".c_" in k and v.dim() == 2 else v for k, v in gpt.state_dict().items()}
    state |= {"lm_head.weight": gpt.wte.weight, "transformer.h.0.attn.bias": torch.ones(1, 1, 20, 20)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"n_head": 4}')
    loaded, tokenizer = GPT.from_pretrained(tmp_path)
    tokens = torch.randint(0, V, (2, 20))
    assert torch.equal(loaded(tokens), gpt(tokens)) and tokenizer["eot"] == V - 1


def test_gpt_equals_hugging_face(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=4, n_head=4, n_embd=64, n_positions=48, vocab_size=300, initializer_range=0.2)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)  # model.safetensors
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    tokens = torch.randint(0, 300, (3, 48))
    with torch.no_grad():
        out = theirs(tokens, output_hidden_states=True)
        for source in (tmp_path, tmp_path / "pytorch_model.bin"):
            ours, _ = GPT.from_pretrained(source)
            difference = (ours(tokens) - out.logits).abs().max().item()
            assert difference < 1e-4 * out.logits.abs().max(), difference
            assert torch.allclose(ours.hidden_states(tokens, 2), out.hidden_states[2], atol=1e-3)
    greedy = theirs.generate(tokens[:1, :5], max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=299)
    mine = generate(ours, [tokens[0, 1:5].tolist()], 20, int(tokens[0, 0]), temperature=0)[0]
    n = min(len(mine), 20)
    assert n > 5 and mine[: n - 1] == greedy[0, 5 : 5 + n - 1].tolist()
    with capsys.disabled():
        print(f"\nlargest difference from Hugging Face's logits: {difference:.2e} of {out.logits.abs().max():.1f}")


def test_gpt_is_causal_and_stops():
    gpt = randomise(GPT(TrunkConfig(**SMALL, block_size=N, vocab_size=V)))
    tokens = make_batch().tokens
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % V
    assert torch.equal(gpt(tokens)[:, :6], gpt(changed)[:, :6]) and not torch.allclose(gpt(tokens)[:, 6:], gpt(changed)[:, 6:])
    texts = generate(gpt, [[1, 2], []] * 10, 30, EOT)  # longer than block_size: the window slides
    assert all(EOT not in t[:-1] and (len(t) == 30 or t[-1] == EOT) for t in texts)
    assert texts == generate(gpt, [[1, 2], []] * 10, 30, EOT) != generate(gpt, [[1, 2], []] * 10, 30, EOT, seed=1)


@pytest.mark.parametrize("size, millions", [("small", 114), ("medium", 328), ("large", 768)])
def test_presets_have_the_papers_sizes(size, millions):
    def make(cls, config_cls, preset):
        names = {f.name for f in textldm.fields(config_cls)}
        with torch.device("meta"):
            return cls(config_cls(**{"vocab_size": 10, **{k: v for k, v in preset.items() if k in names}}))
    dit = make(TextDiT, DiTConfig, {**train_dit.PRESETS[size], **textldm.PAPER, "channels": 64})
    assert sum(p.numel() for p in dit.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    vae = make(TextVAE, VAEConfig, train_vae.PRESETS[size])
    assert sum(p.numel() for t in (vae.encoder, vae.decoder) for p in t.parameters()) / 1e6 == pytest.approx(127, rel=0.02)


# ---------------------------------------------------------------------------------------------------------
# Data


def read_back(folder):
    """All documents of a prepared folder, as bytes."""
    texts = []
    for split in ("train", "val"):
        corpus = Corpus(folder, split, 2)
        for document in np.split(corpus.tokens, np.flatnonzero(corpus.tokens == corpus.eot) + 1)[:-1]:
            texts.append(corpus.encoding.decode_bytes(document[:-1].tolist()))
    return texts


def any_text(rng, n):
    """Any valid Unicode but surrogates."""
    points = rng.choice([0x80, 0x800, 0x10000, 0x110000], n)
    points = [int(rng.integers(p)) for p in points]
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


@pytest.mark.parametrize("encoding", ["bpe", "gpt2"])
def test_prepare_gives_back_any_text(tmp_path, encoding):
    if encoding == "gpt2":
        try:
            textldm.load_encoding({"encoding": "gpt2"})
        except UserError:
            pytest.skip("GPT-2's BPE is not in tiktoken's cache, and there is no network")
    rng = np.random.default_rng(0)
    texts = [any_text(rng, 50) for _ in range(200)] + ["a\r\nb\x00c\u2028d \n\n ", "<|endoftext|>", " ", "\n", "lone \ud800 half"] + DOCUMENTS[:7]
    jsonl(tmp_path / "in.jsonl", texts)
    script("data/prepare.py", tmp_path / "in.jsonl", "--out", tmp_path / "out", f"--encoding={encoding}", "--vocab_size=280", "--val_fraction=0.3")
    assert sorted(read_back(tmp_path / "out")) == sorted(t.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode() for t in texts)


def test_every_format_gives_the_same_corpus(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    plain = "".join(json.dumps({"text": f"{t} {i}"}) + "\n" for i, t in enumerate(DOCUMENTS)).encode()
    frames = zstandard.compress(plain[:5000]) + zstandard.compress(plain[5000:])  # archives are often appended to
    files = {"a.jsonl": plain, "b.jsonl.gz": gzip.compress(plain), "c.jsonl.zst": frames}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(tmp_path / "c.jsonl.zst", "openwebtext2/c.jsonl.zst")
    metas = []
    for name in [*files, "d.tar"]:
        script("data/prepare.py", tmp_path / name, "--out", tmp_path / "out", "--encoding=bpe", "--vocab_size=280", "--val_fraction=0.2")
        metas.append((json.loads((tmp_path / "out/meta.json").read_text())["sha256"], (tmp_path / "out/train.bin").read_bytes()))
    assert all(m == metas[0] for m in metas)


def test_pieces_of_any_size_give_the_same_lines(tmp_path):
    prepare = load("data/prepare.py")
    jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for prepare.PIECE in (7, 100, 1 << 20):
        for name in ("a.jsonl", "a.jsonl.gz"):
            assert list(prepare.Files([tmp_path / name])()) == DOCUMENTS


def test_every_document_is_followed_by_an_end_of_text(tmp_path, monkeypatch):
    """Of any length, however many blocks they are encoded in, and in their order."""
    rng = np.random.default_rng(0)
    texts = ["x" * 3000, "\n", " ", "a\n\n", "b " * 5000, *("word " * int(n) + "end" for n in rng.integers(0, 300, 400)), "y" * 70000, "z"]
    prepare = load("data/prepare.py")
    prepare.PIECE = 1 << 12
    tokenizer = dict(encoding="bpe", vocab_size=280, eot=279, bpe=prepare.train_bpe(iter(texts), 280))
    prepare.write_bins(tmp_path, textldm.load_encoding(tokenizer), 279, "uint16", [("train", lambda: texts)], 0.5)
    (tmp_path / "train.bin.tmp").rename(tmp_path / "train.bin")
    (tmp_path / "meta.json").write_text(json.dumps(dict(tokenizer, dtype="uint16", layout="documents", longest=99)))
    corpus = Corpus(tmp_path, "train", 2)
    found = np.split(corpus.tokens, corpus.ends)
    assert [corpus.encoding.decode(d[:-1].tolist()) for d in found[:-1]] == texts and not len(found[-1])


def test_val_within_the_folder_is_not_trained_on(tmp_path):
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in/a.jsonl", ["for training"] * 9)
    jsonl(tmp_path / "in/val.jsonl", ["for val"] * 9)
    script("data/prepare.py", tmp_path / "in", "--val", tmp_path / "in/val.jsonl", "--out", tmp_path / "out", "--encoding=bpe", "--vocab_size=260")
    assert json.loads((tmp_path / "out/meta.json").read_text())["documents"] == {"train": 9, "val": 9}


def test_the_split_depends_on_the_text_alone(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    vals = []
    for k, order in enumerate((texts, texts[::-1])):
        jsonl(tmp_path / f"{k}.jsonl", order)
        script("data/prepare.py", tmp_path / f"{k}.jsonl", "--out", tmp_path / str(k), "--encoding=bpe", "--vocab_size=270", "--val_fraction=0.2")
        corpus = Corpus(tmp_path / str(k), "val", 64)
        vals.append(sorted(corpus.encoding.decode(corpus.tokens.tolist()).split("<|endoftext|>")))
    assert vals[0] == vals[1] and 30 < len(vals[0]) < 90


def test_text_files_and_val_files(tmp_path):
    (tmp_path / "txt").mkdir()
    for i in range(5):
        (tmp_path / "txt" / f"{i}.txt").write_bytes(f"file {i} äöü\r\n\n".encode() * 9)
    (tmp_path / "val.txt").write_text("file of val")
    script("data/prepare.py", tmp_path / "txt", "--val", tmp_path / "val.txt", "--out", tmp_path / "out", "--encoding=bpe", "--vocab_size=264")
    assert read_back(tmp_path / "out") == [f"file {i} äöü\r\n\n".encode() * 9 for i in range(5)] + [b"file of val"]


def test_names_and_docs_are_those_of_lab():
    prepare = load("data/prepare.py")
    import unicodedata
    names = list(prepare.names())
    assert len(set(names)) == len(names) > 25000 and "greek small letter alpha" in names
    if unicodedata.unidata_version == "14.0.0":
        assert len(names) == 26015
    assert prepare.is_prose("Return the height of the figure.") and not prepare.is_prose("return the height of the figure.")
    assert not prepare.is_prose("Return x[0] + y[1] * (z - 2).") and not prepare.is_prose("Too short.")


def test_nanogpt_bins_are_gpt2_streams(tmp_path, monkeypatch):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    monkeypatch.setattr(textldm, "load_encoding", lambda tokenizer, *_: tokenizer)
    corpus = Corpus(tmp_path, "train", 64)
    assert corpus.encoding["encoding"] == "gpt2" and corpus.is_stream
    batch = corpus.batch(np.random.default_rng(0), 16, 32, cut_words=False)
    assert (batch.tokens.diff(dim=1) == 1).all() and len(set(batch.tokens[:, 0].tolist())) > 8 and batch.counted.all()


def test_rows_are_documents_cut_anywhere(home):
    corpus = Corpus(home / "data", "train", 64)
    documents = set(corpus.encoding.decode(corpus.tokens.tolist()).split("<|endoftext|>"))
    tokens, segment, weight = corpus.batch(np.random.default_rng(0), 500, 64)
    empty = inside = within = 0
    whole = {text: corpus.encoding.encode_ordinary(text) for text in documents}
    for row, s, w in zip(tokens, segment, weight):
        n = row.tolist().index(corpus.eot) + 1
        assert (w[:n] == 1).all() and (w[n:] == textldm.TAIL_WEIGHT).all() and (row[n:] == corpus.eot).all()
        context, target = (corpus.encoding.decode(row[:n - 1][s[:n - 1] == k].tolist()) for k in (CONTEXT, TARGET))
        assert context + target in documents  # cutting words loses no character
        assert corpus.encoding.encode_ordinary(context) == row[s == CONTEXT].tolist()  # and reads as a prompt would
        empty += not context
        inside += context[-1:].isalpha() and target[:1].isalpha()
        within += row[: n - 1].tolist() != whole[context + target]  # the cut was inside a token
    assert empty > 40 and inside > 50 and within > 30


def test_only_beginnings_have_an_empty_context(home):
    corpus = Corpus(home / "data", "train", 8)
    beginnings = {(*d.tolist(), *[corpus.eot] * 8)[:8] for d in np.split(corpus.tokens, corpus.ends)[:-1]}
    tokens, segment, _ = corpus.batch(np.random.default_rng(0), 500, 8, cut_words=False)
    empty = [tuple(row.tolist()) for row, s in zip(tokens, segment) if (s == TARGET).all()]
    assert len(empty) > 20 and set(empty) <= beginnings and not {tuple(row.tolist()) for row in tokens} <= beginnings


def test_masked_diffusion_counts_every_token_once_and_draws_what_the_model_says():
    sys.path.insert(0, str(ROOT / "bench"))
    from train_masked import MaskedLM, masked_loss, unmask
    batch, seen = make_batch(rows=400)._replace(segment=(torch.arange(N) >= 3).long().repeat(400, 1)), []
    net = lambda tokens, masked: seen.append(masked) or torch.zeros(*tokens.shape, V)
    losses = [masked_loss(net, batch, torch.Generator().manual_seed(i)).item() for i in range(40)]
    assert np.mean(losses) == pytest.approx(np.log(V), rel=0.03), "a bound: a model that knows nothing is charged log V a token"
    assert not any((masked & (batch.segment == CONTEXT)).any() for masked in seen)
    model, p = MaskedLM(TrunkConfig(**SMALL, block_size=N, vocab_size=V)), torch.rand(V) + 1e-3
    p[EOT] = 0
    p /= p.sum()
    model.to_logits.weight.data.zero_()
    model.to_logits.bias.data = p.log().clamp(min=-99)
    texts = unmask(model, [[1, 2, 3]] * 1500, 0, EOT, steps=5)
    assert all(len(text) == N - 3 for text in texts)
    assert (torch.tensor(texts).flatten().bincount(minlength=V) / (1500 * (N - 3)) - p).abs().max() < 0.02
    scores = torch.rand(V).log()  # what is not masked is seen: the second half of the target repeats what the model was shown
    model.forward = lambda tokens, masked, mask: torch.where(masked[..., None], scores, torch.nn.functional.one_hot(tokens, V) * 99.0)
    assert unmask(model, [[1, 2]], 3, EOT, steps=4, temperature=0.0) == [[scores.argmax().item()] * 3]


def test_speed_measures_a_gpt_with_a_cache_that_writes_what_it_does_without(home, tmp_path, capsys):
    speed = load("bench/speed.py")
    gpt = randomise(GPT(TrunkConfig(**SMALL, block_size=N, vocab_size=V)), scale=0.5).eval()
    prompts, rows = torch.randint(0, V, (2, 5)), []
    for row in prompts.tolist():
        while len(row) < N:
            row = [*row, gpt(torch.tensor([row]))[0, -1].argmax().item()]
        rows.append(row[5:])
    assert speed.cached_gpt(gpt, prompts, N - 5, torch.float32).tolist() == rows and len({*rows[0], *rows[1]}) > 3
    script("bench/speed.py", "--parts=sample", "--rounds=1", "--lengths=5", "--batches=2", "--data", home / "data", "--out", tmp_path / "speed.json", "--device=cpu")
    report = {row["system"]: row for row in json.loads((tmp_path / "speed.json").read_text())["sample"]}
    assert report["textldm, 20 steps"]["evaluations"] == 20 and report["blocks of 4, 20 steps"]["evaluations"] == 40 and report["gpt, static cache"]["evaluations"] == 5
    assert all(row["memory_mb"] >= 0 and row["new_tokens"] == 5 and row["prompts"] == 2 for row in report.values())
    assert "| textldm, 50 steps | 2 | 5 |" in capsys.readouterr().out
# LDLM: latents learned together with the DiT

def ldlm(**options):
    torch.manual_seed(0)
    config = textldm.JointConfig(**SMALL, block_size=N, vocab_size=V, channels=8, coder_layers=1,
                                  teacher_config=json.dumps(dict(SMALL, n_layer=3, block_size=N + 1, vocab_size=V)), **options)
    model = randomise(textldm.LDLM(config), scale=0.1)
    model.teacher.requires_grad_(False)
    return model


def gradients(model, step=0, change=lambda model: None):
    change(model)
    model.zero_grad()
    textldm.joint_loss(model, make_batch(), torch.Generator().manual_seed(3), step)["loss"].backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}


def test_gamma_scales_what_diffusion_tells_the_encoder_and_nothing_else():
    shut, open_, half = gradients(ldlm(encoder_warmup=100), -500), gradients(ldlm(encoder_warmup=0)), gradients(ldlm(encoder_warmup=100), 80)
    end = gradients(ldlm(encoder_warmup=100), 100)
    encoder = [k for k in half if k.startswith("encoder.")]
    assert len(encoder) > 10 and any(not torch.allclose(shut[k], open_[k], rtol=1e-3) for k in encoder)
    for k in half:
        if k in encoder:
            assert torch.allclose(half[k], (shut[k] + open_[k]) / 2, atol=1e-6), k  # the middle of the sigmoid is at 0.8 of the warm-up
            assert torch.allclose(end[k], shut[k] + (open_[k] - shut[k]) / (1 + math.exp(-2)), atol=1e-6), k
        else:
            assert torch.equal(shut[k], open_[k]) and torch.equal(half[k], open_[k]), k
    assert not any(k.startswith("teacher.") for k in half)


def test_tokens_do_not_shape_the_latents_where_hidden_states_do():
    other = lambda model: randomise(model.token_decoder, scale=1.0)
    for mse in (True, False):
        a, b = gradients(ldlm(hidden_mse=mse)), gradients(ldlm(hidden_mse=mse), change=other)
        kept = {k: torch.equal(a[k], b[k]) for k in a if not k.startswith("token_decoder.")}
        assert all(kept.values()) if mse else not kept["encoder.first.weight"] and not kept["decoder.last.weight"]


def test_noise_is_of_the_decoder_alone_and_normalised_latents_cannot_outgrow_it():
    model = ldlm(decoder_noise=0.0)
    batch = make_batch()
    z = model.latents(batch.tokens, batch.segment)
    assert z.mean(-1).abs().max() < 1e-5 and (z.square().mean(-1) - 1).abs().max() < 1e-3
    model.encoder.last.weight.data *= 100
    model.encoder.last.bias.data *= 100
    assert torch.allclose(model.latents(batch.tokens, batch.segment), z, atol=1e-4)
    losses = [textldm.joint_loss(ldlm(decoder_noise=x), batch, torch.Generator().manual_seed(3), 0) for x in (0.0, 3.0)]
    assert torch.equal(losses[0]["diffusion"], losses[1]["diffusion"]) and not torch.equal(losses[0]["hidden"], losses[1]["hidden"])


def test_the_joint_loss_is_the_sum_of_its_three():
    """Written out, with a DiT that is told the clean latents; and nothing of a target is in the latents of its context."""
    model, batch, seen = ldlm(decoder_noise=0.7), make_batch(), []
    model.hidden_mean.normal_(), model.hidden_std.uniform_(0.5, 2)
    z = model.latents(batch.tokens, batch.segment)
    other = torch.where(batch.segment == TARGET, (batch.tokens + 7) % V, batch.tokens)
    assert torch.allclose(model.latents(other, batch.segment)[batch.segment == CONTEXT], z[batch.segment == CONTEXT], atol=1e-6)
    model.dit.forward = lambda x, segment, *rest, places: seen.append(x) or (z[: len(x)] if places is None else z.flatten(0, 1)[places]) + 0.5
    losses = textldm.joint_loss(model, batch, torch.Generator().manual_seed(3), 0)
    assert losses["diffusion"].item() == pytest.approx(0.25) and torch.equal(model.dit.estimate(z, seen[0], torch.ones(4, 1)), z)
    teacher = model.teacher.hidden_states(torch.nn.functional.pad(batch.tokens, (1, 0), value=EOT), 1)[:, 1:]
    hidden = (teacher - model.hidden_mean) / model.hidden_std
    noise = torch.Generator().manual_seed(3)
    torch.rand(2, 4, generator=noise), torch.randn(z.shape, generator=noise)
    hat = model.decoder(z + 0.7 * torch.randn(z.shape, generator=noise), batch.segment)
    mean = lambda x: ((x * batch.weight).sum() / batch.weight.sum()).item()
    nll = -model.token_decoder(hat, batch.segment).log_softmax(-1).gather(-1, batch.tokens[..., None])[..., 0]
    assert losses["hidden"].item() == pytest.approx(mean((hat - hidden).square().mean(-1)), rel=1e-4) and losses["word"].item() == pytest.approx(mean(nll), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(sum(losses[k].item() for k in ("diffusion", "hidden", "word")), rel=1e-5)
    assert torch.equal(model.to_tokens(z, batch.segment), model.token_decoder(model.decoder(z, batch.segment), batch.segment).argmax(-1))


def test_adaptive_times_follow_the_loss():
    """With a loss of t^2 the density of times is 2 t, but for the tenth that is even; and the running loss finds that profile by itself."""
    model = ldlm()
    dit, K = model.dit, len(model.dit.loss_at)
    for flat in (0.0, 1.0):
        dit.loss_at.fill_(flat)
        assert torch.allclose(dit.times(torch.linspace(0, 1, 11)), torch.linspace(0, 1, 11), atol=1e-6), "even, where the loss is"
    dit.loss_at.copy_(0.3 + torch.linspace(0, 1, K) ** 2)
    t = dit.times(torch.rand(200_000))
    density = torch.histc(t, 10, 0, 1) / len(t) * 10
    assert torch.allclose(density, 0.9 * 2 * (torch.arange(10) + 0.5) / 10 + 0.1, atol=0.03)
    dit.loss_at.zero_()
    real, batch = textldm.denoising_loss, Batch(*(x.repeat(16, 1) for x in make_batch()))
    try:
        at_targets = lambda t, block, batch: t[:, block].flatten()[batch.targets]
        textldm.denoising_loss = lambda dit, z_0, context, batch, t, eps, block, n_guess: (at_targets(t, block, batch) ** 2, None, None, at_targets(t, block, batch))
        for i in range(400):
            dit.note(*flow_loss(dit, torch.zeros(64, N, 8), batch, torch.Generator().manual_seed(i))[1])
    finally:
        textldm.denoising_loss = real
    error = (dit.loss_at - torch.linspace(0, 1, K) ** 2).abs()
    assert error.median() < 0.005 and error.max() < 0.1


def test_without_self_conditioning_nothing_is_told(dit):
    """A DiT with it, whose layer for the guess is zero, is the DiT without it."""
    without = TextDiT(replace(dit.config, self_condition=False))
    without.load_state_dict({k: v for k, v in dit.state_dict().items() if "from_guess" not in k})
    dit.from_guess.weight.data.zero_()
    z, batch = torch.randn(4, N, C), make_batch()
    a, b = (flow_loss(net, z, batch, torch.Generator().manual_seed(0))[0] for net in (dit, without))
    assert torch.equal(a, b)


def test_joint_training_resumes_exactly_and_is_sampled_as_two_stages_are(home, tmp_path, monkeypatch, capsys):
    def run(*more):
        script("train_dit.py", "--joint", "--data", home / "data", "--out", tmp_path, "--teacher", home / "out/gpt.pt", "--channels=8", "--coder_layers=1",
               "--max_steps=4", "--eval_interval=2", "--batch_size=8", "--device=cpu", *(f"--{k}={v}" for k, v in SMALL.items()), *more)
    run()
    whole, batch, calls = load_checkpoint(tmp_path / "dit_last.pt", "dit", ""), Corpus.batch, []
    said = capsys.readouterr().out
    assert "of their variance is between tokens" in said and "dit.pt (the latest)" in said

    def stop_at_the_third(self, rng, B, *rest, **more):
        calls.append(B)
        if calls.count(8) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, rng, B, *rest, **more)

    with monkeypatch.context() as m, pytest.raises(SystemExit, match="stopped after step 3"):
        m.setattr(Corpus, "batch", stop_at_the_third)
        run()
    run("--resume")
    again = load_checkpoint(tmp_path / "dit_last.pt", "dit", "")
    assert again["step"] == 4 and whole["model"]["dit.loss_at"].any() and whole["average"]["dit.loss_at"].any()
    assert all(torch.equal(whole[part][k], again[part][k]) for part in ("model", "average") for k in whole[part])
    capsys.readouterr()
    script("sample.py", "--out", tmp_path, "--prompt=ab", "--steps=2", "--device=cpu")
    assert capsys.readouterr().out.startswith("ab|")
    gpt, _ = GPT.from_pretrained(home / "out/gpt.pt")
    assert torch.equal(whole["model"]["teacher.wte.weight"], gpt.wte.weight) and whole["model"]["hidden_mean"].any()
    with pytest.raises(SystemExit):
        run("--latent_block=4")
    assert "and no --joint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--compile")
    assert "goes with none of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(home, "train_dit.py", f"--out={tmp_path}", "--teacher=none", steps=1)
    assert "--teacher is read with --joint" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# The scripts, and what they make of bad input


@pytest.mark.parametrize("how", ["killed", "asked to stop"])
def test_resume_equals_no_interruption(home, tmp_path, monkeypatch, how):
    """To the bit, and with every line of metrics once, whether the last step was saved or is to be done again."""
    class Killed(BaseException):
        pass
    for path, stage in (("bench/train_gpt.py", "gpt"), ("train_vae.py", "vae"), ("train_dit.py", "dit")):
        whole, lines = load_checkpoint(home / f"out/{stage}_last.pt", stage, ""), (home / f"out/{stage}.jsonl").read_text()
        calls, batch = [], Corpus.batch

        def interrupted(self, rng, B, *rest, **more):
            calls.append(B)
            if how == "killed" and calls.count(8) == 5:  # step 3 is in the metrics, and in no checkpoint
                raise Killed
            if how == "asked to stop" and calls.count(8) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch(self, rng, B, *rest, **more)

        with monkeypatch.context() as m:
            m.setattr(Corpus, "batch", interrupted)
            with pytest.raises(Killed if how == "killed" else SystemExit, match=None if how == "killed" else "stopped after step 3; the same command"):
                train(home, path)
        assert load_checkpoint(home / f"out/{stage}_last.pt", stage, "")["step"] == (2 if how == "killed" else 3)
        with open(home / f"out/{stage}.jsonl", "a") as f:
            f.write('{"step": 4, "loss"')  # half a line
        train(home, path, "--resume")
        resumed = load_checkpoint(home / f"out/{stage}_last.pt", stage, "")
        for part in ("model", "average"):
            assert all(torch.equal(whole[part][k], resumed[part][k]) for k in whole[part]), (stage, part)
        optimizers = {"AdamW", "Muon"} & whole.keys()
        assert optimizers and all(str(whole[k]) == str(resumed[k]) for k in optimizers) and resumed["step"] == 4
        assert (home / f"out/{stage}.jsonl").read_text() == lines


def test_the_teacher_was_trained_at_every_position_that_it_reads_for_the_vae(home):
    (_, _, gpt, corpus, loss_of, *_), _ = taken(home, "bench/train_gpt.py", "--block_size=16")
    (_, _, _, of_vae, *_), _ = taken(home, "train_vae.py", "--block_size=16", f"--teacher={home / 'out/gpt.pt'}")
    loss_of(gpt, corpus.batch(np.random.default_rng(0), 200, corpus.N, cut_words=False))["loss"].backward()
    assert gpt.wpe.weight.grad.abs().sum(1).count_nonzero() == of_vae.N + 1 == gpt.config.block_size


def test_more_steps_go_on_at_the_last_rate(home, tmp_path):
    home = copy_of(home, tmp_path)
    train(home, "bench/train_gpt.py", "--resume", "--warmup=100", steps=6)
    rates = [line["lr"] for line in map(json.loads, (home / "out/gpt.jsonl").read_text().splitlines()) if "lr" in line]
    assert len(rates) == 6 and rates[4:] == pytest.approx([5 / 4 * rates[3], 6 / 4 * rates[3]])  # still warming up
    home = copy_of(home, tmp_path / "again")
    train(home, "bench/train_gpt.py", "--warmup=0")
    train(home, "bench/train_gpt.py", "--warmup=0", "--resume", steps=6)
    rates = [line["lr"] for line in map(json.loads, (home / "out/gpt.jsonl").read_text().splitlines()) if "lr" in line]
    assert rates[0] > rates[3] > rates[4] == rates[5] == pytest.approx(0.1 * rates[0])


def test_what_is_not_finite_is_named_and_not_saved(home, tmp_path, capsys):
    home = copy_of(home, tmp_path)
    before = (home / "out/vae_last.pt").read_bytes()
    with pytest.raises(SystemExit):
        train(home, "train_vae.py", "--resume", "--learning_rate=1e38", steps=9)
    assert "is not finite" in (err := capsys.readouterr().err) and "loss" in err and "step" in err
    assert (home / "out/vae_last.pt").read_bytes() == before


def processes(world, *command, seconds=100):
    """That many processes of python COMMAND, in fp32 and as torchrun would start them. Their exit codes, None for one that had to be killed."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    more = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="default")
    started = [subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, **more, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                stdout=subprocess.DEVNULL) for rank in range(world)]
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(p.poll() is None for p in started):
        time.sleep(0.1)
    codes = [p.poll() for p in started]
    for p in started:
        p.kill()
        p.wait()
    return codes


def test_two_processes_learn_what_one_does(home, tmp_path):
    """As torchrun would run them, against one with two micro-batches a step."""
    if processes(2, "-c", "import torch.distributed as d, torch; d.init_process_group('gloo'); d.all_reduce(torch.ones(1)); d.destroy_process_group()", seconds=30) != [0, 0]:
        pytest.skip("two processes of torch's gloo do not reach each other on this machine")
    losses, sizes = {}, [f"--{k}={v}" for k, v in SMALL.items()]
    common = ["train_vae.py", "--data", home / "data", "--teacher", home / "out/gpt.pt", "--max_steps=6", "--batch_size=8", "--log_interval=1",
              "--device=cpu", *sizes]
    for name, world, more in (("one", 1, ["--accumulate=2"]), ("two", 2, [])):
        assert processes(world, *common, "--out", tmp_path / name, *more) == [0] * world
        lines = map(json.loads, (tmp_path / name / "vae.jsonl").read_text().splitlines())
        losses[name] = [(line["loss"], line["norm"]) for line in lines if "norm" in line]
    assert len(losses["one"]) == 6 and np.array(losses["two"]) == pytest.approx(np.array(losses["one"]), rel=2e-3)
    assert losses["two"][0] == pytest.approx(losses["one"][0], rel=1e-5)
    assert processes(2, *common, "--out", tmp_path / "lost", "--learning_rate=1e38", "--warmup=0") == [2, 2], "both say what was wrong and end"


def test_training_learns_and_remembers(home, tmp_path):
    lines = [json.loads(line) for line in (home / "out/vae.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "loss" in line} == {1, 2, 3, 4}
    assert {"ce", "kl", "cos", "accuracy", "norm", "lr"} <= lines[1].keys()
    for path, stage in (("bench/train_gpt.py", "gpt"), ("train_vae.py", "vae"), ("train_dit.py", "dit")):
        train(home, path, f"--out={tmp_path}", f"--teacher={home / 'out/gpt.pt'}" if stage == "vae" else "--seed=1",
              "--learning_rate=1e-2", "--warmup=0", "--eval_interval=20", steps=60)
        losses = [json.loads(line)["val"]["loss"] for line in (tmp_path / f"{stage}.jsonl").read_text().splitlines() if "val" in line]
        assert len(losses) == 3 and min(losses) < 0.97 * losses[0], stage
        best, last = (load_checkpoint(tmp_path / f"{stage}{end}.pt", stage, "") for end in ("", "_last"))
        averaged = any(not torch.equal(last["model"][k], last["average"][k]) for k in last["model"])
        assert averaged == (stage == "dit") and best["step"] in (20, 40, 60)


def taken(home, path, *more):
    """What a script gives to `train`, and does not train."""
    found = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(textldm, "train", lambda *given, **named: found.append((given, named)))
        train(home, path, *more)
    return found[0]


def test_the_gpt_learns_counted_tokens_from_those_before_them(home):
    (_, _, gpt, corpus, loss_of, *_), _ = taken(home, "bench/train_gpt.py")
    gpt, batch = randomise(gpt), corpus.batch(np.random.default_rng(0), 8, corpus.N, cut_words=False)
    tails = batch._replace(tokens=torch.where(batch.counted, batch.tokens, 3))
    seen = torch.cat((torch.full((8, 1), corpus.eot), batch.tokens[:, :-1]), dim=1)
    nll = -gpt(seen).log_softmax(-1).gather(-1, batch.tokens[..., None])[..., 0]
    assert not batch.counted.all() and loss_of(gpt, tails)["loss"].item() == pytest.approx(nll[batch.counted].mean().item(), rel=1e-5)


def test_beta_grows_from_zero_over_its_warm_up(home):
    (_, _, vae, corpus, loss_of, *_), _ = taken(home, "train_vae.py", "--beta=0.5", "--beta_warmup=10", "--teacher=none")
    batch = corpus.batch(np.random.default_rng(0), 8, corpus.N)
    batch = batch._replace(weight=batch.counted.float())
    losses = [loss_of(randomise(vae), batch, torch.Generator().manual_seed(0), step) for step in (0, 5, 10, 99)]
    betas = [((x["loss"] - x["ce"]) / x["kl"]).item() for x in losses]
    assert betas == pytest.approx([0, 0.25, 0.5, 0.5], abs=1e-3)


def test_shuffled_contexts_are_of_other_rows(home):
    (_, _, dit, _, _, evaluate, *_), _ = taken(home, "train_dit.py")
    table = evaluate(randomise(dit, scale=0.2))["table"]
    assert all(abs(row["shuffled"] - row["loss"]) > 1e-3 for row in table)
    dit.forward = lambda x, *_, places=None: torch.zeros(*(x.shape[:2] if places is None else [len(places)]), dit.config.vocab_size)
    assert all(row["shuffled"] == row["loss"] for row in evaluate(dit)["table"]), "one that reads no context"


class Toy(torch.nn.Module):
    """A matrix, and a vector that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.config, self.h = TrunkConfig(), torch.nn.ModuleDict(dict(mlp=torch.nn.Linear(2, 3)))
        for p in self.parameters():
            p.data.fill_(1)


def train_toy(out, loss_of, steps=3, muon=False, **options):
    """Trains a Toy by `textldm.train`. loss_of(matrix, batch, step). Returns its weights, their average, the weights that toy.pt keeps, those that
    were evaluated last, what each micro-batch's generator drew, and the lines of metrics."""
    judged, calls, luck = [], itertools.count(), []

    class Rows:
        tokenizer, meta, N, tokens = {}, {}, 4, [0]

        def fixed_batches(self, *_, **__):
            return []

        def batch(self, rng, B, N, cut_words=True):
            weight = torch.from_numpy(rng.random((B, N))).float()
            return Batch(torch.from_numpy(rng.integers(9, size=(B, N))), torch.ones(B, N, dtype=torch.long), weight)
    cfg = textldm.TrainConfig(out=str(out), max_steps=steps, eval_interval=1, log_interval=1, batch_size=2, device="cpu", muon=muon, learning_rate=0.1, warmup=0, **options)

    def loss(net, batch, generator, step):
        luck.append(torch.rand((), generator=generator).item())
        return dict(loss=loss_of(net.h["mlp"].weight, batch, step) + 0 * net.h["mlp"].bias.sum())
    textldm.train("toy", cfg, Toy(), Rows(), loss, lambda model: judged.append(model.h["mlp"].weight.clone()) or dict(loss=-next(calls)), lambda batch: batch.weight.sum(), ema=True)
    lines = [json.loads(line) for line in (out / "toy.jsonl").read_text().splitlines()]
    last, best = (load_checkpoint(out / f"toy{end}.pt", "toy", "") for end in ("_last", ""))
    weights, average, kept = ({k.split(".")[-1]: v for k, v in state.items()} for state in (last["model"], last["average"], best["model"]))
    return SimpleNamespace(weights=weights, average=average, kept=kept, judged=judged[-1], luck=luck, lines=[line for line in lines if "norm" in line])


def test_the_average_follows_the_weights_at_its_rate(tmp_path):
    """By a decay that grows to 0.999: (1 + k) / (10 + k) after k steps."""
    seen = []
    toy = train_toy(tmp_path, lambda matrix, *_: seen.append(matrix.detach().clone()) or matrix.sum(), steps=120)
    averages = []
    for most in (0.999, 0.9):
        averages.append(seen[0])
        for k, after in enumerate([*seen[1:], toy.weights["weight"]]):
            decay = min(most, (2 + k) / (11 + k))
            averages[-1] = decay * averages[-1] + (1 - decay) * after
    assert torch.allclose(toy.average["weight"], averages[0], atol=1e-5) and not torch.allclose(*averages, atol=1e-3), "this run tells 0.999 from 0.9"
    assert torch.equal(toy.kept["weight"], toy.average["weight"]) and torch.equal(toy.judged, toy.average["weight"]), "what is judged and kept is the average"


def test_gradients_are_clipped_to_a_norm_of_1(tmp_path):
    """So a huge one counts as one of norm 1, and one of less as it is. (The first step's, beside two of 0.1.)"""
    loss_of = lambda norm: lambda matrix, batch, step: (norm if step == 0 else 0.1) * matrix.sum() / 6**0.5
    huge, one, small = (train_toy(tmp_path / str(norm), loss_of(norm)).weights["weight"] for norm in (1000.0, 1.0, 0.5))
    assert torch.allclose(huge, one, atol=1e-5) and not torch.allclose(small, one, atol=1e-3)


def test_each_micro_batch_has_luck_of_its_own(tmp_path):
    draws = [train_toy(tmp_path / str(seed), lambda matrix, *_: matrix.sum(), accumulate=2, seed=seed).luck for seed in (1, 2)]
    assert len({*draws[0], *draws[1]}) == 12, "three steps of two, and two seeds"


def test_muon_is_for_the_matrices_of_blocks_alone(home):
    for stage, layers in (("gpt", SMALL["n_layer"]), ("dit", SMALL["n_layer"])):
        state = load_checkpoint(home / f"out/{stage}_last.pt", stage, "")
        count = [len(group["params"]) for name in ("Muon", "AdamW") for group in state[name]["param_groups"]]
        sizes = {k: v.dim() for k, v in state["model"].items() if k != "latent_of"}
        assert count == [4 * layers, sum(d == 2 for d in sizes.values()) - 4 * layers, sum(d == 1 for d in sizes.values())]


def test_the_teachers_statistics_are_of_counted_tokens():
    teacher = randomise(GPT(TrunkConfig(**SMALL, block_size=N + 1, vocab_size=V)))
    batches = [make_batch(8, seed=i) for i in range(2)]
    mean, std = train_vae.statistics_of(teacher, batches, EOT, contextlib.nullcontext())
    features = torch.cat([teacher_features(teacher, b.tokens, EOT)[b.weight == 1] for b in batches])
    assert torch.allclose(mean, features.mean(0), atol=1e-5) and torch.allclose(std, features.std(0), atol=1e-5)


@pytest.mark.parametrize("muon", (False, True))
def test_weight_decay_is_of_matrices_alone(tmp_path, muon):
    weights = train_toy(tmp_path, lambda matrix, *_: 0 * matrix.sum(), weight_decay=0.5, muon=muon).weights
    assert torch.equal(weights["bias"], torch.ones(3)) and weights["weight"].max() < 0.9


def test_micro_batches_count_by_their_share(tmp_path):
    """Two of two rows, of different weights, are one of four: the loss, its gradient's norm and the step."""
    seen = []

    def loss_of(matrix, batch, step):
        seen.append((batch.tokens, batch.weight))
        return textldm.weighted_mean(matrix.sum() * batch.tokens.float().square(), batch.weight) * 1e-3
    lines = train_toy(tmp_path, loss_of, steps=1, accumulate=2).lines
    (a, w), (b, v) = seen
    assert w.sum() != v.sum()
    mean = ((a.square() * w).sum() + (b.square() * v).sum()) / (w.sum() + v.sum()) * 1e-3
    assert lines[0]["loss"] == pytest.approx(6 * mean.item(), rel=1e-5) and lines[0]["norm"] == pytest.approx(6**0.5 * mean.item(), rel=1e-5)


@pytest.mark.parametrize("keep_last, step", [(False, 2), (True, 4)])
def test_the_best_checkpoint_is_kept_or_where_asked_the_latest(home, tmp_path, keep_last, step):
    corpus, val = Corpus(home / "data", "train", N), iter((2.0, 1.0, 4.0, 3.0))
    gpt = GPT(TrunkConfig(**SMALL, block_size=N, vocab_size=corpus.meta["vocab_size"]))
    loss_of = lambda net, batch, generator, step: dict(loss=textldm.cross_entropy(net(batch.tokens), batch.tokens).mean())
    cfg = textldm.TrainConfig(out=str(tmp_path), max_steps=4, eval_interval=1, batch_size=4, device="cpu")
    textldm.train("gpt", cfg, gpt, corpus, loss_of, lambda model: dict(loss=next(val)), lambda batch: batch.weight.sum(), keep_last=keep_last)
    assert load_checkpoint(tmp_path / "gpt.pt", "gpt", "")["step"] == step


def test_sample_writes_continues_and_warns(home, tmp_path, capsys):
    def sample(*more):
        script("sample.py", "--out", home / "out", "--steps=3", "--device=cpu", *more)
        return capsys.readouterr()
    out = sample("--prompt=greek sm", "--n=3", "--seed=5").out
    assert out.count("greek sm|") == 3 and out == sample("--prompt=greek sm", "--n=3", "--seed=5").out
    assert sample("--prompt=greek", "--trace").out.count("t=") == 3
    assert "tokens, " in (warned := sample("--prompt=" + "greek " * 99)).err and "|" in warned.out
    assert "|" in sample("--prompt=greek", f"--gpt={home / 'out/gpt.pt'}").out
    (tmp_path / "in.jsonl").write_text('{"prompt": "greek", "id": 1}\n{"prompt": "", "id": 2}\n')
    sample(f"--prompts={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}", "--batch_size=1")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [1, 2] and all(isinstance(line["text"], str) for line in lines)


def test_the_seed_of_sample_draws_the_noise(home, tmp_path, capsys):
    """Of a DiT of random weights: that of `home` has learnt too little to write two texts."""
    out = copy_of(home, tmp_path) / "out"
    state = load_checkpoint(out / "dit.pt", "dit", "")
    generator = torch.Generator().manual_seed(0)
    state["model"] = {k: torch.randn(v.shape, generator=generator) * (3 if k == "latent_of" else 0.5) for k, v in state["model"].items()}
    write_whole(out / "dit.pt", state)

    def sample(*more):
        script("sample.py", "--out", out, "--prompt=greek", "--steps=3", "--length=8", "--device=cpu", *more)
        return capsys.readouterr().out
    for more in ((), (f"--gpt={out / 'gpt.pt'}",)):
        assert len({sample(f"--seed={i}", *more) for i in range(4)}) == 4 and sample(*more) == sample("--seed=0", *more)


def test_sample_passes_its_options_on_and_says_what_ended(home, tmp_path, monkeypatch):
    given = []

    def write(vae, dit, prompts, length, eot, seed, callback, **how):
        given.append((len(prompts), length, how))
        return [[5, eot], [6]] * (len(prompts) // 2)
    monkeypatch.setattr(textldm, "continue_texts", write)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    script("sample.py", "--out", home / "out", f"--prompts={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}", "--n=3", "--temperature=0.25",
           "--cfg=1.5", "--steps=7", "--length=4", "--device=cpu")
    assert given == [(6, 4, dict(steps=7, cfg_scale=1.5, temperature=0.25))]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [*"aaabbb"] and [line["ended"] for line in lines] == [True, False] * 3


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The report of bench/evaluate.py on canned text: sentences that a GPT learns in seconds, and floors."""
    folder, rng = tmp_path_factory.mktemp("judged"), np.random.default_rng(0)
    nouns, verbs, places = "cat dog bird fox owl".split(), "sees hears finds loves".split(), "wood house river sky".split()
    texts = sorted({f"the {a} {v} the {b} near the {p} and then the {c} {w} the {d} near the {q}" for a, v, b, p, c, w, d, q in
                    zip(*(rng.choice(words, 600) for words in (nouns, verbs, nouns, places, nouns, verbs, nouns, places)))})
    script("data/prepare.py", jsonl(folder / "texts.jsonl", texts), "--out", folder / "data", "--encoding=bpe", "--vocab_size=300",
           "--layout=documents", "--val_fraction=0.2")
    for seed, out in ((1, "out"), (2, "out/evaluator")):
        script("bench/train_gpt.py", "--data", folder / "data", "--out", folder / out, f"--seed={seed}", "--n_layer=2", "--n_head=2", "--n_embd=32",
               "--max_steps=150", "--batch_size=32", "--learning_rate=1e-2", "--warmup=10", "--device=cpu")
    judge(folder, "--systems=gpt")
    benchmark, = (folder / "data").glob("benchmark_60_1_*.jsonl")
    lines = [json.loads(line) for line in benchmark.read_text().splitlines()]
    theirs = folder / "theirs.jsonl"
    theirs.write_text("".join(json.dumps(dict(prompt=b["prompt"], text=" the" * len(b["reference"].split()))) + "\n" for b in lines))
    judge(folder, "--systems=real,other,unigram,tokens,prompt,gpt", f"--texts={theirs}")
    return folder, theirs


def judge(folder, *more):
    script("bench/evaluate.py", "--data", folder / "data", "--out", folder / "out", "--n=60", "--clusters=8", "--device=cpu", *more)


def test_every_floor_is_caught_and_real_text_lies_where_it_must(judged):
    folder, theirs = judged
    report = json.loads((folder / "out/eval.json").read_text())
    systems = report["systems"]
    real, other, unigram, tokens, prompt, gpt, collapsed = systems.values()
    nll, spread = (lambda s: s["nll"][0]), (lambda s: s["entropy"][0])
    assert 1.5 * nll(real) < nll(other) < nll(prompt) < nll(unigram), "what does not follow is improbable; without order, more so"
    assert abs(nll(gpt) - nll(real)) < 0.2 and abs(spread(gpt) - spread(real)) < 0.2, "a trained model is near real text"
    assert spread(collapsed) < 0.5 < spread(real) - 0.5 and collapsed["distinct_2"][0] < 0.5 * real["distinct_2"][0]
    assert abs(spread(unigram) - spread(real)) < 0.5, "what is wrong with it is not its words"
    assert prompt["copied_prompt"] > 80 > 40 > max(s["copied_prompt"] for s in systems.values() if s is not prompt)
    assert unigram["copied_train"] < 0.5 * real["copied_train"]
    assert tokens["words_known"] < 80 < 99 < min(real["words_known"], unigram["words_known"]) and nll(tokens) > nll(real) + 1
    assert real["copies"] == 0
    if not isinstance(real["rouge"], str):
        assert real["rouge"][0][0] == 100 > 90 > max(s["rouge"][2][0] for s in systems.values() if s is not real)
        assert other["rouge"][1][0] > 2 * unigram["rouge"][1][0], "pairs of words need an order"
    if not isinstance(real["mauve"], str):
        assert min(s["mauve"][0] for s in (real, other, gpt)) > 2 * max(s["mauve"][0] for s in (unigram, prompt, collapsed))
    assert len(report["frontier"]["gpt"]) == 6 and report["systems"]["gpt"]["knob"] in [p["knob"] for p in report["frontier"]["gpt"]]
    assert (folder / "out/eval.md").read_text().count("| gpt |") == 2


def test_whole_documents_are_judged_too(judged, tmp_path):
    folder, _ = judged
    script("bench/evaluate.py", "--data", folder / "data", "--out", tmp_path, "--evaluator", folder / "out/evaluator/gpt.pt", "--n=60", "--clusters=8",
           "--device=cpu", "--unprompted", f"--systems=real,unigram,gpt=gpt:{folder / 'out/gpt.pt'}")
    real, unigram, gpt = json.loads((tmp_path / "eval.json").read_text())["systems"].values()
    benchmark, = (folder / "data").glob("benchmark_60_1_*_unprompted.jsonl")
    assert all(b["prompt"] == "" and b["reference"].startswith("the ") for b in map(json.loads, benchmark.read_text().splitlines()))
    assert abs(gpt["nll"][0] - real["nll"][0]) < 0.3 and unigram["nll"][0] > real["nll"][0] + 1 and real["copies"] == 0


def test_bad_benchmarks_are_refused(judged, tmp_path, capsys):
    folder, theirs = judged
    options = ("bench/evaluate.py", "--data", folder / "data", "--out", folder / "out", "--n=60", "--device=cpu", "--systems=real")
    before = sorted(folder.rglob("*"))
    refuse(capsys, "has only", *options, "--n=5000")
    refuse(capsys, "kind 'fake'", *options, "--systems=real,fake")
    refuse(capsys, "--top_p=1,x", *options, "--systems=gpt", "--top_p=1,x")
    file = tmp_path / "bench.jsonl"
    for line, sentence in (('{"prompt": "a"}', 'line 1: expected {"prompt"'), ("[1]", "line 1"), ("{", "line 1"),
                           ('{"prompt": "a", "reference": " "}', "the reference is empty"),
                           ('{"prompt": "a", "reference": "b"}', "has 1 lines")):
        file.write_text(line + "\n")
        refuse(capsys, sentence, *options, f"--benchmark={file}")
    refuse(capsys, "does not exist", *options, f"--benchmark={tmp_path / 'none'}")
    file.write_text('{"prompt": "a", "text": "b"}\n')
    refuse(capsys, "does not match the benchmark", *options, f"--texts={file}")
    refuse(capsys, "evaluator/gpt.pt is missing", *options, "--out", tmp_path)
    refuse(capsys, "judged by itself", *options, "--systems=gpt", f"--evaluator={folder / 'out/gpt.pt'}")
    refuse(capsys, "leave one of them out", *options, f"--benchmark={file}", "--unprompted")
    refuse(capsys, "two rows", *options, "--systems=real,real")
    assert sorted(folder.rglob("*")) == before


def test_missing_packages_are_one_sentence(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    refuse(capsys, "pip install zstandard", "data/prepare.py", tmp_path / "a.jsonl.zst", "--out", tmp_path / "out", "--encoding=bpe")
    refuse(capsys, "pip install safetensors", "train_vae.py", "--data", home / "data", "--out", tmp_path, "--teacher", tmp_path)


def snapshot(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def refuse(capsys, words, path, *arguments, keep=None):
    """The script ends with code 2 and one line with these words, and changes no file under keep."""
    before = keep and snapshot(keep)
    with pytest.raises(SystemExit) as e:
        script(path, *arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and words in error and "error:" in error and "Traceback" not in error, error
    assert keep is None or snapshot(keep) == before


def copy_of(home, tmp_path):
    import shutil
    shutil.copytree(home, tmp_path / "copy")
    return tmp_path / "copy"


def test_bad_data_is_refused(home, tmp_path, capsys):
    home = copy_of(home, tmp_path)
    scripts = ("bench/train_gpt.py", "train_vae.py", "train_dit.py")
    for path in scripts:
        refuse(capsys, "missing or empty; python data/prepare.py", path, "--data", tmp_path / "nowhere", "--out", home / "out", keep=home)
    good = snapshot(home / "data")

    def broken(name, data, words):
        (home / "data" / name).write_bytes(data)
        for path in scripts:
            refuse(capsys, words, path, "--data", home / "data", "--out", home / "out", "--device=cpu", keep=home)
        for p, old in good.items():
            p.write_bytes(old)

    train_bin, meta = (good[home / "data" / n] for n in ("train.bin", "meta.json"))
    broken("train.bin", b"", "missing or empty")
    broken("train.bin", train_bin[:-1], "do not fit")
    broken("train.bin", train_bin[:-2], "do not fit")
    broken("train.bin", train_bin.replace(b"e\x00", b"\xff\xff"), "beyond its vocabulary")
    broken("val.bin", good[home / "data/val.bin"].replace(b"\x2b\x01", b"\x01\x00"), "less than one row")
    broken("meta.json", meta.replace(b'"uint16"', b'"uint99"'), "do not fit")
    broken("meta.json", meta[:-20], "meta.json do not fit")
    broken("meta.json", meta.replace(b'"eot"', b'"eos"'), "meta.json do not fit")


def test_bad_sources_are_refused(tmp_path, capsys):
    zstandard = pytest.importorskip("zstandard")
    out = tmp_path / "out"
    jsonl(tmp_path / "good.jsonl", DOCUMENTS)
    script("data/prepare.py", tmp_path / "good.jsonl", "--out", out, "--encoding=bpe", "--vocab_size=280", "--val_fraction=0.2")
    lines = (tmp_path / "good.jsonl").read_bytes()
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        (tmp_path / "a.jsonl").write_bytes(lines[:500])
        tar.add(tmp_path / "a.jsonl", "a.jsonl")
        tar.add(tmp_path / "good.jsonl", "good.jsonl")
    random = np.random.default_rng(0).bytes(300000).hex().encode()  # so that the compressed file is large
    files = {
        "cut.jsonl.zst": (zstandard.compress(lines + random)[:-100], "broken, cut off"),
        "bad.jsonl.zst": (b"not zstandard at all", "broken, cut off"),
        "cut.jsonl.gz": (gzip.compress(lines + random)[:-100], "broken, cut off"),
        "bad.jsonl.gz": (b"not gzip at all", "broken, cut off"),
        "bad.tar": (b"not a tar at all" * 99, "broken, cut off"),
        "none.jsonl": (b'{"txt": "wrong field"}\nnot json\n[1]\n{"text": 3}\n\n', "no usable document"),
        "empty.jsonl": (b"", "no usable document"),
        "one.jsonl": (b'{"text": "one one one one"}\n', "documents fell to"),
        "deep.jsonl": (b"[" * 99999 + b"\n", "no usable document"),
        "cut.tar": ((tmp_path / "whole.tar").read_bytes()[:1024], "broken, cut off"),
    }
    for name, (data, words) in files.items():
        (tmp_path / name).write_bytes(data)
        refuse(capsys, words, "data/prepare.py", tmp_path / name, "--out", out, "--encoding=bpe", "--vocab_size=259", keep=out)
    refuse(capsys, "missing", "data/prepare.py", tmp_path / "nothing.jsonl", "--out", out, keep=out)
    refuse(capsys, "too small for --vocab_size", "data/prepare.py", tmp_path / "one.jsonl", "--out", tmp_path / "new", "--encoding=bpe")
    refuse(capsys, "--val_fraction", "data/prepare.py", tmp_path / "good.jsonl", "--out", out, "--val_fraction=2", keep=out)
    assert not (tmp_path / "new").exists()
    (tmp_path / "some.jsonl").write_bytes(b"nonsense\n" + lines)  # single bad lines are skipped and counted
    script("data/prepare.py", tmp_path / "some.jsonl", "--out", out, "--encoding=bpe", "--vocab_size=280", "--val_fraction=0.2")
    assert "skipped 1 unusable lines of" in capsys.readouterr().out


def test_bad_checkpoints_are_refused(home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = copy_of(home, tmp_path)
    out, data = home / "out", ["--data", home / "data", "--out", home / "out", "--device=cpu", "--max_steps=2"]
    (out / "cut.pt").write_bytes((out / "vae.pt").read_bytes()[:-1000])
    (out / "code.pt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    flipped = bytearray((out / "vae.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 4
    (out / "flip.pt").write_bytes(flipped)
    for bad, words in (("cut.pt", "no whole checkpoint"), ("flip.pt", "no whole checkpoint"), ("code.pt", "no whole checkpoint"), ("none.pt", "missing; python"),
                       ("gpt.pt", "where a vae is needed")):
        refuse(capsys, words, "train_dit.py", *data, "--vae", out / bad, keep=home)
        refuse(capsys, words, "sample.py", "--out", out, "--vae", out / bad, keep=home)
    for bad, words in (("cut.pt", "no whole checkpoint"), ("none.pt", "missing; python bench/train_gpt.py"), ("vae.pt", "where a gpt is needed")):
        refuse(capsys, words, "train_vae.py", *data, "--teacher", out / bad, keep=home)
    torch.save({"some": torch.ones(3)}, out / "other.bin")
    refuse(capsys, "Hugging Face", "train_vae.py", *data, "--teacher", out / "other.bin", keep=home)
    assert not (tmp_path / "pwned").exists()  # nothing in a checkpoint runs
    state = load_checkpoint(out / "vae.pt", "vae", "")
    write_whole(out / "wide.pt", {**state, "config": {**state["config"], "n_embd": 32}})
    write_whole(out / "odd.pt", {**state, "config": {"n_odd": 1}})
    write_whole(out / "huge.pt", {**state, "config": {**state["config"], "n_embd": 2**40}})  # no memory for what it claims
    write_whole(out / "deep.pt", {**state, "config": {**state["config"], "n_layer": 2**40}})
    for bad in ("wide.pt", "odd.pt", "huge.pt", "deep.pt"):
        refuse(capsys, "does not fit this code", "train_dit.py", *data, "--vae", out / bad, keep=home)
    # another VAE than the DiT's, of the same sizes
    state = load_checkpoint(out / "vae.pt", "vae", "")
    state["model"]["z_mean"] += 1
    write_whole(out / "vae2.pt", state)
    refuse(capsys, "another VAE", "sample.py", "--out", out, "--vae", out / "vae2.pt", keep=home)
    # another vocabulary
    script("data/prepare.py", home / "docs.jsonl", "--out", home / "data2", "--encoding=bpe", "--vocab_size=290", "--layout=documents", "--val_fraction=0.2")
    other = ["--data", home / "data2", "--out", out, "--device=cpu", "--max_steps=2"]
    refuse(capsys, "another vocabulary", "train_dit.py", *other, keep=home)
    refuse(capsys, "different tokenizers", "train_vae.py", *other, keep=home)
    refuse(capsys, "another vocabulary", "bench/train_gpt.py", *other, "--resume", keep=home)
    alike = [*data, "--resume", "--batch_size=8", *(f"--{k}={v}" for k, v in SMALL.items())]
    refuse(capsys, "another n_layer;", "bench/train_gpt.py", *alike, "--n_layer=1", keep=home)
    refuse(capsys, "another seed;", "bench/train_gpt.py", *alike, "--seed=2", keep=home)
    # another teacher than the VAE's, of the same sizes
    state = load_checkpoint(out / "gpt.pt", "gpt", "")
    state["model"]["wte.weight"] += 1
    write_whole(out / "gpt2.pt", state)
    refuse(capsys, "another teacher", "train_vae.py", *alike, "--teacher", out / "gpt2.pt", keep=home)


def test_bad_options_are_refused(home, tmp_path, capsys):
    data = ["--data", home / "data", "--out", home / "out"]
    for option in ("--max_steps=0", "--max_steps=many", "--beta=-1", "--no_such_option=1", "--preset=huge", "--batch_size=1.5", "--device=tpu9"):
        refuse(capsys, "--device" if "device" in option else "argument" if "=" in option else option, "train_vae.py", *data, option, keep=home) \
            if option not in ("--max_steps=0", "--beta=-1", "--no_such_option=1") else \
            refuse(capsys, option.split("=")[0], "train_vae.py", *data, option, keep=home)
    for option in ("--n=0", "--steps=0", "--length=-1", "--length=1000", "--cfg=nan"):
        refuse(capsys, option.split("=")[0], "sample.py", "--out", home / "out", option)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    refuse(capsys, "leave one of them out", "sample.py", "--out", home / "out", f"--gpt={home / 'out/gpt.pt'}", "--trace")
    refuse(capsys, "line 2", "sample.py", "--out", home / "out", f"--prompts={tmp_path / 'bad.jsonl'}")
    refuse(capsys, "does not exist", "sample.py", "--out", home / "out", f"--prompts={tmp_path / 'none.jsonl'}")

"""Properties of textldm.py, on the CPU, with no network:

    python -m pytest test_textldm.py

Each test guards one property and fails when it is broken. This file needs torch, pytest and
textldm.py, and can be copied together with it.
"""

import ast
import contextlib
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import textldm
from textldm import (
    CONTEXT,
    GPT,
    OURS,
    PADDING,
    TAIL_WEIGHT,
    TARGET,
    Batch,
    DiTConfig,
    Sampling,
    TextDiT,
    TextVAE,
    TransformerConfig,
    VAEConfig,
    continue_texts,
    cross_entropy,
    denoise,
    denoising_loss,
    flow_loss,
    guided_estimate,
    make_batch,
    rotary,
    rotate,
    row_seeds,
    rows_of,
    same_segment,
    teacher_features,
    texts_of,
)

V = 50  # tokens in the vocabulary
EOT = V - 1
C = 6  # channels of a latent
N = 12  # tokens in a row
E = 16  # width of the networks
E_TEACHER = 20
SIZES = dict(n_layer=2, n_head=2, n_embd=E)
SMALL = dict(SIZES, block_size=N, vocab_size=V)


# ---- What the tests are made of ------------------------------------------------------------------


@pytest.fixture(autouse=True)
def same_numbers():
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randomise(model, seed=0, scale=0.3):
    """Weights as of a trained model: nothing is zero, so every path matters."""
    luck = generator(seed)
    for name, p in model.named_parameters():
        noise = scale * torch.randn(p.shape, generator=luck)
        is_gain = ".ln_" in f".{name}" and name.endswith("weight")
        p.data = noise + 1 if is_gain else noise
    return model.eval()


def our_config(config_type, **options):
    """A small config of our recipe. Options beat the recipe."""
    names = {f.name for f in fields(config_type)}
    recipe = {k: v for k, v in OURS.items() if k in names}
    return config_type(**{**SMALL, **recipe, "channels": C, **options})


def make_vae(vae_type=TextVAE, **options):
    config = our_config(VAEConfig, teacher_embd=E_TEACHER, **options)
    return randomise(vae_type(config))


def make_dit(dit_type=TextDiT, config_type=DiTConfig, **options):
    dit = randomise(dit_type(our_config(config_type, **options)), scale=0.1)
    if dit.config.predict_tokens:
        dit.to_output.weight.data *= 30  # sure of its tokens
        dit.latent_of.normal_(generator=generator(1))
    return dit


def make_gpt(**options):
    config = TransformerConfig(**{**SMALL, "block_size": N + 1, **options})
    return randomise(GPT(config))


def example_batch(rows=4, n=N, seed=0):
    """Rows of a context, a target and a tail, each with a cut and a length of its own."""
    tokens = torch.randint(0, V - 1, (rows, n), generator=generator(seed))
    cuts = torch.arange(rows) + 2
    lengths = n - torch.arange(rows) % 3
    place = torch.arange(n)
    tokens[place >= lengths[:, None] - 1] = EOT
    segment = (place >= cuts[:, None]).long()
    weight = torch.where(place < lengths[:, None], 1.0, TAIL_WEIGHT)
    return make_batch(tokens, segment, weight)


def same_rows(batch, **changes):
    """The batch with other tokens, segment or weight."""
    parts = dict(tokens=batch.tokens, segment=batch.segment, weight=batch.weight)
    return make_batch(**{**parts, **changes})


VARIETIES = dict(
    ours=dict(),
    velocity=dict(predict_tokens=False),
    paper=dict(predict_tokens=False, adaln=False, self_condition=False),
)


@pytest.fixture
def vae():
    return make_vae()


@pytest.fixture(params=VARIETIES)
def dit(request):
    return make_dit(**VARIETIES[request.param])


@pytest.fixture(params=["ours", "velocity"])
def told_dit(request):
    """A DiT that is told its estimate of the step before."""
    return make_dit(**VARIETIES[request.param])


def change_tokens(tokens, where):
    return torch.where(where, (tokens + 7) % V, tokens)


def all_target(rows, n=N):
    return torch.full((rows, n), TARGET)


# ---- Who sees whom -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [CONTEXT, TARGET])
def test_encoder_leaks_nothing_between_context_and_target(vae, part):
    batch = example_batch()
    is_changed = batch.segment == part
    z = vae.latents(batch.tokens, batch.segment)
    z_changed = vae.latents(change_tokens(batch.tokens, is_changed), batch.segment)
    assert torch.equal(z[~is_changed], z_changed[~is_changed])
    assert not torch.allclose(z[is_changed], z_changed[is_changed])


@pytest.mark.parametrize("part", [CONTEXT, TARGET])
def test_one_masked_pass_equals_two_separate_ones(vae, part):
    batch = example_batch()
    z = vae.latents(batch.tokens, batch.segment)
    logits = vae.decode(z, batch.segment)
    for i, row in enumerate(batch.tokens):
        is_part = batch.segment[i] == part
        alone = row[is_part][None]
        one_segment = torch.zeros_like(alone)
        z_alone = vae.latents(alone, one_segment)[0]
        logits_alone = vae.decode(z[i, is_part][None], one_segment)[0]
        assert torch.allclose(z_alone, z[i, is_part], atol=1e-4)
        assert torch.allclose(logits_alone, logits[i, is_part], atol=1e-3)


def test_target_sees_all_of_the_context(dit):
    batch = example_batch()
    x = torch.randn(4, N, C, requires_grad=True)
    output = dit(x, batch.segment, torch.full((4,), 0.5), torch.zeros_like(x))
    of_targets = output[batch.segment == TARGET].sum()
    (gradient,) = torch.autograd.grad(of_targets, x)
    assert (gradient[batch.segment == CONTEXT] != 0).any(-1).all()


def test_outputs_at_places_are_those_of_the_whole_row(dit):
    batch = example_batch()
    x = torch.randn(4, N, C)
    given = (x, batch.segment, torch.full((4,), 0.5), torch.zeros_like(x))
    output = dit(*given)
    at_places = dit(*given, places=batch.targets)
    assert torch.equal(at_places, output[batch.segment == TARGET])


def test_context_is_clean_and_target_is_noised(dit):
    batch = example_batch()
    z_0, eps = torch.randn(2, 4, N, C)
    given = []
    real = dit.forward

    def forward(x, *more, places):
        given.append(x)
        return real(x, *more, places=places)

    dit.forward = forward
    denoising_loss(dit, batch, z_0, torch.full((4,), 0.7), eps)
    (x,) = given
    z_t = 0.3 * z_0 + 0.7 * eps
    assert torch.equal(x[batch.segment == CONTEXT], z_0[batch.segment == CONTEXT])
    assert torch.allclose(x[batch.segment == TARGET], z_t[batch.segment == TARGET])


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_dropped_context_is_not_seen(dit, drop):
    batch = example_batch()
    dit.config.context_drop = drop
    z_0 = torch.randn(4, N, C)
    is_context = (batch.segment == CONTEXT)[..., None]
    other = torch.where(is_context, torch.randn(4, N, C), z_0)
    loss = flow_loss(dit, batch, z_0, generator(0))
    loss_of_other = flow_loss(dit, batch, other, generator(0))
    assert torch.equal(loss, loss_of_other) == (drop == 1)


def test_contexts_are_dropped_at_all_times():
    """Whether a row has its context does not depend on its time."""
    dit = make_dit(context_drop=0.5, self_condition=False)
    seen = []

    def forward(x, segment, t, guess=None, places=None):
        seen.extend(zip((x[:, 0] == 0).all(-1).tolist(), t.tolist()))
        return torch.zeros(len(places), V)

    dit.forward = forward
    flow_loss(dit, example_batch(rows=4), torch.ones(4, N, C), generator(0))
    for seed in range(50):
        flow_loss(dit, example_batch(rows=4), torch.ones(4, N, C), generator(seed))
    times = {drop: [t for is_dropped, t in seen if is_dropped == drop] for drop in (True, False)}
    assert all(len(some) > 70 for some in times.values())
    assert abs(np.mean(times[True]) - np.mean(times[False])) < 0.1


def test_the_seed_of_a_row_is_of_its_prompt_and_its_number_alone():
    together = row_seeds([[1], [2], [1]], 0)
    assert len(set(together)) == 3
    assert row_seeds([[1], [1]], 0) == [together[0], together[2]]
    assert row_seeds([[2]], 0) == [together[1]] != row_seeds([[2]], 1)


def test_a_dropped_context_is_zero_and_its_target_is_as_ever(dit):
    batch = example_batch()
    is_context = batch.segment == CONTEXT
    z_0 = torch.randn(4, N, C)
    given = []
    real = dit.forward

    def forward(x, *more, **options):
        given.append(x)
        return real(x, *more, **options)

    dit.forward = forward
    for drop in (0.0, 1.0):
        dit.config.context_drop = drop
        flow_loss(dit, batch, z_0, generator(0))
    whole = [x for x in given if len(x) == 4]  # a first pass, for a guess, has fewer rows
    with_context, without = whole
    assert torch.equal(with_context[is_context], z_0[is_context])
    assert not without[is_context].any()
    assert torch.equal(with_context[~is_context], without[~is_context])


def padded_batch(batch, pad):
    """The rows of a batch, with padding behind them."""
    return make_batch(
        F.pad(batch.tokens, (0, pad), value=EOT),
        F.pad(batch.segment, (0, pad), value=PADDING),
        F.pad(batch.weight, (0, pad)),
    )


def test_padding_changes_no_number_of_the_vae(vae):
    batch = example_batch()
    padded = padded_batch(batch, 5)
    features = torch.randn(4, N + 5, E_TEACHER)
    report = vae(batch, features[:, :N])
    padded_report = vae(padded, features)
    for name in report:
        assert torch.allclose(report[name], padded_report[name], rtol=1e-4), name
    z = vae.latents(batch.tokens, batch.segment)
    z_padded = vae.latents(padded.tokens, padded.segment)
    assert torch.allclose(z_padded[:, :N], z, atol=1e-5)


def test_padding_changes_no_statistic_of_the_latents(vae):
    batch = example_batch()
    found = []
    for b in (batch, padded_batch(batch, 5)):
        vae.standardise([b])
        found.append(torch.cat((vae.z_mean, vae.z_std)))
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_padding_changes_no_estimate(vae, dit, scale):
    batch = example_batch()
    padded = padded_batch(batch, 5)
    z = vae.latents(padded.tokens, padded.segment)
    t = torch.tensor(0.6)
    sampling = Sampling(cfg_scale=scale)
    estimate = guided_estimate(dit, z[:, :N], t, z[:, :N], batch.segment, sampling)
    of_padded = guided_estimate(dit, z, t, z, padded.segment, sampling)
    assert torch.allclose(estimate, of_padded[:, :N], rtol=1e-4, atol=1e-4)


def test_reports_count_up_to_the_first_end_of_text_only(vae):
    batch = example_batch()
    report = vae(batch)
    mu, _, _ = vae.posterior(batch.tokens, batch.segment)
    logits = vae.decode(mu, batch.segment)
    counted = batch.counted
    ce = F.cross_entropy(logits[counted], batch.tokens[counted])
    assert report["ce"].item() == pytest.approx(ce.item(), rel=1e-4)
    is_right = logits.argmax(-1) == batch.tokens
    accuracy = is_right[counted].float().mean()
    assert report["accuracy"].item() == pytest.approx(accuracy.item(), rel=1e-4)
    assert (batch.tokens[~counted] == EOT).all()
    assert (batch.tokens == EOT)[counted].sum() == 4  # one of each row


# ---- The losses ----------------------------------------------------------------------------------


def test_vae_loss_is_ce_plus_kl_minus_cosine(vae):
    batch = example_batch()
    features = torch.randn(4, N, E_TEACHER)
    mu, logvar, _ = vae.posterior(batch.tokens, batch.segment)
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    kl = torch.distributions.kl_divergence(posterior, prior).sum(-1)
    report = vae(batch, features)
    assert report["kl"].item() == pytest.approx(kl[batch.counted].mean().item(), rel=1e-4)

    batch = same_rows(batch, weight=batch.counted.float())
    report = {k: v.item() for k, v in vae(batch, features, beta=0.25).items()}
    total = report["ce"] + 0.25 * report["kl"] - vae.config.repa * report["cos"]
    assert report["loss"] == pytest.approx(total, rel=1e-4)


def test_the_tail_has_a_small_weight_in_the_vae_loss(vae):
    batch = example_batch()
    is_tail = batch.weight == TAIL_WEIGHT
    tail = vae(same_rows(batch, weight=is_tail.float()))["loss"]
    text = vae(same_rows(batch, weight=batch.counted.float()))["loss"]
    n_tail, n_text = TAIL_WEIGHT * is_tail.sum(), batch.counted.sum()
    mean = (n_tail * tail + n_text * text) / (n_tail + n_text)
    assert vae(batch)["loss"].item() == pytest.approx(mean.item(), rel=1e-4)


def test_the_decoder_reads_a_draw_from_the_posterior(vae):
    batch = example_batch()
    mu, logvar, _ = vae.posterior(batch.tokens, batch.segment)
    real = vae.decode
    read = []

    def decode(z, segment):
        read.append(z)
        return real(z, segment)

    vae.decode = decode
    vae(batch)
    vae(batch, generator=generator(5))
    noise = torch.randn(mu.shape, generator=generator(5))
    assert torch.equal(read[0], mu), "without a generator it is the mean"
    assert torch.allclose(read[1], mu + (0.5 * logvar).exp() * noise)


@pytest.mark.parametrize("repa_latents", [True, False])
def test_repa_is_a_cosine_of_standardised_features(repa_latents):
    vae = make_vae(repa_latents=repa_latents)
    vae.teacher_mean.normal_()
    vae.teacher_std.uniform_(0.5, 2)
    mu = torch.randn(2, N, C)
    h = torch.randn(2, N, E)
    with torch.no_grad():
        projected = vae.to_teacher(mu if repa_latents else h)
        same = projected * vae.teacher_std + vae.teacher_mean
        scaled = 3 * projected * vae.teacher_std + vae.teacher_mean
    ones = torch.ones(2, N)
    assert torch.allclose(vae.alignment(mu, h, same), ones, atol=1e-5)
    assert torch.allclose(vae.alignment(mu, h, scaled), ones, atol=1e-5), "it knows no scale"


@pytest.mark.parametrize("repa_latents", [True, False])
def test_repa_shapes_the_latents_or_as_in_the_paper_the_features_behind_them(repa_latents):
    vae = make_vae(repa_latents=repa_latents)
    features = torch.randn(4, N, E_TEACHER)
    of_latents = []
    of_encoder = []
    for repa in (0, 1):  # the alignment asks for the difference
        vae.config.repa = repa
        vae.zero_grad()
        vae(example_batch(), features)["loss"].backward()
        of_latents.append(vae.to_posterior.weight.grad.clone())
        of_encoder.append(vae.encoder.ln_f.weight.grad.clone())
    assert ((of_latents[1] - of_latents[0]).abs().max() > 1e-4) == repa_latents
    assert (of_encoder[1] - of_encoder[0]).abs().max() > 1e-4


def test_the_teacher_receives_no_gradient(vae):
    teacher = make_gpt(n_embd=E_TEACHER)
    features = teacher_features(teacher, example_batch().tokens)
    assert not features.requires_grad
    features = features.detach().requires_grad_()
    vae(example_batch(), features)["loss"].backward()
    assert features.grad is None
    assert vae.wte.weight.grad.abs().sum() > 0
    assert vae.to_teacher.weight.grad.abs().sum() > 0


def test_teacher_features_are_third_to_last_and_aligned():
    teacher = make_gpt(n_layer=5)
    tokens = example_batch().tokens
    features = teacher_features(teacher, tokens)
    after_end_of_text = torch.cat((torch.full((4, 1), EOT), tokens), dim=1)
    whole = teacher.hidden_states(after_end_of_text, 3)  # of layers 3, 4, 5 the third from the end
    assert torch.equal(features, whole[:, 1:])


def test_standardised_latents_have_mean_0_and_std_1(vae):
    batches = [example_batch(64, seed=i) for i in range(4)]
    vae.standardise(batches)
    z = torch.cat([vae.latents(b.tokens, b.segment)[b.counted] for b in batches])
    assert z.mean(0).abs().max() < 1e-4
    assert (z.std(0) - 1).abs().max() < 1e-3


def test_to_tokens_takes_standardised_latents(vae):
    batch = example_batch(64)
    mu, _, _ = vae.posterior(batch.tokens, batch.segment)
    raw = vae.decode(mu, batch.segment).argmax(-1)
    vae.standardise([batch])
    z = vae.latents(batch.tokens, batch.segment)
    assert (z - mu).abs().max() > 0.1
    assert torch.equal(vae.to_tokens(z, batch.segment), raw)


@pytest.mark.parametrize(
    "variances, active",
    [([0, 0.005, 0.02, 0.3, 0.8, 4], 4), ([0.009] * 6, 0), ([0.011] * 6, 6)],
)
def test_active_channels_are_those_that_vary(vae, variances, active):
    """By the variance of the means over tokens, from 0.01 on."""
    batches = [example_batch(64, seed=i) for i in range(2)]
    mu = torch.cat([vae.posterior(b.tokens, b.segment)[0][b.counted] for b in batches])
    scale = (torch.tensor(variances) / mu.var(0)).sqrt()
    vae.to_posterior.weight.data[:C] *= scale[:, None]
    assert vae.standardise(batches) == active
    expected = [x**0.5 if x > 0.01 else 1 for x in variances]
    assert vae.z_std.tolist() == pytest.approx(expected, rel=1e-3), "a collapsed one stays small"


def test_an_untrained_dit_predicts_zero_velocity():
    dit = TextDiT(our_config(DiTConfig, predict_tokens=False))
    batch = example_batch()
    z_0, eps = torch.randn(2, 4, N, C)
    loss, _, _, _ = denoising_loss(dit, batch, z_0, torch.rand(4), eps)
    of_zero = (eps - z_0).square().mean(-1)[batch.segment == TARGET]
    assert torch.allclose(loss, of_zero)


def test_an_untrained_dit_gives_all_tokens_equal_chances():
    dit = TextDiT(our_config(DiTConfig))
    z_0, eps = torch.randn(2, 4, N, C)
    loss, _, _, _ = denoising_loss(dit, example_batch(), z_0, torch.rand(4), eps)
    assert torch.allclose(loss, torch.tensor(math.log(V)))


def test_the_gates_of_an_untrained_dit_are_shut():
    dit = TextDiT(our_config(DiTConfig))
    x = torch.randn(3, N, E)
    time_emb = dit.time_embedding(torch.full((3,), 0.5))
    for block in dit.transformer.h:
        assert torch.equal(block(x, time_emb=time_emb), x)


@pytest.mark.parametrize("variety", ["velocity", "paper"])
def test_an_exact_velocity_has_no_loss_and_its_estimate_is_the_data(variety):
    dit = make_dit(**VARIETIES[variety])
    batch = example_batch()
    is_target = batch.segment == TARGET
    z_0, eps = torch.randn(2, 4, N, C)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])

    def exact(x, segment, t, guess, places):
        return ((x - z_0) / t[:, None, None])[is_target]

    dit.forward = exact
    loss, output, z_t, t_of = denoising_loss(dit, batch, z_0, t, eps)
    assert loss.max() < 1e-8
    assert torch.allclose(dit.estimate(output, z_t, t_of), z_0[is_target], atol=1e-5)


def test_self_conditioning_tells_some_rows_what_a_first_pass_estimated(told_dit):
    dit = told_dit
    batch = example_batch()
    segment, is_target = batch.segment, batch.segment == TARGET
    z_0, eps = torch.randn(2, 4, N, C)
    t = torch.rand(4)
    real = dit.forward
    inputs = []
    guesses = []

    def forward(x, segment, t, guess=None, places=None):
        inputs.append(x)
        guesses.append(torch.zeros_like(x) if guess is None else guess.clone())
        return real(x, segment, t, guess, places=places)

    dit.forward = forward
    _, output, _, _ = denoising_loss(dit, batch, z_0, t, eps, n_guess=2)
    x = inputs[1]
    first, guess = guesses
    assert not first.any()
    assert not guess[2:].any()
    assert not guess.requires_grad

    untold = real(x, segment, t, torch.zeros_like(x))
    estimate = dit.estimate(untold, x, t[:, None, None])
    assert torch.allclose(guess[:2][is_target[:2]], estimate[:2][is_target[:2]], atol=1e-5)
    told = output[: is_target[:2].sum()]
    assert not torch.allclose(untold[:2][is_target[:2]], told, atol=1e-3)

    # At contexts an estimate means nothing, and is not read.
    elsewhere = torch.where(is_target[..., None], guess, guess + 1)
    assert torch.equal(real(x, segment, t, elsewhere, places=batch.targets), output)


def test_half_of_the_rows_are_told_a_first_estimate(told_dit):
    told = []
    real = told_dit.forward

    def forward(x, segment, t, guess=None, places=None):
        seen = torch.zeros_like(x) if guess is None else guess
        told.append(seen.abs().amax(dim=(1, 2)) > 0)
        return real(x, segment, t, guess, places=places)

    told_dit.forward = forward
    for seed in (0, 1):
        flow_loss(told_dit, example_batch(rows=5), torch.randn(5, N, C), generator(seed))
        first, second = told[-2:]
        assert first.tolist() == [False] * (2 + seed)
        assert second.tolist() == [True] * (2 + seed) + [False] * (3 - seed)


def test_without_self_conditioning_nothing_is_told(told_dit):
    """A DiT whose layer for the guess is zero is the DiT without that layer."""
    without = TextDiT(replace(told_dit.config, self_condition=False))
    state = told_dit.state_dict()
    del state["from_guess.weight"]
    without.load_state_dict(state)
    told_dit.from_guess.weight.data.zero_()
    z_0 = torch.randn(4, N, C)
    a = flow_loss(told_dit, example_batch(), z_0, generator(0))
    b = flow_loss(without, example_batch(), z_0, generator(0))
    assert torch.equal(a, b)


def test_flow_loss_learns_from_targets_alone(dit):
    """It does not depend on the weight of context positions."""
    batch = example_batch()
    z_0 = torch.randn(4, N, C)
    is_target = batch.segment == TARGET
    heavy_context = same_rows(batch, weight=torch.where(is_target, batch.weight, 100.0))
    heavy_tail = same_rows(batch, weight=torch.ones_like(batch.weight))
    loss = flow_loss(dit, batch, z_0, generator(0))
    assert torch.equal(flow_loss(dit, heavy_context, z_0, generator(0)), loss)
    assert not torch.equal(flow_loss(dit, heavy_tail, z_0, generator(0)), loss)


def test_no_step_waits_for_a_gpu(vae, dit, monkeypatch):
    """Tensors on the meta device have shapes and no values. Whatever asks for a value there raises,
    and on a GPU it waits. No loss, no backward pass and no step of the sampler does so."""

    def no_autocast(*_, **__):  # autocast does not know the device
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", no_autocast)
    teacher = make_gpt(n_embd=E_TEACHER).to("meta")
    vae, dit = vae.to("meta"), dit.to("meta")
    batch = Batch(*[x.to("meta") for x in example_batch()])
    with pytest.raises(Exception, match="meta"):
        bool(batch.weight.any())
    z_0 = vae.latents(batch.tokens, batch.segment)
    losses = [
        vae(batch, teacher_features(teacher, batch.tokens))["loss"],
        flow_loss(dit, batch, z_0, torch.Generator()),
        cross_entropy(teacher(batch.tokens), batch.tokens).mean(),
    ]
    sum(losses).backward()
    z = denoise(dit, z_0, batch.segment, Sampling(steps=3, cfg_scale=2.0))
    assert z.shape == z_0.shape


def test_every_parameter_learns_in_bf16(vae, dit):
    """Also where a first pass makes the guess without gradients, in the same autocast."""
    batch = example_batch()
    with torch.autocast("cpu", torch.bfloat16):
        z_0 = vae.latents(batch.tokens, batch.segment)
        flow_loss(dit, batch, z_0, generator(0)).backward()
    for name, p in dit.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_every_parameter_of_the_vae_learns_in_bf16(vae):
    with torch.autocast("cpu", torch.bfloat16):
        features = torch.randn(4, N, E_TEACHER)
        vae(example_batch(), features, 0.1, generator(0))["loss"].backward()
    for name, p in vae.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_residual_streams_and_estimates_stay_in_fp32_under_autocast(vae, dit):
    seen = []

    def look(block, inputs):
        seen.append(inputs[0].dtype)

    for network in (vae, dit):
        for module in network.modules():
            if isinstance(module, textldm.Block):
                module.register_forward_pre_hook(look)
    batch = example_batch()
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.latents(batch.tokens, batch.segment)
        logits = vae.decode(z, batch.segment)
        output = dit(z, batch.segment, torch.rand(4), torch.zeros_like(z))
        estimate = dit.estimate(output, z, torch.tensor(0.5))
    assert seen == [torch.float32] * 6
    for x in (z, logits, output, estimate):
        assert x.dtype == torch.float32


def test_a_posterior_learns_the_cross_entropy_of_targets():
    dit = make_dit()
    batch = example_batch()
    real = dit.forward
    logits = []

    def forward(*given, places=None):
        logits.append(real(*given))
        if places is None:
            return logits[-1]
        return logits[-1].flatten(0, 1)[places]

    dit.forward = forward
    loss = flow_loss(dit, batch, torch.randn(4, N, C), generator(0))
    weight = batch.weight * (batch.segment == TARGET)
    log_p = logits[-1].log_softmax(-1)
    nll = -log_p.gather(-1, batch.tokens[..., None])[..., 0]
    expected = (nll * weight).sum() / weight.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_low_temperature_points_to_the_likeliest_token_and_leaves_velocities(dit):
    batch = example_batch()
    x = torch.randn(4, N, C)
    t = torch.full((4,), 0.5)
    output = dit(x, batch.segment, t, torch.zeros_like(x))
    warm = dit.estimate(output, x, t[:, None, None], 1.0)
    cold = dit.estimate(output, x, t[:, None, None], 0.0)
    if dit.config.predict_tokens:
        assert not torch.allclose(warm, cold)
        assert torch.allclose(cold, dit.latent_of[output.argmax(-1)], atol=1e-4)
    else:
        assert torch.equal(warm, cold)


# ---- The sampler ---------------------------------------------------------------------------------


class Oracle:
    """Stands for a DiT. Its estimate of the clean latents is a function of z_t and t."""

    def __init__(self, clean_latents, times):
        self.clean_latents = clean_latents
        self.times = times

    def __call__(self, z, segment, t, guess, mask):
        return self.clean_latents(z, t[:, None, None])

    def estimate(self, output, z, t, temperature):
        return output


def times_of(**options):
    """The method `times` of a DiT in the paper's form."""
    return TextDiT(DiTConfig(**SMALL, channels=C, **options)).times


def test_guidance_scale_1_is_the_conditional_model_and_0_the_unconditional(dit):
    batch = example_batch()
    is_target = batch.segment == TARGET
    z, guess = torch.randn(2, 4, N, C)
    t = torch.tensor(0.4)
    without_context = torch.where(is_target[..., None], z, 0.0)

    def estimate(x, guess):
        output = dit(x, batch.segment, t.expand(4), guess)
        return dit.estimate(output, x, t)[is_target]

    conditional = estimate(z, guess)
    unconditional = estimate(without_context, 0 * guess if dit.config.predict_tokens else guess)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    extrapolated = unconditional + 3 * (conditional - unconditional)
    expected = {1: conditional, 1 + 1e-7: conditional, 0: unconditional, 3: extrapolated}
    for scale, z_0 in expected.items():
        sampling = Sampling(cfg_scale=scale)
        guided = guided_estimate(dit, z, t, guess, batch.segment, sampling)
        assert torch.allclose(guided[is_target], z_0, atol=1e-4), scale


def test_guidance_goes_away_from_the_estimate_without_context_and_of_tokens_without_guess(told_dit):
    """With a prompt, and where there is none. LDLM predicts no tokens."""
    segment = torch.full((4, N), TARGET)
    segment[2:, :2] = CONTEXT
    is_target = segment == TARGET
    z, guess = torch.randn(2, 4, N, C)
    without_context = torch.where(is_target[..., None], z, 0.0)
    t = torch.tensor(0.4)

    def guided(z, guess, scale):
        sampling = Sampling(cfg_scale=scale)
        return guided_estimate(told_dit, z, t, guess, segment, sampling)[is_target]

    guess_u = 0 * guess if told_dit.config.predict_tokens else guess
    e_c, e_u = guided(z, guess, 1), guided(without_context, guess_u, 1)
    assert not torch.allclose(e_c, guided(z, 0 * guess, 1), atol=1e-3)
    assert torch.allclose(guided(z, guess, 3), e_u + 3 * (e_c - e_u), atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_temperature_reaches_the_estimate(scale):
    dit = make_dit()
    batch = example_batch()
    z = torch.randn(4, N, C)
    t = torch.tensor(0.4)
    found = []
    for temperature in (1.0, 0.1):
        sampling = Sampling(cfg_scale=scale, temperature=temperature)
        found.append(guided_estimate(dit, z, t, 0 * z, batch.segment, sampling))
    assert not torch.allclose(*found, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_euler_integrates_a_constant_velocity_exactly(steps):
    v, eps = torch.randn(2, 2, N, C)
    times = times_of()
    grid = times(torch.linspace(1, 0, steps + 1))
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()

    def clean_latents(z, t):
        return z - t * v

    oracle = Oracle(clean_latents, times)
    z = denoise(oracle, eps, all_target(2), Sampling(steps=steps, cfg_scale=1.0))
    assert torch.allclose(z, eps - v, atol=1e-5)


def test_euler_error_halves_when_steps_double():
    """Data are N(m, s^2). Then z_t is normal, of variance q = ((1 - t) s)^2 + t^2. So
    E[eps - z_0 | z_t] is linear in z_t, and the flow takes eps to m + s eps."""
    m, s = 0.7, 0.4
    eps = torch.linspace(-2, 2, 41, dtype=torch.float64)

    def clean_latents(z, t):
        t = t.double()
        q = ((1 - t) * s) ** 2 + t**2
        velocity = -m + (t - (1 - t) * s**2) / q * (z - (1 - t) * m)
        return z - t * velocity

    paper_times = times_of(t_mean=0.0, t_std=1.5)

    def times(u):
        return paper_times(u).double()

    errors = []
    for steps in (50, 100, 200, 400):
        sampling = Sampling(steps=steps, cfg_scale=1.0)
        z = denoise(Oracle(clean_latents, times), eps[None, :, None], all_target(1, 41), sampling)
        errors.append((z[0, :, 0] - (m + s * eps)).abs().max().item())
    assert errors[0] < 0.1
    for error, error_of_double in zip(errors, errors[1:]):
        assert 1.6 < error / error_of_double < 2.4, errors


def test_sampling_grid_follows_the_training_times():
    u = torch.linspace(1, 0, 101)
    grid = times_of(t_mean=0.8, t_std=0.7)(u)[1:-1].double()
    normal = (torch.logit(grid) - 0.8) / 0.7
    assert torch.allclose(normal, torch.special.ndtri(u.double())[1:-1], atol=1e-3)


def test_training_times_are_quantiles_drawn_evenly(dit, monkeypatch):
    """One time for each row, of the distribution that the sampler follows."""
    drawn = []
    real = textldm.denoising_loss

    def denoising_loss(dit, batch, z_0, t, eps, n_guess):
        drawn.append(t)
        return real(dit, batch, z_0, t, eps, n_guess)

    monkeypatch.setattr(textldm, "denoising_loss", denoising_loss)
    batch = example_batch(rows=2000, n=3)
    with torch.no_grad():
        flow_loss(dit, batch, torch.randn(2000, 3, C), generator(0))
    (t,) = drawn
    u = torch.linspace(0, 1, 101)[5:96]
    assert torch.allclose(t.quantile(u), dit.times(u), atol=0.03)


class ExactPosterior(TextDiT):
    """Knows the true p(token | z_t) of data that are independent draws from p."""

    p = torch.tensor([0.6, 0.3, 0.1])

    def forward(self, x, segment, t, guess, mask=None, places=None):
        t = t[:, None, None, None]
        noise = (x[..., None, :] - (1 - t) * self.latent_of) / t  # (B, N, V, C)
        return self.p.log() - noise.square().sum(-1) / 2

    def times(self, u):
        return u


def test_an_exact_posterior_samples_tokens_as_often_as_they_are():
    """Data are one of three tokens at each position. The flow ends on their latents."""
    dit = ExactPosterior(our_config(DiTConfig, vocab_size=3, channels=2))
    dit.latent_of.copy_(torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -2.0]]))
    eps = torch.randn(1, 4000, 2, generator=generator(0))
    z = denoise(dit, eps, all_target(1, 4000), Sampling(steps=200, cfg_scale=1.0))
    distance, token = (z[0, :, None] - dit.latent_of).norm(dim=-1).min(-1)
    assert distance.quantile(0.99) < 0.02
    frequency = token.bincount() / 4000
    assert (frequency - dit.p).abs().max() < 0.02


def test_the_sampler_leaves_the_context_as_it_is(dit):
    batch = example_batch()
    z = torch.randn(4, N, C)
    end = denoise(dit, z, batch.segment, Sampling(steps=3, cfg_scale=2.0))
    is_context = batch.segment == CONTEXT
    assert torch.equal(end[is_context], z[is_context])
    assert not torch.allclose(end[~is_context], z[~is_context], atol=0.1)


def test_same_seed_same_text_whatever_the_neighbours(vae, dit):
    sampling = Sampling(steps=5, cfg_scale=3.0, temperature=0.7, seed=3)
    other_seed = replace(sampling, seed=4)
    prompts = [[1, 2, 3], [4], []]
    texts = continue_texts(vae, dit, prompts, 6, sampling)
    assert texts == continue_texts(vae, dit, prompts, 6, sampling)
    assert texts != continue_texts(vae, dit, prompts, 6, other_seed)
    longer_neighbour = [5, 6, 7, 8, 9, 10]
    beside_it = continue_texts(vae, dit, [longer_neighbour, [4]], 6, sampling)
    assert beside_it[1] == texts[1]


def test_the_context_of_a_sample_is_the_encoded_prompt(vae, dit, monkeypatch):
    seen = []

    def denoise(dit, z, segment, sampling, callback):
        seen.append((z, segment))
        return z

    monkeypatch.setattr(textldm, "denoise", denoise)
    continue_texts(vae, dit, [[1, 2, 3], [4]], 5)
    ((z, segment),) = seen
    alone = vae.latents(torch.tensor([[1, 2, 3]]), torch.full((1, 3), CONTEXT))
    assert torch.allclose(z[0, :3], alone[0], atol=1e-5)
    for row, kind, seed in zip(z, segment, row_seeds([[1, 2, 3], [4]], 0)):
        assert torch.equal(row[kind == TARGET], torch.randn(5, C, generator=generator(seed)))


def test_a_text_has_its_length_or_fills_the_row(vae, dit):
    def to_tokens(z, segment):  # never the end-of-text
        return torch.ones_like(segment)

    vae.to_tokens = to_tokens
    sampling = Sampling(steps=1)
    prompts = [[1, 2, 3], [4], []]
    assert [len(text) for text in continue_texts(vae, dit, prompts, 5, sampling)] == [5, 5, 5]
    whole = continue_texts(vae, dit, prompts, 0, sampling)
    assert [len(text) for text in whole] == [N - 3, N - 1, N]


def test_texts_stop_at_the_end_of_text(vae, dit):
    def to_tokens(z, segment):
        return torch.tensor([[1, 2, 3, EOT, 5, EOT], [1, 2, 3, 4, 5, 6]])

    vae.to_tokens = to_tokens
    texts = continue_texts(vae, dit, [[7], [7]], 5, Sampling(steps=2))
    assert texts == [[2, 3, EOT], [2, 3, 4, 5, 6]]


def test_prompts_come_back_from_their_rows():
    prompts = [[1, 2, 3], [], [EOT, 4]]
    tokens, segment = rows_of(prompts, 2, N, EOT)
    for prompt, row, row_segment in zip(prompts, tokens, segment):
        assert row[row_segment == CONTEXT].tolist() == prompt
        assert (row_segment == TARGET).sum() == 2
        assert (row_segment.diff() >= 0).all(), "context, target, padding"
    ends = texts_of(tokens, segment, EOT)
    assert ends == [[EOT], [EOT], [EOT]]


def test_each_step_is_told_what_the_one_before_estimated(vae, told_dit, monkeypatch):
    real = textldm.guided_estimate
    told = []
    made = []

    def guided_estimate(dit, z, t, guess, segment, sampling):
        told.append(guess)
        made.append(real(dit, z, t, guess, segment, sampling))
        return made[-1]

    monkeypatch.setattr(textldm, "guided_estimate", guided_estimate)
    continue_texts(vae, told_dit, [[1, 2], [3]], 6, Sampling(steps=4))
    assert len(told) == 4
    assert not told[0].any()
    for guess, estimate in zip(told[1:], made):
        assert guess is estimate


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_guess_reaches_the_network(told_dit, scale):
    segment = example_batch().segment
    z = torch.randn(4, N, C)
    t = torch.tensor(0.5)
    sampling = Sampling(cfg_scale=scale)
    told = guided_estimate(told_dit, z, t, z, segment, sampling)
    untold = guided_estimate(told_dit, z, t, 0 * z, segment, sampling)
    assert not torch.equal(told, untold)


def test_the_callback_sees_the_way_from_noise(vae, dit):
    times = []
    seen = []

    def callback(t, texts):
        times.append(t)
        seen.append(texts)

    texts = continue_texts(vae, dit, [[1, 2]], 6, Sampling(steps=8), callback)
    assert times == pytest.approx(dit.times(torch.linspace(1, 0, 9))[1:].tolist())
    assert times[-1] == 0, "the time that a step reaches"
    assert seen[-1] == texts, "the last step ends on its estimate"


def test_the_sampler_shows_its_estimates_and_ends_on_the_last():
    data, eps = torch.randn(2, 2, 3, C)
    shown = []

    def clean_latents(z, t):
        return data

    def callback(t, guess):
        shown.append(guess)

    oracle = Oracle(clean_latents, times_of())
    sampling = Sampling(steps=5, cfg_scale=1.0)
    end = denoise(oracle, eps, all_target(2, 3), sampling, callback)
    assert len(shown) == 5
    for guess in shown:
        assert guess is data
    assert torch.allclose(end, data, atol=1e-5)


def test_the_forward_pass_is_that_of_the_paper_or_ours_written_out(dit):
    """Equal to the bit."""
    batch = example_batch()
    z_0, eps = torch.randn(2, 4, N, C)
    t = torch.rand(4)
    _, output, _, _ = denoising_loss(dit, batch, z_0, t, eps)

    is_target = batch.segment == TARGET
    t_of = t[:, None, None]
    x = torch.where(is_target[..., None], (1 - t_of) * z_0 + t_of * eps, z_0)
    h = dit.from_latent(x) + dit.segment_emb(batch.segment)
    for block in dit.transformer.h:
        shifts_scales_gates = (0, 0, 1, 0, 0, 1)  # they change nothing
        if dit.config.adaln:
            shifts_scales_gates = block.adaln(dit.time_embedding(t)).chunk(6, dim=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = shifts_scales_gates
        y = block.ln_1(h) * (1 + scale_1) + shift_1
        q, k, v = block.attn.c_attn(y).view(4, N, 3, 2, E // 2).permute(2, 0, 3, 1, 4)
        turn = rotary(torch.arange(N), E // 2)
        q, k = rotate(q, turn), rotate(k, turn)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, N, E)
        h = h + gate_1 * block.attn.c_proj(y)
        y = block.ln_2(h) * (1 + scale_2) + shift_2
        h = h + gate_2 * block.mlp(y)
    assert torch.equal(output, dit.to_output(dit.transformer.ln_f(h)[is_target]))


def test_times_are_told_apart():
    dit = TextDiT(our_config(DiTConfig))
    dit.time_mlp = torch.nn.Identity()
    a, b = dit.time_embedding(torch.tensor([0.1, 0.12]))
    assert (a - b).abs().max() > 0.5


# ---- Blocks and the GPT --------------------------------------------------------------------------


def test_attention_is_softmax_attention():
    attention = randomise(textldm.Attention(TransformerConfig(n_head=2, n_embd=E)))
    x = torch.randn(3, N, E)
    heads = []
    for y in attention.c_attn(x).split(E, dim=-1):
        heads.append(y.view(3, N, 2, E // 2).transpose(1, 2))
    q, k, v = heads
    is_later = torch.ones(N, N).triu(1).bool()
    scores = (q @ k.mT / math.sqrt(E // 2)).masked_fill(is_later, -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(3, N, E)
    assert torch.allclose(attention(x, causal=True), attention.c_proj(y), atol=1e-4)


def test_a_mask_hides_keys():
    attention = randomise(textldm.Attention(TransformerConfig(n_head=2, n_embd=E)))
    x = torch.randn(2, N, E)
    segment = example_batch(rows=2).segment
    whole = attention(x, same_segment(segment))
    for i in range(2):
        for part in (CONTEXT, TARGET):
            alone = attention(x[i, segment[i] == part][None])[0]
            assert torch.allclose(alone, whole[i, segment[i] == part], atol=1e-4)


def test_rotary_attention_sees_distances_only():
    # The same query and key at every position.
    q, k = torch.randn(2, 1, 2, 1, 8).expand(2, 1, 2, N, 8)
    turn = rotary(torch.arange(N), 8)
    scores = rotate(q, turn) @ rotate(k, turn).mT
    for distance in range(-N + 1, N):
        same = scores.diagonal(distance, dim1=-2, dim2=-1)
        assert torch.allclose(same, same[..., :1].expand_as(same), atol=1e-4)
    assert not torch.allclose(scores[..., 0, 1], scores[..., 0, 3], atol=1e-2)


def test_weights_begin_as_gpt2s():
    """Those that write into the residual stream are smaller the deeper the network is."""
    gpt = GPT(TransformerConfig(n_layer=8, n_head=2, n_embd=64, vocab_size=V))
    for name, p in gpt.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".ln_" in f".{name}":
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_the_gpt_is_causal():
    gpt = make_gpt()
    tokens = example_batch().tokens
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % V
    logits, logits_changed = gpt(tokens), gpt(changed)
    assert torch.equal(logits[:, :6], logits_changed[:, :6])
    assert not torch.allclose(logits[:, 6:], logits_changed[:, 6:])


def test_the_gpt_knows_positions_and_all_of_the_past():
    gpt = make_gpt()
    tokens = example_batch().tokens
    swapped = tokens[:, [1, 0, *range(2, N)]]
    assert not torch.allclose(gpt(tokens)[:, -1], gpt(swapped)[:, -1], atol=1e-4)


# ---- The recipe and the file ---------------------------------------------------------------------


def defaults_of(config_type):
    return {f.name: f.default for f in fields(config_type)}


def test_defaults_are_the_papers():
    paper = {
        VAEConfig: dict(
            n_layer=9,
            n_head=12,
            n_embd=768,
            block_size=1024,
            vocab_size=50257,
            channels=64,
            beta=1e-3,
            repa=1.0,
            repa_latents=False,
        ),
        DiTConfig: dict(
            block_size=1024,
            vocab_size=50257,
            context_drop=0.1,
            t_mean=0.0,
            t_std=1.5,
            adaln=False,
            predict_tokens=False,
            self_condition=False,
        ),
        Sampling: dict(steps=50, cfg_scale=7.0, temperature=1.0),
    }
    for config_type, values in paper.items():
        defaults = defaults_of(config_type)
        for name, value in values.items():
            assert defaults[name] == value, (config_type, name)


def test_our_recipe_changes_exactly_the_fields_that_it_names():
    defaults = defaults_of(VAEConfig) | defaults_of(DiTConfig)
    of_training = {"from_decoder", "muon"}  # options of the training scripts
    assert OURS.keys() - defaults.keys() == of_training
    for name in OURS.keys() - of_training:
        assert type(OURS[name]) is type(defaults[name]), name
        assert OURS[name] != defaults[name], name


def test_the_end_of_text_is_the_last_token():
    assert our_config(DiTConfig).end_of_text == EOT
    assert TransformerConfig().end_of_text == 50256  # GPT-2's


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="n_embd=18"):
        TransformerConfig(n_embd=18, n_head=6)


SOURCE = Path(textldm.__file__).read_bytes()


def test_the_file_imports_torch_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    packages = {name.split(".")[0] for name in imported}
    assert "torch" in packages
    assert packages <= sys.stdlib_module_names | {"torch"}


ALONE = """
import sys
from pathlib import Path

import torch

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
from textldm import OURS, DiTConfig, Sampling, TextDiT, TextVAE, VAEConfig
from textldm import continue_texts, flow_loss, make_batch

torch.manual_seed(0)
luck = torch.Generator().manual_seed(0)
sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=10, channels=4)
# Each row repeats one token, and ends.
tokens = torch.arange(9).repeat(8)[:, None].repeat(1, 8)
tokens[:, -1] = 9
segment = (torch.arange(8) >= 3).long().repeat(72, 1)
batch = make_batch(tokens, segment, torch.ones(72, 8))


def train(model, loss_of):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def vae_loss():
    return vae(batch)["loss"]


def dit_loss():
    return flow_loss(dit, batch, z_0, luck)


vae = TextVAE(VAEConfig(**sizes))
train(vae, vae_loss)
vae.standardise([batch])
vae.requires_grad_(False)
z_0 = vae.latents(tokens, segment)
names = ("adaln", "predict_tokens", "self_condition", "t_mean", "t_std")
dit = TextDiT(DiTConfig(**sizes, **{name: OURS[name] for name in names}))
alone = torch.arange(10)[:, None]
dit.latent_of = vae.latents(alone, torch.ones_like(alone))[:, 0]
train(dit, dit_loss)
texts = continue_texts(vae, dit, [[5, 5, 5], [2]], 0, Sampling(steps=5))
for text, room in zip(texts, (5, 7)):
    assert len(text) == room or text[-1] == 9, texts

ours = []
for name, module in sys.modules.items():
    file = getattr(module, "__file__", None)
    if file and Path(file).parent == folder:
        ours.append(name)
print(*ours)
"""


def test_the_file_works_alone(tmp_path):
    """In a folder of its own it trains a VAE and a DiT, and samples."""
    (tmp_path / "textldm.py").write_bytes(SOURCE)
    # -I leaves this folder and PYTHONPATH out of the search for modules.
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["textldm"]

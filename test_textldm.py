"""Properties of textldm.py, on the CPU, with no network:

    python -m pytest test_textldm.py

Each test guards one property and fails when it is broken. This file needs torch, pytest and
textldm.py, and can be copied together with it.
"""

import ast
import contextlib
import inspect
import math
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import textldm
from textldm import CONTEXT, GPT, OURS, PADDING, TAIL_WEIGHT, TARGET, Attention, Batch, Block
from textldm import DiTConfig, Sampling, TextDiT, TextVAE, Transformer, TransformerConfig, VAEConfig
from textldm import continue_texts, cross_entropy, denoise, denoising_loss, flow_loss
from textldm import guided_estimate, make_batch, noisy_rows, rotary, rotate, row_seeds, rows_of
from textldm import teacher_features, texts_of, weighted_mean

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
        is_gain = "ln_" in name and name.endswith("weight")
        p.data = is_gain + scale * torch.randn(p.shape, generator=luck)
    return model.eval()


def our_config(config_type, **options):
    """A small config of our recipe. Options beat the recipe."""
    names = {f.name for f in fields(config_type)}
    recipe = {k: v for k, v in OURS.items() if k in names}
    return config_type(**{**SMALL, **recipe, "channels": C, **options})


def make_vae(vae_type=TextVAE, **options):
    return randomise(vae_type(our_config(VAEConfig, teacher_embd=E_TEACHER, **options)))


def make_dit(dit_type=TextDiT, config_type=DiTConfig, **options):
    dit = randomise(dit_type(our_config(config_type, **options)), scale=0.1)
    if dit.config.predict_tokens:
        dit.to_output.weight.data *= 30  # sure of its tokens
        dit.latent_of.normal_(generator=generator(1))
    return dit


def make_gpt(**options):
    return randomise(GPT(TransformerConfig(**{**SMALL, "block_size": N + 1, **options})))


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


def padded_rows(batch):
    """The rows of a batch, with padding behind them."""
    tokens = F.pad(batch.tokens, (0, 5), value=EOT)
    segment = F.pad(batch.segment, (0, 5), value=PADDING)
    return make_batch(tokens, segment, F.pad(batch.weight, (0, 5)))


def change_tokens(tokens, where):
    return torch.where(where, (tokens + 7) % V, tokens)


def all_target(rows, n=N):
    return torch.full((rows, n), TARGET)


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


@pytest.fixture
def watch(monkeypatch):
    def watch(owner, name, answer=None):
        """From now on lists the calls of a function: their arguments by name, and `result`. An
        `answer` stands for the function, and gets these arguments."""
        real = getattr(owner, name)
        signature = inspect.signature(real)
        calls = []

        def watched(*values, **options):
            given = signature.bind(*values, **options)
            given.apply_defaults()
            call = SimpleNamespace(**given.arguments)
            call.result = answer(call) if answer else real(*values, **options)
            calls.append(call)
            return call.result

        monkeypatch.setattr(owner, name, watched)
        return calls

    return watch


# ---- Blocks and the GPT --------------------------------------------------------------------------


def test_positions_enter_attention_by_their_difference():
    ones = rotate(torch.ones(N, 4), rotary(torch.arange(N), 4))
    distance = torch.arange(N) - torch.arange(N)[:, None]
    expected = 2 * distance.cos() + 2 * (0.01 * distance).cos()
    assert torch.allclose(ones @ ones.T, expected, atol=1e-5)

    attention = randomise(Attention(TransformerConfig(n_head=2, n_embd=E)))
    x = torch.randn(3, N, E)
    y, shifted = (attention(x, turn=rotary(torch.arange(N) + a, E // 2)) for a in (0, 5))
    assert torch.allclose(y, shifted, atol=1e-4)
    assert not torch.allclose(y, attention(x), atol=1e-2)


@pytest.mark.parametrize("adaln, expected", [(False, [-109, 113]), (True, [-1259, 6123])])
def test_a_block_by_hand(watch, adaln, expected):
    block = Block(TransformerConfig(n_head=1, n_embd=2), adaln)
    watch(block.attn, "forward", lambda call: 10 * call.x)
    watch(block.mlp, "forward", lambda call: 100 * call.x)
    if adaln:
        block.adaln.weight.data.zero_()
        shifts_scales_gates = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        block.adaln.bias.data = shifts_scales_gates.repeat_interleave(2)
    x = torch.tensor([[[1.0, 3.0]]])  # its norm is [-1, 1], with adaln 3 [-1, 1] + 1
    y = block(x, time_emb=torch.ones(1, 1, 2))
    assert y[0, 0].tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("network_type, expected", [(Transformer, 0.841345), (GPT, 0.841192)])
def test_an_mlp_has_a_gelu_and_gpt2s_is_of_tanh(network_type, expected):
    mlp = network_type(TransformerConfig(**SMALL)).h[0].mlp
    for p in mlp.parameters():
        p.data.zero_()
    mlp.c_fc.bias.data += 1
    mlp.c_proj.weight.data += 1 / (4 * E)
    assert mlp(torch.zeros(E))[0].item() == pytest.approx(expected, abs=1e-5)


def test_a_transformer_knows_the_order_and_ends_in_a_norm():
    transformer = Transformer(TransformerConfig(**SMALL))
    x = torch.randn(3, N, E)
    y = transformer(x)
    assert y.mean(-1).abs().max() < 1e-3
    assert (y.var(-1, correction=0) - 1).abs().max() < 1e-2
    assert not torch.allclose(transformer(x.flip(1)).flip(1), y, atol=1e-3)


@pytest.mark.parametrize(
    "network_type, config_type, options",
    [
        (GPT, TransformerConfig, {}),
        (TextVAE, VAEConfig, dict(channels=32, teacher_embd=32)),
        (TextDiT, DiTConfig, dict(channels=32, adaln=True, self_condition=True)),
    ],
)
def test_weights_begin_as_gpt2s(network_type, config_type, options):
    config = config_type(n_layer=8, n_head=2, n_embd=64, vocab_size=V, **options)
    for name, p in network_type(config).named_parameters():
        if name.endswith("bias") or ".adaln." in name or name == "to_output.weight":
            assert not p.any(), name
        elif p.dim() >= 2:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.2), name


def test_a_gpt_knows_its_past_in_order_and_not_its_future():
    gpt = make_gpt()
    tokens = example_batch().tokens
    logits = gpt(tokens)
    for i in range(N):
        changed = gpt(change_tokens(tokens, torch.arange(N) == i))
        assert torch.equal(changed[:, :i], logits[:, :i])
        assert not torch.isclose(changed[:, i:], logits[:, i:]).all(-1).any()
    swapped = tokens[:, [1, 0, *range(2, N)]]
    assert not torch.allclose(gpt(swapped)[:, -1], logits[:, -1], atol=1e-4)
    h = gpt.ln_f(gpt.hidden_states(tokens, 2))
    assert torch.allclose(logits, h @ gpt.wte.weight.T, atol=1e-4)


@pytest.mark.parametrize("n_layer, expected", [(5, 3), (3, 1), (2, 1)])
def test_features_are_of_the_third_to_last_layer_after_an_end_of_text(watch, n_layer, expected):
    teacher = make_gpt(n_layer=n_layer)
    tokens = example_batch().tokens
    read = watch(teacher.wte, "forward")
    calls = [watch(block, "forward") for block in teacher.h]
    features = teacher_features(teacher, tokens)
    assert torch.equal(read[0].input, F.pad(tokens, (1, 0), value=EOT))
    states = [call.result for (call,) in calls[:expected]]
    assert not any(calls[expected:])
    assert torch.equal(features, states[-1][:, 1:])
    assert not features.requires_grad


# ---- Who sees whom -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 5, N - 1])
def test_a_vae_reads_all_of_a_segment_and_nothing_of_the_other(vae, place):
    batch = example_batch()
    changed = change_tokens(batch.tokens, torch.arange(N) == place)
    z, z_changed = (vae.latents(tokens, batch.segment) for tokens in (batch.tokens, changed))
    logits, logits_changed = (vae.decode(x, batch.segment) for x in (z, z_changed))
    is_seen = batch.segment == batch.segment[:, place, None]
    for before, after in ((z, z_changed), (logits, logits_changed)):
        assert torch.equal(before[~is_seen], after[~is_seen])
        assert not torch.isclose(before, after)[is_seen].all(-1).any()


@pytest.mark.parametrize("part", [CONTEXT, TARGET])
def test_one_masked_pass_equals_two_separate_ones(vae, part):
    batch = example_batch()
    z = vae.latents(batch.tokens, batch.segment)
    logits = vae.decode(z, batch.segment)
    for i, is_part in enumerate(batch.segment == part):
        alone = batch.tokens[i, is_part][None]
        one_segment = torch.zeros_like(alone)
        z_alone = vae.latents(alone, one_segment)[0]
        logits_alone = vae.decode(z[i, is_part][None], one_segment)[0]
        assert torch.allclose(z_alone, z[i, is_part], atol=1e-4)
        assert torch.allclose(logits_alone, logits[i, is_part], atol=1e-3)


def test_a_dit_knows_the_whole_row_and_by_its_options_the_time_and_a_guess(dit):
    segment = example_batch().segment
    x, guess = torch.randn(2, 4, N, C)
    given = dict(x=x, segment=segment, t=torch.full((4,), 0.5), guess=guess)
    output = dit(**given)

    def is_told(**changes):
        return not torch.allclose(dit(**{**given, **changes}), output, atol=1e-4)

    for place in (0, N - 1):
        other = dit(**{**given, "x": x + (torch.arange(N) == place)[:, None]})
        assert not torch.isclose(other, output).all(-1).any()
    assert is_told(segment=all_target(4))
    assert is_told(t=torch.full((4,), 0.6)) == dit.config.adaln
    assert is_told(guess=None) == dit.config.self_condition
    assert torch.equal(dit(**{**given, "guess": None}), dit(**{**given, "guess": 0 * guess}))
    is_target = (segment == TARGET)[..., None]
    assert not is_told(guess=torch.where(is_target, guess, 5.0))


def test_padding_changes_no_number_of_the_vae(vae):
    batch = example_batch()
    padded = padded_rows(batch)
    features = torch.randn(4, N + 5, E_TEACHER)
    report, padded_report = vae(batch, features[:, :N]), vae(padded, features)
    for name in report:
        assert torch.allclose(report[name], padded_report[name], rtol=1e-4), name
    found = []
    for b in (batch, padded):
        vae.standardise([b])
        found.append(vae.latents(b.tokens, b.segment)[:, :N])
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_padding_changes_no_estimate(dit, scale):
    segment = padded_rows(example_batch()).segment
    z, guess = torch.randn(2, 4, N + 5, C)
    t = torch.tensor(0.6)
    found = []
    for n in (N, N + 5):
        given = dit, z[:, :n], t, guess[:, :n], segment[:, :n], Sampling(cfg_scale=scale)
        found.append(guided_estimate(*given)[:, :N])
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


# ---- Stage 1 -------------------------------------------------------------------------------------


def test_a_batch_counts_no_tail_and_lists_its_targets():
    segment = torch.tensor([[CONTEXT, TARGET, TARGET], [CONTEXT, CONTEXT, TARGET]])
    weight = torch.tensor([[1, 1, 1], [1, 1, TAIL_WEIGHT]])
    batch = make_batch(torch.zeros(2, 3), segment, weight)
    assert batch.targets.tolist() == [1, 2, 5]
    assert batch.counted.tolist() == [[True, True, True], [True, True, False]]
    assert weighted_mean(torch.ones(2), torch.zeros(2)) == 0


def test_the_loss_of_a_vae_by_hand(watch):
    vae = make_vae(vocab_size=2, channels=2, repa=2.0)
    weight = torch.tensor([[1, 1, 0.1]])
    batch = make_batch(torch.tensor([[0, 0, 1]]), all_target(1, 3), weight)
    mu = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]]])
    variance = torch.tensor([[[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]])
    p = torch.tensor([[[0.8, 0.2], [0.25, 0.75], [0.9, 0.1]]])
    cos = torch.tensor([[0.5, -0.1, 1.0]])
    watch(vae, "posterior", lambda call: (mu, variance.log(), None))
    watch(vae, "decode", lambda call: p.log())
    watch(vae, "alignment", lambda call: cos)

    ce = [-math.log(0.8), -math.log(0.25), -math.log(0.1)]
    kl = [(1 + 4) / 2, (9 + 2 - 1 - math.log(2)) / 2, 0]
    losses = [ce[i] + 0.25 * kl[i] - 2 * cos[0, i].item() for i in range(3)]
    loss = (losses[0] + losses[1] + 0.1 * losses[2]) / 2.1
    expected = [(ce[0] + ce[1]) / 2, (kl[0] + kl[1]) / 2, 0.2, 0.5, loss]
    report = vae(batch, features=cos, beta=0.25)
    assert list(report) == ["ce", "kl", "cos", "accuracy", "loss"]
    assert [x.item() for x in report.values()] == pytest.approx(expected, rel=1e-4)
    assert vae(batch)["cos"] == 0, "without features nothing is aligned"


def test_the_decoder_reads_a_draw_from_the_posterior_or_its_mean(vae, watch):
    mu = torch.randn(4, N, C)
    logvar = torch.full((4, N, C), math.log(9))
    watch(vae, "posterior", lambda call: (mu, logvar, None))
    read = watch(vae, "decode")
    vae(example_batch())
    vae(example_batch(), generator=generator(5))
    noise = torch.randn(mu.shape, generator=generator(5))
    assert torch.equal(read[0].z, mu)
    assert torch.allclose(read[1].z, mu + 3 * noise)


@pytest.mark.parametrize("bias, expected", [(1e3, 10), (-1e3, -20)])
def test_a_variance_has_bounds_and_a_mean_has_none(vae, bias, expected):
    vae.to_posterior.bias.data.fill_(bias)
    mu, logvar, _ = vae.posterior(example_batch().tokens, all_target(4))
    assert (logvar == expected).all()
    assert (mu / bias > 0.9).all()


@pytest.mark.parametrize("repa_latents", [True, False])
def test_repa_is_the_cosine_of_latents_or_features_to_standardised_ones(repa_latents):
    vae = make_vae(repa_latents=repa_latents)
    vae.teacher_mean.normal_()
    vae.teacher_std.uniform_(0.5, 2)
    vae.to_teacher.weight.data *= 1e-9
    vae.to_teacher.bias.data = torch.tensor([3.0, 4.0] + 18 * [0])
    standardised = torch.tensor([8.0, 6.0] + 18 * [0])  # cosine (24 + 24) / (5 * 10)
    features = (standardised * vae.teacher_std + vae.teacher_mean).requires_grad_()
    mu, h = torch.randn(C).requires_grad_(), torch.randn(E).requires_grad_()
    cos = vae.alignment(mu, h, features)
    assert cos.item() == pytest.approx(0.96)
    cos.backward()
    assert [mu.grad is not None, h.grad is not None] == [repa_latents, not repa_latents]
    assert features.grad is None


def test_standardised_latents_by_hand(vae, watch):
    mean = torch.tensor([5.0, 0.0, -1.0, 2.0, 3.0, 0.0])
    std = torch.tensor([2.0, 1.0, 0.11, 0.09, 0.01, 0.0])
    active_std = torch.tensor([2.0, 1.0, 0.11, 1, 1, 1])  # variances of the others are below 0.01
    table = mean + std * torch.tensor([-1, 0, 1, 99])[:, None]  # token 3 is the tail's
    watch(vae, "posterior", lambda call: (table[call.tokens], None, None))
    read = watch(vae, "decode", lambda call: torch.eye(C))
    text = make_batch(torch.tensor([[0, 1]]), all_target(1, 2), torch.ones(1, 2))
    end = same_rows(text, tokens=torch.tensor([[2, 3]]), weight=torch.tensor([[1, TAIL_WEIGHT]]))
    assert vae.standardise([text, end]) == 3
    z = vae.latents(torch.tensor([0, 1, 2]), None)
    assert torch.allclose(z[2], std / active_std, atol=1e-5)
    assert torch.allclose(z.mean(0), torch.zeros(C), atol=1e-5)
    assert vae.to_tokens(z, None).tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.allclose(read[0].z, table[:3], atol=1e-5), "the decoder reads raw latents"


# ---- Stage 2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variety", VARIETIES)
def test_an_untrained_dit_says_zero_and_its_gates_are_shut(variety):
    dit = TextDiT(our_config(DiTConfig, **VARIETIES[variety]))
    x = torch.randn(3, N, C)
    assert not dit(x, all_target(3), torch.rand(3), x).any(), "all tokens alike, or no velocity"
    h = torch.randn(3, N, E)
    y = dit.transformer.h[0](h, time_emb=torch.randn(3, 1, E))
    assert torch.equal(y, h) == dit.config.adaln


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_a_velocity_by_hand(temperature):
    dit = make_dit(predict_tokens=False)
    v, z_0, eps, z_t = torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]], [[2.0, 1.0]], [[3.0, 4.0]]])
    assert dit.loss(v, None, z_0, eps).tolist() == [(1 + 4) / 2]
    assert dit.estimate(v, z_t, torch.tensor(0.5), temperature).tolist() == [[2.5, 3.0]]


@pytest.mark.parametrize(
    "temperature, expected", [(1.0, [0.8, 0.4]), (0.5, [0.64 / 0.68, 0.08 / 0.68]), (0.0, [1, 0])]
)
def test_a_token_by_hand(temperature, expected):
    dit = make_dit(vocab_size=2, channels=2)
    dit.latent_of.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    logits = torch.tensor([[0.8, 0.2]]).log() + 7
    assert dit.loss(logits, torch.tensor([1]), None, None).item() == pytest.approx(math.log(5))
    estimate = dit.estimate(logits, None, None, temperature)
    assert estimate[0].tolist() == pytest.approx(expected)


def test_times_by_hand(watch):
    dit = make_dit(t_mean=0.8, t_std=0.7, n_embd=4)
    u = torch.tensor([0, 0.158655, 0.5, 0.841345, 1])  # of a normal -inf, -1, 0, 1, inf
    expected = torch.tensor([-math.inf, 0.1, 0.8, 1.5, math.inf]).sigmoid()
    assert torch.allclose(dit.times(u), expected, atol=1e-5)
    watch(dit.time_mlp, "forward", lambda call: call.input)
    told = dit.time_embedding(torch.tensor([0.1, 0.002]))[1, 0]
    expected = [math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]
    assert told.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_loss_noises_targets_alone_and_tells_first_rows_an_estimate(dit, watch):
    batch = example_batch()
    is_target = batch.segment == TARGET
    z_0, eps = torch.randn(2, 4, N, C)
    t = torch.tensor([0.1, 0.5, 0.7, 1.0])
    calls = watch(dit, "forward")
    loss, output, z_t, t_of = denoising_loss(dit, batch, z_0, t, eps, n_guess=2)
    call = calls[-1]
    noisy = torch.stack([(1 - a) * z + a * e for a, z, e in zip(t, z_0, eps)])
    assert torch.equal(call.x[~is_target], z_0[~is_target])
    assert torch.allclose(call.x[is_target], noisy[is_target])
    assert torch.allclose(z_t, noisy[is_target])
    assert t_of[:, 0].tolist() == t.repeat_interleave(is_target.sum(1)).tolist()

    whole_row = dit(call.x, batch.segment, t, call.guess)
    assert torch.allclose(output, whole_row[is_target], atol=1e-5)
    expected = cross_entropy(whole_row, batch.tokens)
    if not dit.config.predict_tokens:
        expected = (whole_row - (eps - z_0)).square().mean(-1)
    assert torch.allclose(loss, expected[is_target], atol=1e-5)

    estimate = dit.estimate(dit(call.x, batch.segment, t), call.x, t[:, None, None])
    is_told = is_target & (torch.arange(4) < 2)[:, None] & dit.config.self_condition
    assert torch.allclose(call.guess[is_told], estimate[is_told], atol=1e-5)
    assert not call.guess[is_target & ~is_told].any()
    assert not call.guess.requires_grad


def test_flow_loss_draws_noise_and_times_and_drops_contexts_at_all_times(watch):
    dit = make_dit(context_drop=0.25)
    batch = example_batch(4001, n=3)
    is_target = batch.segment == TARGET
    losses = torch.rand(is_target.sum())
    calls = watch(textldm, "denoising_loss", lambda call: (losses, None, None, None))
    loss = flow_loss(dit, batch, torch.ones(4001, 3, C), generator(0))
    weight = batch.weight[is_target]
    assert loss.item() == pytest.approx(((losses * weight).sum() / weight.sum()).item())

    (call,) = calls
    u = torch.linspace(0.05, 0.95, 19)
    assert torch.allclose(call.t.quantile(u), dit.times(u), atol=0.03)
    is_hidden = (call.z_0 == 0).all(-1)
    is_dropped = is_hidden[:, 0]
    assert is_dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert call.t[is_dropped].mean().item() == pytest.approx(call.t.mean().item(), abs=0.03)
    assert torch.equal(is_hidden, is_dropped[:, None] & ~is_target)
    assert (call.z_0[~is_hidden] == 1).all()
    assert call.eps.mean().item() == pytest.approx(0, abs=0.02)
    assert call.eps.std().item() == pytest.approx(1, abs=0.02)
    assert call.n_guess == 2001, "half of the rows"


# ---- Devices and precision -----------------------------------------------------------------------


def test_no_step_waits_for_a_gpu(vae, dit, monkeypatch):
    """Tensors on the meta device have no values. Whatever asks for one raises there, and on a GPU
    it waits."""
    # Autocast does not know the device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    teacher = make_gpt(n_embd=E_TEACHER).to("meta")
    vae, dit = vae.to("meta"), dit.to("meta")
    batch = Batch(*[x.to("meta") for x in example_batch()])
    with pytest.raises(Exception, match="meta"):
        bool(batch.weight.any())
    z_0 = vae.latents(batch.tokens, batch.segment)
    losses = [
        vae(batch, teacher_features(teacher, batch.tokens))["loss"],
        flow_loss(dit, batch, z_0, None),
        cross_entropy(teacher(batch.tokens), batch.tokens).mean(),
    ]
    sum(losses).backward()
    z = denoise(dit, z_0, batch.segment, Sampling(steps=3, cfg_scale=2.0))
    assert z.shape == z_0.shape


def test_every_parameter_learns_in_bf16_and_residual_streams_stay_in_fp32(vae, dit, watch):
    blocks = [x for x in [*vae.modules(), *dit.modules()] if isinstance(x, Block)]
    calls = [watch(block, "forward") for block in blocks]
    batch = example_batch()
    with torch.autocast("cpu", torch.bfloat16):
        features = torch.randn(4, N, E_TEACHER)
        vae(batch, features, 0.1, generator(0))["loss"].backward()
        z = vae.latents(batch.tokens, batch.segment).detach()
        flow_loss(dit, batch, z, generator(0)).backward()
        output = dit(z, batch.segment, torch.rand(4), z)
        estimate = dit.estimate(output, z, torch.tensor(0.5))
        logits = vae.decode(z, batch.segment)
    for name, p in [*vae.named_parameters(), *dit.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.any(), name
    streams = [call.x for of_block in calls for call in of_block]
    for x in (z, output, estimate, logits, *streams):
        assert x.dtype == torch.float32


# ---- The sampler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, 1, 3])
def test_guidance_goes_from_the_estimate_without_context_to_the_one_with_it(dit, scale):
    segment = example_batch().segment
    segment[0] = TARGET  # no prompt
    is_target = segment == TARGET
    z, guess = torch.randn(2, 4, N, C)
    t = torch.tensor(0.6)

    def estimate(z, guess):
        output = dit(z, segment, t.expand(4), guess)
        return dit.estimate(output, z, t, 0.5)[is_target]

    e_c = estimate(z, guess)
    without_context = torch.where(is_target[..., None], z, 0.0)
    e_u = estimate(without_context, None if dit.config.predict_tokens else guess)
    assert not torch.allclose(e_c, e_u, atol=1e-3)
    sampling = Sampling(cfg_scale=scale, temperature=0.5)
    guided = guided_estimate(dit, z, t, guess, segment, sampling)
    assert torch.allclose(guided[is_target], e_u + scale * (e_c - e_u), atol=1e-4)


def test_two_steps_of_euler_by_hand(watch):
    dit = make_dit(predict_tokens=False, t_mean=-math.log(3))  # times 1, 1/4, 0
    halve = watch(dit, "forward", lambda call: call.x / (2 * call.t[:, None, None]))
    z = torch.tensor([7.0, 8.0])[None, :, None].expand(1, 2, C)
    segment = torch.tensor([[CONTEXT, TARGET]])
    shown = []
    sampling = Sampling(steps=2, cfg_scale=1.0)
    end = denoise(dit, z, segment, sampling, lambda *step: shown.extend(step))
    assert [call.t.item() for call in halve] == pytest.approx([1, 0.25])
    assert [call.guess[0, 1, 0].item() for call in halve] == pytest.approx([0, 4])
    # 8 is halved to 4. 3/4 of this and 1/4 of 8 are 5, which is halved to 2.5.
    x = torch.cat([*[call.x for call in halve], end])[..., 0]
    assert torch.allclose(x, torch.tensor([[7, 8], [7, 5], [7, 2.5]]))
    assert [x.flatten()[-1].item() for x in shown] == pytest.approx([0.25, 4, 0, 2.5])


def test_rows_are_a_prompt_and_room_and_padding():
    c, t, p = CONTEXT, TARGET, PADDING
    prompts = [[1, 2], [], [EOT]]
    tokens, segment = rows_of(prompts, 2, N, EOT)
    assert tokens.tolist() == [[1, 2, EOT, EOT], 4 * [EOT], 4 * [EOT]]
    assert segment.tolist() == [[c, c, t, t], [t, t, p, p], [c, t, t, p]]
    tokens, segment = rows_of(prompts, 0, 3, EOT)
    assert tokens.tolist() == [[1, 2, EOT], 3 * [EOT], 3 * [EOT]]
    assert segment.tolist() == [[c, c, t], [t, t, t], [c, t, t]]


def test_a_text_is_its_target_to_the_first_end_of_text():
    c, t, p = CONTEXT, TARGET, PADDING
    tokens = torch.tensor([[1, 2, EOT, 3, EOT], [EOT, 2, 3, 4, 5]])
    segment = torch.tensor([[c, t, t, t, t], [c, t, t, t, p]])
    assert texts_of(tokens, segment, EOT) == [[2, EOT], [2, 3, 4]]


def test_the_seed_of_a_row_is_of_its_prompt_and_its_number_alone():
    together = row_seeds([[1], [2], [1]], 0)
    assert len(set(together)) == 3
    assert row_seeds([[1], [1]], 0) == [together[0], together[2]]
    assert row_seeds([[2]], 0) == [together[1]] != row_seeds([[2]], 1)
    assert row_seeds([[1], [1]], [5, 5]) == [5, 5]


def test_a_sample_starts_from_the_encoded_prompt_and_noise_of_its_seed(vae, dit):
    vae.standardise([example_batch()])
    prompts = [[1, 2, 3], [4], []]
    z, segment = noisy_rows(vae, dit, prompts, 5, Sampling(seed=8))
    for prompt, row, kind, seed in zip(prompts, z, segment, row_seeds(prompts, 8)):
        assert torch.equal(row[kind == TARGET], torch.randn(5, C, generator=generator(seed)))
        alone = torch.tensor([prompt], dtype=torch.long)
        z_alone = vae.latents(alone, torch.zeros_like(alone))[0]
        assert torch.allclose(row[kind == CONTEXT], z_alone, atol=1e-5)


def test_same_seed_same_text_whatever_the_neighbours(vae, dit):
    sampling = Sampling(steps=5, cfg_scale=3.0, temperature=0.7, seed=3)
    prompts = [[1, 2, 3], [4], []]
    texts = continue_texts(vae, dit, prompts, 6, sampling)
    assert texts == continue_texts(vae, dit, prompts, 6, sampling)
    assert texts != continue_texts(vae, dit, prompts, 6, replace(sampling, seed=4))
    beside_it = continue_texts(vae, dit, [[5, 6, 7, 8, 9, 10], [4]], 6, sampling)
    assert beside_it[1] == texts[1]


def test_the_callback_sees_the_texts_of_all_steps(vae, dit):
    times = []
    seen = []

    def callback(t, texts):
        times.append(t)
        seen.append(texts)

    texts = continue_texts(vae, dit, [[1, 2]], 6, Sampling(steps=8), callback)
    assert times == pytest.approx(dit.times(torch.linspace(1, 0, 9))[1:].tolist())
    assert seen[0] != seen[-1] == texts


# ---- The recipe and the file ---------------------------------------------------------------------


def defaults_of(config_type):
    return {f.name: f.default for f in fields(config_type)}


def test_defaults_are_the_papers():
    vae, dit = defaults_of(VAEConfig), defaults_of(DiTConfig)
    for config in (vae, dit):
        assert [config["block_size"], config["vocab_size"]] == [1024, 50257]
    assert [vae["n_layer"], vae["n_head"], vae["n_embd"], vae["channels"]] == [9, 12, 768, 64]
    assert [vae["beta"], vae["repa"], vae["repa_latents"]] == [1e-3, 1.0, False]
    assert [dit["context_drop"], dit["t_mean"], dit["t_std"]] == [0.1, 0.0, 1.5]
    assert not any(dit[name] for name in ("adaln", "predict_tokens", "self_condition"))
    assert Sampling() == Sampling(steps=50, cfg_scale=7.0, temperature=1.0)


def test_our_recipe_changes_exactly_the_fields_that_it_names():
    defaults = defaults_of(VAEConfig) | defaults_of(DiTConfig)
    of_training = {"from_decoder", "muon"}  # options of the training scripts
    assert OURS.keys() - defaults.keys() == of_training
    for name in OURS.keys() - of_training:
        assert type(OURS[name]) is type(defaults[name]), name
        assert OURS[name] != defaults[name], name


def test_the_end_of_text_is_the_last_token():
    assert TransformerConfig().end_of_text == 50256  # GPT-2's


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="n_embd=18"):
        TransformerConfig(n_embd=18, n_head=6)


def test_the_file_imports_torch_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(Path(textldm.__file__).read_bytes())):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert "torch" in imported
    assert imported <= sys.stdlib_module_names | {"torch"}


def test_the_file_works_alone_with_its_tests(tmp_path):
    for file in (textldm.__file__, __file__):
        shutil.copy(file, tmp_path)
    # -I leaves this folder and PYTHONPATH out of the search for modules.
    command = [sys.executable, "-I", "-m", "pytest", "-q", "-k", "callback or learns"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

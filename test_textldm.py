"""Properties of textldm.py, on the CPU, with no network:

    python -m pytest test_textldm.py

This file needs torch, pytest and textldm.py, and can be copied together with it.
"""

import ast
import contextlib
import inspect
import math
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import textldm
from textldm import CONTEXT, GPT, OURS, PADDING, TAIL_WEIGHT, TARGET, Attention, Batch, Block
from textldm import DiTConfig, Sampling, TextDiT, TextVAE, Transformer, TransformerConfig, VAEConfig
from textldm import continue_texts, cross_entropy, denoise, denoising_loss, flow_loss
from textldm import guided_estimate, make_batch, noisy_rows, rotary, rotate, row_generators
from textldm import row_seeds, rows_of, teacher_features, texts_of, weighted_mean

V = 50  # tokens in the vocabulary
EOT = V - 1
C = 6  # channels of a latent
N = 12  # tokens in a row
E = 16  # width of the networks
E_TEACHER = 20
SIZES = dict(n_layer=2, n_head=2, n_embd=E)
SMALL = dict(SIZES, block_size=N, vocab_size=V)


@pytest.fixture(autouse=True)
def same_numbers():
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
    config = our_config(VAEConfig, **{"teacher_embd": E_TEACHER, **options})
    return randomise(vae_type(config))


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
        """Lists the calls of a function from now on. An `answer` to them stands for it."""
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


@pytest.mark.parametrize("adaln, expected", [(False, [-109, 113]), (True, [-1259, 6123])])
def test_a_block_by_hand(watch, adaln, expected):
    block = Block(TransformerConfig(n_head=1, n_embd=2), adaln)
    watch(block.attn, "forward", lambda call: 10 * call.x)
    watch(block.mlp, "forward", lambda call: 100 * call.x)
    if adaln:
        block.adaln.weight.data.zero_()
        block.adaln.bias.data = torch.arange(1.0, 7.0).repeat_interleave(2)
    x = torch.tensor([[[1.0, 3.0]]])  # its norm is [-1, 1], with adaln 3 [-1, 1] + 1
    y = block(x, time_emb=torch.ones(1, 1, 2))
    assert y[0, 0].tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("network_type, expected", [(Transformer, 0.841345), (GPT, 0.841192)])
def test_an_mlp_has_a_gelu_and_gpt2s_is_of_tanh(network_type, expected):
    mlp = network_type(TransformerConfig(**SMALL)).h[0].mlp
    mlp.c_fc.bias.data.fill_(1)
    mlp.c_proj.weight.data.fill_(1 / (4 * E))
    mlp.c_proj.bias.data.zero_()
    assert mlp(torch.zeros(E))[0].item() == pytest.approx(expected, abs=1e-5)


def test_a_transformer_knows_the_order_and_ends_in_a_norm():
    transformer = Transformer(TransformerConfig(**SMALL))
    x = torch.randn(3, N, E)
    y = transformer(x)
    assert torch.allclose(y, F.layer_norm(y, (E,)), atol=1e-3)
    assert not torch.allclose(transformer(x.flip(1)).flip(1), y, atol=1e-3)


def test_weights_begin_as_gpt2s():
    sizes = dict(n_layer=8, n_head=2, n_embd=64, vocab_size=V)
    gpt = GPT(TransformerConfig(**sizes))
    vae = TextVAE(VAEConfig(**sizes, channels=32, teacher_embd=32))
    dit = TextDiT(DiTConfig(**sizes, channels=32, adaln=True, self_condition=True))
    for name, p in torch.nn.ModuleList([gpt, vae, dit]).named_parameters():
        if name.endswith(("bias", "to_output.weight")) or ".adaln." in name:
            assert not p.any(), name
        elif p.dim() >= 2:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.2), name


def test_a_gpt_knows_its_past_and_positions_and_not_its_future():
    gpt = make_gpt()
    tokens = example_batch().tokens
    logits = gpt(tokens)
    for i in range(N):
        changed = gpt(change_tokens(tokens, torch.arange(N) == i))
        assert torch.equal(changed[:, :i], logits[:, :i])
        assert not torch.isclose(changed[:, i:], logits[:, i:]).all(-1).any()
    of_equal_tokens = gpt(torch.zeros_like(tokens))
    assert not torch.isclose(of_equal_tokens[:, 1:], of_equal_tokens[:, :-1]).all(-1).any()
    h = gpt.ln_f(gpt.hidden_states(tokens, 2))
    assert torch.allclose(logits, h @ gpt.wte.weight.T, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-5), (True, 0.01)])
def test_a_cross_entropy_and_its_gradients_are_autograds(bias, bf16, tolerance):
    layer = randomise(torch.nn.Linear(E, V, bias))
    shape = 3, textldm.chunk_of(torch.empty(0)) - 1  # three chunks, and the last is not full
    h = torch.randn(*shape, E, requires_grad=True)
    tokens = torch.randint(0, V, shape)
    weight = torch.rand(shape) * (torch.rand(shape) < 0.7)

    def with_gradients(loss, losses):
        return [loss, losses, *torch.autograd.grad(3 * loss, [h, *layer.parameters()])]

    losses = F.cross_entropy(layer(h).mT, tokens, reduction="none")
    expected = with_gradients((losses * weight).sum() / weight.sum(), losses)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = with_gradients(*cross_entropy(h, layer, tokens, weight))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert (x - y).norm() < tolerance * y.norm()
    assert not found[1].requires_grad
    assert cross_entropy(300 * h, layer, tokens, 0 * weight)[0] == 0, "and nothing overflows"


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


# ---- Stage 1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 5, N - 1, N])
def test_a_vae_reads_all_of_a_segment_and_nothing_of_others(vae, place):
    segment = F.pad(example_batch().segment, (0, 5), value=PADDING)
    tokens = torch.randint(0, V, segment.shape)
    changed = change_tokens(tokens, torch.arange(N + 5) == place)
    z, z_changed = (vae.latents(x, segment) for x in (tokens, changed))
    decoded, decoded_changed = (vae.decode(x, segment) for x in (z, z_changed))
    is_seen = segment == segment[:, place, None]
    for before, after in ((z, z_changed), (decoded, decoded_changed)):
        assert torch.equal(before[~is_seen], after[~is_seen])
        assert not torch.isclose(before, after)[is_seen].all(-1).any()


def test_the_loss_of_a_vae_by_hand(watch):
    vae = make_vae(vocab_size=2, channels=2, repa=2.0, n_embd=2, n_head=1)
    torch.nn.init.eye_(vae.to_logits.weight)
    weight = torch.tensor([[1, 1, 0.1]])
    batch = make_batch(torch.tensor([[0, 0, 1]]), all_target(1, 3), weight)
    mu = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]]])
    variance = torch.tensor([[[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]])
    p = torch.tensor([[[0.8, 0.2], [0.25, 0.75], [0.9, 0.1]]])
    cos = torch.tensor([[0.5, -0.1, 1.0]])
    watch(vae, "posterior", lambda call: (mu, variance.log(), None))
    watch(vae, "decode", lambda call: p.log())
    watch(vae, "alignment", lambda call: cos)

    # The loss of a token is ce + 0.25 kl - 2 cos. The third token is of the tail.
    expected = dict(ce=0.80472, kl=3.57671, cos=0.2, loss=1.25145)
    report = vae(batch, features=cos, beta=0.25)
    assert {k: x.item() for k, x in report.items()} == pytest.approx(expected, rel=1e-4)
    assert vae(batch)["cos"] == 0, "without features nothing is aligned"
    assert weighted_mean(torch.ones(2), torch.zeros(2)) == 0


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


def test_a_variance_has_bounds(vae):
    vae.to_posterior.bias.data = torch.tensor(C * [0] + 3 * [1e3, -1e3])
    _, logvar, _ = vae.posterior(torch.tensor([[7]]), all_target(1, 1))
    assert logvar[0, 0].tolist() == 3 * [10, -20]


@pytest.mark.parametrize("repa_latents", [True, False])
def test_repa_is_the_cosine_of_latents_or_features_to_standardised_ones(repa_latents):
    vae = make_vae(repa_latents=repa_latents, teacher_embd=2)
    vae.teacher_mean.copy_(torch.tensor([1.0, 2.0]))
    vae.teacher_std.copy_(torch.tensor([0.5, 2.0]))
    vae.to_teacher.weight.data *= 1e-9
    vae.to_teacher.bias.data = torch.tensor([3.0, 4.0])
    features = torch.tensor([5.0, 14.0], requires_grad=True)  # standardised [8, 6]
    mu, h = torch.randn(C, requires_grad=True), torch.randn(E, requires_grad=True)
    cos = vae.alignment(mu, h, features)
    assert cos.item() == pytest.approx((24 + 24) / (5 * 10))
    cos.backward()
    assert [mu.grad is not None, h.grad is not None] == [repa_latents, not repa_latents]
    assert features.grad is None


def test_standardised_latents_by_hand(vae, watch):
    mean = torch.tensor([5.0, 0.0, -1.0, 2.0, 3.0, 0.0])
    std = torch.tensor([2.0, 1.0, 0.11, 0.09, 0.01, 0.0])
    active_std = torch.tensor([2.0, 1.0, 0.11, 1, 1, 1])  # variances of the others are below 0.01
    table = mean + std * torch.tensor([-1, 0, 1, 99])[:, None]  # token 3 is the tail's
    watch(vae, "posterior", lambda call: (table[call.tokens], None, None))
    read = watch(vae, "decode", lambda call: torch.eye(C, E))
    torch.nn.init.eye_(vae.to_logits.weight)
    text = make_batch(torch.tensor([[0, 1]]), all_target(1, 2), torch.ones(1, 2))
    end = same_rows(text, tokens=torch.tensor([[2, 3]]), weight=torch.tensor([[1, TAIL_WEIGHT]]))
    assert vae.standardise([text, end]) == 3
    z = vae.latents(torch.tensor([0, 1, 2]), None)
    assert torch.allclose(z[2], std / active_std, atol=1e-5)
    assert torch.allclose(z.mean(0), torch.zeros(C), atol=1e-5)
    assert vae.to_tokens(z, None).tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.allclose(read[0].z, table[:3], atol=1e-5), "the decoder reads raw latents"


# ---- Stage 2 and the sampler ---------------------------------------------------------------------


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


def test_a_velocity_by_hand():
    dit = make_dit(predict_tokens=False)
    dit.to_output = torch.nn.Identity()
    v, z_0, eps, z_t = torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]], [[2.0, 1.0]], [[3.0, 4.0]]])
    v = torch.cat((v, eps - z_0))
    found = dit.loss(v, None, z_0, eps, torch.tensor([1.0, 3.0]))
    assert torch.hstack(found).tolist() == [2.5 / 4, 2.5, 0]
    assert dit.estimate(v, z_t, torch.tensor(0.5), temperature=0.1)[0].tolist() == [2.5, 3.0]


def test_a_token_by_hand():
    dit = make_dit(vocab_size=2, channels=2, n_embd=2, n_head=1)
    dit.latent_of.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    dit.to_output.bias.data = torch.tensor([0.8, 0.2]).log() + 7
    h = torch.zeros(1, 2)
    found = dit.loss(h, torch.tensor([1]), None, None, torch.tensor([3.0]))
    assert [x.item() for x in found] == pytest.approx(2 * [math.log(5)])
    for temperature, p in ((1.0, 0.8), (0.5, 0.64 / 0.68), (0.0, 1.0)):
        (estimate,) = dit.estimate(h, None, None, temperature)
        assert estimate.tolist() == pytest.approx([p, 2 * (1 - p)])


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
    loss, losses, h, z_t, t_of = denoising_loss(dit, batch, z_0, t, eps, n_guess=2)
    call = calls[-1]
    noisy = torch.stack([(1 - a) * z + a * e for a, z, e in zip(t, z_0, eps)])
    assert torch.equal(call.x[~is_target], z_0[~is_target])
    assert torch.allclose(call.x[is_target], noisy[is_target])
    assert torch.allclose(z_t, noisy[is_target])
    assert t_of[:, 0].tolist() == t.repeat_interleave(is_target.sum(1)).tolist()

    whole_row = dit(call.x, batch.segment, t, call.guess)
    assert torch.allclose(h, whole_row[is_target], atol=1e-5)
    given = whole_row[is_target], batch.tokens[is_target], z_0[is_target], eps[is_target]
    expected = dit.loss(*given, batch.weight[is_target])
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert torch.allclose(losses, expected[1], atol=1e-5)

    estimate = dit.estimate(dit(call.x, batch.segment, t), call.x, t[:, None, None])
    is_told = is_target & (torch.arange(4) < 2)[:, None] & dit.config.self_condition
    assert torch.allclose(call.guess[is_told], estimate[is_told], atol=1e-5)
    assert not call.guess[is_target & ~is_told].any()
    assert not losses.requires_grad and not call.guess.requires_grad


def test_flow_loss_draws_noise_and_times_and_drops_contexts_at_all_times(watch):
    dit = make_dit(context_drop=0.25)
    segment = torch.tensor([CONTEXT, TARGET, TARGET]).expand(4001, 3)
    batch = same_rows(example_batch(4001, n=3), segment=segment)
    is_target = segment == TARGET
    calls = watch(textldm, "denoising_loss", lambda call: ("loss", None, None, None, None))
    for seed in (0, 1):
        assert flow_loss(dit, batch, torch.ones(4001, 3, C), generator(seed)) == "loss"
    call = calls[-1]
    u = torch.linspace(0.05, 0.95, 19)
    assert torch.allclose(call.t.quantile(u), dit.times(u), atol=0.03)
    is_hidden = (call.z_0 == 0).all(-1)
    is_dropped = is_hidden[:, 0]
    assert is_dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert call.t[is_dropped].mean().item() == pytest.approx(call.t.mean().item(), abs=0.03)
    assert torch.equal(is_hidden, is_dropped[:, None] & ~is_target)
    assert (call.z_0[~is_hidden] == 1).all()
    assert [x.item() for x in torch.std_mean(call.eps)] == pytest.approx([1, 0], abs=0.02)
    assert [call.n_guess for call in calls] == [2000, 2001], "half of the rows"


def test_no_step_waits_for_a_gpu(vae, dit, monkeypatch):
    # What asks for a value waits on a GPU, and raises on the meta device. It has no autocast.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    teacher = make_gpt(n_embd=E_TEACHER).to("meta")
    vae, dit = vae.to("meta"), dit.to("meta")
    batch = Batch(*[x.to("meta") for x in example_batch()])
    z_0 = vae.latents(batch.tokens, batch.segment)
    losses = [
        vae(batch, teacher_features(teacher, batch.tokens))["loss"],
        flow_loss(dit, batch, z_0, torch.Generator()),
        teacher(batch.tokens, batch.tokens, batch.counted),
    ]
    sum(losses).backward()
    denoise(dit, z_0, batch.segment, Sampling(steps=3, cfg_scale=2.0))


def test_every_parameter_learns_in_bf16_and_residual_streams_stay_in_fp32(vae, dit, watch):
    blocks = [x for x in [*vae.modules(), *dit.modules()] if isinstance(x, Block)]
    calls = [watch(block, "forward") for block in blocks]
    batch = example_batch()
    with torch.autocast("cpu", torch.bfloat16):
        vae(batch, torch.randn(4, N, E_TEACHER), 0.1, generator(0))["loss"].backward()
        z = vae.latents(batch.tokens, batch.segment).detach()
        flow_loss(dit, batch, z, generator(0)).backward()
        h = dit(z, batch.segment, torch.rand(4), z)
        estimate = dit.estimate(h, z, torch.tensor(0.5))
    for name, p in [*vae.named_parameters(), *dit.named_parameters()]:
        assert p.grad is not None and p.grad.any(), name
    streams = [call.x for of_block in calls for call in of_block]
    for x in (z, h, estimate, *streams):
        assert x.dtype == torch.float32


@pytest.mark.parametrize("scale", [0, 1, 3])
def test_guidance_goes_from_the_estimate_without_context_to_the_one_with_it(dit, scale):
    segment = example_batch().segment
    segment[0] = TARGET  # no prompt
    is_target = segment == TARGET
    padded = F.pad(segment, (0, 5), value=PADDING)
    z, guess = torch.randn(2, 4, N + 5, C)
    t = torch.tensor(0.6)
    sampling = Sampling(cfg_scale=scale, temperature=0.5)
    guided = guided_estimate(dit, z, t, guess, padded, sampling)[:, :N]

    def estimate(z, guess):
        h = dit(z, segment, t.expand(4), guess)
        return dit.estimate(h, z, t, 0.5)[is_target]

    z, guess = z[:, :N], guess[:, :N]
    e_c = estimate(z, guess)
    without_context = torch.where(is_target[..., None], z, 0.0)
    e_u = estimate(without_context, None if dit.config.predict_tokens else guess)
    assert not torch.allclose(e_c, e_u, atol=1e-3)
    assert torch.allclose(guided[is_target], e_u + scale * (e_c - e_u), atol=1e-4)


def test_three_steps_of_euler_by_hand(watch):
    dit = make_dit(predict_tokens=False)
    dit.to_output = torch.nn.Identity()
    drawn = watch(dit, "times", lambda call: torch.tensor([1, 0.25, 0.125, 0]))
    halve = watch(dit, "forward", lambda call: call.x / (2 * call.t[:, None, None]))
    z = torch.tensor([7.0, 8.0])[None, :, None].expand(1, 2, C)
    segment = torch.tensor([[CONTEXT, TARGET]])
    shown = []
    sampling = Sampling(steps=3, cfg_scale=1.0)
    end = denoise(dit, z, segment, sampling, lambda *step: shown.extend(step))
    assert drawn[0].u.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert [call.t.item() for call in halve] == [1, 0.25, 0.125]
    # From 8 by estimate 4 and noise 8 to 5, from 5 by 2.5 and 12.5 to 3.75, and to its half.
    x = torch.cat([*[call.x for call in halve], end])[..., 0]
    assert x.tolist() == [[7, 8], [7, 5], [7, 3.75], [7, 1.875]]
    assert [call.guess[0, 1, 0].item() for call in halve] == [0, 4, 2.5]
    assert [x.flatten()[-1].item() for x in shown] == [0.25, 4, 0.125, 2.5, 0, 1.875]


def test_rows_are_a_prompt_and_room_and_padding_and_texts_what_fills_the_room():
    c, t, p = CONTEXT, TARGET, PADDING
    prompts = [[1, 2], [], [EOT]]
    tokens, segment = rows_of(prompts, 2, N, EOT)
    assert tokens.tolist() == [[1, 2, EOT, EOT], 4 * [EOT], 4 * [EOT]]
    assert segment.tolist() == [[c, c, t, t], [t, t, p, p], [c, t, t, p]]
    tokens = torch.tensor([[1, 2, 3, EOT], [EOT, 5, EOT, 6], [EOT, 7, 8, 9]])
    assert texts_of(tokens, segment, EOT) == [[3, EOT], [EOT], [7, 8]]
    _, segment = rows_of(prompts, 0, 3, EOT)
    assert segment.tolist() == [[c, c, t], [t, t, t], [c, t, t]]


def test_the_seed_of_a_row_is_of_its_prompt_and_its_number_alone():
    together = row_seeds([[1], [2], [1]], 0)
    assert len(set(together)) == 3
    assert row_seeds([[1], [1]], 0) == [together[0], together[2]]
    assert row_seeds([[2]], 0) == [together[1]] != row_seeds([[2]], 1)
    assert row_seeds([[1], [1]], [5, 5]) == [5, 5]


def test_a_sample_starts_from_the_encoded_prompt_and_noise_of_its_seed(vae, dit):
    vae.standardise([example_batch()])
    prompts = [[1, 2, 3], [4], []]
    assert not vae.z_std.requires_grad
    z, segment = noisy_rows(vae, dit, prompts, 5, row_generators(prompts, 8))
    for prompt, row, kind, seed in zip(prompts, z, segment, row_seeds(prompts, 8)):
        assert torch.equal(row[kind == TARGET], torch.randn(5, C, generator=generator(seed)))
        alone = torch.tensor([prompt], dtype=torch.long)
        z_alone = vae.latents(alone, torch.zeros_like(alone))[0]
        assert torch.allclose(row[kind == CONTEXT], z_alone, atol=1e-5)
    with pytest.raises(ValueError):
        noisy_rows(vae, dit, prompts, 5, row_generators(prompts, [8, 8]))


def test_same_seed_same_text_whatever_the_neighbours(vae, dit):
    sampling = Sampling(steps=5, cfg_scale=3.0, temperature=0.7, seed=3)
    prompts = [[1, 2, 3], [4], []]
    texts = continue_texts(vae, dit, prompts, 6, sampling)
    assert texts != continue_texts(vae, dit, prompts, 6, replace(sampling, seed=4))
    beside_it = continue_texts(vae, dit, [[5, 6, 7, 8, 9, 10], [4]], 6, sampling)
    assert beside_it[1] == texts[1]


def test_the_callback_sees_the_texts_of_all_steps(vae, dit, watch):
    shown = []
    ends = watch(textldm, "denoise")
    sampling = Sampling(steps=8)
    texts = continue_texts(vae, dit, [[1, 2]], 6, sampling, lambda *step: shown.append(step))
    times, seen = zip(*shown)
    assert times == pytest.approx(dit.times(torch.linspace(1, 0, 9))[1:].tolist())
    assert seen[0] != seen[-1] == texts
    assert not ends[0].result.requires_grad


# ---- The recipe and the file ---------------------------------------------------------------------


def defaults_of(config_type):
    return {f.name: f.default for f in fields(config_type)}


def test_defaults_are_the_papers():
    vae, dit = defaults_of(VAEConfig), defaults_of(DiTConfig)
    assert [dit["block_size"], dit["vocab_size"]] == [1024, 50257]
    assert [vae["n_layer"], vae["n_head"], vae["n_embd"], vae["channels"]] == [9, 12, 768, 64]
    assert [vae["beta"], vae["repa"], vae["repa_latents"]] == [1e-3, 1.0, False]
    assert [dit["context_drop"], dit["t_mean"], dit["t_std"]] == [0.1, 0.0, 1.5]
    assert not any(dit[name] for name in ("adaln", "predict_tokens", "self_condition"))
    assert TransformerConfig().end_of_text == 50256
    assert Sampling() == Sampling(steps=50, cfg_scale=7.0, temperature=1.0)


def test_our_recipe_changes_exactly_the_fields_that_it_names():
    defaults = defaults_of(VAEConfig) | defaults_of(DiTConfig)
    assert OURS.keys() - defaults.keys() == {"from_decoder", "muon"}  # options of the scripts
    for name in OURS.keys() & defaults.keys():
        assert OURS[name] != defaults[name], name


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="n_embd=18"):
        TransformerConfig(n_embd=18, n_head=6)


def test_the_file_imports_torch_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(textldm))):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= sys.stdlib_module_names | {"torch"}


def test_the_file_works_alone_with_its_tests(tmp_path):
    for file in (textldm.__file__, __file__):
        shutil.copy(file, tmp_path)
    # -I leaves this folder and PYTHONPATH out of the search for modules.
    command = [sys.executable, "-I", "-m", "pytest", "-q", "-k", "callback"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

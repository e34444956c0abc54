"""Properties of variants/ldlm.py: latents that are learned together with the DiT."""

import contextlib
import json
import math

import pytest
import torch
import torch.nn.functional as F

import variants.ldlm
from engine.checkpoint import load_checkpoint
from engine.evaluation import Evaluation
from test_textldm import (
    EOT,
    SIZES,
    SMALL,
    N,
    V,
    change_tokens,
    example_batch,
    generator,
    randomise,
)
from tests.helpers import refuse, script, train, training_options
from textldm import CONTEXT, OURS, TARGET, Batch, Block, make_batch
from variants.ldlm import LDLM, LDLMConfig, joint_loss, latent_loss

C = 8  # channels of a latent
TEACHER = dict(SIZES, n_layer=3, block_size=N + 1, vocab_size=V)


def make_ldlm(**options):
    recipe = {k: OURS[k] for k in ("adaln", "self_condition", "t_mean", "t_std")}
    config = LDLMConfig(
        **{**SMALL, **recipe, **options},
        channels=C,
        coder_layers=1,
        teacher_config=json.dumps(TEACHER),
    )
    model = randomise(LDLM(config), scale=0.1)
    model.teacher.requires_grad_(False)
    return model


def gradients(model, step=0):
    """Of the joint loss, by name."""
    model.zero_grad()
    joint_loss(model, example_batch(), step, generator(3))["loss"].backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}


def mean_by_weight(x, batch):
    return ((x * batch.weight).sum() / batch.weight.sum()).item()


# ---- The loss ------------------------------------------------------------------------------------


def test_gamma_scales_what_diffusion_tells_the_encoder_and_nothing_else():
    shut = gradients(make_ldlm(encoder_warmup=100), step=-500)
    half = gradients(make_ldlm(encoder_warmup=100), step=80)  # the middle of the sigmoid
    end = gradients(make_ldlm(encoder_warmup=100), step=100)
    full = gradients(make_ldlm(encoder_warmup=0))
    of_encoder = [name for name in full if name.startswith("encoder.")]
    assert len(of_encoder) > 10
    assert any(not torch.allclose(shut[name], full[name], rtol=1e-3) for name in of_encoder)
    for name in full:
        assert not name.startswith("teacher.")
        if name in of_encoder:
            diffusion = full[name] - shut[name]
            at_end = shut[name] + diffusion / (1 + math.exp(-2))
            assert torch.allclose(half[name], shut[name] + diffusion / 2, atol=1e-6), name
            assert torch.allclose(end[name], at_end, atol=1e-6), name
        else:
            assert torch.equal(shut[name], full[name]), name
            assert torch.equal(half[name], full[name]), name


def test_gamma_grows_from_0_to_088_in_the_warm_up():
    """By hand: 1 / (1 + e^8), then 1 / (1 + e^-2)."""
    model = make_ldlm(encoder_warmup=40)
    found = []
    for step in (0, 40):
        model.zero_grad()
        joint_loss(model, example_batch(), step, generator(3))["diffusion"].backward()
        found.append(model.encoder.first.weight.grad.norm().item())
    assert found[0] / found[1] == pytest.approx(0.000335 / 0.8808, rel=0.01)


@pytest.mark.parametrize("hidden_mse", [True, False])
def test_tokens_do_not_shape_the_latents_where_hidden_states_do(hidden_mse):
    model, other = make_ldlm(hidden_mse=hidden_mse), make_ldlm(hidden_mse=hidden_mse)
    randomise(other.token_decoder, scale=1.0)
    of_model, of_other = gradients(model), gradients(other)
    is_same = {}
    for name in of_model:
        if not name.startswith("token_decoder."):
            is_same[name] = torch.equal(of_model[name], of_other[name])
    if hidden_mse:
        assert all(is_same.values())
    else:
        assert not is_same["encoder.first.weight"]
        assert not is_same["decoder.last.weight"]


def test_normalised_latents_cannot_outgrow_noise():
    model = make_ldlm()
    batch = example_batch()
    z = model.latents(batch.tokens, batch.segment)
    assert z.mean(-1).abs().max() < 1e-5
    assert (z.square().mean(-1) - 1).abs().max() < 1e-3
    model.encoder.last.weight.data *= 100
    model.encoder.last.bias.data *= 100
    assert torch.allclose(model.latents(batch.tokens, batch.segment), z, atol=1e-4)


def test_noise_is_of_the_decoder_alone():
    batch = example_batch()
    quiet = joint_loss(make_ldlm(decoder_noise=0.0), batch, 0, generator(3))
    loud = joint_loss(make_ldlm(decoder_noise=3.0), batch, 0, generator(3))
    assert torch.equal(quiet["diffusion"], loud["diffusion"])
    assert not torch.equal(quiet["hidden"], loud["hidden"])


def test_the_joint_loss_is_the_sum_of_its_three():
    """Written out, with a DiT that is half off the clean latents."""
    model = make_ldlm(decoder_noise=0.7)
    model.hidden_mean.normal_()
    model.hidden_std.uniform_(0.5, 2)
    batch = example_batch()
    z = model.latents(batch.tokens, batch.segment)

    def forward(x, segment, t, guess=None, places=None):
        output = z[: len(x)] + 0.5
        if places is None:
            return output
        return output.flatten(0, 1)[places]

    model.dit.forward = forward
    losses = joint_loss(model, batch, 0, generator(3))
    assert losses["diffusion"].item() == pytest.approx(0.25)

    after_end_of_text = F.pad(batch.tokens, (1, 0), value=EOT)
    features = model.teacher.hidden_states(after_end_of_text, 1)[:, 1:]
    hidden = (features - model.hidden_mean) / model.hidden_std
    luck = generator(3)
    torch.rand(2, 4, generator=luck)  # times and dropped contexts
    torch.randn(z.shape, generator=luck)  # the noise of the diffusion
    noise = torch.randn(z.shape, generator=luck)
    decoded = model.decoder(z + 0.7 * noise, batch.segment)
    hidden_loss = mean_by_weight((decoded - hidden).square().mean(-1), batch)
    assert losses["hidden"].item() == pytest.approx(hidden_loss, rel=1e-4)
    log_p = model.token_decoder(decoded, batch.segment).log_softmax(-1)
    nll = -log_p.gather(-1, batch.tokens[..., None])[..., 0]
    assert losses["word"].item() == pytest.approx(mean_by_weight(nll, batch), rel=1e-4)
    total = sum(losses[name].item() for name in ("diffusion", "hidden", "word"))
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


def test_the_dit_estimates_the_clean_latents_themselves():
    model = make_ldlm()
    z, z_t = torch.randn(2, 4, N, C)
    assert torch.equal(model.dit.estimate(z, z_t, torch.ones(4, 1, 1)), z)


def test_the_latents_of_a_context_know_nothing_of_its_target():
    model = make_ldlm()
    batch = example_batch()
    is_context = batch.segment == CONTEXT
    other = change_tokens(batch.tokens, batch.segment == TARGET)
    z = model.latents(batch.tokens, batch.segment)
    z_other = model.latents(other, batch.segment)
    assert torch.allclose(z_other[is_context], z[is_context], atol=1e-6)


def test_tokens_are_read_from_latents_through_hidden_states():
    model = make_ldlm()
    segment = example_batch().segment
    z = torch.randn(4, N, C)
    logits = model.token_decoder(model.decoder(z, segment), segment)
    assert torch.equal(model.to_tokens(z, segment), logits.argmax(-1))


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_dropped_context_is_not_seen(drop):
    model = make_ldlm(context_drop=drop)
    batch = example_batch()
    z_0 = torch.randn(4, N, C)
    is_context = (batch.segment == CONTEXT)[..., None]
    other = torch.where(is_context, torch.randn(4, N, C), z_0)
    loss = latent_loss(model.dit, batch, z_0, generator(0))
    model = make_ldlm(context_drop=drop)  # with times as they were
    loss_of_other = latent_loss(model.dit, batch, other, generator(0))
    assert torch.equal(loss, loss_of_other) == (drop == 1)


def test_a_dropped_context_is_zero_and_its_target_is_as_ever():
    batch = example_batch()
    is_context = batch.segment == CONTEXT
    z_0 = torch.randn(4, N, C)
    found = []
    for drop in (0.0, 1.0):
        dit = make_ldlm(context_drop=drop).dit
        real = dit.forward

        def forward(x, *more, **options):
            found.append(x)
            return real(x, *more, **options)

        dit.forward = forward
        latent_loss(dit, batch, z_0, generator(0))
    with_context, without = found[1], found[3]  # the others are first passes, for a guess
    assert torch.equal(with_context[is_context], z_0[is_context])
    assert not without[is_context].any()
    assert torch.equal(with_context[~is_context], without[~is_context])


def test_no_step_waits_for_a_gpu(monkeypatch):
    """On the meta device, whose tensors have no values."""

    def no_autocast(*_, **__):  # autocast does not know the device
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", no_autocast)
    model = make_ldlm().to("meta")
    batch = Batch(*[x.to("meta") for x in example_batch()])
    joint_loss(model, batch, 3, torch.Generator())["loss"].backward()
    assert model.dit.times(torch.rand(5, device="meta")).shape == (5,)


def test_every_parameter_but_the_teachers_learns_in_bf16():
    model = make_ldlm()
    with torch.autocast("cpu", torch.bfloat16):
        joint_loss(model, example_batch(), 400, generator(0))["loss"].backward()
    for name, p in model.named_parameters():
        if name.startswith("teacher."):
            assert p.grad is None, name
        else:
            assert p.grad.any(), name


def test_residual_streams_stay_in_fp32_under_autocast():
    model = make_ldlm()
    seen = []

    def look(block, inputs):
        seen.append(inputs[0].dtype)

    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        joint_loss(model, example_batch(), 400, generator(0))
    assert set(seen) == {torch.float32}


# ---- The times -----------------------------------------------------------------------------------


def test_times_are_even_where_the_loss_is():
    dit = make_ldlm().dit
    u = torch.linspace(0, 1, 11)
    for loss in (0.0, 1.0):
        dit.loss_at.fill_(loss)
        assert torch.allclose(dit.times(u), u, atol=1e-6)


def test_adaptive_times_follow_the_loss():
    """With a loss of t^2 the density of times is 2 t, but for the tenth of them that is even."""
    dit = make_ldlm().dit
    K = len(dit.loss_at)
    dit.loss_at.copy_(0.3 + torch.linspace(0, 1, K) ** 2)
    t = dit.times(torch.rand(200_000))
    density = torch.histc(t, 10, 0, 1) / len(t) * 10
    middle = (torch.arange(10) + 0.5) / 10
    assert torch.allclose(density, 0.9 * 2 * middle + 0.1, atol=0.03)
    u = torch.linspace(0, 1, 101)
    t = dit.times(u)
    assert torch.allclose(0.9 * t**2 + 0.1 * t, u, atol=1e-3), "they are its quantiles"


def test_the_running_loss_finds_its_profile_by_itself(monkeypatch):
    def loss_of_t_squared(dit, batch, z_0, t, eps, n_guess):
        t_of = t[:, None].expand(batch.tokens.shape).flatten()[batch.targets]
        return t_of**2, None, None, t_of[:, None]

    monkeypatch.setattr(variants.ldlm, "denoising_loss", loss_of_t_squared)
    dit = make_ldlm().dit
    rows = example_batch()
    batch = make_batch(*[x.repeat(16, 1) for x in (rows.tokens, rows.segment, rows.weight)])
    for seed in range(400):
        latent_loss(dit, batch, torch.zeros(64, N, C), generator(seed))
    profile = torch.linspace(0, 1, len(dit.loss_at)) ** 2
    error = (dit.loss_at - profile).abs()
    assert error.median() < 0.005
    assert error.max() < 0.1


def test_without_adaptive_times_they_are_logit_normal():
    dit = make_ldlm(adaptive_times=False, t_mean=0.8, t_std=0.7).dit
    dit.loss_at.copy_(torch.linspace(0, 1, len(dit.loss_at)) ** 2)
    u = torch.linspace(0, 1, 101)[1:-1].double()
    normal = (torch.logit(dit.times(u)) - 0.8) / 0.7
    assert torch.allclose(normal, torch.special.ndtri(u), atol=1e-3)


# ---- The script ----------------------------------------------------------------------------------

OPTIONS = ["--channels=8", "--coder_layers=1"]


def train_ldlm(home, folder, *more):
    teacher = f"--teacher={home / 'out/gpt.pt'}"
    train(home, "variants/ldlm.py", f"--out={folder}", teacher, *OPTIONS, *more)


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """A folder with the checkpoints and metrics of a run."""
    folder = tmp_path_factory.mktemp("ldlm")
    train_ldlm(home, folder)
    return folder


def test_a_trained_ldlm_is_sampled_as_two_stages_are(trained, capsys):
    script("sample.py", "--out", trained, "--prompt=ab", "--steps=2", "--device=cpu")
    assert capsys.readouterr().out.startswith("ab|")


def test_a_trained_ldlm_holds_its_teacher_and_the_statistics_of_it(home, trained):
    gpt = load_checkpoint(home / "out/gpt.pt", "gpt", "")["model"]
    model = load_checkpoint(trained / "dit.pt", "ldlm", "")["model"]
    for name, value in gpt.items():
        assert torch.equal(model[f"teacher.{name}"], value), name
    assert model["hidden_mean"].any()
    assert model["dit.loss_at"].any(), "the running loss is a part of it"


def test_the_latest_checkpoint_is_kept_though_its_loss_is_higher(home, tmp_path, monkeypatch):
    """The loss says nothing, because the latents move with it."""
    losses = iter([1.0, 2.0])

    def evaluate(self, vae, dit):
        return dict(loss=next(losses)), "a text"

    monkeypatch.setattr(Evaluation, "__call__", evaluate)
    train_ldlm(home, tmp_path)
    assert load_checkpoint(tmp_path / "dit.pt", "ldlm", "")["step"] == 4


def test_a_collapse_of_the_latents_is_described():
    """By the variance between tokens, the directions of it, and what is reconstructed."""
    model = make_ldlm()
    batch = example_batch(64)
    described = variants.ldlm.describe_latents(model, batch)
    z = model.latents(batch.tokens, batch.segment)[batch.counted]
    assert described.startswith(f"latents: {z.var(0).mean():.2f} of their variance")
    p = torch.bincount(batch.tokens[batch.counted]) / batch.counted.sum()  # without tails
    real = -p[p > 0] @ p[p > 0].log()
    assert described.endswith(f"(of val rows {real:.2f})")
    for p in model.encoder.parameters():
        p.data.zero_()
    model.encoder.last.bias.data = torch.arange(float(C))
    described = variants.ldlm.describe_latents(model, batch)
    assert described.startswith("latents: 0.00 of their variance")
    assert f"0 of {C} active" in described


def test_what_does_not_fit_ldlm_is_refused(home, trained, capsys):
    options = [*training_options(home), f"--out={trained}", *OPTIONS]
    refuse(capsys, "--compile does not", "variants/ldlm.py", *options, "--compile", keep=trained)
    refuse(capsys, "is missing", "variants/ldlm.py", *options, keep=trained)  # the teacher
    refuse(capsys, "unrecognized", "variants/ldlm.py", *options, "--predict_tokens", keep=trained)

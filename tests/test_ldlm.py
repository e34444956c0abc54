"""Properties of variants/ldlm.py: latents that are learned together with the DiT."""

import json

import pytest
import torch
import torch.nn.functional as F

import variants.ldlm
from engine.checkpoint import load_checkpoint
from engine.evaluation import Evaluation
from test_textldm import EOT, SIZES, SMALL, N, V
from test_textldm import change_tokens, example_batch, generator, randomise, same_rows
from tests.helpers import refuse, script, train, training_options
from textldm import CONTEXT, OURS, TAIL_WEIGHT, TARGET
from variants.ldlm import LDLM, LDLMConfig, joint_loss

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
    model = randomise(LDLM(config))
    model.teacher.requires_grad_(False)
    model.token_decoder.last.bias.data[EOT] += 3  # some texts end
    return model


# ---- The loss ------------------------------------------------------------------------------------


def gradients(model, part, step=0):
    """Of a part of the joint loss, by name of what it reaches."""
    model.zero_grad()
    joint_loss(model, example_batch(), step, generator(3))[part].backward()
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("step, gamma", [(0, 0.000335), (80, 0.5), (100, 0.8808)])
def test_gamma_scales_what_diffusion_tells_the_encoder_and_nothing_else(step, gamma):
    """By hand: 1 / (1 + e^8), 1 / (1 + e^0) and 1 / (1 + e^-2)."""
    for part in ("diffusion", "hidden"):
        full = gradients(make_ldlm(encoder_warmup=0), part)
        found = gradients(make_ldlm(encoder_warmup=100), part, step)
        for name in full:
            is_scaled = part == "diffusion" and name.startswith("encoder.")
            expected = full[name] * (gamma if is_scaled else 1)
            error = (found[name] - expected).abs().max()
            assert error <= 2e-3 * expected.abs().max(), name


@pytest.mark.parametrize(
    "hidden_mse, reached",
    [(True, {"token_decoder"}), (False, {"encoder", "decoder", "token_decoder"})],
)
def test_tokens_do_not_shape_the_latents_where_hidden_states_do(hidden_mse, reached):
    model = make_ldlm(hidden_mse=hidden_mse)
    assert {name.split(".")[0] for name in gradients(model, "word")} == reached
    losses = joint_loss(model, example_batch(), 0, generator(3))
    assert (losses["hidden"] > 0) == hidden_mse


def test_normalised_latents_cannot_outgrow_noise():
    model = make_ldlm()
    batch = example_batch()
    z = model.latents(batch.tokens, batch.segment)
    assert z.mean(-1).abs().max() < 1e-5
    assert (z.square().mean(-1) - 1).abs().max() < 1e-3


def test_the_joint_loss_is_the_sum_of_its_three():
    """Written out, with a DiT that is half off the clean latents."""
    model = make_ldlm(decoder_noise=0.7, context_drop=0.0)
    model.hidden_mean.normal_()
    model.hidden_std.uniform_(0.5, 2)
    batch = example_batch()
    z = model.latents(batch.tokens, batch.segment)
    told = []

    def forward(x, segment, t, guess=None, places=None):
        told.append(guess)
        output = z[: len(x)] + 0.5
        return output if places is None else output.flatten(0, 1)[places]

    model.dit.forward, model.dit.to_output = forward, torch.nn.Identity()
    losses = {k: x.item() for k, x in joint_loss(model, batch, 0, generator(3)).items()}
    luck = generator(3)
    t = torch.rand(2, 4, generator=luck)[0]  # even, as nothing is known of the loss yet
    torch.randn(z.shape, generator=luck)  # the noise of the diffusion
    noise = torch.randn(z.shape, generator=luck)
    assert losses["diffusion"] == pytest.approx(0.25)
    assert torch.equal(told[1][:2], z[:2] + 0.5), "the estimate is the output itself"
    assert not told[1][2:].any()
    at_times = torch.zeros(64).index_fill(0, (t * 63).round().long(), 0.025)
    assert torch.allclose(model.dit.loss_at, at_times)

    after_end_of_text = F.pad(batch.tokens, (1, 0), value=EOT)
    features = model.teacher.hidden_states(after_end_of_text, 1)[:, 1:]
    hidden = (features - model.hidden_mean) / model.hidden_std
    decoded = model.decoder(z + 0.7 * noise, batch.segment)
    log_p = model.token_decoder(decoded, batch.segment).log_softmax(-1)
    of_tokens = dict(
        hidden=(decoded - hidden).square().mean(-1),
        word=-log_p.gather(-1, batch.tokens[..., None])[..., 0],
    )
    for name, loss in of_tokens.items():
        mean = (loss * batch.weight).sum() / batch.weight.sum()
        assert losses[name] == pytest.approx(mean.item(), rel=1e-4)
    total = losses["diffusion"] + losses["hidden"] + losses["word"]
    assert losses["loss"] == pytest.approx(total, rel=1e-5)


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


# ---- The times -----------------------------------------------------------------------------------

U = torch.linspace(0, 1, 101)
ADAPTIVE = dict(
    flat=(lambda t: 0 * t + 1, lambda t: t),
    rising=(lambda t: 0.3 + t**2, lambda t: 0.9 * t**2 + 0.1 * t),
    falling_again=(lambda t: t.minimum(2 / 3 - t), lambda t: 2.7 * t.clamp(max=1 / 3) + 0.1 * t),
)


@pytest.mark.parametrize("loss_at, cdf", ADAPTIVE.values(), ids=ADAPTIVE)
def test_adaptive_times_spread_the_loss_evenly_but_for_a_tenth(loss_at, cdf):
    dit = make_ldlm().dit
    dit.loss_at.copy_(loss_at(torch.linspace(0, 1, 64)))
    t = dit.times(U)
    assert t[0] == 0 and t[-1] == 1
    assert torch.allclose(cdf(t), U, atol=1e-3)


def test_without_adaptive_times_they_are_logit_normal():
    dit = make_ldlm(adaptive_times=False, t_mean=0.8, t_std=0.7).dit
    dit.loss_at.copy_(torch.linspace(0, 1, 64))
    u = U[1:-1].double()
    normal = (torch.logit(dit.times(u)) - 0.8) / 0.7
    assert torch.allclose(normal, torch.special.ndtri(u), atol=1e-3)


def test_the_running_loss_by_hand():
    """Of times near 0 the mean is (1 + 3 * 3) / 4. A time with no weight learns nothing."""
    dit = make_ldlm().dit
    loss = torch.tensor([1.0, 3.0, 5.0, 7.0])
    t = torch.tensor([0, 0.007, 1, 0.5])
    weight = torch.tensor([1.0, 3.0, 1.0, 0.0])
    for share in (0.1, 0.19):
        dit.update_loss_at(loss, t, weight)
        expected = [2.5 * share, *[0] * 62, 5 * share]
        assert dit.loss_at.tolist() == pytest.approx(expected)


# ---- The script ----------------------------------------------------------------------------------

OPTIONS = ["--channels=8", "--coder_layers=1"]


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """A folder with the checkpoint of a run whose loss grew."""
    folder = tmp_path_factory.mktemp("ldlm")
    losses = iter([1.0, 2.0])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Evaluation, "__call__", lambda *_: (dict(loss=next(losses)), "a text"))
        teacher = f"--teacher={home / 'out/gpt.pt'}"
        train(home, "variants/ldlm.py", f"--out={folder}", teacher, *OPTIONS)
    return folder


def test_a_trained_ldlm_is_sampled_as_two_stages_are(trained, capsys):
    script("sample.py", "--out", trained, "--prompt=ab", "--steps=2", "--device=cpu")
    assert capsys.readouterr().out.startswith("ab|")


def test_the_latest_ldlm_is_kept_with_its_teacher_and_the_statistics_of_it(home, trained):
    """Its loss says nothing, because the latents move with it."""
    gpt = load_checkpoint(home / "out/gpt.pt", "gpt", "")["model"]
    state = load_checkpoint(trained / "dit.pt", "ldlm", "")
    assert state["step"] == 4
    for name, value in gpt.items():
        assert torch.equal(state["model"][f"teacher.{name}"], value), name
    assert state["model"]["hidden_mean"].any()
    assert (state["model"]["hidden_std"] != 1).any()
    assert state["model"]["dit.loss_at"].any(), "the running loss is a part of it"


def test_a_collapse_of_the_latents_is_described():
    """By hand: 20 tokens 1 and 20 tokens 2, which two channels tell apart, and tails. What is read
    of any latents is nine 1 and three 2."""
    model = make_ldlm()
    tokens = torch.tensor([1, 2] * 5 + [EOT, EOT]).repeat(4, 1)
    weight = torch.where(tokens == EOT, TAIL_WEIGHT, 1.0)
    latent_of = torch.zeros(V, C)
    latent_of[1, :2], latent_of[2, :2], latent_of[EOT] = 1, -1, 9
    model.latents = lambda tokens, segment: latent_of[tokens]
    model.to_tokens = lambda z, segment: (torch.arange(N) // 9 + 1).expand(len(z), N)
    batch = same_rows(example_batch(), tokens=tokens, weight=weight)
    assert variants.ldlm.describe_latents(model, batch) == (
        "latents: 0.26 of their variance is between tokens, in 1 directions; std per channel "
        "0.00 to 1.01, 2 of 8 active; 60.00% of val tokens reconstructed; 64 samples from "
        "nothing: entropy 0.56 nats (of val rows 0.69)"
    )


@pytest.mark.parametrize(
    "words, option",
    [
        ("--compile does not", "--compile"),
        ("is missing", "--seed=1"),  # the teacher
        ("unrecognized", "--predict_tokens"),
    ],
)
def test_what_does_not_fit_ldlm_is_refused(home, trained, capsys, words, option):
    options = [*training_options(home), f"--out={trained}", *OPTIONS, option]
    refuse(capsys, words, "variants/ldlm.py", *options, keep=trained)

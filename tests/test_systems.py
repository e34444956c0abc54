"""Laws of every system: TextLDM, Cola DLM, LDLM, masked diffusion and the GPT."""

import contextlib
from typing import Callable, NamedTuple

import pytest
import torch
import torch.nn as nn

from baselines.gpt import generate, gpt_loss
from baselines.masked import MaskedLM, masked_loss, unmask
from test_textldm import E_TEACHER, EOT, SMALL, N, all_target
from test_textldm import example_batch, generator, make_dit, make_gpt, make_vae, randomise
from test_textldm import same_rows
from tests.test_ldlm import make_ldlm
from textldm import CONTEXT, TARGET, Batch, Block, Sampling, TransformerConfig
from textldm import continue_texts, flow_loss
from variants.cola_dlm import CausalVAE, ColaConfig, ColaDiT, block_flow_loss, continue_in_blocks
from variants.ldlm import joint_loss, latent_loss


def sampling(seed):
    return Sampling(steps=3, cfg_scale=3.0, temperature=0.7, seed=seed)


def make_textldm():
    return nn.ModuleDict(dict(vae=make_vae(), dit=make_dit()))


def make_cola():
    dit = make_dit(ColaDiT, ColaConfig, latent_block=3)
    return nn.ModuleDict(dict(vae=make_vae(CausalVAE), dit=dit))


def both_stages(flow):
    """The losses of a VAE and of a DiT."""

    def loss(net, batch, luck):
        features = torch.ones(*batch.tokens.shape, E_TEACHER, device=batch.tokens.device)
        of_vae = net.vae(batch, features, 0.1, luck)["loss"]
        z_0 = net.vae.latents(batch.tokens, batch.segment).detach()
        return of_vae + flow(net.dit, batch, z_0, luck)

    return loss


class System(NamedTuple):
    make: Callable
    loss: Callable  # of a model, a batch and a generator
    write: Callable  # of a model, prompts, a length (0: a row) and a seed


SYSTEMS = dict(
    textldm=System(
        make_textldm,
        both_stages(flow_loss),
        lambda net, prompts, n, seed: continue_texts(*net.values(), prompts, n, sampling(seed)),
    ),
    cola_dlm=System(
        make_cola,
        both_stages(block_flow_loss),
        lambda net, prompts, n, seed: continue_in_blocks(*net.values(), prompts, n, sampling(seed)),
    ),
    ldlm=System(
        make_ldlm,
        lambda net, batch, luck: joint_loss(net, batch, 400, luck)["loss"],
        lambda net, prompts, n, seed: continue_texts(net, net.dit, prompts, n, sampling(seed)),
    ),
    masked=System(
        lambda: randomise(MaskedLM(TransformerConfig(**SMALL))),
        masked_loss,
        lambda net, prompts, n, seed: unmask(net, prompts, n, sampling(seed)),
    ),
    gpt=System(
        make_gpt,
        lambda net, batch, luck: gpt_loss(net, batch),
        lambda net, prompts, n, seed: generate(net, prompts, n, temperature=2.0, seed=seed),
    ),
)


@pytest.fixture(params=SYSTEMS)
def system(request):
    return SYSTEMS[request.param]


def rows_for(system, rows=4):
    """A Cola DLM has rows without a context."""
    batch = example_batch(rows)
    return same_rows(batch, segment=all_target(rows)) if system.make is make_cola else batch


# ---- The losses ----------------------------------------------------------------------------------


def test_no_loss_waits_for_a_gpu(system, monkeypatch):
    """On the meta device, whose tensors have no values."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    batch = Batch(*[x.to("meta") for x in rows_for(system)])
    system.loss(system.make().to("meta"), batch, torch.Generator()).backward()


def test_every_parameter_but_a_teachers_learns_in_bf16(system):
    net = system.make()
    with torch.autocast("cpu", torch.bfloat16):
        system.loss(net, rows_for(system), generator(0)).backward()
    for name, p in net.named_parameters():
        is_learned = p.grad is not None and bool(p.grad.any())
        assert is_learned != name.startswith("teacher."), name


def test_residual_streams_stay_in_fp32_under_autocast(system):
    net = system.make()
    seen = set()
    for module in net.modules():
        if isinstance(module, Block):
            module.ln_1.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        system.loss(net, rows_for(system), generator(0))
    assert seen == {torch.float32}


# ---- The context of a DiT ------------------------------------------------------------------------

FLOWS = dict(textldm=flow_loss, cola_dlm=block_flow_loss, ldlm=latent_loss)


def passes(name, drop, rows):
    """What the loss of a system gives to its DiT: clean latents, then x, segment and t of each
    pass."""
    system = SYSTEMS[name]
    net = system.make()
    net.dit.config.context_drop = drop
    real = net.dit.forward
    given = []

    def forward(x, segment, t, *more, **options):
        given.append((x, segment, t))
        return real(x, segment, t, *more, **options)

    net.dit.forward = forward
    z_0 = torch.randn(rows, N, net.dit.config.channels, generator=generator(1))
    batch = rows_for(system, rows)
    FLOWS[name](net.dit, batch, z_0, generator(0))
    is_context = torch.ones(rows, N).bool() if name == "cola_dlm" else batch.segment == CONTEXT
    return z_0[is_context], given


@pytest.mark.parametrize("name", FLOWS)
def test_a_dropped_context_is_zero_and_its_target_is_as_ever(name):
    clean, (_, (x, segment, _)) = passes(name, 0.0, rows=4)
    _, given = passes(name, 1.0, rows=4)
    assert torch.equal(x[segment == CONTEXT], clean)
    for without, segment, _ in given:
        assert not without[segment == CONTEXT].any()
    assert torch.equal(without[segment == TARGET], x[segment == TARGET])


@pytest.mark.parametrize("name", FLOWS)
def test_as_many_contexts_as_asked_are_dropped_at_any_time(name):
    _, (_, (x, _, t)) = passes(name, 0.3, rows=600)
    is_dropped = (x[:, 0] == 0).all(-1)
    t = t.view(600, -1)
    assert is_dropped.float().mean() == pytest.approx(0.3, abs=0.06)
    assert (t[is_dropped].mean(0) - t[~is_dropped].mean(0)).abs().max() < 0.08


# ---- Texts ---------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_text_whatever_the_neighbours(system):
    net = system.make()
    prompts = [[1, 2, 3], [4], [], [4]]
    texts = system.write(net, prompts, 6, 3)
    assert texts == system.write(net, prompts, 6, 3)
    assert texts != system.write(net, prompts, 6, 4)
    assert texts[1] == system.write(net, [[5, 6, 7, 8, 9], [4]], 6, 3)[1]
    assert texts[1] != texts[3], "equal prompts go on in different ways"


def test_texts_stop_at_the_end_of_text_or_of_a_row(system):
    prompts = [[1, 2], [], [3]] * 20
    texts = system.write(system.make(), prompts, 0, 3)
    is_whole = [len(text) == N - len(prompt) for text, prompt in zip(texts, prompts)]
    for text, whole in zip(texts, is_whole):
        assert EOT not in text[:-1]
        assert whole or text[-1] == EOT
    assert set(is_whole) == {True, False}

"""Properties of variants/cola_dlm.py: text in blocks, each given all before it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import variants.cola_dlm as cola
from test_textldm import EOT, C, N, V, all_target, change_tokens, example_batch, generator
from test_textldm import make_dit, make_vae, randomise, same_rows
from tests.helpers import make_quick, refuse, script, stage_of, train, training_options
from textldm import TAIL_WEIGHT, TARGET, Sampling, guided_estimate
from variants.cola_dlm import BlockCorpus, BlockEvaluation, CausalVAE, ColaConfig, ColaDiT
from variants.cola_dlm import Layout, Noise, Texts, block_denoising_loss, block_flow_loss
from variants.cola_dlm import continue_in_blocks, first_block

b = 3  # tokens in a block
PLACE = torch.arange(N)


def make_cola_dit(n_layer=2):
    dit = make_dit(ColaDiT, ColaConfig, latent_block=b, n_layer=n_layer)
    randomise(dit.transformer)  # what stands before a block matters
    return dit


@pytest.fixture
def vae():
    return make_vae(CausalVAE)


@pytest.fixture
def dit():
    return make_cola_dit()


def batch_of_texts():
    """Rows that are all target."""
    return same_rows(example_batch(), segment=all_target(4))


# ---- The networks --------------------------------------------------------------------------------


def test_the_vae_of_blocks_looks_back_only_and_all_the_way(vae):
    tokens, segment = torch.randint(1, V - 1, (1, N)), all_target(1)
    z = torch.randn(1, N, C)
    for i in range(N):
        is_here = PLACE == i
        other_tokens = change_tokens(tokens, is_here)
        other_z = torch.where(is_here[:, None], 0.0, z)
        by_token = vae.latents(other_tokens, segment) - vae.latents(tokens, segment)
        by_latent = vae.decode(other_z, segment) - vae.decode(z, segment)
        for change in (by_token, by_latent):
            assert torch.equal(change[0].abs().amax(-1) > 1e-5, PLACE >= i)


def test_one_block_of_one_time_is_the_dit_of_textldm(dit):
    plain = make_dit()
    dit.load_state_dict(plain.state_dict())
    x, guess = torch.randn(2, 4, N, C)
    t = torch.rand(4)
    layout = Layout(dit.turn(PLACE), torch.ones(N, N).bool(), torch.zeros(N, dtype=torch.long))
    expected = plain(x, all_target(4), t, guess)
    output = dit(x, all_target(4), t[:, None], guess, layout)
    assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4)


# ---- The loss ------------------------------------------------------------------------------------


def test_each_block_is_denoised_as_alone_behind_all_that_is_before_it(dit):
    """At its own time, and in half of the rows with the estimate of a first pass."""
    batch = batch_of_texts()
    z_0, context, eps = torch.randn(3, 4, N, C)
    block = (PLACE + 1) // b
    t = torch.rand(4, 5)
    is_learned = []
    dit.from_guess.register_forward_pre_hook(lambda _, x: is_learned.append(x[0].requires_grad))
    noise = Noise(block, t, eps)
    given = dit, batch, z_0, context, noise
    loss, losses, h, z_t, t_of = block_denoising_loss(*given, n_guess=2)
    assert is_learned == [False]
    assert torch.equal(t_of.view(4, N), t[:, block])
    expected = z_0 + t_of.view(4, N, 1) * (eps - z_0)
    assert torch.allclose(z_t.view(4, N, C), expected, atol=1e-6)
    nll = F.cross_entropy(dit.to_output(h), batch.tokens.flatten(), reduction="none")
    assert torch.allclose(losses, nll, atol=1e-5)
    mean = (nll.view(4, N) * batch.weight).sum() / batch.weight.sum()
    assert loss.item() == pytest.approx(mean.item(), rel=1e-5)

    for i in range(5):
        before, now = PLACE[block < i], PLACE[block == i]
        place = torch.cat((before, now))
        is_now = (block[place] == i).long()  # CONTEXT, then TARGET
        seen = block[place, None] >= block[place]  # all before it is read in blocks, too
        layout = Layout(dit.turn(place), seen, is_now)
        x = torch.cat((context[:, before], expected[:, now]), dim=1)
        times = F.pad(t[:, i : i + 1], (1, 0))  # what is before it is clean

        def alone(guess):
            return dit(x, is_now.expand(4, -1), times, guess, layout)

        untold = torch.zeros_like(x)
        told = dit.estimate(alone(untold), x, None)
        guess = torch.cat((told[:2], untold[2:]))
        found = h.view(4, N, -1)[:, now]
        assert torch.allclose(found, alone(guess)[:, len(before) :], atol=1e-4)


def test_in_training_blocks_begin_anywhere_and_have_times_of_their_own(dit, monkeypatch):
    """A prompt may end anywhere. Times are of the distribution that the sampler follows."""
    drawn = []

    def remember(dit, batch, z_0, context, noise, n_guess):
        drawn.append(noise)
        assert n_guess == 2, "half of the rows"
        return [None]

    monkeypatch.setattr(cola, "block_denoising_loss", remember)
    for seed in range(300):
        block_flow_loss(dit, batch_of_texts(), torch.randn(4, N, C), generator(seed))
    assert {int((noise.block == 0).sum()) for noise in drawn} == {1, 2, 3}
    assert all((noise.block.diff() >= 0).all() for noise in drawn)
    t = torch.cat([noise.t for noise in drawn])
    u = torch.linspace(0, 1, 101)[5:96]
    assert torch.allclose(t.flatten().quantile(u), dit.times(u), atol=0.03)
    assert t.T.corrcoef().fill_diagonal_(0).abs().max() < 0.15
    eps = torch.stack([noise.eps for noise in drawn])
    assert eps.std() == pytest.approx(1, abs=0.02)


def test_the_evaluation_compares_with_contexts_of_rows_that_are_long_enough(vae, dit, monkeypatch):
    """Rows have 12, 11, 10 and 12 tokens. That of the second is from the middle of a text."""
    batch = batch_of_texts()
    batch.weight[1, :b] = 0
    monkeypatch.setattr(cola, "block_denoising_loss", lambda *given, n_guess: given[3])
    evaluation = BlockEvaluation(batch, C, None)
    denoise_at = evaluation.denoiser(vae, dit)
    z = vae.latents(batch.tokens, batch.segment)
    for is_shuffled, rows in ((False, [0, 1, 2, 3]), (True, [3, 3, 3, 0])):
        context = denoise_at(torch.tensor(0.5), is_shuffled)
        assert torch.allclose(context, z[rows], atol=1e-5)
    assert evaluation.cuts == [6, 5, 5, 6]


def test_a_corpus_of_blocks_marks_rows_from_the_middle_and_no_others(home):
    corpus = BlockCorpus(home / "data", "train", 8)
    corpus.latent_block = b
    rows = corpus.batch(np.random.default_rng(0), 200, 12)
    begins = {tuple(corpus.tokens[i : i + 4]) for i in [0, *corpus.ends[:-1]]}
    is_begin = torch.tensor([tuple(row[:4]) in begins for row in rows.tokens.tolist()])
    is_end = (rows.tokens == corpus.eot).long()
    expected = torch.where(is_end.cumsum(1) > is_end, TAIL_WEIGHT, 1.0)
    expected[~is_begin, :b] = 0
    assert 0 < is_begin.sum() < 200
    assert torch.equal(rows.weight, expected)
    assert (rows.segment == TARGET).all()


# ---- The sampler ---------------------------------------------------------------------------------


def test_a_prompt_is_read_as_in_training(vae, dit):
    tokens = torch.randint(1, V - 1, (1, 7 + b))
    t = torch.tensor([[0.4]])
    place, z, segment = first_block(vae, dit, [tokens[0, :7].tolist()], Sampling(cfg_scale=1.0))
    found = place(z, segment, t[0], torch.zeros_like(z), None)
    clean = vae.latents(tokens, all_target(1, 10))
    eps = torch.zeros_like(clean)
    eps[:, 7:] = (z - 0.6 * clean[:, 7:]) / 0.4
    block = torch.tensor([0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    batch = same_rows(example_batch(1, 10), tokens=tokens, segment=all_target(1, 10))
    noise = Noise(block, t.expand(1, 4), eps)
    _, _, h, _, _ = block_denoising_loss(dit, batch, clean, clean, noise)
    assert torch.allclose(found[0], h[7:], atol=1e-4)


def test_guidance_is_against_latents_that_are_zero(vae, dit):
    def estimate(scale):
        sampling = Sampling(cfg_scale=scale, seed=[1, 2])
        place, z, segment = first_block(vae, dit, [[1, 2, 3], [4]], sampling)
        return guided_estimate(place, z, torch.tensor(0.4), 0 * z, segment, sampling)

    given, guided = estimate(1.0), estimate(3.0)
    vae.latents = lambda tokens, segment: torch.zeros(*tokens.shape, C)
    nothing = estimate(1.0)
    assert not torch.allclose(given, nothing, atol=0.01)
    assert torch.allclose(guided, nothing + 3 * (given - nothing), atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("n_blocks, n_layer", [(4, 2), (13, 1)])
def test_a_document_goes_on_as_if_it_were_the_prompt(vae, monkeypatch, scale, n_blocks, n_layer):
    """What is kept is what reading the document again gives. Beyond the window this is exact if
    neither network has keys that know of older ones."""
    dit = make_cola_dit(n_layer=n_layer)
    if n_layer == 1:
        vae.latents = lambda tokens, segment: vae.wte(tokens)[..., :C]
    z, guess = torch.randn(2, 3, b, C)
    found = []

    def denoise(place, noise, segment, sampling):
        assert len(noise.unique(dim=0)) == 3, "each row has its own"
        found.append(guided_estimate(place, z, torch.tensor(0.4), guess, segment, sampling))
        return z

    monkeypatch.setattr(cola, "denoise", denoise)
    read = vae.decode

    def decode(latents, segment):
        found.append(read(latents, segment)[:, -b:])
        return F.one_hot(F.pad(written, (latents.shape[1] - b, 0)), V)

    vae.decode, vae.to_logits = decode, torch.nn.Identity()
    documents = [[1, 2, 3], [8, 9], []]
    sampling = Sampling(cfg_scale=scale)
    growing = Texts(vae, dit, documents, sampling)
    for i in range(n_blocks):
        written = torch.randint(1, V - 1, (3, b))
        if i < 3:
            written[i, i] = EOT
        for texts in (growing, Texts(vae, dit, documents, sampling)):
            assert torch.equal(texts.next_block(), written)
        estimate, x, estimate_again, x_again = found[-4:]
        assert torch.allclose(estimate, estimate_again, atol=1e-4)
        assert torch.allclose(x, x_again, atol=1e-3)
        for row, block in enumerate(written.tolist()):
            documents[row] = [] if EOT in block else documents[row] + block


PLAN = torch.tensor([[[1, 2, 3]], [[4, EOT, 5]], [[6, 7, 8]], [[9, 9, 9]]])


@pytest.mark.parametrize(
    "prompt, length, text",
    [
        ([1], 0, [1, 2, 3, 4, EOT]),
        ([1] * 8, 0, [1, 2, 3, 4]),  # the row is full
        ([1], 7, [1, 2, 3, 4, EOT, 6, 7]),  # one document after another
    ],
)
def test_blocks_stop_at_the_end_of_text_or_go_on_as_asked(vae, dit, prompt, length, text):
    seen = []
    vae.to_tokens = lambda z, segment: F.pad(PLAN[len(seen)], (z.shape[1] - b, 0))
    sampling, show = Sampling(steps=1), lambda t, texts: seen.append(list(texts[0]))
    assert continue_in_blocks(vae, dit, [prompt], length, sampling, show) == [text]
    assert (seen[0], seen[-1]) == ([1, 2, 3], text)


# ---- The scripts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks(home, tmp_path_factory):
    """A causal VAE and a DiT of blocks, made by the script itself."""
    folder = tmp_path_factory.mktemp("blocks")
    teacher = f"--teacher={home / 'out/gpt.pt'}"
    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        train(home, "variants/cola_dlm.py vae", f"--out={folder}", teacher)
        train(home, "variants/cola_dlm.py dit", f"--out={folder}", "--latent_block=4")
    return folder


def test_the_script_tells_the_corpus_how_long_a_block_is(home, blocks):
    options = [*training_options(home), f"--out={blocks}", "--latent_block=2"]
    stage, *_ = stage_of("variants/cola_dlm.py", "dit", *options)
    assert stage.corpus.latent_block == 2


def test_a_long_text_is_sampled_by_blocks(blocks, capsys):
    lengths = []
    for length in (5, 100):
        options = ["--out", blocks, "--prompt=ab", "--steps=2", "--device=cpu"]
        script("sample.py", *options, f"--length={length}")
        lengths.append(len(capsys.readouterr().out))
    assert lengths[0] < lengths[1]


DIT = ["variants/cola_dlm.py", "dit"]
CAUSAL = "holds a causal_vae, where a vae is needed"
BOTH_WAYS = "holds a vae, where a causal_vae is needed"


@pytest.mark.parametrize(
    "words, command",
    [
        (BOTH_WAYS, [*DIT, "--vae={home}/out/vae.pt"]),
        (BOTH_WAYS, ["sample.py", "--vae={home}/out/vae.pt"]),
        (CAUSAL, ["train_dit.py"]),
        ("more than half of a row", [*DIT, "--latent_block=999"]),
        ("--recompute is for", [*DIT, "--recompute"]),
        ("name the stage", ["variants/cola_dlm.py", "gpt"]),
    ],
)
def test_what_does_not_fit_is_refused(home, blocks, capsys, words, command):
    path, *more = [part.format(home=home) for part in command]
    options = [f"--out={blocks}"]
    if path != "sample.py":
        options = [*training_options(home), *options]
    refuse(capsys, words, path, *more[:1], *options, *more[1:], keep=blocks)

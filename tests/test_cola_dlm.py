"""Properties of variants/cola_dlm.py: text in blocks, each given all before it."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import variants.cola_dlm

from test_textldm import EOT, C, N, V, all_target, example_batch, generator
from test_textldm import make_dit, make_vae, same_rows
from tests.helpers import refuse, script, train, training_options, write_jsonl
from textldm import CONTEXT, TARGET, Batch, Sampling, same_segment
from variants.cola_dlm import (
    BlockCorpus,
    CausalVAE,
    ColaConfig,
    ColaDiT,
    Layout,
    Noise,
    block_denoising_loss,
    block_flow_loss,
    continue_in_blocks,
    who_sees_whom,
)

b = 3  # tokens in a block


@pytest.fixture
def vae():
    return make_vae(CausalVAE)


@pytest.fixture
def dit():
    return make_dit(ColaDiT, ColaConfig, latent_block=b)


@pytest.fixture(scope="module")
def blocks(home, tmp_path_factory):
    """A causal VAE and a DiT of blocks, made by the script itself."""
    folder = tmp_path_factory.mktemp("blocks")
    train_vae(home, folder)
    train_dit(home, folder)
    return folder


def train_vae(home, folder, *more):
    teacher = f"--teacher={home / 'out/gpt.pt'}"
    train(home, "variants/cola_dlm.py vae", f"--out={folder}", teacher, *more)


def train_dit(home, folder, *more):
    train(home, "variants/cola_dlm.py dit", f"--out={folder}", "--latent_block=4", *more)


def batch_of_texts():
    """Rows that are all target."""
    return same_rows(example_batch(), segment=all_target(4))


# ---- Who sees whom -------------------------------------------------------------------------------


def test_a_block_sees_the_clean_ones_before_it_and_itself(dit):
    """By gradients, over every pair of blocks."""
    batch = batch_of_texts()
    block = (torch.arange(N) + 2) // b
    M = int(block[-1]) + 1
    z_0 = torch.randn(4, N, C)
    context = torch.randn(4, N, C, requires_grad=True)
    eps = torch.randn(4, N, C, requires_grad=True)
    noise = Noise(block, torch.rand(4, M), eps)
    _, output, _, _ = block_denoising_loss(dit, batch, z_0, context, noise)
    output = output.view(4, N, -1)
    for i in range(M):
        of_block = output[:, block == i].sum()
        of_context, of_noise = torch.autograd.grad(of_block, (context, eps), retain_graph=True)
        for j in range(M):
            is_j = block == j
            assert (of_context[:, is_j] != 0).any() == (j < i), (i, j)
            assert (of_noise[:, is_j] != 0).any() == (j == i), (i, j)


def test_the_guess_of_a_first_pass_tells_a_block_of_nothing_else(dit):
    """By change, over every pair of blocks, where a first pass is told to the second."""
    batch = batch_of_texts()
    block = (torch.arange(N) + 2) // b
    M = int(block[-1]) + 1
    z_0, context, eps = torch.randn(3, 4, N, C)
    t = torch.rand(4, M)

    def run(context, eps):
        noise = Noise(block, t, eps)
        _, output, _, _ = block_denoising_loss(dit, batch, z_0, context, noise, n_guess=4)
        return output.detach().view(4, N, -1)

    told = run(context, eps)
    for j in range(M):
        change = torch.where((block == j)[:, None], torch.randn(4, N, C), 0.0)
        by_context = (run(context + change, eps) - told).abs().amax(dim=(0, 2)) > 1e-5
        by_noise = (run(context, eps + change) - told).abs().amax(dim=(0, 2)) > 1e-5
        assert torch.equal(by_context, block > j)
        assert torch.equal(by_noise, block == j)


def test_the_vae_of_blocks_looks_back_only_and_all_the_way(vae):
    tokens = torch.randint(1, V - 1, (1, N))
    segment = all_target(1)
    embedded = vae.wte(tokens).detach().requires_grad_()
    z = torch.randn(1, N, C, requires_grad=True)

    def embed(tokens):
        return embedded

    vae.wte.forward = embed
    mu, _, _ = vae.posterior(tokens, segment)
    logits = vae.decode(z, segment)
    for x, y in ((embedded, mu), (z, logits)):
        seen = []
        for i in range(N):
            (gradient,) = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)
            seen.append(gradient[0].abs().sum(-1) > 0)
        assert torch.equal(torch.stack(seen), torch.ones(N, N).tril().bool())


# ---- The loss ------------------------------------------------------------------------------------


def passes_of(dit, batch, z_0, noise, n_guess=0):
    """What a denoising loss gives to the network, as tuples of arguments and a dict of options."""
    real = dit.forward
    seen = []

    def forward(x, segment, t, guess, layout, places=None):
        told = None if guess is None else guess.clone()
        seen.append(((x, segment, t, told, layout), dict(places=places)))
        return real(x, segment, t, guess, layout, places)

    dit.forward = forward
    block_denoising_loss(dit, batch, z_0, z_0, noise, n_guess)
    dit.forward = real
    return seen


def test_each_block_has_its_time_and_all_is_clean_before_it(dit):
    z_0, eps = torch.randn(2, 4, N, C)
    block = (torch.arange(N) + 1) // b
    t = torch.rand(4, 5)
    ((given, options),) = passes_of(dit, batch_of_texts(), z_0, Noise(block, t, eps))
    x, segment, times, guess, layout = given
    t_of = times[:, layout.time_index]
    assert not t_of[:, :N].any()
    assert torch.equal(x[:, :N], z_0)
    assert torch.equal(t_of[:, N:], t[:, block])
    assert torch.allclose(x[:, N:], z_0 + t_of[:, N:, None] * (eps - z_0), atol=1e-6)
    turn = dit.turn(torch.arange(N).repeat(2))
    assert all(map(torch.equal, layout.turn, turn))
    noisy = torch.arange(4 * 2 * N).view(4, 2 * N)[:, N:]
    assert torch.equal(options["places"].view(4, N), noisy)


def test_another_time_of_a_block_changes_that_block_alone(dit):
    z_0, eps = torch.randn(2, 4, N, C)
    block = (torch.arange(N) + 1) // b
    ((given, options),) = passes_of(dit, batch_of_texts(), z_0, Noise(block, torch.rand(4, 5), eps))
    x, segment, t, guess, layout = given
    other = t.clone()
    other[:, 2] += 0.3  # the first one is of the clean tokens
    change = dit(x, segment, other, guess, layout, **options) - dit(*given, **options)
    is_changed = change.view(4, N, -1).abs().amax(dim=(0, 2)) > 1e-6
    assert torch.equal(is_changed, block == 1)


def test_self_conditioning_tells_some_rows_what_a_first_pass_estimated(dit):
    z_0, eps = torch.randn(2, 4, N, C)
    noise = Noise(torch.arange(N) // b, torch.rand(4, 4), eps)
    seen = passes_of(dit, batch_of_texts(), z_0, noise, n_guess=2)
    (_, _, _, first, _), _ = seen[0]
    (x, segment, t, guess, layout), _ = seen[1]
    untold = dit(x, segment, t, torch.zeros_like(x), layout)
    estimate = dit.estimate(untold, x, None)
    assert first is None
    assert torch.allclose(guess[:2, N:], estimate[:2, N:], atol=1e-5)
    assert not guess[2:].any()
    assert not guess.requires_grad
    told = dit(x, segment, t, guess, layout)
    assert not torch.allclose(told[:2, N:], untold[:2, N:], atol=1e-3)


def test_blocks_of_training_begin_anywhere(dit, monkeypatch):
    """In sampling they are counted from the end of a prompt, so the first one may be short."""
    first = []

    def remember(dit, batch, z_0, context, noise, n_guess):
        first.append(int((noise.block == 0).sum()))
        return torch.zeros(4 * N), None, None, None

    monkeypatch.setattr(variants.cola_dlm, "block_denoising_loss", remember)
    for seed in range(40):
        block_flow_loss(dit, batch_of_texts(), torch.randn(4, N, C), generator(seed))
    assert set(first) == set(range(1, b + 1))


def test_the_times_of_a_row_are_drawn_apart(dit):
    """And each of them is of the distribution that the sampler follows."""
    drawn = []
    real = dit.forward

    def forward(x, segment, t, guess, layout, places=None):
        drawn.append(t[:, 1:])
        return real(x, segment, t, guess, layout, places)

    dit.forward = forward
    with torch.no_grad():
        for seed in range(200):
            z_0 = torch.randn(4, N, C)
            block_flow_loss(dit, batch_of_texts(), z_0, generator(seed))
    t = torch.cat(drawn[1::2])  # the first pass of each loss is that for the guess
    u = torch.linspace(0, 1, 101)[5:96]
    assert torch.allclose(t.flatten().quantile(u), dit.times(u), atol=0.03)
    assert t.T.corrcoef().fill_diagonal_(0).abs().max() < 0.2


def test_a_dropped_context_is_zero_and_the_noisy_blocks_are_as_ever(dit):
    batch = batch_of_texts()
    z_0 = torch.randn(4, N, C)
    real = dit.forward
    given = []

    def forward(x, *more, **options):
        given.append(x)
        return real(x, *more, **options)

    dit.forward = forward
    noisy = []
    for drop in (0.0, 1.0):
        dit.config.context_drop = drop
        block_flow_loss(dit, batch, z_0, generator(0))
        assert torch.equal(given[-1][:, :N], z_0 * (1 - drop))
        noisy.append(given[-1][:, N:])
    assert torch.equal(*noisy)


def test_a_corpus_of_blocks_marks_rows_from_the_middle_and_no_others(tmp_path):
    texts = []
    for i in range(40):
        texts.append(" ".join(f"{i}{j}" for j in range(30)))
    write_jsonl(tmp_path / "docs.jsonl", texts)
    options = ["--encoding=bpe", "--vocab_size=300", "--layout=documents", "--val_fraction=0.2"]
    script("data/prepare.py", tmp_path / "docs.jsonl", "--out", tmp_path / "data", *options)
    corpus = BlockCorpus(tmp_path / "data", "train", 16)
    corpus.latent_block = 3
    rows = corpus.batch(np.random.default_rng(0), 200, 16)
    begins = {tuple(corpus.tokens[i : i + 16]) for i in [0, *corpus.ends[:-1]]}
    is_begin = [tuple(row) in begins for row in rows.tokens.tolist()]
    assert is_begin == (rows.weight[:, 0] == 1).tolist()
    assert 0 < sum(is_begin) < 200
    assert (rows.weight[:, 3:] == 1).all()
    assert (rows.weight[:, :3] == rows.weight[:, :1]).all()
    assert (rows.segment == TARGET).all()


def test_no_step_waits_for_a_gpu(vae, dit, monkeypatch):
    """On the meta device, whose tensors have no values."""

    def no_autocast(*_, **__):  # autocast does not know the device
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", no_autocast)
    vae, dit = vae.to("meta"), dit.to("meta")
    batch = Batch(*[x.to("meta") for x in batch_of_texts()])
    z_0 = vae.latents(batch.tokens, batch.segment)
    block_flow_loss(dit, batch, z_0, torch.Generator()).backward()


def test_every_parameter_learns_in_bf16(dit):
    with torch.autocast("cpu", torch.bfloat16):
        z_0 = torch.randn(4, N, C)
        block_flow_loss(dit, batch_of_texts(), z_0, generator(0)).backward()
    for name, p in dit.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_one_block_of_one_time_is_the_dit_of_textldm(dit):
    """With everything in one block, the pass over the noisy half is TextDiT's."""
    plain = make_dit()
    state = plain.state_dict()
    dit.load_state_dict(state)
    x, guess = torch.randn(2, 4, N, C)
    t = torch.rand(4)
    place = torch.arange(N)
    layout = Layout(dit.turn(place), torch.ones(N, N).bool(), torch.zeros(N, dtype=torch.long))
    expected = plain(x, all_target(4), t, guess)
    output = dit(x, all_target(4), t[:, None], guess, layout)
    assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4)


# ---- The sampler ---------------------------------------------------------------------------------


class Rereading(ColaDiT):
    """Checks the output for each noisy block against one pass, with the mask of training, over all
    that was ever read and the block."""

    def begin(self, prompts):
        self.P = max(len(prompt) for prompt in prompts)
        self.past = []  # latents, as they are read
        self.kept = []  # numbers of tokens in the history
        self.checked = 0
        self.document = torch.full((len(prompts), self.P), -1)  # of each token
        for row, prompt in zip(self.document, prompts):
            row[self.P - len(prompt) :] = 0
        self.now = torch.zeros(len(prompts), 1, dtype=torch.long)  # the document of the next block

    def forward(self, x, segment, t, guess, layout, places=None):
        output = super().forward(x, segment, t, guess, layout, places)
        if segment[0, 0] == CONTEXT:
            self.past.append(x)
            self.kept.append(layout.history.layers[0][0].shape[2])
            return output
        assert torch.allclose(output, self.in_one_pass(x, t, guess), atol=1e-4)
        self.checked += 1
        return output

    def in_one_pass(self, x, t, guess):
        past = torch.cat(self.past, dim=1)  # (B, L, C)
        B, L, _ = past.shape
        place = torch.arange(L + b)
        kind = (place >= L).long()  # CONTEXT, then TARGET
        block = (place - self.P) // b  # those of prompts are negative
        block_end = (self.P + (block + 1) * b).clamp(min=self.P)
        is_near = place >= block_end[:, None] - N
        document = torch.cat((self.document, self.now.expand(-1, b)), dim=1)
        document = document.repeat(B // len(document), 1)  # guidance has twice the rows
        mask = who_sees_whom(kind, block) & same_segment(document) & is_near
        layout = Layout(turn=self.turn(place), mask=mask, time_index=kind)
        times = F.pad(t, (1, 0))  # the past is clean
        whole = torch.cat((past, x), dim=1)
        guess = F.pad(guess, (0, 0, L, 0))
        output = super().forward(whole, kind.expand(B, -1), times, guess, layout)
        return output[:, L:]

    def take(self, tokens):
        """Takes note of a written block (B, b)."""
        self.document = torch.cat((self.document, self.now.expand(-1, b)), dim=1)
        self.now = self.now + (tokens == EOT).any(dim=1, keepdim=True)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_what_is_kept_of_the_history_is_what_reading_it_again_would_give(vae, scale):
    """Over several documents and rows."""
    dit = make_dit(Rereading, ColaConfig, latent_block=b)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9], []]
    dit.begin(prompts)
    read = vae.to_tokens
    luck = generator(5)

    def to_tokens(z, segment):
        is_end = torch.rand(segment.shape, generator=luck) < 0.05
        tokens = read(z, segment).masked_fill(is_end, EOT)
        dit.take(tokens[:, -b:])
        return tokens

    vae.to_tokens = to_tokens
    sampling = Sampling(steps=3, cfg_scale=scale, temperature=1.0)
    continue_in_blocks(vae, dit, prompts, 13 * b, sampling)
    assert dit.checked >= 13 * 3
    assert dit.now.min() > 0, "each row has ended a document"
    assert max(dit.kept) <= N - b < 7 + 13 * b
    for x in dit.past:
        assert x[:3].any()
        assert not x[3:].any(), "guidance is against no history"


SAMPLING = Sampling(steps=3, cfg_scale=3.0, temperature=0.7, seed=3)


def test_blocks_stop_at_the_end_of_text_or_of_a_row(vae, dit):
    prompts = [[1, 2, 3], [4], []]
    texts = continue_in_blocks(vae, dit, prompts, 0, SAMPLING)
    for text, prompt in zip(texts, prompts):
        assert EOT not in text[:-1]
        assert text[-1] == EOT or len(text) == N - len(prompt)


def test_blocks_do_not_depend_on_neighbours(vae, dit):
    texts = continue_in_blocks(vae, dit, [[1, 2, 3], [4], []], 0, SAMPLING)
    beside_others = continue_in_blocks(vae, dit, [[5, 6, 7, 8, 9], [4]], 0, SAMPLING)
    assert beside_others[1] == texts[1]


def test_blocks_go_on_as_long_as_is_asked(vae, dit):
    seen = []

    def callback(t, texts):
        seen.append(list(texts[0]))

    short = continue_in_blocks(vae, dit, [[1, 2, 3]], 0, SAMPLING)[0]
    long = continue_in_blocks(vae, dit, [[1, 2, 3]], 50, SAMPLING, callback)[0]
    assert len(long) == 50
    assert long[: len(short)] == short
    assert len(seen) > 15
    for text, longer in zip(seen, seen[1:]):
        assert longer[: len(text)] == text, "what was shown never changes"


def test_the_seed_chooses_the_text_of_blocks(vae, dit):
    texts = set()
    for seed in (1, 2, 1):
        sampling = Sampling(steps=3, cfg_scale=1.0, seed=seed)
        texts.add(tuple(continue_in_blocks(vae, dit, [[]], 20, sampling)[0]))
    assert len(texts) == 2


# ---- The scripts ---------------------------------------------------------------------------------


def test_a_long_text_is_sampled_by_blocks(blocks, capsys):
    def sample(*more):
        options = ["--out", blocks, "--prompt=ab", "--steps=2", "--device=cpu"]
        script("sample.py", *options, *more)
        return capsys.readouterr().out

    text = sample("--length=100")
    assert text.startswith("ab|")
    assert text == sample("--length=100")
    assert len(text) > len(sample("--length=5"))


def test_another_kind_of_vae_is_refused(home, blocks, capsys):
    options = [*training_options(home), f"--out={blocks}"]
    both_ways = f"--vae={home / 'out/vae.pt'}"
    words = "holds a vae, where a causal_vae is needed"
    refuse(capsys, words, "variants/cola_dlm.py", "dit", *options, both_ways, keep=blocks)
    refuse(capsys, words, "sample.py", "--out", blocks, both_ways, keep=blocks)
    words = "holds a causal_vae, where a vae is needed"
    refuse(capsys, words, "train_dit.py", *options, keep=blocks)


def test_a_stage_must_be_named(capsys):
    for stage in ([], ["gpt"]):
        refuse(capsys, "name the stage", "variants/cola_dlm.py", *stage)


def test_a_block_longer_than_half_of_a_row_is_refused(home, blocks, capsys):
    options = [*training_options(home), f"--out={blocks}", "--latent_block=999"]
    words = "more than half of a row"
    refuse(capsys, words, "variants/cola_dlm.py", "dit", *options, keep=blocks)

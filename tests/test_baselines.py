"""Properties of baselines/, of the GPTs that are loaded, of presets and of statistics."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

import baselines.gpt
import train_dit
from baselines.gpt import generate, gpt_loss
from baselines.masked import MaskedLM, masked_loss, unmask
from engine.checkpoint import build, load_gpt_state
from engine.corpus import GPT2
from engine.config import DIT_PRESETS, VAE_PRESETS, TrainConfig
from engine.train import Run
from test_textldm import (
    EOT,
    SMALL,
    N,
    V,
    example_batch,
    generator,
    make_gpt,
    make_vae,
    randomise,
    same_rows,
)
from tests.helpers import train
from textldm import (
    CONTEXT,
    GPT,
    OURS,
    PADDING,
    TARGET,
    Batch,
    DiTConfig,
    Sampling,
    TextDiT,
    TextVAE,
    TransformerConfig,
    VAEConfig,
    rows_of,
)


def run_and_corpus(home, path, *more):
    """The engine.train.Run of a training script, and the corpus that it draws from."""
    found = []
    real = Run.draw

    def draw(self, step):
        found.append((self, self.corpus))
        return real(self, step)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Run, "draw", draw)
        train(home, path, *more, steps=1)
    return found[0]


# ---- The GPT: how it writes, and what it learns --------------------------------------------------


def test_texts_of_the_gpt_stop_at_the_end_of_text_or_at_their_length():
    gpt = make_gpt(block_size=N)
    texts = generate(gpt, [[1, 2], []] * 10, 30)  # longer than block_size: the window slides
    for text in texts:
        assert EOT not in text[:-1]
        assert len(text) == 30 or text[-1] == EOT
    assert {len(text) == 30 for text in texts} == {True, False}


def test_without_a_length_the_gpt_fills_the_row():
    gpt = make_gpt(block_size=N)
    gpt.ln_f.weight.data.zero_()
    gpt.ln_f.bias.data = gpt.wte.weight[7] * 100  # always the same token
    texts = generate(gpt, [[1, 2], []], 0, temperature=0)
    # The end-of-text token that is read first takes a place.
    assert [len(text) for text in texts] == [N - 3, N - 1]


def test_the_seed_chooses_the_texts_of_the_gpt():
    gpt = make_gpt(block_size=N)
    prompts = [[1, 2], []] * 10
    texts = generate(gpt, prompts, 30)
    assert texts == generate(gpt, prompts, 30)
    assert texts != generate(gpt, prompts, 30, seed=1)


def test_texts_of_the_gpt_do_not_depend_on_neighbours():
    gpt = make_gpt(block_size=N)
    prompts = [[1, 2], [3], [4, 5, 6, 7]]
    others = [[8, 9, 10, 11, 12], [3], []]
    assert generate(gpt, prompts, 20)[1] == generate(gpt, others, 20)[1]


def test_the_gpt_draws_each_token_as_often_as_it_says():
    """And with top_p none but the likeliest that together have that probability."""
    gpt = make_gpt(block_size=N)
    p = gpt(torch.tensor([[EOT, 1]]))[0, 1].softmax(-1)
    n = 4000
    texts = generate(gpt, [[1]] * n, 1)
    frequency = torch.tensor(texts).flatten().bincount(minlength=V) / n
    assert (frequency - p).abs().max() < 0.03
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]  # the probability of likelier tokens
    nucleus = set(order[before < 0.5].tolist())
    assert 1 < len(nucleus) < V
    drawn = {text[0] for text in generate(gpt, [[1]] * n, 1, top_p=0.5)}
    assert drawn == nucleus
    greedy = generate(gpt, [[1]], 1, temperature=0)
    assert greedy == [[p.argmax().item()]]


def test_the_gpt_learns_counted_tokens_from_those_before_them():
    gpt = make_gpt()
    batch = example_batch(8)
    assert not batch.counted.all()
    other_tails = same_rows(batch, tokens=torch.where(batch.counted, batch.tokens, 3))
    seen = torch.cat((torch.full((8, 1), EOT), batch.tokens[:, :-1]), dim=1)
    log_p = gpt(seen).log_softmax(-1)
    nll = -log_p.gather(-1, batch.tokens[..., None])[..., 0]
    expected = nll[batch.counted].mean().item()
    assert gpt_loss(gpt, batch).item() == pytest.approx(expected, rel=1e-5)
    assert gpt_loss(gpt, other_tails).item() == pytest.approx(expected, rel=1e-5)


def test_the_teacher_was_trained_at_every_position_that_it_reads_for_the_vae(home, tmp_path):
    options = ["--block_size=16", f"--out={tmp_path}"]
    gpt_run, corpus = run_and_corpus(home, "baselines/gpt.py", *options)
    teacher = f"--teacher={home / 'out/gpt.pt'}"
    _, corpus_of_vae = run_and_corpus(home, "train_vae.py", *options, teacher)
    gpt = gpt_run.stage.model
    gpt.zero_grad()
    batch = corpus.batch(np.random.default_rng(0), 200, corpus.N)
    gpt_loss(gpt, batch).backward()
    trained = gpt.wpe.weight.grad.abs().sum(1).count_nonzero()
    assert trained == corpus_of_vae.N + 1 == gpt.config.block_size


def test_no_loss_of_a_baseline_waits_for_a_gpu():
    """On the meta device, whose tensors have no values."""
    batch = Batch(*[x.to("meta") for x in example_batch()])
    gpt_loss(make_gpt().to("meta"), batch).backward()
    model = MaskedLM(TransformerConfig(**SMALL)).to("meta")
    masked_loss(model, batch, None).backward()


# ---- GPTs in Hugging Face's layout ---------------------------------------------------------------


def load_gpt(source):
    return build(GPT, TransformerConfig, load_gpt_state(source))


def test_gpt_loads_hugging_face_layout(tmp_path):
    gpt = make_gpt(n_layer=3, n_head=4, n_embd=32, block_size=20, vocab_size=50257)
    state = {}
    for name, tensor in gpt.state_dict().items():
        is_transposed = ".c_" in name and tensor.dim() == 2
        state[f"transformer.{name}"] = tensor.T.contiguous() if is_transposed else tensor
    state["lm_head.weight"] = gpt.wte.weight
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 20, 20)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"n_head": 4}')
    tokens = torch.randint(0, 50257, (2, 20))
    assert torch.equal(load_gpt(tmp_path)(tokens), gpt(tokens))
    assert load_gpt_state(tmp_path)["tokenizer"] == GPT2


def test_gpt_equals_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=4, n_head=4, n_embd=64, n_positions=48, initializer_range=0.2
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)  # model.safetensors
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    tokens = torch.randint(0, 50257, (3, 48))
    tokens[:, 0] = 50256  # the end-of-text token, after which ours writes
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
        for source in (tmp_path, tmp_path / "pytorch_model.bin"):
            ours = load_gpt(source)
            difference = (ours(tokens) - expected.logits).abs().max()
            assert difference < 1e-4 * expected.logits.abs().max()
            hidden = ours.hidden_states(tokens, 2)
            assert torch.allclose(hidden, expected.hidden_states[2], atol=1e-3)

    prompt = tokens[:1, :5]
    greedy = theirs.generate(
        prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=50256
    )
    (text,) = generate(ours, [prompt[0, 1:].tolist()], 20, temperature=0)
    assert len(text) > 5
    assert text == greedy[0, 5:].tolist()


# ---- Masked diffusion ----------------------------------------------------------------------------


def test_masked_diffusion_counts_every_token_once():
    """The loss is a bound. A model that knows nothing is charged log V for each target token."""
    segment = (torch.arange(N) >= 3).long().repeat(400, 1)
    batch = same_rows(example_batch(400), segment=segment)
    masks = []

    def know_nothing(tokens, is_masked):
        masks.append(is_masked)
        return torch.zeros(*tokens.shape, V)

    losses = []
    for seed in range(40):
        losses.append(masked_loss(know_nothing, batch, generator(seed)).item())
    assert np.mean(losses) == pytest.approx(math.log(V), rel=0.03)
    for is_masked in masks:
        assert not (is_masked & (batch.segment == CONTEXT)).any()


def test_masked_diffusion_cannot_see_what_it_is_to_tell():
    model = randomise(MaskedLM(TransformerConfig(**SMALL)))
    batch = example_batch()
    is_masked = (batch.segment == TARGET) & (torch.rand(4, N) < 0.5)
    other = torch.where(is_masked, (batch.tokens + 7) % V, batch.tokens)
    assert torch.equal(model(batch.tokens, is_masked), model(other, is_masked))
    seen = torch.where(is_masked, batch.tokens, (batch.tokens + 7) % V)
    assert not torch.allclose(model(batch.tokens, is_masked), model(seen, is_masked))


def test_masked_diffusion_hides_padding():
    model = randomise(MaskedLM(TransformerConfig(**SMALL)))
    tokens, segment = rows_of([[1, 2], [3, 4, 5, 6]], 3, N, EOT)
    mask = (segment != PADDING)[:, None, None]
    logits = model(tokens, segment == TARGET, mask)
    alone = model(tokens[:1, :5], segment[:1, :5] == TARGET)
    assert torch.allclose(logits[0, :5], alone[0], atol=1e-4)


def test_masked_diffusion_draws_what_the_model_says():
    model = MaskedLM(TransformerConfig(**SMALL))
    p = torch.rand(V) + 1e-3
    p[EOT] = 0
    p /= p.sum()
    model.to_logits.weight.data.zero_()
    model.to_logits.bias.data = p.log().clamp(min=-99)
    sampling = Sampling(steps=5, cfg_scale=1.0, temperature=1.0)
    texts = unmask(model, [[1, 2, 3]] * 1500, 0, sampling)
    for text in texts:
        assert len(text) == N - 3
    frequency = torch.tensor(texts).flatten().bincount(minlength=V) / (1500 * (N - 3))
    assert (frequency - p).abs().max() < 0.02


def test_at_temperature_0_masked_diffusion_writes_the_likeliest_tokens():
    model = MaskedLM(TransformerConfig(**SMALL))
    scores = torch.rand(V).log()

    def forward(tokens, is_masked, mask):
        of_seen = torch.nn.functional.one_hot(tokens, V) * 99.0  # another step would keep them
        return torch.where(is_masked[..., None], scores, of_seen)

    model.forward = forward
    texts = unmask(model, [[1, 2]], 3, Sampling(steps=4, temperature=0.0))
    assert texts == [[scores.argmax().item()] * 3]


def test_the_seed_chooses_the_texts_of_masked_diffusion():
    model = randomise(MaskedLM(TransformerConfig(**SMALL)))
    prompts = [[1, 2], [3]]
    sampling = Sampling(steps=3, seed=1)
    texts = unmask(model, prompts, 6, sampling)
    assert texts == unmask(model, prompts, 6, sampling)
    assert texts != unmask(model, prompts, 6, Sampling(steps=3, seed=2))


# ---- Presets and the recipe ----------------------------------------------------------------------


def on_meta(model_type, config_type, preset, **options):
    """A model of a preset, of no memory, without our departures from the paper."""
    names = {f.name for f in fields(config_type)}
    sizes = {k: v for k, v in preset.items() if k in names}
    with torch.device("meta"):
        return model_type(config_type(**{"vocab_size": 10, **sizes, **options}))


def millions_in(*modules):
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


@pytest.mark.parametrize("size, millions", [("small", 114), ("medium", 328), ("large", 768)])
def test_presets_have_the_papers_sizes(size, millions):
    dit = on_meta(TextDiT, DiTConfig, DIT_PRESETS[size], channels=64)
    assert millions_in(dit) == pytest.approx(millions, rel=0.02)
    vae = on_meta(TextVAE, VAEConfig, VAE_PRESETS[size])
    assert millions_in(vae.encoder, vae.decoder) == pytest.approx(127, rel=0.02)
    assert vae.config.channels == 64


@pytest.mark.parametrize("size, millions", [("small", 124), ("medium", 355), ("large", 774)])
def test_presets_of_the_gpt_have_gpt2s_sizes(size, millions):
    preset = baselines.gpt.PRESETS[size]
    gpt = on_meta(GPT, TransformerConfig, preset, vocab_size=50257)
    assert millions_in(gpt) == pytest.approx(millions, rel=0.01)


def test_each_key_of_our_recipe_is_an_option_that_the_paper_has_otherwise():
    options = {}
    for config_type in (VAEConfig, DiTConfig, TrainConfig, train_dit.DiTStage):
        options |= {f.name: f.default for f in fields(config_type) if f.metadata}
    for name, value in OURS.items():
        assert type(options[name]) is type(value), name
        assert options[name] != value, name


def test_masked_diffusion_reveals_an_equal_share_in_each_step():
    """Of 4,000 masked tokens the steps of 4 see 4,000, then some 3,000, 2,000 and 1,000."""
    model = MaskedLM(TransformerConfig(**{**SMALL, "block_size": 4000}))
    seen = []

    def forward(tokens, is_masked, mask):
        seen.append(int(is_masked.sum()))
        return torch.zeros(*tokens.shape, V)

    model.forward = forward
    unmask(model, [[]], sampling=Sampling(steps=4))
    assert seen == pytest.approx([4000, 3000, 2000, 1000], abs=150)


def test_a_nucleus_is_drawn_by_the_probabilities_that_it_has_left(monkeypatch):
    """Of 0.5, 0.3 and 0.2 the nucleus of 0.7 has the first two: 0.625 and 0.375."""
    logits = torch.full((V,), -torch.inf)
    logits[:3] = torch.tensor([0.3, 0.5, 0.2]).log()
    monkeypatch.setattr("baselines.gpt.next_logits", lambda gpt, rows: logits.expand(len(rows), -1))
    texts = generate(make_gpt(), [[]] * 3000, 1, top_p=0.7)
    share = [sum(text == [token] for text in texts) / 3000 for token in range(3)]
    assert share == pytest.approx([0.375, 0.625, 0], abs=0.03)

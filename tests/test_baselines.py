"""Properties of baselines/, of the GPTs that are loaded, and of presets."""

import math
from dataclasses import fields
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import baselines.gpt
from baselines.gpt import generate, gpt_loss, next_logits
from baselines.masked import MaskedLM, evaluate, masked_loss, unmask
from engine.checkpoint import build, load_checkpoint, load_gpt_state
from engine.config import DIT_PRESETS, VAE_PRESETS
from engine.corpus import GPT2, Corpus
from test_textldm import EOT, SMALL, N, V
from test_textldm import example_batch, generator, make_gpt, randomise, same_rows
from tests.helpers import make_quick, train
from textldm import CONTEXT, GPT, TARGET, DiTConfig, Sampling, TextDiT, TextVAE
from textldm import TransformerConfig, VAEConfig

# ---- The GPT: how it writes, and what it learns --------------------------------------------------


@pytest.mark.parametrize(
    "options, share",
    [
        (dict(), [0.3, 0.5, 0.2]),
        (dict(top_p=0.7), [0.375, 0.625, 0]),  # what the nucleus has left, over its sum
        (dict(temperature=0.5), [0.237, 0.658, 0.105]),  # squares, over their sum
        (dict(top_p=0), [0, 1, 0]),
        (dict(temperature=0), [0, 1, 0]),
    ],
)
def test_the_gpt_draws_each_token_as_often_as_it_says(monkeypatch, options, share):
    logits = torch.full((V,), -torch.inf)
    logits[:3] = torch.tensor([0.3, 0.5, 0.2]).log()
    monkeypatch.setattr(baselines.gpt, "next_logits", lambda gpt, rows: logits.expand(len(rows), V))
    texts = generate(make_gpt(), [[]] * 3000, 1, **options)
    drawn = torch.tensor(texts).flatten().bincount(minlength=V) / 3000
    assert drawn[:3].tolist() == pytest.approx(share, abs=0.03)
    assert ((drawn[:3] > 0) == (torch.tensor(share) > 0)).all()


def test_the_gpt_writes_after_an_end_of_text_in_a_window_that_slides(monkeypatch):
    seen = []

    def next_logits(gpt, rows):
        seen.append(rows[0])
        return F.one_hot(torch.tensor([len(seen)]), V).float()

    monkeypatch.setattr(baselines.gpt, "next_logits", next_logits)
    texts = generate(make_gpt(block_size=4), [[7, 8]], 4, temperature=0)
    assert texts == [[1, 2, 3, 4]]
    assert seen == [[EOT, 7, 8], [EOT, 7, 8, 1], [7, 8, 1, 2], [8, 1, 2, 3]]


def test_the_gpt_reads_each_row_to_its_own_end():
    gpt = make_gpt()
    rows = [[EOT, 1, 2, 3], [EOT], [EOT, 4]]
    alone = [gpt(torch.tensor([row]))[0, -1] for row in rows]
    assert torch.allclose(next_logits(gpt, rows), torch.stack(alone), atol=1e-4)


def test_the_gpt_learns_counted_tokens_from_those_before_them():
    gpt = make_gpt()
    batch = example_batch(8)
    seen = F.pad(batch.tokens[:, :-1], (1, 0), value=EOT)
    nll = F.cross_entropy(gpt(seen).mT, batch.tokens, reduction="none")
    expected = nll[batch.counted].mean().item()
    assert not batch.counted.all()
    assert gpt_loss(gpt, batch).item() == pytest.approx(expected, rel=1e-5)


def test_the_evaluation_of_the_gpt_is_a_mean_and_continues_four_contexts(monkeypatch):
    gpt = make_gpt()
    batches = [example_batch(8, seed=seed) for seed in (0, 1)]
    losses = [gpt_loss(gpt, batch).item() for batch in batches]
    shown = []
    monkeypatch.setattr(baselines.gpt, "lines_of_samples", lambda *given: shown.append(given) or [])
    numbers, _ = baselines.gpt.evaluate(gpt, batches, Mock())
    ((_, _, prompts, _),) = shown
    assert numbers["loss"] == pytest.approx(sum(losses) / 2)
    assert prompts == [batches[0].tokens[i, : i + 2].tolist() for i in range(4)]


def test_the_teacher_was_trained_at_every_position_that_it_reads_for_the_vae(
    home, tmp_path, monkeypatch
):
    """It reads an end-of-text token before each row."""
    make_quick(monkeypatch)
    real = Corpus.batch
    longest = {}  # row that each split gives

    def batch(self, rng, B, N):
        longest[self.path.stem] = self.N
        return real(self, rng, B, N)

    monkeypatch.setattr(Corpus, "batch", batch)
    found = []
    for path, kind in (("baselines/gpt.py", "gpt"), ("train_vae.py", "vae")):
        train(home, path, "--block_size=16", f"--out={tmp_path}", steps=1)
        state = load_checkpoint(tmp_path / f"{kind}.pt", kind, "")
        found.append((state["config"]["block_size"], longest["train"]))
    assert found == [(17, 17), (16, 16)]


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
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=64, initializer_range=0.2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)  # model.safetensors
    ours = load_gpt(tmp_path)
    tokens = torch.randint(0, 50257, (3, 48))
    expected = theirs(tokens).logits
    assert (ours(tokens) - expected).abs().max() < 1e-4 * expected.abs().max()
    prompt = torch.tensor([[50256, 1, 2, 3]])  # after an end-of-text token, as ours writes
    greedy = theirs.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert generate(ours, [[1, 2, 3]], 10, temperature=0) == [greedy[0, 4:].tolist()]


# ---- Masked diffusion ----------------------------------------------------------------------------


def make_masked(**options):
    return randomise(MaskedLM(TransformerConfig(**{**SMALL, **options})))


def test_masked_diffusion_counts_every_target_once_by_its_weight():
    """The loss is a bound. This model is charged log V for a token, and nothing in the tail. The
    evaluation leaves the tail out."""
    batch = example_batch(400)
    segment = (torch.arange(N) >= 3).long().repeat(400, 1)
    batch = same_rows(batch, segment=segment, weight=torch.where(batch.counted, 1.0, 3.0))

    def model(tokens, is_masked):
        assert not (is_masked & (batch.segment == CONTEXT)).any()
        return 99.0 * F.one_hot(tokens, V) * ~batch.counted[..., None]

    model.to_logits = torch.nn.Embedding.from_pretrained(torch.eye(V))
    losses = [masked_loss(model, batch, generator(seed)).item() for seed in range(40)]
    share = batch.counted[:, 3:].sum() / batch.weight[:, 3:].sum()
    assert sum(losses) / 40 == pytest.approx(math.log(V) * share.item(), rel=0.02)
    numbers, text = evaluate(model, [batch] * 40)
    assert numbers["loss"] == pytest.approx(math.log(V), rel=0.02)


def test_masked_diffusion_cannot_see_what_it_is_to_tell():
    model = make_masked()
    batch = example_batch()
    is_masked = (batch.segment == TARGET) & (torch.rand(4, N) < 0.5)
    other = (batch.tokens + 7) % V
    logits = model(batch.tokens, is_masked)
    assert torch.equal(logits, model(torch.where(is_masked, other, batch.tokens), is_masked))
    assert not torch.allclose(logits, model(torch.where(is_masked, batch.tokens, other), is_masked))


def test_masked_diffusion_hides_padding():
    model = make_masked()
    real = model.forward
    seen = []

    def forward(*given):
        seen.append(real(*given))
        return seen[-1]

    model.forward = forward
    for prompts in ([[1, 2]], [[1, 2], [3, 4, 5, 6, 7]]):
        unmask(model, prompts, 3, Sampling(steps=1))
    assert torch.allclose(seen[1][0, :5], seen[0][0], atol=1e-4)


def test_masked_diffusion_reveals_an_equal_share_in_each_step_as_the_model_says():
    """Of 4,000 masked tokens 4 steps see 4,000, then some 3,000, 2,000 and 1,000."""
    p = torch.rand(V).masked_fill(torch.arange(V) == EOT, 0)
    p /= p.sum()
    model = make_masked(block_size=4002)
    seen = []

    def forward(tokens, is_masked, mask):
        seen.append(int(is_masked.sum()))
        return torch.where(is_masked[..., None], p.log(), 99.0 * F.one_hot(tokens, V))

    model.forward, model.to_logits = forward, torch.nn.Identity()
    (text,) = unmask(model, [[1, 2]], 0, Sampling(steps=4))
    assert seen == pytest.approx([4000, 3000, 2000, 1000], abs=150)
    assert (torch.tensor(text).bincount(minlength=V) / 4000 - p).abs().max() < 0.02
    (text,) = unmask(model, [[1, 2]], 5, Sampling(steps=4, temperature=0.0))
    assert text == [p.argmax().item()] * 5


# ---- Presets -------------------------------------------------------------------------------------


def millions_in(model_type, config_type, preset, *parts, **options):
    """The parameters of a preset, or of parts of it, in a model without memory."""
    names = {f.name for f in fields(config_type)}
    sizes = {k: v for k, v in preset.items() if k in names}
    with torch.device("meta"):
        model = model_type(config_type(**{**sizes, **options}))
    modules = [getattr(model, part) for part in parts] or [model]
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    "size, of_dit, of_gpt", [("small", 114, 124), ("medium", 328, 355), ("large", 768, 774)]
)
def test_presets_have_the_sizes_of_the_paper_and_of_gpt2(size, of_dit, of_gpt):
    dit = millions_in(TextDiT, DiTConfig, DIT_PRESETS[size], channels=64)
    vae = millions_in(TextVAE, VAEConfig, VAE_PRESETS[size], "encoder", "decoder")
    gpt = millions_in(GPT, TransformerConfig, baselines.gpt.PRESETS[size])
    assert dit == pytest.approx(of_dit, rel=0.02)
    assert vae == pytest.approx(127, rel=0.02)
    assert gpt == pytest.approx(of_gpt, rel=0.01)

"""Weights and tokens that this project did not make: right, or refused in a sentence."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch

from engine.checkpoint import build, load_checkpoint, load_gpt_state, write_whole
from engine.config import UserError
from engine.corpus import GPT2, Corpus
from tests.helpers import make_quick, refuse, stage_of, training_options
from textldm import GPT, TransformerConfig

V, E = 50257, 16
SIZES = dict(n_layer=3, n_head=2, n_embd=E)
CONFIG = SIZES | dict(
    model_type="gpt2", activation_function="gelu_new", n_positions=32, vocab_size=V
)


@pytest.fixture(scope="module")
def gpt():
    """Its weights are exact in half precision."""
    model = GPT(TransformerConfig(**SIZES, block_size=32, vocab_size=V))
    for p in model.parameters():
        p.data = (p + 0.2 * torch.randn(p.shape)).half().float()
    return model


@pytest.fixture
def tensors(gpt):
    """Its weights in Hugging Face's layout."""
    found = {}
    for name, x in gpt.state_dict().items():
        is_transposed = ".c_" in name and x.dim() == 2
        found[f"transformer.{name}"] = x.T.contiguous() if is_transposed else x
    return found


def write_folder(folder, tensors, config=CONFIG):
    torch.save(tensors, folder / "pytorch_model.bin")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_shards(folder, tensors):
    index = {}
    for i, (name, x) in enumerate(tensors.items()):
        index[name] = f"shard{i}.bin"
        torch.save({name: x}, folder / index[name])
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps(dict(weight_map=index)))
    return path


def refuse_folder(words, folder, tensors, config=CONFIG):
    source = write_folder(folder, tensors, config)
    with pytest.raises(UserError, match=words):
        load_gpt_state(source)


def with_rows(tensors, rows):
    wte = tensors["transformer.wte.weight"]
    return tensors | {"transformer.wte.weight": torch.cat([wte, wte])[:rows]}


# ---- GPT-2s

SAME = dict(activation_function="gelu_pytorch_tanh", layer_norm_epsilon=1e-05, n_inner=4 * E)
SAME |= dict(reorder_and_upcast_attn=True, resid_pdrop=0.1, tie_word_embeddings=True)


@pytest.mark.parametrize("form", ["plain", "half", "shards", "same", "head", 50258, 50304])
def test_each_form_of_a_gpt2_computes_what_it_does(tmp_path, gpt, tensors, capsys, form):
    config = CONFIG
    if form == "half":
        tensors = {name: x.half() for name, x in tensors.items()}
    if form == "same":
        config = CONFIG | SAME
    if form == "head":
        tensors["lm_head.weight"] = gpt.wte.weight.detach().clone()
        config = CONFIG | dict(tie_word_embeddings=False)
    if form in (50258, 50304):
        tensors = with_rows(tensors, form)
        config = CONFIG | dict(vocab_size=form)
    source = write_folder(tmp_path, tensors, config)
    if form == "shards":
        write_shards(tmp_path, tensors)
        (tmp_path / "pytorch_model.bin").unlink()
    state = load_gpt_state(source)
    tokens = torch.arange(20)[None]
    found = build(GPT, TransformerConfig, state)(tokens)
    assert found.dtype == torch.float32
    assert torch.equal(found, gpt(tokens))
    assert state["tokenizer"] == GPT2
    is_told = f"are cut off (of {form})" in capsys.readouterr().out
    assert is_told == (form in (50258, 50304))


OTHER_CONFIGS = [
    dict(model_type="gpt_neo"),
    dict(activation_function="relu"),
    dict(layer_norm_epsilon=0.1),
    dict(scale_attn_weights=False),
    dict(scale_attn_by_inverse_layer_idx=True),
    dict(add_cross_attention=True),
    dict(tie_word_embeddings=False),
    dict(n_inner=32),
    dict(n_layer=2),
    dict(n_embd=32),
    dict(n_positions=16),
    dict(vocab_size=50304),
]


@pytest.mark.parametrize("more", OTHER_CONFIGS, ids=lambda more: next(iter(more)))
def test_what_a_config_changes_is_refused_by_name(tmp_path, tensors, more):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    refuse_folder(f"config.json: {next(iter(more))} is ", tmp_path, tensors, CONFIG | more)


@pytest.mark.parametrize("rows", [300, 50256, 60000])
def test_another_vocabulary_is_refused_by_its_size(tmp_path, tensors, rows):
    words = f"another vocabulary than GPT-2's .{rows} rows"
    refuse_folder(words, tmp_path, with_rows(tensors, rows), CONFIG | dict(vocab_size=rows))


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_another_vocabulary_is_refused_by_its_tokens(tmp_path, monkeypatch, tensors, name):
    """GPT-2's own is known by the hash of its tokens; here three tokens stand for it."""
    digest = hashlib.sha256(b"a\nb\nc").hexdigest()
    monkeypatch.setattr("engine.checkpoint.GPT2_TOKENS", digest)

    def write(**ids):
        ids = ids if name == "vocab.json" else dict(model=dict(vocab=ids))
        (tmp_path / name).write_text(json.dumps(ids))

    write(c=2, b=1, a=0, pad=50257)
    load_gpt_state(write_folder(tmp_path, tensors))
    write(a=0, b=2, c=1)
    refuse_folder("another vocabulary", tmp_path, tensors)


def test_weights_that_are_no_gpt2s_are_refused(tmp_path, tensors):
    refuse_folder("has no config.json.*3 layers of width 16", tmp_path, tensors, None)
    name = "transformer.h.0.mlp.c_fc.weight"
    refuse_folder("torch.int8", tmp_path, tensors | {name: tensors[name].to(torch.int8)})
    del tensors["transformer.h.1.ln_1.bias"]
    with pytest.raises(UserError, match="does not fit this code.*; name another model"):
        build(GPT, TransformerConfig, load_gpt_state(write_folder(tmp_path, tensors)))


def test_shards_that_are_not_there_are_refused(tmp_path, tensors):
    index = write_shards(tmp_path, tensors)
    (tmp_path / "shard7.bin").unlink()
    with pytest.raises(UserError, match="shard7.bin is missing"):
        load_gpt_state(str(tmp_path))
    index.write_text("{}")
    with pytest.raises(UserError, match="index.json names no shards"):
        load_gpt_state(str(tmp_path))


def test_a_teacher_of_gpt2s_needs_gpt2s_tokens(tmp_path, tensors, home, capsys):
    folder = write_folder(tmp_path, tensors)
    options = ["--teacher", folder, "--data", home / "data", "--out", tmp_path]
    refuse(capsys, "prepare the data with --encoding=gpt2", "train_vae.py", *options)


# ---- Files of tokens

TOKENS = np.random.default_rng(0).integers(0, 50256, 3000).astype(np.uint16)
BAD_TOKEN = np.where(np.arange(3000) == 2993, 50257, TOKENS).astype(np.uint16)
NPY = io.BytesIO()
np.save(NPY, TOKENS)


def with_header(magic, tokens):
    return np.array([magic, 1, len(tokens), *[0] * 253], np.int32).tobytes() + tokens.tobytes()


NO_TOKENS = dict(
    llmc=(with_header(20240520, TOKENS), "header of llm.c"),
    llama3=(with_header(20240801, TOKENS.astype(np.uint32)), "header of llm.c"),
    npy=(NPY.getvalue(), "is a .npy file"),
    uint32=(TOKENS.astype(np.uint32).tobytes(), "zeros in every second place"),
    int64=(TOKENS.astype(np.int64).tobytes(), "zeros in every second place"),
    big32=(TOKENS.astype(">u4").tobytes(), "zeros in every second place"),
    text=(b"It was the best of times, it was the worst of times.\n" * 50, "is text"),
    utf8=("Привет, мир! ".encode() * 99, "is text"),
    swapped=(TOKENS.byteswap().tobytes(), "has a token "),
    bad_token=(BAD_TOKEN.tobytes(), "has a token 50257, and GPT-2 has 50257"),
    chars=((TOKENS % 65).tobytes(), "no token above 64"),
    gz=(b"\x1f\x8b" + bytes(range(256)) * 20, "is a compressed file"),
)


@pytest.mark.parametrize("content, words", NO_TOKENS.values(), ids=NO_TOKENS)
def test_what_is_no_file_of_gpt2s_tokens_is_refused_with_the_way_out(tmp_path, content, words):
    path = tmp_path / "train.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} .*{words}.*; data/prepare.py makes"):
        Corpus(tmp_path, "train", 16)


# ---- Rows that are shorter than asked

READERS = [
    ("train_vae.py", "the teacher"),
    ("variants/ldlm.py", "the teacher"),
    ("train_dit.py", "the VAE"),
]


@pytest.mark.parametrize("path, name", READERS)
def test_rows_shorter_than_asked_are_said_with_both_ways_out(
    home, tmp_path, capsys, monkeypatch, path, name
):
    make_quick(monkeypatch)
    for kind, longest in (("gpt", 9), ("vae", 8)):
        state = load_checkpoint(home / f"out/{kind}.pt", kind, "")
        state["config"]["block_size"] = longest
        if kind == "gpt":
            state["model"]["wpe.weight"] = state["model"]["wpe.weight"][:longest]
        write_whole(tmp_path / f"{kind}.pt", state)
    options = [*training_options(home), "--out", tmp_path]
    stage, *_ = stage_of(path, *options, "--block_size=12")
    said = capsys.readouterr().err
    assert f"{name} reads rows of at most 8 tokens, so rows have 8 instead of 12" in said
    assert f"train {name} with --block_size=12, or give --block_size=8 here" in said
    assert stage.corpus.N == 8
    stage_of(path, *options, "--block_size=8")
    assert "warning" not in capsys.readouterr().err

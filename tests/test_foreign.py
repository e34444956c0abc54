"""Weights and tokens that this project did not make: right, or refused in a sentence."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch

from engine.checkpoint import build, load_gpt_state
from engine.corpus import GPT2, Corpus
from engine.config import UserError
from tests.helpers import refuse, train
from textldm import GPT, TransformerConfig

V, E, LAYERS, PLACES = 50257, 16, 3, 32
CONFIG = dict(
    model_type="gpt2",
    activation_function="gelu_new",
    n_head=2,
    n_embd=E,
    n_layer=LAYERS,
    n_positions=PLACES,
    vocab_size=V,
)


def tensors_of_gpt2(rows=V, layers=LAYERS, width=E):
    """Random weights in Hugging Face's layout."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return 0.2 * torch.randn(shape, generator=generator)

    tensors = {"wte.weight": random(rows, width), "wpe.weight": random(PLACES, width)}
    shapes = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 4, "mlp.c_proj": 0.25}
    for i in range(layers):
        for name, ratio in shapes.items():
            before = 4 * width if ratio == 0.25 else width
            tensors[f"h.{i}.{name}.weight"] = random(before, int(ratio * before))
            tensors[f"h.{i}.{name}.bias"] = random(int(ratio * before))
        for name in ("ln_1", "ln_2"):
            tensors[f"h.{i}.{name}.weight"] = 1 + random(width)
            tensors[f"h.{i}.{name}.bias"] = random(width)
    tensors["ln_f.weight"], tensors["ln_f.bias"] = 1 + random(width), random(width)
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def tensors():
    return tensors_of_gpt2()


def write_folder(folder, tensors, config=CONFIG):
    torch.save(tensors, folder / "pytorch_model.bin")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(source):
    gpt = build(GPT, TransformerConfig, load_gpt_state(str(source)))
    with torch.no_grad():
        return gpt(torch.arange(20)[None])


# ---- GPT-2s


@pytest.mark.parametrize(
    "more",
    [
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
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_a_config_changes_is_refused_by_name(tmp_path, tensors, more):
    write_folder(tmp_path, tensors, CONFIG | more)
    with pytest.raises(UserError, match=f"config.json: {next(iter(more))} is "):
        load_gpt_state(str(tmp_path))


def test_what_a_config_says_and_does_not_change_is_taken(tmp_path, tensors):
    expected = logits(write_folder(tmp_path, tensors))
    same = dict(activation_function="gelu_pytorch_tanh", layer_norm_epsilon=1e-05, n_inner=4 * E)
    same |= dict(reorder_and_upcast_attn=True, resid_pdrop=0.1, tie_word_embeddings=True)
    assert torch.equal(logits(write_folder(tmp_path, tensors, CONFIG | same)), expected)


def test_an_output_layer_of_its_own_is_refused_and_one_that_is_the_embedding_is_not(
    tmp_path, tensors
):
    config = CONFIG | dict(tie_word_embeddings=False)
    wte = tensors["transformer.wte.weight"]
    write_folder(tmp_path, tensors | {"lm_head.weight": wte.clone()}, config)
    load_gpt_state(str(tmp_path))
    write_folder(tmp_path, tensors | {"lm_head.weight": wte + 1}, config)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_gpt_state(str(tmp_path))


def test_shards_are_read_by_their_index(tmp_path, tensors):
    expected = logits(write_folder(tmp_path, tensors))
    (tmp_path / "pytorch_model.bin").unlink()
    names = list(tensors)
    shards = {"a-00001-of-00002.bin": names[:9], "a-00002-of-00002.bin": names[9:]}
    for shard, some in shards.items():
        torch.save({name: tensors[name] for name in some}, tmp_path / shard)
    index = {name: shard for shard, some in shards.items() for name in some}
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps(dict(weight_map=index)))
    assert torch.equal(logits(tmp_path), expected)
    (tmp_path / "a-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="a-00002-of-00002.bin is missing"):
        load_gpt_state(str(tmp_path))
    path.write_text("{}")
    with pytest.raises(UserError, match="index.json names no shards"):
        load_gpt_state(str(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match="no index of their shards; name a folder"):
        load_gpt_state(str(tmp_path))


@pytest.mark.parametrize("rows", [50258, 50304])
def test_rows_that_pad_a_vocabulary_are_cut_off_with_a_line(tmp_path, capsys, rows):
    tensors = tensors_of_gpt2(rows)
    padded = logits(write_folder(tmp_path, tensors, CONFIG | dict(vocab_size=rows)))
    assert f"are cut off (of {rows})" in capsys.readouterr().out
    assert padded.shape[-1] == V
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:V]
    assert torch.equal(logits(write_folder(tmp_path, tensors)), padded)
    assert load_gpt_state(str(tmp_path))["tokenizer"] == GPT2


@pytest.mark.parametrize("rows", [300, 50256, 60000])
def test_another_vocabulary_is_refused_by_its_size(tmp_path, rows):
    write_folder(tmp_path, tensors_of_gpt2(rows), CONFIG | dict(vocab_size=rows))
    with pytest.raises(UserError, match=f"another vocabulary than GPT-2's .{rows} rows"):
        load_gpt_state(str(tmp_path))


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_another_vocabulary_is_refused_by_its_tokens(tmp_path, monkeypatch, tensors, name):
    """GPT-2's own is known by the hash of its tokens; here three tokens stand for it."""

    def write(ids):
        ids = ids if name == "vocab.json" else dict(model=dict(vocab=ids))
        (tmp_path / name).write_text(json.dumps(ids))

    write_folder(tmp_path, tensors)
    write({"a": 0, "b": 1, "c": 2})
    with pytest.raises(UserError, match="another vocabulary"):
        load_gpt_state(str(tmp_path))
    digest = hashlib.sha256(b"a\nb\nc").hexdigest()
    monkeypatch.setattr("engine.checkpoint.GPT2_TOKENS", digest)
    load_gpt_state(str(tmp_path))
    write({"c": 2, "b": 1, "a": 0, "<pad>": 50257})
    load_gpt_state(str(tmp_path))
    write({"a": 0, "b": 2, "c": 1})
    with pytest.raises(UserError, match="another vocabulary"):
        load_gpt_state(str(tmp_path))


def test_without_a_config_the_sizes_must_be_gpt2s(tmp_path, tensors):
    write_folder(tmp_path, tensors, None)
    with pytest.raises(UserError, match="has no config.json.*3 layers of width 16"):
        load_gpt_state(str(tmp_path))


def test_quantised_weights_are_refused(tmp_path, tensors):
    name = "transformer.h.0.mlp.c_fc.weight"
    write_folder(tmp_path, tensors | {name: tensors[name].to(torch.int8)})
    with pytest.raises(UserError, match="torch.int8"):
        load_gpt_state(str(tmp_path))


def test_half_precision_is_computed_in_fp32(tmp_path, tensors):
    half = {name: tensor.half() for name, tensor in tensors.items()}
    found = logits(write_folder(tmp_path, half))
    assert found.dtype == torch.float32
    (tmp_path / "whole").mkdir()
    whole = {name: tensor.float() for name, tensor in half.items()}
    assert torch.equal(logits(write_folder(tmp_path / "whole", whole)), found)


def test_advice_on_a_downloaded_model_is_not_to_train_it_again(tmp_path, tensors, home, capsys):
    folder = write_folder(tmp_path, tensors)
    options = ["--teacher", folder, "--data", home / "data", "--out", tmp_path]
    refuse(capsys, "prepare the data with --encoding=gpt2", "train_vae.py", *options)
    missing = {name: x for name, x in tensors.items() if name != "transformer.h.1.ln_1.bias"}
    write_folder(tmp_path, missing)
    with pytest.raises(UserError, match="does not fit this code.*; name another model"):
        logits(tmp_path)


# ---- Files of tokens


def tokens_of_gpt2(n=3000):
    return np.random.default_rng(0).integers(0, 50256, n).astype(np.uint16)


def npy(x):
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def with_header(magic, x):
    header = np.zeros(256, np.int32)
    header[:3] = magic, 1, len(x)
    return header.tobytes() + x.tobytes()


BAD_TOKEN = tokens_of_gpt2()
BAD_TOKEN[-7] = 50257


@pytest.mark.parametrize(
    "content, words",
    [
        (with_header(20240520, tokens_of_gpt2()), "header of llm.c"),
        (with_header(20240801, tokens_of_gpt2().astype(np.uint32)), "header of llm.c"),
        (npy(tokens_of_gpt2()), "is a .npy file"),
        (tokens_of_gpt2().astype(np.uint32).tobytes(), "zeros in every second place"),
        (tokens_of_gpt2().astype(np.int64).tobytes(), "zeros in every second place"),
        (tokens_of_gpt2().astype(">u4").tobytes(), "zeros in every second place"),
        (bytes(4000), "zeros in every second place"),
        (b"It was the best of times, it was the worst of times.\n" * 50, "is text"),
        ("Привет, мир! ".encode() * 99, "is text"),
        (tokens_of_gpt2().byteswap().tobytes(), "has a token "),
        (BAD_TOKEN.tobytes(), "has a token 50257, and GPT-2 has 50257"),
        ((tokens_of_gpt2() % 65).tobytes(), "no token above 64"),
        (b"\x1f\x8b" + bytes(range(256)) * 20, "is a compressed file"),
    ],
    ids="llmc llama3 npy uint32 int64 big32 zeros text utf8 swapped bad_token chars gz".split(),
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_no_file_of_gpt2s_tokens_is_refused(tmp_path, content, words, split):
    """Before any step, wherever in the file it shows; with what it is, and the way out."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "val"):
        (data / f"{name}.bin").write_bytes(tokens_of_gpt2().tobytes())
    (data / f"{split}.bin").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        Corpus(data, split, 16)
    assert "data/prepare.py" in str(error.value)
    assert str(data / f"{split}.bin") in str(error.value)


def test_a_prepared_folder_needs_no_pass(home, monkeypatch):
    def fail(path, tokens):
        raise AssertionError

    monkeypatch.setattr("engine.corpus.refuse_other_files", fail)
    Corpus(home / "data", "train", 16)


# ---- Rows that are shorter than asked


def test_rows_shorter_than_asked_are_said_with_both_ways_out(home, tmp_path, capsys):
    def said(path, *options):
        capsys.readouterr()
        train(home, path, "--out", tmp_path, *options, steps=1)
        found = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        return found

    home_gpt = ["--teacher", home / "out/gpt.pt"]
    train(home, "baselines/gpt.py", "--out", tmp_path, "--block_size=8", steps=1)
    (line,) = said("train_vae.py", "--block_size=12")
    assert "the teacher reads rows of at most 8 tokens" in line
    assert "rows have 8 instead of 12" in line
    assert "train the teacher with --block_size=12, or give --block_size=8 here" in line
    (line,) = said("train_dit.py", "--block_size=12")
    assert "the VAE reads rows of at most 8 tokens" in line
    assert said("train_dit.py", "--block_size=8", "--overwrite") == []
    assert said("train_vae.py", "--block_size=12", *home_gpt, "--overwrite") == []
    ldlm = ["--channels=8", "--coder_layers=1", "--out", tmp_path / "ldlm"]
    ldlm += ["--teacher", tmp_path / "gpt.pt"]
    assert "the teacher reads" in said("variants/ldlm.py", "--block_size=12", *ldlm)[0]

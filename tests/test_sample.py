"""What sample.py writes, and what all scripts refuse."""

import contextlib
import io
import json
import math
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import engine.animation
import engine.terminal
import variants.writers
from bench.evaluate import EvalConfig
from bench.page import PageConfig
from engine.animation import Side
from engine.checkpoint import read_tensors, write_whole
from engine.config import TrainConfig, UserError, make_config
from engine.corpus import Corpus
from sample import Printer, SampleConfig, show_steps
from tests.helpers import ROOT, few_fixed_batches, randomised, refuse, script, train
from tests.helpers import training_options
from textldm import DiTConfig, Sampling, TransformerConfig, VAEConfig, row_seeds
from variants.cola_dlm import ColaConfig
from variants.ldlm import LDLMConfig
from variants.writers import load_writer

CHECKPOINTS = dict(
    gpt="out/gpt.pt",
    dit="out/dit.pt",
    masked="masked/masked.pt",
    ldlm="ldlm/dit.pt",
    cola_dlm="cola_dlm/dit.pt",
)
FUNCTIONS = dict(
    gpt="generate",
    dit="continue_texts",
    masked="unmask",
    ldlm="continue_texts",
    cola_dlm="continue_in_blocks",
)
KINDS = list(FUNCTIONS)
RANDOM = "gpt2_random"  # a folder may have a name that begins as a pretrained model's


@pytest.fixture(scope="module")
def place(home, tmp_path_factory):
    """A copy of home with a checkpoint of each kind, and in RANDOM the same with random weights:
    after few steps a model writes one text only."""
    place = tmp_path_factory.mktemp("place") / "copy"
    shutil.copytree(home, place)
    small = ["--block_size=16", "--eval_interval=9"]
    taught = [*small, "--teacher=out/gpt.pt"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Corpus, "fixed_batches", few_fixed_batches)
        m.chdir(place)
        train(place, "baselines/masked.py", "--out=masked", *small, steps=1)
        train(place, "variants/cola_dlm.py vae", "--out=cola_dlm", *taught, steps=1)
        train(place, "variants/cola_dlm.py dit", "--out=cola_dlm", *small, steps=1)
        taught += ["--channels=8", "--coder_layers=1"]
        train(place, "variants/ldlm.py", "--out=ldlm", *taught, steps=1)
    for kind, path in CHECKPOINTS.items():
        folder = place / RANDOM / kind
        folder.mkdir(parents=True)
        write_whole(folder / "dit.pt", randomised(read_tensors(place / path)))
        vae = (place / path).with_name("vae.pt")
        if vae.exists():
            write_whole(folder / "vae.pt", randomised(read_tensors(vae)))
    return place


@pytest.fixture
def sample(place, monkeypatch, capsys):
    """Runs sample.py in the place, with few steps. Returns what it printed."""
    monkeypatch.chdir(place)

    def run(*options):
        capsys.readouterr()
        script("sample.py", "--steps=3", "--device=cpu", *options)
        return capsys.readouterr()

    return run


def prompts_in(folder, lines):
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- What sample.py writes


@pytest.mark.parametrize("kind", ["dit", "cola_dlm"])
def test_each_prompt_of_a_file_is_continued_n_times(tmp_path, sample, kind):
    source = prompts_in(tmp_path, [{"prompt": "greek"}, {"prompt": "latin"}])
    out = sample(f"--out={RANDOM}/{kind}", f"--prompts={source}", "--n=2", "--length=5").out
    assert re.findall(r"^(greek|latin)\|", out, re.M) == ["greek", "greek", "latin", "latin"]


@pytest.mark.parametrize("kind, function", FUNCTIONS.items())
def test_options_reach_each_kind_and_what_ended_is_said(
    tmp_path, monkeypatch, sample, kind, function
):
    calls = []
    n_models = 2 if function.startswith("continue") else 1

    def write(*given, seed=None):
        prompts, length, how, *callback = given[n_models:]
        if kind == "gpt":
            how = Sampling(7, 1.5, how, seed)
        assert not any(callback)
        calls.append((prompts, length, how))
        return [[5, 299], [6]] * 3

    monkeypatch.setattr(variants.writers, function, write)
    lines = [{"prompt": "", "id": "☕"}, {"prompt": "b<|endoftext|>", "id": 2}]
    target = tmp_path / "out.jsonl"
    options = [f"--prompts={prompts_in(tmp_path, lines)}", f"--output={target}", "--n=3"]
    options += ["--temperature=0.25", "--cfg=1.5", "--steps=7", "--length=4", "--seed=2"]
    assert sample(f"--out={RANDOM}/{kind}", *options).out == ""
    prompts = [[]] * 6
    assert calls == [(prompts, 4, Sampling(7, 1.5, 0.25, row_seeds(prompts, 2)))]
    decode = load_writer("out/gpt.pt").decode
    first, second = dict(text=decode([5]), ended=True), dict(text=decode([6]), ended=False)
    a, b = lines
    assert lines_in(target) == [a | first, a | second, a | first, b | second, b | first, b | second]
    assert "☕" in target.read_text(encoding="utf-8")


def test_a_notebook_loads_in_three_lines_and_samples_in_one(
    random_out, tmp_path, monkeypatch, sample
):
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    *lines, last = code.splitlines()
    assert len(lines) == 3
    assert lines[0] == "from textldm import *"
    (tmp_path / "out").symlink_to(random_out)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), names := {})
    text = eval(re.fullmatch(r"print\((.*)\)", last)[1], names)
    fp32 = torch.device("cpu"), contextlib.nullcontext()
    monkeypatch.setattr(engine.terminal, "pick_device", lambda *given: fp32)
    options = ["--prompt=greek small letter", "--steps=20", "--cfg=3", "--temperature=0.7"]
    assert sample(f"--out={random_out}", *options).out == f"greek small letter|{text}\n"


@pytest.mark.parametrize("cfg, cost", [(3, 2), (1, 1)])
def test_a_trace_has_each_token_of_a_gpt_and_the_text_after_each_step(
    sample, monkeypatch, cfg, cost
):
    shown = []
    monkeypatch.setattr(engine.animation, "play", lambda *given: shown.append(given))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    options = ["--prompt=greek", "--length=4", f"--cfg={cfg}"]
    gpt_option = f"--gpt={RANDOM}/gpt/dit.pt"
    out = sample(f"--out={RANDOM}/dit", *options, "--trace", gpt_option).out
    ((prompts, (gpt, text)),) = shown
    assert prompts == ["greek"]
    assert (gpt.title, gpt.cost, text.title, text.cost) == ("GPT", 1, "TextLDM", cost)
    (ids,) = gpt.steps[-1][1]
    assert gpt.steps == [(f"n={n}", [ids[:n]]) for n in range(len(ids) + 1)]
    assert sample(f"--out={RANDOM}/gpt", *options).out == f"greek|{gpt.decode(ids)}\n"
    assert text.steps[0] == ("t=1.000", [[]])
    first, second, third, last = (float(label.removeprefix("t=")) for label, _ in text.steps)
    assert first > second > third > last == 0
    (ids,) = text.steps[-1][1]
    assert out == sample(f"--out={RANDOM}/dit", *options).out == f"greek|{text.decode(ids)}\n"


@pytest.mark.parametrize("is_terminal, term", [(True, "dumb"), (False, "xterm")])
@pytest.mark.parametrize(
    "n, shown",
    [
        (9, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (24, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 24]),
        (40, [1, 5, 9, 13, 17, 21, 25, 29, 33, 40]),
    ],
)
def test_without_a_terminal_a_trace_is_some_ten_lines(
    monkeypatch, capsys, n, shown, is_terminal, term
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM", term)
    steps = [(f"n={k}", [[k], [-k]]) for k in range(n + 1)]
    show_steps(["", ""], [Side("GPT", str, steps, 1)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"n={k}  '[{k}]'  '[{-k}]'" for k in shown]


def test_what_a_terminal_cannot_show_is_replaced(place, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    script("sample.py", "--out", place / "out", "--prompt=café", "--steps=2", "--device=cpu")
    stdout.flush()
    assert stdout.buffer.getvalue().startswith(b"caf?|")


def test_a_text_of_blocks_is_printed_block_by_block(tmp_path, monkeypatch, sample):
    options = [f"--out={RANDOM}/cola_dlm", "--prompt=greek", "--length=50"]
    target = tmp_path / "out.jsonl"
    assert sample(*options, f"--output={target}").out == ""
    pieces = []
    monkeypatch.setattr("builtins.print", lambda text, **options: pieces.append(text))
    sample(*options)
    assert len(pieces) == 14, "13 blocks of 4 tokens, and the end of the line"
    assert "".join(pieces) == f"greek|{lines_in(target)[0]['text']}"


def test_half_a_character_is_printed_when_it_is_whole(capsys):
    printer = Printer("a", lambda ids: bytes(ids).decode("utf-8", "replace"))
    coffee = list("☕".encode())
    shown = []
    for n in (1, 2, 3):
        printer.stream(0.0, [coffee[:n]])
        shown.append(capsys.readouterr().out)
    assert shown == ["a|", "", "☕"]


def test_a_gpt_in_hugging_faces_layout_writes(place, tmp_path):
    model = read_tensors(place / "out/gpt.pt")["model"]
    model["wte.weight"] = torch.randn(50257, 16)
    for name, x in model.items():
        if ".c_" in name and x.dim() == 2:
            model[name] = x.T.contiguous()
    torch.save(model, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    writers = [load_writer(str(path)) for path in (tmp_path, tmp_path / "pytorch_model.bin")]
    first, second = (writer.write([[1, 2]], 5) for writer in writers)
    assert len(first[0]) == 5
    assert first == second


# ---- What is refused

TRAINING = [
    "baselines/gpt.py",
    "train_vae.py",
    "train_dit.py",
    "baselines/masked.py",
    "variants/ldlm.py",
    "variants/cola_dlm.py vae",
    "variants/cola_dlm.py dit",
]
# What each option that names a checkpoint wants, and what makes one.
READERS = [
    ("train_vae.py --teacher", "gpt", "python baselines/gpt.py"),
    ("train_dit.py --vae", "vae", "python train_vae.py"),
    ("variants/ldlm.py --teacher", "gpt", "python baselines/gpt.py"),
    ("variants/cola_dlm.py vae --teacher", "gpt", "python baselines/gpt.py"),
    ("variants/cola_dlm.py dit --vae", "causal_vae", "python variants/cola_dlm.py vae"),
    ("sample.py --vae", "vae", "python train_vae.py"),
    ("sample.py --model=cola_dlm/dit.pt --vae", "causal_vae", "python variants/cola_dlm.py vae"),
    ("sample.py --trace --gpt", "gpt", "python baselines/gpt.py"),
    ("sample.py --model", "dit or cola_dlm or ldlm or gpt or masked", "the training scripts"),
]
# The changes of one file of a prepared corpus.
BAD_DATA = {
    "empty": ("train.bin", lambda data: b"", "missing or empty"),
    "half a token": ("train.bin", lambda data: data[:-1], "do not fit"),
    "a token too few": ("train.bin", lambda data: data[:-2], "do not fit"),
    "unknown tokens": (
        "train.bin",
        lambda data: data.replace(b"e\x00", b"\xff\xff"),
        "beyond its vocabulary",
    ),
    "no document": ("val.bin", lambda data: b"\0" * len(data), "less than one row"),
    "unknown type": ("meta.json", lambda data: data.replace(b"uint16", b"uint99"), "do not fit"),
    "cut meta": ("meta.json", lambda data: data[:-20], "meta.json do not fit"),
    "no eot": ("meta.json", lambda data: data.replace(b"eot", b"eos"), "meta.json do not fit"),
}

BAD_OPTIONS = [
    ("train_vae.py --max_steps=many", "argument"),
    ("train_vae.py --batch_size=1.5", "argument"),
    ("train_vae.py --preset=huge", "argument"),
    ("train_vae.py --recipe=theirs", "argument"),
    ("train_vae.py --n_embd=91", "is not a multiple"),
    ("train_vae.py --n_embd=2147483640", "out of memory"),
    ("sample.py --n=0", "--n="),
    ("sample.py --steps=0", "--steps="),
    ("sample.py --batch_size=0", "--batch_size="),
    ("sample.py --temperature=-1", "--temperature="),
    ("sample.py --length=1000", "--length=1000 does not fit the model's rows"),
    ("sample.py --device=tpu9", "--device"),
    ("sample.py --gpt=out/gpt.pt", "needs --trace"),
    ("sample.py --keep=2 --trace", "leave --trace out"),
    ("sample.py --trace --model=out/gpt.pt", "is a gpt, which writes in another way; leave"),
    ("sample.py --trace --model=masked/masked.pt", "is a masked, which writes in another way"),
    ("sample.py --trace --out=cola_dlm", "is a cola_dlm, which writes in another way; leave"),
    ("sample.py --keep=2 --model=out/gpt.pt", "is a gpt, which does not; leave --keep out"),
    ("sample.py --keep=2 --out=cola_dlm", "is a cola_dlm, which does not; leave --keep out"),
    ("sample.py --prompts=bad/in.jsonl", 'line 2: expected {"prompt": "..."}'),
    ("sample.py --prompts=bad/none.jsonl", "does not exist"),
    ("sample.py --output=out", "must be a file"),
    ("sample.py --output=none/out.jsonl", "must be a file"),
]
for command in TRAINING:
    for option in ("--max_steps=0", "--latent_blocks=4", "--device=tpu9"):
        BAD_OPTIONS.append((f"{command} --out=new {option}", option.split("=")[0]))

BAD_FILES = [
    ("train_vae.py --teacher=bad/other.bin", "Hugging Face"),
    ("train_vae.py --teacher=bad", "pip install safetensors"),
    ("train_dit.py --vae=cola_dlm/vae.pt", "holds a causal_vae, where a vae is needed"),
    ("train_dit.py --data=bad/words", "another vocabulary"),
    ("train_vae.py --data=bad/words", "different tokenizers"),
    ("variants/ldlm.py --data=bad/words", "different tokenizers"),
    ("variants/cola_dlm.py vae --data=bad/words", "different tokenizers"),
    ("sample.py --vae=bad/vae2.pt", "another VAE"),
]
for name in ("wide", "odd", "huge", "none"):
    BAD_FILES.append((f"train_dit.py --vae=bad/config_{name}.pt", "does not fit this code"))
for command, kind, remedy in READERS:
    BAD_FILES.append((f"{command}=bad/missing.pt", f"missing; {remedy}"))
    BAD_FILES.append((f"{command}=bad/toy.pt", f"holds a toy, where a {kind} is needed; {remedy}"))
    for name in ("cut", "code"):
        BAD_FILES.append((f"{command}=bad/{name}.pt", "no whole checkpoint"))
for command in TRAINING:
    words = "missing or empty; python data/prepare.py"
    BAD_FILES.append((f"{command} --out=new --data=nowhere", words))
    for name, (_, _, words) in BAD_DATA.items():
        BAD_FILES.append((f"{command} --data=bad/{name}", words))

OTHER_RUNS = [
    ("baselines/gpt.py --resume --data=bad/words", "another vocabulary"),
    ("baselines/gpt.py --resume --data=bad/sha", "another data;"),
    ("train_vae.py --resume --teacher=bad/gpt2.pt", "another teacher;"),
    ("train_dit.py --resume --vae=bad/vae2.pt", "another vae;"),
    ("baselines/gpt.py --resume --out=bad", "does not fit this code"),
    ("baselines/gpt.py --resume --out=masked", "is missing; without --resume"),
]
for option in ("n_layer=1", "seed=2", "accumulate=2", "warmup=7", "weight_decay=0.1", "no-muon"):
    words = f"another {option.removeprefix('no-').split('=')[0]}; resume with the same"
    OTHER_RUNS.append((f"baselines/gpt.py --resume --{option}", words))


@pytest.fixture(scope="module")
def broken(place):
    """The place, where each file in bad/ is broken in one way."""
    bad = place / "bad"
    bad.mkdir()
    whole = (place / "out/vae.pt").read_bytes()
    (bad / "cut.pt").write_bytes(whole[:-1000])
    (bad / "code.pt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    (bad / "model.safetensors").write_bytes(b"x")
    torch.save({"some": torch.ones(3)}, bad / "other.bin")
    prompts_in(bad, [{"prompt": "a"}, {"text": "b"}])

    vae, gpt, last = (read_tensors(place / f"out/{name}.pt") for name in ("vae", "gpt", "gpt_last"))
    del last["AdamW"]
    moved = {"z_mean": vae["model"]["z_mean"] + 1}
    louder = {"wte.weight": gpt["model"]["wte.weight"] + 1}
    states = dict(
        toy=dict(kind="toy"),
        vae2=vae | dict(model=vae["model"] | moved),
        gpt2=gpt | dict(model=gpt["model"] | louder),
        gpt_last=last,
        config_wide=vae | dict(config=vae["config"] | dict(n_embd=32)),
        config_huge=vae | dict(config=vae["config"] | dict(n_embd=2**40)),
        config_odd=vae | dict(config=dict(n_odd=1)),
        config_none=vae | dict(config=None),
    )
    for name, state in states.items():
        write_whole(bad / f"{name}.pt", state)

    for what, (name, change, _) in BAD_DATA.items():
        shutil.copytree(place / "data", bad / what)
        (bad / what / name).write_bytes(change((bad / what / name).read_bytes()))
    meta = (place / "data/meta.json").read_text()
    shutil.copytree(place / "data", bad / "sha")
    (bad / "sha/meta.json").write_text(meta.replace('"sha256": "', '"sha256": "0'))
    options = ["--encoding=bpe", "--vocab_size=290", "--layout=documents", "--val_fraction=0.2"]
    script("data/prepare.py", place / "docs.jsonl", "--out", bad / "words", *options)
    return place


@pytest.mark.parametrize("command, words", BAD_OPTIONS + BAD_FILES + OTHER_RUNS)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    broken, monkeypatch, capsys, command, words
):
    monkeypatch.chdir(broken)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    command, *options = re.split(" (?=--)", command)
    path, *stage = command.split()
    alike = [] if path == "sample.py" else training_options(broken)
    refuse(capsys, words, path, *stage, *alike, *options, keep=broken)
    assert not Path("new").exists()


CONFIGS = [TransformerConfig, VAEConfig, DiTConfig, ColaConfig, LDLMConfig]
CONFIGS += [TrainConfig, SampleConfig, EvalConfig, PageConfig]


@pytest.mark.parametrize("config_type", CONFIGS)
def test_each_number_beyond_its_limits_is_refused_by_its_name(config_type):
    for f in fields(config_type):
        if f.type not in (int, float):
            continue
        low, high = f.metadata.get("low"), f.metadata.get("high")
        beyond = [-1, 10**18] if f.type is int else [1e308, math.inf, math.nan]
        if low is not None:
            beyond.append(low - 1)
        if high is not None:
            beyond.append(high + 1)
        for value in beyond:
            with pytest.raises(UserError, match=f"--{f.name}="):
                make_config(config_type, {f.name: f.type(value)})
        for value in {low, high} - {None}:
            try:
                make_config(config_type, {f.name: f.type(value)})
            except UserError as error:  # the others do not go with it
                assert "is not a multiple of" in str(error)

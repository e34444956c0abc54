"""What sample.py writes, and what all scripts refuse."""

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from engine.animation import Side
from engine.checkpoint import read_tensors, write_whole
from sample import Printer, show_steps
from tests.helpers import ROOT, make_quick, randomised, refuse, script, train, training_options
from textldm import Sampling, row_seeds
from variants.writers import load_writer

# The functions that write.
KINDS = dict(gpt="generate", masked="unmask", dit="continue_texts", ldlm="continue_texts")
KINDS["cola_dlm"] = "continue_in_blocks"


@pytest.fixture(scope="module")
def place(home, random_out, tmp_path_factory):
    """A copy of home, and in gpt2_kinds/ a folder for each kind of model with random weights. (Its
    name begins as that of a pretrained model, which it is not.)"""
    place = tmp_path_factory.mktemp("place") / "copy"
    shutil.copytree(home, place)
    kinds = place / "gpt2_kinds"
    for kind in ("gpt", "dit"):
        shutil.copytree(random_out, kinds / kind)
    small = ["--block_size=16", "--eval_interval=9"]
    taught = [*small, f"--teacher={home / 'out/gpt.pt'}"]
    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        m.chdir(kinds)
        train(place, "baselines/masked.py", "--out=masked", *small, steps=1)
        train(place, "variants/cola_dlm.py vae", "--out=cola_dlm", *taught, steps=1)
        train(place, "variants/cola_dlm.py dit", "--out=cola_dlm", *small, steps=1)
        taught += ["--channels=8", "--coder_layers=1"]
        train(place, "variants/ldlm.py", "--out=ldlm", *taught, steps=1)
    for kind in ("masked", "cola_dlm", "ldlm"):
        for path in (kinds / kind).glob("*.pt"):
            write_whole(path, randomised(read_tensors(path)))
    for kind in ("gpt", "masked"):
        (kinds / kind / f"{kind}.pt").replace(kinds / kind / "dit.pt")
    return place


@pytest.fixture
def sample(place, monkeypatch, capsys):
    """Runs sample.py in the place, with a model of a kind. Returns what it printed."""
    monkeypatch.chdir(place)

    def run(kind, *options):
        script("sample.py", f"--out=gpt2_kinds/{kind}", "--steps=3", "--device=cpu", *options)
        return capsys.readouterr().out

    return run


@pytest.fixture
def written(sample, tmp_path):
    """The lines that sample.py writes to --output for those of --prompts."""

    def run(kind, lines, *options):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert sample(kind, f"--prompts={source}", f"--output={target}", *options) == ""
        return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]

    return run


@pytest.mark.parametrize("kind", ["dit", "cola_dlm"])
def test_each_prompt_of_a_file_is_continued_n_times(tmp_path, sample, kind):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "greek"}\n{"prompt": "latin"}\n')
    out = sample(kind, f"--prompts={source}", "--n=2", "--length=5")
    assert re.findall(r"^(greek|latin)\|", out, re.M) == ["greek", "greek", "latin", "latin"]


@pytest.mark.parametrize("kind", KINDS)
def test_options_reach_each_kind_and_what_ended_is_said(tmp_path, monkeypatch, written, kind):
    calls = []

    def write(*given, seed=None):
        n_models = 2 if KINDS[kind].startswith("continue") else 1
        prompts, length, how, *callback = given[n_models:]
        if kind == "gpt":
            how = Sampling(7, 1000, how, seed)
        assert not any(callback)
        calls.append((prompts, length, how))
        return [[5, 299], [6]] * 3

    monkeypatch.setattr(f"variants.writers.{KINDS[kind]}", write)
    a, b = {"prompt": "", "id": "☕"}, {"prompt": "b<|endoftext|>", "id": 2}
    options = ["--n=3", "--temperature=0.25", "--cfg=1000", "--steps=7", "--length=4", "--seed=2"]
    lines = written(kind, [a, b], *options)
    prompts = [[]] * 6
    assert calls == [(prompts, 4, Sampling(7, 1000, 0.25, row_seeds(prompts, 2)))]
    decode = load_writer("out/gpt.pt").decode
    first, second = dict(text=decode([5]), ended=True), dict(text=decode([6]), ended=False)
    assert lines == [a | first, a | second, a | first, b | second, b | first, b | second]
    assert "☕" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_a_notebook_samples_in_four_lines(random_out, tmp_path, monkeypatch, sample):
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    *lines, last = code.splitlines()
    assert (len(lines), lines[0]) == (3, "from textldm import *")
    (tmp_path / "out").symlink_to(random_out)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), names := {})
    text = eval(re.fullmatch(r"print\((.*)\)", last)[1], names)
    fp32 = torch.device("cpu"), contextlib.nullcontext()
    monkeypatch.setattr("engine.terminal.pick_device", lambda *given: fp32)
    options = ["--prompt=greek small letter", "--steps=20", "--cfg=3", "--temperature=0.7"]
    assert sample("", "--out=out", *options) == f"greek small letter|{text}\n"


@pytest.mark.parametrize("cfg, cost", [(3, 2), (1, 1)])
def test_a_trace_has_each_token_of_a_gpt_and_the_text_of_each_step(sample, monkeypatch, cfg, cost):
    shown = []
    monkeypatch.setattr("engine.animation.play", lambda *given: shown.append(given))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    options = ["--prompt=greek", "--length=4", f"--cfg={cfg}"]
    out = sample("dit", *options, "--trace", "--gpt=gpt2_kinds/gpt/dit.pt")
    ((prompts, (gpt, text)),) = shown
    assert prompts == ["greek"]
    assert (gpt.title, gpt.cost, text.title, text.cost) == ("GPT", 1, "TextLDM", cost)
    (ids,) = gpt.steps[-1][1]
    assert gpt.steps == [(f"n={n}", [ids[:n]]) for n in range(len(ids) + 1)]
    assert sample("gpt", *options) == f"greek|{gpt.decode(ids)}\n"
    assert text.steps[0] == ("t=1.000", [[]])
    first, second, third, last = (float(label.removeprefix("t=")) for label, _ in text.steps)
    assert first > second > third > last == 0
    (ids,) = text.steps[-1][1]
    assert out == sample("dit", *options) == f"greek|{text.decode(ids)}\n"


@pytest.mark.parametrize("is_terminal, term", [(True, "dumb"), (False, "xterm")])
@pytest.mark.parametrize("n, shown", [(9, [*range(1, 10)]), (24, [*range(1, 22, 2), 24])])
def test_elsewhere_a_trace_is_some_ten_lines(monkeypatch, capsys, n, shown, is_terminal, term):
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


def test_a_text_of_blocks_is_printed_block_by_block(monkeypatch, sample, written):
    (line,) = written("cola_dlm", [{"prompt": "greek"}], "--length=50")
    pieces = []
    monkeypatch.setattr("builtins.print", lambda text, **options: pieces.append(text))
    sample("cola_dlm", "--prompt=greek", "--length=50")
    assert len(pieces) == 14, "13 blocks of 4 tokens, and the end of the line"
    assert "".join(pieces) == f"greek|{line['text']}"


def test_half_a_character_is_printed_when_it_is_whole(capsys):
    printer = Printer("a", lambda ids: bytes(ids).decode("utf-8", "replace"))
    shown = []
    for n in (1, 2, 3):
        printer.stream(0.0, [list("☕".encode()[:n])])
        shown.append(capsys.readouterr().out)
    assert shown == ["a|", "", "☕"]


# ---- What is refused

TRAINING = ["baselines/gpt.py", "train_vae.py", "train_dit.py", "baselines/masked.py"]
TRAINING += ["variants/ldlm.py", "variants/cola_dlm.py vae", "variants/cola_dlm.py dit"]
# What each option that names a checkpoint wants, and what makes one.
READERS = [
    ("train_vae.py --teacher", "gpt", "python baselines/gpt.py"),
    ("train_dit.py --vae", "vae", "python train_vae.py"),
    ("variants/ldlm.py --teacher", "gpt", "python baselines/gpt.py"),
    ("variants/cola_dlm.py vae --teacher", "gpt", "python baselines/gpt.py"),
    ("variants/cola_dlm.py dit --vae", "causal_vae", "python variants/cola_dlm.py vae"),
    ("sample.py --vae", "vae", "python train_vae.py"),
    ("sample.py --out=gpt2_kinds/cola_dlm --vae", "causal_vae", "python variants/cola_dlm.py vae"),
    ("sample.py --trace --gpt", "gpt", "python baselines/gpt.py"),
    ("sample.py --model", "dit or cola_dlm or ldlm or gpt or masked", "the training scripts"),
]
# What is changed in a file of a corpus.
BAD_DATA = {
    "empty": ("train.bin", lambda data: b"", "missing or empty"),
    "a token too few": ("train.bin", lambda data: data[:-2], "do not fit"),
    "unknown": ("train.bin", lambda data: data.replace(b"e\0", b"\xff\xff"), "beyond its vocab"),
    "no document": ("val.bin", lambda data: b"\0" * len(data), "less than one row"),
    "unknown type": ("meta.json", lambda data: data.replace(b"uint16", b"uint99"), "do not fit"),
    "cut meta": ("meta.json", lambda data: data[:-20], "meta.json do not fit"),
    "no eot": ("meta.json", lambda data: data.replace(b"eot", b"eos"), "meta.json do not fit"),
}
OTHER_DATA = {
    "tokens": ("meta.json", lambda data: data.replace(b"AA== 0\\nAQ==", b"AQ== 0\\nAA=="), ""),
    "texts": ("meta.json", lambda data: data.replace(b'"sha256": "', b'"sha256": "0'), ""),
}

REFUSED = [
    ("train_vae.py --max_steps=many", "argument"),
    ("train_vae.py --batch_size=1000000000000000000", "--batch_size="),
    ("train_vae.py --n_embd=2147483640", "out of memory"),
    ("sample.py --n=0", "--n="),
    ("sample.py --steps=0", "--steps="),
    ("sample.py --batch_size=0", "--batch_size="),
    ("sample.py --temperature=-1", "--temperature="),
    ("sample.py --cfg=1001", "--cfg="),
    ("sample.py --length=22", "--length=22 does not fit the model's rows of 22 tokens; at most 21"),
    ("sample.py --length=22 --model=out/gpt.pt", "rows of 22 tokens; at most 21"),
    ("sample.py --gpt=out/gpt.pt", "needs --trace"),
    ("sample.py --keep=2 --trace", "leave --trace out"),
    ("sample.py --trace --model=out/gpt.pt", "is a gpt, which writes in another way; leave"),
    ("sample.py --trace --out=gpt2_kinds/masked", "is a masked, which writes in another way"),
    ("sample.py --trace --out=gpt2_kinds/cola_dlm", "is a cola_dlm, which writes in another way"),
    ("sample.py --keep=2 --model=out/gpt.pt", "is a gpt, which does not; leave --keep out"),
    ("sample.py --keep=2 --out=gpt2_kinds/cola_dlm", "is a cola_dlm, which does not; leave"),
    ("sample.py --prompts=docs.jsonl", 'docs.jsonl, line 1: expected {"prompt": "..."}'),
    ("sample.py --prompts=none.jsonl", "--prompts=none.jsonl does not exist"),
    ("sample.py --output=out", "must be a file"),
    ("sample.py --output=none/out.jsonl", "must be a file"),
    ("train_vae.py --teacher=bad/other.bin", "Hugging Face"),
    ("train_vae.py --teacher=bad", "pip install safetensors"),
    ("sample.py --model=bad/other.bin", "Hugging Face"),
    ("sample.py --model=bad", "pip install safetensors"),
    ("train_dit.py --vae=bad/wide.pt", "does not fit this code"),
    ("train_dit.py --vae=bad/odd.pt", "does not fit this code"),
    ("train_dit.py --data=bad/tokens", "another vocabulary"),
    ("train_vae.py --data=bad/tokens", "different tokenizers"),
    ("variants/ldlm.py --data=bad/tokens", "different tokenizers"),
    ("variants/cola_dlm.py vae --data=bad/tokens", "different tokenizers"),
    ("sample.py --vae=bad/vae2.pt", "another VAE"),
    ("baselines/gpt.py --resume --data=bad/tokens", "another vocabulary"),
    ("baselines/gpt.py --resume --data=bad/texts", "another data;"),
    ("baselines/gpt.py --resume --n_layer=1", "another n_layer; resume with the same"),
    ("baselines/gpt.py --resume --no-muon", "another muon; resume with the same"),
    ("train_vae.py --resume --teacher=bad/gpt2.pt", "another teacher;"),
    ("train_dit.py --resume --vae=bad/vae2.pt", "another vae;"),
    ("baselines/gpt.py --resume --out=bad", "does not fit this code"),
    ("baselines/gpt.py --resume --out=gpt2_kinds/dit", "is missing; without --resume"),
]
for command, kind, remedy in READERS:
    REFUSED.append((f"{command}=bad/missing.pt", f"missing; {remedy}"))
    REFUSED.append((f"{command}=bad/toy.pt", f"holds a toy, where a {kind} is needed; {remedy}"))
    REFUSED.append((f"{command}=bad/cut.pt", "no whole checkpoint"))
    REFUSED.append((f"{command}=bad/code.pt", "no whole checkpoint"))
for command in TRAINING:
    for option in ("--max_steps=0", "--latent_blocks=4", "--device=tpu9"):
        REFUSED.append((f"{command} --out=new {option}", option.split("=")[0]))
    REFUSED.append((f"{command} --out=new --data=nowhere", "missing or empty; python data/"))
    for name, (_, _, words) in BAD_DATA.items():
        REFUSED.append((f"{command} --data=bad/{name}", words))


@pytest.fixture(scope="module")
def broken(place):
    """The place, with files and corpora in bad/ that are each broken in one way."""
    bad = place / "bad"
    bad.mkdir()
    (bad / "cut.pt").write_bytes((place / "out/vae.pt").read_bytes()[:-1000])
    (bad / "code.pt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    (bad / "model.safetensors").write_bytes(b"x")
    torch.save({"some": torch.ones(3)}, bad / "other.bin")
    vae, gpt, last = (read_tensors(place / f"out/{name}.pt") for name in ("vae", "gpt", "gpt_last"))
    del last["AdamW"]
    states = dict(
        toy=dict(kind="toy"),
        gpt_last=last,
        vae2=vae | dict(model=vae["model"] | dict(z_mean=vae["model"]["z_mean"] + 1)),
        gpt2=gpt | dict(model=gpt["model"] | {"wte.weight": gpt["model"]["wte.weight"] + 1}),
        wide=vae | dict(config=vae["config"] | dict(n_embd=32)),
        odd=vae | dict(config=dict(n_odd=1)),
    )
    for name, state in states.items():
        write_whole(bad / f"{name}.pt", state)
    for what, (name, change, _) in (BAD_DATA | OTHER_DATA).items():
        shutil.copytree(place / "data", bad / what)
        (bad / what / name).write_bytes(change((bad / what / name).read_bytes()))
    return place


@pytest.mark.parametrize("command, words", REFUSED)
def test_what_does_not_fit_is_refused(broken, monkeypatch, capsys, command, words):
    monkeypatch.chdir(broken)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    command, *options = re.split(" (?=--)", command)
    path, *stage = command.split()
    alike = [] if path == "sample.py" else training_options(broken)
    refuse(capsys, words, path, *stage, *alike, *options, keep=broken)
    assert not Path("new").exists()

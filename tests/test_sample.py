"""Properties of sample.py, and of what all scripts make of bad options, data and checkpoints."""

import contextlib
import io
import json
import math
import re
import shutil
import sys
from dataclasses import fields

import pytest
import torch

import engine.animation
import engine.terminal
import variants.writers
from bench.evaluate import EvalConfig
from bench.page import PageConfig
from engine.checkpoint import load_checkpoint, write_whole
from engine.config import TrainConfig, UserError, make_config
from engine.corpus import GPT2, Corpus, load_encoding
from engine.animation import Side
from sample import Printer, SampleConfig, show_steps
from tests.helpers import (
    randomised,
    ROOT,
    SIZES,
    copy_of,
    few_fixed_batches,
    load,
    refuse,
    run_module,
    script,
    train,
)
from textldm import DiTConfig, Sampling, TransformerConfig, VAEConfig, row_seeds
from variants.cola_dlm import ColaConfig
from variants.ldlm import LDLMConfig
from variants.writers import load_writer

TRAINING = [
    "baselines/gpt.py",
    "train_vae.py",
    "train_dit.py",
    "baselines/masked.py",
    "variants/ldlm.py",
    "variants/cola_dlm.py vae",
    "variants/cola_dlm.py dit",
]
KINDS = ["gpt", "dit", "masked", "ldlm", "cola_dlm"]


@pytest.fixture(scope="module")
def models(home, tmp_path_factory):
    """For each kind the options that name its checkpoint, made by its script in one step."""
    teacher = ["--teacher", home / "out/gpt.pt"]
    ldlm = tmp_path_factory.mktemp("ldlm")
    blocks = tmp_path_factory.mktemp("blocks")
    masked = tmp_path_factory.mktemp("masked")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Corpus, "fixed_batches", few_fixed_batches)
        small = ["--block_size=16", "--eval_interval=9"]
        train(home, "baselines/masked.py", "--out", masked, *small, steps=1)
        train(home, "variants/cola_dlm.py vae", "--out", blocks, *teacher, *small, steps=1)
        train(home, "variants/cola_dlm.py dit", "--out", blocks, *small, steps=1)
        small += ["--channels=8", "--coder_layers=1"]
        train(home, "variants/ldlm.py", "--out", ldlm, *teacher, *small, steps=1)
    return dict(
        gpt=["--model", home / "out/gpt.pt"],
        dit=["--out", home / "out"],
        masked=["--model", masked / "masked.pt"],
        ldlm=["--model", ldlm / "dit.pt"],
        cola_dlm=["--out", blocks],
    )


@pytest.fixture(scope="module")
def random_models(models, tmp_path_factory):
    """The same, with random weights: after few steps a model writes one text only."""
    found = {}
    for kind, (option, path) in models.items():
        folder = tmp_path_factory.mktemp(kind)
        source = path
        if option == "--out":
            source = path / "dit.pt"
            vae = load_checkpoint(path / "vae.pt", ("vae", "causal_vae"), "")
            write_whole(folder / "vae.pt", randomised(vae))
        write_whole(folder / "dit.pt", randomised(load_checkpoint(source, kind, "")))
        found[kind] = ["--out", folder]
    return found


@pytest.fixture
def sample(capsys):
    """Runs sample.py with few steps. Returns what it printed."""

    def run(*options):
        capsys.readouterr()
        script("sample.py", "--steps=3", "--device=cpu", *options)
        return capsys.readouterr()

    return run


def encoding_of(home):
    return load_encoding(Corpus(home / "data", "train", 8).tokenizer)


def prompts_in(tmp_path, lines):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- What sample.py writes


def test_each_prompt_is_continued_n_times(home, sample):
    out = sample("--out", home / "out", "--prompt=greek sm", "--n=3").out
    assert out.count("greek sm|") == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_any_kind_writes(models, sample, kind):
    out = sample(*models[kind], "--prompt=greek", "--length=5").out
    assert out.startswith("greek|")
    assert out.endswith("\n")


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_draws_what_is_random(random_models, sample, kind):
    options = [*random_models[kind], "--prompt=greek", "--length=8", "--temperature=1"]
    texts = [sample(*options, f"--seed={seed}").out for seed in range(4)]
    assert len(set(texts)) == 4
    assert sample(*options).out == texts[0]
    assert sample(*options, "--seed=3").out == texts[3]


def test_a_prompt_that_is_too_long_loses_its_beginning_and_a_warning_says_so(home, sample):
    found = sample("--out", home / "out", "--prompt=" + "greek " * 99)
    assert re.search(r"warning: prompt 1: \d+ tokens, \d+ more than fit", found.err)
    assert "its beginning is cut off" in found.err
    assert "greek |" in found.out


def test_a_trace_shows_the_text_of_each_step(home, sample):
    out = sample("--out", home / "out", "--prompt=greek", "--trace").out
    lines = out.splitlines()
    times = [float(line[2:7]) for line in lines if line.startswith("t=")]
    assert len(times) == 3
    assert times[-1] == 0, "each line has the time that its step reaches"
    assert times[0] < 1
    assert times == sorted(times, reverse=True)
    text = lines[-1].removeprefix("greek|")
    assert lines[2].endswith(f"  {text!r}"), "the last step shows what is written"


def test_a_long_trace_shows_about_ten_steps(home, sample):
    out = sample("--out", home / "out", "--prompt=greek", "--trace", "--steps=40").out
    assert out.count("t=") == 10


@pytest.mark.parametrize("n", [1, 9, 24, 40])
def test_the_lines_of_a_trace_end_with_the_last_step(capsys, n):
    steps = [(f"n={k}", [[k]]) for k in range(n + 1)]
    show_steps([""], [Side("GPT", str, steps, 1)])
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert labels[0] == "n=1" or n == 1
    assert labels[-1] == f"n={n}"
    assert len(labels) <= 20


def test_a_trace_shows_the_tokens_of_a_gpt_one_by_one(home, sample):
    gpt = home / "out/gpt.pt"
    out = sample("--out", home / "out", "--prompt=greek", "--trace", "--gpt", gpt).out
    lines = out.splitlines()
    texts = [eval(line.split("  ", 1)[1]) for line in lines if line.startswith("n=")]
    assert lines[0].startswith("n=1  ")
    for shorter, longer in zip(texts, texts[1:]):
        assert longer.startswith(shorter.rstrip("\ufffd"))
    assert sample("--model", gpt, "--prompt=greek").out == f"greek|{texts[-1]}\n"


def test_in_a_terminal_a_trace_is_played(home, sample, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(engine.animation.time, "sleep", lambda seconds: None)
    gpt = home / "out/gpt.pt"
    out = sample("--out", home / "out", "--prompt=greek", "--trace", "--gpt", gpt).out
    frames = re.split(r"\x1b\[\d+F\x1b\[J", out)
    heads = [re.split(" {2,}", frame.splitlines()[0].strip()) for frame in frames]
    assert heads[0] == ["GPT, n=0: 0 evaluations", "TextLDM, t=1.000: 0 evaluations"]
    gpt_head, head = heads[-1]
    n, evaluations = re.fullmatch(r"GPT, n=(\d+): (\d+) evaluations", gpt_head).groups()
    assert n == evaluations != "0"
    assert head.endswith(": 6 evaluations"), "three steps, with and without the prompt"


def test_a_gpt_beside_a_trace_must_be_one_and_needs_the_trace(home, capsys):
    dit = home / "out/dit.pt"
    refuse(
        capsys, "needs --trace", "sample.py", "--out", home / "out", "--gpt", home / "out/gpt.pt"
    )
    options = ["--out", home / "out", "--trace", "--gpt", dit]
    refuse(capsys, "holds a dit", "sample.py", *options)


def test_prompts_of_a_file_are_written_with_their_texts(home, tmp_path, sample):
    lines = [{"prompt": "greek", "id": 1}, {"prompt": "", "id": 2}, {"prompt": "café ☕", "id": 3}]
    source = prompts_in(tmp_path, lines)
    target = tmp_path / "out.jsonl"
    options = [f"--prompts={source}", f"--output={target}", "--batch_size=2"]
    found = sample("--out", home / "out", *options)
    assert found.out == ""
    written = lines_in(target)
    assert [line["id"] for line in written] == [1, 2, 3]
    assert [line["prompt"] for line in written] == ["greek", "", "café ☕"]
    for line in written:
        assert isinstance(line["text"], str)
        assert isinstance(line["ended"], bool)


def test_prompts_of_a_file_may_be_printed(home, tmp_path, sample):
    source = prompts_in(tmp_path, [{"prompt": "greek"}, {"prompt": "latin"}])
    out = sample("--out", home / "out", f"--prompts={source}").out
    assert out.count("greek|") == 1
    assert out.count("latin|") == 1


def test_options_are_passed_on_and_what_ended_is_said(home, tmp_path, monkeypatch, sample):
    given = []
    eot = 299

    def write(vae, dit, prompts, length, sampling, callback):
        given.append((len(prompts), length, sampling, callback))
        return [[5, eot], [6]] * (len(prompts) // 2)

    monkeypatch.setattr(variants.writers, "continue_texts", write)
    source = prompts_in(tmp_path, [{"prompt": ""}, {"prompt": "b<|endoftext|>"}])
    target = tmp_path / "out.jsonl"
    options = ["--n=3", "--temperature=0.25", "--cfg=1.5", "--steps=7", "--length=4", "--seed=2"]
    sample("--out", home / "out", f"--prompts={source}", f"--output={target}", *options)
    ((number, length, sampling, callback),) = given
    assert (number, length, callback) == (6, 4, None)
    assert (sampling.steps, sampling.cfg_scale, sampling.temperature) == (7, 1.5, 0.25)
    assert len(set(sampling.seed)) == 6
    written = lines_in(target)
    assert [line["prompt"] for line in written] == [""] * 3 + ["b<|endoftext|>"] * 3
    assert [line["ended"] for line in written] == [True, False] * 3
    texts = [encoding_of(home).decode([5]), encoding_of(home).decode([6])]
    assert [line["text"] for line in written] == texts * 3


def test_a_notebook_loads_in_three_lines_and_samples_in_one(
    random_out, tmp_path, monkeypatch, sample
):
    """The lines of README.md, on a model of the tests. In fp32, as a notebook computes."""
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    lines = code.splitlines()
    assert len(lines) == 4
    assert lines[0] == "from textldm import *"
    (tmp_path / "out").symlink_to(random_out)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines[:3]), names := {})
    text = eval(re.fullmatch(r"print\((.*)\)", lines[3])[1], names)
    cpu = torch.device("cpu"), contextlib.nullcontext()
    monkeypatch.setattr(engine.terminal, "pick_device", lambda *given: cpu)
    options = ["--prompt=greek small letter", "--steps=20", "--cfg=3", "--temperature=0.7"]
    assert sample("--out=out", *options).out == f"greek small letter|{text}\n"


@pytest.mark.parametrize("kind", ["dit", "ldlm", "masked"])
def test_a_text_is_written_in_parts(random_models, sample, kind):
    options = [*random_models[kind], "--prompt=greek", "--length=4", "--temperature=1"]
    whole = sample(*options).out
    assert sample(*options, "--keep=4").out == whole
    assert sample(*options, "--keep=1").out.startswith("greek|")


@pytest.mark.parametrize("kind, function", [("gpt", "generate"), ("masked", "unmask")])
def test_options_are_passed_on_to_other_kinds(models, monkeypatch, sample, kind, function):
    given = []

    def write(model, prompts, length, *more, **named):
        given.append((len(prompts), length, *more, named))
        return [[5]] * len(prompts)

    monkeypatch.setattr(variants.writers, function, write)
    options = ["--n=2", "--temperature=0.25", "--length=4", "--seed=1", "--steps=7"]
    sample(*models[kind], "--prompt=", *options)
    ((number, length, how, named),) = given
    assert (number, length) == (2, 4)
    seeds = row_seeds([[], []], 1)
    if kind == "gpt":
        assert how == 0.25
        assert named == dict(seed=seeds)
    else:
        assert (how.temperature, how.steps, how.seed) == (0.25, 7, seeds)


def test_what_a_terminal_cannot_show_is_replaced(home, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    script("sample.py", "--out", home / "out", "--prompt=café", "--steps=2", "--device=cpu")
    stdout.flush()
    assert stdout.buffer.getvalue().startswith(b"caf?|")


# ---- Blocks, which are printed as they come


def test_a_text_of_blocks_is_as_long_as_asked(random_models, home, tmp_path, sample):
    target = tmp_path / "out.jsonl"
    source = prompts_in(tmp_path, [{"prompt": "greek"}])
    seen = []
    real = variants.writers.continue_in_blocks

    def write(*given):
        texts = real(*given)
        seen.extend(texts)
        return texts

    with pytest.MonkeyPatch.context() as m:
        m.setattr(variants.writers, "continue_in_blocks", write)
        options = [f"--prompts={source}", f"--output={target}", "--length=50"]
        sample(*random_models["cola_dlm"], *options)
    (text,) = seen
    assert len(text) == 50, "longer than a row, which has 16"
    (line,) = lines_in(target)
    writer = load_writer(str(home / "out/gpt.pt"))
    assert line["text"] == writer.decode(text)


def test_a_stream_of_blocks_is_the_text_that_is_written_at_once(random_models, sample):
    """One text is printed as it grows, of several each when it is done."""
    options = [*random_models["cola_dlm"], "--prompt=greek", "--length=50", "--cfg=1"]
    stream = sample(*options).out
    several = sample(*options, "--n=2").out
    assert stream.startswith("greek|")
    assert several.startswith(stream.rstrip("\ufffd\n"))


def test_a_stream_prints_each_block_once(random_models, monkeypatch, sample):
    calls = []
    stream = Printer.stream

    def remember(printer, t, texts):
        calls.append(len(texts[0]))
        stream(printer, t, texts)

    module = load("sample.py")
    monkeypatch.setattr(module.Printer, "stream", remember)
    options = [*random_models["cola_dlm"], "--prompt=greek", "--length=50", "--steps=2"]
    run_module(module, "sample.py", *options, "--device=cpu")
    assert calls == [*range(4, 50, 4), 50]


def test_half_a_character_is_printed_when_it_is_whole(home, capsys):
    encoding = encoding_of(home)
    printer = Printer("a", encoding.decode)
    coffee = [encoding.encode_single_token(bytes([byte])) for byte in "☕".encode()]
    shown = []
    for n in (1, 2, 3):
        printer.stream(0.0, [coffee[:n]])
        shown.append(capsys.readouterr().out)
    assert shown == ["a|", "", "☕"]


def test_end_of_texts_are_line_ends_within_a_text_and_nothing_at_its_end(home):
    writer = load_writer(str(home / "out/gpt.pt"))
    a = writer.encoding.encode("a")
    assert writer.decode([*a, 299, *a, 299]) == "a\na"


# ---- Bad options


@pytest.mark.parametrize(
    "option, words",
    [
        ("--max_steps=0", "--max_steps"),
        ("--max_steps=many", "argument"),
        ("--beta=-1", "--beta"),
        ("--no_such_option=1", "--no_such_option"),
        ("--preset=huge", "argument"),
        ("--recipe=theirs", "argument"),
        ("--batch_size=1.5", "argument"),
        ("--learning_rate=nan", "--learning_rate"),
        ("--n_embd=91", "is not a multiple"),
        ("--n_head=0", "--n_head"),
        ("--batch_size=1000000000000000000", "--batch_size"),
        ("--learning_rate=inf", "--learning_rate"),
        ("--learning_rate=1e308", "--learning_rate"),
        ("--n_embd=2147483640", "out of memory"),
        ("--device=tpu9", "--device"),
    ],
)
def test_bad_options_of_training_are_refused(home, capsys, option, words):
    where = ["--data", home / "data", "--out", home / "out"]
    refuse(capsys, words, "train_vae.py", *where, option, keep=home)


CONFIGS = [
    TransformerConfig,
    VAEConfig,
    DiTConfig,
    ColaConfig,
    LDLMConfig,
    TrainConfig,
    SampleConfig,
    EvalConfig,
    PageConfig,
]


@pytest.mark.parametrize("config_type", CONFIGS)
def test_each_number_at_its_limits_is_taken_or_refused_by_its_name(config_type):
    for f in fields(config_type):
        low, high = f.metadata.get("low"), f.metadata.get("high")
        if f.type is int:
            tried = [0, -1, 10**18]
        elif f.type is float:
            tried = [0.0, -1.0, 1e308, math.inf, math.nan]
        else:
            continue
        for value in tried:
            values = {f.name: value}
            is_below = low is not None and value < low or f.type is int and value < 0
            is_above = high is not None and value > high or value > 1e17
            if is_below or is_above or math.isnan(value):
                with pytest.raises(UserError, match=f"--{f.name}="):
                    make_config(config_type, values)
        for value in {low, high} - {None}:
            try:
                make_config(config_type, {f.name: f.type(value)})
            except UserError as error:  # the others do not go with it
                assert "is not a multiple of" in str(error)


@pytest.mark.parametrize("command", TRAINING)
def test_bad_options_are_refused_by_each_script(home, tmp_path, capsys, command):
    path, *stage = command.split()
    where = ["--data", home / "data", "--out", tmp_path / "out"]
    refuse(capsys, "--max_steps", path, *stage, *where, "--max_steps=0")
    refuse(capsys, "--latent_blocks", path, *stage, *where, "--latent_blocks=4")
    refuse(capsys, "--device", path, *stage, *where, "--device=tpu9")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", ["--n=0", "--steps=0", "--length=-1", "--length=1000", "--cfg=nan", "--seed=-1"]
)
def test_bad_options_of_sampling_are_refused(home, capsys, option):
    refuse(capsys, option.split("=")[0], "sample.py", "--out", home / "out", option)


@pytest.mark.parametrize("kind", ["gpt", "masked", "cola_dlm"])
def test_a_trace_is_refused_where_a_text_does_not_form_out_of_noise(models, capsys, kind):
    refuse(capsys, "leave --trace out", "sample.py", *models[kind], "--trace")


@pytest.mark.parametrize("kind", ["gpt", "cola_dlm"])
def test_keep_is_refused_where_tokens_are_not_written_all_at_once(models, capsys, kind):
    refuse(capsys, "leave --keep out", "sample.py", *models[kind], "--keep=2")


def test_a_trace_of_what_is_written_in_parts_is_refused(home, capsys):
    refuse(capsys, "leave --trace out", "sample.py", "--out", home / "out", "--keep=2", "--trace")


def test_bad_files_of_prompts_are_refused(home, tmp_path, capsys):
    where = ["--out", home / "out"]
    bad = prompts_in(tmp_path, [{"prompt": "a"}, {"text": "b"}])
    refuse(capsys, "line 2", "sample.py", *where, f"--prompts={bad}")
    bad.write_text("{")
    refuse(capsys, "line 1", "sample.py", *where, f"--prompts={bad}")
    refuse(capsys, "does not exist", "sample.py", *where, f"--prompts={tmp_path / 'none.jsonl'}")


@pytest.mark.parametrize("target", ["", "no_folder/out.jsonl"])
def test_an_output_that_cannot_be_a_file_is_refused_first(home, tmp_path, capsys, target):
    option = f"--output={tmp_path / target}"
    refuse(capsys, "must be a file", "sample.py", "--out", home / "out", option)


# ---- Bad data


def test_missing_data_is_refused(home, tmp_path, capsys):
    for command in TRAINING:
        path, *stage = command.split()
        where = ["--data", tmp_path / "nowhere", "--out", tmp_path / "out"]
        refuse(capsys, "missing or empty; python data/prepare.py", path, *stage, *where)
    assert not (tmp_path / "out").exists()


BAD_DATA = {
    "empty": ("train.bin", lambda data: b"", "missing or empty"),
    "half a token": ("train.bin", lambda data: data[:-1], "do not fit"),
    "a token too few": ("train.bin", lambda data: data[:-2], "do not fit"),
    "unknown tokens": (
        "train.bin",
        lambda data: data.replace(b"e\x00", b"\xff\xff"),
        "beyond its vocabulary",
    ),
    "no document": (
        "val.bin",
        lambda data: data.replace(b"\x2b\x01", b"\x01\x00"),
        "less than one row",
    ),
    "unknown type": (
        "meta.json",
        lambda data: data.replace(b'"uint16"', b'"uint99"'),
        "do not fit",
    ),
    "cut meta": ("meta.json", lambda data: data[:-20], "meta.json do not fit"),
    "no eot": ("meta.json", lambda data: data.replace(b'"eot"', b'"eos"'), "meta.json do not fit"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_refused_and_nothing_is_changed(home, tmp_path, capsys, what):
    home = copy_of(home, tmp_path)
    name, change, words = BAD_DATA[what]
    path = home / "data" / name
    path.write_bytes(change(path.read_bytes()))
    for command in TRAINING:
        script_path, *stage = command.split()
        where = ["--data", home / "data", "--out", home / "out", "--device=cpu"]
        refuse(capsys, words, script_path, *stage, *where, keep=home)


# ---- Bad checkpoints


@pytest.fixture
def copy(home, tmp_path, monkeypatch):
    """A copy of home, and a working folder where nothing may appear."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return copy_of(home, tmp_path)


def with_config(state, **changes):
    return dict(state, config=dict(state["config"], **changes))


def write_bad_files(out):
    """Files that are no checkpoint, and the words that refuse them."""
    whole = (out / "vae.pt").read_bytes()
    (out / "cut.pt").write_bytes(whole[:-1000])
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 4
    (out / "flip.pt").write_bytes(flipped)
    (out / "code.pt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    return ["cut.pt", "flip.pt", "code.pt"]


def options_for(home):
    return ["--data", home / "data", "--out", home / "out", "--device=cpu", "--max_steps=2"]


def test_files_that_are_no_checkpoint_are_refused(copy, tmp_path, capsys):
    out = copy / "out"
    options = options_for(copy)
    for bad in write_bad_files(out):
        words = "no whole checkpoint"
        refuse(capsys, words, "train_vae.py", *options, "--teacher", out / bad, keep=copy)
        refuse(capsys, words, "train_dit.py", *options, "--vae", out / bad, keep=copy)
        refuse(capsys, words, "sample.py", "--out", out, "--vae", out / bad, keep=copy)
        refuse(capsys, words, "sample.py", "--out", out, "--model", out / bad, keep=copy)
        stages = ["variants/cola_dlm.py", "dit", *options, "--vae", out / bad]
        refuse(capsys, words, *stages, keep=copy)
        refuse(capsys, words, "variants/ldlm.py", *options, "--teacher", out / bad, keep=copy)
    assert not list((tmp_path / "here").iterdir()), "nothing in a checkpoint runs"


def test_a_missing_checkpoint_is_refused_with_what_makes_it(copy, capsys):
    none = copy / "out/none.pt"
    options = options_for(copy)
    makes_gpt = "missing; python baselines/gpt.py"
    makes_vae = "missing; python train_vae.py"
    makes_blocks = "missing; python variants/cola_dlm.py vae"
    refuse(capsys, makes_gpt, "train_vae.py", *options, "--teacher", none, keep=copy)
    refuse(capsys, makes_gpt, "variants/ldlm.py", *options, "--teacher", none, keep=copy)
    refuse(capsys, makes_vae, "train_dit.py", *options, "--vae", none, keep=copy)
    refuse(capsys, makes_vae, "sample.py", "--out", copy / "out", "--vae", none, keep=copy)
    refuse(capsys, "missing; the training scripts", "sample.py", "--model", none, keep=copy)
    stages = ["variants/cola_dlm.py", "dit", *options, "--vae", none]
    refuse(capsys, makes_blocks, *stages, keep=copy)


def test_a_checkpoint_of_another_kind_is_refused(copy, models, capsys):
    out = copy / "out"
    options = options_for(copy)
    blocks = models["cola_dlm"][1]
    wants_vae = "holds a gpt, where a vae is needed"
    refuse(capsys, wants_vae, "train_dit.py", *options, "--vae", out / "gpt.pt", keep=copy)
    refuse(capsys, wants_vae, "sample.py", "--out", out, "--vae", out / "gpt.pt", keep=copy)
    wants_gpt = "holds a vae, where a gpt is needed"
    refuse(capsys, wants_gpt, "train_vae.py", *options, "--teacher", out / "vae.pt", keep=copy)
    wants_blocks = "holds a vae, where a causal_vae is needed"
    refuse(capsys, wants_blocks, "variants/cola_dlm.py", "dit", *options, keep=copy)
    model = ["--model", blocks / "dit.pt", "--vae", out / "vae.pt"]
    refuse(capsys, wants_blocks, "sample.py", *model, keep=copy)
    wants_plain = "holds a causal_vae, where a vae is needed"
    refuse(capsys, wants_plain, "train_dit.py", *options, "--vae", blocks / "vae.pt", keep=copy)
    refuse(capsys, "holds a vae, where a dit or", "sample.py", "--model", out / "vae.pt", keep=copy)


def test_a_file_that_is_no_gpt_2_is_refused(copy, capsys):
    torch.save({"some": torch.ones(3)}, copy / "out/other.bin")
    teacher = ["--teacher", copy / "out/other.bin"]
    refuse(capsys, "Hugging Face", "train_vae.py", *options_for(copy), *teacher, keep=copy)


def test_a_checkpoint_that_does_not_fit_the_code_is_refused(copy, capsys):
    """Without memory for what it claims."""
    out = copy / "out"
    state = load_checkpoint(out / "vae.pt", "vae", "")
    bad = dict(
        wide=with_config(state, n_embd=32),
        odd=dict(state, config={"n_odd": 1}),
        huge=with_config(state, n_embd=2**40),
        deep=with_config(state, n_layer=2**40),
        none=dict(state, config=None),
    )
    for name, content in bad.items():
        write_whole(out / f"{name}.pt", content)
    for name in bad:
        option = ["--vae", out / f"{name}.pt"]
        words = "does not fit this code"
        refuse(capsys, words, "train_dit.py", *options_for(copy), *option, keep=copy)


def test_another_vae_than_the_dits_is_refused(copy, capsys):
    """Of the same sizes."""
    out = copy / "out"
    state = load_checkpoint(out / "vae.pt", "vae", "")
    state["model"]["z_mean"] += 1
    write_whole(out / "vae2.pt", state)
    other = ["--vae", out / "vae2.pt"]
    refuse(capsys, "another VAE", "sample.py", "--out", out, *other, keep=copy)
    alike = [*options_for(copy), "--resume", "--batch_size=8", *SIZES]
    refuse(capsys, "another vae;", "train_dit.py", *alike, *other, keep=copy)


def test_another_vocabulary_is_refused(copy, capsys):
    options = ["--encoding=bpe", "--vocab_size=290", "--layout=documents", "--val_fraction=0.2"]
    script("data/prepare.py", copy / "docs.jsonl", "--out", copy / "data2", *options)
    other = ["--data", copy / "data2", "--out", copy / "out", "--device=cpu", "--max_steps=2"]
    refuse(capsys, "another vocabulary", "train_dit.py", *other, keep=copy)
    refuse(capsys, "another vocabulary", "baselines/gpt.py", *other, "--resume", keep=copy)
    refuse(capsys, "different tokenizers", "train_vae.py", *other, keep=copy)
    refuse(capsys, "different tokenizers", "variants/ldlm.py", *other, keep=copy)
    stage = ["variants/cola_dlm.py", "vae"]
    refuse(capsys, "different tokenizers", *stage, *other, keep=copy)


def test_a_run_is_not_resumed_with_other_options(copy, capsys):
    alike = [*options_for(copy), "--resume", "--batch_size=8", *SIZES]
    others = ["n_layer=1", "seed=2", "accumulate=2", "warmup=7", "weight_decay=0.1", "no-muon"]
    for option in others:
        name = option.removeprefix("no-").split("=")[0]
        words = f"another {name}; resume with the same"
        refuse(capsys, words, "baselines/gpt.py", *alike, f"--{option}", keep=copy)


def test_a_run_is_not_resumed_with_another_teacher(copy, capsys):
    """Of the same sizes."""
    out = copy / "out"
    state = load_checkpoint(out / "gpt.pt", "gpt", "")
    state["model"]["wte.weight"] += 1
    write_whole(out / "gpt2.pt", state)
    alike = [*options_for(copy), "--resume", "--batch_size=8", *SIZES]
    other = ["--teacher", out / "gpt2.pt"]
    refuse(capsys, "another teacher;", "train_vae.py", *alike, *other, keep=copy)


def test_a_run_is_not_resumed_with_another_corpus(copy, capsys):
    meta = copy / "data/meta.json"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps(dict(content, sha256="0" * 64)))
    alike = [*options_for(copy), "--resume", "--batch_size=8", *SIZES]
    refuse(capsys, "another data;", "baselines/gpt.py", *alike, keep=copy)


def test_a_damaged_checkpoint_is_not_resumed(copy, capsys):
    alike = [*options_for(copy), "--resume", "--batch_size=8", *SIZES]
    last = copy / "out/gpt_last.pt"
    state = load_checkpoint(last, "gpt", "")
    del state["AdamW"]
    write_whole(last, state)
    refuse(capsys, "does not fit this code", "baselines/gpt.py", *alike, keep=copy)
    last.unlink()
    refuse(capsys, "is missing; without --resume", "baselines/gpt.py", *alike, keep=copy)


def test_a_missing_package_is_one_sentence(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    options = ["--data", home / "data", "--out", tmp_path, "--teacher", tmp_path]
    refuse(capsys, "pip install safetensors", "train_vae.py", *options)


def test_the_folder_of_checkpoints_may_have_any_name(home, tmp_path, monkeypatch, sample):
    """Also one that begins as the name of a pretrained model."""
    monkeypatch.chdir(tmp_path)
    for name in ("names", "gpt2_names"):
        shutil.copytree(home / "out", tmp_path / name)
        assert sample(f"--out={name}", "--prompt=greek").out.startswith("greek|")


def test_a_gpt_in_hugging_faces_layout_writes(home, tmp_path):
    gpt = load_checkpoint(home / "out/gpt.pt", "gpt", "")
    wte = torch.randn(50257, 16)
    gpt["model"]["wte.weight"] = wte
    gpt["config"]["vocab_size"] = 50257
    gpt["tokenizer"] = GPT2
    write_whole(tmp_path / "gpt.pt", gpt)
    tensors = {}
    for name, x in gpt["model"].items():
        if ".c_" in name and x.dim() == 2:
            x = x.T.contiguous()
        tensors[f"transformer.{name}"] = x
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    texts = []
    for path in (tmp_path / "gpt.pt", tmp_path, tmp_path / "pytorch_model.bin"):
        writer = load_writer(str(path), "", torch.device("cpu"))
        assert writer.kind == "gpt"
        texts.append(writer.write([[1, 2]], 5, Sampling()))
    assert texts[0] == texts[1] == texts[2]

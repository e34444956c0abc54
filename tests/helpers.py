"""What the tests of several rooms share: scripts that run in this process, and small corpora."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import engine.evaluation
import textldm
from engine.corpus import Corpus
from engine.terminal import run_script

ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--n_layer=2", "--n_head=2", "--n_embd=16"]
DOCUMENTS = [
    "greek small letter alpha",
    "greek small letter beta",
    "latin capital letter a with grave",
    "cyrillic letter zhe",
    "arabic letter alef",
    "café ☕ naïve",
    "one two three four five six",
] * 40


def few_fixed_batches(corpus, n, device):
    """Corpus.fixed_batches, of fewer rows: what is computed of them takes less time."""
    return [corpus.batch(np.random.default_rng((0, i)), 16, corpus.N) for i in range(min(n, 2))]


def short_samples(vae, dit, prompts, *more):
    """continue_texts, of one token each: the samples of an evaluation take most of its time."""
    return [[5] for _ in prompts]


def make_quick(monkeypatch):
    monkeypatch.setattr(Corpus, "fixed_batches", few_fixed_batches)
    monkeypatch.setattr(textldm, "continue_texts", short_samples)  # for scripts loaded from now on
    monkeypatch.setattr(engine.evaluation, "continue_texts", short_samples)


def randomised(state):
    """A checkpoint with random weights, and with the statistics that it has."""
    generator = torch.Generator().manual_seed(0)
    model = {}
    for name, x in state["model"].items():
        random = torch.randn(x.shape, generator=generator)
        if name in ("z_mean", "z_std", "hidden_mean", "hidden_std") or ".ln_" in f".{name}":
            model[name] = x
        elif name == "latent_of":
            model[name] = 3 * random
        else:
            model[name] = (0.1 if ".h." in name else 0.5) * random
    return dict(state, model=model)


def load(path):
    """A script as a module of its own, made anew."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_module(module, path, *arguments):
    """Runs the main of a loaded script, as the command line would."""
    before = sys.argv
    sys.argv = [path, *map(str, arguments)]
    try:
        run_script(module.main)
    finally:
        sys.argv = before


def script(path, *arguments):
    """Runs a script in this process, as the command line would."""
    run_module(load(path), path, *arguments)


def stage_of(path, *arguments):
    """What a script gives to engine.train.train: a Stage, and three functions."""
    module, found = load(path), []
    with pytest.MonkeyPatch.context() as m:  # other scripts import this module
        m.setattr(module, "train", lambda *given: found.extend(given))
        run_module(module, path, *arguments)
    return found


def training_options(home, steps=4):
    return [
        "--data",
        home / "data",
        "--out",
        home / "out",
        *SIZES,
        f"--max_steps={steps}",
        "--eval_interval=2",
        "--batch_size=8",
        "--log_interval=1",
        "--device=cpu",
    ]


def train(home, path, *more, steps=4):
    """Trains a stage with the corpus and the checkpoints in home. path may hold a first argument,
    as in "variants/cola_dlm.py vae"."""
    path, *stage = path.split()
    script(path, *stage, *training_options(home, steps), *more)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def snapshot(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def copy_of(home, tmp_path):
    shutil.copytree(home, tmp_path / "copy")
    return tmp_path / "copy"


def refuse(capsys, words, path, *arguments, keep=None):
    """The script ends with code 2 and one line with these words, and changes no file under keep."""
    before = keep and snapshot(keep)
    with pytest.raises(SystemExit) as e:
        script(path, *arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2, error
    assert words in error and "error:" in error and "Traceback" not in error, error
    assert keep is None or snapshot(keep) == before

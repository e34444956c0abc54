import os
import signal

import pytest
import torch

os.environ.pop("NO_COLOR", None)
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers, which reads it once

from engine.checkpoint import load_checkpoint, write_whole
from engine.terminal import unlock_all
from tests.helpers import DOCUMENTS, make_quick, randomised, script, train, write_jsonl


@pytest.fixture(autouse=True)
def alone():
    """Each test draws the same numbers, whichever ran before it. Training takes over Ctrl-C,
    SIGTERM and SIGHUP, and locks its folder; a test gives them back."""
    torch.manual_seed(0)
    yield
    unlock_all()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_DFL)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A small corpus in data/, and one checkpoint of each stage in out/, made by the scripts
    themselves."""
    home = tmp_path_factory.mktemp("home")
    write_jsonl(home / "docs.jsonl", [f"{text} {i}" for i, text in enumerate(DOCUMENTS)])
    options = ["--encoding=bpe", "--vocab_size=300", "--layout=documents", "--val_fraction=0.2"]
    script("data/prepare.py", home / "docs.jsonl", "--out", home / "data", *options)
    with pytest.MonkeyPatch.context() as m:
        make_quick(m)
        train(home, "baselines/gpt.py")
        train(home, "train_vae.py")
        train(home, "train_dit.py")
    return home


@pytest.fixture(scope="session")
def random_out(home, tmp_path_factory):
    """The checkpoints of home/out with random weights: after few steps of training a model writes
    one text only."""
    folder = tmp_path_factory.mktemp("random")
    for kind in ("gpt", "vae", "dit"):
        state = load_checkpoint(home / f"out/{kind}.pt", kind, "")
        write_whole(folder / f"{kind}.pt", randomised(state))
    return folder

"""What to run after data/prepare.py: commands that suit a corpus and this machine."""

import os
import shlex
import time
from pathlib import Path

import torch

from engine.config import TINY
from engine.corpus import Corpus
from engine.loop import minutes, pick_device
from textldm import GPT, TransformerConfig, cross_entropy

ROOT = Path(__file__).resolve().parent.parent
# Vocabularies of this size are for a GPU.
LARGE_VOCABULARY = 2**14

SMALLER = 6  # the step that is timed has so many times fewer rows

# For running text: rows and steps that were tried on books of 0.4 and 1 MB.
TEXT_BATCH = 96
TEXT_ROW = 32
GPT_STEPS = 400
VAE_STEPS = 400
DIT_STEPS = (700, 2500)  # at least and at most; between, what fits in DIT_SECONDS
DIT_SECONDS = 1200
# Seconds of a step, over those of the step of a GPT of the same size. Measured.
VAE_OVER_GPT = 1.1
DIT_OVER_GPT = 2.2


def next_commands(out, meta):
    """Returns the commands that train on the corpus in the folder out, as text.

    out: as the user wrote it. meta: the content of its meta.json.
    """
    # The folder of the corpus, and one for its checkpoints.
    name = out.resolve().name
    folders = [f"--data={shlex.quote(str(out))}", f"--out={shlex.quote(f'out/{name}')}"]
    if meta["vocab_size"] > LARGE_VOCABULARY:
        return "\n".join(["\nTo train on it, on a GPU:\n", *commands_for_a_gpu(folders)])
    if torch.backends.mps.is_available():
        folders.append("--device=cpu")  # untried on the GPU of a Mac
    tokens = min(meta["tokens"].values())
    if meta["layout"] == "documents" and tokens > min(meta["longest"], TINY["block_size"]):
        return "\n".join(["\nTo train on it:\n", *commands_for_documents(folders)])
    # A row of the GPT has one token more.
    row = min(TEXT_ROW, tokens - 1)
    if row < 8 or meta["layout"] == "documents":
        return f"\nIt is too short to train on: one split has only {tokens} tokens."
    per_step = seconds_of_step(meta["vocab_size"], row)
    fitting = int(DIT_SECONDS / (DIT_OVER_GPT * per_step)) // 100 * 100
    steps = min(max(fitting, DIT_STEPS[0]), DIT_STEPS[1])
    seconds = per_step * (GPT_STEPS + VAE_OVER_GPT * VAE_STEPS + DIT_OVER_GPT * steps)
    lines = [f"\nTo train on it, about {minutes(seconds)} on this machine:\n"]
    lines += commands_for_text(folders, row, steps, beginning(out))
    return "\n".join(lines)


def command(script, *options):
    """Returns a command line that runs a script of this project from the working directory."""
    return " ".join(["python", shlex.quote(os.path.relpath(ROOT / script)), *options])


def commands_for_text(folders, row, steps, prompt):
    """Cola DLM with blocks of 4: in these minutes it writes better text than TextLDM.

    steps: of the DiT.
    """
    shared = [*folders, f"--batch_size={TEXT_BATCH}", f"--block_size={row}"]
    prompt = f"--prompt={shlex.quote(prompt)}"
    return [
        command("baselines/gpt.py", *shared, f"--max_steps={GPT_STEPS}"),
        command("variants/cola_dlm.py", "vae", *shared, f"--max_steps={VAE_STEPS}"),
        command("variants/cola_dlm.py", "dit", *shared, "--latent_block=4", f"--max_steps={steps}"),
        command("sample.py", *folders[1:], prompt, "--length=300"),
    ]


def commands_for_documents(folders):
    """TextLDM writes short documents at once."""
    return [
        command("baselines/gpt.py", *folders),
        command("train_vae.py", *folders),
        command("train_dit.py", *folders),
        command("sample.py", *folders[1:], "--n=5"),
    ]


def commands_for_a_gpu(folders):
    """The README's, for one GPU."""
    vae = "--preset=small --teacher=gpt2 --no-muon --compile --max_steps=6000 --beta_warmup=2000"
    dit = "--preset=small --compile --max_steps=20000"
    return [
        command("train_vae.py", *folders, vae),
        command("train_dit.py", *folders, dit),
        command("sample.py", *folders[1:], "--n=4"),
    ]


def beginning(out):
    """Returns the first words of the val text."""
    corpus = Corpus(out, "val", 2)
    text = corpus.encoding.decode(corpus.tokens[:40].tolist())
    words = text.replace("\ufffd", " ").replace("<|endoftext|>", " ").split()
    # The first word may be cut.
    return " ".join(words[1:4])


def seconds_of_step(vocab_size, row):
    """Returns the seconds of a training step of the GPT, from the fastest of a few small steps."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    device, autocast = pick_device(name, row)
    config = TransformerConfig(**TINY | dict(block_size=row + 1, vocab_size=vocab_size))
    gpt = GPT(config).to(device)
    rows = TEXT_BATCH // SMALLER
    length = 3 * row // 4  # the mean over steps: see Run.draw
    tokens = torch.zeros(rows, length, dtype=torch.long, device=device)  # (B, N)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with autocast:
            loss = cross_entropy(gpt(tokens).float(), tokens).mean()
        loss.backward()
        gpt.zero_grad()
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return SMALLER * min(seconds)

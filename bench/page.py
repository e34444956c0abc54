"""A page in which a slider moves a text from noise to its end. One HTML file, which needs no
network.

    python bench/page.py                # of the models in out/, to out/page.html
    python bench/page.py --out=out/input --prompts="The; I said"

It shows what the DiT's estimate decodes to at each step, and the probabilities that the DiT gives
to tokens (with the prompt, at temperature 1). Below, a GPT writes one more token with each step.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from baselines.gpt import generate
from engine.checkpoint import build, load_checkpoint, load_gpt_state, write_whole
from engine.config import UserError, command_line
from engine.terminal import pick_device, run_script
from textldm import GPT, TARGET, DiTConfig, Sampling, TextDiT, TextVAE, TransformerConfig
from textldm import option, texts_of
from variants.writers import diffusion_writer, load_vae

CANDIDATES = 5
BEGIN = 3  # the step at which the page opens: of noise alone nothing can be read
PLACE = "const DATA = null; // bench/page.py puts the run here"
NAMES = "greek small letter; arabic letter; box drawings; latin capital letter; musical symbol; "
# Tokens that nobody could see.
VISIBLE = {"\n": "⏎", "\t": "⇥", " ": " ␣"}


@dataclass
class PageConfig:
    out: str = option("out", "folder of dit.pt, vae.pt and gpt.pt")
    gpt: str = option("", "checkpoint of the GPT (OUT/gpt.pt)")
    page: str = option("", "file to write (OUT/page.html)")
    prompts: str = option(NAMES, "prompts, with a semicolon between two; one may be empty")
    steps: int = option(20, "Euler steps", 1, 200)
    cfg: float = option(3.0, "guidance scale; 1: none", 0, 1000)
    temperature: float = option(0.7, "below 1: likelier tokens; 0: the likeliest", 0)
    seed: int = option(0, "seed of the noise", 0, 2**31)
    about: str = option("", "a sentence on the corpus, for the page")


def shown(encoding, token):
    """A token as text that can be seen."""
    text = encoding.decode([token])
    if text == "<|endoftext|>":
        return " (end)"
    if text in VISIBLE:
        return VISIBLE[text]
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in text)


def described(encoding, token, p):
    """A token of a text with its probability and the likeliest candidates, as the page reads them.
    p (V,): the probabilities of all tokens in its place."""
    best = p.topk(min(CANDIDATES, len(p)))
    candidates = []
    for value, index in zip(best.values.tolist(), best.indices.tolist()):
        candidates.append([shown(encoding, index), round(value, 4)])
    return [shown(encoding, token), round(p[token].item(), 4), candidates]


def denoised(writer, vae, dit, prompt, sampling):
    """What TextLDM writes: for the noise and for each step its time, the evaluations of the network
    until then, and its tokens."""
    seen = []  # z, segment and h of each evaluation; guidance makes two in one batch
    steps = []  # t and the text of each step
    hook = dit.register_forward_hook(lambda module, args, h: seen.append((*args[:2], h)))
    try:
        writer.write([prompt], 0, sampling, lambda t, texts: steps.append((t, texts[0])))
    finally:
        hook.remove()
    noise, segment, _ = (x[:1] for x in seen[0])  # (1, N, C), (1, N), (1, N, E): with the prompt
    (text,) = texts_of(vae.to_tokens(noise, segment), segment, dit.config.end_of_text)
    tokens = [[shown(writer.encoding, token), 0, []] for token in text]
    found = [dict(t=1.0, evaluations=0, tokens=tokens)]
    for k, ((t, text), (_, _, h)) in enumerate(zip(steps, seen), start=1):
        p = dit.to_output(h[0][segment[0] == TARGET]).float().softmax(-1)  # (T, V)
        tokens = [described(writer.encoding, *pair) for pair in zip(text, p)]
        found.append(dict(t=round(t, 4), evaluations=k * len(h), tokens=tokens))
    return found


def written_by_gpt(gpt, prompt, sampling, encoding):
    """What the GPT writes: its tokens."""
    (text,) = generate(gpt, [prompt], 0, sampling.temperature, seed=sampling.seed)
    rows = torch.tensor([[gpt.config.end_of_text, *prompt, *text]])  # (1, N)
    p = gpt(rows)[0].float().softmax(-1)  # (N, V): of the token after each
    return [described(encoding, *pair) for pair in zip(text, p[len(prompt) :])]


def notes(runs, options):
    """What the page says below."""
    longest = max(len(run["gpt"]) for run in runs)
    most = runs[0]["steps"][-1]["evaluations"]
    lines = [f"TextLDM needs {most} evaluations of its network here, the GPT at most {longest}."]
    if options.cfg != 1:
        lines.append(
            "With guidance a step has two evaluations, with the prompt (or the last guess) and "
            "without. Probabilities are of the first; the text can hold a token that they rule out."
        )
    return [
        *lines,
        "(end): the text ends here. A text without it has filled its row. A candidate that begins "
        "with … goes on with the word before it.",
        f"{options.steps} steps, guidance scale {options.cfg:g}, temperature "
        f"{options.temperature:g}, seed {options.seed}, not picked.",
    ]


@torch.no_grad()
def main():
    (options,) = command_line(__doc__, PageConfig)
    path, vae_path = f"{options.out}/dit.pt", f"{options.out}/vae.pt"
    state = load_checkpoint(path, "dit", "python train_dit.py makes one")
    vae = load_vae(vae_path, path, state, TextVAE)
    dit = build(TextDiT, DiTConfig, state)
    if not dit.config.predict_tokens:
        raise UserError(f"{path} predicts velocities, and the page shows probabilities of tokens")
    gpt_path = options.gpt or f"{options.out}/gpt.pt"
    gpt_state = load_gpt_state(gpt_path)
    if gpt_state["tokenizer"] != state["tokenizer"]:
        raise UserError(f"{gpt_path} and {path} have different tokenizers; name another --gpt")
    gpt = build(GPT, TransformerConfig, gpt_state)
    if gpt.config.block_size <= dit.config.block_size:  # it reads an end-of-text token first
        raise UserError(f"{gpt_path} needs longer rows than the DiT; name another --gpt")
    writer = diffusion_writer("dit", vae, dit, state["tokenizer"])
    texts = [text.strip() for text in options.prompts.split(";")]

    runs = []
    _, autocast = pick_device("cpu", dit.config.block_size)
    for prompt in writer.encode(texts):
        seeds = writer.seeds([prompt], options.seed)  # as sample.py makes the noise
        sampling = Sampling(options.steps, options.cfg, options.temperature, seeds)
        with autocast:
            (completion,) = writer.complete([prompt], sampling)
            whole = [*prompt, *completion]
            steps = denoised(writer, vae, dit, whole, sampling)
            tokens = written_by_gpt(gpt, whole, sampling, writer.encoding)
        runs.append(dict(prompt=writer.encoding.decode(whole), steps=steps, gpt=tokens))
    content = dict(runs=runs, about=notes(runs, options), begin=BEGIN, corpus=options.about)
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")  # ends no script
    page = (ROOT / "bench/page.html").read_text(encoding="utf-8")
    target = options.page or f"{options.out}/page.html"
    write_whole(target, page.replace(PLACE, f"const DATA = {data};"))
    print(f"{target}: {len(runs)} prompts, {Path(target).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_script(main)

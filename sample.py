"""Continues prompts.

    python sample.py --prompt="arabic letter" --n=4
    python sample.py --prompt="combining g" --trace          # the text as it forms out of noise
    python sample.py --prompt=greek --trace --gpt=out/gpt.pt # beside a GPT that writes on
    python sample.py --prompts=in.jsonl --output=out.jsonl   # lines of {"prompt": ...}
    python sample.py --prompt="greek" --model=out/gpt.pt     # what another kind of model writes
    python sample.py --out=out/blocks --length=4096          # a Cola DLM writes on and on
    python sample.py --prompt="greek" --keep=2               # better, in more steps

--output writes the lines of --prompts again, each with its "text" and whether it "ended".
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from engine.animation import Side, play
from engine.checkpoint import load_gpt_state, write_whole
from engine.config import UserError, command_line
from engine.prompts import read_lines
from engine.terminal import pick_device, run_script
from textldm import Sampling, option
from variants.writers import gpt_writer, load_writer

TITLES = dict(dit="TextLDM", ldlm="LDLM")  # of the kinds that --trace shows


@dataclass
class SampleConfig:
    prompt: str = option("", "text to continue; may be empty, or end inside a word")
    n: int = option(1, "continuations of each prompt", 1)
    length: int = option(
        0, "tokens to write at most (a Cola DLM: exactly); 0: what a row leaves for them", 0
    )
    steps: int = option(20, "Euler steps", 1)
    cfg: float = option(3.0, "guidance scale; 1: none", 0, 1000)
    temperature: float = option(0.7, "below 1: likelier tokens; 0: the likeliest", 0)
    seed: int = option(0, "seed of the noise", 0, 2**31)
    keep: int = option(0, "tokens to keep each time that the rest is written again; 0: all", 0)
    trace: bool = option(False, "show the text as it forms out of noise")
    gpt: str = option("", "checkpoint of a GPT; --trace shows what it writes beside the text")
    prompts: str = option("", "file of JSON lines with a prompt each, instead of --prompt")
    output: str = option("", "file for the same lines, each with its text and whether it ended")
    batch_size: int = option(64, "prompts at once", 1)
    out: str = option("out", "folder of the checkpoints")
    model: str = option("", "checkpoint of any kind that writes (OUT/dit.pt)")
    vae: str = option("", "checkpoint of stage 1 (OUT/vae.pt)")
    device: str = option("auto", "cpu, cuda, mps, or auto")


def read_prompts(options):
    """A list of dicts with a prompt each."""
    output = Path(options.output)
    if options.output and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output={output} must be a file, in a folder that exists")
    if options.prompts:
        return read_lines(options.prompts, ["prompt"], "--prompts=")
    return [{"prompt": options.prompt}]


class Printer:
    """Prints a text as it grows by blocks."""

    def __init__(self, prompt, decode):
        self.prompt = prompt
        self.decode = decode
        self.shown = ""

    def stream(self, t, texts):
        # The last sign may be a part of a character, which the next block completes.
        whole = f"{self.prompt}|{self.decode(texts[0])}".rstrip("\ufffd")
        print(whole[len(self.shown) :], end="", flush=True)
        self.shown = whole


def encode(given, writer, options):
    """The prompts of lines as ids, each options.n times."""
    prompts = writer.encode([line["prompt"] for line in given], options.length)
    return [prompt for prompt in prompts for _ in range(options.n)]


def check(options, writer, path):
    """Raises UserError where an option does not go with others or with the kind of the model."""
    if options.gpt and not options.trace:
        raise UserError("--gpt needs --trace; to write with a GPT alone, use --model=FILE")
    if options.trace and options.keep:
        raise UserError("--trace shows a text that is written all at once; leave --trace out")
    if options.trace and (writer.block or not writer.has_steps):
        raise UserError(
            f"--trace shows how one target forms out of noise; {path} is a {writer.kind}, which "
            "writes in another way; leave --trace out"
        )
    if options.keep and (writer.block or writer.kind == "gpt"):
        raise UserError(
            f"--keep is for models that write all tokens at once; {path} is a {writer.kind}, which "
            "does not; leave --keep out"
        )


def one_by_one(texts):
    """The steps in which a GPT writes texts (lists of ids), for show_steps."""
    last = max(map(len, texts))
    return [(f"n={n}", [ids[:n] for ids in texts]) for n in range(last + 1)]


def show_steps(prompts, sides):
    """In a terminal an animation, elsewhere a line for each of some ten steps."""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        play(prompts, sides)
        return
    for side in sides:
        steps = side.steps[1:]
        some = steps[:: max(len(steps) // 10, 1)]
        some[-1] = steps[-1]  # what is written in the end
        for label, texts in some:
            print("  ".join([label, *(repr(side.decode(ids)) for ids in texts)]))


def main():
    (options,) = command_line(__doc__, SampleConfig)
    device, autocast = pick_device(options.device)
    path = options.model or f"{options.out}/dit.pt"
    vae = options.vae or f"{options.out}/vae.pt"
    writer = load_writer(path, vae, device)
    pick_device(options.device, writer.block_size)  # the kind of attention depends on it
    check(options, writer, path)
    given = read_prompts(options)
    lines = [line for line in given for _ in range(options.n)]
    asked = [line["prompt"] for line in lines]
    prompts = encode(given, writer, options)
    if options.gpt:
        gpt = gpt_writer(load_gpt_state(options.gpt), device)
        gpt_prompts = encode(given, gpt, options)

    # A text depends on its prompt, its number among the copies of that prompt, and --seed alone.
    seeds = writer.seeds(prompts, options.seed)
    if options.gpt:
        gpt_seeds = gpt.seeds(gpt_prompts, options.seed)

    printer = Printer(asked[0], writer.decode)
    texts = []
    starts = range(0, len(prompts), options.batch_size)
    for start in tqdm(starts, desc="sample", disable=len(starts) == 1 or options.trace):
        batch = slice(start, start + options.batch_size)
        some = prompts[batch]
        steps = [("t=1.000", [[] for _ in some])]

        def remember(t, texts, steps=steps):
            steps.append((f"t={t:.3f}", texts))

        callback = None
        if options.trace:
            callback = remember
        elif writer.block and len(prompts) == 1 and not options.output:
            callback = printer.stream
        sampling = Sampling(options.steps, options.cfg, options.temperature, seeds[batch])
        with autocast:
            texts += writer.write(some, options.length, sampling, callback, options.keep)
            if options.gpt:
                by_its_own = replace(sampling, seed=gpt_seeds[batch])
                by_gpt = gpt.write(gpt_prompts[batch], options.length, by_its_own)
        if options.trace:
            cost = 1 if options.cfg == 1 else 2  # guidance needs two evaluations in a step
            sides = [Side(TITLES[writer.kind], writer.decode, steps, cost)]
            if options.gpt:
                sides.insert(0, Side("GPT", gpt.decode, one_by_one(by_gpt), 1))
            show_steps(asked[batch], sides)

    if options.output:
        out = []
        for line, ids in zip(lines, texts):
            line = dict(line, text=writer.decode(ids), ended=writer.tokenizer["eot"] in ids)
            out.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_whole(options.output, "".join(out))
        return
    for line, ids in zip(lines, texts):
        whole = f"{line['prompt']}|{writer.decode(ids)}"
        print(whole[len(printer.shown) :])


if __name__ == "__main__":
    run_script(main)

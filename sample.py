"""Continues prompts.

    python sample.py --prompt="arabic letter" --n=4
    python sample.py --prompt="combining g" --trace             # the text as it forms out of noise
    python sample.py --prompts=in.jsonl --output=out.jsonl      # lines of {"prompt": ...}; adds "text", and if it "ended"
    python sample.py --prompt="greek" --gpt=out/gpt.pt          # what the autoregressive baseline writes
    python sample.py --prompt="Return" --length=4096            # a DiT with latent_block: on and on, through one document after another
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from textldm import (GPT, LDLM, Config, DiTConfig, JointConfig, TextDiT, TextVAE, UserError, VAEConfig, command_line, continue_texts,
                     load_checkpoint, load_encoding, model_from, option, pick_device, run, write_whole)


@dataclass
class SampleConfig(Config):
    prompt: str = option("", "text to continue; may be empty, or end inside a word")
    n: int = option(1, "continuations of each prompt", 1)
    length: int = option(0, "tokens to write at most (exactly, with latent_block); 0: what a training row leaves after the prompt", 0)
    steps: int = option(20, "Euler steps", 1)
    cfg: float = option(3.0, "guidance scale; 1: none", 0, 1000)
    seed: int = option(0, "seed of the noise", 0, 2**31)
    trace: bool = option(False, "print the text at a few steps of the way from noise")
    prompts: str = option("", "file of JSON lines with a prompt each, instead of --prompt")
    output: str = option("", "file to write the same lines to, with the continuation as text, and whether it ended")
    batch_size: int = option(64, "prompts at once", 1)
    out: str = option("out", "folder of the checkpoints")
    dit: str = option("", "checkpoint of stage 2 (OUT/dit.pt)")
    vae: str = option("", "checkpoint of stage 1 (OUT/vae.pt)")
    gpt: str = option("", "checkpoint of a GPT, to write in the place of TextLDM")
    temperature: float = option(0.7, "below 1: likelier tokens (of a DiT that predicts tokens, or of a GPT, for which 1 is usual); 0: the likeliest", 0)
    device: str = option("auto", "cpu, cuda, mps, or auto")


def load_models(options, device):
    """(vae, dit, tokenizer) of matching checkpoints."""
    paths = options.vae or f"{options.out}/vae.pt", options.dit or f"{options.out}/dit.pt"
    d = load_checkpoint(paths[1], "dit", "python train_dit.py makes one") if Path(paths[1]).is_file() else {}
    if "joint" in d:  # LDLM: all in one
        ldlm = model_from(LDLM, JointConfig, d).to(device)
        return ldlm, ldlm.dit, d["tokenizer"]
    v = load_checkpoint(paths[0], "vae", "python train_vae.py makes one")
    if not d or d.get("tokenizer") != v.get("tokenizer"):  # load_checkpoint says which
        d = load_checkpoint(paths[1], "dit", "python train_dit.py makes one", v.get("tokenizer"))
    vae, dit = model_from(TextVAE, VAEConfig, v), model_from(TextDiT, DiTConfig, d)
    if d.get("vae") != vae.z_mean.tolist():
        raise UserError(f"{paths[1]} was trained on the latents of another VAE than {paths[0]}; name that one with --vae")
    return vae.to(device), dit.to(device), v["tokenizer"]


def read_lines(path, wanted, option=""):
    """The dicts of a file of JSON lines, each with the wanted fields as text; option is what named the file."""
    if not Path(path).is_file():
        raise UserError(f"{option}{path} does not exist, or is no file")
    lines = []
    for i, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").strip("\n").split("\n")):
        try:
            lines.append(json.loads(line))
            [lines[-1][k] + "" for k in wanted]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}, line {i + 1}: expected " + "{" + ", ".join(f'"{k}": "..."' for k in wanted) + "}") from None
    return lines


def read_prompts(options):
    if options.output and (Path(options.output).is_dir() or not Path(options.output).parent.is_dir()):
        raise UserError(f"--output={options.output} must be a file, in a folder that exists")
    if not options.prompts:
        return [{"prompt": options.prompt}]
    return read_lines(options.prompts, ["prompt"], "--prompts=")


def fit(prompts, length, block_size):
    """Cuts prompts that leave no room for `length` new tokens; an eighth of a row where no length was asked for."""
    if length >= block_size:
        raise UserError(f"--length={length} does not fit the model's rows of {block_size} tokens; at most {block_size - 1}")
    room = block_size - (length or max(block_size // 8, 1))
    for i, prompt in enumerate(prompts):
        if len(prompt) > room:
            print(f"warning: prompt {i + 1} has {len(prompt)} tokens, {len(prompt) - room} more than fit; its beginning is cut off",
                  file=sys.stderr)
            prompts[i] = prompt[-room:]
    return prompts


@torch.no_grad()
def generate(gpt, prompts, length, eot, temperature=1.0, top_p=1.0, seed=0):
    """Continues prompts (lists of ids, read from an `eot` on) with the autoregressive baseline, as `continue_texts` does
    with TextLDM; temperature 0 is greedy, top_p keeps the likeliest tokens that together have that probability."""
    rows, block, device = [[eot, *prompt] for prompt in prompts], gpt.config.block_size, gpt.wte.weight.device
    ends = [len(row) + length if length else block for row in rows]
    # a row's luck is its own, whatever its neighbours; greedy is to be lucky always
    u = [(temperature > 0) * torch.rand(end, generator=torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)) for i, end in enumerate(ends)]
    live = [i for i, row in enumerate(rows) if len(row) < ends[i]]
    while live:
        seen = [rows[i][-block:] for i in live]
        x = torch.tensor([row + [eot] * (max(map(len, seen)) - len(row)) for row in seen], device=device)  # (B, N)
        h = gpt.hidden_states(x, gpt.config.n_layer)[range(len(live)), [len(row) - 1 for row in seen]]      # (B, E)
        logits = F.linear(gpt.ln_f(h), gpt.wte.weight).float().cpu()                                        # (B, V)
        p, order = (logits / max(temperature, 1e-4)).softmax(-1).sort(descending=True)                      # (B, V)
        p = p * (p.cumsum(-1) - p < max(top_p, 1e-9))
        luck = torch.stack([u[i][len(rows[i])] for i in live])[:, None] * p.sum(-1, keepdim=True)           # (B, 1)
        pick = (p.cumsum(-1) <= luck).sum(-1, keepdim=True).minimum((p > 0).sum(-1, keepdim=True) - 1)      # (B, 1)
        for i, token in zip(live, order.gather(1, pick).flatten().tolist()):
            rows[i].append(token)
        live = [i for i in live if len(rows[i]) < ends[i] and rows[i][-1] != eot]
    return [row[1 + len(prompt):] for row, prompt in zip(rows, prompts)]


def main():
    options, = command_line(__doc__, SampleConfig)
    sys.stdout.reconfigure(errors="replace")  # a prompt, or half a character at the end of a text, may not print
    device, autocast = pick_device(options.device)
    if options.gpt and options.trace:
        raise UserError("--trace shows what the steps of diffusion point to; --gpt has none, leave one of them out")
    if options.gpt:
        gpt, tokenizer = GPT.from_pretrained(options.gpt)
        gpt, block_size = gpt.to(device), gpt.config.block_size - 1
    else:
        vae, dit, tokenizer = load_models(options, device)
        block_size = dit.config.block_size
    b = 0 if options.gpt else dit.config.latent_block
    if b and options.trace:
        raise UserError(f"--trace shows how one target forms, and this DiT writes blocks of {b}, one after another; leave it out")
    encoding, eot = load_encoding(tokenizer), tokenizer["eot"]
    lines = read_prompts(options)
    prompts = fit([encoding.encode_ordinary(line["prompt"]) for line in lines], b or options.length, block_size)
    lines, prompts = ([x for x in xs for _ in range(options.n)] for xs in (lines, prompts))

    def show(ids):
        return encoding.decode(ids).removesuffix("<|endoftext|>").replace("<|endoftext|>", "\n")

    def trace(t, texts):
        seen.append(t)
        if (len(seen) - 1) % max(options.steps // 10, 1) == 0:
            print(f"t={t:.3f}  " + "  ".join(repr(show(ids)) for ids in texts))

    def stream(t, texts):
        nonlocal shown
        before, shown = shown, f"{lines[0]['prompt']}|{show(texts[0])}".rstrip("\ufffd")  # which may become a character
        print(shown[len(before) :], end="", flush=True)

    texts, seen, shown, streams = [], [], "", b and len(prompts) == 1 and not options.output
    for start in tqdm(range(0, len(prompts), options.batch_size), desc="sample", disable=len(prompts) <= options.batch_size):
        some, seed = prompts[start : start + options.batch_size], options.seed * 1_000_003 + start  # no two seeds share noise
        seen.clear()
        with autocast:
            if options.gpt:
                new = generate(gpt, some, options.length, eot, options.temperature, seed=seed)
            else:
                new = continue_texts(vae, dit, some, options.length, eot, seed, trace if options.trace else stream if streams else None,
                                     steps=options.steps, cfg_scale=options.cfg, temperature=options.temperature)
        texts += [(show(ids), eot in ids) for ids in new]
    if options.output:
        write_whole(options.output, "".join(json.dumps(dict(line, text=text, ended=ended), ensure_ascii=False) + "\n"
                                            for line, (text, ended) in zip(lines, texts)))
    else:
        for line, (text, _) in zip(lines, texts):
            print(f"{line['prompt']}|{text}"[len(shown) :])


if __name__ == "__main__":
    run(main)

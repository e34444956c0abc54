"""The autoregressive baseline: trains a GPT of GPT-2's architecture, and writes with it.

    python baselines/gpt.py                                     # the embedded names
    python baselines/gpt.py --data=data/docs --out=out/docs

It is also the teacher for REPA where no pretrained model shares the tokenizer. Watch `loss`, in
nats per token. The best checkpoint by validation loss is kept.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.config import PAPER_SCHEDULE, TINY, TrainConfig, command_line
from engine.corpus import Corpus
from engine.evaluation import lines_of_samples
from engine.terminal import pick_device, run_script
from engine.train import Stage, train
from textldm import (
    CONTEXT,
    GPT,
    OURS,
    TransformerConfig,
    row_seeds,
)

# The time of all three stages of README's first command, over the time of this one. Measured.
FIRST_COMMAND = 10.0
PRESETS = dict(
    tiny=TINY | dict(max_steps=400),
    small=PAPER_SCHEDULE | dict(n_layer=12, n_head=12, n_embd=768),  # GPT-2's sizes
    medium=PAPER_SCHEDULE | dict(n_layer=24, n_head=16, n_embd=1024),
    large=PAPER_SCHEDULE | dict(n_layer=36, n_head=20, n_embd=1280),
)


@torch.no_grad()
def generate(gpt, prompts, length, temperature=1.0, top_p=1.0, seed=0):
    """Continues prompts (lists of ids) as `continue_texts` does with TextLDM.

    length: tokens to write at most; 0: what a row leaves. temperature 0 is greedy. top_p keeps the
    likeliest tokens that together have that probability. seed: an int, or one for each row. Returns
    lists of ids."""
    eot, block = gpt.config.end_of_text, gpt.config.block_size
    rows = [[eot, *prompt] for prompt in prompts]
    ends = [len(row) + length if length else block for row in rows]
    choices = []  # the numbers that choose the tokens of each row
    for end, row_seed in zip(ends, row_seeds(prompts, seed)):
        u = torch.rand(end, generator=torch.Generator().manual_seed(row_seed))
        choices.append(u if temperature > 0 else torch.zeros(end))
    live = [i for i in range(len(rows)) if len(rows[i]) < ends[i]]
    while live:
        logits = next_logits(gpt, [rows[i][-block:] for i in live])  # (B, V)
        p, order = (logits / max(temperature, 1e-4)).softmax(-1).sort(descending=True)  # (B, V)
        p = p * (p.cumsum(-1) - p < max(top_p, 1e-9))
        u = torch.stack([choices[i][len(rows[i])] for i in live])[:, None]  # (B, 1)
        below = (p.cumsum(-1) <= u * p.sum(-1, keepdim=True)).sum(-1, keepdim=True)  # (B, 1)
        last = (p > 0).sum(-1, keepdim=True) - 1
        picked = order.gather(1, below.minimum(last))[:, 0].tolist()
        for i, token in zip(live, picked):
            rows[i].append(token)
        live = [i for i in live if len(rows[i]) < ends[i] and rows[i][-1] != eot]
    return [row[1 + len(prompt) :] for row, prompt in zip(rows, prompts)]


def next_logits(gpt, rows):
    """Logits (B, V) of the token after each row (lists of ids), in fp32 on the CPU."""
    N = max(len(row) for row in rows)
    tokens = torch.full((len(rows), N), gpt.config.end_of_text)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    h = gpt.hidden_states(tokens.to(gpt.wte.weight.device), gpt.config.n_layer)  # (B, N, E)
    last = [len(row) - 1 for row in rows]
    h = h[range(len(rows)), last]  # (B, E)
    return F.linear(gpt.ln_f(h), gpt.wte.weight).float().cpu()


def gpt_loss(gpt, batch):
    """The mean loss of counted tokens, in nats, each given an end-of-text token and all before
    it."""
    tokens = batch.tokens
    end_of_text = gpt.config.end_of_text
    seen = F.pad(tokens[:, :-1], (1, 0), value=end_of_text)  # (B, N)
    return gpt(seen, tokens, batch.counted)


@torch.no_grad()
def evaluate(gpt, batches, corpus):
    """The mean loss, as a dict, and a text of it and four samples."""
    loss = sum(gpt_loss(gpt, batch).item() for batch in batches) / len(batches)
    prompts = []
    for row, segment in zip(batches[0].tokens[:4], batches[0].segment):
        prompts.append(row[segment == CONTEXT].tolist()[-32:])
    texts = generate(gpt, prompts, 32)
    lines = [f"val: {loss:.4f} nats per token"]
    lines += lines_of_samples(corpus.encoding, corpus.eot, prompts, texts)
    return dict(loss=loss), "\n".join(lines)


def main():
    config, cfg = command_line(
        __doc__, TransformerConfig, TrainConfig, presets=PRESETS, recipe=OURS
    )
    is_first_command = len(sys.argv) == 1
    corpus = Corpus(cfg.data, "train", config.block_size)
    val = Corpus(cfg.data, "val", config.block_size)
    # One token more than the rows of other stages. As a teacher it reads them after an end-of-text
    # token, and each of these positions has to be trained.
    corpus.N = val.N = config.block_size = corpus.N + 1
    config.vocab_size = corpus.meta["vocab_size"]
    device, _ = pick_device(cfg.device, corpus.N)
    val_batches = val.fixed_batches(4, device)
    torch.manual_seed(cfg.seed)
    gpt = GPT(config).to(device)
    whole = FIRST_COMMAND if is_first_command else 0.0
    stage = Stage("gpt", cfg, corpus, gpt, dict(kind="gpt"), whole=whole)

    def loss_of(net, batch, generator, step):
        return dict(loss=gpt_loss(net, batch))

    def weight_of(batch):
        return batch.counted.float().sum()

    train(stage, loss_of, weight_of, lambda gpt: evaluate(gpt, val_batches, corpus))


if __name__ == "__main__":
    run_script(main)

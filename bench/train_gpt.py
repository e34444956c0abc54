"""Trains a GPT of GPT-2's architecture: the teacher for REPA where no pretrained model shares the
tokenizer, and the autoregressive baseline.

    python bench/train_gpt.py                                   # the embedded names
    python bench/train_gpt.py --data=data/docs --out=out/docs

Watch `loss`, in nats a token; the best by val is kept.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import generate
from textldm import (CONTEXT, GPT, Corpus, TrainConfig, TrunkConfig, at_scale, command_line, cross_entropy, pick_device, run, train,
                     weighted_mean)

FIRST_COMMAND = 10.0  # measured: the time of all three stages of README's first command, over this one's
PRESETS = dict(tiny=dict(max_steps=400), small=at_scale(12, 12, 768), medium=at_scale(24, 16, 1024), large=at_scale(36, 20, 1280))  # GPT-2's


def main():
    config, cfg = command_line(__doc__, TrunkConfig, TrainConfig, presets=PRESETS)
    is_first_command = (config, cfg) == (TrunkConfig(), TrainConfig(**PRESETS["tiny"]))
    corpus, val = (Corpus(cfg.data, split, config.block_size) for split in ("train", "val"))
    # a token more than the rows of other stages: it reads them after an end-of-text, and each position has to be trained for that
    corpus.N = val.N = config.block_size = corpus.N + 1
    config.vocab_size = corpus.meta["vocab_size"]
    torch.manual_seed(cfg.seed)
    rows = val.fixed_batches(4, pick_device(cfg.device)[0], cut_words=False)
    prompts = [row[segment == CONTEXT].tolist()[-32:] for row, segment in zip(rows[0].tokens[:4], rows[0].segment)]

    def loss_of(net, batch, generator=None, step=None):
        logits = net(F.pad(batch.tokens[:, :-1], (1, 0), value=corpus.eot)).float()  # (B, N, V)
        return dict(loss=weighted_mean(cross_entropy(logits, batch.tokens), batch.counted))

    @torch.no_grad()
    def evaluate(gpt):
        loss = sum(loss_of(gpt, b)["loss"].item() for b in rows) / len(rows)
        lines = [f"val: {loss:.4f} nats a token"]
        for prompt, text in zip(prompts, generate(gpt, prompts, 32, corpus.eot)):
            lines.append("  {!r} -> {!r}".format(*(corpus.encoding.decode([i for i in x if i != corpus.eot]) for x in (prompt, text))))
        tqdm.write("\n".join(lines))
        return dict(loss=loss)

    train("gpt", cfg, GPT(config), corpus, loss_of, evaluate, weight_of=lambda b: b.counted.float().sum(), cut_words=False,
          whole=FIRST_COMMAND if is_first_command else 0)


if __name__ == "__main__":
    run(main)

"""Trains a masked-diffusion language model on the blocks of textldm.py: the baseline that diffuses tokens, not latents.

    python bench/train_masked.py                                # the embedded names
    python bench/evaluate.py --systems=real,gpt,textldm,masked

After MDLM (Sahoo et al. 2024, arXiv 2406.07524): noise replaces each token of the target by a mask with probability t, and the
network, which needs not be told the time, learns what was there. Watch `loss`, a bound on the nats a token.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from textldm import (PADDING, TARGET, Corpus, TrainConfig, Trunk, TrunkConfig, command_line, cross_entropy,
                     init_weights, pick_device, rows_of, run, texts_of, train, weighted_mean)
from train_dit import PRESETS  # the same trunks and schedules


class MaskedLM(Trunk):
    """p(token) at every position, given the tokens that are not masked: those of the context and of what was written so far."""

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        self.wte = nn.Embedding(config.vocab_size + 1, config.n_embd)           # the last one: the mask
        self.to_logits = nn.Linear(config.n_embd, config.vocab_size)
        init_weights(self)

    def forward(self, tokens, masked, mask=None):                               # (B, N) each -> (B, N, V)
        return self.to_logits(super().forward(self.wte(tokens.masked_fill(masked, self.config.vocab_size)), mask)).float()


def masked_loss(net, batch, generator):
    """The bound of MDLM, linear schedule: cross-entropy of the masked tokens over t, whose mean over t counts every token once."""
    B, N = batch.tokens.shape
    # times spread evenly over the rows of a batch, which makes 1 / t noisy no more than it must be
    t = (torch.rand(1, generator=generator, device=batch.tokens.device) + torch.arange(B, device=batch.tokens.device) / B) % 1
    t = t.clamp(min=1e-3)[:, None]                                              # (B, 1)
    is_target = batch.segment == TARGET
    masked = is_target & (torch.rand(B, N, generator=generator, device=t.device) < t)
    ce = cross_entropy(net(batch.tokens, masked), batch.tokens)  # (B, N)
    return weighted_mean(ce * masked / t, batch.weight * is_target)


@torch.no_grad()
def unmask(model, prompts, length, eot, steps=50, temperature=1.0, seed=0):
    """Continues prompts as `continue_texts` does: all of the target masked at t = 1; each step draws those tokens that the
    reverse process reveals on its way from t to the next, (t - t_next) / t of the masked ones, from p(token)."""
    tokens, segment = rows_of(prompts, length, model.config.block_size, eot)
    device, generator = model.wte.weight.device, torch.Generator().manual_seed(seed)
    tokens, segment = tokens.to(device), segment.to(device)
    masked = segment == TARGET
    for i in range(steps, 0, -1):
        logits = model(tokens, masked, (segment != PADDING)[:, None, None])
        u, gumbel = torch.rand(tokens.shape, generator=generator), torch.rand(logits.shape, generator=generator)
        drawn = (logits / max(temperature, 1e-6) - (-gumbel.log()).log().to(device)).argmax(-1)  # a draw from the softmax
        now = masked & (u.to(device) < 1 / i)
        tokens, masked = torch.where(now, drawn, tokens), masked & ~now
    return texts_of(tokens, segment, eot)


def main():
    config, cfg = command_line(__doc__, TrunkConfig, TrainConfig, presets=PRESETS)
    corpus, val = (Corpus(cfg.data, split, config.block_size) for split in ("train", "val"))
    config.vocab_size, config.block_size = corpus.meta["vocab_size"], corpus.N
    torch.manual_seed(cfg.seed)
    rows = val.fixed_batches(4, pick_device(cfg.device)[0])

    @torch.no_grad()
    def evaluate(model):
        loss = sum(masked_loss(model, b._replace(weight=b.counted.float()), torch.Generator(b.tokens.device).manual_seed(i)).item()
                   for i, b in enumerate(rows)) / len(rows)
        tqdm.write(f"val: at most {loss:.4f} nats a token of the target")
        return dict(loss=loss)

    loss_of = lambda net, batch, generator, step: dict(loss=masked_loss(net, batch, generator))
    weight_of = lambda batch: (batch.weight * (batch.segment == TARGET)).sum()
    train("masked", cfg, MaskedLM(config), corpus, loss_of, evaluate, weight_of, ema=True)


if __name__ == "__main__":
    run(main)

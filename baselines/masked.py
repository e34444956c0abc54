"""Masked diffusion on the blocks of textldm.py: the baseline that diffuses tokens, not latents.

    python baselines/masked.py                                  # the embedded names
    python bench/evaluate.py --systems=real,gpt,textldm,masked

After MDLM (Sahoo et al. 2024, arXiv 2406.07524). Noise replaces each token of the target by a mask
with probability t, and the network learns what was there. It sees how many tokens are masked, so it
is not told the time. Watch `loss`, an upper bound on the nats per token.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.config import DIT_PRESETS, TrainConfig, command_line
from engine.corpus import Corpus
from engine.terminal import pick_device, run_script
from engine.train import Stage, train
from textldm import (
    OURS,
    PADDING,
    TARGET,
    Sampling,
    Transformer,
    TransformerConfig,
    cross_entropy,
    init_weights,
    row_generators,
    rows_of,
    texts_of,
    weighted_mean,
)
from train_dit import weight_of


class MaskedLM(nn.Module):
    """p(token) at every position, given the tokens that are not masked. `to_logits` tells it of
    what `forward` returns."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.wte = nn.Embedding(config.vocab_size + 1, config.n_embd)  # the last one is the mask
        self.to_logits = nn.Linear(config.n_embd, config.vocab_size)
        init_weights(self)

    def forward(self, tokens, is_masked, mask=None):
        """tokens, is_masked (B, N) -> (B, N, E). mask (B, 1, 1, N) hides padding."""
        tokens = tokens.masked_fill(is_masked, self.config.vocab_size)
        return self.transformer(self.wte(tokens), mask)


def masked_loss(net, batch, generator):
    """The bound of MDLM with the linear schedule: the cross-entropy of the masked tokens over t.
    Its mean over t counts every token once."""
    B, N = batch.tokens.shape
    device = batch.tokens.device
    # The times of a batch are evenly spread, because 1 / t is noisy enough.
    t = torch.rand(1, generator=generator, device=device) + torch.arange(B, device=device) / B
    t = (t % 1).clamp(min=1e-3)[:, None]  # (B, 1)
    is_target = batch.segment == TARGET
    is_masked = is_target & (torch.rand(B, N, generator=generator, device=device) < t)
    weight = batch.weight * is_masked / t  # (B, N)
    h = net(batch.tokens, is_masked)  # (B, N, E)
    loss, _ = cross_entropy(h, net.to_logits, batch.tokens, weight)
    return loss * weight.sum() / (batch.weight * is_target).sum().clamp(min=1e-9)


@torch.no_grad()
def unmask(model, prompts, length=0, sampling=Sampling(cfg_scale=1.0)):
    """Continues prompts as `continue_texts` does. All of the target is masked at t = 1. Each step
    draws from p(token) those tokens that the reverse process reveals on its way from t to the next:
    a share of (t - t_next) / t of the masked ones. There is no guidance."""
    end_of_text = model.config.end_of_text
    tokens, segment = rows_of(prompts, length, model.config.block_size, end_of_text)  # (B, N) each
    device = model.wte.weight.device
    generators = row_generators(prompts, sampling.seed)
    tokens, segment = tokens.to(device), segment.to(device)
    is_target = segment == TARGET
    is_masked = is_target
    mask = (segment != PADDING)[:, None, None]  # (B, 1, 1, N)

    def draw(counts, *shape):
        """Uniform numbers, so many for each row: (sum of counts, *shape)."""
        some = [torch.rand(n, *shape, generator=g) for n, g in zip(counts.tolist(), generators)]
        return torch.cat(some).to(device)

    for i in range(sampling.steps, 0, -1):
        h = model(tokens, is_masked, mask)  # (B, N, E)
        u = torch.ones(tokens.shape, device=device)  # (B, N)
        u[is_target] = draw(is_target.sum(1))
        is_revealed = is_masked & (u < 1 / i)
        # Only R revealed tokens are drawn. Random numbers for all would take longer than the
        # network, and many GB, if the vocabulary is large.
        logits = model.to_logits(h[is_revealed]).float()  # (R, V)
        scaled = logits / max(sampling.temperature, 1e-6)
        uniform = draw(is_revealed.sum(1), scaled.shape[-1])  # (R, V)
        gumbel = -(-uniform.log()).log()
        tokens[is_revealed] = (scaled + gumbel).argmax(-1)  # a draw from the softmax
        is_masked = is_masked & ~is_revealed
    return texts_of(tokens, segment, end_of_text)


@torch.no_grad()
def first_logits(model, prompts):
    """Logits (B, V) of the token after each prompt, where all after it is masked."""
    config = model.config
    tokens, segment = rows_of(prompts, 0, config.block_size, config.end_of_text)  # (B, N) each
    device = model.wte.weight.device
    h = model(tokens.to(device), (segment == TARGET).to(device))  # (B, N, E)
    h = h[range(len(prompts)), [len(prompt) for prompt in prompts]]  # (B, E)
    return model.to_logits(h).float()


@torch.no_grad()
def evaluate(model, batches):
    loss = 0
    for i, batch in enumerate(batches):
        batch = batch._replace(weight=batch.counted.float())
        generator = torch.Generator(batch.tokens.device).manual_seed(i)
        loss += masked_loss(model, batch, generator).item() / len(batches)
    return dict(loss=loss), f"val: at most {loss:.4f} nats per token of the target"


def main():
    config, cfg = command_line(
        __doc__, TransformerConfig, TrainConfig, presets=DIT_PRESETS, recipe=OURS
    )
    corpus = Corpus(cfg.data, "train", config.block_size)
    val = Corpus(cfg.data, "val", config.block_size)
    config.vocab_size, config.block_size = corpus.meta["vocab_size"], corpus.N
    device, _ = pick_device(cfg.device, corpus.N)
    val_batches = val.fixed_batches(4, device)
    torch.manual_seed(cfg.seed)
    model = MaskedLM(config).to(device)
    stage = Stage("masked", cfg, corpus, model, dict(kind="masked"), has_average=True)

    def loss_of(net, batch, generator, step):
        return dict(loss=masked_loss(net, batch, generator))

    train(stage, loss_of, weight_of, lambda average: evaluate(average, val_batches))


if __name__ == "__main__":
    run_script(main)

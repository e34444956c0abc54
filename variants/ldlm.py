"""LDLM: the latents are learned together with the DiT, in one stage (Meshchaninov et al. 2026,
arXiv 2605.07933).

    python variants/ldlm.py --out=out/ldlm --teacher=out/gpt.pt   # after baselines/gpt.py
    python sample.py --out=out/ldlm --prompt="greek small letter"

What it changes of TextLDM:
    - An encoder and a decoder stand between latents and the hidden states of a frozen GPT, instead
      of tokens. A token decoder turns hidden states into tokens.
    - The DiT predicts the clean latents themselves.
    - One loss trains all of it: L_diff + L_h + L_w, see `joint_loss`.

The latent of a token has mean 0 and standard deviation 1 over its channels. Watch the line
"latents": the loss says nothing, because the latents move with it, so the latest checkpoint is
kept.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.checkpoint import build, load_teacher_state
from engine.config import DIT_PRESETS, TrainConfig, UserError, command_line
from engine.corpus import Corpus, shorten_rows
from engine.evaluation import Evaluation
from engine.statistics import feature_statistics
from engine.terminal import pick_device, run_script
from engine.train import Stage, train
from textldm import (
    CONTEXT,
    GPT,
    OURS,
    DiTConfig,
    Sampling,
    TextDiT,
    Transformer,
    TransformerConfig,
    by_chunks,
    continue_texts,
    cross_entropy,
    denoising_loss,
    init_weights,
    option,
    same_segment,
    teacher_features,
    weighted_mean,
)
from train_dit import weight_of

# Of our departures, those that LDLM shares, and one of its own.
OURS_HERE = {k: OURS[k] for k in ("adaln", "self_condition", "t_mean", "t_std", "muon")}
OURS_HERE["decoder_noise"] = 1.5  # the paper's 3 is for longer training


@dataclass
class LDLMConfig(DiTConfig):
    channels: int = option(192, "C, channels of a latent; one alone would always be 0", 2)
    coder_layers: int = option(2, "blocks of encoder, decoder and token decoder, each", 1, 999)
    predict_tokens: bool = False  # not an option: the mean latent of a token would move
    adaptive_times: bool = option(True, "times that spread the loss evenly, not logit-normal")
    hidden_mse: bool = option(True, "the decoder learns hidden states, and not the tokens' loss")
    encoder_warmup: int = option(400, "steps until diffusion shapes the encoder; 0: at once", 0)
    decoder_noise: float = option(3.0, "std of noise in the decoder's input, in training", 0)
    teacher_config: str = ""  # the frozen GPT's, as JSON


@dataclass
class LDLMStage:
    teacher: str = option("", "the frozen GPT (OUT/gpt.pt)")


class Coder(nn.Module):
    """A small Transformer from vectors of n_in to vectors of n_out numbers, one per token."""

    def __init__(self, config, n_in, n_out):
        super().__init__()
        self.config = replace(config, n_layer=config.coder_layers)
        self.first = nn.Linear(n_in, config.n_embd)
        self.transformer = Transformer(self.config)
        self.last = nn.Linear(config.n_embd, n_out)
        init_weights(self)

    def hidden(self, x, segment):
        """(B, N, n_in) -> what `last` reads (B, N, E)"""
        return self.transformer(self.first(x).float(), same_segment(segment))

    def forward(self, x, segment):
        """(B, N, n_in) -> (B, N, n_out)"""
        return self.last(self.hidden(x, segment)).float()


class LatentDiT(TextDiT):
    """A TextDiT that predicts the clean latents themselves."""

    def __init__(self, config):
        super().__init__(config)
        # Running means of the loss at 64 even times from 0 to 1, for adaptive times.
        self.register_buffer("loss_at", torch.zeros(64))

    def loss(self, h, tokens, z_0, eps, weight):
        losses = (self.to_output(h).float() - z_0).square().mean(-1)
        return weighted_mean(losses, weight), losses.detach()

    def estimate(self, h, z_t, t, temperature=1.0):
        return self.to_output(h).float()

    def update_loss_at(self, loss, t, weight):
        """Takes the losses, times and weights (T,) of a batch into the running means."""
        K = len(self.loss_at)
        nearest = (t * (K - 1)).round().long()  # (T,)
        total = torch.zeros_like(self.loss_at).index_add(0, nearest, loss * weight)  # (K,)
        count = torch.zeros_like(self.loss_at).index_add(0, nearest, weight)  # (K,)
        mean = torch.where(count > 0, total / count.clamp(min=1e-9), self.loss_at)
        self.loss_at.lerp_(mean, 0.1)

    def times(self, u):
        """Quantiles u -> times, such that the expected loss grows linearly in the quantile.

        unspecified: the loss is taken never to fall with t, and a tenth of the times are uniform,
        so that no t is left out."""
        if not self.config.adaptive_times:
            return super().times(u)
        K = len(self.loss_at)
        even = torch.linspace(0, 1, K, device=self.loss_at.device)  # (K,)
        rise = self.loss_at.cummax(0).values - self.loss_at[0]  # (K,)
        cdf = 0.9 * rise / rise[-1].clamp(min=1e-9) + 0.1 * even
        cdf = cdf / cdf[-1]
        # The inverse of the cdf at u: a straight line between each two of its points.
        q = u.to(cdf)
        right = torch.searchsorted(cdf, q.contiguous()).clamp(1, K - 1)
        share = (q - cdf[right - 1]) / (cdf[right] - cdf[right - 1])
        return (even[right - 1] + share * (even[right] - even[right - 1])).to(u)


class LDLM(nn.Module):
    """Encoder, decoder and token decoder, the DiT, and the frozen GPT. Samplers take it for a
    VAE."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dit = LatentDiT(config)
        teacher_config = TransformerConfig(**json.loads(config.teacher_config))
        self.teacher = GPT(teacher_config).requires_grad_(False)
        C = config.channels
        some_token = torch.zeros(1, 1, dtype=torch.long)
        E_teacher = teacher_features(self.teacher, some_token).shape[-1]
        self.encoder = Coder(config, E_teacher, C)
        self.decoder = Coder(config, C, E_teacher)
        self.token_decoder = Coder(config, E_teacher, config.vocab_size)
        self.register_buffer("hidden_mean", torch.zeros(E_teacher))  # of training data
        self.register_buffer("hidden_std", torch.ones(E_teacher))

    def hidden(self, tokens):
        """tokens (B, N) -> the teacher's standardised features (B, N, E_teacher)."""
        features = teacher_features(self.teacher, tokens).float()
        return (features - self.hidden_mean) / self.hidden_std

    def encode(self, hidden, segment):
        """hidden (B, N, E_teacher) -> latents (B, N, C). They are normalised, with no scale to
        learn, so that they cannot outgrow noise."""
        return F.layer_norm(self.encoder(hidden, segment), (self.config.channels,))

    def latents(self, tokens, segment):
        """tokens (B, N) -> latents (B, N, C)."""
        return self.encode(self.hidden(tokens), segment)

    def to_tokens(self, z, segment):
        """Latents z (B, N, C) -> the likeliest tokens (B, N)."""
        x = self.token_decoder.hidden(self.decoder(z, segment), segment)  # (B, N, E)
        return by_chunks(lambda x: self.token_decoder.last(x).argmax(-1), x)


def latent_loss(dit, batch, z_0, generator):
    """textldm.flow_loss, which also takes each target's loss into the running means by time."""
    B = len(z_0)
    u = torch.rand(2, B, generator=generator, device=z_0.device)
    eps = torch.randn(z_0.shape, generator=generator, device=z_0.device)  # (B, N, C)
    t = dit.times(u[0])  # (B,)
    is_hidden = (u[1] < dit.config.context_drop)[:, None] & (batch.segment == CONTEXT)  # (B, N)
    z_0 = z_0.masked_fill(is_hidden[..., None], 0)
    n_guess = (B + generator.initial_seed() % 2) // 2
    loss, losses, _, _, t_of = denoising_loss(dit, batch, z_0, t, eps, n_guess)
    dit.update_loss_at(losses, t_of[:, 0], batch.at_targets(batch.weight))
    return loss


def joint_loss(ldlm, batch, step, generator):
    """L_diff(gamma z + (1 - gamma) stop_gradient(z)) + L_h + L_w. Returns a dict of scalars.

    gamma grows from 0 to 1 with the steps. It scales the gradient of the diffusion loss into the
    encoder, and nothing else."""
    config = ldlm.config
    hidden = ldlm.hidden(batch.tokens)  # (B, N, E_teacher)
    z = ldlm.encode(hidden, batch.segment)  # (B, N, C)
    gamma = 1.0
    if config.encoder_warmup:
        gamma = 1 / (1 + math.exp(8 - 10 * step / config.encoder_warmup))  # 0.88 at its end
    diffusion = latent_loss(ldlm.dit, batch, gamma * z + (1 - gamma) * z.detach(), generator)

    # The decoder's noise makes it forgive the DiT its errors.
    noise = torch.randn(z.shape, generator=generator, device=z.device)
    decoded = ldlm.decoder(z + config.decoder_noise * noise, batch.segment)  # (B, N, E_teacher)
    # With the squared error the tokens' loss stays out of the decoder: near a latent all stays
    # readable.
    seen = decoded.detach() if config.hidden_mse else decoded
    read = ldlm.token_decoder.hidden(seen, batch.segment)  # (B, N, E)
    hidden_loss = weighted_mean((decoded - hidden).square().mean(-1), batch.weight)
    if not config.hidden_mse:
        hidden_loss = 0 * hidden_loss
    word, _ = cross_entropy(read, ldlm.token_decoder.last, batch.tokens, batch.weight)
    loss = diffusion + hidden_loss + word
    return dict(diffusion=diffusion, hidden=hidden_loss, word=word, loss=loss)


def entropy_of(tokens):
    """The entropy, in nats, of the frequencies of a list of ids."""
    p = torch.tensor(tokens).bincount().float()
    p = p / p.sum()
    return p.xlogy(p).sum().abs().item()  # not -0


@torch.no_grad()
def describe_latents(ldlm, batch):
    """One line in which a collapse shows while it happens. The other numbers do not show it."""
    z = ldlm.latents(batch.tokens, batch.segment)  # (B, N, C)
    is_right = ldlm.to_tokens(z, batch.segment) == batch.tokens  # (B, N)
    reconstructed = is_right[batch.counted].float().mean()
    z = z[batch.counted].cpu()  # (tokens, C)
    std = z.std(0)  # (C,)
    spread = torch.linalg.eigvalsh(z.T.cov().double())  # (C,)
    directions = spread.sum() ** 2 / spread.square().sum()
    texts = continue_texts(ldlm, ldlm.dit, [[]] * 64, 0, Sampling(steps=20, cfg_scale=1.0))
    entropy = entropy_of(sum(texts, []))
    real = entropy_of(batch.tokens[:64][batch.counted[:64]].tolist())
    return (
        f"latents: {std.square().mean():.2f} of their variance is between tokens, in "
        f"{directions:.0f} directions; std per channel {std.min():.2f} to {std.max():.2f}, "
        f"{(std > 0.1).sum()} of {len(std)} active; {reconstructed:.2%} of val tokens "
        f"reconstructed; 64 samples from nothing: entropy {entropy:.2f} nats "
        f"(of val rows {real:.2f})"
    )


def main():
    config, cfg, stage = command_line(
        __doc__, LDLMConfig, TrainConfig, LDLMStage, presets=DIT_PRESETS, recipe=OURS_HERE
    )
    if cfg.compile:
        raise UserError("--compile does not compile LDLM, whose losses call its networks apart")
    corpus = Corpus(cfg.data, "train", config.block_size)
    val = Corpus(cfg.data, "val", config.block_size)
    device, autocast = pick_device(cfg.device, corpus.N)
    state = load_teacher_state(stage.teacher or f"{cfg.out}/gpt.pt", corpus)
    teacher = build(GPT, TransformerConfig, state).to(device)
    shorten_rows((corpus, val), teacher.config.block_size - 1, "the teacher")
    config.block_size = corpus.N
    config.vocab_size = corpus.meta["vocab_size"]
    config.teacher_config = json.dumps(asdict(teacher.config))
    torch.manual_seed(cfg.seed)
    ldlm = LDLM(config).to(device)
    ldlm.teacher.load_state_dict(teacher.state_dict())
    with autocast:
        statistics = feature_statistics(teacher, corpus.fixed_batches(16, device))
    ldlm.hidden_mean, ldlm.hidden_std = statistics
    table = Evaluation(val.fixed_batches(1, device)[0], config.channels, corpus)

    def loss_of(net, batch, generator, step):
        return joint_loss(net, batch, step, generator)

    def evaluate(average):
        numbers, text = table(average, average.dit)
        return numbers, f"{text}\n{describe_latents(average, table.batch)}"

    identity = dict(kind="ldlm")
    stage = Stage("dit", cfg, corpus, ldlm, identity, has_average=True, keeps_latest=True)
    train(stage, loss_of, weight_of, evaluate)


if __name__ == "__main__":
    run_script(main)

"""TextLDM in one file: a VAE, a Diffusion Transformer and flow matching, for text.

Unofficial and educational, after [TextLDM]: text becomes latents, one a token; a DiT turns noise into those of a continuation.

    stage 1  tokens --encoder--> posterior --draw--> z --decoder--> tokens            TextVAE, train_vae.py
                                     +--projection--> features of a frozen GPT        REPA, in TextVAE.alignment
    stage 2  [clean latents of the context ; noisy latents of the target]             TextDiT, train_dit.py
                        --DiT--> p(token), by cross-entropy; hence z_0, the velocity  denoising_loss
    sample   prompt --encoder--> context;  noise --Euler--> target --decoder--> text  continue_texts, sample.py

Shapes   B rows in a batch      N tokens in a row           V tokens in the vocabulary
         E width of a network   H heads of D = E / H        C channels of a latent        M times in a row: 1, or one a block
Time     t = 1 is noise and t = 0 is data, everywhere. The path between them is straight,
         z_t = (1 - t) z_0 + t eps, so its velocity is dz_t/dt = eps - z_0.
Rows     hold two texts, a context, then the target that continues it (Corpus.batch makes them). `segment` (B, N) marks tokens
         CONTEXT or TARGET, or PADDING, which fills shorter rows in sampling and is hidden from all else. A target that ends
         before its row is followed by a tail of end-of-text tokens. `weight` (B, N) is 1 for text up to and with its end-of-text (the
         counted tokens) and TAIL_WEIGHT in the tail, enough to learn to stop. (Cola DLM: 0 for the first token of a row from the middle
         of a text.) Training minimises means by weight, in stage 2 of targets; what else is reported is over counted tokens.
Blocks   With --latent_block the DiT is Cola DLM's, one network with another layout of the row: a row is one text, cut in blocks, and each
         of them is a target whose context is all before it. The VAE is then causal, and sampling (continue_in_blocks) need not end.
         A first reading can leave out what depends on latent_block. (block_size, nanoGPT's name, is the length of a row.)
Latents  z are raw in TextVAE's forward, `posterior` and `decode`, and of mean 0 and std 1 per channel everywhere else.
LDLM     learns latents and DiT together, in part 6. There they are of mean 0 and std 1 over a token's channels.
Tags     `unspecified:` the paper is silent and the choice is ours.   `deviation:` we do otherwise.
[TextLDM] Jiang et al. 2026, arXiv 2605.07748   [VAE] Kingma, Welling 2013, 1312.6114    [CFG] Ho, Salimans 2022, 2207.12598
[Cola] Guo et al. 2026, 2605.06548   [LDLM] Meshchaninov et al. 2026, 2605.07933   [GPT2] Radford et al. 2019    [RoPE] Su et al. 2021, 2104.09864    [DiT] Peebles, Xie 2022, 2212.09748
[Muon] Jordan et al. 2024, kellerjordan.github.io/posts/muon   [FM] Lipman et al. 2022, 2210.02747  [SD3] Esser et al. 2024, 2403.03206   [REPA] Yu et al. 2024, 2410.06940   [AB] Chen et al. 2022, 2208.04202
Short of time? Read TextDiT's forward, error and estimate, part 5 (the loss and the sampler), then TextVAE.forward.
"""

import argparse
import base64
import collections
import copy
import functools
import json
import math
import os
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

CONTEXT, TARGET, PADDING = 0, 1, 2
TAIL_WEIGHT = 0.1  # unspecified: enough to learn that nothing follows, too little to drown the text
BROKEN = (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, IndexError, RuntimeError)  # what a damaged or foreign file may raise


class UserError(Exception):
    """Something the user can mend: scripts print its one sentence and exit with code 2."""


class Batch(collections.namedtuple("Batch", "tokens segment weight")):          # (B, N) each
    @property
    def counted(self):                                                          # (B, N)
        return self.weight == 1

    @functools.cached_property
    def targets(self):
        """(T,): the places of all targets in the flattened rows. `to` takes it along: counted on the CPU, as nonzero() on a GPU waits for it."""
        return (self.segment.flatten() == TARGET).nonzero()[:, 0]

    def to(self, device):
        device = torch.device(device)
        is_gpu = device.type == "cuda"  # it copies from pinned memory while it computes
        move = lambda x: (x.pin_memory() if is_gpu and not x.is_cuda else x).to(device, non_blocking=is_gpu)
        moved = Batch(*map(move, self))
        moved.targets = move(self.targets)
        return moved


def option(default, help, low=None, high=None):
    """A dataclass field with its reason and range; `command_line` (part 7) makes an option of it."""
    return field(default=default, metadata=dict(help=help, low=low, high=high))


class Config:
    def __post_init__(self):  # of dataclasses, from the command line or a checkpoint: what is not of its type or range is refused
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata.get("low", 0 if f.type is int else None), f.metadata.get("high")
            if type(value) is not f.type or not (low is None or value >= low) or not (high is None or value <= high):
                raise UserError(f"--{f.name}={value!r}: expected {f.type.__name__}" + f" from {low} to {'any' if high is None else high}" * (f.type is not bool))


# ---- 1. Blocks: the pre-norm Transformer that all networks (GPT, encoder, decoder, DiT) are stacks of
@dataclass
class TrunkConfig(Config):
    n_layer: int = option(4, "Transformer blocks", 1, 999)
    n_head: int = option(3, "attention heads", 1)
    n_embd: int = option(96, "width of the residual stream", 1)
    block_size: int = option(64, "longest row in tokens; where rows are documents, no longer than 99% of them are", 2, 2**16)
    recompute: bool = option(False, "save memory: the backward pass computes each block again")
    vocab_size: int = 0  # the corpus's


def rotate(x, position):
    """Rotary positions [RoPE]: pairs of channels of x (..., N, D) turn with the position (N,), so that q . k depends on distances only."""
    D = x.shape[-1]
    frequency = 10000 ** (-torch.arange(0, D, 2, device=x.device) / D)          # (D/2,)
    angle = position[:, None] * frequency                                       # (N, D/2)
    (a, b), cos, sin = x.float().chunk(2, dim=-1), angle.cos(), angle.sin()     # a, b (..., N, D/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        if n_embd % (2 * n_head):
            raise UserError(f"--n_embd={n_embd} is no multiple of twice --n_head={n_head}")
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, position=None, mask=None, causal=False, memory=None, keep=0):
        """memory, for Cola DLM's history, is [] or [keys, values] (B, H, N_past, D) of earlier tokens, which x sees too. If keep > 0, x's keys
        and values are appended to memory, and the last `keep` remain."""
        B, N, E = x.shape
        qkv = self.c_attn(x).view(B, N, 3, self.n_head, E // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        q, k, v = qkv                                                           # (B, H, N, D) each
        if position is not None:
            q, k = rotate(qkv[:2], position)
        if memory:
            k, v = torch.cat((memory[0], k), dim=2), torch.cat((memory[1], v), dim=2)  # (B, H, N_past + N, D) each
        if keep:
            memory[:] = k[:, :, -keep:], v[:, :, -keep:]
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            torch.backends.cuda.enable_flash_sdp(N > 128)                       # also a CPU's: flash takes twice as long on short rows, and a third on long ones
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, N, E))                  # (B, N, E)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). With `adaln` an embedding of the time shifts, scales
    and gates both branches (adaLN-zero, section 3.2 of [DiT]; unlike there, not the last norm). Gates begin at zero."""

    def __init__(self, n_embd, n_head, adaln=False):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd), Attention(n_embd, n_head)
        self.ln_2, self.mlp = nn.LayerNorm(n_embd), nn.Sequential(collections.OrderedDict(
            c_fc=nn.Linear(n_embd, 4 * n_embd), gelu=nn.GELU(), c_proj=nn.Linear(4 * n_embd, n_embd)))
        self.adaln = nn.Linear(n_embd, 6 * n_embd) if adaln else None

    def forward(self, x, time_emb=None, when=slice(None), **attention):         # x (B, N, E), time_emb (B, M, E), when (N,): which of the M
        if self.adaln is None:
            x = x + self.attn(self.ln_1(x), **attention)
            return x + self.mlp(self.ln_2(x))
        six = self.adaln(time_emb)[:, when]                                     # (B, N or 1, 6 E): token i is at time t[:, when[i]]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = six.chunk(6, dim=-1)  # (B, N or 1, E) each
        x = x + gate_1 * self.attn(self.ln_1(x) * (1 + scale_1) + shift_1, **attention)
        return x + gate_2 * self.mlp(self.ln_2(x) * (1 + scale_2) + shift_2)


class Trunk(nn.Module):
    """Blocks and a last LayerNorm: with rotary positions the encoder, the decoder and the core of the DiT; GPT has its own forward."""

    def __init__(self, config, adaln=False):
        super().__init__()
        self.h = nn.ModuleList(Block(config.n_embd, config.n_head, adaln) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.recompute = config.recompute

    def through(self, layers, x, time_emb=None, memory=None, **more):           # (B, N, E) -> (B, N, E)
        recompute = self.recompute and torch.is_grad_enabled()
        for i, layer in enumerate(layers):
            more["memory"] = memory[i] if memory else None                      # each layer has its own
            x = checkpoint(layer, x, time_emb, **more, use_reentrant=False) if recompute else layer(x, time_emb, **more)
        return x

    def forward(self, x, mask=None, time_emb=None, position=None, **more):      # (B, N, E) -> (B, N, E)
        position = torch.arange(x.shape[1], device=x.device) if position is None else position  # (N,)
        return self.ln_f(self.through(self.h, x, time_emb, mask=mask, position=position, **more))


def init_weights(model):
    """GPT-2's: std 0.02, and less for matrices that write into the residual stream, whose variance is not to grow with depth; biases and adaLN zero."""
    for name, p in model.named_parameters():
        if name.endswith("bias") or ".adaln." in name:
            nn.init.zeros_(p)
        elif p.dim() >= 2:
            nn.init.normal_(p, std=0.02 / (math.sqrt(2 * model.config.n_layer) if "c_proj" in name else 1))


def weighted_mean(x, weight):  # (B, N) each
    return (x * weight).sum() / weight.sum().clamp(min=1e-9)


def cross_entropy(logits, tokens):  # (B, N, V), (B, N) -> (B, N)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


# ---- 2. GPT: the frozen teacher for REPA, and the autoregressive baseline --------------------------------
class GPT(Trunk):
    """GPT-2 [GPT2]: learned positions, tanh GELU, tied embeddings. Parameters have Hugging Face's names: their files load."""

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        for layer in self.h:
            layer.mlp.gelu = nn.GELU("tanh")                                    # the other networks have the exact one, faster on today's CPUs
        init_weights(self)

    def hidden_states(self, tokens, layer):
        """The residual stream (B, N, E) behind block `layer`, from 1 (0: the embeddings), and no norm, for tokens (B, N), N up to block_size."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]               # (B, N, E)
        return self.through(self.h[:layer], x, causal=True)

    def forward(self, tokens):                                                  # (B, N)
        x = self.ln_f(self.hidden_states(tokens, self.config.n_layer))          # (B, N, E)
        return F.linear(x, self.wte.weight)                                     # (B, N, V)

    @classmethod
    def from_pretrained(cls, source):
        """A GPT from a name (downloaded into torch.hub's cache), a file or folder in Hugging Face's layout, or
        a checkpoint of ours. Returns it and its tokenizer, as in meta.json. Raises UserError."""
        path = Path(source)
        if source in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
            path = Path(torch.hub.get_dir(), "checkpoints", f"{source}.bin")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                if not path.exists():
                    torch.hub.download_url_to_file(f"https://huggingface.co/openai-community/{source}/resolve/main/pytorch_model.bin", str(path))
            except OSError as e:
                raise UserError(f"cannot download {source} ({e}); name a local folder instead") from None
        elif path.is_dir():
            path /= "model.safetensors" if (path / "model.safetensors").exists() else "pytorch_model.bin"
        state = load_checkpoint(path, "gpt", "python bench/train_gpt.py makes one")
        if "kind" in state:
            return model_from(cls, TrunkConfig, state), state["tokenizer"]
        try:  # Hugging Face: causal masks among the weights, and matrices (in, out), once those of convolutions
            state = {k.removeprefix("transformer."): v.T if ".c_" in k and v.dim() == 2 else v for k, v in state.items()
                     if not k.endswith((".attn.bias", ".masked_bias", "lm_head.weight"))}
            config = path.with_name("config.json")
            n_head = json.loads(config.read_text())["n_head"] if config.exists() else len(state["ln_f.weight"]) // 64
            (V, E), n_layer = state["wte.weight"].shape, len({k.split(".")[1] for k in state if k.startswith("h.")})
            config = dict(n_layer=n_layer, n_head=n_head, n_embd=E, block_size=len(state["wpe.weight"]), vocab_size=V)
        except BROKEN as e:
            raise UserError(f"{path} is no GPT-2 in Hugging Face's layout ({type(e).__name__}: {str(e)[:60]})") from None
        return model_from(cls, TrunkConfig, dict(kind=path, config=config, model=state)), dict(encoding="gpt2", vocab_size=V, eot=V - 1)


# ---- 3. The VAE: tokens to latents and back, one latent a token; aligned to a teacher by REPA
def same_segment(segment, causal=False):
    """Who sees whom in the VAE, (B, 1, N, N): query and key with the same label (and, for Cola DLM, not a later key). Context and
    target share a row and a pass, and neither knows of the other (section 3.2 of [TextLDM]: a bidirectional encoder would
    leak the target into the context). Rotary positions see only distances, so this equals two passes."""
    same = (segment[:, :, None] == segment[:, None, :])[:, None]
    return same.tril() if causal else same


@torch.no_grad()
def teacher_features(teacher, tokens, eot):
    """What REPA aligns to, and what LDLM encodes: (B, N, E_teacher) of the teacher's third-to-last layer for tokens (B, N). unspecified: an
    `eot` goes first (a causal model's first position is abnormally large), and the teacher reads rows whole: part of what
    it knows of a target is its context, which the encoder cannot see."""
    return teacher.hidden_states(F.pad(tokens, (1, 0), value=eot), max(teacher.config.n_layer - 2, 1))[:, 1:]


@dataclass
class VAEConfig(TrunkConfig):
    n_layer: int = option(2, "Transformer blocks in the encoder, and again in the decoder", 1, 999)
    channels: int = option(16, "C, channels of a latent; the paper's best is 64", 1)
    beta: float = option(1e-3, "weight of the KL divergence (the paper's)", 0)
    beta_warmup: int = option(200, "steps over which beta grows from zero: first learn to write, then to compress", 0)
    repa: float = option(4.0, "lambda, weight of the alignment (deviation: the paper has 1)", 0)
    repa_latents: bool = option(True, "deviation: REPA aligns the latents' means, not the encoder's features")
    causal: bool = option(False, "for --latent_block: a token's latent, and what is read from a latent, depend on nothing later")
    teacher_embd: int = 0  # width of the teacher's features, 0 without one


class TextVAE(nn.Module):
    """Stage 1 (section 3.1 of [TextLDM]): a bidirectional encoder to a diagonal Gaussian per token, and a
    non-autoregressive decoder whose only input is the latents."""

    def __init__(self, config):
        super().__init__()
        self.config, E, C = config, config.n_embd, config.channels
        self.wte = nn.Embedding(config.vocab_size, E)
        self.encoder = Trunk(config)
        self.to_posterior = nn.Linear(E, 2 * C)
        self.from_latent = nn.Linear(C, E)
        self.decoder = Trunk(config)
        self.to_logits = nn.Linear(E, config.vocab_size, bias=False)
        self.to_teacher = nn.Linear(C if config.repa_latents else E, config.teacher_embd) if config.teacher_embd else None
        init_weights(self)
        # Statistics of training data: z's from `standardise`, at every evaluation; the teacher's from train_vae.py.
        # unspecified: the scale of the latents. beta is too small to hold them near N(0, 1), so stage 2 standardises them.
        for name, width in (("z", C), ("teacher", config.teacher_embd)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    def posterior(self, tokens, segment):
        """tokens, segment (B, N) -> mu (B, N, C), logvar (B, N, C) and the encoder's features h (B, N, E)."""
        h = self.encoder(self.wte(tokens), same_segment(segment, self.config.causal))  # (B, N, E)
        mu, logvar = self.to_posterior(h).float().chunk(2, dim=-1)              # (B, N, C) each
        return mu, logvar.clamp(-20, 10), h

    def decode(self, z, segment):
        """Raw latents z (B, N, C) -> logits (B, N, V) of all tokens at once."""
        x = self.from_latent(z).float()  # (B, N, E): under autocast products are bf16, the residual stream is not
        return self.to_logits(self.decoder(x, same_segment(segment, self.config.causal))).float()

    def alignment(self, student, features):
        """REPA [REPA]: cosine (B, N) of the student, linearly projected, and the frozen teacher's features (B, N, E_teacher).
        The student is mu (B, N, C), which the DiT will see, or, in the paper's form, the encoder's last features h (B, N, E);
        `to_posterior` is then free to discard what was aligned. deviation: the teacher's are standardised first; a few huge,
        nearly constant dimensions give any two positions of GPT-2 a cosine of about two thirds."""
        target = (features.float() - self.teacher_mean) / self.teacher_std      # (B, N, E_teacher)
        return F.cosine_similarity(self.to_teacher(student).float(), target.detach(), dim=-1)

    def forward(self, batch, features=None, beta=None, generator=None):
        """L = CE + beta KL + lambda L_REPA (Eq. 1-3 of [TextLDM]), L_REPA = -mean cos. Returns a dict of
        scalars, `loss` to be minimised, the others over counted tokens. Without a generator z is the mean."""
        tokens, segment, weight = batch
        mu, logvar, h = self.posterior(tokens, segment)
        noise = 0 if generator is None else torch.randn(mu.shape, generator=generator, device=mu.device)
        z = mu + (0.5 * logvar).exp() * noise                                   # (B, N, C)
        logits = self.decode(z, segment)                                        # (B, N, V)
        ce = cross_entropy(logits, tokens)                                      # (B, N)
        # KL of a diagonal Gaussian from the standard one (appendix B of [VAE]), summed over channels
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)            # (B, N)
        cos = torch.zeros_like(ce) if features is None else self.alignment(mu if self.config.repa_latents else h, features)  # (B, N)
        loss = ce + (self.config.beta if beta is None else beta) * kl - self.config.repa * cos
        report = dict(ce=ce, kl=kl, cos=cos, accuracy=(logits.argmax(-1) == tokens).float())
        return {k: weighted_mean(x.detach(), batch.counted) for k, x in report.items()} | dict(loss=weighted_mean(loss, weight))

    @torch.no_grad()
    def standardise(self, batches):
        """Measures and stores mean and std per channel of the counted latents in batches. Returns how many channels are active: of a variance above 0.01."""
        mu = torch.cat([self.posterior(b.tokens, b.segment)[0][b.counted] for b in batches]).cpu().double()
        self.z_mean.copy_(mu.mean(0))
        self.z_std.copy_(mu.std(0).clamp(min=1e-6))
        return int((mu.var(0) > 0.01).sum())

    def latents(self, tokens, segment):
        """tokens (B, N) -> standardised latents z_0 (B, N, C). unspecified: they are means, for targets, too: the noise of a draw cannot be predicted."""
        return (self.posterior(tokens, segment)[0] - self.z_mean) / self.z_std

    def to_tokens(self, z, segment):
        """Standardised latents z (B, N, C) -> tokens (B, N), the likeliest."""
        return self.decode(z * self.z_std + self.z_mean, segment).argmax(-1)


# ---- 4. The DiT: estimates the clean latents of the target, from noisy ones and the context's clean ones ---
@dataclass
class DiTConfig(TrunkConfig):
    channels: int = 0  # C, the VAE's
    adaln: bool = option(True, "deviation: tell the blocks the time, by adaLN-zero")
    latent_block: int = option(0, "0: TextLDM, one target; more: Cola DLM, blocks of so many latents, each given all before it", 0, 2**15)
    context_drop: float = option(0.1, "share of rows trained without their context, for guidance (the paper's); if 0, sample with --cfg=1", 0, 1)
    predict_tokens: bool = option(True, "deviation: predict p(token), from which the velocity follows")
    self_condition: bool = option(True, "deviation: tell the DiT what it estimated a step before")
    t_mean: float = option(0.8, "logit-normal times: mean (deviation: the paper has 0)", -9, 9)
    t_std: float = option(1.0, "logit-normal times: std (deviation: the paper has 1.5)", 1e-3, 9)


def who_sees_whom(segment, block):
    """Cola DLM's mask (N, N), query by key, for the segment and the block of each token, (N,) each. A token sees the clean tokens of earlier
    blocks and, in its own, clean sees clean and noisy sees noisy. So no noisy block sees the clean tokens that it is to become.

        block        0 1 2   0 1 2
        clean    0   x . .   . . .
                 1   x x .   . . .
                 2   x x x   . . .
        noisy    0   . . .   x . .
                 1   x . .   . x .
                 2   x x .   . . x
    TextLDM needs no mask but for padding: context and target see each other. So its context is read again at every step of sampling; here, once."""
    earlier, same = block[:, None] > block, block[:, None] == block             # is the key's block earlier than the query's?
    return earlier & (segment == CONTEXT) | same & (segment[:, None] == segment)


class TextDiT(nn.Module):
    """Stage 2 (section 3.2 of [TextLDM]): context and target latents in one sequence, full attention. The
    paper's form knows the time only by the noise it sees; with `adaln` it is told (why: see README)."""

    def __init__(self, config):
        super().__init__()
        self.config, E = config, config.n_embd
        self.from_latent = nn.Linear(config.channels, E)
        if config.self_condition:
            self.from_guess = nn.Linear(config.channels, E, bias=False)
        self.segment_emb = nn.Embedding(2, E)                                   # of CONTEXT, of TARGET
        if config.adaln:
            self.time_mlp = nn.Sequential(nn.Linear(E, E), nn.SiLU(), nn.Linear(E, E), nn.SiLU())
        self.trunk = Trunk(config, config.adaln)
        self.to_output = nn.Linear(E, config.vocab_size if config.predict_tokens else config.channels)  # logits, or the velocity
        self.register_buffer("latent_of", torch.zeros(config.vocab_size if config.predict_tokens else 0, config.channels))  # E[z_0 | token]: train_dit.py measures it
        init_weights(self)
        nn.init.zeros_(self.to_output.weight)                                   # training starts from v = 0, or equal chances

    def time_embedding(self, t):
        """Sinusoids of t (B, M) as in [DiT], whose times run to 1000: without that factor all t look nearly alike."""
        half = self.config.n_embd // 2
        angle = 1000 * t[..., None] * 10000 ** (-torch.arange(half, device=t.device) / half)  # (B, M, E/2)
        return self.time_mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))     # (B, M, E)

    def times(self, u):
        """Quantiles u in [0, 1] -> times, of a logit-normal (section 3.1 of [SD3]). The loss draws u at random, the sampler steps through it evenly:
        so it steps finely where the model was trained most (section 3.2 of [TextLDM])."""
        return torch.sigmoid(self.config.t_mean + self.config.t_std * math.sqrt(2) * torch.erfinv(2 * u - 1))

    def forward(self, x, segment, t, guess, mask=None, places=None, **cola):
        """x (B, N, C), clean (or dropped: zero) where segment is CONTEXT, noisy where TARGET; t (B, M), one time for a row, or one for each block (and,
        training, a first one for the clean half of rows); guess (B, N, C), an earlier estimate of the targets' z_0, or zero. Returns velocities (B, N, C),
        or logits (B, N, V); with places (T,) in the flattened rows those of these tokens alone, (T, C) or (T, V), as the output layer is costly.
        mask and cola (of blocks: when, position, memory, keep) go to the Transformer."""
        is_target = segment == TARGET                                           # (B, N)
        h = self.from_latent(x) + self.segment_emb(is_target.long())            # (B, N, E)
        if self.config.self_condition:
            h = h + self.from_guess(guess * is_target[..., None])
        h = self.trunk(h, mask, self.time_embedding(t) if self.config.adaln else None, **cola)
        if places is None:
            return self.to_output(h).float()
        # to a multiple of 128 places, so that few sizes occur: a CPU's library keeps what it compiled for each, gigabytes of it
        n = len(places)
        h = h.flatten(0, 1).index_select(0, F.pad(places, (0, -n % 128)))       # (T and some, E)
        return self.to_output(h).float()[:n]

    def error(self, output, tokens, z_0, eps, t):
        """What training minimises (T,), of forward's output for tokens (T,), or for latents z_0 and noise eps (T, C) at times t (T,)."""
        if self.config.predict_tokens:
            return F.cross_entropy(output, tokens, reduction="none")            # no velocity in it: `estimate` makes z_0 of the output, `euler` steps of that
        _, _, d_alpha, d_sigma = interpolant(t[..., None])
        return (output - (d_alpha * z_0 + d_sigma * eps)).square().mean(-1)     # Eq. 5 of [TextLDM]

    def estimate(self, output, x, t, temperature=1.0):
        """The clean latents, E[z_0 | x], of targets, from forward's output for x at times t: (B, N, C) for x (B, N, C) at t (B, N or 1), and (T, C) for
        x (T, C) at t (T,). A temperature below 1 makes them those of likelier tokens, if it predicts tokens."""
        if not self.config.predict_tokens:
            alpha, sigma, d_alpha, d_sigma = interpolant(t[..., None])
            return (d_sigma * x - sigma * output) / (alpha * d_sigma - sigma * d_alpha)  # x - t v, if the path is straight
        # E[z_0 | x] is the sum over tokens of p(token | x) E[z_0 | token, x]. `latent_of` ignores the rest of x: it has E[z_0 | token].
        # So what a latent holds beyond its token (train_dit.py prints how much) is in contexts and in training's targets, not in samples.
        with torch.autocast(output.device.type, enabled=False):                 # in fp32, as guidance takes differences of estimates
            return (output / max(temperature, 1e-4)).softmax(-1) @ self.latent_of


# ---- 5. Flow matching [FM]: the loss, and the sampler ----------------------------------------------------
def interpolant(t):
    """The path at times t, z_t = alpha z_0 + sigma eps, here the straight one: alpha, sigma and their derivatives by t."""
    return 1 - t, t, -1, 1


def denoising_loss(dit, z_0, context, batch, t, eps, block, n_guess=0):
    """Returns (loss, output, z_t, times), one entry for each of the T targets of a batch: TextDiT.error, and what `estimate` takes. For latents z_0
    and noise eps (B, N, C), the block (N,) of each token (0, but for Cola DLM), times t (B, M); context (B, N, C) is z_0,
    or zeros in rows where it is dropped. Self-conditioning [AB]: a sample is told what the step before estimated; in training the first n_guess
    rows are told what a first pass estimates, the rest zeros, as in the first step of sampling."""
    (B, N, _), segment, targets = z_0.shape, batch.segment, batch.targets
    at = t[:, block]                                                            # (B, N): the time of each token
    alpha, sigma, *_ = interpolant(at[..., None])                               # (B, N, 1) each
    z_t = alpha * z_0 + sigma * eps                                             # (B, N, C)
    if not dit.config.latent_block:
        x, cola = torch.where((segment == TARGET)[..., None], z_t, context), {}  # (B, N, C)
        places, first = targets, None                                           # (T,), and in the first pass all places
    else:  # Cola DLM takes a row twice at once, [clean ; noisy], so that each block is a target with its clean history
        side, twice = torch.arange(2, device=z_t.device).repeat_interleave(N), block.repeat(2)  # (2 N,) each: CONTEXT is 0, TARGET 1
        x, segment, t = torch.cat((context, z_t), dim=1), side.expand(B, -1), F.pad(t, (1, 0))  # (B, 2 N, C), (B, 2 N), (B, 1 + M)
        places = targets + (targets // N + 1) * N                               # (B N,): all noisy tokens, as each is a target
        first = places[: n_guess * N]
        cola = dict(when=torch.where(side == TARGET, 1 + twice, 0),             # (2 N,): clean tokens are at t = 0, noisy ones at their block's
                    mask=who_sees_whom(side, twice), position=torch.arange(N, device=x.device).repeat(2))
    guess = torch.zeros_like(x)
    if dit.config.self_condition and n_guess:
        with torch.no_grad():
            output = dit(x[:n_guess], segment[:n_guess], t[:n_guess], guess[:n_guess], places=first, **cola).view(n_guess, N, -1)
            guess[:n_guess, -N:] = dit.estimate(output, z_t[:n_guess], at[:n_guess])
        torch.clear_autocast_cache()  # before torch 2.10 the second pass would reuse weights cast without a gradient (pytorch#112583)
    output = dit(x, segment, t, guess, places=places, **cola)                   # (T, V), or (T, C)
    tokens, z_0, eps, z_t, at = (x.flatten(0, 1).index_select(0, targets) for x in (batch.tokens, z_0, eps, z_t, at))  # (T, ...) each
    return dit.error(output, tokens, z_0, eps, at), output, z_t, at


def flow_loss(dit, z_0, batch, generator):
    """The loss of stage 2 on a batch with latents z_0 (B, N, C), and each target's loss, time and weight (T,), for LDLM's times. All randomness is the generator's."""
    (B, N, _), b, device = z_0.shape, dit.config.latent_block, z_0.device
    M, block = 1, torch.zeros(N, dtype=torch.long, device=device)               # TextLDM: a row has one target and one time
    if b:  # the first block is cut short at random: in sampling, blocks are counted from a prompt's end
        M, block = (N + b - 2) // b + 1, (torch.arange(N, device=device) + torch.randint(b, (1,), generator=generator, device=device)) // b
    u = torch.rand(M + 1, B, generator=generator, device=device)                # quantiles of times, and whether the context is dropped
    eps = torch.randn(z_0.shape, generator=generator, device=device)
    t, drop = dit.times(u[:-1].T), u[-1] < dit.config.context_drop          # (B, M), (B,)
    context = z_0.masked_fill(drop[:, None, None], 0)                           # (B, N, C)
    loss, *_, at = denoising_loss(dit, z_0, context, batch, t, eps, block, n_guess=(B + 1) // 2)
    # Cola DLM (TextLDM's first tokens have weight): the first block of a row from the middle of a text is no example of how texts begin
    weight = (batch.weight * ((block > 0) | (batch.weight[:, :1] > 0))).flatten()[batch.targets]  # (T,)
    return weighted_mean(loss, weight), (loss.detach(), at, weight)


def guided_estimate(dit, z, t, guess, context, segment, mask, cfg_scale, temperature=1.0, **cola):
    """e_u + w (e_c - e_u) [CFG], of the estimates of z_0 with and without the context (B, N, C), for noisy latents z (B, N, C) at time t;
    both are told the same guess, guided (B, N, C), of the step before. To guide estimates is to guide velocities, linear in them. w = 1 needs e_c only."""
    is_target, t = (segment == TARGET)[..., None], t.expand(len(z), 1)          # (B, N, 1), (B, 1)
    x = torch.where(is_target, z, context)                                      # (B, N, C)
    if cfg_scale == 1:
        return dit.estimate(dit(x, segment, t, guess, mask, **cola), x, t, temperature)
    x, t = torch.cat((x, torch.where(is_target, z, 0.0))), t.repeat(2, 1)       # (2 B, N, C): the last B rows without their context (blocks: it is in memory, of 2 B rows)
    output = dit(x, segment.repeat(2, 1), t, guess.repeat(2, 1, 1), mask.repeat(2, 1, 1, 1), **cola)
    e_c, e_u = dit.estimate(output, x, t, temperature).chunk(2)                 # (B, N, C) each
    return e_u + cfg_scale * (e_c - e_u)


def euler(estimate, z, times, callback=None):
    """Integrates dz/dt along times (steps + 1,), from noise z (B, N, C) to data. estimate(z, t, guess) is told what it made the step before;
    callback(t, guess) sees each. A step goes along the path of the guess and the noise that is in z if the guess is right: if it is straight,
    z + (t_next - t) (eps - z_0), Euler's. The last one, to t = 0, ends on the guess. (Contexts are carried along in z, and not read.)"""
    guess = torch.zeros_like(z)
    for t, t_next in zip(times[:-1], times[1:]):
        guess = estimate(z, t, guess)
        if callback is not None:
            callback(t, guess)
        (alpha, sigma, *_), (alpha_next, sigma_next, *_) = interpolant(t), interpolant(t_next)
        z = alpha_next * guess + sigma_next * (z - alpha * guess) / sigma
    return z


def denoise(dit, z, context, segment, mask, callback=None, steps=20, cfg_scale=3.0, temperature=0.7, **cola):
    """From noise z (B, N, C) to the latents of the targets."""
    times = dit.times(torch.linspace(1, 0, steps + 1)).to(z.device)
    estimate = lambda z, t, guess: guided_estimate(dit, z, t, guess, context, segment, mask, cfg_scale, temperature, **cola)
    return euler(estimate, z, times, callback)


def rows_of(prompts, length, block_size, eot):
    """tokens and segment (B, N) of prompts (lists of ids, maybe none), each with room for `length` tokens more; 0: for the rest of a row of block_size."""
    ends = [(len(prompt) + length) if length else block_size for prompt in prompts]
    tokens = [prompt + [eot] * (max(ends) - len(prompt)) for prompt in prompts]
    segment = [[CONTEXT] * len(p) + [TARGET] * (end - len(p)) + [PADDING] * (max(ends) - end) for p, end in zip(prompts, ends)]
    return torch.tensor(tokens), torch.tensor(segment)


def texts_of(tokens, segment, eot):
    """The targets of tokens (B, N), up to and with their end-of-text, as lists of ids."""
    rows = [row[s == TARGET].tolist() for row, s in zip(tokens, segment)]
    return [row[: row.index(eot) + 1] if eot in row else row for row in rows]


@torch.no_grad()
def continue_texts(vae, dit, prompts, length, eot, seed=0, callback=None, **how):
    """Continues each prompt (ids, maybe none) by up to `length` tokens, or to the end of a training row. Returns lists of ids, with `eot`
    where the text ended. callback(t, texts) sees the text that each step points to; how: steps, cfg_scale, temperature, as in denoise."""
    if dit.config.latent_block:
        return continue_in_blocks(vae, dit, prompts, length, eot, seed, callback, **how)
    tokens, segment = rows_of(prompts, length, dit.config.block_size, eot)     # (B, N) each
    (B, N), generator = tokens.shape, torch.Generator().manual_seed(seed)
    # noise of whole rows, from the CPU: the same on any device and beside neighbours of any length
    z = torch.randn(B, max(N, dit.config.block_size), vae.config.channels, generator=generator)[:, :N]  # (B, N, C)
    tokens, segment, z = (x.to(dit.from_latent.weight.device) for x in (tokens, segment, z))
    texts = lambda z: texts_of(vae.to_tokens(z, segment), segment, eot)
    context = vae.latents(tokens, segment)                                      # (B, N, C); the targets' are of end-of-texts, and not used
    mask = (segment != PADDING)[:, None, None]                                  # (B, 1, 1, N)
    return texts(denoise(dit, z, context, segment, mask, callback and (lambda t, z_0: callback(float(t), texts(z_0))), **how))


# ---- 6. Two variants, which a first reading can leave out: sampling with Cola DLM's blocks, and LDLM -----
def continue_in_blocks(vae, dit, prompts, length, eot, seed, callback, **how):
    """As continue_texts, with Cola DLM. In a loop the VAE encodes the last tokens, the DiT takes the new ones into `memory`, its keys and values
    of the `window` tokens that a block sees (so text of any length takes the same memory), and a block is denoised and decoded. A length is
    written in full. unspecified: behind an end-of-text the next block begins a document, with nothing before it; and the oldest keys know of
    tokens that have left the window, which no row of training has. callback(0, texts) sees after each block what is written, for good."""
    b, device, guided = dit.config.latent_block, dit.from_latent.weight.device, how.get("cfg_scale") != 1  # denoise guides by default
    window = dit.config.block_size - b
    P = min(window, max(map(len, prompts)))
    tokens = torch.tensor([[eot] * (P - len(x)) + x[max(len(x) - P, 0) :] for x in prompts], dtype=torch.long, device=device)  # (B, P)
    begin = torch.tensor([[max(P - len(x), 0)] for x in prompts], device=device)  # (B, 1): where a row's document begins, behind padding
    generators, memory = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))], [[] for _ in dit.trunk.h]
    texts, rooms = [[] for _ in prompts], [length or dit.config.block_size - len(prompt) for prompt in prompts]
    is_done = lambda text, room: len(text) >= room or not length and eot in text
    end, new = P, P                                                             # the block begins at `end`; so many tokens are not in memory
    while not all(map(is_done, texts, rooms)):
        place = torch.arange(end - tokens.shape[1], end, device=device)         # (L,): of the L tokens before the block
        inside = place >= begin                                                 # (B, L): the document, which to the VAE is one segment, and the rest another
        clean = vae.latents(tokens, inside)                                     # (B, L, C)
        if new:  # a call for its effect on memory alone; for guidance rows B to 2 B have zeros for a history
            x = torch.cat((clean, 0 * clean) if guided else (clean,))[:, -new:]  # (B or 2 B, new, C)
            mask = who_sees_whom(torch.full_like(place, CONTEXT), (place - end) // b) & same_segment(inside)  # (B, 1, L, L)
            dit(x, torch.full(x.shape[:2], CONTEXT, device=device), x.new_zeros(len(x), 1), torch.zeros_like(x),
                mask[:, :, -new:].repeat(1 + guided, 1, 1, 1), places=place[:0], position=place[-new:], memory=memory, keep=window)
        clean, inside = clean[:, -window:], F.pad(inside[:, -window:], (0, b), value=True)  # (B, L, C), (B, L + b): L is now at most window
        z = torch.stack([torch.randn(b, clean.shape[-1], generator=g) for g in generators]).to(device)  # (B, b, C)
        z = denoise(dit, z, torch.zeros_like(z), torch.full(z.shape[:2], TARGET, device=device), same_segment(inside)[:, :, -b:],
                    position=torch.arange(end, end + b, device=device), memory=memory, **how)
        written = vae.to_tokens(torch.cat((clean, z), dim=1), inside)[:, -b:]   # (B, b)
        for text, room, row in zip(texts, rooms, texts_of(written, torch.full_like(written, TARGET), eot)):
            text += row[: 0 if is_done(text, room) else room - len(text)]
        if callback is not None:
            callback(0.0, texts)
        tokens, end, new = torch.cat((tokens[:, -window:], written), dim=1), end + b, b
        begin = begin.where((written != eot).all(dim=1, keepdim=True), end)     # another document begins with the next block
    return texts


# LDLM: the latents are learned together with the DiT, on hidden states of a frozen GPT [LDLM]
@dataclass
class JointConfig(DiTConfig):
    channels: int = option(192, "C, channels of a latent; many, as the decoder's noise leaves little of each", 1)
    coder_layers: int = option(2, "Transformer blocks of the encoder, the decoder and the token decoder, each", 1, 999)
    predict_tokens: bool = False  # not to be chosen: the mean latent of a token would move
    adaptive_times: bool = option(True, "times such that the loss grows evenly in their quantiles, not logit-normal ones")
    hidden_mse: bool = option(True, "the decoder learns hidden states, by squared error, and the tokens' loss does not reach it: what lies near a latent stays readable")
    encoder_warmup: int = option(400, "steps over which the diffusion loss begins to shape the encoder, half of a short run's; 0: from the start", 0)
    decoder_noise: float = option(1.5, "std of noise in the decoder's input, in training: it forgives the DiT its errors (deviation: the paper has 3); 0: none", 0)
    teacher_config: str = ""  # the frozen GPT's, as JSON


class Coder(nn.Module):
    def __init__(self, config, n_in, n_out):
        super().__init__()
        self.config = replace(config, n_layer=config.coder_layers)
        self.first, self.trunk, self.last = nn.Linear(n_in, config.n_embd), Trunk(self.config), nn.Linear(config.n_embd, n_out)
        init_weights(self)

    def forward(self, x, segment):                                              # (B, N, n_in) -> (B, N, n_out)
        return self.last(self.trunk(self.first(x).float(), same_segment(segment))).float()


class LatentDiT(TextDiT):
    """Predicts the clean latents themselves. With adaptive_times the loss grows evenly with the quantiles of times: each stretch of the way
    teaches alike (unspecified: it is taken never to fall with t, and a tenth of the times are even, so that none is left out)."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("loss_at", torch.zeros(64))                        # running means of the loss at even times from 0 to 1

    def error(self, output, tokens, z_0, eps, t):
        return (output - z_0).square().mean(-1)

    def estimate(self, output, x, t, temperature=1.0):
        return output

    def note(self, loss, t, weight):                                            # (T,) each, for loss_at. Of several processes rank 0's are kept
        nearest = (t * (len(self.loss_at) - 1)).round().long()                  # (T,)
        total, count = (torch.zeros_like(self.loss_at).index_add(0, nearest, x) for x in (loss * weight, weight))  # (64,) each
        self.loss_at.lerp_(torch.where(count > 0, total / count.clamp(min=1e-9), self.loss_at), 0.1)

    def times(self, u):
        if not self.config.adaptive_times:
            return super().times(u)
        even = torch.linspace(0, 1, len(self.loss_at), device=self.loss_at.device)  # (64,)
        rise = self.loss_at.cummax(0).values - self.loss_at[0]                  # (64,)
        cdf = 0.9 * rise / rise[-1].clamp(min=1e-9) + 0.1 * even
        cdf = cdf / cdf[-1]
        # the inverse of the cdf at u, a straight line between each two of its points
        q = u.to(cdf)
        right = torch.searchsorted(cdf, q.contiguous()).clamp(1, len(cdf) - 1)
        share = (q - cdf[right - 1]) / (cdf[right] - cdf[right - 1])
        return (even[right - 1] + share * (even[right] - even[right - 1])).to(u)


class LDLM(nn.Module):
    """Encoder and decoder between hidden states of a frozen GPT and latents, a decoder from those states to tokens, and the DiT. Samplers take it for a VAE."""

    def __init__(self, config):
        super().__init__()
        self.config, self.dit = config, LatentDiT(config)
        self.teacher = GPT(TrunkConfig(**json.loads(config.teacher_config))).requires_grad_(False)
        C, V, E_teacher = config.channels, config.vocab_size, teacher_features(self.teacher, torch.zeros(1, 1, dtype=torch.long), 0).shape[-1]
        self.encoder, self.decoder, self.token_decoder = Coder(config, E_teacher, C), Coder(config, C, E_teacher), Coder(config, E_teacher, V)
        self.register_buffer("hidden_mean", torch.zeros(E_teacher))             # of training data, as in REPA
        self.register_buffer("hidden_std", torch.ones(E_teacher))

    def hidden(self, tokens):                                                   # (B, N) -> (B, N, E_teacher)
        return (teacher_features(self.teacher, tokens, self.config.vocab_size - 1).float() - self.hidden_mean) / self.hidden_std

    def latents(self, tokens, segment, hidden=None):
        """tokens (B, N) -> latents (B, N, C), each of mean 0 and std 1 over its channels, with no scale to learn: they cannot outgrow noise."""
        return F.layer_norm(self.encoder(self.hidden(tokens) if hidden is None else hidden, segment), (self.config.channels,))

    def to_tokens(self, z, segment):                                            # (B, N, C) -> (B, N)
        return self.token_decoder(self.decoder(z, segment), segment).argmax(-1)


def joint_loss(ldlm, batch, generator, step):
    """L_diff(gamma z + (1 - gamma) sg(z)) + L_h + L_w, a dict: gamma(s) scales the gradient of the diffusion loss into the encoder, and nothing else."""
    config, (tokens, segment, weight) = ldlm.config, batch
    hidden = ldlm.hidden(tokens)                                                # (B, N, E_teacher)
    z = ldlm.latents(tokens, segment, hidden)                                   # (B, N, C)
    gamma = 1 / (1 + math.exp(8 - 10 * step / config.encoder_warmup)) if config.encoder_warmup else 1  # 0.88 at the end of the warm-up
    diffusion, each = flow_loss(ldlm.dit, gamma * z + (1 - gamma) * z.detach(), batch, generator)
    ldlm.dit.note(*each)
    losses = dict(diffusion=diffusion)
    hidden_hat = ldlm.decoder(z + config.decoder_noise * torch.randn(z.shape, generator=generator, device=z.device), segment)  # (B, N, E_teacher)
    logits = ldlm.token_decoder(hidden_hat.detach() if config.hidden_mse else hidden_hat, segment)  # (B, N, V)
    losses["hidden"] = config.hidden_mse * weighted_mean((hidden_hat - hidden).square().mean(-1), weight)
    losses["word"] = weighted_mean(cross_entropy(logits, tokens), weight)
    return losses | dict(loss=sum(losses.values()))


# ---- 7. Plumbing, once for all scripts: tokenizers, batches, command line, checkpoints, the training loop. A first reading can end here, but for Corpus.batch.
# How GPT-2 cuts text into words before it merges bytes (its published pattern); our own BPEs do the same.
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def load_encoding(tokenizer, source="the checkpoint and its tokenizer"):
    """The tiktoken.Encoding of a `tokenizer` dict, as in meta.json and in every checkpoint: GPT-2's, or a
    small BPE of ours whose ranks it holds in tiktoken's file format. source is named in a UserError."""
    try:
        if tokenizer["encoding"] == "bpe":
            ranks = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(tokenizer["bpe"].splitlines())}
            encoding = tiktoken.Encoding("bpe", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": tokenizer["eot"]})
        else:
            encoding = tiktoken.get_encoding(tokenizer["encoding"])
        known = encoding.token_byte_values()
        if not len(known) == tokenizer["eot"] == tokenizer["vocab_size"] - 1 or not {bytes([b]) for b in range(256)} <= set(known):
            raise ValueError("other tokens than it claims")
        return encoding
    except OSError as e:
        raise UserError(f"cannot download GPT-2's BPE ({type(e).__name__}); set TIKTOKEN_CACHE_DIR to its folder") from None
    except BROKEN as e:
        raise UserError(f"{source} do not fit ({type(e).__name__}: {e}); prepare or train again") from None


class Corpus:
    """A memmap of tokens that data/prepare.py (or nanoGPT) wrote. A row of up to N tokens is one document's, where meta.json says so,
    or is cut from the stream of all, and attention and loss cross end-of-texts freely. whole: rows are all target, for Cola DLM."""

    def __init__(self, folder, split, block_size, whole=False):
        self.path = path = Path(folder) / f"{split}.bin"
        if not path.exists() or not path.stat().st_size:
            raise UserError(f"{path} is missing or empty; python data/prepare.py makes it (see its --help)")
        self.meta = dict(encoding="gpt2", vocab_size=50257, eot=50256, dtype="uint16", layout="stream")
        try:
            if path.with_name("meta.json").exists():
                self.meta = json.loads(path.with_name("meta.json").read_text())
            self.tokenizer = {k: self.meta[k] for k in ("encoding", "vocab_size", "eot", "bpe") if k in self.meta}
            self.encoding, self.eot = load_encoding(self.tokenizer, f"{path} and meta.json"), self.meta["eot"]
            self.tokens = np.memmap(path, dict(uint16=np.uint16, uint32=np.uint32)[self.meta["dtype"]], "r")  # ValueError: no whole number
            if len(self.tokens) != self.meta.get("tokens", {}).get(split, len(self.tokens)):
                raise ValueError("another number of tokens")
            self.whole, self.is_stream = whole, self.meta["layout"] != "documents"  # a stream is one endless document
            self.ends = np.array([len(self.tokens)]) if self.is_stream else np.flatnonzero(self.tokens == self.eot) + 1
            self.N = block_size if self.is_stream else min(block_size, max(int(self.meta["longest"]), 2))
        except (OSError, *BROKEN) as e:
            raise UserError(f"{path} and meta.json do not fit ({type(e).__name__}: {e}); prepare them again") from None
        if len(self.tokens) < self.N or not len(self.ends):
            raise UserError(f"{path} has {len(self.tokens)} tokens, less than one row of {self.N}; prepare more text")

    def batch(self, rng, B, N, device="cpu", cut_words=True):
        """B rows of N tokens, each (if not whole) cut in context and target at a place drawn anew: at the start, between tokens or, in about
        one row of six, inside one, so that any prompt is in distribution. unspecified: all of this. The paper cuts, and does not say where."""
        tokens, cuts, lengths = np.full((B, N), self.eot), np.zeros(B, int), np.zeros(B, int)
        for i in range(B):
            d = rng.integers(len(self.ends))
            first, end = self.ends[d - 1] if d else 0, self.ends[d]
            start = first + rng.integers(max(end - first - N, 0) + 1)           # a random stretch of what is longer
            row = self.tokens[start : min(end, start + N + 4)].tolist()         # a few more, as cut_word may merge some
            if max(row) >= self.meta["vocab_size"]:
                raise UserError(f"{self.path}: token {max(row)} is beyond its vocabulary of {self.meta['vocab_size']}")
            cut = rng.integers(min(len(row), N)) if not self.whole and rng.random() > 0.1 else 0
            cut = max(cut, int(start > first and not self.is_stream))           # only a text's beginning follows nothing
            if cut_words and not self.whole and cut and rng.random() < 0.25:
                row, cut = self.cut_word(row, cut, rng)
            lengths[i], cuts[i] = min(len(row), N), min(cut, N - 1)
            tokens[i, : lengths[i]] = row[:N]
        is_context = np.arange(N) < cuts[:, None]                               # (B, N); if whole, at most the first token
        segment = np.where(is_context & (not self.whole), CONTEXT, TARGET)
        weight = np.where(np.arange(N) < lengths[:, None], 1, TAIL_WEIGHT).astype(np.float32) * ~(is_context & self.whole)
        return Batch(*map(torch.from_numpy, (tokens, segment, weight))).to(device)

    def fixed_batches(self, n, device, cut_words=True):
        """n batches of up to 16,384 tokens, always the same ones, so that any two checkpoints compare."""
        B = max(1, min(256, 2**14 // self.N))
        return [self.batch(np.random.default_rng((0, i)), B, self.N, device, cut_words) for i in range(n)]

    def cut_word(self, row, cut, rng):
        """Moves a cut from before token `cut` to a character inside it. Both sides are written as the
        tokenizer would, had it seen them apart: so will it see a prompt that ends inside a word."""
        a, b = max(cut - 3, 0), min(cut + 4, len(row))
        b = row.index(self.eot, a) if self.eot in row[a:b] else b
        before, word, after = (self.encoding.decode(row[i:j]) for i, j in ((a, cut), (cut, cut + 1), (cut + 1, b)))
        if b <= cut or len(word) < 2 or "\ufffd" in before + word + after:      # \ufffd: part of a character
            return row, cut
        k = rng.integers(1, len(word))
        left, right = map(self.encoding.encode_ordinary, (before + word[:k], word[k:] + after))
        return row[:a] + left + right + row[b:], a + len(left)


@dataclass
class TrainConfig(Config):
    data: str = option("data/names", "folder of a prepared corpus")
    out: str = option("out", "folder for checkpoints and metrics")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    seed: int = option(1, "seed of everything random", 0, 2**31)
    batch_size: int = option(192, "rows in a micro-batch", 1)
    accumulate: int = option(1, "micro-batches in a step", 1)
    max_steps: int = option(500, "optimiser steps; more of them with --resume go on at the last rate", 1)
    learning_rate: float = option(0.0, "at its peak; 0: 4e-3 with Muon, 1e-3 without", 0)
    warmup: int = option(100, "steps of linear warm-up, before a cosine down to a tenth", 0)
    weight_decay: float = option(0.01, "on matrices only (the paper's)", 0)
    muon: bool = option(True, "deviation: Muon for blocks' matrices")
    eval_interval: int = option(250, "steps between evaluations and checkpoints", 1)
    log_interval: int = option(20, "steps between lines of metrics", 1)
    device: str = option("auto", "cpu, cuda, mps, or auto")
    compile: bool = option(False, "torch.compile: a slow start, then faster")


# --recipe=paper: the paper's choice wherever an option's default is a `deviation:`
PAPER = dict(repa=1.0, repa_latents=False, adaln=False, predict_tokens=False, self_condition=False, from_decoder=False,
             t_mean=0.0, t_std=1.5, muon=False, decoder_noise=3.0)


def at_scale(n_layer, n_head, n_embd, max_steps=200_000, **more):
    """A preset of the paper's scale; the scripts have those of their stages, and `tiny`, for CPUs."""
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, max_steps=max_steps, block_size=1024, batch_size=16,
                accumulate=48, learning_rate=1e-4, warmup=2000, eval_interval=2000, **more)


def command_line(description, *types, presets=None):
    """One instance of each dataclass from sys.argv: an option beats the preset, the preset the default.
    Whatever is unknown, ill-typed or out of range ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("--preset", choices=presets, default="tiny", help="sizes and schedule (tiny)")
        parser.add_argument("--recipe", choices=("ours", "paper"), default="ours", help="paper: its choice where an option is a deviation; overrides presets (ours)")
    tiny = (presets or {}).get("tiny", {})
    for f in [f for t in types for f in fields(t) if f.metadata]:
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} ({tiny.get(f.name, f.default)})".replace("%", "%%"),
                            default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args())
    values = (presets or {}).get(given.pop("preset", None), {}) | (PAPER if given.pop("recipe", None) == "paper" else {}) | given
    return [t(**{f.name: values[f.name] for f in fields(t) if f.name in values}) for t in types]


def run(main):  # a script's; what the user can mend becomes one line and exit code 2
    try:
        code, said = main(), ""
    except (UserError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as e:
        code, said = 2, f"error: {str(e) or 'stopped'}\n"
    except SystemExit as e:
        code, said = e.code, ""
    if dist.is_initialized():  # only now, when nothing holds DDP: of torch 2.13 its end and that of gloo's threads may wait for each other
        dist.destroy_process_group()
    sys.stderr.write(said)  # after the bars that were open
    if code:
        sys.exit(code)


def pick_dtype(device):
    """What to multiply in, the one decision for networks and optimisers: bf16 where the hardware has it. Elsewhere it is emulated, slower by far than fp32."""
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":  # its instructions, and that torch uses AVX-512 (ATEN_CPU_CAPABILITY=avx2 forbids it, to measure what others see)
        is_native = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    else:
        is_native = False
    return torch.bfloat16 if is_native else torch.float32


def pick_device(name):
    """A torch.device, and the autocast to compute in."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"                        # torchrun's, one GPU a process
    name = name if name != "auto" else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={name} is not available here ({str(e)[:80]!r})") from None
    return device, torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(device) == torch.bfloat16)


def write_whole(path, content):
    """Writes a text, or items as a checkpoint, beside and renames: whatever happens, path is whole, with this or with what it had."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            f.write(content.encode("utf-8", "replace")) if isinstance(content, str) else torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({str(e)[:80]}); what was there is as it was") from None


def load_checkpoint(path, kind, remedy, tokenizer=None):
    """The dict at path: a checkpoint of this kind (and tokenizer, where one is given), or a state dict of
    Hugging Face's, which has no kind and is taken for a gpt. UserError for all else."""
    if not Path(path).is_file():
        raise UserError(f"{path} is missing; {remedy}")
    try:
        if str(path).endswith(".safetensors"):
            import safetensors.torch
            state = safetensors.torch.load_file(path)
        else:
            z = zipfile.is_zipfile(path) and zipfile.ZipFile(path)
            if z and (any(i.compress_type for i in z.infolist()) or z.testzip()):  # compressed, it may claim any size; testzip:
                raise ValueError("damaged")                                     # torch writes checksums, and does not look at them
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError:
        raise UserError(f"{path} needs one more package: pip install safetensors") from None
    except Exception as e:  # what a damaged file makes torch.load raise has no common class
        raise UserError(f"{path} is no whole checkpoint ({type(e).__name__}); make or fetch it again") from None
    if state.get("kind", "gpt") != kind:
        raise UserError(f"{path} holds a {state.get('kind', 'gpt')}, where a {kind} is needed; {remedy}")
    if tokenizer not in (None, state.get("tokenizer")):
        raise UserError(f"{path} was trained with another vocabulary; {remedy}, for this data")
    return state


def model_from(cls, config_cls, state):
    try:
        config = config_cls(**state["config"])
        with torch.device("meta"):  # no memory for what a config claims; `assign` takes the tensors that the file has
            model = cls(config)
        model.load_state_dict(state["model"], assign=True)
        return model.float().eval()
    except (UserError, *BROKEN) as e:
        raise UserError(f"the {state.get('kind')} does not fit this code ({type(e).__name__}: {str(e)[:40]!r}); train it again") from None


class Muon(torch.optim.Optimizer):
    """Muon, for matrices [Muon]: steps along the orthogonalised momentum, scaled to the RMS of AdamW's steps. The same as torch.optim.Muon, which
    multiplies in bf16 on any hardware; where that is emulated, its step takes 27 times as long as in fp32. Here `dtype` says."""

    def __init__(self, params, weight_decay, dtype):
        super().__init__(params, dict(lr=0.0, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = collections.defaultdict(list)                               # matrices of one shape are multiplied at once
            for p in group["params"]:
                if p.grad is not None:                                          # LDLM's teacher has none
                    alike[p.shape].append(p)
            for shape, matrices in alike.items():
                updates = []
                for p in matrices:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum_buffer"]
                    momentum.lerp_(p.grad, 0.05)
                    updates.append(p.grad.lerp(momentum, 0.95))
                for p, update in zip(matrices, orthogonal(torch.stack(updates), self.dtype)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def orthogonal(x, dtype):
    """For each matrix of x (K, n, m) the nearest orthogonal one, roughly: five steps of Newton and Schulz bring all singular values to between 0.7
    and 1.2, with the coefficients of [Muon], which lift small ones fast."""
    is_tall = x.shape[1] > x.shape[2]
    y = (x.mT if is_tall else x).to(dtype)
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return y.mT if is_tall else y


def minutes(seconds):
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class Objective(nn.ModuleDict):  # a loss as the forward of a module, for DistributedDataParallel to wrap
    def forward(self, loss_of, *micro_batch):
        return loss_of(self["net"], *micro_batch)


def train(stage, cfg, model, corpus, loss_of, evaluate, weight_of, cut_words=True, ema=False, keep_last=False, whole=0, **extra):
    """The loop of all stages. loss_of(net, batch, generator, step) and evaluate(model) return dicts with `loss`, the latter on
    val; weight_of(batch) is the sum of the weights that `loss` is a mean by, or about that; extra is what else a resumed run must share. After its first
    steps it says how long it will take, and `whole` times that for all stages of the README's first command (0: does not). Writes STAGE.pt (best
    by val, or the latest with `keep_last`; of averaged weights with `ema`), STAGE_last.pt and STAGE.jsonl. All randomness comes from (seed, step, micro-batch): there
    is no state of it to save, and under torchrun K processes of A micro-batches each compute what one with K A does."""
    (device, autocast), out = pick_device(cfg.device), Path(cfg.out)
    dtype = pick_dtype(device)
    rank, world = (int(os.environ.get(*x)) for x in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun sets them
    objective = Objective(dict(net=torch.compile(model.to(device)) if cfg.compile else model.to(device)))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
        objective = nn.parallel.DistributedDataParallel(objective)
    sum_of_all = lambda x: x if world == 1 else (dist.all_reduce(x := x.to(device)), x)[1].cpu()  # over the processes
    average = copy.deepcopy(model).requires_grad_(False) if ema else model  # without ema one and the same
    group_of = lambda name, p: "vector" if p.dim() < 2 else "hidden" if cfg.muon and (".attn." in name or ".mlp." in name) else "matrix"
    hidden, matrices, vectors = ([p for name, p in model.named_parameters() if group_of(name, p) == x] for x in ("hidden", "matrix", "vector"))
    optimizers = [torch.optim.AdamW([dict(params=matrices), dict(params=vectors, weight_decay=0)], betas=(0.9, 0.98),
                                    weight_decay=cfg.weight_decay, fused=device.type != "mps")]
    if cfg.muon:
        optimizers.append(Muon(hidden, cfg.weight_decay, dtype))
    parts = dict(model=model, average=average, **{type(o).__name__: o for o in optimizers})
    identity = dict(kind=stage, tokenizer=corpus.tokenizer, config=asdict(model.config), **extra, data=corpus.meta.get("sha256", len(corpus.tokens)),
                    accumulate=cfg.accumulate * world, **{k: getattr(cfg, k) for k in ("seed", "batch_size", "warmup", "weight_decay", "muon")})
    peak = cfg.learning_rate or (4e-3 if cfg.muon else 1e-3)
    step, best, horizon, last, metrics = 0, math.inf, cfg.max_steps, out / f"{stage}_last.pt", out / f"{stage}.jsonl"
    corpus.fixed_batches(1, device)  # what is wrong with the data shows before any file is touched
    out.mkdir(parents=True, exist_ok=True)
    if cfg.resume:
        state = load_checkpoint(last, stage, "start without --resume", corpus.tokenizer)
        try:
            now, before = identity | identity["config"], state | state["config"]
            if different := [k for k in now if k not in ("config", "recompute") and before.get(k) != now[k]]:
                raise UserError(f"{last} was started with another {', '.join(different)}; resume with the same")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            step, best, horizon = int(state["step"]), float(state["best"]), int(state["horizon"])
            if rank == 0:  # the steps after the checkpoint will come again
                kept = lambda line: line.endswith("}\n") and json.loads(line)["step"] <= step
                write_whole(metrics, "".join(filter(kept, metrics.read_text().splitlines(True))))
            del state, before  # they have the size of all parts together
        except torch.OutOfMemoryError:
            raise
        except (OSError, *BROKEN) as e:
            raise UserError(f"{last} and {metrics.name} do not fit this code ({type(e).__name__}); start without --resume") from None
    save = lambda: rank or write_whole(last, dict(step=step, best=best, horizon=horizon, **{k: part.state_dict() for k, part in parts.items()}, **identity))
    precision = "bf16, as it can" if dtype == torch.bfloat16 else "fp32, as its bf16 is emulated, or was never tried"
    print(f"{stage}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {device}, which multiplies in {precision}; rows of {corpus.N} tokens", flush=True)
    stops = []  # a signal lets the step finish and be saved, then Ctrl-C stops at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stops.append(number), signal.signal(signal.SIGINT, signal.SIG_DFL)))

    def draw(step):
        for micro in range(rank * cfg.accumulate, (rank + 1) * cfg.accumulate):
            rng = np.random.default_rng((cfg.seed, step, micro))
            generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
            # deviation: the paper truncates rows at random; here the rows of a micro-batch share one length
            N = max(corpus.N * int(rng.integers(4, 9)) // 8, 2)
            yield corpus.batch(rng, cfg.batch_size, N, cut_words=cut_words), generator

    bar, batches = tqdm(total=cfg.max_steps, initial=step, desc=stage, mininterval=1, disable=rank > 0), list(draw(step))
    first, began = step, 0.0
    cfg.resume or save()  # from here on there is this run to resume, and no older one
    with open(metrics if rank == 0 else os.devnull, "a" if cfg.resume else "w") as log, bar:
        while step < cfg.max_steps:
            done = min(max(step - cfg.warmup, 0) / max(horizon - cfg.warmup, 1), 1)
            lr = peak * min((step + 1) / max(cfg.warmup, 1), 1) * (0.55 + 0.45 * math.cos(math.pi * done))
            total, stopped = sum_of_all(torch.tensor([sum(weight_of(b) for b, _ in batches), len(stops)]))
            if stopped:  # a signal to any process stops all at the same step
                save()
                break
            report = collections.Counter()                                      # adds the terms of all micro-batches
            for k, (batch, generator) in enumerate(batches):
                objective.require_backward_grad_sync = k == len(batches) - 1    # processes exchange gradients once a step
                share, batch = weight_of(batch) / total, batch.to(device)
                with autocast:
                    losses = objective(loss_of, batch, generator, step)
                (losses["loss"] * share * world).backward()                     # times world, as the exchange takes the mean
                report.update({k: v.detach() * share for k, v in losses.items()})
            batches = list(draw(step + 1))                                      # while a GPU is still at work on this step
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(norm):                                         # here, once a step, a GPU is waited for
                terms = [k for k, v in report.items() if not v.isfinite()] or ["the gradient"]
                raise UserError(f"step {step}: {', '.join(terms)} is not finite; --resume, or start again, at a lower --learning_rate")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if ema:  # unspecified: a decay of 0.999 from the start would leave a short run's average half initialisation
                for a, p in zip(average.state_dict().values(), model.state_dict().values()):
                    a.lerp_(p, 1 - min(0.999, (1 + step) / (10 + step)))
            bar.update()
            if step == first + 5:                                               # the first steps are slow
                began = time.perf_counter()
            if step == first + 25 and rank == 0:
                seconds = (time.perf_counter() - began) / 20 * (cfg.max_steps - first)
                bar.write(f"{stage}: about {minutes(seconds)} on this machine" + (f"; all three stages of README's first command about {minutes(whole * seconds)}" if whole else ""))
            if step % cfg.log_interval == 0:
                report = dict(zip(report, sum_of_all(torch.stack(list(report.values()))).tolist()))
                print(json.dumps(dict(step=step, **report, norm=norm.item(), lr=lr)), file=log, flush=True)
                bar.set_postfix({k: f"{v:.3g}" for k, v in report.items()}, refresh=False)
            if rank == 0 and (step % cfg.eval_interval == 0 or step == cfg.max_steps):
                with autocast:
                    val = evaluate(average.eval())
                model.train()
                if not math.isfinite(val["loss"]):
                    raise UserError(f"step {step}: the val loss is not finite; --resume, or start again, at a lower --learning_rate")
                print(json.dumps(dict(step=step, val=val)), file=log, flush=True)
                if keep_last or val["loss"] < best:
                    best = val["loss"]
                    write_whole(out / f"{stage}.pt", dict(model=average.state_dict(), step=step, **identity))
                save()
    if step < cfg.max_steps:
        sys.exit(f"{stage}: stopped after step {step}; the same command with --resume goes on from there")
    print(f"{stage}: wrote {out / f'{stage}.pt'} ({'the latest' if keep_last else 'best by val loss'}) and {last} (to --resume)")

"""Writes with a checkpoint of any kind, which names its kind itself."""

from dataclasses import dataclass, replace
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Callable

import torch

from baselines import masked
from baselines.gpt import generate, next_logits
from baselines.masked import MaskedLM, unmask
from engine.checkpoint import GPT2_NAMES, as_gpt_state, build, load_checkpoint, load_gpt_state
from engine.corpus import load_encoding
from engine.prompts import make_prompts, room_for_prompts
from engine.config import UserError
from textldm import (
    GPT,
    DiTConfig,
    Sampling,
    TextDiT,
    TextVAE,
    TransformerConfig,
    VAEConfig,
    continue_texts,
    guided_estimate,
    noisy_rows,
    row_generators,
    row_seeds,
)
from variants.cola_dlm import (
    CausalVAE,
    ColaConfig,
    ColaDiT,
    continue_in_blocks,
    first_block,
)
from variants.ldlm import LDLM, LDLMConfig
from variants.parts import write_in_parts

KINDS = ("dit", "cola_dlm", "ldlm", "gpt", "masked")


@dataclass
class Writer:
    """A model that continues prompts."""

    kind: str
    sample: Callable  # sample(prompts, length, sampling, callback=None) -> lists of ids
    tokenizer: dict
    block_size: int  # a prompt and its continuation have at most so many tokens
    first_logits: Callable = None  # (prompts, sampling) -> logits (B, V) of the token after each
    block: int = 0  # tokens in a block, of a kind that writes on and on; else 0
    has_steps: bool = True  # whether it denoises in steps, which a callback may see

    @property
    def has_temperature(self):
        return self.first_logits is not None

    @cached_property
    def encoding(self):
        return load_encoding(self.tokenizer)

    @cached_property
    def token_bytes(self):
        """The bytes of each token but the end-of-text."""
        eot = self.tokenizer["eot"]
        return [self.encoding.decode_single_token_bytes(i) for i in range(eot)]

    def encode(self, prompts, length=0):
        """Strings as Prompts. Each leaves room for `length` more tokens, or for an eighth of a row
        where length is 0: the beginning of a longer one is cut off, with a warning. Raises
        UserError if no row has that room."""
        room = room_for_prompts(self.block or length, self.block_size)
        return make_prompts(self.encoding, prompts, room, self.has_temperature)

    def decode(self, ids):
        """ids as a string, without the end-of-text token at its end. Others become line ends."""
        text = self.encoding.decode(ids).removesuffix("<|endoftext|>")
        return text.replace("<|endoftext|>", "\n")

    def text(self, prompt, sampling=Sampling(), length=0):
        """Continues a string, by at most `length` tokens (0: to the end of a row). Returns what
        follows it. In fp32; where sample.py uses bf16, it may choose other words."""
        (ids,) = self.write(self.encode([prompt], length), length, sampling)
        return self.decode(ids)

    def seeds(self, prompts, seed):
        """textldm.row_seeds of Prompts, or of lists of ids."""
        return row_seeds([[*prompt, *rest_of(prompt)] for prompt in prompts], seed)

    @torch.no_grad()
    def write(self, prompts, length=0, sampling=Sampling(), callback=None, keep=0):
        """Continues Prompts, or lists of ids, as they were typed: what a text repeats of `rest` is
        taken off. Returns lists of ids. keep: see variants/parts.py."""
        sampling = replace(sampling, seed=self.seeds(prompts, sampling.seed))
        completions = self.complete(prompts, sampling)
        # A completion may have more tokens than what it completes. The row still has room.
        room = self.block_size - (self.block or length or 1)
        whole = [[*prompt, *new][-room:] for prompt, new in zip(prompts, completions)]

        def typed(texts):
            """What follows each prompt as it was typed."""
            found = []
            for prompt, new, text in zip(prompts, completions, texts):
                found.append(self.without(new + text, rest_of(prompt)))
            return found

        def show(t, texts):
            callback(t, typed(texts))

        if keep:
            return typed(write_in_parts(self, whole, length, sampling, keep))
        return typed(self.sample(whole, length, sampling, show if callback else None))

    @torch.no_grad()
    def complete(self, prompts, sampling):
        """For each prompt the tokens that complete its `rest`: at least one, if it has a rest.

        This is token healing (Lundberg 2023, of the library guidance). A prompt that ends inside a
        word ends with a token that no text has there. So its last piece is taken off and drawn
        again: token by token, from p(token) at t = 1, of those that `fitting` says. Where a model
        has no p(token), nothing is drawn."""
        found = [[] for _ in prompts]
        rests = [rest_of(prompt) for prompt in prompts]
        # Not the numbers that the noise is made of.
        generators = [torch.Generator().manual_seed(seed ^ 2**31) for seed in sampling.seed]
        while self.first_logits and any(rests):
            rows = [i for i, rest in enumerate(rests) if rest]
            fitting = {rest: self.fitting(rest) for rest in set(rests) if rest}
            some = [[*prompts[i], *found[i]][1 - self.block_size :] for i in rows]
            of_rows = replace(sampling, seed=[sampling.seed[i] for i in rows])
            logits = self.first_logits(some, of_rows).float().cpu()  # (len(rows), V)
            for i, row in zip(rows, logits):
                row = row.masked_fill(~fitting[rests[i]], -torch.inf)
                p = (row / max(sampling.temperature, 1e-4)).softmax(-1)
                token = p.multinomial(1, generator=generators[i]).item()
                found[i].append(token)
                rests[i] = rests[i][len(self.token_bytes[token]) :]
        return found

    def fitting(self, rest):
        """(V,): the tokens that begin with these bytes, and of those with which these bytes begin
        the longest. (Shorter ones are likely for what they begin elsewhere.)"""
        fits = [token.startswith(rest) for token in self.token_bytes]
        shorter = [i for i, token in enumerate(self.token_bytes) if rest.startswith(token)]
        fits[max(shorter, key=lambda i: len(self.token_bytes[i]))] = True
        return torch.tensor([*fits, False])  # the last token is the end of a text

    def without(self, ids, rest):
        """ids without those bytes of rest with which they begin. A token that has more leaves its
        other bytes, each as a token."""
        ids = list(ids)
        while rest and ids and ids[0] < len(self.token_bytes):
            token = self.token_bytes[ids[0]]
            common = commonprefix((token, rest))
            if not common:
                break
            rest = rest[len(common) :]
            left = token[len(common) :]
            ids[:1] = [self.encoding.encode_single_token(bytes([byte])) for byte in left]
            if left:
                break
        return ids


def rest_of(prompt):
    return getattr(prompt, "rest", b"")


def load_writer(path, vae_path="", device="cpu"):
    """The Writer of the checkpoint at path. vae_path: the checkpoint of the VAE, for the kinds that
    have one. Raises UserError."""
    if path in GPT2_NAMES or Path(path).is_dir():  # in Hugging Face's layout
        return gpt_writer(load_gpt_state(path), device)
    state = load_checkpoint(path, KINDS, "the training scripts make one")
    kind = state.get("kind", "gpt")
    if kind == "gpt":
        return gpt_writer(as_gpt_state(state, path), device)
    if kind == "masked":
        return masked_writer(state, device)
    if kind == "ldlm":
        ldlm = build(LDLM, LDLMConfig, state).to(device)
        return diffusion_writer(kind, ldlm, ldlm.dit, state["tokenizer"])
    if kind == "cola_dlm":
        vae = load_vae(vae_path, path, state, CausalVAE).to(device)
        dit = build(ColaDiT, ColaConfig, state).to(device)
    else:
        vae = load_vae(vae_path, path, state, TextVAE).to(device)
        dit = build(TextDiT, DiTConfig, state).to(device)
    return diffusion_writer(kind, vae, dit, state["tokenizer"])


def load_vae(vae_path, path, state, vae_type):
    """The VAE on whose latents the DiT of a checkpoint was trained."""
    if vae_type is CausalVAE:
        kind, remedy = "causal_vae", "python variants/cola_dlm.py vae makes one"
    else:
        kind, remedy = "vae", "python train_vae.py makes one"
    vae_state = load_checkpoint(vae_path, kind, remedy, state["tokenizer"])
    vae = build(vae_type, VAEConfig, vae_state)
    if state.get("vae") != vae.z_mean.tolist():
        raise UserError(
            f"{path} was trained on the latents of another VAE than {vae_path}; "
            "name that one (sample.py --vae)"
        )
    return vae


class InLogits:
    """A DiT whose estimate is log p(token), at one place of each row. So guided_estimate guides
    these, at t = 1. Logits of all places would not fit a GPU."""

    def __init__(self, dit, places):
        self.dit, self.config, self.places = dit, dit.config, places

    def __call__(self, *given):
        h = self.dit(*given)  # (B, N, E), or (2 B, N, E) with guidance
        copies = len(h) // len(self.places)
        return h[range(len(h)), self.places * copies]

    def estimate(self, h, z, t, temperature):
        return self.dit.to_output(h).float().log_softmax(-1)


def diffusion_writer(kind, vae, dit, tokenizer):
    def sample(prompts, length, sampling, callback=None):
        if kind == "cola_dlm":
            return continue_in_blocks(vae, dit, prompts, length, sampling, callback)
        return continue_texts(vae, dit, prompts, length, sampling, callback)

    def first_logits(prompts, sampling):
        if kind == "cola_dlm":
            net, z, segment = first_block(vae, dit, prompts, sampling)
            places = [0 for _ in prompts]
        else:
            net = dit
            generators = row_generators(prompts, sampling.seed)
            z, segment = noisy_rows(vae, dit, prompts, 0, generators)  # (B, N, C), (B, N)
            places = [len(prompt) for prompt in prompts]
        t, guess = torch.ones((), device=z.device), torch.zeros_like(z)
        net = InLogits(net, places)
        return guided_estimate(net, z, t, guess, segment, sampling)  # (B, V)

    config = dit.config
    block = config.latent_block if kind == "cola_dlm" else 0
    if not config.predict_tokens:
        first_logits = None
    return Writer(kind, sample, tokenizer, config.block_size, first_logits, block)


def gpt_writer(state, device):
    gpt = build(GPT, TransformerConfig, state).to(device)
    eot = gpt.config.end_of_text

    def sample(prompts, length, sampling, callback=None):
        return generate(gpt, prompts, length, sampling.temperature, seed=sampling.seed)

    def first_logits(prompts, sampling):
        return next_logits(gpt, [[eot, *prompt] for prompt in prompts])

    # It reads an end-of-text token first.
    block_size = gpt.config.block_size - 1
    return Writer("gpt", sample, state["tokenizer"], block_size, first_logits, has_steps=False)


def masked_writer(state, device):
    model = build(MaskedLM, TransformerConfig, state).to(device)

    def sample(prompts, length, sampling, callback=None):
        return unmask(model, prompts, length, sampling)

    def first_logits(prompts, sampling):
        return masked.first_logits(model, prompts)

    block_size = model.config.block_size
    return Writer("masked", sample, state["tokenizer"], block_size, first_logits, has_steps=False)

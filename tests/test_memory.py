"""The peak of memory at a GPU's sizes, counted on fake tensors, which take none."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import textldm
from engine.config import DIT_PRESETS
from textldm import TARGET, DiTConfig, Sampling, TextDiT, TextVAE, VAEConfig
from textldm import denoise, denoising_loss, make_batch

V = 50257


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that are alive."""

    alive = peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                self.count(x.untyped_storage())
        return result

    def __init__(self):
        super().__init__()
        self.seen = set()

    def count(self, storage):
        self.seen.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, key, size):
        self.seen.remove(key)
        self.alive -= size


def sample(vae, dit):
    with torch.no_grad():
        segment = torch.full((64, 1024), TARGET)
        z = denoise(dit, torch.zeros(64, 1024, 64), segment, Sampling(steps=1, cfg_scale=3.0))
        vae.to_tokens(z, segment)


def rows():
    segment = torch.full((16, 1024), TARGET)
    segment[:, :512] = 0
    return make_batch(torch.zeros_like(segment), segment, torch.ones(16, 1024))


def train(vae, dit):
    moments_and_average = [torch.zeros_like(p) for p in dit.parameters() for _ in range(3)]
    z_0 = vae.latents(BATCH.tokens, BATCH.segment)
    denoising_loss(dit, BATCH, z_0, torch.ones(16), z_0, n_guess=8)[0].backward()
    assert moments_and_average


BATCH = rows()


@pytest.mark.parametrize("work, gigabytes", [(sample, 8), (train, 16)])
def test_small_fits_a_gpu(monkeypatch, work, gigabytes):
    monkeypatch.setattr(textldm, "chunk_of", lambda h: 1024)  # as on a GPU
    torch.backends.cuda.enable_flash_sdp(True)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    sizes = {k: DIT_PRESETS["small"][k] for k in ("n_layer", "n_head", "n_embd")}
    with fake, Memory() as memory, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        vae = TextVAE(VAEConfig(vocab_size=V)).requires_grad_(False)
        options = dict(adaln=True, predict_tokens=True, self_condition=True)
        dit = TextDiT(DiTConfig(**sizes, **options, vocab_size=V, channels=64))
        work(vae, dit)
    print(f"{work.__name__}: {memory.peak / 1e9:.1f} GB")  # pytest -s shows it
    assert memory.peak < gigabytes * 1e9

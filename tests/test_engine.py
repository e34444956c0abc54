"""What training stands on: optimisers, statistics, evaluations, checkpoints, the terminal."""

import errno
import fcntl
import os
import sys
import zipfile
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import engine.evaluation
import engine.muon
import textldm
from engine.checkpoint import build, load_checkpoint, read_tensors, write_whole
from engine.config import DIT_PRESETS, VAE_PRESETS, TrainConfig, UserError, command_line
from engine.corpus import Corpus
from engine.evaluation import Evaluation, evaluate_vae
from engine.muon import Muon, make_optimizers, orthogonal
from engine.statistics import feature_statistics, mean_latents
from engine.terminal import lock, pick_device, run_script
from engine.train import recompute_blocks
from tests.helpers import make_quick, snapshot, stage_of, train, training_options
from textldm import Block, DiTConfig, TransformerConfig, VAEConfig, make_batch, teacher_features

SMALL = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=50)
N, C = 12, 6
SPLITS = ("train", "val")


def some_rows(rows=4):
    """Rows of a context, a target and a tail."""
    tokens = torch.randint(0, 50, (rows, N))
    segment = (torch.arange(N) >= 4).long().expand(rows, N)
    weight = torch.where(torch.arange(N) < 10, 1.0, 0.1).expand(rows, N)
    return make_batch(tokens, segment, weight)


# ---- Optimisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_that_of_torch(dtype):
    start = [torch.randn(shape) for shape in ((8, 20), (8, 20), (20, 8), (9, 9))]
    a, b = [[nn.Parameter(x.clone()) for x in start] for _ in range(2)]
    ours = Muon(a, 0.1, dtype)
    ours.param_groups[0]["lr"] = 0.5
    theirs = torch.optim.Muon(b, lr=0.5, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(a, b):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(a, b):
        assert torch.allclose(p, q, atol=0.02)


@pytest.mark.parametrize("muon", [False, True])
def test_matrices_decay_and_muon_has_those_of_attention_and_mlp(muon):
    block = Block(TransformerConfig(**SMALL, block_size=N), adaln=True)
    model = nn.ModuleList([nn.Embedding(5, 16), block])
    cfg = TrainConfig(weight_decay=0.5, muon=muon)
    optimizers = make_optimizers(model, Block, cfg, torch.float32)
    assert optimizers[0].defaults["betas"] == (0.9, 0.98), "the paper's"
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kind = type(optimizer).__name__, group["weight_decay"]
            found += [(id(p), *kind) for p in group["params"]]
    expected = []
    for name, p in model.named_parameters():
        is_layer = name.startswith(("1.attn.", "1.mlp.")) and p.dim() == 2
        kind = "Muon" if muon and is_layer else "AdamW"
        expected.append((id(p), kind, 0.5 if p.dim() == 2 else 0))
    assert sorted(found) == sorted(expected)


HARDWARE = [(True, "AVX512", "bf16"), (False, "AVX512", "fp32"), (True, "AVX2", "fp32")]


@pytest.mark.parametrize("instructions, capability, name", HARDWARE)
def test_networks_and_optimiser_multiply_in_what_the_hardware_has(
    home, tmp_path, monkeypatch, capsys, instructions, capability, name
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    seen = set()
    for place, function in ((engine.muon, orthogonal), (textldm.MLP, textldm.MLP.forward)):

        def remember(*given, function=function):
            result = function(*given)
            seen.add(result.dtype)
            return result

        monkeypatch.setattr(place, function.__name__, remember)
    train(home, "baselines/gpt.py", f"--out={tmp_path}", steps=1)
    assert seen == {torch.bfloat16 if name == "bf16" else torch.float32}
    first, *_, last = capsys.readouterr().out.splitlines()
    rows = Corpus(home / "data", "train", 64).N + 1
    assert first.startswith(f"gpt: 0.0M parameters on cpu, which multiplies in {name}")
    assert first.endswith(f"; rows of {rows} tokens")
    files = f"{tmp_path}/gpt_last.pt (to --resume); {tmp_path}/gpt.pt is of step 1"
    assert last == f"gpt: wrote {files}"


def test_recomputed_blocks_give_the_same_gradients():
    options = dict(predict_tokens=True, self_condition=True, adaln=True)
    dit = textldm.TextDiT(DiTConfig(**SMALL, block_size=N, channels=C, **options))
    for p in dit.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    batch, z_0 = some_rows(), torch.randn(4, N, C)
    calls, gradients = [], []
    dit.transformer.h[0].ln_1.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):
        textldm.flow_loss(dit, batch, z_0, torch.Generator().manual_seed(2)).backward()
        gradients.append([p.grad.clone() for p in dit.parameters()])
        dit.zero_grad()
        recompute_blocks(dit)
    assert len(calls) == 2 + 3, "for the guess, for the loss, and again"
    for once, again in zip(*gradients):
        assert torch.allclose(once, again, atol=1e-6)


# ---- What stages measure and are given -----------------------------------------------------------


def test_the_teachers_statistics_are_of_counted_tokens():
    teacher = textldm.GPT(TransformerConfig(**SMALL, block_size=N + 1))
    batches = [some_rows(), some_rows(8)]
    mean, std = feature_statistics(teacher, batches)
    features = [teacher_features(teacher, b.tokens)[:, :10].flatten(0, 1) for b in batches]
    features = torch.cat(features)
    assert torch.allclose(mean, features.mean(0), atol=1e-5)
    assert torch.allclose(std, features.std(0), atol=1e-5)


class Places:
    """A space where the latent of token k at place i is k + i/10, and alone k."""

    config = VAEConfig(n_embd=16, n_head=2, vocab_size=3, channels=1)
    z_mean = torch.zeros(1)

    def latents(self, tokens, segment):
        return (tokens + torch.arange(tokens.shape[1]) / 10)[..., None].float()

    def to_tokens(self, z, segment):
        return z[..., 0].round().long()


def test_the_mean_latent_of_a_token_by_hand():
    tokens = torch.tensor([[0, 1, 0, 2]])
    weight = torch.tensor([[1, 1, 1, 0.1]])
    batch = make_batch(tokens, torch.ones_like(tokens), weight)
    mean, unexplained = mean_latents(Places(), [batch])
    # Token 0 is at places 0 and 2 and alone: 0.2/3. Token 1 is at place 1, and token 2 in the tail.
    assert mean[:, 0].tolist() == pytest.approx([0.2 / 3, 1.05, 2])
    apart = [0.2 / 3, 0.05, 0.2 - 0.2 / 3]
    spread = [0 - 1.3 / 3, 1.1 - 1.3 / 3, 0.2 - 1.3 / 3]
    assert unexplained == pytest.approx(sum(x * x for x in apart) / sum(x * x for x in spread))


@pytest.mark.parametrize("drop, scale", [(0.1, 3.0), (0.0, 1.0)])
def test_an_evaluation_of_a_dit_by_hand(monkeypatch, drop, scale):
    """Of three targets the second is in a tail, and does not count. The first row may have the
    context of the second row; no row has one for the second."""
    tokens = torch.tensor([[1, 2, 2], [2, 1, 0]])
    segment = torch.tensor([[0, 1, 1], [0, 0, 1]])
    batch = make_batch(tokens, segment, torch.tensor([[1, 1, 0.1], [1, 1, 1]]))

    def denoise(dit, batch, z, t, eps, n_guess):
        """Noise of 0.5 everywhere, and a loss that shows the contexts."""
        assert n_guess == 2 and eps.shape == z.shape
        z_t = (1 - t[0]) * z.flatten(0, 1)[batch.targets] + t[0] * 0.5
        loss = torch.tensor([2.0, 50.0, 4.0]) + z[0, 0] + 10 * z[1, 0]
        return None, loss, None, z_t, t[0].expand(3, 1)

    def write(vae, dit, prompts, length, sampling):
        assert (length, sampling.cfg_scale, sampling.temperature) == (1, scale, 0.7)
        return [[*prompt, 0, 9] for prompt in prompts]

    monkeypatch.setattr(engine.evaluation, "denoising_loss", denoise)
    monkeypatch.setattr(engine.evaluation, "continue_texts", write)
    dit = SimpleNamespace(config=DiTConfig(context_drop=drop))
    dit.estimate = lambda h, z_t, t: torch.tensor([[2.1], [2.2], [7.0]])
    encoding = SimpleNamespace(decode=lambda ids: "".join(map(str, ids)))
    corpus = SimpleNamespace(N=3, encoding=encoding, eot=9)
    numbers, text = Evaluation(batch, 1, corpus)(Places(), dit)
    table = numbers["table"]
    assert [row["t"] for row in table] == [k / 10 for k in range(1, 10)]
    assert {row["loss"] for row in table} == {numbers["loss"]} == {3 + 1 + 20}
    assert {row["shuffled"] for row in table} == {3 + 2 + 20}
    assert {row["predicted"] for row in table} == {0.5}
    # Noise adds 0.5 t / (1 - t) to the latents 2.1 and 0.2: 0.21 at 0.3, 0.33 at 0.4, 0.5 at 0.5.
    assert [row["noisy"] for row in table] == [1] * 3 + [0.5] + [0] * 5
    lines = text.splitlines()
    assert lines[0].split() == ["t", "loss", "shuffled", "noisy", "predicted"]
    assert lines[4].split() == ["0.4000", "24.0000", "25.0000", "0.5000", "0.5000"]
    assert lines[10:] == ["  '1' -> '10'", "  '2' -> '20'"], "prompts fill half a row"


def test_an_evaluation_of_a_vae_is_a_mean_over_its_batches():
    def vae(batch, features, beta):
        return dict(loss=features + beta, kl=-features, cos=features)

    vae.config = VAEConfig(beta=0.5, channels=8)
    vae.latents = lambda tokens, segment: 2 * tokens
    vae.to_tokens = lambda z, segment: (z / 2).clamp(max=1)
    weight = torch.tensor([[1, 1, 1, 0.1]])
    tokens = torch.tensor([[[0, 1, 2, 2]], [[0, 1, 1, 1]]])  # of the first, two of three are right
    batches = [make_batch(x, torch.ones_like(x), weight) for x in tokens]
    numbers, text = evaluate_vae(vae, batches, lambda batch: batch.tokens.sum(), 5)
    assert numbers == dict(loss=4.5, accuracy=pytest.approx(5 / 6), kl=-4, cos=4, active=5)
    assert "accuracy 0.8333, KL -4.0 nats per token, 5 of 8 channels active" in text


def test_the_vae_is_given_beta_by_step_and_measures_training_rows(home, tmp_path, monkeypatch):
    make_quick(monkeypatch)
    options = [*training_options(home), "--teacher", home / "out/gpt.pt", "--out", tmp_path]
    options += ["--beta=0.5", "--beta_warmup=2"]
    stage, loss_of, weight_of, evaluate = stage_of("train_vae.py", *options)
    rows, val = [Corpus(home / "data", name, 64).fixed_batches(2, "cpu") for name in SPLITS]
    gpt = build(textldm.GPT, TransformerConfig, load_checkpoint(home / "out/gpt.pt", "gpt", ""))
    mean, std = feature_statistics(gpt, rows)
    assert torch.allclose(stage.model.teacher_mean, mean, atol=0.02)
    assert torch.allclose(stage.model.teacher_std, std, atol=0.02)
    given = [loss_of(lambda *given: given, rows[0], "drawn", step) for step in range(4)]
    assert [beta for _, _, beta, _ in given] == [0, 0.25, 0.5, 0.5]
    assert torch.equal(given[0][1], teacher_features(gpt, rows[0].tokens))
    assert weight_of(rows[0]) == rows[0].weight.sum()
    with torch.no_grad():
        numbers, _ = evaluate(stage.model)
        losses = [stage.model(b, teacher_features(gpt, b.tokens), 0.5)["loss"] for b in val]
        mu = [stage.model.posterior(b.tokens, b.segment)[0][b.counted] for b in rows]
    assert numbers["loss"] == pytest.approx(sum(losses).item() / 2)
    assert torch.allclose(stage.model.z_mean, torch.cat(mu).mean(0), atol=1e-5)


OPTIONS = ["--from_decoder", "--no-from_decoder", "--n_embd=32", "--n_head=1"]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_dit_begins_as_the_decoder_and_measures_training_rows(
    home, tmp_path, monkeypatch, option
):
    make_quick(monkeypatch)
    options = [*training_options(home), "--vae", home / "out/vae.pt", "--out", tmp_path, option]
    stage, _, weight_of, _ = stage_of("train_dit.py", *options, "--n_layer=4", "--adaln")
    vae = build(textldm.TextVAE, VAEConfig, load_checkpoint(home / "out/vae.pt", "vae", ""))
    for i, block in enumerate(stage.model.transformer.h):
        original = vae.decoder.h[i // 2]  # of two blocks to four
        is_copied = torch.equal(block.mlp.c_fc.weight, original.mlp.c_fc.weight)
        assert is_copied == (option == "--from_decoder")
        assert not block.adaln.weight.any(), "its gates are shut"
    rows = Corpus(home / "data", "train", 64).fixed_batches(2, "cpu")
    of_targets = rows[0].weight.flatten()[rows[0].targets].sum()
    assert weight_of(rows[0]).item() == pytest.approx(of_targets.item())
    mean, _ = mean_latents(vae, rows)
    assert torch.allclose(stage.model.latent_of, mean, atol=1e-5)
    assert stage.identity["vae"] == vae.z_mean.tolist()


# ---- The command line ----------------------------------------------------------------------------


def options_of(monkeypatch, *given, config=VAEConfig, presets=VAE_PRESETS):
    monkeypatch.setattr(sys, "argv", ["x", *given])
    return command_line("", config, TrainConfig, presets=presets, recipe=textldm.OURS)


def test_an_option_beats_the_preset_which_beats_the_recipe(monkeypatch):
    vae, cfg = options_of(monkeypatch)
    assert (vae.repa, vae.n_layer, cfg.muon, cfg.max_steps) == (4, 2, False, 500)
    vae, cfg = options_of(monkeypatch, "--muon", "--repa=2", "--preset=small")
    assert (vae.repa, vae.n_layer, cfg.muon, cfg.max_steps) == (2, 9, True, 200_000)
    vae, cfg = options_of(monkeypatch, "--recipe=paper")
    assert (vae.repa, vae.repa_latents, cfg.muon) == (1, False, False)
    dit, cfg = options_of(monkeypatch, config=DiTConfig, presets=DIT_PRESETS)
    assert (dit.predict_tokens, dit.t_mean, cfg.muon, cfg.max_steps) == (True, 0.8, True, 2880)


REFUSED = ["--n_layer=0", "--n_head=0", "--repa=nan", "--max_steps=0", "--n_embd=32"]
REFUSED += ["--beta=1e308", "--seed=-1", "--block_size=1"]


@pytest.mark.parametrize("option", REFUSED)
def test_a_number_out_of_its_range_is_refused_by_its_name(monkeypatch, option):
    with pytest.raises(UserError, match=option.split("=")[0]):
        options_of(monkeypatch, option)


def test_the_home_folder_has_a_short_name_in_all_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = "data out vae teacher model gpt prompts output benchmark evaluator".split()
    paths = make_dataclass("Paths", [(name, str, textldm.option("", "")) for name in names])
    monkeypatch.setattr(sys, "argv", ["x", *(f"--{name}=~/some" for name in names)])
    (config,) = command_line("", paths)
    assert {getattr(config, name) for name in names} == {f"{tmp_path}/some"}


# ---- Checkpoints ---------------------------------------------------------------------------------


def test_a_file_is_written_whole_through_links(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far/target.pt", tmp_path / "link.pt"
    link.symlink_to(target)
    write_whole(link, "a text\n")
    assert target.read_text() == "a text\n"
    write_whole(link, dict(kind="toy", x=torch.ones(2)))
    assert torch.equal(load_checkpoint(target, "toy", "")["x"], torch.ones(2))
    assert link.is_symlink()
    assert len(list(tmp_path.rglob("*"))) == 3, "nothing else is left"


@pytest.mark.parametrize("name", ["torch.save", "os.fsync", "os.replace"])
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "file.pt"
    write_whole(path, "what was there")
    before = snapshot(tmp_path)

    def fail(*given):
        raise OSError("disk full")

    monkeypatch.setattr(f"engine.checkpoint.{name}", fail)
    with pytest.raises(UserError, match="cannot write .*disk full.*what was there is as it was"):
        write_whole(path, dict(kind="toy"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("path", ["/dev/null", "."])
def test_what_is_no_file_is_not_replaced(path):
    with pytest.raises(UserError, match="it is no file"):
        write_whole(path, "text")


def test_a_flipped_bit_in_a_tensor_is_found_and_what_is_compressed_is_refused(tmp_path):
    path, numbers = tmp_path / "toy.pt", torch.randn(99)
    write_whole(path, dict(kind="toy", x=numbers))
    content = bytearray(path.read_bytes())
    content[content.index(numbers.numpy().tobytes()) + 200] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no whole checkpoint"):
        load_checkpoint(path, "toy", "")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("some", bytes(9))  # it might claim any size
    with pytest.raises(ValueError, match="damaged"):
        read_tensors(path)


# ---- The terminal --------------------------------------------------------------------------------


def test_a_folder_is_one_processs_until_it_ends(home, tmp_path, capsys):
    other = os.open(tmp_path, os.O_RDONLY)  # flock takes it for another process
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(SystemExit):
        train(home, "baselines/gpt.py", "--overwrite", "--out", tmp_path)
    assert "another process writes to" in capsys.readouterr().err
    assert snapshot(tmp_path) == {}
    os.close(other)
    lock(tmp_path)
    lock(tmp_path / ".." / tmp_path.name)  # this process has it, by whatever name


def test_where_a_drive_has_no_locks_there_is_none(tmp_path, monkeypatch):
    def flock(*given):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    lock(tmp_path)


def raises(error):
    def main():
        raise error

    return main


class CompilerError(Exception):
    __module__ = "torch._dynamo.exc"


ERRORS = [
    (lambda: torch.empty(1 << 55), "out of memory"),
    (raises(MemoryError()), "out of memory (MemoryError)"),
    (raises(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")), "out of memory"),
    (raises(RuntimeError("MPS backend out of memory (a: 1)")), "out of memory"),
    (lambda: open("/none/such"), "No such file or directory: '/none/such'"),
    (raises(UserError("a sentence")), "a sentence"),
    (raises(KeyboardInterrupt()), "stopped"),
    (raises(CompilerError("no gcc")), "--compile does not work here (no gcc); leave it out"),
    (lambda: pick_device("cuda:7"), "--device=cuda:7 is not available here"),
]


@pytest.mark.parametrize("main, words", ERRORS)
def test_what_a_user_can_mend_is_one_line_and_code_2(main, words, capsys):
    with pytest.raises(SystemExit) as e:
        run_script(main)
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), RuntimeError("shapes differ")])
def test_what_a_user_cannot_mend_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error)):
        run_script(raises(error))

"""What training stands on: optimisers, statistics, evaluations, checkpoints, the terminal."""

import errno
import os
import signal
import sys
import time
import zipfile

import pytest
import torch
import torch.nn as nn

import engine.evaluation
import engine.muon
import textldm
from engine.checkpoint import build, copy_blocks, load_checkpoint, read_tensors, write_whole
from engine.config import DIT_PRESETS, VAE_PRESETS, TrainConfig, UserError, command_line
from engine.corpus import Corpus
from engine.evaluation import Evaluation, rows_with_other_contexts, table_by_time
from engine.muon import Muon, make_optimizers, orthogonal
from engine.statistics import feature_statistics, mean_latents
from engine.terminal import lock, run_script, unlock_all
from engine.train import recompute_blocks
from tests.helpers import few_fixed_batches, load, script, snapshot, train
from textldm import (
    GPT,
    OURS,
    Block,
    DiTConfig,
    TextDiT,
    TextVAE,
    TransformerConfig,
    VAEConfig,
    flow_loss,
    make_batch,
    teacher_features,
)

SMALL = dict(n_layer=2, n_head=2, n_embd=16)
N, V, C = 12, 50, 6


def randomise(model, scale=0.3):
    """Weights as of a trained model: nothing is zero, so that every path matters."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data = scale * torch.randn(p.shape, generator=generator)
        if ".ln_" in f".{name}" and name.endswith("weight"):
            p.data += 1
    return model.eval()


def some_rows(rows=4, seed=0):
    """Rows of a context, a target and a tail."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V - 1, (rows, N), generator=generator)
    place = torch.arange(N)
    cuts = torch.arange(rows) % 4 + 2
    ends = N - torch.arange(rows) % 3
    tokens[place >= ends[:, None] - 1] = V - 1
    segment = (place >= cuts[:, None]).long()
    weight = torch.where(place < ends[:, None], 1.0, textldm.TAIL_WEIGHT)
    return make_batch(tokens, segment, weight)


# ---- Optimisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors(shape, dtype, tolerance):
    matrix = torch.randn(1, *shape)
    u, _, vt = torch.linalg.svd(matrix[0], full_matrices=False)
    around = u.T @ orthogonal(matrix, dtype)[0].float() @ vt.T
    singular_values = around.diag()
    assert (around - singular_values.diag()).abs().max() < tolerance
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.3


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_muon_steps_along_the_orthogonalised_momentum(shape):
    """In matrices of a shape, which are multiplied at once, each by itself."""
    p, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(shape))
    optimizer = Muon([p, other], 0.5, torch.float32)
    optimizer.param_groups[0]["lr"] = 0.1
    mean = torch.zeros(shape)
    for gradient in torch.randn(3, *shape):
        before = p.detach().clone()
        p.grad, other.grad = gradient.clone(), torch.randn(shape)
        mean = 0.95 * mean + 0.05 * gradient
        optimizer.step()
        nesterov = 0.05 * gradient + 0.95 * mean
        step = 0.2 * max(shape) ** 0.5 * orthogonal(nesterov[None], torch.float32)[0]
        assert torch.allclose(p, 0.95 * before - 0.1 * step, atol=1e-5)


def test_muon_is_that_of_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has had it since 2.9")
    start = torch.randn(8, 20)
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = Muon([a], 0.1, torch.bfloat16)
    theirs = torch.optim.Muon([b], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours.param_groups[0]["lr"] = 0.01
    for gradient in torch.randn(4, 8, 20):
        a.grad, b.grad = gradient, gradient.clone()
        ours.step()
        theirs.step()
    assert torch.allclose(a, b, atol=1e-3)
    assert not torch.allclose(a, start, atol=1e-2)


@pytest.mark.parametrize("muon", [False, True])
def test_each_parameter_has_one_optimiser_and_matrices_alone_decay(muon):
    """Muon has the matrices of attention and MLP, and not that of adaLN."""
    config = TransformerConfig(**SMALL, block_size=N, vocab_size=V)
    model = nn.ModuleList([nn.Embedding(5, 16), Block(config, adaln=True)])
    cfg = TrainConfig(weight_decay=0.5, muon=muon)
    adamw, *rest = make_optimizers(model, Block, cfg, torch.float32)
    matrices, vectors = adamw.param_groups
    assert adamw.defaults["betas"] == (0.9, 0.98), "the paper's"
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.5, 0)
    names = {p: name for name, p in model.named_parameters()}
    in_muon = [names[p] for o in rest for group in o.param_groups for p in group["params"]]
    wanted = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"] if muon else []
    assert sorted(in_muon) == [f"1.{name}.weight" for name in wanted]
    others = [names[p] for p in (*matrices["params"], *vectors["params"])]
    assert sorted([*in_muon, *others]) == sorted(names.values())
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert all(group["weight_decay"] == 0.5 for o in rest for group in o.param_groups)


HARDWARE = [
    (True, "AVX512", torch.bfloat16),
    (False, "AVX512", torch.float32),
    (True, "AVX2", torch.float32),
]


@pytest.mark.parametrize("instructions, capability, dtype", HARDWARE)
def test_networks_and_optimiser_multiply_in_what_the_hardware_has(
    home, tmp_path, monkeypatch, capsys, instructions, capability, dtype
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    seen = set()
    forward = GPT.forward

    def remember_dtype(x, dtype):
        seen.add(dtype)
        return orthogonal(x, dtype)

    def remember_output(*given):
        output = forward(*given)
        seen.add(output.dtype)
        return output

    monkeypatch.setattr(engine.muon, "orthogonal", remember_dtype)
    monkeypatch.setattr(GPT, "forward", remember_output)
    train(home, "baselines/gpt.py", f"--out={tmp_path}", steps=1)
    assert seen == {dtype}
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("gpt: 0.0M parameters on cpu, which multiplies in ")
    assert str(dtype)[-2:] in said[0].split("multiplies in ")[1].split(",")[0]
    corpus = Corpus(home / "data", "train", 64)
    assert said[0].endswith(f"; rows of {corpus.N + 1} tokens")
    files = f"{tmp_path}/gpt_last.pt (to --resume); {tmp_path}/gpt.pt is of step 1"
    assert said[-1] == f"gpt: wrote {files}"


def test_recomputed_blocks_give_the_same_gradients():
    """The backward pass computes a block again, and not for the guess, which has no gradient."""
    found = []
    for is_recomputed in (False, True):
        options = dict(predict_tokens=True, self_condition=True, adaln=True)
        config = DiTConfig(**SMALL, block_size=N, vocab_size=V, channels=C, **options)
        dit = randomise(TextDiT(config), scale=0.1)
        if is_recomputed:
            recompute_blocks(dit)
        calls = []
        dit.transformer.h[0].ln_1.register_forward_pre_hook(lambda *_: calls.append(1))
        z_0 = torch.randn(4, N, C, generator=torch.Generator().manual_seed(1))
        flow_loss(dit, some_rows(), z_0, torch.Generator().manual_seed(2)).backward()
        found.append((len(calls), {name: p.grad for name, p in dit.named_parameters()}))
    (once, expected), (again, gradients) = found
    assert once == 2, "for the guess, and for the loss"
    assert again == 3
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-6), name


# ---- What stages measure and are given -----------------------------------------------------------


def test_the_teachers_statistics_are_of_counted_tokens():
    teacher = randomise(GPT(TransformerConfig(**SMALL, block_size=N + 1, vocab_size=V)))
    batches = [some_rows(8, seed=i) for i in range(2)]
    mean, std = feature_statistics(teacher, batches)
    features = [teacher_features(teacher, b.tokens)[b.weight == 1] for b in batches]
    features = torch.cat(features)
    assert torch.allclose(mean, features.mean(0), atol=1e-5)
    assert torch.allclose(std, features.std(0), atol=1e-5)


class FourLatents:
    """A space where the latent of token k at place i is k + i/10, and alone k."""

    config = VAEConfig(**SMALL, vocab_size=3, channels=1)
    z_mean = torch.zeros(1)

    def latents(self, tokens, segment):
        return (tokens + torch.arange(tokens.shape[1]) / 10)[..., None].float()

    def to_tokens(self, z, segment):
        return z[..., 0].round().long()


def test_the_mean_latent_of_a_token_by_hand():
    """Token 0 is at places 0 and 2 and alone: 0.2/3. Token 1 at place 1: 1.1. The tail is left
    out."""
    tokens = torch.tensor([[0, 1, 0, 2]])
    weight = torch.tensor([[1, 1, 1, 0.1]])
    batch = make_batch(tokens, torch.ones_like(tokens), weight)
    mean, unexplained = mean_latents(FourLatents(), [batch])
    assert mean[:, 0].tolist() == pytest.approx([0.2 / 3, 1.05, 2])
    apart = [0.2 / 3, 0.05, 0.2 - 0.2 / 3]
    spread = [0 - 1.3 / 3, 1.1 - 1.3 / 3, 0.2 - 1.3 / 3]
    assert unexplained == pytest.approx(sum(x * x for x in apart) / sum(x * x for x in spread))


def test_the_table_by_time_by_hand():
    """Two targets, of which the tail does not count. Noise takes z_t / (1 - t) of the first to
    another token from t = 0.5 on; the estimate is right."""
    tokens = torch.tensor([[1, 2, 2]])
    segment = torch.tensor([[0, 1, 1]])
    batch = make_batch(tokens, segment, torch.tensor([[1, 1, 0.1]]))
    space = FourLatents()
    z_0 = space.latents(tokens, segment).flatten(0, 1)[batch.targets]

    class Net:
        def estimate(self, output, z_t, t):
            return z_0

    def denoise(t, is_shuffled):
        z_t = (1 - t) * z_0 + t * 0.5
        loss = torch.tensor([2.0, 50.0]) + is_shuffled
        return loss, None, z_t, t.expand(2, 1)

    table = table_by_time(space, Net(), batch, denoise)
    assert [row["t"] for row in table] == [k / 10 for k in range(1, 10)]
    assert {row["loss"] for row in table} == {2}
    assert {row["shuffled"] for row in table} == {3}
    assert {row["predicted"] for row in table} == {1}
    # z_t / (1 - t) is 2.1 + 0.5 t / (1 - t): at 0.4 it is 2.43, at 0.5 it is 2.6.
    assert [row["noisy"] for row in table] == [1] * 4 + [0] * 5


def test_an_evaluation_has_the_mean_loss_and_what_the_model_writes(home, monkeypatch):
    corpus = Corpus(home / "data", "val", 16)
    evaluation = Evaluation(corpus.fixed_batches(1, "cpu")[0], 2, corpus)
    evaluation.cuts = [3, 99, 0, 1]
    evaluation.denoiser = lambda *_: None
    table = [dict(t=0.1, loss=1.0), dict(t=0.2, loss=4.0)]
    monkeypatch.setattr(engine.evaluation, "table_by_time", lambda *_: table)
    given = []

    def write(vae, dit, prompts, sampling):
        given.append(([len(prompt) for prompt in prompts], sampling.cfg_scale))
        return [corpus.encoding.encode(" two")] * 4

    evaluation.write = write
    for drop, scale in ((0.1, 3.0), (0.0, 1.0)):
        dit = TextDiT(DiTConfig(**SMALL, channels=2, context_drop=drop))
        numbers, text = evaluation(None, dit)
        assert given[-1] == ([3, corpus.N // 2, 0, 1], scale)
    assert numbers == dict(loss=2.5, table=table)
    assert "0.2000     4.0000" in text and text.endswith("-> ' two'")


def test_another_rows_context_is_long_enough():
    others = rows_with_other_contexts([3, 1, 5, 9], [6, 2, 4, 8])
    assert others == [2, 2, 3, 3], "the next one that is longer, or its own where there is none"


def test_the_vae_is_given_beta_by_step_and_measures_training_rows(home, tmp_path, monkeypatch):
    betas, measured = [], []
    forward, standardise = TextVAE.forward, TextVAE.standardise

    def remember_beta(self, batch, features, beta, generator=None):
        if generator is not None:
            betas.append(beta)
        return forward(self, batch, features, beta, generator)

    def remember_rows(self, batches):
        measured.append(batches[0].tokens)
        return standardise(self, batches)

    monkeypatch.setattr(TextVAE, "forward", remember_beta)
    monkeypatch.setattr(TextVAE, "standardise", remember_rows)
    options = ["--teacher=none", "--beta=0.5", "--beta_warmup=2", "--out", tmp_path]
    train(home, "train_vae.py", *options, steps=4)
    assert betas == [0, 0.25, 0.5, 0.5]
    rows = Corpus(home / "data", "train", 64).fixed_batches(1, "cpu")[0].tokens
    assert torch.equal(measured[0], rows)


@pytest.mark.parametrize("command", ["train_dit.py", "variants/cola_dlm.py dit"])
def test_a_dit_begins_as_the_decoder_and_measures_training_rows(
    home, tmp_path, monkeypatch, command
):
    """Its blocks are copies where the widths are equal and this is asked for. Its mean latents are
    of the training split."""
    vae = home / "out/vae.pt"
    if "cola" in command:
        options = ["--out", tmp_path, "--teacher=none"]
        train(home, "variants/cola_dlm.py vae", *options, steps=1)
        vae = tmp_path / "vae.pt"
    weights = load_checkpoint(vae, ("vae", "causal_vae"), "")["model"]
    drawn = []

    def remember(self, n, device):
        drawn.append((self.path.stem, n))
        return few_fixed_batches(self, 1, device)

    monkeypatch.setattr(engine.evaluation.Evaluation, "__call__", lambda *_: (dict(loss=0.0), ""))
    monkeypatch.setattr(Corpus, "fixed_batches", remember)
    is_copied = []
    for option in ("--from_decoder", "--no-from_decoder", "--n_embd=32", "--n_head=1"):
        given = [option, "--overwrite", "--vae", vae, "--out", tmp_path / "dit"]
        train(home, command, *given, "--learning_rate=1e-30", steps=1)
        ours = load_checkpoint(tmp_path / "dit/dit.pt", ("dit", "cola_dlm"), "")["model"]
        name = "h.1.mlp.c_fc.weight"
        is_copied.append(torch.equal(ours[f"transformer.{name}"], weights[f"decoder.{name}"]))
    assert is_copied == [True, False, False, False]
    assert ("train", 64) in drawn and ("val", 64) not in drawn


def test_copied_blocks_compute_what_their_originals_do():
    """Of two layers to four. The gates of adaLN are shut, as ever."""
    vae = randomise(TextVAE(VAEConfig(**SMALL, block_size=N, vocab_size=V, channels=C)))
    dit = TextDiT(DiTConfig(**dict(SMALL, n_layer=4), vocab_size=V, channels=C, adaln=True))
    copy_blocks(vae.decoder.h, dit.transformer.h)
    h = torch.randn(3, N, 16)
    time_emb = dit.time_embedding(torch.full((3,), 0.5))
    assert torch.allclose(dit.transformer.h[0](h, time_emb=time_emb), h)
    for i, block in enumerate(dit.transformer.h):
        block.adaln = None
        assert torch.equal(block(h), vae.decoder.h[i // 2](h))


# ---- The command line ----------------------------------------------------------------------------


def options_of(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["x", *given])
    return command_line("", VAEConfig, TrainConfig, presets=VAE_PRESETS, recipe=OURS)


def test_an_option_beats_the_preset_which_beats_the_recipe(monkeypatch):
    vae, cfg = options_of(monkeypatch)
    assert (vae.repa, vae.n_layer, cfg.muon, cfg.max_steps) == (4, 2, False, 500)
    vae, cfg = options_of(monkeypatch, "--muon", "--repa=2", "--preset=small")
    assert (vae.repa, vae.n_layer, cfg.muon, cfg.max_steps) == (2, 9, True, 200_000)
    vae, cfg = options_of(monkeypatch, "--recipe=paper")
    assert (vae.repa, vae.repa_latents, cfg.muon) == (1, False, False)
    monkeypatch.setattr(sys, "argv", ["x"])
    dit, cfg = command_line("", DiTConfig, TrainConfig, presets=DIT_PRESETS, recipe=OURS)
    assert (dit.predict_tokens, dit.t_mean, cfg.muon, cfg.max_steps) == (True, 0.8, True, 2880)


REFUSED = ["--n_layer=0", "--n_head=0", "--repa=nan", "--max_steps=0", "--n_embd=32"]
REFUSED += ["--beta=1e308", "--seed=-1", "--block_size=1"]


@pytest.mark.parametrize("option", REFUSED)
def test_a_number_out_of_its_range_is_refused_by_its_name(monkeypatch, option):
    with pytest.raises(UserError, match=option.split("=")[0]):
        options_of(monkeypatch, option)


def test_the_home_folder_has_a_short_name_in_all_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sample_config = load("sample.py").SampleConfig
    vae_config = load("train_vae.py").VAEStage
    judge_config = load("bench/evaluate.py").EvalConfig
    paths = ["data", "out", "vae", "teacher", "model", "gpt", "prompts", "output"]
    paths += ["benchmark", "evaluator"]
    found = {}
    for config_type in (TrainConfig, sample_config, vae_config, judge_config):
        names = [name for name in paths if hasattr(config_type, name)]
        monkeypatch.setattr(sys, "argv", ["x", *(f"--{name}=~/some" for name in names)])
        (config,) = command_line("", config_type)
        found |= {name: getattr(config, name) for name in names}
    assert found == {name: f"{tmp_path}/some" for name in paths}


# ---- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["a text\n", dict(kind="toy", x=torch.ones(2))])
def test_a_file_is_written_whole_through_links(tmp_path, content):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far/target.pt", tmp_path / "link.pt"
    link.symlink_to(target)
    write_whole(target, "what was there")
    write_whole(link, content)
    assert link.is_symlink() and not target.is_symlink()
    if isinstance(content, str):
        assert target.read_text() == content
    else:
        assert torch.equal(load_checkpoint(link, "toy", "")["x"], torch.ones(2))
    assert len(list(tmp_path.rglob("*"))) == 3, "nothing else is left"


@pytest.mark.parametrize("name", ["torch.save", "os.fsync", "os.replace"])
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "file.pt"
    write_whole(path, "what was there")

    def fail(*given):
        raise OSError("disk full")

    monkeypatch.setattr(f"engine.checkpoint.{name}", fail)
    with pytest.raises(UserError, match="cannot write .*disk full.*what was there is as it was"):
        write_whole(path, dict(kind="toy"))
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["/dev/null", "."])
def test_what_is_no_file_is_not_replaced(path):
    with pytest.raises(UserError, match="it is no file"):
        write_whole(path, "text")


def test_a_flipped_bit_anywhere_in_the_tensors_is_found(home, tmp_path):
    whole = (home / "out/vae.pt").read_bytes()
    places = []
    with zipfile.ZipFile(home / "out/vae.pt") as file:
        for info in file.infolist():
            if "/data/" in info.filename and info.file_size:
                with file.open(info) as entry:
                    places.append(whole.index(entry.read()) + info.file_size // 2)
    assert len(places) > 20
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 4
        (tmp_path / "flipped.pt").write_bytes(flipped)
        with pytest.raises(UserError, match="is no whole checkpoint"):
            load_checkpoint(tmp_path / "flipped.pt", "vae", "")


def test_a_compressed_checkpoint_is_refused(home, tmp_path):
    """It might claim any size."""
    with zipfile.ZipFile(home / "out/vae.pt") as source:
        with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as target:
            for info in source.infolist():
                target.writestr(info.filename, source.read(info))
    with pytest.raises(ValueError, match="damaged"):
        read_tensors(tmp_path / "small.pt")


def test_a_checkpoint_of_another_kind_or_vocabulary_is_refused(home):
    path = home / "out/vae.pt"
    with pytest.raises(UserError, match="holds a vae, where a dit is needed; make one"):
        load_checkpoint(path, "dit", "make one")
    with pytest.raises(UserError, match="another vocabulary; make one, for this data"):
        load_checkpoint(path, "vae", "make one", tokenizer=dict(encoding="gpt2"))
    with pytest.raises(UserError, match="none.pt is missing; make one"):
        load_checkpoint(home / "none.pt", "vae", "make one")


def test_a_model_takes_the_tensors_of_its_checkpoint_and_no_memory_of_its_own(home):
    """So it takes no memory for what a config claims."""
    devices = set()

    class Observed(TextVAE):
        def __init__(self, config):
            super().__init__(config)
            devices.update(x.device.type for x in self.state_dict().values())

    state = load_checkpoint(home / "out/vae.pt", "vae", "")
    vae = build(Observed, VAEConfig, state)
    assert devices == {"meta"}
    assert vae.wte.weight.data_ptr() == state["model"]["wte.weight"].data_ptr()
    assert vae.wte.weight.dtype == torch.float32


# ---- The terminal --------------------------------------------------------------------------------


@pytest.fixture
def other_process(tmp_path):
    """The id of a process that holds the lock of tmp_path."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        lock(tmp_path)
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_is_one_processs_until_it_ends(home, tmp_path, other_process, capsys):
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit):
        train(home, "baselines/gpt.py", "--overwrite", "--out", tmp_path)
    assert "another process writes to" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    os.kill(other_process, signal.SIGKILL)
    os.waitid(os.P_PID, other_process, os.WEXITED | os.WNOWAIT)
    lock(tmp_path)
    lock(tmp_path / ".." / tmp_path.name)  # this process has it, by whatever name
    unlock_all()


def test_where_a_drive_has_no_locks_there_is_none(tmp_path, monkeypatch):
    def flock(*given):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    lock(tmp_path)


def raises(error):
    def main():
        raise error

    return main


ERRORS = [
    (lambda: torch.empty(1 << 55), "out of memory"),
    (raises(MemoryError()), "out of memory (MemoryError)"),
    (raises(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")), "out of memory"),
    (raises(RuntimeError("MPS backend out of memory (a: 1)")), "out of memory"),
    (lambda: open("/none/such"), "No such file or directory: '/none/such'"),
    (raises(OSError("the device is gone")), "the device is gone"),
    (raises(UserError("a sentence")), "a sentence"),
    (raises(KeyboardInterrupt()), "stopped"),
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


def test_a_device_that_is_not_there_is_one_line(home, capsys):
    with pytest.raises(SystemExit):
        script("sample.py", "--out", home / "out", "--device=cuda:7")
    assert "--device=cuda:7 is not available here" in capsys.readouterr().err

"""Train the world's causal diffusion transformer and its text encoder to generate in four steps.

Teacher forcing: a clip of chunks stands in the sequence twice, clean (timestep 0) and noised; a noised chunk sees the
clean chunks before it and itself, a clean chunk sees the clean ones up to itself, exactly what the cache holds at
generation. The levels of noise are the four of the sampler, plus some in between.

Four kinds of steps:

first   the opening chunk alone, at all levels of noise: where sprites start is free, so four steps would end in the
        mean of all layouts; sampled in `world.model.FIRST_STEPS` a layout emerges.
short   windows of a few chunks under true history.
stream  whole clips chunk by chunk on the real memory, as at generation: sparse attention, persistent pages, the model's
        own chunks in the memory. Finished chunks are constants to autograd.
long    whole clips at once, dense; with `own_share` under the model's own estimates of the history, made in parallel
        for all chunks, and with inputs of later steps made from its own estimates.

Because the world is deterministic once its first frames are seen, the renderer's next frames stay the right target also
after the model's own mistakes, and no adversary or critic is needed.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import AttentionConfig, Backend, Positions
from ..rollout import upload
from ..state import StreamState
from ..vae import WanVAE
from ..wan import WanModel
from ..world.scene import Scene, to_prompt
from ..world.text import PAD, UNKNOWN, WorldTextEncoder, tokenize
from .common import (
    BatchedMuon,
    Budget,
    GraphedStep,
    backward_prompt,
    channels_last,
    compile_blocks,
    log,
    lr_factor,
    mixed_precision,
    prompt_leaves,
    render_with_mask,
    save_weights,
    set_lr,
    shifted,
    training_scenes,
    whole_attention,
)
from .world_words import WordReader

SIGMAS = (1.0, 0.9375, 5 / 6, 0.625)
CHUNK = 3
POSITIONS: tuple[Positions, ...] = ("absolute", "rebased")
FRAMES = 81  # video frames of a training clip: 21 latent frames, 7 chunks
LONGEST = 64  # words of a training prompt
CAUSAL_AR = {"config": '{"transformer": {"causal_ar": true}}'}


@dataclass(frozen=True)
class DitTraining:
    """Shares are parts of the steps; progress goes from 0 to 1.

    minutes: length of the run. first_share: openings. long_from: progress at which windows become whole clips.
    stream_share: of the whole clips, those on the sparse memory at `topk`. own_share: of the other whole
    clips, those that see the model's own output. guidance: see `opening_step`. words: weight of the loss that asks
    every word for its sprite (world_words.py). sprites: how much more than the background sprites weigh in the loss of
    openings (less so the more noise there is) and streams. renew_every: steps between two additions
    to the clips. decay_from: progress at which the learning rate starts to fall.
    """

    minutes: float = 9.0
    seed: int = 0
    dim: int = 256
    ffn_dim: int = 768
    heads: int = 2
    layers: int = 7
    first_batch: int = 64
    batch: int = 16
    chunks: int = 4
    long_batch: int = 8
    first_share: float = 0.3
    long_from: float = 0.75
    own_share: float = 0.5
    stream_share: float = 0.5
    stream_batch: int = 16
    topk: float = 0.25
    backend: Backend = "auto"
    decay_from: float = 0.6
    bank_start: int = 640
    bank_size: int = 6144
    openings_size: int = 16384
    renew_every: int = 8
    muon_lr: float = 3e-3
    adam_lr: float = 1.5e-3
    drop_prompt: float = 0.06
    guidance: float = 0.0
    words: float = 0.0
    sprites: float = 0.0
    context_noise: float = 0.12
    ema: float = 0.998
    compile: bool = True
    graphs: bool = True  # openings and streams as CUDA graphs
    log_every: int = 100


class LatentBank:
    """Clips of the world as latents on the device: filled by rendering and encoding, then renewed clip by clip.

    scenes: (dice, how many) -> what is rendered.
    """

    def __init__(
        self,
        vae: WanVAE,
        size: int,
        device: str,
        seed: int,
        frames: int = FRAMES,
        scenes: Callable[[random.Random, int], list[Scene]] = training_scenes,
    ):
        self.vae, self.size, self.device, self.frames, self.scenes = vae, size, device, frames, scenes
        self.rng = random.Random(seed)
        # [size, 17, F, h, w] bfloat16, made by the first `add`: the latents, and where sprites are
        self.latents: Tensor | None = None
        self.ids = torch.full((size, LONGEST), PAD)
        self.filled = self.next = 0

    @property
    def chunks(self) -> int:
        """Chunks of a whole clip."""
        return (self.frames // 4 + 1) // CHUNK

    @torch.no_grad()
    def add(self, count: int) -> None:
        """Render and encode `count` clips; a full bank loses its oldest."""
        scenes = self.scenes(self.rng, count)
        with mixed_precision(self.device):
            video, sprites = render_with_mask(scenes, self.frames, self.device)
            fresh = self.vae.encode_whole(video.contiguous(memory_format=torch.channels_last_3d))
        fresh = torch.cat([fresh, latent_mask(sprites).to(fresh)], dim=1)
        if self.latents is None:
            self.latents = torch.empty(
                (self.size, *fresh.shape[1:]), dtype=torch.bfloat16, device=self.device
            )
        for scene, latent in zip(scenes, fresh, strict=True):
            self.latents[self.next] = latent
            self.ids[self.next] = padded(tokenize(to_prompt(scene)))
            self.next = (self.next + 1) % self.size
            self.filled = min(self.filled + 1, self.size)

    def draw(self, count: int, chunks: int, drop_prompt: float) -> tuple[Tensor, Tensor, int]:
        """Latents and sprite mask [B, 17, 3 * chunks, h, w] float32, word ids [B, n], and the first frame's index."""
        assert self.latents is not None, "add clips first"
        pick = torch.tensor([self.rng.randrange(self.filled) for _ in range(count)])
        first = 0 if self.rng.random() < 0.5 else CHUNK * self.rng.randint(0, self.chunks - chunks)
        latents = self.latents[upload(pick, self.device), :, first : first + CHUNK * chunks].float()
        # A dropped prompt is one unknown word, as the empty prompt is when generating: a row without any word would be
        # attention over nothing, whose gradient is not a number on some GPU kernels.
        ids = self.ids[pick]
        ids[torch.tensor([self.rng.random() < drop_prompt for _ in pick])] = padded([UNKNOWN])
        return latents, upload(ids, self.device), first


def latent_mask(mask: Tensor) -> Tensor:
    """1 where a latent holds a pixel of the mask: [B, 1, F, H, W] -> [B, 1, f, H/8, W/8]."""
    first = mask[:, :, :1].expand(-1, -1, 4, -1, -1)  # the first latent frame is one frame, every other four
    return F.max_pool3d(torch.cat([first, mask[:, :, 1:]], dim=2), (4, 8, 8))


def weighed(clip: Tensor, sprites: float | Tensor) -> tuple[Tensor, Tensor]:
    """A bank's clip [B, 17, F, h, w] as latents [B, 16, F, h, w] and weights of the loss [B, 1, F, h, w]."""
    return clip[:, :16], 1 + sprites * clip[:, 16:]


def padded(words: list[int]) -> Tensor:
    """Word ids as a row of LONGEST."""
    return F.pad(torch.tensor(words), (0, LONGEST - len(words)), value=PAD)


@functools.cache
def no_prompt(device: torch.device) -> Tensor:
    """Word ids [1, LONGEST] of a prompt that is left out."""
    return padded([UNKNOWN])[None].to(device)


@functools.cache
def teacher_forcing_attention(chunks: int):
    """`attend` for [clean chunks | noised chunks]; q, k, v are [B, N, H, D]."""

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (qc, qn), (kc, kn), (vc, vn) = (
            [half.unflatten(2, (chunks, -1)) for half in t.transpose(1, 2).chunk(2, dim=2)] for t in (q, k, v)
        )
        clean, noised = [], []
        for i in range(chunks):
            past_k, past_v = kc[:, :, :i].flatten(2, 3), vc[:, :, :i].flatten(2, 3)
            k_clean, v_clean = torch.cat([past_k, kc[:, :, i]], 2), torch.cat([past_v, vc[:, :, i]], 2)
            k_noised, v_noised = torch.cat([past_k, kn[:, :, i]], 2), torch.cat([past_v, vn[:, :, i]], 2)
            clean.append(F.scaled_dot_product_attention(qc[:, :, i], k_clean, v_clean))
            noised.append(F.scaled_dot_product_attention(qn[:, :, i], k_noised, v_noised))
        return torch.cat([*clean, *noised], dim=2).transpose(1, 2)

    return attend


class Trainee(nn.Module):
    """Backbone, text encoder and what reads its words, and the parallel forward over a whole clip."""

    def __init__(self, cfg: DitTraining):
        super().__init__()
        self.dit = WanModel(dim=cfg.dim, ffn_dim=cfg.ffn_dim, num_heads=cfg.heads, num_layers=cfg.layers)
        self.dit.init_weights()
        self.text = WorldTextEncoder()
        self.reader = WordReader(self.text.dim)

    def forward(self, context: Tensor, noised: Tensor, sigma: Tensor, first: int, cross_kv) -> Tensor:
        """Flow of every chunk. context, noised [B, 16, F, h, w]; sigma [B, chunks] -> [B, 16, F, h, w]."""
        frames = context.shape[2]
        x = torch.cat([context, noised], dim=2)
        t = 1000 * sigma.repeat_interleave(CHUNK, dim=1)
        t = torch.cat([torch.zeros_like(t), t], dim=1)
        cos, sin = self.dit.rope(first, frames, x.shape[3], x.shape[4], x.device)
        rope = torch.cat([cos, cos]), torch.cat([sin, sin])
        flow = self.dit(x, t, cross_kv, teacher_forcing_attention(frames // CHUNK), rope=rope)
        return flow[:, :, frames:]

    def opening(self, noised: Tensor, sigma_B: Tensor, cross_kv) -> Tensor:
        """Flow of opening chunks [B, 16, CHUNK, h, w] at noise levels [B]."""
        return self.dit(noised, 1000 * sigma_B[:, None].expand(-1, CHUNK), cross_kv, whole_attention)


def per_frame(sigma_BK: Tensor) -> Tensor:
    """[B, chunks] -> [B, 1, F, 1, 1]."""
    return sigma_BK.repeat_interleave(CHUNK, dim=1)[:, None, :, None, None]


@functools.cache
def levels(sigmas: tuple[float, ...], device: torch.device) -> Tensor:
    """Noise levels on the device, uploaded once: a training step in which the host never waits is twice as fast."""
    return torch.tensor(sigmas, device=device)


def mean_by_step(error: Tensor, step: Tensor) -> Tensor:
    """Mean of `error` where `step` is 0, 1, 2 or 3 [4]; nan where it never is."""
    return torch.stack([(error * (step == i)).sum() / (step == i).sum() for i in range(4)])


def draw_sigma(batch: int, chunks: int, device) -> tuple[Tensor, Tensor]:
    """Noise levels [B, chunks] and the index of the sampler step they stand for (-1: in between)."""
    step = torch.randint(0, 4, (batch, chunks), device=device)
    sigma = levels(SIGMAS, step.device)[step]
    uniform = torch.rand(batch, chunks, device=device)
    between = torch.rand(batch, chunks, device=device) < 0.12
    return torch.where(between, shifted(uniform), sigma), torch.where(between, -1, step)


@torch.no_grad()
def own_estimate(model: Trainee, x0: Tensor, context: Tensor, sigma: Tensor, first: int, cross_kv) -> Tensor:
    """The model's x0 for every chunk, from the truth noised to `sigma` [B, chunks] under `context`."""
    s = per_frame(sigma)
    noised = (1 - s) * x0 + s * torch.randn_like(x0)
    return noised - s * model(context, noised, sigma, first, cross_kv).float()


def self_inputs(model: Trainee, x0: Tensor, step: Tensor, first: int, cross_kv) -> tuple[Tensor, Tensor]:
    """Context and noising source made of the model's own estimates, for about half of the chunks each.

    The context drifts for one to three rounds. A step's source is the estimate of the step before it, as in the
    sampler; in a first chunk that sees no history the estimate may show another layout than the truth, so there the
    truth stays.
    """
    batch, chunks = step.shape
    context = x0
    for _ in range(random.randint(1, 3)):
        level = torch.where(torch.rand(batch, chunks, device=x0.device) < 0.5, SIGMAS[2], SIGMAS[3])
        context = own_estimate(model, x0, context, level, first, cross_kv)
    keep = torch.rand(batch, 1, device=x0.device) < 0.3
    context = torch.where(per_frame(keep.expand(-1, chunks)), x0, context)
    before = levels((1.0, *SIGMAS), x0.device)[step.clamp(min=0)]
    source = own_estimate(model, x0, context, before, first, cross_kv)
    truth = (step <= 0) | (torch.rand(batch, chunks, device=x0.device) < 0.5)
    truth[:, 0] = True
    return context, torch.where(per_frame(truth), x0, source)


def optimizers(model: Trainee, cfg: DitTraining) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else; rates are tensors where graphs read them."""
    inside = [
        p for n, p in model.named_parameters() if ".blocks." in n and p.ndim == 2 and n.startswith("dit.")
    ]
    ids = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in ids]
    device = model.text.embedding.device
    graphs = device.type == "cuda"
    muon_lr, adam_lr = (
        torch.tensor(lr, device=device) if graphs else lr for lr in (cfg.muon_lr, cfg.adam_lr)
    )
    return [
        BatchedMuon(inside, lr=muon_lr),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, capturable=graphs),
    ]


def train_dit(cfg: DitTraining, folder: Path, device: str, resume: bool = False) -> None:
    """Train with the VAE found in `folder`; writes world_dit and world_text there (the moving average of the weights).

    `resume` starts from the weights already there, with whole clips.
    """
    torch.manual_seed(cfg.seed)
    random.seed(cfg.seed)
    vae = WanVAE.from_state_dict(load_file(folder / "world_vae.safetensors")).requires_grad_(False)
    channels_last(vae.to(device, torch.bfloat16 if device != "cpu" else torch.float32))
    bank = LatentBank(vae, cfg.bank_size, device, cfg.seed)
    openings = LatentBank(vae, cfg.openings_size, device, cfg.seed + 1, frames=1 + 4 * (CHUNK - 1))
    model = Trainee(cfg).to(device)
    if resume:
        load_weights(model, folder)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if cfg.compile:
        compile_blocks(model.dit)
    optims = optimizers(model, cfg)
    budget, shown = Budget(cfg.minutes), time.monotonic()
    while bank.filled < cfg.bank_start and budget.progress < 0.5:
        bank.add(4)
        openings.add(32)
    if not all(b.latents.isfinite().all() for b in (bank, openings) if b.latents is not None):
        raise FloatingPointError("the VAE's latents are not finite")
    log.info("%d clips, %d openings after %.0f%%", bank.filled, openings.filled, 100 * budget.progress)
    losses: dict[str, list[Tensor]] = {"opening": [], "clip": [], "stream": []}
    steps = Steps(model, optims, cfg, bank, openings, device)
    averaged, current = list(average.values()), list(model.state_dict().values())
    step = 0
    while (progress := budget.progress) < 1:
        set_lr(optims, lr_factor(step, progress, decay_from=cfg.decay_from))
        kind = draw_kind(cfg, long := resume or progress > cfg.long_from)
        if kind == "opening":
            loss = steps.opening()
        elif kind == "stream":
            loss = steps.stream()
        else:
            loss = steps.clip(long)
        losses[kind].append(loss)
        torch._foreach_lerp_(averaged, current, 1 - min(cfg.ema, (1 + step) / (10 + step)))
        step += 1
        if step % cfg.renew_every == 0:
            if kind == "opening":
                openings.add(16)
            else:
                bank.add(4)
        if step % cfg.log_every == 0:
            if not model.dit.head.head.bias.isfinite().all():
                raise FloatingPointError(
                    f"the weights are not finite at step {step}: lower muon_lr or adam_lr"
                )
            now = time.monotonic()
            means = {k: torch.stack(v).nanmean(0).tolist() for k, v in losses.items() if v}
            log.info("step %d  %.0f%%  flow loss %s  %.1f steps/s", step, 100 * progress, shorten(means),
                     cfg.log_every / (now - shown))  # fmt: skip
            shown = now
            losses = {kind: [] for kind in losses}
            save_trainee(average, folder)  # a run that is cut short loses seconds
    save_trainee(average, folder)
    log.info("wrote the world model to %s after %d steps", folder, step)


class Steps:
    """One step of each kind: draw clips, gradients, update."""

    def __init__(
        self, model: Trainee, optims, cfg: DitTraining, bank: LatentBank, openings: LatentBank, device
    ):
        self.model, self.optims, self.cfg, self.device = model, optims, cfg, device
        self.bank, self.openings = bank, openings
        self.graphs: dict[Hashable, GraphedStep] = {}

    def clip(self, long: bool) -> Tensor:
        own = long and random.random() < self.cfg.own_share
        loss = clip_step(self.model, self.bank, self.cfg, long, own, self.device)
        update(self.model, self.optims)
        return loss

    def opening(self) -> Tensor:
        clip, ids, _ = self.openings.draw(self.cfg.first_batch, 1, self.cfg.drop_prompt)
        return self._graphed("opening", opening_step, clip, ids)

    def stream(self) -> Tensor:
        """On the sparse memory, half of the time with rebased positions."""
        positions = random.choice(POSITIONS)
        attention = AttentionConfig(topk=self.cfg.topk, positions=positions, backend=self.cfg.backend)
        return self.stream_on(attention, self.bank, 0, self.bank.chunks, self.cfg.drop_prompt)

    def stream_on(
        self, attention: AttentionConfig, bank: LatentBank, given: int, chunks: int, drop_prompt: float
    ) -> Tensor:
        """`stream_step` over the first `chunks` chunks of clips from `bank`."""
        clip, ids, _ = bank.draw(self.cfg.stream_batch, bank.chunks, drop_prompt)
        step = functools.partial(stream_step, attention=attention, given=given)
        return self._graphed((attention, given, chunks), step, clip[:, :, : CHUNK * chunks], ids)

    def _graphed(self, key: Hashable, gradients: Callable[..., Tensor], clip: Tensor, ids: Tensor) -> Tensor:
        """A step of gradients(model, clip, ids, cfg=...), replayed as the graph of that key where graphs are used."""

        def step(clip: Tensor, ids: Tensor) -> Tensor:
            loss = gradients(self.model, clip, ids, cfg=self.cfg)
            update(self.model, self.optims)
            return loss

        if not (self.cfg.graphs and clip.is_cuda):
            return step(clip, ids)
        if key not in self.graphs:
            self.graphs[key] = GraphedStep(step, clip, ids)
        return self.graphs[key](clip, ids)


def draw_kind(cfg: DitTraining, long: bool) -> str:
    """What the next step trains: "opening", "stream" or "clip"."""
    if random.random() < cfg.first_share:
        return "opening"
    return "stream" if long and random.random() < cfg.stream_share else "clip"


def shorten(means: dict) -> str:
    """Losses as they are shown; those of clips and streams are one for each of the sampler's steps, and behind those of
    streams stands the sprites'."""
    rows = {k: v if isinstance(v, list) else [v] for k, v in means.items()}
    return ", ".join(f"{k} {' '.join(f'{x:.4f}' for x in row)}" for k, row in rows.items())


def empty_memory(model: Trainee, clip: Tensor, attention: AttentionConfig) -> StreamState:
    """An empty memory for a batch like `clip` [B, C, F, h, w]; not of mode "dense"."""
    widths = model.dit.num_layers, model.dit.num_heads, model.dit.head_dim
    memory = _memory(*widths, (clip.shape[3] // 2, clip.shape[4] // 2), len(clip), attention, clip.device)
    memory.reset()
    return memory


@functools.lru_cache(maxsize=8)
def _memory(
    layers: int,
    heads: int,
    head_dim: int,
    grid: tuple[int, int],
    batch: int,
    attention: AttentionConfig,
    device,
) -> StreamState:
    """Made once for all steps of a kind: a new one would upload tables, and wait for the device."""
    return StreamState(
        layers=layers, heads=heads, head_dim=head_dim, grid=grid, chunk_frames=CHUNK, batch=batch,
        attention=attention, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )  # fmt: skip


def opening_step(model: Trainee, clip: Tensor, ids: Tensor, cfg: DitTraining) -> Tensor:
    """Gradients of opening chunks at all levels of noise (shift 5). Returns the mean flow loss, unweighted.

    With `guidance` the target moves on by that part of what the prompt changes in the model's own output, so that the
    trained model gives by itself what classifier-free guidance at 1 / (1 - guidance) gives with two passes.
    Where layouts are still free, at high noise, weight on sprites would draw them everywhere: so it fades.
    """
    sigma = shifted(torch.rand(len(clip), device=clip.device))
    s = sigma.view(-1, 1, 1, 1, 1)
    x0, weight = weighed(clip, cfg.sprites * (1 - s))
    noise = torch.randn_like(x0)
    noised, target = (1 - s) * x0 + s * noise, noise - x0
    with mixed_precision(x0.device):
        flow = model.opening(noised, sigma, model.dit.cross_kv(model.text(ids))).float()
        if cfg.guidance:
            with torch.no_grad():
                nothing = no_prompt(x0.device).expand_as(ids)
                without = model.opening(noised, sigma, model.dit.cross_kv(model.text(nothing)))
                told = (ids[:, 0] != UNKNOWN).view(-1, 1, 1, 1, 1)
                target = target + cfg.guidance * told * (flow - without.float())
    error = (flow - target).square()
    objective = (weight * error).mean()
    if cfg.words:
        with mixed_precision(x0.device):
            objective = objective + cfg.words * model.reader.loss(model.text, ids)
    objective.backward()
    return error.detach().mean()


def clip_step(
    model: Trainee, bank: LatentBank, cfg: DitTraining, long: bool, own: bool, device: str
) -> Tensor:
    """Gradients of chunks under their history. Returns the mean flow loss per sampler step [4] (nan: none drawn).

    A window's first chunk only serves as history: what comes out of nothing is trained by `opening_step`.
    """
    chunks, batch = (bank.chunks, cfg.long_batch) if long else (cfg.chunks, cfg.batch)
    clip, ids, first = bank.draw(batch, chunks, cfg.drop_prompt)
    x0, _ = weighed(clip, 0.0)
    sigma, step = draw_sigma(batch, chunks, device)
    with mixed_precision(device):
        cross_kv = model.dit.cross_kv(model.text(ids))
        if own:
            context, source = self_inputs(
                model, x0, step, first, [(k.detach(), v.detach()) for k, v in cross_kv]
            )
        else:
            context = source = x0
        level = cfg.context_noise * torch.rand(batch, 1, 1, 1, 1, device=device)
        context = context + level * torch.randn_like(context)
        s, noise = per_frame(sigma), torch.randn_like(x0)
        noised = (1 - s) * source + s * noise
        flow = model(context, noised, sigma, first, cross_kv)
    # Exactly the flow that leads from the input to the truth; equal to noise - x0 where the source is the truth.
    target = (noised - x0) / s
    error = (flow.float() - target).square().mean(dim=(1, 3, 4)).unflatten(1, (chunks, CHUNK)).mean(2)
    error[:, 1:].mean().backward()
    return mean_by_step(error.detach()[:, 1:], step[:, 1:])


def stream_step(
    model: Trainee, clip: Tensor, ids: Tensor, attention: AttentionConfig, cfg: DitTraining, given: int = 0
) -> Tensor:
    """Gradients of whole clips on a memory as at generation. Returns mean flow losses [5], unweighted, opening left
    out: one per sampler step, and that of the sprites alone over all steps.

    For about half of the clips a chunk's input is made from the model's estimate of the step before, and for most
    clips the memory is given the model's own chunks. The opening chunk and its memory stay the truth's: an estimate may
    show another layout. The first `given` chunks are the truth's and only written into the memory; what is learned
    comes after them.
    """
    batch, chunks, device = len(clip), clip.shape[2] // CHUNK, clip.device
    memory = empty_memory(model, clip, attention)
    with mixed_precision(device):
        cross_kv = model.dit.cross_kv(model.text(ids))
    leaves = prompt_leaves(cross_kv)
    truthful = torch.rand(batch, 1, device=device) < 0.3

    def flow(x: Tensor, sigma: Tensor) -> Tensor:
        with mixed_precision(device):
            t = 1000 * sigma.expand(batch, CHUNK)
            return model.dit(x, t, leaves, memory.attend, memory.t_start).float()

    def estimate(x0: Tensor, sigma: Tensor) -> Tensor:
        s = per_frame(sigma)
        noised = (1 - s) * x0 + s * torch.randn_like(x0)
        return noised - s * flow(noised, sigma)

    def write(context: Tensor) -> None:
        level = cfg.context_noise * torch.rand(batch, 1, 1, 1, 1, device=device)
        flow(context + level * torch.randn_like(context), torch.zeros(batch, 1, device=device))

    errors, steps, sprites = [], [], []
    for index, part in enumerate(clip.split(CHUNK, dim=2)):
        x0, weight = weighed(part, cfg.sprites)
        memory.begin_chunk(CHUNK)
        if index < given:
            with torch.no_grad():
                write(x0)
            memory.end_chunk()
            continue
        sigma, step = draw_sigma(batch, 1, device)
        source = x0
        if index == 0:
            sigma = shifted(torch.rand_like(sigma))
        else:
            before = levels((1.0, *SIGMAS), x0.device)[step.clamp(min=0)]
            truth = (step <= 0) | (torch.rand_like(sigma) < 0.5)
            with torch.no_grad():
                source = torch.where(per_frame(truth), x0, estimate(x0, before))
        s = per_frame(sigma)
        noised = (1 - s) * source + s * torch.randn_like(x0)
        out = flow(noised, sigma)
        error = (out - (noised - x0) / s).square()
        ((weight * error).mean() / (chunks - given)).backward()
        with torch.no_grad():
            own = noised - s * out
            context = x0 if index == 0 else torch.where(per_frame(truthful), x0, own)
            write(context)
        memory.end_chunk()
        if index > 0:
            errors.append(error.detach().mean(dim=(1, 2, 3, 4)))
            steps.append(step[:, 0])
            mask = part[:, 16:]
            sprites.append(torch.stack([(mask * error.detach()).sum() / x0.shape[1], mask.sum()]))
    backward_prompt(cross_kv, leaves)
    lost, cells = torch.stack(sprites).sum(0)
    return torch.cat([mean_by_step(torch.cat(errors), torch.cat(steps)), (lost / cells)[None]])


def update(model: Trainee, optims) -> None:
    """Apply the gradients, clipped."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optims:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save_trainee(weights: dict[str, Tensor], folder: Path) -> None:
    parts = {
        part: {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
        for part in ("dit", "text")
    }
    save_weights(folder / "world_dit.safetensors", parts["dit"], CAUSAL_AR)
    save_weights(folder / "world_text.safetensors", parts["text"])


def load_weights(model: Trainee, folder: Path) -> None:
    for part in ("dit", "text"):
        getattr(model, part).load_state_dict(load_file(folder / f"world_{part}.safetensors"))

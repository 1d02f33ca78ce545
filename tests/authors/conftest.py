"""The authors' own code beside ours: one random model of Wan 1.3B's full width and 2 layers, float32, on the CPU.

Nothing of theirs is kept here. A checkout of each repository is named by an environment variable; without it the tests
skip. How the comparison is made fair, for all repositories alike:
- Their modules are loaded as they are. Only what cannot run here is replaced: the text encoder, the VAE, the memory
  helpers that ask for a CUDA device at import, tqdm's bars, and diffusers, of which they use two base classes and a
  decorator.
- flash_attn needs CUDA and rounds to 16 bits; its wrapper is replaced by PyTorch's attention in float32.
- Their loop draws fresh noise from the global generator. It is given the draws that ours makes (`draw_noise`).
- They hard-code 30 blocks and 1560 tokens a frame; both are attributes, set to this model's 2 and 24.
"""

import importlib
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig
from sparse_forcing_pack.sparse_attn.rollout import draw_noise, prefill, stream
from sparse_forcing_pack.sparse_attn.state import StreamState
from sparse_forcing_pack.sparse_attn.wan import WanModel, frame_timesteps
from torch import nn

logger = logging.getLogger("sparse_forcing.authors")

WIDTHS = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 2}
GRID = (4, 6)  # tokens of a latent frame
TOKENS = GRID[0] * GRID[1]
LATENT = (1, 16, 2 * GRID[0], 2 * GRID[1])  # batch, channels, height, width
TEXT_ROWS = 64  # of 512: the number of rows is not in question, and their code embeds them in every pass
SEED = 11
TOLERANCE = 1e-5  # of latents whose values reach 5


class Placeholder(ModuleType):
    """A module that has every name; none of them is meant to be used."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return object


class Checkout:
    """Modules of one repository. They are imported apart: all of the family use the same top-level names."""

    NAMES = ("wan", "utils", "pipeline", "demo_utils", "diffusers", "tqdm")
    PACKAGES = ("wan", "wan.modules", "utils", "pipeline", "demo_utils")
    LEFT_OUT = (
        *("wan.modules.t5", "wan.modules.tokenizers", "wan.modules.vae", "wan.modules.causal_model_infinity"),
        *("demo_utils.memory", "utils.memory"),
    )

    def __init__(self, root: Path, *modules: str):
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if self._theirs(name)}
        compile_before = torch.compile
        try:
            self._prepare(root)
            torch.compile = lambda function, **_: (
                function
            )  # flex attention, of their training, is compiled at import
            self.modules = {name: importlib.import_module(name) for name in modules}
        finally:
            torch.compile = compile_before
            for name in [name for name in sys.modules if self._theirs(name)]:
                del sys.modules[name]
            sys.modules.update(before)
        for module in self.modules.values():
            for name in {"attention", "flash_attention"} & set(vars(module)):
                setattr(module, name, exact_attention)

    def _theirs(self, name: str) -> bool:
        return name.split(".")[0] in self.NAMES

    def _prepare(self, root: Path) -> None:
        for name in self.PACKAGES:  # without running what their __init__ files import
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")))]
        for name in self.LEFT_OUT:
            sys.modules[name] = Placeholder(name)
        for name in ("diffusers", "diffusers.models"):
            sys.modules[name] = Placeholder(name)
        base = Placeholder("diffusers.models.modeling_utils")
        base.ModelMixin = nn.Module
        config = Placeholder("diffusers.configuration_utils")
        config.ConfigMixin, config.register_to_config = object, lambda init: init
        bar = Placeholder("tqdm")
        bar.tqdm = lambda items, **_: items
        sys.modules.update({module.__name__: module for module in (base, config, bar)})

    def __getitem__(self, name: str) -> ModuleType:
        return self.modules[name]

    def generator(self, weights, rows: int = TEXT_ROWS):
        """Their wrapper around their CausalWanModel with our weights, which fit by name."""
        wrapper_class = self["utils.wan_wrapper"].WanDiffusionWrapper
        wrapper = wrapper_class.__new__(wrapper_class)  # its __init__ reads files
        nn.Module.__init__(wrapper)
        with torch.device("meta"):
            model = self["wan.modules.causal_model"].CausalWanModel(text_len=rows, **WIDTHS)
        with torch.device("cpu"):
            freqs = self["wan.modules.causal_model"].rope_params
            head = WIDTHS["dim"] // WIDTHS["num_heads"]
            model.freqs = torch.cat(
                [freqs(1024, n) for n in (head - 4 * (head // 6), *[2 * (head // 6)] * 2)], dim=1
            )
        model.load_state_dict(weights, assign=True)
        wrapper.model = model.eval().requires_grad_(False)
        wrapper.uniform_timestep, wrapper.seq_len = False, 32760
        wrapper.scheduler = self["utils.scheduler"].FlowMatchScheduler(
            shift=5.0, sigma_min=0.0, extra_one_step=True
        )
        wrapper.scheduler.set_timesteps(1000, training=True)
        wrapper.post_init()
        return wrapper

    def pipeline(
        self, weights, context, *, window=-1, sink=0, module="pipeline.causal_inference", **settings
    ):
        """Their inference pipeline for this model; settings as in their configuration files."""
        generator = self.generator(weights)
        generator.model.local_attn_size = window
        for part in generator.modules():
            if hasattr(part, "max_attention_size"):
                part.local_attn_size, part.sink_size = window, sink
                part.max_attention_size = 32760 if window == -1 else window * TOKENS
        defaults = {
            "denoising_step_list": [1000, 750, 500, 250],
            "warp_denoising_step": True,
            "num_frame_per_block": 3,
            "independent_first_frame": False,
            "context_noise": 0,
            "model_kwargs": SimpleNamespace(local_attn_size=window, sink_size=sink),
        }
        theirs = next(
            v
            for k, v in vars(self[module]).items()
            if k.endswith("InferencePipeline") and v.__module__ == module
        )
        made = theirs(
            SimpleNamespace(**defaults | settings),
            "cpu",
            generator=generator,
            text_encoder=lambda text_prompts: {"prompt_embeds": context[text_prompts[0]]},
            vae=SimpleNamespace(decode_to_pixel=lambda latents, use_cache: torch.zeros(1)),
        )
        made.num_transformer_blocks, made.frame_seq_length = WIDTHS["num_layers"], TOKENS
        return made


def exact_attention(q, k, v, k_lens=None, **_):
    """Attention over [B, N, H, D] in the inputs' own float32, in place of flash_attn."""
    assert k_lens is None
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.fixture(scope="session")
def weights():
    """Random weights, the same for all; the head and the modulation are not zero, norms are not one."""
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in WanModel(**WIDTHS).state_dict().items()}

    def draw(key, shape):
        x = torch.randn(shape, generator=generator)
        if ".norm" in key and key.endswith("weight"):
            return 1 + 0.1 * x
        return x / shape[1:].numel() ** 0.5 if len(shape) in (2, 5) else 0.1 * x

    return {key: draw(key, shape) for key, shape in shapes.items()}


@pytest.fixture(scope="session")
def context():
    """Text rows of two prompts, [1, TEXT_ROWS, 4096]."""
    return {
        name: draw_noise((1, TEXT_ROWS, 4096), SEED, 0, step) for step, name in enumerate(("first", "second"))
    }


@pytest.fixture(scope="session")
def noise():
    """First noise of 15 latent frames, [B, C, F, H, W]."""
    batch, channels, height, width = LATENT
    return draw_noise((batch, channels, 15, height, width), SEED, 1, 0)


class Ours:
    """One stream of this project's backbone and rollout."""

    def __init__(
        self, weights, context, attention: AttentionConfig, sampler: SamplerConfig, total_frames: int
    ):
        with torch.device("meta"):
            self.model = WanModel(**WIDTHS)
        self.model.load_state_dict(weights, assign=True)
        self.model.eval().requires_grad_(False)
        self.context, self.sampler = context, sampler
        self.memory = StreamState(
            layers=WIDTHS["num_layers"],
            heads=WIDTHS["num_heads"],
            head_dim=128,
            grid=GRID,
            chunk_frames=sampler.chunk_frames,
            attention=attention,
            total_frames=total_frames,
        )
        self.prompt("first")

    def prompt(self, name):
        self.cross_kv = self.model.cross_kv(self.context[name])

    @torch.no_grad()
    def denoise(self, x, sigma):
        timesteps = frame_timesteps(sigma, x.shape[0], x.shape[2], x.device)
        flow = self.model(x, timesteps, self.cross_kv, self.memory.attend, self.memory.t_start)
        return x.float() - sigma * flow.float()

    def prefill(self, latent):
        prefill(self.denoise, self.memory, latent, self.sampler.chunk_frames)

    def run(self, noise, seed=SEED, start_chunk=0):
        """Latents [B, C, F, H, W] of the chunks from start_chunk on."""
        chunks = stream(
            self.denoise, self.memory, self.sampler, noise=noise, seed=seed, start_chunk=start_chunk
        )
        return torch.cat([chunk.latent for chunk in chunks], dim=2)


@pytest.fixture
def ours(weights, context):
    def make(attention, sampler=None, total_frames=15):
        return Ours(weights, context, attention, sampler or SamplerConfig(), total_frames)

    return make


def theirs_first(x):
    """[B, C, F, H, W] <-> [B, F, C, H, W], the research repositories' order."""
    return x.transpose(1, 2)


@pytest.fixture
def same_noise(monkeypatch):
    """Let their torch.randn_like give what ours draws: chunk after chunk, step after step."""

    def use(draws):
        """draws: (seed, chunk, frames, renoising steps) of every chunk in order."""
        queue = [(seed, chunk, frames, step) for seed, chunk, frames, steps in draws for step in range(steps)]

        def randn_like(x, **_):
            seed, chunk, frames, step = queue.pop(0)
            batch, channels, height, width = LATENT
            drawn = theirs_first(draw_noise((batch, channels, frames, height, width), seed, chunk, step))
            assert drawn.flatten(0, 1).shape == x.shape
            return drawn.flatten(0, 1)

        monkeypatch.setattr(torch, "randn_like", randn_like)
        return queue

    return use


@pytest.fixture
def run_theirs(same_noise):
    def run(pipeline, noise, draws, **options):
        """Their latents, as [B, C, F, H, W], given frames included."""
        queue = same_noise(draws)
        with torch.no_grad():
            _, latents = pipeline.inference(theirs_first(noise), return_latents=True, **options)
        assert not queue, "their loop drew less noise than ours"
        return theirs_first(latents)

    return run


@pytest.fixture
def agree():
    """Compare latents; --log-cli-level=INFO shows the largest difference of every test."""

    def compare(mine, other):
        assert mine.shape == other.shape
        difference = (mine - other).abs().max().item()
        logger.info("largest difference %.2e, largest value %.2f", difference, other.abs().max().item())
        assert torch.isfinite(other).all() and other.std() > 0.1
        assert difference < TOLERANCE

    return compare


def checkout(variable: str, *modules: str) -> Checkout:
    """The repository at the path in an environment variable; skips the test without it."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} does not name a checkout of the authors' repository")
    if not (Path(path) / "wan").is_dir():
        pytest.skip(f"{variable}={path} is no checkout of the authors' repository: it has no folder wan")
    common = ("utils.scheduler", "wan.modules.model", "wan.modules.causal_model", "utils.wan_wrapper")
    return Checkout(Path(path).resolve(), *common, *modules)


@pytest.fixture(scope="session")
def self_forcing():
    return checkout("SELF_FORCING_PATH", "pipeline.causal_inference")


@pytest.fixture(scope="session")
def longlive():
    return checkout("LONGLIVE_PATH", "pipeline.causal_inference", "pipeline.interactive_causal_inference")


@pytest.fixture(scope="session")
def causal_forcing():
    return checkout("CAUSAL_FORCING_PATH", "pipeline.causal_inference")


@pytest.fixture(scope="session")
def reward_forcing():
    return checkout("REWARD_FORCING_PATH", "pipeline.causal_inference")

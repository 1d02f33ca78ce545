"""What the authors of each model family sample with, and which of them a file belongs to.

Weights do not say how they were trained: a file's family is told from its name and the folders above it, and a name
that says nothing gets Self-Forcing's settings, which most of these models share. Everything here is a proposal that
its user sees and may change. Every number names the file of the authors' repository that it was read in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from .config import AttentionConfig, Positions, SamplerConfig, shifted_sigmas

FAMILY = "sparse_forcing_preset"  # key of a safetensors header, written by the converter


@dataclass(frozen=True)
class Preset:
    """The settings of one family; frames are latent frames.

    sigmas: the schedule, a trailing 0 implied; first_sigmas: of the first chunk, where it differs. shift: the warp that
    the schedule and the model share. window_frames None: every frame is attended (the authors allow 21). positions
    "rebased": temporal places are those in the cache. sink_ema: how far the sink moves towards what leaves. ema: which
    weights of a training file. note: where our rollout is not theirs exactly, and what else to know.
    """

    name: str
    source: str
    sigmas: tuple[float, ...]
    chunk_frames: int = 3
    first_sigmas: tuple[float, ...] | None = None
    shift: float = 5.0
    window_frames: int | None = None
    sink_frames: int = 0
    positions: Positions = "absolute"
    sink_ema: float = 0.0
    ema: bool = True
    note: str = ""

    @property
    def sampler(self) -> SamplerConfig:
        """The schedule and the chunk."""
        return SamplerConfig(self.sigmas, self.chunk_frames, first_sigmas=self.first_sigmas)

    @property
    def attention(self) -> AttentionConfig:
        """What the authors attend to."""
        if self.window_frames is None:
            return AttentionConfig(mode="dense")
        return AttentionConfig(
            mode="window",
            window_frames=self.window_frames,
            sink_frames=self.sink_frames,
            positions=self.positions,
            sink_ema=self.sink_ema,
        )

    @property
    def sparse(self) -> AttentionConfig:
        """Sparse Forcing on top: the paper's budgets (6 frames of memory, 6 of window, a quarter of it read), in whole
        chunks, with the authors' sink, or the first chunk where they keep none."""
        chunk = self.chunk_frames
        sink = -(-max(self.sink_frames, 1) // chunk) * chunk
        return AttentionConfig(
            mode="sparse",
            window_frames=-(-6 // chunk) * chunk,
            sink_frames=sink,
            persistent_frames=max(-(-6 // chunk) * chunk, sink),
            positions=self.positions,
        )

    def describe(self) -> str:
        """One line for people."""
        steps = ", ".join(f"{1000 * sigma:g}" for sigma in self.sigmas)
        first = f" ({len(self.first_sigmas)} steps for the first chunk)" if self.first_sigmas else ""
        window = "all frames" if self.window_frames is None else f"{self.window_frames} frames"
        moving = f" (sink_ema {self.sink_ema:g})" if self.sink_ema else ""
        return (
            f"{self.name}: steps {steps}{first}, shift {self.shift:g}, chunks of {self.chunk_frames}, "
            f"window {window}, sink {self.sink_frames}{moving}"
        )


SELF_FORCING = Preset(
    name="Self-Forcing",
    source="guandeh17/Self-Forcing: configs/self_forcing_dmd.yaml, README.md (--use_ema)",
    sigmas=shifted_sigmas(4),
    note="Its authors' demo page differs (shift 8, fp16); this is their command line.",
)
CAUSAL_FORCING = Preset(
    name="Causal-Forcing, chunk-wise",
    source="thu-ml/Causal-Forcing: configs/causal_forcing_dmd_chunkwise.yaml, README.md (without --use_ema)",
    sigmas=shifted_sigmas(4),
    ema=False,
)
CAUSAL_FORCING_FRAMES = Preset(
    name="Causal-Forcing, frame-wise",
    source="thu-ml/Causal-Forcing: configs/causal_forcing_dmd_framewise.yaml, README.md (--use_ema)",
    sigmas=shifted_sigmas(4),
    chunk_frames=1,
    note="To start from an image, the image is the first frame.",
)
CAUSAL_FORCING_2 = Preset(
    name="Causal-Forcing++, frame-wise in 2 steps",
    source="thu-ml/Causal-Forcing: configs/causal_forcing_dmd_framewise_2step.yaml, README.md (--use_ema)",
    sigmas=shifted_sigmas(2),
    first_sigmas=shifted_sigmas(4),
    chunk_frames=1,
)
CAUSAL_FORCING_1 = Preset(
    name="Causal-Forcing++, frame-wise in 1 step",
    source="thu-ml/Causal-Forcing: configs/causal_forcing_dmd_framewise_1step.yaml, README.md (--use_ema)",
    sigmas=shifted_sigmas(1),
    first_sigmas=shifted_sigmas(4),
    chunk_frames=1,
)
LONGLIVE = Preset(
    name="LongLive",
    source="NVlabs/LongLive, branch v1.0: configs/longlive_inference.yaml (use_ema: false)",
    sigmas=shifted_sigmas(4),
    window_frames=12,
    sink_frames=3,
    ema=False,
    note="longlive_base.pt wants lora.pt (rank and alpha 256) merged in. At a new prompt its authors compute the "
    "window's frames again.",
)
REWARD_FORCING = Preset(
    name="Reward Forcing",
    source="JaydenLyh/Reward-Forcing: configs/reward_forcing.yaml, wan/modules/causal_model.py",
    sigmas=shifted_sigmas(4),
    window_frames=9,
    sink_frames=3,
    positions="rebased",
    sink_ema=0.001,
    note="Its sink moves by a thousandth towards every chunk that leaves the window: sink_ema, in mode window.",
)
KREA = Preset(
    name="Krea Realtime 14B",
    source="krea-ai/realtime-video: configs/self_forcing_server_14b.yaml, release_server.py",
    sigmas=(1.0, 0.937, 0.833, 0.625),
    window_frames=6,
    positions="rebased",
    note="Its cache of 3 frames is computed anew before every chunk, the first of them from its decoded picture; here "
    "the cache is kept as it was.",
)
ROLLING_SIGMAS = shifted_sigmas(5)  # TencentARC/RollingForcing: configs/rolling_forcing_dmd.yaml
# Families whose rollout cannot be had here, and why.
UNFIT = {
    "Rolling Forcing": (
        "It denoises five chunks at once, each at its own noise level (1000, 952.4, 882.4, 769.2, 555.6). This rollout "
        "has one chunk and one level at a time: the model would run, on inputs that it never met in training. "
        "Causal-Forcing's longvideo.pt works the same way."
    ),
}

# What a path says: the first word in the file's own name (else in a folder's), the others in either. First fit counts.
_FAMILIES: tuple[tuple[tuple[str, ...], Preset | str], ...] = (
    (("rolling",), "Rolling Forcing"),
    (("longvideo",), "Rolling Forcing"),
    (("longlive",), LONGLIVE),
    (("reward",), REWARD_FORCING),
    (("krea",), KREA),
    (("framewise", "1step"), CAUSAL_FORCING_1),
    (("framewise", "2step"), CAUSAL_FORCING_2),
    (("framewise",), CAUSAL_FORCING_FRAMES),
    (("causalforcing", "framewise"), CAUSAL_FORCING_FRAMES),
    (("causalforcing",), CAUSAL_FORCING),
    (("selfforcing",), SELF_FORCING),
)
PRESETS = (
    *(SELF_FORCING, CAUSAL_FORCING, CAUSAL_FORCING_FRAMES, CAUSAL_FORCING_2, CAUSAL_FORCING_1),
    *(LONGLIVE, REWARD_FORCING, KREA),
)


@dataclass(frozen=True)
class Proposal:
    """A preset for a file, and on what ground. warning: why the result may not be the authors'; empty if it is."""

    preset: Preset
    reason: str
    warning: str = ""


def propose(path: str | PurePath, metadata: dict[str, str] | None = None) -> Proposal:
    """The settings that the authors of a recognised file use.

    path: of the file, as the host names it; its own name counts first, then the two folders above it. metadata: of its
    safetensors header, where the converter writes the preset's name (FAMILY). Never raises: a file that says nothing
    gets Self-Forcing's settings, and the reason says so.
    """
    told = (metadata or {}).get(FAMILY)
    if known := next((preset for preset in PRESETS if preset.name == told), None):
        return Proposal(known, "its header says so")
    parts = PurePath(str(path).replace("\\", "/")).parts[-3:]
    own, whole = (_plain(text) for text in ("".join(parts[-1:]), "".join(parts)))
    for text in (own, whole):
        for (word, *others), found in _FAMILIES:
            if word not in text or any(other not in whole for other in others):
                continue
            reason = f"from its name, {'/'.join(parts)}"
            if isinstance(found, Preset):
                return Proposal(found, reason)
            return Proposal(SELF_FORCING, f"{reason}: {found}", UNFIT[found])
    return Proposal(
        SELF_FORCING,
        "its name says nothing, and Self-Forcing's settings are what most of these models share",
        "A model that makes one frame at a time needs chunks of 1: if the video flickers, try the frame-wise settings.",
    )


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())

"""The Wan 2.1 VAE's decoder as a stream on a GPU: channels last, and one pass over memory between two convolutions.

Takes the weights by their names, as `vae.WanVAE` and ComfyUI's module have them, and gives the frames that their own
decoders give, for latents that arrive in pieces of any size. All activations are [T, H, W, C]. Each causal convolution
reads a window [T + 2, H, W, C] that the kernel before it has written, the two past frames included, so nothing is
padded, concatenated or copied. Nearest upsampling and the 3x3 convolution after it are one 2x2 convolution with the
sums of the weights that fall on one pixel.

Every tensor that a kernel of ours reads or writes is a buffer of the decoder, made before a graph is captured. From the
third latent frame of a stream on, each frame is one replay of a CUDA graph.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.fused import norm_to_window
from ..kernels.workspace import Workspace
from .graphs import new_pool, record
from .vae import Decoder

logger = logging.getLogger("sparse_forcing")

WAITING = "waiting"  # in a snapshot: a latent frame that was pushed and not decoded
HEAD_CHANNELS = 8  # of the last convolution: 3, and zeros, because tensor cores take multiples of 8
DECODER = ("conv2", "decoder")  # of a VAE's network, the parts that decode
DECODERS = ("Decoder", "Decoder3d")  # ours and ComfyUI's
FRAMES = 4  # video frames of a latent frame


def why_not(vae: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this VAE's decoder cannot be taken over to compute in `dtype` on `device`, or None."""
    name = type(getattr(vae, "decoder", None)).__name__
    if name not in DECODERS:
        return f"its decoder is a {name}, not Wan 2.1's"
    weights = decoder_weights(vae)
    for key, weight in weights.items():
        if type(weight) is not Tensor or not weight.is_floating_point() or weight.element_size() < 2:
            return f"it has quantised weights ({key})"
    if any(getattr(module, "weight_function", None) for module in vae.modules()):
        return "its weights are patched when they are used"
    if reason := _unlike_wan(weights):
        return reason
    width = weights["decoder.head.0.gamma"].shape[0]
    if device.type == "cuda" and dtype.itemsize == 2 and width % 8:
        return f"its base width is {width}, and 16-bit convolutions want a multiple of 8"
    return None


def decoder_weights(vae: nn.Module) -> dict[str, Tensor]:
    """What decoding reads, by name; not copied."""
    return {
        name: parameter.data for name, parameter in vae.named_parameters() if name.split(".")[0] in DECODER
    }


def bytes_needed(weights: dict[str, Tensor], height: int, width: int, dtype: torch.dtype) -> int:
    """About what a FastDecoder of these weights keeps on the device for latents [h, w]."""
    decoder = FastDecoder({name: weight.to("meta") for name, weight in weights.items()}, "meta", dtype)
    decoder._open(height, width)
    return decoder.nbytes


def _unlike_wan(weights: dict[str, Tensor]) -> str | None:
    """How names and shapes differ from those of a Wan 2.1 decoder of the same width, or None."""
    missing = {"decoder.head.0.gamma", "conv2.weight"} - weights.keys()
    if missing:
        return f"it has no {min(missing)}"
    width, z_dim = weights["decoder.head.0.gamma"].shape[0], weights["conv2.weight"].shape[0]
    with torch.device("meta"):
        wanted = {f"decoder.{name}": w.shape for name, w in Decoder(width, z_dim, nn).named_parameters()}
    wanted |= {"conv2.weight": torch.Size((z_dim, z_dim, 1, 1, 1)), "conv2.bias": torch.Size((z_dim,))}
    if odd := sorted(wanted.keys() ^ weights.keys()):
        return f"{odd[0]} is {'missing' if odd[0] in wanted else 'not part of a Wan 2.1 decoder'}"
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            return f"{name} has shape {list(weights[name].shape)}, Wan 2.1's of this width {list(shape)}"
    return None


@dataclass
class _Conv:
    """A convolution's weights, channels last, and its bias; `place` is its number among those with a past."""

    weight: Tensor
    bias: Tensor
    place: int | None = None


@dataclass
class _Value:
    """An activation that the next kernel computes while it reads: y + bias + residual, see `norm_to_window`."""

    y: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    shuffled: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[T, H, W, C] of the sum."""
        frames, height, width, channels = self.y.shape
        if self.shuffled:
            return frames, 2 * (height - 1), 2 * (width - 1), channels // 4
        return frames, height, width, channels


class FastDecoder:
    """Push raw latents, get the video frames that they complete; batch 1, no gradients.

    weights: `decoder_weights` of a VAE that `why_not` lets pass; copied where device, dtype or layout differ.
    Latent frames are decoded one by one, which takes less memory and, on an H200, less time than three at once. Use it
    on one CUDA stream: its buffers belong to the stream of the first push.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        graphs: bool = True,
        backend: str = "auto",
    ):
        if reason := _unlike_wan(weights):
            raise ValueError(f"These weights are not those of a Wan 2.1 decoder: {reason}.")
        self.device, self.dtype = torch.device(device), dtype
        self.graphs = graphs and self.device.type == "cuda"
        self.backend = backend
        self.convolve = convolve
        self._work = Workspace()
        self._gammas: dict[str, Tensor] = {}
        self._convs: dict[str, _Conv] = {}
        self._take(weights)
        self._layers = sorted(
            {re.sub(r"(upsamples\.\d+).*", r"\1", name) for name in self._convs if ".upsamples." in name},
            key=lambda name: int(name.rsplit(".", 1)[1]),
        )
        self._past: list[Tensor] = []
        self._replay: Callable[[], None] | None = None
        self._warm = False  # kernels and libraries have run a later frame
        self._seen = 0  # latent frames of this stream, counted to 2
        self._waiting: Tensor | None = None

    # --- the stream ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def push(self, latent: Tensor) -> Tensor:
        """Raw latents [1, 16, F, h, w] -> frames [1, 3, n, 8h, 8w] in the decoder's dtype, about [-1, 1]."""
        latent = latent.to(self.device, self.dtype)
        if self._waiting is not None:
            latent, self._waiting = torch.cat([self._waiting, latent], dim=2), None
        count, height, width = latent.shape[2:]
        self._open(height, width)
        total = FRAMES * count - (FRAMES - 1 if count and not self._seen else 0)
        video = latent.new_empty(total, 8 * height, 8 * width, 3)
        done = 0
        for at in range(count):
            frames = self._next(latent[0, :, at])
            video[done : done + len(frames)] = frames
            done += len(frames)
        return video.permute(3, 0, 1, 2)[None]

    def reset(self) -> None:
        """Start a new stream."""
        for past in self._past:
            past.zero_()
        self._seen, self._waiting = 0, None

    def snapshot(self) -> dict[str, Tensor]:
        """What is remembered between two pushes on the CPU, by the places that ComfyUI's cache gives them: the last
        two inputs [1, C, 2, h, w] of each convolution, a bool where a temporal upsampler has seen one frame alone."""
        saved = {}
        for place, past in enumerate(self._past if self._seen else []):
            marked = self._seen == 1 and place in self._time_places
            saved[str(place)] = (
                torch.ones(1) > 0 if marked else past.permute(3, 0, 1, 2)[None].to("cpu", copy=True)
            )
        if self._waiting is not None:
            saved[WAITING] = self._waiting.to("cpu", copy=True)
        return saved

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Resume where `snapshot`, of this class or of a decoder that keeps ComfyUI's cache, was taken."""
        if not saved:
            return self.reset()
        first = saved["0"]
        self._open(*first.shape[3:])
        self.reset()
        marks = [saved[str(place)].dtype == torch.bool for place in self._time_places]
        self._seen = 1 if any(marks) else 2
        for place, past in enumerate(self._past):
            value = saved[str(place)]
            if value.dtype != torch.bool:  # the first frame alone has no frame before it
                past[2 - value.shape[2] :] = value[0].permute(1, 2, 3, 0).to(past)
        waiting = saved.get(WAITING)
        self._waiting = None if waiting is None else waiting.to(self.device, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: weights, pasts and scratch."""
        own = [
            *self._gammas.values(),
            *self._past,
            *(t for c in self._convs.values() for t in (c.weight, c.bias)),
        ]
        return sum(t.numel() * t.element_size() for t in own) + self._work.nbytes

    # --- one piece ----------------------------------------------------------------------------------------------

    def _next(self, latent: Tensor) -> Tensor:
        """The frames [1 or 4, 8h, 8w, 3], in a buffer, of a stream's next latent frame [16, h, w]."""
        self._latent.copy_(latent.permute(1, 2, 0)[None])
        if self._seen and self._warm and self.graphs and self._replay is None:
            self._capture()
        if self._seen and self._replay is not None:
            self._replay()
        else:
            self._decode()
            self._warm |= self._seen > 0
        self._seen = min(2, self._seen + 1)
        return self._video if self._seen == 2 else self._video[:1]

    def _capture(self) -> None:
        try:
            self._replay, _ = record(self._decode, new_pool())
        except Exception as error:  # whatever cannot be captured can still be run
            self.graphs = False
            logger.warning("The VAE decodes without CUDA graphs: %s: %s", type(error).__name__, error)

    def _decode(self) -> None:
        """Decode the latent frame in its buffer into the video's buffer; the same kernels for all but a first one."""
        value = self._stem(self._latent)
        value = self._block("decoder.middle.0", value)
        value = self._attention("decoder.middle.1", value)
        value = self._block("decoder.middle.2", value)
        for name in self._layers:
            layer = self._block if f"{name}.residual.2" in self._convs else self._upsample
            value = layer(name, value)
        head = self._convs["decoder.head.2"]
        window = self._enter(value, head, "decoder.head.0")
        frames = self._empty("head", (*value.shape[:3], HEAD_CHANNELS))
        self.convolve(window, head.weight, frames)
        torch.add(frames[..., :3], head.bias[:3], out=self._video[: len(frames)])

    def _stem(self, latent: Tensor) -> _Value:
        conv2 = self._convs["conv2"]
        y = self._empty("y", latent.shape)
        torch.mm(latent.reshape(-1, latent.shape[3]), conv2.weight.flatten(1).t(), out=y.flatten(0, 2))
        conv1 = self._convs["decoder.conv1"]
        return self._apply(conv1, self._enter(_Value(y, conv2.bias), conv1))

    def _block(self, name: str, x: _Value) -> _Value:
        """Residual block. The sum that enters it is stored over its residual, or in buffer x."""
        conv1, conv2 = self._convs[f"{name}.residual.2"], self._convs[f"{name}.residual.6"]
        total = self._empty("x", x.shape) if x.residual is None else x.residual
        window = self._enter(x, conv1, f"{name}.residual.0", total)
        window = self._enter(self._apply(conv1, window), conv2, f"{name}.residual.3")
        shortcut = self._convs.get(f"{name}.shortcut")
        if shortcut is not None:
            narrow, total = total, self._empty("shortcut", (*x.shape[:3], shortcut.weight.shape[0]))
            rows = narrow.flatten(0, 2)
            torch.addmm(shortcut.bias, rows, shortcut.weight.flatten(1).t(), out=total.flatten(0, 2))
        return replace(self._apply(conv2, window), residual=total)

    def _attention(self, name: str, x: _Value) -> _Value:
        """Single-head attention inside each frame."""
        qkv, proj = self._convs[f"{name}.to_qkv"], self._convs[f"{name}.proj"]
        frames, height, width, channels = x.shape
        assert x.residual is not None
        window = self._empty("window", x.shape)
        self._norm(x, window, gamma=self._gammas[f"{name}.norm"], total=x.residual)
        parts = self._empty("qkv", (frames, height * width, 3, channels))
        rows = window.view(-1, channels)
        torch.addmm(qkv.bias, rows, qkv.weight.flatten(1).t(), out=parts.view(-1, 3 * channels))
        q, k, v = (part[:, None] for part in parts.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v).reshape(-1, channels)
        y = self._empty("y", x.shape)
        torch.mm(out, proj.weight.flatten(1).t(), out=y.view(-1, channels))
        return _Value(y, proj.bias, x.residual)

    def _upsample(self, name: str, x: _Value) -> _Value:
        """Twice the height and width; twice the frames, too, where it has a time_conv, but for a stream's first."""
        time, space = self._convs.get(f"{name}.time_conv"), self._convs[f"{name}.resample.1"]
        if time is not None and self._seen:
            frames = self._double_time(x, time)
        else:
            assert x.residual is not None
            frames = x.residual  # the sum takes its place
            self._norm(x, frames)
        count, height, width, _ = frames.shape
        y = self._empty("y", (count, height + 1, width + 1, space.weight.shape[0]))
        self.convolve(frames, space.weight, y)
        return _Value(y, space.bias, shuffled=True)

    def _double_time(self, x: _Value, conv: _Conv) -> Tensor:
        """The convolution gives two frames per frame side by side, which become neighbours in time."""
        frames, height, width, channels = x.shape
        y = self._apply(conv, self._enter(x, conv)).y.view(frames, height * width, 2, channels)
        doubled = self._empty("frames", (2 * frames, height, width, channels))
        out = doubled.view(frames, 2, height * width, channels)
        torch.add(y.transpose(1, 2), conv.bias.view(2, 1, channels), out=out)
        return doubled

    def _enter(self, x: _Value, conv: _Conv, gamma: str | None = None, total: Tensor | None = None) -> Tensor:
        """The window that a causal convolution reads, of `x` after norm and SiLU (with gamma), and of its past."""
        assert conv.place is not None
        frames, height, width, channels = x.shape
        window = self._empty("window", (frames + 2, height, width, channels))
        gain = None if gamma is None else self._gammas[gamma]
        self._norm(x, window, gamma=gain, total=total, past=self._past[conv.place], silu=gain is not None)
        return window

    def _norm(self, x: _Value, window: Tensor, **options: Any) -> None:
        options |= {"bias": x.bias, "residual": x.residual, "shuffled": x.shuffled, "backend": self.backend}
        norm_to_window(x.y, window, **options)

    def _apply(self, conv: _Conv, window: Tensor) -> _Value:
        """The convolution of a window that has its past, or of single frames, without its bias."""
        past = conv.weight.shape[2] - 1 if conv.weight.dim() == 5 else 0
        shape = (window.shape[0] - past, *window.shape[1:3], conv.weight.shape[0])
        y = self._empty("y", shape)
        self.convolve(window, conv.weight, y)
        return _Value(y, conv.bias)

    # --- weights and buffers ------------------------------------------------------------------------------------

    def _take(self, weights: dict[str, Tensor]) -> None:
        """Weights in the layout of the convolutions, in the order of ComfyUI's cache."""
        place = 0
        self._time_places: list[int] = []
        self._scales: list[
            tuple[int, int]
        ] = []  # of each past: height and width over the latent's, and channels
        scale = 1
        for name in _in_order(weights):
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            causal = weight.dim() == 5 and weight.shape[2] > 1
            if causal:
                self._scales.append((scale, weight.shape[1]))
                if name.endswith("time_conv"):
                    self._time_places.append(place)
            if name == "decoder.head.2":
                extra = HEAD_CHANNELS - weight.shape[0]
                weight, bias = F.pad(weight, (0, 0) * 4 + (0, extra)), F.pad(bias, (0, extra))
            if name.endswith("resample.1"):
                scale *= 2
                weight = merged_upsampling(weight)
            bias = bias.to(self.device, self.dtype)
            self._convs[name] = _Conv(self._in_layout(weight), bias, place if causal else None)
            place += causal
        for name, gamma in weights.items():
            if name.endswith(".gamma"):
                self._gammas[name.removesuffix(".gamma")] = gamma.to(self.device, self.dtype).flatten()

    def _in_layout(self, weight: Tensor) -> Tensor:
        layout = torch.channels_last_3d if weight.dim() == 5 else torch.channels_last
        return weight.to(self.device, self.dtype).contiguous(memory_format=layout)

    def _open(self, height: int, width: int) -> None:
        """Zeros for every past, and scratch, at the first push and for another size."""
        shapes = [(2, height * scale, width * scale, channels) for scale, channels in self._scales]
        if self._past and tuple(self._past[0].shape) == shapes[0]:
            return
        if self._seen:
            have = list(self._past[0].shape[1:3])
            raise ValueError(
                f"This stream has latents of {have}, these are {[height, width]}; call reset() first."
            )
        self._past = [torch.zeros(shape, device=self.device, dtype=self.dtype) for shape in shapes]
        self._work, self._replay, self._warm = Workspace(), None, False
        self._latent = self._empty("latent", (1, height, width, shapes[0][3]))
        self._video = self._empty("video", (FRAMES, 8 * height, 8 * width, 3))
        # The largest of each name first, or smaller ones would be kept beside it.
        channels = shapes[-1][3]
        self._empty("window", (FRAMES + 2, 8 * height, 8 * width, channels))
        self._empty("y", (FRAMES, 4 * height + 1, 4 * width + 1, 4 * channels))
        self._empty("x", (FRAMES, 8 * height, 8 * width, channels))

    def _empty(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._work.empty(name, tuple(shape), self.dtype, self.device)


def _in_order(weights: dict[str, Tensor]) -> list[str]:
    """Convolutions as a decoder comes to them, time_conv before the convolution after upsampling."""

    def rank(name: str) -> tuple:
        stage = ["conv2", "decoder.conv1", "decoder.middle", "decoder.upsamples", "decoder.head"]
        at = next(i for i, prefix in enumerate(stage) if name.startswith(prefix))
        layer = int(name.split(".")[2]) if at in (2, 3) else 0
        return at, layer, "resample" in name, name

    return sorted((name.removesuffix(".weight") for name in weights if name.endswith(".weight")), key=rank)


def merged_upsampling(weight: Tensor) -> Tensor:
    """Weights [O, I, 3, 3] behind nearest upsampling -> [4O, I, 2, 2] before it, a bank of O per output position.

    An output row of even number reads the rows before and at its own, (k0, k1 + k2); one of odd number those at and
    after its own, (k0 + k1, k2). Columns alike.
    """
    taps = torch.tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64, device=weight.device
    )
    merged = torch.einsum("aik,bjl,ockl->abocij", taps, taps, weight.double())
    return merged.flatten(0, 2).to(weight.dtype)


def convolve(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write the convolution of x [T, H, W, I] into out [T', H', W', O], all contiguous, without a bias.

    weight [O, I, 3, kh, kw], over time too and unpadded there, or [O, I, kh, kw]; channels last. Padded by kh // 2.
    """
    side = weight.shape[-1] // 2
    if weight.dim() == 5:
        source, target, padding = _channels_first(x[None]), _channels_first(out[None]), [0, side, side]
    else:
        source, target, padding = _channels_first(x), _channels_first(out), [side, side]
    if x.is_cuda and torch.version.cuda:
        ones, allow_tf32 = [1] * len(padding), torch.backends.cudnn.allow_tf32
        # The operator under conv3d, because it takes an output.
        torch.ops.aten.cudnn_convolution.out(
            source, weight, padding, ones, ones, 1, False, False, allow_tf32, out=target
        )
    else:
        run = F.conv3d if weight.dim() == 5 else F.conv2d
        target.copy_(run(source, weight, padding=padding))


def _channels_first(x: Tensor) -> Tensor:
    """View [N, ..., C] as [N, C, ...]."""
    return x.movedim(-1, 1)

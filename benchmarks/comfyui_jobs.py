"""The jobs of comfyui.py and what their records sum up to."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from comfyui_ballast import Ballast
from comfyui_client import Client, Run, ServerGone, connect
from comfyui_graphs import CHUNK_FRAMES, FPS, SAMPLE, Graphs
from comfyui_results import estimated_gb, merged, of_stream, plot, summary_of, where_it_ran
from comfyui_workflows import LOADERS, run_workflows

Record = dict[str, Any]
CORE = "core"
MODES: dict[str, dict[str, Any] | None] = {
    CORE: None,
    "dense": {"mode": "dense"},
    "sparse": {},
    "slow": {"fast_pass": False},
}
SHORTCUTS = {"shortcuts": "shared + fp8"}
SMALL_CARD = {"offload_pages": True, "page_bits": "8"}
WARM_S, LONG_S = 5.0, 20.0  # seconds of video
SHORT_FRAMES, LONG_FRAMES = 21, 63  # latent frames of a sampler's runs
FREE_GB, FREE_GB_14B = (24, 16, 12, 8), (24, 16)


async def measure(args: argparse.Namespace, command: str, host: str) -> int:
    """Run the jobs that are asked for, write the results, and return the exit code."""
    records: list[Record] = []
    died: str | None = None
    facts: dict[str, Any] = {}
    try:
        async with connect(args.url) as client:
            facts = where_it_ran(await client.get("/system_stats"), args.machine or "")
            print(json.dumps(facts, indent=1), flush=True)
            await Jobs(client, args, records).run()
    except ServerGone as gone:
        died = str(gone)
        print(f"The server is gone: {died}", flush=True)
    if not facts:
        return 1
    facts |= {"command": command, "date": time.strftime("%Y-%m-%d %H:%M"), "died": died}
    out = args.out or args.merge or Path("build/comfyui.json")
    found = merged(args.merge, facts, records, summary_of(records))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary_of(records), indent=1), f"\nwrote {out}", flush=True)
    if args.plot:
        plot(summary_of(records), args.plot)
    return 1 if died else 2 if any(record["error"] for record in records) else 0


class Jobs:
    """All jobs over one connection; each appends its records as they come."""

    def __init__(self, client: Client, args: argparse.Namespace, records: list[Record]):
        self.client, self.args, self.records, self.seed = client, args, records, int(time.time()) % 10**6
        width, height = map(int, args.size.split("x"))
        self.graphs = Graphs(width, height, args.cond, args.vae, args.tiny_vae, args.block_tokens)
        self.listed: dict[str, list[str]] = {}

    async def run(self) -> None:
        self.listed = await self._files()
        for name, job in self._chosen().items():
            began = time.monotonic()
            try:
                await job()
            except ServerGone as gone:
                self.add(name, error=str(gone))
                raise
            except Exception as error:  # one job that fails must not cost the others
                traceback.print_exc()
                self.add(name, error=f"{type(error).__name__}: {error}")
            print(f"-- {name} took {time.monotonic() - began:.0f} s", flush=True)

    def _chosen(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Jobs in their order; those that only --only starts are left out without it."""
        always: dict[str, Callable[[], Awaitable[None]]] = {
            "sampler": self.sampler,
            "stream_tiny": lambda: self.stream("stream_tiny", {}),
            "stream_autosave": lambda: self.stream("stream_autosave", {}, autosave_chunks=4),
            "stream_shared_fp8": lambda: self.stream("stream_shared_fp8", SHORTCUTS),
            "stream_wan": lambda: self.stream("stream_wan", {}, seconds=LONG_S / 2, tiny=False),
            "stream_fp8_checkpoint": lambda: self.stream_file("stream_fp8_checkpoint", self.args.fp8),
            "stream_gguf": lambda: self.stream_file("stream_gguf", self.args.gguf),
            "workflows": lambda: run_workflows(self),
        }
        if big := self.args.model_14b:
            always["stream_14b"] = lambda: self.stream("stream_14b", {}, big, seconds=8.0)
            always["stream_14b_fp8"] = lambda: self.stream("stream_14b_fp8", SHORTCUTS, big, seconds=8.0)
        asked = {
            "first_run": self.first_run,
            "ballast": lambda: self.ballast("ballast", self.args.model, FREE_GB, {}),
            "ballast_14b": lambda: self.ballast("ballast_14b", self.args.fp8_14b, FREE_GB_14B, SMALL_CARD),
        }
        only = self.args.only
        if not only:
            return always
        jobs = always | asked
        for pattern in only:
            if not any(fnmatch(name, pattern) for name in jobs):
                raise SystemExit(f"no job is called {pattern!r}; there are {', '.join(jobs)}")
        chosen = {name: job for name, job in jobs.items() if any(fnmatch(name, pattern) for pattern in only)}
        if "first_run" in chosen:  # before anything has compiled a kernel
            chosen = {"first_run": chosen.pop("first_run"), **chosen}
        return chosen

    # --- jobs ---

    async def sampler(self) -> None:
        """Core, dense, sparse and slow in turn, so that a change of the clocks meets all of them; then the long run."""
        spans: dict[str, list[float]] = {name: [] for name in MODES}
        failed: dict[str, str] = {}
        for turn in range(1 + self.args.rounds):
            for name, apply in MODES.items():
                if name in failed:
                    continue
                run = await self._sample(SHORT_FRAMES, apply)
                if run.error:
                    failed[name] = run.error
                elif turn:
                    spans[name].append(run.node_s(SAMPLE))
        frames = self._frames(SHORT_FRAMES)
        for name, times in spans.items():
            facts = {"error": failed[name]} if name in failed else self._of_sampler(times, frames)
            self.add(f"{name}_5s", **facts)
        await self._long_sampler(spans["sparse"])
        await self.engine()

    async def _long_sampler(self, short: list[float]) -> None:
        """63 latent frames sparse: what they take longer than 21 is the steady state, free of start and end."""
        for _ in range(2):  # the first warms up
            run = await self._sample(LONG_FRAMES, MODES["sparse"])
        if run.error or not short:
            self.add("sparse_15s", error=run.error or "the short sparse run failed")
            return
        more = self._frames(LONG_FRAMES) - self._frames(SHORT_FRAMES)
        chunk_s = (run.node_s(SAMPLE) - statistics.median(short)) / (more / CHUNK_FRAMES)
        self.add("sparse_15s", chunk_s=chunk_s, fps=4 * CHUNK_FRAMES / chunk_s, node_s=run.node_s(SAMPLE))

    async def _sample(self, frames: int, apply: dict[str, Any] | None) -> Run:
        graph = self.graphs.sampler(self.args.model, self._frames(frames), self.next_seed(), apply)
        return await self.client.run(graph)

    @staticmethod
    def _of_sampler(times: list[float], frames: int) -> dict[str, Any]:
        node_s = statistics.median(times)
        chunk_s = node_s / (frames / CHUNK_FRAMES)
        return {"chunk_s": chunk_s, "fps": (4 * frames - 3) / node_s, "node_s": node_s, "all_node_s": times}

    async def engine(self) -> None:
        """The engine's own steady chunk, from --engine's file, or measured here while the server idles."""
        source, mode = self.args.engine, f"sparse@{self.args.block_tokens}"
        if source == "none":
            return
        if source != "auto":
            found = json.loads(Path(source).read_text(encoding="utf-8"))
        else:
            found = await run_rollout(mode)
        facts = found["modes"][mode]
        if "steady" not in facts:
            self.add("engine", error=facts.get("error", "no steady time"))
            return
        chunk_s = facts["steady"]["p50_ms"] / 1000
        self.add("engine", chunk_s=chunk_s, fps=4 * CHUNK_FRAMES / chunk_s)

    async def stream_file(self, name: str, file: str) -> None:
        """Stream another file of the same model, where the server has it."""
        loader = "UnetLoaderGGUF" if file.endswith(".gguf") else "UNETLoader"
        if file in self.listed.get(loader, []):
            await self.stream(name, {}, file, seconds=LONG_S / 2)
        else:
            print(f"{name}: not run, the server's {loader} lists no {file}", flush=True)

    async def stream(
        self,
        name: str,
        apply: dict[str, Any],
        model: str = "",
        seconds: float = LONG_S,
        tiny: bool = True,
        **more: Any,
    ) -> None:
        """Stream Video: a short video to warm up, then the measured one."""
        model = model or self.args.model
        for length in (WARM_S, seconds):
            run = await self._stream(model, length, apply, tiny, **more)
            if run.error:
                break
        self.add(name, **of_stream(run))

    async def _stream(
        self, model: str, seconds: float, apply: dict[str, Any], tiny: bool = True, **more: Any
    ) -> Run:
        seconds = max(4 * CHUNK_FRAMES * 4 / FPS, seconds * self.args.time)  # four chunks at least
        return await self.client.run(
            self.graphs.stream(model, seconds, self.next_seed(), apply, tiny, **more)
        )

    async def first_run(self) -> None:
        """The first graph of a fresh server; its Triton cache should be empty."""
        run = await self._stream(self.args.model, WARM_S, {})
        self.add("first_run", **of_stream(run), total_s=run.total_s, texts=run.texts[:20])

    async def ballast(self, name: str, model: str, levels: tuple[int, ...], apply: dict[str, Any]) -> None:
        """Streams with so much memory free, its peak, and what Estimate says of it."""
        for level in levels:
            try:
                self.add(
                    f"{name}_{level}gb", free_gb=level, **await self._on_a_small_card(level, model, apply)
                )
            except (RuntimeError, OSError) as error:
                if isinstance(error, ServerGone):
                    raise
                self.add(f"{name}_{level}gb", error=str(error))

    async def _on_a_small_card(self, free_gb: int, model: str, apply: dict[str, Any]) -> dict[str, Any]:
        seconds = self._seconds(2 * WARM_S)
        said = await self.client.run(self.graphs.estimate(model, seconds, apply))
        await self.client.free()
        async with Ballast(free_gb) as ballast:
            run = await self._stream(model, 2 * WARM_S, apply)
        facts = of_stream(run) | {"peak_gb": ballast.peak_gb, "estimate_gb": estimated_gb(said)}
        if facts["estimate_gb"] and ballast.peak_gb:
            facts["estimate_over_peak"] = facts["estimate_gb"] / ballast.peak_gb
        return facts

    # --- helpers ---

    def add(self, name: str, error: str | None = None, **facts: Any) -> None:
        """Append a record and print it."""
        record = {"name": name, "chunk_s": None, "fps": None, "first_chunk_s": None, **facts, "error": error}
        self.records.append(record)
        said = {key: round(value, 4) if isinstance(value, float) else value for key, value in record.items()}
        print(json.dumps({key: value for key, value in said.items() if value not in (None, [])}), flush=True)

    def _seconds(self, seconds: float) -> float:
        """Seconds of video: four chunks at least."""
        return max(4 * CHUNK_FRAMES * 4 / FPS, seconds * self.args.time)

    def _frames(self, frames: int) -> int:
        """Whole chunks, two at least."""
        chunks = max(2 if frames == SHORT_FRAMES else 4, round(frames * self.args.time / CHUNK_FRAMES))
        return chunks * CHUNK_FRAMES

    def next_seed(self) -> int:
        """A new seed every time, so that ComfyUI's cache answers nothing."""
        self.seed += 1
        return self.seed

    async def free_bytes(self) -> int:
        return (await self.client.get("/system_stats"))["devices"][0]["vram_free"]

    async def _files(self) -> dict[str, list[str]]:
        """The files that each loader of the server offers."""
        found = {}
        for kind, name in {**LOADERS, "UnetLoaderGGUF": "unet_name"}.items():
            schema = (await self.client.get(f"/object_info/{kind}")).get(kind)
            if schema:
                options = schema["input"]["required"][name]
                found[kind] = options[0] if isinstance(options[0], list) else options[1].get("options", [])
        return found


async def run_rollout(mode: str) -> dict[str, Any]:
    """benchmarks/rollout.py of 1.3B in a process of its own."""
    script = Path(__file__).with_name("rollout.py")
    with tempfile.TemporaryDirectory() as out:
        options = ("--model", "1.3b", "--modes", mode, "--quick", "--decode", "none", "--out", out)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(script),
            *options,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said = (await process.communicate())[0].decode(errors="replace")
        path = Path(out, "rollout.json")
        if process.returncode or not path.is_file():
            raise RuntimeError(f"benchmarks/rollout.py failed: {said[-800:]}")
        return json.loads(path.read_text(encoding="utf-8"))

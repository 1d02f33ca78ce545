// The player on Stream Video: shows a video while it is made, and lets the viewer stop it or change the prompt.
//
// It hears the events sparse_forcing.{chunk,note,end} and posts to /sparse_forcing/{stop,prompt}; nodes/live.py is the
// other side. Every chunk event says all that the player shows, so a page that was reloaded in the middle goes on.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { MemoryView, STYLE as MEMORY_STYLE } from "./memory_view.js";
import { clock, decoded, element } from "./parts.js";

const NODE = "SparseForcingStreamVideo";
const MAX_FRAMES = 1200; // JPEGs kept, about 15 kB each: 18 MB, however long the video
const STEP_SECONDS = 1; // of the arrow keys
const HEIGHT = 330;

const SETTINGS = [
  ["Autoplay", "Play a video while it is made", true, "Off: the player waits at the first frame until you press Play."],
  ["Memory", "Show what the model remembers", false, "Whether the Memory button of a new player is pressed at first."],
];
const settingId = (name) => `SparseForcing.Player.${name}`;
const setting = (name) => app.extensionManager.setting.get(settingId(name));

const STYLE = `
.sf-player { display: flex; flex-direction: column; gap: 6px; height: 100%; min-height: 0; padding: 6px;
  box-sizing: border-box; border-radius: 6px; font: 12px/1.4 system-ui, sans-serif; color: var(--input-text, #ddd);
  background: var(--comfy-menu-bg, #222); border: 1px solid var(--border-color, #444); outline-offset: -2px; }
.sf-player canvas { flex: 1 1 0; min-height: 170px; width: 100%; object-fit: contain; border-radius: 4px;
  background: var(--comfy-input-bg, #111); }
.sf-player .sf-row .sf-numbers { flex: 1 1 0; min-width: 0; }
.sf-player .sf-row { display: flex; gap: 6px; align-items: center; }
.sf-player input { flex: 1 1 0; min-width: 0; }
.sf-player input[type="text"], .sf-player button { font: inherit; color: var(--input-text, #ddd); padding: 3px 8px;
  background: var(--comfy-input-bg, #333); border: 1px solid var(--border-color, #555); border-radius: 4px; }
.sf-player input[type="range"] { accent-color: var(--p-primary-color, #4a8cff); }
.sf-player button { cursor: pointer; white-space: nowrap; }
.sf-player button:disabled { cursor: default; opacity: 0.5; }
.sf-player .sf-time, .sf-player .sf-numbers { font-variant-numeric: tabular-nums; }
.sf-player .sf-numbers, .sf-player .sf-note { color: var(--descrip-text, #aaa); min-height: 1.4em;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.sf-player .sf-prompts { display: flex; height: 14px; gap: 2px; font-size: 10px; line-height: 14px; }
.sf-player .sf-prompts span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; padding: 0 3px;
  border-radius: 3px; background: var(--comfy-input-bg, #333); border-bottom: 2px solid transparent; }
.sf-player .sf-prompts span[aria-current="true"] { border-bottom-color: var(--p-primary-color, #4a8cff); }
.sf-player [hidden] { display: none; }
`;

/** Frames by number, at most `limit`: the latest quarter in full, before it one in each stretch of `stride` frames. */
export class FrameStore {
  constructor(limit = MAX_FRAMES) {
    this.limit = limit;
    this.clear();
  }

  clear() {
    this.frames = []; // {number, blob}, in order
    this.stride = 1; // doubles whenever the past does not fit
  }

  add(number, blob) {
    const last = this.frames.at(-1);
    if (last && number <= last.number) return; // a chunk that came twice
    this.frames.push({ number, blob });
    while (this.frames.length > this.limit) {
      const thinner = this.thinned();
      if (thinner.length === this.frames.length) this.stride *= 2;
      else this.frames = thinner;
    }
  }

  thinned() {
    const recent = this.frames.length - (this.limit >> 2);
    let stretch = -1;
    return this.frames.filter(({ number }, i) => {
      if (i >= recent) return true;
      const before = stretch;
      stretch = Math.floor(number / this.stride);
      return stretch !== before;
    });
  }

  /** The latest frame at or before a number, else the first. */
  at(number) {
    let low = 0;
    let high = this.frames.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.frames[middle].number <= number) low = middle + 1;
      else high = middle;
    }
    return this.frames[Math.max(0, low - 1)];
  }
}

/** The text under the picture: what is known, in words. */
export function numbers(chunk) {
  const parts = [`chunk ${chunk.done}/${chunk.total}`, `${chunk.fps_made.toFixed(1)} FPS`];
  parts.push(`${chunk.seconds.toFixed(1)} s a chunk`, `cache ${bytes(chunk.cache_bytes)}`);
  if (chunk.seconds_left > 0) parts.push(`${clock(chunk.seconds_left)} left`);
  return parts.join(" \u00b7 ");
}

export function bytes(count) {
  for (const [unit, step] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= step) return `${(count / step).toFixed(count < 10 * step ? 1 : 0)} ${unit}`;
  }
  return `${count} B`;
}

class Player {
  constructor() {
    this.store = new FrameStore();
    this.run = null; // {prompt_id, node} of the run that is shown
    this.fps = 16;
    this.position = 0; // seconds
    this.length = 0; // seconds that exist
    this.playing = true;
    this.build();
  }

  build() {
    this.memory = new MemoryView(() => this.redraw(), (seconds) => this.seek(seconds));
    this.canvas = element("canvas", { role: "img", "aria-label": "Preview of the video" });
    this.play = element("button", { type: "button" });
    this.scrub = element("input", { type: "range", min: 0, max: 0, step: "any", "aria-label": "Position in seconds" });
    this.time = element("span", { class: "sf-time" }, "0:00 / 0:00");
    this.stop = element("button", { type: "button", title: "End after this chunk, with a complete video" });
    this.stop.append("Stop and keep");
    this.prompts = element("div", { class: "sf-prompts", role: "list", "aria-label": "Prompts over time" });
    this.text = element("input", {
      type: "text",
      "aria-label": "New prompt, from the next chunk on",
      placeholder: "New prompt, from the next chunk on",
      maxlength: 8192,
    });
    this.send = element("button", { type: "button" }, "Change prompt");
    this.promptRow = element("div", { class: "sf-row" }, this.text, this.send);
    this.numbers = element("div", { class: "sf-numbers" }, "The video plays here while it is made.");
    this.note = element("div", { class: "sf-note", role: "status" });
    const bar = element("div", { class: "sf-bar" }, this.memory.strip, this.scrub);
    this.root = element(
      "div",
      { class: "sf-player", tabindex: 0, role: "group", "aria-label": "Live player: space plays, arrows move" },
      this.canvas,
      element("div", { class: "sf-row" }, this.play, bar, this.time, this.stop),
      this.memory.legend,
      this.prompts,
      this.promptRow,
      element("div", { class: "sf-row" }, this.numbers, this.memory.button),
      this.note,
    );
    this.play.onclick = () => this.setPlaying(!this.playing);
    this.scrub.oninput = () => this.seek(Number(this.scrub.value));
    this.stop.onclick = () => this.requestStop();
    this.send.onclick = () => this.requestPrompt();
    this.root.prepend(element("style", {}, MEMORY_STYLE, STYLE)); // its own, so that the page's head stays the host's
    this.root.onkeydown = (event) => this.key(event);
    this.root.onpointerdown = (event) => event.stopPropagation(); // dragging the bar does not drag the node
    this.memory.setOn(setting("Memory"));
    this.setPlaying(true);
    this.setRunning(false, false);
  }

  // --- what arrives

  chunk(event) {
    if (!this.shows(event)) this.begin(event);
    this.fps = event.fps;
    for (const [number, picture] of event.pictures) {
      this.store.add(number, new Blob([decoded(picture)], { type: "image/jpeg" }));
    }
    this.length = (event.first_frame + event.frame_count) / this.fps;
    this.scrub.max = this.length;
    this.numbers.textContent = this.numbers.title = numbers(event);
    this.memory.show(event);
    this.showPrompts(event);
    this.setRunning(!this.ending, event.takes_prompts);
    this.root.dataset.frames = this.store.frames.length;
    this.draw();
    this.tick();
  }

  end(event) {
    if (!this.shows(event)) return;
    const said = { finished: "Finished.", stopped: "Stopped; the video is complete up to here." };
    this.say(said[event.outcome] ?? "Ended early; the finished chunks are in the output folder.");
    this.setRunning(false, false);
    this.root.dataset.state = event.outcome;
    if (this.position >= this.length) this.setPlaying(false);
  }

  say(text) {
    this.note.textContent = this.note.title = text;
  }

  shows(event) {
    return this.run?.prompt_id === event.prompt_id && this.run?.node === event.node;
  }

  begin(event) {
    this.run = { prompt_id: event.prompt_id, node: event.node };
    this.ending = false;
    this.position = event.first_frame / event.fps; // not 0 where the page was loaded in the middle
    this.store.clear();
    this.memory.clear();
    this.say("");
    this.root.dataset.state = "running";
    this.setPlaying(setting("Autoplay"));
  }

  showPrompts(event) {
    const total = event.total_frames / event.fps;
    const prompts = event.timeline;
    this.prompts.hidden = prompts.length === 0;
    this.prompts.replaceChildren(
      ...prompts.map(([start, text], i) => {
        const width = Math.max(0, Math.min(total, prompts[i + 1]?.[0] ?? total) - start);
        const holds = text === event.prompt;
        const made = element("span", { role: "listitem", title: `${start} s: ${text}`, "aria-current": holds }, text);
        made.style.flex = `${width} 1 0`;
        made.hidden = width === 0;
        return made;
      }),
    );
  }

  setRunning(running, takesPrompts) {
    this.stop.disabled = !running;
    this.promptRow.hidden = !takesPrompts;
  }

  // --- what plays

  setPlaying(playing) {
    if (playing && this.position >= this.length && this.root.dataset.state !== "running") this.position = 0;
    this.playing = playing;
    this.play.replaceChildren(element("i", { class: `pi ${playing ? "pi-pause" : "pi-play"}`, "aria-hidden": true }));
    this.play.setAttribute("aria-label", playing ? "Pause" : "Play");
    this.tick();
  }

  seek(seconds) {
    this.position = Math.min(Math.max(0, seconds), this.length);
    this.draw();
    this.tick();
  }

  /** Move on with the clock; the timer runs only while there is something to play. */
  tick() {
    if (this.timer || !this.playing || this.position >= this.length) return;
    const before = performance.now();
    this.timer = setTimeout(() => {
      this.timer = null;
      if (!this.playing) return;
      this.position = Math.min(this.length, this.position + (performance.now() - before) / 1000);
      this.draw();
      if (this.position >= this.length && this.root.dataset.state !== "running") this.setPlaying(false);
      else if (this.root.isConnected) this.tick();
    }, 1000 / this.fps);
  }

  redraw() {
    this.drawn = null;
    this.draw();
  }

  async draw() {
    this.scrub.value = this.position;
    this.time.textContent = `${clock(this.position)} / ${clock(this.length)}`;
    const frame = this.store.at(Math.floor(this.position * this.fps + 1e-6));
    if (!frame || frame === this.drawn) return;
    this.drawn = frame;
    const picture = await createImageBitmap(frame.blob).catch(() => null);
    if (picture && this.drawn === frame) {
      if (this.canvas.width !== picture.width) this.canvas.width = picture.width;
      if (this.canvas.height !== picture.height) this.canvas.height = picture.height;
      this.canvas.getContext("2d").drawImage(picture, 0, 0);
      this.memory.draw(this.canvas, frame.number);
      this.root.dataset.shown = frame.number;
    }
    picture?.close();
  }

  key(event) {
    if (event.target === this.text) {
      if (event.key === "Enter") this.requestPrompt();
      event.stopPropagation();
      return;
    }
    if (event.target.tagName === "BUTTON" && [" ", "Enter"].includes(event.key)) {
      event.stopPropagation(); // the button's own
      return;
    }
    const actions = {
      " ": () => this.setPlaying(!this.playing),
      ArrowLeft: () => this.seek(this.position - STEP_SECONDS),
      ArrowRight: () => this.seek(this.position + STEP_SECONDS),
      Home: () => this.seek(0),
      End: () => this.seek(this.length),
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    actions[event.key]();
  }

  // --- what the viewer asks for

  async requestStop() {
    this.ending = true;
    this.stop.disabled = true;
    if (await this.post("stop", {})) this.say("Ends after this chunk.");
    else this.ending = this.stop.disabled = false;
  }

  async requestPrompt() {
    const text = this.text.value.trim();
    if (text && (await this.post("prompt", { text }))) this.say(`From the next chunk on: ${text}`);
  }

  async post(what, content) {
    try {
      const answer = await api.fetchApi(`/sparse_forcing/${what}`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...this.run, ...content }),
      });
      if (answer.ok) return true;
      this.say((await answer.json().catch(() => ({}))).error ?? `The server answered ${answer.status}.`);
    } catch {
      this.say("The server does not answer.");
    }
    return false;
  }
}

/** The node that an execution id names; in subgraphs it is a path, such as 5:3. */
function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

const players = new WeakMap(); // node -> Player

function playerOf(event) {
  const node = findNode(event.detail.node);
  return node && players.get(node);
}

app.registerExtension({
  name: "sparseforcing.player",

  settings: SETTINGS.map(([key, name, defaultValue, tooltip]) => ({
    id: settingId(key),
    category: ["Sparse Forcing", "Player", key],
    name,
    type: "boolean",
    defaultValue,
    tooltip,
  })),

  setup() {
    api.addEventListener("sparse_forcing.chunk", (event) => playerOf(event)?.chunk(event.detail));
    api.addEventListener("sparse_forcing.note", (event) => playerOf(event)?.say(event.detail.text));
    api.addEventListener("sparse_forcing.end", (event) => playerOf(event)?.end(event.detail));
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const player = new Player();
    players.set(node, player);
    const widget = node.addDOMWidget("player", "SPARSE_FORCING_PLAYER", player.root, {
      serialize: false, // not part of the prompt
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
    });
    widget.serialize = false; // nor of the saved workflow
  },
});

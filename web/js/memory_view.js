// What the model remembers of the video, over the player: light on the picture, a strip over the scrub bar, a legend.
//
// Every chunk event brings the map as `memory`; docs/api.md says what is in it. Colours and light are those of the
// picture that the Memory Map node draws (sparse_attn/memory_map.py).

import { clock, decoded, element } from "./parts.js";

const COLOURS = { sink: [230, 159, 0], persistent: [86, 180, 233], window: [0, 158, 115] };
const FORGOTTEN = [60, 60, 60]; // in the legend
const DARKEST = 0.2; // what is left of a picture's light where nobody keeps it
const COLOUR = 0.35; // of a part, where everybody does
const FAINTEST = 0.25; // of a stretch in the strip

export const STYLE = `
.sf-player button[aria-pressed="true"] { border-color: var(--p-primary-color, #4a8cff);
  box-shadow: inset 0 0 0 1px var(--p-primary-color, #4a8cff); }
.sf-player .sf-bar { flex: 1 1 0; min-width: 0; display: flex; flex-direction: column; justify-content: center; }
.sf-player .sf-bar input { flex: none; width: 100%; margin: 0; }
.sf-player .sf-strip { position: relative; height: 8px; margin: 0 8px; cursor: pointer; border-radius: 2px;
  overflow: hidden; background: var(--comfy-input-bg, #333); border: 1px solid var(--border-color, #555); }
.sf-player .sf-strip span { position: absolute; top: 0; bottom: 0; min-width: 2px; }
.sf-player .sf-legend { display: flex; flex-wrap: wrap; gap: 0 12px; color: var(--descrip-text, #aaa); }
.sf-player .sf-legend i { display: inline-block; width: 10px; height: 10px; margin-right: 4px; border-radius: 2px;
  border: 1px solid var(--border-color, #555); box-sizing: border-box; }
.sf-player .sf-moment { flex-basis: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
`;

const css = (colour, strength = 1) => `rgb(${colour.join(" ")} / ${strength})`;
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

export class MemoryView {
  /** changed(): draw again; seek(seconds): go there. */
  constructor(changed, seek) {
    this.changed = changed;
    const title = "Show what the model remembers, over the video";
    this.button = element("button", { type: "button", title }, "Memory");
    this.strip = element("div", { class: "sf-strip", role: "list", "aria-label": "Moments in memory" });
    this.peak = element("span");
    this.moment = element("span", { class: "sf-moment" });
    this.legend = element(
      "div",
      { class: "sf-legend", role: "group", "aria-label": "Legend of the memory" },
      legendEntry(COLOURS.sink, "sink"),
      legendEntry(COLOURS.persistent, "persistent", this.peak),
      legendEntry(COLOURS.window, "window"),
      legendEntry(FORGOTTEN, "dark: forgotten"),
      this.moment,
    );
    this.button.onclick = () => {
      this.setOn(!this.on);
      this.changed();
    };
    this.strip.onclick = (event) => {
      const { left, width } = this.strip.getBoundingClientRect();
      seek(((event.clientX - left) / width) * this.length);
    };
    this.nothing = { part: "window", shares: [0], grid: [1, 1] }; // of a moment that is forgotten
    this.clear();
  }

  clear() {
    this.memory = null; // of the latest chunk that brought one
    this.length = 0; // seconds of the strip
    this.moment.textContent = "No map yet. Only runs in mode sparse have one.";
    this.showStrip();
  }

  setOn(on) {
    this.on = on;
    this.button.setAttribute("aria-pressed", on);
    this.strip.hidden = this.legend.hidden = !on;
  }

  /** What a chunk event says of the memory, which is null where the page is slow and in other modes than sparse. */
  show({ memory, fps, first_frame, frame_count }) {
    this.fps = fps;
    this.length = (first_frame + frame_count) / fps;
    if (memory) this.memory = { ...memory, tiles: memory.tiles.map((tile) => read(tile, memory.grid)) };
    this.showStrip();
    if (this.on) this.changed();
  }

  showStrip() {
    this.peak.textContent = this.memory?.peak ? `, brightest: ${percent(this.memory.peak)}` : "";
    this.strip.replaceChildren(
      ...(this.memory?.tiles ?? []).map((tile) => {
        const title = `${clock(tile.first / this.fps)}: ${this.words(tile)}`;
        const made = element("span", { role: "listitem", title, "aria-label": title, "data-part": tile.part });
        made.style.left = `${(100 * tile.first) / this.fps / this.length}%`;
        made.style.width = `${(100 * tile.count) / this.fps / this.length}%`;
        made.style.background = css(COLOURS[tile.part], Math.max(FAINTEST, tile.most));
        return made;
      }),
    );
  }

  words(tile) {
    if (tile.part !== "persistent") return `${tile.part}, kept by all layers and heads`;
    return `persistent, kept by up to ${percent(tile.most * this.memory.peak)} of layers and heads`;
  }

  /** Lay what is remembered of a frame over its picture, and say it in words. */
  draw(canvas, frame) {
    if (!this.on || !this.memory) return;
    const { tiles } = this.memory;
    const tile = tiles.find(({ first, count }) => first <= frame && frame < first + count);
    const newer = frame >= tiles.at(-1).first + tiles.at(-1).count; // a video's last chunk need not be remembered
    const words = tile ? this.words(tile) : newer ? "newer than the memory" : this.forgotten();
    this.moment.textContent = this.moment.title = `This moment: ${words}.`;
    if (newer) return;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    const shown = tile ?? this.nothing;
    shown.light ??= light(shown);
    context.drawImage(shown.light, 0, 0, canvas.width, canvas.height);
  }

  forgotten() {
    const { tiles, stretches } = this.memory;
    if (tiles.length === stretches) return "not in memory";
    return `not among the ${tiles.length} moments of ${stretches} that are kept most`;
  }
}

function legendEntry(colour, ...words) {
  const swatch = element("i", { "aria-hidden": true });
  swatch.style.background = css(colour);
  return element("span", {}, swatch, ...words);
}

/** A tile with its shares as bytes over its grid, and the largest of them, 0 to 1. */
function read(tile, grid) {
  if (!tile.shares) return { ...tile, shares: [255], grid: [1, 1], most: 1 };
  const shares = decoded(tile.shares);
  return { ...tile, shares, grid, most: Math.max(...shares) / 255 };
}

/** What makes of a picture P: DARKEST P where the share is 0, (1 - COLOUR) P + COLOUR colour where it is 255. */
function light({ part, shares, grid: [rows, columns] }) {
  const made = element("canvas", { width: columns, height: rows });
  const image = new ImageData(columns, rows);
  shares.forEach((share, i) => {
    const cover = 1 - DARKEST - (share / 255) * (1 - COLOUR - DARKEST);
    const tint = ((share / 255) * COLOUR) / cover;
    image.data.set([...COLOURS[part].map((value) => Math.round(tint * value)), Math.round(255 * cover)], 4 * i);
  });
  made.getContext("2d").putImageData(image, 0, 0);
  return made;
}

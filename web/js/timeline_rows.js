// The prompts of Prompt Timeline as rows: a time, a prompt, and a button that removes them.
//
// The node's text stays what is saved and sent. Rows are read from it, with the grammar of sparse_attn/timeline.py, and
// every edit reads it anew and writes it back, so that neither of the two can lose what was written in the other.

import { app } from "../../../scripts/app.js";
import { element } from "./parts.js";

const NODE = "SparseForcingPromptTimeline";
const HEIGHT = 130; // of four rows; more scroll
const STEP_SECONDS = 3; // from the last prompt to one that is added

const CODE = /^\s*(?:(\d+)m)?(\d+(?:\.\d+)?)s\s*:/;
const LIKE_A_TIME = String.raw`\s*\d[\d.,]*m?[\d.,]*\s*(?:ms|s|secs?|seconds?|m|mins?|minutes?|h)?\s*:`;
const NEARLY = new RegExp(`^${LIKE_A_TIME}`, "i");
const BORDER = new RegExp(String.raw`\n|/(?=${LIKE_A_TIME})`, "i");

const STYLE = `
.sf-rows { display: flex; flex-direction: column; gap: 4px; height: 100%; overflow-y: auto; box-sizing: border-box;
  padding: 4px; font: 12px/1.4 system-ui, sans-serif; color: var(--input-text, #ddd); }
.sf-rows div { display: flex; flex: none; gap: 4px; align-items: center; }
.sf-rows input, .sf-rows button { font: inherit; color: var(--input-text, #ddd); padding: 2px 6px; min-width: 0;
  background: var(--comfy-input-bg, #333); border: 1px solid var(--border-color, #555); border-radius: 4px; }
.sf-rows input[type="number"] { width: 56px; }
.sf-rows input[type="text"] { flex: 1 1 0; }
.sf-rows button { flex: none; cursor: pointer; }
.sf-rows button:disabled, .sf-rows input:disabled { cursor: default; opacity: 0.5; }
.sf-rows [hidden] { display: none; }
`;

/** [{start, text}] in the order of time, a text without a word included; null where the node would refuse the rest. */
export function readTimeline(text) {
  const prompts = [];
  for (const piece of text.split(BORDER)) {
    if (!piece.trim()) continue;
    const code = CODE.exec(piece);
    const words = (code ? piece.slice(code[0].length) : piece).trim().replace(/\s+/g, " ");
    if (code) prompts.push({ start: 60 * Number(code[1] ?? 0) + Number(code[2]), text: words });
    else if (NEARLY.test(piece)) return null;
    else if (prompts.length) prompts.at(-1).text = `${prompts.at(-1).text} ${words}`.trim();
    else prompts.push({ start: 0, text: words });
  }
  const ordered = prompts.every(({ start }, i) => (i ? start > prompts[i - 1].start : start === 0));
  return ordered && prompts.length ? prompts : null;
}

export function writeTimeline(prompts) {
  return prompts.map(({ start, text }) => `${time(start)}: ${text}`).join("\n");
}

function time(seconds) {
  const [minutes, rest] = [Math.floor(seconds / 60), Number((seconds % 60).toFixed(3))];
  return minutes ? `${minutes}m${rest}s` : `${rest}s`;
}

class Rows {
  constructor(node, widget) {
    Object.assign(this, { node, widget });
    this.list = element("div", { role: "list", "aria-label": "Prompts and their times", style: "display: contents" });
    this.note = element("div", { role: "status" });
    this.add = element("button", { type: "button" }, "Add a prompt");
    this.root = element("div", { class: "sf-rows", role: "group", "aria-label": "Prompts as rows" });
    this.root.append(element("style", {}, STYLE), this.list, this.note, element("div", {}, this.add));
    this.add.onclick = () => {
      this.edit((prompts) => prompts.push({ start: prompts.at(-1).start + STEP_SECONDS, text: "" }));
      this.list.lastChild?.querySelector("input[type=text]").focus();
    };
    this.root.onpointerdown = (event) => event.stopPropagation(); // selecting words does not drag the node
    this.root.onkeydown = (event) => {
      if (!event.ctrlKey && !event.metaKey) event.stopPropagation(); // letters are no shortcuts of the graph
    };
    this.root.addEventListener("focusin", () => this.show()); // somebody may have set the text without a word
    const heard = widget.callback;
    widget.callback = (...said) => {
      heard?.apply(widget, said);
      this.show();
    };
  }

  /** Change the prompts in place by `change`; those that are out of order afterwards are put into it. */
  edit(change) {
    const prompts = readTimeline(this.widget.value);
    if (!prompts) return this.show();
    change(prompts);
    prompts.sort((one, other) => one.start - other.start);
    prompts[0].start = 0; // the video begins with a prompt, whichever was removed
    this.widget.value = writeTimeline(prompts);
    this.widget.callback(this.widget.value);
    this.node.setDirtyCanvas(true, true);
  }

  show() {
    const linked = this.node.inputs?.some((input) => input.widget?.name === this.widget.name && input.link != null);
    const prompts = linked ? null : readTimeline(this.widget.value);
    this.note.textContent = linked ? "The text comes from another node." : "The text cannot be read as prompts and times.";
    this.note.hidden = prompts !== null;
    this.add.disabled = prompts === null;
    const count = prompts?.length ?? 0;
    while (this.list.childElementCount > count) this.list.lastChild.remove();
    while (this.list.childElementCount < count) this.list.append(this.row(this.list.childElementCount));
    prompts?.forEach(({ start, text }, i) => {
      const [begins, words, remove] = this.list.children[i].children;
      if (begins !== document.activeElement) begins.value = start;
      if (words !== document.activeElement) words.value = text; // who types keeps the space at the end
      remove.disabled = count === 1;
    });
  }

  row(i) {
    const named = (name) => ({ "aria-label": `${name} ${i + 1}`, title: `${name} ${i + 1}` });
    const begins = element("input", { type: "number", min: 0, step: "any", ...named("Second of prompt") });
    const words = element("input", { type: "text", ...named("Prompt"), placeholder: "What the video shows from then on" });
    const remove = element("button", { type: "button", ...named("Remove prompt") }, "\u00d7");
    begins.disabled = i === 0; // always 0
    begins.onchange = () => this.move(i, begins);
    words.oninput = () => this.edit((prompts) => (prompts[i].text = words.value));
    remove.onclick = () => this.edit((prompts) => prompts.splice(i, 1));
    return element("div", { role: "listitem" }, begins, words, remove);
  }

  /** Another time for a prompt; one that is no time, or taken, goes back to what it was. */
  move(i, begins) {
    const seconds = begins.value === "" ? NaN : Number(Number(begins.value).toFixed(3));
    begins.blur();
    this.edit((prompts) => {
      if (seconds > 0 && !prompts.some(({ start }) => start === seconds)) prompts[i].start = seconds;
    });
  }
}

app.registerExtension({
  name: "sparseforcing.timeline",

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const rows = new Rows(node, node.widgets.find((widget) => widget.name === "text"));
    const widget = node.addDOMWidget("rows", "SPARSE_FORCING_ROWS", rows.root, {
      serialize: false, // the text says it all
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
      getMaxHeight: () => HEIGHT, // the rest is the text's
    });
    widget.serialize = false;
    for (const change of ["onConfigure", "onConnectionsChange"]) {
      const before = node[change];
      node[change] = function (...said) {
        before?.apply(this, said);
        rows.show();
      };
    }
    rows.show();
  },
});

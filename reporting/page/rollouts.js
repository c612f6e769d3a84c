"use strict";
// Rollouts: a list, and one rollout beside it with its critique, its edit as a diff, and its tokens in colour.

// -- pieces that evaluations and comparisons share ------------------------------------------------------------------

const NO_SPACES = /[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]/; // scripts without spaces between words
const segmenter = "Segmenter" in Intl ? new Intl.Segmenter(undefined, { granularity: "word" }) : undefined;

// Diff of `before` and `after`: [["same" | "del" | "ins", text], ...]. Sentences that both share stay as they are. The text
// between them is compared by words. A single word between two changes joins them, so that a rewritten sentence reads as
// one change.
function changes(before, after) {
  const byWords = (a, b) => (segmenter && NO_SPACES.test(a + b) ? Diff.diffWords(a, b, { intlSegmenter: segmenter }) : Diff.diffWordsWithSpace(a, b));
  const found = [];
  let removed = "", added = "";
  const flush = () => {
    if (removed) found.push(["del", removed]);
    if (added) found.push(["ins", added]);
    removed = added = "";
  };
  const between = (a, b) => {
    const parts = a && b ? byWords(a, b) : [{ value: a || b, removed: Boolean(a), added: Boolean(b) }];
    parts.forEach((part, k) => {
      const few = part.value.split(/\s+/).filter((w) => /[\p{L}\p{N}]/u.test(w)).length < 2;
      if (part.removed) removed += part.value;
      else if (part.added) added += part.value;
      else if ((removed || added) && k < parts.length - 1 && few) [removed, added] = [removed + part.value, added + part.value];
      else { flush(); found.push(["same", part.value]); }
    });
    flush();
  };
  let [gone, come] = ["", ""];
  for (const part of Diff.diffSentences(before, after)) {
    if (part.removed) gone += part.value;
    else if (part.added) come += part.value;
    else if (!part.value.trim() && (gone || come)) [gone, come] = [gone + part.value, come + part.value];
    else {
      if (gone || come) between(gone, come);
      [gone, come] = ["", ""];
      found.push(["same", part.value]);
    }
  }
  if (gone || come) between(gone, come);
  return found;
}

function wordDiff(before, after) {
  const parts = changes(visible(before), visible(after));
  return h("div", { class: "said diff", dir: "auto" }, parts.map(([kind, text]) => (kind === "same" ? text : h(kind, {}, text))));
}

function personaBox(persona, question) {
  const flat = persona && typeof persona === "object" && !Array.isArray(persona) && Object.values(persona).every((v) => typeof v !== "object");
  const body = flat
    ? h("dl", { class: "persona" }, Object.entries(persona).map(([key, value]) => h("div", {}, h("dt", {}, visible(key)), h("dd", {}, visible(value)))))
    : h("pre", { class: "said persona-text" }, visible(typeof persona === "string" ? persona : JSON.stringify(persona, null, 2)));
  const long = !flat && asText(persona ?? "").length > 400;
  return [h("h2", { class: "question", dir: "auto" }, visible(question)),
    persona ? (long ? h("details", { class: "profile" }, h("summary", {}, "Persona"), body) : body) : null];
}

const SCORES = [["helpfulness", "Helpful"], ["personalization", "Personal"], ["naturalness", "Natural"], ["reward", "Reward"], ["exact", "Exact score"], ["n_tokens", "Tokens"], ["recited", "Values repeated"]];
const LOWER_IS_BETTER = ["recited"], NEUTRAL = ["n_tokens"];

// Scores of responses side by side. With two responses, also the change.
function scoreTable(responses, titles, change) {
  const rows = SCORES.filter(([name]) => responses.some((r) => r && r[name] !== undefined && r[name] !== null));
  if (!rows.length) return null;
  const cell = (name, value) => (name === "recited" ? percent(value) : number(value, ["reward", "exact"].includes(name) ? 2 : 0));
  return h("table", { class: "scores" },
    h("thead", {}, h("tr", {}, h("td", {}), titles.map((t) => h("th", { scope: "col" }, t)), change ? h("th", { scope: "col" }, "Change") : null)),
    h("tbody", {}, rows.map(([name, label]) => {
      const [a, b] = responses.map((r) => r?.[name]);
      const moved = change && typeof a === "number" && typeof b === "number" ? b - a : null;
      const good = moved && !NEUTRAL.includes(name) ? (moved > 0) !== LOWER_IS_BETTER.includes(name) : null;
      const text = moved === null ? "\u2013" : name === "recited" ? (moved > 0 ? "+" : "") + percent(moved) : moved ? signed(moved, ["reward", "exact"].includes(name) ? 2 : 0) : "0";
      return h("tr", { class: name }, h("th", { scope: "row" }, label), responses.map((r) => h("td", {}, cell(name, r?.[name]))),
        change ? h("td", { class: good === null ? "same" : good ? "up" : "down" }, text) : null);
    })));
}

function segmented(name, label, options) {
  return h("div", { class: "segmented", role: "group", "aria-label": label, id: name }, options.map(([value, text, title]) =>
    h("button", { "data-value": value, "aria-pressed": String(state[name] === value), title, onclick: () => set({ [name]: value }, true) }, text)));
}

// A list of n elements, item(i) each, that grows as it is scrolled.
function growingList(box, n, item) {
  let filled = 0;
  const more = () => {
    const fragment = document.createDocumentFragment(), end = Math.min(n, filled + 100);
    for (; filled < end; filled++) fragment.append(item(filled));
    box.append(fragment);
  };
  more();
  box.onscroll = () => { if (filled < n && box.scrollTop + box.clientHeight > box.scrollHeight - 600) more(); };
  window.onscroll = () => { if (filled < n && box.isConnected && innerHeight + scrollY > document.documentElement.scrollHeight - 900) more(); };
  return { upTo: (k) => { while (filled <= k && filled < n) more(); } };
}

// -- tokens in colour --------------------------------------------------------------------------------------------------

const COLORINGS = [["off", "Off"], ["logp", "log p"], ["ratio", "ratio r"], ["weight", "weight"], ["advantage", "advantage"]];
const ABOUT = {
  logp: ["log p under the policy; strong colours mark unlikely tokens", ["certain", "e\u207b\u2076"]],
  ratio: ["r = p / q, the policy over the behaviour policy, on a log scale", ["r \u2264 1/8", "1", "r \u2265 8"]],
  weight: ["factor of grad log p, on a log scale; struck through where it is 0 (no gradient)", ["0", "1", "\u2265 8"]],
  advantage: ["whitened over the batch", ["\u2264 \u22122", "0", "\u2265 2"]],
};
// null where a log-prob is not finite
const ratioOf = (tokens, k) => (tokens.logp[k] === null || tokens.logq[k] === null ? null : Math.exp(tokens.logp[k] - tokens.logq[k]));

// [css variable of the hue, strength from 0 to 1]
function shadeOf(tokens, k, coloring) {
  const value = { logp: tokens.logp[k], ratio: ratioOf(tokens, k), weight: tokens.weight[k], advantage: tokens.advantage[k] }[coloring];
  if (value === null) return ["--hue-a", 0];
  if (coloring === "logp") return ["--hue-a", Math.min(1, -value / 6)];
  const scaled = coloring === "advantage" ? value / 2 : Math.log2(value) / 3;
  return [scaled < 0 ? "--hue-b" : "--hue-a", Math.min(1, Math.abs(scaled))];
}

function tokenText(tokens) {
  const readout = h("p", { class: "readout muted", "aria-live": "polite" }, "Point at a token, or click one and move with \u2190 \u2192.");
  const spans = tokens.text.map((text, k) => {
    const [hue, strength] = shadeOf(tokens, k, state.color);
    const inserted = tokens.kept && !tokens.kept[k], none = tokens.weight[k] === 0;
    return h("span", { class: `token${inserted ? " inserted" : ""}${none ? " none" : ""}`, "data-k": k,
      style: `--tint: color-mix(in srgb, var(${hue}) ${Math.round(72 * strength)}%, transparent)` }, visible(text).replace(/\n/g, "\u21b5\n"));
  });
  const row = (k) => [["log p", number(tokens.logp[k], 3)], ["log q", number(tokens.logq[k], 3)], ["r", number(ratioOf(tokens, k), 3)],
    ["weight", number(tokens.weight[k], 3)], ["advantage", number(tokens.advantage[k], 3)]];
  let now = null;
  const show = (k) => {
    if (k < 0 || k >= spans.length) return;
    if (now !== null) spans[now].classList.remove("now");
    now = k;
    spans[k].classList.add("now");
    readout.className = "readout";
    readout.replaceChildren(h("code", {}, visible(tokens.text[k]) || "\u2026"), ...row(k).map(([name, value]) => h("span", {}, name, " ", h("b", {}, value))),
      tokens.kept ? h("span", {}, tokens.kept[k] ? "kept" : "inserted") : "");
  };
  const box = h("div", { class: "said tokens", dir: "auto", tabindex: 0, "aria-label": "Tokens" }, spans);
  const at = (event) => event.target.closest?.(".token")?.dataset.k;
  box.onmouseover = box.onclick = (e) => { if (at(e) !== undefined) show(Number(at(e))); };
  box.onkeydown = (e) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (by) { show(now === null ? 0 : now + by); e.preventDefault(); e.stopPropagation(); }
  };
  return [box, readout];
}

function colorKey() {
  const [text, marks] = ABOUT[state.color];
  return h("p", { class: "colorkey muted" }, h("span", { class: `ramp ${marks.length === 3 ? "two" : "one"}` }), marks.map((m) => h("span", {}, m)), h("span", { class: "text" }, text));
}

// -- the view ----------------------------------------------------------------------------------------------------------

function rowTitle(one, r) {
  const p = one.prompts[r.prompt];
  return visible(p.question ?? r.prompt);
}

function rolloutItem(one, i) {
  const r = one.rows[i], g = gain(r);
  const flags = [];
  if (r.held_out) flags.push(["held out", ""]);
  if (r.drop_reason || r.edit?.drop_reason) flags.push(["dropped", "bad"]);
  if (r.truncated || r.edit?.truncated) flags.push(["cut off", "bad"]);
  if (r.tokens || r.edit?.tokens) flags.push(["tokens", ""]);
  return h("a", { class: "item", href: "#", "data-row": i, "aria-current": String(i) === state.row ? "true" : null,
    onclick: (e) => { e.preventDefault(); set({ row: String(i) }); } },
    h("span", { class: "meta" }, h("span", {}, `step ${r.step}`), h("span", { class: "muted" }, visible(one.prompts[r.prompt].topic ?? r.prompt)), flags.map(([text, kind]) => h("span", { class: `flag ${kind}` }, text))),
    h("span", { class: "title", dir: "auto" }, rowTitle(one, r)),
    h("span", { class: "figures" }, h("b", {}, fixed(r.reward)), g === null ? "" : [h("span", { class: "arrow muted" }, " \u2192 "), h("b", {}, fixed(r.edit.reward)),
      h("span", { class: `delta ${g > 0 ? "up" : g < 0 ? "down" : "same"}` }, (g > 0 ? "+" : "") + fixed(g))]),
    h("span", { class: "snippet muted", dir: "auto" }, visible((r.answer || "").slice(0, 160))));
}

function badges(r) {
  const found = [];
  if (r.drop_reason) found.push([`Dropped from the batch: ${r.drop_reason}`, "bad"]);
  else if (r.held_out) found.push(["Held-out prompt, not trained on", ""]);
  else found.push(["Original in the batch", "good"]);
  if (r.edit) {
    if (r.edit.drop_reason) found.push([`Edit dropped from the batch: ${r.edit.drop_reason}`, "bad"]);
    else if (r.edit.selected) found.push(["Edit in the batch", "good"]);
    else if (!r.held_out) found.push(["Edit not selected for the batch", ""]);
  }
  if (r.truncated) found.push(["Original cut off at the limit", "bad"]);
  if (r.edit?.truncated) found.push(["Edit cut off at the limit", "bad"]);
  if (r.audit) found.push([`Audit: judged again ${number(r.audit.again)}${r.audit.second === null || r.audit.second === undefined ? "" : `, second judge ${number(r.audit.second)}`}`, ""]);
  return h("p", { class: "badges" }, found.map(([text, kind]) => h("span", { class: `badge ${kind}` }, visible(text))));
}

// A prompt as the policy read it, control tokens included: a template of the run with the texts of a rollout.
function promptBlock(title, template, texts) {
  const filled = template.replace(/\{(persona|question|answer|critique)\}/g, (_, name) => texts[name]);
  return h("details", { class: "prompt" }, h("summary", {}, title), said(filled));
}

function promptBlocks(one, r) {
  if (!one.templates) return null;
  const { persona, persona_text, question } = one.prompts[r.prompt];
  const texts = { persona: persona_text ?? persona, question, answer: r.answer, critique: r.critique };
  return [promptBlock("Prompt, as the policy read it", one.templates.prompt, texts),
    r.edit ? promptBlock("Edit prompt, as the policy read it", one.templates.prompt + one.templates.edit, texts) : null];
}

function responseBlock(title, response, before) {
  const colored = state.color !== "off" && response.tokens;
  let body;
  if (colored) body = tokenText(response.tokens);
  else if (before && state.text === "diff") body = wordDiff(before.answer, response.answer);
  else body = said(response.answer);
  const side = [];
  if (before && !colored && state.text === "diff") side.push(h("span", { class: "key" }, h("ins", {}, "added"), " ", h("del", {}, "removed")));
  if (state.color !== "off" && !response.tokens) side.push(h("span", { class: "muted" }, "no token figures for this response"));
  return h("section", { class: "block" }, h("h3", {}, title, h("span", { class: "side" }, side)), body);
}

function rolloutDetail(one, i) {
  const r = one.rows[i], prompt = one.prompts[r.prompt];
  const same = one.rows.filter((x) => x.prompt === r.prompt), steps = [...new Set(same.map((x) => x.step))];
  const others = same.length > 1
    ? h("button", { class: "quiet", id: "same-prompt", onclick: () => set({ ...Object.fromEntries(FILTER.map((n) => [n, DEFAULTS[n]])), prompt: r.prompt, row: state.row }) },
        `This prompt: ${plural(same.length, "rollout")}` + (steps.length > 1 ? ` in ${steps.length} steps` : "")) : null;
  const hasTokens = r.tokens || r.edit?.tokens;
  return h("article", { class: "detail" },
    h("header", {},
      h("p", { class: "crumbs" }, h("button", { class: "quiet back", onclick: () => set({ row: "" }) }, "\u2190 List"),
        h("span", {}, `Step ${r.step}`), h("span", {}, `sample ${r.sample}`), h("span", {}, visible(r.prompt)), prompt.topic ? h("span", {}, visible(prompt.topic)) : null, others),
      personaBox(prompt.persona, prompt.question), badges(r)),
    h("div", { class: "columns" },
      h("div", { class: "flow" },
        h("div", { class: "switches" }, r.edit ? segmented("text", "Edit as", [["diff", "Diff"], ["plain", "Text"]]) : null,
          hasTokens ? [h("span", { class: "muted" }, "Tokens"), segmented("color", "Colour tokens by", COLORINGS)] : null),
        state.color !== "off" && hasTokens ? colorKey() : null,
        responseBlock("Original", r),
        r.critique ? h("section", { class: "block critique" }, h("h3", {}, "Critique"), said([r.checks, r.critique].filter(Boolean).join("\n"))) : null,
        r.edit ? responseBlock("Edit", r.edit, r) : null,
        r.edit?.critique ? h("section", { class: "block critique after" }, h("h3", {}, "Critique of the edit"), said([r.edit.checks, r.edit.critique].filter(Boolean).join("\n"))) : null,
        promptBlocks(one, r)),
      h("aside", {}, scoreTable(r.edit ? [r, r.edit] : [r], r.edit ? ["Original", "Edit"] : ["Original"], Boolean(r.edit)))));
}

views.rollouts = {
  mount(main) {
    const one = run();
    if (!one.rows.length) return main.append(h("p", { class: "empty" }, "No rollouts yet. They are written at the end of a step."));
    main.append(h("div", { class: "panes" }, h("div", { class: "list", id: "list" }), h("div", { class: "reader", id: "reader" })));
    this.fill();
  },
  fill() {
    const one = run(), { rows } = matching(), list = document.getElementById("list");
    list.replaceChildren();
    list.scrollTop = 0;
    if (!rows.length) list.append(h("p", { class: "empty" }, "Nothing matches. ", h("button", { class: "quiet", onclick: clearFilter }, "Clear the filter")));
    else this.list = growingList(list, rows.length, (k) => rolloutItem(one, rows[k]));
    this.read();
  },
  read() {
    const one = run(), { rows } = matching(), wide = matchMedia("(min-width: 900px)").matches;
    const chosen = state.row !== "" && one.rows[state.row] ? Number(state.row) : wide ? rows[0] : undefined;
    const reader = document.getElementById("reader");
    document.getElementById("main").classList.toggle("reading", state.row !== "");
    reader.replaceChildren(chosen === undefined ? "" : rolloutDetail(one, chosen));
    reader.scrollTop = 0;
    for (const item of document.querySelectorAll(".item[aria-current]")) item.removeAttribute("aria-current");
    const k = rows.indexOf(chosen);
    if (k >= 0) {
      this.list.upTo(k);
      const item = document.querySelector(`.item[data-row="${chosen}"]`);
      item.setAttribute("aria-current", "true");
      if (wide) scrollInside(item, document.getElementById("list"));
      else if (state.row !== "") window.scrollTo(0, 0);
    }
    this.at = k;
  },
  update(changed) {
    if (!run().rows.length) return;
    if (FILTER.some((name) => changed.has(name))) this.fill();
    else if (changed.has("row")) this.read();
    else if (changed.has("text") || changed.has("color")) {
      const reader = document.getElementById("reader"), place = reader.scrollTop;
      const focused = document.activeElement?.closest?.(".segmented")?.id;
      this.read();
      reader.scrollTop = place;
      if (focused) document.querySelector(`#${focused} [aria-pressed="true"]`)?.focus();
    }
  },
  key(event) {
    const { rows } = matching();
    if (event.key === "t") {
      const names = COLORINGS.map(([name]) => name);
      set({ color: names[(names.indexOf(state.color) + 1) % names.length] }, true);
    }
    const by = { j: 1, k: -1 }[event.key];
    if (by && rows.length) set({ row: String(rows[Math.max(0, Math.min(rows.length - 1, (this.at ?? -1) + by))]) }, state.row !== "");
  },
};

// Scrolls the list, not the page.
function scrollInside(item, box) {
  const top = item.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top + item.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 3;
}

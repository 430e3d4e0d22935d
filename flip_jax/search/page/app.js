// The page: what was asked, asking it, and showing the answer.

import { Filters } from "./filters.js";
import { Results, pictureAddress } from "./results.js";
import { COLOURS, Sketch, WIDTHS } from "./sketch.js";
import { WORDS } from "./words.js";

const byId = (id) => document.getElementById(id);
const PAGE = 24; // faces shown at first, and added by "more"
const info = await ask("/api/info");

let language = remembered() ?? (navigator.language.startsWith("zh") ? "zh" : "en");
let words = WORDS[language];
let picture = null; // {blob, address, kind: "photo" | "sketch"} or {face}
let answer = null;
let count = PAGE;
let running = null; // AbortController of the search under way

const filters = new Filters(byId("groups"), info.attributes, () => search());
const results = new Results(info.version, (face) => attach({ face }));
const sketch = new Sketch(byId("canvas"), sketchChanged);

function remembered() {
  try {
    const kept = localStorage.getItem("language");
    return kept in WORDS ? kept : null;
  } catch {
    return null; // storage is switched off
  }
}

// The JSON at an address; throws {code} for an error.
async function ask(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : { code: "offline" };
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw body.error ?? { code: "other" };
  return body;
}

function base64(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed({ code: "picture_damaged" });
    reader.readAsDataURL(blob);
  });
}

async function search(wanted = PAGE) {
  running?.abort();
  const turn = (running = new AbortController());
  count = wanted;
  showError(null);
  showFilters();
  const query = { text: byId("text").value, count, rerank: byId("rerank").checked };
  query.filters = Object.fromEntries(filters.chosen);
  byId("found").textContent = words.searching;
  byId("timing").textContent = "";
  byId("results").setAttribute("aria-busy", "true");
  const slow = setTimeout(() => count === PAGE && results.wait(12), 250);
  try {
    if (picture?.blob) query.picture = await base64(picture.blob);
    if (picture?.face !== undefined) query.face = picture.face;
    const body = JSON.stringify(query);
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body, signal: turn.signal };
    const found = await ask("/api/search", options);
    if (turn !== running) return;
    answer = found;
    showAnswer();
  } catch (error) {
    if (error.name === "AbortError" || turn !== running) return;
    if (String(error.code).startsWith("picture")) {
      picture = null; // the faces found before stay
      showPicture();
    } else {
      answer = null;
    }
    showAnswer();
    showError(error);
  } finally {
    clearTimeout(slow);
    if (turn === running) {
      running = null;
      byId("results").removeAttribute("aria-busy");
    }
  }
}

function showAnswer() {
  const faces = answer?.faces ?? [];
  results.show(faces, language, words);
  const best = picture?.kind === "sketch" ? faces.slice(0, 6) : [];
  byId("best").replaceChildren(...best.map((face, place) =>
    thumb(face.face, words.rank(place + 1), "thumb large", () =>
      results.open(face, language, words))));
  // Nothing was asked: these are just the first.
  const browsing = faces.length > 0 && faces[0].cosine === null && !filters.chosen.size;
  byId("found").textContent = answer ? words.results(faces.length) : "";
  if (browsing) byId("found").textContent = words.browse;
  if (answer && !faces.length) byId("found").textContent = words.none;
  const parts = [];
  if (filters.chosen.size && answer) {
    parts.push(words.matching(number(answer.matching), number(answer.total)));
  }
  if (answer) {
    const spent = Object.values(answer.milliseconds).reduce((sum, ms) => sum + ms, 0);
    parts.push(words.took(spent < 10 ? spent.toFixed(1) : Math.round(spent)));
  }
  byId("timing").textContent = parts.join(" · ");
  byId("notes").replaceChildren(...(answer?.notes ?? []).map((note) => {
    const line = document.createElement("li");
    line.textContent = words.notes[note.code]?.(note) ?? note.code;
    return line;
  }));
  const rest = answer && faces.length === count && answer.matching > count;
  byId("more").hidden = !rest || count + PAGE > info.limits.count;
  byId("legend").hidden = !faces.some((face) => face.cosine !== null);
}

function showFilters() {
  byId("chosen").replaceChildren(...filters.chips(language, words));
  byId("filter-count").textContent = filters.chosen.size;
  byId("filter-count").hidden = !filters.chosen.size;
}

function showError(error) {
  byId("alert").hidden = error === null;
  if (error === null) return;
  const limits = {
    megabytes: info.limits.picture_bytes / 2 ** 20,
    megapixels: info.limits.picture_pixels / 1e6,
    text: info.limits.text,
  };
  byId("alert").textContent = (words.errors[error.code] ?? words.errors.other)(limits);
}

// Sets the picture of the query; null removes it.
function attach(given) {
  if (picture?.address) URL.revokeObjectURL(picture.address);
  picture = given;
  if (picture?.blob) picture.address = URL.createObjectURL(picture.blob);
  if (picture && picture.kind !== "sketch") closeSketch();
  showPicture();
  search();
  if (picture && picture.kind !== "sketch") scrollTo({ top: 0, behavior: "smooth" });
}

function showPicture() {
  const shown = picture !== null && picture.kind !== "sketch";
  byId("attached").hidden = !shown;
  if (!shown) return;
  byId("attached-name").textContent = picture.blob ? words.yourPicture : words.thisFace;
  const address = picture.address ?? pictureAddress(picture.face, info.version);
  byId("attached-picture").src = address;
}

function attachFile(file) {
  if (!file) return;
  if (file.size > info.limits.picture_bytes) {
    showError({ code: "picture_bytes" });
    return;
  }
  attach({ blob: file, kind: "photo" });
}

async function sketchChanged() {
  if (sketch.empty) {
    if (picture?.kind === "sketch") attach(null);
    return;
  }
  const blob = await sketch.blob();
  if (!byId("drawing").hidden) attach({ blob, kind: "sketch" });
}

function openSketch() {
  byId("drawing").hidden = false;
  byId("sketch").setAttribute("aria-expanded", "true");
  if (!sketch.empty) sketchChanged();
}

function closeSketch() {
  byId("drawing").hidden = true;
  byId("sketch").setAttribute("aria-expanded", "false");
}

function showPens() {
  const pens = (values, key, paint, names) => values.map((value, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "pen";
    button.setAttribute("aria-label", names[place]);
    button.title = names[place];
    button.setAttribute("aria-pressed", String(sketch[key] === value));
    paint(button, value);
    button.addEventListener("click", () => {
      sketch[key] = value;
      showPens();
    });
    return button;
  });
  const dot = (button, width) => {
    const mark = document.createElement("i");
    mark.style.width = mark.style.height = `${4 + width / 2.2}px`;
    button.append(mark);
  };
  const fill = (button, colour) => (button.style.backgroundColor = colour);
  byId("colours").replaceChildren(...pens(COLOURS, "colour", fill, words.colours));
  byId("widths").replaceChildren(...pens(WIDTHS, "width", dot, words.widths));
}

// A small picture of a face that does something.
function thumb(face, label, name, run) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = name;
  made.setAttribute("aria-label", label);
  made.title = label;
  const shown = document.createElement("img");
  shown.src = pictureAddress(face, info.version);
  shown.alt = "";
  made.append(shown);
  made.addEventListener("click", run);
  return made;
}

function showExamples() {
  const { captions, faces, sketches } = info.examples;
  const texts = captions.slice(0, 4).map((text) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "chip";
    chip.lang = "en";
    chip.textContent = text;
    chip.addEventListener("click", () => {
      byId("text").value = text;
      picture = null;
      closeSketch();
      showPicture();
      search();
    });
    return chip;
  });
  byId("example-texts").replaceChildren(...texts);
  const pictures = faces.slice(0, 4).map((face) =>
    thumb(face, words.exampleFace, "thumb", () => {
      byId("text").value = "";
      attach({ face });
    }));
  const drawn = sketches.slice(0, 2).map((face) =>
    thumb(face, words.exampleSketch, "thumb pencil", async () => {
      byId("text").value = "";
      attach(null);
      openSketch();
      byId("drawing").scrollIntoView({ block: "nearest", behavior: "smooth" });
      await sketch.play(await ask(`/api/strokes/${face}?v=${info.version}`));
    }));
  byId("example-faces").replaceChildren(...pictures, ...drawn);
  byId("examples").hidden = false;
}

const number = (value) => value.toLocaleString(language === "zh" ? "zh-CN" : "en-GB");

function speak(chosen) {
  language = chosen;
  words = WORDS[language];
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = words.title;
  for (const place of document.querySelectorAll("[data-word]")) {
    place.textContent = words[place.dataset.word];
  }
  byId("about").textContent = words.about(number(info.faces), number(info.step));
  byId("text").placeholder = words.placeholder;
  byId("canvas").setAttribute("aria-label", words.canvas);
  byId("colours").setAttribute("aria-label", words.colour);
  byId("widths").setAttribute("aria-label", words.width);
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
  filters.render(language, words);
  showPens();
  showExamples();
  showFilters();
  showPicture();
  showAnswer();
}

function listen() {
  byId("query").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  byId("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      search();
    }
  });
  byId("rerank").addEventListener("change", () => search());
  byId("more").addEventListener("click", () => search(count + PAGE));
  byId("photo").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    attachFile(byId("file").files[0]);
    byId("file").value = ""; // so that the same file can be chosen again
  });
  byId("detach").addEventListener("click", () => attach(null));
  byId("sketch").addEventListener("click", () => {
    if (byId("drawing").hidden) {
      openSketch();
      return;
    }
    closeSketch();
    if (picture?.kind === "sketch") attach(null);
  });
  byId("undo").addEventListener("click", () => sketch.undo());
  byId("clear").addEventListener("click", () => sketch.clear());
  for (const button of document.querySelectorAll("[data-language]")) {
    button.addEventListener("click", () => {
      speak(button.dataset.language);
      try {
        localStorage.setItem("language", language);
      } catch {
        // storage is switched off; the choice lasts for this visit
      }
    });
  }
  const card = byId("query");
  let inside = 0;
  const mark = (change) => {
    inside = Math.max(0, inside + change);
    card.classList.toggle("dropping", inside > 0);
  };
  card.addEventListener("dragenter", () => mark(1));
  card.addEventListener("dragleave", () => mark(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault(); // a picture that misses the card must not replace the page
    mark(-inside);
    attachFile(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) attachFile(event.clipboardData.files[0]);
  });
  byId("filters").open = matchMedia("(min-width: 900px)").matches;
}

speak(language);
listen();
search();

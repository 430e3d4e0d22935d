// Faces found: cards in a grid, and one of them in detail.

import { attributeName } from "./words.js";

const byId = (id) => document.getElementById(id);

export const pictureAddress = (face, version) => `/pictures/${face}?v=${version}`;

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

const percent = (share) => `${(100 * share).toFixed(share > 0.0995 ? 0 : 1)} %`;

function score(name, value, share) {
  const line = element("span", `score ${name}`);
  line.append(element("small", "", name === "match" ? "ITM" : "cos"), element("b", "", value));
  const bar = element("i");
  bar.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  line.append(bar);
  return line;
}

function scores(face) {
  const lines = [];
  if (face.cosine !== null) lines.push(score("cosine", face.cosine.toFixed(3), face.cosine));
  if (face.match !== null) lines.push(score("match", percent(face.match), face.match));
  return lines;
}

export class Results {
  // `similar` is called with the number of a face to search with.
  constructor(version, similar) {
    this.version = version;
    this.shown = null;
    byId("similar").addEventListener("click", () => {
      byId("detail").close();
      similar(this.shown.face);
    });
    byId("detail").addEventListener("click", (event) => {
      if (event.target === byId("detail")) byId("detail").close(); // outside of its content
    });
  }

  show(faces, language, words) {
    byId("grid").replaceChildren(...faces.map((face, place) => {
      const card = element("li", "face");
      const button = element("button");
      button.type = "button";
      const picture = element("img");
      picture.src = pictureAddress(face.face, this.version);
      picture.alt = face.captions[0] ?? words.face(face.id);
      picture.loading = "lazy";
      picture.decoding = "async";
      button.append(picture, element("span", "rank", place + 1), ...scores(face));
      button.setAttribute("aria-label", [
        words.rank(place + 1),
        face.cosine === null ? "" : `cos ${face.cosine.toFixed(3)}`,
        face.match === null ? "" : `ITM ${percent(face.match)}`,
        face.captions[0] ?? "",
      ].filter(Boolean).join(", "));
      button.addEventListener("click", () => this.open(face, language, words));
      card.append(button);
      return card;
    }));
  }

  // Grey cards while a search runs.
  wait(count) {
    const empty = Array.from({ length: count }, () => element("li", "face waiting"));
    byId("grid").replaceChildren(...empty);
  }

  open(face, language, words) {
    this.shown = face;
    byId("detail-title").textContent = words.face(face.id);
    byId("detail-picture").src = pictureAddress(face.face, this.version);
    byId("detail-picture").alt = face.captions[0] ?? words.face(face.id);
    byId("detail-scores").replaceChildren(...scores(face));
    byId("close").setAttribute("aria-label", words.close);
    const captions = face.captions.map((text) => element("li", "", text));
    byId("detail-captions").replaceChildren(...captions);
    byId("detail-captions").lang = "en";
    const names = face.attributes.map((name) =>
      element("span", "chip plain", attributeName(name, language)));
    byId("detail-attributes").replaceChildren(...names);
    byId("detail").showModal();
  }
}

// The panel of the 40 attributes: each any, yes, no or unknown.

import { GROUPS, attributeName } from "./words.js";

const SIGNS = { yes: "✓", no: "✕", unknown: "?" };

export class Filters {
  // `counts`: faces per attribute and state; `changed` is called when a filter is set or removed.
  constructor(panel, counts, changed) {
    this.panel = panel;
    this.counts = counts;
    this.changed = changed;
    this.chosen = new Map(); // attribute -> state
  }

  set(name, state) {
    if (state === null) this.chosen.delete(name);
    else this.chosen.set(name, state);
    this.press();
    this.changed();
  }

  clear() {
    this.chosen.clear();
    this.press();
    this.changed();
  }

  // Makes the panel anew in a language.
  render(language, words) {
    this.panel.replaceChildren();
    for (const [group, attributes] of Object.entries(GROUPS)) {
      const set = document.createElement("fieldset");
      const legend = document.createElement("legend");
      legend.textContent = words.groups[group];
      set.append(legend);
      for (const [name] of attributes) set.append(this.row(name, language, words));
      this.panel.append(set);
    }
    this.press();
  }

  row(name, language, words) {
    const row = document.createElement("div");
    row.className = "filter";
    const label = document.createElement("span");
    label.textContent = attributeName(name, language, true);
    row.append(label);
    const states = Object.entries(this.counts[name]);
    for (const [state, count] of states) {
      if (state === "unknown" && count === 0) continue; // all labels are known
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.attribute = name;
      button.dataset.state = state;
      button.textContent = SIGNS[state];
      const full = words.is(attributeName(name, language), words[state]);
      button.setAttribute("aria-label", full);
      button.title = `${full} (${count})`;
      button.disabled = count === 0;
      button.addEventListener("click", () => {
        this.set(name, this.chosen.get(name) === state ? null : state);
      });
      row.append(button);
    }
    return row;
  }

  press() {
    for (const button of this.panel.querySelectorAll("button")) {
      const { attribute, state } = button.dataset;
      button.setAttribute("aria-pressed", String(this.chosen.get(attribute) === state));
    }
  }

  // One chip per filter, to remove it.
  chips(language, words) {
    const chips = [...this.chosen].map(([name, state]) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.className = "chip on";
      chip.textContent = `${words.is(attributeName(name, language), words[state])} ×`;
      chip.setAttribute("aria-label",
        `${words.remove} ${words.is(attributeName(name, language), words[state])}`);
      chip.addEventListener("click", () => this.set(name, null));
      return chip;
    });
    if (chips.length > 1) {
      const all = document.createElement("button");
      all.type = "button";
      all.className = "chip";
      all.textContent = words.clearAll;
      all.addEventListener("click", () => this.clear());
      chips.push(all);
    }
    return chips;
  }
}

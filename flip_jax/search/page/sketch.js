// A sheet of paper: strokes in order, so that the last can be taken back.

export const COLOURS = ["#22262e", "#f0c8a4", "#b67c52", "#5c3a2a", "#7a4e28", "#e2b96c", "#b4b4ba",
  "#c4314b", "#4a78a8", "#ffffff"];
export const WIDTHS = [3, 12, 40]; // pixels of the sheet

export class Sketch {
  // `changed` is called after each change of the picture.
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.colour = COLOURS[0];
    this.width = WIDTHS[0];
    this.strokes = [];
    this.replay = 0; // number of the animation that may draw
    this.paint();
    let pen = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || pen !== null) return;
      event.preventDefault();
      this.replay += 1;
      pen = event.pointerId;
      canvas.setPointerCapture(pen);
      this.strokes.push({ colour: this.colour, width: this.width, points: [this.place(event)] });
      this.paint();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerId !== pen) return;
      for (const part of event.getCoalescedEvents?.() ?? [event]) {
        this.strokes.at(-1).points.push(this.place(part));
      }
      this.paint();
    });
    const lift = (event) => {
      if (event.pointerId !== pen) return;
      pen = null;
      this.changed();
    };
    canvas.addEventListener("pointerup", lift);
    canvas.addEventListener("pointercancel", lift);
  }

  get empty() {
    return this.strokes.length === 0;
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  paint() {
    const pen = this.canvas.getContext("2d");
    pen.fillStyle = "#ffffff";
    pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    pen.lineCap = pen.lineJoin = "round";
    for (const { colour, width, points } of this.strokes) {
      pen.strokeStyle = colour;
      pen.lineWidth = width;
      pen.beginPath();
      pen.moveTo(...points[0]);
      for (const point of points) pen.lineTo(...point);
      pen.stroke();
    }
  }

  undo() {
    this.replay += 1;
    this.strokes.pop();
    this.paint();
    this.changed();
  }

  clear() {
    this.replay += 1;
    this.strokes = [];
    this.paint();
    this.changed();
  }

  // Draws the strokes of a record one after the other; `size` is the side of their picture.
  async play({ size, strokes }) {
    const turn = (this.replay += 1);
    const scale = this.canvas.width / size;
    this.strokes = [];
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    for (const line of strokes) {
      const points = line.map(([x, y]) => [(x + 0.5) * scale, (y + 0.5) * scale]);
      this.strokes.push({ colour: COLOURS[0], width: WIDTHS[0], points });
      if (still) continue;
      this.paint();
      await new Promise((done) => setTimeout(done, 900 / strokes.length));
      if (turn !== this.replay) return;
    }
    this.paint();
    this.changed();
  }

  blob() {
    return new Promise((done) => this.canvas.toBlob(done, "image/png"));
  }
}

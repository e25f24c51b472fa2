// What is on the page. All names are set as text; what is decided is stored before the page goes on.
"use strict";

const $ = (id) => document.getElementById(id);
let current = -1, shown = null, hidden = false;

function listed() {
  const wanted = $("filter").value, name = $("of-class").value;
  const fits = (image) => (wanted === "all" || image.decision === wanted) && (!name || image.tags.includes(name));
  return run.images.map((_, number) => number).filter((number) => fits(run.images[number]));
}

// The next or previous image on the list; after a decision the next undecided one if the list holds all.
function neighbour(step, decided) {
  let list = listed();
  if (decided && $("filter").value === "all") list = list.filter((n) => run.images[n].decision === "undecided");
  const ahead = step > 0 ? list.find((n) => n > current) : list.findLast((n) => n < current);
  return ahead ?? (step > 0 ? list[0] : list.at(-1)) ?? -1;
}

function first() {
  const list = listed();
  return list.find((number) => run.images[number].decision === "undecided") ?? list[0] ?? -1;
}

async function show(number) {
  current = number;
  shown = null;
  if (number < 0) return empty();
  const found = await picture(number).catch((fault) => fault);
  if (number !== current) return;
  if (found instanceof Error) return empty(found.message);
  shown = found;
  say("");
  for (const canvas of [$("photo"), $("mask")]) [canvas.width, canvas.height] = [found.width, found.height];
  $("photo").getContext("2d").drawImage(found.photo, 0, 0, found.width, found.height);
  sliders();
  draw();
  for (const near of [neighbour(1, true), neighbour(1, false)]) if (near >= 0) picture(near).catch(() => undefined);
}

function empty(why) {
  const done = run.images.every((image) => image.decision !== "undecided");
  $("legend").replaceChildren();
  $("origin").textContent = "";
  say(why ?? (done ? "Everything is decided. Export takes it from here." : "No image is left on this list."));
  sliders();
  draw();
}

function draw() {
  const image = run.images[current], ready = Boolean(shown);
  document.body.classList.toggle("empty", !ready);
  if (ready) {
    const scores = scoresOf(image), own = Object.keys(scores).length > 0;
    const mask = own ? maskOf(shown.maps, shown.maps.classes.map((k) => scores[run.classes[k].name])) : shown.mask;
    const pixels = paint(mask, shown.height, shown.width, run.classes.map((known) => known.colour));
    $("mask").getContext("2d").putImageData(pixels, 0, 0);
    $("mask").style.opacity = hidden ? 0 : $("opacity").value;
    $("origin").textContent = own ? `of the maps${run.crf ? ", no CRF" : ""}` : `of the run${run.crf ? ", with CRF" : ""}`;
    $("reset").disabled = !own;
    legend(image, mask);
    fit();
  }
  $("name").textContent = image ? image.name : "";
  $("status").textContent = image ? image.decision : "";
  $("status").className = image ? `chip ${image.decision}` : "";
  $("place").textContent = image ? `${current + 1} of ${run.images.length}` : "";
  $("certainty").textContent = image ? image.certainty.toFixed(2) : "";
  $("hide").setAttribute("aria-pressed", String(hidden));
  $("opacity-value").textContent = `${Math.round($("opacity").value * 100)} %`;
  counts();
}

function legend(image, mask) {
  const pixels = new Uint32Array(256);
  for (let i = 0; i < mask.length; i++) pixels[mask[i]] += 1;
  const share = (k) => (pixels[k] ? `${(100 * pixels[k] / mask.length).toFixed(1)} %` : "");
  const rows = run.classes.map((known, k) => [known, k + 1]).filter(([known]) => image.tags.includes(known.name));
  $("legend").replaceChildren(...rows.map(([known, k]) => entry(known, share(k))));
  if (pixels[255]) $("legend").append(entry({ name: "ignored", colour: IGNORED }, share(255)));
  if (!rows.length) $("legend").append(element("li", "no tags: all background", "muted"));
}

function entry(known, share) {
  const row = element("li", ""), swatch = element("i", "", "swatch");
  swatch.style.background = `rgb(${known.colour})`;
  row.append(swatch, element("span", known.name), element("output", share || "not in the mask", share ? "" : "warn"));
  return row;
}

function element(tag, text, kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = kind;
  return made;
}

// The sliders of the image that is shown; moving one of them does not build them again.
function sliders() {
  const image = run.images[current];
  $("thresholds").hidden = !shown || !image.tags.length;
  $("by-class").replaceChildren();
  if (!shown) return;
  for (const name of image.tags) {
    const words = `All “${name}” images`, slider = document.createElement("input"), row = element("div", "", "row");
    Object.assign(slider, { type: "range", min: 0, max: 0.99, step: 0.01, ariaLabel: words });
    slider.dataset.name = name;
    slider.addEventListener("input", () => moveClass(name, Number(slider.value)));
    const back = element("button", "×", "quiet small");
    back.title = "No score for this class";
    back.addEventListener("click", () => moveClass(name, null));
    row.append(element("span", words), back, element("output", ""), slider);
    $("by-class").append(row);
  }
  levels();
}

function levels() {
  const image = run.images[current];
  if (!image) return;
  const values = image.tags.map((name) => valueIn(scoresOf(image), name)), same = values.every((v) => v === values[0]);
  if (document.activeElement !== $("own") || same) $("own").value = values.length ? Math.max(...values) : run.score;
  $("own-value").textContent = same && values.length ? values[0].toFixed(2) : "by class";
  for (const row of $("by-class").children) {
    const slider = row.querySelector("input"), value = valueIn(run.classScores, slider.dataset.name);
    slider.value = value;
    row.querySelector("output").textContent = value.toFixed(2);
    row.querySelector("button").hidden = !Object.hasOwn(run.classScores, slider.dataset.name);
  }
}

function moveOwn(value) {
  const image = run.images[current];
  if (!shown || !image.tags.length) return;
  const score = Math.min(0.99, Math.max(0, Math.round(value * 100) / 100));
  touched(image, Object.fromEntries(image.tags.map((name) => [name, score])));
}

function moveClass(name, value) {
  if (value === null) delete run.classScores[name];
  else run.classScores[name] = value;
  unsaved.classes.add(name);
  touched(run.images[current], {});
}

function asRun() {
  const image = run.images[current];
  if (!shown || !Object.keys(scoresOf(image)).length) return;
  touched(image, {});
  image.asRun = true;
  levels();
  draw();
}

// The mask of an image is another one now: what was decided on the old one does not hold for it.
function touched(image, scores) {
  const own = (value) => Object.keys(value).length;
  const changed = own(scores) || own(image.scores) || image.decision !== "undecided";
  if (image.decision !== "undecided") toast(`Its mask changed: undecided again, it was ${image.decision}.`);
  Object.assign(image, { scores, decision: "undecided", asRun: false });
  if (changed) unsaved.image = current;
  clearTimeout(unsaved.timer);
  unsaved.timer = setTimeout(() => later(save), 300);
  levels();
  draw();
}

function decide(decision) {
  return later(async () => {
    if (!shown) return; // nobody decides on what is not on the screen
    const number = current, image = run.images[number], scores = scoresOf(image);
    const before = { number, decision: image.decision, scores: image.scores };
    await save();
    await ask("decide", { image: number, decision, scores });
    Object.assign(image, { decision, scores });
    undoable.push(before);
    toast("");
    await show(neighbour(1, true));
  });
}

function undo() {
  return later(async () => {
    await save();
    const here = run.images[current];
    const last = undoable.at(-1) ?? { number: current, decision: "undecided", scores: here?.scores };
    if (!undoable.length && (!here || here.decision === "undecided")) return;
    await ask("decide", { image: last.number, decision: last.decision, scores: last.scores });
    undoable.pop();
    Object.assign(run.images[last.number], { decision: last.decision, scores: last.scores, asRun: false });
    toast(`Undone: ${run.images[last.number].name} is ${last.decision}.`);
    await show(last.number);
  });
}

function go(step) {
  return later(async () => {
    await save();
    await show(neighbour(step, false));
  });
}

function counts() {
  const found = Object.fromEntries(["undecided", ...DONE].map((word) => [word, 0]));
  for (const image of run.images) found[image.decision] += 1;
  const total = run.images.length, done = total - found.undecided;
  for (const word of DONE) $(`done-${word}`).style.width = `${100 * found[word] / Math.max(total, 1)}%`;
  $("progress").setAttribute("aria-valuenow", String(Math.round(100 * done / Math.max(total, 1))));
  $("decided").textContent = `${done} of ${total} decided`;
  for (const option of $("filter").options) {
    option.textContent = `${option.value} (${option.value === "all" ? total : found[option.value]})`;
  }
}

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
  $("frame").hidden = Boolean(text);
}

let fading = 0;
function toast(text, bad = false) {
  clearTimeout(fading);
  Object.assign($("toast"), { textContent: text, hidden: !text, className: bad ? "bad" : "" });
  if (text && !bad) fading = setTimeout(() => { $("toast").hidden = true; }, 3500);
}

// As large as the place allows, in its own proportions.
function fit() {
  if (!shown) return;
  const room = $("stage").getBoundingClientRect(), border = 24;
  const scale = Math.min((room.width - border) / shown.width, (room.height - border) / shown.height, 12);
  for (const side of ["width", "height"]) $("frame").style[side] = `${Math.max(1, Math.floor(shown[side] * scale))}px`;
}

const ONCE = ["a", "r", "f", "u", " ", "?"]; // held down, they act once
const KEYS = {
  a: () => decide("accepted"), r: () => decide("rejected"), f: () => decide("flagged"), u: undo,
  ArrowRight: () => go(1), ArrowLeft: () => go(-1), " ": hide, 0: asRun,
  "+": () => nudge(0.01), "=": () => nudge(0.01), "-": () => nudge(-0.01),
  "?": () => $("help").showModal(),
};

function hide() {
  hidden = !hidden;
  draw();
}

function nudge(step) {
  const image = run.images[current];
  if (image?.tags.length) moveOwn(Math.max(...image.tags.map((name) => valueIn(scoresOf(image), name))) + step);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const at = event.target, typed = at instanceof HTMLInputElement || at instanceof HTMLSelectElement;
  if (typed && event.key.startsWith("Arrow") || at instanceof HTMLSelectElement) return;
  if (event.key === " " && at.matches("button, summary")) return; // it presses what has the focus
  if (event.key === "Escape" && typed) at.blur();
  else if (Object.hasOwn(KEYS, event.key) && !(event.repeat && ONCE.includes(event.key))) KEYS[event.key]();
  else return;
  event.preventDefault();
});

for (const [id, key] of [["accept", "a"], ["reject", "r"], ["flag", "f"], ["undo", "u"], ["previous", "ArrowLeft"],
  ["next", "ArrowRight"], ["hide", " "], ["reset", "0"], ["open-help", "?"]]) {
  $(id).addEventListener("click", () => {
    $(id).blur();
    KEYS[key]();
  });
}
$("own").addEventListener("input", () => moveOwn(Number($("own").value)));
$("opacity").addEventListener("input", () => { hidden = false; draw(); });
for (const id of ["filter", "of-class"]) {
  $(id).addEventListener("change", () => {
    $(id).blur();
    later(async () => {
      await save();
      await show(listed().includes(current) ? current : first());
    });
  });
}
addEventListener("resize", fit);
addEventListener("pagehide", () => unsent().forEach(([path, value]) => ask(path, value).catch(() => undefined)));

async function start() {
  Object.assign(run, await (await ask("state.json")).json());
  document.title = `Review: ${run.title}`;
  $("title").textContent = run.title;
  $("filter").append(...["all", "undecided", ...DONE].map((word) => new Option(word, word)));
  $("of-class").append(new Option("any class", ""), ...run.classes.map((known) => new Option(known.name, known.name)));
  $("about-masks").textContent = run.crf
    ? "You start with the masks of the run, whose edges a CRF has drawn. Once you move a background score, the mask is that of the soft maps, without the CRF."
    : "You start with the masks of the run. Once you move a background score, the mask follows from the soft maps.";
  await show(first());
}

start().catch((fault) => say(fault.message));

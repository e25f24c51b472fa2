// What the page knows of the run, and how it is fetched and stored. No element of the page is touched here.
"use strict";

const DONE = ["accepted", "rejected", "flagged"];
const run = { images: [], classes: [], classScores: {}, score: 0 };
const pictures = new Map(); // number -> promise of what the server has of an image
const undoable = []; // {number, decision, scores} before a decision
const unsaved = { image: null, classes: new Set(), timer: 0 };
let queue = Promise.resolve();

async function ask(path, value) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value), keepalive: true };
  let answer;
  try {
    answer = await fetch(path, value === undefined ? {} : post);
  } catch {
    throw new Error("The server does not answer. Start `tag2mask review` again; what was stored is safe.");
  }
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

async function load(number) {
  const [photo, mask, maps] = await Promise.all(["photo", "mask", "maps"].map((what) => ask(`${what}/${number}`)));
  const made = readMask(await mask.arrayBuffer());
  return {
    photo: await createImageBitmap(await photo.blob()),
    maps: readMaps(await maps.arrayBuffer(), made.height, made.width),
    ...made,
  };
}

function picture(number) {
  if (!pictures.has(number)) {
    const coming = load(number);
    coming.catch(() => pictures.delete(number));
    pictures.set(number, coming);
    if (pictures.size > 6) pictures.delete(pictures.keys().next().value);
  }
  return pictures.get(number);
}

// The score of a class in {name: score}, else the one that the run used.
function valueIn(scores, name) {
  return Object.hasOwn(scores, name) ? scores[name] : run.score;
}

// Which scores make the mask that is shown: the image's own, those of classes while it is undecided, or none.
function scoresOf(image) {
  if (Object.keys(image.scores).length) return image.scores;
  const moved = image.tags.some((name) => Object.hasOwn(run.classScores, name));
  const follows = moved && image.decision === "undecided" && !image.asRun;
  return follows ? Object.fromEntries(image.tags.map((name) => [name, valueIn(run.classScores, name)])) : {};
}

// What sliders moved and the server does not know yet: [path, value, what to forget once it knows]. What moved again
// in the meantime is not forgotten.
function unsent() {
  const scoreNow = (name) => (Object.hasOwn(run.classScores, name) ? run.classScores[name] : null);
  const found = [...unsaved.classes].map((name) => {
    const score = scoreNow(name);
    return ["class", { class: name, score }, () => { if (scoreNow(name) === score) unsaved.classes.delete(name); }];
  });
  const number = unsaved.image, image = run.images[number];
  if (number === null) return found;
  const { decision, scores } = image;
  const forget = () => { if (unsaved.image === number && image.scores === scores) unsaved.image = null; };
  return [...found, ["decide", { image: number, decision, scores }, forget]];
}

async function save() {
  clearTimeout(unsaved.timer);
  for (const [path, value, forget] of unsent()) {
    await ask(path, value);
    forget();
  }
}

function later(work) {
  queue = queue.then(work).catch((fault) => toast(fault.message, true));
  return queue;
}

// Soft maps -> mask, by the same rule as the Python that saves it: bilinear, the largest map wins if it is above the
// background score of its class.
"use strict";

const IGNORED = [224, 224, 192]; // of pixels that are 255, as in the palette

// Half floats as they lie on disk -> numbers.
function halves(bits) {
  const found = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) {
    const exponent = (bits[i] >> 10) & 31, rest = bits[i] & 1023;
    const size = exponent ? (1 + rest / 1024) * 2 ** (exponent - 15) : rest * 2 ** -24;
    found[i] = bits[i] & 32768 ? -size : size;
  }
  return found;
}

// For every place of `large` cells: its left neighbour among `small`, its right one, and the share of the right one.
function places(small, large) {
  const left = new Int32Array(large), right = new Int32Array(large), share = new Float32Array(large);
  for (let i = 0; i < large; i++) {
    const at = Math.max(0, (i + 0.5) * (small / large) - 0.5);
    left[i] = Math.min(Math.floor(at), small - 1);
    right[i] = Math.min(left[i] + 1, small - 1);
    share[i] = at - left[i];
  }
  return { left, right, share };
}

// What /maps/N sends -> {classes, best: largest map [H W], which: its place among the classes [H W]}.
function readMaps(buffer, height, width) {
  const head = new DataView(buffer), word = (n) => head.getUint32(4 * n, true);
  const [count, h, w] = [word(0), word(1), word(2)];
  const classes = Array.from({ length: count }, (_, p) => word(3 + p));
  const maps = halves(new Uint16Array(buffer, 12 + 4 * count, count * h * w));
  const best = new Float32Array(height * width), which = new Uint8Array(height * width);
  const rows = places(h, height), columns = places(w, width);
  for (let p = 0; p < count; p++) {
    for (let y = 0, i = 0; y < height; y++) {
      const up = (p * h + rows.left[y]) * w, down = (p * h + rows.right[y]) * w, below = rows.share[y];
      for (let x = 0; x < width; x++, i++) {
        const a = columns.left[x], b = columns.right[x], s = columns.share[x];
        const value = Math.fround(
          (1 - below) * ((1 - s) * maps[up + a] + s * maps[up + b])
          + below * ((1 - s) * maps[down + a] + s * maps[down + b]));
        if (p === 0 || value > best[i]) {
          best[i] = value;
          which[i] = p;
        }
      }
    }
  }
  return { classes, best, which };
}

// Scores by place among the classes of the maps -> index mask [H W].
function maskOf(maps, scores) {
  const above = Float32Array.from(scores), names = Uint8Array.from(maps.classes, (k) => k + 1);
  const mask = new Uint8Array(maps.best.length);
  for (let i = 0; i < mask.length; i++) {
    const p = maps.which[i];
    if (maps.best[i] > above[p]) mask[i] = names[p];
  }
  return mask;
}

// What /mask/N sends -> {height, width, mask}.
function readMask(buffer) {
  const head = new DataView(buffer);
  return { height: head.getUint32(0, true), width: head.getUint32(4, true), mask: new Uint8Array(buffer, 8) };
}

// An index mask as opaque pixels, the background as none.
function paint(mask, height, width, colours) {
  const pixels = new ImageData(width, height), words = new Uint32Array(pixels.data.buffer);
  const table = new Uint32Array(256);
  const set = (k, [r, g, b]) => { table[k] = (255 << 24 | b << 16 | g << 8 | r) >>> 0; };
  colours.forEach((colour, k) => set(k + 1, colour));
  set(255, IGNORED);
  for (let i = 0; i < mask.length; i++) words[i] = table[mask[i]];
  return pixels;
}

// Shows a caption: each word in the colour of the layer it left at, and the layers used against those skipped.

// Cividis (Nuñez, Anderton and Renslow, PLOS ONE 2018), which looks alike to people with and without colour blindness.
const CIVIDIS = [[255, 234, 70], [219, 198, 88], [182, 165, 107], [149, 143, 120], [124, 123, 120], [102, 105, 112], [64, 77, 107], [0, 51, 111], [0, 32, 77]];

/** `[background, text]` of layer m of n: bright for what left early, dark for what went deep. */
export function layerColours(m, n) {
  const place = n > 1 ? (Math.min(Math.max(m, 1), n) - 1) / (n - 1) * (CIVIDIS.length - 1) : 0;
  const [low, high] = [CIVIDIS[Math.floor(place)], CIVIDIS[Math.ceil(place)]];
  const colour = low.map((value, i) => Math.round(value + (high[i] - value) * (place - Math.floor(place))));
  // Relative luminance and contrast as in WCAG 2.2: the better of black and white is never below 4.5.
  const [r, g, b] = colour.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return [`rgb(${colour})`, (luminance + 0.05) ** 2 > 0.05 * 1.05 ? "#000000" : "#ffffff"];
}

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in made && key !== "list" && key !== "form") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export const number = (value, digits = 2) => (typeof value === "number" ? value.toFixed(digits) : "?");

export const howDecided = (word, layers) =>
  `“${word.text}” left at layer ${word.exit_layer} of ${layers}, entropy ${number(word.entropy)} nats`;

/** One word as an item of a list. With `tell`, it is a button that tells how the word was decided. */
export function wordItem(word, layers, tell) {
  const said = howDecided(word, layers);
  const inside = [element("span", {}, word.text), element("small", { "aria-hidden": "true" }, String(word.exit_layer))];
  const chip = tell
    ? element("button", { type: "button", className: "word", "aria-label": said, title: `entropy ${number(word.entropy)} nats` }, ...inside)
    : element("span", { className: "word button", title: said }, ...inside, element("span", { className: "hidden" }, `, layer ${word.exit_layer}`));
  [chip.style.backgroundColor, chip.style.color] = layerColours(word.exit_layer, layers);
  chip.dataset.layer = word.exit_layer;
  if (tell) for (const kind of ["pointerenter", "focus", "click"]) chip.addEventListener(kind, () => tell(said, word));
  return element("li", {}, chip);
}

export function legend(layers) {
  const shown = Array.from({ length: layers }, (_, i) => {
    const key = element("b", {}, String(i + 1));
    [key.style.backgroundColor, key.style.color] = layerColours(i + 1, layers);
    return key;
  });
  return [element("span", {}, "Left at layer"), ...shown, element("span", {}, "brighter is earlier")];
}

/**
 * `[used, all]` decoder layers of an answer, as the paper counts them. The end of the sentence is a step of its own, and
 * no word: whether there was one, and what it used, follows from the answer's SpeedUp.
 */
export function layersUsed(answer, layers) {
  const words = answer.words.reduce((sum, word) => sum + word.exit_layer, 0);
  const all = layers * (answer.words.length + 1);
  const end = all / answer.speedup - words;
  const ended = end > 0.5 && end < layers + 0.5 && Math.abs(end - Math.round(end)) < 1e-3;
  return ended ? [words + Math.round(end), all] : [words, layers * answer.words.length];
}

/** The bar of layers used against layers skipped, and the same in words. */
export function layersBar(used, all) {
  const part = element("span");
  part.style.width = `${(100 * used) / all}%`;
  const said = `${used} of ${all} decoder layers used, ${all - used} skipped`;
  return [element("div", { className: "bar", role: "img", "aria-label": said }, part), element("p", {}, `${said}.`)];
}

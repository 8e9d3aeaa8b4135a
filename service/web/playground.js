// The playground: holds what was asked and answered, and keeps the page in step with it.

import { ServiceError, caption, getJson } from "./api.js";
import { compareSpeeds } from "./compare.js";
import { curlLine, pythonLines } from "./lines.js";
import { brighten, drawBoxes, watchPhoto } from "./photo.js";
import { element, layersBar, layersUsed, legend, number, wordItem } from "./words.js";

const at = (id) => document.getElementById(id);
const NEAR = 0.04; // how close to a named speed the slider must be to mean it
const LOOK_AGAIN_MS = 1000; // while the service is not ready
const STILL_THERE_MS = 15000; // once it is
const service = new URL(".", location.href).href.replace(/\/$/, "");

const now = { key: "", file: null, tiers: [], layers: 6, ready: false, wanted: false, asking: null, answer: null };

// ---- the service

async function watchService() {
  const { key } = now;
  let wait = LOOK_AGAIN_MS;
  try {
    await getJson("readyz", now.key);
    if (!now.ready) await becomeReady();
    wait = STILL_THERE_MS;
  } catch (error) {
    if (key !== now.key) return; // another look is under way, with the key that was given since
    now.ready = false;
    if (error.status === 401) wait = STILL_THERE_MS; // nothing changes until a key is given, and then it looks at once
    say(error);
  }
  update();
  clearTimeout(watchService.next);
  watchService.next = setTimeout(watchService, wait);
}

async function becomeReady() {
  const [speeds, model] = await Promise.all([getJson("v1/speeds", now.key), getJson("v1/model", now.key)]);
  now.tiers = speeds.tiers.filter((tier) => tier.target <= speeds.range.highest);
  now.layers = model.layers;
  now.ready = true;
  sayState(`Ready: ${model.name}, ${model.layers} decoder layers, on ${model.device}`);
  // What has the focus may be hidden or replaced below, and the focus would be lost.
  const focused = [at("key-form"), at("tiers")].some((part) => part.contains(document.activeElement));
  at("key-form").hidden = true;
  at("legend").replaceChildren(...legend(now.layers));
  const slider = at("speed");
  slider.min = speeds.range.lowest; // the browser keeps the value between the two
  slider.max = speeds.range.highest;
  if (slider.disabled) slider.value = now.tiers.find((tier) => tier.name === speeds.default)?.target ?? 1;
  slider.disabled = false;
  showTiers(speeds.range);
  if (focused) slider.focus();
  if (now.wanted) ask();
}

/** The state of the service in words. They are set where they changed only, since a screen reader reads them out then. */
function sayState(text) {
  at("state").classList.toggle("ready", now.ready);
  if (at("state").textContent !== text) at("state").textContent = text;
}

function say(error) {
  if (error.status === 401) needKey(error);
  else sayState(error instanceof ServiceError ? `${error.title}. ${error.detail}` : String(error));
}

function needKey(error) {
  now.ready = false;
  at("key-form").hidden = false;
  sayState(now.key ? `${error.title}. The key you gave is not known here.` : `${error.title}.`);
  update();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  now.key = at("key").value.trim();
  sayState("Asking the service with this key …");
  watchService();
});

// ---- the speed

function showTiers({ lowest, highest }) {
  const place = (tier) => (tier.target - lowest) / (highest - lowest || 1);
  at("ticks").replaceChildren(
    ...now.tiers.map((tier) => {
      const tick = element("span");
      tick.style.left = `${100 * place(tier)}%`;
      return tick;
    }),
  );
  at("tiers").replaceChildren(
    ...now.tiers.map((tier) => {
      const edge = place(tier) < 0.1 ? "begin" : place(tier) > 0.9 ? "end" : "";
      const lines = [element("span", {}, tier.name), " ", element("span", {}, String(tier.target))];
      const button = element("button", { type: "button", className: edge }, ...lines);
      button.style.left = `${100 * place(tier)}%`;
      button.addEventListener("click", () => {
        at("speed").value = tier.target;
        showSpeed();
        if (now.file) ask();
      });
      return button;
    }),
  );
  showSpeed();
}

/** What is asked for: the name of a tier, or a number. */
function speed() {
  const value = Number(at("speed").value);
  const tier = now.tiers.find((each) => Math.abs(each.target - value) < NEAR);
  return tier ? tier.name : value;
}

function showSpeed() {
  const asked = speed();
  const said = typeof asked === "string" ? `${asked} (${at("speed").value})` : String(asked);
  at("speed-said").textContent = said;
  at("speed").setAttribute("aria-valuetext", said);
  now.tiers.forEach((tier, i) => at("tiers").children[i].setAttribute("aria-pressed", String(tier.name === asked)));
}

at("speed").addEventListener("input", showSpeed);
at("speed").addEventListener("change", () => now.file && ask());

// ---- a caption

/** Takes the place of whatever is being asked: its signal, aborted by the next. */
function begin() {
  now.asking?.abort();
  now.asking = new AbortController();
  at("problem").hidden = true;
  update();
  return now.asking.signal;
}

/** The words go; the focus, where one of them has it, goes to the button that brings new ones. */
function noWords() {
  if (at("words").contains(document.activeElement)) at("ask").focus();
  at("words").replaceChildren();
}

async function ask() {
  if (!now.file) return;
  now.wanted = !now.ready;
  if (!now.ready) {
    begin(); // for what was asked before this
    now.asking = null;
    at("result").hidden = true;
    noWords();
    return update();
  }
  const file = now.file;
  const options = { speed: speed(), regions: true };
  if (at("show-look").checked) options.attention = true;
  const signal = begin();
  const words = at("words");
  now.answer = null;
  at("result").hidden = false;
  at("said").textContent = "";
  const clear = () => {
    noWords();
    for (const each of [at("layers"), at("facts")]) each.replaceChildren();
  };
  clear();
  at("detail").textContent = "Looking …";
  let used = 0;
  const told = {
    restart: () => {
      used = 0;
      clear();
    },
    word: (word) => {
      words.append(wordItem(word, now.layers, tellWord));
      used += word.exit_layer;
      at("layers").replaceChildren(...layersBar(used, now.layers * words.children.length));
    },
  };
  try {
    const answer = await caption(file, options, now.key, signal, told);
    if (!signal.aborted) showAnswer(answer, file, options);
  } catch (error) {
    if (!signal.aborted) showProblem(error, ask);
  } finally {
    if (!signal.aborted) now.asking = null;
    update();
  }
}

const tellWord = (said) => {
  at("detail").textContent = `${said}.`;
};

/** The photo as the word at `index` of the answer looked at it, where that was asked for. */
function showLook(index) {
  const weights = at("show-look").checked && now.answer?.attention?.[index];
  brighten(weights ? now.answer.regions.map((region) => region.box) : [], weights || []);
}

function showAnswer(answer, file, options) {
  now.answer = answer;
  at("detail").textContent = "Point at a word, or move to it with the Tab key, to see how it was decided.";
  const focused = [...at("words").children].findIndex((item) => item.contains(document.activeElement));
  at("words").replaceChildren(...answer.words.map((word, i) => wordItem(word, now.layers, (said) => (tellWord(said), showLook(i)))));
  if (focused >= 0) (at("words").children[focused]?.firstChild ?? at("ask")).focus();
  at("said").textContent = `Caption: ${answer.caption}`;
  const [used, all] = layersUsed(answer, now.layers);
  at("layers").replaceChildren(...layersBar(used, all));
  const { timings_ms: times, speed: given } = answer;
  const facts = {
    "SpeedUp of this caption": number(answer.speedup),
    "Promised on average": number(given.promised),
    "Threshold τ": `${number(given.tau)} nats`,
    Confidence: number(answer.confidence),
    Looking: times.look > 0 ? `${number(times.look, 1)} ms` : "remembered",
    Words: `${number(times.describe, 1)} ms`,
    "In all": `${number(times.total, 1)} ms`,
  };
  if (given.moved_by_load) facts["Under load"] = "moved to a higher speed";
  at("facts").replaceChildren(...Object.entries(facts).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  showBoxes();
  showLines(file, options);
}

function showProblem(error, again) {
  at("result").hidden = at("words").children.length === 0;
  if (!at("result").hidden) at("detail").textContent = "";
  if (error.status === 401) needKey(error);
  const known = error instanceof ServiceError;
  const title = known ? error.title : "Something went wrong in this page";
  const parts = [element("strong", {}, title), element("span", {}, known ? error.detail : String(error))];
  if (known && error.requestId) parts.push(element("span", { className: "hint" }, ` Request ${error.requestId}.`));
  const worthIt = !known || error.status === 0 || error.status === 429 || error.status >= 500;
  if (again && worthIt) {
    const button = element("button", { type: "button" }, "Try again");
    button.addEventListener("click", () => {
      at("ask").focus(); // this button goes
      again();
    });
    parts.push(element("div", {}, button));
  }
  at("problem").replaceChildren(...parts);
  at("problem").hidden = false;
}

// ---- regions, comparison, lines to copy

function showBoxes() {
  const wanted = at("show-boxes").checked;
  const boxes = (wanted && now.answer?.regions) || [];
  drawBoxes(boxes.map((region) => region.box));
  at("boxes").toggleAttribute("hidden", !boxes.length);
  at("boxes-said").textContent = boxes.length ? `${boxes.length} regions were looked at.` : wanted && now.file ? "No regions yet." : "";
}

at("show-boxes").addEventListener("change", showBoxes);
at("words").addEventListener("pointerleave", () => showLook(-1));
at("words").addEventListener("focusout", () => showLook(-1));
at("show-look").addEventListener("change", () => {
  showLook(-1);
  if (at("show-look").checked && now.file && !now.answer?.attention) ask();
});

async function compare() {
  const signal = begin();
  const hide = () => {
    at("compared").hidden = true; // half a comparison says nothing
  };
  signal.addEventListener("abort", hide);
  at("compared").hidden = false;
  try {
    await compareSpeeds(at("speeds"), now, signal);
    if (!signal.aborted) at("said").textContent = "The comparison is done.";
  } catch (error) {
    if (!signal.aborted) {
      hide();
      showProblem(error, compare);
    }
  } finally {
    if (!signal.aborted) now.asking = null;
    update();
  }
}

// Not `disabled` while it works: the focus would be lost.
at("compare").addEventListener("click", () => at("compare").getAttribute("aria-disabled") === "true" || compare());

function showLines(file, options) {
  at("elsewhere").hidden = false;
  at("curl").textContent = curlLine(service, file.name, options, Boolean(now.key));
  at("python").textContent = pythonLines(service, file.name, options);
  at("copied").textContent = "";
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = at(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent); // only there over https and on this machine
      at("copied").textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(source);
      at("copied").textContent = "Selected: copy it with your keyboard.";
    }
  });
}

// ---- the whole

function update() {
  const busy = now.asking !== null;
  at("ask").disabled = !now.file;
  at("ask").textContent = now.wanted ? "Waits for the service …" : busy ? "Captioning …" : "Caption";
  at("compare").disabled = !now.file;
  at("compare").setAttribute("aria-disabled", String(!now.ready || busy));
}

at("ask").addEventListener("click", ask);
watchPhoto(
  (file) => {
    now.file = file;
    now.answer = null;
    at("compared").hidden = true;
    at("boxes-said").textContent = "";
    ask();
  },
  (title, detail) => showProblem(new ServiceError(title, detail, 400)),
);
watchService();

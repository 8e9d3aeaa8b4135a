// The same photo at every named speed, side by side, with what each cost.

import { caption } from "./api.js";
import { element, layersBar, layersUsed, number, wordItem } from "./words.js";

const TIMES = 3; // captions at each speed: the middle one is what it costs, whatever else the machine did meanwhile

const middle = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

/** Fills `list` with a card for each of `now.tiers`, one caption after the other, since two at once slow each other. */
export async function compareSpeeds(list, now, signal) {
  list.replaceChildren();
  const cards = now.tiers.map((tier) => {
    const rest = element("div", {}, element("p", { className: "hint" }, "waits …"));
    const heading = element("h3", {}, tier.name);
    list.append(element("li", { className: "compared" }, heading, rest));
    return { tier, heading, rest, answers: [] };
  });
  for (let time = 1; time <= TIMES; time++) {
    for (const { tier, heading, rest, answers } of cards) {
      answers.push(await caption(now.file, { speed: tier.name }, now.key, signal));
      if (signal.aborted) return;
      const [answer] = answers;
      const words = answer.words.map((word) => wordItem(word, now.layers));
      const [describe, total] = ["describe", "total"].map((part) => number(middle(answers.map((each) => each.timings_ms[part])), 1));
      heading.replaceChildren(tier.name, element("span", {}, `SpeedUp ${number(answer.speedup)}`));
      rest.replaceChildren(
        element("ol", { className: "words", "aria-label": `Caption at ${tier.name}` }, ...words),
        ...layersBar(...layersUsed(answer, now.layers)),
        element("p", { className: time < TIMES ? "" : "ms" }, `Words ${describe} ms, in all ${total} ms`),
      );
    }
  }
}

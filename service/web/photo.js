// The photo: chosen, dropped, pasted, or one of the samples; shown, with the regions that were looked at over it.

const at = (id) => document.getElementById(id);

/** Calls `chosen(file)` for each photo that the user gives, after it was put on the page, and `failed` for none. */
export function watchPhoto(chosen, failed) {
  let taken = 0; // a sample that arrives after something else was taken is not wanted any more
  const take = (file, description) => {
    taken += 1;
    show(file, description);
    chosen(file);
  };
  at("file").addEventListener("change", () => {
    const [file] = at("file").files;
    if (file) take(file, `Your photo ${file.name}`);
    at("file").value = ""; // the same file again is a change too
  });
  const drop = at("drop");
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  document.addEventListener("dragleave", (event) => event.relatedTarget || drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) take(file, `Your photo ${file.name}`);
    else failed("There was no file in what you dropped", "Save the photo first, then drop the file.");
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (file) take(file, "The photo you pasted");
    else if (!event.target.closest("input")) failed("There was no photo in what you pasted", "Copy the picture itself, not its address.");
  });
  for (const button of document.querySelectorAll("[data-sample]")) {
    button.addEventListener("click", async () => {
      const picture = button.querySelector("img");
      taken += 1;
      const mine = taken;
      let blob;
      try {
        const answer = await fetch(picture.src);
        if (!answer.ok) throw new Error(`The answer was ${answer.status}`);
        blob = await answer.blob();
      } catch {
        if (taken === mine) failed("The sample cannot be loaded", "Is the service still running?");
        return;
      }
      if (taken === mine) take(new File([blob], button.dataset.sample, { type: blob.type }), picture.alt);
    });
  }
}

function show(file, description) {
  const photo = at("photo");
  if (photo.src) URL.revokeObjectURL(photo.src);
  at("no-preview").hidden = true;
  at("stage").hidden = false;
  photo.onerror = () => {
    at("stage").hidden = true;
    at("no-preview").hidden = false;
  };
  photo.alt = description;
  photo.src = URL.createObjectURL(file);
  at("drop-hint").textContent = file.name;
  drawBoxes([]);
  brighten([], []);
}

function rectangle([x0, y0, x1, y1], more) {
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const place = { x: x0, y: y0, width: x1 - x0, height: y1 - y0, ...more };
  for (const [name, value] of Object.entries(place)) rect.setAttribute(name, value);
  return rect;
}

/** Boxes as x0, y0, x1, y1, relative to the upright photo, which is how browsers show it. */
export function drawBoxes(boxes) {
  at("boxes").replaceChildren(...["under", "over"].flatMap((layer) => boxes.map((box) => rectangle(box, { class: layer }))));
}

/** Darkens the photo but for the boxes, each as bright as its weight; no boxes: not at all. */
export function brighten(boxes, weights) {
  const largest = Math.max(...weights, 1e-9);
  const bright = boxes.map((box, i) => rectangle(box, { fill: "black", opacity: (weights[i] / largest).toFixed(3) }));
  at("bright").replaceChildren(...bright);
  at("look").toggleAttribute("hidden", !boxes.length);
}

// Asks the service: JSON, captions word by word (server-sent events over fetch), and problems told in words.

/** An error that can be shown to a person as it is. */
export class ServiceError extends Error {
  /** `title` and `detail` are sentences; `status` is that of HTTP, 0 where there was no answer. */
  constructor(title, detail, status = 0, requestId = "") {
    super(detail ? `${title}: ${detail}` : title);
    Object.assign(this, { title, detail, status, requestId });
  }
}

export const unreachable = () =>
  new ServiceError("The service cannot be reached", "Is it still running, and is the network there?");

const brokenOff = () => new ServiceError("The answer broke off", "The connection closed before it was whole. Try again.");

/** What is being read of an answer. Throws ServiceError where the connection closes, or what came is no JSON. */
async function whole(reading) {
  try {
    return await reading;
  } catch (error) {
    throw error.name === "AbortError" ? error : brokenOff();
  }
}

const headersWith = (key, more = {}) => (key ? { ...more, Authorization: `Bearer ${key}` } : more);

async function send(address, init) {
  try {
    return await fetch(address, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable();
  }
}

/** The error of an answer that is none of the good ones: RFC 9457, or whatever a proxy before the service says. */
async function errorOf(response) {
  try {
    const problem = await response.json();
    return problemError(problem, response.status);
  } catch {
    return new ServiceError(`The answer was ${response.status}`, response.statusText, response.status);
  }
}

export const problemError = (problem, status = problem.status) =>
  new ServiceError(problem.title || `The answer was ${status}`, problem.detail || "", status, problem.request_id || "");

/** The JSON at `address`. Throws ServiceError. */
export async function getJson(address, key) {
  const response = await send(address, { headers: headersWith(key), cache: "no-store" });
  if (!response.ok) throw await errorOf(response);
  return whole(response.json());
}

/**
 * Captions `file`; `options` are form fields. Calls `told.word(word)` for each word as it is decided and `told.restart()`
 * where the caption begins again, if the service streams. Returns the whole answer. Throws ServiceError.
 */
export async function caption(file, options, key, signal, told) {
  const form = new FormData();
  form.append("image", file, file.name || "photo");
  for (const [name, value] of Object.entries(options)) form.append(name, String(value));
  const accept = told ? "text/event-stream, application/json;q=0.5" : "application/json";
  const headers = headersWith(key, { Accept: accept });
  const response = await send("v1/caption", { method: "POST", body: form, headers, signal });
  if (!response.ok) throw await errorOf(response);
  const type = response.headers.get("content-type") || "";
  if (!type.startsWith("text/event-stream")) return whole(response.json());
  for await (const { event, data } of events(response.body)) {
    if (event === "word") told?.word(data);
    else if (event === "restart") told?.restart();
    else if (event === "caption") return data;
    else if (event === "problem") throw problemError(data);
  }
  throw brokenOff();
}

/** Server-sent events (WHATWG HTML, 9.2.6) of a byte stream, their data read as JSON. Throws ServiceError. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await whole(reader.read());
      if (done) return;
      text += value;
      // A carriage return at the end may be half of a line's end: it waits for what follows.
      const lines = text.endsWith("\r") ? text.slice(0, -1) : text;
      const blocks = lines.split(/\r\n\r\n|\n\n|\r\r/);
      text = blocks.pop() + text.slice(lines.length);
      yield* blocks.map(parsed).filter((event) => event !== null);
    }
  } finally {
    reader.cancel().catch(() => {}); // left early, or broken already
  }
}

/** `{event, data}` of one block of lines; null where it holds no data, as a keep-alive. */
function parsed(block) {
  let event = "message";
  const data = [];
  for (const line of block.split(/\r\n|\n|\r/)) {
    const [, name, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (name === "event") event = value;
    else if (name === "data") data.push(value);
  }
  return data.length ? { event, data: JSON.parse(data.join("\n")) } : null;
}

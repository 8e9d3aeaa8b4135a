// Shows /openapi.json as a page to read: every operation with its parameters, bodies, answers, and a line for a shell.

import { getJson } from "./api.js";
import { element } from "./words.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const service = new URL(".", location.href).href.replace(/\/$/, "");
let components = {};

/** Text with `code` in backticks, as nodes. */
const prose = (text) =>
  (text || "").split(/`([^`]+)`/).map((part, i) => (i % 2 ? element("code", {}, part) : part));

const paragraphs = (text) =>
  (text || "").split(/\n\s*\n/).filter(Boolean).map((part) => element("p", {}, ...prose(part)));

function resolve(schema) {
  let place = schema;
  while (place?.$ref) place = components[place.$ref.split("/").pop()];
  return place || {};
}

/** The kind of a value in few words. */
function kind(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(", ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  const choices = schema.anyOf || schema.oneOf;
  if (choices) return choices.map(kind).join(" or ");
  if (schema.type === "array") return schema.items ? `list of ${kind(schema.items)}` : "list";
  const bounds = [
    schema.minimum !== undefined && `at least ${schema.minimum}`,
    schema.maximum !== undefined && `at most ${schema.maximum}`,
  ].filter(Boolean);
  return [schema.format === "binary" ? "file" : schema.type || "any", ...bounds].join(", ");
}

function table(heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, ...[cell].flat()))));
  return element("div", { className: "wide", tabindex: "0", role: "group", "aria-label": `Table: ${heads[0]}` }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
}

function fields(schema) {
  const whole = resolve(schema);
  const required = new Set(whole.required || []);
  const rows = Object.entries(whole.properties || {}).map(([name, property]) => {
    const about = property.description || resolve(property).description;
    return [element("code", {}, name), kind(property) + (required.has(name) ? "; required" : ""), prose(about)];
  });
  return rows.length ? table(["Member", "Value", "What it is"], rows) : element("p", {}, kind(schema));
}

function examples(content) {
  const all = content.examples ? Object.entries(content.examples) : content.example ? [["example", { value: content.example }]] : [];
  return all.map(([name, example]) => {
    const text = JSON.stringify(example.value, null, 2) ?? "";
    const shown = text.length > 1200 ? `${text.slice(0, 1200)} …` : text;
    return element("details", {}, element("summary", {}, `${name}${example.summary ? `: ${example.summary}` : ""}`), element("pre", { tabindex: "0" }, shown));
  });
}

function contents(content) {
  const shown = new Map(); // types that hold the same are told of once
  for (const [type, each] of Object.entries(content || {})) {
    const same = JSON.stringify(each);
    shown.set(same, [...(shown.get(same) || []), type]);
  }
  return [...shown].flatMap(([same, types]) => {
    const each = JSON.parse(same);
    return [element("p", {}, ...prose(types.map((type) => `\`${type}\``).join(", "))), ...(each.schema ? [fields(each.schema)] : []), ...examples(each)];
  });
}

function curl(method, path, operation) {
  const form = operation.requestBody?.content?.["multipart/form-data"];
  const json = operation.requestBody?.content?.["application/json"];
  const properties = form ? Object.keys(resolve(form.schema).properties || {}) : [];
  const field = ["image", "images"].find((name) => properties.includes(name));
  const body = field ? ` -F ${field}=@photo.jpg` : json ? " --json @request.json" : "";
  const verb = method === "get" || body ? "" : ` -X ${method.toUpperCase()}`;
  return `curl${verb}${body} '${service}${path}'`;
}

function operationItem(method, path, operation) {
  const summary = element("summary", {}, element("span", { className: "method" }, method.toUpperCase()), element("code", {}, path), element("span", {}, operation.summary || ""));
  const parts = [...paragraphs(operation.description), element("pre", { tabindex: "0" }, curl(method, path, operation))];
  if (operation.parameters?.length) {
    const rows = operation.parameters.map((each) => [element("code", {}, each.name), `${each.in}${each.required ? ", required" : ""}`, kind(each.schema), prose(each.description || each.schema?.description)]);
    parts.push(element("h3", {}, "Parameters"), table(["Name", "Where", "Value", "What it is"], rows));
  }
  if (operation.requestBody) parts.push(element("h3", {}, "Body"), ...contents(operation.requestBody.content));
  parts.push(element("h3", {}, "Answers"));
  for (const [status, answer] of Object.entries(operation.responses || {})) {
    const headers = Object.entries(answer.headers || {}).map(([name, header]) => [element("code", {}, name), prose(header.description)]);
    const inside = [...contents(answer.content), ...(headers.length ? [table(["Header", "What it is"], headers)] : [])];
    parts.push(element("details", {}, element("summary", {}, `${status} `, ...prose(answer.description)), ...inside));
  }
  return element("details", { className: "operation" }, summary, element("div", {}, ...parts));
}

function show(openapi) {
  components = openapi.components?.schemas || {};
  document.getElementById("about").append(...paragraphs(openapi.info.description));
  document.getElementById("about").hidden = false;
  const groups = new Map();
  for (const [path, operations] of Object.entries(openapi.paths)) {
    for (const method of METHODS.filter((each) => operations[each])) {
      const tag = operations[method].tags?.[0] || "other";
      groups.set(tag, [...(groups.get(tag) || []), operationItem(method, path, operations[method])]);
    }
  }
  for (const [tag, items] of groups) {
    const title = element("h2", {}, tag[0].toUpperCase() + tag.slice(1));
    document.getElementById("operations").append(element("section", {}, title, ...items));
  }
  document.getElementById("state").hidden = true;
}

try {
  show(await getJson("openapi.json"));
} catch (error) {
  document.getElementById("state").textContent = String(error.message || error);
}

// What was just done, as a line for a shell and lines of Python that do the same.

const KEY = "DEECAP_CLIENT_KEY"; // the key itself is never shown

const forShell = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

export function curlLine(service, name, options, withKey) {
  const fields = Object.entries(options).map(([key, value]) => `-F ${forShell(`${key}=${value}`)}`);
  const header = withKey ? [`-H "Authorization: Bearer $${KEY}"`] : [];
  // curl reads the file's name up to ; or , unless it is quoted, and \ and " are escaped within.
  const file = /[;,"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;
  return ["curl", ...header, "-F", forShell(`image=@${file}`), ...fields, forShell(`${service}/v1/caption`)].join(" ");
}

export function pythonLines(service, name, options) {
  const given = Object.entries(options).map(([key, value]) => {
    const text = typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value);
    return `, ${key}=${text}`;
  });
  const call = `client.caption(${JSON.stringify(name)}${given.join("")})`;
  return `from service.client import Client\n\nwith Client(${JSON.stringify(service)}) as client:\n    print(${call}.caption)`;
}

// Requests to the gateway. The key lives in this tab's session storage, and goes to this origin only.

const STORED = "vllm-service-key";

export const session = {
  get key() { return sessionStorage.getItem(STORED); },
  set key(value) { if (value) sessionStorage.setItem(STORED, value); else sessionStorage.removeItem(STORED); },
  /** Called where the key is not valid any more. */
  onExpired: () => {},
};

/** An error answer of the gateway. */
export class ApiError extends Error {
  constructor(status, error, requestId) {
    super(error?.message ?? `The gateway answered ${status}.`);
    this.status = status;
    this.code = error?.code ?? null;
    this.requestId = requestId;
  }
}

/** Sends a request and returns the response; throws an ApiError for 400 and above. */
export async function send(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (session.key) headers.Authorization = `Bearer ${session.key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const text = body === undefined ? undefined : JSON.stringify(body);
  const options = { method, headers, body: text, signal, cache: "no-store", credentials: "omit", redirect: "error" };
  const response = await fetch(path, options);
  if (response.ok) return response;
  let error = null;
  try { error = (await response.json()).error; } catch { /* a proxy's page */ }
  if (response.status === 401) session.onExpired(error?.message);
  throw new ApiError(response.status, error, response.headers.get("x-request-id"));
}

export const get = async (path, signal) => (await send(path, { signal })).json();
export const post = async (path, body) => (await send(path, { method: "POST", body })).json();

/** Yields the data of a stream's events, decoded from JSON, until `[DONE]`. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n")) >= 0; text = text.slice(end + 1)) {
      const line = text.slice(0, end).trimEnd();
      if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Returns objects for rows that came as lists. */
export const unpack = ({ columns, data }) =>
  data.map((row) => Object.fromEntries(columns.map((name, index) => [name, row[index]])));

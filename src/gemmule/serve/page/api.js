// Requests to the server that served this page.

const KEY = "gemmule-api-key";

export class Failure extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.away = code === "unreachable" || status === 503; // and may come back
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

async function request(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Your text is kept; this page tries again by itself.", 0, "unreachable");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new Failure(error?.message ?? `the server answered ${response.status}`, response.status, error?.code);
}

export const ask = async (path, body, signal) => (await request(path, body, signal)).json();

// The events of a streamed reply; a stream that ends early is a failure.
export async function* events(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Failure("The server went away before the reply was finished; what came is kept.", 0, "unreachable");
    waiting += value;
    const parts = waiting.split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw new Failure(content.error.message, 0, content.error.code);
      yield content;
    }
  }
}

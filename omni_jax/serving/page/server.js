// What the page asks of the server: OpenAI's chat completions, voices, and realtime sessions.

const KEY = "omni_jax.key";

export class UnauthorizedError extends Error {}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) throw new UnauthorizedError("the key is missing or wrong");
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error?.message ?? `the server answers with status ${response.status}`);
  }
  return response;
}

export async function getModel() {
  const { data } = await (await ask("/v1/models")).json();
  return data[0].id;
}

export async function getVoices() {
  return (await (await ask("/v1/audio/voices")).json()).voices;
}

export async function addVoice(fields) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  await ask("/v1/audio/voices", { method: "POST", body });
}

// The chunks of a streamed answer.
export async function* streamChat(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await ask("/v1/chat/completions", options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// A realtime session; its events go to `onevent`.
export function openSession(model, onevent, onclose) {
  const url = new URL(`/v1/realtime?model=${encodeURIComponent(model)}`, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const key = sessionStorage.getItem(KEY);
  const socket = new WebSocket(url, ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])]);
  socket.onmessage = ({ data }) => onevent(JSON.parse(data));
  socket.onclose = onclose;
  return {
    send(type, values = {}) {
      if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type, ...values }));
    },
    close: () => socket.close(),
  };
}

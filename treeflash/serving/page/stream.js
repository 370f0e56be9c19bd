// Requests to the server, and the events of a streamed chat completion.

const NEEDS_KEY = "a valid API key is needed; enter it below";

/** Send a request. Throws an Error that says what is wrong, with the status of the answer if any. */
export async function fetchPath(path, key, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (/[^\x20-\xff]/.test(key)) throw refusal(401, NEEDS_KEY); // no header can hold it
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error instanceof TypeError ? new Error("the server cannot be reached") : error;
  });
  if (!response.ok) throw refusal(response.status, await reason(response));
  return response;
}

function refusal(status, message) {
  return Object.assign(new Error(message), { status });
}

/** Ask for an answer; yields the chunks. Throws an Error that says what is wrong. */
export async function* complete(body, key, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const response = await fetchPath("v1/chat/completions", key, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (signal.aborted) throw error;
      return { done: true };
    });
    if (done) throw new Error("the connection was cut off");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const line = event.split("\n").find((text) => text.startsWith("data: "));
      if (!line) continue; // a comment, which keeps the connection
      const data = line.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

/** What the server says about a request that it refused. */
async function reason(response) {
  if (response.status === 401) return NEEDS_KEY;
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

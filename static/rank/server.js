// Requests to the server, and the one error that means "no answer".
const TIMEOUT_MILLISECONDS = 20_000;

export class Unreachable extends Error {}

function csrf() {
  return document.cookie.match(/(?:^|; )csrftoken=([^;]+)/)?.[1] ?? "";
}

async function send(url, body) {
  const headers = { "X-CSRFToken": csrf() };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    return await fetch(url, {
      method: "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      redirect: "manual", // A redirect means the sign-in page: it must not be read as an answer.
      signal: AbortSignal.timeout(TIMEOUT_MILLISECONDS),
    });
  } catch (error) {
    throw new Unreachable(String(error));
  }
}

export function signedOut(response) {
  return response.type === "opaqueredirect" || response.status === 401;
}

// {status, signedOut, data, error: {code, message}}
export async function call(url, body) {
  const response = await send(url, body);
  if (signedOut(response)) return { status: 401, signedOut: true, data: null, error: { code: "signed_out", message: "You are signed out." } };
  const data = await response.json().catch(() => null);
  if (response.status >= 500 || (data === null && response.status !== 204)) throw new Unreachable(`status ${response.status}`);
  return { status: response.status, signedOut: false, data, error: response.ok ? null : (data.error ?? { code: "error", message: "" }) };
}

// {signedOut, html}
export async function fragment(url) {
  const response = await send(url);
  if (signedOut(response)) return { signedOut: true, html: "" };
  const isHtml = response.headers.get("content-type")?.startsWith("text/html");
  if (!isHtml || (!response.ok && ![403, 409, 503].includes(response.status))) throw new Unreachable(`status ${response.status}`);
  return { signedOut: false, html: await response.text() };
}

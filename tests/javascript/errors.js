// Makes servers refuse requests; prints what OpenAI's client threw as JSON. Arguments: addresses of
// a patient server, of one that waits a short time for uploads, and of one that does for edits;
// picture, a key, a key for one edit a minute.

import { readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";

const [baseURL, hurriedURL, strictURL, path, apiKey, limitedKey] = process.argv.slice(2);
const common = { apiKey, maxRetries: 0 };
const client = new OpenAI({ baseURL, ...common });
const limited = client.withOptions({ apiKey: limitedKey });
const hurried = new OpenAI({ baseURL: hurriedURL, ...common, fetch: trickle });
const strict = new OpenAI({ baseURL: strictURL, ...common });
const picture = readFileSync(path);

async function edit(more = {}, by = client, content = picture) {
  const image = await toFile(content, "person.png", { type: "image/png" });
  return by.images.edit({ image, prompt: "add a hat", ...more });
}

/** Send a form's first bytes and then nothing. */
async function trickle(url, init) {
  const form = new Response(init.body);
  const headers = new Headers(init.headers);
  headers.set("content-type", form.headers.get("content-type"));
  const body = new ReadableStream({ start: (sink) => sink.enqueue(Buffer.from("--")) });
  return fetch(url, { ...init, headers, body, duplex: "half" });
}

async function read(stream) {
  for await (const event of stream) event;
}

const attempts = {
  400: () => edit({ size: "1024x1024" }),
  unknown: () => edit({ promt: "x" }),
  401: () => edit({}, client.withOptions({ apiKey: "sk-another-0123456789" })),
  404: () => edit({ model: "gpt-image-1" }),
  408: () => edit({}, hurried),
  413: () => edit({}, client, Buffer.alloc(200_000)),
  415: () => client.post("/images/edits", { body: "x", headers: { "content-type": "text/plain" } }),
  429: async () => {
    await edit({}, limited).catch(() => {}); // which counts too
    await edit({}, limited);
  },
  500: () => edit({ seed: 13 }, client.withOptions({ maxRetries: 2 })),
  503: () => edit({ seed: 14 }, strict),
  event: async () => read(await edit({ seed: 13, stream: true, partial_images: 1 })),
};

const told = {};
for (const [name, attempt] of Object.entries(attempts)) {
  try {
    await attempt();
  } catch (error) {
    const { status = null, code = null, param = null, requestID } = error;
    if (status && !requestID) throw new Error(`the answer to ${name} has no id`);
    told[name] = [error.constructor.name, status, code, param];
  }
}
console.log(JSON.stringify(told));

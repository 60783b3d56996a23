// Asks a server all that OpenAI's client can; prints what it got as JSON. Arguments: address,
// picture, a key, a key for one edit a minute.

import { createReadStream } from "node:fs";
import OpenAI, { toFile } from "openai";

const [baseURL, path, apiKey, slowKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const image = () => toFile(createReadStream(path), "person.png", { type: "image/png" });
const edit = async (more, asked = {}) =>
  client.images.edit({ image: await image(), prompt: "add a hat", ...more, ...asked });

/** Edit with another key. */
const editAs = async (apiKey) =>
  client.withOptions({ apiKey }).images.edit({ image: await image(), prompt: "a hat" });

async function failed(attempt) {
  try {
    await attempt();
  } catch (error) {
    const { status, code, param, requestID } = error;
    return { kind: error.constructor.name, status, code, param, requestID };
  }
}

const models = [];
for await (const model of client.models.list()) models.push(model.id);

const events = [];
for await (const event of await edit({ stream: true, partial_images: 2, seed: 3 })) {
  events.push([event.type, event.partial_image_index ?? null, event.b64_json]);
}

const several = { n: 2, seed: 3, temperature: Array(7).fill(0.5) };
const answers = {
  models,
  events,
  two: (await edit(several)).data,
  listed: (await client.images.edit({ image: [await image()], prompt: "a hat", seed: 3 })).data.length,
  retrieved: (await client.models.retrieve("nano")).id,
  errors: {
    400: await failed(() => edit({ size: "1024x1024" })),
    unknown: await failed(() => edit({ promt: "x" })),
    401: await failed(() => editAs("sk-another-0123456789")),
    404: await failed(() => edit({ model: "gpt-image-1" })),
    413: await failed(() => edit({ prompt: "x".repeat(21e6) })),
    429: await failed(async () => (await editAs(slowKey), await editAs(slowKey))),
  },
};
console.log(JSON.stringify(answers));

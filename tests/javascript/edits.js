// Asks a server all that OpenAI's client can; prints what it got as JSON. Arguments: address,
// picture.

import { createReadStream } from "node:fs";
import OpenAI, { toFile } from "openai";

const [baseURL, path] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const image = () => toFile(createReadStream(path), "person.png", { type: "image/png" });
const edit = async (more, asked = {}) =>
  client.images.edit({ image: await image(), prompt: "add a hat", ...more, ...asked });

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
};
console.log(JSON.stringify(answers));

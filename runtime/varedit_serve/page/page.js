// The page: one picture, edited turn by turn. It asks this server alone, as any client does.

const $ = (id) => document.getElementById(id);
const OPTIONAL = ["seed", "guidance_scale", "temperature", "negative_prompt"];
const PREVIEWS = 3;

/** A turn: the picture before it, what was asked for, and the result; the first has no `before`. */
let turns = [];
let shown = 0;
let running = null; // the AbortController of an edit
let painted = false;

// Pictures

async function start(file) {
  if (!file?.type.startsWith("image/")) return tell("That is no picture.", true);
  const url = URL.createObjectURL(file), image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(url);
    return tell("The picture is damaged, or this browser cannot show it.", true);
  }
  cancel();
  forget(turns);
  turns = [{ url, blob: file, prompt: file.name || "picture" }];
  show(0);
  tell("");
  $("prompt").focus();
}

/** Let go of the memory of turns that can be seen no more. */
function forget(gone) {
  for (const { url } of gone) URL.revokeObjectURL(url);
}

function show(place) {
  shown = place;
  view(turns[place]);
  clearMask();
  list();
}

/** Show a picture; with a slider where it has one before it. */
function view({ url, before }) {
  $("stage").classList.remove("empty");
  $("views").hidden = false;
  $("before").src = before ?? url;
  $("after").src = url;
  $("views").classList.toggle("done", Boolean(before));
  $("slider").hidden = $("save").hidden = !before;
  if (before) $("save").href = url;
  slide(0);
}

function slide(percent) {
  $("slider").value = percent;
  $("after").style.clipPath = `inset(0 0 0 ${percent}%)`;
  $("handle").style.left = `${percent}%`;
  $("is-before").hidden = percent < 15;
  $("is-after").hidden = percent > 85;
}

function list() {
  $("history").replaceChildren(...turns.map((turn, place) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = document.createElement("img");
    const text = document.createElement("span");
    image.src = turn.url;
    image.alt = "";
    text.textContent = turn.prompt;
    button.title = turn.seed === undefined ? turn.prompt : `${turn.prompt} (seed ${turn.seed})`;
    button.setAttribute("aria-pressed", String(place === shown));
    button.disabled = Boolean(running);
    button.append(image, text);
    button.onclick = () => show(place);
    item.append(button);
    return item;
  }));
}

function tell(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

// Editing

async function edit(event) {
  event.preventDefault();
  if (running) return;
  if (!turns.length) return tell("Choose a picture first.", true);
  const from = turns[shown], prompt = $("prompt").value.trim();
  if (!prompt) return tell("Say what to change.", true);
  running = new AbortController();
  const { signal } = running;
  busy(true);
  view({ url: from.url });
  let told = {};
  try {
    const body = await fields(from, prompt);
    const reply = await ask("/v1/images/edits", { method: "POST", body, signal });
    for await (told of events(reply.body)) take(told, from, prompt);
    if (told.type !== "image_edit.completed") throw new Error("The server ended before the result.");
  } catch (error) {
    view(turns[shown]); // another one than `from` if a picture was dropped meanwhile
    tell(error.name === "AbortError" ? "Cancelled." : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    busy(false);
  }
}

async function fields(from, prompt) {
  const form = new FormData();
  form.append("image", from.blob, "picture");
  form.append("prompt", prompt);
  form.append("stream", "true");
  form.append("partial_images", String(PREVIEWS));
  for (const name of OPTIONAL) if ($(name).value.trim()) form.append(name, $(name).value.trim());
  if (painted) form.append("mask", await maskFile(), "mask.png");
  return form;
}

function take(told, from, prompt) {
  if (told.error) throw new Error(told.error.message);
  if (told.type === "image_edit.partial_image") {
    $("after").src = `data:image/${told.output_format};base64,${told.b64_json}`;
    tell(`Drawing, ${told.partial_image_index + 1} of ${PREVIEWS + 1} …`);
    return;
  }
  const blob = decoded(told), url = URL.createObjectURL(blob);
  forget(turns.splice(shown + 1));
  turns = [...turns, { url, blob, before: from.url, prompt, seed: told.seed }];
  show(turns.length - 1);
  $("prompt").value = "";
  tell([`Done, seed ${told.seed}.`, ...(told.warnings ?? [])].join(" "));
}

function decoded(told) {
  const bytes = Uint8Array.from(atob(told.b64_json), (c) => c.charCodeAt(0));
  return new Blob([bytes], { type: `image/${told.output_format}` });
}

async function ask(path, request = {}) {
  const key = $("key").value.trim();
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const reply = await fetch(path, { ...request, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  });
  if (reply.ok) return reply;
  if (reply.status === 401) {
    $("settings").open = true;
    $("key").focus();
    throw new Error("The server needs an API key: give it under Settings.");
  }
  const wait = reply.headers.get("retry-after");
  const told = await reply.json().catch(() => null);
  const message = told?.error?.message ?? `The server answered ${reply.status}`;
  throw new Error(wait ? `${message} (in ${wait} s)` : message);
}

/** Yield the data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((text) => text.startsWith("data: "));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

function cancel() {
  running?.abort();
}

function busy(now) {
  $("go").hidden = now;
  $("cancel").hidden = !now;
  for (const id of ["brush", "choose", "clear"]) $(id).disabled = now;
  if (now) {
    tell("Waiting …");
    masking(false);
  }
  list();
}

// The mask: what is painted may change

const canvas = $("mask"), pen = canvas.getContext("2d");
let last = null;

function masking(on) {
  $("brush").setAttribute("aria-pressed", String(on));
  $("tools").classList.toggle("plain", !on);
  canvas.hidden = !on && !painted;
  canvas.style.pointerEvents = on ? "auto" : "none";
  if (on) slide(0);
}

function clearMask() {
  const { naturalWidth, naturalHeight } = $("before");
  canvas.width = naturalWidth || 1;
  canvas.height = naturalHeight || 1;
  painted = false;
  masking($("brush").getAttribute("aria-pressed") === "true");
}

function paint(event) {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  const here = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  pen.lineWidth = (Math.max(canvas.width, canvas.height) * $("size").value) / 100;
  pen.lineCap = "round";
  pen.strokeStyle = "#ff3d7f";
  pen.beginPath();
  pen.moveTo(...(last ?? here));
  pen.lineTo(...here);
  pen.stroke();
  last = here;
  painted = true;
}

/** Return the mask as the server reads it: white where it is painted, else black. */
function maskFile() {
  const whole = new OffscreenCanvas(canvas.width, canvas.height), brush = whole.getContext("2d");
  brush.drawImage(canvas, 0, 0);
  brush.globalCompositeOperation = "source-in";
  brush.fillStyle = "#fff";
  brush.fillRect(0, 0, whole.width, whole.height);
  brush.globalCompositeOperation = "destination-over";
  brush.fillStyle = "#000";
  brush.fillRect(0, 0, whole.width, whole.height);
  return whole.convertToBlob({ type: "image/png" });
}

canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId);
  paint(event);
};
canvas.onpointermove = (event) => last && paint(event);
canvas.onpointerup = canvas.onpointercancel = () => (last = null);

// What a person does

$("form").onsubmit = edit;
$("cancel").onclick = cancel;
$("choose").onclick = () => $("file").click();
$("file").onchange = () => {
  start($("file").files[0]);
  $("file").value = ""; // so that the same one can be chosen again
};
$("slider").oninput = () => slide($("slider").value);
$("before").onload = () => {
  const { naturalWidth, naturalHeight } = $("before");
  $("views").style.setProperty("--ratio", naturalWidth / naturalHeight);
  if (canvas.width !== naturalWidth || canvas.height !== naturalHeight) clearMask();
};
$("brush").onclick = () => turns.length && masking($("brush").getAttribute("aria-pressed") !== "true");
$("clear").onclick = clearMask;
$("key").onchange = hello;

const stage = $("stage");
// Anywhere: beside the stage a browser would leave the page for the picture.
addEventListener("dragover", (event) => (event.preventDefault(), stage.classList.add("over")));
addEventListener("dragleave", () => stage.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  start(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => event.clipboardData.files.length && start(event.clipboardData.files[0]));

$("views").onpointermove = (event) => {
  if (event.buttons !== 1 || !turns[shown]?.before || canvas.style.pointerEvents === "auto") return;
  const box = $("views").getBoundingClientRect();
  slide(Math.min(100, Math.max(0, ((event.clientX - box.left) / box.width) * 100)));
};

const KEYS = {
  m: () => $("brush").click(),
  "[": () => $("size").stepDown(2),
  "]": () => $("size").stepUp(2),
  ArrowLeft: () => slide(Math.max(0, +$("slider").value - 5)),
  ArrowRight: () => slide(Math.min(100, +$("slider").value + 5)),
  ArrowUp: () => !running && shown > 0 && show(shown - 1),
  ArrowDown: () => !running && shown + 1 < turns.length && show(shown + 1),
  "/": () => $("prompt").focus(),
};
addEventListener("keydown", (event) => {
  if (event.key === "Escape") return cancel();
  if (event.target.matches("input:not([type=range])") || event.ctrlKey || event.metaKey) return;
  if (event.target.matches("input") && event.key.startsWith("Arrow")) return;
  if (event.key in KEYS && turns.length) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

async function hello() {
  try {
    const { data } = await (await ask("/v1/models")).json();
    $("model").textContent = data[0].id;
    tell("");
  } catch (error) {
    $("model").textContent = "";
    tell(error.message, true);
  }
}

masking(false);
hello();

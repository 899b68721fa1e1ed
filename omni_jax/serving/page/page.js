// The page: a dialogue in writing and by voice, with pictures, sounds, videos and a camera.

import { Answer } from "/page/answer.js";
import { addVoice, getModel, getVoices, openSession, setKey, streamChat, UnauthorizedError } from "/page/server.js";
import { fromBase64, fromPcm16, joinSamples, Microphone, toBase64, toPcm16, toWav } from "/page/sound.js";

const SYSTEM_PROMPT =
  "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and " +
  "visual inputs, as well as generating text and speech.";
const FRAME_MILLISECONDS = 500; // from one picture of the camera to the next
const CAMERA_SIDE = 448; // pixels, of the longer side
const SHORTEST_TURN = 0.3; // seconds; a shorter press of Talk was none

const find = (id) => document.getElementById(id);
const dialogue = find("dialogue");

let model = "";
let voices = [];
let messages = []; // of the dialogue so far, as chat completions take them
let attached = []; // { part, name, preview }
let answer = null; // that comes or is spoken
let asking = null; // aborts the request
let session = null; // while hands-free
let camera = null; // its stream

// --- what everything needs ---

async function start() {
  try {
    model = await getModel();
    voices = await getVoices();
  } catch (error) {
    if (!(error instanceof UnauthorizedError)) return tell(error);
    find("key-dialog").showModal();
    return;
  }
  find("model").textContent = model;
  find("voice").replaceChildren(...voices.map((name) => new Option(name)), new Option("no voice, text alone", ""));
  find("add-voice").hidden = !voices.length;
}

function tell(error) {
  const box = find("problem");
  box.textContent = error ? String(error.message ?? error) : "";
  box.hidden = !error;
}

function announce(text) {
  find("announcement").textContent = text;
}

function press(button, pressed) {
  find(button).setAttribute("aria-pressed", String(pressed));
}

function refresh() {
  find("empty").hidden = dialogue.childElementCount > 0;
  find("stop").disabled = !answer;
  const list = find("attachments");
  list.hidden = !attached.length;
  list.replaceChildren(
    ...attached.map((item, i) => {
      const entry = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = `${item.name} ✕`;
      button.setAttribute("aria-label", `Remove ${item.name}`);
      button.onclick = () => {
        attached.splice(i, 1);
        refresh();
      };
      entry.append(button);
      return entry;
    }),
  );
  dialogue.parentElement.parentElement.scrollTo({ top: dialogue.scrollHeight });
}

function showMine(text, previews = []) {
  const item = document.createElement("li");
  item.className = "user";
  item.append(...previews);
  const paragraph = document.createElement("p");
  paragraph.textContent = text;
  item.append(paragraph);
  dialogue.append(item);
  refresh();
  return paragraph;
}

// --- a turn that is sent whole ---

async function send(parts, text, previews) {
  tell(null);
  await stopAnswer();
  const content = [...attached.map((item) => item.part), ...parts];
  if (text) content.push({ type: "text", text });
  if (!content.length) return;
  showMine(text || (parts.length ? "(spoken)" : ""), [...attached.flatMap((item) => item.preview), ...previews]);
  attached = [];
  messages.push({ role: "user", content });
  const voice = find("voice").value;
  answer = new Answer(dialogue, Boolean(voice));
  const mine = answer;
  refresh();
  asking = new AbortController();
  const body = { model, messages: [{ role: "system", content: SYSTEM_PROMPT }, ...messages] };
  if (voice) Object.assign(body, { modalities: ["text", "audio"], audio: { voice, format: "pcm16" } });
  try {
    await mine.open();
    let timeline;
    for await (const chunk of streamChat(body, asking.signal)) {
      const [choice] = chunk.choices;
      timeline = choice?.timeline ?? timeline;
      if (choice?.delta.content) mine.addText(choice.delta.content);
      const audio = choice?.delta.audio;
      if (audio?.data) mine.addSound(fromPcm16(fromBase64(audio.data)), audio.hold_back);
      refresh();
    }
    mine.complete(timeline);
  } catch (error) {
    mine.stop();
    if (error.name !== "AbortError") tell(error);
  }
  messages.push({ role: "assistant", content: mine.text });
  announce(mine.text);
  await mine.finished;
  if (answer === mine) answer = null;
  refresh();
}

async function stopAnswer() {
  asking?.abort();
  const stopped = answer;
  if (!stopped) return;
  if (session) session.interrupt();
  stopped.stop();
  answer = null;
  await stopped.finished;
  refresh();
}

// --- push to talk ---

const talk = { microphone: null, pieces: [] };

async function beginTalk() {
  if (talk.microphone || session) return;
  await stopAnswer();
  talk.pieces = [];
  talk.microphone = new Microphone();
  press("talk", true);
  try {
    await talk.microphone.open((samples) => talk.pieces.push(samples));
  } catch (error) {
    endTalk();
    tell(error);
  }
}

async function endTalk() {
  if (!talk.microphone) return;
  talk.microphone.close();
  talk.microphone = null;
  press("talk", false);
  const samples = joinSamples(talk.pieces);
  if (samples.length < SHORTEST_TURN * 24000) return;
  const wav = new Uint8Array(await toWav(samples).arrayBuffer());
  const parts = [{ type: "input_audio", input_audio: { data: toBase64(wav), format: "wav" } }];
  const previews = [];
  if (camera) {
    const url = takePicture();
    parts.unshift({ type: "image_url", image_url: { url } });
    previews.push(makePreview("img", url));
  }
  await send(parts, "", previews);
}

// --- hands-free: the server takes turns ---

async function beginHandsFree() {
  tell(null);
  await stopAnswer();
  press("hands-free", true);
  const microphone = new Microphone();
  const mine = {}; // paragraphs of what the user says, by item
  let item = null; // that is spoken
  let frames = null;
  // one after the other, though some are waited for
  let handled = Promise.resolve();
  const handle = (event) => (handled = handled.then(() => onEvent(event)).catch(tell));
  const connection = openSession(model, handle, () => endHandsFree());
  session = {
    interrupt() {
      connection.send("response.cancel");
      cut();
    },
    close() {
      clearInterval(frames);
      microphone.close();
      connection.close();
    },
  };

  function cut() {
    if (!answer || !item) return;
    const audio_end_ms = answer.playedMilliseconds;
    connection.send("conversation.item.truncate", { item_id: item, content_index: 0, audio_end_ms });
  }

  async function onEvent(event) {
    if (event.type === "session.created") {
      const voice = find("voice").value;
      const audio = { input: { transcription: { model } }, output: voice ? { voice } : {} };
      const output_modalities = [voice ? "audio" : "text"];
      connection.send("session.update", { session: { type: "realtime", audio, output_modalities } });
      for (const message of messages) connection.send("conversation.item.create", { item: toItem(message) });
      await microphone.open((samples) =>
        connection.send("input_audio_buffer.append", { audio: toBase64(toPcm16(samples)) }),
      );
      frames = setInterval(() => {
        if (!camera) return;
        connection.send("input_image_buffer.append", { image: takePicture().split(",")[1] });
      }, FRAME_MILLISECONDS);
      announce("Listening");
    } else if (event.type === "input_audio_buffer.speech_started") {
      cut();
      answer?.stop();
      answer = null;
      mine[event.item_id] = showMine("…");
    } else if (event.type === "conversation.item.input_audio_transcription.completed") {
      if (mine[event.item_id]) mine[event.item_id].textContent = event.transcript;
      messages.push({ role: "user", content: event.transcript });
    } else if (event.type === "response.created") {
      answer = new Answer(dialogue, Boolean(find("voice").value));
      await answer.open();
      refresh();
    } else if (event.type === "response.output_item.added") {
      item = event.item.id;
    } else if (event.type === "response.output_audio_transcript.delta" || event.type === "response.output_text.delta") {
      answer?.addText(event.delta);
    } else if (event.type === "response.output_audio.delta") {
      answer?.addSound(fromPcm16(fromBase64(event.delta)), event.hold_back);
    } else if (event.type === "response.done") {
      const done = answer;
      if (event.response.status === "failed") tell(event.response.status_details?.error);
      if (!done) return;
      done.complete();
      messages.push({ role: "assistant", content: done.text });
      announce(done.text);
      // while it is still heard, other events come
      done.finished.then(() => {
        if (answer === done) answer = null;
        refresh();
      });
    } else if (event.type === "error" && event.error.code !== null) {
      tell(event.error);
    }
    refresh();
  }
}

function endHandsFree() {
  press("hands-free", false);
  session?.close();
  session = null;
  answer?.stop();
  answer = null;
  refresh();
}

// A message for a session: its text; sounds and videos of earlier turns stay behind.
function toItem({ role, content }) {
  const kind = role === "assistant" ? "output_text" : "input_text";
  const texts = typeof content === "string" ? [content] : content.map((part) => part.text ?? "(media)");
  return { type: "message", role, content: [{ type: kind, text: texts.join(" ") }] };
}

// --- camera and files ---

async function toggleCamera() {
  const view = find("camera");
  if (camera) {
    camera.getTracks().forEach((track) => track.stop());
    camera = null;
  } else {
    try {
      camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      view.srcObject = camera;
      await view.play();
    } catch (error) {
      tell(error);
      camera = null;
    }
  }
  view.hidden = !camera;
  press("use-camera", Boolean(camera));
}

function takePicture() {
  const view = find("camera");
  const scale = Math.min(1, CAMERA_SIDE / Math.max(view.videoWidth, view.videoHeight));
  const sheet = Object.assign(document.createElement("canvas"), {
    width: Math.max(1, Math.round(view.videoWidth * scale)),
    height: Math.max(1, Math.round(view.videoHeight * scale)),
  });
  sheet.getContext("2d").drawImage(view, 0, 0, sheet.width, sheet.height);
  return sheet.toDataURL("image/jpeg", 0.9);
}

function makePreview(tag, url) {
  const element = document.createElement(tag);
  element.src = url;
  if (tag === "img") element.alt = "What was sent";
  else element.controls = true;
  return element;
}

async function attach(files) {
  for (const file of files) {
    const [kind] = file.type.split("/");
    if (!["image", "audio", "video"].includes(kind)) {
      tell(`${file.name} is no picture, sound or video`);
      continue;
    }
    const data = toBase64(new Uint8Array(await file.arrayBuffer()));
    const url = `data:${file.type.split(";")[0]};base64,${data}`;
    const part = { type: `${kind}_url`, [`${kind}_url`]: { url } };
    const tag = kind === "image" ? "img" : kind;
    attached.push({ part, name: file.name, preview: [makePreview(tag, URL.createObjectURL(file))] });
  }
  refresh();
}

// --- a voice of one's own ---

const recording = { microphone: null, samples: null, pieces: [] };

async function toggleRecording() {
  if (recording.microphone) {
    recording.microphone.close();
    recording.microphone = null;
    recording.samples = joinSamples(recording.pieces);
    press("voice-record", false);
    find("voice-status").textContent = `${(recording.samples.length / 24000).toFixed(1)} s recorded.`;
    find("voice-save").disabled = false;
    return;
  }
  recording.pieces = [];
  recording.microphone = new Microphone();
  press("voice-record", true);
  find("voice-status").textContent = "Recording; press again to end.";
  await recording.microphone.open((samples) => recording.pieces.push(samples));
}

async function saveVoice() {
  const speaker = find("voice-speaker").value;
  const fields = {
    name: find("voice-name").value,
    audio_sample: toWav(recording.samples),
    consent: `${speaker} speaks in this recording and has agreed that their voice is used on this server.`,
  };
  if (find("voice-text").value) fields.ref_text = find("voice-text").value;
  try {
    await addVoice(fields);
    await start();
    find("voice").value = fields.name;
  } catch (error) {
    tell(error);
  }
}

// --- what people do ---

find("form").onsubmit = (event) => {
  event.preventDefault();
  const text = find("text").value.trim();
  find("text").value = "";
  if (text || attached.length) send([], text, []);
};
find("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    find("form").requestSubmit();
  }
};
const talkButton = find("talk");
talkButton.onpointerdown = () => beginTalk();
talkButton.onpointerup = talkButton.onpointercancel = talkButton.onpointerleave = () => endTalk();
// for the keyboard and for screen readers, which press and do not hold
talkButton.onclick = (event) => {
  if (event.detail === 0) (talk.microphone ? endTalk : beginTalk)();
};
const isTyping = (element) => element.closest("input, textarea, select, button, summary, dialog");
document.addEventListener("keydown", (event) => {
  if (event.code === "Space" && !event.repeat && !isTyping(event.target)) {
    event.preventDefault();
    beginTalk();
  } else if (event.key === "Escape") stopAnswer();
});
document.addEventListener("keyup", (event) => {
  if (event.code === "Space" && !isTyping(event.target)) endTalk();
});
find("hands-free").onclick = () => (session ? endHandsFree() : beginHandsFree());
find("use-camera").onclick = toggleCamera;
find("stop").onclick = stopAnswer;
find("files").onchange = (event) => attach(event.target.files).then(() => (event.target.value = ""));
find("clear").onclick = async () => {
  await stopAnswer();
  if (session) endHandsFree();
  messages = [];
  attached = [];
  dialogue.replaceChildren();
  refresh();
};
const main = document.querySelector("main");
main.ondragover = (event) => {
  event.preventDefault();
  main.classList.add("dropping");
};
main.ondragleave = () => main.classList.remove("dropping");
main.ondrop = (event) => {
  event.preventDefault();
  main.classList.remove("dropping");
  attach(event.dataTransfer.files);
};
find("add-voice").onclick = () => find("voice-dialog").showModal();
find("voice-record").onclick = () => toggleRecording().catch(tell);
find("voice-dialog").onclose = (event) => {
  recording.microphone?.close();
  recording.microphone = null;
  if (event.target.returnValue === "save" && recording.samples) saveVoice();
};
find("key-form").onsubmit = () => {
  setKey(find("key").value);
  start();
};

window.omni = { analyser: () => answer?.analyser }; // for whoever watches the page from outside
start();
refresh();

// The page's sound: one audio context, the player of answers, and the microphone.

export const RATE = 24000;

let context;

async function openContext() {
  if (!context) {
    // at the server's rate where the browser can, so that nothing is resampled
    context = new AudioContext({ sampleRate: RATE });
    await context.audioWorklet.addModule("/page/worklets.js");
  }
  if (context.state !== "running") await context.resume();
  return context;
}

// Plays one answer at a time.
export class Player {
  #node;
  #seconds = 0; // that have come
  #started = false;
  #held = []; // what comes before there is a node
  onplayed = () => {};
  ondone = () => {};
  dried = 0; // how often it ran dry

  async open() {
    const opened = await openContext();
    this.#node = new AudioWorkletNode(opened, "player", { numberOfInputs: 0, outputChannelCount: [1] });
    this.analyser = opened.createAnalyser();
    this.#node.connect(this.analyser).connect(opened.destination);
    this.#node.port.onmessage = ({ data }) => {
      if (data.kind === "dry") this.dried++;
      else if (data.kind === "done") this.ondone(data.played / RATE);
      else this.onplayed(data.played / RATE);
    };
  }

  get seconds() {
    return this.#seconds;
  }

  // Takes samples; the first are held back for so many seconds.
  push(samples, holdBack = 0) {
    this.#seconds += samples.length / RATE;
    this.#node.port.postMessage({ kind: "push", samples }, [samples.buffer]);
    if (!this.#started) {
      this.#started = true;
      this.#held.push(setTimeout(() => this.#node.port.postMessage({ kind: "start" }), 1000 * holdBack));
    }
  }

  // Says that no more come.
  end() {
    this.#node.port.postMessage({ kind: "end" });
    if (!this.#started) this.ondone(0);
  }

  stop() {
    this.#held.forEach(clearTimeout);
    this.#node?.port.postMessage({ kind: "clear" });
    this.#node?.disconnect();
  }
}

// Hears the microphone until it is stopped; packets are Float32Arrays at RATE.
export class Microphone {
  #stream;
  #node;

  async open(onPacket) {
    const opened = await openContext();
    const wanted = { channelCount: 1, echoCancellation: true, noiseSuppression: true };
    this.#stream = await navigator.mediaDevices.getUserMedia({ audio: wanted });
    this.#node = new AudioWorkletNode(opened, "recorder", { numberOfOutputs: 0 });
    const resample = makeResampler(opened.sampleRate);
    this.#node.port.onmessage = ({ data }) => onPacket(resample(data));
    opened.createMediaStreamSource(this.#stream).connect(this.#node);
  }

  close() {
    this.#node?.port.close();
    this.#node?.disconnect();
    this.#stream?.getTracks().forEach((track) => track.stop());
  }
}

function makeResampler(rate) {
  if (rate === RATE) return (samples) => samples;
  let place = 0; // of the next sample, in the packet
  let last = 0;
  return (samples) => {
    const out = [];
    for (; place < samples.length; place += rate / RATE) {
      const left = Math.floor(place) > 0 ? samples[Math.floor(place) - 1] : last;
      out.push(left + (samples[Math.floor(place)] - left) * (place % 1));
    }
    place -= samples.length;
    last = samples[samples.length - 1];
    return Float32Array.from(out);
  };
}

export function toPcm16(samples) {
  const out = new Int16Array(samples.length);
  for (let i = 0; i < samples.length; i++) out[i] = Math.round(32767 * Math.max(-1, Math.min(1, samples[i])));
  return new Uint8Array(out.buffer);
}

export function fromPcm16(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Float32Array.from({ length: bytes.byteLength / 2 }, (_, i) => view.getInt16(2 * i, true) / 32768);
}

export function toBase64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}

export function fromBase64(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

export function joinSamples(pieces) {
  const out = new Float32Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let place = 0;
  for (const piece of pieces) {
    out.set(piece, place);
    place += piece.length;
  }
  return out;
}

// A WAV file of samples at RATE.
export function toWav(samples) {
  const data = toPcm16(samples);
  const header = new DataView(new ArrayBuffer(44));
  const write = (place, text) => [...text].forEach((letter, i) => header.setUint8(place + i, letter.charCodeAt(0)));
  write(0, "RIFF");
  header.setUint32(4, 36 + data.length, true);
  write(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true);
  header.setUint16(22, 1, true);
  header.setUint32(24, RATE, true);
  header.setUint32(28, 2 * RATE, true);
  header.setUint16(32, 2, true);
  header.setUint16(34, 16, true);
  write(36, "data");
  header.setUint32(40, data.length, true);
  return new Blob([header, data], { type: "audio/wav" });
}

// Sound in the audio thread: what is played, without gaps, and what the microphone hears.

const RATE = 24000; // of the server's sound

// Plays samples as they come, at RATE, and tells how many were played and whether it ran dry.
class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.clear();
    this.port.onmessage = ({ data }) => {
      if (data.kind === "push") this.pieces.push(data.samples);
      else if (data.kind === "start") this.running = true;
      else if (data.kind === "end") this.ended = true;
      else if (data.kind === "clear") this.clear();
    };
  }

  clear() {
    this.pieces = [];
    this.offset = 0; // in the first piece, with a fraction where the context has another rate
    this.played = 0;
    this.running = false;
    this.ended = false;
    this.dry = false;
  }

  process(_, [[out]]) {
    const step = RATE / sampleRate;
    const before = this.played;
    for (let i = 0; this.running && i < out.length; i++) {
      while (this.pieces.length && this.offset >= this.pieces[0].length) {
        this.offset -= this.pieces.shift().length;
      }
      if (!this.pieces.length) {
        if (!this.dry && !this.ended) this.port.postMessage({ kind: "dry" });
        this.dry = true;
        if (this.ended) {
          this.running = false;
          this.port.postMessage({ kind: "done", played: this.played });
        }
        break;
      }
      this.dry = false;
      out[i] = this.take();
      this.offset += step;
      this.played += step;
    }
    // a tenth of a second is often enough for whoever shows it
    if (Math.floor(before / 2400) !== Math.floor(this.played / 2400)) {
      this.port.postMessage({ kind: "played", played: this.played });
    }
    return true;
  }

  // The sample here, between its two neighbours.
  take() {
    const [first, second] = this.pieces;
    const place = Math.floor(this.offset);
    const left = first[place];
    const right = place + 1 < first.length ? first[place + 1] : (second?.[0] ?? left);
    return left + (right - left) * (this.offset - place);
  }
}

// Gives what the microphone hears in packets of 20 ms, at the rate of the context.
class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.packet = new Float32Array(Math.round(sampleRate / 50));
    this.filled = 0;
  }

  process([[input]]) {
    for (const sample of input ?? []) {
      this.packet[this.filled++] = sample;
      if (this.filled === this.packet.length) {
        this.port.postMessage(this.packet.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("player", Player);
registerProcessor("recorder", Recorder);

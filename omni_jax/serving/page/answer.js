// An answer on the page: its text appears as it is spoken, and how long its parts took is told below.

import { Player } from "/page/sound.js";

const LETTERS_PER_SECOND = 14; // of speech, until all of it is there and says better

export class Answer {
  #text = "";
  #spoken;
  #unspoken;
  #item;
  #player = null;
  #seconds = 0; // played
  #complete = false;
  #asked = performance.now();
  #times = {};
  #finished;
  finished = new Promise((resolve) => (this.#finished = resolve));

  // Adds itself to the dialogue; a voice is heard if `speaks`.
  constructor(dialogue, speaks) {
    this.#item = document.createElement("li");
    this.#item.className = "assistant";
    const paragraph = document.createElement("p");
    this.#spoken = document.createElement("span");
    this.#unspoken = document.createElement("span");
    this.#unspoken.className = "unspoken";
    paragraph.append(this.#spoken, this.#unspoken);
    this.#item.append(paragraph);
    dialogue.append(this.#item);
    if (speaks) this.#player = new Player();
  }

  get text() {
    return this.#text;
  }

  get analyser() {
    return this.#player?.analyser;
  }

  // Milliseconds of its sound that were heard.
  get playedMilliseconds() {
    return Math.floor(1000 * Math.min(this.#seconds, this.#player?.seconds ?? 0));
  }

  async open() {
    if (!this.#player) return;
    await this.#player.open();
    this.#player.onplayed = (seconds) => {
      this.#seconds = seconds;
      this.#show();
    };
    this.#player.ondone = (seconds) => {
      this.#seconds = seconds;
      this.#end();
    };
  }

  addText(text) {
    this.#times.text ??= performance.now();
    this.#text += text;
    this.#show();
  }

  addSound(samples, holdBack) {
    this.#times.sound ??= performance.now();
    this.#times.holdBack ??= holdBack ?? 0;
    this.#player?.push(samples, holdBack);
  }

  // All of it is there; `budget` are the server's own figures, if it gives any.
  complete(budget) {
    this.#times.complete = performance.now();
    this.#times.budget = budget;
    this.#complete = true;
    if (this.#player) this.#player.end();
    else this.#end();
    this.#show();
  }

  // It is cut here.
  stop() {
    this.#player?.stop();
    this.#end();
  }

  #show() {
    const total = this.#player?.seconds ?? 0;
    let count = this.#text.length;
    if (this.#player && this.#item.isConnected && !this.#item.dataset.ended) {
      const rate = this.#complete && total ? this.#text.length / total : LETTERS_PER_SECOND;
      count = Math.min(count, Math.ceil(this.#seconds * rate));
    }
    this.#spoken.textContent = this.#text.slice(0, count);
    this.#unspoken.textContent = this.#text.slice(count);
  }

  #end() {
    if (this.#item.dataset.ended) return;
    this.#item.dataset.ended = "true";
    this.#show();
    this.#item.append(this.#describeTimes());
    this.#finished();
  }

  #describeTimes() {
    const { text, sound, complete, holdBack, budget } = this.#times;
    const since = (time) => (time === undefined ? "none" : `${((time - this.#asked) / 1000).toFixed(2)} s`);
    const details = document.createElement("details");
    details.className = "latency";
    const summary = document.createElement("summary");
    const first = this.#player ? `first sound after ${since(sound)}` : `first text after ${since(text)}`;
    const count = this.#player?.dried ?? 0;
    const dried = count ? `, ran dry ${count === 1 ? "once" : `${count} times`}` : "";
    summary.textContent = first + dried;
    const rows = [
      ["first text", since(text)],
      ["first sound", since(sound)],
      ["held back", sound === undefined ? "none" : `${holdBack.toFixed(2)} s`],
      ["all of it", since(complete)],
    ];
    for (const [name, seconds] of Object.entries(budget ?? {})) {
      rows.push([`in the server: ${name.replaceAll("_", " ")}`, `${seconds.toFixed(2)} s`]);
    }
    const table = document.createElement("table");
    for (const [name, value] of rows) {
      const row = table.insertRow();
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name;
      row.append(head);
      row.insertCell().textContent = value;
    }
    details.append(summary, table);
    return details;
  }
}

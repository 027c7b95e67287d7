// The talk tab's behaviour: one conversation at a time, shown as it happens.
// Sound and wire are the client's business; this file turns its events into what one sees.

import { SpeechClient } from "../web/speechlm-client.js";

const RATE = 24000; // Hz, of the wire
const FLOOR_DB = -60; // the empty end of a meter
const VOICED_DB = -40;
const HOLD_MS = 400; // a pause this short does not end "speaking"
const SAME_TURN_MS = 1500; // what one side adds within this time continues its turn
const LONG_PAUSE_MS = 4000; // what it adds after this time never does
const UNATTENDED_MS = 25_000; // a call without a microphone gives its line back after this silence

/** What the state line says; `failed` says what went wrong instead. */
const SAYS = {
  idle: "Press the button and speak.",
  connecting: "Connecting…",
  listening: "Listening.",
  asking: "Asking your question…",
  speaking: "Speaking. Interrupt as you like.",
  refused: "The microphone was refused. Allow it in the address bar, or pick a question.",
  deaf: "There is no microphone. Connect one, or pick a question.",
  muted: "The browser let no sound begin. Press the button, or pick a question, once more.",
  full: "Every line is busy. Try again in a moment.",
};
const LIVE = new Set(["listening", "asking", "speaking"]);

/** The state that shows an error of the client, by its code; "failed" shows any other. */
const FAILS = {
  "microphone-refused": "refused",
  "no-microphone": "deaf",
  "sound-refused": "muted",
  "server-full": "full",
};

/** Write only what changes: a screen reader speaks whatever is written. */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** The two-sided transcript: pieces of text in, turns out. */
class Transcript {
  constructor(log) {
    this.log = log;
    this.list = log.querySelector("ol");
    this.empty = this.list.firstElementChild;
    this.clear();
  }

  clear() {
    this.endTurns();
    this.list.replaceChildren(this.empty);
  }

  endTurns() {
    this.open = {}; // side → {text: element, at: ms of its last piece}
    this.latest = null; // the side that opened the last turn
  }

  add(side, piece) {
    const now = performance.now();
    let turn = this.open[side];
    const since = now - (turn?.at ?? -Infinity);
    const continues = since < SAME_TURN_MS || (this.latest === side && since < LONG_PAUSE_MS);
    if (!continues) {
      if (!piece.trim()) return;
      turn = this.open[side] = { text: this.begin(side) };
      this.latest = side;
    }
    turn.at = now;
    turn.text.append(turn.text.textContent ? piece : piece.trimStart());
    this.log.scrollTop = this.log.scrollHeight;
  }

  begin(side) {
    this.empty.remove();
    const item = document.createElement("li");
    item.className = `turn ${side}`;
    const who = document.createElement("span");
    who.className = "who";
    who.textContent = side === "you" ? "You, as it heard you" : "Model";
    const text = document.createElement("span");
    text.className = "text";
    item.append(who, text);
    this.list.append(item);
    return text;
  }
}

class TalkPage {
  constructor(root) {
    this.root = root;
    const find = (selector) => root.querySelector(selector);
    this.orb = find(".orb");
    this.orbLabel = find(".orb-label");
    this.stateLine = find(".state");
    this.bars = { you: find(".level.you .bar"), model: find(".level.model .bar") };
    this.figures = { latency: find(".latency"), response: find(".response") };
    this.startOver = find(".start-over");
    this.note = find(".note");
    this.hint = this.note.textContent;
    this.chips = find(".chips");
    this.transcript = new Transcript(find(".log"));
    this.client = null;
    this.asking = false; // a recording is on its way to the model
    this.soundAt = 0; // ms: when either side was last heard
    this.spokeAt = -Infinity; // ms: when the model was last heard
    this.attended = false; // a microphone is open

    this.orb.addEventListener("click", () => (this.client ? this.stop() : this.start(true)));
    this.startOver.addEventListener("click", () => this.clear());
    this.chips.addEventListener("click", (event) => {
      const chip = event.target.closest("[data-src]");
      if (this.occupied) event.preventDefault(); // not even the choice of a file
      else if (chip) this.ask(chip, () => fetchSound(chip.dataset.src));
    });
    find("input[type=file]").addEventListener("change", ({ target }) => {
      const [file] = target.files;
      target.value = ""; // the same file may be chosen again
      if (file) this.ask(target.closest(".chip"), () => file);
    });
    addEventListener("pagehide", () => this.stop());
    this.show("idle");
  }

  /** Show `state`; `message` replaces its usual line. */
  show(state, message = SAYS[state]) {
    const live = LIVE.has(state);
    this.root.dataset.state = state;
    this.root.toggleAttribute("data-live", live);
    write(this.stateLine, message);
    write(this.orbLabel, live ? "Stop" : state === "connecting" ? "Cancel" : "Talk");
    this.orb.toggleAttribute("data-busy", state === "connecting");
    this.offerChips();
  }

  /** No recording may be asked now. */
  get occupied() {
    return this.asking || this.root.dataset.state === "connecting";
  }

  offerChips() {
    // Not `disabled`, which would take the focus from the chip that was pressed.
    this.chips.setAttribute("aria-disabled", this.occupied);
  }

  /** Open a conversation; true when it is live. */
  async start(microphone) {
    const client = new SpeechClient({ format: "pcm_f32" });
    this.client = client;
    this.attended = microphone;
    this.soundAt = performance.now();
    write(this.note, this.hint);
    this.show("connecting");
    const on = (type, act) =>
      client.addEventListener(type, ({ detail }) => {
        if (this.client === client) act(detail); // not what a closed call still had to say
      });
    on("text", ({ text }) => this.say("model", text));
    on("heard", ({ text }) => this.say("you", text));
    on("level", (levels) => this.level(levels));
    on("latency", (measured) => this.latency(measured));
    on("error", (error) => this.fail(error));
    try {
      await client.connect({ microphone });
    } catch {
      return false; // told by the error event above, or stopped by hand
    }
    if (this.client !== client) return false;
    this.show(this.asking ? "asking" : "listening");
    return true;
  }

  stop() {
    const client = this.client;
    this.hangUp();
    client?.close();
    this.show("idle");
  }

  /** Client and server each say what went wrong in one sentence; the usual ones are put plainer. */
  fail({ message, code }) {
    this.hangUp();
    const state = FAILS[code] ?? "failed";
    this.show(state, SAYS[state] ?? message);
  }

  hangUp() {
    this.client = null;
    this.player?.pause();
    this.transcript.endTurns();
    this.setLevel("you", FLOOR_DB);
    this.setLevel("model", FLOOR_DB);
  }

  clear() {
    this.transcript.clear();
    // A disabled button loses the focus; the transcript is where one would look next.
    if (document.activeElement === this.startOver) this.transcript.log.focus();
    this.startOver.disabled = true;
    this.player?.pause();
    if (LIVE.has(this.root.dataset.state)) this.client.restart();
  }

  /** Stream the recording that `open` gives in the microphone's place, and let the visitor hear it. */
  async ask(chip, open) {
    if (this.occupied) return;
    let url;
    this.asking = true;
    chip.setAttribute("aria-busy", "true");
    write(this.note, this.hint);
    this.offerChips();
    // Before anything is waited for: outside the click itself, Safari lets no sound begin.
    const started = this.client ? null : this.start(false);
    const { client } = this;
    try {
      const recording = await open();
      const pcm = await decode(recording);
      if (started && !(await started)) return;
      if (this.client !== client) return; // stopped, or begun, by hand meanwhile
      url = URL.createObjectURL(recording);
      this.player = new Audio(url);
      this.player.volume = 0.6;
      this.player.play().catch(() => {}); // to hear it is a courtesy: what is sent does not depend on it
      await this.client.feed(pcm, RATE);
    } catch ({ message }) {
      if (started && this.client === client) this.stop(); // there is nothing to ask in it
      write(this.note, message);
    } finally {
      if (url) URL.revokeObjectURL(url);
      chip.removeAttribute("aria-busy");
      this.asking = false;
      this.offerChips();
    }
  }

  say(side, piece) {
    this.transcript.add(side, piece);
    this.startOver.disabled = false;
  }

  level({ input, output }) {
    const now = performance.now();
    this.setLevel("you", input);
    this.setLevel("model", output);
    if (output > VOICED_DB) this.spokeAt = now;
    if (Math.max(input, output) > VOICED_DB || this.asking) this.soundAt = now;
    if (!this.attended && now - this.soundAt > UNATTENDED_MS) return this.stop();
    if (!LIVE.has(this.root.dataset.state)) return;
    const speaking = now - this.spokeAt < HOLD_MS;
    this.show(speaking ? "speaking" : this.asking ? "asking" : "listening");
  }

  setLevel(side, dbfs) {
    const level = Math.min(1, Math.max(0, 1 - dbfs / FLOOR_DB));
    this.root.style.setProperty(`--${side}-level`, level.toFixed(3));
    const shown = Math.round(Math.max(FLOOR_DB, dbfs));
    this.bars[side].setAttribute("aria-valuenow", shown);
    this.bars[side].setAttribute("aria-valuetext", `${shown} dB`.replace("-", "−"));
  }

  latency({ pipeline_ms, response_ms }) {
    if (pipeline_ms != null) this.figures.latency.textContent = `${Math.round(pipeline_ms)} ms`;
    if (response_ms != null) this.figures.response.textContent = `${Math.round(response_ms)} ms`;
  }
}

/** The sound of an example, as a Blob. */
async function fetchSound(url) {
  const answer = await fetch(url).catch(() => null);
  if (answer?.ok) return answer.blob();
  throw new Error(`The example could not be fetched (${answer?.status ?? "no answer"}).`);
}

/** Any sound file that the browser reads → mono Float32Array at the wire's rate. */
async function decode(recording) {
  const offline = new OfflineAudioContext(1, 1, RATE); // decodes to its own rate
  const sound = await offline.decodeAudioData(await recording.arrayBuffer()).catch(() => {
    throw new Error("That file holds no sound that this browser can read. Try another.");
  });
  const pcm = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    const samples = sound.getChannelData(channel);
    for (let k = 0; k < pcm.length; k++) pcm[k] += samples[k] / sound.numberOfChannels;
  }
  return pcm;
}

/** Bring the page under `element` to life. */
export function mount(element) {
  new TalkPage(element.querySelector(".talk"));
}

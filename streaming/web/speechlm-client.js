// A conversation with a speechlm server from a web page. One ES module, no dependencies.
//
//   import { SpeechClient } from "/web/speechlm-client.js";
//   const client = new SpeechClient();
//   client.addEventListener("text", ({ detail }) => log.append(detail.text));
//   button.onclick = () => client.connect();            // inside a click: browsers ask for it
//   await client.feed(samples, 44100);                  // a recording instead of the microphone
//
// Events (all CustomEvent, facts in `detail`):
//   state    {state}                    "idle" | "connecting" | "live" | "closed"
//   session  {id, seed, format, model, delay_ms, ignored, …}   once, when the server has a place
//   text     {text}                     a piece of what the assistant says
//   heard    {text}                     a piece of what it heard
//   level    {input, output}            dBFS over 40 ms, 25 times a second, measured in the page
//   latency  {response_ms}              last voiced input → first audible output, in the page; and
//            {compute_ms, queue_ms, pipeline_ms, playout_ms}   as the server measures them
//   error    {message, code}            one sentence; the connection is then closed. The code is
//            "microphone-refused", "no-microphone", "sound-refused", "server-full", or undefined
//            for the unusual
//   metadata {type, …}                  any other JSON the server sends

import { resample } from "./resampler.js";

const RATE = 24000;
const KIND = { handshake: 0, audio: 1, text: 2, control: 3, metadata: 4, error: 5, ping: 6, coloredText: 7 };
const ACTION = { start: 0, endTurn: 1, pause: 2, restart: 3 };
const CONNECT_MS = 10_000;
const LATE = RATE; // samples that a server may owe beyond its own delay, a second
const RESTART_MS = 2000; // a server that has not said by now that it began anew will not
const STOPPED_MS = 5000; // sound that does not run again by now will not
const SILENT_MS = 20_000; // the server pings more often than this
const TRY_LATER = 1013; // the WebSocket's close code of a full server

/** An Error with the code of the error event that tells of it. */
const coded = (message, code) => Object.assign(new Error(message), { code });
const stop = (stream) => stream?.getTracks().forEach((track) => track.stop());

/** Samples of a chunk of bytes, for bytes cut anywhere. */
class PcmDecoder {
  constructor(format) {
    this.float = format === "pcm_f32";
    this.rest = new Uint8Array(0);
  }

  decode(bytes) {
    const width = this.float ? 4 : 2;
    const all = new Uint8Array(this.rest.length + bytes.length);
    all.set(this.rest);
    all.set(bytes, this.rest.length);
    const count = Math.floor(all.length / width);
    this.rest = all.slice(count * width);
    const view = new DataView(all.buffer);
    const pcm = new Float32Array(count);
    for (let k = 0; k < count; k++) {
      pcm[k] = this.float ? view.getFloat32(4 * k, true) : view.getInt16(2 * k, true) / 32767;
    }
    return pcm;
  }
}

/** One audio message: the kind, then little-endian samples. */
function audioMessage(pcm, format) {
  const width = format === "pcm_f32" ? 4 : 2;
  const bytes = new Uint8Array(1 + width * pcm.length);
  bytes[0] = KIND.audio;
  const view = new DataView(bytes.buffer, 1);
  for (let k = 0; k < pcm.length; k++) {
    if (width === 4) view.setFloat32(4 * k, pcm[k], true);
    else view.setInt16(2 * k, Math.round(32767 * Math.max(-1, Math.min(1, pcm[k]))), true);
  }
  return bytes;
}

export class SpeechClient extends EventTarget {
  #socket = null;
  #context = null;
  #node = null;
  #stream = null;
  #decoder = null;
  #watchdog = 0;
  #feeds = new Map();
  #feedId = 0;
  #state = "idle";
  #playout = 0;
  #owed = 0; // samples sent, less those that came back
  #late = LATE; // so many owed are too many
  #paused = false;
  #restarts = 0; // those that the server has not confirmed
  #restartTimer = 0;
  #stoppedTimer = 0;

  /**
   * @param {object} [options]
   * @param {string|URL} [options.url] the server; by default the one this module came from;
   *   without a path `/api/chat` is meant
   * @param {"pcm_s16"|"pcm_f32"} [options.format]
   * @param {object} [options.params] seed, text_temperature, audio_temperature, text_topk, audio_topk
   * @param {string} [options.apiKey] sent as ?auth_id= (a page cannot set a WebSocket's headers)
   * @param {number} [options.jitterMs] sound held back against uneven arrival
   */
  constructor({ url, format = "pcm_s16", params = {}, apiKey, jitterMs = 50 } = {}) {
    super();
    this.url = new URL(url ?? new URL("../api/chat", import.meta.url), location.href);
    this.url.protocol = this.url.protocol.replace("http", "ws");
    if (this.url.pathname === "/") this.url.pathname = "/api/chat";
    this.url.searchParams.set("format", format);
    for (const [name, value] of Object.entries(params)) this.url.searchParams.set(name, value);
    if (apiKey) this.url.searchParams.set("auth_id", apiKey);
    this.format = format;
    this.jitterMs = jitterMs;
  }

  get state() {
    return this.#state;
  }

  /**
   * Opens sound and server; resolves when the conversation is live. Call it inside a click.
   * @param {object} [options]
   * @param {boolean} [options.microphone] false: silence is sent until something is fed
   * @throws {Error} when the page, the microphone or the server says no, or close() is called
   *   meanwhile; nothing is left open then
   */
  async connect({ microphone = true } = {}) {
    if (this.#state === "connecting" || this.#state === "live") {
      throw new Error(`connect() needs an idle or closed client; this one is ${this.#state}.`);
    }
    this.#enter("connecting");
    let context = null;
    let stream = null;
    // close() may come during any of the waits, and even another connect() after it.
    const check = () => {
      if (this.#context === context) return;
      stop(stream);
      throw new Error("The client was closed while it connected.");
    };
    try {
      if (!("AudioWorklet" in globalThis)) {
        throw new Error("This page may not use sound: open it over https or on localhost.");
      }
      // Created first and in the caller's task: a browser lets it sound only inside a user gesture.
      context = this.#context = new AudioContext({ latencyHint: "interactive" });
      context.onstatechange = () => this.#keepSounding(context);
      const running = context.resume();
      running.catch(() => {}); // waited for below, unless something else fails first
      if (microphone) stream = await this.#openMicrophone();
      check();
      this.#stream = stream;
      await context.audioWorklet.addModule(new URL("./speechlm-worklet.js", import.meta.url));
      check();
      this.#openAudio();
      await this.#openSocket();
      await this.#started(running);
      check();
    } catch (error) {
      check();
      this.#fail(error.message, error.code);
      throw error;
    }
    this.#enter("live");
  }

  /**
   * Streams a recording in the microphone's place, at the pace of speech. A slow server gets all
   * of it, however late.
   * @param {Float32Array} samples mono, -1…1
   * @param {number} [sampleRate] Hz
   * @returns {Promise<void>} resolves when all of it is on its way to the server
   */
  feed(samples, sampleRate = RATE) {
    if (this.#state !== "live") throw new Error(`feed() needs a live client; this one is ${this.#state}.`);
    if (!samples.length) return Promise.resolve();
    const pcm = Float32Array.from(resample(samples, sampleRate, RATE));
    const id = ++this.#feedId;
    this.#node.port.postMessage({ type: "feed", pcm, id }, [pcm.buffer]);
    return new Promise((resolve) => this.#feeds.set(id, resolve));
  }

  /** Forgets the conversation so far, and what is left of a recording that is being fed, and begins
   * a new one on the same connection. Sound and text of the old one that still come are dropped. */
  restart() {
    this.#control("restart");
    this.#node?.port.postMessage({ type: "flush" });
    this.#owed = 0;
    this.#restarts++;
    clearTimeout(this.#restartTimer);
    // Older servers begin anew without a word; nobody has counted what they sent meanwhile.
    this.#restartTimer = setTimeout(() => (this.#restarts = this.#owed = 0), RESTART_MS);
  }

  /** The model's clock stands still until `resume()`. */
  pause() {
    this.#control("pause");
    this.#paused = true;
  }

  resume() {
    this.#control("start");
    this.#paused = false;
  }

  /** Ends the conversation and frees microphone, sound and server. */
  close() {
    for (const timer of [this.#watchdog, this.#restartTimer, this.#stoppedTimer]) clearTimeout(timer);
    this.#restarts = this.#stoppedTimer = 0;
    for (const resolve of this.#feeds.values()) resolve();
    this.#feeds.clear();
    stop(this.#stream);
    this.#node?.port.postMessage({ type: "close" });
    this.#node?.disconnect();
    if (this.#context && this.#context.state !== "closed") this.#context.close();
    const socket = this.#socket;
    this.#socket = this.#context = this.#node = this.#stream = null;
    socket?.close(1000);
    if (this.#state !== "idle") this.#enter("closed");
  }

  #enter(state) {
    if (this.#state === state) return;
    this.#state = state;
    this.#emit("state", { state });
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #fail(message, code) {
    if (this.#state === "closed" || this.#state === "idle") return;
    this.#emit("error", { message, code });
    this.close();
  }

  #control(action) {
    if (this.#state !== "live") throw new Error(`${action} needs a live client; this one is ${this.#state}.`);
    this.#socket.send(Uint8Array.of(KIND.control, ACTION[action]));
  }

  async #openMicrophone() {
    try {
      // The server leaves echo, noise and gain to the browser, which knows the loudspeaker.
      const stream = await navigator.mediaDevices.getUserMedia({
        audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
      });
      for (const track of stream.getTracks()) {
        track.onended = () => {
          if (stream === this.#stream) this.#fail("The microphone was disconnected.", "no-microphone");
        };
      }
      return stream;
    } catch (error) {
      if (error.name === "NotFoundError") {
        throw coded("No microphone was found; connect one, or feed a recording.", "no-microphone");
      }
      throw coded(
        `The microphone could not be opened (${error.name}); allow it in the browser, or feed a recording.`,
        error.name === "NotAllowedError" ? "microphone-refused" : undefined,
      );
    }
  }

  #openAudio() {
    this.#node = new AudioWorkletNode(this.#context, "speechlm", {
      numberOfInputs: 1,
      numberOfOutputs: 1,
      outputChannelCount: [2],
      channelCount: 1,
      channelCountMode: "explicit",
      processorOptions: { jitterMs: this.jitterMs },
    });
    this.#node.port.onmessage = ({ data }) => this.#fromAudio(data);
    this.#node.onprocessorerror = () => this.#fail("The browser's audio thread stopped.");
    this.#node.connect(this.#context.destination);
    if (this.#stream) this.#context.createMediaStreamSource(this.#stream).connect(this.#node);
  }

  /** Waits for the sound to run; outside a user gesture it may never do so. */
  #started(running) {
    const late = new Promise((_, reject) => {
      const message = "The browser does not let the page sound; call connect() inside a click.";
      setTimeout(() => reject(coded(message, "sound-refused")), CONNECT_MS);
    });
    return Promise.race([running, late]);
  }

  /** A telephone call, another program or a headset that goes may stop the sound: asks for it again,
   * and gives up when it does not come. */
  #keepSounding(context) {
    if (context !== this.#context) return; // closed from this side
    if (context.state === "running") {
      clearTimeout(this.#stoppedTimer);
      this.#stoppedTimer = 0;
    } else {
      context.resume().catch(() => {}); // the timer will tell
      const message = "The sound of the page was stopped and does not go on; connect again.";
      this.#stoppedTimer ||= setTimeout(() => this.#fail(message), STOPPED_MS);
    }
  }

  /** Resolves when the server has said which session this is. */
  #openSocket() {
    this.#decoder = new PcmDecoder(this.format);
    this.#owed = 0;
    this.#paused = false;
    return new Promise((resolve, reject) => {
      const socket = new WebSocket(this.url);
      socket.binaryType = "arraybuffer";
      this.#socket = socket;
      let refused = "";
      const timer = setTimeout(() => reject(new Error(`No answer from ${this.url.host}.`)), CONNECT_MS);
      socket.onmessage = ({ data }) => {
        if (socket !== this.#socket) return; // closed from this side
        this.#watch();
        const message = this.#fromServer(new Uint8Array(data));
        if (message?.type === "error") {
          refused = message.message;
          if (this.#state === "live") this.#fail(refused);
        } else if (message?.type === "session") {
          clearTimeout(timer);
          this.#late = LATE + ((message.delay_ms ?? 0) * RATE) / 1000;
          if (message.format === this.format) resolve();
          else reject(new Error(`The server speaks ${message.format}, not ${this.format}.`));
        }
      };
      socket.onclose = ({ code }) => {
        clearTimeout(timer);
        if (socket !== this.#socket) return reject(); // closed from this side, as connect() will say
        const message = refused || `The connection to ${this.url.host} was closed (code ${code}).`;
        if (this.#state === "live") this.#fail(message);
        else reject(coded(message, code === TRY_LATER ? "server-full" : undefined));
      };
    });
  }

  #watch() {
    clearTimeout(this.#watchdog);
    this.#watchdog = setTimeout(() => this.#fail(`Nothing came from ${this.url.host} for 20 s.`), SILENT_MS);
  }

  #fromAudio(data) {
    if (data.type === "capture") {
      this.#playout = data.buffered;
      this.#emit("level", { input: data.input, output: data.output });
      if (this.#state === "live" && this.#socket.readyState === WebSocket.OPEN) this.#send(data);
    } else if (data.type === "response") {
      this.#emit("latency", { response_ms: data.ms + 1000 * (this.#context?.outputLatency ?? 0) });
    } else if (data.type === "fed") {
      this.#feeds.get(data.id)?.();
      this.#feeds.delete(data.id);
    }
  }

  /** Sends a piece of sound, unless the server is late. Every sample that it takes brings one back, so
   * what it owes says how late; the socket's own buffers hold minutes and do not tell. */
  #send({ pcm, recorded }) {
    // A paused server drops what it hears, and takes a client that sends nothing for gone.
    if (!this.#paused) {
      // A microphone would come later and later; a recording ends, and is wanted whole.
      if (this.#owed > this.#late && !recorded) return;
      this.#owed += pcm.length;
    }
    this.#socket.send(audioMessage(pcm, this.format));
  }

  /** Acts on one message; returns the metadata or error in it, if any. */
  #fromServer(bytes) {
    const payload = bytes.subarray(1);
    const old = this.#restarts > 0; // of the conversation before a restart
    const text = () => new TextDecoder().decode(payload);
    switch (bytes[0]) {
      case KIND.audio: {
        const pcm = this.#decoder.decode(payload);
        if (old) return null;
        this.#owed = Math.max(0, this.#owed - pcm.length);
        this.#node?.port.postMessage({ type: "play", pcm }, [pcm.buffer]);
        return null;
      }
      case KIND.text:
        if (!old) this.#emit("text", { text: text() });
        return null;
      case KIND.coloredText:
        if (!old) this.#emit("text", { text: new TextDecoder().decode(payload.subarray(1)) });
        return null;
      case KIND.metadata: {
        const { type, ...detail } = JSON.parse(text());
        if (type === "level") return null; // the page measures its own, closer to the ear
        if (type === "heard" && old) return null;
        if (type === "restarted") this.#restarted();
        if (type === "latency") {
          // The server's response time leaves out the network; the page's own does not.
          const { response_ms, ...measured } = detail;
          this.#emit("latency", { ...measured, playout_ms: this.#playout });
        } else {
          const named = type === "session" || type === "heard";
          this.#emit(named ? type : "metadata", named ? detail : { type, ...detail });
        }
        return { type, ...detail };
      }
      case KIND.error:
        return { type: "error", message: text() };
      default:
        return null; // the handshake, a ping, a kind of a newer protocol
    }
  }

  #restarted() {
    if (!this.#restarts) this.#owed = 0; // late, or not asked for
    else if (!--this.#restarts) clearTimeout(this.#restartTimer);
  }
}

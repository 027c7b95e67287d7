// The audio thread: capture and playback on one clock, at 24 kHz towards the page.
//
//   microphone ─ resample ─┬─ 40 ms pieces ─→ page ─→ server
//   feed (a recording) ────┘
//   server ─→ page ─→ jitter buffer ─ resample ─→ loudspeaker
//
// Sound flows to the server always, silence too: the model's clock is the sound it hears.
// A recording that is fed takes the microphone's place sample by sample, so it is streamed at the
// pace of the sound card, not of a page timer (which browsers slow down in the background).

import { Resampler } from "./resampler.js";

const RATE = 24000;
const PIECE = 960; // samples sent at a time; two complete a frame of the model
const WINDOW = 240; // 10 ms, for the response time
const SETTLED = 7200; // 300 ms of silence end a turn
const AUDIBLE = 1e-4; // mean square of -40 dBFS
const SILENT = 1e-5; // -50 dBFS: what may be skipped unheard
const BLOCK = 48; // 2 ms at a time through the playback resampler

const dbfs = (meanSquare) => 10 * Math.log10(meanSquare + 1e-10);

/** Sound waiting to be played. Starts `jitter` after the first sample came, and again after it ran
 * dry; sheds silence when it has grown long, and anything when it has grown very long. */
class JitterBuffer {
  constructor(jitterMs) {
    this.jitter = (jitterMs * RATE) / 1000;
    this.clear();
  }

  clear() {
    this.chunks = [];
    this.offset = 0;
    this.length = 0;
    this.waited = -1; // samples since the first chunk came; -1: none has; Infinity: playing
  }

  push(chunk) {
    const long = this.length > this.jitter + 0.24 * RATE;
    const veryLong = this.length > this.jitter + RATE;
    let energy = 0;
    if (long) for (const x of chunk) energy += x * x;
    if (veryLong || (long && energy / chunk.length < SILENT)) return;
    this.chunks.push(chunk);
    this.length += chunk.length;
    if (this.waited < 0) this.waited = 0;
  }

  /** Fills `block` with the next samples, or silence. */
  pull(block) {
    block.fill(0);
    if (this.waited < this.jitter) {
      if (this.waited >= 0) this.waited += block.length;
      return;
    }
    this.waited = Infinity;
    let done = 0;
    while (done < block.length && this.length > 0) {
      const chunk = this.chunks[0];
      const take = Math.min(block.length - done, chunk.length - this.offset);
      block.set(chunk.subarray(this.offset, this.offset + take), done);
      done += take;
      this.offset += take;
      this.length -= take;
      if (this.offset === chunk.length) {
        this.chunks.shift();
        this.offset = 0;
      }
    }
    if (done < block.length) this.waited = -1;
  }
}

/** Time from the last voiced input to the first audible output, on the clock of this thread.
 * It is known once the speaker has kept silent for `SETTLED`: until then the turn may go on. */
class ResponseMeter {
  constructor() {
    this.input = { sum: 0, time: 0 };
    this.output = { sum: 0, time: 0, audible: -RATE };
    this.voiced = -1; // when the last voiced window ended, if the output was silent by then
    this.onset = -1; // when the output became audible after that
  }

  /** Takes a sample of the input; milliseconds when a response time has become known, else null. */
  heard(x) {
    const { input, output } = this;
    input.sum += x * x;
    if (++input.time % WINDOW) return null;
    const voiced = input.sum / WINDOW > AUDIBLE;
    input.sum = 0;
    if (voiced) {
      // An answer that began while the input went on has no response time.
      this.voiced = input.time - output.audible > 0.2 * RATE ? input.time : -1;
      this.onset = -1;
    } else if (this.onset >= 0 && input.time - this.voiced >= SETTLED) {
      const elapsed = ((this.onset - this.voiced) / RATE) * 1000;
      this.voiced = this.onset = -1;
      return Math.max(0, elapsed);
    }
    return null;
  }

  /** Takes a sample of the output. */
  played(x) {
    const output = this.output;
    output.sum += x * x;
    if (++output.time % WINDOW) return;
    if (output.sum / WINDOW > AUDIBLE) {
      output.audible = output.time;
      if (this.voiced >= 0 && this.onset < 0) this.onset = output.time - WINDOW;
    }
    output.sum = 0;
  }
}

class SpeechProcessor extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.down = new Resampler(sampleRate, RATE);
    this.up = new Resampler(RATE, sampleRate);
    this.captured = new Float32Array(this.down.bound(128));
    this.silence = new Float32Array(128);
    this.feed = []; // {pcm, offset, id}
    this.jitter = new JitterBuffer(options.processorOptions.jitterMs);
    this.block = new Float32Array(BLOCK);
    this.ready = new Float32Array(128 + this.up.bound(BLOCK));
    this.made = new Float32Array(this.up.bound(BLOCK));
    this.waiting = 0;
    this.meter = new ResponseMeter();
    this.beginPiece();
    this.open = true;
    this.port.onmessage = ({ data }) => {
      if (data.type === "play") this.jitter.push(data.pcm);
      else if (data.type === "feed") this.feed.push({ pcm: data.pcm, offset: 0, id: data.id });
      else if (data.type === "flush") this.flush();
      else if (data.type === "close") this.open = false;
    };
  }

  process(inputs, outputs) {
    const microphone = inputs[0][0] ?? this.silence;
    this.capture(microphone);
    const output = outputs[0];
    this.play(output[0]);
    for (let channel = 1; channel < output.length; channel++) output[channel].set(output[0]);
    return this.open;
  }

  capture(samples) {
    const count = this.down.process(samples, samples.length, this.captured);
    for (let k = 0; k < count; k++) {
      const fed = this.fed();
      this.recorded ||= fed !== null;
      const x = fed ?? this.captured[k];
      const elapsed = this.meter.heard(x);
      if (elapsed !== null) this.port.postMessage({ type: "response", ms: elapsed });
      this.piece[this.filled++] = x;
      if (this.filled === PIECE) this.send();
    }
  }

  /** The next sample of a recording that is being fed, or null. */
  fed() {
    const next = this.feed[0];
    if (!next) return null;
    const x = next.pcm[next.offset++] ?? 0;
    if (next.offset >= next.pcm.length) {
      this.feed.shift();
      this.port.postMessage({ type: "fed", id: next.id });
    }
    return x;
  }

  /** Drops what waits to be played, what waits to be sent, and a response that is being measured. */
  flush() {
    this.jitter.clear();
    for (const { id } of this.feed) this.port.postMessage({ type: "fed", id });
    this.feed = [];
    this.meter = new ResponseMeter();
    this.beginPiece();
  }

  beginPiece() {
    this.piece = new Float32Array(PIECE);
    this.filled = 0;
    this.recorded = false; // some of it is of a recording
    this.energy = 0; // of the output meanwhile
  }

  send() {
    let energy = 0;
    for (const x of this.piece) energy += x * x;
    const message = {
      type: "capture",
      pcm: this.piece,
      recorded: this.recorded,
      input: dbfs(energy / PIECE),
      output: dbfs(this.energy / PIECE),
      buffered: (this.jitter.length / RATE) * 1000,
    };
    this.port.postMessage(message, [this.piece.buffer]);
    this.beginPiece();
  }

  play(output) {
    while (this.waiting < output.length) {
      this.jitter.pull(this.block);
      for (const x of this.block) {
        this.energy += x * x;
        this.meter.played(x);
      }
      const count = this.up.process(this.block, BLOCK, this.made);
      this.ready.set(this.made.subarray(0, count), this.waiting);
      this.waiting += count;
    }
    output.set(this.ready.subarray(0, output.length));
    this.ready.copyWithin(0, output.length, this.waiting);
    this.waiting -= output.length;
  }
}

registerProcessor("speechlm", SpeechProcessor);

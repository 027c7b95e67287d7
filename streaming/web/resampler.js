// A streaming resampler between any two rates: windowed sinc, one filter a phase.
// Delay: `zeros` samples of the slower rate (16 at 24 kHz: 0.7 ms).

const gcd = (a, b) => (b ? gcd(b, a % b) : a);

export class Resampler {
  /** @param {number} from input rate, Hz  @param {number} to output rate, Hz */
  constructor(from, to, zeros = 16) {
    const divisor = gcd(from, to);
    this.up = to / divisor;
    this.down = from / divisor;
    // Cut off a little below the slower Nyquist frequency, so that little folds back.
    const cutoff = 0.94 * Math.min(1, to / from);
    const half = Math.ceil(zeros / Math.min(1, to / from));
    this.taps = 2 * half;
    this.filters = new Float32Array(this.up * this.taps);
    for (let phase = 0; phase < this.up; phase++) {
      const filter = this.filters.subarray(phase * this.taps, (phase + 1) * this.taps);
      let sum = 0;
      for (let k = 0; k < this.taps; k++) {
        const t = k - half + 1 - phase / this.up;
        const x = Math.PI * cutoff * t;
        const hann = 0.5 + 0.5 * Math.cos((Math.PI * Math.max(-half, Math.min(half, t))) / half);
        filter[k] = (x === 0 ? 1 : Math.sin(x) / x) * hann;
        sum += filter[k];
      }
      for (let k = 0; k < this.taps; k++) filter[k] /= sum;
    }
    this.phase = 0;
    this.held = half - 1; // so many samples of silence come before the first
    this.buffer = new Float32Array(this.taps + 4096);
  }

  /** How many samples `process` can give at most for `count` samples in. */
  bound(count) {
    return Math.ceil(((count + 1) * this.up) / this.down) + 1;
  }

  /** Resamples the first `count` samples of `input` into `output`; returns how many came out. */
  process(input, count, output) {
    if (this.held + count > this.buffer.length) {
      const larger = new Float32Array(2 * (this.held + count));
      larger.set(this.buffer.subarray(0, this.held));
      this.buffer = larger;
    }
    for (let k = 0; k < count; k++) this.buffer[this.held + k] = input[k];
    const end = this.held + count;
    let start = 0;
    let made = 0;
    while (start + this.taps <= end) {
      const filter = this.phase * this.taps;
      let sum = 0;
      for (let k = 0; k < this.taps; k++) sum += this.filters[filter + k] * this.buffer[start + k];
      output[made++] = sum;
      this.phase += this.down;
      start += Math.floor(this.phase / this.up);
      this.phase %= this.up;
    }
    this.buffer.copyWithin(0, start, end);
    this.held = end - start;
    return made;
  }
}

/** A whole recording at another rate: Float32Array -> Float32Array, of the exact length. */
export function resample(samples, from, to) {
  if (from === to) return samples;
  const resampler = new Resampler(from, to);
  const length = Math.round((samples.length * to) / from);
  const padded = new Float32Array(samples.length + resampler.taps);
  padded.set(samples);
  const output = new Float32Array(resampler.bound(padded.length));
  resampler.process(padded, padded.length, output);
  return output.slice(0, length);
}

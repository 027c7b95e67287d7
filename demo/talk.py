"""The talk tab: microphone in, voice out, a running two-sided transcript.

Python only lays the page out. All that is live (sound, levels, transcript) happens in the browser,
in `static/talk.js`, which speaks to the server's `/api/chat` through the JavaScript client of the
`streaming` package. Example questions and uploaded sounds are decoded in the browser and streamed
through the same WebSocket at the pace of speech, so the page works without a microphone too; but
not over plain http from another machine, where browsers give a page no audio thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import soundfile

from audio_codec.audio import SAMPLE_RATE
from audio_codec.files import replacing
from synth_data.tts import Voice, speak

STATIC = Path(__file__).parent / "static"
EXAMPLES_DIR = STATIC / "examples"

# MP3, because it is the one small format that every browser decodes, Safari included.
_SUFFIX = ".mp3"
_PEAK = 0.5


@dataclass(frozen=True, slots=True)
class Example:
    """A question that ships as a sound: file name without suffix, its text, who speaks it."""

    slug: str
    text: str
    voice: str


EXAMPLES = (
    Example("sum", "What is seven plus five?", "espeak:en-us+m3@rate=160"),
    Example("after", "What comes after Wednesday?", "flite:slt"),
    Example("capital", "What is the capital of France?", "espeak:en-gb-x-rp+m7@rate=165"),
    Example("opposite", "What is the opposite of hot?", "espeak:en-us+f2@rate=160"),
    Example("animal", "What does a cow say?", "flite:awb"),
    Example("repeat", "Repeat after me: green apple tree.", "espeak:en-us+m5@rate=150"),
    Example("abilities", "What can you do?", "flite:slt@rate=1.1"),
)


def make_examples(directory: Path = EXAMPLES_DIR) -> list[Path]:
    """Synthesize every example question into `directory`; about 10 kB each.

    Returns the files in the order of `EXAMPLES`. Raises `UserError` when the engine of a voice is
    not installed or `directory` cannot be written.
    """
    paths = []
    for example in EXAMPLES:
        pcm = speak(example.text, Voice.parse(example.voice)).pcm  # [S]
        pcm = pcm * (_PEAK / max(float(abs(pcm).max()), 1e-6))
        path = directory / (example.slug + _SUFFIX)
        with replacing(path) as partial:
            soundfile.write(partial, pcm, SAMPLE_RATE, format="MP3")
        paths.append(path)
    return paths


def talk_tab(static_url: str, directory: Path = EXAMPLES_DIR) -> gr.HTML:
    """The tab's one component; call it inside a `gr.Tab`.

    `static_url` is where `demo/static` is served, relative to the page ("demo"). Examples whose
    file is not in `directory` are left out.
    """
    examples = [
        {"text": example.text, "url": f"{static_url}/{directory.name}/{example.slug}{_SUFFIX}"}
        for example in EXAMPLES
        if (directory / (example.slug + _SUFFIX)).exists()
    ]
    return gr.HTML(
        html_template=(STATIC / "talk.html").read_text(encoding="utf-8"),
        css_template=(STATIC / "talk.css").read_text(encoding="utf-8"),
        # A module of our own origin: Gradio runs `js_on_load` as a function body, which cannot
        # import statically.
        js_on_load=(
            f'import(new URL("{static_url}/talk.js", document.baseURI))'
            ".then(({ mount }) => mount(element), () => {"
            ' element.querySelector(".state").textContent ='
            ' "The page\'s script could not be loaded; reload the page."; });'
        ),
        apply_default_css=False,
        examples=examples,
    )

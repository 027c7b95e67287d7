"""The front door: `speechlm chat|serve|talk|demo|codec|bench|train|merge|synth|eval|card|scaling`.

Every command parses its arguments, calls one function of a room and writes what came back. Rooms
are imported inside the commands, so that `speechlm --help` answers at once.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from audio_codec.errors import UserError
from audio_codec.files import check_writable

if TYPE_CHECKING:
    from audio_codec.checkpoint import StoredType
    from audio_codec.transcode import Direction
    from synth_data.build import BuildReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Talk to a speech language model, train one from nothing, embed one.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train one part by a recipe in configs/.")
synth_app = typer.Typer(no_args_is_help=True, help="Make training data by a recipe in configs/.")
eval_app = typer.Typer(no_args_is_help=True, help="Measure a model; prints a table.")
codec_app = typer.Typer(no_args_is_help=True, help="Files of sound into codes, and back.")
bench_app = typer.Typer(help="How fast a model is on this machine; prints a table.")
scaling_app = typer.Typer(no_args_is_help=True, help="Laws of size and data, from finished runs.")
app.add_typer(codec_app, name="codec")
app.add_typer(bench_app, name="bench")
app.add_typer(train_app, name="train")
app.add_typer(synth_app, name="synth")
app.add_typer(eval_app, name="eval")
app.add_typer(scaling_app, name="scaling")

Recipe = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, as in configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="A.B=C", help="Values laid over the YAML's.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
ModelName = Annotated[
    str, typer.Option("--model", help='"tiny", a folder or hf://organisation/name.')
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers to FILE too.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same answer.")]
Utterances = Annotated[int, typer.Option("--utterances", min=1, help="How many to measure on.")]
Slots = Annotated[int, typer.Option("--slots", min=1, help="Conversations at once.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit status 2."""
    try:
        app()
    except UserError as error:
        sys.exit(_complain(error))


def _complain(error: UserError) -> int:
    print(f"speechlm: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO if verbose else logging.WARNING)


@app.command()
def chat(
    input: Annotated[Path, typer.Option("--input", help="A recorded question.")],
    output: Annotated[Path, typer.Option("--output", help="Where the spoken answer goes.")],
    model: ModelName = "tiny",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Answer a recording: stream it frame by frame, then silence until the answer is over."""
    from audio_codec import audio

    audio.check_writable(output)
    _check(json)
    question = audio.load(input)

    # Only now: the models take seconds to import.
    from speechlm import convert
    from streaming import engine

    answer = engine.chat(convert.load(model), question, seed=seed)
    audio.save(output, answer.pcm)
    _report("chat", answer.metrics, json, text=answer.text)
    print(answer.text)


@app.command()
def serve(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535)] = 8998,
    slots: Slots = 1,
    model: ModelName = "tiny",
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", envvar="SPEECHLM_API_KEYS", help="A key that opens the door."),
    ] = None,
) -> None:
    """Serve conversations over WebSocket and HTTP."""
    from streaming import server

    config = server.ServerConfig(api_keys=frozenset(api_key or ()))
    server.serve(model, host=host, port=port, slots=slots, config=config)


@app.command()
def talk(
    url: Annotated[str, typer.Option("--url", help="The server.")] = "ws://127.0.0.1:8998",
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="SPEECHLM_API_KEY", help="The server's key.")
    ] = None,
) -> None:
    """Talk to a server by microphone and loudspeaker."""
    from streaming import client

    client.talk(url, api_key=api_key)


@app.command()
def demo(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535)] = 7860,
    model: ModelName = "tiny",
) -> None:
    """Open the page on which one talks to a model in the browser."""
    from demo import app as page

    page.launch(model, host=host, port=port)


Codebooks = Annotated[
    int | None, typer.Option("--codebooks", min=1, help="The first N alone: fewer bits.")
]


@codec_app.command("encode")
def codec_encode(
    source: Annotated[str, typer.Argument(metavar="IN", help="Sound: a file, a folder or -.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="An .npz file, a folder or -.")],
    codebooks: Codebooks = None,
    model: ModelName = "tiny",
) -> None:
    """Sound into codes; folders are mirrored, - is standard input or output."""
    from audio_codec import transcode

    _transcode(transcode.ENCODE, source, target, codebooks, model)


@codec_app.command("decode")
def codec_decode(
    source: Annotated[str, typer.Argument(metavar="IN", help="Codes: a file, a folder or -.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="A sound file, a folder or -.")],
    codebooks: Codebooks = None,
    model: ModelName = "tiny",
) -> None:
    """Codes into sound, by the model that made them."""
    from audio_codec import transcode

    _transcode(transcode.DECODE, source, target, codebooks, model)


def _transcode(
    direction: Direction, source: str, target: str, codebooks: int | None, model: str
) -> None:
    from rich.console import Console

    from audio_codec import transcode
    from speechlm import convert

    done = transcode.run(
        direction,
        lambda: convert.load_codec_of(model),
        source,
        target,
        codebooks=codebooks,
        stdin=sys.stdin.buffer,
        stdout=sys.stdout.buffer,
        console=Console(stderr=True),
    )
    if target != transcode.PIPE:
        for path, header in done:
            print(f"{path}: {header}")


@codec_app.command("info")
def codec_info(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="Codes or sound: a file, a folder or -; or a model."),
    ],
) -> None:
    """What is in files of codes or of sound, or what a model's codec is."""
    from audio_codec import transcode
    from speechlm import convert

    for name, fact in transcode.info(what, convert.load_codec_of, sys.stdin.buffer):
        print(f"{name:12} {fact}")


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context, model: ModelName = "tiny", slots: Slots = 1, json: Json = None
) -> None:
    """How long a frame takes on this machine, for 1, 2, 4 … conversations at once."""
    if context.invoked_subcommand is not None:
        sources = (context.get_parameter_source(name) for name in context.params)
        if any(source is not None and source.name != "DEFAULT" for source in sources):
            word = context.invoked_subcommand
            raise UserError(f"the options of 'bench {word}' stand behind the word '{word}'.")
        return
    _check(json)
    from speechlm import convert
    from streaming import bench as room

    _report("bench", room.frame_times(convert.load(model), slots), json)


@bench_app.command("codec")
def bench_codec(
    peers: Annotated[
        list[str] | None, typer.Argument(metavar="PEER", help="More to run against.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="PEER", help="encodec, mimi or both.")
    ] = None,
    model: ModelName = "tiny",
    frames: Annotated[
        int,
        typer.Option(min=20, help="Frames to time of a peer in a setting; of ours, five times."),
    ] = 100,
    json: Json = None,
) -> None:
    """A model's codec against public ones, in turns: --against encodec mimi."""
    _check(json)
    from audio_codec import bench as room
    from speechlm import convert
    from speechlm.evaluation.report import Metric

    measured = room.measure(
        lambda: convert.load_codec_of(model), [*(against or ()), *(peers or ())], frames
    )
    metrics = {name: Metric(**vars(figure)) for name, figure in measured.items()}
    _report("bench codec", metrics, json)


@bench_app.command("train")
def bench_train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="A.B=C",
            help="Changes of its shape, as temporal.dim=2048; with --recipe, of the recipe.",
        ),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="PEER", help="transformers.")
    ] = None,
    model: ModelName = "tiny",
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG", show_default="noise", help="Train on the sources of this one."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 3,
    length: Annotated[int, typer.Option(min=1, help="Columns of a row.")] = 750,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each to time.")] = 10,
    precision: Annotated[
        str, typer.Option(help="Of the forward: bf16, no (float32), or auto: what is fast here.")
    ] = "auto",
    json: Json = None,
) -> None:
    """How fast a model of this shape trains, and the same in another library, in turns."""
    _check(json)
    import functools

    import numpy as np

    from audio_codec import checkpoint
    from speechlm import bench as room
    from speechlm.config import load_config
    from speechlm.model import LMConfig
    from speechlm.text_tokenizer import load_text_tokenizer
    from speechlm.training.lm import TrainConfig, masked, mixture_of

    folder = checkpoint.resolve(model)
    changes = overrides or []
    shape = load_config(folder / "config.json", changes if recipe is None else [], LMConfig)
    data: dict[str, Any] = {}
    if recipe is not None:
        training = load_config(recipe, changes, TrainConfig)
        rng = np.random.default_rng(training.run.seed)
        data["mixture"] = mixture_of(training, shape.streams, load_text_tokenizer(folder))
        data["masked"] = functools.partial(masked, training, shape.streams, rng=rng)
    _report(
        "bench train",
        room.measure(
            shape,
            against or (),
            rows=rows,
            length=length,
            steps=steps,
            precision=precision,
            **data,
        ),
        json,
    )


@bench_app.command("synth")
def bench_synth(
    text_to_token: Annotated[
        str | None,
        typer.Option("--text-to-token", metavar="FOLDER", help="A model to measure against TTS."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", show_default="it knows", help="Whose codes it speaks."),
    ] = None,
    decoder: Annotated[
        str | None, typer.Option("--decoder", help="A token decoder that speaks its codes again.")
    ] = None,
    texts: Annotated[int, typer.Option(min=16, help="Held-out sentences to say.")] = 1024,
    device: Annotated[str, typer.Option(help="Where models are timed: cpu or cuda.")] = "cpu",
    json: Json = None,
    seed: Seed = 0,
) -> None:
    """How good the making of data is: de-duplication against planted copies, text to codes."""
    _check(json)
    if text_to_token is None and (tokenizer or decoder):
        raise UserError("--tokenizer and --decoder need a model to measure: --text-to-token.")
    from speechlm.evaluation.report import Metric
    from synth_data import bench as room

    measured = room.measure_dedup(seed=seed)
    if text_to_token is not None:
        from speechlm import convert

        known = tokenizer or room.tokenizer_of(text_to_token)
        listener = str(convert.tokenizer_folder(known))
        measured |= room.measure_text_to_token(
            text_to_token, listener, texts, decoder=decoder, device=device, seed=seed
        )
    _report("bench synth", {name: Metric(**vars(f)) for name, f in measured.items()}, json)


def _train(trainee: str, config: Path, overrides: list[str] | None, resume: bool) -> None:
    # Each trainee is a module of speechlm.training with a `TrainConfig` and a `train`.
    from speechlm.config import load_config

    module = importlib.import_module(f"speechlm.training.{trainee}")
    print(module.train(load_config(config, overrides or [], module.TrainConfig), resume=resume))


@train_app.command("tokenizer")
def train_tokenizer(config: Recipe, overrides: Overrides = None, resume: Resume = False) -> None:
    """The speech tokenizer: a causal recognizer with a quantized bottleneck."""
    _train("tokenizer", config, overrides, resume)


@train_app.command("codec")
def train_codec(config: Recipe, overrides: Overrides = None, resume: Resume = False) -> None:
    """The codec, on top of a frozen tokenizer."""
    _train("codec", config, overrides, resume)


@train_app.command("text-to-token")
def train_text_to_token(
    config: Recipe, overrides: Overrides = None, resume: Resume = False
) -> None:
    """The model that turns text into semantic codes without any sound."""
    _train("text_to_token", config, overrides, resume)


@train_app.command("token-decoder")
def train_token_decoder(
    config: Recipe, overrides: Overrides = None, resume: Resume = False
) -> None:
    """The token decoder: speech from a frozen tokenizer's codes alone."""
    _train("token_decoder", config, overrides, resume)


@train_app.command("lm")
def train_lm(config: Recipe, overrides: Overrides = None, resume: Resume = False) -> None:
    """The language model, on codes."""
    _train("lm", config, overrides, resume)


Processes = Annotated[int, typer.Option("--processes", min=1, help="Devices, one a process.")]


@train_app.command("plan")
def train_plan(
    config: Recipe,
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(show_default="this machine", help="A GPU by name, as H100.")
    ] = None,
    processes: Processes = 1,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak to reach.")] = 0.4,
    price: Annotated[float | None, typer.Option(min=0, help="Of a device for an hour.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=1, show_default="this run's", help="FLOPs for the optimal size."),
    ] = None,
    json: Json = None,
) -> None:
    """What a run of the language model will take: size, memory, FLOPs, time, cost."""
    _check(json)
    from speechlm.config import load_config
    from speechlm.training import lm
    from speechlm.training import plan as room

    recipe = load_config(config, overrides or [], lm.TrainConfig)
    made = room.plan(
        recipe, device=device, processes=processes, utilization=mfu, price=price, budget=budget
    )
    _report("train plan", made.metrics, json)
    for one in made.exposures:
        print(f"{one.path}: {one.samples} samples, seen {one.epochs:.2g} times")


@train_app.command("samples")
def train_samples(
    config: Recipe,
    step: Annotated[int, typer.Option("--step", min=0, help="Of which step, from 0.")],
    overrides: Overrides = None,
) -> None:
    """Which samples a step of a language-model run sees."""
    from speechlm.config import load_config
    from speechlm.training import lm

    for source, part in lm.samples(load_config(config, overrides or [], lm.TrainConfig), step):
        where = f"columns {part.first}–{part.first + part.columns - 1}"
        print(f"{source}\tlane {part.lane}\t{where}\tdocument {part.number}\t{part.name}")


@scaling_app.command("fit")
def scaling_fit(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run folders of the language model.")
    ],
    metric: Annotated[str, typer.Option(help="The loss to fit.")] = "validation/loss",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it, as .svg or .png.")
    ] = None,
    json: Json = None,
) -> None:
    """Fit L = E + A/N^α + B/D^β to finished runs, with intervals."""
    _check(json)
    from speechlm import scaling

    if plot is not None:
        check_writable(plot)
        scaling.check_plot(plot)
    points = scaling.read_runs(runs, metric)
    law = scaling.fit(points)
    _report("scaling fit", scaling.metrics(points, law, scaling.bootstrap(points, law)), json)
    if plot is not None:
        scaling.plot(points, law, plot)


@synth_app.command("text")
def synth_text(config: Recipe, overrides: Overrides = None) -> None:
    """Corpora into clean spoken text: filtered, masked, without duplicates."""
    from rich.console import Console

    from speechlm.config import load_config
    from synth_data import corpus

    recipe = load_config(config, overrides or [], corpus.TextConfig)
    Console().print(corpus.build_text(recipe).table())


Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Work on a Ray cluster: auto, or its address."),
]


@synth_app.command("speech")
def synth_speech(config: Recipe, overrides: Overrides = None, ray: Ray = None) -> None:
    """Sentences read aloud in many voices, with word times."""
    from speechlm.config import load_config
    from synth_data.recipes import speech

    recipe = load_config(config, _where(overrides, ray), speech.SpeechConfig)
    _shards(recipe.output, speech.build_speech(recipe))


@synth_app.command("dialogues")
def synth_dialogues(config: Recipe, overrides: Overrides = None, ray: Ray = None) -> None:
    """Conversations on two channels, as shards."""
    from speechlm.config import load_config
    from synth_data.recipes import dialogues

    recipe = load_config(config, _where(overrides, ray), dialogues.DialoguesConfig)
    _shards(recipe.output, dialogues.build_dialogues(recipe))


@synth_app.command("pairs")
def synth_pairs(config: Recipe, overrides: Overrides = None, ray: Ray = None) -> None:
    """Texts with the semantic codes of their sound, for the text-to-token model."""
    from speechlm.config import load_config
    from synth_data.recipes import pairs

    recipe = load_config(config, _where(overrides, ray), pairs.PairsConfig)
    _shards(recipe.output, pairs.build_pairs(recipe))


@synth_app.command("interleave")
def synth_interleave(config: Recipe, overrides: Overrides = None, ray: Ray = None) -> None:
    """Documents of text and speech in turns, spoken by a text-to-token model."""
    from speechlm.config import load_config
    from synth_data.recipes import interleave

    recipe = load_config(config, _where(overrides, ray), interleave.InterleaveRecipe)
    _shards(recipe.output, interleave.build_interleaved(recipe))


@synth_app.command("stereo")
def synth_stereo(config: Recipe, overrides: Overrides = None, ray: Ray = None) -> None:
    """Recorded conversations in moshi-finetune's layout, encoded once, as shards."""
    from speechlm.config import load_config
    from synth_data.recipes import stereo

    recipe = load_config(config, _where(overrides, ray), stereo.StereoConfig)
    _shards(recipe.output, stereo.build_stereo(recipe))


@synth_app.command("inspect")
def synth_inspect(
    shard: Annotated[str, typer.Argument(metavar="SHARD", help="A shard or a folder of them.")],
    sample: Annotated[
        str | None,
        typer.Option("--sample", metavar="KEY", show_default="the first", help="Which one."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Its sound and a picture too.")
    ] = None,
    model: ModelName = "tiny",
    decoder: Annotated[
        str | None,
        typer.Option("--decoder", metavar="FOLDER", help="A token decoder, for semantic codes."),
    ] = None,
) -> None:
    """What is said in a sample, speech in colour; codes are decoded by the model's codec."""
    from rich.console import Console

    from synth_data import bench, view

    found = view.find(shard, sample)
    Console().print(view.describe(found), soft_wrap=True)
    if out is None:
        return
    from speechlm import convert

    try:
        if decoder is None:
            pcm = view.sound(found, lambda: convert.load_codec_of(model))
        else:
            pcm = view.speech(found, bench.speaker(decoder))
    except UserError:
        view.draw(found, None, out / f"{found.id}.png")  # Its codes can be seen all the same.
        raise
    view.draw(found, pcm, out / f"{found.id}.png")
    view.save_sound(out / f"{found.id}.wav", pcm)


@synth_app.command("stats")
def synth_stats(
    shards: Annotated[list[str], typer.Argument(metavar="SHARDS", help="Folders or shards.")],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="SHARDS", help="What they were made from: how diverse?"),
    ] = None,
    json: Json = None,
) -> None:
    """How much there is, where it comes from, and how diverse it is."""
    _check(json)
    from rich.console import Console

    from speechlm.evaluation.report import Metric
    from synth_data import view

    summary, figures = view.measure(shards, against)
    Console().print(view.table(summary))
    metrics = {name: Metric(**vars(figure)) for name, figure in figures.items()}
    _report("synth stats", metrics, json)


def _where(overrides: list[str] | None, ray: str | None) -> list[str]:
    return [*(overrides or ()), *((f"ray={ray}",) if ray else ())]


def _shards(output: object, made: BuildReport) -> None:
    reasons = "; ".join(f"{count} × {reason}" for reason, count in made.reasons.most_common(5))
    print(
        f"{output}: {made.samples} samples, {made.seconds / 3600:.2f} h in {made.written} new "
        f"shards; {made.kept} stood already, {len(made.dropped)} samples dropped"
        f"{f' ({reasons})' if reasons else ''}."
    )


def _evaluate(
    question: str,
    model: str | None,
    json: Path | None,
    asked: Mapping[str, Any],
    said: Mapping[str, Any] | None = None,
    *,
    report: Path | None = None,
    title: str = "",
    **options: Any,
) -> None:
    """Measure and report; what was `asked`, and is not None, makes it another measurement.

    With `report`, for questions that can draw their answer, also that document: after all else, so
    that no number is lost with it.
    """
    from speechlm.evaluation import report as writer

    _check(json)
    room = importlib.import_module(f"speechlm.evaluation.{question.replace('-', '_')}")
    compared = None
    if report is None:
        metrics = room.evaluate(model, **options)
    else:
        writer.check_report(report)
        compared = room.compare(model, **options)
        metrics = compared.metrics()
    unusual = {name: value for name, value in asked.items() if value is not None}
    marked = {"options": unusual} if unusual else {}
    _report(f"eval {question}", metrics, json, **marked, **(said or {}))
    if report is not None and compared is not None:
        writer.write_report(report, title, compared.document())


def _unless(usual: object, value: object) -> Any:
    return None if value == usual else value


@eval_app.command("codec")
def eval_codec(
    model: Annotated[
        str | None,
        typer.Option("--model", show_default="tiny", help="Whose codec to measure."),
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            metavar="NAME_OR_PATH",
            help="Any codec; more as its peers, left out where their weights cannot be fetched.",
        ),
    ] = None,
    audio: Annotated[
        Path | None,
        typer.Option(
            "--audio", metavar="FOLDER", help="Recordings to measure on, 30 s of each at most."
        ),
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,4|all",
            show_default="1,2,4,8,… and all of them",
            help="Numbers of codebooks of the curve.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FOLDER", help="Pictures and sounds too.")
    ] = None,
    json: Json = None,
    seed: Seed = 0,
    utterances: Utterances = 100,
) -> None:
    """How much of speech survives the codec, or each of several."""
    # A codec that is named stands alone; the shipped one is measured beside it when asked for.
    first = model if model or codec else "tiny"
    options: dict[str, Any] = {"seed": seed, "utterances": utterances, "codecs": codec or ()}
    options |= {"audio": audio, "levels": levels}
    options |= {"report": report, "title": "What survives the codec"}
    asked = {"seed": _unless(0, seed), "utterances": _unless(100, utterances), "levels": levels}
    asked |= {"audio": None if audio is None else str(audio)}
    _evaluate("codec", first, json, asked, **options)


@eval_app.command("tokenizer")
def eval_tokenizer(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", show_default="tiny, or the sweep", help="Whose tokenizer to measure."
        ),
    ] = None,
    twin: Annotated[
        str | None, typer.Option("--twin", help="Its twin: trained alike, with unquantized=true.")
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option("--sweep", metavar="FOLDER", help="Compare all finished runs below FOLDER."),
    ] = None,
    recorded: Annotated[
        Path | None, typer.Option(help="A data folder with recorded people, to hear them too.")
    ] = None,
    codes: Annotated[
        int, typer.Option("--codes", min=0, help="Judge the codebook's usage by so many at least.")
    ] = 0,
    codes_from: Annotated[
        list[Path] | None,
        typer.Option("--codes-from", metavar="SHARDS", help="Whose sounds are counted; else TTS."),
    ] = None,
    stream_hours: Annotated[
        float, typer.Option(min=0, help="Hold a stream so long against one pass.")
    ] = 0.0,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FOLDER", help="Table and pictures too.")
    ] = None,
    decoder: Annotated[
        str | None, typer.Option("--decoder", help="A token decoder that speaks its codes again.")
    ] = None,
    json: Json = None,
    seed: Seed = 0,
    utterances: Utterances = 300,
) -> None:
    """How well words can be read off the semantic codes, of one tokenizer or of a sweep."""
    # A sweep stands alone; a model is measured beside it when asked for.
    first = model if model or sweep else "tiny"
    options: dict[str, Any] = {"seed": seed, "utterances": utterances, "recorded": recorded}
    options |= {"twin": twin, "sweep": sweep, "codes": codes, "codes_from": codes_from or ()}
    options |= {"stream_hours": stream_hours, "decoder": decoder}
    options |= {"report": report, "title": "What semantic codes keep"}
    asked = {"seed": _unless(0, seed), "utterances": _unless(300, utterances)}
    asked |= {"sweep": None if sweep is None else str(sweep)}
    said = {"codes_from": [str(folder) for folder in codes_from]} if codes_from else None
    _evaluate("tokenizer", first, json, asked, said, **options)


Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine", show_default="espeak and flite", help="Whose voices ask; twice for two."
    ),
]


@eval_app.command("spoken-qa")
def eval_spoken_qa(
    model: ModelName = "tiny",
    json: Json = None,
    seed: Seed = 0,
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions.")] = 300,
    unknown: Annotated[int, typer.Option(min=1, help="Questions outside the quiz world.")] = 100,
    long: Annotated[bool, typer.Option(help="Also hold ten-minute conversations.")] = True,
    voices: Annotated[
        list[str] | None,
        typer.Option(
            show_default="panel",
            help="Who asks: panel (ten known, two new), heldout (none known as it is), or a voice "
            "as espeak:en-us; twice for two.",
        ),
    ] = None,
    engine: Engines = None,
    category: Annotated[
        list[str] | None,
        typer.Option("--category", show_default="all", help="What is asked about; twice for two."),
    ] = None,
    assistant: Annotated[str, typer.Option(help="The voice it was trained to have.")] = "flite:rms",
    recorded: Annotated[
        Path | None, typer.Option(help="A data folder with recorded digits, to answer them too.")
    ] = None,
) -> None:
    """Held-out spoken questions: is the answer right, as text and as sound?"""
    if engine and voices and not {"panel", "heldout"} & set(voices):
        raise UserError("--engine chooses voices of panel and heldout; voices by name have theirs.")
    options: dict[str, Any] = {"categories": category} if category else {}
    options |= {"seed": seed, "questions": questions, "unknown": unknown}
    options |= {"conversations": 8 if long else 0, "voices": voices or ["panel"]}
    options |= {"engines": tuple(engine or ("espeak", "flite"))}
    options |= {"assistant": assistant, "recorded": recorded}
    asked = {
        "voices": _unless("panel", _listed(voices)),
        "categories": _listed(category),
        "engines": _listed(engine),
        "questions": _unless(300, questions),
        "unknown": _unless(100, unknown),
        "seed": _unless(0, seed),
    }
    _evaluate("spoken-qa", model, json, asked, **options)


def _listed(names: Sequence[str] | None) -> str | None:
    return ",".join(names) if names else None


@eval_app.command("duplex")
def eval_duplex(
    model: ModelName = "tiny",
    json: Json = None,
    seed: Seed = 0,
    trials: Annotated[int, typer.Option(min=1, help="Conversations of each kind.")] = 60,
    engine: Engines = None,
) -> None:
    """Turn taking: does it answer, wait, stop and keep silent when it should?"""
    options: dict[str, Any] = {"seed": seed, "trials": trials}
    options |= {"engines": tuple(engine or ("espeak", "flite"))}
    asked = {"seed": _unless(0, seed), "trials": _unless(60, trials), "engines": _listed(engine)}
    _evaluate("duplex", model, json, asked, **options)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Its folder, or hf://….")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new checkpoint.")],
    dtype: Annotated[str, typer.Option(help="How it is stored: fp32, bf16 or int8.")] = "bf16",
) -> None:
    """Add a LoRA adapter to its base: one checkpoint, as fast as the base."""
    from speechlm import convert

    print(convert.merge_adapter(adapter, output, _stored(dtype)))


def _stored(dtype: str) -> StoredType:
    from typing import get_args

    from audio_codec.checkpoint import StoredType

    if dtype not in get_args(StoredType):
        raise UserError(f"--dtype is {dtype}; choices: {', '.join(get_args(StoredType))}.")
    return cast("StoredType", dtype)


@app.command()
def average(
    one: Annotated[str, typer.Argument(metavar="ONE", help="A model, by name or folder.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another of the same shape.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new checkpoint.")],
    share: Annotated[float, typer.Option(help="How far to go from ONE to OTHER, 0 to 1.")] = 0.5,
    dtype: Annotated[str, typer.Option(help="How it is stored: fp32, bf16 or int8.")] = "bf16",
) -> None:
    """Weights between a model's and those it was trained on to: often the best of both."""
    from speechlm import convert

    print(convert.average(one, other, output, share, _stored(dtype)))


@app.command()
def card(
    scores: Annotated[list[Path], typer.Argument(metavar="FILE", help="Files written by --json.")],
    model: Annotated[str, typer.Option("--model", help='A checkpoint folder, or "tiny".')],
) -> None:
    """Write measured scores into a checkpoint's card.json, each with its command and date."""
    from speechlm.evaluation import report

    report.add_scores(model, scores)


def _check(json: Path | None) -> None:
    """Refuse a place that cannot be written before the measurement, not after it."""
    if json is not None:
        check_writable(json)


def _report(command: str, metrics: Any, json: Path | None, **extra: Any) -> None:
    from speechlm.evaluation import report

    if json is not None:
        report.write_json(json, report.envelope(command, metrics, **extra))
    report.print_table(command, metrics)


if __name__ == "__main__":
    main()

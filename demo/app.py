"""The demo's one process: the engine, its WebSocket server and the page, on one origin.

    speechlm demo                      # http://127.0.0.1:7860

The page asks nothing of any other origin: its fonts are those of the reader's machine, analytics
are off, and every script is served from here. The server stands under `/` first, so `/api/chat` is
the same address that other clients use; Gradio takes what is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from audio_codec import checkpoint
from audio_codec.errors import UserError
from demo.card import card_tab, read_card
from demo.talk import talk_tab
from streaming import server
from streaming.engine import Engine

STATIC = Path(__file__).parent / "static"
STATIC_URL = "demo"

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "Menlo", "Consolas", "monospace")

# Nobody who closes a demo wants to wait for the visitors of its page.
_CONFIG = server.ServerConfig(drain_seconds=1)


def _page(card: Mapping[str, Any]) -> gr.Blocks:
    """The tabs: talk, and the card of the model that answers."""
    page: gr.Blocks
    with gr.Blocks(title="speechlm", analytics_enabled=False) as page:
        with gr.Tab("Talk"):
            talk_tab(STATIC_URL)
        with gr.Tab("Model card"):
            card_tab(card)
    return page


def create_app(engine: Engine[Any], card: Mapping[str, Any] | None = None) -> FastAPI:
    """The server of `engine` (`/api/chat` and the rest) with the page at `/`.

    `card` is the checkpoint's `card.json`, drawn in the second tab. The engine must run already;
    its owner closes it.
    """
    app = server.create_app(engine, _CONFIG)
    app.mount(f"/{STATIC_URL}", StaticFiles(directory=STATIC), name="demo")
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Gradio makes an event loop for every lock that it creates outside of one, and closes none.
        return asyncio.run(_mount_in_loop(app, card or {}))
    return _mount(app, card or {})


async def _mount_in_loop(app: FastAPI, card: Mapping[str, Any]) -> FastAPI:
    return _mount(app, card)


def _mount(app: FastAPI, card: Mapping[str, Any]) -> FastAPI:
    # The plain strings are font names of the reader's machine; Gradio's own theme fetches fonts.
    theme = gr.themes.Base(font=_SANS, font_mono=_MONO, primary_hue="teal", neutral_hue="stone")
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        _page(card),
        path="/",
        theme=theme,
        css_paths=STATIC / "page.css",
        favicon_path=str(STATIC / "favicon.svg"),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
    return mounted


def launch(
    model: str = "tiny", host: str = "127.0.0.1", port: int = 7860, *, slots: int = 1
) -> None:
    """Load a model and serve the page; blocks until a signal.

    Args:
        model: a shipped name, a checkpoint directory, or `hf://organisation/name`.
        host: address to listen at. Browsers let a page hear and sound only over https or on
            localhost, so from another machine the examples want https too.
        port: TCP port; 0 lets the system choose.
        slots: conversations at once; who comes after that is told that every line is busy.

    Raises `UserError` when the model is not there, `slots` is below 1 or the address is taken.
    """
    if slots < 1:
        raise UserError(f"slots: {slots} is too few; choose 1 or more.")
    from speechlm import convert  # here: `create_app` also serves models that need none of it

    server.listen(host, port).close()  # a taken address shows here, not after the model is loaded
    loaded = convert.load(model)
    card = read_card(checkpoint.resolve(model))
    with Engine(loaded, slots, name=model) as engine:
        server.run(create_app(engine, card), engine, host, port, _CONFIG)

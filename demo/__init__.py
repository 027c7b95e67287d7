"""The demo: a page to talk to the model, for people."""

import os

# Read by Gradio and huggingface_hub when they are imported: the page and its server call nobody.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

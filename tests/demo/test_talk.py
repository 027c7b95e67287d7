from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_codec.errors import UserError
from demo.talk import EXAMPLES, make_examples, talk_tab
from synth_data.tts import get_engine


def test_make_examples(tmp_path: Path) -> None:
    try:
        for name in ("espeak", "flite"):
            get_engine(name)
    except UserError as error:
        pytest.skip(str(error))
    paths = make_examples(tmp_path)
    assert [path.stem for path in paths] == [example.slug for example in EXAMPLES]
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # no temporary file is left
    for path in paths:
        pcm, rate = soundfile.read(path)
        assert rate == 24_000
        assert 0.5 < len(pcm) / rate < 6
        assert 0.3 < np.abs(pcm).max() < 0.7


def test_the_tab_offers_only_examples_that_are_there(tmp_path: Path) -> None:
    (tmp_path / f"{EXAMPLES[1].slug}.mp3").touch()
    offered = talk_tab("demo", tmp_path).props["examples"]
    assert [example["text"] for example in offered] == [EXAMPLES[1].text]
    assert offered[0]["url"] == f"demo/{tmp_path.name}/{EXAMPLES[1].slug}.mp3"

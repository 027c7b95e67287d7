"""`auto` is bf16 where the device has units for it; what is asked for is obeyed."""

import logging
import platform

import pytest
import torch

from audio_codec import precision
from audio_codec.precision import has_bf16, lowered, settle

CPU = torch.device("cpu")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks an x86 processor")
@pytest.mark.parametrize("units", [True, False])
def test_a_processor_is_asked_for_its_units(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    assert has_bf16("cpu") is units
    assert settle("auto", "cpu") == ("bf16" if units else "fp32")


def test_what_has_no_units_known_is_left_in_float32() -> None:
    assert not has_bf16("meta") and settle("auto", torch.device("meta")) == "fp32"
    assert has_bf16("cuda") or not torch.cuda.is_available() or torch.version.hip is None


def test_an_explicit_choice_is_obeyed_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    precision._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert settle("fp32", CPU) == "fp32" and not caplog.messages
        assert [settle("bf16", CPU), settle("bf16", CPU)] == ["bf16", "bf16"]
    (said,) = caplog.messages
    assert "bf16" in said and "cpu" in said and "slower" in said
    x = torch.ones(2, 2)
    for asked, dtype in (("bf16", torch.bfloat16), ("auto", torch.float32)):
        with lowered(asked, CPU):  # type: ignore[arg-type]
            assert (x @ x).dtype == dtype

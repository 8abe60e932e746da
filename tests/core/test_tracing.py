from __future__ import annotations

import time

import pytest

from mdi.core.tracing import MAX_SPANS, Recorder, Span
from mdi.rpc import channel, codec


def test_spans_are_noted_only_while_somebody_records() -> None:
    recorder = Recorder()
    with recorder.span("decode"):
        pass
    assert recorder.take(recording=True) == []
    before_s = time.perf_counter()
    with recorder.span("prefill", batch_id=3, n_tokens=7):
        time.sleep(0.01)
    [span] = recorder.take(recording=False)
    assert (span.name, span.batch_id, span.n_tokens) == ("prefill", 3, 7)
    assert before_s <= span.start_s < span.start_s + 0.01 <= span.end_s <= time.perf_counter()
    with recorder.span("decode"):
        pass
    assert recorder.take(recording=False) == []


def test_work_that_fails_was_work_all_the_same() -> None:
    recorder = Recorder()
    recorder.take(recording=True)
    with pytest.raises(ValueError), recorder.span("fetch"):
        raise ValueError
    assert [span.name for span in recorder.take(recording=True)] == ["fetch"]


def test_what_nobody_takes_is_bounded() -> None:
    recorder = Recorder()
    recorder.take(recording=True)
    for _ in range(MAX_SPANS + 10):
        with recorder.span("decode"):
            pass
    spans = recorder.take(recording=True)
    assert len(spans) == MAX_SPANS
    assert len(codec.encode_spans(spans, 0.0).SerializeToString()) < channel.MAX_MESSAGE_BYTES


SPANS = [Span("encode", 10.0, 11.5), Span("decode", 12.0, 12.25, batch_id=4, n_tokens=2)]


def test_the_same_clock_is_left_alone() -> None:
    message = codec.encode_spans(SPANS, now_s=13.0)
    assert codec.decode_spans(message, asked_s=12.9, answered_s=13.2) == SPANS


def test_another_clock_is_shifted_to_this_one() -> None:
    message = codec.encode_spans(SPANS, now_s=13.0)
    encode, decode = codec.decode_spans(message, asked_s=100.0, answered_s=100.5)
    assert (encode.start_s, encode.end_s) == pytest.approx((97.25, 98.75))
    assert decode.start_s == pytest.approx(99.25)
    assert (decode.batch_id, decode.n_tokens) == (4, 2)

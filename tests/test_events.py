"""One log record per event: readable as text, and its fields as attributes."""

import logging

import pytest

from kotonoha_store.events import log_event

logger = logging.getLogger("kotonoha_store.test")


def test_an_event_reads_as_text_and_has_its_fields_as_attributes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log_event(
        logger,
        logging.INFO,
        "batch_embedded",
        lease="ab-1",
        chunks=100,
        seconds=1 / 3,
        code=None,
        final=True,
        share="5%s",
    )
    (record,) = caplog.records
    assert record.getMessage() == (
        "batch_embedded lease=ab-1 chunks=100 seconds=0.333333 code=None final=True share=5%s"
    )
    fields = {"event": "batch_embedded", "lease": "ab-1", "chunks": 100, "seconds": 1 / 3, "code": None, "final": True}
    assert fields.items() <= vars(record).items()
    # Where it was logged, not where the helper stands.
    assert (record.filename, record.funcName) == (
        "test_events.py",
        "test_an_event_reads_as_text_and_has_its_fields_as_attributes",
    )


def test_a_value_cannot_forge_a_field_or_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log_event(logger, logging.INFO, "archived", session_key="a chunks=9\nERROR x", plain="thread:42", japanese="雑談")
    assert caplog.messages == ["archived session_key='a chunks=9\\nERROR x' plain=thread:42 japanese=雑談"]


@pytest.mark.parametrize("name", ["name", "message", "args", "exc_info", "taskName", "event"])
@pytest.mark.parametrize("level", [logging.DEBUG, logging.ERROR])
def test_an_attribute_of_records_cannot_be_overwritten_whatever_the_level(
    caplog: pytest.LogCaptureFixture, name: str, level: int
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match=name):
        log_event(logger, level, "archived", **{name: 1})
    assert not caplog.records


def test_an_attribute_that_the_application_gives_every_record_is_no_obstacle(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    plain = logging.getLogRecordFactory()

    def with_guild(*args: object, **kwargs: object) -> logging.LogRecord:
        record = plain(*args, **kwargs)
        record.guild_id = 0
        return record

    logging.setLogRecordFactory(with_guild)
    try:
        log_event(logger, logging.INFO, "archived", guild_id=5, messages=3)
    finally:
        logging.setLogRecordFactory(plain)
    (record,) = caplog.records
    assert record.getMessage() == "archived guild_id=5 messages=3"
    assert vars(record)["guild_id"] == 5
    assert vars(record)["messages"] == 3

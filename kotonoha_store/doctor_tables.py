"""What the doctor asks of indexes, rows, queue and words; see :mod:`kotonoha_store.doctor`. For the current schema."""

import json
from typing import Any, Final

import numpy as np
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import AddConstraint

from kotonoha_store import index_builds, search_statements
from kotonoha_store.columns import EMBEDDING_DIMENSION, pack_vector
from kotonoha_store.doctor_findings import Case, Finding, error, info, ok, warning
from kotonoha_store.embedding_queue import EmbeddingQueue
from kotonoha_store.filters import EVERYTHING
from kotonoha_store.health import describe_pause, is_misconfigured, is_paused
from kotonoha_store.index_builds import VECTOR_INDEX
from kotonoha_store.models import NOTIFY_TRIGGER, TOUCH_TRIGGER, Base
from kotonoha_store.selectivity import ef_search

# From how many vectors on the planner should prefer the index to comparing all; below, both take milliseconds.
_MANY_VECTORS: Final = 5_000
# Rows a second that an HNSW build does where maintenance_work_mem is small; see the benchmarks.
_BUILD_RATE: Final = 600
_DEAD_SHARE: Final = 0.2
_DEAD_ROWS: Final = 1_000
_QUEUE_INTERVALS: Final = 3
_QUEUE_GRACE_SECONDS: Final = 300.0
_LONG_TRANSACTION_SECONDS: Final = 3600
_SAMPLED_PAGES: Final = 2_000
_COUNTED_TO: Final = 10_000

_TRIGGERS: Final = {"trg_sources_touch_updated_at": TOUCH_TRIGGER, "trg_jobs_notify": NOTIFY_TRIGGER}

_FORGOTTEN: Final = (
    "SELECT c.id FROM knowledge_chunks AS c WHERE c.embedding IS NULL"
    " AND NOT EXISTS (SELECT FROM embedding_jobs AS j WHERE j.chunk_id = c.id)"
)


async def indexes(case: Case) -> list[Finding]:
    """Every index of the models is there and valid, and no build has left anything behind."""
    states = await index_builds.index_states(case.database)
    building = await case.driver.fetchval(
        "SELECT count(*) FROM pg_stat_progress_create_index WHERE datname = current_database()"
    )
    mend = "run `kotonoha-store reindex --broken`"
    found = []
    for state in states:
        # Of our table: the search_path may find another's index of that name first.
        quoted = await case.driver.fetchval(
            "SELECT i.indexrelid::regclass::text FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid"
            " WHERE i.indrelid = to_regclass(quote_ident($1)) AND c.relname = $2",
            state.table,
            state.name,
        )
        if state.state in ("invalid", "leftover") and building:
            found.append(info(f"index-{state.state}", f"{state.name} is not finished: an index is just being built"))
        elif state.state == "missing":
            found.append(error("index-missing", f"the index {state.name} on {state.table} is missing", mend))
        elif state.state == "invalid":
            seen = f"the index {state.name} is INVALID: it is kept up to date, but no query uses it"
            found.append(error("index-invalid", seen, mend, f"REINDEX INDEX CONCURRENTLY {quoted}"))
        elif state.state == "leftover":
            seen = f"the index {state.name} is what a build that was cut short has left; writes keep it up to date"
            found.append(warning("index-leftover", seen, mend, f"DROP INDEX CONCURRENTLY {quoted}"))
    return found or [ok("indexes", f"{sum(state.state == 'valid' for state in states)} indexes, all valid")]


async def vector_index(case: Case) -> list[Finding]:
    """The HNSW index has the operator class, dimension and options that searches and settings expect."""
    column = await case.driver.fetchrow(
        "SELECT format_type(atttypid, atttypmod) AS type, atttypmod AS dimension FROM pg_attribute"
        " WHERE attrelid = 'knowledge_chunks'::regclass AND attname = 'embedding'"
    )
    row = await case.driver.fetchrow(
        "SELECT am.amname AS method, o.opcname AS class, c.reloptions AS options, i.indpred IS NOT NULL AS partial,"
        " c.oid::regclass::text AS quoted, i.indrelid::regclass::text AS quoted_table"
        " FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_am AS am ON am.oid = c.relam"
        " JOIN pg_opclass AS o ON o.oid = i.indclass[0]"
        " WHERE i.indrelid = to_regclass('knowledge_chunks') AND c.relname = $1",
        VECTOR_INDEX,
    )
    found = []
    if column["dimension"] != EMBEDDING_DIMENSION:
        seen = f"knowledge_chunks.embedding is {column['type']}, and this library writes halfvec({EMBEDDING_DIMENSION})"
        found.append(error("vector-dimension", seen, "restore the column; vectors of another dimension are made again"))
    if row is None:
        return found  # told as a missing index
    wanted = case.settings.kb_hnsw_m, case.settings.kb_hnsw_ef_construction
    if (row["method"], row["class"], row["partial"]) != ("hnsw", "halfvec_cosine_ops", False):
        partial = ", and partial" if row["partial"] else ""
        found.append(
            error(
                "hnsw-operator-class",
                f"{VECTOR_INDEX} is {row['method']} with {row['class']}{partial}: no search by cosine distance uses it",
                "drop it, then run `kotonoha-store reindex --broken`",
                f"DROP INDEX CONCURRENTLY {row['quoted']}",
                f"CREATE INDEX CONCURRENTLY {VECTOR_INDEX} ON {row['quoted_table']}"
                f" USING hnsw (embedding halfvec_cosine_ops) WITH (m = {wanted[0]}, ef_construction = {wanted[1]})",
            )
        )
        return found
    options = dict(option.split("=", 1) for option in row["options"] or ())
    has = int(options.get("m", 16)), int(options.get("ef_construction", 64))
    is_asked = {"kb_hnsw_m", "kb_hnsw_ef_construction"} & case.settings.model_fields_set
    said = f"{VECTOR_INDEX} has m = {has[0]}, ef_construction = {has[1]}"
    if has != wanted and is_asked:
        seen = f"{said}, while the settings say {wanted[0]} and {wanted[1]}"
        found.append(
            warning(
                "hnsw-options", seen, "run `kotonoha-store reindex`, or correct KB_HNSW_M and KB_HNSW_EF_CONSTRUCTION"
            )
        )
    return found or [ok("hnsw", f"{said}, halfvec({EMBEDDING_DIMENSION}), cosine")]


async def vector_index_used(case: Case) -> list[Finding]:
    """The planner takes the HNSW index for the statement that searches by meaning run."""
    code = "hnsw-used"
    # One that has vectors, whatever the embedder's: for another the planner would expect none.
    model = await case.driver.fetchval(
        "SELECT embedding_model FROM knowledge_chunks WHERE embedding IS NOT NULL ORDER BY id DESC LIMIT 1"
    )
    statement = search_statements.nearest("index", EVERYTHING)
    # Any direction will do; seeded, so that two runs ask the same.
    vector = pack_vector(np.random.default_rng(1).standard_normal(EMBEDDING_DIMENSION, dtype=np.float32))
    values = {
        "query": vector,
        "model": model or "",
        "candidates": 10,
        "top_k": 10,
        "offset": 0,
        "ef_search": str(ef_search(10)),
    }
    plan = await case.driver.fetchval(f"EXPLAIN (FORMAT JSON) {statement.sql}", *statement.arguments(values))
    if f'"{VECTOR_INDEX}"' in (plan if isinstance(plan, str) else json.dumps(plan)):
        return [ok(code, f"a search by meaning uses {VECTOR_INDEX}")]
    vectors = await case.driver.fetchval(
        "SELECT count(*) FROM (SELECT FROM knowledge_chunks WHERE embedding IS NOT NULL LIMIT $1) AS counted",
        _MANY_VECTORS,
    )
    if vectors < _MANY_VECTORS:
        return [info(code, f"with {vectors} vectors the planner rightly compares all of them, without the index")]
    mend = "let it count the rows anew; if that changes nothing, see the other findings on indexes and settings"
    return [
        warning(
            code,
            f"a search by meaning does not use {VECTOR_INDEX}, and compares all vectors",
            mend,
            "ANALYZE knowledge_chunks",
        )
    ]


async def build_time(case: Case) -> list[Finding]:
    """An index can be built within the time that a statement may take."""
    code = "statement-timeout"
    row = await case.driver.fetchrow(
        "SELECT setting::bigint / 1000.0 AS seconds, greatest((SELECT reltuples FROM pg_class"
        " WHERE oid = 'knowledge_chunks'::regclass), 0) AS chunks FROM pg_settings WHERE name = 'statement_timeout'"
    )
    if not row["seconds"]:
        return [ok(code, "statements may take as long as they take")]
    needed = row["chunks"] / _BUILD_RATE
    said = f"statement_timeout is {row['seconds']:g} s"
    if row["seconds"] < needed:
        mend = "migrations and `kotonoha-store reindex` lift it for themselves; in a session of your own do it first"
        return [
            info(
                code,
                f"{said}, and building {VECTOR_INDEX} takes some {needed:.0f} s",
                mend,
                "SET statement_timeout = 0",
            )
        ]
    return [ok(code, said)]


async def dead_rows(case: Case) -> list[Finding]:
    """VACUUM keeps up with what is changed and deleted."""
    rows = await case.driver.fetch(
        "SELECT s.relname AS name, s.relid::regclass::text AS quoted, s.n_live_tup AS live, s.n_dead_tup AS dead,"
        " 'autovacuum_enabled=false' = ANY (c.reloptions) AS is_off"
        " FROM pg_stat_user_tables AS s JOIN pg_class AS c ON c.oid = s.relid"
        " WHERE s.relid IN (SELECT to_regclass(quote_ident(name)) FROM unnest($1::text[]) AS name) ORDER BY 1",
        list(Base.metadata.tables),
    )
    found = []
    if await case.driver.fetchval("SELECT NOT current_setting('autovacuum')::boolean"):
        seen = "autovacuum is off: dead rows slow every search down, and nobody removes them"
        found.append(
            warning(
                "autovacuum-off",
                seen,
                "turn it on (as a superuser)",
                "ALTER SYSTEM SET autovacuum = on",
                "SELECT pg_reload_conf()",
            )
        )
    for row in rows:
        if row["is_off"]:
            sql = f"ALTER TABLE {row['quoted']} RESET (autovacuum_enabled)"
            found.append(warning("autovacuum-off", f"autovacuum is off for {row['name']}", "turn it on", sql))
        # What is only queued comes and goes; autovacuum has a minute's time.
        least = _DEAD_ROWS if row["name"] == "knowledge_chunks" else 10 * _DEAD_ROWS
        if row["dead"] < least or row["dead"] < _DEAD_SHARE * (row["live"] + row["dead"]):
            continue
        seen = f"{row['name']} has {row['dead']} dead rows beside {row['live']} live ones"
        vacuum = f"VACUUM (ANALYZE) {row['quoted']}"
        if row["name"] == "knowledge_chunks":
            mend = "VACUUM, then see `kotonoha-store recall-check`: after many deletions only a REINDEX restores recall"
            found.append(
                warning(
                    "dead-vectors", f"{seen}: they take places in the HNSW index, and searches find less", mend, vacuum
                )
            )
        else:
            mend = "VACUUM now; if it comes back, let autovacuum run more often (autovacuum_vacuum_scale_factor)"
            found.append(warning("dead-rows", seen, mend, vacuum))
    return found or [ok("dead-rows", "autovacuum keeps up")]


async def deletions(case: Case) -> list[Finding]:
    """Deletions that may have thinned the HNSW graph out: only a measurement tells."""
    row = await case.driver.fetchrow(
        "SELECT n_tup_del AS deleted, n_live_tup AS live FROM pg_stat_user_tables"
        " WHERE relid = 'knowledge_chunks'::regclass"
    )
    if row is None or row["deleted"] < max(_DEAD_ROWS, _DEAD_SHARE * row["live"]):
        return []
    seen = f"{row['deleted']} chunks were deleted since statistics began, beside {row['live']} that are there"
    return [
        info("deletions", seen, "measure with `kotonoha-store recall-check`; where it is low, `kotonoha-store reindex`")
    ]


async def long_transactions(case: Case) -> list[Finding]:
    """No forgotten transaction keeps VACUUM from removing dead rows."""
    rows = await case.driver.fetch(
        "SELECT pid, extract(epoch FROM now() - xact_start)::int AS seconds FROM pg_stat_activity"
        " WHERE state LIKE 'idle in transaction%' AND xact_start < now() - make_interval(secs => $1)"
        " AND datname = current_database() ORDER BY xact_start",
        _LONG_TRANSACTION_SECONDS,
    )
    mend = "end the program that forgot it, or its connection; nothing that it did was committed"
    return [
        warning(
            "long-transaction",
            f"the connection {row['pid']} has been idle in a transaction for {row['seconds'] // 60} minutes: "
            "VACUUM keeps what died since",
            mend,
            f"SELECT pg_terminate_backend({row['pid']})",
        )
        for row in rows
    ] or [ok("long-transactions", "no transaction is left open")]


async def queue(case: Case) -> list[Finding]:
    """Jobs are taken up soon after they are due, and what dead workers held comes back."""
    row = await case.driver.fetchrow(
        "SELECT count(*) AS jobs, extract(epoch FROM now() - min(available_at) FILTER (WHERE lease_token IS NULL))"
        "::float8 AS due, count(*) FILTER (WHERE lease_token IS NOT NULL AND available_at < now()) AS expired,"
        " extract(epoch FROM now() - min(available_at) FILTER (WHERE lease_token IS NOT NULL))::float8 AS lease"
        " FROM embedding_jobs"
    )
    patience = max(_QUEUE_INTERVALS * 60 * case.settings.kb_embedding_interval_minutes, _QUEUE_GRACE_SECONDS)
    mend = "start a worker: `kotonoha-store worker`; if one runs, see its log"
    paused = [pause for pause in await EmbeddingQueue(case.database).pauses() if is_paused(pause)]
    found = []
    if (row["due"] or 0) > patience:
        seen = f"{row['jobs']} chunks wait for their vector, the oldest has been due for {row['due'] / 60:.0f} minutes"
        if paused:
            found.append(info("queue-age", f"{seen}: their provider is paused, see below"))
        else:
            found.append(warning("queue-age", f"{seen}: no worker takes them", mend))
    if row["expired"]:
        seen = f"{row['expired']} leases have expired, the oldest {row['lease'] / 60:.1f} minutes ago: a worker died"
        if row["lease"] > patience and not paused:
            found.append(warning("expired-leases", f"{seen}, and none takes its chunks over", mend))
        else:
            found.append(info("expired-leases", f"{seen}; the next claims take them over, one by one"))
    forgotten = await case.driver.fetchval(f"SELECT count(*) FROM ({_FORGOTTEN} LIMIT $1) AS counted", _COUNTED_TO)  # noqa: S608  a constant
    if forgotten:
        number = f"{forgotten} chunks" if forgotten < _COUNTED_TO else f"{forgotten} chunks or more"
        seen = f"{number} have neither a vector nor a place in the queue: searches by meaning never find them"
        sql = f"INSERT INTO embedding_jobs (chunk_id) {_FORGOTTEN} ON CONFLICT DO NOTHING"
        found.append(error("never-embedded", seen, "queue them again; a worker embeds them", sql))
    return found or [ok("queue", f"{row['jobs']} chunks wait for their vector, none for long")]


async def constraints(case: Case) -> list[Finding]:
    """The triggers and foreign keys that the migrations make are there and enabled."""
    tables = Base.metadata.tables
    wanted = {str(key.name): key for table in tables.values() for key in table.foreign_key_constraints}
    there = await case.driver.fetch(
        "SELECT tgname AS name, tgisinternal AS of_key, tgrelid::regclass::text AS quoted_table,"
        " tgenabled IN ('D', 'R') AS is_off,"
        " format('ALTER TABLE %s ENABLE TRIGGER %I', tgrelid::regclass, tgname) AS mend"
        " FROM pg_trigger WHERE tgrelid IN (SELECT to_regclass(quote_ident(name)) FROM unnest($1::text[]) AS name)"
        " UNION ALL SELECT conname, true, conrelid::regclass::text, false, NULL FROM pg_constraint WHERE contype = 'f'"
        " AND conrelid IN (SELECT to_regclass(quote_ident(name)) FROM unnest($1::text[]) AS name)",
        list(tables),
    )
    names = {row["name"] for row in there}
    found = []
    for name, sql in _TRIGGERS.items():
        if name not in names:
            found.append(error("trigger-missing", f"the trigger {name} is missing", "make it again", sql))
    for name, key in wanted.items():
        if name not in names:
            # Isolated, the model's own key would be left out of every table made from it later in this process.
            statement = AddConstraint(key, isolate_from_table=False)
            sql = str(statement.compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]  # untyped there
            seen = f"the foreign key {name} is missing: what is deleted leaves rows behind that belong to nothing"
            found.append(error("foreign-key-missing", seen, "delete such rows, then make it again", sql))
    for row in there:
        if row["is_off"] and (row["of_key"] or row["name"] in _TRIGGERS):
            what = "a foreign key's trigger" if row["of_key"] else f"the trigger {row['name']}"
            mend = "enable it (a foreign key's as a superuser)"
            found.append(error("trigger-disabled", f"{what} on {row['quoted_table']} is disabled", mend, row["mend"]))
    return found or [ok("constraints", "triggers and foreign keys are there and enabled")]


async def dead_letters(case: Case) -> list[Finding]:
    """No text was given up on."""
    rows = await case.driver.fetch(
        "SELECT coalesce(error_code, 'no code') AS code, count(*) AS number FROM knowledge_chunks_dlq"
        " GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    if not rows:
        return [ok("dead-letters", "none")]
    seen = ", ".join(f"{row['number']} of {row['code']}" for row in rows)
    mend = "see `kotonoha-store dlq list`; once their cause is mended, `kotonoha-store dlq requeue`, else `dlq discard`"
    return [warning("dead-letters", f"texts that could not be embedded are not found by meaning: {seen}", mend)]


async def pauses(case: Case) -> list[Finding]:
    """No provider of vectors is left alone."""
    found = []
    for pause in await EmbeddingQueue(case.database).pauses():
        if not is_paused(pause):
            continue
        quoted = await case.driver.fetchval("SELECT quote_literal($1::text)", pause.provider)
        if is_misconfigured(pause):
            mend = "correct OPENAI_API_KEY, OPENAI_BASE_URL or KB_EMBEDDING_MODEL; workers that start anew ask at once"
            sql = f"DELETE FROM embedding_pauses WHERE provider = {quoted}"  # noqa: S608  quoted by the server
            found.append(error("provider-configuration", describe_pause(pause), mend, sql))
        else:
            found.append(info("provider-paused", describe_pause(pause), "it is asked again by itself"))
    return found or [ok("providers", "none is paused")]


async def words(case: Case) -> list[Finding]:
    """Every chunk can be found by its words."""
    missing = await case.driver.fetchval(
        "SELECT count(*) FROM (SELECT FROM knowledge_chunks AS c WHERE NOT EXISTS"
        " (SELECT FROM chunk_terms AS t WHERE t.chunk_id = c.id) LIMIT $1) AS counted",
        _COUNTED_TO,
    )
    if not missing:
        return [ok("words", "every chunk has its words")]
    number = f"{missing} chunks" if missing < _COUNTED_TO else f"{missing} chunks or more"
    return [
        error(
            "words-missing",
            f"{number} have no words: searches by word do not find them",
            "run `kotonoha-store stats --refresh`",
        )
    ]


def _percent(number: int, total: int) -> str:
    """In whole per cent, but neither all nor nothing where it is less or more."""
    share = 100 * number / total
    if 0 < share < 1:
        return "<1 %"
    return ">99 %" if 99 < share < 100 else f"{share:.0f} %"


async def models(case: Case) -> list[Finding]:
    """The vectors are of one model, and it is the embedder's."""
    rows = await case.driver.fetch(
        "SELECT embedding_model AS model, count(*) AS number FROM knowledge_chunks TABLESAMPLE SYSTEM (("
        " SELECT least(100, 100.0 * $1 / greatest(pg_relation_size('knowledge_chunks')"
        " / current_setting('block_size')::int, 1)))::real) WHERE embedding IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1",
        _SAMPLED_PAGES,
    )
    counts: dict[str, Any] = {row["model"]: row["number"] for row in rows}
    if not counts:
        return [ok("models", "there are no vectors yet")]
    total = sum(counts.values())
    said = ", ".join(f"{model!r} {_percent(number, total)}" for model, number in counts.items())
    mend = (
        "set KB_EMBEDDER and KB_EMBEDDING_MODEL to what made them, or embed those texts with this one: run "
        "`kotonoha-store reembed`, with a worker"
    )
    if case.model is not None and case.model not in counts:
        return [
            error(
                "models-foreign",
                f"the vectors are of {said}; the embedder is {case.model!r} and finds none of them",
                mend,
            )
        ]
    if len(counts) > 1:
        return [
            warning("models-mixed", f"the vectors are of several models: {said}; a search finds those of one", mend)
        ]
    return [ok("models", f"all vectors are of {said}")]

"""Words: the terms of every chunk in a table of their own; which session a source came from; an index for `until`.

Existing chunks get their terms batch by batch, by the library's own Python; a script made by ``--sql``
cannot, and says so when there are chunks.

Revision: 0003
Revises: 0002
"""

from typing import Any

from alembic import context, op
from sqlalchemy import Connection, text

from kotonoha_store.words import analyse, scope_terms, terms_literal

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BATCH = 1000

TERMS_TABLE = """
    CREATE TABLE IF NOT EXISTS chunk_terms (
        chunk_id bigint PRIMARY KEY REFERENCES knowledge_chunks(id) ON DELETE CASCADE,
        terms tsvector NOT NULL,
        folded text
    )
    """

FREQUENCIES_TABLE = """
    CREATE TABLE IF NOT EXISTS term_frequencies (
        term text COLLATE "C" PRIMARY KEY,
        frequency double precision NOT NULL
    )
    """

INDEXES = (
    "idx_sources_origin_session_key ON knowledge_sources(origin_session_key) WHERE origin_session_key IS NOT NULL",
    "idx_chunks_occurred_from ON knowledge_chunks(occurred_from) WHERE occurred_from IS NOT NULL",
    # The library merges new entries itself after each addition; the limit is for who writes past it.
    "idx_chunk_terms_terms ON chunk_terms USING gin (terms) WITH (gin_pending_list_limit = 16384)",
)

# By its owner's right: only that one may merge.
REFRESH_FUNCTION = """\
CREATE OR REPLACE FUNCTION kotonoha_refresh_terms(force boolean DEFAULT false) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    AS $$
DECLARE
    sample_size CONSTANT integer := 2000;
    newest bigint := (SELECT max(chunk_id) FROM chunk_terms);
    known double precision := (SELECT frequency FROM term_frequencies WHERE term = '');
    counted_to double precision := (SELECT frequency FROM term_frequencies WHERE term = '#');
    size double precision := pg_relation_size('chunk_terms');
    counted_size double precision := (SELECT frequency FROM term_frequencies WHERE term = '#size');
    drawn bigint[];
    sample bigint[];
    chunks double precision;
BEGIN
    -- While the index is still being built there is nothing to merge.
    PERFORM gin_clean_pending_list(indexrelid) FROM pg_index
    WHERE indexrelid = to_regclass('idx_chunk_terms_terms') AND indisvalid;
    -- One id far above the others hides growth, which the size shows.
    IF abs(newest - counted_to) < known / 2 AND size < 1.5 * counted_size + 1000000 AND NOT force THEN
        RETURN;
    END IF;
    -- Whoever is counting already counts for all; with an old snapshot two that count would collide.
    IF NOT pg_try_advisory_xact_lock(7205110862154902382)
        OR current_setting('transaction_isolation') <> 'read committed'
    THEN
        RETURN;
    END IF;
    IF newest IS NULL THEN
        DELETE FROM term_frequencies;
        RETURN;
    END IF;
    IF newest > sample_size THEN
        drawn := ARRAY(SELECT DISTINCT 1 + floor(random() * newest)::bigint FROM generate_series(1, sample_size));
        sample := ARRAY(SELECT chunk_id FROM chunk_terms WHERE chunk_id = ANY (drawn));
        chunks := newest * (cardinality(sample)::double precision / cardinality(drawn));
    END IF;
    -- All of few; and where most ids are gone, the newest.
    IF coalesce(cardinality(sample), 0) < sample_size / 10 THEN
        sample := ARRAY(SELECT chunk_id FROM chunk_terms ORDER BY chunk_id DESC LIMIT sample_size);
        IF cardinality(sample) < sample_size THEN
            chunks := cardinality(sample);
        ELSE
            -- What VACUUM counted, where it did.
            chunks := greatest(
                chunks, sample_size, (SELECT reltuples FROM pg_class WHERE oid = 'chunk_terms'::regclass)
            );
        END IF;
    END IF;
    DELETE FROM term_frequencies;
    INSERT INTO term_frequencies (term, frequency)
    SELECT '', chunks
    UNION ALL
    SELECT '#', newest
    UNION ALL
    SELECT '#size', size
    UNION ALL (
        SELECT word, ndoc::double precision / cardinality(sample)
        FROM ts_stat(format('SELECT terms FROM chunk_terms WHERE chunk_id = ANY (%L::bigint[])', sample))
        WHERE word NOT LIKE '#%' AND (ndoc > 1 OR cardinality(sample) < sample_size / 10)
        ORDER BY ndoc DESC, word
        LIMIT 10000
    );
END
$$"""

# Of the tables' own schema: a caller's temporary table of the same name, with a trigger, would have the owner's right.
REFRESH_PATH = """\
DO $$ BEGIN EXECUTE format(
    'ALTER FUNCTION kotonoha_refresh_terms(boolean) SET search_path = %I, pg_temp', current_schema()
); END $$"""

TOUCH_TRIGGER = """\
CREATE OR REPLACE TRIGGER trg_sources_touch_updated_at
BEFORE UPDATE ON knowledge_sources
FOR EACH ROW EXECUTE FUNCTION kotonoha_touch_updated_at()"""

UNFILLED = text(
    "SELECT c.id, s.title, c.content, c.guild_id, c.channel_id, c.thread_id, c.user_id"
    " FROM knowledge_chunks AS c JOIN knowledge_sources AS s ON s.id = c.source_id"
    " LEFT JOIN chunk_terms AS t ON t.chunk_id = c.id"
    " WHERE c.id > :after AND t.chunk_id IS NULL ORDER BY c.id LIMIT :batch"
)

# A chunk that is deleted since it was read is passed over, without waiting: the deletion may wait for another of
# these. The lock keeps it until the row is in.
FILL = text(
    "INSERT INTO chunk_terms (chunk_id, terms, folded)"
    " SELECT n.chunk_id, n.terms, n.folded FROM unnest("
    " CAST(:ids AS bigint[]), CAST(CAST(:terms AS text[]) AS tsvector[]), CAST(:folded AS text[])"
    ") AS n (chunk_id, terms, folded)"
    " JOIN (SELECT id FROM knowledge_chunks WHERE id = ANY (CAST(:ids AS bigint[]))"
    " FOR KEY SHARE SKIP LOCKED) AS c"
    " ON c.id = n.chunk_id ON CONFLICT DO NOTHING"
)


def drop_index(index: str, *, only_if: str = "true") -> None:
    """Drop an index of our table: DROP INDEX IF EXISTS takes a namesake in another schema when ours is gone."""
    name, _, table = index.partition("(")[0].split()[:3]
    op.execute(
        "DO $$ DECLARE found regclass; BEGIN"
        " SELECT c.oid INTO found FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid"
        f" WHERE i.indrelid = to_regclass('{table}') AND c.relname = '{name}' AND {only_if};"
        " IF found IS NOT NULL THEN EXECUTE 'DROP INDEX ' || found; END IF; END $$"
    )


def create_concurrently(index: str) -> None:
    """Build an index beside running queries; one that an earlier run left INVALID is built anew."""
    # IF NOT EXISTS would keep it.
    drop_index(index, only_if="NOT i.indisvalid")
    op.execute(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {index}")


def scope(row: Any) -> list[str]:
    names = ("guild_id", "channel_id", "thread_id", "user_id")
    return scope_terms(**{name: getattr(row, name) for name in names})


def fill_terms(connection: Connection) -> None:
    """Committed batch by batch: run again after a crash, it goes on where it was."""
    # Ids below zero, which no sequence gave, too.
    after = -(2**63)
    while rows := connection.execute(UNFILLED, {"after": after, "batch": BATCH}).all():
        words = [analyse(row.title, row.content) for row in rows]
        values = {
            "ids": [row.id for row in rows],
            "terms": [terms_literal(each, scope(row)) for each, row in zip(words, rows, strict=True)],
            "folded": [each.folded for each in words],
        }
        connection.execute(FILL, values)
        after = rows[-1].id


def upgrade() -> None:
    op.execute("ALTER TABLE knowledge_sources ADD COLUMN IF NOT EXISTS origin_session_key text")
    # What is filled in here is no change of the source.
    op.execute("DROP TRIGGER IF EXISTS trg_sources_touch_updated_at ON knowledge_sources")
    op.execute(
        "UPDATE knowledge_sources SET origin_session_key = metadata ->> 'origin_session_key'"
        " WHERE type = 'discord_session' AND origin_session_key IS NULL"
        " AND jsonb_typeof(metadata -> 'origin_session_key') = 'string'"
    )
    op.execute(TOUCH_TRIGGER)

    op.execute(TERMS_TABLE)
    # Not compressed: a search reads the terms of its best candidates.
    op.execute("ALTER TABLE chunk_terms ALTER COLUMN terms SET STORAGE EXTERNAL")
    op.execute(FREQUENCIES_TABLE)
    op.execute(REFRESH_FUNCTION)
    op.execute(REFRESH_PATH)

    with op.get_context().autocommit_block():
        if context.is_offline_mode():
            op.execute(
                "DO $$ BEGIN IF EXISTS (SELECT FROM knowledge_chunks) THEN RAISE WARNING"
                " 'chunks that are there already are not found by word yet: call Store.fill_terms()'; END IF; END $$"
            )
        else:
            fill_terms(op.get_bind())
        # CONCURRENTLY waits for older transactions, however long they take.
        op.execute("SET lock_timeout = 0")
        for index in INDEXES:
            create_concurrently(index)
        # Whoever added a chunk during the build has counted those few only.
        op.execute("SELECT kotonoha_refresh_terms(force => true)")


def downgrade() -> None:
    op.execute("DROP FUNCTION IF EXISTS kotonoha_refresh_terms(boolean)")
    op.execute("DROP TABLE IF EXISTS term_frequencies")
    op.execute("DROP TABLE IF EXISTS chunk_terms")
    for index in INDEXES[:2]:
        drop_index(index)
    op.execute("ALTER TABLE knowledge_sources DROP COLUMN IF EXISTS origin_session_key")

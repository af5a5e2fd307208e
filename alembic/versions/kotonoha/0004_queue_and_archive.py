"""Queue and archive: pauses of a provider, the history of dead letters, wake-up, vectors found by their text's hash,
sessions that ask to be archived while they are in use.

Revision: 0004
Revises: 0003
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

COLUMNS = {
    "sessions": ("archive_requested_at timestamptz",),
    "knowledge_chunks_dlq": ("history jsonb NOT NULL DEFAULT '[]'::jsonb",),
    "embedding_jobs": ("history jsonb",),
}

PAUSES_TABLE = """
    CREATE TABLE IF NOT EXISTS embedding_pauses (
        provider text PRIMARY KEY,
        paused_until timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP,
        failures integer NOT NULL DEFAULT 0,
        error_code text,
        updated_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP
    )
    """

INDEXES = (
    "idx_sessions_archive_requested ON sessions(archive_requested_at, id) WHERE archive_requested_at IS NOT NULL",
    # The model as its hash, and not WHERE embedding IS NOT NULL: else searches would leave the HNSW graph for it as
    # long as statistics know of no embedded chunk.
    "idx_chunks_content_hash ON knowledge_chunks(content_hash, hashtextextended(embedding_model, 0))",
)

# PostgreSQL sends equal notifications of one transaction once.
NOTIFY_FUNCTION = """\
CREATE OR REPLACE FUNCTION kotonoha_notify_jobs() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    NOTIFY kotonoha_embedding_jobs;
    RETURN NULL;
END
$$"""

NOTIFY_TRIGGER = """\
CREATE OR REPLACE TRIGGER trg_jobs_notify
AFTER INSERT ON embedding_jobs
FOR EACH STATEMENT EXECUTE FUNCTION kotonoha_notify_jobs()"""

# Each append reads and writes the whole array; lz4 does both in a fraction of pglz's time.
MESSAGES_COMPRESSION = """\
DO $$ BEGIN
    ALTER TABLE sessions ALTER COLUMN messages SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END $$"""


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


def upgrade() -> None:
    for table, columns in COLUMNS.items():
        for column in columns:
            op.execute(f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {column}")
    op.execute(PAUSES_TABLE)
    op.execute(NOTIFY_FUNCTION)
    op.execute(NOTIFY_TRIGGER)
    op.execute(MESSAGES_COMPRESSION)

    with op.get_context().autocommit_block():
        # CONCURRENTLY waits for older transactions, however long they take.
        op.execute("SET lock_timeout = 0")
        for index in INDEXES:
            create_concurrently(index)


def downgrade() -> None:
    op.execute("DROP TRIGGER IF EXISTS trg_jobs_notify ON embedding_jobs")
    op.execute("DROP FUNCTION IF EXISTS kotonoha_notify_jobs()")
    op.execute("ALTER TABLE sessions ALTER COLUMN messages SET COMPRESSION default")
    for index in INDEXES:
        drop_index(index)
    op.execute("DROP TABLE IF EXISTS embedding_pauses")
    for table, columns in COLUMNS.items():
        for column in columns:
            op.execute(f"ALTER TABLE {table} DROP COLUMN IF EXISTS {column.split()[0]}")

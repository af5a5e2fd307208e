"""The schema of kotonoha-bot v0.8.0, version 1.22 of its design.

Every name, type, default and index as written there; corrected is only what cannot run (a stray
backslash, constraints added without a guard). Run on a database that was made by that script, it
changes nothing.

Revision: 0001
Revises:
"""

from alembic import context, op

from kotonoha_store.migrations import ensure_vector, hnsw_options

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ENUMS = {
    "source_type_enum": ("discord_session", "document_file", "web_page", "image_caption", "audio_transcript"),
    "session_status_enum": ("active", "archived"),
    "source_status_enum": ("pending", "processing", "completed", "partial", "failed"),
}

TABLES = (
    """
    CREATE TABLE IF NOT EXISTS sessions (
        id BIGSERIAL PRIMARY KEY,
        session_key TEXT UNIQUE NOT NULL,
        session_type TEXT NOT NULL,
        messages JSONB DEFAULT '[]'::jsonb NOT NULL,
        status session_status_enum DEFAULT 'active',
        guild_id BIGINT,
        channel_id BIGINT,
        thread_id BIGINT,
        user_id BIGINT,
        version INT DEFAULT 1,
        last_archived_message_index INT DEFAULT 0,
        created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
        last_active_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS knowledge_sources (
        id BIGSERIAL PRIMARY KEY,
        type source_type_enum NOT NULL,
        title TEXT NOT NULL,
        uri TEXT,
        status source_status_enum DEFAULT 'pending',
        error_code TEXT,
        error_message TEXT,
        metadata JSONB DEFAULT '{}'::jsonb,
        created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
        updated_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS knowledge_chunks (
        id BIGSERIAL PRIMARY KEY,
        source_id BIGINT REFERENCES knowledge_sources(id) ON DELETE CASCADE,
        content TEXT NOT NULL,
        embedding halfvec(1536),
        location JSONB DEFAULT '{}'::jsonb,
        token_count INT,
        retry_count INT DEFAULT 0,
        created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS knowledge_chunks_dlq (
        id BIGSERIAL PRIMARY KEY,
        original_chunk_id BIGINT,
        source_id BIGINT,
        source_title TEXT,
        content TEXT NOT NULL,
        error_code TEXT,
        error_message TEXT,
        retry_count INT DEFAULT 0,
        created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
        last_retry_at TIMESTAMPTZ
    )
    """,
)

CHECKS = (
    ("sessions", "chk_sessions_status", "status IN ('active', 'archived')"),
    (
        "knowledge_sources",
        "chk_sources_status",
        "status IN ('pending', 'processing', 'completed', 'partial', 'failed')",
    ),
)


def index_statements() -> list[str]:
    # KB_HNSW_M and KB_HNSW_EF_CONSTRUCTION decide, by default the design's 16 and 64.
    options = hnsw_options(context.config.attributes["settings"])
    return [
        "idx_sessions_session_key ON sessions(session_key)",
        "idx_sessions_status ON sessions(status)",
        "idx_sessions_last_active_at ON sessions(last_active_at)",
        "idx_sessions_channel_id ON sessions(channel_id)",
        "idx_sessions_archive_candidates ON sessions(status, last_active_at) WHERE status = 'active'",
        "idx_sources_metadata ON knowledge_sources USING gin (metadata)",
        "idx_sources_status ON knowledge_sources(status)",
        "idx_sources_type ON knowledge_sources(type)",
        f"idx_chunks_embedding ON knowledge_chunks USING hnsw (embedding halfvec_cosine_ops) WITH ({options})",
        "idx_chunks_source_id ON knowledge_chunks(source_id)",
        "idx_chunks_searchable ON knowledge_chunks(source_id, created_at)"
        " WHERE embedding IS NOT NULL AND token_count > 0",
        "idx_chunks_queue ON knowledge_chunks(id) WHERE embedding IS NULL AND retry_count < 3",
    ]


def upgrade() -> None:
    if context.is_offline_mode():
        op.execute("CREATE EXTENSION IF NOT EXISTS vector")
    else:
        ensure_vector(op.get_bind())
    for name, values in ENUMS.items():
        labels = ", ".join(f"'{value}'" for value in values)
        # CREATE TYPE knows no IF NOT EXISTS.
        op.execute(
            f"DO $$ BEGIN CREATE TYPE {name} AS ENUM ({labels}); EXCEPTION WHEN duplicate_object THEN NULL; END $$"
        )
    for table in TABLES:
        op.execute(table)
    for index in index_statements():
        op.execute(f"CREATE INDEX IF NOT EXISTS {index}")
    for table, name, condition in CHECKS:
        op.execute(
            f"DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = '{table}'::regclass"
            f" AND conname = '{name}') THEN ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({condition});"
            " END IF; END $$"
        )


def downgrade() -> None:
    for table in ("knowledge_chunks_dlq", "knowledge_chunks", "knowledge_sources", "sessions"):
        op.execute(f"DROP TABLE IF EXISTS {table}")
    # The extension stays: others in this database may use it.
    for name in ENUMS:
        op.execute(f"DROP TYPE IF EXISTS {name}")

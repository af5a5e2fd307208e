"""${message}

Revision: ${up_revision}
Revises: ${down_revision | comma,n}

Rules of this folder:
- A landed revision is never edited.
- Each statement can be run again after a half-applied run: IF [NOT] EXISTS, or a check that is
  qualified by table or schema.
- No table is locked for long: fill in batches outside a transaction, build indexes CONCURRENTLY in
  an autocommit block of their own, after whatever must be committed before.
- The downgrade brings back what was there, with rows in the tables; types are dropped too.
- Test it up, down and up again in tests/test_migrations.py.
"""

${imports if imports else "from alembic import op"}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}

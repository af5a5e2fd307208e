"""What the doctor asks of the server, the extension, the connection and the role; see :mod:`kotonoha_store.doctor`."""

from datetime import UTC, date, datetime
from typing import Any, Final

from kotonoha_store import endpoints
from kotonoha_store.doctor_findings import Case, Finding, error, info, ok, warning
from kotonoha_store.errors import ConfigurationError, StoreError
from kotonoha_store.roles import OUR_TABLES, Role, privileges_on

_SUPPORTED: Final = (16, 18)

# https://www.postgresql.org/support/versioning: the second Thursday of November, five years after the first release.
_END_OF_LIFE: Final = {16: date(2028, 11, 9), 17: date(2029, 11, 8), 18: date(2030, 11, 14)}

# Of the release notes of the version that mended it: 17.2 and 16.6; 18.3, 17.9 and 16.13.
_ABI: Final = "extensions built for its other minor versions can crash, and ALTER ROLE ... SET role has no effect"
_SUBSTRING: Final = "substring() refuses some long texts that are not ASCII, and a standby can stop in replay"
_BAD_SERVERS: Final = {
    (16, 5): (_ABI, 6),
    (17, 1): (_ABI, 2),
    (16, 12): (_SUBSTRING, 13),
    (17, 8): (_SUBSTRING, 9),
    (18, 2): (_SUBSTRING, 3),
}

# pgvector's CHANGELOG: what the version mended that concerns an HNSW index of halfvec.
_LEAST_PGVECTOR: Final = (0, 8)
_GRAPH_MENDED: Final = (0, 8, 3)
_PGVECTOR_FAULTS: Final = (
    ((0, 8, 2), "parallel builds of HNSW indexes overflow a buffer (CVE-2026-3172)"),
    (_GRAPH_MENDED, "VACUUM beside insertions can damage an HNSW index"),
    ((0, 8, 4), 'VACUUM of an HNSW index can fail with "hnsw graph not repaired"'),
)
_INSTALL: Final = "the package postgresql-NN-pgvector, or the image pgvector/pgvector"

_LACKING: Final = """
SELECT format('USAGE ON SEQUENCE %s', s.oid::regclass) AS missing
FROM pg_class AS s
JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = s.oid AND d.deptype = 'a'
WHERE CASE WHEN s.relkind = 'S' THEN NOT has_sequence_privilege(s.oid, 'USAGE') ELSE false END
    AND d.refobjid IN (SELECT to_regclass(quote_ident(name)) FROM unnest($1::text[]) AS name)
UNION ALL
SELECT format('EXECUTE ON FUNCTION %s', p) FROM to_regprocedure('kotonoha_refresh_terms(boolean)') AS p
WHERE NOT has_function_privilege(p, 'EXECUTE')
ORDER BY 1
"""

# Kept free for administrators, beside whatever else connects.
_SPARE: Final = 3


async def server_version(case: Case) -> list[Finding]:
    """16 to 18, no version that is known to be bad, none that gets no corrections any more."""
    number, text = await case.driver.fetchrow(
        "SELECT current_setting('server_version_num')::int, current_setting('server_version')"
    )
    return judge_server(number // 10_000, number % 10_000, text.split(" ")[0], datetime.now(UTC).date())


def judge_server(major: int, minor: int, text: str, today: date) -> list[Finding]:
    """The findings for a version, apart from a server that has it."""
    code = "server-version"
    least, most = _SUPPORTED
    if major < least:
        return [error(code, f"PostgreSQL {text} is too old", f"move to PostgreSQL {least} to {most}")]
    if not text.replace(".", "").isdecimal():
        return [warning(code, f"PostgreSQL {text} is no release", f"use a release of PostgreSQL {least} to {most}")]
    if major > most:
        return [
            warning(code, f"PostgreSQL {text}: this version was not tested on it", "install a newer kotonoha-store")
        ]
    if (bad := _BAD_SERVERS.get((major, minor))) is not None:
        why, mended = bad
        return [warning(code, f"PostgreSQL {text} has a known fault: {why}", f"install {major}.{mended} or later")]
    if today > _END_OF_LIFE[major]:
        seen = f"PostgreSQL {major} has had no corrections since {_END_OF_LIFE[major]}"
        return [warning(code, seen, f"move to PostgreSQL {most} (pg_upgrade, or dump and restore)")]
    return [ok(code, f"PostgreSQL {text}")]


async def pgvector(case: Case) -> list[Finding]:
    """The extension is there, new enough, without known faults, and in the search_path."""
    row = await case.driver.fetchrow(
        "SELECT e.extversion AS version, quote_ident(n.nspname) AS schema,"
        " to_regtype('halfvec') IS NOT NULL AS visible,"
        " current_setting('search_path') AS path, quote_ident(current_database()) AS database,"
        " (SELECT default_version FROM pg_available_extensions WHERE name = 'vector') AS available,"
        " (SELECT c.oid::regclass::text FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid"
        " WHERE i.indrelid = to_regclass('knowledge_chunks') AND c.relname = 'idx_chunks_embedding') AS graph,"
        " (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) OR EXISTS (SELECT"
        " FROM pg_available_extension_versions AS v JOIN pg_available_extensions AS a ON a.name = v.name"
        " AND a.default_version = v.version WHERE v.name = 'vector' AND v.trusted"
        " AND has_database_privilege(current_database(), 'CREATE')) AS may_create"
        " FROM (SELECT 1) AS one LEFT JOIN (pg_extension AS e JOIN pg_namespace AS n ON n.oid = e.extnamespace)"
        " ON e.extname = 'vector'"
    )
    version, available = row["version"], row["available"]
    if version is None:
        if case.at.state == "empty" and available is not None and row["may_create"]:
            return [info("pgvector", f"pgvector {available} is not in this database yet: `migrate` creates it")]
        if available is None:
            mend = f"install pgvector on the server ({_INSTALL}), then let its administrator create the extension"
        else:
            mend = "let the database's owner or the server's administrator create it"
        return [error("pgvector-missing", "pgvector is not in this database", mend, "CREATE EXTENSION vector")]
    findings = judge_pgvector(version, available, graph=row["graph"])
    if not row["visible"]:
        path = f"{row['path']}, {row['schema']}" if row["path"] else row["schema"]
        findings.append(
            error(
                "pgvector-schema",
                f"pgvector is in the schema {row['schema']}, which is not in this role's search_path",
                "add it; connections that are open keep the old one",
                f"ALTER ROLE CURRENT_USER IN DATABASE {row['database']} SET search_path = {path}",
            )
        )
    return findings or [ok("pgvector", f"pgvector {version} in the schema {row['schema']}")]


def judge_pgvector(version: str, available: str | None, *, graph: str | None) -> list[Finding]:
    """The findings for a version, apart from a server that has it; ``graph`` is the HNSW index, quoted."""
    has, offered = _parts(version), _parts(available or version)
    update = "ALTER EXTENSION vector UPDATE"
    faults = [what for mended, what in _PGVECTOR_FAULTS if has < mended]
    least = _PGVECTOR_FAULTS[-1][0]
    wanted = ".".join(map(str, least))
    how = (
        f"install pgvector {wanted} or newer ({_INSTALL}), then update the extension"
        if offered < least
        else (f"the server has {available} already: update the extension")
    )
    if has < _LEAST_PGVECTOR:
        return [error("pgvector-version", f"pgvector {version} is too old: no iterative index scans", how, update)]
    if faults:
        sql: tuple[str, ...] = (update,)
        if has < _GRAPH_MENDED and graph is not None:
            how += ", and build the index again, since it may be damaged"
            sql += (f"REINDEX INDEX CONCURRENTLY {graph}",)
        return [warning("pgvector-version", f"pgvector {version} has known faults: {'; '.join(faults)}", how, *sql)]
    if offered > has:
        return [info("pgvector-version", f"pgvector {version}, while the server has {available}", how, update)]
    return []


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in version.split("."))


async def durability(case: Case) -> list[Finding]:
    """A crash loses nothing that was committed."""
    rows = await case.driver.fetch(
        "SELECT name, source FROM pg_settings WHERE name IN ('fsync', 'full_page_writes') AND setting = 'off'"
    )
    if not rows:
        return [ok("durability", "fsync and full_page_writes are on")]
    return [
        error(
            f"durability-{row['name']}",
            f"{row['name']} is off: after a crash of the machine the database may be damaged beyond repair",
            "turn it on"
            + (
                ", and take it off the server's command line"
                if row["source"] == "command line"
                else " (as a superuser)"
            ),
            f"ALTER SYSTEM SET {row['name']} = on",
            "SELECT pg_reload_conf()",
        )
        for row in rows
    ]


async def defaults(case: Case) -> list[Finding]:
    """Nothing was set for this role or database that the library's statements do not expect."""
    rows = await case.driver.fetch(
        "SELECT name, setting, source, quote_ident(current_database()) AS database FROM pg_settings WHERE name IN"
        " ('default_transaction_isolation', 'default_transaction_read_only', 'server_encoding', 'enable_indexscan')"
    )
    found = []
    wanted = {
        "default_transaction_isolation": ("read committed", "claims by several workers at once fail and are repeated"),
        "default_transaction_read_only": ("off", "nothing can be written"),
        "enable_indexscan": ("on", "searches by meaning do not use the HNSW index"),
    }
    for row in rows:
        name, setting = row["name"], row["setting"]
        if name == "server_encoding" and setting != "UTF8":
            mend = "make a database with ENCODING 'UTF8' TEMPLATE template0 and move to it (dump and restore)"
            found.append(error("encoding", f"the database's encoding is {setting}: many texts cannot be stored", mend))
        elif name in wanted and setting != wanted[name][0]:
            value, why = wanted[name]
            report = error if name == "default_transaction_read_only" else warning
            code = name.removeprefix("default_transaction_").replace("_", "-")
            seen = f"{name} is {setting}: {why}"
            # Else the statement that follows would be refused as well.
            first = ("SET default_transaction_read_only = off",) if report is error else ()
            mend = "set it back; connections that are open keep it"
            found.append(report(code, seen, mend, *first, _put_back(row, value)))
    if await case.driver.fetchval("SELECT pg_is_in_recovery()"):
        mend = "point DATABASE_URL at the primary; searches may use the replica by DATABASE_REPLICA_URL"
        found.append(error("replica", "this server is a replica: nothing can be written", mend))
    return found or [ok("defaults", "encoding UTF8, read committed, writable")]


def _put_back(row: Any, value: str) -> str:
    name, database = row["name"], row["database"]
    known = {
        "user": f"ALTER ROLE CURRENT_USER RESET {name}",
        "database user": f"ALTER ROLE CURRENT_USER IN DATABASE {database} RESET {name}",
        "database": f"ALTER DATABASE {database} RESET {name}",
    }
    return known.get(row["source"], f"ALTER DATABASE {database} SET {name} = '{value}'")


async def connections(case: Case) -> list[Finding]:
    """The server has connections enough for this pool beside whatever else connects."""
    code, pool = "connections", case.settings.db_pool_max_size
    if case.database.is_pooled:
        return [ok(code, f"up to {pool} to the pooler, which keeps its own budget")]
    row = await case.driver.fetchrow(
        "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
        " - coalesce(current_setting('reserved_connections', true)::int, 0) AS most,"
        " nullif(r.rolconnlimit, -1) AS of_role, nullif(d.datconnlimit, -1) AS of_database, r.rolsuper,"
        " (SELECT sum(numbackends)::int FROM pg_stat_database) AS used, role.*, base.*,"
        " (SELECT count(*)::int FROM pg_stat_activity WHERE application_name = 'kotonoha_store') AS ours"
        " FROM pg_roles AS r, pg_database AS d,"
        " LATERAL (SELECT count(*)::int AS used_by_role, count(*) FILTER (WHERE application_name = 'kotonoha_store')"
        "::int AS ours_by_role FROM pg_stat_activity WHERE usesysid = r.oid) AS role,"
        " LATERAL (SELECT count(*)::int AS used_in_database, count(*) FILTER (WHERE application_name ="
        " 'kotonoha_store')::int AS ours_in_database FROM pg_stat_activity WHERE datid = d.oid"
        " AND backend_type IS DISTINCT FROM 'autovacuum worker') AS base"
        " WHERE r.rolname = session_user AND d.datname = current_database()"
    )
    limits = [("the server", "the server's max_connections", row["most"], row["used"], row["ours"])]
    # Superusers are let in beyond these.
    if row["of_role"] is not None and not row["rolsuper"]:
        mend = "the role's CONNECTION LIMIT"
        limits.append(("this role", mend, row["of_role"], row["used_by_role"], row["ours_by_role"]))
    if row["of_database"] is not None and not row["rolsuper"]:
        mend = "the database's CONNECTION LIMIT"
        limits.append(("this database", mend, row["of_database"], row["used_in_database"], row["ours_in_database"]))
    what, limit, usable, used, ours = min(limits, key=lambda each: each[2] - max(each[3] - each[4], 0))
    others = max(used - ours, 0)
    seen = (
        f"{what} may have {usable} connections, {used} in use, {others} of them by other programs;"
        f" DB_POOL_MAX_SIZE is {pool}"
    )
    if others + pool > usable:
        least = min(case.settings.db_pool_min_size, fitting := max(1, usable - others - _SPARE))
        mend = f"set DB_POOL_MAX_SIZE={fitting} (and DB_POOL_MIN_SIZE={least}), or raise {limit}"
        return [warning(code, f"the pool can grow beyond what {what} has left: {seen}", mend)]
    if row["most"] - row["used"] < _SPARE:
        mend = "lower DB_POOL_MAX_SIZE of the processes that run, put a pooler between, or raise max_connections"
        return [warning(code, f"the server has almost no connection left: {seen}", mend)]
    return [ok(code, seen)]


async def pooler(case: Case) -> list[Finding]:
    """A pooler in transaction mode is known as one, and there is a way past it."""
    code, settings = "pooler", case.settings
    if not case.database.is_pooled:
        url = endpoints.database_url(settings)
        if settings.db_pooler == "none" and url is not None:
            looks = endpoints.is_pooled(url, settings.model_copy(update={"db_pooler": "auto"}))
            if looks:
                seen = "DATABASE_URL looks like a pooler in transaction mode, but DB_POOLER=none says there is none"
                return [warning(code, seen, "set DB_POOLER=auto, unless that pooler keeps whole sessions")]
        return [ok(code, "no pooler in transaction mode")]
    try:
        _ = case.database.direct_url
    except ConfigurationError:
        mend = "set DATABASE_DIRECT_URL to the server's own address; until then workers poll"
        seen = (
            "behind a pooler in transaction mode migrations, index builds, backups and LISTEN have no way to the server"
        )
        return [warning(code, seen, mend)]
    if settings.kb_listen and not case.database.can_listen:
        minutes = settings.kb_embedding_interval_minutes
        seen = f"behind this pooler LISTEN does not work: workers look every {minutes:g} minutes"
        return [info(code, seen, "set DATABASE_DIRECT_URL, and they are woken at once")]
    return [ok(code, "a pooler in transaction mode, and a way past it")]


async def direct_url(case: Case) -> list[Finding]:
    """What goes past the pooler goes to the same database."""
    code = "direct-url"
    if case.settings.database_direct_url is None or case.settings.uses_embedded_server:
        return []
    try:
        await case.database.check_direct_url()
    except StoreError as failure:
        seen, _, mend = str(failure).partition("; ")
        use = "migrations, index builds, backups and LISTEN go there"
        return [error(code, f"{seen}: {use}", mend or "correct DATABASE_DIRECT_URL")]
    return [ok(code, "DATABASE_DIRECT_URL leads to the same database")]


async def role(case: Case) -> list[Finding]:
    """The role is neither superuser nor above row-level security."""
    row = await case.driver.fetchrow("SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user")
    mend = "run `kotonoha-store grants` as this role, and connect as a member of the group roles it makes"
    if row["rolsuper"]:
        seen = "this role is a superuser: a fault of the application could reach the whole server"
        if case.settings.uses_embedded_server:
            return [info("role-superuser", "this role is a superuser; the embedded server is this user's own anyway")]
        return [warning("role-superuser", seen, mend)]
    if row["rolbypassrls"]:
        return [warning("role-bypassrls", "this role passes row-level security by (BYPASSRLS)", mend)]
    # These attributes are not inherited, but SET ROLE takes them on.
    above = await case.driver.fetch(
        "SELECT rolname, rolsuper, format('REVOKE %I FROM %I', rolname, current_user) AS mend FROM pg_roles"
        " WHERE (rolsuper OR rolbypassrls) AND pg_has_role(oid, 'SET') ORDER BY 1"
    )
    if above:
        who = ", ".join(f"{each['rolname']} ({'superuser' if each['rolsuper'] else 'BYPASSRLS'})" for each in above)
        seen = f"this role can become {who} by SET ROLE: a fault of the application could do so as well"
        revoke = "take the membership away, or that of the role it is held through"
        return [warning("role-membership", seen, revoke, *(each["mend"] for each in above))]
    return [ok("role", "neither superuser nor BYPASSRLS")]


async def hidden_schemas(driver: Any) -> list[str]:
    """Return the schemas of the search_path that hold our tables and are closed to this role, quoted."""
    rows = await driver.fetch(
        "SELECT quote_ident(n.nspname) AS name FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE c.relname = 'alembic_version' AND NOT has_schema_privilege(n.oid, 'USAGE') AND n.nspname = ANY ("
        " regexp_split_to_array(replace(replace(current_setting('search_path'), '\"$user\"', current_user), '\"', ''),"
        " ', *')) ORDER BY 1"
    )
    return [row["name"] for row in rows]


async def row_security(case: Case) -> list[Finding]:
    """Row-level security hides no rows of ours from this role altogether."""
    rows = await case.driver.fetch(
        "SELECT c.oid::regclass::text AS name, quote_ident(current_user) AS role FROM pg_class AS c"
        " WHERE c.oid IN (SELECT to_regclass(quote_ident(name)) FROM unnest($1::text[]) AS name)"
        " AND row_security_active(c.oid) AND NOT EXISTS (SELECT FROM pg_policy AS p, unnest(p.polroles) AS of"
        " WHERE p.polrelid = c.oid AND p.polpermissive AND (of = 0 OR pg_has_role(of, 'USAGE'))) ORDER BY 1",
        list(OUR_TABLES),
    )
    if not rows:
        return [ok("row-security", "hides no table")]
    return [
        error(
            "row-security",
            f"row-level security is enabled on {row['name']} without a policy for this role: it sees no row",
            "have the owner make a policy, or disable it",
            f"CREATE POLICY kotonoha_store ON {row['name']} TO {row['role']} USING (true) WITH CHECK (true)",
        )
        for row in rows
    ]


async def privileges(case: Case) -> list[Finding]:
    """The role may do what an application or a worker does."""
    code = "privileges"
    held = await case.driver.fetch(
        "SELECT t.name, p.privilege FROM unnest($1::text[]) AS t (name),"
        " unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS p (privilege)"
        " WHERE has_table_privilege(to_regclass(quote_ident(t.name)), p.privilege)",
        list(OUR_TABLES),
    )
    granted = {(row["name"], row["privilege"]) for row in held}
    others = [row["missing"] for row in await case.driver.fetch(_LACKING, list(OUR_TABLES))]
    lacking = {}
    for each in (Role.APP, Role.WORKER):
        needed = [(table, one) for table in OUR_TABLES for one in privileges_on(each, table).split(", ")]
        lacking[each] = [pair for pair in needed if pair not in granted]
        if not lacking[each] and not others:
            return [ok(code, f"all that the {each} needs")]
    reading = {(table, "SELECT") for table in OUR_TABLES}
    if granted == reading:
        mend = "grant it what `kotonoha-store grants` gives the app, if it is to write"
        return [info(code, "this role only reads", mend)]
    nearest = min(lacking, key=lambda each: len(lacking[each]))
    by_table: dict[str, list[str]] = {}
    for table, one in lacking[nearest]:
        by_table.setdefault(table, []).append(one)
    name = await case.driver.fetchval("SELECT quote_ident(current_user)")
    wanted = [f"{', '.join(ones)} ON {table}" for table, ones in by_table.items()] + others
    seen = f"this role lacks privileges that the {nearest} needs: {'; '.join(wanted)}"
    mend = "have the owner grant them, or run `kotonoha-store grants` as the owner and make this role a member"
    return [error(code, seen, mend, *(f"GRANT {each} TO {name}" for each in wanted))]

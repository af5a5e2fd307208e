"""What the catalogs say about roles, owners and privileges; used by :mod:`kotonoha_store.roles` alone."""

from typing import Final

from sqlalchemy import text

WHERE: Final = text("""
    SELECT current_database() AS database, current_user AS role, n.oid, n.nspname AS schema,
        (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS is_superuser,
        EXISTS (SELECT FROM aclexplode(n.nspacl) WHERE privilege_type = 'CREATE' AND grantee = 0) AS is_open,
        (SELECT pg_has_role(datdba, 'USAGE') FROM pg_database WHERE datname = current_database()) AS owns_database,
        (SELECT v.nspname FROM pg_extension AS e JOIN pg_namespace AS v ON v.oid = e.extnamespace
            WHERE e.extname = 'vector' AND v.oid <> n.oid) AS vector_schema
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relname = 'knowledge_chunks' AND c.relkind = 'r'
        AND CASE WHEN CAST(:schema AS text) IS NULL THEN pg_table_is_visible(c.oid) ELSE n.nspname = :schema END
""")

ROLES: Final = text("""
    SELECT rolname, rolcanlogin OR rolsuper AS is_foreign,
        ARRAY(SELECT m.rolname FROM pg_auth_members AS a JOIN pg_roles AS m ON m.oid = a.member
            WHERE a.roleid = r.oid AND m.rolname <> current_user GROUP BY m.rolname ORDER BY m.rolname) AS members,
        pg_has_role(current_user, oid, 'USAGE') AS is_ours
    FROM pg_roles AS r WHERE rolname = ANY (:names)
""")

OBJECTS: Final = text("""
    SELECT 'TABLE' AS kind, c.relname AS name, format('%I.%I', n.nspname, c.relname) AS quoted, c.relowner AS owner
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.oid = :schema AND c.relkind = 'r' AND c.relname = ANY (:tables)
    UNION ALL
    SELECT 'SEQUENCE', s.relname, format('%I.%I', n.nspname, s.relname), s.relowner
    FROM pg_class AS s JOIN pg_namespace AS n ON n.oid = s.relnamespace
    JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = s.oid AND d.deptype IN ('a', 'i')
        AND d.refclassid = 'pg_class'::regclass
    JOIN pg_class AS c ON c.oid = d.refobjid
    WHERE n.oid = :schema AND s.relkind = 'S' AND c.relname = ANY (:tables)
    UNION ALL
    SELECT 'FUNCTION', p.proname, format('%I.%I(%s)', n.nspname, p.proname, oidvectortypes(p.proargtypes)),
        p.proowner
    FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
    WHERE n.oid = :schema AND p.prokind = 'f' AND starts_with(p.proname, 'kotonoha_')
    UNION ALL
    SELECT 'TYPE', t.typname, format('%I.%I', n.nspname, t.typname), t.typowner
    FROM pg_type AS t JOIN pg_namespace AS n ON n.oid = t.typnamespace
    WHERE n.oid = :schema AND t.typname = ANY (:types)
    ORDER BY 1, 2
""")

# is_group: the owner role of another prefix, told by the others that go with it.
OWNERS: Final = text("""
    SELECT oid, rolname, rolsuper, pg_has_role(current_user, oid, 'USAGE') AS is_ours,
        EXISTS (SELECT FROM pg_auth_members AS a JOIN pg_roles AS o ON o.oid = a.roleid
            WHERE o.rolname = :owner AND a.member = r.oid AND a.inherit_option AND a.set_option) AS is_member,
        EXISTS (SELECT FROM pg_auth_members AS a JOIN pg_roles AS o ON o.oid = a.roleid
            WHERE o.rolname = :owner AND a.member = r.oid) AS has_owner,
        rolname <> :owner AND right(rolname, 6) = '_owner' AND NOT rolcanlogin AND (
            SELECT count(*) FROM pg_roles AS g WHERE NOT g.rolcanlogin AND g.rolname IN (
                SELECT left(r.rolname, -5) || ending FROM unnest(CAST(:endings AS text[])) AS ending
            )
        ) = cardinality(CAST(:endings AS text[])) AS is_group,
        ARRAY(SELECT DISTINCT a.member FROM pg_auth_members AS a WHERE a.roleid = r.oid) AS members
    FROM pg_roles AS r WHERE oid = ANY (:owners) OR rolname = current_user OR EXISTS (
        SELECT FROM pg_auth_members AS a JOIN pg_roles AS o ON o.oid = a.roleid
        WHERE a.member = r.oid AND (o.rolname = :owner OR o.oid = ANY (:owners))
    )
    ORDER BY rolname
""")

LACKING: Final = text("""
    SELECT role, privilege, label
    FROM unnest(CAST(:roles AS text[]), CAST(:kinds AS text[]), CAST(:objects AS text[]), CAST(:labels AS text[]),
        CAST(:privileges AS text[])) AS wanted (role, kind, object, label, privilege)
    WHERE NOT CASE kind
        WHEN 'table' THEN has_table_privilege(role, object, privilege)
        WHEN 'sequence' THEN has_sequence_privilege(role, object, privilege)
        WHEN 'function' THEN has_function_privilege(role, object, privilege)
        WHEN 'schema' THEN has_schema_privilege(role, object, privilege)
        ELSE has_database_privilege(role, object, privilege)
    END
""")


# Whatever names one of the roles in this database, ours or not; each becomes one REVOKE.
GRANTED: Final = text("""
    WITH role AS (SELECT oid, rolname FROM pg_roles WHERE rolname = ANY (:names))
    SELECT format('REVOKE ALL ON %s %s FROM %I', kind, name, rolname) AS statement
    FROM (
        SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
            oid::regclass::text, relacl
        FROM pg_class WHERE relacl IS NOT NULL
        UNION ALL
        SELECT 'ROUTINE', oid::regprocedure::text, proacl
        FROM pg_proc WHERE proacl IS NOT NULL
        UNION ALL
        SELECT 'SCHEMA', quote_ident(nspname), nspacl FROM pg_namespace WHERE nspacl IS NOT NULL
        UNION ALL
        SELECT 'DATABASE', quote_ident(datname), datacl FROM pg_database
        WHERE datacl IS NOT NULL AND datname = current_database()
    ) AS object (kind, name, acl), role
    WHERE EXISTS (SELECT FROM aclexplode(acl) WHERE grantee = role.oid)
    UNION ALL
    SELECT DISTINCT format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA %I REVOKE ALL ON %s FROM %I',
        pg_get_userbyid(defaclrole), (SELECT nspname FROM pg_namespace AS n WHERE n.oid = defaclnamespace),
        CASE defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' ELSE 'FUNCTIONS' END, rolname)
    FROM pg_default_acl, role
    WHERE defaclnamespace <> 0 AND defaclobjtype IN ('r', 'S', 'f')
        AND EXISTS (SELECT FROM aclexplode(defaclacl) WHERE grantee = role.oid)
    ORDER BY 1
""")

OWNED: Final = text("""
    WITH role AS (SELECT oid FROM pg_roles WHERE rolname = ANY (:names))
    SELECT format('ALTER %s %s OWNER TO %I', kind, name, current_user) AS statement
    FROM (
        SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW'
            ELSE 'TABLE' END, oid::regclass::text, relowner
        FROM pg_class AS c
        WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND NOT EXISTS (SELECT FROM pg_depend AS d
            WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype IN ('a', 'i')
                AND d.refclassid = 'pg_class'::regclass AND c.relkind = 'S')
        UNION ALL
        SELECT 'ROUTINE', oid::regprocedure::text, proowner
        FROM pg_proc
        UNION ALL
        SELECT 'TYPE', oid::regtype::text, typowner
        FROM pg_type WHERE typtype IN ('e', 'd', 'r') AND typelem = 0
        UNION ALL
        SELECT 'SCHEMA', quote_ident(nspname), nspowner FROM pg_namespace
    ) AS object (kind, name, owner)
    WHERE owner IN (SELECT oid FROM role)
""")

USES: Final = text("""
    SELECT r.rolname AS name,
        ARRAY(SELECT m.rolname FROM pg_auth_members AS a JOIN pg_roles AS m ON m.oid = a.member
            WHERE a.roleid = r.oid AND m.rolname <> current_user
                -- Whoever migrated was made a member, which is of no use where nothing belongs to it any more.
                AND (r.rolname <> :owner OR EXISTS (SELECT FROM pg_shdepend AS s WHERE s.deptype = 'o'
                    AND s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid
                        AND s.classid <> 'pg_default_acl'::regclass))
            GROUP BY m.rolname ORDER BY m.rolname) AS members,
        ARRAY(SELECT DISTINCT d.datname FROM pg_shdepend AS s JOIN pg_database AS d
            ON d.oid = CASE WHEN s.dbid = 0 THEN s.objid ELSE s.dbid END
            WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid
                AND (s.dbid <> 0 OR s.classid = 'pg_database'::regclass)
                AND d.datname <> current_database() ORDER BY 1) AS databases
    FROM pg_roles AS r WHERE r.rolname = ANY (:names) AND NOT r.rolcanlogin
    ORDER BY array_position(:names, r.rolname)
""")

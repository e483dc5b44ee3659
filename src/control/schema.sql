-- What administrators have set: keys, and the trail of who changed what. Secrets are not here, only their hashes.

CREATE TABLE audit (
    id INTEGER PRIMARY KEY,
    -- Unix nanoseconds.
    at INTEGER NOT NULL CHECK (at >= 0),
    -- `cli`, or an admin key's id.
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    -- The id of what was changed.
    target TEXT NOT NULL,
    before TEXT CHECK (before IS NULL OR json_valid(before)),
    after TEXT CHECK (after IS NULL OR json_valid(after))
) STRICT;

CREATE TABLE keys (
    id TEXT PRIMARY KEY CHECK (id LIKE 'key\_%' ESCAPE '\'),
    hash BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
    -- The secret before the last rotation, and until when it still works.
    old_hash BLOB UNIQUE CHECK (length(old_hash) = 32),
    old_until INTEGER CHECK ((old_until IS NULL) = (old_hash IS NULL)),
    name TEXT NOT NULL,
    alias TEXT,
    expires_at INTEGER CHECK (expires_at >= 0),
    blocked INTEGER NOT NULL CHECK (blocked IN (0, 1)),
    models TEXT NOT NULL CHECK (json_type(models) = 'array'),
    max_tokens INTEGER CHECK (max_tokens >= 1),
    -- Decimal units of the currency.
    max_budget TEXT,
    soft_budget TEXT,
    budget_duration TEXT,
    tpm_limit INTEGER CHECK (tpm_limit >= 1),
    rpm_limit INTEGER CHECK (rpm_limit >= 1),
    max_parallel_requests INTEGER CHECK (max_parallel_requests >= 1),
    tags TEXT NOT NULL CHECK (json_type(tags) = 'object'),
    require_tags TEXT NOT NULL CHECK (json_type(require_tags) = 'array'),
    metadata TEXT NOT NULL CHECK (json_type(metadata) = 'object'),
    created_at INTEGER NOT NULL CHECK (created_at >= 0),
    updated_at INTEGER NOT NULL CHECK (updated_at >= created_at),
    deleted_at INTEGER CHECK (deleted_at >= created_at),
    -- The last change: who has seen the trail up to there knows this row.
    changed INTEGER NOT NULL REFERENCES audit (id)
) STRICT;

CREATE UNIQUE INDEX keys_alias ON keys (alias) WHERE alias IS NOT NULL AND deleted_at IS NULL;
CREATE INDEX keys_changed ON keys (changed);
CREATE INDEX audit_target ON audit (target);

CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the trail only appends'); END;
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the trail only appends'); END;
CREATE TRIGGER keys_no_delete BEFORE DELETE ON keys
BEGIN SELECT RAISE(ABORT, 'a key''s row stays: its id is on receipts'); END;
CREATE TRIGGER keys_stay_deleted BEFORE UPDATE ON keys WHEN old.deleted_at IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'a deleted key stays as it was'); END;
CREATE TRIGGER keys_keep_their_id BEFORE UPDATE ON keys WHEN new.id <> old.id
BEGIN SELECT RAISE(ABORT, 'a key keeps its id'); END;

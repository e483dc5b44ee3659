-- Files that clients gave, or that batches wrote, and batches of requests. What a file holds lies beside this
-- database, under `files/`. Times are whole seconds since 1970, money is in pico-units of the books' currency.

CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    key_id TEXT, -- whose it is; null: of whoever asked without a key
    bytes INTEGER NOT NULL CHECK (bytes >= 0),
    created_at INTEGER NOT NULL CHECK (created_at >= 0),
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL CHECK (purpose IN ('batch', 'batch_output'))
) STRICT;

CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    key_id TEXT,
    tenant TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    window TEXT NOT NULL,
    input_file TEXT NOT NULL,
    output_file TEXT,
    error_file TEXT,
    metadata TEXT NOT NULL, -- JSON object
    headers TEXT NOT NULL, -- JSON object: what its lines say beside their bodies
    status TEXT NOT NULL CHECK (status IN
        ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling', 'cancelled')),
    problems TEXT, -- JSON array, of a file that does not validate
    created_at INTEGER NOT NULL CHECK (created_at >= 0),
    expires_at INTEGER NOT NULL CHECK (expires_at >= created_at),
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER,
    total INTEGER NOT NULL DEFAULT 0 CHECK (total >= 0),
    completed INTEGER NOT NULL DEFAULT 0 CHECK (completed >= 0),
    failed INTEGER NOT NULL DEFAULT 0 CHECK (failed >= 0),
    prompt_tokens INTEGER NOT NULL DEFAULT 0 CHECK (prompt_tokens >= 0),
    cached_tokens INTEGER NOT NULL DEFAULT 0 CHECK (cached_tokens >= 0),
    completion_tokens INTEGER NOT NULL DEFAULT 0 CHECK (completion_tokens >= 0),
    cost_picos INTEGER NOT NULL DEFAULT 0 CHECK (cost_picos >= 0),
    CHECK (completed + failed <= total)
) STRICT;
CREATE INDEX batches_open ON batches (seq)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

-- One for each line that has ended, until the batch's files are written.
CREATE TABLE results (
    batch TEXT NOT NULL REFERENCES batches (id),
    line INTEGER NOT NULL CHECK (line > 0),
    completed INTEGER NOT NULL CHECK (completed IN (0, 1)),
    record TEXT NOT NULL, -- JSON, as the batch's files have it
    PRIMARY KEY (batch, line)
) STRICT, WITHOUT ROWID;

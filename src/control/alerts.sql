-- What was raised, and who has heard of it. Since version 2.

CREATE TABLE alerts (
    id TEXT PRIMARY KEY CHECK (id LIKE 'alert\_%' ESCAPE '\'),
    -- What it is about: raised once.
    once TEXT NOT NULL UNIQUE,
    -- Unix nanoseconds.
    at INTEGER NOT NULL CHECK (at >= 0),
    kind TEXT NOT NULL,
    event TEXT NOT NULL CHECK (json_type(event) = 'object')
) STRICT;

CREATE TABLE alert_sends (
    alert TEXT NOT NULL REFERENCES alerts (id) ON DELETE CASCADE,
    -- A hash of the webhook's address, which may hold a secret.
    target TEXT NOT NULL,
    -- For people: the host of the address.
    host TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    -- Not to be tried before.
    due_at INTEGER NOT NULL,
    -- Acknowledged, or given up: then nothing more is sent.
    sent_at INTEGER,
    given_up_at INTEGER CHECK (given_up_at IS NULL OR sent_at IS NULL),
    -- Why the last attempt failed.
    error TEXT,
    PRIMARY KEY (alert, target)
) STRICT, WITHOUT ROWID;

CREATE INDEX alerts_at ON alerts (at);
CREATE INDEX alert_sends_open ON alert_sends (target, alert) WHERE sent_at IS NULL AND given_up_at IS NULL;

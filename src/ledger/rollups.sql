-- Roll-ups: sums over receipt lines by clock hour, written with the receipts. Within an hour that is still open
-- a row grows; after it, it stands. They hold nothing that the receipts do not say: the audit adds them up again.
-- An empty label is one that the request did not have.

-- What lines are attributed to, each combination once; it has few values a label, whatever the number of requests.
CREATE TABLE dimensions (
    id INTEGER PRIMARY KEY,
    currency TEXT NOT NULL,
    device TEXT NOT NULL,
    rate_version TEXT NOT NULL REFERENCES rates,
    tenant TEXT NOT NULL,
    key_id TEXT NOT NULL,
    team TEXT NOT NULL,
    feature TEXT NOT NULL,
    environment TEXT NOT NULL,
    cost_center TEXT NOT NULL,
    model TEXT NOT NULL,
    precision TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('stop', 'length', 'cancelled', 'budget', 'error')),
    service_tier TEXT NOT NULL CHECK (service_tier IN ('priority', 'default', 'flex', 'batch')),
    bytes_per_block INTEGER NOT NULL CHECK (bytes_per_block >= 0),
    UNIQUE (currency, device, rate_version, tenant, key_id, team, feature, environment, cost_center, model,
            precision, endpoint, status, service_tier, bytes_per_block)
) STRICT;

CREATE INDEX dimensions_key ON dimensions (key_id);

-- Labels that may have as many values as there are requests: kept apart, so that the others stay few.
CREATE TABLE parties (
    id INTEGER PRIMARY KEY,
    user TEXT NOT NULL,
    task TEXT NOT NULL,
    UNIQUE (user, task)
) STRICT;

-- `sums`: twelve unsigned numbers, each in groups of seven bits, lowest first, the top bit set on all but the last:
-- requests, prompt tokens, cached tokens, completion tokens, requests whose energy is known, their millijoules,
-- device-nanoseconds, block-nanoseconds, money for time, money for memory, and what of that the house
-- pays: past budgets' caps, and for tiers that cost less.
-- Packed, since a year of columns takes seconds to read. A request is counted, with its tokens and its energy, in
-- the row of its first line.
CREATE TABLE rollups (
    hour INTEGER NOT NULL CHECK (hour >= 0), -- of the receipts' transactions
    dimension INTEGER NOT NULL REFERENCES dimensions,
    sums BLOB NOT NULL,
    PRIMARY KEY (hour, dimension)
) STRICT, WITHOUT ROWID;

-- The same for lines with a user or a task; what a row of `rollups` has beyond these has neither.
CREATE TABLE party_rollups (
    hour INTEGER NOT NULL CHECK (hour >= 0),
    dimension INTEGER NOT NULL REFERENCES dimensions,
    party INTEGER NOT NULL REFERENCES parties,
    sums BLOB NOT NULL,
    PRIMARY KEY (hour, dimension, party)
) STRICT, WITHOUT ROWID;

-- The rows of `rollups` over all hours, so that what a key has spent is read without them.
CREATE TABLE dimension_totals (
    dimension INTEGER PRIMARY KEY REFERENCES dimensions,
    sums BLOB NOT NULL
) STRICT;

CREATE TRIGGER dimensions_no_UPDATE BEFORE UPDATE ON dimensions
    BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER dimensions_no_DELETE BEFORE DELETE ON dimensions
    BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER parties_no_UPDATE BEFORE UPDATE ON parties
    BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER parties_no_DELETE BEFORE DELETE ON parties
    BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER rollups_no_DELETE BEFORE DELETE ON rollups
    BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER party_rollups_no_DELETE BEFORE DELETE ON party_rollups
    BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER dimension_totals_no_DELETE BEFORE DELETE ON dimension_totals
    BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;

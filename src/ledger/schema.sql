-- The ledger. Append-only but for `checkpoint` and `open_accruals`, which say where the device stands.
-- Quantities that pass 2^63 (block-nanoseconds) and sums of money are split: value = hi * 10^18 + lo.
-- Money is in pico-units of the rate's currency, times in nanoseconds, `wall` and `_at` since 1970.

CREATE TABLE rates (
    version TEXT NOT NULL PRIMARY KEY,
    device_hour_picos INTEGER NOT NULL CHECK (device_hour_picos >= 0),
    kv_share_parts INTEGER NOT NULL CHECK (kv_share_parts BETWEEN 0 AND 1000000000000), -- of 10^12
    currency TEXT NOT NULL,
    -- What of its cost a request of each tier pays, of 10^12.
    priority_parts INTEGER NOT NULL DEFAULT 1000000000000 CHECK (priority_parts BETWEEN 0 AND 1000000000000),
    default_parts INTEGER NOT NULL DEFAULT 1000000000000 CHECK (default_parts BETWEEN 0 AND 1000000000000),
    flex_parts INTEGER NOT NULL DEFAULT 1000000000000 CHECK (flex_parts BETWEEN 0 AND 1000000000000),
    batch_parts INTEGER NOT NULL DEFAULT 1000000000000 CHECK (batch_parts BETWEEN 0 AND 1000000000000)
) STRICT;

-- One life of a device under one server process and one rate.
CREATE TABLE epochs (
    id INTEGER PRIMARY KEY,
    boot_id TEXT NOT NULL,
    device TEXT NOT NULL,
    device_kind TEXT NOT NULL,
    device_name TEXT NOT NULL,
    rate_version TEXT NOT NULL REFERENCES rates,
    started_at INTEGER NOT NULL CHECK (started_at >= 0),
    UNIQUE (boot_id, device)
) STRICT;

CREATE TABLE pools (
    epoch INTEGER PRIMARY KEY REFERENCES epochs,
    blocks INTEGER NOT NULL CHECK (blocks >= 0),
    bytes_per_block INTEGER NOT NULL CHECK (bytes_per_block >= 0),
    since_ns INTEGER NOT NULL CHECK (since_ns >= 0)
) STRICT;

CREATE TABLE epoch_ends (
    epoch INTEGER PRIMARY KEY REFERENCES epochs,
    reason TEXT NOT NULL CHECK (reason IN ('clean', 'crash')),
    end_ns INTEGER NOT NULL CHECK (end_ns >= 0),
    ended_at INTEGER NOT NULL CHECK (ended_at >= 0)
) STRICT;

CREATE TABLE methods (
    id TEXT NOT NULL PRIMARY KEY,
    json TEXT NOT NULL
) STRICT;

CREATE TABLE accounts (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
) STRICT;

CREATE TABLE transactions (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('receipt', 'house', 'bill')),
    epoch INTEGER NOT NULL REFERENCES epochs,
    hour INTEGER NOT NULL CHECK (hour >= 0), -- clock hour since 1970
    wall INTEGER NOT NULL CHECK (wall >= 0)
) STRICT;
CREATE INDEX closes_by_epoch ON transactions (epoch) WHERE kind <> 'receipt';

-- In each transaction debits equal credits in each commodity.
CREATE TABLE entries (
    tx INTEGER NOT NULL REFERENCES transactions,
    account INTEGER NOT NULL REFERENCES accounts,
    side TEXT NOT NULL CHECK (side IN ('debit', 'credit')),
    device_ns INTEGER NOT NULL CHECK (device_ns >= 0),
    block_ns_hi INTEGER NOT NULL CHECK (block_ns_hi >= 0),
    block_ns_lo INTEGER NOT NULL CHECK (block_ns_lo BETWEEN 0 AND 999999999999999999),
    picos INTEGER NOT NULL CHECK (picos >= 0),
    PRIMARY KEY (tx, account)
) STRICT, WITHOUT ROWID;

-- The interval of the device's clock that a bill covers.
CREATE TABLE bills (
    tx INTEGER PRIMARY KEY REFERENCES transactions,
    from_ns INTEGER NOT NULL CHECK (from_ns >= 0),
    to_ns INTEGER NOT NULL CHECK (to_ns > from_ns)
) STRICT;

CREATE TABLE receipts (
    tx INTEGER PRIMARY KEY REFERENCES transactions,
    request_id TEXT NOT NULL UNIQUE,
    ticket INTEGER NOT NULL,
    client_request_id TEXT,
    idempotency_key TEXT,
    key_id TEXT,
    tenant TEXT NOT NULL,
    user TEXT,
    metadata TEXT NOT NULL, -- JSON object
    tags TEXT NOT NULL, -- JSON object
    model TEXT NOT NULL,
    precision TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('stop', 'length', 'cancelled', 'budget', 'error')),
    seed INTEGER NOT NULL, -- the bits of a u64
    prompt_tokens INTEGER NOT NULL CHECK (prompt_tokens >= 0),
    cached_tokens INTEGER NOT NULL CHECK (cached_tokens >= 0),
    completion_tokens INTEGER NOT NULL CHECK (completion_tokens >= 0),
    draft_accepted INTEGER NOT NULL CHECK (draft_accepted >= 0),
    draft_rejected INTEGER NOT NULL CHECK (draft_rejected >= 0),
    prefill_ns INTEGER NOT NULL CHECK (prefill_ns >= 0),
    decode_ns INTEGER NOT NULL CHECK (decode_ns >= 0),
    steps INTEGER NOT NULL CHECK (steps >= 0),
    block_ns_hi INTEGER NOT NULL CHECK (block_ns_hi >= 0),
    block_ns_lo INTEGER NOT NULL CHECK (block_ns_lo BETWEEN 0 AND 999999999999999999),
    bytes_per_block INTEGER NOT NULL CHECK (bytes_per_block >= 0),
    kv_peak_blocks INTEGER NOT NULL CHECK (kv_peak_blocks >= 0),
    queue_ns INTEGER NOT NULL CHECK (queue_ns >= 0),
    ttft_ns INTEGER CHECK (ttft_ns >= 0),
    wall_ns INTEGER NOT NULL CHECK (wall_ns >= 0),
    submitted_at INTEGER NOT NULL CHECK (submitted_at >= 0),
    finished_at INTEGER NOT NULL CHECK (finished_at >= 0),
    saved_prefix_cache_ns INTEGER NOT NULL CHECK (saved_prefix_cache_ns >= 0),
    saved_batching_ns INTEGER NOT NULL CHECK (saved_batching_ns >= 0),
    device TEXT NOT NULL,
    currency TEXT NOT NULL,
    method_id TEXT,
    energy_mj INTEGER CHECK (energy_mj >= 0),
    overrun_picos INTEGER NOT NULL DEFAULT 0 CHECK (overrun_picos >= 0),
    service_tier TEXT NOT NULL DEFAULT 'default' CHECK (service_tier IN ('priority', 'default', 'flex', 'batch'))
) STRICT;
CREATE UNIQUE INDEX receipts_idempotency ON receipts (coalesce(key_id, ''), idempotency_key)
    WHERE idempotency_key IS NOT NULL;

CREATE TABLE receipt_lines (
    tx INTEGER NOT NULL REFERENCES receipts,
    line INTEGER NOT NULL CHECK (line >= 0),
    device TEXT NOT NULL,
    rate_version TEXT NOT NULL REFERENCES rates,
    device_ns INTEGER NOT NULL CHECK (device_ns >= 0),
    block_ns_hi INTEGER NOT NULL CHECK (block_ns_hi >= 0),
    block_ns_lo INTEGER NOT NULL CHECK (block_ns_lo BETWEEN 0 AND 999999999999999999),
    time_picos INTEGER NOT NULL CHECK (time_picos >= 0),
    memory_picos INTEGER NOT NULL CHECK (memory_picos >= 0),
    -- What of both its tier does not pay.
    discount_picos INTEGER NOT NULL DEFAULT 0 CHECK (discount_picos >= 0),
    PRIMARY KEY (tx, line)
) STRICT, WITHOUT ROWID;

-- Where each running device stands, cumulative since its epoch began: written with every commit, gone
-- when the epoch ends.
CREATE TABLE checkpoint (
    device TEXT NOT NULL PRIMARY KEY,
    epoch INTEGER NOT NULL UNIQUE REFERENCES epochs,
    hour INTEGER NOT NULL CHECK (hour >= 0),
    wall INTEGER NOT NULL CHECK (wall >= 0),
    now_ns INTEGER NOT NULL CHECK (now_ns >= 0),
    host_gap_ns INTEGER NOT NULL CHECK (host_gap_ns >= 0),
    idle_ns INTEGER NOT NULL CHECK (idle_ns >= 0),
    load_ns INTEGER NOT NULL CHECK (load_ns >= 0),
    warmup_ns INTEGER NOT NULL CHECK (warmup_ns >= 0),
    preemption_ns INTEGER NOT NULL CHECK (preemption_ns >= 0),
    cached_hi INTEGER NOT NULL CHECK (cached_hi >= 0),
    cached_lo INTEGER NOT NULL CHECK (cached_lo BETWEEN 0 AND 999999999999999999),
    free_hi INTEGER NOT NULL CHECK (free_hi >= 0),
    free_lo INTEGER NOT NULL CHECK (free_lo BETWEEN 0 AND 999999999999999999),
    carry_hi INTEGER NOT NULL CHECK (carry_hi >= 0),
    carry_lo INTEGER NOT NULL CHECK (carry_lo BETWEEN 0 AND 999999999999999999),
    settled_ns INTEGER NOT NULL CHECK (settled_ns >= 0),
    settled_hi INTEGER NOT NULL CHECK (settled_hi >= 0),
    settled_lo INTEGER NOT NULL CHECK (settled_lo BETWEEN 0 AND 999999999999999999),
    money_hi INTEGER NOT NULL CHECK (money_hi >= 0), -- of all receipts of the epoch
    money_lo INTEGER NOT NULL CHECK (money_lo BETWEEN 0 AND 999999999999999999)
) STRICT;

-- What each request that has not ended has used so far, and whose it is.
CREATE TABLE open_accruals (
    epoch INTEGER NOT NULL REFERENCES epochs,
    ticket INTEGER NOT NULL,
    request_id TEXT NOT NULL,
    device_ns INTEGER NOT NULL CHECK (device_ns >= 0),
    block_ns_hi INTEGER NOT NULL CHECK (block_ns_hi >= 0),
    block_ns_lo INTEGER NOT NULL CHECK (block_ns_lo BETWEEN 0 AND 999999999999999999),
    attribution TEXT, -- JSON; null for a ticket that was never given out
    PRIMARY KEY (epoch, ticket)
) STRICT, WITHOUT ROWID;

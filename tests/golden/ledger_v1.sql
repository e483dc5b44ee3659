BEGIN TRANSACTION;
CREATE TABLE accounts (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
) STRICT;
INSERT INTO "accounts" VALUES(1,'tenant:anonymous');
INSERT INTO "accounts" VALUES(2,'device:cpu');
CREATE TABLE bills (
    tx INTEGER PRIMARY KEY REFERENCES transactions,
    from_ns INTEGER NOT NULL CHECK (from_ns >= 0),
    to_ns INTEGER NOT NULL CHECK (to_ns > from_ns)
) STRICT;
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
INSERT INTO "checkpoint" VALUES('cpu',1,498709,1795355500209467220,7643861739,66377799,427145413,1822247982,1956019750,0,0,0,0,695525542895,0,0,455533177,0,456882385,0,10136905);
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
INSERT INTO "entries" VALUES(1,1,'debit',455533177,0,456882385,10136905);
INSERT INTO "entries" VALUES(1,2,'credit',455533177,0,456882385,10136905);
CREATE TABLE epoch_ends (
    epoch INTEGER PRIMARY KEY REFERENCES epochs,
    reason TEXT NOT NULL CHECK (reason IN ('clean', 'crash')),
    end_ns INTEGER NOT NULL CHECK (end_ns >= 0),
    ended_at INTEGER NOT NULL CHECK (ended_at >= 0)
) STRICT;
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
INSERT INTO "epochs" VALUES(1,'01a20386c0d6764c8015d73af688e204','cpu','cpu','a processor','USD 0.1/h kv 0.2',1795355492565603618);
CREATE TABLE methods (
    id TEXT NOT NULL PRIMARY KEY,
    json TEXT NOT NULL
) STRICT;
INSERT INTO "methods" VALUES('shapley1-105d2dd8da95','{"decode":{"step":10131791000,"token":5551543533,"attention":10775039,"logits":0},"mixed":{"step":10131540915,"token":3192560090,"attention":6989100,"logits":2716300508},"prefill":{"step":0,"token":3710895652,"attention":6325279,"logits":0}}');
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
INSERT INTO "open_accruals" VALUES(1,2,'01a20386d307725aa8e8b166cf7d5c44',2916537618,0,7555683994,'{"request":"01a20386d307725aa8e8b166cf7d5c44","client_request_id":null,"idempotency_key":null,"key_id":null,"tenant":"anonymous","user":null,"metadata":{},"tags":{},"model":"small","precision":"Q4_1","endpoint":"/v1/completions"}');
CREATE TABLE pools (
    epoch INTEGER PRIMARY KEY REFERENCES epochs,
    blocks INTEGER NOT NULL CHECK (blocks >= 0),
    bytes_per_block INTEGER NOT NULL CHECK (bytes_per_block >= 0),
    since_ns INTEGER NOT NULL CHECK (since_ns >= 0)
) STRICT;
INSERT INTO "pools" VALUES(1,182,368640,3778267732);
CREATE TABLE rates (
    version TEXT NOT NULL PRIMARY KEY,
    device_hour_picos INTEGER NOT NULL CHECK (device_hour_picos >= 0),
    kv_share_parts INTEGER NOT NULL CHECK (kv_share_parts BETWEEN 0 AND 1000000000000), -- of 10^12
    currency TEXT NOT NULL
) STRICT;
INSERT INTO "rates" VALUES('USD 0.1/h kv 0.2',100000000000,200000000000,'USD');
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
    PRIMARY KEY (tx, line)
) STRICT, WITHOUT ROWID;
INSERT INTO "receipt_lines" VALUES(1,0,'cpu','USD 0.1/h kv 0.2',455533177,0,456882385,10122959,13946);
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
    method_id TEXT
) STRICT;
INSERT INTO "receipts" VALUES(1,'01a20386d10b756ab05b4912c7bb2a7b',1,NULL,NULL,NULL,'anonymous',NULL,'{}','{}','small','Q4_1','/v1/completions','length',8087647284780615,2,0,8,0,0,73051873,382481304,8,0,456882385,368640,1,3961864,77100226,460844249,1795355496727052891,1795355497184047323,0,0,'cpu','USD','shapley1-105d2dd8da95');
CREATE TABLE transactions (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('receipt', 'house', 'bill')),
    epoch INTEGER NOT NULL REFERENCES epochs,
    hour INTEGER NOT NULL CHECK (hour >= 0), -- clock hour since 1970
    wall INTEGER NOT NULL CHECK (wall >= 0)
) STRICT;
INSERT INTO "transactions" VALUES(1,'receipt',1,498709,1795355497184305426);
CREATE INDEX closes_by_epoch ON transactions (epoch) WHERE kind <> 'receipt';
CREATE UNIQUE INDEX receipts_idempotency ON receipts (coalesce(key_id, ''), idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE TRIGGER rates_no_UPDATE BEFORE UPDATE ON rates
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER rates_no_DELETE BEFORE DELETE ON rates
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER epochs_no_UPDATE BEFORE UPDATE ON epochs
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER epochs_no_DELETE BEFORE DELETE ON epochs
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER pools_no_UPDATE BEFORE UPDATE ON pools
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER pools_no_DELETE BEFORE DELETE ON pools
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER epoch_ends_no_UPDATE BEFORE UPDATE ON epoch_ends
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER epoch_ends_no_DELETE BEFORE DELETE ON epoch_ends
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER methods_no_UPDATE BEFORE UPDATE ON methods
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER methods_no_DELETE BEFORE DELETE ON methods
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER accounts_no_UPDATE BEFORE UPDATE ON accounts
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER accounts_no_DELETE BEFORE DELETE ON accounts
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER transactions_no_UPDATE BEFORE UPDATE ON transactions
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER transactions_no_DELETE BEFORE DELETE ON transactions
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER entries_no_UPDATE BEFORE UPDATE ON entries
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER entries_no_DELETE BEFORE DELETE ON entries
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER bills_no_UPDATE BEFORE UPDATE ON bills
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER bills_no_DELETE BEFORE DELETE ON bills
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER receipts_no_UPDATE BEFORE UPDATE ON receipts
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER receipts_no_DELETE BEFORE DELETE ON receipts
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER receipt_lines_no_UPDATE BEFORE UPDATE ON receipt_lines
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE TRIGGER receipt_lines_no_DELETE BEFORE DELETE ON receipt_lines
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;
CREATE INDEX receipts_user ON receipts (user) WHERE user IS NOT NULL;
CREATE INDEX receipts_key ON receipts (key_id) WHERE key_id IS NOT NULL;
CREATE INDEX receipts_status ON receipts (status);
CREATE INDEX receipts_tenant ON receipts (tenant);
CREATE INDEX receipts_finished ON receipts (finished_at);
COMMIT;

BEGIN TRANSACTION;
CREATE TABLE accounts (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
) STRICT;
INSERT INTO "accounts" VALUES(1,'tenant:anonymous');
INSERT INTO "accounts" VALUES(2,'device:cpu');
INSERT INTO "accounts" VALUES(3,'vendor:cpu');
INSERT INTO "accounts" VALUES(4,'house:load');
INSERT INTO "accounts" VALUES(5,'house:warmup');
INSERT INTO "accounts" VALUES(6,'house:host_gap');
INSERT INTO "accounts" VALUES(7,'house:idle');
INSERT INTO "accounts" VALUES(8,'house:kv_free');
INSERT INTO "accounts" VALUES(9,'house:rounding');
CREATE TABLE bills (
    tx INTEGER PRIMARY KEY REFERENCES transactions,
    from_ns INTEGER NOT NULL CHECK (from_ns >= 0),
    to_ns INTEGER NOT NULL CHECK (to_ns > from_ns)
) STRICT;
INSERT INTO "bills" VALUES(9,0,6075324329);
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
CREATE TABLE coarse_until (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    hour INTEGER NOT NULL CHECK (hour >= 0),
    -- Hours from there to this one are being added, and so many of their rows are in: days', then months', each in
    -- the order of time, of dimensions by their labels, and of parties.
    adding INTEGER NOT NULL CHECK (adding >= hour),
    added INTEGER NOT NULL CHECK (added >= 0 AND (added = 0 OR adding > hour)),
    -- Rows of the month of `hour` and of later ones mean nothing and are to be deleted.
    stale INTEGER NOT NULL CHECK (stale IN (0, 1))
) STRICT;
INSERT INTO "coarse_until" VALUES(1,498720,498720,0,0);
CREATE TABLE day_rollups (
    day INTEGER NOT NULL CHECK (day >= 0), -- since 1970, UTC
    dimension INTEGER NOT NULL REFERENCES dimensions,
    sums BLOB NOT NULL,
    PRIMARY KEY (day, dimension)
) STRICT, WITHOUT ROWID;
CREATE TABLE dimension_totals (
    dimension INTEGER PRIMARY KEY REFERENCES dimensions,
    sums BLOB NOT NULL
) STRICT;
INSERT INTO "dimension_totals" VALUES(1,X'041000080000E0A0EECF02C8D8DAD302B0ABBB07A2C60700');
INSERT INTO "dimension_totals" VALUES(2,X'041000080000DEA3DBDD028794B9DE02D2DEE207E7E40700');
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
    bytes_per_block INTEGER NOT NULL CHECK (bytes_per_block >= 0),
    UNIQUE (currency, device, rate_version, tenant, key_id, team, feature, environment, cost_center, model,
            precision, endpoint, status, bytes_per_block)
) STRICT;
INSERT INTO "dimensions" VALUES(1,'USD','cpu','USD 0.1/h kv 0.2','anonymous','','red','chat','','','SmolLM2-135M-Instruct.Q4_1','Q4_1','/v1/completions','length',368640);
INSERT INTO "dimensions" VALUES(2,'USD','cpu','USD 0.1/h kv 0.2','anonymous','','blue','chat','','','SmolLM2-135M-Instruct.Q4_1','Q4_1','/v1/completions','length',368640);
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
INSERT INTO "entries" VALUES(1,1,'debit',98645527,0,98779306,2209271);
INSERT INTO "entries" VALUES(1,2,'credit',98645527,0,98779306,2209271);
INSERT INTO "entries" VALUES(2,1,'debit',111761900,0,111909570,2503025);
INSERT INTO "entries" VALUES(2,2,'credit',111761900,0,111909570,2503025);
INSERT INTO "entries" VALUES(3,1,'debit',236539021,0,237177661,5297598);
INSERT INTO "entries" VALUES(3,2,'credit',236539021,0,237177661,5297598);
INSERT INTO "entries" VALUES(4,1,'debit',257405904,0,264553887,5766060);
INSERT INTO "entries" VALUES(4,2,'credit',257405904,0,264553887,5766060);
INSERT INTO "entries" VALUES(5,1,'debit',102307365,0,102456016,2291284);
INSERT INTO "entries" VALUES(5,2,'credit',102307365,0,102456016,2291284);
INSERT INTO "entries" VALUES(6,1,'debit',88039299,0,88194350,1971739);
INSERT INTO "entries" VALUES(6,2,'credit',88039299,0,88194350,1971739);
INSERT INTO "entries" VALUES(7,1,'debit',268335402,0,268951289,6009700);
INSERT INTO "entries" VALUES(7,2,'credit',268335402,0,268951289,6009700);
INSERT INTO "entries" VALUES(8,1,'debit',274719500,0,275338000,6152678);
INSERT INTO "entries" VALUES(8,2,'credit',274719500,0,275338000,6152678);
INSERT INTO "entries" VALUES(9,2,'debit',6075324329,0,62838086912,168759009);
INSERT INTO "entries" VALUES(9,3,'credit',6075324329,0,62838086912,168759009);
INSERT INTO "entries" VALUES(10,2,'credit',4637570411,0,61390726833,136557654);
INSERT INTO "entries" VALUES(10,4,'debit',2530517573,0,0,70292154);
INSERT INTO "entries" VALUES(10,5,'debit',1581116540,0,0,43919903);
INSERT INTO "entries" VALUES(10,6,'debit',10852225,0,0,241160);
INSERT INTO "entries" VALUES(10,7,'debit',515084073,0,0,11446312);
INSERT INTO "entries" VALUES(10,8,'debit',0,0,61390726833,10658112);
INSERT INTO "entries" VALUES(10,9,'debit',0,0,0,13);
CREATE TABLE epoch_ends (
    epoch INTEGER PRIMARY KEY REFERENCES epochs,
    reason TEXT NOT NULL CHECK (reason IN ('clean', 'crash')),
    end_ns INTEGER NOT NULL CHECK (end_ns >= 0),
    ended_at INTEGER NOT NULL CHECK (ended_at >= 0)
) STRICT;
INSERT INTO "epoch_ends" VALUES(1,'clean',6075324329,1795393132827216519);
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
INSERT INTO "epochs" VALUES(1,'01a205c501647595939bed32d44659ae','cpu','cpu','a processor','USD 0.1/h kv 0.2',1795393126751885309);
CREATE TABLE methods (
    id TEXT NOT NULL PRIMARY KEY,
    json TEXT NOT NULL
) STRICT;
INSERT INTO "methods" VALUES('shapley1-42eb14277e47','{"decode":{"step":19032978000,"token":4015158175,"attention":259077450,"logits":0},"mixed":{"step":19032978000,"token":4015158175,"attention":259077450,"logits":0},"prefill":{"step":19032978000,"token":4015158175,"attention":259077450,"logits":0}}');
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
CREATE TABLE parties (
    id INTEGER PRIMARY KEY,
    user TEXT NOT NULL,
    task TEXT NOT NULL,
    UNIQUE (user, task)
) STRICT;
INSERT INTO "parties" VALUES(1,'ann','');
INSERT INTO "parties" VALUES(2,'bob','');
CREATE TABLE party_month_rollups (
    month INTEGER NOT NULL CHECK (month >= 0), -- since January 1970, UTC
    dimension INTEGER NOT NULL REFERENCES dimensions,
    party INTEGER NOT NULL REFERENCES parties,
    sums BLOB NOT NULL,
    PRIMARY KEY (month, dimension, party)
) STRICT, WITHOUT ROWID;
CREATE TABLE party_rollups (
    hour INTEGER NOT NULL CHECK (hour >= 0),
    dimension INTEGER NOT NULL REFERENCES dimensions,
    party INTEGER NOT NULL REFERENCES parties,
    sums BLOB NOT NULL,
    PRIMARY KEY (hour, dimension, party)
) STRICT, WITHOUT ROWID;
INSERT INTO "party_rollups" VALUES(498720,1,1,X'020800040000A485EA9F01E79799A001E0CFC603D5C70300');
INSERT INTO "party_rollups" VALUES(498720,1,2,X'020800040000BC9B84B001E1C0C1B301D0DBF403CDFE0300');
INSERT INTO "party_rollups" VALUES(498720,2,1,X'020800040000CF9EDEB001C9F38CB101D9DBF603DFF70300');
INSERT INTO "party_rollups" VALUES(498720,2,2,X'0208000400008F85FDAC01BEA0ACAD01F982EC0388ED0300');
CREATE TABLE pools (
    epoch INTEGER PRIMARY KEY REFERENCES epochs,
    blocks INTEGER NOT NULL CHECK (blocks >= 0),
    bytes_per_block INTEGER NOT NULL CHECK (bytes_per_block >= 0),
    since_ns INTEGER NOT NULL CHECK (since_ns >= 0)
) STRICT;
INSERT INTO "pools" VALUES(1,32,368640,4111634113);
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
INSERT INTO "receipt_lines" VALUES(1,0,'cpu','USD 0.1/h kv 0.2',98645527,0,98779306,2192122,17149);
INSERT INTO "receipt_lines" VALUES(2,0,'cpu','USD 0.1/h kv 0.2',111761900,0,111909570,2483597,19428);
INSERT INTO "receipt_lines" VALUES(3,0,'cpu','USD 0.1/h kv 0.2',236539021,0,237177661,5256422,41176);
INSERT INTO "receipt_lines" VALUES(4,0,'cpu','USD 0.1/h kv 0.2',257405904,0,264553887,5720131,45929);
INSERT INTO "receipt_lines" VALUES(5,0,'cpu','USD 0.1/h kv 0.2',102307365,0,102456016,2273497,17787);
INSERT INTO "receipt_lines" VALUES(6,0,'cpu','USD 0.1/h kv 0.2',88039299,0,88194350,1956428,15311);
INSERT INTO "receipt_lines" VALUES(7,0,'cpu','USD 0.1/h kv 0.2',268335402,0,268951289,5963008,46692);
INSERT INTO "receipt_lines" VALUES(8,0,'cpu','USD 0.1/h kv 0.2',274719500,0,275338000,6104877,47801);
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
    overrun_picos INTEGER NOT NULL DEFAULT 0 CHECK (overrun_picos >= 0)
) STRICT;
INSERT INTO "receipts" VALUES(1,'01a205c511b97343b0d379c43010f9f3',1,NULL,NULL,NULL,'anonymous','ann','{}','{"feature":"chat","team":"red"}','SmolLM2-135M-Instruct.Q4_1','Q4_1','/v1/completions','length',1,4,0,1,0,0,98645527,0,1,0,98779306,368640,1,11807566,110586872,110586872,1795393130958259970,1795393131057159005,0,0,'cpu','USD','shapley1-42eb14277e47',NULL,0);
INSERT INTO "receipts" VALUES(2,'01a205c5126f76359e8c2ab05facb464',2,NULL,NULL,NULL,'anonymous','bob','{}','{"feature":"chat","team":"red"}','SmolLM2-135M-Instruct.Q4_1','Q4_1','/v1/completions','length',1,4,0,1,0,0,111761900,0,1,0,111909570,368640,1,15679645,127589215,127589215,1795393131139124078,1795393131251152234,0,0,'cpu','USD','shapley1-42eb14277e47',NULL,0);
INSERT INTO "receipts" VALUES(3,'01a205c5130174ab81acf6a13ecffccc',3,NULL,NULL,NULL,'anonymous','ann','{}','{"feature":"chat","team":"red"}','SmolLM2-135M-Instruct.Q4_1','Q4_1','/v1/completions','length',1,4,0,3,0,0,96587216,139951805,3,0,237177661,368640,1,407897,97110995,237585558,1795393131271072318,1795393131508310419,0,0,'cpu','USD','shapley1-42eb14277e47',NULL,0);
INSERT INTO "receipts" VALUES(4,'01a205c5141b73bdb7e99e580c51a1b7',4,NULL,NULL,NULL,'anonymous','bob','{}','{"feature":"chat","team":"red"}','SmolLM2-135M-Instruct.Q4_1','Q4_1','/v1/completions','length',1,4,0,3,0,0,127034460,130371444,3,0,264553887,368640,1,621215,127779599,265175102,1795393131557565462,1795393131822186950,0,0,'cpu','USD','shapley1-42eb14277e47',NULL,0);
INSERT INTO "receipts" VALUES(5,'01a205c515637674b985cbe970b22d8f',5,NULL,NULL,NULL,'anonymous','ann','{}','{"feature":"chat","team":"blue"}','SmolLM2-135M-Instruct.Q4_1','Q4_1','/v1/completions','length',1,4,0,1,0,0,102307365,0,1,0,102456016,368640,1,1998403,104454419,104454419,1795393131879401824,1795393131981943518,0,0,'cpu','USD','shapley1-42eb14277e47',NULL,0);
INSERT INTO "receipts" VALUES(6,'01a205c515fe717b80705dd5b0c0cc3a',6,NULL,NULL,NULL,'anonymous','bob','{}','{"feature":"chat","team":"blue"}','SmolLM2-135M-Instruct.Q4_1','Q4_1','/v1/completions','length',1,4,0,1,0,0,88039299,0,1,0,88194350,368640,1,6930850,95125200,95125200,1795393132045118308,1795393132133429722,0,0,'cpu','USD','shapley1-42eb14277e47',NULL,0);
INSERT INTO "receipts" VALUES(7,'01a205c5169f76d9b5bdba10c7379381',7,NULL,NULL,NULL,'anonymous','ann','{}','{"feature":"chat","team":"blue"}','SmolLM2-135M-Instruct.Q4_1','Q4_1','/v1/completions','length',1,4,0,3,0,0,98996489,169338913,3,0,268951289,368640,1,311513,99457285,269262802,1795393132198537599,1795393132467563097,0,0,'cpu','USD','shapley1-42eb14277e47',NULL,0);
INSERT INTO "receipts" VALUES(8,'01a205c517d7775191959e5dbd3eaf3e',8,NULL,NULL,NULL,'anonymous','bob','{}','{"feature":"chat","team":"blue"}','SmolLM2-135M-Instruct.Q4_1','Q4_1','/v1/completions','length',1,4,0,3,0,0,88457992,186261508,3,0,275338000,368640,1,8726332,97336190,284064332,1795393132512976056,1795393132788467995,0,0,'cpu','USD','shapley1-42eb14277e47',NULL,0);
CREATE TABLE rollups (
    hour INTEGER NOT NULL CHECK (hour >= 0), -- of the receipts' transactions
    dimension INTEGER NOT NULL REFERENCES dimensions,
    sums BLOB NOT NULL,
    PRIMARY KEY (hour, dimension)
) STRICT, WITHOUT ROWID;
INSERT INTO "rollups" VALUES(498720,1,X'041000080000E0A0EECF02C8D8DAD302B0ABBB07A2C60700');
INSERT INTO "rollups" VALUES(498720,2,X'041000080000DEA3DBDD028794B9DE02D2DEE207E7E40700');
CREATE TABLE transactions (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('receipt', 'house', 'bill')),
    epoch INTEGER NOT NULL REFERENCES epochs,
    hour INTEGER NOT NULL CHECK (hour >= 0), -- clock hour since 1970
    wall INTEGER NOT NULL CHECK (wall >= 0)
) STRICT;
INSERT INTO "transactions" VALUES(1,'receipt',1,498720,1795393131069763045);
INSERT INTO "transactions" VALUES(2,'receipt',1,498720,1795393131251385581);
INSERT INTO "transactions" VALUES(3,'receipt',1,498720,1795393131508539590);
INSERT INTO "transactions" VALUES(4,'receipt',1,498720,1795393131857031355);
INSERT INTO "transactions" VALUES(5,'receipt',1,498720,1795393131986550481);
INSERT INTO "transactions" VALUES(6,'receipt',1,498720,1795393132168721574);
INSERT INTO "transactions" VALUES(7,'receipt',1,498720,1795393132467770987);
INSERT INTO "transactions" VALUES(8,'receipt',1,498720,1795393132796654763);
INSERT INTO "transactions" VALUES(9,'bill',1,498720,1795393132827216519);
INSERT INTO "transactions" VALUES(10,'house',1,498720,1795393132827216519);
CREATE INDEX closes_by_epoch ON transactions (epoch) WHERE kind <> 'receipt';
CREATE UNIQUE INDEX receipts_idempotency ON receipts (coalesce(key_id, ''), idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX dimensions_key ON dimensions (key_id);
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

-- Coarse roll-ups: what the hourly ones come to, so that long reports read few rows. They cover the clock hours
-- before `coarse_until`, to which nothing is added any more, so that what a row carries of the house is known too.
-- A wall clock that was set back takes months off their end. The audit compares them with the hourly ones.
-- `sums`: as in `rollups`, with a thirteenth number: the house's money that the row carries.

CREATE TABLE day_rollups (
    day INTEGER NOT NULL CHECK (day >= 0), -- since 1970, UTC
    dimension INTEGER NOT NULL REFERENCES dimensions,
    sums BLOB NOT NULL,
    PRIMARY KEY (day, dimension)
) STRICT, WITHOUT ROWID;

-- Of lines with a user or a task; what the days of a month have beyond these has neither.
CREATE TABLE party_month_rollups (
    month INTEGER NOT NULL CHECK (month >= 0), -- since January 1970, UTC
    dimension INTEGER NOT NULL REFERENCES dimensions,
    party INTEGER NOT NULL REFERENCES parties,
    sums BLOB NOT NULL,
    PRIMARY KEY (month, dimension, party)
) STRICT, WITHOUT ROWID;

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
INSERT INTO coarse_until (id, hour, adding, added, stale) VALUES (1, 0, 0, 0, 0);

-- What clients asked to be kept: what they said and what was answered, as JSON texts. Everything here goes after its
-- time; nothing else refers to it.

CREATE TABLE responses (
    -- In the order in which they were kept.
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    -- Who alone may see it.
    owner TEXT NOT NULL,
    -- The id of the one that it goes on from, which may be gone.
    previous TEXT,
    -- Unix nanoseconds.
    created INTEGER NOT NULL CHECK (created >= 0),
    bytes INTEGER NOT NULL CHECK (bytes > 0),
    input TEXT NOT NULL,
    response TEXT NOT NULL
) STRICT;

-- With the sizes, so that a start adds them up without reading the texts.
CREATE INDEX responses_by_age ON responses (created, bytes);

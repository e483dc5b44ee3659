-- Where the windows of budgets will probably end, as the server that runs, or ran last, says. Since version 3.

CREATE TABLE foreseen (
    budget TEXT NOT NULL,
    -- Whose: a value of the budget's scope.
    value TEXT NOT NULL,
    -- When the window ends, and when this was said: Unix nanoseconds.
    window_end INTEGER NOT NULL CHECK (window_end >= 0),
    at INTEGER NOT NULL CHECK (at >= 0),
    -- Decimal units of the currency.
    expected TEXT NOT NULL,
    low TEXT NOT NULL,
    high TEXT NOT NULL,
    PRIMARY KEY (budget, value)
) STRICT, WITHOUT ROWID;
